"""Test a teacher that sees rows by another template than the student: prompts, states, caches, samples, checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distillm_cli.config.load import resolve
from distillm_cli.config.schema import DataConfig, RolloutConfig
from distillm_cli.data.batching import tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.rows import Row
from distillm_cli.data.sides import with_teacher_prompts
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.interleaved import InterleavedSampler
from distillm_cli.rollouts.pool import pack, unpack
from distillm_cli.rollouts.sampler import ModelSampler
from distillm_cli.teachers.cached import BatchComposition, CachedTeacher, HiddenStateTable
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.types import Rollout, collate, rows_digest
from tests import chat_models, tiny
from tests.chat_models import CHAT
from tests.codes import raises_code

TOKENIZER = tiny.tokenizer()
DATA = DataConfig(max_length=40, max_prompt_length=32, template="exact")
ROWS = [Row(instruction="abc" * (1 + i % 3), input="x" * (i % 4), references=("dc" * (1 + i % 5),)) for i in range(24)]


def sides(own="exact", seen="alpaca", rows=ROWS, limit=250):
    data = DATA.model_copy(update={"template": own, "max_length": limit, "max_prompt_length": limit})
    encoder = Encoder(TOKENIZER, data)
    examples = tokenize(rows, encoder, data)
    return with_teacher_prompts(examples, encoder.with_settings(template=seen)), encoder


def model(seed=4):
    return Backbone(tiny.model("llama", len(TOKENIZER), seed=seed, max_position_embeddings=256), TOKENIZER)


def test_teacher_sees_its_prompt_and_the_same_response():
    examples, encoder = sides()
    for row, sequence in zip(examples.rows, examples.sequences, strict=True):
        seen = sequence.for_teacher
        np.testing.assert_array_equal(seen.prompt, encoder.with_settings(template="alpaca").prompt_ids(row))
        np.testing.assert_array_equal(sequence.prompt, encoder.prompt_ids(row))
        np.testing.assert_array_equal(seen.response, sequence.response)
        assert sequence.prompt_length == len(seen.prompt) > len(sequence.prompt)
    assert rows_digest(examples.sequences) != rows_digest(sides(seen="plain")[0].sequences), "caches differ"


def test_states_are_those_of_the_teachers_side():
    examples, _ = sides()
    picks = list(examples.sequences[3:9])
    teacher = LocalTeacher(model())
    found_ND = teacher.hidden(collate(picks), picks)
    assert torch.equal(found_ND, model().hidden(collate([s.for_teacher for s in picks])).detach())
    assert found_ND.shape[0] == sum(s.supervised for s in picks)
    composition = BatchComposition(
        lambda step: list(range(step * 4, step * 4 + 4)), steps=6, rows=examples.sequences, max_rows=4
    )
    rows = HiddenStateTable(examples.sequences)
    cached = CachedTeacher(model(), mode="memory", rows=rows, composition=composition, caches_rollouts=True)
    for _ in range(2):
        torch.testing.assert_close(cached.hidden(collate(picks), picks), found_ND)
    same = Rollout.to(picks[0], picks[0].response)
    assert rows.row_equal_to(same) == picks[0]
    other = Rollout(same.prompt, same.response, same.row)
    assert rows.row_equal_to(other) is None, "another teacher's prompt has other states"


def test_samplers_use_the_prompts_of_each_model():
    examples, _ = sides()
    prompts = list(examples.sequences[:6])
    config = RolloutConfig(max_new_tokens=6)
    by_teacher = ModelSampler(model(), config, max_length=250, seed=3, is_teacher=True).sample(prompts, 1)
    seen = [s.for_teacher for s in prompts]
    expected = ModelSampler(model(), config, max_length=250, seed=3).sample(seen, 1)
    assert [r.response.tolist() for r in by_teacher] == [r.response.tolist() for r in expected]
    for rollout, prompt in zip(by_teacher, prompts, strict=True):
        assert rollout.prompt is prompt.prompt or np.array_equal(rollout.prompt, prompt.prompt)
        np.testing.assert_array_equal(rollout.for_teacher.prompt, prompt.for_teacher.prompt)
    greedy = RolloutConfig(max_new_tokens=6, accept=1, temperature=0.0, draft=3)
    drafted = InterleavedSampler(model(5), model(), greedy, greedy, max_length=250, seed=3).sample(prompts, 1)
    alone = ModelSampler(model(), greedy, max_length=250, seed=3).sample(seen, 1)
    assert [r.response.tolist() for r in drafted] == [r.response.tolist() for r in alone], (
        "with K = 1 it is the teacher's"
    )


def test_checkpoint_of_rollouts_has_both_prompts():
    examples, _ = sides()
    rollouts = [Rollout.to(s, s.response[:2]) for s in examples.sequences[:5]]
    for one, other in zip(rollouts, unpack(pack(rollouts, "replay"), "replay"), strict=True):
        np.testing.assert_array_equal(one.prompt, other.prompt)
        np.testing.assert_array_equal(one.for_teacher.prompt, other.for_teacher.prompt)
        assert other.for_teacher.turns is None


def test_rows_that_do_not_fit_the_teachers_side_are_dropped():
    examples, _ = sides(rows=[*ROWS[:20], *[Row(instruction="a" * 20, references=("d",))] * 4], limit=155)
    assert 0 < examples.dropped < 24
    assert len(examples) == 24 - examples.dropped == len(examples.rows)
    assert all(len(s.for_teacher) <= 155 for s in examples.sequences)
    assert [s.row for s in examples.sequences] == list(range(len(examples)))
    with raises_code("data.no_teacher_prompt"):
        sides(limit=60)


def test_earlier_answers_are_aligned():
    own = chat_models.tokenizer(CHAT)
    seen = chat_models.tokenizer(
        CHAT.replace("<user>", "<sys><user>").replace("<end>{{ '\\n' }}{%- endif", "<stop>{%- endif")
    )
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "x"},
    ]
    row = Row(messages=messages, answer={"role": "assistant", "content": "two"}, references=("two",))
    data = DATA.model_copy(update={"template": "chat", "max_length": 90})
    examples = with_teacher_prompts(tokenize([row], Encoder(own, data), data), Encoder(seen, data))
    (sequence,) = examples.sequences
    other = sequence.for_teacher
    pairs = [(s.prompt, s.turns) for s in (sequence, other)]
    texts = [own.decode(prompt[turns]) for prompt, turns in pairs]
    assert texts == ["one<end>", "one<stop>"]
    assert sequence.supervised == other.supervised
    short = Encoder(seen, data.model_copy(update={"turns": "last"}))
    with raises_code("data.no_teacher_prompt", "earlier answers"):
        with_teacher_prompts(tokenize([row], Encoder(own, data), data), short)


@pytest.mark.parametrize(
    ("sets", "mention"),
    [
        (["objective.hidden=0.5"], "objective.hidden needs the same prompt"),
        (["method=mixkd"], "data.mixup needs the same prompt"),
        (["method=kdiga"], "objective.input_gradient needs the same prompt"),
        (["method=okd"], "okd.rank"),
        (["method=minillm"], "mixture with the teacher"),
        (["data.sources=[{source: g2p, template: plain}]"], "a source of data.sources has its own template"),
    ],
)
def test_methods_that_need_the_same_positions_are_refused(sets, mention):
    with raises_code("recipe.fields_conflict", "teacher.template", mention):
        resolve(command="distill", sets=["teacher.template=plain", *sets])


def test_equal_sides_are_one_side():
    assert not resolve(command="distill", sets=["teacher.template=auto", "objective.hidden=0.5"]).recipe.has_two_sides
    assert resolve(command="distill", sets=["teacher.chat_template=teacher"]).recipe.has_two_sides
