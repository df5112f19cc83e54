"""Whether, where and how the teacher's states are kept in a run; and ``--warm-teacher-cache``."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillm_cli.config.load import Resolved
from distillm_cli.config.schema import Recipe
from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.errors import Interrupted, UsageError, signal_number
from distillm_cli.losses import criteria
from distillm_cli.rollouts.scheduler import Scheduler
from distillm_cli.runs.prepare import Prepared, new_order, new_replay, new_scheduler, prepare
from distillm_cli.teachers import teacher_cache
from distillm_cli.teachers.teacher import FirstEpoch, RowStates, Teacher
from distillm_cli.teachers.teacher_cache import Key
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.types import Sequence, collate
from distillm_cli.ui.console import Console
from distillm_cli.ui.display import amount
from distillm_cli.utils.memory import available_memory
from distillm_cli.utils.text import counted

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone

SHARE = 0.25  # of the free memory, which `auto` may fill


@dataclass(frozen=True)
class CachePlan:
    """What is kept of the teacher's states. mode: memory, disk or off. why: a clause for people.

    rows_bytes, rollout_bytes, sample_bytes, held_out_bytes: of data set rows (exact), of student outputs (at most), of the
    teacher's samples (at most), of held-out rows; all 0 when off. place, key, is_made: of a cache on disk, and whether it
    is there.
    """

    mode: str
    why: str
    rows_bytes: int = 0
    rollout_bytes: int = 0
    sample_bytes: int = 0
    held_out_bytes: int = 0
    place: Path | None = None
    key: Key | None = None
    is_made: bool = False


@dataclass(frozen=True)
class TeacherHandle:
    """A teacher at work, and what it was decided to keep. hit: its states were on disk already."""

    teacher: Teacher
    keeping: CachePlan
    hit: bool = False

    def facts(self) -> dict[str, Any]:
        """What the result object says of it."""
        rows = self.teacher.rows
        known = 0 if rows is None else len(rows.sequences) - rows.unknown
        place = {} if self.keeping.place is None else {"place": str(self.keeping.place)}
        size = 0 if rows is None else rows.bytes
        told = {"mode": self.keeping.mode, "rows": known, "bytes": size, "hit": self.hit}
        return told | {"model_left": self.teacher.has_left, **place}


def open_teacher(
    run: Prepared, listener: Listener, *, before: str | None = None, rebuild: bool = False
) -> TeacherHandle | None:
    """The run's teacher, None for SFT. States on disk are read, or computed first.

    before: the mode that the run was started with, on a resume: `auto` must not decide anew, or the states would round
    otherwise. Raises StorageError, CheckpointError, UsageError.
    """
    model = run.pair.teacher
    if model is None:
        return None
    keeping = plan_cache(run, before=before, rebuild=rebuild)
    listener(Note(f"teacher's states: {keeping.why}{'' if keeping.place is None else f', in {keeping.place}'}"))
    if keeping.mode == "off":
        return TeacherHandle(Teacher(model), keeping)
    rows, company, hit, computed = None, None, False, 0
    if keeping.mode == "disk":
        rows, hit, computed = _on_disk(run, keeping, rebuild, listener)
    elif keeping.rows_bytes:
        _warn_if_short(keeping, listener)
        order = new_order(run.recipe, run.train)  # of its own: an order remembers one epoch, and the run's is another
        rows = RowStates(run.train.sequences)
        company = FirstEpoch(
            lambda step: [run.train.sequences[i] for i in order.batch(step)],
            steps=order.steps_per_epoch,
            rows=run.train.sequences,
            most=run.recipe.train.batch_size,
            pass_overhead=run.pass_overhead,
        )
    schedule = new_scheduler(run)
    teacher = Teacher(
        model,
        mode=keeping.mode,
        rows=rows,
        company=company,
        remembers=schedule.may_replay or _samples_come_back(run),
        passing=run.train.sequences if rows is None else (),
        # Weights in few bits are no plain tensors that could be let go of one by one.
        leaves=rows is not None
        and not (schedule.may_use_student_outputs or schedule.may_use_teacher_samples or model.is_quantized),
        awaited=_held_out(run),
    )
    teacher.tokens = computed
    return TeacherHandle(teacher, keeping, hit)


def warm(resolved: Resolved, *, rebuild: bool, ui: Console, prefetcher: Prefetcher | None = None) -> dict[str, Any]:
    """Computes the cache on disk for this recipe, unless it is there, and returns the result object of ``--json``."""
    began = time.perf_counter()
    for note in resolved.notes:
        ui(Warned(note))
    place = None
    try:
        run = prepare(resolved.recipe, ui, prefetcher)
        keeping = _planned_on_disk(run, _token_bytes(run))
        place = str(keeping.place)
        _, hit, computed = _on_disk(run, keeping, rebuild, ui)
    except KeyboardInterrupt as stop:
        what, hint = "interrupted while making the teacher cache", "it is there whole or not at all; start it again"
        raise Interrupted(what, signal_number=signal_number(stop), where=place, hint=hint) from None
    rows, size, mode = len(run.train), keeping.rows_bytes, run.recipe.teacher.cache
    if mode in ("memory", "off"):
        ui(Warned(f"with teacher.cache {mode} this recipe will not read it; give --teacher-cache disk or auto"))
    ui(Note(f"{'was there already' if hit else 'made'}: {keeping.place} · {counted(rows, 'row')} · {amount(size)}B"))
    return {
        "command": "distill",
        "status": "ok",
        "output": str(keeping.place),
        "wall_s": round(time.perf_counter() - began, 3),
        "teacher_cache": {"mode": "disk", "rows": rows, "bytes": size, "hit": hit, "place": str(keeping.place)},
        "teacher_tokens": computed,
    }


def uses_rows(recipe: Recipe) -> bool:
    """Whether data set rows' own responses are trained on: where the schedule draws them, or beside student outputs."""
    schedule = Scheduler(recipe.schedule, steps=1, seed=0)
    return schedule.may_use_rows or criteria.build(recipe.objective).rows_beside


def check_rows(recipe: Recipe) -> None:
    """Raises UsageError where states on disk would be of rows that the run does not train on."""
    if not uses_rows(recipe):
        raise UsageError(
            f"teacher.cache disk keeps what the teacher says of data set rows, and schedule.kind "
            f"{recipe.schedule.kind} trains on none",
            hint="give --teacher-cache memory or off",
        )


def plan_cache(run: Prepared, *, before: str | None = None, rebuild: bool = False) -> CachePlan:
    """What would be kept, and its size; computes a few tokens to measure the width. Arguments as of ``open_teacher``."""
    mode = run.recipe.teacher.cache
    if rebuild and mode in ("memory", "off"):
        raise UsageError(f"--rebuild-teacher-cache with --teacher-cache {mode}", hint="give --teacher-cache disk")
    is_auto = mode == "auto"
    if is_auto and before is not None:
        mode = before
    if mode == "off":
        return CachePlan("off", "not kept" if not is_auto else "not kept, as when the run was started")
    per_token = _token_bytes(run)
    if mode == "disk" or (is_auto and rebuild):
        return _planned_on_disk(run, per_token)
    if mode == "memory":
        rows = uses_rows(run.recipe) if not is_auto else _rows_come_back(run)
        return _planned_in_memory(run, per_token, rows=rows)
    return _planned_by_itself(run, per_token)


def _planned_by_itself(run: Prepared, per_token: int) -> CachePlan:
    """``auto``: the disk where a cache is there already, else memory where it pays and fits, else off."""
    root = _root(run)
    if uses_rows(run.recipe) and _may_be_there(root, run):
        found = _planned_on_disk(run, per_token)
        if found.is_made:
            return found
    if not (_rows_come_back(run) or new_scheduler(run).may_replay or _samples_come_back(run)):
        schedule = new_scheduler(run)
        asked = "sees every row once" if uses_rows(run.recipe) else "asks about every sample once"
        if schedule.may_use_teacher_samples and not run.recipe.objective.kd_weight:
            asked = "asks the teacher for samples alone"
        return CachePlan("off", f"not kept: this run {asked}")
    found = _planned_in_memory(run, per_token, rows=_rows_come_back(run))
    size, free = found.rows_bytes + found.rollout_bytes + found.sample_bytes + found.held_out_bytes, available_memory()
    if free is None or size <= SHARE * free:
        return found
    why = f"not kept: {amount(size)}B is more than a quarter of the {amount(free)}B of free memory"
    return CachePlan("off", f"{why} (--teacher-cache disk would keep them in {root})")


def _may_be_there(root: Path, run: Prepared) -> bool:
    """Whether the name of some cache gives hope: only then are the weights read."""
    if not root.is_dir():
        return False
    if (root / teacher_cache.FACTS).exists():
        return True
    return any(root.glob(f"*-{teacher_cache.rows_digest(run.train.sequences)[:16]}"))


def _planned_in_memory(run: Prepared, per_token: int, *, rows: bool) -> CachePlan:
    sizes = {"rows_bytes": run.train.tokens * per_token if rows else 0, **_beside_rows(run, per_token)}
    parts = [f"{amount(sizes['rows_bytes'])}B for {counted(len(run.train), 'row')}"] if rows else []
    if sizes["rollout_bytes"]:
        parts.append(f"at most {amount(sizes['rollout_bytes'])}B for replayed rollouts")
    if sizes["sample_bytes"]:
        parts.append(f"at most {amount(sizes['sample_bytes'])}B for teacher samples")
    what = f"as they come, {' and '.join(parts)}" if parts else "where it is asked twice, which it is not in this run"
    return CachePlan("memory", f"kept in memory {what}", **sizes)


def _planned_on_disk(run: Prepared, per_token: int) -> CachePlan:
    check_rows(run.recipe)
    model, sequences = run.pair.teacher, run.train.sequences
    key = Key(teacher_cache.teacher_digest(model, _config_of(model)), teacher_cache.rows_digest(sequences))
    place = teacher_cache.place_of(_root(run), key)
    size = run.train.tokens * per_token
    why = f"on disk, {amount(size)}B for {counted(len(run.train), 'row')}"
    return CachePlan(
        "disk", why, rows_bytes=size, **_beside_rows(run, per_token), place=place, key=key, is_made=place.exists()
    )


def _beside_rows(run: Prepared, per_token: int) -> dict[str, int]:
    drawn = min(new_replay(run.recipe, run.step_rows).capacity, run.steps * run.step_rows)
    rollouts = drawn * run.recipe.rollout.max_new_tokens * per_token if new_scheduler(run).may_replay else 0
    held_out = sum(s.supervised for s in _held_out(run)) * per_token
    samples = _sampled_tokens(run) * per_token if _samples_come_back(run) else 0
    return {"rollout_bytes": rollouts, "sample_bytes": samples, "held_out_bytes": held_out}


def _sampled_tokens(run: Prepared) -> int:
    """Of the teacher's samples: as many as there are, or as there can be at most."""
    if run.teacher_samples is not None:
        return sum(s.supervised for samples in run.teacher_samples.values() for s in samples)
    return len(run.train) * run.recipe.rollout.max_new_tokens


def _on_disk(run: Prepared, keeping: CachePlan, rebuild: bool, listener: Listener) -> tuple[RowStates, bool, int]:
    """The states, whether they were there already, and how many tokens the teacher computed for them."""
    sequences, asked, made = run.train.sequences, Teacher(run.pair.teacher), False
    if rebuild or not keeping.is_made:
        how = {"size": keeping.rows_bytes, "rebuild": rebuild}
        how["of"] = {"teacher": str(run.recipe.teacher.path), "data": run.train_rows.name}
        if run.recipe.data.date is not None:
            how["of"] |= {"date": run.recipe.data.date}
        made = teacher_cache.write_cache(keeping.place, keeping.key, asked, sequences, run.device, listener, **how)
    return teacher_cache.read_cache(keeping.place, keeping.key, sequences, listener), not made, asked.tokens


def disk_free(place: Path) -> int | None:
    """Bytes free where ``place`` is or would be made."""
    for parent in (place, *place.parents):
        if parent.is_dir():
            return shutil.disk_usage(parent).free
    return None


def _root(run: Prepared) -> Path:
    return teacher_cache.root_of(run.recipe.teacher.cache_dir)


def _rows_come_back(run: Prepared) -> bool:
    return uses_rows(run.recipe) and run.steps > run.order.steps_per_epoch


def _samples_come_back(run: Prepared) -> bool:
    """Whether the teacher is asked more than once about a sample of its own."""
    comes_back = new_scheduler(run).samples_come_back and run.steps > run.order.steps_per_epoch
    return comes_back and run.recipe.objective.kd_weight > 0


def _held_out(run: Prepared) -> list[Sequence]:
    """Held-out rows that the teacher is asked about: at every validation, where a divergence selects checkpoints."""
    return run.valid.sequences if run.recipe.train.select == "valid_divergence" else []


def _token_bytes(run: Prepared) -> int:
    """Of one token's state; measured, since a model may answer with its own logits in its own type."""
    one = run.train.sequences[0].prompt[:1]  # a row may have no response
    few = Sequence(one, one)
    hidden_ND = Teacher(run.pair.teacher).hidden(collate([few]).to(run.device), [few])
    return hidden_ND.shape[1] * hidden_ND.element_size()


def _config_of(model: Backbone) -> str:
    """The teacher's config, without where it was found and which version wrote it."""
    told = model.model.config.to_dict()
    elsewhere = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    return json.dumps({k: v for k, v in told.items() if k not in elsewhere}, sort_keys=True, default=str)


def _warn_if_short(keeping: CachePlan, listener: Listener) -> None:
    size, free = keeping.rows_bytes + keeping.rollout_bytes + keeping.sample_bytes, available_memory()
    if free is not None and size > free:
        listener(Warned(f"the teacher's states take {amount(size)}B, and {amount(free)}B of memory are free"))
