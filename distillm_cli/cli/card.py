"""The model card of an output directory: what was trained, from what, and the figures that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import distillm_cli
from distillm_cli.config.load import Resolved

if TYPE_CHECKING:
    from distillm_cli.core.engine import Progress


def model_card(resolved: Resolved, reached: Progress, measured: Mapping[str, Any], *, task: str) -> str:
    """Markdown with the front matter that the hub reads. measured: by model name, with ``valid_loss`` and ``scores``.

    task: the hub's name for what such a model does.
    """
    recipe = resolved.recipe
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags:", f"- {recipe.method}"]
    if recipe.method != "sft":
        lines.append("- knowledge-distillation")
    lines += ["---", "", f"# {recipe.student.path}, " + ("fine-tuned" if recipe.method == "sft" else "distilled"), ""]
    facts = {
        "method": recipe.method,
        "student": recipe.student.path,
        "teacher": recipe.teacher.path if recipe.method != "sft" else None,
        "data": recipe.data.source,
        "objective": _objective(recipe),
        "schedule": recipe.schedule.kind if recipe.method != "sft" else None,
        "steps": f"{reached.step:,} ({', '.join(f'{n:,} {source}' for source, n in sorted(reached.sources.items()))})",
        "supervised tokens": f"{reached.tokens:,}",
        "seed": recipe.train.seed,
        "made with": f"distillm {distillm_cli.__version__}",
    }
    lines += [f"- **{name}**: {value}" for name, value in facts.items() if value is not None]
    metrics = list(dict.fromkeys(metric for m in measured.values() for metric in m.scores))
    lines += ["", "## Held-out figures", "", f"| model | valid loss |{''.join(f' {name} |' for name in metrics)}"]
    lines.append("|---" * (2 + len(metrics)) + "|")
    for name, m in measured.items():
        figures = [m.valid_loss, *(m.scores.get(metric) for metric in metrics)]
        lines.append(f"| {name} | " + " | ".join("–" if f is None else f"{f:.3f}" for f in figures) + " |")
    lines += ["", "Valid loss: mean cross-entropy per response token, nats. `recipe.yaml` holds every setting.", ""]
    return "\n".join(lines)


def _objective(recipe) -> str:
    o = recipe.objective
    if recipe.method == "sft" or o.kd_weight == 0:
        return "cross-entropy"
    setting = {"skl": f" α={o.alpha:g}", "srkl": f" α={o.alpha:g}", "jsd": f" β={o.beta:g}"}.get(o.divergence, "")
    return f"{o.divergence}{setting}" + (f", kd_weight {o.kd_weight:g}" if o.kd_weight < 1 else "")
