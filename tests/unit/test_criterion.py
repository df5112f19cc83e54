"""What a token costs, and what a criterion that looks at the whole step is shown."""

import pytest
import torch
from torch.testing import assert_close

from distillm_cli.config import schema
from distillm_cli.losses.objectives import KD, CrossEntropy
from distillm_cli.losses.weights import LossWeights, TokenWeights
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.training.checkpoint import read_checkpoint
from tests.unit import test_trainer as runs


def test_cross_entropy_is_for_rows_and_the_divergence_for_everything():
    criterion = KD(schema.ObjectiveConfig(kd_weight=0.8))
    row, rollout = criterion.weights(Source.DATASET), criterion.weights(Source.ROLLOUT)
    assert (row.kd, row.ce) == pytest.approx((0.8, 0.2))
    assert (rollout.kd, rollout.ce) == (0.8, 0.0)
    assert CrossEntropy().weights(Source.DATASET) == LossWeights(kd=0.0, ce=1.0)


def test_warming_up_the_divergence_moves_weight_from_cross_entropy_to_it():
    criterion = KD(schema.ObjectiveConfig(kd_weight=0.8, kd_warmup=0.5))
    shares = [criterion.weights(Source.DATASET, progress) for progress in (0.001, 0.25, 0.5, 1.0)]
    assert [t.kd for t in shares] == pytest.approx([0.0016, 0.4, 0.8, 0.8])
    assert all(t.kd + t.ce == pytest.approx(1) for t in shares)


class Watching(KD):
    """Weighs a token by how its probabilities stand to the median of the whole step; remembers every loss."""

    needs_log_probs_of = ("teacher", "student")

    def __init__(self, config):
        super().__init__(config)
        self.losses, self.shown = [], []

    def begin_step(self, pieces, readings, progress):
        self.shown.append((pieces, readings))
        gaps = [reading.log_p_N - reading.log_q_N for reading in readings]
        median = torch.cat(gaps).median()
        return [TokenWeights(weights_N=(gap > median).float() + 0.5) for gap in gaps]

    def observe(self, loss, progress):
        self.losses.append(loss)

    def state_dict(self):
        return {"losses": self.losses}

    def load_state_dict(self, state):
        self.losses = list(state["losses"])


def watched(tmp_path=None, **train):
    engine = runs.build(tmp_path, method="off", steps=6, backbone=runs.student("llama"), **train)  # without dropout
    engine.student_loss.criterion = Watching(schema.ObjectiveConfig())
    return engine


def test_a_step_is_shown_as_a_whole_so_that_its_cut_changes_nothing():
    whole, cut = watched(batch_size=4, accumulate=1), watched(batch_size=2, accumulate=2)
    for engine in (whole, cut):
        engine.train()
    assert len(whole.objective.shown[0][0]) < len(cut.objective.shown[0][0])
    for a, b in zip(whole.student_loss.parameters(), cut.student_loss.parameters(), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)
    reading = whole.objective.shown[0][1][0]
    assert reading.log_p_N.shape == reading.log_q_N.shape
    assert (reading.log_p_N <= 0).all()


def test_what_a_criterion_remembers_is_in_the_checkpoint(tmp_path):
    straight = watched()
    straight.train()
    first = watched(tmp_path, save_steps=4)
    first.train()
    again = watched(tmp_path / "again")
    again.load(read_checkpoint(first.checkpoints.path(4)))
    assert again.objective.losses == straight.objective.losses[:4]
