"""The teacher speaks once: kept states against live ones, in memory, through replay, and after the model has left."""

import copy
import gc
import weakref

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.pool import pack, unpack
from distillm_cli.teachers.cached import BatchComposition, CachedTeacher, HiddenStateTable
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.types import Rollout, collate, length_groups
from tests import tiny

TOKENIZER = tiny.tokenizer()
ROWS = tiny.sequences([(3 + i % 9, 1 + i % 5) for i in range(50)], vocab=len(TOKENIZER), seed=3)
STEPS, BATCH = 6, 8  # two rows sit the first epoch out
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2},
}


def model(family="llama", dtype=torch.float32):
    return Backbone(tiny.model(family, len(TOKENIZER), seed=4), TOKENIZER).to(dtype)


def batches(step):
    return [ROWS[(step * BATCH + i) * 7 % 50] for i in range(BATCH)]


def cached(backbone=None, **how):
    composition = BatchComposition(batches, steps=STEPS, rows=ROWS, max_rows=4)
    rows = HiddenStateTable(ROWS)
    return CachedTeacher(backbone or model(), mode="memory", rows=rows, composition=composition, **how)


def first_epoch(teacher):
    """What a run asks in its first epoch, and the answers."""
    groups = [group for step in range(STEPS) for group in length_groups(batches(step), 4)]
    return groups, [teacher.hidden(collate(group), group) for group in groups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_epoch_is_the_uncached_one_bit_for_bit_and_later_ones_up_to_batch_shape_rounding(dtype):
    live, teacher = LocalTeacher(model(dtype=dtype)), cached(model(dtype=dtype))
    for ours, theirs in zip(first_epoch(teacher)[1], first_epoch(live)[1], strict=True):
        assert torch.equal(ours, theirs)
    picks = [ROWS[i] for i in (7, 3, 49, 0, 12)]
    found, wanted = (t.hidden(collate(picks), picks) for t in (teacher, live))
    assert found.dtype == dtype
    assert_close(found, wanted, **TOLERANCE[dtype])


def test_the_model_is_asked_once_about_each_row():
    teacher = cached()
    groups, said = first_epoch(teacher)
    asked = teacher.tokens
    assert asked == sum(len(s.response) for group in groups for s in group)
    for group, before in zip(groups, said, strict=True):
        assert torch.equal(teacher.hidden(collate(group), group), before)
    assert teacher.tokens == asked
    late = teacher.composition.leftovers
    teacher.hidden(collate(late), late)
    assert teacher.rows.missing == 0
    assert teacher.tokens == sum(len(s.response) for s in ROWS)


def test_a_rows_states_do_not_depend_on_who_asked_first():
    """A run that is resumed in a later epoch asks in another order, and must see the same bits."""
    in_order, resumed = cached(), cached()
    first_epoch(in_order)
    for start in range(0, 50, 5):
        picks = [ROWS[(start + i) * 3 % 50] for i in range(5)]
        for teacher in (resumed, in_order):
            teacher.hidden(collate(picks), picks)
    assert torch.equal(resumed.rows.table_ND, in_order.rows.table_ND)
    assert resumed.tokens == in_order.tokens, "each row is computed once in any order"


def test_a_rollout_for_a_rows_prompt_is_not_that_row():
    teacher = cached()
    row = ROWS[4]
    rollout = Rollout(row.prompt, (row.response + 1) % 20, row.row)
    assert not teacher.rows.contains(rollout)
    assert_close(teacher.hidden(collate([rollout]), [rollout]), teacher.model.hidden(collate([rollout])).detach())
    assert not teacher.rows.contains(copy.copy(row))


def rollouts(n):
    return [Rollout(s.prompt, (s.response + 1) % 20, s.row) for s in ROWS[:n]]


def test_a_replayed_rollout_is_scored_once_and_forgotten_with_the_sequence():
    teacher = cached(caches_rollouts=True)
    fresh = rollouts(4)
    first = teacher.hidden(collate(fresh), fresh)
    asked = teacher.tokens
    again = [fresh[2], fresh[0], fresh[2]]
    parts = dict(zip(fresh, first.split([len(s.response) for s in fresh]), strict=True))
    assert torch.equal(teacher.hidden(collate(again), again), torch.cat([parts[s] for s in again]))
    assert teacher.tokens == asked

    more = [*fresh[:2], *rollouts(6)[4:]]  # two known, two new: only the new ones are computed
    found = teacher.hidden(collate(more), more)
    assert teacher.tokens == asked + sum(len(s.response) for s in more[2:])
    assert_close(found, LocalTeacher(model()).hidden(collate(more), more), **TOLERANCE[torch.float32])

    states = [weakref.ref(s.teacher_hidden_ND) for s in {*fresh, *more}]
    assert len(states) == 6
    teacher.begin_step()  # a later step
    del fresh, again, parts, more
    gc.collect()
    assert [ref for ref in states if ref() is not None] == []


def test_cached_states_of_rollouts_go_through_a_checkpoint():
    teacher, other = cached(caches_rollouts=True), cached(caches_rollouts=True)
    fresh = rollouts(5)
    teacher.hidden(collate(fresh[1:4]), fresh[1:4])
    copies = unpack(pack(fresh, "replay"), "replay")
    picks = [1, 2, 3]
    ours, theirs = ([some[i] for i in picks] for some in (fresh, copies))
    assert torch.equal(teacher.hidden(collate(ours), ours), other.hidden(collate(theirs), theirs))
    assert other.tokens == 0
    assert [s.teacher_hidden_ND is None for s in copies] == [True, False, False, False, True]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2"])
def test_the_model_leaves_memory_once_every_row_is_known(family):
    backbone = model(family)
    head = backbone.head()
    kept_alive = {id(head.weight_VD)}
    gone = [weakref.ref(p) for p in backbone.parameters() if id(p) not in kept_alive]
    teacher = cached(backbone, releases_model=True)
    hidden = first_epoch(cached(model(family)))[1]
    for ours, theirs in zip(first_epoch(teacher)[1], hidden, strict=True):
        assert torch.equal(ours, theirs)
    assert teacher.has_released_model
    assert teacher.rows.missing == 0, "the rows that sat the first epoch out are known too"
    gc.collect()
    assert [ref for ref in gone if ref() is not None and ref().device.type != "meta"] == []
    assert all(p.device.type == "meta" for p in backbone.parameters())
    groups, said = first_epoch(teacher)
    fresh = model(family)
    assert_close(teacher.head.logits(said[0]), fresh.head().logits(fresh.hidden(collate(groups[0]))).detach())


def test_the_model_stays_while_something_may_still_be_asked():
    held_out = tiny.sequences([(4, 3), (5, 2)], vocab=len(TOKENIZER), seed=8)
    teacher = cached(releases_model=True, validation=HiddenStateTable(held_out))
    first_epoch(teacher)
    assert not teacher.has_released_model
    said = teacher.hidden(collate(held_out), held_out)
    assert teacher.has_released_model
    assert torch.equal(teacher.hidden(collate(held_out), held_out), said)

    drawn = cached(caches_rollouts=True)  # rollouts may come: nobody said that it may leave
    first_epoch(drawn)
    assert not drawn.has_released_model


def test_the_teacher_computes_in_its_own_dtype_under_autocast():
    teacher, picks = LocalTeacher(model()), ROWS[:3]
    alone = teacher.hidden(collate(picks), picks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.hidden(collate(picks), picks), alone)


def test_a_resumed_teacher_continues_its_count():
    first = LocalTeacher(model())
    first.hidden(collate(ROWS[:2]), ROWS[:2])
    resumed = LocalTeacher(model())
    resumed.load_state_dict(first.state_dict())
    resumed.hidden(collate(ROWS[:2]), ROWS[:2])
    assert resumed.tokens == 2 * first.tokens > 0
