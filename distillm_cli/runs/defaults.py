"""Choose defaults for the models of a run: learning rate, epochs, warm-up and lengths that are `auto` in the recipe.

| student                                        | distill: lr, epochs | sft: lr, epochs | warm-up |
|------------------------------------------------|---------------------|-----------------|---------|
| built from scratch (random:, layers:, …)       | 5e-4, 20            | 5e-5, 3         | 0       |
| GPT-2 under 0.5 B                              | 5e-4, 20            | 5e-5, 3         | 0       |
| GPT-2 from 0.5 B                               | 1e-4, 10            | 5e-5, 3         | 0       |
| OPT under 1 B                                  | 5e-5, 20            | 5e-5, 3         | 0       |
| OPT from 1 B                                   | 5e-5, 10            | 5e-5, 3         | 0       |
| Llama base under 0.3 B                         | 5e-4, 20            | 5e-5, 3         | 0       |
| Llama base with LoRA                           | 5e-4, 10            | 5e-4, 3         | 0       |
| any of these with LoRA                         | 5e-4, as above      | 5e-4, 3         | 0       |
| encoder-decoder                                | 1e-4, 3             | 1e-4, 3         | 10 %    |
| any other under 0.3 B, with a chat template    | 5e-5, 3             | 5e-5, 3         | 10 %    |
| any other under 0.3 B, base                    | 1e-4, 3             | 1e-4, 3         | 10 %    |
| any other from 0.3 B, with a chat template     | 1e-5, 3             | 1e-5, 3         | 10 %    |
| any other from 0.3 B, base                     | 2e-5, 3             | 2e-5, 3         | 10 %    |
| the last five with LoRA                        | 10 times the rate   | 10 times        | 10 %    |

Lengths: 512 if every loaded model is GPT-2, OPT or Llama without a chat template (or none is loaded), else 2048, within
the models' context. A prompt may have 256 tokens less than that, but at least 256.

Sources: the upper part follows the DistiLLM paper (arXiv 2402.03898), which trains GPT-2 and OPT in full and OpenLLaMA
with LoRA; students from scratch and small Llama bases are treated as its small GPT-2. The lower part is common
practice: LLaMA-Factory's examples (full 1e-5, LoRA 1e-4, 3 epochs, warm-up 0.1, 2048 tokens), TRL's SFTConfig (2e-5),
ms-swift's Qwen chat scripts (1e-5, LoRA 1e-4, 2048 tokens), "LoRA Without Regret" (ten times the full rate), and
transformers' advice for T5 (1e-4).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from distillm_cli.config.field_usage import is_used, value_of
from distillm_cli.config.load import Resolved
from distillm_cli.config.pipeline_recipe import PREFIX, Pipeline, Stage
from distillm_cli.config.schema import AUTO, Recipe
from distillm_cli.config.student_spec import BUILTIN_MODELS, ConfigFile, RandomModel, is_built, parse_student
from distillm_cli.errors import RecipeError, UsageError
from distillm_cli.models.model_families import family_of
from distillm_cli.models.model_info import ModelInfo, read_model_info
from distillm_cli.models.model_paths import locate_model
from distillm_cli.utils.text import format_parameters

LENGTHS = ("data.max_length", "data.max_prompt_length")
KEYS = ("train.lr", "train.epochs", "train.warmup", *LENGTHS)
PAPER_LENGTH = 512
LENGTH = 2048
MIN_PROMPT = 256
_SMALL = 0.3e9  # parameters

StageModels = Mapping[str, ModelInfo | None]  # models of earlier stages, by ``stage:NAME``


class Rates(NamedTuple):
    """Hold a row of the table, and a description of its models."""

    lr: float
    epochs: float
    warmup: float
    who: str


def fitted(resolved: Resolved, known: StageModels | None = None, model: str | None = None) -> Resolved:
    """Replace each `auto` of the recipe by the value for its models, with the reason as its origin.

    model: used instead of the recipe's student, in a stage that does not train. `auto` remains if a model's config
    cannot be read; loading the model reports the reason. Raises RecipeError if a value contradicts the recipe.
    """
    recipe = resolved.recipe
    known = known or {}
    path = model or recipe.student.path
    value = partial(value_of, recipe)
    auto_keys = [key for key in KEYS if value(key) == AUTO and is_used(key, value)]
    if not auto_keys:
        return resolved
    student = student_info(recipe, known, model)
    if student is None:
        why = f"auto: no config of {path} available" if path else "auto: depends on the models"
        return replace(resolved, origin=resolved.origin | dict.fromkeys(auto_keys, why))
    values = dict(_values(recipe, student, _teacher(recipe, known), auto_keys))
    if not values:  # the number of parameters is not known
        return resolved
    changes = {key: value for key, (value, _) in values.items()}
    origin = {key: f"auto: {number(value)} {why}" for key, (value, why) in values.items()}
    return replace(resolved, recipe=_with(recipe, changes), origin=resolved.origin | origin)


def student_info(recipe: Recipe, known: StageModels, model: str | None = None) -> ModelInfo | None:
    """Return the description of the recipe's student (or of ``model``); None if its config cannot be read."""
    path = model or recipe.student.path
    if path is None or path in known:
        return known.get(path or "")
    if is_built(path):
        teacher = _teacher(recipe, known)
        info = ModelInfo(_family_of(path)) if teacher is None else teacher
        return replace(info, is_built=True, count=lambda: None)
    return read_model_info(path, None if model else recipe.student.revision)


def _family_of(path: str) -> str:
    """Return the family of a student that is built without a teacher: random:[FAMILY:]SIZE, or a config.json."""
    spec = parse_student(path)
    if isinstance(spec, ConfigFile):
        with suppress(OSError, ValueError, AttributeError):
            return str(json.loads(Path(path).expanduser().read_text(encoding="utf-8")).get("model_type"))
    return (spec.family or "llama") if isinstance(spec, RandomModel) else "llama"


def _teacher(recipe: Recipe, known: StageModels) -> ModelInfo | None:
    path = recipe.teacher.path
    if path is None or (recipe.method == "sft" and not recipe.student.is_built):
        return None
    if recipe.has_random_teacher:  # it is built like the student
        return None
    return known[path] if path in known else read_model_info(path, recipe.teacher.revision)


def is_in_paper(info: ModelInfo) -> bool:
    """Return whether a model is of one of the paper's families, without a chat template."""
    return family_of(info.family).paper_name is not None and not info.has_template


def rates(student: ModelInfo, *, sft: bool, lora: bool) -> Rates | None:
    """Return the row of the table for a student; None if it depends on a size that is not known."""
    if student.is_built or is_in_paper(student):
        paper_rates = _paper_rates(student, lora)
        if paper_rates is not None:
            lr, epochs, who = paper_rates
            if sft:
                lr = 5e-5
                epochs = 3.0
            return Rates(5e-4 if lora else lr, epochs, 0.0, f"for {who}{', LoRA' if lora else ''}")
    size = student.parameters
    if size is None:
        return None
    kind = "chat" if student.has_template else "base"
    if student.is_encoder_decoder:
        kind = "encoder-decoder"
        lr = 1e-4
    elif size < _SMALL:
        lr = 5e-5 if student.has_template else 1e-4
    else:
        lr = 1e-5 if student.has_template else 2e-5
    who = f"{_article(format_parameters(size).removesuffix(' parameters'))} {kind} model{', LoRA' if lora else ''}"
    return Rates(10 * lr if lora else lr, 3.0, 0.1, f"for {who}")


def _paper_rates(student: ModelInfo, lora: bool) -> tuple[float, float, str] | None:
    """Return the paper's learning rate and epochs of distillation, with a description of the models; None without them."""
    if student.is_built:
        return 5e-4, 20.0, "a model built from scratch"
    size = student.parameters or 0
    name = family_of(student.family).paper_name
    who = f"{name} (the paper's)"
    match name:
        case "GPT-2":
            return (5e-4, 20.0, who) if size < 0.5e9 else (1e-4, 10.0, who)
        case "OPT":
            return 5e-5, 20.0 if size < 1e9 else 10.0, who
    if lora:
        return 5e-4, 10.0, who
    return (5e-4, 20.0, "a small Llama (as the paper's GPT-2)") if size < _SMALL else None


def _values(
    recipe: Recipe, student: ModelInfo, teacher: ModelInfo | None, auto_keys: list[str]
) -> Iterator[tuple[str, tuple[float, str]]]:
    """Yield the value for each key that is `auto`, and the reason for it."""
    if set(auto_keys) - set(LENGTHS):
        row = rates(student, sft=recipe.method == "sft", lora=recipe.student.lora.r is not None)
        if row is not None:
            values = {"train.lr": row.lr, "train.epochs": row.epochs, "train.warmup": row.warmup}
            yield from ((key, (value, row.who)) for key, value in values.items() if key in auto_keys)
    length = recipe.data.max_length
    if length == AUTO:
        length, why = _length(student, teacher)
        yield "data.max_length", (length, why)
    if recipe.data.max_prompt_length == AUTO:
        yield "data.max_prompt_length", (max(MIN_PROMPT, length - MIN_PROMPT), f"for a max_length of {length}")


def _length(student: ModelInfo, teacher: ModelInfo | None) -> tuple[int, str]:
    loaded = [info for info in (None if student.is_built else student, teacher) if info is not None]
    if all(map(is_in_paper, loaded)):
        return PAPER_LENGTH, "(the paper's)"
    contexts = [info.context for info in loaded if info.context is not None]
    if min(contexts, default=LENGTH) < LENGTH:
        return max(2, min(contexts)), "(the models' context)"
    return LENGTH, "for a chat model" if any(info.has_template for info in loaded) else "for a model of this family"


def _with(recipe: Recipe, changes: Mapping[str, float]) -> Recipe:
    """Return the recipe with new values of these keys of `train` and `data`."""
    for name in ("train", "data"):
        inside = {key.partition(".")[2]: value for key, value in changes.items() if key.startswith(f"{name}.")}
        recipe = recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=inside)})
    try:
        Recipe.model_validate(recipe.model_dump())  # rules over several fields
    except ValidationError as error:
        what, _, hint = str(error.errors()[0]["ctx"]["error"]).partition("; ")
        raise RecipeError("recipe.fields_conflict", what, hint=hint or None) from None
    return recipe


def fitted_line(resolved: Resolved) -> str | None:
    """Return a sentence with the values that were chosen for the models; None without values that the run uses."""
    names = {"train.lr": "lr", "train.epochs": "epochs", "train.warmup": "warmup", "data.max_length": "max_length"}
    if resolved.recipe.train.steps:
        del names["train.epochs"]
    fitted_values: dict[str, list[str]] = {}
    for key, name in names.items():
        is_fitted = resolved.origin[key].startswith("auto: ") and value_of(resolved.recipe, key) != AUTO
        if is_fitted:
            value, _, why = resolved.origin[key].removeprefix("auto: ").partition(" ")
            fitted_values.setdefault(why, []).append(f"{name} {value}")
    if not fitted_values:
        return None
    return "auto: " + "; ".join(f"{', '.join(values)} {why}" for why, values in fitted_values.items())


def number(value: float) -> str:
    """Format a number as in a recipe: 1e-5, 0.1, 512."""
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") if 0 < value < 0.01 else f"{value:g}"


def _article(noun: str) -> str:
    return f"{'an' if noun.startswith(('8', '11 ', '11.', '18 ', '18.')) else 'a'} {noun}"


def check_data(resolved: Resolved, known: StageModels | None = None) -> str | None:
    """Return a sentence if the run uses Dolly because the recipe names no data; None if it names data.

    Raises UsageError if data is required: always, except in distillation between models of the paper's families.
    """
    recipe = resolved.recipe
    known = known or {}
    if resolved.origin["data.source"] != "default" or recipe.data.sources:
        return None
    if recipe.method == "sft":
        hint = "use --data PATH or NAME, such as --data rows.jsonl or --data dolly"
        raise UsageError("usage.no_data", "no data to train on", where="--data is not given", hint=hint)
    paths = (recipe.teacher.path, recipe.student.path)
    models = [_teacher(recipe, known), student_info(recipe, known)]
    for path, info in zip(paths, models, strict=True):
        if path is not None and info is None and path not in known and not is_built(path):
            locate_model(path)  # raises for a directory that does not exist
    shipped = next((path for path in paths if path in BUILTIN_MODELS), None)
    if shipped is not None or not all(info is not None and is_in_paper(info) for info in models):
        name = "rows.jsonl or --data dolly" if shipped is None else shipped.removeprefix("builtin:")
        where = "--data is not given, and Dolly is the default only for GPT-2, OPT and Llama base models"
        raise UsageError(
            "usage.no_data", "no data to train on", where=where, hint=f"use --data PATH or NAME, such as --data {name}"
        )
    return f"no --data: training on Dolly (data.source {recipe.data.source}), the paper's data set"


def fitted_pipeline(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with each stage's recipe fitted to its models, including those of earlier stages.

    Raises RecipeError for a training stage that names no data.
    """
    known: dict[str, ModelInfo | None] = {}
    return replace(pipeline, stages=tuple(_fitted_stage(stage, known) for stage in pipeline.stages))


def _fitted_stage(stage: Stage, known: dict[str, ModelInfo | None]) -> Stage:
    if stage.verb in ("sft", "distill"):
        try:
            check_data(stage.resolved, known)
        except UsageError as error:
            where = f"stage {stage.name} has no data.source"
            raise RecipeError(
                "recipe.no_data", error.what, where=where, hint=f"set stages.{stage.name}.data.source"
            ) from None
        known[PREFIX + stage.name] = student_info(stage.resolved.recipe, known)
        return replace(stage, resolved=fitted(stage.resolved, known))
    return replace(stage, resolved=fitted(stage.resolved, known, stage.config.model_names[0]))
