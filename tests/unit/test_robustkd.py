"""Test the masks of RobustKD on a teacher's blocks, their training, and the connectors."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distillm_cli.config.extras import RobustKDConfig
from distillm_cli.config.schema import TrainConfig
from distillm_cli.extras.robustkd import (
    START,
    MaskTraining,
    RobustKD,
    detoxified,
    last_blocks,
    matched_blocks,
    mean_features,
    read_masks,
    write_masks,
)
from distillm_cli.losses.divergences import KL
from distillm_cli.losses.objectives import CrossEntropy
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import CROSS_ENTROPY, LossWeights
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.blocks import blocks_of, real_positions
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.training.optimizer import build_optimizer
from tests import tiny
from tests.codes import raises_code

WIDTH = 32
KD = LossWeights(kd=1.0, ce=0.0, divergence=KL())
LENGTHS = [(5, 3), (2, 4), (3, 1)]
FAMILIES = ("gpt2", "llama", "opt-350m", "gemma2", "t5", "t5-v1.1", "bart")


def backbone(family: str = "llama", **fields) -> Backbone:
    model = tiny.model(family, tiny.VOCAB, **fields)
    model.requires_grad_(False)
    return Backbone(model, tiny.tokenizer(size=tiny.VOCAB))


def masks(value: float | None = None, count: int = 2, width: int = WIDTH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand((count, width), generator=generator) if value is None else torch.full((count, width), value)
    return mask, torch.randn((count, width), generator=generator)


def robust(teacher: Backbone, student: Backbone, values, **fields) -> RobustKD:
    return RobustKD(teacher, student, values, RobustKDConfig(blocks=values[0].shape[0], **fields), seed=1)


def trained(student: Backbone) -> Backbone:
    student.model.requires_grad_(True)
    return student


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_of_zero_is_the_teacher_exactly(family):
    teacher = backbone(family)
    batch = tiny.batch(LENGTHS, tiny.VOCAB)
    own = teacher.logits(batch)  # by the model's own forward, which hooks make every pass use
    extra = robust(teacher, trained(backbone(family, seed=1)), masks(0.0))
    assert torch.equal(teacher.logits(batch), own)
    extra.mask_KD.fill_(0.3)
    assert not torch.allclose(teacher.logits(batch), own, atol=1e-3)
    hidden_ND = extra.hidden([batch])
    assert torch.equal(teacher.head().logits(hidden_ND), teacher.head().logits(teacher.hidden(batch)))
    extra.release()
    assert hooks(teacher.model) == 0
    assert torch.equal(teacher.logits(batch), own)


def test_mask_of_one_replaces_the_feature():
    f = torch.randn(2, 3, 4).to(torch.bfloat16)
    d = torch.randn(4)
    assert torch.equal(detoxified(f, torch.ones(4), d), d.to(torch.bfloat16).expand(2, 3, 4))
    half = detoxified(f.float(), torch.full((4,), 0.25), d)
    torch.testing.assert_close(half, 0.75 * f.float() + 0.25 * d)


def test_decoding_uses_the_masks_and_forgets_them():
    """Check a teacher whose fast decoding was tested before the masks were added."""
    teacher = backbone("llama")
    prompts = [torch.tensor([3, 4, 5], dtype=torch.int32).numpy()]
    before = teacher.decode(prompts).logits(None)
    extra = robust(teacher, trained(backbone(seed=1)), masks())
    batch = tiny.batch([(3, 1)], tiny.VOCAB)
    batch.ids_BT[0, :3] = torch.tensor([3, 4, 5])
    masked = teacher.logits(batch)
    torch.testing.assert_close(teacher.decode(prompts).logits(None), masked, atol=1e-4, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # decodes with a copy of the weights
        copied = teacher.decode(prompts).logits(None)
    assert (copied - masked).abs().max() < 0.2 * (before - masked).abs().max()
    extra.release()
    assert torch.equal(teacher.decode(prompts).logits(None), before)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_mask_gradients_match_plain_float64(family):
    """Compare with CE + λ·mean Var(f')/Var(f), the variance over all positions of each masked block."""
    teacher = backbone(family)
    batch = tiny.batch(LENGTHS, tiny.VOCAB, seed=4)
    config = RobustKDConfig(blocks=2, mask_weight=0.7)
    feature_KD = mean_features(teacher, 2, [tiny.sequences(LENGTHS, tiny.VOCAB, seed=4)])

    plain = Backbone(copy.deepcopy(teacher.model).double(), teacher.tokenizer)
    logits_KD = torch.full((2, WIDTH), math.log(START / (1 - START)), dtype=torch.float64, requires_grad=True)
    d_KD = feature_KD.double().requires_grad_()
    ratios = []

    def hook(k):
        def masked(module, inputs, output):
            f = output[0] if isinstance(output, tuple) else output
            m = 1 / (1 + torch.exp(-logits_KD[k]))
            g = (1 - m) * f + m * d_KD[k]
            ratios.append(g.flatten(0, 1).var(0) / f.flatten(0, 1).var(0))
            return (g, *output[1:]) if isinstance(output, tuple) else g

        return masked

    handles = [block.register_forward_hook(hook(k)) for k, block in enumerate(blocks_of(plain)[-2:])]
    logits_NV = double_logits(plain, batch)
    loss = F.cross_entropy(logits_NV, batch.targets_N) + 0.7 * torch.stack(ratios).mean()
    loss.backward()
    for handle in handles:
        handle.remove()

    extra = MaskTraining(teacher, feature_KD, config)
    module = StudentLoss(teacher, CrossEntropy(), extras={"mask": extra})
    module.train()
    assert not teacher.model.training
    total, _ = module([batch], None, CROSS_ENTROPY, scale=1 / batch.tokens)
    total.backward()
    assert total.item() == pytest.approx(loss.item(), rel=1e-4)
    for ours, reference in ((extra.logits_KD, logits_KD), (extra.feature_KD, d_KD)):
        torch.testing.assert_close(ours.grad.double(), reference.grad, rtol=2e-3, atol=2e-5)
    assert [p for p in module.parameters() if p.requires_grad] == [extra.logits_KD, extra.feature_KD]
    extra.release()
    assert hooks(teacher.model) == 0


def double_logits(model: Backbone, batch) -> torch.Tensor:
    """Return logits [N, V] without the cast to float32."""
    from distillm_cli.models import seq2seq

    if model.is_encoder_decoder:
        return seq2seq.own_logits(model.model, batch, model.start)[:, : model.vocab]
    logits_BTV = model.model(input_ids=batch.ids_BT, use_cache=False).logits
    return logits_BTV.flatten(0, 1).index_select(0, batch.positions_N)[:, : model.vocab]


def test_masks_learn():
    teacher = backbone("llama")
    sequences = tiny.sequences(LENGTHS * 4, tiny.VOCAB)
    extra = MaskTraining(teacher, mean_features(teacher, 2, [sequences]), RobustKDConfig(blocks=2))
    module = StudentLoss(teacher, CrossEntropy(), extras={"mask": extra})
    module.train()
    optimizer = build_optimizer(module, TrainConfig(lr=0.05, weight_decay=0.0), [extra])
    batch = tiny.batch(LENGTHS * 4, tiny.VOCAB)
    losses = []
    for _ in range(12):
        total, _ = module([batch], None, CROSS_ENTROPY, scale=1 / batch.tokens)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    assert losses[-1] < losses[0] - 0.1
    assert set(extra.trained_state()) == {"logits_KD", "feature_KD"}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_mean_feature_ignores_padding_and_batches(family):
    teacher = backbone(family)
    sequences = tiny.sequences(LENGTHS, tiny.VOCAB)
    together = mean_features(teacher, 2, [sequences])
    alone = mean_features(teacher, 2, [[s] for s in sequences])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert hooks(teacher.model) == 0
    batch = tiny.batch(LENGTHS, tiny.VOCAB)
    expected = {"gpt2": 7 + 5 + 3, "t5": 3 + 4 + 1}
    assert len(real_positions(teacher, batch)) == expected[family]


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_is_the_divergence_and_the_connectors(family, autocast):
    teacher = backbone(family)
    student = trained(backbone(family, seed=5))
    extra = robust(teacher, student, masks(), connector_weight=0.3)
    module = StudentLoss(student, CrossEntropy(), teacher_head=teacher.head(), extras={"robustkd": extra})
    module.eval().train()
    student.eval()  # without dropout
    batches = [tiny.batch(LENGTHS[:2], tiny.VOCAB), tiny.batch(LENGTHS[2:], tiny.VOCAB, seed=1)]
    tokens = sum(batch.tokens for batch in batches)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        total, _ = module(batches, None, KD, scale=1 / tokens)
    total.backward()
    assert hooks(student.model) == 0
    assert all(connector.weight.grad.abs().sum() > 0 for connector in extra.connectors)
    assert extra.connectors[0].out_features == WIDTH

    divergence = errors = 0.0
    for batch in batches:
        ours, theirs = captured(student, batch, 2), captured(teacher, batch, 2)
        log_q, log_p = (torch.log_softmax(m.logits(batch), -1) for m in (student, teacher))
        divergence += (log_p.exp() * (log_p - log_q)).sum().item()
        for connector, s, t in zip(extra.connectors, ours, theirs, strict=True):
            errors += ((connector(s) - t).square().sum(1) / t.square().sum(1)).sum().item() / 2
    expected = (divergence + 0.3 * errors) / tokens
    assert total.item() == pytest.approx(expected, rel=3e-2 if autocast else 1e-4)
    extra.release()


def captured(model: Backbone, batch, count: int) -> list[torch.Tensor]:
    """Return the outputs of the last blocks at the supervised positions, after the model's other hooks."""
    from distillm_cli.models import seq2seq

    found = []

    def keep(module, inputs, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks_of(model)[-count:]]
    with torch.no_grad():
        model.logits(batch)
    for handle in handles:
        handle.remove()
    is_pair = model.is_encoder_decoder
    at_N = seq2seq.split_batch(batch, model.start).positions_N if is_pair else batch.positions_N
    return [states.flatten(0, 1)[at_N] for states in found]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_micro_batches(checkpointing):
    def gradients(parts):
        teacher, student = backbone(), trained(backbone(seed=5))
        if checkpointing and len(parts) == 2:
            student.model.gradient_checkpointing_enable()
        extra = robust(teacher, student, masks())
        module = StudentLoss(student, CrossEntropy(), teacher_head=teacher.head(), extras={"robustkd": extra})
        module.train()
        for batch in parts:
            module([batch], None, KD, scale=1 / 8)[0].backward()
        return [p.grad for p in module.parameters() if p.requires_grad]

    sequences = tiny.sequences(LENGTHS, tiny.VOCAB)
    from distillm_cli.types import collate

    whole = gradients([collate(sequences)])
    for ours, reference in zip(gradients([collate(sequences[:1]), collate(sequences[1:])]), whole, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-3, atol=1e-5)


def test_failed_pass_leaves_no_state():
    """Check a pass that runs out of memory between the teacher's and the student's part."""
    teacher, student = backbone(), trained(backbone(seed=5))
    extra = robust(teacher, student, masks())
    module = StudentLoss(student, CrossEntropy(), teacher_head=teacher.head(), extras={"robustkd": extra})
    module.train()
    batch = tiny.batch(LENGTHS, tiny.VOCAB)
    expected = module([batch], None, KD, scale=1 / 8)[0].item()
    extra.hidden([tiny.batch([(4, 2)], tiny.VOCAB)])
    student.hidden(tiny.batch([(4, 2)], tiny.VOCAB))
    assert module([batch], None, KD, scale=1 / 8)[0].item() == expected
    extra.release()
    assert hooks(teacher.model) == hooks(student.model) == 0


def test_connectors_do_not_change_the_random_state():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, second = (robust(backbone(), backbone(seed=5), masks()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.connectors[0].weight, second.connectors[0].weight)
    assert {"mask_KD", "feature_KD"} < set(first.trained_state())
    assert len(robust(backbone(), backbone(seed=5), masks(), connector_weight=0.0).connectors) == 0


@pytest.mark.parametrize(
    ("depth", "count", "expected"), [(4, 3, [1, 2, 3]), (3, 3, [0, 1, 2]), (2, 3, [0, 1, 1]), (1, 3, [0, 0, 0])]
)
def test_student_blocks_are_matched_from_the_end(depth, count, expected):
    blocks = [nn.Identity() for _ in range(depth)]
    assert [blocks.index(block) for block in matched_blocks(blocks, count)] == expected


def test_too_many_blocks_are_an_error():
    with raises_code("usage.invalid_blocks", "2 blocks", "robustkd.blocks=2"):
        last_blocks(backbone(), 3)


def test_damaged_masks_are_an_error(tmp_path):
    values = masks()
    write_masks(tmp_path, *values)
    assert all(torch.equal(a, b) for a, b in zip(read_masks(tmp_path), values, strict=True))
    (tmp_path / "mask.safetensors").write_bytes(b"x")
    with raises_code("checkpoint.damaged", "mask.safetensors"):
        read_masks(tmp_path)


def test_source_of_the_micro_batch_does_not_matter():
    teacher, student = backbone(), trained(backbone(seed=5))
    extra = robust(teacher, student, masks())
    module = StudentLoss(student, CrossEntropy(), teacher_head=teacher.head(), extras={"robustkd": extra})
    module.train()
    batch = tiny.batch(LENGTHS, tiny.VOCAB)
    losses = [module([batch], None, KD, scale=1 / 8, source=s)[0].item() for s in (Source.DATASET, Source.ROLLOUT)]
    assert losses[0] == losses[1]
