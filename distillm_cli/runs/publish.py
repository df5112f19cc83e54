"""Publish the trained student: model, tokenizer and model card in the output directory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distillm_cli.config.load import Resolved
from distillm_cli.models.composite import is_composite
from distillm_cli.runs import output_dir
from distillm_cli.runs.model_card import CardFacts, model_card
from distillm_cli.training.distributed import in_first_process
from distillm_cli.utils.storage import storing

if TYPE_CHECKING:
    from distillm_cli.runs.prepare import Prepared
    from distillm_cli.runs.report import ModelReport
    from distillm_cli.training.state import TrainerState


@in_first_process
def publish_model(
    run: Prepared,
    output: Path,
    resolved: Resolved,
    state: TrainerState,
    report: Mapping[str, ModelReport],
    about: CardFacts,
    export_extras: Callable[[Path], None],
) -> None:
    """Write the student, its tokenizer and its card into ``output``, where ``from_pretrained(output)`` finds them.

    report: by model name. export_extras: writes more of what was trained into a directory. Raises StorageError.
    """
    hint = "free disk space, then run the command again with --resume: the training is not repeated"
    with storing(f"cannot write the model into {output}", hint), output_dir.publishing(output) as staged:
        run.export_model(staged)
        export_extras(staged)
        task = "text2text-generation" if run.student.is_encoder_decoder else "text-generation"
        if is_composite(run.student.model.config):
            task = "image-text-to-text"
        card = model_card(resolved, state, report, about, task=task)
        (staged / output_dir.CARD).write_text(card, encoding="utf-8")
