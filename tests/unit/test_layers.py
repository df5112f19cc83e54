"""Test students built from copies of the teacher's layers, embeddings and head."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distillm_cli.config.schema import StudentConfig
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.layers import build_from_layers, chosen_layers
from distillm_cli.models.loading import load_backbone
from distillm_cli.models.pair import create_student
from tests import tiny
from tests.codes import raises_code

TOKENIZER = tiny.tokenizer(size=41)


def teacher(family: str, **fields) -> Backbone:
    return Backbone(tiny.model(family, 45, **fields), TOKENIZER)  # with a padded vocabulary


@pytest.mark.parametrize(
    ("spec", "depth", "layers"),
    [
        ("layers:6", 12, [0, 2, 4, 7, 9, 11]),  # like DistilGPT-2, which was built from GPT-2
        ("layers:6", 24, [0, 5, 9, 14, 18, 23]),
        ("layers:1", 12, [0]),
        ("layers:2", 12, [0, 11]),
        ("layers:12", 12, list(range(12))),
        ("layers:4:first", 12, [0, 1, 2, 3]),
        ("layers:4:last", 12, [8, 9, 10, 11]),
        ("layers:3:evenly", 5, [0, 2, 4]),
        ("layers:0,3,7", 12, [0, 3, 7]),
        ("layers:all", 3, [0, 1, 2]),
    ],
)
def test_layer_specification_selects_layers(spec, depth, layers):
    assert chosen_layers(spec, depth) == layers


@pytest.mark.parametrize(
    ("spec", "code", "mentions"),
    [
        ("layers:", "usage.invalid_student", ("layers:6",)),
        ("layers:six", "usage.invalid_student", ("'layers:six'",)),
        ("layers:6:middle", "usage.invalid_student", ("layers:6:last",)),
        ("layers:13", "usage.invalid_layers", ("layers:13", "1 to 12")),
        ("layers:0", "usage.invalid_layers", ("1 to 12",)),
        ("layers:0,12", "usage.invalid_layers", ("12", "0 to 11")),
        ("layers:3,1", "usage.invalid_layers", ()),
        ("layers:1,1", "usage.invalid_layers", ()),
    ],
)
def test_invalid_layer_specification_is_rejected(spec, code, mentions):
    with raises_code(code, *mentions):
        chosen_layers(spec, 12)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_student_of_all_layers_is_a_copy_of_the_teacher(family):
    full = teacher(family)
    student = Backbone(build_from_layers("layers:all", full), TOKENIZER)
    batch = tiny.batch([(3, 4), (5, 9)], 41)
    with torch.no_grad():
        assert torch.equal(student.logits(batch), full.logits(batch))
        assert student.check_head(batch)
    teacher_pointers = {p.data_ptr() for p in full.model.parameters()}
    assert not teacher_pointers & {p.data_ptr() for p in student.model.parameters()}
    assert all(p.requires_grad for p in student.parameters())
    tied = full.model.get_input_embeddings().weight is full.model.get_output_embeddings().weight
    assert tied == (student.model.get_input_embeddings().weight is student.model.get_output_embeddings().weight)


@pytest.mark.parametrize("family", ["gpt2", "opt-350m", "llama", "qwen3", "gemma2"])
def test_student_matches_teacher_with_skipped_layers(family, tmp_path):
    full = teacher(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    student = Backbone(build_from_layers("layers:0,3", full), TOKENIZER)
    batch = tiny.batch([(3, 4), (5, 9)], 41)
    layers = next(m for m in full.trunk.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    for i in (1, 2):
        layers[i].forward = lambda hidden, *args, **kwargs: hidden
    with torch.no_grad():
        torch.testing.assert_close(student.logits(batch), full.logits(batch))
    student.model.save_pretrained(tmp_path)
    reloaded = type(student.model).from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(student.model.parameters(), reloaded.parameters(), strict=True))


def test_layer_types_follow_the_copied_layers():
    layer_types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    full = teacher("gemma3", num_hidden_layers=6, layer_types=layer_types)
    student = build_from_layers("layers:1,2,3", full)
    assert student.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert [layer.self_attn.is_sliding for layer in student.model.layers] == [True, False, True]
    qwen = teacher("qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    cut = build_from_layers("layers:2", qwen).config
    assert cut.layer_types == ["full_attention", "sliding_attention"]


def test_dropout_and_generation_config_default_to_the_teacher():
    full = teacher("opt")
    full.model.generation_config.eos_token_id = [0, 7]
    student = Backbone(build_from_layers("layers:1", full), TOKENIZER)
    assert student.model.config.dropout == 0.1
    assert student.stop_ids == full.stop_ids == {0, 7}
    assert build_from_layers("layers:1", full, dropout=0.0).config.dropout == 0


def test_layers_and_relative_width_require_a_teacher():
    options = {"seed": 0, "device": torch.device("cpu"), "max_length": 32}
    with raises_code("usage.no_teacher", "layers:1"):
        create_student(StudentConfig(path="layers:1"), **options)
    with raises_code("usage.no_teacher", "width:0.5"):
        create_student(StudentConfig(path="width:0.5"), **options)


@pytest.mark.parametrize(("spec", "width"), [("width:16", 16), ("width:0.5", 16), ("width:.75", 32)])
def test_narrow_student_has_the_teachers_depth(spec, width):
    full = teacher("qwen3", num_hidden_layers=3)
    options = {"device": torch.device("cpu"), "max_length": 32, "teacher": full}
    one, same, other = (create_student(StudentConfig(path=spec), seed=seed, **options) for seed in (0, 0, 1))
    config = one.model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen3", 3, width)
    weights = [m.model.get_input_embeddings().weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("spec", "mentions"),
    [
        ("width:64", ("32", "1 to 32")),
        ("width:1.5", ("'width:1.5'", "width:256", "width:0.5")),
        ("width:0.0", ("'width:0.0'",)),
        ("width:7", ("7",)),
    ],
)
def test_invalid_width_is_rejected(spec, mentions):
    options = {"seed": 0, "device": torch.device("cpu"), "max_length": 32, "teacher": teacher("llama")}
    with raises_code("usage.invalid_student", *mentions):
        create_student(StudentConfig(path=spec), **options)


def test_layers_of_an_encoder_decoder_are_rejected():
    t5 = Backbone(tiny.model("t5", 41), TOKENIZER)
    with raises_code("model.cannot_take_layers", "t5"):
        build_from_layers("layers:1", t5)


def test_layers_outside_a_module_list_are_rejected():
    full = teacher("llama")
    full.model.model.layers = torch.nn.ModuleDict({str(i): layer for i, layer in enumerate(full.model.model.layers)})
    with raises_code("model.cannot_take_layers", "llama"):
        build_from_layers("layers:1", full)


def test_moved_layers_have_their_original_attention_scale():
    """Check a GPT-2 that divides attention scores by the layer index."""
    full = teacher("gpt2", n_layer=6, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=True)
    student = build_from_layers("layers:1,3,4", full)
    ids = torch.arange(12)[None] * 7 % 41
    with torch.no_grad():
        found = student(ids, use_cache=False).logits
        blocks = full.model.transformer.h
        full.model.transformer.h = torch.nn.ModuleList([blocks[i] for i in (1, 3, 4)])
        expected = full.model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_depend_on_their_index_cannot_be_moved():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("diffllama", vocab_size=45, num_hidden_layers=4, **sizes)
    full = Backbone(AutoModelForCausalLM.from_config(config).eval(), TOKENIZER)
    with raises_code("model.cannot_take_layers", "diffllama", "layers:2"):
        build_from_layers("layers:2", full)
    student, ids = build_from_layers("layers:2:first", full), torch.arange(8)[None]
    full.model.model.layers = full.model.model.layers[:2]
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, full.model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2"])
@pytest.mark.parametrize("in_file", [True, False])
def test_weights_file_decides_whether_the_head_is_tied(family, in_file, tmp_path):
    """Check a config with tied embeddings over a file that has a separate head (``in_file``) or none."""
    path = tiny.save(tmp_path / "model", family, tie_word_embeddings=not in_file)
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}), encoding="utf-8")
    expected_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    loaded = load_backbone(path, dtype=torch.float32, device=torch.device("cpu"))
    student = build_from_layers("layers:all", loaded)
    ids = torch.arange(2, 14)[None]
    student.save_pretrained(tmp_path / "student")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = expected_model(ids).logits
        for model in (loaded.model, student, reloaded):
            torch.testing.assert_close(model(ids).logits, expected)
    assert reloaded.config.tie_word_embeddings is not in_file


def test_missing_head_is_rejected(tmp_path):
    path = tiny.save(tmp_path / "model", "llama", tie_word_embeddings=True)
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}), encoding="utf-8")
    with raises_code("model.weights_mismatch", "lm_head.weight", "tie_word_embeddings"):
        load_backbone(path, dtype=torch.float32, device=torch.device("cpu"))
