"""Test suites as files: what they set, what the command overrides, and errors."""

from __future__ import annotations

import json

import pytest

from distillm_cli.config.schema import EvalConfig, Recipe
from distillm_cli.config.suite_file import read_suite_file, shipped_suites, suite_path
from distillm_cli.evaluation.suites import load_suite
from tests.codes import raises_code

SUITE = """\
source: rows.jsonl
license: CC0-1.0
template: plain
metrics: [exact_match, length]
seeds: [1, 2]
limit: 2
generation: {temperature: 0.5, max_new_tokens: 7}
"""


@pytest.fixture
def suite(tmp_path):
    rows = [{"instruction": f"say {i}", "output": "x"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text(SUITE, encoding="utf-8")
    return path


def test_suite_file_sets_rows_and_settings(suite, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    loaded = load_suite(str(suite), Recipe())
    assert (loaded.name, len(loaded.rows), loaded.license) == ("mine", 2, "CC0-1.0")
    config = loaded.config(EvalConfig(greedy=True))
    assert (config.metrics, config.seeds, config.greedy) == (("exact_match", "length"), (1, 2), False)
    assert (config.temperature, config.max_new_tokens, config.top_p) == (0.5, 7, 1.0)
    assert loaded.template("auto") == "plain"


def test_settings_by_hand_override_the_file(suite):
    loaded = load_suite(str(suite), Recipe(eval=EvalConfig(limit=3)))
    assert len(loaded.rows) == 3
    assert loaded.config(EvalConfig(limit=3)).limit == 3
    own = EvalConfig(metrics=("bleu",), max_new_tokens=99)
    config = loaded.config(own, {"eval.metrics", "eval.max_new_tokens", "eval.greedy"})
    assert (config.metrics, config.max_new_tokens, config.temperature) == (("bleu",), 99, 0.5)
    assert loaded.template("chat", {"data.template"}) == "chat"


@pytest.mark.parametrize("name", shipped_suites())
def test_shipped_suite_is_valid(name):
    suite = read_suite_file(suite_path(name))
    assert suite.license
    assert suite.description
    suite.config(EvalConfig())


@pytest.mark.parametrize(
    ("line", "mention"),
    [
        ("colour: red", "colour"),
        ("metrics: [rouge_x]", "rouge_x"),
        ("generation: {temperatur: 1}", "generation.temperatur"),
        ("generation: {temperature: -1}", "temperature"),
        ("template: fancy", "template"),
        ("seeds: []", "seeds"),
        ("source: mine.yaml", "mine.yaml"),
    ],
)
def test_wrong_key_or_value_is_named(suite, line, mention):
    key = line.partition(":")[0]
    kept = [text for text in SUITE.splitlines() if not text.startswith(key)]
    suite.write_text("\n".join([*kept, line]), encoding="utf-8")
    with raises_code("data.invalid_suite", str(suite), mention):
        read_suite_file(suite)


def test_absent_suite_file_is_named(tmp_path):
    with raises_code("data.not_found", "absent.yaml", "--list"):
        load_suite(str(tmp_path / "absent.yaml"), Recipe())


def test_suite_of_pairs_takes_no_generation(suite):
    pair = {"sentence1": "a", "sentence2": "b", "score": 1}
    (suite.parent / "rows.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    with raises_code("data.invalid_suite", "sentence pairs"):
        load_suite(str(suite), Recipe())
