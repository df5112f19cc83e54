"""Test supervised positions of a batch, and how a step is divided into passes."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distillm_cli.types import Sequence, collate, length_groups, micro_batches, pass_overhead


def sequence(prompt, response, row=0):
    return Sequence(np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32), row)


def test_state_at_t_predicts_token_t_plus_one():
    """Check a prompt 5 6 with response 7 8 and end token 1, and a shorter row with right padding."""
    batch = collate([sequence([5, 6], [7, 8, 1]), sequence([9], [4])])
    assert batch.ids_BT.tolist() == [[5, 6, 7, 8], [9, 0, 0, 0]]
    assert batch.positions_N.tolist() == [1, 2, 3, 4]
    assert batch.targets_N.tolist() == [7, 8, 1, 4]
    assert batch.rows_N.tolist() == [0, 0, 0, 1]
    assert (batch.tokens, batch.size) == (4, 2)


def test_supervised_positions_do_not_depend_on_token_ids():
    """Check rows in which padding, end-of-sequence and prompt tokens have the same id."""
    batch = collate([sequence([0, 0], [0, 0]), sequence([0, 0, 0], [0])])
    assert batch.positions_N.tolist() == [1, 2, 3 + 2]


def test_empty_prompt_is_rejected():
    with pytest.raises(ValueError, match="row 3"):
        collate([sequence([], [1], row=3)])


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(2, 500), min_size=1, max_size=40), max_rows=st.integers(1, 16))
def test_length_groups_have_each_sequence_once(lengths, max_rows):
    rows = [sequence([1], [2] * (length - 1), row) for row, length in enumerate(lengths)]
    groups = length_groups(rows, max_rows)
    assert sorted(s.row for group in groups for s in group) == list(range(len(rows)))
    assert max(len(group) for group in groups) <= max_rows
    assert sum(collate(group).tokens for group in groups) == collate(rows).tokens


def test_length_groups_weigh_padding_against_passes():
    rows = [sequence([1], [2] * n) for n in [500] * 4 + [20] * 4]
    assert [[len(s) for s in group] for group in length_groups(rows, 8)] == [[501] * 4, [21] * 4]
    short = [sequence([1], [2] * n) for n in [30] * 4 + [20] * 4]
    assert len(length_groups(short, 8)) == 1
    # On a GPU, or with narrow layers, a pass with few tokens takes as long as one with many.
    long = [sequence([1], [2] * n) for n in [150] * 4 + [50] * 4]
    costs = [pass_overhead("cpu", 768), pass_overhead("cpu", 64), pass_overhead("cuda", 768)]
    assert [len(length_groups(long, 8, cost)) for cost in costs] == [2, 2, 1]
    similar = [sequence([1], [2] * n) for n in [110] * 4 + [60] * 4]
    assert [len(length_groups(similar, 8, cost)) for cost in costs] == [2, 1, 1]
    assert torch.is_tensor(collate(short).ids_BT)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(2, 500), min_size=1, max_size=40), max_rows=st.integers(1, 16))
def test_micro_batches_combine_length_groups(lengths, max_rows):
    rows = [sequence([1], [2] * (length - 1), row) for row, length in enumerate(lengths)]
    combined = micro_batches(rows, max_rows)
    assert [group for micro_batch in combined for group in micro_batch] == length_groups(rows, max_rows)
    sizes = [[len(group) for group in micro_batch] for micro_batch in combined]
    assert max(map(sum, sizes)) <= max_rows
    for one, following in pairwise(sizes):
        assert sum(one) + following[0] > max_rows
