"""Test the teacher cache on disk: complete, of the right teacher and rows, and shared between processes."""

import errno
import json
import subprocess
import sys
import textwrap
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.models.backbone import Backbone
from distillm_cli.teachers import teacher_cache
from distillm_cli.teachers.cached import CachedTeacher
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.teachers.teacher_cache import (
    CacheKey,
    cache_directory,
    check_space,
    read_cache,
    teacher_digest,
    write_cache,
)
from distillm_cli.types import collate, rows_digest
from tests import tiny
from tests.codes import raises_code
from tests.resource_limits import file_size

TOKENIZER = tiny.tokenizer()
ROWS = tiny.sequences([(3 + i % 9, 1 + i % 5) for i in range(50)], vocab=len(TOKENIZER), seed=3)
CPU = torch.device("cpu")
LABELS = {"teacher": "models/big", "data": "rows.jsonl"}


def model(dtype=torch.float32, **fields):
    return Backbone(tiny.model("llama", len(TOKENIZER), seed=4, **fields), TOKENIZER).to(dtype)


def key_of(backbone, rows=ROWS, config="{}"):
    return CacheKey(teacher_digest(backbone, config), rows_digest(rows))


def make(root, backbone=None, rows=ROWS, **options):
    """Write a cache and return its directory and key."""
    backbone = backbone or model()
    key = key_of(backbone, rows)
    directory = cache_directory(root, key)
    assert write_cache(directory, key, LocalTeacher(backbone), rows, CPU, of=LABELS, **options)
    return directory, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_from_disk_match_live_ones(tmp_path, dtype):
    directory, key = make(tmp_path, model(dtype))
    teacher = CachedTeacher(model(dtype), mode="disk", rows=read_cache(directory, key, ROWS))
    picks = [ROWS[i] for i in (7, 3, 49, 0, 12)]
    found = teacher.hidden(collate(picks), picks)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    assert found.dtype == dtype
    assert_close(found, LocalTeacher(model(dtype)).hidden(collate(picks), picks), **tolerance)
    assert teacher.tokens == 0


def test_states_of_the_same_batch_are_bit_exact(tmp_path):
    equal_rows = tiny.sequences([(5, 4)] * 20, vocab=len(TOKENIZER), seed=6)
    directory, key = make(tmp_path, rows=equal_rows)
    cached = CachedTeacher(model(), mode="disk", rows=read_cache(directory, key, equal_rows)).hidden(
        collate(equal_rows), equal_rows
    )
    assert torch.equal(cached, LocalTeacher(model()).hidden(collate(equal_rows), equal_rows))


def test_cache_key_depends_on_teacher_and_rows():
    keys = [key_of(model()), key_of(model(), config='{"rope_theta": 5}'), key_of(model(torch.bfloat16))]
    changed, cut, own_logits = model(), model(), model()
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1e-3
    cut.vocab -= 1
    own_logits.own_logits = True
    reordered = [ROWS[1], ROWS[0], *ROWS[2:]]
    shifted = [replace(ROWS[0], prompt=ROWS[0].prompt[:-1], response=ROWS[0].response), *ROWS[1:]]
    keys += [key_of(backbone) for backbone in (changed, cut, own_logits)]
    keys += [key_of(model(), rows) for rows in (ROWS[:-1], reordered, shifted)]
    assert len({key.name for key in keys}) == len(keys)
    assert key_of(model()) == keys[0]


def damage(directory, kind):
    states = directory / teacher_cache.STATES
    if kind == "flipped byte":
        content = bytearray(states.read_bytes())
        content[1000] ^= 1
        states.write_bytes(content)
    elif kind == "cut":
        states.write_bytes(states.read_bytes()[:-4])
    elif kind == "no metadata":
        (directory / teacher_cache.METADATA).unlink()
    elif kind == "truncated metadata":
        (directory / teacher_cache.METADATA).write_text('{"format": 2, "teach')
    elif kind == "no states":
        states.unlink()


@pytest.mark.parametrize("kind", ["flipped byte", "cut", "no metadata", "truncated metadata", "no states"])
def test_damaged_cache_is_rejected_and_can_be_rebuilt(tmp_path, kind):
    directory, key = make(tmp_path)
    good = read_cache(directory, key, ROWS).table_ND.clone()
    damage(directory, kind)
    with raises_code("checkpoint.damaged", str(directory), "--rebuild-teacher-cache") as error:
        read_cache(directory, key, ROWS)
    assert error.value.exit_code == 5
    assert not write_cache(directory, key, LocalTeacher(model()), ROWS, CPU, of=LABELS), (
        "a cache is rebuilt only on request"
    )
    assert write_cache(directory, key, LocalTeacher(model()), ROWS, CPU, of=LABELS, rebuild=True)
    assert torch.equal(read_cache(directory, key, ROWS).table_ND, good)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == [directory.name]


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        (b"{}", ("states.json", "format")),
        (b"[1, 2]", ("states.json", "format")),
        (b"\xff\xfe", ("states.json", "utf-8")),
        ({"tokens": None}, ("states.json", "tokens", "None")),
        ({"dtype": "nn"}, ("states.json", "dtype", "'nn'")),
        ({"sha256": ...}, ("states.json", "sha256")),
        ({"width": 7}, ("states.bin",)),
    ],
)
def test_invalid_metadata_is_rejected(tmp_path, content, mentions):
    directory, key = make(tmp_path)
    file = directory / teacher_cache.METADATA
    if isinstance(content, dict):
        metadata = json.loads(file.read_text()) | content
        content = json.dumps({name: value for name, value in metadata.items() if value is not ...}).encode()
    file.write_bytes(content)
    with raises_code("checkpoint.damaged", str(directory), *mentions):
        read_cache(directory, key, ROWS)


def test_rebuild_replaces_a_file_at_the_cache_path(tmp_path):
    key = key_of(model())
    directory = cache_directory(tmp_path, key)
    directory.write_text("not a directory")
    (tmp_path / f".old-{directory.name}-1").write_text("a leftover of an earlier version")
    with raises_code("checkpoint.damaged", "states.json"):
        read_cache(directory, key, ROWS)
    make(tmp_path, rebuild=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{directory.name}.lock", directory.name]


def test_named_cache_must_match_teacher_and_rows(tmp_path):
    directory, key = make(tmp_path)
    assert cache_directory(directory, key) == directory
    other = key_of(model(torch.bfloat16))
    with raises_code("checkpoint.changed", str(directory), "models/big", "--rebuild-teacher-cache"):
        read_cache(cache_directory(directory, other), other, ROWS)
    fewer = CacheKey(key.teacher, rows_digest(ROWS[:-1]))
    with raises_code("checkpoint.changed", str(directory), "rows.jsonl"):
        read_cache(cache_directory(directory, fewer), fewer, ROWS[:-1])
    metadata = json.loads((directory / "states.json").read_text())
    (directory / "states.json").write_text(json.dumps(metadata | {"format": 1}))
    with raises_code("checkpoint.changed", str(directory)):
        read_cache(directory, key, ROWS)


def test_open_cache_stays_valid_during_a_rebuild(tmp_path):
    directory, key = make(tmp_path)
    reading = read_cache(directory, key, ROWS)
    before = reading.table_ND.clone()
    damage(directory, "no metadata")
    make(tmp_path, rebuild=True)
    assert torch.equal(reading.table_ND, before)


def test_directory_with_other_files_is_not_replaced(tmp_path):
    """Check a user's directory that happens to have a states.json."""
    directory, key = make(tmp_path)
    damage(directory, "no metadata")
    (directory / "thesis.txt").write_text("user file")
    with raises_code("storage.not_a_cache", "thesis.txt"):
        write_cache(directory, key, LocalTeacher(model()), ROWS, CPU, of=LABELS, rebuild=True)
    assert (directory / "thesis.txt").read_text() == "user file"
    assert not any(path.name.startswith((".staging", ".old")) for path in tmp_path.iterdir())


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    key = key_of(model())
    directory = cache_directory(tmp_path, key)
    leftover = tmp_path / f".staging-{key.name}-1234"
    leftover.mkdir()
    (leftover / "states.bin").write_bytes(b"partial")
    other = tmp_path / ".staging-0123456789abcdef-0123456789abcdef-77"
    other.mkdir()
    assert not directory.exists()
    make(tmp_path)
    assert not leftover.exists()
    assert other.exists(), "the writer of another cache may be running"
    assert read_cache(directory, key, ROWS).missing == 0


def test_leftovers_do_not_count_as_used_space(tmp_path, monkeypatch):
    directory, key = make(tmp_path / "whole")
    size = (directory / "states.bin").stat().st_size
    directory = cache_directory(tmp_path / "small", key)
    leftover = directory.with_name(f".staging-{key.name}-1234")
    leftover.mkdir(parents=True)
    (leftover / "states.bin").write_bytes(bytes(size // 2))

    def usage(path):
        used = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        return SimpleNamespace(free=int(1.1 * size) - used)

    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", usage)
    with raises_code("storage.no_space"):
        check_space(directory, size)
    with raises_code("storage.no_space"):
        write_cache(directory, key, LocalTeacher(model()), ROWS, CPU, of=LABELS, size=2 * size)
    leftover.mkdir(exist_ok=True)
    (leftover / "states.bin").write_bytes(bytes(size // 2))
    assert write_cache(directory, key, LocalTeacher(model()), ROWS, CPU, of=LABELS, size=size)
    assert read_cache(directory, key, ROWS).missing == 0


def test_unwritable_cache_directory_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    key = key_of(model())
    directory = cache_directory(tmp_path / "file", key)
    for attempt in (
        lambda: check_space(directory, 1),
        lambda: write_cache(directory, key, LocalTeacher(model()), ROWS, CPU, of=LABELS),
    ):
        with raises_code("storage.failed", str(directory), "teacher.cache_dir") as error:
            attempt()
        assert error.value.exit_code == 8


def test_missing_space_is_detected_before_computing(tmp_path):
    with raises_code("storage.no_space", "1,000,000,000,000.0 MB", "--teacher-cache"):
        check_space(cache_directory(tmp_path, key_of(model())), 10**18)


def test_full_disk_while_writing_leaves_the_old_cache(tmp_path):
    """Check a write that fails midway, like on a full disk or with a quota."""
    directory, key = make(tmp_path)
    before = (directory / "states.bin").read_bytes()
    with file_size(len(before) // 2):
        with raises_code("storage.failed", str(directory)):
            write_cache(directory, key, LocalTeacher(model()), ROWS, CPU, of=LABELS, rebuild=True)
        empty = cache_directory(tmp_path / "new", key)
        with raises_code("storage.failed", "File too large"):
            write_cache(empty, key, LocalTeacher(model()), ROWS, CPU, of=LABELS)
    assert (directory / "states.bin").read_bytes() == before
    assert not any(p.name.startswith((".staging", ".old")) for p in tmp_path.rglob(".*"))
    assert not empty.exists()
    assert read_cache(directory, key, ROWS).missing == 0


def test_no_space_error_has_the_systems_message(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache, "_write_at", full)
    with raises_code("storage.failed", "No space left on device"):
        make(tmp_path)


WRITER = """
import sys, time, torch, numpy as np
from pathlib import Path
from types import SimpleNamespace
from distillm_cli.training.events import Note
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.teachers.teacher_cache import CacheKey, read_cache, write_cache
from distillm_cli.types import Sequence

class Slow:
    def hidden(self, batch):
        print("computing", flush=True)
        time.sleep(1.0)  # long enough for the other process to start
        return torch.arange(batch.tokens * 4.0).view(-1, 4)

rows = [Sequence(np.ones(2, np.int32), np.ones(3, np.int32), i) for i in range(9)]
key, place, teacher = CacheKey("a" * 64, "b" * 64), Path(sys.argv[1]) / "cache", LocalTeacher(Slow())
print("ready", flush=True)
sys.stdin.readline()
wrote = write_cache(place, key, teacher, rows, torch.device("cpu"), lambda e: None, of={"teacher": "t", "data": "d"})
states = read_cache(place, key, rows)
print("wrote" if wrote else "waited", teacher.tokens, states.table_ND.sum().item(), flush=True)
"""


@pytest.mark.long
def test_two_processes_compute_a_cache_once(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)]
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = sorted(process.communicate(timeout=300)[0].split("\n")[-2] for process in processes)
    assert outputs == ["waited 0 5778.0", "wrote 27 5778.0"]
