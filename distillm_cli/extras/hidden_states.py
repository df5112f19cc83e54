"""Add a distance between blocks of student and teacher to the loss (``objective.hidden``).

It is the term of TinyBERT (arXiv 1909.10351), there the mean squared error between the student's states after a trained
linear map and the teacher's, and of DistilBERT (arXiv 1910.01108), there 1 − cos. Here it is a mean over the supervised
positions, and over the pairs of blocks, of the sequences of every source:

    mse     weight · mean over the width of (W s + b − t)²
    cosine  weight · (1 − cos(W s + b, t))

The maps are trained with the student and are not part of the model that is saved. With equal widths there are none.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillm_cli.config.extras import HiddenConfig
from distillm_cli.errors import UsageError
from distillm_cli.extras.matched_blocks import MatchedBlocks, projections
from distillm_cli.losses.extra import MicroRows, StudentPass, step_sum
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.blocks import BlockOutputs, block_width, blocks_of
from distillm_cli.utils.text import counted

_SEED = 0x686964  # added to the run's seed for the maps


class HiddenStates(MatchedBlocks):
    """Compare blocks of the student with blocks of a frozen teacher. weight: of the term."""

    def __init__(self, teacher: Backbone, student: Backbone, config: HiddenConfig, *, weight: float, seed: int):
        blocks = blocks_of(student), blocks_of(teacher)
        pairs = matched_pairs(config.layers, *(len(of_model) for of_model in blocks))
        chosen = [[of_model[pair[side] - 1] for pair in pairs] for side, of_model in enumerate(blocks)]
        super().__init__(teacher, BlockOutputs(chosen[1]), BlockOutputs(chosen[0]))
        self.weight = weight
        self.kind = config.loss
        widths = block_width(student), block_width(teacher)
        identities = nn.ModuleList([nn.Identity() for _ in pairs])
        maps = identities if widths[0] == widths[1] else projections(len(pairs), widths, seed=seed + _SEED)
        self.maps = maps.to(student.device)
        teacher.forget_fast_paths()
        self.outputs.attach()
        self._distances: list[Tensor] = []

    def begin_step(self, rows: SequenceOf[MicroRows], step: int) -> list[Any]:
        self._distances = []
        return super().begin_step(rows, step)

    def loss(self, done: StudentPass) -> Tensor | None:
        shares_N = done.hidden_ND.new_ones(()) if done.shares_N is None else done.shares_N
        total = done.hidden_ND.new_zeros((), dtype=torch.float32)
        for of_pair, (states_NS, target_ND) in zip(self.maps, self.take_states(), strict=True):
            mapped_ND = of_pair(states_NS.float()).float()
            target_ND = target_ND.float()
            if self.kind == "mse":
                distance_N = (mapped_ND - target_ND).square().mean(1)
            else:
                distance_N = 1 - F.cosine_similarity(mapped_ND, target_ND, dim=1)
            total = total + (distance_N * shares_N).sum()
        distance = total * (done.scale / len(self.maps))
        self._distances.append(distance.detach())
        return self.weight * distance

    def figures(self) -> dict[str, float]:
        """Return the mean distance of the step, before the weight."""
        distance = step_sum(self._distances)
        return {} if distance is None else {"hidden": distance}


def matched_pairs(layers: str, student_blocks: int, teacher_blocks: int) -> list[tuple[int, int]]:
    """Return the matched blocks of student and teacher, counted from 1. Raises UsageError for one that does not exist.

    layers: ``last``, ``even`` (block i of S with block ⌈i·T/S⌉ of T, as in TinyBERT) or pairs such as ``1:4,2:8``.
    """
    if layers == "last":
        return [(student_blocks, teacher_blocks)]
    if layers == "even":
        return [(i, -(-i * teacher_blocks // student_blocks)) for i in range(1, student_blocks + 1)]
    pairs = [(int(student), int(teacher)) for student, teacher in (pair.split(":") for pair in layers.split(","))]
    for pair in pairs:
        for name, index, count in zip(("student", "teacher"), pair, (student_blocks, teacher_blocks), strict=True):
            if not 1 <= index <= count:
                raise UsageError(
                    "usage.invalid_blocks",
                    f"hidden.layers {pair[0]}:{pair[1]}: the {name} has {counted(count, 'block')}",
                    hint=f"try --set hidden.layers={min(pair[0], student_blocks)}:{min(pair[1], teacher_blocks)}, counted "
                    "from 1",
                )
    return pairs
