"""Test cached teacher states against live ones: in memory, for replayed rollouts, and after the model is released."""

import copy
import gc
import weakref
from dataclasses import replace

import numpy as np
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
STEPS, BATCH = 6, 8  # two rows are not in the first epoch
TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2},
}


def model(family="llama", dtype=torch.float32):
    return Backbone(tiny.model(family, len(TOKENIZER), seed=4), TOKENIZER).to(dtype)


def batches(step):
    return [ROWS[(step * BATCH + i) * 7 % 50] for i in range(BATCH)]


def cached(backbone=None, **options):
    composition = BatchComposition(lambda step: [s.row for s in batches(step)], steps=STEPS, rows=ROWS, max_rows=4)
    rows = HiddenStateTable(ROWS)
    return CachedTeacher(backbone or model(), mode="memory", rows=rows, composition=composition, **options)


def first_epoch(teacher):
    """Return the groups of the first epoch and the teacher's hidden states for them."""
    groups = [group for step in range(STEPS) for group in length_groups(batches(step), 4)]
    return groups, [teacher.hidden(collate(group), group) for group in groups]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_states_match_live_ones(dtype):
    """Check that the first epoch is bit-exact, and later ones up to the rounding of other batch shapes."""
    live, teacher = LocalTeacher(model(dtype=dtype)), cached(model(dtype=dtype))
    for cached_hidden, live_hidden in zip(first_epoch(teacher)[1], first_epoch(live)[1], strict=True):
        assert torch.equal(cached_hidden, live_hidden)
    picks = [ROWS[i] for i in (7, 3, 49, 0, 12)]
    found, expected = (t.hidden(collate(picks), picks) for t in (teacher, live))
    assert found.dtype == dtype
    assert_close(found, expected, **TOLERANCE[dtype])


def test_each_row_is_computed_once():
    teacher = cached()
    groups, hidden_states = first_epoch(teacher)
    computed = teacher.tokens
    assert computed == sum(len(s.response) for group in groups for s in group)
    for group, before in zip(groups, hidden_states, strict=True):
        assert torch.equal(teacher.hidden(collate(group), group), before)
    assert teacher.tokens == computed
    leftovers = teacher.composition.leftovers
    teacher.hidden(collate(leftovers), leftovers)
    assert teacher.rows.missing == 0
    assert teacher.tokens == sum(len(s.response) for s in ROWS)


def test_states_do_not_depend_on_the_order_of_rows():
    """Check this for runs that are resumed in a later epoch, which use the rows in another order."""
    in_order, resumed = cached(), cached()
    first_epoch(in_order)
    for start in range(0, 50, 5):
        picks = [ROWS[(start + i) * 3 % 50] for i in range(5)]
        for teacher in (resumed, in_order):
            teacher.hidden(collate(picks), picks)
    assert torch.equal(resumed.rows.table_ND, in_order.rows.table_ND)
    assert resumed.tokens == in_order.tokens, "each row is computed once in any order"


def test_rollout_with_the_prompt_of_a_row_is_not_cached():
    teacher = cached()
    row = ROWS[4]
    rollout = Rollout(row.prompt, (row.response + 1) % 20, row.row)
    assert not teacher.rows.contains(rollout)
    assert_close(teacher.hidden(collate([rollout]), [rollout]), teacher.model.hidden(collate([rollout])).detach())
    assert not teacher.rows.contains(copy.copy(row))


def rollouts(n):
    return [Rollout(s.prompt, (s.response + 1) % 20, s.row) for s in ROWS[:n]]


def test_replayed_rollout_is_computed_once_and_released():
    teacher = cached(caches_rollouts=True)
    fresh = rollouts(4)
    first = teacher.hidden(collate(fresh), fresh)
    computed = teacher.tokens
    replayed = [fresh[2], fresh[0], fresh[2]]
    parts = dict(zip(fresh, first.split([len(s.response) for s in fresh]), strict=True))
    assert torch.equal(teacher.hidden(collate(replayed), replayed), torch.cat([parts[s] for s in replayed]))
    assert teacher.tokens == computed

    more = [*fresh[:2], *rollouts(6)[4:]]  # two cached and two new ones, and only the new ones are computed
    found = teacher.hidden(collate(more), more)
    assert teacher.tokens == computed + sum(len(s.response) for s in more[2:])
    assert_close(found, LocalTeacher(model()).hidden(collate(more), more), **TOLERANCE[torch.float32])

    states = [weakref.ref(s.teacher_hidden_ND) for s in {*fresh, *more}]
    assert len(states) == 6
    teacher.begin_step()  # the next step
    del fresh, replayed, parts, more
    gc.collect()
    assert [ref for ref in states if ref() is not None] == []


@pytest.mark.parametrize("caches_rollouts", [True, False])
def test_rollout_equal_to_its_row_has_the_states_of_the_row(caches_rollouts):
    teacher, live = cached(caches_rollouts=caches_rollouts), LocalTeacher(model())
    first_epoch(teacher)
    computed = teacher.tokens
    equal = [Rollout(s.prompt.copy(), s.response.copy(), s.row) for s in ROWS[:3]]
    assert_close(teacher.hidden(collate(equal), equal), live.hidden(collate(equal), equal), **TOLERANCE[torch.float32])
    assert teacher.tokens == computed, "nothing is computed"

    mixed = [equal[0], *rollouts(5)[3:], equal[1]]
    assert_close(teacher.hidden(collate(mixed), mixed), live.hidden(collate(mixed), mixed), **TOLERANCE[torch.float32])
    assert teacher.tokens == computed + sum(len(s.response) for s in mixed[1:3])
    assert all((s.teacher_hidden_ND is not None) == caches_rollouts for s in mixed[1:3])


def test_rollout_of_multi_turn_row_is_not_taken_for_the_row():
    row = replace(ROWS[0], turns=np.array([1]))
    table = HiddenStateTable([row])
    assert table.row_equal_to(Rollout(row.prompt, row.response, 0)) is None
    assert table.row_equal_to(Rollout(row.prompt, row.response, 1)) is None, "no such row"


def test_cached_states_of_rollouts_are_saved_and_restored():
    teacher, other = cached(caches_rollouts=True), cached(caches_rollouts=True)
    fresh = rollouts(5)
    teacher.hidden(collate(fresh[1:4]), fresh[1:4])
    copies = unpack(pack(fresh, "replay"), "replay")
    picks = [1, 2, 3]
    originals, restored = ([some[i] for i in picks] for some in (fresh, copies))
    assert torch.equal(teacher.hidden(collate(originals), originals), other.hidden(collate(restored), restored))
    assert other.tokens == 0
    assert [s.teacher_hidden_ND is None for s in copies] == [True, False, False, False, True]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2"])
def test_model_is_released_once_every_row_is_cached(family):
    backbone = model(family)
    head = backbone.head()
    head_ids = {id(head.weight_VD)}
    references = [weakref.ref(p) for p in backbone.parameters() if id(p) not in head_ids]
    teacher = cached(backbone, releases_model=True)
    hidden = first_epoch(cached(model(family)))[1]
    for found, expected in zip(first_epoch(teacher)[1], hidden, strict=True):
        assert torch.equal(found, expected)
    assert teacher.has_released_model
    assert teacher.rows.missing == 0, "rows outside the first epoch are cached too"
    gc.collect()
    assert [ref for ref in references if ref() is not None and ref().device.type != "meta"] == []
    assert all(p.device.type == "meta" for p in backbone.parameters())
    groups, hidden_states = first_epoch(teacher)
    fresh = model(family)
    assert_close(teacher.head.logits(hidden_states[0]), fresh.head().logits(fresh.hidden(collate(groups[0]))).detach())


def test_model_is_not_released_while_it_is_needed():
    held_out = tiny.sequences([(4, 3), (5, 2)], vocab=len(TOKENIZER), seed=8)
    teacher = cached(releases_model=True, validation=HiddenStateTable(held_out))
    first_epoch(teacher)
    assert not teacher.has_released_model
    hidden_states = teacher.hidden(collate(held_out), held_out)
    assert teacher.has_released_model
    assert torch.equal(teacher.hidden(collate(held_out), held_out), hidden_states)

    with_rollouts = cached(caches_rollouts=True)  # rollouts may need the model later
    first_epoch(with_rollouts)
    assert not with_rollouts.has_released_model


def test_teacher_ignores_autocast():
    teacher, picks = LocalTeacher(model()), ROWS[:3]
    alone = teacher.hidden(collate(picks), picks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher.hidden(collate(picks), picks), alone)


def test_resumed_teacher_continues_its_token_count():
    first = LocalTeacher(model())
    first.hidden(collate(ROWS[:2]), ROWS[:2])
    resumed = LocalTeacher(model())
    resumed.load_state_dict(first.state_dict())
    resumed.hidden(collate(ROWS[:2]), ROWS[:2])
    assert resumed.tokens == 2 * first.tokens > 0
