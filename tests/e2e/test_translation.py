"""A T5 as typed: translation from a named set, teacher, student, rollouts, resume, scores, samples; and what is refused."""

import json

import pytest
import torch
from tests.typed import call
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from distillm_cli.cli.app import main
from distillm_cli.config.load import resolve
from distillm_cli.runs.defaults import fitted
from distillm_cli.runs.plan import plan_from_configs, plan_run
from distillm_cli.training.trainer import Trainer

GERMAN = ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
ENGLISH = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def rows(n, offset=0):
    """Digits as words, the other way round, in the form of the hub's translation sets."""
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
def place(tmp_path_factory):
    """Rows under the name of a set of the hub, as $DISTILLM_DATA has them, and a T5 made by ``distillm sft``."""
    place = tmp_path_factory.mktemp("t5")
    (place / "data" / "wmt14-de-en").mkdir(parents=True)
    for name, part in (("train", rows(64)), ("valid", rows(10, 3)), ("test", rows(12, 6))):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (place / "data" / "wmt14-de-en" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILLM_DATA", str(place / "data"))
        argv = ["sft", "--model", "random:t5:2x48", "--tokenizer", "chars", "--data", "wmt14-de-en", *SMALL]
        assert main([str(a) for a in [*argv, "--steps", "15", "--lr", "5e-3", "--output", place / "teacher"]]) == 0
    return place


@pytest.fixture(autouse=True)
def _data(place, monkeypatch):
    monkeypatch.setenv("DISTILLM_DATA", str(place / "data"))


def distill_argv(place, output, *more):
    pair = ["--teacher", place / "teacher", "--student", "random:1x32", "--data", "wmt14-de-en"]
    adaptive = ["--set", "schedule.epsilon=-10", "--set", "schedule.capacity=16", "--set", "schedule.levels=2"]
    return ["distill", *pair, "--output", output, "--steps", "20", "--lr", "5e-3", *adaptive, *SMALL, *more]


def test_the_published_directory_is_an_ordinary_t5(place):
    model = AutoModelForSeq2SeqLM.from_pretrained(place / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(place / "teacher")
    assert model.config.model_type == "t5"
    ids = tokenizer("Translate German to English.\neins zwei\n")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id, "whoever calls the tokenizer feeds the encoder what it was trained on"
    assert model.generate(torch.tensor([ids]), max_new_tokens=4).shape[0] == 1, "the decoder's start is known"
    card = (place / "teacher" / "README.md").read_text()
    assert "pipeline_tag: text2text-generation" in card


def test_distilled_interrupted_resumed_scored_and_sampled(place, tmp_path, capsys, monkeypatch):
    code, whole, _ = call(capsys, *distill_argv(place, tmp_path / "whole"))
    assert code == 0
    assert min(whole[f"{source}_steps"] for source in ("dataset", "rollout", "replay")) > 0
    assert whole["teacher_cache"]["rows"] == 64
    assert {"bleu", "chrf"} <= whole["report"]["student_after"].keys()

    begin_step, stop = Trainer._begin_step, {"at": 12}

    def interrupted(self, *args):
        if self.state.step == stop["at"]:
            raise KeyboardInterrupt
        return begin_step(self, *args)

    monkeypatch.setattr(Trainer, "_begin_step", interrupted)
    assert call(capsys, *distill_argv(place, tmp_path / "cut"))[0] == 130
    monkeypatch.undo()
    monkeypatch.setenv("DISTILLM_DATA", str(place / "data"))
    code, cut, _ = call(capsys, "distill", "--resume", "--output", tmp_path / "cut", "--json", "--quiet")
    assert (code, cut["steps"]) == (0, 20)
    first, second = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / n).state_dict() for n in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    code, scores, _ = call(
        capsys, "eval", tmp_path / "whole", "--suite", "wmt14-de-en", "--metric", "bleu,chrf,rouge_1,rouge_2",
        "--seeds", "10,20", "--json", "--quiet",
    )  # fmt: skip
    suite = scores["suites"]["wmt14-de-en"]
    assert (code, suite["rows"]) == (0, 12)
    assert suite["bleu"]["signature"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert set(suite["chrf"]["seeds"]) == {"10", "20"}
    assert suite["chrf"]["mean"] == pytest.approx(sum(suite["chrf"]["seeds"].values()) / 2)

    said = tmp_path / "said.jsonl"
    code, generated, _ = call(
        capsys, "generate", "--model", place / "teacher", "--data", "wmt14-de-en", "--limit", "7",
        "--max-new-tokens", "8", "--output", said, "--json", "--quiet",
    )  # fmt: skip
    assert (code, generated["rows"]) == (0, 7)
    assert json.loads(said.read_text().splitlines()[0])["prompt"] == "Translate German to English.\nnull null null\n"
    student = ["--student", tmp_path / "whole", "--data", said, "--output", tmp_path / "on-samples", "--steps", "2"]
    code, again, _ = call(capsys, "distill", "--teacher", place / "teacher", *student, *SMALL)
    assert (code, again["steps"]) == (0, 2)


def test_a_cache_on_disk_is_made_once_and_is_this_teachers(place, tmp_path, capsys):
    disk = ["--teacher-cache", "disk", "--set", f"teacher.cache_dir={tmp_path / 'states'}", "--steps", "4"]
    told = [call(capsys, *distill_argv(place, tmp_path / name, *disk))[1]["teacher_cache"] for name in "ab"]
    assert [cache["hit"] for cache in told] == [False, True]
    assert told[0]["place"] == told[1]["place"]


def test_selecting_by_a_metric_that_is_not_among_the_scored_ones(place, tmp_path, capsys):
    select = ["--set", "train.select=chrf", "--set", "eval.metrics=[exact_match]", "--steps", "10"]
    code, result, _ = call(capsys, *distill_argv(place, tmp_path / "run", *select))
    assert code == 0
    assert result["best_step"] in (5, 10)
    code, _, err = call(capsys, *distill_argv(place, tmp_path / "none", *select, "--set", "eval.report_rows=0"))
    assert code == 2
    assert "eval.report_rows" in err


def test_plan_shows_the_pair_and_the_end_of_the_prompt(place, capsys):
    capsys.readouterr()
    argv = ["plan", "--teacher", place / "teacher", "--student", "random:1x32", "--data", "wmt14-de-en"]
    assert main([str(a) for a in [*argv, "--set", "data.template=plain", "--max-length", "128", "--json"]]) == 0
    out, err = capsys.readouterr()
    models = json.loads(out)["models"]
    assert (models["teacher"]["kind"], models["student"]["kind"]) == ("t5", "t5")
    assert (models["teacher"]["width"], models["student"]["layers"], models["student"]["context"]) == (48, 1, None)
    assert "<eos>" in err.replace("\n", "")


@pytest.mark.parametrize("method", ["distillm", "minillm", "distillm2"])
def test_the_plan_by_shapes_is_that_of_the_loaded_pair(place, method):
    """Both stacks, the copy that samples, kept states: what is told by arithmetic alone is what loading tells."""
    flags = {
        "teacher.path": str(place / "teacher"),
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


def test_a_pair_of_two_kinds_is_refused(place, tmp_path, capsys):
    argv = distill_argv(place, tmp_path / "no")
    argv[argv.index("random:1x32")] = "random:gpt2:1x32"
    code, answer, err = call(capsys, *argv)
    assert (code, answer["code"]) == (4, 4)
    assert "the teacher is an encoder-decoder model (t5) and the student a causal model (gpt2)" in err
    assert not (tmp_path / "no").exists() or not any((tmp_path / "no").iterdir())
