"""Test pre-training on the teacher's confidence: labels, loss, the layer that is dropped."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distillm_cli.extras.ptp import (
    CLASSES,
    Confidence,
    ConfidenceHead,
    ConfidenceOnly,
    confidence_of,
    labels_of,
    medians,
)
from distillm_cli.losses.extra import MicroRows
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.training.state import RunInfo
from distillm_cli.types import collate
from tests import tiny
from tests.command_line import flags
from tests.unit.test_config import check_rejected, resolve

CPU = torch.device("cpu")


def confidence(log_p, is_right):
    return Confidence(torch.tensor(log_p), torch.tensor(is_right))


def test_labels_split_right_and_wrong_tokens_at_their_medians():
    found = [
        confidence([-0.1, -0.2, -0.3, -2.0], [True, True, True, False]),
        confidence([-1.0, -3.0, -0.4], [False, False, True]),
    ]
    thresholds = medians(found)
    assert thresholds == pytest.approx({True: -0.3, False: -2.0})
    assert labels_of(found[0], thresholds).tolist() == [0, 0, 0, 2]
    assert labels_of(found[1], thresholds).tolist() == [2, 3, 1]


def test_saturated_confidences_leave_two_classes_populated():
    """Check a teacher that is certain of most tokens: a threshold that had to be exceeded would leave a class empty."""
    found = confidence([0.0, 0.0, 0.0, -0.5], [True] * 4)
    assert labels_of(found, medians([found])).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_confidence_is_that_of_the_teachers_logits(family):
    teacher = Backbone(tiny.model(family, 41), tiny.tokenizer(size=41))
    sequences = tiny.sequences([(3, 4), (5, 9), (2, 1)], 41)
    found = confidence_of([sequences[:2], sequences[2:]], lambda b, _: teacher.hidden(b), teacher.head, CPU)
    for sequence in sequences:
        with torch.no_grad():
            p_NV = teacher.logits(collate([sequence])).softmax(-1)
        assert torch.allclose(found[sequence].log_p_N.exp(), p_NV.amax(-1), atol=1e-5)
        assert found[sequence].is_right_N.tolist() == (p_NV.argmax(-1).numpy() == sequence.response).tolist()
        assert np.array_equal(found[sequence].is_right_N.shape, (sequence.supervised,))


def pre_training(tied: bool):
    student = Backbone(tiny.model("llama-tied" if tied else "llama", 41), tiny.tokenizer(size=41))
    sequences = tiny.sequences([(3, 4), (5, 9), (2, 1)], 41)
    generator = torch.Generator().manual_seed(0)
    labels = {s: torch.randint(len(CLASSES), (s.supervised,), generator=generator) for s in sequences}
    extra = ConfidenceHead(student, labels, seed=1, device=CPU)
    return StudentLoss(student, ConfidenceOnly(), extras={"ptp": extra}), extra, sequences, labels


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_cross_entropy_of_the_four_classes(tied):
    student_loss, extra, sequences, labels = pre_training(tied)
    student_loss.train()
    micro = [MicroRows(Source.DATASET, [sequences[2:], sequences[:2]]), MicroRows(Source.DATASET, [sequences[1:]])]
    drawn = student_loss.begin_step(micro, 0)
    assert drawn[1]["ptp"].tolist() == torch.cat([labels[s] for s in sequences[1:]]).tolist()
    batches = [collate(group) for group in micro[0].groups]
    weights = student_loss.criterion.weights(Source.DATASET)
    total, _ = student_loss(batches, None, weights, None, 0.5, Source.DATASET, drawn[0])
    total.backward()
    expected = 0.0
    for sequence in (sequences[2], *sequences[:2]):
        logits_N4 = extra.head(student_loss.student.hidden(collate([sequence])))
        expected += 0.5 * torch.nn.functional.cross_entropy(logits_N4, labels[sequence], reduction="sum").item()
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert extra.head.weight.grad is not None
    head = student_loss.student.model.get_output_embeddings().weight
    assert (head.grad is not None) == tied, "a head that is not the embedding matrix has no loss"


def test_layer_does_not_depend_on_the_random_state():
    layers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        layers.append(pre_training(tied=True)[1].head)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_accuracy_is_measured_for_each_class():
    _, extra, sequences, labels = pre_training(tied=True)
    with torch.no_grad():
        extra.head.weight.zero_()
        extra.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))  # always the second class
        found = extra.measure([sequences[:2], sequences[2:]], RunInfo(steps=1, steps_per_epoch=1))
    share = torch.cat(list(labels.values())).eq(1).float().mean().item()
    assert found == pytest.approx(
        {
            "ptp_accuracy": share,
            "ptp_confident_right": 0,
            "ptp_unconfident_right": 1,
            "ptp_confident_wrong": 0,
            "ptp_unconfident_wrong": 0,
        }
    )


def test_settings_that_do_not_fit_are_rejected():
    check_rejected("recipe.fields_conflict", "student.ptp_lr", sets=["student.ptp_lr=1e-4"])
    check_rejected("recipe.fields_conflict", "student.ptp", command="sft", sets=["student.ptp=1"])
    for sets in (["student.lora.r=4", "student.path=shared:2x2"], ["teacher.quantize=4bit", "student.path=shared:2x2"]):
        check_rejected("recipe.fields_conflict", "shared:2x2", sets=sets)


def test_peakd_sets_student_and_pre_training_unless_given():
    student = resolve(command="distill", sets=["method=peakd"]).recipe.student
    assert (student.path, student.ptp) == ("shared:0.5x2:swap", 1.0)
    given = resolve(command="distill", sets=["method=peakd", "student.path=shared:3x2", "student.ptp=0"]).recipe.student
    assert (given.path, given.ptp) == ("shared:3x2", 0.0)
    by_flag = resolve(command="distill", flags=flags(student="layers:4"), sets=["method=peakd"]).recipe.student
    assert (by_flag.path, by_flag.ptp) == ("layers:4", 1.0)
