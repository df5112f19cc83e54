"""Test micro-batches and steps that are limited by tokens instead of rows."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from distillm_cli.config.load import resolve
from distillm_cli.data.batching import MixedOrder, Order
from distillm_cli.runs.costs import step_sequences
from distillm_cli.types import Sequence, length_groups, micro_batches
from tests.codes import raises_code

LENGTHS = [3, 17, 5, 40, 8, 8, 2, 29, 11, 6, 4, 33, 12, 3, 7, 21]


def sequences(lengths=LENGTHS):
    ids = np.arange(50, dtype=np.int32)
    return [Sequence(ids[:1], ids[: length - 1], i) for i, length in enumerate(lengths)]


def positions(group) -> int:
    return len(group) * max(map(len, group))


@pytest.mark.parametrize("tokens", [10, 40, 64, 200, 10_000])
def test_micro_batches_stay_within_their_tokens(tokens):
    found = micro_batches(sequences(), len(LENGTHS), 8, tokens)
    assert sorted(s.row for micro in found for group in micro for s in group) == list(range(len(LENGTHS)))
    for micro in found:
        alone = len(micro) == len(micro[0]) == 1
        assert alone or sum(map(positions, micro)) <= tokens
    if tokens >= max(LENGTHS):
        assert sum(LENGTHS) / tokens <= len(found) <= 1 + 2 * sum(LENGTHS) / tokens


def test_limit_of_rows_still_holds_beside_tokens():
    assert max(len(group) for group in length_groups(sequences(), 3, 8, 500)) <= 3


def epochs_of(order, epochs=4):
    return [
        [order.batch(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        for epoch in range(epochs)
    ]


def test_steps_have_about_the_same_number_of_tokens():
    lengths = np.random.default_rng(3).integers(5, 60, 500)
    order = Order(lengths, 8, seed=3, tokens=400)
    assert order.steps_per_epoch == round(lengths.sum() / 400)
    for batches in epochs_of(order):
        assert sorted(chain.from_iterable(batches)) == list(range(500)), "every row once in every epoch"
        tokens = [int(lengths[batch].sum()) for batch in batches]
        target = lengths.sum() / order.steps_per_epoch
        assert max(abs(n - target) for n in tokens) <= 60
    again = Order(lengths, 8, seed=3, tokens=400)
    last = 3 * order.steps_per_epoch
    assert again.batch(last) == order.batch(last), "a function of the step"


@pytest.mark.parametrize(
    ("lengths", "tokens"), [([1000, 1, 1, 1], 200), ([1, 1, 1, 1000], 300), ([5] * 7, 5), ([5], 99)]
)
def test_no_step_is_empty(lengths, tokens):
    order = Order(lengths, 8, seed=1, tokens=tokens)
    for batches in epochs_of(order):
        assert all(batches)
        assert sorted(chain.from_iterable(batches)) == list(range(len(lengths)))


def test_mixture_keeps_its_shares_in_steps_of_tokens():
    lengths = [10] * 60 + [40] * 20
    order = MixedOrder(lengths, 8, 3, sizes=(60, 20), wanted=(40, 40), tokens=200)
    assert order.counts == [40, 40]
    assert order.steps_per_epoch == (40 * 10 + 40 * 40) / 200
    for batches in epochs_of(order):
        assert Counter(i < 60 for i in chain.from_iterable(batches)) == {True: 40, False: 40}
        assert max(sum(lengths[i] for i in batch) for batch in batches) <= 240


def test_plan_counts_the_sequences_of_steps_of_tokens():
    train = resolve(command="distill", sets=["train.tokens_per_step=400"]).recipe.train
    assert step_sequences(train, 100, 25.0) == 16
    assert step_sequences(train, 10, 25.0) == 10
    assert step_sequences(train.model_copy(update={"tokens_per_step": None}), None, 25.0) == 8


@pytest.mark.parametrize(
    ("sets", "code", "mention"),
    [
        (["train.tokens_per_step=400", "data.bucket=4"], "recipe.fields_conflict", "data.bucket 4 groups rows"),
        (["train.tokens_per_step=400", "method=minillm"], "recipe.fields_conflict", "schedule.kind rounds"),
        (["train.tokens_per_batch=0"], "recipe.invalid_value", "an integer ≥ 1"),
        (["train.tokens_per_batch=100", "method=disco"], "recipe.unused_field", "train.tokens_per_batch"),
    ],
)
def test_contradicting_settings_are_refused(sets, code, mention):
    with raises_code(code, mention):
        resolve(command="distill", sets=sets)
