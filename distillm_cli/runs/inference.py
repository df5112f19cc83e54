"""Load a model for generation, and the settings of the run that trained it, for ``generate`` and ``eval``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distillm_cli.config.explain import leaves
from distillm_cli.config.load import Resolved, resolve, with_resolved_values
from distillm_cli.config.merging import read_document
from distillm_cli.config.schema import ModelSide, Recipe
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Row
from distillm_cli.errors import RecipeError, UsageError
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
    """Describe the sources of the settings of ``generate`` and ``eval``.

    recipe: a file, a shipped name, or a resolved recipe (of a pipeline's stage); None: the model's own, if it has one.
    flags, sets: override the recipe.
    """

    recipe: str | Resolved | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    sets: list[str] | None = None


def resolve_settings(command: str, model: str, settings: Settings, listener: Listener) -> tuple[Resolved, bool]:
    """Return the recipe to use, and whether it is the model's own recipe.

    A model's own recipe has the template that it was trained with. Its settings for the machine of that run are reset.
    """
    if isinstance(settings.recipe, Resolved):
        return settings.recipe, False
    path = None if settings.recipe is not None else own_recipe(model, listener)
    resolved = resolve(command=command, recipe=path or settings.recipe, flags=settings.flags, sets=settings.sets)
    if path is None:
        return resolved, False
    return _on_this_machine(resolved, path), True


def _on_this_machine(resolved: Resolved, path: Path) -> Resolved:
    """Return the recipe of the run that made the model, with the settings for that run's machine reset.

    path: of the recipe. The chat template is reset too: it was saved with the model's tokenizer. A template of the student's
    side becomes that of the data, and what the teacher sees becomes a setting of its own side.
    """
    recorded = [key for key, origin in resolved.origin.items() if origin.startswith(f"{path.name}:")]
    reset: dict[str, tuple[Any, str]] = {
        key: (leaves()[key].default, "default")
        for key in ("train.device", "train.threads", "data.chat_template", "student.chat_template", "student.template")
        if key in recorded
    }
    teacher, student = resolved.recipe.data_of("teacher"), resolved.recipe.data_of("student")
    if resolved.recipe.student.template is not None and "data.template" in recorded:
        reset["data.template"] = (student.template, resolved.origin["student.template"])
        reset["teacher.template"] = (teacher.template, resolved.origin["teacher.template"])
    choices = {teacher.chat_template, student.chat_template}
    is_same = len(choices) == 1 or choices == {"auto", "student"}
    reset["teacher.chat_template"] = (
        None if is_same else teacher.chat_template,
        resolved.origin["teacher.chat_template"],
    )
    return with_resolved_values(resolved, reset)


def own_recipe(model: str, listener: Listener) -> Path | None:
    """Return the recipe of the run that made this model: in its directory, or above its ``checkpoints/``.

    None for a directory that no run wrote; with a warning, also if a run's recipe is missing or another program wrote a
    ``recipe.yaml``. Raises RecipeError for one that is damaged: the prompts would be formatted differently.
    """
    place = Path(model).expanduser()
    directories = [place] if place.parent.name != "checkpoints" else [place, place.parent.parent]
    path = next((directory / RECIPE for directory in directories if (directory / RECIPE).is_file()), None)
    if path is None:
        if any(manifest.read_manifest(directory) for directory in directories):
            missing = directories[-1] / RECIPE
            what = f"{missing} is missing: prompts of {model} use the default settings, not those of its training"
            listener(Warned(f"{what}; restore it, or use --recipe FILE"))
        return None
    listed = manifest.read_manifest(path.parent)
    if listed is not None and RECIPE in listed["files"] and manifest.difference(path.parent, listed, RECIPE):
        raise _damaged(path, "it differs from its manifest")
    # A run writes the origin of each value.
    is_of_run = "  # default" in path.read_text(encoding="utf-8", errors="replace")
    try:
        resolved = resolve(command="eval", recipe=path)
    except RecipeError as error:
        if is_of_run or not _is_mapping(path):
            raise _damaged(path, str(error)) from error
        listener(Warned(f"{path} is not used: {error}"))  # other programs write a recipe.yaml too
        return None
    if is_of_run and any(not origin.startswith(f"{path.name}:") for origin in resolved.origin.values()):
        raise _damaged(path, "some lines are missing")
    return path


def _is_mapping(path: Path) -> bool:
    try:
        read_document(path, str(path))
    except RecipeError:
        return False
    return True


def _damaged(path: Path, why: str) -> RecipeError:
    hint = f"restore the original, or use --recipe {path} to accept it (--recipe FILE for another)"
    return RecipeError("recipe.damaged", f"{path} is damaged or changed: {why}", hint=hint)


def side_of(model: str, recipe: Recipe) -> ModelSide:
    """Return whose prompts a model sees: the teacher's if the recipe names it as the teacher, and not as the student."""
    is_teacher, is_student = (
        path is not None and Path(path).expanduser() == Path(model).expanduser()
        for path in (recipe.teacher.path, recipe.student.path)
    )
    return "teacher" if is_teacher and not is_student else "student"


def load_model(
    model: str, recipe: Recipe, listener: Listener, side: ModelSide | None = None
) -> tuple[Backbone, Encoder]:
    """Load a model on the recipe's device in the recipe's precision, and return it with its encoder.

    side: whose prompts it sees; None: those of ``side_of``. Raises ModelError.
    """
    resume_garbage_collection()
    set_threads(recipe.train.threads, listener)
    device = resolve_device(recipe.train.device)
    backbone = load_backbone(model, dtype=precision(recipe), device=device, listener=listener)
    return backbone, _encoder_of(backbone, recipe, side or side_of(model, recipe))


def load_without_weights(model: str, recipe: Recipe) -> tuple[Backbone, Encoder]:
    """Load a model's config, tokenizer and end tokens, and return them with its encoder. Raises ModelError."""
    from distillm_cli.models.served import load_skeleton

    resume_garbage_collection()
    backbone = load_skeleton(model, dtype=torch.float32)
    return backbone, _encoder_of(backbone, recipe, side_of(model, recipe))


def _encoder_of(backbone: Backbone, recipe: Recipe, side: ModelSide) -> Encoder:
    """Return the encoder of a model's prompts, with the chat template and the languages of the recipe."""
    data = recipe.data_of(side)
    if data.chat_template not in ("auto", "student", "teacher"):
        backbone.tokenizer.chat_template = read_template(data.chat_template)
    set_languages(backbone.tokenizer, data, [backbone])
    return Encoder(
        backbone.tokenizer,
        data,
        is_encoder_decoder=backbone.is_encoder_decoder,
        stops=backbone.stop_ids,
        end_id=usual_end_token(backbone),
    )


def teacher_encoder(encoder: Encoder, teacher: Backbone, recipe: Recipe, template: str) -> Encoder:
    """Return the encoder of the prompts that a teacher sees beside the student, as in training.

    encoder: of the student's prompts, with its tokenizer; returned unchanged if both see the same. template: of the
    teacher's side. Raises UsageError for a chat template that neither model has.
    """
    choice = recipe.data_of("teacher").chat_template
    if (template, choice) == (encoder.template, encoder.data.chat_template):
        return encoder
    found = encoder.with_settings(template=template, chat_template=choice)
    if choice == encoder.data.chat_template:
        return found
    if choice in ("auto", "student"):
        what = f"teacher.chat_template = {choice}, but the student was trained with another template than its own"
        hint = "set it to teacher or to a Jinja file, in a recipe for --recipe"
        raise UsageError("usage.no_chat_template", what, hint=hint)
    chat_template = teacher.tokenizer.chat_template if choice == "teacher" else read_template(choice)
    if chat_template is None:
        raise UsageError("usage.no_chat_template", f"chat_template = {choice}, but the teacher's tokenizer has none")
    return found.with_chat_template(chat_template)


def report_template(encoder: Encoder, rows: Iterable[Row], listener: Listener) -> None:
    """Report which template the prompts use."""
    forms = sorted({encoder.renderer.form(row) for row in rows})
    names = {"chat": "chat (the tokenizer's chat template)", "exact": "exact (unchanged prompts)"}
    listener(Note(f"template: {', '.join(names.get(form, form) for form in forms)}"))


def precision(recipe: Recipe) -> torch.dtype:
    """Return the dtype that a model generates in."""
    return resolve_dtype(recipe.student.dtype, resolve_device(recipe.train.device))


def check_model(backbone: Backbone, encoder: Encoder, row: Row, listener: Listener) -> None:
    """Compare the head's logits with the model's own on one prompt; if they differ, warn and use the model's own.

    Raises ModelError for a model that cannot generate.
    """
    ids = encoder.prompt_ids(row)
    ids = ids if backbone.context is None else ids[: backbone.context - 1]
    if not backbone.check_head(collate([Sequence(ids, ids[-1:])]).to(backbone.device)):
        kind = backbone.model.config.model_type
        listener(
            Warned(
                f"the head of this {kind} model is not a plain matrix product: using the model's own logits, "
                "which is slower"
            )
        )
    backbone.check_decoding()
