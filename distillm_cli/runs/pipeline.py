"""Run a pipeline: each stage by the function of its verb, unless it is already done.

The same command resumes an interrupted pipeline: a finished stage is recognized by its fingerprint
(``runs/stage_record.py``), an unfinished one is resumed from its own checkpoint, rows or results.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

from distillm_cli.config.load import Resolved, to_yaml
from distillm_cli.config.pipeline_recipe import (
    PREFIX,
    EvalStageConfig,
    GenerateStageConfig,
    Pipeline,
    Stage,
    StageConfig,
    inputs,
    with_stage_paths,
)
from distillm_cli.errors import START_OVER, CheckpointError, DistillmError, Interrupted, UsageError, signal_number
from distillm_cli.runs import output_dir, stage_record
from distillm_cli.runs.inputs import check_overwrite
from distillm_cli.runs.run_results import (
    EvalResult,
    GenerateResult,
    PipelineResult,
    Result,
    StageFinished,
    StageResult,
    TrainResult,
)
from distillm_cli.runs.stage_record import StageRecord
from distillm_cli.runs.start import TrainOptions
from distillm_cli.training.distributed import in_first_process, world
from distillm_cli.training.events import Listener, Note, Staged, Warned
from distillm_cli.utils.manifest import recorded
from distillm_cli.utils.memory import return_freed_memory
from distillm_cli.utils.text import json_value

RESOLVED_PIPELINE = "pipeline.yaml"


@dataclass(frozen=True)
class StageState:
    """Describe the state of a stage before a run.

    kind: "done", "to run", "to resume", "changed" or "left out". why: a clause for messages.
    """

    kind: str
    why: str = ""


def choose_stages(pipeline: Pipeline, only: str | None, start: str | None) -> list[str]:
    """Return the names that ``--only`` (one, or several with commas) or ``--from`` selects, in the pipeline's order.

    Raises UsageError for a name that is not a stage.
    """
    if only is not None and start is not None:
        raise UsageError(
            "usage.exclusive_options", "--only and --from are mutually exclusive", hint="choose one of them"
        )
    names = list(pipeline.names)
    selected = names if only is None else [name.strip() for name in only.split(",")]
    for flag, name in (*(("--only", name) for name in selected), ("--from", start)):
        if name is not None and name not in names:
            close = get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else None
            raise UsageError(
                "usage.unknown_stage", f"{flag} {name}: no such stage", where=f"stages: {', '.join(names)}", hint=hint
            )
    return [name for name in names if name in selected] if start is None else names[names.index(start) :]


@in_first_process
def stage_states(pipeline: Pipeline, output: Path, chosen: list[str]) -> dict[str, StageState]:
    """Return the state of each stage for a run, without writing.

    Raises UsageError for a stage whose input is missing.
    """
    records = {name: stage_record.read_record(output / name) for name in pipeline.names}
    _check_reads(pipeline, output, chosen, records)
    found: dict[str, StageState] = {}
    made: dict[str, str] = {}
    for stage in pipeline.stages:
        place, before = output / stage.name, records[stage.name]
        again = [name for name in stage.depends_on if found[name].kind not in ("done", "left out")]
        if stage.name not in chosen:
            found[stage.name] = StageState("left out", "done" if _is_done(before, place) else "not done")
            made[stage.name] = before.made if before is not None else ""
            continue
        stage_record.check_data_files(stage)
        _check_server(stage)
        if before is None:
            found[stage.name] = StageState("to run")
        elif again:
            verb = "is" if len(again) == 1 else "are"
            found[stage.name] = StageState(
                "changed", f"{' and '.join(f'stage {name}' for name in again)} {verb} to run first"
            )
        else:
            found[stage.name] = _state(stage, place, before, made)
        made[stage.name] = before.made if before is not None and found[stage.name].kind == "done" else ""
    return found


def _check_server(stage: Stage) -> None:
    """Raise UsageError for a setting of a stage that its server does not have."""
    if isinstance(stage.config, EvalStageConfig) and stage.config.server is not None:
        from distillm_cli.runs.server_model import check_eval_on_server  # imports an HTTP client

        check_eval_on_server(stage.config.models[0], stage.resolved.recipe.eval)


def run_pipeline(
    pipeline: Pipeline, output: Path, listener: Listener, *, only: str | None = None, start: str | None = None
) -> PipelineResult:
    """Run the stages that are not done into ``output``. only, start: see ``choose_stages``."""
    started = time.perf_counter()
    chosen = choose_stages(pipeline, only, start)
    _check_free(output / RESOLVED_PIPELINE)
    stage_states(pipeline, output, chosen)  # reports errors before anything is written
    with stage_record.lock_pipeline(output):
        output_dir.write_file(output, RESOLVED_PIPELINE, resolved_yaml(pipeline))
        output_dir.check_shared(output)
        results = _PipelineRun(pipeline, output, chosen, listener).run()
    return PipelineResult(output, round(time.perf_counter() - started, 3), results)


def resolved_yaml(pipeline: Pipeline, states: Mapping[str, StageState] | None = None) -> str:
    """Return the pipeline as YAML that can be read back, each value with its origin."""
    lines = ["stages:"]
    for stage in pipeline.stages:
        state = "" if states is None else f"  # {describe(states[stage.name])}"
        lines.append(f"  {stage.name}:{state}")
        for name, value in stage.config.model_dump().items():
            if name != "recipe" and value is not None:
                text = f"[{', '.join(value)}]" if isinstance(value, tuple) else value
                lines.append(f"    {f'{name}: {text}':<33}  # {stage.origins[name]}")
        lines += [f"    {line}" for line in to_yaml(stage.resolved).splitlines()]
    return "\n".join(lines) + "\n"


def describe(state: StageState) -> str:
    """Return a stage's state as a clause."""
    return f"{state.kind}: {state.why}" if state.why else state.kind


@in_first_process
def _check_free(path: Path) -> None:
    """Raise UsageError for a ``pipeline.yaml`` that no run wrote."""
    if path.is_file() and path.name not in recorded(path.parent):
        what = f"{path} was not written by `distillm run`, which would replace it"
        raise UsageError("usage.output_exists", what, hint="choose another --output, or move it away")


def _is_done(record: StageRecord | None, place: Path) -> bool:
    return record is not None and record.status == "done" and stage_record.is_intact(record, place)


@in_first_process
def _state(stage: Stage, place: Path, before: StageRecord, made: Mapping[str, str]) -> StageState:
    of = stage_record.fingerprint_inputs(stage, made)
    if stage_record.stage_fingerprint(of) != before.fingerprint:
        changes = stage_record.differences(before.of, of)
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        return StageState("changed", ", ".join(changes[:3]) + more)
    if before.status != "done":
        return StageState("to resume")
    if not stage_record.is_intact(before, place):
        return StageState("to resume", "its output is missing or has changed")
    return StageState("done")


def _check_reads(
    pipeline: Pipeline, output: Path, chosen: list[str], records: Mapping[str, StageRecord | None]
) -> None:
    """Raise UsageError if a chosen stage reads one that is left out and not finished."""
    for stage in (pipeline[name] for name in chosen):
        for name in stage.depends_on:
            if name not in chosen and not _is_done(records[name], output / name):
                what = "is not finished" if records[name] is not None else "does not exist"
                path = stage_record.stage_output(pipeline[name], output / name)
                raise UsageError(
                    "usage.stage_not_made",
                    f"stage {stage.name} needs the output of stage {name}, but {path} {what}",
                    hint=f"run stage {name} first, with --only {name} or --from {name}",
                )


@dataclass
class _PipelineRun:
    """Run a pipeline's chosen stages."""

    pipeline: Pipeline
    output: Path
    chosen: list[str]
    listener: Listener

    def run(self) -> dict[str, StageResult]:
        """Run the stages that are not done, in order. Returns the result of each chosen stage, by name."""
        results: dict[str, StageResult] = {}
        made: dict[str, str] = {}
        total = len(self.pipeline.stages)
        for position, stage in enumerate(self.pipeline.stages):
            place = self.output / stage.name
            before = stage_record.read_record(place)
            if stage.name not in self.chosen:
                made[stage.name] = before.made if before is not None else ""
                self._warn_if_stale(stage, place, before, made)
                continue
            self._report_position(position)
            title = f"stage {position + 1} of {total} · {stage.name} ({stage.verb})"
            state = StageState("to run") if before is None else _state(stage, place, before, made)
            if before is not None and state.kind == "done":
                self.listener(Note(f"{title} · already done"))
                made[stage.name] = before.made
                results[stage.name] = self._stage_result("skipped", stage, place, dict(before.result))
                continue
            why = {"to run": "", "to resume": " · resumes"}
            self.listener(Note(f"{title}{why.get(state.kind, f' · {describe(state)}')}"))
            record = stage_record.start_record(stage, stage_record.fingerprint_inputs(stage, made), before)
            result = self._run_stage(stage, place, record).as_json()
            record = stage_record.finished_record(record, stage, place, json_value(result))
            stage_record.write_record(place, record)
            made[stage.name] = record.made
            results[stage.name] = self._stage_result("done", stage, place, result)
        self._report_position(total)
        return results

    def _run_stage(self, stage: Stage, place: Path, record: StageRecord) -> Result:
        """Run one stage; an error names the stage."""
        stage_record.write_record(place, record)
        places = {
            other.name: _shortest_path(stage_record.stage_output(other, self.output / other.name))
            for other in self.pipeline.stages
        }
        own, resolved = with_stage_paths(stage, places)
        retry = "run the same command again to resume"
        try:
            result = self._run_verb(stage, own, resolved, place, record)
            self.listener(StageFinished(stage.name, result))
            return result
        except Interrupted as stop:
            raise Interrupted(
                f"stage {stage.name}: {stop.what}", where=stop.where, hint=retry, signal_number=stop.exit_code - 128
            ) from stop
        except DistillmError as error:
            advice = f"remove {place} to run the stage again"
            error.args = (f"stage {stage.name}: {error}".replace(START_OVER, advice),)
            raise
        except KeyboardInterrupt as stop:
            what = f"stage {stage.name}: interrupted"
            raise Interrupted(what, hint=retry, signal_number=signal_number(stop)) from None
        finally:
            _release_memory()

    def _run_verb(self, stage: Stage, own: StageConfig, resolved: Resolved, place: Path, record: StageRecord) -> Result:
        """Run the function of a stage's verb. own, resolved: with paths instead of the names of other stages."""
        if isinstance(own, GenerateStageConfig):
            return self._generate(own, resolved, place)
        if isinstance(own, EvalStageConfig):
            return self._evaluate(stage, own, resolved, place)
        return self._train(stage, resolved, place, record)

    def _train(self, stage: Stage, resolved: Resolved, place: Path, record: StageRecord) -> TrainResult:
        from distillm_cli.runs.defaults import fitted_line
        from distillm_cli.runs.train import train
        from distillm_cli.training.checkpoint import visible

        # Until the directory is cleared, its checkpoints may belong to an earlier version of the stage.
        has_checkpoint = world().broadcast(
            lambda: any(visible(directory / output_dir.CHECKPOINTS) for directory in output_dir.places(place))
        )
        resume = record.status == "started" and has_checkpoint
        output_dir.check_output(place, resume=resume, overwrite=not resume)
        if not resume:
            check_overwrite(stage.verb, resolved.recipe, place)
        if (fitted := fitted_line(resolved)) is not None:
            self.listener(Note(fitted))
        # The pipeline may have been moved since it was started; fingerprints show which version of a stage is read.
        options = TrainOptions(resume=resume, overwrite=not resume, moved_inputs=_inputs_from_stages(stage))

        def on_ready() -> None:
            stage_record.write_record(place, replace(record, status="started"))

        with output_dir.claimed(place):
            return train(stage.verb, resolved, place, self.listener, options, on_ready=on_ready)

    def _generate(self, own: GenerateStageConfig, resolved: Resolved, place: Path) -> GenerateResult:
        from distillm_cli.runs.generate import generate_responses
        from distillm_cli.runs.inference import Settings
        from distillm_cli.runs.prompt_source import PromptSource

        data, file = resolved.recipe.data, place / stage_record.SAMPLES
        source = PromptSource(data=data.source, split=own.split, limit=own.limit or data.limit, samples=own.n)
        settings = Settings(resolved)
        generate = partial(
            generate_responses, own.model, source, settings, self.listener, output=str(file), server=own.server
        )
        try:  # raises an error if the file has rows of other weights, prompts or settings
            return generate(resume=True)
        except CheckpointError:
            _rename_old_rows(file, self.listener)
            return generate()

    def _evaluate(self, stage: Stage, own: EvalStageConfig, resolved: Resolved, place: Path) -> EvalResult:
        from distillm_cli.runs.eval import evaluate_checkpoints
        from distillm_cli.runs.inference import Settings

        # Directories are named by stage, since paths may change: scores of an earlier path must be replaced.
        pairs = zip(stage.config.model_names, own.models, strict=True)
        names = {model: name.removeprefix(PREFIX) for name, model in pairs if name.startswith(PREFIX)}
        models, settings = list(own.models), Settings(resolved)
        return evaluate_checkpoints(models, settings, self.listener, output=str(place), names=names, server=own.server)

    def _stage_result(self, status: str, stage: Stage, place: Path, result: Mapping[str, Any]) -> StageResult:
        return StageResult(status, stage.verb, str(stage_record.stage_output(stage, place)), result)

    def _report_position(self, position: int) -> None:
        """Report which stage is running; position: its index, or the number of stages at the end."""
        names = self.pipeline.names
        states = tuple(
            "left out" if name not in self.chosen else "done" if i < position else "now" if i == position else "later"
            for i, name in enumerate(names)
        )
        self.listener(Staged(names, states))

    def _warn_if_stale(self, stage: Stage, place: Path, before: StageRecord | None, made: Mapping[str, str]) -> None:
        """Warn if a stage that is left out is read by another one and has changed since it ran."""
        is_read = any(stage.name in self.pipeline[name].depends_on for name in self.chosen)
        if is_read and before is not None and (state := _state(stage, place, before, made)).kind == "changed":
            self.listener(Warned(f"stage {stage.name} is not run again, although it has changed: {state.why}"))


@in_first_process
def _rename_old_rows(samples: Path, listener: Listener) -> None:
    """Rename a file of rows that will be generated again, since a user may have corrected it."""
    numbered = (samples.with_name(f"{samples.stem}-before-{n}{samples.suffix}") for n in itertools.count(1))
    aside = next(path for path in numbered if not path.exists())
    samples.rename(aside)
    listener(Note(f"moved the earlier responses to {aside}"))


def _inputs_from_stages(stage: Stage) -> set[str]:
    """Return the dotted keys of a stage's inputs that are outputs of other stages."""
    return {key for key, text in inputs(stage.config, stage.resolved.recipe) if text.startswith(PREFIX)}


def _shortest_path(place: Path) -> str:
    """Return a path relative to the working directory if it is below it: the same for every spelling of --output."""
    whole, working_directory = place.resolve(), Path.cwd().resolve()
    return str(whole.relative_to(working_directory)) if whole.is_relative_to(working_directory) else str(whole)


def _release_memory() -> None:
    """Release the memory of the last stage, including that of the accelerator."""
    import gc

    import torch

    gc.collect()
    return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
