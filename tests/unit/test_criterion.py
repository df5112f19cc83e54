"""Test the weights of the loss terms, and criteria that use the log-probabilities of the whole step."""

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config import schema
from distillm_cli.losses.objectives import KD, CrossEntropy
from distillm_cli.losses.weights import LossWeights, TokenWeights
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.training.checkpoint import read_checkpoint
from tests.unit import test_trainer as runs


def test_cross_entropy_applies_only_to_dataset_rows():
    criterion = KD(schema.ObjectiveConfig(kd_weight=0.8))
    row, rollout = criterion.weights(Source.DATASET), criterion.weights(Source.ROLLOUT)
    assert (row.kd, row.ce) == pytest.approx((0.8, 0.2))
    assert (rollout.kd, rollout.ce) == (0.8, 0.0)
    assert CrossEntropy().weights(Source.DATASET) == LossWeights(kd=0.0, ce=1.0)


def test_kd_warmup_shifts_weight_from_cross_entropy():
    criterion = KD(schema.ObjectiveConfig(kd_weight=0.8, kd_warmup=0.5))
    shares = [criterion.weights(Source.DATASET, progress) for progress in (0.001, 0.25, 0.5, 1.0)]
    assert [t.kd for t in shares] == pytest.approx([0.0016, 0.4, 0.8, 0.8])
    assert all(t.kd + t.ce == pytest.approx(1) for t in shares)


class MedianWeighted(KD):
    """Weigh tokens by the median log-probability gap of the step, and record every loss."""

    needs_log_probs_of = ("teacher", "student")

    def __init__(self, config):
        super().__init__(config)
        self.losses, self.recorded = [], []

    def begin_step(self, batches, readings, progress):
        self.recorded.append((batches, readings))
        gaps = [reading.log_p_N - reading.log_q_N for reading in readings]
        median = torch.cat(gaps).median()
        return [TokenWeights(weights_N=(gap > median).float() + 0.5) for gap in gaps]

    def observe(self, loss, progress):
        self.losses.append(loss)

    def state_dict(self):
        return {"losses": self.losses}

    def load_state_dict(self, state):
        self.losses = list(state["losses"])


def trainer_with_median_weights(tmp_path=None, **train):
    engine = runs.build(tmp_path, method="off", steps=6, backbone=runs.student("llama"), **train)  # without dropout
    engine.student_loss.criterion = MedianWeighted(schema.ObjectiveConfig())
    return engine


def test_criterion_sees_the_whole_step():
    """Check that the division into micro-batches does not change the weights."""
    whole, accumulated = (
        trainer_with_median_weights(batch_size=4, accumulate=1),
        trainer_with_median_weights(batch_size=2, accumulate=2),
    )
    for engine in (whole, accumulated):
        engine.train()
    assert len(whole.objective.recorded[0][0]) < len(accumulated.objective.recorded[0][0])
    for a, b in zip(whole.student_loss.parameters(), accumulated.student_loss.parameters(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)
    reading = whole.objective.recorded[0][1][0]
    assert reading.log_p_N.shape == reading.log_q_N.shape
    assert (reading.log_p_N <= 0).all()


def test_criterion_state_is_in_the_checkpoint(tmp_path):
    uninterrupted = trainer_with_median_weights()
    uninterrupted.train()
    first = trainer_with_median_weights(tmp_path, save_steps=4, keep=2)
    first.train()
    resumed = trainer_with_median_weights(tmp_path / "again")
    resumed.load(read_checkpoint(first.checkpoints.path(4)))
    assert resumed.objective.losses == uninterrupted.objective.losses[:4]
