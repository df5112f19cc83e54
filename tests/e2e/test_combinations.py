"""Test T5 and adapters under every schedule, interrupted and resumed, and adapters on layers of the teacher."""

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
from tests.command_line import assert_error
from tests.marks import long

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
def workdir(tmp_path_factory):
    """Write rows, and train a T5 and a Llama teacher for two steps. Return their directory."""
    workdir = tmp_path_factory.mktemp("combinations")
    rows = [
        {"instruction": "Spell.", "input": str(n), "output": " ".join(WORDS[int(d)] for d in str(n))} for n in range(40)
    ]
    (workdir / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("t5", "llama"):
        model = ["--model", f"random:{kind}:2x32", "--tokenizer", "chars", "--data", workdir / "rows.jsonl"]
        assert main([str(a) for a in ["sft", *model, *SMALL, "--steps", 2, "--output", workdir / kind]]) == 0
    return workdir


def distill(workdir, kind, *more):
    return ["distill", "--teacher", workdir / kind, "--data", workdir / "rows.jsonl", *SMALL, "--steps", 7, *more]


def weights(output):
    """Return the weights of a model directory or an adapter directory."""
    (file,) = output.glob("*.safetensors")
    return load_file(file)


def nearly_equal(one, two):
    """Return whether two results are equal up to the rounding of floats."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(nearly_equal(one[key], two[key]) for key in one)
    return one == pytest.approx(two, abs=1e-4) if isinstance(one, float) else one == two


def sources(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["source"] for line in lines if "loss" in line]


CASES = [("t5", kind, ["--lora", RANK] if i % 2 else []) for i, kind in enumerate(choices("schedule.kind"))]
CASES += [
    ("t5", "adaptive", ["--lora", RANK]),
    ("llama", "adaptive", ["--lora", RANK]),
    ("llama", "rounds", ["--lora", RANK]),
]
DEFAULT = [("t5", "adaptive", ["--lora", RANK]), ("llama", "rounds", ["--lora", RANK])]


@pytest.mark.parametrize(("family", "kind", "lora"), [case if case in DEFAULT else long(*case) for case in CASES])
def test_resume_matches_uninterrupted_run(family, kind, lora, workdir, tmp_path, cli, monkeypatch):
    settings = ["--student", "random:1x32", "--schedule", kind, *lora, *([] if kind == "off" else BULK)]
    settings += ADAPTIVE if kind == "adaptive" else []
    code, result, err = cli(*distill(workdir, family, *settings, "--output", tmp_path / "full"))
    assert (code, result["steps"]) == (0, 7), err
    begin_step = Trainer._begin_step

    def interrupted(self, *args):
        if self.state.step == 5:
            raise KeyboardInterrupt
        return begin_step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_begin_step", interrupted)
        assert cli(*distill(workdir, family, *settings, "--output", tmp_path / "resumed"))[0] == 130
    code, result, err = cli("distill", "--resume", "--output", tmp_path / "resumed", "--json", "--quiet")
    assert (code, result["steps"]) == (0, 7), err
    full, resumed = (weights(tmp_path / name) for name in ("full", "resumed"))
    assert full.keys() == resumed.keys()
    assert all(torch.equal(full[name], resumed[name]) for name in full)
    drawn = sources(tmp_path / "full")
    assert sources(tmp_path / "resumed") == drawn
    if kind in ("adaptive", "rounds"):
        assert {"rollout", "replay"} <= set(drawn), "the checkpoint has rollouts to replay"


@pytest.mark.parametrize(("spec", "layers"), [("layers:0,1", [0, 1]), ("layers:1:last", [1])])
def test_adapter_changes_student_layers_by_its_rank(spec, layers, workdir, tmp_path, cli):
    output = tmp_path / "run"
    argv = distill(workdir, "llama", "--student", spec, "--lora", RANK, "--schedule", "on", "--output", output)
    assert cli(*argv)[0] == 0
    teacher, student = (AutoModelForCausalLM.from_pretrained(path) for path in (workdir / "llama", output))
    assert student.config.num_hidden_layers == len(layers)
    before, after = dict(teacher.named_parameters()), dict(student.named_parameters())
    changed = 0
    for name, weight in after.items():
        old = name
        if ".layers." in name:
            head, _, rest = name.partition(".layers.")
            new, _, rest = rest.partition(".")
            old = f"{head}.layers.{layers[int(new)]}.{rest}"
        difference = (weight - before[old]).detach()
        if weight.dim() == 2 and ".layers." in name:
            values = torch.linalg.svdvals(difference)
            assert values[RANK] < 1e-5 * values[0], name
            changed += 1
        else:
            assert not difference.any(), f"{name} is frozen"
    assert changed == 7 * len(layers)


@pytest.mark.long
def test_t5_adapter_scores_like_the_merged_model(workdir, tmp_path, cli):
    base = ["--student", workdir / "t5", "--lora", RANK, "--schedule", "on", *BULK]
    for output in ("merged", "adapter"):
        more = ["--set", f"student.lora_output={output}", "--output", tmp_path / output]
        assert cli(*distill(workdir, "t5", *base, *more))[0] == 0
    merged, start = (AutoModelForSeq2SeqLM.from_pretrained(path) for path in (tmp_path / "merged", workdir / "t5"))
    assert torch.equal(merged.shared.weight, start.shared.weight)
    assert not torch.equal(
        merged.decoder.block[0].layer[1].EncDecAttention.k.weight,
        start.decoder.block[0].layer[1].EncDecAttention.k.weight,
    )
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    scores = [
        cli("eval", tmp_path / name, "--suite", workdir / "rows.jsonl", "--limit", 6, "--greedy", "--json", "--quiet")
        for name in ("merged", "adapter")
    ]
    assert [code for code, _, _ in scores] == [0, 0]
    first, second = (result["suites"] for _, result, _ in scores)
    for suite in (*first.values(), *second.values()):
        for key in ("seconds", "tokens_per_s"):
            suite.pop(key)
    assert nearly_equal(first, second)
    resumed_adapter = distill(
        workdir, "t5", "--student", tmp_path / "adapter", "--lora", RANK, "--output", tmp_path / "continued"
    )
    assert cli(*resumed_adapter)[0] == 0, "training continues from an adapter"
    distilled = distill(workdir, tmp_path / "adapter", "--student", "random:1x32", "--output", tmp_path / "distilled")
    assert cli(*distilled)[0] == 0, "an adapter may be the teacher"


@pytest.mark.parametrize(
    ("family", "settings", "code", "mention"),
    [
        (
            "llama",
            ["--student", "layers:1", "--lora", RANK, "--set", "student.lora_output=adapter"],
            "recipe.fields_conflict",
            "student.lora_output",
        ),
        ("t5", ["--student", "layers:1", "--lora", RANK], "model.cannot_take_layers", "t5"),
        (
            "t5",
            ["--student", "random:1x32", "--lora", RANK, "--set", "student.lora.targets=[nowhere]"],
            "model.no_lora_target",
            "'nowhere'",
        ),
    ],
)
def test_impossible_combination_is_an_error(family, settings, code, mention, workdir, tmp_path, cli):
    outcome = cli(*distill(workdir, family, *settings, "--output", tmp_path / "no"))
    assert_error(outcome, code, mention)
    assert not list(tmp_path.glob("no/*"))


@pytest.mark.parametrize("library_result", ["failure", "success"])
def test_signal_while_torch_reads_is_an_interruption(library_result, workdir, tmp_path, cli, monkeypatch):
    """Check a signal while torch reads a file: torch replaces the exception of the handler by a read error."""
    argv = distill(workdir, "llama", "--student", "random:1x32", "--schedule", "off", "--output", tmp_path / "run")
    assert cli(*argv)[0] == 0

    def load(path):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            if library_result == "success":
                return load_file(path)
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    monkeypatch.setattr(checkpoint, "load_file", load)
    code, result, err = cli(*argv, "--resume")
    assert (code, result["code"], result["error"]) == (143, 143, "interrupted"), err
    monkeypatch.undo()
    assert cli(*argv, "--resume")[0] == 0, "the signal does not affect the next command"


@pytest.mark.parametrize("family", ["gpt2", long("llama")])
def test_float16_teacher_with_bfloat16_student(family, tmp_path, cli):
    """Check a pair of two dtypes: bfloat16 autocast supports neither stacked float16 states nor GPT-2's norms in float16."""
    rows = [{"prompt": "ab" * (1 + i), "completion": "ba" * (1 + i % 5)} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = ["--teacher", tiny.save(tmp_path / "teacher", family), "--student", "random:1x32"]
    options = ["--schedule", "off", "--teacher-cache", "memory", "--set", "train.select=valid_divergence"]
    losses = {}
    for dtype in ("bf16", "fp32"):
        argv = ["--set", "teacher.dtype=fp16", "--set", f"student.dtype={dtype}", "--output", tmp_path / dtype]
        code, result, err = cli(
            "distill", *pair, "--data", tmp_path / "rows.jsonl", *SMALL, "--steps", 12, *options, *argv
        )
        assert code == 0, err
        losses[dtype] = result["report"]["teacher"]["valid_loss"]
    assert losses["bf16"] == losses["fp32"], "the loss of the teacher does not depend on the student's dtype"
