"""Whether, where and how the teacher's states are kept in a run; and ``--warm-teacher-cache``."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillm_cli.config.load import Resolved
from distillm_cli.config.schema import Recipe
from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.errors import Interrupted, UsageError, signal_number
from distillm_cli.runs.build import new_scheduler
from distillm_cli.runs.cache_size import CacheSize, CacheWorkload, uses_rows
from distillm_cli.runs.prepare import Prepared, new_order, prepare
from distillm_cli.runs.run_results import TeacherCacheResult
from distillm_cli.teachers import teacher_cache
from distillm_cli.teachers.cached import BatchComposition, CachedTeacher, HiddenStateTable
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.teachers.teacher_cache import CacheKey
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.types import Sequence, collate
from distillm_cli.utils.memory import available_memory
from distillm_cli.utils.text import counted, format_count

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone


@dataclass(frozen=True)
class CachePlan:
    """Hold what is decided on the teacher's cache. mode: memory, disk or off. why: a clause for people.

    size: what it will hold. place, key, is_made: of a cache on disk, and whether it exists.
    """

    mode: str
    why: str
    size: CacheSize = field(default_factory=CacheSize)
    place: Path | None = None
    key: CacheKey | None = None
    is_made: bool = False


@dataclass(frozen=True)
class TeacherHandle:
    """A teacher at work, and what it was decided to keep. hit: its states were on disk already."""

    teacher: LocalTeacher
    keeping: CachePlan
    hit: bool = False

    def facts(self) -> dict[str, Any]:
        """What the result object says of it."""
        rows = getattr(self.teacher, "rows", None)
        known = 0 if rows is None else len(rows.sequences) - rows.missing
        place = {} if self.keeping.place is None else {"place": str(self.keeping.place)}
        size = 0 if rows is None else rows.bytes
        told = {"mode": self.keeping.mode, "rows": known, "bytes": size, "hit": self.hit}
        return told | {"model_left": self.teacher.has_released_model, **place}


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
    workload = workload_of(run)
    keeping = plan_cache(run, workload, before=before, rebuild=rebuild)
    listener(Note(f"teacher's states: {keeping.why}{'' if keeping.place is None else f', in {keeping.place}'}"))
    if keeping.mode == "off":
        return TeacherHandle(LocalTeacher(model), keeping)
    rows, composition, hit, computed = None, None, False, 0
    if keeping.mode == "disk":
        rows, hit, computed = _on_disk(run, keeping, rebuild, listener)
    elif keeping.size.rows:
        _warn_if_short(keeping, listener)
        order = new_order(run.recipe, run.train)  # of its own: an order remembers one epoch, and the run's is another
        rows = HiddenStateTable(run.train.sequences)
        composition = BatchComposition(
            lambda step: [run.train.sequences[i] for i in order.batch(step)],
            steps=order.steps_per_epoch,
            rows=run.train.sequences,
            max_rows=run.recipe.train.batch_size,
            pass_overhead=run.pass_overhead,
        )
    schedule = new_scheduler(run)
    samples = schedule.config.uses_student_outputs or schedule.config.uses_teacher_samples
    validation = _held_out(run)
    teacher = CachedTeacher(
        model,
        mode=keeping.mode,
        rows=rows,
        composition=composition,
        caches_rollouts=workload.rollouts_repeat or workload.samples_repeat,
        validation=HiddenStateTable(validation) if validation else None,
        # Quantized weights are no plain tensors that could be released one by one.
        releases_model=rows is not None and not (samples or model.is_quantized),
    )
    teacher.tokens = computed
    return TeacherHandle(teacher, keeping, hit)


def warm(
    resolved: Resolved, listener: Listener, *, rebuild: bool = False, prefetcher: Prefetcher | None = None
) -> TeacherCacheResult:
    """Compute the cache on disk for this recipe, unless it is there."""
    started = time.perf_counter()
    for note in resolved.notes:
        listener(Warned(note))
    place = None
    try:
        run = prepare(resolved.recipe, listener, prefetcher)
        keeping = _planned_on_disk(run, workload_of(run))
        place = str(keeping.place)
        _, hit, computed = _on_disk(run, keeping, rebuild, listener)
    except KeyboardInterrupt as stop:
        what, hint = "interrupted while making the teacher cache", "it is there whole or not at all; start it again"
        raise Interrupted(what, signal_number=signal_number(stop), where=place, hint=hint) from None
    rows, size, mode = len(run.train), keeping.size.rows, run.recipe.teacher.cache
    if mode in ("memory", "off"):
        listener(Warned(f"with teacher.cache {mode} this recipe will not read it; give --teacher-cache disk or auto"))
    listener(
        Note(
            f"{'was there already' if hit else 'made'}: {keeping.place} · {counted(rows, 'row')} · {format_count(size)}B"
        )
    )
    return TeacherCacheResult(
        output=keeping.place,
        wall_s=round(time.perf_counter() - started, 3),
        teacher_cache={"mode": "disk", "rows": rows, "bytes": size, "hit": hit, "place": str(keeping.place)},
        teacher_tokens=computed,
    )


def check_rows(recipe: Recipe) -> None:
    """Raises UsageError where states on disk would be of rows that the run does not train on."""
    if not uses_rows(recipe):
        raise UsageError(
            f"teacher.cache disk keeps what the teacher says of data set rows, and schedule.kind "
            f"{recipe.schedule.kind} trains on none",
            hint="give --teacher-cache memory or off",
        )


def workload_of(run: Prepared) -> CacheWorkload:
    """Return what decides the cache's size. Computes a token, to measure the width and type of the teacher's states."""
    sample_tokens = None
    if run.teacher_samples is not None:
        sample_tokens = sum(s.supervised for samples in run.teacher_samples.values() for s in samples)
    return CacheWorkload(
        recipe=run.recipe,
        bytes_per_token=0 if run.recipe.teacher.cache == "off" else _bytes_per_token(run),
        rows=len(run.train),
        row_tokens=run.train.tokens,
        steps=run.steps,
        steps_per_epoch=run.order.steps_per_epoch,
        validation_tokens=sum(s.supervised for s in run.valid.sequences),
        sample_tokens=sample_tokens,
    )


def plan_cache(
    run: Prepared, workload: CacheWorkload, *, before: str | None = None, rebuild: bool = False
) -> CachePlan:
    """Return where the teacher's states will be cached, and how large that is. Arguments as of ``open_teacher``."""
    mode = run.recipe.teacher.cache
    if rebuild and mode in ("memory", "off"):
        raise UsageError(f"--rebuild-teacher-cache with --teacher-cache {mode}", hint="give --teacher-cache disk")
    if mode == "disk" or (mode == "auto" and (rebuild or before == "disk")):
        return _planned_on_disk(run, workload)
    if mode == "off":
        return CachePlan("off", "not cached")
    if mode == "auto" and before == "off":
        return CachePlan("off", "not cached, as when the run was started")
    if mode == "auto" and before is None:
        if (found := _existing_on_disk(run, workload)) is not None:
            return found
        chosen, why = workload.choose(available_memory())
        if chosen == "off":
            hint = f" (--teacher-cache disk would keep them in {_root(run)})" if workload.anything_repeats else ""
            return CachePlan("off", f"{why}{hint}")
    size = workload.size(mode)
    parts = size.described(len(run.train))
    return CachePlan("memory", f"cached in memory: {parts or 'nothing is needed twice in this run'}", size)


def _existing_on_disk(run: Prepared, workload: CacheWorkload) -> CachePlan | None:
    """Return the plan for a cache that an earlier run made; None where there is none for these rows and this teacher."""
    root = _root(run)
    if not (uses_rows(run.recipe) and root.is_dir()):
        return None
    # Only where a name is promising are the weights read.
    named = any(root.glob(f"*-{teacher_cache.rows_digest(run.train.sequences)[:16]}"))
    if not named and not (root / teacher_cache.METADATA).exists():
        return None
    found = _planned_on_disk(run, workload)
    return found if found.is_made else None


def _planned_on_disk(run: Prepared, workload: CacheWorkload) -> CachePlan:
    check_rows(run.recipe)
    model, sequences = run.pair.teacher, run.train.sequences
    key = CacheKey(teacher_cache.teacher_digest(model, _config_of(model)), teacher_cache.rows_digest(sequences))
    place = teacher_cache.cache_directory(_root(run), key)
    size = workload.size("disk")
    why = f"on disk, {format_count(size.rows)}B for {counted(len(run.train), 'row')}"
    return CachePlan("disk", why, size, place=place, key=key, is_made=place.exists())


def _on_disk(
    run: Prepared, keeping: CachePlan, rebuild: bool, listener: Listener
) -> tuple[HiddenStateTable, bool, int]:
    """The states, whether they were there already, and how many tokens the teacher computed for them."""
    sequences, asked, made = run.train.sequences, LocalTeacher(run.pair.teacher), False
    if rebuild or not keeping.is_made:
        how = {"size": keeping.size.rows, "rebuild": rebuild}
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
    return teacher_cache.cache_root(run.recipe.teacher.cache_dir)


def _held_out(run: Prepared) -> list[Sequence]:
    """Held-out rows that the teacher is asked about: at every validation, where a divergence selects checkpoints."""
    return run.valid.sequences if run.recipe.train.select == "valid_divergence" else []


def _bytes_per_token(run: Prepared) -> int:
    """Measure one token's state: a model may answer with its own logits, in its own type."""
    one = run.train.sequences[0].prompt[:1]  # a row may have no response
    few = Sequence(one, one)
    hidden_ND = LocalTeacher(run.pair.teacher).hidden(collate([few]).to(run.device), [few])
    return hidden_ND.shape[1] * hidden_ND.element_size()


def _config_of(model: Backbone) -> str:
    """The teacher's config, without where it was found and which version wrote it."""
    told = model.model.config.to_dict()
    elsewhere = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
    return json.dumps({k: v for k, v in told.items() if k not in elsewhere}, sort_keys=True, default=str)


def _warn_if_short(keeping: CachePlan, listener: Listener) -> None:
    size, free = keeping.size.total, available_memory()
    if free is not None and size > free:
        listener(
            Warned(f"the teacher's states take {format_count(size)}B, and {format_count(free)}B of memory are free")
        )
