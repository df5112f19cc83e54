"""Test which tokens enter the loss (``objective.tokens``), and the loss of these, against plain PyTorch in float64."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.losses import objectives
from distillm_cli.losses.selection import TokenSelection
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.scheduler import Source
from tests import tiny

TOKENIZER = tiny.tokenizer()
V = len(TOKENIZER)
LENGTHS = [[(3, 4), (5, 2), (2, 1)], [(4, 1), (2, 6)]]
BATCHES = [tiny.batch(lengths, V, seed) for seed, lengths in enumerate(LENGTHS)]
RESPONSES = [response for lengths in LENGTHS for _, response in lengths]


def backbone(seed, family="llama"):
    return Backbone(tiny.model(family, V, seed=seed).double(), TOKENIZER)


class Plain:
    """Compute the loss from whole tables of logits."""

    def __init__(self, student, teacher):
        self.log_q_NV, self.log_p_NV = (self._log(model) for model in (student, teacher))
        self.kl_N = (self.log_p_NV.exp() * (self.log_p_NV - self.log_q_NV)).sum(-1)
        self.entropy_N = -(self.log_q_NV.exp() * self.log_q_NV).sum(-1)

    @staticmethod
    def _log(model):
        head = model.head()
        logits = [model.hidden(batch, for_backward=True) @ head.weight_VD.T for batch in BATCHES]
        return torch.cat(logits).log_softmax(-1)

    def highest(self, scores_N, share):
        """Return the indices of the selected tokens, response by response."""
        found, start = [], 0
        for n in RESPONSES:
            ranked = sorted(range(start, start + n), key=lambda i: -scores_N[i].item())
            found += ranked[: math.ceil(share * n)]
            start += n
        return sorted(found)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize(("score", "share"), [("entropy", 0.5), ("divergence", 0.5), ("divergence", 0.3)])
def test_loss_is_that_of_the_selected_tokens(score, share, reduction):
    student, teacher = backbone(1), backbone(2)
    config = ObjectiveConfig(divergence="kl", tokens=f"{score}:{share}", kd_weight=0.75, reduction=reduction)
    objective = objectives.build(config)
    loss = StudentLoss(student, objective, teacher_head=teacher.head()).train()
    with torch.no_grad():
        teacher_hidden_ND = torch.cat([teacher.hidden(batch) for batch in BATCHES])
    count = objective.count(
        [s for lengths, seed in zip(LENGTHS, (0, 1), strict=True) for s in tiny.sequences(lengths, V, seed)]
    )
    total, tokens = loss(BATCHES, teacher_hidden_ND, objective.weights(Source.DATASET), None, 1 / count)
    total.backward()
    found = {name: p.grad.clone() for name, p in student.model.named_parameters() if p.grad is not None}
    assert tokens.item() == sum(RESPONSES)

    student.model.zero_grad()
    plain = Plain(student, teacher)
    kept = plain.highest(plain.entropy_N if score == "entropy" else plain.kl_N, share)
    targets_N = torch.cat([batch.targets_N for batch in BATCHES])
    losses_N = 0.75 * plain.kl_N - 0.25 * plain.log_q_NV.gather(-1, targets_N[:, None])[:, 0]
    if reduction == "token":
        expected = losses_N[kept].mean()
    else:
        ends = torch.tensor(RESPONSES).cumsum(0).tolist()
        means = [
            losses_N[[i for i in kept if end - n <= i < end]].mean() for n, end in zip(RESPONSES, ends, strict=True)
        ]
        expected = torch.stack(means).mean()
    assert_close(total, expected)
    expected.backward()
    for name, p in student.model.named_parameters():
        if p.grad is not None:
            # 1/n of a sequence is float32.
            rtol, atol = (1e-7, 1e-10) if reduction == "token" else (1e-5, 1e-7)
            assert_close(found[name], p.grad, rtol=rtol, atol=atol)


def test_selection_does_not_depend_on_micro_batches():
    selection = TokenSelection("entropy", 0.5)
    scores_N = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 4.0, 0.5])
    rows_N = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    whole = selection.indices(scores_N, rows_N).tolist()
    first, second = (
        selection.indices(scores_N[:3], rows_N[:3]).tolist(), selection.indices(scores_N[3:], rows_N[3:] - 1).tolist()
    )  # fmt: skip
    assert whole == first + [3 + i for i in second] == [0, 2, 3, 5]


def test_of_equal_scores_the_earlier_tokens_are_selected():
    assert TokenSelection("divergence", 0.4).indices(torch.zeros(5), torch.zeros(5, dtype=torch.int64)).tolist() == [
        0,
        1,
    ]


@pytest.mark.parametrize(("tokens", "share", "kept"), [(30, 0.1, 3), (1, 0.01, 1), (7, 0.5, 4), (10, 0.3, 3)])
def test_kept_tokens_are_rounded_up(tokens, share, kept):
    assert TokenSelection("entropy", share).kept(tokens) == kept


def test_validation_has_all_tokens():
    student, teacher = backbone(1), backbone(2)
    objectives_ = [
        objectives.build(ObjectiveConfig(divergence="kl", tokens=tokens)) for tokens in ("all", "entropy:0.2")
    ]
    with torch.no_grad():
        hidden_ND = torch.cat([teacher.hidden(batch) for batch in BATCHES])
        values = [
            StudentLoss(student, objective, teacher_head=teacher.head()).eval()(BATCHES, hidden_ND, objective.held_out)[
                0
            ]
            for objective in objectives_
        ]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("fields", "mention"),
    [
        ({"tokens": "entropy:1.5"}, "pattern"),
        ({"tokens": "entropy:0.0"}, "pattern"),
        ({"tokens": "loss:0.5"}, "pattern"),
        ({"tokens": "entropy:0.5", "divergence": "atkd"}, "weights easy and hard tokens itself"),
        ({"tokens": "divergence:0.5", "kd_weight": 0}, "there is no divergence"),
        ({"tokens": "entropy:0.5", "divergence": "rkl", "policy_gradient": True}, "needs all tokens"),
    ],
)
def test_bad_selection_is_refused(fields, mention):
    with pytest.raises(ValidationError, match=mention):
        ObjectiveConfig(**fields)
