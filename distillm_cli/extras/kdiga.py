"""Align the gradients of the loss by the input, in the style of KDIGA (arXiv 2110.12072).

The paper aligns gradients by an image's pixels, so that a student inherits the robustness of an adversarially trained
teacher. Here the input is the sequence of input embeddings x of prompt and response. For a sequence with response y, with
CE the mean over its tokens, q the student and the teacher p as a constant:

    weight · mean over sequences of ‖ G(∇_x CE(q(x), y)) − G(∇_x CE(p(x), y)) ‖₂

The norm is over all positions of the sequence, and is not squared. Each model's gradient is by its own embeddings. What is
compared depends on the space:

    shared  G is the gradient itself. Widths must be equal, and the embeddings should be related (``layers:N``).
    swap    G[t, v] = (E_v − E_{x_t})·g_t / √C, the first-order change of the loss if token t is replaced by v, for C tokens
            v of the vocabulary, with the model's own embeddings E

The student's gradient has a graph (double backward), so the term is computed without dropout, in the precision of the
weights, and with torch's plain attention, which has a second derivative. Student outputs, whose tokens are not labels, have
no such term.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distillm_cli.config.extras import KDIGAConfig
from distillm_cli.errors import ModelError, out_of_memory
from distillm_cli.losses.extra import Extra, MicroRows, StudentPass, step_sum
from distillm_cli.losses.objectives import STUDENT_OUTPUTS
from distillm_cli.losses.plain import token_losses
from distillm_cli.models.backbone import Backbone
from distillm_cli.teachers.local import LanguageModel
from distillm_cli.types import Batch, Embedded, Sequence, collate
from distillm_cli.utils.modules import eval_mode

_SEED = 0x696761  # part of the seed of the candidates


@dataclass(frozen=True, eq=False)
class Draw:
    """Hold the draw of a step: the tokens to compare, None in a shared space, and 1 / the step's count of sequences."""

    candidates_C: Tensor | None
    scale: float


def input_gradients(model: LanguageModel, batch: Batch, *, with_graph: bool) -> tuple[Embedded, list[Tensor]]:
    """Return a batch's input embeddings, and the gradients by them of each sequence's mean cross-entropy.

    with_graph: both have a graph, to the model's parameters.
    """
    embedded = model.embed(batch)
    if not with_graph:
        embedded = embedded.with_tensors([x.detach() for x in embedded.tensors])
    for x in embedded.tensors:
        if not x.requires_grad:  # frozen embeddings
            x.requires_grad_()
    losses_N = token_losses(model.hidden_of(embedded), model.head(), batch.targets_N)
    lengths_B = torch.bincount(batch.rows_N, minlength=batch.size)
    # The sequences of a batch are independent, so the gradient of the sum has that of each sequence in its own rows.
    total = (losses_N / lengths_B[batch.rows_N]).sum()
    return embedded, list(torch.autograd.grad(total, embedded.tensors, create_graph=with_graph))


def compared(model: LanguageModel, embedded: Embedded, gradients: SequenceOf[Tensor], draw: Draw) -> Tensor:
    """Return what is compared of one model, [B, entries]: its gradients, or its swap scores of the drawn tokens."""
    if draw.candidates_C is None:
        return torch.cat([g_BTD.flatten(1) for g_BTD in gradients], dim=1)
    scores = []
    for k, (x_BTD, g_BTD) in enumerate(zip(embedded.tensors, gradients, strict=True)):
        candidates_CD = model.token_embeddings(draw.candidates_C, decoder=k == 1)
        own_BT1 = (g_BTD * x_BTD).sum(-1, keepdim=True)
        scores.append((g_BTD @ candidates_CD.T - own_BT1).flatten(1))
    return torch.cat(scores, dim=1) / math.sqrt(len(draw.candidates_C))


def check_second_derivative(model: Backbone) -> None:
    """Raise ModelError unless the gradient of the model's loss by its input has a gradient."""
    sequence = Sequence(np.array([0], dtype=np.int32), np.array([0, 0], dtype=np.int32))
    batch = collate([sequence]).to(model.device)
    try:
        with torch.autocast(model.device.type, enabled=False), eval_mode(model), sdpa_kernel(SDPBackend.MATH):
            _, gradients = input_gradients(model, batch, with_graph=True)
            # Not by autograd.grad, which leaves out functions that only raise an error.
            torch.stack([g_BTD.square().sum() for g_BTD in gradients]).sum().backward()
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise ModelError(
            "model.no_second_derivative",
            f"{model.model.config.model_type}: the gradient of the loss by the input cannot be differentiated",
            where=str(error).splitlines()[0][:200],
            hint="load the model with eager attention, or try --set objective.input_gradient=0",
        ) from error
    finally:
        model.zero_grad(set_to_none=True)


class KDIGA(Extra):
    """Add the distance between the models' input gradients to a step's loss.

    weight: of the term. vocab: number of token ids to draw candidates from; None compares in a shared space.
    """

    def __init__(self, teacher: LanguageModel, config: KDIGAConfig, *, weight: float, seed: int, vocab: int | None):
        super().__init__()
        # A function, so that the frozen teacher does not become a submodule that is trained and saved.
        self._teacher = lambda: teacher
        self.config = config
        self.weight = weight
        self.seed = seed
        self.vocab = vocab
        self._distances: list[Tensor] = []

    def begin_step(self, rows: SequenceOf[MicroRows], step: int) -> list[Any]:
        """Draw the step's candidates. Steps and micro-batches without the term get None."""
        self._distances = []
        labeled = [micro.source not in STUDENT_OUTPUTS for micro in rows]
        count = sum(len(micro.sequences) for micro, is_labeled in zip(rows, labeled, strict=True) if is_labeled)
        if step % self.config.every or not count:
            return [None] * len(rows)
        candidates_C = None
        if self.vocab is not None:
            generator = np.random.default_rng([self.seed, _SEED, step])
            drawn = generator.choice(self.vocab, min(self.config.candidates, self.vocab), replace=False)
            candidates_C = torch.from_numpy(drawn.astype(np.int64))
        draw = Draw(candidates_C, 1 / count)
        return [draw if is_labeled else None for is_labeled in labeled]

    def loss(self, done: StudentPass) -> Tensor | None:
        if done.drawn is None:
            return None
        draw = done.drawn
        device = done.hidden_ND.device
        if draw.candidates_C is not None:
            draw = Draw(draw.candidates_C.to(device), draw.scale)
        teacher = self._teacher()
        distances = []
        with (
            torch.autocast(device.type, enabled=False),
            eval_mode(cast(nn.Module, done.student)),
            sdpa_kernel(SDPBackend.MATH),
        ):
            for batch in done.batches:
                with torch.enable_grad():
                    embedded, gradients = input_gradients(teacher, batch, with_graph=False)
                    of_teacher = compared(teacher, embedded, gradients, draw).detach()
                of_student = compared(done.student, *input_gradients(done.student, batch, with_graph=True), draw)
                distances.append(torch.linalg.vector_norm(of_student - of_teacher.to(of_student.dtype), dim=1).sum())
        distance = torch.stack(distances).sum() * draw.scale
        self._distances.append(distance.detach())
        return self.weight * distance

    def figures(self) -> dict[str, float]:
        """Return the mean distance over the step's sequences, before the weight."""
        distance = step_sum(self._distances)
        return {} if distance is None else {"input_gradient": distance}
