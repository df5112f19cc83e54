"""The work of ``distillm run``: each stage by the function of its verb, and only where it is not done already.

The same command goes on where it was stopped: a finished stage is known by its fingerprint (``runs/stages.py``), an
unfinished one goes on from its own checkpoint, rows or results.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillm_cli.config.load import Resolved, to_yaml
from distillm_cli.config.pipeline_recipe import PREFIX, Pipeline, Stage, Training, inputs, placed
from distillm_cli.errors import START_OVER, CheckpointError, DistillmError, Interrupted, UsageError, signal_number
from distillm_cli.runs import output_dir, stages
from distillm_cli.runs.inputs import check_spared
from distillm_cli.runs.stages import StageRecord
from distillm_cli.training.events import Note, Staged, Warned
from distillm_cli.utils.manifest import recorded
from distillm_cli.utils.memory import give_back_freed_memory

if TYPE_CHECKING:
    from distillm_cli.ui.console import Console

RESOLVED = "pipeline.yaml"


@dataclass(frozen=True)
class State:
    """Of a stage, before a run. kind: "done", "to run", "to go on", "changed" or "left out". why: a clause for people."""

    kind: str
    why: str = ""


def choose(pipeline: Pipeline, only: str | None, start: str | None) -> list[str]:
    """The names that ``--only`` (one, or several with commas) or ``--from`` leave, in the pipeline's order.

    Raises UsageError for a name that is no stage.
    """
    if only is not None and start is not None:
        raise UsageError("--only and --from exclude each other", hint="give one of them")
    names = list(pipeline.names)
    wanted = names if only is None else [name.strip() for name in only.split(",")]
    for flag, name in (*(("--only", name) for name in wanted), ("--from", start)):
        if name is not None and name not in names:
            close = get_close_matches(name, names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else None
            raise UsageError(f"{flag} {name}: no such stage", where=f"stages: {', '.join(names)}", hint=hint)
    return [name for name in names if name in wanted] if start is None else names[names.index(start) :]


def survey(pipeline: Pipeline, output: Path, chosen: list[str]) -> dict[str, State]:
    """What a run would do with each stage. Touches nothing. Raises UsageError for a stage that cannot get its input."""
    records = {name: stages.read_record(output / name) for name in pipeline.names}
    _check_reads(pipeline, output, chosen, records)
    found: dict[str, State] = {}
    made: dict[str, str] = {}
    for stage in pipeline.stages:
        place, before = output / stage.name, records[stage.name]
        again = [name for name in stage.reads if found[name].kind not in ("done", "left out")]
        if stage.name not in chosen:
            found[stage.name] = State("left out", "done" if _is_done(before, place) else "not done")
            made[stage.name] = before.made if before is not None else ""
            continue
        stages.check_inputs(stage)
        if before is None:
            found[stage.name] = State("to run")
        elif again:
            verb = "is" if len(again) == 1 else "are"
            found[stage.name] = State(
                "changed", f"{' and '.join(f'stage {name}' for name in again)} {verb} to be made first"
            )
        else:
            found[stage.name] = _state(stage, place, before, made)
        made[stage.name] = before.made if before is not None and found[stage.name].kind == "done" else ""
    return found


def run(
    pipeline: Pipeline, output: Path, *, only: str | None = None, start: str | None = None, ui: Console
) -> dict[str, Any]:
    """Runs what is not done into ``output`` and returns the result object of ``--json``."""
    began = time.perf_counter()
    chosen = choose(pipeline, only, start)
    _check_free(output / RESOLVED)
    survey(pipeline, output, chosen)  # everything that can be wrong beforehand, before anything is written
    with stages.claimed_pipeline(output):
        output_dir.write_file(output, RESOLVED, resolved_yaml(pipeline))
        told = _Run(pipeline, output, chosen, ui).go()
    wall = round(time.perf_counter() - began, 3)
    return {"command": "run", "status": "ok", "output": str(output), "wall_s": wall, "stages": told}


def resolved_yaml(pipeline: Pipeline, states: Mapping[str, State] | None = None) -> str:
    """The whole pipeline as YAML that reads back the same, each line with where its value came from."""
    lines = ["stages:"]
    for stage in pipeline.stages:
        state = "" if states is None else f"  # {said(states[stage.name])}"
        lines.append(f"  {stage.name}:{state}")
        for name, value in stage.own.model_dump().items():
            if name != "recipe" and value is not None:
                text = f"[{', '.join(value)}]" if isinstance(value, tuple) else value
                lines.append(f"    {f'{name}: {text}':<33}  # {stage.origins[name]}")
        lines += [f"    {line}" for line in to_yaml(stage.resolved).splitlines()]
    return "\n".join(lines) + "\n"


def said(state: State) -> str:
    return f"{state.kind}: {state.why}" if state.why else state.kind


def _check_free(path: Path) -> None:
    """Raises UsageError for a file that is somebody's own pipeline."""
    if path.is_file() and path.name not in recorded(path.parent):
        what = f"{path} was not written by `distillm run`, which would replace it"
        raise UsageError(what, hint="choose another --output, or move it away")


def _is_done(record: StageRecord | None, place: Path) -> bool:
    return record is not None and record.status == "done" and stages.is_whole(record, place)


def _state(stage: Stage, place: Path, before: StageRecord, made: Mapping[str, str]) -> State:
    of = stages.shaped_by(stage, made)
    if stages.stage_fingerprint(of) != before.fingerprint:
        changes = stages.differences(before.of, of)
        more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
        return State("changed", ", ".join(changes[:3]) + more)
    if before.status != "done":
        return State("to go on")
    if not stages.is_whole(before, place):
        return State("to go on", "what it made is gone or was changed")
    return State("done")


def _check_reads(
    pipeline: Pipeline, output: Path, chosen: list[str], records: Mapping[str, StageRecord | None]
) -> None:
    """Whether every stage that is left out and read has been done."""
    for stage in (pipeline[name] for name in chosen):
        for name in stage.reads:
            if name not in chosen and not _is_done(records[name], output / name):
                what = "is not finished" if records[name] is not None else "is not there"
                raise UsageError(
                    f"stage {stage.name} reads what stage {name} makes, and {stages.makes(pipeline[name], output / name)} "
                    f"{what}",
                    hint=f"run stage {name} first, with --only {name} or --from {name}",
                )


@dataclass
class _Run:
    """One run of a pipeline's chosen stages."""

    pipeline: Pipeline
    output: Path
    chosen: list[str]
    ui: Console

    def go(self) -> dict[str, Any]:
        told: dict[str, Any] = {}
        made: dict[str, str] = {}
        number = len(self.pipeline.stages)
        for position, stage in enumerate(self.pipeline.stages):
            place = self.output / stage.name
            before = stages.read_record(place)
            head = f"stage {position + 1} of {number} · {stage.name} ({stage.verb})"
            if stage.name not in self.chosen:
                made[stage.name] = before.made if before is not None else ""
                self._warn_if_stale(stage, place, before, made)
                continue
            self._show(position)
            of = stages.shaped_by(stage, made)
            state = State("to run") if before is None else _state(stage, place, before, made)
            if state.kind == "done":
                self.ui(Note(f"{head} · done already"))
                made[stage.name] = before.made
                told[stage.name] = {"status": "skipped", **self._about(stage, place), "result": dict(before.result)}
                continue
            why = {"to run": "", "to go on": " · goes on where it was stopped"}.get(state.kind, f" · {said(state)}")
            self.ui(Note(f"{head}{why}"))
            record = stages.begin(stage, of, before)
            result = self._made(stage, place, record)
            record = stages.finished(record, stage, place, _plain(result))
            stages.write_record(place, record)
            made[stage.name] = record.made
            told[stage.name] = {"status": "done", **self._about(stage, place), "result": result}
        self._show(number)
        self.ui.show(_table(told))
        return told

    def _made(self, stage: Stage, place: Path, record: StageRecord) -> dict[str, Any]:
        """Makes one stage; whatever stops it says which one it was."""
        stages.write_record(place, record)
        places = {
            other.name: _from_here(stages.makes(other, self.output / other.name)) for other in self.pipeline.stages
        }
        own, resolved = placed(stage, places)
        again = "type the same command again to go on"
        try:
            return _by_verb(stage, own, resolved, place, record, self.ui)
        except Interrupted as stop:
            raise Interrupted(
                f"stage {stage.name}: {stop.what}", where=stop.where, hint=again, signal_number=stop.exit_code - 128
            ) from stop
        except DistillmError as error:
            advice = f"remove {place} to make the stage again"
            error.args = (f"stage {stage.name}: {error}".replace(START_OVER, advice),)
            raise
        except KeyboardInterrupt as stop:
            what = f"stage {stage.name}: interrupted"
            raise Interrupted(what, hint=again, signal_number=signal_number(stop)) from None
        finally:
            _let_go()

    def _about(self, stage: Stage, place: Path) -> dict[str, str]:
        return {"verb": stage.verb, "output": str(stages.makes(stage, place))}

    def _show(self, position: int) -> None:
        names = self.pipeline.names
        states = tuple(
            "left out" if name not in self.chosen else "done" if i < position else "now" if i == position else "later"
            for i, name in enumerate(names)
        )
        self.ui(Staged(names, states))

    def _warn_if_stale(self, stage: Stage, place: Path, before: StageRecord | None, made: Mapping[str, str]) -> None:
        """A stage that is left out is taken as it is; whoever left it out may not know that its recipe has moved on."""
        read = any(stage.name in self.pipeline[name].reads for name in self.chosen)
        if read and before is not None and (state := _state(stage, place, before, made)).kind == "changed":
            self.ui(Warned(f"stage {stage.name} is taken as it is, though it has changed since: {state.why}"))


def _by_verb(
    stage: Stage, own: Training, resolved: Resolved, place: Path, record: StageRecord, ui: Console
) -> dict[str, Any]:
    """own, resolved: the stage's, with places for the names of others."""
    if own.verb in ("sft", "distill"):
        return _train(own.verb, resolved, place, record, _from_stages(stage), ui)
    if own.verb == "generate":
        return _generate(own, resolved, place, ui)
    from distillm_cli.runs.eval import score

    # By stage: where those are may change, and scores must not stand beside those of the same stage elsewhere.
    pairs = zip(stage.own.models, own.models, strict=True)
    names = {model: name.removeprefix(PREFIX) for name, model in pairs if name.startswith(PREFIX)}
    how = {"flags": {}, "sets": None, "output": str(place), "resume": True}
    return score(list(own.models), recipe=resolved, names=names, **how, ui=ui)


def _train(
    verb: str, resolved: Resolved, place: Path, record: StageRecord, from_stages: Collection[str], ui: Console
) -> dict[str, Any]:
    from distillm_cli.runs.defaults import fitted_line
    from distillm_cli.runs.train import train
    from distillm_cli.training.checkpoint import visible

    # Checkpoints are this making's own only once the directory has been cleared for it.
    beginnings = (place, place / output_dir.SFT)
    resume = record.status == "started" and any(visible(begun / output_dir.CHECKPOINTS) for begun in beginnings)
    begun: Callable[[], None] = lambda: stages.write_record(place, replace(record, status="started"))  # noqa: E731
    output_dir.check_output(place, resume=resume, overwrite=not resume)
    if not resume:
        check_spared(verb, resolved.recipe, place)
    if (fitted := fitted_line(resolved)) is not None:
        ui(Note(fitted))
    with output_dir.claimed(place):
        # The fingerprint knows which making of a stage is read; the pipeline may have been moved since it was started.
        how = {"resume": resume, "overwrite": not resume, "movable": from_stages}
        return train(verb, resolved, place, **how, begun=begun, ui=ui)


def _generate(own: Any, resolved: Resolved, place: Path, ui: Console) -> dict[str, Any]:
    from distillm_cli.runs.generate import run as generate
    from distillm_cli.runs.prompt_source import PromptSource

    data = resolved.recipe.data
    wanted = PromptSource(data=data.source, split=own.split, limit=own.limit or data.limit, samples=own.n)
    common = {"recipe": resolved, "flags": {}, "sets": None, "output": str(place / stages.SAMPLES), "ui": ui}
    try:  # the rows know what they were made with, weights and prompts included
        return generate(own.model, wanted, resume=True, overwrite=False, **common)
    except CheckpointError:
        _put_aside(place / stages.SAMPLES, ui)
        return generate(own.model, wanted, resume=False, overwrite=False, **common)


def _put_aside(samples: Path, ui: Console) -> None:
    """Under a name of its own: somebody may have mended what is to be made anew."""
    numbered = (samples.with_name(f"{samples.stem}-before-{n}{samples.suffix}") for n in itertools.count(1))
    aside = next(path for path in numbered if not path.exists())
    samples.rename(aside)
    ui(Note(f"the answers of before are kept: {aside}"))


def _from_stages(stage: Stage) -> set[str]:
    """Dotted keys of what the stage reads of others."""
    return {key for key, text in inputs(stage.own, stage.resolved.recipe) if text.startswith(PREFIX)}


def _from_here(place: Path) -> str:
    """A place as seen from the working directory where it lies below it, so that every spelling of --output is the same."""
    whole, here = place.resolve(), Path.cwd().resolve()
    return str(whole.relative_to(here)) if whole.is_relative_to(here) else str(whole)


def _let_go() -> None:
    """Memory of the stage before, the accelerator's included, is given back."""
    import gc

    import torch

    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _plain(result: Mapping[str, Any]) -> dict[str, Any]:
    from distillm_cli.ui.console import plain

    return plain(result)


def _table(told: Mapping[str, Any]) -> Any:
    """Each stage with what became of it."""
    from distillm_cli.ui.display import duration
    from distillm_cli.ui.summary import table

    rows = [
        [
            name,
            stage["verb"],
            "done already" if stage["status"] == "skipped" else f"done in {duration(stage['result']['wall_s'])}",
            stage["output"],
        ]
        for name, stage in told.items()
    ]
    return table("Stages", ["", "verb", "", "output"], rows)
