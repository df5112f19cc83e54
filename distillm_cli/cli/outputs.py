"""The output directory: named, checked, filled. It ends as an ordinary Hugging Face directory."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from distillm_cli.errors import CheckpointError, StorageError, UsageError

CHECKPOINTS, METRICS, RECIPE, EVAL = "checkpoints", "metrics.jsonl", "recipe.yaml", "eval"
SFT = "sft"  # the stage before distillation, an output directory in the output directory

# What a run writes; `--overwrite` clears these and nothing else, so that a mistyped path loses nobody's files.
_OURS = (
    CHECKPOINTS, METRICS, RECIPE, EVAL, "README.md", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "chat_template.jinja", "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors", SFT,
)  # fmt: skip


def default_name(recipe: str | None, data: str, student: str, method: str, *, resume: bool) -> Path:
    """``runs/dolly-gpt2-distillm``, with a number where that is taken; on a resume the newest of that name."""

    def short(text: str) -> str:
        stem = Path(text.rstrip("/")).name.removesuffix(".jsonl").removesuffix(".json")
        return re.sub(r"[^\w.+-]+", "-", stem).strip("-.") or "run"

    name = short(recipe) if recipe else f"{short(data)}-{short(student)}"
    base = Path("runs") / (name if method in name else f"{name}-{method}")
    taken = [base] if base.exists() else []
    while (candidate := base.with_name(f"{base.name}-{len(taken) + 1}")).exists() and taken:
        taken.append(candidate)
    if resume:
        return taken[-1] if taken else base
    return candidate if taken else base


def check(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Makes sure the directory may be written. A non-empty one is refused without ``resume`` or ``overwrite``.

    Nothing in it is touched. Raises UsageError, CheckpointError, StorageError.
    """
    if resume and overwrite:
        raise UsageError("--resume and --overwrite exclude each other", hint="give one of them")
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file", hint="give a directory")
    if resume and not any((place / CHECKPOINTS).is_dir() for place in (output, output / SFT)):
        raise CheckpointError(
            f"nothing to resume: {output / CHECKPOINTS} does not exist", hint="start without --resume"
        )
    if output.is_dir() and any(output.iterdir()) and not (resume or overwrite):
        raise UsageError(
            f"output directory {output} is not empty",
            hint="choose another --output, or give --resume to go on or --overwrite to start anew",
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(f"cannot write to {output}: {error.strerror}", hint="choose another --output") from error


def clear(output: Path) -> None:
    """Removes what an earlier run wrote into the directory, and only that."""
    shards = [p.name for p in output.glob("model-*-of-*.safetensors")]
    for name in (*_OURS, *shards):
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    staged = path.with_name(f".staging-{path.name}")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def publish(staged: Path, output: Path) -> None:
    """Moves a finished model directory's files into ``output``, weights last, and removes ``staged``."""
    for path in sorted(staged.iterdir(), key=lambda p: p.suffix == ".safetensors"):
        path.replace(output / path.name)
    staged.rmdir()
