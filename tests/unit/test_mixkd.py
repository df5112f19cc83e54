"""Test distillation on mixtures of input embeddings."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config.extras import MixKDConfig
from distillm_cli.extras.mixkd import MixKD, mix_pairs
from distillm_cli.losses import objectives
from distillm_cli.losses.divergences import KL
from distillm_cli.losses.extra import MicroRows, StudentPass
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import LossWeights
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import Sequence, collate, micro_batches
from tests import tiny

VOCAB = 41
EXACT = {"rtol": 1e-9, "atol": 1e-9}
FIRST = tiny.sequences([(5, 3), (2, 6), (7, 2)], VOCAB, seed=3)
SECOND = tiny.sequences([(2, 5), (4, 1), (7, 4)], VOCAB, seed=4)
FAMILIES = ["llama", "gpt2", "t5", "bart"]


def models(family):
    tokenizer = tiny.tokenizer(size=VOCAB)
    return [
        Backbone(tiny.model(family, VOCAB, seed=seed, **fields).double(), tokenizer)
        for seed, fields in ((1, {}), (2, {}))
    ]


def extra(teacher, *, kd=1.0, ce=1.0, **options):
    config = MixKDConfig(kd_weight=kd, ce_weight=ce)
    options = {"alpha": 0.4, "seed": 7, "is_encoder_decoder": teacher.is_encoder_decoder} | options
    return MixKD(teacher, config, **options)


def loss_of(mixkd, student, mixed, *, source=Source.DATASET):
    done = StudentPass(
        student=student,
        source=source,
        batches=(),
        hidden_ND=torch.zeros(1),
        targets_N=torch.zeros(0, dtype=torch.int64),
        teacher_hidden_ND=None,
        weights=LossWeights(kd=1.0, ce=0.0, divergence=KL()),
        scale=1.0,
        drawn=mixed,
    )
    return mixkd.loss(done)


def plain_loss(student, teacher, sequences, *, kd=1.0, ce=1.0):
    loss = StudentLoss(student, objectives.build(None), teacher_head=teacher.head())
    batch = collate(sequences)
    hidden_ND = teacher.hidden(batch).detach()
    return loss([batch], hidden_ND, LossWeights(kd=kd, ce=ce, divergence=KL()))[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_share_of_one_is_the_plain_objective(family, weights):
    student, teacher = models(family)
    kd, ce = weights
    mixed = mix_pairs(FIRST, SECOND, 1.0, is_encoder_decoder=student.is_encoder_decoder)
    found = loss_of(extra(teacher, kd=kd, ce=ce), student, [mixed])
    assert_close(found, plain_loss(student, teacher, FIRST, kd=kd, ce=ce), **EXACT)
    mixed = mix_pairs(FIRST, SECOND, 0.0, is_encoder_decoder=student.is_encoder_decoder)
    found = loss_of(extra(teacher, kd=kd, ce=ce), student, [mixed])
    assert_close(found, plain_loss(student, teacher, SECOND, kd=kd, ce=ce), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapping_a_pair_and_its_shares_changes_nothing(family):
    student, teacher = models(family)
    mixkd = extra(teacher)
    there, back = (
        mix_pairs(a, b, share, is_encoder_decoder=student.is_encoder_decoder)
        for a, b, share in ((FIRST, SECOND, 0.3), (SECOND, FIRST, 0.7))
    )
    losses = [loss_of(mixkd, student, [mixed]) for mixed in (there, back)]
    grads = [torch.autograd.grad(loss, list(student.parameters())) for loss in losses]
    assert_close(*losses, **EXACT)
    assert_close(*grads, rtol=1e-6, atol=1e-7)  # shares are float32


def by_hand(student, teacher, first, second, share):
    """Compute TMKD and SM of one pair without padding, position by position."""
    if student.is_encoder_decoder:
        return _by_hand_seq2seq(student, teacher, first, second, share)
    P = max(len(first.prompt), len(second.prompt))
    T = P + max(len(first.response), len(second.response)) - 1
    inputs = []
    for model in (student, teacher):
        table = model.model.get_input_embeddings().weight
        rows = []
        for t in range(T):
            found = []
            for s, part in ((first, share), (second, 1 - share)):
                k = t - (P - len(s.prompt))
                ids = np.concatenate((s.prompt, s.response[:-1]))
                if 0 <= k < len(ids):
                    found.append((part, table[int(ids[k])]))
            rows.append(found[0][1] if len(found) == 1 else sum(part * row for part, row in found))
        inputs.append(torch.stack(rows)[None])
    logits = [
        m.model(inputs_embeds=x, use_cache=False).logits[0, P - 1 :]
        for m, x in zip((student, teacher), inputs, strict=True)
    ]
    return _from_logits(*logits, first, second, share)


def _by_hand_seq2seq(student, teacher, first, second, share):
    logits = []
    for model in (student, teacher):
        embedded = []
        starts = np.array([model.start], dtype=np.int32)
        for name in ("prompt", "response"):
            rows = [
                getattr(s, name) if name == "prompt" else np.concatenate((starts, s.response[:-1]))
                for s in (first, second)
            ]
            mixed = []
            for t in range(max(map(len, rows))):
                found = [
                    (part, model.token_embeddings(torch.tensor([int(ids[t])]), decoder=name == "response")[0])
                    for ids, part in zip(rows, (share, 1 - share), strict=True)
                    if t < len(ids)
                ]
                mixed.append(found[0][1] if len(found) == 1 else sum(part * row for part, row in found))
            embedded.append(torch.stack(mixed)[None])
        logits.append(
            model.model(inputs_embeds=embedded[0], decoder_inputs_embeds=embedded[1], use_cache=False).logits[0]
        )
    return _from_logits(*logits, first, second, share)


def _from_logits(student_TV, teacher_TV, first, second, share):
    log_q, log_p = student_TV.log_softmax(-1), teacher_TV.log_softmax(-1).detach()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    total = 0.0
    for r in range(len(kl)):
        for s, part in ((first, share), (second, 1 - share)):
            if r < len(s.response):
                total = total + part * (kl[r] - log_q[r, int(s.response[r])])
    return total


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_mixtures_equal_single_pairs_without_padding(family):
    student, teacher = models(family)
    mixed = mix_pairs(FIRST, SECOND, 0.25, is_encoder_decoder=student.is_encoder_decoder)
    found = loss_of(extra(teacher), student, [mixed])
    expected = sum(by_hand(student, teacher, a, b, 0.25) for a, b in zip(FIRST, SECOND, strict=True))
    assert_close(found, expected, **EXACT)


def test_supervised_turns_of_a_conversation_keep_their_targets():
    turns = [Sequence(s.prompt, s.response, s.row, turns=np.array([2, 3])) for s in (FIRST[0], FIRST[2])]
    mixed = mix_pairs(turns, [SECOND[0], SECOND[2]], 0.5)
    first = mixed.sides[0]
    assert first.targets_M.tolist() == [int(t) for s in turns for t in (*s.prompt[[2, 3]], *s.response)]
    assert float(mixed.weights_N.sum()) == pytest.approx(
        0.5 * sum(s.supervised for s in [*turns, SECOND[0], SECOND[2]])
    )
    ids_T = turns[0].prompt.tolist() + turns[0].response.tolist()
    for position, target in zip(
        mixed.positions_N[first.predicted_M][:5].tolist(), first.targets_M.tolist(), strict=False
    ):
        assert ids_T[first.placements[0].index_BT[0, position] + 1] == target


def test_row_beyond_the_context_loses_the_start_of_its_prompt():
    long, short = tiny.sequences([(9, 2), (2, 8)], VOCAB)
    mixed = mix_pairs([long], [short], 0.5, context=10)
    assert mixed.sides[0].placements[0].index_BT.shape == (1, 10)
    assert mixed.sides[0].placements[0].index_BT[0, 0] == 6
    assert float(mixed.weights_N.sum()) == 0.5 * (2 + 8)


def test_pairs_and_share_do_not_depend_on_the_micro_batches():
    rows = tiny.sequences([(3 + i % 4, 1 + i % 5) for i in range(12)], VOCAB)
    student, teacher = models("llama")
    losses, shares = [], []
    for most in (12, 5, 2):
        mixkd = extra(teacher)
        micro = [MicroRows(Source.DATASET, groups) for groups in micro_batches(rows, most)]
        drawn = mixkd.begin_step(micro, step=3)
        losses.append(sum(loss_of(mixkd, student, mixed) for mixed in drawn))
        shares.append(mixkd.figures()["mixup_share"])
        weights = sum(float(mixed.weights_N.sum()) for of_micro in drawn for mixed in of_micro)
        assert weights == pytest.approx(sum(s.supervised for s in rows))
    assert len(set(shares)) == 1
    assert_close(losses[0], losses[1], **EXACT)
    assert_close(losses[0], losses[2], **EXACT)
    other = extra(teacher)
    other.begin_step([MicroRows(Source.DATASET, [rows])], step=4)
    assert other.figures()["mixup_share"] != shares[0]


def test_student_outputs_have_no_cross_entropy():
    student, teacher = models("llama")
    mixed = mix_pairs(FIRST, SECOND, 0.25)
    alone = loss_of(extra(teacher, ce=0.0), student, [mixed])
    assert_close(loss_of(extra(teacher), student, [mixed], source=Source.ROLLOUT), alone)
    assert loss_of(extra(teacher, kd=0.0), student, [mixed], source=Source.REPLAY) is None


def test_mean_per_sequence_weights_each_side_by_its_own_length():
    mixed = mix_pairs(FIRST, SECOND, 0.25, per_sequence=True)
    assert float(mixed.weights_N.sum()) == pytest.approx(len(FIRST))
    assert float(mixed.sides[0].weights_M.sum()) == pytest.approx(0.25 * len(FIRST))


def test_frozen_teacher_is_no_part_of_the_extra():
    _, teacher = models("llama")
    mixkd = extra(teacher)
    assert not list(mixkd.parameters())
    assert not mixkd.trained_state()
    assert not teacher.train(False).training
    mixkd.train()
    assert not teacher.training


def test_tied_matrix_gets_the_gradients_of_both_passes(monkeypatch):
    """Check the fast pass of plain rows, which adds its part to ``grad`` in place, beside the pass on mixtures."""
    grads = []
    for fast in ("1", "0"):
        monkeypatch.setenv("DISTILLM_CPU_FAST", fast)
        tokenizer = tiny.tokenizer(size=VOCAB)
        student = Backbone(tiny.model("llama-tied", VOCAB, seed=1), tokenizer)
        teacher = Backbone(tiny.model("llama", VOCAB, seed=2), tokenizer).requires_grad_(False)
        loss = StudentLoss(
            student, objectives.build(None), teacher_head=teacher.head(), extras={"mixkd": extra(teacher)}
        )
        loss.train()
        drawn = loss.begin_step([MicroRows(Source.DATASET, [FIRST])], 0)
        weights = LossWeights(kd=1.0, ce=0.0, divergence=KL())
        batch = collate(FIRST)
        loss([batch], teacher.hidden(batch).detach(), weights, drawn=drawn[0])[0].backward()
        grads.append({name: p.grad for name, p in student.named_parameters()})
    assert_close(*grads, rtol=1e-4, atol=1e-4)
