"""Test encoder-decoders: states, heads, decoding and training, each against plain transformers."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch.testing import assert_close

from distillm_cli.config.schema import DataConfig, ObjectiveConfig, RolloutConfig, ScheduleConfig, TrainConfig
from distillm_cli.data.batching import tokenize
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.rows import Row
from distillm_cli.data.teacher_samples import TeacherSamples, encode_teacher_samples
from distillm_cli.errors import Interrupted
from distillm_cli.losses import objectives
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.loading import load_backbone
from distillm_cli.models.pair import check_architectures
from distillm_cli.models.seq2seq import split_batch
from distillm_cli.models.students import build_from_config, build_random
from distillm_cli.models.trained_tokenizers import append_eos
from distillm_cli.rollouts.pool import SequencePool
from distillm_cli.rollouts.sampler import ModelSampler, Sampling, sample
from distillm_cli.rollouts.scheduler import build_scheduler
from distillm_cli.teachers.cached import BatchComposition, CachedTeacher, HiddenStateTable
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.training.checkpoint import Checkpoints
from distillm_cli.training.events import Stepped
from distillm_cli.training.state import RunInfo
from distillm_cli.training.trainer import Trainer
from distillm_cli.training.validation import Validator
from distillm_cli.types import Sequence, collate
from distillm_cli.utils.modules import eval_mode
from tests import tiny
from tests.codes import raises_code

VOCAB, ROWS = 97, 101
DataConfig = partial(DataConfig, max_length=512, max_prompt_length=256)  # as in a run whose models are known

FAMILIES = sorted(tiny.SEQ2SEQ)
LENGTHS = [(3, 4), (7, 9), (5, 2), (1, 1)]
START, PAD, EOS = 1, 1, 0


@cache
def tokenizer():
    return tiny.tokenizer(size=VOCAB)


def backbone(family: str, **fields) -> Backbone:
    return Backbone(tiny.model(family, ROWS, **fields), tokenizer())


@cache
def shared(family: str) -> Backbone:
    """Return one backbone per family. Tests that modify a backbone build their own."""
    return backbone(family)


def prompts(lengths=(3, 19, 6, 18, 17, 1)) -> list[np.ndarray]:
    return [s.prompt for s in tiny.sequences([(n, 1) for n in lengths], VOCAB, seed=3)]


def plain_logits(model, sequence: Sequence) -> torch.Tensor:
    """Return logits [R, V] of one response by transformers' forward, with the response shifted by the start token."""
    prompt = torch.from_numpy(sequence.prompt.astype(np.int64))[None]
    response = torch.from_numpy(sequence.response.astype(np.int64))
    decoder = torch.cat([torch.tensor([START]), response[:-1]])[None]
    return model(input_ids=prompt, decoder_input_ids=decoder, use_cache=False).logits[0, :, :VOCAB]


# Batches and heads


def test_split_batch_restores_prompts_and_responses():
    sequences = tiny.sequences(LENGTHS, VOCAB)
    parts = split_batch(collate(sequences), START)
    assert parts.ids_BS.shape == parts.mask_BS.shape == (4, 7)
    for b, s in enumerate(sequences):
        assert parts.mask_BS[b].sum() == len(s.prompt)
        assert parts.ids_BS[b, : len(s.prompt)].tolist() == s.prompt.tolist()
        assert parts.decoder_ids_BR[b, : len(s.response)].tolist() == [START, *s.response[:-1].tolist()]
    assert parts.positions_N.tolist() == [b * 9 + t for b, s in enumerate(sequences) for t in range(len(s.response))]
    assert split_batch(collate(tiny.sequences([(3, 4), (3, 2)], VOCAB)), START).mask_BS is None, (
        "no mask without padding"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_head_match_model_logits_and_gradients(family):
    model = shared(family)
    sequences = tiny.sequences(LENGTHS, VOCAB)
    weights_NV = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(1))

    def gradients(logits_NV):
        model.zero_grad()
        (logits_NV.log_softmax(-1) * weights_NV).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    batch = collate(sequences)
    assert model.check_head(batch)
    found, plain = (
        model.head().logits(model(batch)),
        torch.cat([plain_logits(model.model, s) for s in sequences]),
    )
    assert plain.std() > 0.5, "a comparison of zeros would prove nothing"
    assert_close(found, plain, rtol=1e-4, atol=1e-4)
    assert_close(model.logits(batch), plain, rtol=1e-4, atol=1e-4)
    found, plain = gradients(found), gradients(plain)
    model.zero_grad()
    assert found.keys() == plain.keys()
    scale = max(g.abs().max() for g in plain.values())
    for name, gradient in found.items():
        assert_close(gradient / scale, plain[name] / scale, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "scale"), [("t5", 32**-0.5), ("t5-v1.1", 1.0), ("mt5", 1.0), ("umt5", 32**-0.5), ("bart", 1.0)]
)
def test_tied_t5_scales_its_head_by_the_width(family, scale):
    assert shared(family).head().scale == pytest.approx(scale)
    assert shared(family).head().weight_VD.shape == (VOCAB, 32)


def test_wrong_head_scale_is_detected():
    model = backbone("t5")
    model.head_scale = 1.0
    assert not model.check_head(tiny.batch(LENGTHS, VOCAB))
    assert model.own_logits
    sequences = tiny.sequences(LENGTHS, VOCAB)
    plain = torch.cat([plain_logits(model.model, s) for s in sequences])
    assert_close(model.head().logits(model(collate(sequences))), plain, rtol=1e-4, atol=1e-4)
    assert_close(forced(model, 8), forced(shared("t5"), 8), rtol=1e-3, atol=1e-3)


# Decoding


def forced(model: Backbone, steps: int) -> torch.Tensor:
    """Return logits [B, steps + 1, V] for given tokens, with rows dropped and reordered."""
    batch_prompts = prompts()
    tokens = torch.randint(VOCAB, (len(batch_prompts), steps), generator=torch.Generator().manual_seed(5))
    decoding, rows = model.decode(batch_prompts), torch.arange(len(batch_prompts))
    found = torch.full((len(batch_prompts), steps + 1, VOCAB), float("nan"))
    for step in range(steps + 1):
        if keep := {3: [5, 0, 1, 3], 6: [3, 1]}.get(step):
            decoding.keep(torch.tensor(keep))
            rows = rows[keep]
        found[rows, step] = decoding.logits(tokens[rows, step - 1] if step else None)
    return found.nan_to_num(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_matches_recomputing_everything(family):
    model, steps = backbone(family).train(), 40
    tokens = torch.randint(VOCAB, (6, steps), generator=torch.Generator().manual_seed(5))
    found = forced(model, steps)
    assert model.training
    assert all(module.training for module in model.model.modules()), "training mode is restored"
    model.eval()
    for row, prompt in enumerate(prompts()):
        logits = plain_logits(model.model, Sequence(prompt, np.append(tokens[row].numpy(), 0), row))
        is_decoded = found[row].abs().sum(-1) > 0
        assert is_decoded.sum() == {0: 41, 3: 41, 1: 6, 5: 6}.get(row, 3)
        assert_close(found[row][is_decoded], logits[is_decoded], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_decoding_is_close_to_float32(family):
    model = backbone(family)
    with torch.autocast("cpu", torch.bfloat16):
        found = forced(model, 8)
    exact = forced(model, 8)
    assert found.dtype == torch.float32
    assert (found - exact).square().mean().sqrt() < 0.1 * exact.std()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_samples_match_generate(family):
    # The cache of transformers counts encoder layers, and fails if the decoder has more.
    model = backbone(family, num_decoder_layers=2) if family == "t5-v1.1" else shared(family)
    batch_prompts = prompts()
    outputs = sample(
        model, batch_prompts, Sampling(temperature=0, max_new_tokens=12), [(0, i) for i in range(len(batch_prompts))]
    )
    for prompt, out in zip(batch_prompts, outputs, strict=True):
        expected = model.model.generate(
            torch.from_numpy(prompt.astype(np.int64))[None], do_sample=False, max_new_tokens=12, num_beams=1
        )[0, 1:]
        stop = [i for i, token in enumerate(expected.tolist()) if token == EOS]
        assert out.tokens.tolist() == expected.tolist()[: stop[0] + 1 if stop else None]


def test_sample_of_a_row_does_not_depend_on_its_batch():
    model, batch_prompts, sampling = shared("t5"), prompts(), Sampling(max_new_tokens=12)
    together = sample(model, batch_prompts, sampling, [(7, i) for i in range(6)], entropy=True)
    for i, prompt in enumerate(batch_prompts):
        (alone,) = sample(model, [prompt], sampling, [(7, i)], entropy=True)
        assert alone.tokens.tolist() == together[i].tokens.tolist()
        assert alone.entropy == pytest.approx(together[i].entropy, rel=1e-3)


class AlternatingModel:
    """Prefer the same two tokens alternately."""

    context, stop_ids, forced_first = None, frozenset({EOS}), None

    def __init__(self, is_encoder_decoder: bool):
        self.is_encoder_decoder, self.step = is_encoder_decoder, -1

    def decode(self, prompts):
        return self

    def logits(self, tokens_B):
        self.step += 1
        return torch.tensor([[3.0 if token == 5 + self.step % 2 else 1.0 - token / 9 for token in range(9)]])


def test_no_repeat_ngram_ignores_the_encoder_prompt():
    """Check that n-grams of the prompt count for causal models only, like in transformers."""
    sampling, prompt = Sampling(temperature=0, max_new_tokens=2, no_repeat_ngram_size=2), np.array([5, 6])
    outputs = {
        kind: sample(AlternatingModel(kind), [prompt], sampling, [(0, 0)])[0].tokens.tolist() for kind in (True, False)
    }
    assert outputs == {True: [5, 6], False: [5, 0]}

    model = shared("t5")
    for prompt in prompts((6, 9)):
        source = torch.from_numpy(prompt.astype(np.int64))[None]
        expected = model.model.generate(source, do_sample=False, max_new_tokens=20, no_repeat_ngram_size=2)[0, 1:]
        sampling = Sampling(temperature=0, max_new_tokens=20, no_repeat_ngram_size=2)
        assert sample(model, [prompt], sampling, [(0, 0)])[0].tokens.tolist() == expected.tolist()


# Students, pairs and prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_random_student_has_the_family_of_its_teacher(family):
    teacher = tiny.config(family, ROWS)
    made = build_random("random:3x64", tokenizer(), teacher_config=teacher, max_length=32, seed=1)
    config = made.config
    assert (type(made), config.model_type) == (type(shared(family).model), teacher.model_type)
    decoder_layers = {"t5-v1.1": 4}.get(family, 3)  # the teacher has half as many decoder layers again
    assert len(decoder_of(made)) == decoder_layers
    assert (config.hidden_size, config.num_hidden_layers, config.decoder_start_token_id) == (64, 3, PAD)
    assert made.generation_config.decoder_start_token_id == PAD
    student = Backbone(made, tokenizer())
    batch = tiny.batch(LENGTHS, VOCAB)
    assert student.check_head(batch)
    assert student.logits(batch).std() < 2, "embeddings with standard deviation 1 would give logits of √width"


def decoder_of(model) -> torch.nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.block if hasattr(decoder, "block") else decoder.layers


def test_random_t5_and_bart_from_a_config():
    made = build_random("random:t5:2x48", tokenizer(), teacher_config=None, max_length=32, seed=1)
    assert (made.config.model_type, made.config.d_model, made.config.num_layers) == ("t5", 48, 2)
    assert Backbone(made, tokenizer()).check_head(tiny.batch(LENGTHS, VOCAB))
    config = tiny.config("bart", ROWS, decoder_start_token_id=0)  # the end-of-sequence token
    other = tiny.tokenizer("abc")
    other.eos_token, other.pad_token = "c", "a"
    built = build_from_config(config, other, seed=1, where="config.json")
    assert built.config.decoder_start_token_id == other.eos_token_id != 0, (
        "the start token stays the end-of-sequence token"
    )


def test_encoder_prompt_and_response_end_with_end_token():
    row = Row(prompt="ab", references=("cd",), where="t:1")
    plain = tiny.tokenizer()
    ids = plain(["ab", "cd"])["input_ids"]
    eos = plain.eos_token_id
    made = Encoder(plain, DataConfig(), is_encoder_decoder=True).sequence(row, 0)
    assert made.prompt.tolist() == [*ids[0], eos], "also if the tokenizer adds no end token"
    assert made.response.tolist() == [*ids[1], eos]
    assert Encoder(plain, DataConfig()).prompt_ids(row).tolist() == ids[0], "prompts of causal models have no end token"

    t5 = tiny.tokenizer()
    append_eos(t5)
    assert t5("ab")["input_ids"] == [*ids[0], eos]
    assert Encoder(t5, DataConfig(), is_encoder_decoder=True).prompt_ids(row).tolist() == [*ids[0], eos]
    assert Encoder(t5, DataConfig()).prompt_ids(row).tolist() == ids[0]
    with_end_text = Row(prompt="ab<eos>", references=("cd",), where="t:1")
    assert Encoder(t5, DataConfig(), is_encoder_decoder=True).prompt_ids(with_end_text).tolist() == [*ids[0], eos]


def test_start_and_end_tokens_on_prompt_and_response():
    """Check a tokenizer like BART's. Its decoder was trained to generate the start token first."""
    bart = tiny.tokenizer()
    template = processors.TemplateProcessing(single="z $A <eos>", special_tokens=[("z", 28), ("<eos>", 0)])
    bart.backend_tokenizer.post_processor = template
    made = Encoder(bart, DataConfig(), is_encoder_decoder=True).sequence(
        Row(prompt="a", references=("b",), where=""), 0
    )
    assert (made.prompt.tolist(), made.response.tolist()) == ([28, 3, 0], [28, 4, 0])


def test_teacher_samples_have_the_special_tokens_of_rows():
    bart = tiny.tokenizer()
    template = processors.TemplateProcessing(single="z $A <eos>", special_tokens=[("z", 28), ("<eos>", 0)])
    bart.backend_tokenizer.post_processor = template
    row, data = Row(prompt="ab", references=("cd",), where="t:1"), DataConfig(template="plain")
    encoder = Encoder(bart, data, is_encoder_decoder=True)
    examples = tokenize([row], encoder, data)
    sample_row = replace(row, references=("dc",))
    by_row = encode_teacher_samples(
        TeacherSamples(Path("samples.jsonl"), [sample_row], {sample_row.key: [sample_row]}), examples, encoder, None
    )
    assert by_row[0][0].prompt.tolist() == examples.sequences[0].prompt.tolist() == [28, 3, 4, 0]
    assert by_row[0][0].response.tolist() == [28, 6, 5, 0]


def test_causal_and_encoder_decoder_pair_is_rejected():
    t5, llama = shared("t5"), Backbone(tiny.model("llama", ROWS), tokenizer())
    with raises_code("model.different_kinds", "t5", "llama") as e:
        check_architectures(t5, llama)
    assert e.value.exit_code == 4
    with raises_code("model.different_kinds", "llama", "t5"):
        check_architectures(llama, t5)
    check_architectures(t5, shared("mt5"))


@pytest.mark.parametrize("family", ["t5", "t5-v1.1", "mt5", "bart"])
def test_saved_model_reloads_with_the_same_logits(family, tmp_path):
    """Check that logits are bit-identical for tied and untied, scaled and unscaled heads."""
    tiny.save(tmp_path, family, rows=ROWS, own_tokenizer=tokenizer())
    reloaded = load_backbone(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    batch = tiny.batch(LENGTHS, VOCAB)
    assert reloaded.check_head(batch)
    assert torch.equal(reloaded.logits(batch), shared(family).logits(batch))
    assert (reloaded.model.lm_head.weight is reloaded.model.get_input_embeddings().weight) == (family in ("t5", "bart"))


def test_sentencepiece_file_without_tokenizer_json_loads(tmp_path):
    """Check a repository like google/t5-v1_1-xl and google/mt5-xl, which have no tokenizer.json."""
    pytest.importorskip("google.protobuf", reason="transformers reads spiece.model with it")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    pieces = ["<pad>", "</s>", "<unk>", *(f"▁{word}" for word in ["the", "a", "dog", "cat", "red"]), *"adegortch", "▁"]
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}  # control, control, unknown
    written = proto.ModelProto()
    for rank, piece in enumerate(pieces):
        written.pieces.add(piece=piece, score=-float(rank), type=kinds.get(piece, 1))
    written.trainer_spec.model_type, written.trainer_spec.unk_id = proto.TrainerSpec.UNIGRAM, 2
    (tmp_path / "spiece.model").write_bytes(written.SerializeToString())
    ids = {"eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0}
    tiny.model("t5", len(pieces) + 100, **ids).save_pretrained(tmp_path)
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 100}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer", **marks}))
    model = load_backbone(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    made = Encoder(model.tokenizer, DataConfig(template="plain"), is_encoder_decoder=True).sequence(
        Row(instruction="the red dog", references=("a cat",), where=""), 0
    )
    assert model.tokenizer.decode(made.prompt.tolist()) == "the red dog</s>"
    assert made.response[-1] == model.start + 1 == 1
    assert model.check_head(collate([made]))


# Training with the trainer of causal models


def build_trainer(
    tmp_path=None, *, steps=10, cached=False, student=None, teacher="t5-v1.1", listener=lambda event: None
):
    """Build an adaptive run with rollouts and replay, from one T5 with dropout 0.1 to another."""
    train = TrainConfig(batch_size=4, lr=1e-3, warmup=0, eval_steps=3, save_steps=1000, seed=5)
    rows = tiny.sequences([(3 + i % 5, 2 + i % 4) for i in range(24)], VOCAB, seed=2)
    student = student or backbone("t5", seed=1, spread=1.0)
    scheduler = build_scheduler(ScheduleConfig(epsilon=-10.0, capacity=8, levels=3), steps=steps, seed=5)

    def batches(step):
        return [rows[(step * 4 + i * 7) % len(rows)] for i in range(4)]

    model = backbone(teacher, seed=4)
    local_teacher = LocalTeacher(model)
    if cached:
        composition = BatchComposition(lambda step: [s.row for s in batches(step)], steps=6, rows=rows, max_rows=4)
        table = HiddenStateTable(rows)
        local_teacher = CachedTeacher(model, mode="memory", rows=table, composition=composition, caches_rollouts=True)
    student_loss = StudentLoss(student, objectives.build(ObjectiveConfig()), teacher_head=local_teacher.head)
    run = RunInfo(steps=steps, steps_per_epoch=6)
    held_out = [tiny.sequences([(4, 3), (5, 4), (3, 2)], VOCAB, seed=9)]
    return Trainer(
        student_loss,
        SequencePool(
            batches,
            scheduler,
            student=ModelSampler(student, RolloutConfig(max_new_tokens=5), max_length=16, seed=5),
            bulk=2,
            sampling=lambda: eval_mode(student_loss),
        ),
        local_teacher,
        validator=Validator(held_out, run, teacher=local_teacher, listener=listener),
        checkpoints=None if tmp_path is None else Checkpoints(tmp_path, student.model.save_pretrained, keep=2),
        config=train,
        run=run,
        listener=listener,
    )


def weights(engine):
    return {name: p.detach().clone() for name, p in engine.student_loss.named_parameters()}


@pytest.mark.parametrize(("family", "cached"), [("t5", False), ("mt5", True)], ids=["t5", "mt5, cached states"])
def test_resume_matches_uninterrupted_run(family, cached, tmp_path):
    def stop(event):
        if isinstance(event, Stepped) and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    torch.manual_seed(5)
    uninterrupted = build_trainer(cached=cached, student=backbone(family, seed=1, spread=1.0))
    result = uninterrupted.train()
    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        build_trainer(tmp_path, cached=cached, student=backbone(family, seed=1, spread=1.0), listener=stop).train()
    found = Checkpoints(tmp_path, lambda path: None, keep=1).latest()
    student = backbone(family, seed=8)
    student.model.load_state_dict(type(student.model).from_pretrained(found.path).state_dict())
    resumed = build_trainer(cached=cached, student=student)
    torch.manual_seed(999)
    resumed.load(found)
    resumed_result = resumed.train()
    assert resumed_result.sources == result.sources
    assert min(result.sources[source] for source in ("dataset", "rollout", "replay")) > 0
    for name, value in weights(uninterrupted).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_cached_teacher_states_match_live_ones():
    live, caching = (
        build_trainer(steps=18, cached=cached, student=backbone("t5", dropout_rate=0.0)) for cached in (False, True)
    )
    live.train(), caching.train()
    for name, value in weights(live).items():
        assert_close(weights(caching)[name], value, rtol=1e-3, atol=1e-4)
    assert caching.teacher.tokens < 0.8 * live.teacher.tokens


def test_gradient_checkpointing_does_not_change_results():
    # With these weights no random draw is so close to the border of two tokens that rounding decides between them.
    plain, checkpointing = (build_trainer(steps=4, student=backbone("t5", seed=1, dropout_rate=0.0)) for _ in range(2))
    model = checkpointing.student_loss.student.model
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    plain.train(), checkpointing.train()
    assert plain.state.sources["rollout"] > 0
    for name, value in weights(plain).items():
        assert_close(weights(checkpointing)[name], value, rtol=1e-3, atol=1e-4)


def test_loss_of_a_step_matches_the_definition():
    """Compare the skew KL of two T5s over ragged rows with the definition in float64."""
    engine = build_trainer(student=backbone("t5", seed=1).double())
    engine.teacher.model.double()
    student, teacher = engine.student_loss.student.model, engine.teacher.model.model
    sequences = tiny.sequences(LENGTHS, VOCAB)
    p = torch.cat([plain_logits(teacher, s) for s in sequences]).detach().softmax(-1)
    q = torch.cat([plain_logits(student, s) for s in sequences]).softmax(-1)
    expected = (p * (p / (0.1 * p + 0.9 * q)).log()).sum() / len(p)
    expected.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    student.zero_grad()
    engine.student_loss.eval()
    batch = collate(sequences)
    total, tokens = engine.student_loss([batch], engine.teacher.hidden(batch, sequences), engine.objective.held_out)
    (total / tokens).backward()
    assert (total / tokens).item() == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in student.named_parameters():
        assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-8)
