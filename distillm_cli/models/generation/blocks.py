"""Decoding in blocks: several tokens are read at once, and the latest may be taken back again.

Shape letters: B rows, G tokens of a block, C columns of the cache, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from distillm_cli.models.generation.cache import fits
from distillm_cli.models.generation.decoding import PlainDecoding, close

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distillm_cli.models.backbone import Backbone


class BlockDecoding(PlainDecoding):
    """As its parent, for models that attend to everything: there a token that was read leaves one column behind.

    Taking tokens back moves a row's remaining columns to the right, so that all rows end in the same column and each is
    padded on the left, as prompts are.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray]):
        super().__init__(backbone, prompts)
        if self._mask_BT is None:
            self._mask_BT = torch.ones_like(self._prompt_BP)

    @torch.no_grad()
    def logits_after(self, tokens_BG: torch.Tensor) -> torch.Tensor:
        """Appends these tokens to the rows; next-token logits [B, G, V], float32, after each."""
        if self._prompt_BP is not None:
            raise ValueError("the prompts come first: logits(None)")
        G, device = tokens_BG.shape[1], self._positions_BP.device
        self._positions_BP = self._positions_BP[:, -1:] + torch.arange(1, G + 1, device=device)
        self._mask_BT = F.pad(self._mask_BT, (0, G), value=1)
        return self._pass(tokens_BG.to(device), self._cache, self._mask_BT, self._positions_BP, every=True)

    def retract(self, counts_B: torch.Tensor) -> None:
        """Takes back so many of each row's latest tokens, which were read after its prompt."""
        counts_B = counts_B.to(self._positions_BP.device)
        if not counts_B.any():
            return
        self._positions_BP = self._positions_BP[:, -1:] - counts_B[:, None]
        least = int(counts_B.min())
        columns = self._mask_BT.shape[1] - least
        from_BC = torch.arange(columns, device=counts_B.device) - (counts_B - least)[:, None]
        there_BC, from_BC = from_BC >= 0, from_BC.clamp_min(0)
        self._mask_BT = self._mask_BT.gather(1, from_BC) * there_BC
        for layer in self._cache.layers:
            index = from_BC[:, None, :, None]
            layer.keys, layer.values = (
                states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (layer.keys, layer.values)
            )


def takes_back(backbone: Backbone) -> bool:
    """Whether the model gives its own logits over tokens that came in blocks, also after some were taken back.

    Tried on short prompts, against decoding that never looks back.
    """
    if backbone.model.config.is_encoder_decoder or not fits(backbone.model.config):
        return False
    ids = np.arange(16) * 7 % backbone.vocab
    prompts = [ids[:9], ids[:3]]
    block_BG = torch.tensor([[1, 2, 3], [3, 1, 2]]) % backbone.vocab
    try:
        blocks = BlockDecoding(backbone, prompts)
        blocks.logits(None)
        blocks.logits_after(block_BG)
        blocks.retract(torch.tensor([2, 1]))
        found_BV = blocks.logits(block_BG[:, 0])
    except Exception:  # a family that reads masks or caches in a way of its own; it drafts one token at a time
        return False
    expected_BV = torch.cat(
        [
            PlainDecoding(backbone, [np.concatenate([prompts[b], block_BG[b, :n], block_BG[b, :1]])]).logits(None)
            for b, n in enumerate((1, 2))
        ]
    )
    return close(found_BV, expected_BV, backbone.model.dtype)
