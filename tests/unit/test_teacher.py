"""The teacher speaks once: kept states against live ones, on disk and in memory."""

import copy

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.core.events import Note
from distillm_cli.core.teacher import Teacher, collect, collect_on_disk
from distillm_cli.errors import CheckpointError
from distillm_cli.models.backbone import Backbone
from distillm_cli.sequences import Sequence, collate
from tests import tiny

TOKENIZER = tiny.tokenizer()
ROWS = tiny.sequences([(3 + i % 9, 1 + i % 5) for i in range(50)], vocab=len(TOKENIZER), seed=3)
CPU = torch.device("cpu")


def teacher(family="llama", dtype=torch.float32):
    return Backbone(tiny.model(family, len(TOKENIZER), seed=4), TOKENIZER).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_states_are_the_live_ones_up_to_batch_shape_rounding(tmp_path, dtype):
    model = teacher(dtype=dtype)
    kept = {"memory": collect(model, ROWS, CPU), "disk": collect_on_disk(model, ROWS, CPU, tmp_path)}
    picks = [ROWS[i] for i in (7, 3, 49, 0, 12)]
    live = Teacher(model).hidden(collate(picks), picks)
    for states in kept.values():
        found = Teacher(model, states).hidden(collate(picks), picks)
        assert found.dtype == dtype
        assert_close(
            found, live, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=5e-2 if dtype == torch.bfloat16 else 1e-5
        )
    assert torch.equal(kept["memory"].table_ND, kept["disk"].table_ND)


def test_the_disk_is_read_and_not_written_the_second_time(tmp_path):
    said = []
    first = collect_on_disk(teacher(), ROWS, CPU, tmp_path)
    (place,) = tmp_path.iterdir()
    before = (place / "states.bin").stat().st_mtime_ns
    again = collect_on_disk(teacher(), ROWS, CPU, tmp_path, said.append)
    assert torch.equal(first.table_ND, again.table_ND)
    assert (place / "states.bin").stat().st_mtime_ns == before
    assert [type(event) for event in said] == [Note]


def test_another_teacher_or_other_rows_have_another_cache(tmp_path):
    collect_on_disk(teacher(), ROWS, CPU, tmp_path)
    changed = teacher()
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1e-3
    collect_on_disk(changed, ROWS, CPU, tmp_path)
    collect_on_disk(teacher(), ROWS[:-1], CPU, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_damaged_cache_is_refused_by_name(tmp_path):
    collect_on_disk(teacher(), ROWS, CPU, tmp_path)
    (place,) = tmp_path.iterdir()
    with (place / "states.bin").open("ab") as file:
        file.truncate(40)
    with pytest.raises(CheckpointError, match=place.name):
        collect_on_disk(teacher(), ROWS, CPU, tmp_path)


def test_a_rollout_for_a_rows_prompt_is_not_that_row():
    model = teacher()
    states = collect(model, ROWS, CPU)
    row = ROWS[4]
    rollout = Sequence(row.prompt, (row.response + 1) % 20, row.row)
    batch = collate([rollout])
    assert not states.knows(rollout)
    assert_close(Teacher(model, states).hidden(batch, [rollout]), model.hidden(batch).detach())
    assert not states.knows(copy.copy(row))
