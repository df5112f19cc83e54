"""Check that a run with a sharded student is the same run, and that it continues in any number of processes."""

import json
import os
import shutil
import signal
import string
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distillm_cli.cli.app import main
from distillm_cli.models.model_paths import BUILTIN_TEACHER
from distillm_cli.training.checkpoint import read_checkpoint, visible
from tests import tiny
from tests.command_line import assert_error
from tests.processes import ROOT, Processes, signal_arrives
from tests.protocol_server import serving
from tests.same_runs import FEW, assert_same_run, assert_same_weights, distill, metrics, run_alone, run_together

pytestmark = pytest.mark.long  # test_several_processes has a usual test

FEW_ROWS = tuple(field for field in FEW if not field.startswith("eval.report_rows"))
FULL, NONE = "train.shard=full", "train.shard=none"
ROLLOUTS = ("schedule.phi=0.6", "schedule.warm_up=none", "schedule.capacity=16", "rollout.bulk=2")
SAVED = ("train.save_steps=1", "train.keep=9", *ROLLOUTS)
LORA = ("student.path=layers:2", "student.lora.r=4", "student.lora.dropout=0")


@pytest.fixture(scope="module")
def pair():
    with Processes(2) as pair:
        yield pair


CASES = [
    ("kd", ()),
    ("kd", ("train.gradient_checkpointing=true", "train.accumulate=2", "teacher.cache=off")),
    ("kd", ("train.batch_size=1",)),  # one process has no rows
    ("kd", LORA),
    ("kd", ("train.tokens_per_batch=60", "train.tokens_per_step=200")),
    ("distillm", ROLLOUTS),
    ("distillm", (*ROLLOUTS, "schedule.freshness=on", *LORA)),
    ("minillm", ()),
    ("atkd", ()),
    ("distillm2", ()),
    ("skd", ()),
]


@pytest.mark.parametrize(("method", "fields"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_sharded_run_is_the_same_run(method, fields, pair, tmp_path, capsys, monkeypatch):
    run_alone(distill("one", *fields, method=method), tmp_path, capsys, monkeypatch)
    run_together(pair, distill("two", *fields, FULL, method=method), tmp_path)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.fixture(scope="module")
def pair_of_plain_passes():
    """Return two processes without the hand-written passes, which round differently in models of large weights."""
    before = os.environ.get("DISTILLM_CPU_FAST")
    os.environ["DISTILLM_CPU_FAST"] = "0"
    with Processes(2) as pair:
        os.environ.pop("DISTILLM_CPU_FAST")
        if before is not None:
            os.environ["DISTILLM_CPU_FAST"] = before
        yield pair


@pytest.mark.parametrize("family", ["gpt2", "opt-350m", "gemma2", "falcon_h1", "t5"])
def test_fine_tuning_of_other_families(family, pair_of_plain_passes, tmp_path):
    length = {"gpt2": {"n_positions": 128}, "t5": {}}.get(family, {"max_position_embeddings": 128})
    tiny.save(tmp_path / "model", family, rows=120, own_tokenizer=tiny.tokenizer(string.printable), **length)
    fields = [field for field in (*FEW, "data.template=plain") if "dropout" not in field]
    fields += ["student.dropout=0"] if family in ("gpt2", "opt-350m", "t5") else []
    sft = ["sft", "--model", "model", "--data", "builtin", "--steps", 3, "--lr", "1e-5", "--json"]
    sft += [word for field in fields for word in ("--set", field)]
    for shard in (NONE, FULL):
        run_together(pair_of_plain_passes, [*sft, "--set", shard, "--output", shard], tmp_path)
    assert_same_run(tmp_path / NONE, tmp_path / FULL, 1e-4)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Return directories with the same weights in one file, in several, in bfloat16, and pickled, which is not mapped."""
    root = tmp_path_factory.mktemp("stored")
    model = AutoModelForCausalLM.from_pretrained(BUILTIN_TEACHER, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight * 0.9).bfloat16())
    for name in ("one", "several", "half", "pickled"):
        shutil.copytree(BUILTIN_TEACHER, root / name, ignore=shutil.ignore_patterns("*.safetensors", "recipe.yaml"))
    model.save_pretrained(root / "one")
    model.save_pretrained(root / "several", max_shard_size="300KB")
    torch.save(
        {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}, root / "pickled/pytorch_model.bin"
    )
    model.bfloat16().save_pretrained(root / "half")
    assert len(list((root / "several").glob("*.safetensors"))) > 2
    return root


@pytest.mark.parametrize("name", ["one", "several", "half"])
def test_student_that_is_read_in_parts(name, stored, pair, tmp_path):
    """Check that the run has the same bits as one whose processes read all weights."""
    fields = (*SAVED, FULL, "eval.report_rows=2", "eval.metrics=exact_match", "student.save_dtype=bf16")
    for run in ("pickled", name):
        run_together(pair, distill(run, *fields, f"student.path={stored / run}", few=FEW_ROWS), tmp_path)
    assert_same_run(tmp_path / "pickled", tmp_path / name, 0, 0)
    for file in ("config.json", "checkpoints/step-000002/config.json", "eval/report/student-before.json"):
        assert (tmp_path / "pickled" / file).read_bytes() == (tmp_path / name / file).read_bytes()
    for file in ("model", "training"):
        one, two = (
            load_file(tmp_path / run / f"checkpoints/step-000002/{file}.safetensors") for run in ("pickled", name)
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    saved, exported = (
        load_file(tmp_path / name / place / "model.safetensors") for place in ("checkpoints/step-000003", "")
    )
    assert saved.keys() == exported.keys()
    assert all(torch.equal(exported[key], weight.bfloat16()) for key, weight in saved.items())


def test_weights_of_an_earlier_step_are_restored(stored, pair, tmp_path):
    fields = (f"student.path={stored / 'half'}", "train.select=valid_loss", "train.lr=0.03", "train.warmup=0.99")
    result = run_together(pair, distill("run", *fields, FULL, method="kd", steps=6), tmp_path)
    best = result["best_step"]
    assert best < 6
    measured = {line["step"]: line["valid_loss"] for line in metrics(tmp_path / "run") if "valid_loss" in line}
    assert measured[best] < measured[6]
    assert result["report"]["student_after"]["valid_loss"] == pytest.approx(measured[best], rel=1e-6)
    assert result["report"]["student_before"]["valid_loss"] == pytest.approx(measured[0], rel=1e-6)
    assert_same_weights(tmp_path / "run", tmp_path / f"run/checkpoints/step-{best:06d}", 0)


@pytest.mark.parametrize("fields", [(), LORA], ids=["full", "lora"])
def test_fine_tuning_and_a_stage_before_it(fields, pair, tmp_path, capsys, monkeypatch):
    fields = (*fields, "student.sft_epochs=0.2", "student.save_dtype=bf16")
    run_alone(distill("one", *fields, method="kd"), tmp_path, capsys, monkeypatch)
    run_together(pair, distill("two", *fields, FULL, method="kd"), tmp_path)
    assert_same_run(tmp_path / "one", tmp_path / "two", weights=1e-2)  # bf16
    assert_same_weights(tmp_path / "one/sft", tmp_path / "two/sft", 1e-2)


def test_best_checkpoint_is_selected(pair, tmp_path, capsys, monkeypatch):
    fields = ("train.select=rouge_l", "eval.report_rows=5", "eval.max_new_tokens=5", "eval.metrics=rouge_l")
    one = run_alone(distill("one", *fields, steps=6, few=FEW_ROWS), tmp_path, capsys, monkeypatch)
    two = run_together(pair, distill("two", *fields, FULL, steps=6, few=FEW_ROWS), tmp_path)
    assert one["best_step"] == two["best_step"]
    for name, report in one["report"].items():
        assert two["report"][name] == pytest.approx(report, abs=1e-4)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("fields", [(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize(("before", "after"), [(FULL, FULL), (FULL, NONE), (NONE, FULL), (FULL, None), (None, FULL)])
def test_resume(before, after, fields, pair, tmp_path, capsys, monkeypatch):
    """Check that a checkpoint continues with shards, without, and in a single process (None)."""
    whole = distill("whole", *SAVED, *fields, steps=4)
    run_alone(whole, tmp_path, capsys, monkeypatch)
    parts = [*whole, "--output", "parts"]
    stop = (2, signal.SIGTERM)
    if before is None:
        with signal_arrives(*stop):
            assert main([str(a) for a in parts]) == 143
        capsys.readouterr()
    else:
        outcomes = pair.run([*parts, "--set", before], directory=tmp_path, faults={1: ["signal_arrives", *stop]})
        assert [o.code for o in outcomes] == [143, 143], outcomes[0].err
    step = read_checkpoint(visible(tmp_path / "parts/checkpoints")[-1]).state["progress"]["step"]
    assert 1 <= step < 4
    if after is None:
        run_alone([*parts, "--resume"], tmp_path, capsys, monkeypatch)
    else:
        run_together(pair, [*parts, "--set", after, "--resume"], tmp_path)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_with_shards_gives_the_same_bits(pair, tmp_path):
    fields = (*SAVED, FULL, "student.dropout=0.1")
    run_together(pair, distill("whole", *fields, steps=4), tmp_path)
    parts = distill("parts", *fields, steps=4)
    outcomes = pair.run(parts, directory=tmp_path, faults={0: ["signal_arrives", 2, signal.SIGTERM]})
    assert outcomes[0].code == 143
    run_together(pair, [*parts, "--resume"], tmp_path)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", 0)


def test_checkpoint_that_does_not_fit_in_memory(pair, tmp_path, capsys, monkeypatch):
    """Check that one that is gathered on disk is the same, leaves nothing else there, and continues in one process."""
    whole = distill("whole", *SAVED, FULL)
    run_together(pair, whole, tmp_path)
    short = [*whole, "--output", "short"]
    outcomes = pair.run(
        short, directory=tmp_path, faults={0: ["memory_is_short"], 1: ["signal_arrives", 2, signal.SIGTERM]}
    )
    assert [o.code for o in outcomes] == [143, 143], outcomes[0].err
    saved = visible(tmp_path / "short/checkpoints")
    assert saved
    assert list((tmp_path / "short/checkpoints").iterdir()) == saved
    for path in saved:
        for name in ("model.safetensors", "training.safetensors"):
            one, two = (load_file(place / path.name / name) for place in (tmp_path / "whole/checkpoints", path.parent))
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one)
    run_alone([*short, "--set", NONE, "--resume"], tmp_path, capsys, monkeypatch)
    assert_same_run(tmp_path / "whole", tmp_path / "short")


def test_full_disk_while_a_checkpoint_is_gathered(pair, tmp_path):
    outcomes = pair.run(distill("run", *SAVED, FULL), directory=tmp_path, faults={0: ["memory_and_disk_are_short"]})
    assert_error((outcomes[0].code, json.loads(outcomes[0].out), outcomes[0].err), "storage.failed", "No space left")
    assert outcomes[1] == (outcomes[0].code, "", "")


def test_loss_that_is_nan_in_one_process_stops_all(pair, tmp_path):
    outcomes = pair.run(distill("run", *SAVED, FULL), directory=tmp_path, faults={1: ["loss_is_nan", 2]})
    assert_error((outcomes[0].code, json.loads(outcomes[0].out), outcomes[0].err), "numbers.not_finite", "at step 2")
    assert [read_checkpoint(path).state["progress"]["step"] for path in visible(tmp_path / "run/checkpoints")] == [1]


def test_memory_that_runs_out_in_one_process_ends_the_run(tmp_path):
    """Check it under a launcher, which ends the other process: that one waits in a pass."""
    script = """
import os, sys
from distillm_cli.cli.app import main
from tests.processes import memory_runs_out
if os.environ["RANK"] == "1":
    memory_runs_out(2, True).start()
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "one.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "one.py"]
    argv = [str(a) for a in distill("run", *SAVED, FULL)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launch, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "error: out of memory in process 1; continue with --resume" in done.stderr
    assert [path.name for path in visible(tmp_path / "run/checkpoints")] == ["step-000001"]


@pytest.mark.parametrize(
    ("method", "fields"), [("okd", ()), ("kd", ("train.adversarial=fgsm", "objective.kd_weight=0.5"))]
)
def test_extras_are_refused(method, fields, pair, tmp_path):
    first, _ = pair.run(distill("run", FULL, *fields, method=method), directory=tmp_path)
    assert_error((first.code, json.loads(first.out), first.err), "usage.cannot_shard", "needs all weights")


def test_servers_of_two_processes(pair, tmp_path, capsys, monkeypatch):
    """Check a run with both servers, whose first process alone asks for rollouts, with and without shards."""
    rows = [{"prompt": word, "output": word[::-1] + word} for word in ("abc", "bcd", "cde", "def", "efg", "fgh")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    teacher = tiny.save(tmp_path / "teacher", hidden_size=48, seed=1)
    student = tiny.save(tmp_path / "student", seed=2)
    few = (*FEW[1:], f"student.path={student}", "data.valid=rows.jsonl", "data.template=plain", "data.max_length=32")
    fields = ("rollout.temperature=0", "rollout.bulk=2", "schedule.kind=mixed", "student.dtype=fp32")
    run = ["distill", "--teacher", teacher, "--data", "rows.jsonl", "--steps", 3, "--json"]
    run += [word for field in (*few, *fields) for word in ("--set", field)]
    with serving(student) as rollouts, serving(teacher, pools=True) as states:
        run += ["--rollout-server", rollouts.url, "--teacher-server", states.url]
        one = run_alone([*run, "--output", "one"], tmp_path, capsys, monkeypatch)
        asked = rollouts.log["/v1/completions"]
        for shard in (NONE, FULL):
            rollouts.log.clear()
            two = run_together(pair, [*run, "--set", shard, "--output", shard], tmp_path)
            assert rollouts.log["/v1/completions"] == asked
            assert two["sampled_tokens"] == one["sampled_tokens"] > 0
            assert_same_run(tmp_path / "one", tmp_path / shard)


def test_run_in_bf16(pair, tmp_path):
    for shard in (NONE, FULL):
        run_together(pair, distill(shard, *ROLLOUTS, shard, "student.dtype=bf16"), tmp_path)
    assert_same_run(tmp_path / NONE, tmp_path / FULL, tolerance=1e-2, weights=2e-2)


def test_accelerate_that_is_configured_for_fsdp(pair, tmp_path):
    configured = {rank: ["accelerate_uses_fsdp"] for rank in range(2)}
    argv = [word for word in distill("run", method="kd", steps=1) if word != "--quiet"]
    first, _ = pair.run(argv, directory=tmp_path, faults=configured)
    assert first.code == 0
    assert "the student is distributed over 2 processes" in first.err


def test_single_process_is_not_sharded(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    run_alone(distill("auto", method="kd", steps=1), tmp_path, capsys, monkeypatch)
    run_alone(distill("full", FULL, method="kd", steps=1), tmp_path, capsys, monkeypatch)
    assert_same_weights(tmp_path / "auto", tmp_path / "full", 0)
