"""The model card of an output directory: what was trained, from what, and the figures that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import distillm_cli
from distillm_cli.config.load import Resolved
from distillm_cli.config.ownership import objective_words
from distillm_cli.config.yaml_io import text_of
from distillm_cli.utils.text import redact

if TYPE_CHECKING:
    from distillm_cli.training.state import TrainerState


def model_card(
    resolved: Resolved, reached: TrainerState, measured: Mapping[str, Any], *, task: str, measured_on: str
) -> str:
    """Markdown with the front matter that the hub reads. measured: by model name, with ``valid_loss`` and ``scores``.

    task: the hub's name for what such a model does. measured_on: the rows, and how they were answered, in words.
    """
    recipe = resolved.recipe
    student, is_adapter = recipe.student, recipe.student.lora_output == "adapter"
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": task}
    if is_adapter:
        front["base_model"] = redact(student.path)
    front["tags"] = [recipe.method]
    if student.lora.r is not None:
        front["tags"].append("lora")
    if recipe.method != "sft":
        front["tags"].append("knowledge-distillation")
    lines = [
        "---",
        *(f"{key}: {text_of(value)}" for key, value in front.items()),
        "---",
        "",
        f"# {student.path}, " + ("fine-tuned" if recipe.method == "sft" else "distilled"),
        "",
    ]
    facts = {
        "method": recipe.method,
        "student": student.path,
        "trained": _trained(student, is_adapter),
        "fine-tuned before": f"{student.sft_epochs:g} × the rows" if student.sft_epochs else None,
        "teacher": recipe.teacher.path if recipe.method != "sft" else None,
        "data": recipe.data.source,
        "objective": "cross-entropy" if recipe.method == "sft" else objective_words(recipe.objective),
        "schedule": recipe.schedule.kind if recipe.method != "sft" else None,
        "steps": f"{reached.step:,} ({', '.join(f'{n:,} {source}' for source, n in sorted(reached.sources.items()))})",
        "supervised tokens": f"{reached.tokens:,}",
        "seed": recipe.train.seed,
        "made with": f"distillm {distillm_cli.__version__}",
    }
    lines += [f"- **{name}**: {value}" for name, value in facts.items() if value is not None]
    metrics = list(dict.fromkeys(metric for m in measured.values() for metric in m.scores))
    lines += ["", "## Held-out figures", "", f"| model | valid CE |{''.join(f' {name} |' for name in metrics)}"]
    lines.append("|---" * (2 + len(metrics)) + "|")
    for name, m in measured.items():
        figures = [m.valid_loss, *(m.scores.get(metric) for metric in metrics)]
        lines.append(f"| {name} | " + " | ".join("–" if f is None else f"{f:.3f}" for f in figures) + " |")
    lines += ["", f"{measured_on[0].upper()}{measured_on[1:]}.", ""]
    lines += ["Valid CE: mean cross-entropy per response token, nats. `recipe.yaml` holds every setting.", ""]
    return redact("\n".join(lines))


def _trained(student, is_adapter: bool) -> str | None:
    if student.lora.r is None:
        return None
    what = f"a LoRA adapter of rank {student.lora.r}"
    return f"{what}; this directory is the adapter alone" if is_adapter else f"{what}, merged into the weights"
