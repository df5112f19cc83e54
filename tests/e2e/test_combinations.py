"""Combinations that no method has for its own: T5 and adapters under every schedule, stopped and resumed; adapters on cut
students."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from distillm_cli.cli.app import main
from distillm_cli.config.explain import choices
from distillm_cli.training import checkpoint
from distillm_cli.training.trainer import Trainer
from tests import tiny

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SETS = (
    "data.template=plain", "data.valid_limit=4", "eval.report_rows=2", "eval.max_new_tokens=4", "eval.greedy=true",
    "rollout.max_new_tokens=4", "train.threads=1", "train.eval_steps=2", "train.save_steps=2",
)  # fmt: skip
SMALL = [
    *("--max-length", 64, "--dtype", "fp32", "--device", "cpu", "--batch-size", 4, "--lr", 5e-3, "--json", "--quiet"),
    *(word for field in SETS for word in ("--set", field)),
]
RANK = 2
ADAPTIVE = [word for s in ("capacity=6", "phi=0.6", "epsilon=-9") for word in ("--set", f"schedule.{s}")]
BULK = ["--set", "rollout.bulk=2"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows, and a teacher of either kind that was trained for two steps."""
    place = tmp_path_factory.mktemp("combinations")
    rows = [
        {"instruction": "Spell.", "input": str(n), "output": " ".join(WORDS[int(d)] for d in str(n))} for n in range(40)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("t5", "llama"):
        model = ["--model", f"random:{kind}:2x32", "--tokenizer", "chars", "--data", place / "rows.jsonl"]
        assert main([str(a) for a in ["sft", *model, *SMALL, "--steps", 2, "--output", place / kind]]) == 0
    return place


def distill(place, kind, *more):
    return ["distill", "--teacher", place / kind, "--data", place / "rows.jsonl", *SMALL, "--steps", 7, *more]


def weights(output):
    """Of a model directory, or an adapter's."""
    (file,) = output.glob("*.safetensors")
    return load_file(file)


def same(one, other):
    """Results, but for the rounding of floats."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == pytest.approx(other, abs=1e-4) if isinstance(one, float) else one == other


def sources(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["source"] for line in lines if "loss" in line]


CASES = [("t5", kind, ["--lora", RANK] if i % 2 else []) for i, kind in enumerate(choices("schedule.kind"))]
CASES += [
    ("t5", "adaptive", ["--lora", RANK]),
    ("llama", "adaptive", ["--lora", RANK]),
    ("llama", "rounds", ["--lora", RANK]),
]


@pytest.mark.parametrize(("family", "kind", "lora"), CASES)
def test_stopped_and_resumed_it_is_the_run_that_was_not(family, kind, lora, place, tmp_path, typed, monkeypatch):
    settings = ["--student", "random:1x32", "--schedule", kind, *lora, *([] if kind == "off" else BULK)]
    settings += ADAPTIVE if kind == "adaptive" else []
    code, told, err = typed(*distill(place, family, *settings, "--output", tmp_path / "whole"))
    assert (code, told["steps"]) == (0, 7), err
    begin_step = Trainer._begin_step

    def interrupted(self, *args):
        if self.state.step == 5:
            raise KeyboardInterrupt
        return begin_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_begin_step", interrupted)
        assert typed(*distill(place, family, *settings, "--output", tmp_path / "cut"))[0] == 130
    code, told, err = typed("distill", "--resume", "--output", tmp_path / "cut", "--json", "--quiet")
    assert (code, told["steps"]) == (0, 7), err
    whole, cut = (weights(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    drawn = sources(tmp_path / "whole")
    assert sources(tmp_path / "cut") == drawn
    if kind in ("adaptive", "rounds"):
        assert {"rollout", "replay"} <= set(drawn), "what a checkpoint must carry was there"


@pytest.mark.parametrize(("spec", "kept"), [("layers:0,1", [0, 1]), ("layers:1:last", [1])])
def test_an_adapter_on_layers_of_the_teacher_changes_them_by_its_rank_and_nothing_else(
    spec, kept, place, tmp_path, typed
):
    output = tmp_path / "run"
    argv = distill(place, "llama", "--student", spec, "--lora", RANK, "--schedule", "on", "--output", output)
    assert typed(*argv)[0] == 0
    teacher, student = (AutoModelForCausalLM.from_pretrained(path) for path in (place / "llama", output))
    assert student.config.num_hidden_layers == len(kept)
    before, after = dict(teacher.named_parameters()), dict(student.named_parameters())
    changed = 0
    for name, weight in after.items():
        old = name
        if ".layers." in name:
            head, _, rest = name.partition(".layers.")
            new, _, rest = rest.partition(".")
            old = f"{head}.layers.{kept[int(new)]}.{rest}"
        difference = (weight - before[old]).detach()
        if weight.dim() == 2 and ".layers." in name:
            values = torch.linalg.svdvals(difference)
            assert values[RANK] < 1e-5 * values[0], name
            changed += 1
        else:
            assert not difference.any(), f"{name} is frozen"
    assert changed == 7 * len(kept)


def test_a_t5_adapter_is_published_as_a_whole_model_or_alone_and_both_say_the_same(place, tmp_path, typed):
    base = ["--student", place / "t5", "--lora", RANK, "--schedule", "on", *BULK]
    for output in ("merged", "adapter"):
        more = ["--set", f"student.lora_output={output}", "--output", tmp_path / output]
        assert typed(*distill(place, "t5", *base, *more))[0] == 0
    merged, start = (AutoModelForSeq2SeqLM.from_pretrained(path) for path in (tmp_path / "merged", place / "t5"))
    assert torch.equal(merged.shared.weight, start.shared.weight)
    assert not torch.equal(
        merged.decoder.block[0].layer[1].EncDecAttention.k.weight,
        start.decoder.block[0].layer[1].EncDecAttention.k.weight,
    )
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    scores = [
        typed("eval", tmp_path / name, "--suite", place / "rows.jsonl", "--limit", 6, "--greedy", "--json", "--quiet")
        for name in ("merged", "adapter")
    ]
    assert [code for code, _, _ in scores] == [0, 0]
    first, second = (told["suites"] for _, told, _ in scores)
    for suite in (*first.values(), *second.values()):
        for measured in ("seconds", "tokens_per_s"):
            suite.pop(measured)
    assert same(first, second)
    again = distill(place, "t5", "--student", tmp_path / "adapter", "--lora", RANK, "--output", tmp_path / "on")
    assert typed(*again)[0] == 0, "an adapter is gone on with"
    below = distill(place, tmp_path / "adapter", "--student", "random:1x32", "--output", tmp_path / "below")
    assert typed(*below)[0] == 0, "and is a teacher"


@pytest.mark.parametrize(
    ("family", "settings", "code", "line"),
    [
        (
            "llama",
            ["--student", "layers:1", "--lora", RANK, "--set", "student.lora_output=adapter"],
            2,
            "student.lora_output adapter: the base model layers:1 would not be saved",
        ),
        ("t5", ["--student", "layers:1", "--lora", RANK], 4, "cannot copy layers of a t5 teacher"),
        (
            "t5",
            ["--student", "random:1x32", "--lora", RANK, "--set", "student.lora.targets=[nowhere]"],
            4,
            "no linear layer 'nowhere' before the head; student.lora.targets",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_in_one_line(family, settings, code, line, place, tmp_path, typed):
    got, _, err = typed(*distill(place, family, *settings, "--output", tmp_path / "no"))
    assert got == code
    assert line in err
    assert len([said for said in err.splitlines() if said.startswith("error: ")]) == 1
    assert not list(tmp_path.glob("no/*"))


@pytest.mark.parametrize("taken_for", ["a failure", "nothing"])
def test_a_signal_that_a_library_takes_for_something_else_is_a_signal(taken_for, place, tmp_path, typed, monkeypatch):
    """What a signal's handler raises while a tensor is read comes out of torch as a file that cannot be read."""
    ran = distill(place, "llama", "--student", "random:1x32", "--schedule", "off", "--output", tmp_path / "run")
    assert typed(*ran)[0] == 0

    def load(path):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            if taken_for == "nothing":
                return load_file(path)
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    monkeypatch.setattr(checkpoint, "load_file", load)
    code, told, err = typed(*ran, "--resume")
    assert (code, told["code"]) == (143, 143), err
    assert "interrupted" in told["message"]
    assert "delete" not in err
    monkeypatch.undo()
    assert typed(*ran, "--resume")[0] == 0, "what came in one command is of no account in the next"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_float16_teacher_teaches_a_bfloat16_student(family, tmp_path, typed):
    """Autocast to bfloat16 can neither put float16 states side by side nor go through GPT-2's norms in float16."""
    rows = [{"prompt": "ab" * (1 + i), "completion": "ba" * (1 + i % 5)} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = ["--teacher", tiny.save(tmp_path / "teacher", family), "--student", "random:1x32"]
    asked = ["--schedule", "off", "--teacher-cache", "memory", "--set", "train.select=valid_divergence"]
    losses = {}
    for dtype in ("bf16", "fp32"):
        ran = ["--set", "teacher.dtype=fp16", "--set", f"student.dtype={dtype}", "--output", tmp_path / dtype]
        code, told, err = typed(
            "distill", *pair, "--data", tmp_path / "rows.jsonl", *SMALL, "--steps", 12, *asked, *ran
        )
        assert code == 0, err
        losses[dtype] = told["report"]["teacher"]["valid_loss"]
    assert losses["bf16"] == losses["fp32"], "the teacher is measured as it teaches, whatever the student computes in"
