"""Test tokenizing with its counts, and the order of examples."""

from __future__ import annotations

import pickle
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distillm_cli.config.schema import DataConfig, TrainConfig
from distillm_cli.data.batching import Order, batches_by_length, tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.rows import Row
from distillm_cli.data.sources import load_rows
from distillm_cli.errors import DataError
from distillm_cli.training.events import Note, Progress, Warned
from distillm_cli.types import Sequence, collate, length_groups
from tests.codes import raises_code


def letters() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"</s>": 0, "p": 1, "r": 2}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def rows_of(*lengths: tuple[int, int]) -> list[Row]:
    """Return rows with the given numbers of prompt and response tokens, end-of-sequence included."""
    return [
        Row(prompt="p" * prompt, references=("r" * (response - 1),), where=f"a.jsonl:{line}")
        for line, (prompt, response) in enumerate(lengths, start=1)
    ]


def examples_of(rows, listener=lambda event: None, context=None, **fields):
    data = DataConfig(**({"max_length": 10, "max_prompt_length": 6} | fields))
    return tokenize(rows, Encoder(letters(), data), data, listener, context)


ROWS = rows_of((3, 4), (7, 2), (3, 8), (6, 4), (4, 7))

# ------------------------------------------------------------------------------------------------------- tokenizing


def test_long_rows_are_dropped_and_counted():
    events = []
    examples = examples_of(ROWS, events.append)
    assert [row.where for row in examples.rows] == ["a.jsonl:1", "a.jsonl:4"]
    assert (len(examples), examples.dropped, examples.dropped_prompts, examples.truncated) == (2, 3, 1, 0)
    assert [sequence.row for sequence in examples.sequences] == [0, 1]  # indices into examples.rows, not into the input
    assert examples.lengths.tolist() == [7, 10]
    assert examples.tokens == 8
    dropped = "3 of 5 rows dropped as too long: 1 with a prompt over 6 tokens, 2 over 10 tokens in total"
    hint = "--max-length 11 --set data.max_prompt_length=7 would keep 95%"
    assert events == [Progress("tokenizing", 5, 5, "rows"), Warned(f"{dropped}; {hint}")]
    assert examples_of(ROWS, max_length=11, max_prompt_length=7).dropped == 0


@pytest.mark.parametrize(("too_long", "kind"), [(20, Note), (21, Warned)])
def test_warning_if_over_a_fifth_of_rows_is_dropped(too_long, kind):
    rows, events = rows_of(*[(3, 4)] * (100 - too_long), *((3, 10 + n) for n in range(too_long))), []
    assert examples_of(rows, events.append).dropped == too_long
    assert type(events[-1]) is kind
    if kind is Note:
        assert "--max-length" not in events[-1].text
        return
    length = int(re.search(r"; --max-length (\d+) would keep 95%$", events[-1].text)[1])
    assert len(examples_of(rows, max_length=length)) == 95
    assert len(examples_of(rows, max_length=length - 1)) < 95, "the suggested length is the smallest one"


def test_warning_names_context_if_it_is_the_limit():
    events = []
    examples_of(rows_of(*[(3, 4)] * 3, (3, 9), (3, 9)), events.append, context=10, max_length=100)
    assert events[-1].text.endswith("; keeping 95% needs 12 tokens, but the model's context is 10")


def test_truncate_cuts_responses_and_drops_long_prompts():
    events = []
    examples = examples_of(ROWS, events.append, too_long="truncate")
    assert [row.where for row in examples.rows] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5"]
    assert (examples.dropped, examples.dropped_prompts, examples.truncated) == (1, 1, 2)
    assert examples.lengths.tolist() == [7, 10, 10, 10]
    assert [int(sequence.response[-1]) for sequence in examples.sequences] == [0, 2, 0, 2]
    assert events[1:] == [
        Note("1 of 5 rows dropped as too long: 1 with a prompt over 6 tokens"),
        Note("2 of 5 responses cut at 10 tokens, including the prompt"),
    ]


def test_error_stops_at_first_long_row():
    with raises_code("data.row_too_long", "a.jsonl:2", "7 tokens"):
        examples_of(ROWS, too_long="error")


def test_no_rows_left_names_shortest_row_and_limits():
    with raises_code("data.row_too_long", "8 + 3", "6", "10", "a.jsonl:2", "--max-length", "data.max_prompt_length"):
        examples_of(rows_of((9, 20), (8, 3), (7, 90)))
    with raises_code("data.row_too_long", "3 + 4", "5", "a.jsonl:1"):
        examples_of(rows_of((3, 4), (3, 5)), context=5)
    with raises_code("data.no_rows"):
        examples_of([])


def test_dolly_is_tokenized_fast_with_progress(shared_data):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2")
    data, events = DataConfig(source=str(shared_data / "dolly"), limit=2_000, max_length=512, max_prompt_length=256), []
    rows = load_rows(data, "train")
    start = time.process_time()
    examples = tokenize(rows, Encoder(tokenizer, data), data, events.append, 1024)
    assert time.process_time() - start < 10  # 1.5 s on two cores; all 11,435 rows take about 8
    assert len(examples) + examples.dropped == 2_000
    assert examples.dropped_prompts == 0  # the reference implementation used prompts of up to 256 tokens
    assert max(examples.lengths) <= 512
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == [500, 1_000, 1_500, 2_000]
    assert events[-1].text.startswith(f"dolly train: {examples.dropped} of 2,000 rows dropped as too long")
    assert progress[0].task == "tokenizing dolly train"


def test_worker_processes_give_same_examples(shared_data):
    lengths = {"max_length": 64, "max_prompt_length": 256}
    data = DataConfig(source=str(shared_data / "g2p"), limit=1_200, too_long="truncate", **lengths)
    rows = load_rows(data, "train")
    encoder = Encoder(AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "gpt2"), data)
    serial, parallel = (tokenize(rows, encoder, data.model_copy(update={"workers": workers})) for workers in (0, 2))
    assert serial.truncated == parallel.truncated
    assert 0 < serial.truncated < 1_200
    assert serial.rows == parallel.rows
    for one, other in zip(serial.sequences, parallel.sequences, strict=True):
        assert one.row == other.row
        np.testing.assert_array_equal(one.prompt, other.prompt)
        np.testing.assert_array_equal(one.response, other.response)


def test_pickled_error_has_all_fields():
    error = DataError("data.row_too_long", "a.jsonl:3: too long", where="a.jsonl", hint="cut it")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.what, copy.where, copy.hint) == (DataError, error.what, error.where, error.hint)
    assert str(copy) == str(error)


# ----------------------------------------------------------------------------------------------------------- order


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 400), batch=st.integers(1, 40), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
def test_epoch_has_each_example_at_most_once(n, batch, seed, epoch):
    order = Order(np.arange(n) % 13, batch, seed)
    steps = order.steps_per_epoch
    assert steps == max(1, n // batch)
    batches = [order.batch(epoch * steps + index) for index in range(steps)]
    assert {len(chosen) for chosen in batches} == {min(n, batch)}
    seen = [index for chosen in batches for index in chosen]
    assert len(seen) == len(set(seen)) == steps * min(n, batch)
    assert set(seen) <= set(range(n))


def test_order_depends_only_on_the_step():
    lengths = np.random.default_rng(0).integers(5, 500, 1000)
    order = Order(lengths, 8, seed=10)
    forwards = [order.batch(step) for step in range(300)]
    resumed = Order(lengths, 8, seed=10)
    assert [resumed.batch(step) for step in (299, 3, 150)] == [forwards[299], forwards[3], forwards[150]]
    assert [Order(lengths, 8, seed=11).batch(step) for step in range(300)] != forwards
    assert forwards[:125] != forwards[125:250]


def test_order_is_stable_across_versions():
    """Check the order against fixed values, so that a run resumed under another numpy uses the same rows."""
    order = Order([5, 3, 8, 1, 9, 2, 7, 4, 6, 0], 3, seed=10)
    assert [order.batch(step) for step in range(6)] == [
        [3, 7, 6],
        [5, 0, 8],
        [1, 2, 4],
        [0, 6, 2],
        [3, 5, 8],
        [9, 1, 7],
    ]


def test_remainder_rows_vary_between_epochs():
    order = Order(np.arange(15), 8, seed=1)
    assert order.steps_per_epoch == 1
    seen = [frozenset(order.batch(step)) for step in range(20)]
    assert len(set(seen)) > 15
    assert frozenset().union(*seen) == set(range(15))


def test_padding_is_below_a_tenth_for_dolly_lengths():
    """Check random batches of the default size with lengths like Dolly's in GPT-2 tokens (median 90, long tail to 512)."""
    assert DataConfig().bucket == 1, "bucketing would change the batches; length groups within a batch do not"
    lengths = np.clip(np.random.default_rng(0).lognormal(4.6, 0.75, 4000), 25, 512).astype(int)
    data, train = DataConfig(), TrainConfig()
    order = Order(lengths, train.batch_size, seed=10, bucket=data.bucket)
    real = computed = 0
    for step in range(order.steps_per_epoch):
        rows = [Sequence(np.zeros(n - 1, np.int32), np.zeros(1, np.int32)) for n in lengths[order.batch(step)]]
        for part in length_groups(rows, train.batch_size):
            real, computed = real + sum(map(len, part)), computed + len(part) * max(map(len, part))
    assert 1 - real / computed < 0.1


@pytest.mark.parametrize(("n", "batch"), [(8_000, 8), (400, 8), (30_000, 64)])
def test_bucketing_reduces_padding_and_stays_random(n, batch):
    lengths = np.random.default_rng(0).lognormal(5, 0.7, n).astype(int).clip(10, 512)
    order = Order(lengths, batch, seed=10, bucket=50)
    steps = order.steps_per_epoch
    batches = [np.array(order.batch(step)) for step in range(2 * steps)]
    padded = sum(len(chosen) * lengths[chosen].max() for chosen in batches)
    shuffled = np.random.default_rng(1).permutation(n)[: steps * batch].reshape(steps, batch)
    unbucketed = 2 * sum(batch * lengths[chosen].max() for chosen in shuffled)
    assert padded < 0.75 * unbucketed
    # Batch composition is random: few pairs of one batch are together again in the next epoch.
    next_batch_of = np.zeros(n, dtype=int)
    for index, chosen in enumerate(batches[steps:]):
        next_batch_of[chosen] = index
    together_share = np.mean([np.mean(next_batch_of[chosen] == next_batch_of[chosen[0]]) for chosen in batches[:steps]])
    assert together_share < 0.4
    # The order of batches is random: the length of a batch is not correlated with that of the next one.
    means = np.array([lengths[chosen].mean() for chosen in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.25


def test_order_of_epoch_is_computed_once():
    order = Order(np.arange(200_000), 8, seed=1)
    order.batch(0)
    start = time.process_time()
    for step in range(order.steps_per_epoch):
        order.batch(step)
    assert time.process_time() - start < 2


def test_batches_by_length_are_complete_and_longest_first():
    rng = np.random.default_rng(0)
    sequences = [
        Sequence(np.ones(p, np.int32), np.ones(3, np.int32), row) for row, p in enumerate(rng.integers(1, 60, 101))
    ]
    batches = batches_by_length(sequences, 8)
    assert [len(batch) for batch in batches] == [8] * 12 + [5]
    assert sorted(sequence.row for batch in batches for sequence in batch) == list(range(101))
    sizes = [collate(batch).ids_BT.shape[1] for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    assert batches_by_length([], 8) == []
