"""Test students built from a shape or a config, their special tokens and dropout."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distillm_cli.config.student_spec import RandomModel, parse_student
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.model_families import context_of
from distillm_cli.models.students import build_from_config, build_random, set_dropout
from tests import tiny
from tests.codes import raises_code

TOKENIZER = tiny.tokenizer(size=41)


def build(spec: str, teacher: str | None = None, *, seed: int = 0, dropout: float | None = None, **teacher_fields):
    config = None if teacher is None else tiny.config(teacher, **teacher_fields)
    return build_random(spec, TOKENIZER, teacher_config=config, max_length=100, seed=seed, dropout=dropout)


def works(model) -> bool:
    """Return whether forward, fused head and a decoding step work."""
    backbone = Backbone(model, TOKENIZER)
    batch = tiny.batch([(3, 4), (5, 2)], 41)
    decoding = backbone.decode([s.prompt for s in tiny.sequences([(3, 1), (5, 1)], 41)])
    logits_BV = decoding.logits(decoding.logits(None).argmax(-1))
    return backbone.check_head(batch) and bool(logits_BV.isfinite().all())


def test_random_specification_is_parsed():
    assert parse_student("random:4x256") == RandomModel(4, 256)
    assert parse_student("random:gpt2:4x256") == RandomModel(4, 256, "gpt2")


@pytest.mark.parametrize("spec", ["random:4", "random:", "random:0x8", "random:4x0", "random:x8", "random:4x256x2"])
def test_malformed_specification_is_rejected(spec):
    with raises_code("usage.invalid_student", spec, "random:[FAMILY:]LAYERSxWIDTH") as caught:
        parse_student(spec)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("width", [7, 34, 62])
def test_width_that_does_not_divide_into_heads_is_rejected(width):
    with raises_code("usage.invalid_student", str(width), "16"):
        build(f"random:2x{width}")


def test_unknown_family_is_rejected():
    with raises_code("usage.invalid_student", "'nonsense'", "llama, gpt2"):
        build("random:nonsense:2x32")
    with raises_code("usage.invalid_student", "'opt'", "llama, gpt2, t5, qwen3"):
        build("random:opt:2x32", "qwen3")


@pytest.mark.parametrize(("spec", "teacher"), [("random:2x64", None), ("random:2x128", "gpt2"), ("random:2x64", "opt")])
def test_initial_weights_scale_with_the_width(spec, teacher):
    """Check the standard deviation √(2/(5·width)) of the embedding and of a projection, for every family."""
    model, width = build(spec, teacher), int(spec.rsplit("x")[-1])
    projection = next(p for n, p in model.named_parameters() if p.dim() == 2 and ("q_proj" in n or "c_attn" in n))
    for weight in (model.get_input_embeddings().weight[1:], projection):
        assert weight.std().item() == pytest.approx((2 / (5 * width)) ** 0.5, rel=0.05)


def test_random_student_without_a_teacher_is_a_llama():
    model = build("random:2x64")
    config = model.config
    assert config.model_type == "llama"
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (2, 64, 32)
    assert config.num_attention_heads == config.num_key_value_heads == 2
    assert config.intermediate_size == 176  # 8/3 · 64 = 170.7, to a multiple of 16
    assert config.max_position_embeddings == 200
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.shape == (41, 64)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert works(model)


def test_random_gpt2_has_tanh_gelu_and_no_dropout():
    model = build("random:gpt2:2x48")
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head, config.n_positions) == (2, 48, 3, 200)
    assert config.activation_function == "gelu_pytorch_tanh"
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0
    assert works(model)


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - {"gpt2-untied", "llama-tied", "mamba"}))
def test_random_student_is_a_scaled_teacher_config(family):
    model = build("random:3x64", family)
    config = model.config
    assert config.model_type == tiny.config(family).model_type
    assert (config.num_hidden_layers, config.hidden_size) == (3, 64)
    assert config.num_attention_heads == 8  # the teacher's head size, 8, at twice its width
    if hasattr(config, "layer_types"):
        assert len(config.layer_types) == 3
    if family != "bloom":
        assert context_of(config) == tiny.CONTEXT
    assert config.vocab_size == model.get_output_embeddings().weight.shape[0] == 41
    assert works(model)


def test_all_sizes_scale_with_the_width():
    llama = build("random:1x128", "llama").config
    assert (llama.head_dim, llama.num_attention_heads, llama.num_key_value_heads) == (8, 16, 8)
    assert llama.intermediate_size == 4 * 48
    assert build("random:1x16", "llama", num_key_value_heads=1).config.num_key_value_heads == 1
    opt = build("random:1x64", "opt").config
    assert (opt.ffn_dim, opt.word_embed_proj_dim) == (128, 64)
    opt_350m = build("random:1x64", "opt-350m").config
    assert opt_350m.word_embed_proj_dim == 32
    gemma = build("random:1x512", "gemma2", head_dim=256, query_pre_attn_scalar=256).config
    assert (gemma.head_dim, gemma.num_attention_heads, gemma.query_pre_attn_scalar) == (128, 4, 128)
    assert gemma.final_logit_softcapping == 3.0
    assert build("random:1x64", "gptj").config.rotary_dim == 4


def test_layer_types_are_sampled_evenly_with_the_last():
    layer_types = ["sliding_attention"] * 5 + ["full_attention"]
    shallow = build("random:2x32", "gemma3", num_hidden_layers=6, layer_types=layer_types)
    assert shallow.config.layer_types == ["sliding_attention", "full_attention"]
    deep = build("random:4x32", "gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    assert deep.config.layer_types == ["sliding_attention"] * 2 + ["full_attention"] * 2


def test_named_family_has_only_the_teachers_context():
    config = build("random:llama:2x64", "gpt2").config
    assert (config.model_type, config.max_position_embeddings) == ("llama", tiny.CONTEXT)


def test_teacher_that_cannot_be_scaled_is_rejected():
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 24, "long_factor": [1.0] * 24, "rope_theta": 10000.0}
    config = AutoConfig.for_model(
        "phi3",
        vocab_size=41,
        hidden_size=96,
        num_attention_heads=2,
        num_hidden_layers=2,
        pad_token_id=0,
        rope_parameters=longrope,
        original_max_position_embeddings=32,
    )
    with raises_code("model.cannot_scale", "phi3", "random:llama:2x64"):
        build_random("random:2x64", TOKENIZER, teacher_config=config, max_length=64, seed=0)


def test_initial_weights_depend_only_on_the_seed():
    torch.manual_seed(1)
    first = build("random:2x32", seed=3).state_dict()
    torch.manual_seed(2)
    torch.rand(7)
    before = torch.get_rng_state()
    second = build("random:2x32", seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    other = build("random:2x32", seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_random_student_has_no_dropout_by_default():
    assert build("random:2x32", "opt").config.dropout == 0  # 0.1 in the teacher's config
    config = build("random:2x32", "opt", dropout=0.3).config
    assert (config.dropout, config.attention_dropout, config.layerdrop) == (0.3, 0.3, 0.0)


def test_set_dropout_sets_every_dropout_field():
    config = tiny.config("phi")
    set_dropout(config, 0.2, where="here")
    assert (config.resid_pdrop, config.embd_pdrop, config.attention_dropout) == (0.2, 0.2, 0.2)
    config = tiny.config("gpt2")
    set_dropout(config, 0.2, where="here")
    assert (config.attn_pdrop, config.summary_first_dropout) == (0.2, 0.1)
    with raises_code("model.no_dropout", "mamba"):
        set_dropout(tiny.config("mamba"), 0.2, where="here")
    set_dropout(tiny.config("mamba"), 0.0, where="here")


@pytest.mark.parametrize("spec", ["random:2x32", "random:gpt2:2x32"])
def test_saved_student_reloads_and_generates(spec, tmp_path):
    model = build(spec)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), reloaded.parameters(), strict=True))
    assert reloaded.generation_config.eos_token_id == TOKENIZER.eos_token_id
    assert reloaded.generation_config.pad_token_id == TOKENIZER.pad_token_id
    assert reloaded.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False).shape[0] == 1


def test_special_tokens_come_from_the_tokenizer():
    config = build("random:2x32", "llama", bos_token_id=17, eos_token_id=18, pad_token_id=19).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 0, 1)


def test_shared_pad_and_end_token_has_a_trainable_embedding():
    tokenizer = tiny.tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    model = build_random("random:1x16", tokenizer, teacher_config=None, max_length=8, seed=0)
    assert model.config.pad_token_id is None
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id
    assert model.get_input_embeddings().padding_idx is None


def test_student_from_config_has_its_padded_vocabulary():
    model = build_from_config(tiny.config("qwen3", vocab_size=64), TOKENIZER, seed=0, where="config.json")
    assert model.config.vocab_size == 64
    assert works(model)
    same = build_from_config(tiny.config("qwen3", vocab_size=64), TOKENIZER, seed=0, where="config.json")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    assert build_from_config(tiny.config("gpt2"), TOKENIZER, seed=0, where="x").config.attn_pdrop == 0.1
    assert build_from_config(tiny.config("gpt2"), TOKENIZER, seed=0, dropout=0.0, where="x").config.attn_pdrop == 0


def test_config_with_too_small_vocabulary_is_rejected():
    with raises_code("model.tokenizer_mismatch", "41", "30", "dir/config.json"):
        build_from_config(tiny.config("gpt2", vocab_size=30), TOKENIZER, seed=0, where="dir/config.json")
