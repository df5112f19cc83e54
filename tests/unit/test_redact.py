"""Test that credentials in URLs are printed and written nowhere."""

import pytest
import yaml

from distillm_cli.cli.app import main
from distillm_cli.config.derived import fixed_values
from distillm_cli.config.load import resolve, to_yaml
from distillm_cli.errors import DataError
from distillm_cli.runs import output_dir
from distillm_cli.training.events import Note, Warned
from distillm_cli.ui.console import console
from distillm_cli.utils.text import redact

URL = "https://bob:hunter2@host.example/rows.jsonl?x=1&access_token=s3cr3t"
SECRETS = ("bob", "hunter2", "s3cr3t")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (URL, "https://***@host.example/rows.jsonl?x=1&access_token=***"),
        ("no rows at https:/bob:hunter2@host/x; check", "no rows at https:/***@host/x; check"),
        ("s3://AKIA:p@ss@bucket/k", "s3://***@bucket/k"),
        ("hf://token@host", "hf://***@host"),
        (
            "https://h/x?X-Amz-Signature=ab%2F&Expires=9&sig=q#top",
            "https://h/x?X-Amz-Signature=***&Expires=9&sig=***#top",
        ),
        ('{"a": "https://u:p@h/x?password=y", "b": "c@d"}', '{"a": "https://***@h/x?password=***", "b": "c@d"}'),
        ("https://host/@name/x and bob@host", "https://host/@name/x and bob@host"),
        ("C:/data/a@b.jsonl --set train.lr=1", "C:/data/a@b.jsonl --set train.lr=1"),
        ("objective.alpha = 2; expected key=value", "objective.alpha = 2; expected key=value"),
    ],
)
def test_redact_hides_only_credentials(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


COMMANDS = [
    ["distill", "--recipe", "quickstart", "--data", URL, "--dry-run"],
    ["distill", "--recipe", "quickstart", "--data", URL, "--json"],
    ["distill", "--recipe", "quickstart", "--data", URL, "--debug"],
    ["plan", "--recipe", "quickstart", "--data", URL, "--json"],
    ["generate", "--model", "builtin", "--input", URL],
    ["generate", "--model", URL, "--prompt", "hi"],
    ["eval", "builtin", "--suite", URL],
    ["distill", "--teacher", URL, "--student", "random:1x16", "--data", "builtin"],
    ["distill", "--recipe", "quickstart", "--set", f"train.lr={URL}"],
    ["distill", "--recipe", "quickstart", "--set", f"train.lr=https://{'b' * 40}:hunter2{'x' * 80}@host/"],
    ["distill", "--recipe", "quickstart", URL],
    ["recipes", "validate", URL],
    ["run", URL],
]


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: " ".join(argv)[:40])
def test_no_command_prints_credentials(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(argv)
    out, err = capsys.readouterr()
    assert code in (0, 2, 3, 4)
    assert "host" in out + err or "https" in out + err, "the test needs output that mentions the URL"
    assert not [secret for secret in SECRETS if secret in out + err]
    assert not [path for path in tmp_path.rglob("*") if any(secret in path.name for secret in SECRETS)]


def test_events_are_shown_without_credentials(capsys):
    with console() as ui:
        ui(Note(f"reading {URL}"))
        ui(Warned(f"skipped {URL}"))
    err = capsys.readouterr().err
    assert err.count("***@host.example") == 2
    assert not [secret for secret in SECRETS if secret in err]
    assert "hunter2" not in str(DataError("data.not_found", f"no {URL}", where=URL, hint=f"see {URL}"))


def test_recipe_is_saved_without_credentials():
    resolved = resolve(command="distill", recipe="quickstart", sets=[f"data.source='{URL}'"])
    text = to_yaml(resolved)
    assert not [secret for secret in SECRETS if secret in text + str(fixed_values(resolved.recipe))]
    assert yaml.safe_load(text)["data"]["source"] == redact(URL)
    assert "credentials" in text.splitlines()[0] + text.splitlines()[1]
    assert resolved.recipe.data.source == URL, "the run itself needs the credentials"
    assert "credentials" not in to_yaml(resolve(command="distill", recipe="quickstart"))


def test_output_name_has_no_credentials():
    name = str(output_dir.default_name(None, URL, "https://bob:hunter2@host", "kd", resume=False))
    assert not [secret for secret in SECRETS if secret in name]
