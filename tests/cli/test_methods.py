"""Check ``distillm methods``, and shell completion."""

import json
import sys

import pytest

from distillm_cli.cli import app as program
from distillm_cli.config.explain import choices
from distillm_cli.config.load import resolve
from distillm_cli.config.methods import METHODS
from tests.command_line import assert_error_line, flags


@pytest.fixture
def run(capfd):
    def call(*argv: str) -> tuple[int, str, str]:
        code = program.main(list(argv))
        sys.stdout.flush()
        return code, *capfd.readouterr()

    return call


def test_table_has_a_line_for_every_method(run):
    code, out, err = run("methods")
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [row[0] for row in rows] == list(METHODS)
    assert {len(row) for row in rows} == {5}
    columns = {row[0]: row[1:] for row in rows}
    assert columns["ab"] == ["ABKD, Wang et al. 2025 (2505.04560)", "ab α=0.2 β=0.7", "data set rows", "rows, teacher"]
    assert columns["distillm"][1:3] == ["skl α=0.1", "data set rows, rollouts, replay"]
    assert columns["sft"][1:] == ["cross-entropy", "data set rows", "rows"]


def test_table_as_json(run):
    code, out, _ = run("methods", "--json")
    result = json.loads(out)
    assert (code, result["command"], result["status"]) == (0, "methods", "ok")
    assert [row["name"] for row in result["methods"]] == list(METHODS)
    assert all(row["needs"] and row["summary"] and row["verb"] in ("sft", "distill") for row in result["methods"])


@pytest.mark.parametrize("name", METHODS)
def test_show_prints_preset_parameters_and_example(run, name):
    method = METHODS[name]
    code, out, _ = run("methods", "show", name)
    assert code == 0
    assert out.startswith(f"{name}: {method.summary}\n")
    assert method.paper in out
    code, text, _ = run("methods", "show", name, "--json")
    shown = json.loads(text)["method"]
    assert set(method.preset) <= set(shown["parameters"])
    for key, parameter in shown["parameters"].items():
        assert f"  {key} = " in out
        assert parameter["means"]
        assert (parameter["from"] == f"method {name}") == (key in method.preset)
        if key in method.preset:
            assert parameter["value"] == method.preset[key]
    program_name, verb, *words = shown["example"].split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    resolved = resolve(
        command=verb, recipe=given["--recipe"], flags={"method": given["--method"]} if "--method" in given else {}
    )
    assert (program_name, verb, resolved.recipe.method) == ("distillm", method.verb, name)


def test_parameters_are_those_the_method_uses(run):
    def objective_fields(name):
        parameters = json.loads(run("methods", "show", name, "--json")[1])["method"]["parameters"]
        return {key.removeprefix("objective.") for key in parameters if key.startswith("objective.")} - {"divergence"}

    assert objective_fields("kd") == set()
    assert objective_fields("ab") == {"ab_alpha", "ab_beta"}
    assert objective_fields("amid") == {"amid_a", "amid_lambda", "amid_divergence", "amid_from"}
    assert objective_fields("taid") == {"taid_start", "taid_rate", "taid_momentum"}
    assert objective_fields("distillm") == {"alpha"}


def test_unknown_method_suggests_nearest(run):
    outcome = run("methods", "show", "distilm", "--debug")
    assert outcome[1] == ""
    assert_error_line(outcome, "usage.unknown_method", "distilm;", "distillm?", *METHODS)


def test_distill_help_lists_methods_divergences_schedules(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = run("distill", "--help")[1].replace(",", " ").replace(".", " ").split()
    assert "sft," not in run("distill", "--help")[1], "sft belongs to another command"
    assert (set(METHODS) - {"sft"}) | set(choices("objective.divergence")) | set(choices("schedule.kind")) <= set(words)
    assert flags(schedule="mixed")["schedule.kind"].name == "--schedule"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("distill --method ", [name for name in METHODS if name != "sft"]),
        ("plan --method dis", ["distillm", "distillm2", "disco"]),
        ("distill --divergence j", ["jsd", "jeffreys"]),
        ("distill --schedule a", ["annealed", "adaptive", "auto"]),
        ("distill --recipe quick", ["quickstart", "quickstart-pipeline", "quickstart-teacher"]),
        ("run quick", ["quickstart-pipeline"]),
        ("recipes show quickstart-", ["quickstart-pipeline", "quickstart-teacher"]),
        ("recipes cp iw", ["iwslt-mt5"]),
        ("recipes validate iw", ["iwslt-mt5"]),
        ("methods show ta", ["taid"]),
        ("eval o --suite s", ["self-inst", "sni", "samsum", "stsb"]),
        ("eval o --suite dolly,un", ["dolly,unni"]),
        ("eval o --metric rouge_", ["rouge_l", "rouge_1", "rouge_2"]),
        ("distill --data s", ["self-inst", "sni", "samsum", "stsb"]),
        ("distill --dtype b", ["bf16"]),
        ("distill --device c", ["cpu", "cuda", "cuda:1"]),
        ("distill --teacher-cache ", ["auto", "memory", "disk", "off"]),
        ("distill --lr a", ["auto"]),
        ("eval o --template ch", ["chat"]),
        ("generate --data gs", ["gsm8k"]),
        ("distill --set train.lr", ["train.lr=", "train.lr_schedule="]),
        ("distill --set train.lr_schedule=c", ["train.lr_schedule=cosine", "train.lr_schedule=constant"]),
        ("run quickstart-pipeline --set defaults.schedule.k", ["defaults.schedule.kind="]),
        ("pl", ["plan"]),
    ],
)
def test_shell_completion(run, monkeypatch, line, offered):
    """Check what bash offers after ``distillm --install-completion``."""
    words = f"distillm {line}"
    monkeypatch.setenv("_DISTILLM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - (not words.endswith(" "))))
    code, out, err = run()
    assert (code, out.split(), err) == (0, offered, "")
