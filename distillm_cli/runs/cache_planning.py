"""Choose the location of a run's teacher cache, open the teacher with that cache, and warm it on disk."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distillm_cli.config.load import Resolved
from distillm_cli.config.schema import Recipe
from distillm_cli.data.prefetch import Prefetcher
from distillm_cli.errors import Interrupted, UsageError, signal_number
from distillm_cli.runs.build import new_scheduler
from distillm_cli.runs.cache_size import CacheSize, CacheWorkload, uses_rows
from distillm_cli.runs.prepare import Prepared, new_order, prepare
from distillm_cli.runs.run_results import TeacherCacheResult
from distillm_cli.runs.server_checks import check_served_teacher
from distillm_cli.teachers import teacher_cache
from distillm_cli.teachers.cached import BatchComposition, CachedTeacher, HiddenStateTable
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.teachers.teacher_cache import CacheKey
from distillm_cli.training.distributed import in_first_process
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.types import Sequence, collate, rows_digest
from distillm_cli.utils.memory import available_memory
from distillm_cli.utils.storage import cache_root
from distillm_cli.utils.text import counted, format_count

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone


@dataclass(frozen=True)
class CachePlan:
    """Describe the teacher cache of a run.

    mode: memory, disk or off. why: a clause for messages. size: bytes that will be cached. disk: the cache on disk.
    """

    mode: str
    why: str
    size: CacheSize = field(default_factory=CacheSize)
    disk: DiskCache | None = None

    @property
    def place(self) -> Path | None:
        """Return the directory of the cache on disk."""
        return None if self.disk is None else self.disk.place

    @property
    def exists(self) -> bool:
        """Return whether a cache on disk has been computed before."""
        return self.disk is not None and self.disk.exists

    @property
    def has_samples(self) -> bool:
        """Return whether states of rollouts or of the teacher's samples are cached."""
        return bool(self.size.rollouts or self.size.samples)


@dataclass(frozen=True)
class DiskCache:
    """Describe a cache on disk. exists: whether it has been computed before. size: bytes of the rows' states."""

    place: Path
    key: CacheKey
    exists: bool
    size: int


@dataclass(frozen=True)
class TeacherHandle:
    """Hold an opened teacher and the plan of its cache. hit: the cache on disk existed before the run."""

    teacher: LocalTeacher
    cache_plan: CachePlan
    hit: bool = False

    def facts(self) -> dict[str, Any]:
        """Return the ``teacher_cache`` object of the run's result."""
        rows = getattr(self.teacher, "rows", None)
        facts = {
            "mode": self.cache_plan.mode,
            "rows": 0 if rows is None else len(rows.sequences) - rows.missing,
            "bytes": 0 if rows is None else rows.bytes,
            "hit": self.hit,
            "model_left": self.teacher.has_released_model,
        }
        if self.cache_plan.place is not None:
            facts["place"] = str(self.cache_plan.place)
        return facts


def open_teacher(
    run: Prepared, cache_plan: CachePlan | None, listener: Listener, *, rebuild: bool = False
) -> TeacherHandle | None:
    """Open the run's teacher; None for SFT. A cache on disk is read, and computed first if it does not exist.

    cache_plan: of ``plan_cache``. Raises StorageError, CheckpointError.
    """
    if cache_plan is None:
        return None
    model = run.teacher
    listener(Note(f"teacher cache: {cache_plan.why}{'' if cache_plan.place is None else f', in {cache_plan.place}'}"))
    if cache_plan.mode == "off":
        return TeacherHandle(LocalTeacher(model), cache_plan)
    rows = None
    composition = None
    hit = False
    computed_tokens = 0
    if cache_plan.disk is not None:
        rows, hit, computed_tokens = _read_or_compute(run, cache_plan.disk, rebuild, listener)
    elif cache_plan.size.rows:
        _warn_if_short_of_memory(cache_plan, listener)
        order = new_order(run.recipe, run.train)  # not the run's: an order has the state of one epoch
        rows = HiddenStateTable.shared(run.train.sequences, partial(_one_state, run))
        composition = BatchComposition(
            order.batch,
            steps=order.steps_per_epoch,
            rows=run.train.sequences,
            max_rows=run.recipe.train.batch_size,
            max_tokens=run.recipe.train.tokens_per_batch,
            pass_overhead=run.pass_overhead,
        )
    if cache_plan.disk is not None and not model.is_whole:
        listener(Note("loaded only the teacher's head: all of its states are cached"))
    schedule = new_scheduler(run)
    samples = schedule.config.uses_student_outputs or schedule.config.uses_teacher_samples
    validation = _validation_rows(run)
    teacher = CachedTeacher(
        model,
        mode=cache_plan.mode,
        rows=rows,
        composition=composition,
        caches_rollouts=cache_plan.has_samples,
        validation=HiddenStateTable.shared(validation, partial(_one_state, run)) if validation else None,
        # Quantized weights are not plain tensors that could be released one by one. A server's are not here.
        releases_model=rows is not None
        and not (
            samples
            or model.is_quantized
            or model.is_dispatched
            or model.is_served
            or run.recipe.runs_teacher_on_embeddings
        ),
    )
    teacher.tokens = computed_tokens
    return TeacherHandle(teacher, cache_plan, hit)


def warm_cache(
    resolved: Resolved, listener: Listener, *, rebuild: bool = False, prefetcher: Prefetcher | None = None
) -> TeacherCacheResult:
    """Compute the cache on disk for this recipe, unless it exists. Raises UsageError if the run could not use it."""
    started = time.perf_counter()
    check_rows(resolved.recipe)
    for note in resolved.notes:
        listener(Warned(note))
    place = None
    try:
        run = prepare(resolved.recipe, listener, prefetcher)
        check_served_teacher(run)
        disk = _disk_cache(run, _workload_of(run))
        place = str(disk.place)
        _, hit, computed_tokens = _read_or_compute(run, disk, rebuild, listener)
    except KeyboardInterrupt as stop:
        raise Interrupted(
            "interrupted while computing the teacher cache",
            signal_number=signal_number(stop),
            where=place,
            hint="no incomplete cache was written; start again",
        ) from None
    rows = len(run.train)
    mode = run.recipe.teacher.cache
    if mode in ("memory", "off"):
        listener(Warned(f"with teacher.cache {mode} this recipe does not read it; use --teacher-cache disk or auto"))
    result = "already exists" if hit else "made"
    listener(Note(f"{result}: {disk.place} · {counted(rows, 'row')} · {format_count(disk.size)}B"))
    return TeacherCacheResult(
        output=disk.place,
        wall_s=round(time.perf_counter() - started, 3),
        teacher_cache={"mode": "disk", "rows": rows, "bytes": disk.size, "hit": hit, "place": place},
        teacher_tokens=computed_tokens,
    )


def check_rows(recipe: Recipe) -> None:
    """Raise UsageError for a cache on disk if the run changes the teacher, or does not train on rows, which are cached."""
    if recipe.uncached_because is not None:
        raise UsageError(
            "usage.no_teacher_cache",
            f"{recipe.uncached_because}, so no cache is used",
            hint="use no --warm-teacher-cache and no --rebuild-teacher-cache",
        )
    if not uses_rows(recipe):
        raise UsageError(
            "usage.no_teacher_cache",
            "teacher.cache disk has the teacher's hidden states of data set rows, but schedule.kind "
            f"{recipe.schedule.kind} does not train on them",
            hint="use --teacher-cache memory or off",
        )


def _workload_of(run: Prepared) -> CacheWorkload:
    """Return the properties that determine the cache's size.

    The teacher computes one token, to measure the states' width and dtype.
    """
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
        validation_tokens=run.valid.tokens,
        sample_tokens=sample_tokens,
    )


@in_first_process
def plan_cache(run: Prepared, *, started_mode: str | None = None, rebuild: bool = False) -> CachePlan | None:
    """Return the location and size of the teacher cache; None for SFT. For a cache on disk, the weights are hashed.

    started_mode: on a resume, the mode of the original run. ``auto`` uses it again, since states of another mode are
    rounded differently. Raises UsageError.
    """
    if run.pair.teacher is None:
        return None
    if run.recipe.uncached_because is not None:
        return CachePlan("off", f"not cached, since {run.recipe.uncached_because}")
    mode = run.recipe.teacher.cache
    if rebuild and mode in ("memory", "off"):
        raise UsageError(
            "usage.exclusive_options",
            f"--rebuild-teacher-cache with --teacher-cache {mode}",
            hint="use --teacher-cache disk",
        )
    workload = _workload_of(run)
    if mode == "disk" or (mode == "auto" and (rebuild or started_mode == "disk")):
        return _planned_on_disk(run, _disk_cache(run, workload), workload)
    if mode == "off":
        return CachePlan("off", "not cached")
    if mode == "auto" and started_mode == "off":
        return CachePlan("off", "not cached, as at the start of the run")
    if mode == "auto" and started_mode is None:
        existing = _existing_on_disk(run, workload)
        if existing is not None:
            return existing
        chosen, why = workload.choose(available_memory())
        if chosen == "off":
            hint = f" (--teacher-cache disk would store them in {_root(run)})" if workload.anything_repeats else ""
            return CachePlan("off", f"{why}{hint}")
    size = workload.size(mode)
    parts = size.described(len(run.train))
    return CachePlan("memory", f"cached in memory: {parts or 'no sequence repeats in this run'}", size)


def _existing_on_disk(run: Prepared, workload: CacheWorkload) -> CachePlan | None:
    """Return the plan of an existing cache for these rows and this teacher; None without one."""
    root = _root(run)
    if not (uses_rows(run.recipe) and root.is_dir()):
        return None
    # Computing the teacher's digest reads its weights: compare the rows' digest first, which is in the name.
    is_named = any(root.glob(f"*-{rows_digest(run.train.sequences)[:16]}"))
    if not is_named and not (root / teacher_cache.METADATA).exists():
        return None
    disk = _disk_cache(run, workload)
    return _planned_on_disk(run, disk, workload) if disk.exists else None


@in_first_process
def _disk_cache(run: Prepared, workload: CacheWorkload) -> DiskCache:
    """Return the cache on disk of this teacher and these rows. Raises UsageError where the run trains on no rows."""
    check_rows(run.recipe)
    key = CacheKey(_teacher_digest(run.teacher), rows_digest(run.train.sequences))
    place = teacher_cache.cache_directory(_root(run), key)
    return DiskCache(place, key, exists=place.exists(), size=workload.size("disk").rows)


def _teacher_digest(teacher: Backbone) -> str:
    """Return the teacher's digest: the recorded one if only its head is loaded."""
    recorded = None if teacher.record is None else teacher.record.digests.get(str(teacher.vocab))
    if recorded is not None:
        return recorded
    return teacher_cache.teacher_digest(teacher.whole, _config_json(teacher.whole))


def _planned_on_disk(run: Prepared, disk: DiskCache, workload: CacheWorkload) -> CachePlan:
    why = f"on disk, {format_count(disk.size)}B for {counted(len(run.train), 'row')}"
    return CachePlan("disk", why, workload.size("disk"), disk)


def _read_or_compute(
    run: Prepared, disk: DiskCache, rebuild: bool, listener: Listener
) -> tuple[HiddenStateTable, bool, int]:
    """Return the states of a cache on disk, whether they existed before, and how many tokens the teacher computed."""
    sequences = run.train.sequences
    teacher = LocalTeacher(run.teacher)
    is_new = False
    if rebuild or not disk.exists:
        names = {"teacher": str(run.recipe.teacher.path), "data": run.train_rows.name}
        if run.recipe.data.date is not None:
            names["date"] = run.recipe.data.date
        with run.teacher.on_device():
            is_new = teacher_cache.write_cache(
                disk.place,
                disk.key,
                teacher,
                sequences,
                run.device,
                listener,
                of=names,
                size=disk.size,
                rebuild=rebuild,
            )
    table = teacher_cache.read_cache(disk.place, disk.key, sequences, listener)
    known = {} if run.teacher.record is None else run.teacher.record.digests
    if disk.place != _root(run) and str(run.teacher.vocab) not in known:
        from distillm_cli.models.unloaded import record_teacher

        path = str(run.recipe.teacher.path)
        record_teacher(_root(run), path, run.teacher.whole, disk.key.teacher, _bytes_per_token(run))
    return table, not is_new, teacher.tokens


def disk_free(place: Path) -> int | None:
    """Return the free bytes of the file system of ``place``; None if no parent exists."""
    for parent in (place, *place.parents):
        if parent.is_dir():
            return shutil.disk_usage(parent).free
    return None


def _root(run: Prepared) -> Path:
    return cache_root("teacher", run.recipe.teacher.cache_dir)


def _validation_rows(run: Prepared) -> SequenceOf[Sequence]:
    """Return the validation rows whose states are cached: all if a divergence is measured on them, else none."""
    recipe = run.recipe
    is_measured = recipe.train.select == "valid_divergence" or bool(recipe.schedule.measures)
    return run.valid.sequences if is_measured else ()


def _bytes_per_token(run: Prepared) -> int:
    """Return the bytes of one token's state, measured: for some models it is the logits, in a dtype of their own."""
    if run.teacher.record is not None:
        return run.teacher.record.state_bytes
    state_ND = _one_state(run)
    return state_ND.shape[1] * state_ND.element_size()


def _one_state(run: Prepared) -> Tensor:
    """Return the state of one token, which shows width and dtype: for some models it is the logits, in their own dtype."""
    token = run.train.sequences[0].prompt[:1]  # a row may have no response
    sequence = Sequence(token, token)
    return LocalTeacher(run.teacher).hidden(collate([sequence]).to(run.device), [sequence])


def _config_json(model: Backbone) -> str:
    """Return the model's config as JSON, without its path and the version that wrote it."""
    config = model.model.config.to_dict()
    for key in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"):
        config.pop(key, None)
    return json.dumps(config, sort_keys=True, default=str)


def _warn_if_short_of_memory(cache_plan: CachePlan, listener: Listener) -> None:
    size = cache_plan.size.total
    free = available_memory()
    if free is not None and size > free:
        what = f"the teacher's hidden states need {format_count(size)}B, but {format_count(free)}B of memory are free"
        listener(Warned(what))
