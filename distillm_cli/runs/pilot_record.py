"""Record the state of a pilot in ``OUTPUT/pilot.json``, so that it can be killed at any time and continued."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distillm_cli.config.pilot_grid import Arm, Grid
from distillm_cli.errors import CheckpointError, UsageError
from distillm_cli.runs import output_dir
from distillm_cli.runs.pilot_plan import Costs, PilotPlan
from distillm_cli.runs.pilot_scores import RowScores
from distillm_cli.utils.storage import storing

PILOT = "pilot.json"
ARMS = "arms"  # directory of the trials
_FORMAT = 1


@dataclass(frozen=True)
class Trial:
    """Hold the score of an arm after a rung.

    train_s: seconds of all its steps so far. output_share: of its steps on student outputs.
    """

    step: int
    train_s: float
    scores: RowScores
    output_share: float = 0.0


@dataclass
class PilotRecord:
    """Hold what a pilot has measured and decided.

    settings: what the result depends on, apart from the inputs. inputs: fingerprints of models and rows. chosen: values
    and their origins, by key, that were chosen for the rows at the start, such as the template. seconds: used so far.
    trials: by name of the arm, its settings and its scores by rung. decisions: chosen arms, by the place of the decision;
    they depend on the clock and are not taken again. decided_costs: seconds that were measured after the plan. notes: what
    did not fit, sentences. result: the object of ``--json`` at the end.
    """

    settings: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, list[Any]] = field(default_factory=dict)
    seconds: float = 0.0
    plan: dict[str, Any] | None = None
    trials: dict[str, dict[str, Any]] = field(default_factory=dict)
    decisions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    decided_costs: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None
    format: int = _FORMAT

    def trial(self, arm: Arm, rung: int) -> Trial | None:
        """Return the score of an arm after a rung; None if it has not come so far."""
        found = self.trials.get(arm.name, {}).get("rungs", {}).get(str(rung))
        return None if found is None else Trial(**{**found, "scores": RowScores(**found["scores"])})

    def add(self, arm: Arm, rung: int, trial: Trial) -> None:
        """Add the score of an arm after a rung."""
        entry = self.trials.setdefault(arm.name, {"arm": asdict(arm), "rungs": {}})
        entry["rungs"][str(rung)] = asdict(trial)

    @property
    def arms(self) -> list[Arm]:
        """Return the arms that have a score, in the order in which they were tried."""
        return [Arm(**entry["arm"]) for entry in self.trials.values()]

    def decide(self, place: str, make: Callable[[], list[Arm]]) -> list[Arm]:
        """Return the arms that were chosen at a place before, or choose them now."""
        if place not in self.decisions:
            self.decisions[place] = [asdict(arm) for arm in make()]
        return [Arm(**fields) for fields in self.decisions[place]]

    def planned(self) -> PilotPlan | None:
        """Return the recorded plan."""
        if self.plan is None:
            return None
        grid: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in self.plan["grid"].items()
        }
        left_out = tuple(self.plan["left_out"])
        return PilotPlan(Grid(**grid), Costs(**self.plan["costs"]), self.plan["seconds"], left_out)


def read_pilot(output: Path, settings: Mapping[str, Any]) -> PilotRecord:
    """Return the record of a pilot in a directory, or a new one. Raises CheckpointError, UsageError.

    A directory of something else is refused, and so is a pilot with other settings.
    """
    settings = json.loads(json.dumps(settings))
    path = output / PILOT
    if not path.is_file():
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            what = f"{output} exists and was not created by `distillm pilot`"
            raise UsageError("usage.output_exists", what, hint="choose another --output, or move it away")
        return PilotRecord(dict(settings))
    hint = f"remove {output} to start over, or choose another --output"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            what = f"{path}: format {content['format']}, this version reads {_FORMAT}"
            raise CheckpointError("checkpoint.other_version", what, hint=hint)
        record = PilotRecord(**content)
        then = dict(record.settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("checkpoint.damaged", f"{path} cannot be read ({error})", hint=hint) from error
    if record.plan is None and then != settings:
        return PilotRecord(dict(settings))  # it ended before anything was tried
    changed = [key for key in sorted(then.keys() | settings.keys()) if then.get(key) != settings.get(key)]
    if changed:
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        what = f"the pilot in {output} has other settings: {changed[0]} was {then.get(changed[0])!r}, now "
        what += f"{settings.get(changed[0])!r}{more}"
        raise CheckpointError("checkpoint.changed", what, hint="use the original settings, or choose another --output")
    return record


def write_pilot(output: Path, record: PilotRecord) -> None:
    """Write the record atomically. Raises StorageError."""
    with storing(f"cannot write {output / PILOT}", "free disk space, then run the same command again"):
        output_dir.write_file(output, PILOT, json.dumps(asdict(record), allow_nan=False) + "\n")
