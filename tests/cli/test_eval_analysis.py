"""Test what `distillm eval` reuses, compares and finds beside the scores, on a tiny model."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import distillm_cli
from distillm_cli.evaluation import evaluate
from distillm_cli.models.trained_tokenizers import train_tokenizer
from distillm_cli.runs.eval_options import EvalOptions
from tests import tiny
from tests.command_line import assert_error, call
from tests.judge_server import answer_in, judging

WORDS = ("abc", "stop", "a", "later", "redo", "pools", "drawer", "on", "mix", "short")
EVAL = ("--template", "plain", "--max-new-tokens", 6, "--seeds", "1,2", "--json")


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Save two small models. Return their directory."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer("chars", iter([string.printable]))
    fields = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny.model("llama", len(tokenizer) + 1, max_position_embeddings=64, spread=1.0, **fields)
    for name, change in (("a", 0.0), ("b", 0.05)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(change * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory


@pytest.fixture
def workdir(models, tmp_path, monkeypatch) -> Path:
    for name in "ab":
        (tmp_path / name).mkdir()
        for file in (models / name).iterdir():
            (tmp_path / name / file.name).symlink_to(file)
    write(tmp_path / "rows.jsonl", [{"instruction": word, "output": word[::-1]} for word in WORDS])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DISTILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DISTILLM_DATA", raising=False)
    return tmp_path


@pytest.fixture
def generated(monkeypatch) -> list[str]:
    """Record the passes that are generated."""
    tasks: list[str] = []
    sample_all = evaluate.sample_all

    def recorded(*args, **options):
        tasks.append(options["task"])
        return sample_all(*args, **options)

    monkeypatch.setattr(evaluate, "sample_all", recorded)
    return tasks


def score(capsys, *argv):
    code, result, err = call(capsys, "eval", *argv, *EVAL)
    assert code == 0, err
    return result


def test_nothing_is_scored_twice(workdir, capsys, generated):
    first = score(capsys, "a", "--suite", "rows.jsonl")
    assert generated == ["rows, seed 1", "rows, seed 2"]
    assert score(capsys, "a", "--suite", "rows.jsonl")["suites"] == first["suites"]
    assert len(generated) == 2, "the same weights, rows and settings"
    more = score(capsys, "a", "--suite", "rows.jsonl", "--metric", "rouge_l,length")
    assert len(generated) == 2, "another metric needs no response again"
    assert more["suites"]["rows"]["rouge_l"] == first["suites"]["rows"]["rouge_l"]
    code, _, err = call(capsys, "eval", "a", "--suite", "rows.jsonl", *EVAL[:-3], "--seeds", "2,3", "--json")
    assert code == 0, err
    assert generated[2:] == ["rows, seed 3"], "another seed needs only its own pass"
    score(capsys, "a", "--suite", "rows.jsonl", "--rescore")
    assert generated[3:] == ["rows, seed 1", "rows, seed 2"]


@pytest.mark.parametrize("change", ["weights", "rows", "prompts", "responses"])
def test_nothing_stale_is_shown(workdir, capsys, generated, change):
    score(capsys, "a", "--suite", "rows.jsonl")
    extra: tuple[object, ...] = ()
    if change == "weights":
        model = AutoModelForCausalLM.from_pretrained("a")
        (workdir / "a/model.safetensors").unlink()
        with torch.no_grad():
            model.lm_head.weight[3, 3] += 1  # a number that the fingerprint does not sample
        model.save_pretrained("a")
    elif change == "rows":
        write(workdir / "rows.jsonl", [{"instruction": word, "output": word} for word in WORDS])
    elif change == "prompts":
        write(workdir / "rows.jsonl", [{"instruction": word + "?", "output": word[::-1]} for word in WORDS])
    else:
        (file,) = (workdir / "a/eval").rglob("predictions-seed1.jsonl")
        file.write_text(file.read_text(encoding="utf-8").replace('"complete": false', '"complete": true', 1))
        extra = ("--metric", "length")
    score(capsys, "a", "--suite", "rows.jsonl", *extra)
    expected = {"weights": 4, "rows": 2, "prompts": 4, "responses": 3}
    assert len(generated) == expected[change]


def test_interrupted_evaluation_continues_with_the_next_pass(workdir, capsys, generated, monkeypatch):
    recorded = evaluate.sample_all

    def stop_at_seed_2(*args, **options):
        if options["task"].endswith("seed 2"):
            raise KeyboardInterrupt
        return recorded(*args, **options)

    monkeypatch.setattr(evaluate, "sample_all", stop_at_seed_2)
    assert call(capsys, "eval", "a", "--suite", "rows.jsonl", *EVAL)[0] == 130
    monkeypatch.setattr(evaluate, "sample_all", recorded)
    resumed = score(capsys, "a", "--suite", "rows.jsonl")
    assert generated == ["rows, seed 1", "rows, seed 2"]
    whole = score(capsys, "a", "--suite", "rows.jsonl", "--rescore")
    for metric in ("rouge_l", "exact_match"):
        assert resumed["suites"]["rows"][metric] == whole["suites"]["rows"][metric]


def test_checkpoints_are_compared_on_the_same_rows(workdir, capsys):
    options = ("--suite", "rows.jsonl", "--metric", "rouge_l,chrf,distinct_1", "--compare", "--perplexity")
    result = score(capsys, "a", "b", *options, "--teacher", "a")
    found = {entry["metric"]: entry for entry in result["comparisons"]}
    names = {"rouge_l", "chrf", "distinct_1", "loss", "kl_teacher_student", "kl_student_teacher", "agreement"}
    assert set(found) == names
    for name in ("rouge_l", "chrf"):
        entry, mean = found[name], [result["checkpoints"][c]["suites"]["rows"][name]["mean"] for c in "ab"]
        assert entry["difference"] == pytest.approx(mean[1] - mean[0])
        assert entry["low"] <= entry["difference"] <= entry["high"]
        assert 0 < entry["p"] <= 1
    assert found["distinct_1"]["p"] is None
    assert found["kl_teacher_student"]["mean_a"] == pytest.approx(0, abs=1e-9)
    assert found["kl_teacher_student"]["better"] is False, "a is the teacher itself"
    figures = result["checkpoints"]["b"]["suites"]["rows"]["references"]
    assert figures["agreement"] == pytest.approx(found["agreement"]["mean_b"])


def test_python_takes_the_same_options(workdir):
    fields = {"suite": "rows.jsonl", "template": "plain", "max_new_tokens": 6, "seeds": [1, 2]}
    result = distillm_cli.evaluate(["a", "b"], options=EvalOptions(compare=True, perplexity=True), **fields)
    assert {found["metric"] for found in result.comparisons} == {"rouge_l", "exact_match", "loss"}
    assert result.as_json()["comparisons"] == list(result.comparisons)


def test_training_rows_in_a_suite_are_counted(workdir, capsys):
    write(workdir / "train.jsonl", [{"instruction": word, "output": "?"} for word in WORDS[:4]])
    result = score(capsys, "a", "--suite", "rows.jsonl", "--train-data", "train.jsonl", "--metric", "length,chrf")
    found = result["suites"]["rows"]["leakage"]
    assert {k: found[k] for k in ("same_prompts", "same_rows", "leaked_rows", "clean_rows")} == {
        "same_prompts": 4,
        "same_rows": 0,
        "leaked_rows": 4,
        "clean_rows": 6,
    }
    write(workdir / "clean.jsonl", [{"instruction": word, "output": word[::-1]} for word in WORDS[4:]])
    clean = score(capsys, "a", "--suite", "clean.jsonl", "--metric", "length,chrf", "--output", "out")["suites"][
        "clean"
    ]
    lengths = [json.loads(line)["output"] for path in sorted((workdir / "a/eval").rglob("predictions-*.jsonl"))
               for line in path.read_text(encoding="utf-8").splitlines()[4:]]  # fmt: skip
    expected = sum(len(text.split()) for text in lengths) / len(lengths)
    assert found["without"]["length"]["mean"] == pytest.approx(expected)
    assert set(found["without"]) == {"length", "chrf"} <= clean.keys()


def test_judge_rates_and_compares(workdir, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")

    def reply(prompt):
        if "<response>" in prompt:
            return f"Rating: {1 + len(answer_in(prompt, 'response')) % 10}"
        first, second = (len(answer_in(prompt, f"response-{i}")) for i in (1, 2))
        return f"Verdict: {'tie' if first == second else 1 if first > second else 2}"

    with judging(reply) as server:
        judge = ("--judge", "judge", "--judge-url", server.url, "--judge-prices", "1,2")
        result = score(capsys, "a", "b", "--suite", "rows.jsonl", "--compare", *judge)
        requests = len(server.prompts)
        again = score(capsys, "a", "b", "--suite", "rows.jsonl", "--compare", *judge)
        assert len(server.prompts) == requests, "all answers are cached"
    (pair,) = result["judge"]["pairs"]
    assert pair["wins"] + pair["losses"] + pair["ties"] == 10
    assert again["judge"]["pairs"] == [pair]
    assert again["judge"]["cost"] == 0 < result["judge"]["cost"]
    assert result["suites"]["rows"]["judge"]["rated"] == 10
    assert "judge" in {entry["metric"] for entry in result["comparisons"]}
    for path in workdir.rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes()


def test_suite_without_references_keeps_the_other_metrics(workdir, capsys):
    write(workdir / "prompts.jsonl", [{"instruction": word} for word in WORDS])
    options = ("--suite", "rows.jsonl,prompts.jsonl", "--metric", "rouge_l,length", "--perplexity")
    code, result, err = call(capsys, "eval", "a", *options, *EVAL)
    assert code == 0, err
    assert "prompts: no row has a reference" in err
    found = result["suites"]["prompts"]
    assert found["rouge_l"]["mean"] is None
    assert found["length"]["mean"] > 0
    assert found["references"] is None
    assert result["suites"]["rows"]["rouge_l"]["mean"] is not None
    write(workdir / "prompts.jsonl", [{"instruction": "x"}, {"instruction": "y", "output": "z"}])
    code, result, err = call(capsys, "eval", "a", *options, *EVAL)
    assert "1 row without a reference left out, first prompts.jsonl:1" in err
    assert result["suites"]["prompts"]["rows"] == 1


def test_pass_at_k_is_in_the_result(workdir, capsys):
    write(workdir / "rows.jsonl", [{"instruction": word, "output": "1"} for word in WORDS])
    found = score(capsys, "a", "--suite", "rows.jsonl", "--metric", "final_number")["suites"]["rows"]["final_number"]
    assert set(found["pass_at"]) == {"2"}
    assert found["mean"] <= found["pass_at"]["2"] <= 2 * found["mean"]


def test_suites_are_listed(workdir, capsys):
    code, result, _ = call(capsys, "eval", "--list", "--json")
    assert code == 0
    assert result["suites"]["gsm8k-greedy"]["license"] == "MIT"
    assert result["suites"]["dolly"] == {"source": "MiniLLM/dolly"}


@pytest.mark.parametrize(
    ("code", "argv", "mention"),
    [
        ("usage.missing_value", ["a", "--suite", "rows.jsonl", "--compare"], "two checkpoints"),
        ("usage.missing_value", ["a", "a", "--suite", "rows.jsonl", "--compare"], "two checkpoints"),
        ("usage.no_data", ["a", "--suite", "rows.jsonl", "--leakage"], "--train-data"),
        ("usage.unused_option", ["a", "--suite", "rows.jsonl", "--judge-prices", "1,2"], "--judge"),
        ("usage.invalid_value", ["a", "--judge", "m", "--judge-prices", "1"], "--judge-prices"),
        ("usage.no_key", ["a", "--suite", "rows.jsonl", "--judge", "m"], "OPENAI_API_KEY"),
        ("model.not_found", ["a", "--suite", "rows.jsonl", "--teacher", "./nowhere"], "nowhere"),
        ("data.not_found", ["a", "--suite", "absent.yaml"], "absent.yaml"),
        ("usage.missing_package", ["a", "--suite", "lm-eval:hellaswag,arc_easy"], "lm-eval"),
        ("usage.not_on_server", ["a", "--server", "http://127.0.0.1:9", "--perplexity"], "--perplexity"),
        ("usage.invalid_option", [], "CKPT"),
    ],
)
def test_invalid_options_are_errors(workdir, capsys, monkeypatch, code, argv, mention):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for file in Path("a").glob("*.safetensors"):
        file.unlink()
    assert_error(call(capsys, "eval", *argv, "--json"), code, mention)
