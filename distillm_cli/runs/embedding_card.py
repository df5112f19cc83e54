"""Publish a student for sentence embeddings: model, files of sentence-transformers, tokenizer and model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import distillm_cli
from distillm_cli.config.load import Resolved
from distillm_cli.config.yaml_io import text_of
from distillm_cli.models.sentence import SentenceEncoder
from distillm_cli.runs import output_dir
from distillm_cli.runs.model_card import front_matter
from distillm_cli.training.distributed import in_first_process
from distillm_cli.training.state import TrainerState
from distillm_cli.utils.storage import storing
from distillm_cli.utils.text import redact


@in_first_process
def publish_embeddings(
    student: SentenceEncoder,
    output: Path,
    resolved: Resolved,
    state: TrainerState,
    figures: Mapping[str, Mapping[str, float | None]],
    measured_on: str,
    *,
    dtype: torch.dtype,
    dense: Tensor | None,
) -> None:
    """Write the student and its card into ``output``, for transformers and sentence-transformers. Raises StorageError.

    figures: by model. measured_on: description of the rows. dense: weight of a Dense module, of the teacher's width.
    """
    hint = "free disk space, then run the command again with --resume: the training is not repeated"
    with storing(f"cannot write the model into {output}", hint), output_dir.publishing(output) as staged:
        student.save(staged, dtype, dense)
        card = embedding_card(student, resolved, state, figures, measured_on, dense)
        (staged / output_dir.CARD).write_text(card, encoding="utf-8")


def embedding_card(
    student: SentenceEncoder,
    resolved: Resolved,
    state: TrainerState,
    figures: Mapping[str, Mapping[str, float | None]],
    measured_on: str,
    dense: Tensor | None,
) -> str:
    """Return the model card: Markdown with the front matter that the hub reads."""
    recipe = resolved.recipe
    disco = recipe.disco
    front = front_matter(resolved, "sentence-similarity")
    front["tags"] = [*front["tags"], "feature-extraction"]
    if student.loads_in_sentence_transformers:
        front["library_name"] = "sentence-transformers"
        front["tags"].append("sentence-transformers")
    path = recipe.student.required_path
    name = Path(path).name if Path(path).is_dir() else path
    lines = [
        "---",
        *(f"{key}: {text_of(value)}" for key, value in front.items()),
        "---",
        "",
        f"# {name}, distilled",
        "",
    ]
    width = student.width if dense is None else dense.shape[0]
    facts = {
        "method": recipe.method,
        "student": path,
        "teacher": recipe.teacher.path,
        "data": recipe.data.source,
        "loss": f"{disco.loss}, queue {disco.queue:,}" if disco.loss == "infonce" else disco.loss,
        "fine-tuned on pairs": f"{disco.pairs_epochs:g} × the rows" if disco.pairs_epochs else None,
        "embedding": f"{width} numbers, {student.pooling} pooling, at most {student.max_length:,} tokens",
        "steps": f"{state.step:,}",
        "seed": recipe.train.seed,
        "created with": f"distillm {distillm_cli.__version__}",
    }
    lines += [f"- **{key}**: {value}" for key, value in facts.items() if value is not None]
    lines += ["", "```python", "from sentence_transformers import SentenceTransformer", ""]
    lines += [
        'model = SentenceTransformer("PATH")',
        'embeddings = model.encode(["A sentence.", "Another one."])',
        "```",
    ]
    columns = list(dict.fromkeys(key for model in figures.values() for key in model))
    if columns:
        lines += ["", "## Held-out figures", ""]
        lines += [f"| model |{''.join(f' {key} |' for key in columns)}", "|---" * (1 + len(columns)) + "|"]
        for title, scores in figures.items():
            cells = [scores.get(key) for key in columns]
            lines.append(f"| {title} | " + " | ".join("–" if c is None else f"{c:.2f}" for c in cells) + " |")
        lines += ["", f"{measured_on[0].upper()}{measured_on[1:]}.", ""]
    return redact("\n".join([*lines, "", "`recipe.yaml` has all settings.", ""]))
