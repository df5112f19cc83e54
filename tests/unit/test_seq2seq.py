"""Encoder-decoders behind the face of causal models: states, heads, decoding and the engine, each against the plain way."""

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
from distillm_cli.errors import Interrupted, ModelError
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

VOCAB, ROWS = 97, 101
DataConfig = partial(DataConfig, max_length=512, max_prompt_length=256)  # as of a run whose models are known

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
    """One backbone per family; tests that change something build their own."""
    return backbone(family)


def prompts(lengths=(3, 19, 6, 18, 17, 1)) -> list[np.ndarray]:
    return [s.prompt for s in tiny.sequences([(n, 1) for n in lengths], VOCAB, seed=3)]


def plainly(model, sequence: Sequence) -> torch.Tensor:
    """Logits [R, V] of one response, as anybody would write it: prompt in, response shifted by the start token."""
    prompt = torch.from_numpy(sequence.prompt.astype(np.int64))[None]
    response = torch.from_numpy(sequence.response.astype(np.int64))
    decoder = torch.cat([torch.tensor([START]), response[:-1]])[None]
    return model(input_ids=prompt, decoder_input_ids=decoder, use_cache=False).logits[0, :, :VOCAB]


# Batches and heads


def test_a_batch_is_taken_apart_into_what_it_was_made_of():
    sequences = tiny.sequences(LENGTHS, VOCAB)
    parts = split_batch(collate(sequences), START)
    assert parts.ids_BS.shape == parts.mask_BS.shape == (4, 7)
    for b, s in enumerate(sequences):
        assert parts.mask_BS[b].sum() == len(s.prompt)
        assert parts.ids_BS[b, : len(s.prompt)].tolist() == s.prompt.tolist()
        assert parts.decoder_ids_BR[b, : len(s.response)].tolist() == [START, *s.response[:-1].tolist()]
    assert parts.positions_N.tolist() == [b * 9 + t for b, s in enumerate(sequences) for t in range(len(s.response))]
    assert split_batch(collate(tiny.sequences([(3, 4), (3, 2)], VOCAB)), START).mask_BS is None, "nothing is padded"


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_head_give_the_models_own_logits_in_values_and_gradients(family):
    model = shared(family)
    sequences = tiny.sequences(LENGTHS, VOCAB)
    weights_NV = torch.randn(16, VOCAB, generator=torch.Generator().manual_seed(1))

    def gradients(logits_NV):
        model.zero_grad()
        (logits_NV.log_softmax(-1) * weights_NV).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    batch = collate(sequences)
    assert model.check_head(batch)
    ours, plain = (
        model.head().logits(model(batch)),
        torch.cat([plainly(model.model, s) for s in sequences]),
    )
    assert plain.std() > 0.5, "a comparison of zeros would prove nothing"
    assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert_close(model.logits(batch), plain, rtol=1e-4, atol=1e-4)
    ours, plain = gradients(ours), gradients(plain)
    model.zero_grad()
    assert ours.keys() == plain.keys()
    scale = max(g.abs().max() for g in plain.values())
    for name, gradient in ours.items():
        assert_close(gradient / scale, plain[name] / scale, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("family", "scale"), [("t5", 32**-0.5), ("t5-v1.1", 1.0), ("mt5", 1.0), ("umt5", 32**-0.5), ("bart", 1.0)]
)
def test_a_tied_t5_scales_its_head_by_the_width(family, scale):
    assert shared(family).head().scale == pytest.approx(scale)
    assert shared(family).head().weight_VD.shape == (VOCAB, 32)


def test_a_head_that_is_scaled_otherwise_than_its_config_says_is_found_out():
    model = backbone("t5")
    model._scale = 1.0
    assert not model.check_head(tiny.batch(LENGTHS, VOCAB))
    assert model.own_logits
    sequences = tiny.sequences(LENGTHS, VOCAB)
    plain = torch.cat([plainly(model.model, s) for s in sequences])
    assert_close(model.head().logits(model(collate(sequences))), plain, rtol=1e-4, atol=1e-4)
    assert_close(forced(model, 8), forced(shared("t5"), 8), rtol=1e-3, atol=1e-3)


# Decoding


def forced(model: Backbone, steps: int) -> torch.Tensor:
    """Logits [B, steps + 1, V] when each row goes on with tokens given beforehand; rows leave and change places."""
    given = prompts()
    tokens = torch.randint(VOCAB, (len(given), steps), generator=torch.Generator().manual_seed(5))
    decoding, rows = model.decode(given), torch.arange(len(given))
    found = torch.full((len(given), steps + 1, VOCAB), float("nan"))
    for step in range(steps + 1):
        if keep := {3: [5, 0, 1, 3], 6: [3, 1]}.get(step):
            decoding.keep(torch.tensor(keep))
            rows = rows[keep]
        found[rows, step] = decoding.logits(tokens[rows, step - 1] if step else None)
    return found.nan_to_num(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_the_same_as_recomputing_everything(family):
    model, steps = backbone(family).train(), 40
    tokens = torch.randint(VOCAB, (6, steps), generator=torch.Generator().manual_seed(5))
    found = forced(model, steps)
    assert model.training
    assert all(module.training for module in model.model.modules()), "modes come back"
    model.eval()
    for row, prompt in enumerate(prompts()):
        logits = plainly(model.model, Sequence(prompt, np.append(tokens[row].numpy(), 0), row))
        told = found[row].abs().sum(-1) > 0
        assert told.sum() == {0: 41, 3: 41, 1: 6, 5: 6}.get(row, 3)
        assert_close(found[row][told], logits[told], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_decodes_in_a_copy_as_far_from_float32_as_bf16_is(family):
    model = backbone(family)
    with torch.autocast("cpu", torch.bfloat16):
        found = forced(model, 8)
    exact = forced(model, 8)
    assert found.dtype == torch.float32
    assert (found - exact).square().mean().sqrt() < 0.1 * exact.std()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_samples_equal_transformers_generate(family):
    # transformers' own cache counts the encoder's layers, and fails where the decoder has more.
    model = backbone(family, num_decoder_layers=2) if family == "t5-v1.1" else shared(family)
    given = prompts()
    outputs = sample(model, given, Sampling(temperature=0, max_new_tokens=12), [(0, i) for i in range(len(given))])
    for prompt, out in zip(given, outputs, strict=True):
        expected = model.model.generate(
            torch.from_numpy(prompt.astype(np.int64))[None], do_sample=False, max_new_tokens=12, num_beams=1
        )[0, 1:]
        stop = [i for i, token in enumerate(expected.tolist()) if token == EOS]
        assert out.tokens.tolist() == expected.tolist()[: stop[0] + 1 if stop else None]


def test_a_row_is_sampled_the_same_whatever_else_is_in_the_batch():
    model, given, sampling = shared("t5"), prompts(), Sampling(max_new_tokens=12)
    together = sample(model, given, sampling, [(7, i) for i in range(6)], entropy=True)
    for i, prompt in enumerate(given):
        (alone,) = sample(model, [prompt], sampling, [(7, i)], entropy=True)
        assert alone.tokens.tolist() == together[i].tokens.tolist()
        assert alone.entropy == pytest.approx(together[i].entropy, rel=1e-3)


class Says:
    """A decoder that wants to say the same two tokens for ever."""

    context, stop_ids, forced_first = None, frozenset({EOS}), None

    def __init__(self, is_encoder_decoder: bool):
        self.is_encoder_decoder, self.step = is_encoder_decoder, -1

    def decode(self, prompts):
        return self

    def logits(self, tokens_B):
        self.step += 1
        return torch.tensor([[3.0 if token == 5 + self.step % 2 else 1.0 - token / 9 for token in range(9)]])


def test_an_n_gram_of_the_prompt_may_be_said_by_an_encoder_decoder():
    """A summary may quote: as in transformers only the response counts, while a causal model's prompt does."""
    sampling, prompt = Sampling(temperature=0, max_new_tokens=2, no_repeat_ngram_size=2), np.array([5, 6])
    said = {kind: sample(Says(kind), [prompt], sampling, [(0, 0)])[0].tokens.tolist() for kind in (True, False)}
    assert said == {True: [5, 6], False: [5, 0]}

    model = shared("t5")
    for prompt in prompts((6, 9)):
        source = torch.from_numpy(prompt.astype(np.int64))[None]
        expected = model.model.generate(source, do_sample=False, max_new_tokens=20, no_repeat_ngram_size=2)[0, 1:]
        sampling = Sampling(temperature=0, max_new_tokens=20, no_repeat_ngram_size=2)
        assert sample(model, [prompt], sampling, [(0, 0)])[0].tokens.tolist() == expected.tolist()


# Students, pairs and prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_student_of_an_encoder_decoder_is_one_of_its_family_with_calm_first_logits(family):
    teacher = tiny.config(family, ROWS)
    made = build_random("random:3x64", tokenizer(), teacher_config=teacher, max_length=32, seed=1)
    config = made.config
    assert (type(made), config.model_type) == (type(shared(family).model), teacher.model_type)
    decoder_layers = {"t5-v1.1": 4}.get(family, 3)  # the teacher's has half as many again
    assert len(decoder_of(made)) == decoder_layers
    assert (config.hidden_size, config.num_hidden_layers, config.decoder_start_token_id) == (64, 3, PAD)
    assert made.generation_config.decoder_start_token_id == PAD
    student = Backbone(made, tokenizer())
    batch = tiny.batch(LENGTHS, VOCAB)
    assert student.check_head(batch)
    assert student.logits(batch).std() < 2, "an embedding of spread 1 as a head would begin at √width"


def decoder_of(model) -> torch.nn.ModuleList:
    decoder = model.get_decoder()
    return decoder.block if hasattr(decoder, "block") else decoder.layers


def test_random_t5_without_a_teacher_and_from_a_config_file():
    made = build_random("random:t5:2x48", tokenizer(), teacher_config=None, max_length=32, seed=1)
    assert (made.config.model_type, made.config.d_model, made.config.num_layers) == ("t5", 48, 2)
    assert Backbone(made, tokenizer()).check_head(tiny.batch(LENGTHS, VOCAB))
    config = tiny.config("bart", ROWS, decoder_start_token_id=0)  # its end-of-sequence
    other = tiny.tokenizer("abc")
    other.eos_token, other.pad_token = "c", "a"
    built = build_from_config(config, other, seed=1, where="config.json")
    assert built.config.decoder_start_token_id == other.eos_token_id != 0, "the role stays, the token changes"


def test_the_prompt_ends_as_the_tokenizer_ends_a_text_and_the_response_with_end_of_sequence():
    row = Row(prompt="ab", references=("cd",), where="t:1")
    plain = tiny.tokenizer()
    ids = plain(["ab", "cd"])["input_ids"]
    eos = plain.eos_token_id
    made = Encoder(plain, DataConfig(), is_encoder_decoder=True).sequence(row, 0)
    assert made.prompt.tolist() == [*ids[0], eos], "even where the tokenizer puts nothing there"
    assert made.response.tolist() == [*ids[1], eos]
    assert Encoder(plain, DataConfig()).prompt_ids(row).tolist() == ids[0], "a causal model's prompt is not at its end"

    t5 = tiny.tokenizer()
    append_eos(t5)
    assert t5("ab")["input_ids"] == [*ids[0], eos]
    assert Encoder(t5, DataConfig(), is_encoder_decoder=True).prompt_ids(row).tolist() == [*ids[0], eos]
    assert Encoder(t5, DataConfig()).prompt_ids(row).tolist() == ids[0]
    spelled = Row(prompt="ab<eos>", references=("cd",), where="t:1")
    assert Encoder(t5, DataConfig(), is_encoder_decoder=True).prompt_ids(spelled).tolist() == [*ids[0], eos]


def test_a_tokenizer_with_marks_on_both_sides_keeps_them_on_either_text():
    """BART's: the response begins with the mark that its decoder was trained to say first."""
    bart = tiny.tokenizer()
    template = processors.TemplateProcessing(single="z $A <eos>", special_tokens=[("z", 28), ("<eos>", 0)])
    bart.backend_tokenizer.post_processor = template
    made = Encoder(bart, DataConfig(), is_encoder_decoder=True).sequence(
        Row(prompt="a", references=("b",), where=""), 0
    )
    assert (made.prompt.tolist(), made.response.tolist()) == ([28, 3, 0], [28, 4, 0])


def test_the_teachers_samples_from_a_file_have_the_prompt_and_the_ends_that_their_rows_have():
    bart = tiny.tokenizer()
    template = processors.TemplateProcessing(single="z $A <eos>", special_tokens=[("z", 28), ("<eos>", 0)])
    bart.backend_tokenizer.post_processor = template
    row, data = Row(prompt="ab", references=("cd",), where="t:1"), DataConfig(template="plain")
    encoder = Encoder(bart, data, is_encoder_decoder=True)
    examples = tokenize([row], encoder, data)
    said = replace(row, references=("dc",))
    by_row = encode_teacher_samples(
        TeacherSamples(Path("said.jsonl"), [said], {said.key: [said]}), examples, encoder, None
    )
    assert by_row[0][0].prompt.tolist() == examples.sequences[0].prompt.tolist() == [28, 3, 4, 0]
    assert by_row[0][0].response.tolist() == [28, 6, 5, 0]


def test_a_causal_and_an_encoder_decoder_model_are_no_pair():
    t5, llama = shared("t5"), Backbone(tiny.model("llama", ROWS), tokenizer())
    with pytest.raises(
        ModelError, match=r"teacher is an encoder-decoder model \(t5\) and the student a causal model"
    ) as e:
        check_architectures(t5, llama)
    assert e.value.exit_code == 4
    with pytest.raises(ModelError, match=r"teacher is a causal model \(llama\) and the student an encoder-decoder"):
        check_architectures(llama, t5)
    check_architectures(t5, shared("mt5"))


@pytest.mark.parametrize("family", ["t5", "t5-v1.1", "mt5", "bart"])
def test_a_published_directory_loads_as_it_was(family, tmp_path):
    """Untied heads stay untied, scaled ones scaled: logits after ``save_pretrained`` and loading are the same bits."""
    tiny.save(tmp_path, family, rows=ROWS, own_tokenizer=tokenizer())
    again = load_backbone(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    batch = tiny.batch(LENGTHS, VOCAB)
    assert again.check_head(batch)
    assert torch.equal(again.logits(batch), shared(family).logits(batch))
    assert (again.model.lm_head.weight is again.model.get_input_embeddings().weight) == (family in ("t5", "bart"))


def test_a_repository_with_a_sentencepiece_file_alone_is_read(tmp_path):
    """As google/t5-v1_1-xl and google/mt5-xl are published: no tokenizer.json."""
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


# The engine: the one of causal models, untouched


def engine_of(tmp_path=None, *, steps=10, kept=False, student=None, teacher="t5-v1.1", listener=lambda event: None):
    """An adaptive run with rollouts and replay from a T5 (dropout 0.1) against another."""
    train = TrainConfig(batch_size=4, lr=1e-3, warmup=0, eval_steps=3, save_steps=1000, seed=5)
    rows = tiny.sequences([(3 + i % 5, 2 + i % 4) for i in range(24)], VOCAB, seed=2)
    student = student or backbone("t5", seed=1, spread=1.0)
    scheduler = build_scheduler(ScheduleConfig(epsilon=-10.0, capacity=8, levels=3), steps=steps, seed=5)

    def batches(step):
        return [rows[(step * 4 + i * 7) % len(rows)] for i in range(4)]

    model = backbone(teacher, seed=4)
    asked = LocalTeacher(model)
    if kept:
        composition = BatchComposition(batches, steps=6, rows=rows, max_rows=4)
        table = HiddenStateTable(rows)
        asked = CachedTeacher(model, mode="memory", rows=table, composition=composition, caches_rollouts=True)
    student_loss = StudentLoss(student, objectives.build(ObjectiveConfig()), teacher_head=asked.head)
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
        asked,
        validator=Validator(held_out, run, teacher=asked, listener=listener),
        checkpoints=None if tmp_path is None else Checkpoints(tmp_path, student.model.save_pretrained, keep=2),
        config=train,
        run=run,
        listener=listener,
    )


def weights(engine):
    return {name: p.detach().clone() for name, p in engine.student_loss.named_parameters()}


@pytest.mark.parametrize(("family", "kept"), [("t5", False), ("mt5", True)], ids=["t5", "mt5, states kept"])
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(family, kept, tmp_path):
    def stop(event):
        if isinstance(event, Stepped) and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    torch.manual_seed(5)
    whole = engine_of(kept=kept, student=backbone(family, seed=1, spread=1.0))
    done = whole.train()
    torch.manual_seed(5)
    with pytest.raises(Interrupted):
        engine_of(tmp_path, kept=kept, student=backbone(family, seed=1, spread=1.0), listener=stop).train()
    found = Checkpoints(tmp_path, lambda path: None, keep=1).latest()
    student = backbone(family, seed=8)
    student.model.load_state_dict(type(student.model).from_pretrained(found.path).state_dict())
    resumed = engine_of(kept=kept, student=student)
    torch.manual_seed(999)
    resumed.load(found)
    again = resumed.train()
    assert again.sources == done.sources
    assert min(done.sources[source] for source in ("dataset", "rollout", "replay")) > 0
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def test_keeping_the_teachers_states_changes_nothing_but_rounding_and_asks_once():
    live, keeping = (engine_of(steps=18, kept=kept, student=backbone("t5", dropout_rate=0.0)) for kept in (False, True))
    live.train(), keeping.train()
    for name, value in weights(live).items():
        assert_close(weights(keeping)[name], value, rtol=1e-3, atol=1e-4)
    assert keeping.teacher.tokens < 0.8 * live.teacher.tokens


def test_gradient_checkpointing_changes_memory_and_nothing_else():
    plain, saving = (engine_of(steps=4, student=backbone("t5", dropout_rate=0.0)) for _ in range(2))
    model = saving.student_loss.student.model
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    plain.train(), saving.train()
    assert plain.state.sources["rollout"] > 0
    for name, value in weights(plain).items():
        assert_close(weights(saving)[name], value, rtol=1e-3, atol=1e-4)


def test_the_loss_of_a_step_is_the_definition_in_float64():
    """Skew KL of two T5s over ragged rows, response tokens only, against probabilities written out."""
    engine = engine_of(student=backbone("t5", seed=1).double())
    engine.teacher.model.double()
    student, teacher = engine.student_loss.student.model, engine.teacher.model.model
    sequences = tiny.sequences(LENGTHS, VOCAB)
    p = torch.cat([plainly(teacher, s) for s in sequences]).detach().softmax(-1)
    q = torch.cat([plainly(student, s) for s in sequences]).softmax(-1)
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
