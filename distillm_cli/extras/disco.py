"""Distil sentence embeddings: DisCo, the contrastive distillation of DistilCSE (arXiv 2112.05638).

Distillation, on sentences, with the teacher frozen:

    u_i = norm(W·s_i), t_j = norm(teacher's embedding of sentence j)
    infonce  L = −log exp(τ·u_i·t_i) / Σ_j exp(τ·u_i·t_j), j over the sentences of the step and the queue
    mse      L = ‖u_i − t_i‖²

W maps the student's width to the teacher's, without a bias. It starts as the identity, or as a random matrix with
orthonormal rows or columns if the widths differ, so that it keeps cosines unless the teacher is narrower. It is dropped
afterwards. τ is trained. The queue has the teacher's embeddings of the steps before, without a gradient.

Fine-tuning, on sentence pairs:

    scored pairs            L = (cos(s_1, s_2) − score)², scores from 0 to 1 (Sentence-BERT, arXiv 1908.10084)
    pairs, triples          L = −log exp(20·cos(a_i, p_i)) / Σ_j exp(20·cos(a_i, c_j)), c: positives and negatives

Shape letters: B sentences, N sentences of a micro-batch, K keys, S width of the student's embedding, D of the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillm_cli.config.extras import DisCoConfig
from distillm_cli.losses.extra import Extra, MicroRows
from distillm_cli.losses.objectives import Objective
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import LossWeights, TokenWeights
from distillm_cli.models.sentence import SentenceEncoder
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, silent
from distillm_cli.types import Batch, Sequence, collate, length_groups

PAIR_SCALE = 20.0  # τ of the fine-tuning on pairs, which is not trained
_SEED = 0x646973  # added to the run's seed for a random W
_NOTHING = LossWeights(kd=0.0, ce=0.0)


class EmbeddingObjective(Objective):
    """Count sentences, or pairs. The loss of tokens, which other objectives define, is 0."""

    def __init__(self, name: str, held_out_name: str):
        self._name = name
        self.valid_name = held_out_name

    @property
    def name(self) -> str:
        return self._name

    @property
    def held_out(self) -> LossWeights:
        return _NOTHING

    @property
    def held_out_name(self) -> str:
        return self.valid_name

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        return _NOTHING

    def count(self, sequences: SequenceOf[Sequence]) -> int:
        return len(sequences)


class EmbeddingPart(Extra):
    """Compute the loss of embeddings."""

    def embedding_loss(self, student: SentenceEncoder, batches: SequenceOf[Batch], drawn: Any, scale: float) -> Tensor:
        """Return the loss of a micro-batch with its graph. scale: 1 / the step's number of sentences or pairs."""
        raise NotImplementedError


class EmbeddingLoss(StudentLoss):
    """Combine a student and the loss of its embeddings, in the place of the loss of its tokens."""

    part: EmbeddingPart

    def __init__(self, student: SentenceEncoder, criterion: EmbeddingObjective, part: EmbeddingPart):
        super().__init__(student, criterion, extras={"disco": part})  # type: ignore[arg-type]

    def forward(
        self,
        batches: SequenceOf[Batch],
        teacher_hidden_ND: Tensor | None,
        weights: LossWeights,
        token_weights: TokenWeights | None = None,
        scale: float = 1.0,
        source: Source = Source.DATASET,
        drawn: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (the loss of the micro-batch with its graph, its number of sequences), scalars."""
        part = self.extras["disco"]
        total = part.embedding_loss(self.student, batches, drawn["disco"], scale)
        return total, torch.tensor(sum(batch.size for batch in batches), device=total.device)


def embed_together(
    encoder: SentenceEncoder, sequences: SequenceOf[Sequence], listener: Listener = silent, task: str = ""
) -> Tensor:
    """Return the embeddings of sentences [B, D], on the CPU. Each process computes a share of them, and all return all."""
    if world().size == 1:
        return encoder.embed(sequences, listener, task)

    def embed(share: list[Sequence]) -> list[np.ndarray]:
        return list(encoder.embed(share, listener, task).numpy())

    return torch.from_numpy(np.stack(world().map(embed, sequences, [len(s) for s in sequences])))


class TeacherEmbeddings:
    """Return the teacher's normalized embeddings of training sentences.

    sequences: of every sentence, by the teacher's tokenizer. all_once: compute all of them at the first use and keep them
    on the CPU; else those of a step. listener: receives the progress of the former.
    """

    def __init__(
        self,
        teacher: SentenceEncoder,
        sequences: SequenceOf[Sequence],
        *,
        all_once: bool,
        listener: Listener = silent,
    ):
        self.teacher = teacher
        self.sequences = sequences
        self.all_once = all_once
        self.listener = listener
        self._table: Tensor | None = None

    @property
    def width(self) -> int:
        return self.teacher.width

    def __call__(self, rows: SequenceOf[int]) -> Tensor:
        """Return the embeddings [B, D] of these sentences, on the teacher's device."""
        with torch.autocast(self.teacher.device.type, enabled=False):
            if not self.all_once:
                found = embed_together(self.teacher, [self.sequences[row] for row in rows])
            else:
                if self._table is None:
                    self._table = embed_together(
                        self.teacher, self.sequences, self.listener, "embedding training sentences"
                    )
                found = self._table[list(rows)]
        return F.normalize(found.to(self.teacher.device), dim=1)


@dataclass(frozen=True, eq=False)
class Keys:
    """Hold a micro-batch's part of the teacher's embeddings. keys_KD: of the step and the queue. start: its first row."""

    keys_KD: Tensor
    start: int


class Distillation(EmbeddingPart):
    """Train the projected embeddings of the student towards the teacher's.

    teacher: returns the teacher's embeddings by row. width: of the student's embeddings. The queue has the newest
    min(seen, ``config.queue``) embeddings of steps before, the oldest first.
    """

    queue_QD: Tensor

    def __init__(self, teacher: TeacherEmbeddings, width: int, config: DisCoConfig, *, seed: int):
        super().__init__()
        self.config = config
        self.teacher: Callable[[SequenceOf[int]], Tensor] = (
            teacher.__call__
        )  # not a submodule: it is not trained or saved
        self.projection = nn.Linear(width, teacher.width, bias=False)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed + _SEED)
            if width == teacher.width:
                nn.init.eye_(self.projection.weight)
            else:
                nn.init.orthogonal_(self.projection.weight)
        is_contrastive = config.loss == "infonce"
        self.temperature = nn.Parameter(torch.tensor(config.temperature)) if is_contrastive else None
        self.register_buffer("queue_QD", torch.empty(0, teacher.width))
        self._step_BD: Tensor | None = None

    def begin_step(self, rows: SequenceOf[MicroRows], step: int) -> list[Keys]:
        """Return the teacher's embeddings for each micro-batch. The negatives are those of the whole step."""
        ids = [[sequence.row for sequence in micro.sequences] for micro in rows]
        step_BD = self.teacher([row for of_micro in ids for row in of_micro])
        self._step_BD = step_BD
        keys_KD = torch.cat([step_BD, self.queue_QD]) if self.temperature is not None else step_BD
        starts = [sum(map(len, ids[:i])) for i in range(len(ids))]
        return [Keys(keys_KD, start) for start in starts]

    def embedding_loss(self, student: SentenceEncoder, batches: SequenceOf[Batch], drawn: Keys, scale: float) -> Tensor:
        states_NS = torch.cat([student(batch) for batch in batches])
        with torch.autocast(states_NS.device.type, enabled=False):
            u_ND = self.project(states_NS)
            positive_N = torch.arange(len(u_ND), device=u_ND.device) + drawn.start
            if self.temperature is None:
                return (u_ND - drawn.keys_KD[positive_N]).square().sum() * scale
            logits_NK = self.temperature * (u_ND @ drawn.keys_KD.T)
            return F.cross_entropy(logits_NK, positive_N, reduction="sum") * scale

    def project(self, states_NS: Tensor) -> Tensor:
        """Return norm(W·s) of student embeddings."""
        return F.normalize(self.projection(states_NS), dim=1)

    def end_step(self) -> None:
        """Put the step's embeddings into the queue, and drop the oldest above its capacity."""
        if self._step_BD is not None and self.temperature is not None:
            queue_QD = torch.cat([self.queue_QD, self._step_BD])
            self.queue_QD = queue_QD[max(0, len(queue_QD) - self.config.queue) :].clone()
        self._step_BD = None

    def figures(self) -> dict[str, float]:
        return {} if self.temperature is None else {"temperature": self.temperature.item()}

    def load_trained_state(self, tensors: dict[str, Tensor]) -> None:
        if "queue_QD" in tensors:  # its length depends on the step
            self.queue_QD = torch.empty_like(tensors["queue_QD"], device=self.queue_QD.device)
        super().load_trained_state(tensors)


class PairTuning(EmbeddingPart):
    """Fine-tune the student on sentence pairs.

    pairs: the sentences of each row. scores: of each row, from 0 to 1; None for pairs that are all similar. Without scores
    the negatives of an anchor are the other rows of its micro-batch.
    """

    def __init__(self, pairs: SequenceOf[SequenceOf[Sequence]], scores: SequenceOf[float] | None):
        super().__init__()
        self.pairs = pairs
        self.scores = scores

    def begin_step(self, rows: SequenceOf[MicroRows], step: int) -> list[list[int]]:
        return [[sequence.row for sequence in micro.sequences] for micro in rows]

    def embedding_loss(
        self, student: SentenceEncoder, batches: SequenceOf[Batch], drawn: list[int], scale: float
    ) -> Tensor:
        columns = zip(*(self.pairs[row] for row in drawn), strict=True)
        embeddings = [self._embed(student, column) for column in columns]
        return self.loss_of(embeddings, None if self.scores is None else [self.scores[row] for row in drawn]) * scale

    def loss_of(self, columns: SequenceOf[Tensor], scores: SequenceOf[float] | None) -> Tensor:
        """Return the sum of the losses of pairs, from the embeddings [N, S] of their first, second, … sentences."""
        with torch.autocast(columns[0].device.type, enabled=False):
            first_NS, *others = (F.normalize(column, dim=1) for column in columns)
            if scores is not None:
                cosines_N = (first_NS * others[0]).sum(1)
                return (cosines_N - torch.tensor(scores, device=cosines_N.device)).square().sum()
            logits_NK = PAIR_SCALE * (first_NS @ torch.cat(others).T)
            positive_N = torch.arange(len(first_NS), device=logits_NK.device)
            return F.cross_entropy(logits_NK, positive_N, reduction="sum")

    @staticmethod
    def _embed(student: SentenceEncoder, sequences: SequenceOf[Sequence]) -> Tensor:
        """Return the embeddings with their graph, in the order of the sequences, computed in groups of similar length."""
        places: dict[int, list[int]] = {}  # a sentence may be part of several pairs
        for i, sequence in enumerate(sequences):
            places.setdefault(id(sequence), []).append(i)
        groups = length_groups(sequences, len(sequences))
        embeddings = torch.cat([student(collate(group).to(student.device)) for group in groups])
        order = torch.tensor([places[id(s)].pop(0) for group in groups for s in group], device=embeddings.device)
        return torch.empty_like(embeddings).index_copy(0, order, embeddings)
