"""Pre-train a student on the teacher's confidence, in the style of Pea-KD's PTP (arXiv 2009.14822).

Each supervised token of the training rows has one of four labels: the teacher's likeliest token is right or wrong, and the
teacher is confident or not. The student learns them with a linear layer of its own, which is dropped afterwards. The paper
labels whole examples of a classification, with thresholds chosen by task. Here the labels are those of tokens, and the
thresholds are the median confidences of the right and of the wrong tokens, so that all four classes have members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillm_cli.losses.extra import Extra, MicroRows, StudentPass
from distillm_cli.losses.fused import HeadLike
from distillm_cli.losses.objectives import CrossEntropy
from distillm_cli.teachers.local import LanguageModel
from distillm_cli.training.distributed import world
from distillm_cli.training.state import RunInfo
from distillm_cli.types import Batch, Sequence, collate

CLASSES = ("confident_right", "unconfident_right", "confident_wrong", "unconfident_wrong")
_SEED = 0x707470  # added to the run's seed, so that the layer does not start with the student's random numbers
_CHUNK = 1024  # tokens whose logits are in memory at once


@dataclass(frozen=True, eq=False)
class Confidence:
    """Hold, for the N supervised tokens of a sequence, the teacher's highest log-probability and whether it is right."""

    log_p_N: Tensor
    is_right_N: Tensor


@torch.no_grad()
def confidence_of(
    batches: Iterable[SequenceOf[Sequence]],
    hidden: Callable[[Batch, SequenceOf[Sequence]], Tensor],
    head: Callable[[], HeadLike],
    device: torch.device,
) -> dict[Sequence, Confidence]:
    """Return the teacher's confidence in the tokens of every sequence. hidden: returns its states [N, D] for a batch.

    Each process computes a share of the batches, and all return all.
    """

    def of_batches(share: list[SequenceOf[Sequence]]) -> list[list[Confidence]]:
        return [of_batch(sequences) for sequences in share]

    def of_batch(sequences: SequenceOf[Sequence]) -> list[Confidence]:
        batch = collate(sequences).to(device)
        hidden_ND = hidden(batch, sequences)
        log_p_parts, right_parts = [], []
        for states_ND, targets_N in zip(hidden_ND.split(_CHUNK), batch.targets_N.split(_CHUNK), strict=True):
            highest = head().logits(states_ND).log_softmax(-1).max(-1)
            log_p_parts.append(highest.values.cpu())
            right_parts.append((highest.indices == targets_N).cpu())
        lengths = [s.supervised for s in sequences]
        parts = zip(torch.cat(log_p_parts).split(lengths), torch.cat(right_parts).split(lengths), strict=True)
        return [Confidence(log_p_N.clone(), is_right_N.clone()) for log_p_N, is_right_N in parts]

    batches = list(batches)
    found = world().map(of_batches, batches, [sum(map(len, sequences)) for sequences in batches])
    return dict(zip(chain.from_iterable(batches), chain.from_iterable(found), strict=True))


def medians(confidences: Iterable[Confidence]) -> dict[bool, float]:
    """Return the median log-probability of the right tokens and of the wrong ones; 0 without such tokens."""
    found = list(confidences)
    log_p_N = torch.cat([c.log_p_N for c in found])
    is_right_N = torch.cat([c.is_right_N for c in found])
    parts = {is_right: log_p_N[is_right_N == is_right] for is_right in (True, False)}
    return {is_right: part_N.median().item() if len(part_N) else 0.0 for is_right, part_N in parts.items()}


def labels_of(confidence: Confidence, thresholds: Mapping[bool, float]) -> Tensor:
    """Return the index in ``CLASSES`` of each token [N]. A confidence at the threshold counts as confident."""
    threshold_N = torch.where(confidence.is_right_N, thresholds[True], thresholds[False])
    is_unconfident_N = confidence.log_p_N < threshold_N.to(confidence.log_p_N.dtype)
    return 2 * (~confidence.is_right_N).long() + is_unconfident_N.long()


class ConfidenceOnly(CrossEntropy):
    """Train with no loss of the student's own head. Held-out rows are measured as in fine-tuning."""

    name = "CE of four classes"
    has_loss = False


class ConfidenceHead(Extra):
    """Predict the teacher's class of confidence from the student's states.

    labels: the class of each supervised token, by sequence, for training rows and held-out rows.
    """

    def __init__(self, student: LanguageModel, labels: Mapping[Sequence, Tensor], *, seed: int, device: torch.device):
        super().__init__()
        weight_VD = student.head().weight_VD
        width = student.vocab if weight_VD is None else weight_VD.shape[1]  # without a head, the states are logits
        self.head = nn.Linear(width, len(CLASSES), device=device)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed + _SEED)
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=generator) * width**-0.5)
            self.head.bias.zero_()
        self.labels = labels
        self._student = lambda: student  # a function, so that the student does not become a part of this module

    def begin_step(self, rows: SequenceOf[MicroRows], step: int) -> list[Tensor]:
        """Return the labels of each micro-batch's tokens."""
        return [torch.cat([self.labels[s] for s in micro.sequences]) for micro in rows]

    def loss(self, done: StudentPass) -> Tensor:
        labels_N = done.drawn.to(done.hidden_ND.device)
        return F.cross_entropy(self._logits(done.hidden_ND), labels_N, reduction="sum") * done.scale

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            return self.head(hidden_ND.to(self.head.weight.dtype))

    def measure(self, batches: SequenceOf[SequenceOf[Sequence]], run: RunInfo) -> dict[str, float]:
        """Return the share of tokens whose class is predicted: of all tokens, and of each class that occurs."""
        right = torch.zeros(len(CLASSES), dtype=torch.int64)
        total = torch.zeros(len(CLASSES), dtype=torch.int64)
        for sequences in batches:
            with run.autocast():
                hidden_ND = self._student().hidden(collate(sequences).to(run.device))
            labels_N = torch.cat([self.labels[s] for s in sequences])
            is_right_N = self._logits(hidden_ND).argmax(-1).cpu() == labels_N
            total += torch.bincount(labels_N, minlength=len(CLASSES))
            right += torch.bincount(labels_N[is_right_N], minlength=len(CLASSES))
        if not total.sum():
            return {}
        shares = {f"ptp_{name}": (r / n).item() for name, r, n in zip(CLASSES, right, total, strict=True) if n}
        return {"ptp_accuracy": (right.sum() / total.sum()).item()} | shares
