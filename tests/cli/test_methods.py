"""``distillm methods``: the registry as a person and a script see it."""

import json
import sys

import pytest

from distillm_cli.cli import app as program
from distillm_cli.config.explain import choices
from distillm_cli.config.load import resolve
from distillm_cli.config.methods import METHODS
from tests.typed import flags


@pytest.fixture
def run(capfd):
    def call(*argv: str) -> tuple[int, str, str]:
        code = program.main(list(argv))
        sys.stdout.flush()
        return code, *capfd.readouterr()

    return call


def test_the_table_has_a_line_for_every_method(run):
    code, out, err = run("methods")
    rows = [line.split("\t") for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert [row[0] for row in rows] == list(METHODS)
    assert {len(row) for row in rows} == {5}
    told = {row[0]: row[1:] for row in rows}
    assert told["ab"] == ["ABKD, Wang et al. 2025 (2505.04560)", "ab α=0.2 β=0.7", "data set rows", "rows, teacher"]
    assert told["distillm"][1:3] == ["skl α=0.1", "data set rows, rollouts, replay"]
    assert told["sft"][1:] == ["cross-entropy", "data set rows", "rows"]


def test_the_table_is_an_object_on_request(run):
    code, out, _ = run("methods", "--json")
    told = json.loads(out)
    assert (code, told["command"], told["status"]) == (0, "methods", "ok")
    assert [row["name"] for row in told["methods"]] == list(METHODS)
    assert all(row["needs"] and row["summary"] and row["verb"] in ("sft", "distill") for row in told["methods"])


@pytest.mark.parametrize("name", METHODS)
def test_show_tells_all_that_a_method_sets_and_reads_and_how_to_run_it(run, name):
    method = METHODS[name]
    code, out, _ = run("methods", "show", name)
    assert code == 0
    assert out.startswith(f"{name}: {method.summary}\n")
    assert method.paper in out
    code, text, _ = run("methods", "show", name, "--json")
    told = json.loads(text)["method"]
    assert set(method.preset) <= set(told["parameters"])
    for key, parameter in told["parameters"].items():
        assert f"  {key} = " in out
        assert parameter["means"]
        assert (parameter["from"] == f"method {name}") == (key in method.preset)
        if key in method.preset:
            assert parameter["value"] == method.preset[key]
    program_name, verb, *words = told["example"].split()
    given = dict(zip(words[::2], words[1::2], strict=True))
    resolved = resolve(
        command=verb, recipe=given["--recipe"], flags={"method": given["--method"]} if "--method" in given else {}
    )
    assert (program_name, verb, resolved.recipe.method) == ("distillm", method.verb, name)


def test_the_parameters_of_a_method_are_its_own(run):
    def own(name):
        told = json.loads(run("methods", "show", name, "--json")[1])["method"]["parameters"]
        return {key.removeprefix("objective.") for key in told if key.startswith("objective.")} - {"divergence"}

    assert own("kd") == set()
    assert own("ab") == {"ab_alpha", "ab_beta"}
    assert own("amid") == {"amid_a", "amid_lambda", "amid_divergence", "amid_from"}
    assert own("taid") == {"taid_start", "taid_rate", "taid_momentum"}
    assert own("distillm") == {"alpha"}


def test_an_unknown_method_is_told_the_nearest(run):
    code, out, err = run("methods", "show", "distilm")
    assert (code, out) == (2, "")
    assert err == (f"error: no method named distilm; methods: {', '.join(METHODS)}; did you mean distillm?\n")


def test_the_help_of_distill_names_every_method_divergence_and_schedule(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    words = run("distill", "--help")[1].replace(",", " ").replace(".", " ").split()
    assert "sft," not in run("distill", "--help")[1], "a method of another command"
    assert (set(METHODS) - {"sft"}) | set(choices("objective.divergence")) | set(choices("schedule.kind")) <= set(words)
    assert flags(schedule="mixed")["schedule.kind"].name == "--schedule"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("distill --method ", [name for name in METHODS if name != "sft"]),
        ("plan --method dis", ["distillm", "distillm2"]),
        ("distill --divergence j", ["jsd", "jeffreys"]),
        ("distill --schedule a", ["annealed", "adaptive"]),
        ("distill --recipe quick", ["quickstart", "quickstart-pipeline", "quickstart-teacher"]),
        ("run quick", ["quickstart-pipeline"]),
        ("recipes show quickstart-", ["quickstart-pipeline", "quickstart-teacher"]),
        ("recipes cp iw", ["iwslt-mt5"]),
        ("recipes validate iw", ["iwslt-mt5"]),
        ("methods show ta", ["taid"]),
        ("eval o --suite s", ["self-inst", "sni", "samsum"]),
        ("eval o --suite dolly,un", ["dolly,unni"]),
        ("eval o --metric rouge_", ["rouge_l", "rouge_1", "rouge_2"]),
        ("distill --data s", ["self-inst", "sni", "samsum"]),
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
def test_a_shell_is_told_what_may_follow(run, monkeypatch, line, offered):
    """As bash asks once --install-completion has been typed."""
    words = f"distillm {line}"
    monkeypatch.setenv("_DISTILLM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - (not words.endswith(" "))))
    code, out, err = run()
    assert (code, out.split(), err) == (0, offered, "")
