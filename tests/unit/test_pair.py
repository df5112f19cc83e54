"""Test devices, dtypes, vocabularies, students and pairs of teacher and student."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BertConfig

from distillm_cli.config.schema import Recipe, StudentConfig
from distillm_cli.models.backbone import vocabulary_size
from distillm_cli.models.model_families import longrope_bound
from distillm_cli.models.pair import (
    bf16_is_fast,
    check_vocabularies,
    create_student,
    load_backbone,
    load_pair,
    rebuild_student,
    reload_teacher,
    resolve_device,
    resolve_dtype,
)
from distillm_cli.training.events import Warned
from tests import tiny
from tests.codes import raises_code

CPU = torch.device("cpu")
VOCAB = tiny.VOCAB
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def load(path: str, **options):
    return load_backbone(path, dtype=torch.float32, device=CPU, **options)


# Devices and dtypes


def test_resolve_device_accepts_names_and_auto():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cuda:99", "cpu:1"])
def test_missing_device_is_rejected(name):
    with raises_code("usage.no_device", name) as caught:
        resolve_device(name)
    assert caught.value.exit_code == 2


def test_named_gpu_becomes_the_current_one(monkeypatch):
    """Check this because torch reports bf16 support and memory of the current GPU only."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    resolve_device("cuda")
    resolve_device("cpu")
    assert current == [torch.device("cuda", 1)]


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx512_f": True, "avx512_bf16": False}, False)],
)
def test_auto_dtype_is_bf16_on_cpus_that_support_it(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert bf16_is_fast(CPU) is fast
    assert resolve_dtype("auto", CPU) == (torch.bfloat16 if fast else torch.float32)
    assert [resolve_dtype(name, CPU) for name in ("fp32", "bf16", "fp16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]


def test_bf16_detection_with_older_torch(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert bf16_is_fast(CPU)
    assert not bf16_is_fast(torch.device("mps"))


# Vocabularies


def test_vocabularies_may_differ_in_added_special_tokens():
    one, two = tiny.tokenizer(size=VOCAB), tiny.tokenizer(size=VOCAB)
    check_vocabularies(one, two)
    two.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    check_vocabularies(one, two)
    check_vocabularies(two, one)
    one.add_special_tokens({"additional_special_tokens": ["<user>", "<system>"]})
    with raises_code("model.different_vocabularies", "token 42", "'<bot>'", "'<system>'"):
        check_vocabularies(two, one)


def test_first_different_token_is_named():
    with raises_code("model.different_vocabularies", "token 5", "'c'", "'y'") as caught:
        check_vocabularies(tiny.tokenizer("abcdef"), tiny.tokenizer("abyxef"))
    assert caught.value.exit_code == 4


def test_extra_ordinary_token_is_rejected():
    with raises_code("model.different_vocabularies", "token 9, 'g'", "teacher 9 tokens", "student 10"):
        check_vocabularies(tiny.tokenizer("abcdef"), tiny.tokenizer("abcdefg"))
    with raises_code("model.different_vocabularies", "token 9, 'g'", "teacher 10 tokens", "student 9"):
        check_vocabularies(tiny.tokenizer("abcdefg"), tiny.tokenizer("abcdef"))


# Students and their tokenizers


def student(path: str | None, **options):
    fields = {name: options.pop(name) for name in ("tokenizer", "dropout") if name in options}
    options = {"seed": 0, "device": CPU, "max_length": 64} | options
    return create_student(StudentConfig(path=path, **fields), **options)


def test_student_loads_in_float32_with_its_own_tokenizer(tmp_path):
    path = tiny.save(tmp_path / "m", own_tokenizer=tiny.tokenizer("abc", size=VOCAB))
    backbone = student(path, teacher=load(tiny.save(tmp_path / "t")))
    assert backbone.tokenizer.get_vocab() == tiny.tokenizer("abc", size=VOCAB).get_vocab()
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_student_without_tokenizer_uses_the_teachers(tmp_path):
    teacher = load(tiny.save(tmp_path / "t"))
    path = tiny.save(tmp_path / "m", "gpt2", own_tokenizer=False)
    backbone = student(path, teacher=teacher)
    assert backbone.tokenizer is teacher.tokenizer
    assert backbone.model.generation_config.eos_token_id == teacher.tokenizer.eos_token_id
    with raises_code("model.no_tokenizer", "--tokenizer"):
        student(path)


def test_dropout_is_set_in_a_loaded_student(tmp_path):
    path = tiny.save(tmp_path / "m", "gpt2")
    assert {m.p for m in student(path).modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert {m.p for m in student(path, dropout=0.0).modules() if isinstance(m, nn.Dropout)} == {0.0}


def test_random_student_with_saved_or_trained_tokenizer(tmp_path):
    directory = tmp_path / "t"
    tiny.tokenizer(size=VOCAB).save_pretrained(directory)
    assert student("random:1x16", tokenizer=str(directory)).vocab == VOCAB
    backbone = student("random:1x16", tokenizer="chars", texts=lambda _: iter(["abc", "bcd"]))
    assert backbone.vocab == vocabulary_size(backbone.tokenizer) == backbone.model.config.vocab_size
    assert {"a", "b", "c", "d"} <= backbone.tokenizer.get_vocab().keys()
    with raises_code("model.no_tokenizer", "chars"):
        student("random:1x16", tokenizer="chars")


def test_random_student_needs_a_tokenizer():
    with raises_code("model.no_tokenizer", "random:1x16", "--tokenizer"):
        student("random:1x16")
    with raises_code("usage.no_model", "--student"):
        student(None)


def test_config_json_uses_its_tokenizer_without_a_teacher(tmp_path):
    path = Path(tiny.save(tmp_path / "m", "qwen3", rows=64, own_tokenizer=tiny.tokenizer("abc", size=VOCAB)))
    alone = student(str(path / "config.json"))
    assert alone.tokenizer.get_vocab() == tiny.tokenizer("abc", size=VOCAB).get_vocab()
    assert (alone.vocab, alone.model.config.vocab_size, alone.model.config.model_type) == (VOCAB, 64, "qwen3")
    assert not torch.equal(alone.model.lm_head.weight, load(str(path)).model.lm_head.weight)
    teacher = load(tiny.save(tmp_path / "t"))
    assert student(str(path / "config.json"), teacher=teacher).tokenizer is teacher.tokenizer
    with raises_code("model.no_config", "missing.json"):
        student(str(tmp_path / "missing.json"))


def test_config_json_of_bert_is_rejected(tmp_path):
    BertConfig(vocab_size=VOCAB, num_hidden_layers=1, **SMALL).save_pretrained(tmp_path)
    with raises_code("model.not_causal", "bert"):
        student(str(tmp_path / "config.json"), teacher=load(tiny.save(tmp_path / "t")))


# Pairs


def recipe(teacher: str | None, path: str, method: str = "distillm", **fields) -> Recipe:
    sections = {"teacher": {"path": teacher, "dtype": "bf16"}, "student": {"path": path}}
    return Recipe.model_validate({"method": method, **sections, **fields})


def test_pair_shares_tokenizer_with_padded_vocabularies(tmp_path):
    teacher, path = tiny.save(tmp_path / "t", rows=64), tiny.save(tmp_path / "s", "gpt2", rows=48)
    pair = load_pair(recipe(teacher, path), device=CPU)
    assert pair.vocab == pair.teacher.vocab == pair.student.vocab == VOCAB
    assert pair.tokenizer is pair.teacher.tokenizer is pair.student.tokenizer
    assert {p.dtype for p in pair.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pair.student.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    assert all(p.requires_grad for p in pair.student.parameters())
    assert not any(module.training for module in [*pair.teacher.modules(), *pair.student.modules()])
    batch = tiny.batch([(3, 4), (5, 2)], VOCAB)
    for backbone in (pair.teacher, pair.student):
        assert backbone.check_head(batch)
        assert backbone.head().logits(backbone.hidden(batch)).shape == (6, VOCAB)


def test_random_student_depends_on_the_seed_of_the_recipe(tmp_path):
    teacher = tiny.save(tmp_path / "t", "opt")
    first, second, third = (
        load_pair(recipe(teacher, "random:1x32", train={"seed": seed}), device=CPU).student for seed in (10, 10, 11)
    )
    assert first.model.config.model_type == "opt"
    embeddings = [backbone.model.get_input_embeddings().weight for backbone in (first, second, third)]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])


@pytest.mark.parametrize("kind", ["random", "config", "loaded"])
def test_models_can_be_rebuilt_in_their_initial_state(kind, tmp_path):
    """Check this for scores of the initial student, which are computed after training."""
    teacher, other = tiny.save(tmp_path / "t", "gpt2"), tiny.save(tmp_path / "s", "llama", **SMALL)
    pair_recipe = recipe(teacher, {"random": "random:1x16", "config": f"{other}/config.json", "loaded": other}[kind])
    pair = load_pair(pair_recipe, device=CPU)
    before = {name: tensor.clone() for name, tensor in pair.student.model.state_dict().items()}
    teacher_before = {name: tensor.clone() for name, tensor in pair.teacher.model.state_dict().items()}
    for parameter in pair.student.parameters():
        parameter.data += 1
    pair.teacher.to("meta")
    rebuilt, teacher = rebuild_student(pair_recipe, pair, CPU), reload_teacher(pair_recipe, pair, CPU)
    for model, expected in ((rebuilt, before), (teacher, teacher_before)):
        assert (model.vocab, model.tokenizer.get_vocab()) == (pair.vocab, pair.tokenizer.get_vocab())
        torch.testing.assert_close(dict(model.model.state_dict()), expected, rtol=0, atol=0)


def test_sft_loads_no_teacher(tmp_path):
    path = tiny.save(tmp_path / "s")
    pair = load_pair(recipe(str(tmp_path / "nowhere"), path, method="sft"), device=CPU)
    assert pair.teacher is None
    assert pair.vocab == VOCAB
    assert load_pair(recipe(None, path), device=CPU).teacher is None


def test_pair_with_different_vocabularies_is_rejected(tmp_path):
    teacher = tiny.save(tmp_path / "t")
    path = tiny.save(tmp_path / "s", own_tokenizer=tiny.tokenizer("abcdefghijklmnopqrstuvwxzy", size=VOCAB))
    with raises_code("model.different_vocabularies", "token 27", "'y'", "'z'"):
        load_pair(recipe(teacher, path), device=CPU)


@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_pair_uses_the_shared_part_of_the_vocabularies(larger, tmp_path):
    chat_tokenizer = tiny.tokenizer(size=VOCAB)
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    tokenizers = {"teacher": None, "student": None, larger: chat_tokenizer}
    paths = {
        name: tiny.save(tmp_path / name, rows=48, own_tokenizer=tokenizer) for name, tokenizer in tokenizers.items()
    }
    pair = load_pair(recipe(paths["teacher"], paths["student"]), device=CPU)
    assert pair.vocab == pair.teacher.vocab == pair.student.vocab == VOCAB
    assert vocabulary_size(pair.tokenizer) == VOCAB


def test_tokenizer_that_cannot_be_reloaded_is_rejected(tmp_path):
    """Check Qwen2, whose directories are read with the Qwen2 tokenizer class, and Llama, which has none."""
    texts = ["Pronounce the word.\nchump\n", "CH AH M P"]
    for family, fits in (("qwen2", False), ("llama", True)):
        file = tmp_path / f"{family}.json"
        tiny.config(family, 101).to_json_file(file)
        recipe = Recipe(method="sft", student=StudentConfig(path=str(file), tokenizer="chars"))
        if fits:
            pair = load_pair(recipe, device=CPU, texts=lambda _: iter(texts))
            assert pair.tokenizer.decode(pair.tokenizer(texts[0])["input_ids"]) == texts[0]
            continue
        with raises_code("model.tokenizer_not_kept", "qwen2") as caught:
            load_pair(recipe, device=CPU, texts=lambda _: iter(texts))
        assert caught.value.exit_code == 4


def test_warning_about_replaced_student_tokenizer(tmp_path):
    teacher = tiny.save(tmp_path / "teacher")
    own, events = tiny.tokenizer(size=tiny.VOCAB), []
    own.add_special_tokens({"additional_special_tokens": ["<im_start>", "<im_end>"]})
    own.chat_template = "{% for m in messages %}<im_start>{{ m['content'] }}<im_end>{% endfor %}"
    student = tiny.save(tmp_path / "student", rows=len(own), own_tokenizer=own)
    recipe = Recipe(teacher={"path": teacher}, student={"path": student})
    pair = load_pair(recipe, device=torch.device("cpu"), listener=events.append)
    assert len(pair.tokenizer) == tiny.VOCAB
    (warning,) = [event.text for event in events if isinstance(event, Warned)]
    assert warning.endswith("its own tokens <im_end>, <im_start> and chat template are dropped")
    events.clear()
    swapped = Recipe(teacher={"path": student}, student={"path": teacher})
    load_pair(swapped, device=torch.device("cpu"), listener=events.append)
    assert not [event for event in events if isinstance(event, Warned)], "the student has the smaller vocabulary"


def test_longrope_bound_is_read_from_config():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    llama = tiny.config("llama", rope_parameters=rope | {"original_max_position_embeddings": 24})
    assert longrope_bound(llama) == 24
    assert longrope_bound(tiny.config("llama")) is None


def test_reloaded_teacher_uses_its_own_logits(tmp_path):
    """Check Switch, which scales the input of its head only in its own forward."""
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "num_experts": 2}
    ids = {"vocab_size": tiny.VOCAB, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1}
    switch = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("switch_transformers", **ids, **sizes))
    switch.save_pretrained(tmp_path / "teacher")
    tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / "teacher")
    recipe = Recipe(teacher={"path": str(tmp_path / "teacher")}, student={"path": tiny.save(tmp_path / "t5", "t5")})
    pair, batch = load_pair(recipe, device=torch.device("cpu")), tiny.batch([(3, 4), (5, 2)], tiny.VOCAB)
    assert not pair.teacher.check_head(batch)
    rebuilt = reload_teacher(recipe, pair, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.head().logits(rebuilt(batch)), pair.teacher.logits(batch))
