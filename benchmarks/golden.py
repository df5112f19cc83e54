"""Compare two checkouts by the SHA-256 of weights and metrics of tiny runs, in float32 on a CPU.

    python benchmarks/golden.py [--against DIR] [--only NAME …] [--json]

Without --against it prints the digests of this checkout. With it, the checkout in DIR computes the same runs, and every
difference is listed; exits 1 if there is one. Digests are valid for one machine, since processors round differently.

A run is a command line. Its digest covers the weights in the output directory, and the step, epoch, source, loss, gradient
norm and φ of every line of metrics.jsonl. A resume repeats a run from its middle checkpoint in a copy of its directory.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

STEPS = 8
FIGURES = ("step", "epoch", "source", "loss", "lr", "grad_norm", "phi", "tokens", "valid_loss", "reward")

_PAIR = ["--teacher", "builtin", "--student", "random:1x32"]
_BUILTIN = [
    "--data",
    "builtin",
    "--max-length",
    "64",
    "--set",
    "data.template=plain",
    "--set",
    "data.max_prompt_length=40",
]
_BUILTIN += ["--set", "data.size=200", "--set", "data.seed=3"]
_SHARED = ["--steps", str(STEPS), "--batch-size", "4", "--lr", "3e-3", "--dtype", "fp32", "--device", "cpu"]
for _field in (
    "data.valid_limit=12", "rollout.max_new_tokens=12", "train.threads=1", "train.eval_steps=4", "train.save_steps=4",
    "train.keep=9", "train.warmup=0", "eval.report_rows=0",
):  # fmt: skip
    _SHARED += ["--set", _field]
_METHODS = (
    "kd", "seqkd", "imitkd", "gkd", "distillm", "skd", "fdistill", "akl", "ab", "amid", "taid", "atkd", "distillm2",
    "minillm",
)  # fmt: skip
# Further runs: name → arguments in addition to the common ones.
_OTHERS = {
    "schedule-on": ["--method", "kd", "--schedule", "on"],
    "schedule-mixed": ["--method", "kd", "--schedule", "mixed"],
    "schedule-annealed": ["--method", "kd", "--schedule", "annealed"],
    "adaptive-fires": ["--set", "schedule.phi=0.6"],
    "adaptive-bulk-1": ["--set", "schedule.phi=0.6", "--set", "rollout.bulk=1"],
    "mixture": ["--set", "schedule.phi=0.6", "--set", "rollout.teacher_mix=0.2"],
    "accumulate": ["--method", "kd", "--set", "train.accumulate=2"],
    "gradient-checkpointing": ["--method", "kd", "--set", "train.gradient_checkpointing=true"],
    "bucket": ["--method", "kd", "--set", "data.bucket=4"],
    "cache-off": ["--method", "kd", "--teacher-cache", "off"],
    "cache-memory": ["--method", "kd", "--teacher-cache", "memory"],
    "cache-disk": ["--method", "kd", "--teacher-cache", "disk"],
    "dropout": ["--method", "kd", "--set", "student.dropout=0.1"],
    "reduction-sequence": ["--method", "kd", "--set", "objective.reduction=sequence"],
    "select-best": ["--method", "kd", "--set", "train.select=valid_loss"],
    "sft-before": ["--method", "kd", "--set", "student.sft_epochs=0.2"],
    "bf16": ["--method", "kd", "--dtype", "bf16"],
}
_RESUMED = ("kd", "adaptive-fires", "taid", "distillm2", "minillm", "seqkd", "lora", "cache-disk", "chat")


def runs(models: Path) -> dict[str, list[str]]:
    """Return every run by name, as arguments of the program. models: the directory that ``make_models`` filled."""

    def distill(*more: str, pair: list[str] = _PAIR, data: list[str] = _BUILTIN) -> list[str]:
        return ["distill", *pair, *data, *_SHARED, *more]

    def student(spec: str, teacher: str = "builtin") -> list[str]:
        return ["--teacher", teacher, "--student", spec]

    kd = ["--method", "kd"]
    lora = [*kd, "--lora", "4", "--set", "student.lora.dropout=0.1"]
    rows = models / "chat.jsonl"
    chat = [
        "--data",
        str(rows),
        "--set",
        f"data.valid={rows}",
        "--max-length",
        "128",
        "--set",
        "data.max_prompt_length=100",
    ]
    return {
        **{name: distill("--method", name) for name in _METHODS},
        **{name: distill(*more) for name, more in _OTHERS.items()},
        "sft": ["sft", "--model", "random:1x32", "--tokenizer", "chars", *_BUILTIN, *_SHARED],
        "layers": distill(*kd, pair=student("layers:2")),
        "layers-last": distill(*kd, pair=student("layers:1:last")),
        "width": distill(*kd, pair=student("width:0.5")),
        "gpt2": distill(*kd, pair=student("random:gpt2:1x32")),
        "lora": distill(*lora, pair=student("layers:2")),
        "lora-adapter": distill(*lora, "--set", "student.lora_output=adapter", pair=student(str(models / "llama"))),
        "t5": distill(*kd, pair=student("random:1x32", str(models / "t5"))),
        "t5-gkd": distill("--method", "gkd", pair=student("random:1x32", str(models / "t5"))),
        "chat": distill("--method", "gkd", pair=student("random:1x32", str(models / "chat")), data=chat),
    }


def make_models(place: Path) -> None:
    """Save random models that are not part of the program, with tokenizers: a Llama, a T5 and a chat model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    import distillm_cli

    builtin = Path(distillm_cli.__file__).parent / "assets" / "quickstart-teacher"
    tokenizer = AutoTokenizer.from_pretrained(builtin)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(5)
    llama = LlamaForCausalLM(LlamaConfig(**size, **ids, bos_token_id=None, max_position_embeddings=128))
    t5 = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=ids["pad_token_id"], **ids
    )
    for name, model in (("llama", llama), ("t5", T5ForConditionalGeneration(t5)), ("chat", llama)):
        model.save_pretrained(place / name)
        if name == "chat":
            tokenizer.chat_template = (
                "{% for m in messages %}{% if m.role == 'user' %}q {{ m.content }}{% else %}a {{ m.content }}{{ eos_token }}"
                "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}a {% endif %}"
            )
        tokenizer.save_pretrained(place / name)
    words = ("cab", "bad", "fed", "ace")
    rows = [{"messages": [{"role": role, "content": text} for role, text in _talk(word)]} for word in words]
    (place / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2), encoding="utf-8")


def _talk(word: str) -> list[tuple[str, str]]:
    return [("user", f"sort {word}"), ("assistant", "".join(sorted(word))), ("user", "again"), ("assistant", word)]


def digest(output: Path) -> str:
    """Return the SHA-256 of an output directory's weights and figures."""
    found = hashlib.sha256()
    for path in sorted([*output.glob("*.safetensors"), *output.glob("sft/*.safetensors")]):
        found.update(path.name.encode() + path.read_bytes())
    for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        figures = json.loads(line)
        if "alarm" in figures:
            continue
        found.update(json.dumps([figures.get(name) for name in FIGURES]).encode())
    return found.hexdigest()


def halve(output: Path) -> None:
    """Remove everything after the middle checkpoint of a finished run."""
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    shutil.rmtree(newest)
    for path in output.glob("*.safetensors"):
        path.unlink()


def computed(only: list[str], models: Path) -> Iterator[tuple[str, str]]:
    """Execute the runs in this process, with the imported package; yield each run's name and digest."""
    from distillm_cli.cli.app import main

    def call(argv: list[str]) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            code = main([*argv, "--json", "--quiet"])
        if code:
            raise SystemExit(f"{' '.join(argv)}\n{out.getvalue()}{err.getvalue()}")

    for name, argv in runs(models).items():
        output = Path(name)
        if only and name not in only and f"{name}-resumed" not in only:
            continue
        call([*argv, "--output", name])
        yield name, digest(output)
        if name in _RESUMED:
            again = Path(f"{name}-resumed")
            shutil.copytree(output, again)
            halve(again)
            call([*argv, "--output", str(again), "--resume"])
            yield str(again), digest(again)


def of_checkout(root: Path, only: list[str], models: Path) -> dict[str, str]:
    """Return the digests of the checkout in ``root``, by run."""
    with tempfile.TemporaryDirectory() as work:
        environment = os.environ | {
            "PYTHONPATH": str(root),
            "DISTILLM_CACHE": str(Path(work) / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(models), "--only", *only]
        done = subprocess.run(command, cwd=work, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the runs of {root} failed")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout to compare with")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="only these runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # a process that computes, for one checkout
    given = parser.parse_args()
    if given.worker is not None:
        print(json.dumps(dict(computed(given.only, given.worker))))
        return
    checkout = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as models:
        sys.path.insert(0, str(checkout))
        make_models(Path(models))
        found = of_checkout(checkout, given.only, Path(models))
        other = None if given.against is None else of_checkout(given.against.resolve(), given.only, Path(models))
    differing = [] if other is None else [name for name in {**found, **other} if found.get(name) != other.get(name)]
    if given.json:
        print(json.dumps({"runs": found, "differing": differing}))
    else:
        for name, value in found.items():
            print(f"{value[:16]}  {name}{'  DIFFERS' if name in differing else ''}")
        compared = "" if other is None else f", {len(differing)} differ"
        print(f"{len(found)} runs{compared}")
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
