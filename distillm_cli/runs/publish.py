"""Publish the trained student: model, tokenizer and model card in the output directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distillm_cli
from distillm_cli.config.field_usage import describe_objective
from distillm_cli.config.load import Resolved
from distillm_cli.config.schema import StudentConfig
from distillm_cli.config.yaml_io import text_of
from distillm_cli.models.composite import is_composite
from distillm_cli.runs import output_dir
from distillm_cli.utils.storage import storing
from distillm_cli.utils.text import redact

if TYPE_CHECKING:
    from distillm_cli.runs.prepare import Prepared
    from distillm_cli.runs.report import ModelReport
    from distillm_cli.training.state import TrainerState


def publish_model(
    run: Prepared,
    output: Path,
    resolved: Resolved,
    state: TrainerState,
    report: Mapping[str, ModelReport],
    measured_on: str,
) -> None:
    """Write the student, its tokenizer and its card into ``output``, where ``from_pretrained(output)`` finds them.

    report: by model name. measured_on: the rows and how responses were decoded, in words. Raises StorageError.
    """
    hint = "free some space, then type the command again with --resume: nothing is trained again"
    with storing(f"cannot write the model into {output}", hint), output_dir.publishing(output) as staged:
        run.export_model(staged)
        task = "text2text-generation" if run.student.is_encoder_decoder else "text-generation"
        if is_composite(run.student.model.config):
            task = "image-text-to-text"
        card = model_card(resolved, state, report, task=task, measured_on=measured_on)
        (staged / output_dir.CARD).write_text(card, encoding="utf-8")


def model_card(
    resolved: Resolved, state: TrainerState, report: Mapping[str, Any], *, task: str, measured_on: str
) -> str:
    """Return the model card: Markdown with the front matter that the hub reads.

    report: by model name, with ``valid_loss`` and ``scores``. task: the hub's name for the model's task.
    measured_on: the rows and how responses were decoded, in words.
    """
    recipe = resolved.recipe
    student = recipe.student
    verb = "fine-tuned" if recipe.method == "sft" else "distilled"
    lines = ["---"]
    lines += [f"{key}: {text_of(value)}" for key, value in _front_matter(resolved, task).items()]
    lines += ["---", "", f"# {student.path}, {verb}", ""]
    facts = {
        "method": recipe.method,
        "student": student.path,
        "trained": _trained_part(student),
        "fine-tuned before": f"{student.sft_epochs:g} × the rows" if student.sft_epochs else None,
        "teacher": recipe.teacher.path if recipe.method != "sft" else None,
        "data": recipe.data.source,
        "objective": "cross-entropy" if recipe.method == "sft" else describe_objective(recipe.objective),
        "schedule": recipe.schedule.kind if recipe.method != "sft" else None,
        "steps": f"{state.step:,} ({', '.join(f'{n:,} {source}' for source, n in sorted(state.sources.items()))})",
        "supervised tokens": f"{state.tokens:,}",
        "seed": recipe.train.seed,
        "made with": f"distillm {distillm_cli.__version__}",
    }
    lines += [f"- **{name}**: {value}" for name, value in facts.items() if value is not None]
    lines += ["", "## Held-out figures", "", *_figures_table(report)]
    lines += ["", f"{measured_on[0].upper()}{measured_on[1:]}.", ""]
    lines += ["Valid CE: mean cross-entropy per response token, nats. `recipe.yaml` holds every setting.", ""]
    return redact("\n".join(lines))


def _front_matter(resolved: Resolved, task: str) -> dict[str, Any]:
    recipe = resolved.recipe
    is_adapter = recipe.student.lora_output == "adapter"
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": task}
    if is_adapter:
        front["base_model"] = redact(recipe.student.path)
    front["tags"] = [recipe.method]
    if recipe.student.lora.r is not None:
        front["tags"].append("lora")
    if recipe.method != "sft":
        front["tags"].append("knowledge-distillation")
    return front


def _trained_part(student: StudentConfig) -> str | None:
    if student.lora.r is None:
        return None
    what = f"a LoRA adapter of rank {student.lora.r}"
    is_adapter = student.lora_output == "adapter"
    return f"{what}; this directory is the adapter alone" if is_adapter else f"{what}, merged into the weights"


def _figures_table(report: Mapping[str, Any]) -> list[str]:
    metrics = list(dict.fromkeys(metric for model in report.values() for metric in model.scores))
    lines = [f"| model | valid CE |{''.join(f' {name} |' for name in metrics)}"]
    lines.append("|---" * (2 + len(metrics)) + "|")
    for name, model in report.items():
        figures = [model.valid_loss, *(model.scores.get(metric) for metric in metrics)]
        lines.append(f"| {name} | " + " | ".join("–" if f is None else f"{f:.3f}" for f in figures) + " |")
    return lines
