"""Test running models on input embeddings instead of token ids."""

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.models.backbone import Backbone
from tests import tiny
from tests.codes import raises_code

LENGTHS = [(3, 4), (7, 2), (1, 5)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "opt", "gpt_neo", "t5", "bart"])
def test_embeddings_give_the_states_of_token_ids(family):
    model = Backbone(tiny.model(family).double(), tiny.tokenizer(size=101))
    batch = tiny.batch(LENGTHS, 101)
    assert_close(model.hidden_of(model.embed(batch)), model.hidden(batch), rtol=1e-10, atol=1e-10)
    model.check_embeddings()


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_own_logits_of_embeddings_match_those_of_token_ids(family):
    model = Backbone(tiny.model(family), tiny.tokenizer(size=101))
    model.own_logits = True
    batch = tiny.batch(LENGTHS, 101)
    assert_close(model.hidden_of(model.embed(batch)), model.logits(batch))


def test_every_tiny_family_runs_on_embeddings():
    for family in [*tiny.FAMILIES, *tiny.SEQ2SEQ]:
        Backbone(tiny.model(family), tiny.tokenizer(size=101)).check_embeddings()


def test_model_that_uses_ids_elsewhere_is_refused():
    model = Backbone(tiny.model("llama"), tiny.tokenizer(size=101))
    embed = model.token_embeddings
    model.token_embeddings = lambda ids, decoder=False: 2 * embed(ids, decoder=decoder)  # a scale outside the table
    with raises_code("model.no_input_embeddings", "llama"):
        model.check_embeddings()


def test_embeddings_carry_the_gradient_of_the_table():
    model = Backbone(tiny.model("gpt2").double(), tiny.tokenizer(size=101))
    batch = tiny.batch(LENGTHS, 101)
    table = model.model.get_input_embeddings().weight
    grads = [
        torch.autograd.grad(h.square().sum(), table)[0]
        for h in (model.hidden(batch), model.hidden_of(model.embed(batch)))
    ]
    assert_close(*grads, rtol=1e-8, atol=1e-8)
