"""Distil from a teacher that may have a backdoor, in the style of RobustKD (arXiv 2406.03409).

Features of a backdoor vary more than others. A stage before the run learns, for each of the teacher's last blocks, a mask
m and a detoxified feature d, vectors of the block's width, and the block then outputs

    f' = (1 − m)·f + m·d

Only m and d are trained, on a share of the rows: CE(teacher with masks, y) + mask_weight·mean of Var(f') / Var(f). The
release has no script for this step; the loss is a reconstruction. For a mask per channel, Var(f'_c) / Var(f_c) over any
positions is (1 − m_c)², which is computed directly.

The student then learns from this teacher with any divergence, and linear connectors from its last blocks to the teacher's
masked features have the relative error ‖C(s) − f'‖² / ‖f'‖² per token as their loss (the paper's margins and batch norms
are for images).

Shape letters: K masked blocks, D their width, N supervised positions, S the width of the student's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distillm_cli.config.extras import RobustKDConfig
from distillm_cli.errors import START_OVER, CheckpointError, UsageError
from distillm_cli.extras import MASK_FILE
from distillm_cli.extras.matched_blocks import MatchedBlocks, projections
from distillm_cli.losses.extra import Extra, StudentPass
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.blocks import BlockOutputs, block_width, blocks_of, real_positions, states_at
from distillm_cli.training.distributed import world
from distillm_cli.training.state import RunInfo
from distillm_cli.types import Sequence, collate
from distillm_cli.utils.modules import eval_mode
from distillm_cli.utils.text import counted

START = 0.2  # of every m
_SMALLEST_NORM = 1e-6  # squared, of a feature vector
_SEED = 0x726B64  # added to the run's seed for the connectors


def detoxified(f: Tensor, mask_D: Tensor, feature_D: Tensor) -> Tensor:
    """Return (1 − m)·f + m·d in the dtype of f, computed in float32. With m = 0 it equals f exactly."""
    return torch.lerp(f.float(), feature_D.expand_as(f), mask_D.expand_as(f)).to(f.dtype)


def last_blocks(teacher: Backbone, count: int) -> list[nn.Module]:
    """Return the last blocks of a teacher. Raises UsageError if it has fewer."""
    blocks = blocks_of(teacher)
    if count > len(blocks):
        raise UsageError(
            "usage.invalid_blocks",
            f"robustkd.blocks = {count}: the teacher has {counted(len(blocks), 'block')}",
            hint=f"try --set robustkd.blocks={min(3, len(blocks))}",
        )
    return blocks[len(blocks) - count :]


def write_masks(directory: Path, mask_KD: Tensor, feature_KD: Tensor) -> None:
    """Write the masks and detoxified features of a stage to a directory."""
    tensors = {"mask": mask_KD, "feature": feature_KD}
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, directory / MASK_FILE)


def read_masks(directory: Path) -> tuple[Tensor, Tensor]:
    """Return what ``write_masks`` wrote. Raises CheckpointError."""
    try:
        tensors = load_file(directory / MASK_FILE)
        return tensors["mask"], tensors["feature"]
    except (OSError, KeyError, SafetensorError) as error:
        what = f"cannot read the masks in {directory / MASK_FILE} ({error})"
        raise CheckpointError("checkpoint.damaged", what, hint=START_OVER) from error


@torch.no_grad()
def mean_features(teacher: Backbone, count: int, batches: SequenceOf[SequenceOf[Sequence]]) -> Tensor:
    """Return the mean output [K, D] of a teacher's last blocks over all positions of the batches, in float32."""
    outputs = BlockOutputs(last_blocks(teacher, count))

    dist = world()

    def own_sums() -> tuple[list[Tensor], int]:
        sums: list[Tensor] = []
        positions = 0
        for i in dist.share([sum(map(len, sequences)) for sequences in batches]):
            batch = collate(batches[i]).to(teacher.device)
            with eval_mode(teacher), torch.autocast(teacher.device.type, enabled=False):
                teacher.hidden(batch)
            real_M = real_positions(teacher, batch)
            states = [states_at(passes, [real_M]).float().sum(0).to("cpu", torch.float64) for passes in outputs.take()]
            sums = states if not sums else [total + part for total, part in zip(sums, states, strict=True)]
            positions += len(real_M)
        return sums, positions

    outputs.collects = True
    outputs.attach()
    try:
        found = dist.gather(own_sums)
    finally:
        outputs.remove()
    first, *others = [torch.stack(sums) for sums, _ in found if sums]
    positions = sum(count for _, count in found)
    return (sum(others, start=first) / max(positions, 1)).float()


class MaskTraining(Extra):
    """Train the masks of a frozen teacher, which is the model whose cross-entropy is the objective.

    feature_KD: the initial detoxified features, see ``mean_features``.
    """

    def __init__(self, teacher: Backbone, feature_KD: Tensor, config: RobustKDConfig):
        super().__init__()
        self.teacher = teacher
        self.weight = config.mask_weight
        feature_KD = feature_KD.to(teacher.device)
        self.logits_KD = nn.Parameter(torch.full_like(feature_KD, math.log(START / (1 - START))))
        self.feature_KD = nn.Parameter(feature_KD.clone())
        self.outputs = BlockOutputs(last_blocks(teacher, config.blocks), self._change)
        self.outputs.attach()

    @property
    def mask_KD(self) -> Tensor:
        """Return m."""
        return self.logits_KD.sigmoid()

    def train(self, mode: bool = True) -> MaskTraining:
        """Keep the teacher in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def loss(self, done: StudentPass) -> Tensor | None:
        if not self.weight:
            return None
        share = done.targets_N.shape[0] * done.scale
        return (1 - self.mask_KD).square().mean() * (self.weight * share)

    def measure(self, batches: SequenceOf[SequenceOf[Sequence]], run: RunInfo) -> dict[str, float]:
        """Return the mean of m."""
        return {"mask": self.mask_KD.mean().item()}

    def release(self) -> None:
        self.outputs.remove()

    def _change(self, index: int, states_BTD: Tensor) -> Tensor:
        return detoxified(states_BTD, self.logits_KD[index].sigmoid(), self.feature_KD[index])


class RobustKD(MatchedBlocks):
    """Mask the blocks of a frozen teacher, and connect the student's blocks to them.

    masks: m and d [K, D], which stay constant. The masks are in effect for every use of the teacher until ``release``.
    """

    mask_KD: Tensor
    feature_KD: Tensor

    def __init__(
        self, teacher: Backbone, student: Backbone, masks: tuple[Tensor, Tensor], config: RobustKDConfig, *, seed: int
    ):
        matched = matched_blocks(blocks_of(student), config.blocks) if config.connector_weight else []
        super().__init__(
            teacher, BlockOutputs(last_blocks(teacher, config.blocks), self._change), BlockOutputs(matched)
        )
        self.weight = config.connector_weight
        device = teacher.device
        self.register_buffer("mask_KD", masks[0].to(device))
        self.register_buffer("feature_KD", masks[1].to(device))
        self.connectors = nn.ModuleList()
        if self.weight:
            widths = block_width(student), self.mask_KD.shape[1]
            self.connectors = projections(config.blocks, widths, seed=seed + _SEED).to(student.device)
        teacher.forget_fast_paths()
        self.outputs.attach()

    def loss(self, done: StudentPass) -> Tensor | None:
        """Return the connectors' relative squared error, mean over blocks and positions, with its weight and scale."""
        states = self.take_states()
        if not self.weight:
            return None
        total = done.hidden_ND.new_zeros((), dtype=torch.float32)
        for connector, (states_NS, target_ND) in zip(self.connectors, states, strict=True):
            error_ND = connector(states_NS.to(connector.weight.dtype)).float() - target_ND.float()
            norm_N = target_ND.float().square().sum(1).clamp_min(_SMALLEST_NORM)
            total = total + (error_ND.square().sum(1) / norm_N).sum()
        return total * (self.weight * done.scale / len(self.connectors))

    def _change(self, index: int, states_BTD: Tensor) -> Tensor:
        return detoxified(states_BTD, self.mask_KD[index], self.feature_KD[index])


def matched_blocks(blocks: list[nn.Module], count: int) -> list[nn.Module]:
    """Return ``count`` blocks of a student for the teacher's last ones: its last ones, evenly spread if it has fewer.

    The last is always matched with the last.
    """
    depth = len(blocks)
    if depth >= count:
        return blocks[depth - count :]
    return [blocks[-(-(k + 1) * depth // count) - 1] for k in range(count)]
