"""Run the commands from Python: ``import distillm_cli as distillm``. The command line calls the same functions.

    result = distillm.distill(recipe="quickstart", alpha=0.2, train={"steps": 50})
    print(result.report["student_after"], result.output)
    model, tokenizer = result.model()

Keywords are the flags of the command (``alpha``, ``batch_size``) and the sections of a recipe as mappings
(``train={"clip": 1.0}``). Errors are ``DistillmError`` with the text of the command line, where keywords replace flags.
Nothing is printed: what a run reports goes to the logger "distillm_cli", to ``listener``, or with ``display=True`` to the
display of the command line. Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

from distillm_cli.config.shortcuts import Flag, field_flags, flag_of
from distillm_cli.errors import CheckpointError, DistillmError, UsageError
from distillm_cli.runs.object_inputs import is_model, is_rows, is_tokenizer, save_model, save_rows, save_tokenizer
from distillm_cli.training.distributed import joined, world
from distillm_cli.training.events import Alarmed, Event, Listener, Note, Warned, silent

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distillm_cli.config.load import Resolved
    from distillm_cli.config.schema import Recipe
    from distillm_cli.runs.eval_options import EvalOptions
    from distillm_cli.runs.run_results import (
        EvalResult,
        GenerateResult,
        PilotResult,
        PipelinePlan,
        PipelineResult,
        PlanResult,
        TrainResult,
    )
    from distillm_cli.runs.start import TrainOptions
    from distillm_cli.ui.console import Console

    # Types of keyword values: a path or a name, an object, or the result of an earlier run.
    Model: TypeAlias = (
        str | os.PathLike[str] | PreTrainedModel | tuple[PreTrainedModel, PreTrainedTokenizerBase] | TrainResult
    )
    RowSource: TypeAlias = str | os.PathLike[str] | Sequence[Mapping[str, Any]] | Dataset | DatasetDict
    Fields: TypeAlias = Mapping[str, Any]

_LOGGER = logging.getLogger("distillm_cli")
_INPUTS = "inputs"  # directory next to the output, for inputs that are passed as objects
# Fields that may be given as objects.
_MODEL_KEYS = ("teacher.path", "student.path")
_ROW_KEYS = ("data.source", "data.valid", "eval.suites")


# Keywords


class _CommonFields(TypedDict, total=False):
    """List the keywords of all commands that set fields of the recipe. A mapping sets several fields of its section."""

    method: str
    batch_size: int
    skip_bad_rows: bool
    dtype: str
    device: str
    objective: Fields
    rollout: Fields
    okd: Fields
    ctcd: Fields
    mixkd: Fields
    kdiga: Fields
    hidden: Fields
    disco: Fields
    robustkd: Fields
    train: Fields
    eval: Fields


class _PairFields(_CommonFields, total=False):
    """List the keywords of the commands that train, of ``plan`` and of ``pilot``."""

    data: RowSource | Fields
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase
    lora: int
    max_length: int
    epochs: float
    steps: int
    seed: int


class _TrainingFields(_PairFields, total=False):
    """List the keywords of the commands that train with one learning rate, and of ``plan``."""

    lr: float


class _SamplingFields(_CommonFields, total=False):
    """List the keywords of the commands that sample from a finished model."""

    tokenizer: PreTrainedTokenizerBase
    template: str
    limit: int
    greedy: bool
    temperature: float
    top_p: float
    max_new_tokens: int
    student: Fields
    teacher: Fields
    schedule: Fields


class SftFields(_TrainingFields, total=False):
    """List the keywords of ``sft`` that set fields of the recipe."""

    model: Model
    student: Fields
    teacher: Fields
    schedule: Fields
    on_alarm: str
    keep: int


class PlanFields(_TrainingFields, total=False):
    """List the keywords of ``plan`` and ``load_recipe`` that set fields of the recipe."""

    teacher: Model | Fields
    student: Model | Fields
    divergence: str
    alpha: float
    schedule: str | Fields
    teacher_cache: str
    teacher_server: str
    rollout_server: str


class DistillFields(PlanFields, total=False):
    """List the keywords of ``distill`` that set fields of the recipe."""

    on_alarm: str
    keep: int


class PilotFields(_PairFields, total=False):
    """List the keywords of ``pilot`` that set fields of the recipe."""

    teacher: Model | Fields
    student: Model | Fields
    schedule: Fields
    teacher_cache: str


class GenerateFields(_SamplingFields, total=False):
    """List further keywords of ``generate``.

    data: rows with prompts, in place of ``prompts``; or a mapping of the section. split: of the data. limit: use the
    first prompts only. n: responses per prompt. resume: continue an incomplete ``output``. overwrite: replace it. The
    others set fields of the recipe.
    """

    data: RowSource | Fields
    split: str
    n: int
    resume: bool
    overwrite: bool
    top_k: int
    seed: int


class EvalFields(_SamplingFields, total=False):
    """List the keywords of ``evaluate`` that set fields of the recipe."""

    data: Fields
    suite: str | Sequence[str] | RowSource
    metric: str | Sequence[str]
    seeds: int | Sequence[int]
    attack: str
    attack_radius: float
    attack_steps: int
    trigger: str
    target: str


@dataclass
class _Given:
    """Hold the keywords of a call as the flags and ``--set`` texts of a command line.

    directory: for models and rows that are objects; None: the call takes none.
    """

    verb: str
    directory: Path | None
    tokenizer: Any = None
    flags: dict[str, Flag] = field(default_factory=dict)
    sets: list[str] = field(default_factory=list)

    def add_all(self, keywords: Mapping[str, Any]) -> None:
        """Add every keyword. Raises UsageError for one that names no field, with the nearest."""
        from distillm_cli.config.explain import leaves, section_keys

        rest = dict(keywords)
        if is_tokenizer(rest.get("tokenizer")):
            self.tokenizer = rest.pop("tokenizer")
            models = [rest.get("teacher"), rest.get("student"), rest.get("model")]
            if self.verb not in ("generate", "eval") and not any(_has_model(value) for value in models):
                path = save_tokenizer(self._inputs("tokenizer"), self.tokenizer)
                self._set("student.tokenizer", "--tokenizer", str(path))
        entries = {entry.name: entry for entry in field_flags(self.verb)}
        for name, value in rest.items():
            if isinstance(value, Mapping) and name in section_keys() and not is_rows(value):
                self._add_section(name, value)
            elif name in entries:
                for key in entries[name].keys if value is not None else ():
                    self._set(key, entries[name].flag, self._plain(key, value))
            elif name in leaves():
                self._set(name, name, value)
            elif name in section_keys():
                what = f"{name} is a section, not a value"
                raise UsageError(
                    "usage.section_not_value",
                    what,
                    where=f"its keys are {', '.join(section_keys()[name])}",
                    hint="pass a mapping",
                )
            else:
                raise UsageError(
                    "usage.unknown_field", f"no keyword named {name}", hint=_nearest(name, self.verb, [*entries])
                )

    def _add_section(self, section: str, values: Mapping[str, Any]) -> None:
        from distillm_cli.config.explain import leaves, nearest_key, section_keys

        for name, value in values.items():
            key = f"{section}.{name}"
            if key in section_keys() and isinstance(value, Mapping):
                self._add_section(key, value)
            elif key not in leaves():
                close = nearest_key(key)
                raise UsageError(
                    "usage.unknown_field", f"{key}: no such field", hint=f"did you mean {close}?" if close else None
                )
            elif value is None:
                self.sets.append(f"{key}=null")
            else:
                self._set(key, key, self._plain(key, value))

    def _set(self, key: str, name: str, value: Any) -> None:
        if key in self.flags:
            raise UsageError(
                "usage.given_twice", f"{self.flags[key].name} and {name} both given", hint="keep one of them"
            )
        self.flags[key] = Flag(name, value)

    def _plain(self, key: str, value: Any) -> Any:
        """Return a value as a recipe has it: objects are saved, paths become texts, and a list may be one value."""
        from distillm_cli.config.explain import takes_list

        if key in _MODEL_KEYS:
            return self.model(value)
        if key in _ROW_KEYS and is_rows(value):
            value = str(save_rows(self._inputs(key), value))
        if isinstance(value, str | int | float | os.PathLike) and takes_list(key):
            value = [value]
        if isinstance(value, list | tuple):
            return [os.fspath(item) if isinstance(item, os.PathLike) else item for item in value]
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    def model(self, value: Any) -> str:
        """Return the path of a model, which is saved if it is an object."""
        if is_model(value):
            return str(save_model(self._inputs("a model"), value, self.tokenizer))
        path = getattr(value, "output", value)
        if isinstance(path, str | os.PathLike):
            return os.fspath(path)
        what = f"an object of {type(value).__name__} is not a model"
        raise UsageError(
            "usage.not_a_model", what, hint="pass a name, a path, the result of a run, or (model, tokenizer)"
        )

    def _inputs(self, what: str) -> Path:
        if self.directory is None:
            raise UsageError(
                "usage.object_in_recipe",
                f"{what}: objects cannot be part of a recipe",
                hint="pass it to distill, sft or evaluate",
            )
        return self.directory


def _has_model(value: Any) -> bool:
    return is_model(value.get("path") if isinstance(value, Mapping) else value)


def _nearest(name: str, verb: str, flags: list[str]) -> str:
    """Return a hint for an unknown keyword."""
    from distillm_cli.config.explain import nearest_key, section_keys

    names = [*flags, *section_keys()[""], "recipe", "output", "resume", "overwrite", "display", "listener"]
    close = get_close_matches(name, names, n=1, cutoff=0.7)
    if close:
        return f"did you mean {close[0]}?"
    key = nearest_key(name)
    flag = flag_of(key, verb) if key else None
    if flag is not None:
        return f"did you mean {flag}?"
    section, _, last = (key or "").rpartition(".")
    if "." in section:
        return f"did you mean {key}?"
    return f'did you mean {section}={{"{last}": …}}?' if section else f"keywords are {', '.join(flags)}, and sections"


# Functions shared with the command line


def check_complete(recipe: Recipe) -> None:
    """Raise UsageError if the recipe names no model to train, or no teacher for distillation."""
    if recipe.student.path is None:
        what, flag = ("model", "--model") if recipe.method == "sft" else ("student", "--student")
        raise UsageError(
            "usage.no_model", f"no {what} to train", hint=f"give {flag} PATH, or a --recipe that names one"
        )
    if recipe.method != "sft" and recipe.teacher.path is None:
        raise UsageError("usage.no_teacher", "no teacher", hint="give --teacher PATH, or use `distillm sft`")


def resolve_training(
    verb: str,
    recipe: str | Path | Resolved | None,
    flags: Mapping[str, Any],
    sets: Iterable[str] | None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
) -> Resolved:
    """Return the recipe of a training run, with `auto` values chosen.

    A resume without a recipe uses the one in ``output``. Raises RecipeError, UsageError, and CheckpointError if there
    is none.
    """
    from distillm_cli.config.load import resolve
    from distillm_cli.runs import output_dir
    from distillm_cli.runs.defaults import fitted

    if resume and recipe is None:
        saved_recipe = None if output is None else Path(output) / output_dir.RECIPE
        if saved_recipe is not None and saved_recipe.is_file():
            recipe = str(saved_recipe)
        elif "student.path" not in flags and not any(text.startswith("student.path=") for text in sets or ()):
            _refuse_resume(output)
    return fitted(resolve(command=verb, recipe=recipe, flags=flags, sets=sets))


def _refuse_resume(output: str | Path | None) -> None:
    """Raise an error for ``--resume`` without a run: no directory is given, or it has no recipe."""
    from distillm_cli.runs.output_dir import RECIPE

    if output is None:
        raise UsageError(
            "usage.no_output", "--resume without a run", hint="give --output DIR, the directory of the run to resume"
        )
    what = f"no {RECIPE} in it" if Path(output).is_dir() else "no such directory"
    raise CheckpointError(
        "checkpoint.nothing_to_resume",
        f"nothing to resume in {output}",
        where=what,
        hint="check the path, or start without --resume",
    )


def check_training(resolved: Resolved) -> list[str]:
    """Check that a recipe can be trained, and return notes to report at the start. Raises UsageError."""
    from distillm_cli.runs.defaults import check_data, fitted_line

    check_complete(resolved.recipe)
    notes = [note for note in (check_data(resolved), fitted_line(resolved)) if note is not None]
    world().check_same({"recipe": resolved.recipe.model_dump(mode="json")})
    device_map = resolved.recipe.teacher.device_map
    if world().size > 1 and resolved.recipe.method != "sft" and device_map in ("auto", "sequential"):
        raise UsageError(
            "usage.one_process",
            f"teacher.device_map {device_map} would place the teacher of every process on all GPUs",
            where=f"{world().size} processes",
            hint="start it without a launcher, or try --set teacher.device_map=cpu, teacher.offload=true or a server",
        )
    return notes


def train_recipe(
    verb: str,
    resolved: Resolved,
    output: str | Path | None,
    listener: Listener,
    options: TrainOptions,
    recipe: str | Path | Resolved | None = None,
) -> TrainResult:
    """Check and train a recipe into ``output`` (None: a new directory under ``runs/``).

    recipe: the recipe that it was resolved from, which an overwrite must not remove.
    """
    from distillm_cli.runs import output_dir
    from distillm_cli.runs.start import start_training

    notes = check_training(resolved)
    if options.compare and resolved.recipe.has_random_teacher:
        raise UsageError(
            "usage.exclusive_options",
            f"--compare with --teacher {resolved.recipe.teacher.path}: the baselines need a trained teacher",
            hint="drop --compare, or give --teacher PATH",
        )
    place = Path(output) if output else None
    if place is None:
        config = resolved.recipe
        student = config.student.path or "student"
        place = output_dir.default_name(
            resolved.name, config.data.names[0], student, config.method, resume=options.resume
        )
    recipe_file = str(recipe) if isinstance(recipe, str | Path) else None
    result = start_training(verb, resolved, place, listener, options, recipe_file=recipe_file, notes=notes)
    if options.compare:
        from distillm_cli.runs.compare import compare

        return compare(resolved, result, listener, options)
    return result


def pilot_recipe(
    recipe: str | Path | Resolved | None,
    flags: Mapping[str, Any],
    sets: Iterable[str],
    output: str | Path | None,
    listener: Listener,
    *,
    minutes: float,
    grid: Iterable[str],
) -> PilotResult:
    """Run a pilot, or continue the one in ``output`` (None: a directory under ``runs/``, the same for the same command)."""
    resolved = resolve_training("distill", recipe, flags, sets)
    for note in check_training(resolved):
        listener(Note(note))
    from distillm_cli.runs import output_dir
    from distillm_cli.runs.pilot import PilotOptions, run_pilot

    config = resolved.recipe
    place = output_dir.pilot_name(resolved.name, config.data.names[0], config.student.required_path)
    return run_pilot(resolved, Path(output) if output else place, listener, PilotOptions(minutes, tuple(grid)))


def plan_recipe(
    recipe: str | Path | Resolved | None,
    flags: Mapping[str, Flag],
    sets: Sequence[str],
    listener: Listener,
    processes: int = 1,
    *,
    strict: bool = False,
) -> PlanResult | PipelinePlan:
    """Plan a recipe, or every stage of a pipeline. strict: a warning of the checks of a run is an error."""
    from distillm_cli.config.load import resolve
    from distillm_cli.config.pipeline_recipe import is_pipeline, load_pipeline
    from distillm_cli.runs.defaults import fitted, fitted_line, fitted_pipeline

    if isinstance(recipe, str | Path) and is_pipeline(recipe):
        if flags:
            flag = next(iter(flags.values())).name
            what = f"{flag} with {recipe}, a recipe of stages"
            raise UsageError(
                "usage.recipe_of_stages", what, hint="try --set stages.NAME.section.key=VALUE, or defaults.…"
            )
        pipeline = fitted_pipeline(load_pipeline(recipe, sets))
        from distillm_cli.runs.plan_stages import plan_pipeline

        return plan_pipeline(pipeline, listener, processes)
    resolved = fitted(resolve(command="plan", recipe=recipe, flags=flags, sets=sets))
    check_complete(resolved.recipe)
    if resolved.origin["data.source"] == "default" and not resolved.recipe.data.sources:
        listener(Note("no --data: planned for Dolly (data.source dolly)"))
    line = fitted_line(resolved)
    if line is not None:
        listener(Note(line))
    from distillm_cli.runs.plan import plan_run

    return plan_run(resolved, listener, processes, strict=strict)


def generation_flags(flags: Mapping[str, Flag], *, greedy: bool) -> dict[str, Flag]:
    """Return the flags of ``generate`` with ``--greedy`` as a temperature. Raises UsageError for a contradiction."""
    temperature = flags.get("rollout.temperature")
    if not greedy:
        return dict(flags)
    if temperature is not None and temperature.value:
        what = f"--greedy and --temperature {temperature.value:g} are mutually exclusive"
        raise UsageError("usage.exclusive_options", what, hint="drop one of them")
    return {**flags, "rollout.temperature": Flag("--greedy", 0.0)}


def evaluation_flags(flags: Mapping[str, Flag]) -> dict[str, Flag]:
    """Return the flags of ``eval``, sampled if a sampling flag is given. Raises UsageError for a contradiction."""
    sampling = ("eval.seeds", "eval.temperature", "eval.top_p")
    sampling_flag = next((flags[key].name for key in sampling if key in flags), None)
    if "eval.greedy" in flags and flags["eval.greedy"].value and sampling_flag:
        raise UsageError(
            "usage.exclusive_options", f"--greedy and {sampling_flag} are mutually exclusive", hint="drop one of them"
        )
    if "eval.temperature" in flags and flags["eval.temperature"].value == 0 and "eval.seeds" in flags:
        raise UsageError(
            "usage.exclusive_options",
            "--temperature 0 and --seeds are mutually exclusive",
            where="temperature 0 is not random",
        )
    if "eval.greedy" in flags or not sampling_flag:
        return dict(flags)
    return {**flags, "eval.greedy": Flag("--greedy", False)}  # even if the checkpoint's recipe is greedy


# Functions of the library


def load_recipe(recipe: str | Path | Resolved, **fields: Unpack[PlanFields]) -> Resolved:
    """Return a recipe with every value filled in, for the keyword ``recipe`` of the other functions.

    recipe: a shipped name, a file, or a recipe that was loaded before. fields: override it; models and data are names or
    paths here. ``.recipe`` has the values and ``.origin`` the source of each. Raises RecipeError, UsageError.
    """
    from distillm_cli.config.load import resolve

    with _keywords_in_errors():
        given = _Given("plan", None)
        given.add_all(fields)
        return resolve(command="plan", recipe=recipe, flags=given.flags, sets=given.sets)


def distill(
    *,
    recipe: str | Path | Resolved | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    rebuild_teacher_cache: bool = False,
    compare: bool = False,
    strict: bool = False,
    track: str | Sequence[str] = (),
    push: str | None = None,
    push_dry_run: bool = False,
    display: bool = False,
    listener: Listener | None = None,
    **fields: Unpack[DistillFields],
) -> TrainResult:
    """Train a student against a teacher, as ``distillm distill`` does.

    recipe: a shipped name, a file, or the result of ``load_recipe``. output: directory of the result; None: a new one under
    ``runs/``, named as on the command line. resume: continue from the newest checkpoint in ``output``. overwrite: replace
    an earlier run there. rebuild_teacher_cache: replace a cache on disk that is stale. compare: also train the baselines,
    plain SFT and off-policy distillation, for the same seconds. strict: a warning of the checks before the first step is an
    error. track: names of experiment trackers (wandb, trackio, tensorboard, mlflow). push: name on the hub that the output
    directory is uploaded to; push_dry_run: only list its files. display: show what the command line shows. listener: called
    with every event. fields: see ``DistillFields``; they override the recipe.

    teacher and student are names, paths, results of earlier runs, or model objects: ``(model, tokenizer)``, or a model with
    the keyword ``tokenizer``. data is a name, a path, a data set or a list of mappings. Objects are saved in ``inputs/``
    next to the output and loaded from there, so a model uses disk space once and memory twice. Objects are not changed.

    Sets torch's global random state. Raises DistillmError.
    """
    from distillm_cli.runs.start import TrainOptions

    options = TrainOptions(
        resume=resume,
        overwrite=overwrite,
        rebuild_teacher_cache=rebuild_teacher_cache,
        compare=compare,
        strict=strict,
        track=(track,) if isinstance(track, str) else tuple(track),
        push=push,
        push_dry_run=push_dry_run,
    )
    return _train("distill", recipe, output, options, fields, _reporting(display, listener))


def sft(
    *,
    recipe: str | Path | Resolved | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    track: str | Sequence[str] = (),
    push: str | None = None,
    push_dry_run: bool = False,
    display: bool = False,
    listener: Listener | None = None,
    **fields: Unpack[SftFields],
) -> TrainResult:
    """Fine-tune a model on instruction data, as ``distillm sft`` does. The arguments are those of ``distill``.

    fields: see ``SftFields``; ``model`` is the model to train.
    """
    from distillm_cli.runs.start import TrainOptions

    options = TrainOptions(
        resume=resume,
        overwrite=overwrite,
        strict=strict,
        track=(track,) if isinstance(track, str) else tuple(track),
        push=push,
        push_dry_run=push_dry_run,
    )
    return _train("sft", recipe, output, options, fields, _reporting(display, listener))


def plan(
    *,
    recipe: str | Path | Resolved | None = None,
    processes: int = 1,
    display: bool = False,
    listener: Listener | None = None,
    stages: Mapping[str, Fields] | None = None,
    defaults: Fields | None = None,
    **fields: Unpack[PlanFields],
) -> PlanResult | PipelinePlan:
    """Estimate what a run needs, as ``distillm plan`` does; nothing is trained. ``method="sft"`` plans a fine-tuning.

    processes: of the run, each with a GPU of its own. stages, defaults: override those of a recipe of stages. Objects are
    saved in a temporary directory.
    """
    with _in_directory() as directory, _reporting(display, listener) as (listen, ui):
        given = _Given("plan", directory)
        given.add_all(fields)
        result = plan_recipe(recipe, given.flags, [*given.sets, *_pipeline_sets(stages, defaults)], listen, processes)
        if ui is not None:
            from distillm_cli.ui.plan_tables import tables_of

            ui.show(*tables_of(result))
        return result


def pilot(
    *,
    recipe: str | Path | Resolved | None = None,
    minutes: float = 20.0,
    grid: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    display: bool = False,
    listener: Listener | None = None,
    **fields: Unpack[PilotFields],
) -> PilotResult:
    """Choose settings by short runs on held-out rows, as ``distillm pilot`` does. The same call continues a stopped pilot.

    minutes: the budget. grid: values to try for ``lr``, ``divergence``, ``temperature`` and ``schedule``, as in
    ``{"lr": [1e-4, 2e-4]}``. output: directory of the result; None: ``runs/NAME-pilot``. fields: see ``PilotFields``.
    Models and rows are names or paths.
    """
    texts = [f"{name}={','.join(map(str, _listed(values)))}" for name, values in (grid or {}).items()]
    with joined(), _keywords_in_errors(), _reporting(display, listener) as (listen, ui):
        given = _Given("pilot", None)
        given.add_all(fields)
        result = pilot_recipe(recipe, given.flags, given.sets, output, listen, minutes=minutes, grid=texts)
        if ui is not None:
            from distillm_cli.ui.pilot_tables import pilot_tables

            ui.show(*pilot_tables(result))
        return result


def _listed(values: Any) -> Iterable[Any]:
    return values if isinstance(values, list | tuple) else [values]


def run(
    recipe: str | Path,
    *,
    output: str | Path | None = None,
    only: str | Sequence[str] | None = None,
    start: str | None = None,
    stages: Mapping[str, Fields] | None = None,
    defaults: Fields | None = None,
    display: bool = False,
    listener: Listener | None = None,
) -> PipelineResult:
    """Run the stages of a pipeline that are not done, as ``distillm run`` does.

    recipe: a recipe of stages, shipped or a file. output: directory with one directory per stage; None: ``runs/NAME``.
    only: these stages. start: this stage and those after it. stages: fields of a stage by its name,
    ``{"distill": {"objective": {"alpha": 0.3}}}``. defaults: fields of all stages. Models and rows are names or paths.
    """
    from distillm_cli.config.pipeline_recipe import load_pipeline
    from distillm_cli.runs.defaults import fitted_pipeline

    with joined(), _keywords_in_errors(), _reporting(display, listener) as (listen, ui):
        pipeline = fitted_pipeline(load_pipeline(recipe, _pipeline_sets(stages, defaults)))
        from distillm_cli.runs.pipeline import run_pipeline

        chosen = only if only is None or isinstance(only, str) else ",".join(only)
        place = Path(output) if output else Path("runs") / pipeline.name
        result = run_pipeline(pipeline, place, listen, only=chosen, start=start)
        if ui is not None:
            from distillm_cli.ui.summary import stage_table

            ui.show(stage_table(result))
        return result


def generate(
    model: Model,
    prompts: str | Sequence[str] | None = None,
    *,
    recipe: str | Path | Resolved | None = None,
    output: str | Path | None = None,
    server: str | None = None,
    display: bool = False,
    listener: Listener | None = None,
    **fields: Unpack[GenerateFields],
) -> GenerateResult:
    """Sample responses from a model, as ``distillm generate`` does.

    model: a name, a path, the result of a run, or an object, which is saved in a temporary directory. prompts: one or more
    instructions. output: a ``.jsonl`` file; None: ``responses`` of the result has the rows. server: address of an
    OpenAI-compatible server that generates; ``model`` is then a directory with the tokenizer, or a name on the server.
    fields: see ``GenerateFields``.
    """
    keywords: dict[str, Any] = dict(fields)
    data = None
    if not isinstance(keywords.get("data"), Mapping) or is_rows(keywords["data"]):
        data = keywords.pop("data", None)
    with _in_directory() as directory, _reporting(display, listener) as (listen, _):
        given = _Given("generate", directory)
        split, limit = keywords.pop("split", None), keywords.pop("limit", None)
        samples, greedy = keywords.pop("n", 1), keywords.pop("greedy", False)
        file = {name: keywords.pop(name, False) for name in ("resume", "overwrite")}
        given.add_all(keywords)
        flags = generation_flags(given.flags, greedy=greedy)
        path = given.model(model)
        if data is not None:
            data = str(save_rows(directory, data)) if is_rows(data) else os.fspath(data)
        from distillm_cli.runs.generate import generate_responses
        from distillm_cli.runs.inference import Settings
        from distillm_cli.runs.prompt_source import PromptSource

        texts = [prompts] if isinstance(prompts, str) else prompts
        source = PromptSource(
            data=data, split=split, prompts=None if texts is None else list(texts), limit=limit, samples=samples
        )
        settings = Settings(_settings_recipe("generate", recipe, flags, given.sets), flags, given.sets)
        place = None if output is None else str(output)
        return generate_responses(path, source, settings, listen, output=place, server=server, **file)


def evaluate(
    models: Model | list[Model],
    *,
    recipe: str | Path | Resolved | None = None,
    output: str | Path | None = None,
    server: str | None = None,
    options: EvalOptions | None = None,
    display: bool = False,
    listener: Listener | None = None,
    **fields: Unpack[EvalFields],
) -> EvalResult:
    """Score one model, or a list of models, as ``distillm eval`` does.

    models: names, paths, results of runs, or objects, which are saved in a temporary directory. output: directory of the
    results; None: ``eval/`` in each model's directory, or ``eval-NAME/`` for names of the hub and objects. server: address
    of an OpenAI-compatible server that generates, for one model as in ``generate``. options: a comparison, figures of the
    references, leakage, a judge (``runs.eval_options``). fields: see ``EvalFields``. ``suite`` is a name, a file, a list of
    these, or rows.
    """
    chosen = models if isinstance(models, list) else [models]
    with _in_directory() as directory, _reporting(display, listener) as (listen, ui):
        given = _Given("eval", directory)
        given.add_all(fields)
        flags = evaluation_flags(given.flags)
        checkpoints = [given.model(model) for model in chosen]
        place = None if output is None else str(output)
        if place is None and any(map(is_model, chosen)):
            place = "eval" if len(chosen) > 1 else f"eval-{Path(checkpoints[0]).name}"
        from distillm_cli.runs.eval import evaluate_checkpoints
        from distillm_cli.runs.eval_options import EvalOptions
        from distillm_cli.runs.inference import Settings

        settings = Settings(_settings_recipe("eval", recipe, flags, given.sets), flags, given.sets)
        chosen_options = options or EvalOptions()
        result = evaluate_checkpoints(
            checkpoints, settings, listen, output=place, server=server, options=chosen_options
        )
        if ui is not None:
            from distillm_cli.ui.analysis_tables import analysis_tables
            from distillm_cli.ui.summary import eval_summary

            ui.show(*eval_summary(result), *analysis_tables(result))
        return result


def _train(
    verb: str,
    recipe: str | Path | Resolved | None,
    output: str | Path | None,
    options: TrainOptions,
    fields: Mapping[str, Any],
    reporting: AbstractContextManager[tuple[Listener, Console | None]],
) -> TrainResult:
    place = Path(output or "runs/name")
    directory = (place if place.name else place.resolve()).parent / _INPUTS  # Path(".") has no name
    with joined(), _keywords_in_errors(), reporting as (listen, ui):
        given = _Given(verb, directory)
        given.add_all(fields)
        resolved = resolve_training(verb, recipe, given.flags, given.sets, output=output, resume=options.resume)
        result = train_recipe(verb, resolved, output, listen, options, recipe)
        if ui is not None:
            from distillm_cli.ui.summary import train_summary

            ui.show(*train_summary(result))
        return result


def _settings_recipe(
    verb: str, recipe: str | Path | Resolved | None, flags: Mapping[str, Flag], sets: Sequence[str]
) -> str | Resolved | None:
    """Return the recipe of ``generate`` or ``eval``: a resolved recipe with flags applied."""
    from distillm_cli.config.load import Resolved, resolve

    if isinstance(recipe, Resolved):
        return resolve(command=verb, recipe=recipe, flags=flags, sets=sets)
    return None if recipe is None else str(recipe)


def _pipeline_sets(stages: Mapping[str, Fields] | None, defaults: Fields | None) -> list[str]:
    """Return the ``--set`` texts of a pipeline for nested mappings of fields."""

    def texts(prefix: str, value: Any) -> Iterator[str]:
        if isinstance(value, Mapping):
            for name, item in value.items():
                yield from texts(f"{prefix}.{name}", item)
            return
        try:
            yield f"{prefix}={json.dumps(value, default=os.fspath)}"
        except TypeError as error:
            raise UsageError(
                "usage.object_in_recipe", f"{prefix}: {error}", hint="models and rows of stages are names or paths"
            ) from error

    return [*texts("stages", stages or {}), *texts("defaults", defaults or {})]


# Reports and errors


@contextmanager
def _in_directory() -> Iterator[Path]:
    """Yield a temporary directory for objects, in the processes of a launcher and with keywords in errors."""
    with joined(), _keywords_in_errors():
        directory = world().broadcast(mkdtemp)
        try:
            yield Path(directory)
        finally:
            if world().is_first:
                rmtree(directory, ignore_errors=True)


@contextmanager
def _reporting(display: bool, listener: Listener | None) -> Iterator[tuple[Listener, Console | None]]:
    """Yield the listener of a call and, with ``display``, the console of the command line.

    Of several processes, only the first one reports.
    """
    if not world().is_first:
        yield silent, None
        return
    if not display:
        yield listener or log_event, None
        return
    from distillm_cli.ui.console import console

    with console() as ui:

        def listen(event: Event) -> None:
            ui(event)
            if listener is not None:
                listener(event)

        yield listen, ui


def log_event(event: Event) -> None:
    """Log notes and warnings. The default listener of a call."""
    if isinstance(event, Warned | Alarmed):
        _LOGGER.warning("%s", event.text)
    elif isinstance(event, Note):
        _LOGGER.info("%s", event.text)


@contextmanager
def _keywords_in_errors() -> Iterator[None]:
    """Replace flags by keywords in errors: ``batch_size`` for ``--batch-size``, ``a.b`` for ``--set a.b``."""
    try:
        yield
    except DistillmError as error:
        what, where, hint = (_with_keywords(text) for text in (error.what, error.where, error.hint))
        error.what, error.where, error.hint = what or "", where, hint
        error.args = (_with_keywords(str(error)),)
        raise


def _with_keywords(text: str | None) -> str | None:
    if text is None:
        return None
    return re.sub(r"(?<![\w-])--(set |[a-z][a-z-]*)", _keyword, text)


def _keyword(flag: re.Match[str]) -> str:
    names = {"prompt": "prompts", "from": "start"}
    return "" if flag[1] == "set " else names.get(flag[1], flag[1].replace("-", "_"))
