"""Test suites, passes, scores and result files with a deterministic tiny model."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from distillm_cli.config.schema import ColumnsConfig, DataConfig, EvalConfig, Recipe
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Row, load_rows
from distillm_cli.evaluation.evaluate import evaluate_suite, passes
from distillm_cli.evaluation.results import check_results_writable, save_results, settings_label
from distillm_cli.evaluation.suites import Suite, distinct, held_out, load_suite, load_suites, short_name
from distillm_cli.models.backbone import Backbone
from distillm_cli.plugins import metrics
from distillm_cli.runs.report import Report
from distillm_cli.training.events import Progress, Warned, silent
from tests import tiny
from tests.codes import raises_code
from tests.scores import corpus

WORDS = ["abc", "hello", "a", "sevenletters", "xyz", "qrs", "model", "te", "student", "u", "vw", "teacher"]


@pytest.fixture(scope="module")
def model() -> Backbone:
    tokenizer = tiny.tokenizer()
    return Backbone(tiny.model("gpt2", len(tokenizer), spread=2.0), tokenizer)


@pytest.fixture(scope="module")
def encoder(model) -> Encoder:
    return Encoder(model.tokenizer, DataConfig(template="plain"))


def suite_of(*references: tuple[str, ...]) -> Suite:
    rows = [
        Row(prompt=word, references=refs, where=f"test.jsonl:{i}", task=("short", "long")[len(word) > 3])
        for i, (word, refs) in enumerate(zip(WORDS, references or [("a",)] * len(WORDS), strict=False), start=1)
    ]
    return Suite("words", rows, "test.jsonl")


def config(**fields) -> EvalConfig:
    return EvalConfig(
        **{"max_new_tokens": 12, "batch_size": 4, "metrics": ("rouge_l", "exact_match", "error_rate"), **fields}
    )


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_model_that_matches_references_gets_full_scores(model, encoder):
    outputs = evaluate_suite(model, encoder, suite_of(), config(greedy=True)).outputs["greedy"]
    assert not any("<eos>" in text or "<pad>" in text for text in outputs), "special tokens are not part of the text"
    suite = suite_of(*[("never this", text) for text in outputs])
    result = evaluate_suite(model, encoder, suite, config(greedy=True))
    assert result.scores["exact_match"].mean == 100
    assert result.scores["error_rate"].mean == 0
    assert result.scores["rouge_l"].seeds == {"greedy": pytest.approx(100)}
    assert result.scores["rouge_l"].sd == 0


def test_scores_of_seeds_have_mean_and_deviation(model, encoder):
    suite = suite_of(*[(f"{word} a b c", "e d") for word in WORDS])
    result = evaluate_suite(model, encoder, suite, config(seeds=(10, 20, 30)))
    assert list(result.outputs) == ["10", "20", "30"]
    assert len({tuple(texts) for texts in result.outputs.values()}) == 3
    references = [row.references for row in suite.rows]
    expected = [corpus("error_rate", texts, references) for texts in result.outputs.values()]
    assert list(result.scores["error_rate"].seeds.values()) == pytest.approx(expected)
    assert result.scores["error_rate"].mean == pytest.approx(sum(expected) / 3)
    assert result.scores["error_rate"].sd == pytest.approx(statistics.stdev(expected))
    answers = [answer for seed_answers in result.answers.values() for answer in seed_answers]
    assert result.tokens == sum(answer.tokens for answer in answers)
    assert result.complete == sum(answer.complete for answer in answers) / 36
    assert 0 < result.entropy < 4


def test_corpus_metrics_are_computed_per_pass_and_task(model, encoder, tmp_path):
    suite = suite_of(*[(f"{word} a b c", "e d a") for word in WORDS])
    result = evaluate_suite(model, encoder, suite, config(seeds=(10, 20, 30), metrics=("chrf", "bleu", "rouge_1")))
    references = [row.references for row in suite.rows]
    expected = [corpus("chrf", texts, references) for texts in result.outputs.values()]
    score = result.scores["chrf"]
    assert list(score.seeds.values()) == pytest.approx(expected)
    assert (score.mean, score.sd) == (
        pytest.approx(statistics.fmean(expected)),
        pytest.approx(statistics.stdev(expected)),
    )
    picked = [i for i, row in enumerate(suite.rows) if row.task == "long"]
    part = corpus("chrf", [result.outputs["20"][i] for i in picked], [references[i] for i in picked])
    assert result.tasks["long"]["chrf"].seeds["20"] == pytest.approx(part)
    report = result.as_json()
    assert report["bleu"]["signature"].startswith("nrefs:var|")
    assert "signature" not in report["rouge_1"]
    directory = save_results(result, tmp_path)
    lines = [json.loads(line) for line in (directory / "predictions-seed20.jsonl").read_text().splitlines()]
    assert [line["chrf"] for line in lines] == pytest.approx(
        [metrics["chrf"].score(line["output"], line["references"]) for line in lines]
    )
    assert set(lines[0]) >= {"bleu", "rouge_1"}


def test_undefined_metric_is_null_with_a_reason(model, encoder, tmp_path):
    suite = suite_of(("红色",), ("今天天气不错。",))
    result = evaluate_suite(model, encoder, suite, config(metrics=("rouge_l", "chrf"), seeds=(10, 20)))
    report = result.as_json()
    assert (report["rouge_l"]["mean"], report["rouge_l"]["seeds"]) == (None, {"10": None, "20": None})
    assert "rouge_tokenizer=characters" in report["rouge_l"]["undefined"]
    assert report["chrf"]["mean"] is not None
    directory = save_results(result, tmp_path)
    (first, _) = (directory / "predictions-seed10.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(first)["rouge_l"] is None
    characters = config(metrics=("rouge_l",), rouge_tokenizer="characters")
    assert evaluate_suite(model, encoder, suite, characters).scores["rouge_l"].mean is not None


def test_outputs_depend_only_on_seed_and_row(model, encoder):
    one = evaluate_suite(model, encoder, suite_of(), config(seeds=(10,)))
    other = evaluate_suite(model, encoder, suite_of(), config(seeds=(20, 10), batch_size=12))
    assert one.outputs["10"] == other.outputs["10"], "batch size and other seeds have no effect"
    first = suite_of().select(range(3))
    assert evaluate_suite(model, encoder, first, config(seeds=(10,))).outputs["10"] == one.outputs["10"][:3]


def test_passes_are_seeds_or_greedy():
    assert [(name, seed) for name, seed, _ in passes(EvalConfig())] == [(str(s), s) for s in (10, 20, 30, 40, 50)]
    assert [name for name, _, _ in passes(EvalConfig(seeds=(1, 1, 2)))] == ["1", "2"]
    for greedy in (EvalConfig(greedy=True), EvalConfig(temperature=0)):
        ((name, _, sampling),) = passes(greedy)
        assert (name, sampling.temperature) == ("greedy", 0)
    _, _, sampling = passes(EvalConfig(top_p=0.9, top_k=5, temperature=0.5))[0]
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.no_repeat_ngram_size) == (0.5, 0.9, 5, 6)


def test_tasks_are_scored_separately(model, encoder):
    result = evaluate_suite(model, encoder, suite_of(*[("a b",)] * len(WORDS)), config(seeds=(10, 20)))
    assert set(result.tasks) == {"short", "long"}
    picked = [i for i, row in enumerate(result.suite.rows) if row.task == "long"]
    expected = corpus("rouge_l", [result.outputs["20"][i] for i in picked], [("a b",)] * len(picked))
    assert result.tasks["long"]["rouge_l"].seeds["20"] == pytest.approx(expected)


def test_prompt_as_long_as_the_context_is_rejected(model, encoder):
    suite = suite_of()
    suite = replace(suite, rows=[*suite.rows, Row(prompt="x" * tiny.CONTEXT, references=("a",), where="test.jsonl:99")])
    with raises_code("data.row_too_long", "test.jsonl:99", "64 tokens", "64 positions"):
        evaluate_suite(model, encoder, suite, config(greedy=True))
    events = []
    result = evaluate_suite(model, encoder, suite, config(greedy=True), events.append, skip_long=True)
    assert len(result.suite.rows) == len(WORDS) == result.as_json()["rows"]
    assert any(isinstance(event, Warned) and "test.jsonl:99" in event.text for event in events)


def test_response_ends_at_the_context(model, encoder):
    rows = [Row(prompt="x" * (tiny.CONTEXT - 2), references=("a",), where="t:1")]
    result = evaluate_suite(model, encoder, Suite("long", rows, "t"), config(greedy=True))
    assert result.answers["greedy"][0].tokens <= 2


def test_progress_is_reported_per_pass(model, encoder):
    events = []
    evaluate_suite(model, encoder, suite_of(), config(seeds=(10, 20)), events.append)
    ended = [event.task for event in events if isinstance(event, Progress) and event.done == event.total]
    assert ended == ["words, seed 10", "words, seed 20"]


# -------------------------------------------------------------------------------------------------------------- suites


def test_suite_is_a_file_directory_or_dataset_name(tmp_path, monkeypatch):
    row = {"instruction": "say a", "output": ["a", "A"]}
    write(tmp_path / "sni" / "valid.jsonl", row, row)
    write(tmp_path / "own" / "test.jsonl", row)
    write(tmp_path / "own" / "train.jsonl", *[row] * 40)
    monkeypatch.setenv("DISTILLM_DATA", str(tmp_path))
    named = load_suite("sni", Recipe())
    assert (named.name, len(named.rows), named.rows[0].references) == ("sni", 2, ("a", "A"))
    for source, name in ((tmp_path / "own", "own"), (tmp_path / "own" / "test.jsonl", "own-test")):
        suite = load_suite(str(source), Recipe())
        assert (suite.name, len(suite.rows)) == (name, 1)
    # The settings of the training data do not apply to the suite.
    training = Recipe(
        data=DataConfig(source="own", limit=1, columns=ColumnsConfig(prompt="q")), eval=EvalConfig(limit=1)
    )
    assert len(load_suite("sni", training).rows) == 1


@pytest.mark.parametrize(
    ("name", "record", "instruction", "material", "reference"),
    [
        ("samsum", {"id": "1", "dialogue": "A: hi", "summary": "Hi."}, "Summarize the conversation.", "A: hi", "Hi."),
        ("xsum", {"document": "Long.", "summary": "Short."}, "Summarize the article in one sentence.", "Long.", "Short."),
        ("wmt14-de-en", {"translation": {"de": "Hund", "en": "dog"}}, "Translate German to English.", "Hund", "dog"),
        ("wmt14-en-de", {"translation": {"de": "Hund", "en": "dog"}}, "Translate English to German.", "dog", "Hund"),
        ("iwslt", {"de": "Hund", "en": "dog"}, "Translate English to German.", "dog", "Hund"),
        ("gsm8k", {"question": "1 + 1?", "answer": "2\n#### 2"}, "1 + 1?", "", "2\n#### 2"),
        ("samsum", {"instruction": "Sum up.", "input": "x", "output": "y"}, "Sum up.", "x", "y"),
    ],
)  # fmt: skip
def test_known_dataset_has_its_own_columns(name, record, instruction, material, reference, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLM_DATA", str(tmp_path))
    write(tmp_path / name / "test.jsonl", record)
    # Column names for the recipe's own data do not apply to the suite.
    (row,) = load_suite(name, Recipe(data=DataConfig(columns=ColumnsConfig(prompt="ask")))).rows
    assert (row.instruction, row.input, row.references) == (instruction, material, (reference,))


def test_columns_override_those_of_a_known_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLM_DATA", str(tmp_path))
    write(tmp_path / "samsum" / "train.jsonl", *[{"dialogue": f"d{i}", "summary": "s", "title": "t"} for i in range(3)])
    columns = ColumnsConfig(prompt="dialogue", response="title")
    row = load_rows(DataConfig(source="samsum", columns=columns, valid="builtin"), "train")[0]
    assert (row.instruction, row.references) == ("d0", ("t",))


def test_builtin_rows_have_their_task():
    suite = load_suite("builtin", Recipe(eval=EvalConfig(limit=30)))
    assert (suite.name, len(suite.rows)) == ("builtin", 30)
    assert len({row.task for row in suite.rows}) >= 8


def test_held_out_rows_are_used_without_suites(tmp_path):
    write(tmp_path / "own" / "train.jsonl", *[{"prompt": f"p{i}", "output": "a"} for i in range(10)])
    write(tmp_path / "own" / "dev.jsonl", *[{"prompt": f"d{i}", "output": "a"} for i in range(5)])
    recipe = Recipe(data=DataConfig(source=str(tmp_path / "own"), valid_limit=3))
    (suite,) = load_suites(recipe)
    assert [row.prompt for row in suite.rows] == ["d0", "d1", "d2"]
    assert suite == held_out(recipe)


def test_duplicate_suite_names_get_a_number(tmp_path):
    suites = [Suite("test", [], "a"), Suite("test", [], "b"), Suite("dolly", [], "c"), Suite("test", [], "d")]
    assert [suite.name for suite in distinct(suites)] == ["test", "test-2", "dolly", "test-3"]
    assert [short_name(name) for name in ("dolly", "MiniLLM/dolly")] == ["dolly", "MiniLLM-dolly"]
    for name, short in {"answers.jsonl.gz": "answers", "test.csv.zst": f"{tmp_path.name}-test"}.items():
        (tmp_path / name).touch()
        assert short_name(str(tmp_path / name)) == short


def test_missing_suite_is_rejected(monkeypatch):
    monkeypatch.delenv("DISTILLM_DATA", raising=False)
    with raises_code("data.not_found", "DISTILLM_DATA"):
        load_suite("unni", Recipe())


def test_real_suites_load(shared_data, monkeypatch):
    monkeypatch.setenv("DISTILLM_DATA", str(shared_data))
    recipe = Recipe(eval=EvalConfig(suites=("dolly", "self-inst", "vicuna", "sni")))
    suites = {suite.name: suite.rows for suite in load_suites(recipe)}
    assert {name: len(rows) for name, rows in suites.items()} == {
        "dolly": 500,
        "self-inst": 242,
        "vicuna": 80,
        "sni": 1694,
    }
    assert all(row.prompt.endswith("### Response:\n") for rows in suites.values() for row in rows)
    assert any(len(row.references) > 1 for row in suites["sni"])


# --------------------------------------------------------------------------------------------------------------- files


def test_results_match_the_stored_predictions(model, encoder, tmp_path):
    result = evaluate_suite(model, encoder, suite_of(*[("a b", "c")] * 12), config(seeds=(10, 20)))
    directory = save_results(result, tmp_path / "eval", {"model": "tiny"})
    assert directory == tmp_path / "eval" / "words" / "t1-n12-plain"
    assert sorted(path.name for path in directory.iterdir()) == [
        "manifest.json",
        "predictions-seed10.jsonl",
        "predictions-seed20.jsonl",
        "results.json",
    ]
    report = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    assert report["model"] == "tiny"
    assert report["settings"]["seeds"] == [10, 20]
    assert report["rouge_l"] == result.as_json()["rouge_l"]
    lines = [
        json.loads(line) for line in (directory / "predictions-seed20.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["prompt"] for line in lines] == WORDS
    assert sum(line["rouge_l"] for line in lines) / 12 == pytest.approx(report["rouge_l"]["seeds"]["20"])
    recomputed = corpus("error_rate", [line["output"] for line in lines], [line["references"] for line in lines])
    assert recomputed == pytest.approx(report["error_rate"]["seeds"]["20"])


def test_repeated_evaluation_replaces_only_its_files(model, encoder, tmp_path):
    directory = save_results(evaluate_suite(model, encoder, suite_of(), config(seeds=(10, 20))), tmp_path)
    (directory / "notes.txt").write_text("user file", encoding="utf-8")
    other = save_results(evaluate_suite(model, encoder, suite_of(), config(greedy=True)), tmp_path)
    assert other != directory, "other settings have another directory"
    assert save_results(evaluate_suite(model, encoder, suite_of(), config(seeds=(10,))), tmp_path) == directory
    assert sorted(path.name for path in directory.iterdir()) == [
        "manifest.json",
        "notes.txt",
        "predictions-seed10.jsonl",
        "results.json",
    ]


def test_settings_label_is_readable():
    assert settings_label(EvalConfig(), "auto") == "t1"
    assert settings_label(EvalConfig(temperature=0.5, top_p=0.9, limit=10), "auto") == "t0.5-p0.9-limit10"
    assert settings_label(EvalConfig(greedy=True, top_p=0.9, max_new_tokens=64), "plain") == "greedy-n64-plain"
    assert settings_label(EvalConfig(temperature=0), "auto") == "greedy"


def test_unwritable_output_is_found_before_evaluation(model, encoder, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with raises_code("storage.failed", str(tmp_path / "file" / "eval")):
        check_results_writable(tmp_path / "file" / "eval")
    check_results_writable(tmp_path / "new" / "eval")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "the check leaves no files"
    with raises_code("storage.failed", "--output"):
        save_results(evaluate_suite(model, encoder, suite_of(), config(greedy=True)), tmp_path / "file")


def test_report_names_the_precision_of_each_model(tmp_path):
    """Check that the student is evaluated with its float32 weights, independent of the training dtype."""
    recipe = Recipe(
        teacher={"dtype": "bf16"}, student={"dtype": "bf16"}, eval={"report_rows": 2, "metrics": ["exact_match"]}
    )
    student = SimpleNamespace(model=SimpleNamespace(dtype=torch.float32))
    rows = [Row(instruction=str(n), references=("x",)) for n in range(3)]
    for teacher, precision in ((student, "fp32 (teacher: bf16)"), (None, "fp32")):
        pair = SimpleNamespace(teacher=teacher)
        run = SimpleNamespace(
            recipe=recipe, student=student, pair=pair, device=torch.device("cpu"),
            valid=_HeldOut(rows), valid_rows=SimpleNamespace(name="v"),
        )  # fmt: skip
        report = Report(run, tmp_path, silent).measured_on
        assert report == f"valid CE on 3 held-out rows; scores on the first 2 of them, sampled at T = 1, in {precision}"


class _HeldOut(list):
    rows = property(list)
