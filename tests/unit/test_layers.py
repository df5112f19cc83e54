"""Students cut from the teacher: its layers, embeddings and head as copies."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distillm_cli.config.schema import StudentConfig
from distillm_cli.errors import ModelError, UsageError
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.layers import build_from_layers, chosen_layers
from distillm_cli.models.loading import load_backbone
from distillm_cli.models.pair import create_student
from tests import tiny

TOKENIZER = tiny.tokenizer(size=41)


def teacher(family: str, **fields) -> Backbone:
    return Backbone(tiny.model(family, 45, **fields), TOKENIZER)  # a padded vocabulary


@pytest.mark.parametrize(
    ("spec", "depth", "layers"),
    [
        ("layers:6", 12, [0, 2, 4, 7, 9, 11]),  # as DistilGPT-2 was cut from GPT-2
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
def test_layers_are_chosen(spec, depth, layers):
    assert chosen_layers(spec, depth) == layers


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("layers:", "write layers:6"),
        ("layers:six", "cannot read the student specification 'layers:six'"),
        ("layers:6:middle", "layers:6:last"),
        ("layers:13", "layers:13: the teacher has 12 layers; give 1 to 12"),
        ("layers:0", "give 1 to 12"),
        ("layers:0,12", "the teacher has no layer 12; its layers are 0 to 11"),
        ("layers:3,1", "in the teacher's order, each once"),
        ("layers:1,1", "each once"),
    ],
)
def test_layers_that_cannot_be_are_refused(spec, said):
    with pytest.raises(UsageError) as caught:
        chosen_layers(spec, 12)
    assert said in str(caught.value)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_all_layers_are_the_teacher_and_share_nothing_with_it(family):
    whole = teacher(family)
    student = Backbone(build_from_layers("layers:all", whole), TOKENIZER)
    batch = tiny.batch([(3, 4), (5, 9)], 41)
    with torch.no_grad():
        assert torch.equal(student.logits(batch), whole.logits(batch))
        assert student.check_head(batch)
    theirs = {p.data_ptr() for p in whole.model.parameters()}
    assert not theirs & {p.data_ptr() for p in student.model.parameters()}
    assert all(p.requires_grad for p in student.parameters())
    tied = whole.model.get_input_embeddings().weight is whole.model.get_output_embeddings().weight
    assert tied == (student.model.get_input_embeddings().weight is student.model.get_output_embeddings().weight)


@pytest.mark.parametrize("family", ["gpt2", "opt-350m", "llama", "qwen3", "gemma2"])
def test_a_cut_model_is_the_teacher_with_layers_taken_out(family, tmp_path):
    """Against the teacher itself, its other layers passed by."""
    whole = teacher(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})
    student = Backbone(build_from_layers("layers:0,3", whole), TOKENIZER)
    batch = tiny.batch([(3, 4), (5, 9)], 41)
    layers = next(m for m in whole.trunk.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)
    for i in (1, 2):
        layers[i].forward = lambda hidden, *args, **kwargs: hidden
    with torch.no_grad():
        torch.testing.assert_close(student.logits(batch), whole.logits(batch))
    student.model.save_pretrained(tmp_path)
    again = type(student.model).from_pretrained(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(student.model.parameters(), again.parameters(), strict=True))


def test_kinds_of_layers_go_with_their_layers():
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    whole = teacher("gemma3", num_hidden_layers=6, layer_types=kinds)
    student = build_from_layers("layers:1,2,3", whole)
    assert student.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert [layer.self_attn.is_sliding for layer in student.model.layers] == [True, False, True]
    qwen = teacher("qwen2", num_hidden_layers=4, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    cut = build_from_layers("layers:2", qwen).config
    assert cut.layer_types == ["full_attention", "sliding_attention"]


def test_dropout_and_generation_settings_are_the_teachers_unless_told():
    whole = teacher("opt")
    whole.model.generation_config.eos_token_id = [0, 7]
    student = Backbone(build_from_layers("layers:1", whole), TOKENIZER)
    assert student.model.config.dropout == 0.1
    assert student.stop_ids == whole.stop_ids == {0, 7}
    assert build_from_layers("layers:1", whole, dropout=0.0).config.dropout == 0


def test_a_student_of_layers_or_of_half_the_width_needs_a_teacher():
    options = {"seed": 0, "device": torch.device("cpu"), "max_length": 32}
    with pytest.raises(UsageError, match="layers:1 copies layers of a teacher, but there is no teacher"):
        create_student(StudentConfig(path="layers:1"), **options)
    with pytest.raises(UsageError, match=r"width:0\.5 has the depth of a teacher, but there is no teacher"):
        create_student(StudentConfig(path="width:0.5"), **options)


@pytest.mark.parametrize(("spec", "width"), [("width:16", 16), ("width:0.5", 16), ("width:.75", 32)])
def test_a_narrower_student_is_as_deep_as_the_teacher_and_random(spec, width):
    whole = teacher("qwen3", num_hidden_layers=3)
    options = {"device": torch.device("cpu"), "max_length": 32, "teacher": whole}
    one, same, other = (create_student(StudentConfig(path=spec), seed=seed, **options) for seed in (0, 0, 1))
    config = one.model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen3", 3, width)
    weights = [m.model.get_input_embeddings().weight for m in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("width:64", "the teacher is 32 wide; give 1 to 32"),
        ("width:1.5", "cannot read the student specification 'width:1.5'; write width:256, or width:0.5"),
        ("width:0.0", "cannot read"),
        ("width:7", "a width of 7 does not divide into attention heads"),
    ],
)
def test_a_width_that_cannot_be_is_refused(spec, said):
    options = {"seed": 0, "device": torch.device("cpu"), "max_length": 32, "teacher": teacher("llama")}
    with pytest.raises(UsageError) as caught:
        create_student(StudentConfig(path=spec), **options)
    assert said in str(caught.value)


def test_an_encoder_decoder_has_two_stacks_of_layers():
    t5 = Backbone(tiny.model("t5", 41), TOKENIZER)
    with pytest.raises(ModelError, match="a t5 teacher: an encoder-decoder has two stacks"):
        build_from_layers("layers:1", t5)


def test_layers_that_are_not_in_one_list_are_refused():
    whole = teacher("llama")
    whole.model.model.layers = torch.nn.ModuleDict({str(i): layer for i, layer in enumerate(whole.model.model.layers)})
    with pytest.raises(ModelError, match=r"cannot copy layers of a llama teacher: its layers are not in one list"):
        build_from_layers("layers:1", whole)


def test_layers_that_moved_keep_the_scale_of_their_scores():
    """A GPT-2 that divides them by the layer's place: the student is the teacher's own layers, run one after the other."""
    whole = teacher("gpt2", n_layer=6, scale_attn_by_inverse_layer_idx=True, scale_attn_weights=True)
    student = build_from_layers("layers:1,3,4", whole)
    ids = torch.arange(12)[None] * 7 % 41
    with torch.no_grad():
        found = student(ids, use_cache=False).logits
        blocks = whole.model.transformer.h
        whole.model.transformer.h = torch.nn.ModuleList([blocks[i] for i in (1, 3, 4)])
        expected = whole.model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_layers_with_a_constant_of_their_place_may_not_move():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("diffllama", vocab_size=45, num_hidden_layers=4, **sizes)
    whole = Backbone(AutoModelForCausalLM.from_config(config).eval(), TOKENIZER)
    with pytest.raises(
        ModelError, match="diffllama teacher: the computation of its layers depends on their index; layers:2;"
    ):
        build_from_layers("layers:2", whole)
    student, ids = build_from_layers("layers:2:first", whole), torch.arange(8)[None]
    whole.model.model.layers = whole.model.model.layers[:2]
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, whole.model(ids).logits)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2"])
@pytest.mark.parametrize("in_file", [True, False])
def test_the_file_decides_whether_the_head_is_tied(family, in_file, tmp_path):
    """A config that says tied, over a file with a head of its own (``in_file``) or without one."""
    path = tiny.save(tmp_path / "model", family, tie_word_embeddings=not in_file)
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": True}), encoding="utf-8")
    own = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    loaded = load_backbone(path, dtype=torch.float32, device=torch.device("cpu"))
    student = build_from_layers("layers:all", loaded)
    ids = torch.arange(2, 14)[None]
    student.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = own(ids).logits
        for model in (loaded.model, student, again):
            torch.testing.assert_close(model(ids).logits, expected)
    assert again.config.tie_word_embeddings is not in_file


def test_a_missing_head_is_refused_with_the_cure(tmp_path):
    path = tiny.save(tmp_path / "model", "llama", tie_word_embeddings=True)
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}), encoding="utf-8")
    with pytest.raises(ModelError, match="tie_word_embeddings to true"):
        load_backbone(path, dtype=torch.float32, device=torch.device("cpu"))
