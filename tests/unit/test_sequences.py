"""Where the supervised positions are, and how a step is cut: both decided once, for rows and rollouts alike."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm_cli.types import Sequence, collate, length_groups, micro_batches, pass_overhead


def sequence(prompt, response, row=0):
    return Sequence(np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32), row)


def test_the_state_at_t_predicts_token_t_plus_one():
    """Prompt 5 6, response 7 8 and end-of-sequence 1; beside it a shorter one, padded on the right."""
    batch = collate([sequence([5, 6], [7, 8, 1]), sequence([9], [4])])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8], [9, 0, 0, 0]]
    assert batch.positions_N.tolist() == [1, 2, 3, 4]
    assert batch.targets_N.tolist() == [7, 8, 1, 4]
    assert batch.rows_N.tolist() == [0, 0, 0, 1]
    assert (batch.tokens, batch.size) == (4, 2)


def test_masking_goes_by_position_never_by_token_id():
    """Padding, end-of-sequence and a prompt's token may be one id; the supervised positions do not change."""
    batch = collate([sequence([0, 0], [0, 0]), sequence([0, 0, 0], [0])])
    assert batch.positions_N.tolist() == [1, 2, 3 + 2]


def test_an_empty_prompt_has_no_state_to_predict_from():
    with pytest.raises(ValueError, match="row 3 has an empty prompt"):
        collate([sequence([], [1], row=3)])


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(2, 500), min_size=1, max_size=40), most=st.integers(1, 16))
def test_passes_hold_every_sequence_once_and_none_is_too_large(lengths, most):
    rows = [sequence([1], [2] * (length - 1), row) for row, length in enumerate(lengths)]
    cut = length_groups(rows, most)
    assert sorted(s.row for part in cut for s in part) == list(range(len(rows)))
    assert max(len(part) for part in cut) <= most
    assert sum(collate(part).tokens for part in cut) == collate(rows).tokens


def test_padding_is_cut_away_where_it_is_worth_a_pass():
    rows = [sequence([1], [2] * n) for n in [500] * 4 + [20] * 4]
    assert [[len(s) for s in part] for part in length_groups(rows, 8)] == [[501] * 4, [21] * 4]
    short = [sequence([1], [2] * n) for n in [30] * 4 + [20] * 4]
    assert len(length_groups(short, 8)) == 1
    # On a GPU, or in narrow layers, a pass of few tokens takes as long as one of many.
    long = [sequence([1], [2] * n) for n in [150] * 4 + [50] * 4]
    costs = [pass_overhead("cpu", 768), pass_overhead("cpu", 64), pass_overhead("cuda", 768)]
    assert [len(length_groups(long, 8, cost)) for cost in costs] == [2, 2, 1]
    near = [sequence([1], [2] * n) for n in [110] * 4 + [60] * 4]
    assert [len(length_groups(near, 8, cost)) for cost in costs] == [2, 1, 1]
    assert torch.is_tensor(collate(short).ids_BT)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(2, 500), min_size=1, max_size=40), most=st.integers(1, 16))
def test_micro_batches_are_the_passes_gathered_as_far_as_there_is_room(lengths, most):
    rows = [sequence([1], [2] * (length - 1), row) for row, length in enumerate(lengths)]
    gathered = micro_batches(rows, most)
    assert [part for cuts in gathered for part in cuts] == length_groups(rows, most)
    sizes = [[len(part) for part in cuts] for cuts in gathered]
    assert max(map(sum, sizes)) <= most
    for one, following in pairwise(sizes):
        assert sum(one) + following[0] > most
