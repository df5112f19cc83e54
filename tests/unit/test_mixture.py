"""Test mixtures of sources: their rows, their shares of an epoch, the order of their rows, and what is cached of them."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from distillm_cli.config.load import resolve
from distillm_cli.config.schema import DataConfig, SourceConfig
from distillm_cli.data.batching import MixedOrder, apportioned, by_source, tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import load_rows
from distillm_cli.data.token_store import open_tokens
from distillm_cli.models.backbone import Backbone
from distillm_cli.runs.source_shares import wanted_rows
from distillm_cli.teachers.cached import BatchComposition, CachedTeacher, HiddenStateTable
from distillm_cli.types import collate, rows_digest
from tests import tiny
from tests.codes import raises_code
from tests.unit.test_sources import jsonl, numbered

THREE = (
    {"source": "g2p", "weight": 2, "template": "plain"},
    {"source": "banking77", "weight": 1},
    {"source": "dolly", "weight": 1},
)


@pytest.fixture
def named(shared_data, monkeypatch):
    monkeypatch.setenv("DISTILLM_DATA", str(shared_data))


def mixture(*sources, **fields) -> DataConfig:
    return DataConfig(sources=sources, **{"max_length": 64, "max_prompt_length": 48} | fields)


def order_of(sizes, wanted, batch=4, seed=3, bucket=1) -> MixedOrder:
    lengths = [1 + i % 7 for i in range(sum(sizes))]
    return MixedOrder(lengths, batch, seed, bucket, sizes=sizes, wanted=wanted)


def sources_of(examples, sizes) -> list[int]:
    return np.searchsorted(np.cumsum(sizes), examples, side="right").tolist()


@pytest.mark.parametrize("bucket", [1, 3])
@pytest.mark.parametrize(
    ("sizes", "wanted"), [((30, 10, 7), (30, 10, 7)), ((30, 10, 7), (12, 24, 11)), ((5, 50), (40, 15))]
)
def test_no_row_is_repeated_before_all_of_its_source_were_used(sizes, wanted, bucket):
    order = order_of(sizes, wanted, bucket=bucket)
    starts = np.cumsum([0, *sizes])
    epochs = 9
    by_epoch = [
        list(chain.from_iterable(order.batch(e * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)))
        for e in range(epochs)
    ]
    for source, (size, count) in enumerate(zip(sizes, order.counts, strict=True)):
        assert [sources_of(examples, sizes).count(source) for examples in by_epoch] == [count] * epochs
        times = Counter(i for examples in by_epoch for i in examples if starts[source] <= i < starts[source + 1])
        rounds, rest = divmod(epochs * count, size)
        assert Counter(times.values()) == Counter({rounds + 1: rest, rounds: size - rest} if rounds else {1: rest}), (
            source
        )


def test_order_is_a_function_of_seed_and_step():
    one, other = order_of((30, 10), (20, 20)), order_of((30, 10), (20, 20))
    forward = [one.batch(step) for step in range(40)]
    assert [other.batch(step) for step in reversed(range(40))] == forward[::-1]
    assert len({tuple(batch) for batch in forward}) == 40
    assert [order_of((30, 10), (20, 20), seed=4).batch(step) for step in range(40)] != forward


def test_sources_are_mixed_within_the_batches_of_an_epoch():
    order = order_of((400, 400), (400, 400), batch=20)
    numbers = [sources_of(order.batch(step), (400, 400)).count(0) for step in range(order.steps_per_epoch)]
    assert sum(numbers) == 400
    assert 2 <= min(numbers) < 10 < max(numbers) <= 18  # 10 ± 2.2 in random batches


def test_counts_add_up_to_complete_batches():
    assert apportioned(10, [1, 1, 1]) == [4, 3, 3]
    assert apportioned(7, [0.4, 2.6, 4]) == [0, 3, 4]
    assert order_of((30, 10, 7), (30, 10, 7), batch=8).counts == [26, 8, 6], "47 rows are 5 batches of 8"
    assert order_of((3, 2), (3, 2), batch=8).batch(0) == order_of((3, 2), (3, 2), batch=5).batch(0), "one small batch"


def test_weights_are_shares_and_rows_are_numbers():
    def wanted(*sources):
        return wanted_rows([SourceConfig(source="a", **fields) for fields in sources], [100, 300])

    assert wanted({}, {}) == [100, 300]
    assert wanted({"weight": 3}, {"weight": 1}) == [300, 100]
    assert wanted({"rows": 40}, {}) == [40, 300]


def test_real_sources_are_joined_with_their_templates(named):
    data = mixture(*THREE, limit=20, max_length=4096, max_prompt_length=4096)
    rows = load_rows(data, "train")
    assert (rows.name, len(rows), [len(part) for part in rows.parts]) == ("g2p + banking77 + dolly", 60, [20] * 3)
    assert rows.formats == {"instruction": 40, "prompt-completion": 20}
    assert rows[20] == load_rows(DataConfig(source="banking77"), "train")[0]
    assert list(rows) == [rows[i] for i in range(60)] == rows[:]
    encoder = Encoder(tiny.tokenizer(), data)
    prompts = {encoder.renderer.prompt(part[0]).split("\n")[0] for part in rows.parts}
    assert {"Pronounce the word."} < prompts, "g2p is plain, the others are not"
    assert encoder.renderer.form(rows[0]) == "plain"
    assert encoder.renderer.form(rows[50]) == "exact"


def test_held_out_rows_have_equal_parts_of_each_source(named, tmp_path):
    data = mixture({"source": "g2p", "limit": 40}, str(jsonl(tmp_path / "own.jsonl", *numbered(200))), valid_limit=12)
    train, valid = load_rows(data, "train"), load_rows(data, "valid")
    assert [len(part) for part in valid.parts] == [6, 6]
    assert [len(part) for part in train.parts] == [40, 194], "a slice of the rows is held out"
    own = {row.instruction for row in valid.parts[1]}
    assert own.isdisjoint(row.instruction for row in train.parts[1])
    assert [len(part) for part in load_rows(data, "valid", limit=3).parts] == [2, 1]
    one = mixture(*THREE, valid=str(jsonl(tmp_path / "valid.jsonl", *numbered(5))))
    assert (load_rows(one, "valid").parts, len(load_rows(one, "valid"))) == ((), 5)


def test_stored_sources_have_the_same_examples(tmp_path):
    paths = [jsonl(tmp_path / f"{name}.jsonl", *numbered(n)) for name, n in (("one", 60), ("two", 25))]
    sources = ({"source": str(paths[0]), "template": "plain"}, {"source": str(paths[1])})
    plain = mixture(*sources, store="off", template="exact")
    stored = mixture(*sources, store="on", store_dir=str(tmp_path / "store"), template="exact")
    found = []
    for data in (plain, stored):
        rows = load_rows(data, "train", stored=True)
        encoder = Encoder(tiny.tokenizer(), data)

        def make(_, part, encoder=encoder, data=data):
            return open_tokens(part, encoder, print, None) if part.are_stored else tokenize(part, encoder, data)

        assert [part.are_stored for part in rows.parts] == [data is stored] * 2
        found.append(by_source("train", rows, make))
    one, other = found
    assert list(one.rows) == list(other.rows)
    assert {row.template for row in other.rows} == {"plain", None}
    assert one.part_sizes == other.part_sizes == (57, 24)
    assert rows_digest(one.sequences) == rows_digest(other.sequences)
    for i, (left, right) in enumerate(zip(one.sequences, other.sequences, strict=True)):
        assert left.row == right.row == i
        np.testing.assert_array_equal(left.prompt, right.prompt)
        np.testing.assert_array_equal(left.response, right.response)
        assert left == one.sequences[i] != right
    np.testing.assert_array_equal(one.lengths, [len(s) for s in other.sequences])
    assert one.tokens == sum(s.supervised for s in other.sequences)


def test_rows_outside_the_first_epoch_are_cached_in_small_batches(tmp_path):
    data = mixture(str(jsonl(tmp_path / "rows.jsonl", *numbered(60))), store="off", template="exact")
    tokenizer = tiny.tokenizer()
    examples = by_source(
        "train", load_rows(data, "train"), lambda _, part: tokenize(part, Encoder(tokenizer, data), data)
    )
    size = len(examples)
    order = MixedOrder(examples.lengths, 4, 3, sizes=(size,), wanted=(16,))
    composition = BatchComposition(order.batch, steps=4, rows=examples.sequences, max_rows=4)
    model = Backbone(tiny.model("llama", len(tokenizer), seed=4), tokenizer)
    teacher = CachedTeacher(
        model, mode="memory", rows=HiddenStateTable(examples.sequences), composition=composition, releases_model=True
    )
    left = composition.leftovers
    assert len(left) == size - 16
    teacher.hidden(collate(left[:1]), left[:1])
    assert size - 4 <= teacher.rows.missing < size, "not all leftovers are computed with one of them"
    for step in range(-(-size // 4) + 1):
        picks = [examples.sequences[i] for i in order.batch(step)]
        hidden_ND = teacher.hidden(collate(picks), picks)
        assert hidden_ND.isfinite().all()
        assert teacher.has_released_model == (teacher.rows.missing == 0)
    assert teacher.has_released_model
    assert teacher.tokens == examples.tokens, "each row is computed once"


def test_missing_source_is_named(named, tmp_path):
    with raises_code("data.not_found", "no-such"):
        load_rows(mixture({"source": "g2p", "limit": 4}, str(tmp_path / "no-such.jsonl")), "train")


@pytest.mark.parametrize(
    ("sets", "code", "mention"),
    [
        (["data.sources=[g2p, {source: dolly, weight: 2}]"], "recipe.fields_conflict", "g2p has no weight"),
        (["data.sources=[{source: g2p, weight: 2, rows: 9}]"], "recipe.fields_conflict", "weights and rows"),
        (["data.sources=[{sauce: g2p}]"], "recipe.invalid_value", "source, weight, rows, template, limit"),
        (["data.sources=[{source: g2p, weight: 0}]"], "recipe.invalid_value", "weight"),
        (["data.sources=[g2p]", "data.source=dolly"], "recipe.unused_field", "data.source"),
        (["data.sources=[g2p]", "data.size=40"], "recipe.unused_field", "builtin"),
    ],
)
def test_contradicting_sources_are_refused(sets, code, mention):
    with raises_code(code, mention):
        resolve(command="distill", sets=sets)
