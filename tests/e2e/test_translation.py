"""Test T5 on a named translation data set: training, distillation, resume, evaluation, generation and planning."""

import json

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from distillm_cli.cli.app import main
from distillm_cli.config.load import resolve
from distillm_cli.runs.defaults import fitted
from distillm_cli.runs.plan import plan_from_configs, plan_run
from distillm_cli.training.trainer import Trainer
from tests.command_line import assert_error, call

GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def rows(n, offset=0):
    """Return rows of number words, in reverse order, in the format of translation data sets on the hub."""
    picked = [((i * 7 + offset) % 10, (i * 3 + i // 10 + offset) % 10, i % 10) for i in range(n)]
    return [
        {"translation": {"de": " ".join(GERMAN[d] for d in ds), "en": " ".join(ENGLISH[d] for d in reversed(ds))}}
        for ds in picked
    ]


SMALL = [
    "--max-length", "128", "--dtype", "fp32", "--device", "cpu", "--json", "--batch-size", "8", "--quiet",
    "--set", "data.template=plain", "--set", "eval.report_rows=6", "--set", "eval.max_new_tokens=8",
    "--set", "rollout.max_new_tokens=8", "--set", "train.eval_steps=5", "--set", "train.save_steps=5",
    "--set", "train.threads=1", "--set", "eval.metrics=[bleu, chrf]", "--set", "eval.greedy=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Write rows under a data set name for $DISTILLM_DATA, and train a T5 with ``distillm sft``. Return the directory."""
    workdir = tmp_path_factory.mktemp("t5")
    (workdir / "data" / "wmt14-de-en").mkdir(parents=True)
    for name, split_rows in (("train", rows(64)), ("valid", rows(10, 3)), ("test", rows(12, 6))):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows)
        (workdir / "data" / "wmt14-de-en" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLM_DATA", str(workdir / "data"))
        argv = ["sft", "--model", "random:t5:2x48", "--tokenizer", "chars", "--data", "wmt14-de-en", *SMALL]
        assert main([str(a) for a in [*argv, "--steps", "15", "--lr", "5e-3", "--output", workdir / "teacher"]]) == 0
    return workdir


@pytest.fixture(autouse=True)
def _data(workdir, monkeypatch):
    monkeypatch.setenv("DISTILLM_DATA", str(workdir / "data"))


def distill_argv(workdir, output, *more):
    pair = ["--teacher", workdir / "teacher", "--student", "random:1x32", "--data", "wmt14-de-en"]
    adaptive = ["--set", "schedule.epsilon=-10", "--set", "schedule.capacity=16", "--set", "schedule.levels=2"]
    return ["distill", *pair, "--output", output, "--steps", "20", "--lr", "5e-3", *adaptive, *SMALL, *more]


def test_output_is_an_ordinary_t5(workdir):
    model = AutoModelForSeq2SeqLM.from_pretrained(workdir / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(workdir / "teacher")
    assert model.config.model_type == "t5"
    ids = tokenizer("Translate German to English.\neins zwei\n")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id, "the tokenizer adds the end token, as in training"
    assert model.generate(torch.tensor([ids]), max_new_tokens=4).shape[0] == 1, (
        "the decoder start token is in the config"
    )
    card = (workdir / "teacher" / "README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card


def test_t5_is_distilled_resumed_scored_and_sampled(workdir, tmp_path, capsys, monkeypatch):
    code, full, _ = call(capsys, *distill_argv(workdir, tmp_path / "full"))
    assert code == 0
    assert min(full[f"{source}_steps"] for source in ("dataset", "rollout", "replay")) > 0
    assert full["teacher_cache"]["rows"] == 64
    assert {"bleu", "chrf"} <= full["report"]["student_after"].keys()

    begin_step = Trainer._begin_step

    def interrupted(self, *args):
        if self.state.step == 12:
            raise KeyboardInterrupt
        return begin_step(self, *args)

    monkeypatch.setattr(Trainer, "_begin_step", interrupted)
    assert call(capsys, *distill_argv(workdir, tmp_path / "resumed"))[0] == 130
    monkeypatch.undo()
    monkeypatch.setenv("DISTILLM_DATA", str(workdir / "data"))
    code, resumed, _ = call(capsys, "distill", "--resume", "--output", tmp_path / "resumed", "--json", "--quiet")
    assert (code, resumed["steps"]) == (0, 20)
    first, second = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / n).state_dict() for n in ("full", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    code, scores, _ = call(
        capsys, "eval", tmp_path / "full", "--suite", "wmt14-de-en", "--metric", "bleu,chrf,rouge_1,rouge_2",
        "--seeds", "10,20", "--json", "--quiet",
    )  # fmt: skip
    suite = scores["suites"]["wmt14-de-en"]
    assert (code, suite["rows"]) == (0, 12)
    assert suite["bleu"]["signature"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert set(suite["chrf"]["seeds"]) == {"10", "20"}
    assert suite["chrf"]["mean"] == pytest.approx(sum(suite["chrf"]["seeds"].values()) / 2)

    responses = tmp_path / "responses.jsonl"
    code, generated, _ = call(
        capsys, "generate", "--model", workdir / "teacher", "--data", "wmt14-de-en", "--limit", "7",
        "--max-new-tokens", "8", "--output", responses, "--json", "--quiet",
    )  # fmt: skip
    assert (code, generated["rows"]) == (0, 7)
    first_row = json.loads(responses.read_text().splitlines()[0])
    assert first_row["prompt"] == "Translate German to English.\nnull null null\n"
    student = ["--student", tmp_path / "full", "--data", responses, "--output", tmp_path / "on-samples", "--steps", "2"]
    code, again, _ = call(capsys, "distill", "--teacher", workdir / "teacher", *student, *SMALL)
    assert (code, again["steps"]) == (0, 2)


def test_disk_cache_is_reused(workdir, tmp_path, capsys):
    disk = ["--teacher-cache", "disk", "--set", f"teacher.cache_dir={tmp_path / 'states'}", "--steps", "4"]
    caches = [call(capsys, *distill_argv(workdir, tmp_path / name, *disk))[1]["teacher_cache"] for name in "ab"]
    assert [cache["hit"] for cache in caches] == [False, True]
    assert caches[0]["place"] == caches[1]["place"]


def test_selection_by_a_metric_that_is_not_reported(workdir, tmp_path, capsys):
    select = ["--set", "train.select=chrf", "--set", "eval.metrics=[exact_match]", "--steps", "10"]
    code, result, _ = call(capsys, *distill_argv(workdir, tmp_path / "run", *select))
    assert code == 0
    assert result["best_step"] in (5, 10)
    outcome = call(capsys, *distill_argv(workdir, tmp_path / "none", *select, "--set", "eval.report_rows=0"))
    assert_error(outcome, "usage.invalid_selection", "eval.report_rows")


def test_plan_shows_the_pair_and_the_prompt(workdir, capsys):
    capsys.readouterr()
    argv = ["plan", "--teacher", workdir / "teacher", "--student", "random:1x32", "--data", "wmt14-de-en"]
    assert main([str(a) for a in [*argv, "--set", "data.template=plain", "--max-length", "128", "--json"]]) == 0
    out, err = capsys.readouterr()
    models = json.loads(out)["models"]
    assert (models["teacher"]["kind"], models["student"]["kind"]) == ("t5", "t5")
    assert (models["teacher"]["width"], models["student"]["layers"], models["student"]["context"]) == (48, 1, None)
    assert "<eos>" in err.replace("\n", "")


@pytest.mark.parametrize("method", ["distillm", "minillm", "distillm2"])
def test_plan_from_configs_matches_loaded_pair(workdir, method):
    """Check both stacks, the copy for sampling and the cached states: plans with and without loading are equal."""
    flags = {
        "teacher.path": str(workdir / "teacher"),
        "student.path": "random:1x32",
        "data.source": "wmt14-de-en",
        "method": method,
        "train.device": "cpu",
        "student.lora.r": 2,
    }
    sets = ["data.template=plain", "data.max_length=128", "teacher.cache=memory", "student.dtype=fp32"]
    resolved = fitted(resolve(command="plan", recipe=None, flags=flags, sets=sets))
    result = plan_run(resolved, lambda event: None)
    loaded = result.figures
    assert result.batch
    shapes, _ = plan_from_configs(resolved)
    for key in ("models", "vocabulary", "steps", "sequences_per_step", "memory", "step_flops", "gpus"):
        assert loaded[key] == shapes[key], key
    assert {"rollout_weights", "rollout_cache"} <= loaded["memory"].keys()


def test_pair_of_two_kinds_is_an_error(workdir, tmp_path, capsys):
    argv = distill_argv(workdir, tmp_path / "no")
    argv[argv.index("random:1x32")] = "random:gpt2:1x32"
    assert_error(call(capsys, *argv), "model.different_kinds", "t5", "gpt2")
    assert not (tmp_path / "no").exists() or not any((tmp_path / "no").iterdir())
