"""Load a model to generate with, and the settings of the run that trained it: what ``generate`` and ``eval`` share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distillm_cli.config.explain import leaves
from distillm_cli.config.load import Resolved, resolve, with_resolved_values
from distillm_cli.config.merging import read_document
from distillm_cli.config.schema import Recipe
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Row
from distillm_cli.errors import RecipeError
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.chat_format import read_template, set_languages, usual_end_token
from distillm_cli.models.pair import load_backbone, resolve_device, resolve_dtype
from distillm_cli.runs.output_dir import RECIPE
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.types import Sequence, collate
from distillm_cli.utils import manifest
from distillm_cli.utils.memory import resume_garbage_collection
from distillm_cli.utils.threads import set_threads


@dataclass(frozen=True)
class Settings:
    """Say where the settings of ``generate`` and ``eval`` come from.

    recipe: a file, a shipped name, or one that is resolved already (a pipeline's stage); None for the one beside the
    model, where there is one. flags, sets: what is stronger than the recipe.
    """

    recipe: str | Resolved | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    sets: list[str] | None = None


def resolve_settings(command: str, model: str, settings: Settings, listener: Listener) -> tuple[Resolved, bool]:
    """Return the recipe to go by, and whether it is the model's own.

    A model's own recipe has the template that it was trained with. What that recipe records of its machine is left out:
    this may be another one.
    """
    if isinstance(settings.recipe, Resolved):
        return settings.recipe, False
    own = None if settings.recipe is not None else own_recipe(model, listener)
    resolved = resolve(command=command, recipe=own or settings.recipe, flags=settings.flags, sets=settings.sets)
    return (resolved, False) if own is None else (_on_this_machine(resolved, own), True)


def _on_this_machine(resolved: Resolved, own: Path) -> Resolved:
    """Return the recipe of the run that made the model, without what holds for that machine alone.

    The chat template is saved with the model's tokenizer, wherever the run had it from.
    """
    reset = {
        key: (leaves()[key].default, "default")
        for key in ("train.device", "train.threads", "data.chat_template")
        if resolved.origin[key].startswith(f"{own.name}:")
    }
    return with_resolved_values(resolved, reset)


def own_recipe(model: str, listener: Listener) -> Path | None:
    """Return the recipe of the run that made this model: in its directory, or above its ``checkpoints/``.

    None for a directory that no run wrote, and with a warning where a run's recipe is missing or where another program
    has left a ``recipe.yaml``. Raises RecipeError for one that is damaged: the prompts would be formatted differently.
    """
    place = Path(model).expanduser()
    homes = [place] if place.parent.name != "checkpoints" else [place, place.parent.parent]
    own = next((home / RECIPE for home in homes if (home / RECIPE).is_file()), None)
    if own is None:
        if any(manifest.read_manifest(home) for home in homes):
            what = f"{homes[-1] / RECIPE} is missing: prompts of {model} get the default settings, not those of its training"
            listener(Warned(f"{what}; put it back, or give --recipe FILE"))
        return None
    listed = manifest.read_manifest(own.parent)
    if listed is not None and RECIPE in listed["files"] and manifest.difference(own.parent, listed, RECIPE):
        raise _damaged(own, "it differs from the manifest beside it")
    was_of_run = "  # default" in own.read_text(
        encoding="utf-8", errors="replace"
    )  # a run writes down where each value came from
    try:
        found = resolve(command="eval", recipe=own)
    except RecipeError as error:
        if was_of_run or not _is_mapping(own):
            raise _damaged(own, str(error)) from error
        listener(Warned(f"{own} is not used: {error}"))  # other programs leave a recipe.yaml in their output too
        return None
    if was_of_run and any(not origin.startswith(f"{own.name}:") for origin in found.origin.values()):
        raise _damaged(own, "lines of it are missing")
    return own


def _is_mapping(path: Path) -> bool:
    try:
        read_document(path, str(path))
    except RecipeError:
        return False
    return True


def _damaged(own: Path, why: str) -> RecipeError:
    hint = f"put it back as the run wrote it, or give --recipe {own} to use it as it is (--recipe FILE for another)"
    return RecipeError(f"{own} is damaged or changed: {why}", hint=hint)


def load_model(model: str, recipe: Recipe, listener: Listener) -> tuple[Backbone, Encoder]:
    """Load a model on the recipe's device in its precision, and return it with its encoder. Raises ModelError."""
    resume_garbage_collection()
    set_threads(recipe.train.threads, listener)
    device = resolve_device(recipe.train.device)
    backbone = load_backbone(model, dtype=precision(recipe), device=device, listener=listener)
    if recipe.data.chat_template not in ("auto", "student", "teacher"):
        backbone.tokenizer.chat_template = read_template(recipe.data.chat_template)
    set_languages(backbone.tokenizer, recipe.data, [backbone])
    encoder = Encoder(
        backbone.tokenizer,
        recipe.data,
        is_encoder_decoder=backbone.is_encoder_decoder,
        stops=backbone.stop_ids,
        end_id=usual_end_token(backbone),
    )
    return backbone, encoder


def report_template(encoder: Encoder, rows: Iterable[Row], listener: Listener) -> None:
    """Report which template the prompts use."""
    forms = sorted({encoder.renderer.form(row) for row in rows})
    names = {"chat": "chat (the tokenizer's chat template)", "exact": "exact (prompts as they are)"}
    listener(Note(f"template: {', '.join(names.get(form, form) for form in forms)}"))


def precision(recipe: Recipe) -> torch.dtype:
    """Return the dtype that a model generates in."""
    return resolve_dtype(recipe.student.dtype, resolve_device(recipe.train.device))


def check_model(backbone: Backbone, encoder: Encoder, row: Row, listener: Listener) -> None:
    """Compare the head's logits with the model's own on one prompt; warn where they differ and use the model's own.

    Raises ModelError for a model that cannot generate.
    """
    ids = encoder.prompt_ids(row)
    ids = ids if backbone.context is None else ids[: backbone.context - 1]
    if not backbone.check_head(collate([Sequence(ids, ids[-1:])]).to(backbone.device)):
        kind = backbone.model.config.model_type
        listener(Warned(f"the head of this {kind} model is not a plain one: using the model's own logits, slower"))
    backbone.check_decoding()
