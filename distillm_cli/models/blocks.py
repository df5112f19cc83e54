"""Find the blocks (layers) of a model, read their outputs during a pass, and change them.

Shape letters: B sequences, T time, N supervised positions, M positions that are not padding, D width of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distillm_cli.errors import ModelError
from distillm_cli.models import seq2seq
from distillm_cli.models.backbone import Backbone
from distillm_cli.types import Batch, Sequence, collate
from distillm_cli.utils.modules import eval_mode

_DEPTHS = ("num_decoder_layers", "decoder_layers")  # of encoder-decoders; the others have num_hidden_layers


def blocks_of(backbone: Backbone) -> list[nn.Module]:
    """Return the blocks of a model, of an encoder-decoder those of the decoder. Raises ModelError if there is no list."""
    config = backbone.model.config.get_text_config()
    depths = [getattr(config, name, None) for name in _DEPTHS] if backbone.is_encoder_decoder else []
    depth = next((n for n in depths if n is not None), config.num_hidden_layers)
    trunk = backbone.trunk or backbone.model
    lists = {n: m for n, m in trunk.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise ModelError(
            "model.no_blocks",
            f"cannot find the blocks of this {config.model_type} model: its layers are not in one list",
            where=config.name_or_path or None,
            hint="use another model, or a method without masks and connectors",
        )
    return list(lists[outer[0]])


def supervised_positions(backbone: Backbone, batch: Batch) -> Tensor:
    """Return the indices [N] of the supervised positions in the flattened output of a block."""
    if backbone.is_encoder_decoder:
        return seq2seq.split_batch(batch, backbone.start).positions_N
    return batch.positions_N


def real_positions(backbone: Backbone, batch: Batch) -> Tensor:
    """Return the indices [M] of the positions up to the last supervised one of each sequence."""
    if backbone.is_encoder_decoder:
        return seq2seq.split_batch(batch, backbone.start).positions_N
    B, T = batch.ids_BT.shape
    time_N = batch.positions_N % T
    last_B = torch.full((B,), -1, dtype=torch.int64, device=time_N.device)
    last_B = last_B.scatter_reduce(0, batch.rows_N, time_N, "amax")
    return (torch.arange(T, device=time_N.device) <= last_B[:, None]).flatten().nonzero().squeeze(1)


def states_at(passes: list[Tensor], positions: list[Tensor]) -> Tensor:
    """Return the states [N, D] at these positions of the passes' outputs [B, T, D]."""
    return torch.cat([s.flatten(0, 1).index_select(0, at_N) for s, at_N in zip(passes, positions, strict=True)])


@torch.no_grad()
def block_width(backbone: Backbone) -> int:
    """Return the width of a model's blocks, measured on one token."""
    token = np.ones(1, dtype=np.int32)
    outputs = BlockOutputs(blocks_of(backbone)[-1:])
    outputs.collects = True
    outputs.attach()
    try:
        with eval_mode(backbone):
            backbone.hidden(collate([Sequence(token, token)]).to(backbone.device))
        return outputs.take()[0][0].shape[-1]
    finally:
        outputs.remove()


class BlockOutputs:
    """Collect the outputs [B, T, D] of blocks, one list per block with an output per pass, and change them first.

    change: maps (index among the blocks, output) to the output that the model continues with; None: they are only read.
    Outputs are collected while ``collects`` is set. A working copy of the model for decoding changes them in the same way.
    """

    def __init__(self, blocks: list[nn.Module], change: Callable[[int, Tensor], Tensor] | None = None):
        self.blocks = blocks
        self.change = change
        self.collects = False
        self.collected: list[list[Tensor]] = [[] for _ in blocks]
        self._handles: list[RemovableHandle] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockOutputs:
        return self

    def attach(self) -> None:
        """Register the hooks, once."""
        self.remove()
        self._handles = [
            block.register_forward_hook(partial(self._hook, index)) for index, block in enumerate(self.blocks)
        ]

    def remove(self) -> None:
        """Remove the hooks and drop what was collected."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.take()

    def take(self) -> list[list[Tensor]]:
        """Return the collected outputs by block, and forget them."""
        found, self.collected = self.collected, [[] for _ in self.blocks]
        return found

    def _hook(self, index: int, block: nn.Module, inputs: Any, output: Any) -> Any:
        """Read the output of a block: a tensor, or a tuple that begins with it."""
        states_BTD = output[0] if isinstance(output, tuple) else output
        if self.change is not None:
            states_BTD = self.change(index, states_BTD)
        if self.collects:
            self.collected[index].append(states_BTD)
        if self.change is None:
            return None
        return (states_BTD, *output[1:]) if isinstance(output, tuple) else states_BTD
