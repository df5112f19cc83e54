"""The cache on disk: whole, of the right teacher, and shared; or refused by name."""

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

from distillm_cli.errors import CheckpointError, StorageError
from distillm_cli.models.backbone import Backbone
from distillm_cli.teachers import teacher_cache
from distillm_cli.teachers.cached import CachedTeacher
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.teachers.teacher_cache import (
    CacheKey,
    cache_directory,
    check_space,
    read_cache,
    rows_digest,
    teacher_digest,
    write_cache,
)
from distillm_cli.types import collate
from tests import tiny
from tests.limits import file_size

TOKENIZER = tiny.tokenizer()
ROWS = tiny.sequences([(3 + i % 9, 1 + i % 5) for i in range(50)], vocab=len(TOKENIZER), seed=3)
CPU = torch.device("cpu")
OF = {"teacher": "models/big", "data": "rows.jsonl"}


def model(dtype=torch.float32, **fields):
    return Backbone(tiny.model("llama", len(TOKENIZER), seed=4, **fields), TOKENIZER).to(dtype)


def key_of(backbone, rows=ROWS, config="{}"):
    return CacheKey(teacher_digest(backbone, config), rows_digest(rows))


def make(root, backbone=None, rows=ROWS, **how):
    """A cache, and its place."""
    backbone = backbone or model()
    key = key_of(backbone, rows)
    place = cache_directory(root, key)
    assert write_cache(place, key, LocalTeacher(backbone), rows, CPU, of=OF, **how)
    return place, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_from_the_disk_are_the_live_ones_up_to_batch_shape_rounding(tmp_path, dtype):
    place, key = make(tmp_path, model(dtype))
    teacher = CachedTeacher(model(dtype), mode="disk", rows=read_cache(place, key, ROWS))
    picks = [ROWS[i] for i in (7, 3, 49, 0, 12)]
    found = teacher.hidden(collate(picks), picks)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    assert found.dtype == dtype
    assert_close(found, LocalTeacher(model(dtype)).hidden(collate(picks), picks), **tolerance)
    assert teacher.tokens == 0


def test_a_row_computed_in_the_same_batch_is_the_same_to_the_last_bit(tmp_path):
    alike = tiny.sequences([(5, 4)] * 20, vocab=len(TOKENIZER), seed=6)
    place, key = make(tmp_path, rows=alike)
    kept = CachedTeacher(model(), mode="disk", rows=read_cache(place, key, alike)).hidden(collate(alike), alike)
    assert torch.equal(kept, LocalTeacher(model()).hidden(collate(alike), alike))


def test_whatever_shapes_the_states_gives_a_cache_of_its_own():
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


def damage(place, how):
    states = place / teacher_cache.STATES
    if how == "flipped byte":
        content = bytearray(states.read_bytes())
        content[1000] ^= 1
        states.write_bytes(content)
    elif how == "cut":
        states.write_bytes(states.read_bytes()[:-4])
    elif how == "no facts":
        (place / teacher_cache.METADATA).unlink()
    elif how == "half the facts":
        (place / teacher_cache.METADATA).write_text('{"format": 2, "teach')
    elif how == "no states":
        states.unlink()


@pytest.mark.parametrize("how", ["flipped byte", "cut", "no facts", "half the facts", "no states"])
def test_a_damaged_cache_is_refused_by_name_and_rebuilt_on_request(tmp_path, how):
    place, key = make(tmp_path)
    good = read_cache(place, key, ROWS).table_ND.clone()
    damage(place, how)
    with pytest.raises(CheckpointError, match=f"{place} is damaged: .*--rebuild-teacher-cache") as error:
        read_cache(place, key, ROWS)
    assert error.value.exit_code == 5
    assert not write_cache(place, key, LocalTeacher(model()), ROWS, CPU, of=OF), "left alone unless told to rebuild"
    assert write_cache(place, key, LocalTeacher(model()), ROWS, CPU, of=OF, rebuild=True)
    assert torch.equal(read_cache(place, key, ROWS).table_ND, good)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == [place.name]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{}", "states.json has no format"),
        (b"[1, 2]", "states.json has no format"),
        (b"\xff\xfe", "states.json is not JSON ('utf-8' codec"),
        ({"tokens": None}, "states.json: tokens is None"),
        ({"dtype": "nn"}, "states.json: dtype is 'nn'"),
        ({"sha256": ...}, "states.json has no sha256"),
        ({"width": 7}, "states.bin has "),
    ],
)
def test_what_is_wrong_with_the_facts_is_said_in_words(tmp_path, content, said):
    place, key = make(tmp_path)
    file = place / teacher_cache.METADATA
    if isinstance(content, dict):
        facts = json.loads(file.read_text()) | content
        content = json.dumps({name: fact for name, fact in facts.items() if fact is not ...}).encode()
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_cache(place, key, ROWS)
    assert error.value.what.startswith(f"the teacher cache {place} is damaged: {said}")


def test_a_plain_file_in_the_place_of_a_cache_goes_when_it_is_rebuilt(tmp_path):
    key = key_of(model())
    place = cache_directory(tmp_path, key)
    place.write_text("not a directory")
    (tmp_path / f".old-{place.name}-1").write_text("what an earlier version left behind")
    with pytest.raises(CheckpointError, match=r"is damaged: states.json: Not a directory"):
        read_cache(place, key, ROWS)
    make(tmp_path, rebuild=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".{place.name}.lock", place.name]


def test_a_cache_that_is_named_itself_must_be_of_this_teacher_and_these_rows(tmp_path):
    place, key = make(tmp_path)
    assert cache_directory(place, key) == place
    other = key_of(model(torch.bfloat16))
    with pytest.raises(
        CheckpointError, match=rf"{place} belongs to another teacher \(models/big\).*--rebuild-teacher-cache"
    ):
        read_cache(cache_directory(place, other), other, ROWS)
    fewer = CacheKey(key.teacher, rows_digest(ROWS[:-1]))
    with pytest.raises(
        CheckpointError, match=r"belongs to other rows, or another template or tokenizer \(rows.jsonl\)"
    ):
        read_cache(cache_directory(place, fewer), fewer, ROWS[:-1])
    facts = json.loads((place / "states.json").read_text())
    (place / "states.json").write_text(json.dumps(facts | {"format": 1}))
    with pytest.raises(CheckpointError, match="another version of distillm"):
        read_cache(place, key, ROWS)


def test_a_running_reader_keeps_its_states_while_another_run_rebuilds(tmp_path):
    place, key = make(tmp_path)
    reading = read_cache(place, key, ROWS)
    before = reading.table_ND.clone()
    damage(place, "no facts")
    make(tmp_path, rebuild=True)
    assert torch.equal(reading.table_ND, before)


def test_only_a_cache_is_replaced_by_a_cache(tmp_path):
    """A directory that happens to hold a states.json is somebody's own."""
    place, key = make(tmp_path)
    damage(place, "no facts")
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(
        StorageError, match=r"contains other files than a teacher cache \(thesis.txt\) and is not replaced"
    ):
        write_cache(place, key, LocalTeacher(model()), ROWS, CPU, of=OF, rebuild=True)
    assert (place / "thesis.txt").read_text() == "mine"
    assert not any(path.name.startswith((".staging", ".old")) for path in tmp_path.iterdir())


def test_what_a_killed_writer_left_is_never_read_and_goes(tmp_path):
    key = key_of(model())
    place = cache_directory(tmp_path, key)
    half = tmp_path / f".staging-{key.name}-1234"
    half.mkdir()
    (half / "states.bin").write_bytes(b"half")
    other = tmp_path / ".staging-0123456789abcdef-0123456789abcdef-77"
    other.mkdir()
    assert not place.exists()
    make(tmp_path)
    assert not half.exists()
    assert other.exists(), "another cache's writer may be alive"
    assert read_cache(place, key, ROWS).missing == 0


def test_what_a_killed_writer_left_does_not_count_as_taken(tmp_path, monkeypatch):
    place, key = make(tmp_path / "whole")
    size = (place / "states.bin").stat().st_size
    place = cache_directory(tmp_path / "small", key)
    half = place.with_name(f".staging-{key.name}-1234")
    half.mkdir(parents=True)
    (half / "states.bin").write_bytes(bytes(size // 2))

    def usage(path):
        taken = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        return SimpleNamespace(free=int(1.1 * size) - taken)

    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", usage)
    with pytest.raises(StorageError, match="MB free"):
        check_space(place, size)
    with pytest.raises(StorageError, match="MB free"):
        write_cache(place, key, LocalTeacher(model()), ROWS, CPU, of=OF, size=2 * size)
    half.mkdir(exist_ok=True)
    (half / "states.bin").write_bytes(bytes(size // 2))
    assert write_cache(place, key, LocalTeacher(model()), ROWS, CPU, of=OF, size=size)
    assert read_cache(place, key, ROWS).missing == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    key = key_of(model())
    place = cache_directory(tmp_path / "file", key)
    for attempt in (
        lambda: check_space(place, 1),
        lambda: write_cache(place, key, LocalTeacher(model()), ROWS, CPU, of=OF),
    ):
        with pytest.raises(StorageError, match=f"cannot write the teacher cache {place}: .*teacher.cache_dir") as error:
            attempt()
        assert error.value.exit_code == 8


def test_a_disk_that_would_overflow_is_noticed_before_anything_is_computed(tmp_path):
    with pytest.raises(StorageError, match=r"needs 1,000,000,000,000.0 MB, but .* MB free; .*--teacher-cache"):
        check_space(cache_directory(tmp_path, key_of(model())), 10**18)


def test_a_disk_that_fills_up_while_writing_leaves_nothing_and_loses_nothing(tmp_path):
    """The system refuses to let the file grow further, in mid-write, as a full disk or a quota does."""
    place, key = make(tmp_path)
    before = (place / "states.bin").read_bytes()
    with file_size(len(before) // 2):
        with pytest.raises(StorageError, match=f"cannot write the teacher cache {place}"):
            write_cache(place, key, LocalTeacher(model()), ROWS, CPU, of=OF, rebuild=True)
        empty = cache_directory(tmp_path / "new", key)
        with pytest.raises(StorageError, match="File too large"):
            write_cache(empty, key, LocalTeacher(model()), ROWS, CPU, of=OF)
    assert (place / "states.bin").read_bytes() == before
    assert not any(p.name.startswith((".staging", ".old")) for p in tmp_path.rglob(".*"))
    assert not empty.exists()
    assert read_cache(place, key, ROWS).missing == 0


def test_no_space_left_is_said_in_the_systems_words(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(teacher_cache, "_write_at", full)
    with pytest.raises(StorageError, match="No space left on device; free disk space"):
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
        time.sleep(1.0)  # long enough for the other to arrive
        return torch.arange(batch.tokens * 4.0).view(-1, 4)

rows = [Sequence(np.ones(2, np.int32), np.ones(3, np.int32), i) for i in range(9)]
key, place, teacher = CacheKey("a" * 64, "b" * 64), Path(sys.argv[1]) / "cache", LocalTeacher(Slow())
print("ready", flush=True)
sys.stdin.readline()
wrote = write_cache(place, key, teacher, rows, torch.device("cpu"), lambda e: None, of={"teacher": "t", "data": "d"})
states = read_cache(place, key, rows)
print("wrote" if wrote else "waited", teacher.tokens, states.table_ND.sum().item(), flush=True)
"""


def test_two_processes_that_want_the_same_cache_compute_it_once(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)]
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=300)[0].split("\n")[-2] for process in both)
    assert said == ["waited 0 5778.0", "wrote 27 5778.0"]
