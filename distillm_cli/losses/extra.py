"""Define extras: parts with a loss of their own that train beside the student's objective.

An extra is a module inside ``StudentLoss``, so that wrappers see its parameters, and has one or more of four roles:

- It trains the teacher (``TrainedTeacher``): its parameters are on the teacher's side and learn at a rate of their own.
- It runs both models on changed input embeddings (``LanguageModel.hidden_of``): one draw in ``begin_step`` serves both.
- It holds parameters and buffers, such as projections or a queue. They are in every checkpoint, and not in the output
  directory unless ``export`` writes them.
- It uses what a stage before the run has trained.

To add one: a section in ``config/extras.py``, and a file in ``extras/`` with the class and the function that builds it,
which ``extras.build_extras`` calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distillm_cli.losses.fused import fused_loss
from distillm_cli.losses.weights import LossWeights, TokenWeights
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.teachers.local import LanguageModel
from distillm_cli.training.distributed import world
from distillm_cli.training.state import RunInfo
from distillm_cli.types import Batch, LengthGroups, Sequence

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone


@dataclass(frozen=True, eq=False)
class MicroRows:
    """Hold the sequences of a micro-batch, in the order of its collated batches."""

    source: Source
    groups: LengthGroups

    @property
    def sequences(self) -> list[Sequence]:
        return [s for group in self.groups for s in group]


@dataclass(frozen=True, eq=False)
class StudentPass:
    """Hold a micro-batch after the student's forward pass.

    hidden_ND: the student's states at the supervised positions, with their graph. teacher_hidden_ND: the teacher's, with
    a graph if it is trained; None if the objective does not need them. weights: of the objective. scale: 1 / the step's
    count of tokens. shares_N: 1/n for a token of a response of n tokens, with ``reduction: sequence``; None if every token
    has the same weight. drawn: what the extra's ``begin_step`` returned for this micro-batch.
    """

    student: LanguageModel
    source: Source
    batches: SequenceOf[Batch]
    hidden_ND: Tensor
    targets_N: Tensor
    teacher_hidden_ND: Tensor | None
    weights: LossWeights
    scale: float
    shares_N: Tensor | None = None
    drawn: Any = None


class Extra(nn.Module):
    """Add a loss to a step.

    lr_ratio: its learning rate, as a multiple of the student's. trains_teacher: its parameters are the teacher's, so
    that its gradient is clipped separately and its loss is not part of the reported one.
    """

    lr_ratio: float = 1.0
    trains_teacher: bool = False

    def begin_step(self, rows: SequenceOf[MicroRows], step: int) -> list[Any]:
        """Return what ``loss`` needs for each micro-batch. Draws are functions of the seed and ``step`` (from 0)."""
        return [None] * len(rows)

    def student_weights(self, weights: LossWeights, source: Source) -> LossWeights:
        """Return the weights of the objective on a micro-batch of this source."""
        return weights

    def loss_name(self, name: str) -> str:
        """Return the name of the student's loss, from that of the objective."""
        return name

    def loss(self, done: StudentPass) -> Tensor | None:
        """Return the loss of a micro-batch with its graph, already scaled by its share of the step; None without one."""
        return None

    def end_step(self) -> None:
        """Update buffers after the optimizer's step. Nothing that a retried step reads may change before."""

    def figures(self) -> dict[str, float]:
        """Return figures of the step, by name, for the metrics."""
        return {}

    def measure(self, batches: SequenceOf[SequenceOf[Sequence]], run: RunInfo) -> dict[str, float]:
        """Return figures on held-out rows, by name. The caller sets evaluation mode and ``no_grad``."""
        return {}

    def release(self) -> None:
        """Undo what the extra has changed in the models of the run, such as hooks. It is not used afterwards."""

    def save_weights(self, directory: Path) -> None:
        """Write the weights that a checkpoint keeps together with the student's, also the checkpoint of the best step."""

    def load_weights(self, directory: Path) -> None:
        """Restore what ``save_weights`` wrote into a checkpoint's directory."""

    def export(self, directory: Path) -> None:
        """Write what the output directory keeps of this extra."""

    def trained_state(self) -> dict[str, Tensor]:
        """Return the tensors that training changes, by name: trained parameters and the extra's own buffers."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        return trained | dict(self.named_buffers(recurse=False))

    @torch.no_grad()
    def load_trained_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what ``trained_state`` returned. Raises ValueError if names or shapes differ."""
        current = self.trained_state()
        if current.keys() != tensors.keys():
            raise ValueError(
                f"tensors of {type(self).__name__} do not match: {sorted(current.keys() ^ tensors.keys())[:2]}"
            )
        for name, tensor in tensors.items():
            if current[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(current[name].shape)}")
            current[name].copy_(tensor)


def step_sum(losses: SequenceOf[Tensor]) -> float | None:
    """Return the sum of a step's losses in all processes; None without any. Every process calls it."""
    sums = world().gather(lambda: float(torch.stack(list(losses)).sum()) if losses else None)
    found = [loss for loss in sums if loss is not None]
    return sum(found) if found else None


def with_cross_entropy(name: str) -> str:
    """Return the name of an objective's loss with an additional cross-entropy: "CE + kl"."""
    return name if name.startswith("CE") else f"CE + {name}"


class TeacherPass(Extra):
    """Compute the teacher's states in training, within the forward pass of ``StudentLoss``. teacher: the model."""

    def __init__(self, teacher: Backbone):
        super().__init__()
        self.teacher = teacher

    def hidden(self, batches: SequenceOf[Batch]) -> Tensor:
        """Return the teacher's states at the supervised positions, with a graph if the teacher is trained."""
        raise NotImplementedError


class TrainedTeacher(TeacherPass):
    """Train parameters of the teacher.

    in_training_precision: it computes as the student does, under autocast, and not in a dtype of its own.
    """

    trains_teacher = True
    in_training_precision = False

    def own_loss(
        self, done: StudentPass, weights: LossWeights, *, matmul_dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """Return the teacher's loss of a micro-batch, with the student's distribution as a constant; None if it is 0.

        The divergence of ``weights`` is D(student, teacher). matmul_dtype: of the teacher's head, as in ``fused_loss``.
        """
        if done.teacher_hidden_ND is None or not (weights.kd or weights.ce):
            return None
        return fused_loss(
            done.teacher_hidden_ND,
            self.teacher.head(),
            done.targets_N,
            weights=weights,
            teacher_hidden_ND=done.hidden_ND.detach() if weights.kd else None,
            teacher_head=done.student.head() if weights.kd else None,
            token_weights=TokenWeights(weights_N=done.shares_N),
            matmul_dtype=matmul_dtype,
            scale=done.scale,
        )

    def start_weights(self) -> Mapping[str, Tensor]:
        """Return the values from before training of what ``teacher.state()`` returns, on the CPU."""
        raise NotImplementedError

    @contextmanager
    def with_start_weights(self) -> Iterator[None]:
        """Give the teacher its weights from before training inside the block, and its current ones afterwards."""
        weights = dict(self.start_weights())
        self.teacher.swap_state(weights)
        try:
            yield
        finally:
            self.teacher.swap_state(weights)

    def trained_state(self) -> dict[str, Tensor]:
        """Return nothing: the teacher's weights are files of the checkpoint (``save_weights``)."""
        return {}
