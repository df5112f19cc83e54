"""Distil on mixtures of two sequences' input embeddings, in the style of MixKD (arXiv 2011.00593).

The paper mixes classified texts; here every response token is a prediction. Each sequence i of a step gets a partner j, and
one share λ ~ Beta(α, α) serves all pairs of the step and both models, each of which mixes its own embeddings:

    x = λ·E(i) + (1 − λ)·E(j)
    TMKD  Σ_t w_t·D(p(x), q(x))_t
    SM    Σ_t [λ·CE(q(x), i_t) + (1 − λ)·CE(q(x), j_t)]

Sequences are aligned where prompt and response meet, so that response token t of one meets response token t of the other.
A position that only one sequence has is that sequence's embedding, unmixed. The weight w_t of a position is λ if i predicts
a token there, plus 1 − λ if j does. Over a step the weights add up to the number of the step's tokens. A sequence with
share 0 takes no part, so that λ = 1 is the plain objective on the sequences i.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillm_cli.config.extras import MixKDConfig
from distillm_cli.losses.extra import Extra, MicroRows, StudentPass, step_sum
from distillm_cli.losses.fused import fused_loss
from distillm_cli.losses.objectives import STUDENT_OUTPUTS
from distillm_cli.losses.student_loss import concatenate
from distillm_cli.losses.weights import CROSS_ENTROPY, LossWeights, TokenWeights
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.teachers.local import LanguageModel
from distillm_cli.types import Batch, Embedded, Sequence, collate

_SEED = 0x6D6978  # part of the seed of the draws, so that they differ from those of the rows and of the samples


@dataclass(frozen=True, eq=False)
class Placement:
    """Place the embeddings of one side in mixed rows.

    index_BT: the position in the side's own row. share_BT: its share of the mixed embedding, 0 where the side has none.
    """

    index_BT: Tensor
    share_BT: Tensor

    def __call__(self, embeddings_BTD: Tensor) -> Tensor:
        rows_B1 = torch.arange(len(embeddings_BTD), device=embeddings_BTD.device)[:, None]
        placed_BTD = embeddings_BTD[rows_B1, self.index_BT.clamp(max=embeddings_BTD.shape[1] - 1)]
        return placed_BTD * self.share_BT[..., None].to(embeddings_BTD.dtype)

    def to(self, device: torch.device | str) -> Placement:
        return Placement(self.index_BT.to(device), self.share_BT.to(device))


@dataclass(frozen=True, eq=False)
class Side:
    """Hold one of the two sequences of each pair.

    batch: the sequences. placements: in the mixed input, or in the inputs of encoder and decoder. predicted_M: the
    supervised positions (0..N−1) of the mixed batch at which this side has a token, with targets_M that token and weights_M
    its weight.
    """

    batch: Batch
    placements: tuple[Placement, ...]
    predicted_M: Tensor
    targets_M: Tensor
    weights_M: Tensor

    def to(self, device: torch.device | str) -> Side:
        return Side(
            self.batch.to(device),
            tuple(placement.to(device) for placement in self.placements),
            self.predicted_M.to(device),
            self.targets_M.to(device),
            self.weights_M.to(device),
        )


@dataclass(frozen=True, eq=False)
class MixedBatch:
    """Hold a batch of mixed pairs, before either model's embeddings. positions_N, mask_BT: as in ``Embedded``."""

    sides: tuple[Side, Side]
    positions_N: Tensor
    mask_BT: Tensor | None

    @property
    def weights_N(self) -> Tensor:
        """Return the weight of each supervised position: the sum of both sides'."""
        weights_N = torch.zeros(len(self.positions_N), device=self.positions_N.device)
        for side in self.sides:
            weights_N = weights_N.index_add(0, side.predicted_M, side.weights_M)
        return weights_N

    def embed(self, model: LanguageModel) -> Embedded:
        """Return the mixture of the model's own input embeddings, with its graph."""
        first, second = (model.embed(side.batch) for side in self.sides)
        mixed = []
        for k, (of_first, of_second) in enumerate(zip(first.tensors, second.tensors, strict=True)):
            mixed.append(self.sides[0].placements[k](of_first) + self.sides[1].placements[k](of_second))
        return replace(first.with_tensors(mixed), positions_N=self.positions_N, mask_BT=self.mask_BT)

    def to(self, device: torch.device | str) -> MixedBatch:
        first, second = (side.to(device) for side in self.sides)
        return MixedBatch(
            (first, second), self.positions_N.to(device), None if self.mask_BT is None else self.mask_BT.to(device)
        )


def mix_pairs(
    first: SequenceOf[Sequence],
    second: SequenceOf[Sequence],
    share: float,
    *,
    is_encoder_decoder: bool = False,
    context: int | None = None,
    per_sequence: bool = False,
) -> MixedBatch:
    """Return the mixtures of pairs of sequences. share: λ, of the first ones.

    context: most positions of a mixed row, which otherwise loses the start of its prompt. per_sequence: a token of a
    response of n tokens has weight 1/n.
    """
    sides = (list(first), list(second))
    shares = (share, 1 - share)
    active = [side for side, part in zip(sides, shares, strict=True) if part > 0]
    prompts_B = [max(len(s.prompt) for s in pair) for pair in zip(*active, strict=True)]
    responses_B = [max(len(s.response) for s in pair) for pair in zip(*active, strict=True)]
    if is_encoder_decoder:
        starts = [[0] * len(side) for side in sides]
        inputs = _placements(starts, [[len(s.prompt) for s in side] for side in sides], shares)
        decoders = _placements(starts, [[len(s.response) for s in side] for side in sides], shares)
        placements = list(zip(inputs, decoders, strict=True))
        predicted = [[(np.arange(len(s.response)), s.response) for s in side] for side in sides]
        width = decoders[0].index_BT.shape[1]
        S = inputs[0].index_BT.shape[1]
        mask_BT = torch.arange(S) < torch.tensor(prompts_B)[:, None]
        mask = None if bool(mask_BT.all()) else mask_BT.long()
    else:
        if context is not None:
            prompts_B = [min(P, context + 1 - R) for P, R in zip(prompts_B, responses_B, strict=True)]
        starts = [[P - len(s.prompt) for P, s in zip(prompts_B, side, strict=True)] for side in sides]
        inputs = _placements(starts, [[len(s) - 1 for s in side] for side in sides], shares)
        placements = [(place,) for place in inputs]
        predicted = [
            [_predictions(s, start) for s, start in zip(side, of_side, strict=True)]
            for side, of_side in zip(sides, starts, strict=True)
        ]
        width = inputs[0].index_BT.shape[1]
        mask = None
    found = [
        _flat_predictions(side, width) if part > 0 else _NONE for side, part in zip(predicted, shares, strict=True)
    ]
    positions_N = np.unique(np.concatenate([flat_M for flat_M, _, _ in found]))
    mixed_sides = []
    for k in (0, 1):
        flat_M, targets_M, rows_M = found[k]
        weights_M = np.full(len(flat_M), shares[k])
        if per_sequence:
            weights_M /= np.array([s.supervised for s in sides[k]])[rows_M]
        mixed_sides.append(
            Side(
                collate(sides[k]),
                placements[k],
                torch.from_numpy(np.searchsorted(positions_N, flat_M)),
                torch.from_numpy(targets_M),
                torch.from_numpy(weights_M).float(),
            )
        )
    return MixedBatch((mixed_sides[0], mixed_sides[1]), torch.from_numpy(positions_N), mask)


_EMPTY = np.zeros(0, dtype=np.int64)
_NONE = (_EMPTY, _EMPTY, _EMPTY)


def _predictions(sequence: Sequence, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions in a mixed row that predict the sequence's supervised tokens, and the tokens."""
    P = len(sequence.prompt)
    positions = np.arange(P - 1, P - 1 + len(sequence.response))
    targets = sequence.response
    if sequence.turns is not None:
        positions = np.concatenate((sequence.turns.astype(np.int64) - 1, positions))
        targets = np.concatenate((sequence.prompt[sequence.turns], targets))
    positions = positions + start
    return positions[positions >= 0], targets[positions >= 0]


def _flat_predictions(
    rows: SequenceOf[tuple[np.ndarray, np.ndarray]], width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the flattened positions, the tokens and the rows of a side's predictions. width: positions of a mixed row."""
    flat = np.concatenate([positions + b * width for b, (positions, _) in enumerate(rows)]).astype(np.int64)
    targets = np.concatenate([targets for _, targets in rows]).astype(np.int64)
    return flat, targets, np.concatenate([np.full(len(positions), b) for b, (positions, _) in enumerate(rows)])


def _placements(
    starts: SequenceOf[SequenceOf[int]], lengths: SequenceOf[SequenceOf[int]], shares: tuple[float, float]
) -> tuple[Placement, Placement]:
    """Return the placements of both sides. starts: of each row in the mixed row; below 0, the row's start is cut off."""
    B = len(starts[0])
    ends = [[start + n for start, n in zip(*of_side, strict=True)] for of_side in zip(starts, lengths, strict=True)]
    T = max(1, *(end for side, share in zip(ends, shares, strict=True) if share > 0 for end in side))
    positions_T = np.arange(T)
    has_BT = []
    for of_starts, of_ends, share in zip(starts, ends, shares, strict=True):
        has = (positions_T >= np.array(of_starts)[:, None]) & (positions_T < np.array(of_ends)[:, None])
        has_BT.append(has if share > 0 else np.zeros((B, T), dtype=bool))
    both_BT = has_BT[0] & has_BT[1]
    placements = []
    for of_starts, has, share in zip(starts, has_BT, shares, strict=True):
        index_BT = np.where(has, positions_T - np.array(of_starts)[:, None], 0)
        share_BT = np.where(both_BT, share, has.astype(np.float64))
        placements.append(Placement(torch.from_numpy(index_BT), torch.from_numpy(share_BT).float()))
    return placements[0], placements[1]


class MixKD(Extra):
    """Add the losses of mixed inputs to a step.

    teacher: None for fine-tuning, which has SM alone. alpha: of the Beta distribution. context: most positions of either
    model. per_sequence: the objective's mean is per sequence first.
    """

    def __init__(
        self,
        teacher: LanguageModel | None,
        config: MixKDConfig,
        *,
        alpha: float,
        seed: int,
        is_encoder_decoder: bool = False,
        context: int | None = None,
        per_sequence: bool = False,
    ):
        super().__init__()
        # A function, so that the frozen teacher does not become a submodule that is trained and saved.
        self._teacher = lambda: teacher
        self.kd_weight = 0.0 if teacher is None else config.kd_weight
        self.ce_weight = config.ce_weight
        self.alpha = alpha
        self.seed = seed
        self.is_encoder_decoder = is_encoder_decoder
        self.context = context
        self.per_sequence = per_sequence
        self._share = 1.0
        self._losses: list[Tensor] = []

    def begin_step(self, rows: SequenceOf[MicroRows], step: int) -> list[Any]:
        """Draw λ and each sequence's partner from the step's sequences of the same source; mix by micro-batch.

        The order of a step's sequences does not depend on the micro-batches, so neither do the pairs.
        """
        generator = np.random.default_rng([self.seed, _SEED, step])
        self._share = float(generator.beta(self.alpha, self.alpha))
        self._losses = []
        of_source: dict[Source, list[Sequence]] = {}
        for micro in rows:
            of_source.setdefault(micro.source, []).extend(micro.sequences)
        partners = {
            source: iter([sequences[k] for k in generator.permutation(len(sequences))])
            for source, sequences in of_source.items()
        }
        return [
            [self._mixed(group, [next(partners[micro.source]) for _ in group]) for group in micro.groups]
            for micro in rows
        ]

    def _mixed(self, first: SequenceOf[Sequence], second: SequenceOf[Sequence]) -> MixedBatch:
        return mix_pairs(
            first,
            second,
            self._share,
            is_encoder_decoder=self.is_encoder_decoder,
            context=self.context,
            per_sequence=self.per_sequence,
        )

    def loss(self, done: StudentPass) -> Tensor | None:
        # The tokens of student outputs are not labels.
        ce_weight = 0.0 if done.source in STUDENT_OUTPUTS else self.ce_weight
        if not (self.kd_weight or ce_weight):
            return None
        student = done.student
        parts = [mixed.to(done.hidden_ND.device) for mixed in done.drawn]
        hidden_ND = concatenate([student.hidden_of(mixed.embed(student)) for mixed in parts])
        losses = []
        if self.kd_weight:
            losses.append(self._divergence(done, parts, hidden_ND))
        if ce_weight:
            losses.append(self._cross_entropy(done, parts, hidden_ND, ce_weight))
        loss = torch.stack(losses).sum()
        self._losses.append(loss.detach())
        return loss

    def _divergence(self, done: StudentPass, parts: SequenceOf[MixedBatch], hidden_ND: Tensor) -> Tensor:
        teacher = self._teacher()
        assert teacher is not None
        with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
            teacher_hidden_ND = concatenate([teacher.hidden_of(mixed.embed(teacher)) for mixed in parts])
        return fused_loss(
            hidden_ND,
            done.student.head(),
            torch.zeros(len(hidden_ND), dtype=torch.int64, device=hidden_ND.device),  # no divergence here has targets
            weights=LossWeights(kd=self.kd_weight, ce=0.0, divergence=done.weights.divergence),
            teacher_hidden_ND=teacher_hidden_ND,
            teacher_head=teacher.head(),
            token_weights=TokenWeights(weights_N=concatenate([mixed.weights_N for mixed in parts])),
            scale=done.scale,
        )

    def _cross_entropy(
        self, done: StudentPass, parts: SequenceOf[MixedBatch], hidden_ND: Tensor, weight: float
    ) -> Tensor:
        predicted = []
        start = 0
        for mixed in parts:
            predicted += [side.predicted_M + start for side in mixed.sides]
            start += len(mixed.positions_N)
        sides = [side for mixed in parts for side in mixed.sides]
        return fused_loss(
            hidden_ND.index_select(0, torch.cat(predicted)),
            done.student.head(),
            torch.cat([side.targets_M for side in sides]),
            weights=replace(CROSS_ENTROPY, ce=weight),
            token_weights=TokenWeights(weights_N=torch.cat([side.weights_M for side in sides])),
            scale=done.scale,
        )

    def figures(self) -> dict[str, float]:
        """Return the step's λ and the loss of its mixtures, nats per token."""
        return {"mixup_share": self._share, "mixup_loss": step_sum(self._losses) or 0.0}
