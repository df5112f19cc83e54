"""Loading models and tokenizers, what goes wrong there, and whether two models fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BertConfig

from distillm_cli.config.schema import Recipe, StudentConfig
from distillm_cli.errors import ModelError, UsageError
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

CPU = torch.device("cpu")
VOCAB = tiny.VOCAB
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def load(path: str, **options):
    return load_backbone(path, dtype=torch.float32, device=CPU, **options)


# Where and in what precision


def test_devices_are_named_or_found():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "cuda:99", "cpu:1"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UsageError, match=name) as caught:
        resolve_device(name)
    assert caught.value.exit_code == 2


def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch):
    """Torch asks the current GPU for bf16 and for the memory in use, whichever one the models are on."""
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
def test_auto_is_bf16_where_the_cpu_has_it(monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert bf16_is_fast(CPU) is fast
    assert resolve_dtype("auto", CPU) == (torch.bfloat16 if fast else torch.float32)
    assert [resolve_dtype(name, CPU) for name in ("fp32", "bf16", "fp16")] == [
        torch.float32,
        torch.bfloat16,
        torch.float16,
    ]


def test_an_older_torch_is_asked_in_its_own_way(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert bf16_is_fast(CPU)
    assert not bf16_is_fast(torch.device("mps"))


# Vocabularies


def test_equal_vocabularies_are_accepted_and_added_tokens_with_them():
    one, two = tiny.tokenizer(size=VOCAB), tiny.tokenizer(size=VOCAB)
    check_vocabularies(one, two)
    two.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    check_vocabularies(one, two)
    check_vocabularies(two, one)
    one.add_special_tokens({"additional_special_tokens": ["<user>", "<system>"]})
    with pytest.raises(ModelError, match=r"token 42 is '<bot>' for the teacher, '<system>' for the student"):
        check_vocabularies(two, one)


def test_the_same_size_with_different_tokens_is_refused_at_the_first_difference():
    with pytest.raises(ModelError, match=r"token 5 is 'c' for the teacher, 'y' for the student") as caught:
        check_vocabularies(tiny.tokenizer("abcdef"), tiny.tokenizer("abyxef"))
    assert caught.value.exit_code == 4


def test_a_larger_vocabulary_is_not_a_superset_by_special_tokens():
    with pytest.raises(ModelError, match=r"token 9, 'g', exists only in the student; teacher 9 tokens, student 10"):
        check_vocabularies(tiny.tokenizer("abcdef"), tiny.tokenizer("abcdefg"))
    with pytest.raises(ModelError, match=r"token 9, 'g', exists only in the teacher"):
        check_vocabularies(tiny.tokenizer("abcdefg"), tiny.tokenizer("abcdef"))


# Students and their tokenizers


def student(path: str | None, **options):
    fields = {name: options.pop(name) for name in ("tokenizer", "dropout") if name in options}
    options = {"seed": 0, "device": CPU, "max_length": 64} | options
    return create_student(StudentConfig(path=path, **fields), **options)


def test_a_student_is_loaded_in_float32_with_its_own_tokenizer(tmp_path):
    path = tiny.save(tmp_path / "m", own_tokenizer=tiny.tokenizer("abc", size=VOCAB))
    backbone = student(path, teacher=load(tiny.save(tmp_path / "t")))
    assert backbone.tokenizer.get_vocab() == tiny.tokenizer("abc", size=VOCAB).get_vocab()
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_a_student_without_a_tokenizer_takes_the_teachers(tmp_path):
    teacher = load(tiny.save(tmp_path / "t"))
    path = tiny.save(tmp_path / "m", "gpt2", own_tokenizer=False)
    backbone = student(path, teacher=teacher)
    assert backbone.tokenizer is teacher.tokenizer
    assert backbone.model.generation_config.eos_token_id == teacher.tokenizer.eos_token_id
    with pytest.raises(ModelError, match="has no tokenizer; pass --tokenizer"):
        student(path)


def test_dropout_is_set_in_a_loaded_student_too(tmp_path):
    path = tiny.save(tmp_path / "m", "gpt2")
    assert {m.p for m in student(path).modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert {m.p for m in student(path, dropout=0.0).modules() if isinstance(m, nn.Dropout)} == {0.0}


def test_from_scratch_with_a_tokenizer_from_a_directory_or_trained_on_the_data(tmp_path):
    place = tmp_path / "t"
    tiny.tokenizer(size=VOCAB).save_pretrained(place)
    assert student("random:1x16", tokenizer=str(place)).vocab == VOCAB
    backbone = student("random:1x16", tokenizer="chars", texts=lambda _: iter(["abc", "bcd"]))
    assert backbone.vocab == vocabulary_size(backbone.tokenizer) == backbone.model.config.vocab_size
    assert {"a", "b", "c", "d"} <= backbone.tokenizer.get_vocab().keys()
    with pytest.raises(ModelError, match="trained on data, but there is none"):
        student("random:1x16", tokenizer="chars")


def test_from_scratch_needs_some_tokenizer():
    with pytest.raises(ModelError, match=r"random:1x16 needs a tokenizer; pass --tokenizer"):
        student("random:1x16")
    with pytest.raises(UsageError, match="--student"):
        student(None)


def test_a_config_json_takes_the_tokenizer_beside_it_unless_there_is_a_teacher(tmp_path):
    path = Path(tiny.save(tmp_path / "m", "qwen3", rows=64, own_tokenizer=tiny.tokenizer("abc", size=VOCAB)))
    alone = student(str(path / "config.json"))
    assert alone.tokenizer.get_vocab() == tiny.tokenizer("abc", size=VOCAB).get_vocab()
    assert (alone.vocab, alone.model.config.vocab_size, alone.model.config.model_type) == (VOCAB, 64, "qwen3")
    assert not torch.equal(alone.model.lm_head.weight, load(str(path)).model.lm_head.weight)
    teacher = load(tiny.save(tmp_path / "t"))
    assert student(str(path / "config.json"), teacher=teacher).tokenizer is teacher.tokenizer
    with pytest.raises(ModelError, match="no model config at"):
        student(str(tmp_path / "missing.json"))


def test_a_config_json_of_no_causal_model_is_refused(tmp_path):
    BertConfig(vocab_size=VOCAB, num_hidden_layers=1, **SMALL).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not a causal language model"):
        student(str(tmp_path / "config.json"), teacher=load(tiny.save(tmp_path / "t")))


# Pairs


def recipe(teacher: str | None, path: str, method: str = "distillm", **fields) -> Recipe:
    sections = {"teacher": {"path": teacher, "dtype": "bf16"}, "student": {"path": path}}
    return Recipe.model_validate({"method": method, **sections, **fields})


def test_a_pair_shares_tokenizer_and_vocabulary_over_padded_matrices(tmp_path):
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


def test_a_random_student_follows_the_recipes_seed(tmp_path):
    teacher = tiny.save(tmp_path / "t", "opt")
    first, second, third = (
        load_pair(recipe(teacher, "random:1x32", train={"seed": seed}), device=CPU).student for seed in (10, 10, 11)
    )
    assert first.model.config.model_type == "opt"
    embeddings = [backbone.model.get_input_embeddings().weight for backbone in (first, second, third)]
    assert torch.equal(embeddings[0], embeddings[1])
    assert not torch.equal(embeddings[0], embeddings[2])


@pytest.mark.parametrize("kind", ["random", "config", "loaded"])
def test_both_models_can_be_had_again_as_they_were(kind, tmp_path):
    """For the figures of a run's start, which are taken at its end: when student and teacher are no more what they were."""
    teacher, other = tiny.save(tmp_path / "t", "gpt2"), tiny.save(tmp_path / "s", "llama", **SMALL)
    this = recipe(teacher, {"random": "random:1x16", "config": f"{other}/config.json", "loaded": other}[kind])
    pair = load_pair(this, device=CPU)
    before = {name: tensor.clone() for name, tensor in pair.student.model.state_dict().items()}
    theirs = {name: tensor.clone() for name, tensor in pair.teacher.model.state_dict().items()}
    for parameter in pair.student.parameters():
        parameter.data += 1
    pair.teacher.to("meta")
    again, teacher = rebuild_student(this, pair, CPU), reload_teacher(this, pair, CPU)
    for model, true in ((again, before), (teacher, theirs)):
        assert (model.vocab, model.tokenizer.get_vocab()) == (pair.vocab, pair.tokenizer.get_vocab())
        torch.testing.assert_close(dict(model.model.state_dict()), true, rtol=0, atol=0)


def test_sft_loads_no_teacher(tmp_path):
    path = tiny.save(tmp_path / "s")
    pair = load_pair(recipe(str(tmp_path / "nowhere"), path, method="sft"), device=CPU)
    assert pair.teacher is None
    assert pair.vocab == VOCAB
    assert load_pair(recipe(None, path), device=CPU).teacher is None


def test_a_pair_that_speaks_different_tokens_is_refused(tmp_path):
    teacher = tiny.save(tmp_path / "t")
    path = tiny.save(tmp_path / "s", own_tokenizer=tiny.tokenizer("abcdefghijklmnopqrstuvwxzy", size=VOCAB))
    with pytest.raises(ModelError, match=r"token 27 is 'y' for the teacher, 'z' for the student"):
        load_pair(recipe(teacher, path), device=CPU)


@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_only_the_shared_part_meets_the_loss_where_one_has_more_special_tokens(larger, tmp_path):
    chatty = tiny.tokenizer(size=VOCAB)
    chatty.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    tokenizers = {"teacher": None, "student": None, larger: chatty}
    paths = {
        name: tiny.save(tmp_path / name, rows=48, own_tokenizer=tokenizer) for name, tokenizer in tokenizers.items()
    }
    pair = load_pair(recipe(paths["teacher"], paths["student"]), device=CPU)
    assert pair.vocab == pair.teacher.vocab == pair.student.vocab == VOCAB
    assert vocabulary_size(pair.tokenizer) == VOCAB


def test_a_tokenizer_that_the_output_directory_would_not_give_back_is_refused(tmp_path):
    """transformers reads a Qwen2 directory with Qwen2's own tokenizer, whatever was saved there; a Llama one as it is."""
    texts = ["Pronounce the word.\nchump\n", "CH AH M P"]
    for family, fits in (("qwen2", False), ("llama", True)):
        file = tmp_path / f"{family}.json"
        tiny.config(family, 101).to_json_file(file)
        recipe = Recipe(method="sft", student=StudentConfig(path=str(file), tokenizer="chars"))
        if fits:
            pair = load_pair(recipe, device=CPU, texts=lambda _: iter(texts))
            assert pair.tokenizer.decode(pair.tokenizer(texts[0])["input_ids"]) == texts[0]
            continue
        with pytest.raises(ModelError, match="qwen2 model's directory is always loaded with qwen2's own") as caught:
            load_pair(recipe, device=CPU, texts=lambda _: iter(texts))
        assert caught.value.exit_code == 4


def test_what_a_student_loses_with_its_own_tokenizer_is_said(tmp_path):
    teacher = tiny.save(tmp_path / "teacher")
    own, events = tiny.tokenizer(size=tiny.VOCAB), []
    own.add_special_tokens({"additional_special_tokens": ["<im_start>", "<im_end>"]})
    own.chat_template = "{% for m in messages %}<im_start>{{ m['content'] }}<im_end>{% endfor %}"
    student = tiny.save(tmp_path / "student", rows=len(own), own_tokenizer=own)
    recipe = Recipe(teacher={"path": teacher}, student={"path": student})
    pair = load_pair(recipe, device=torch.device("cpu"), listener=events.append)
    assert len(pair.tokenizer) == tiny.VOCAB
    (told,) = [event.text for event in events if isinstance(event, Warned)]
    assert told.endswith("its own tokens <im_end>, <im_start> and chat template are dropped")
    events.clear()
    turned = Recipe(teacher={"path": student}, student={"path": teacher})
    load_pair(turned, device=torch.device("cpu"), listener=events.append)
    assert not [event for event in events if isinstance(event, Warned)], "the smaller vocabulary is kept"


def test_where_longrope_changes_its_factors_is_read_from_the_config():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    llama = tiny.config("llama", rope_parameters=rope | {"original_max_position_embeddings": 24})
    assert longrope_bound(llama) == 24
    assert longrope_bound(tiny.config("llama")) is None


def test_a_teacher_that_comes_back_answers_by_its_own_logits_where_it_did_before(tmp_path):
    """A Switch scales what its head reads, in a way that only its own forward knows."""
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "num_experts": 2}
    ids = {"vocab_size": tiny.VOCAB, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1}
    switch = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("switch_transformers", **ids, **sizes))
    switch.save_pretrained(tmp_path / "teacher")
    tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / "teacher")
    recipe = Recipe(teacher={"path": str(tmp_path / "teacher")}, student={"path": tiny.save(tmp_path / "t5", "t5")})
    pair, batch = load_pair(recipe, device=torch.device("cpu")), tiny.batch([(3, 4), (5, 2)], tiny.VOCAB)
    assert not pair.teacher.check_head(batch)
    again = reload_teacher(recipe, pair, torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(again.head().logits(again(batch)), pair.teacher.logits(batch))
