"""Decode token by token from prompts, with a fast path for models with full attention and a plain path for others.

All decodings have the same methods, and the fast ones are checked against plain decoding. `logits(None)` processes the
prompts, `logits(tokens_B)` appends one token to every row. Both return float32 logits [B, vocab] for the next token.
`keep(rows_B)` removes all other rows and reorders these. Gradients, dropout and autocast are off, and modes are restored
afterwards: the weights are already in the dtype for decoding (`Backbone.decode`).

Shape letters: B sequences, T time, P prompt length (padded), V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache

from distillm_cli.errors import ModelError
from distillm_cli.models import cpu
from distillm_cli.models.cpu.decode_step import decode_step_of
from distillm_cli.models.generation.cache import ContiguousCache, has_plain_cache, one_token_attention_in
from distillm_cli.models.model_families import family_of
from distillm_cli.utils.modules import eval_mode_of

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone

# Prompts are processed together if the shortest has at least this share of the longest's length, or is at most this many
# tokens shorter. Otherwise padding costs more than another pass.
CLOSE_RATIO = 7 / 8
CLOSE_LENGTH = 8
PASS_TOKENS = 4096  # more tokens in one pass exceed the processor's caches


class PlainDecoding:
    """Process all prompts in one pass, padded on the left, with the transformers cache of the model."""

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray], run: _Pass | None = None):
        self._pass = run or _Pass(backbone)
        self._has_columns_only = has_plain_cache(backbone.model.config)  # the cache holds a column for each token
        self._prompt_BP, mask_BP, self._positions_BP = _left_padded(prompts, backbone.device)
        self._mask_BT = None if mask_BP.all() else mask_BP
        self._cache = DynamicCache(config=backbone.model.config)

    @torch.no_grad()
    def logits(self, tokens_B: torch.Tensor | None) -> torch.Tensor:
        check_call_order(tokens_B, self._prompt_BP is not None)
        if tokens_B is None:
            ids_BT, self._prompt_BP = self._prompt_BP, None
        else:
            ids_BT = tokens_B.to(self._positions_BP.device)[:, None]
            self._positions_BP = self._positions_BP[:, -1:] + 1
            if self._mask_BT is not None:
                # A pure state space model needs no mask once the prompt is processed.
                self._mask_BT = None if self._pass.recurrent else F.pad(self._mask_BT, (0, 1), value=1)
        return self._pass(ids_BT, self._cache, self._mask_BT, self._positions_BP)

    def keep(self, rows_B: torch.Tensor) -> None:
        rows_B = rows_B.to(self._positions_BP.device)
        self._positions_BP = self._positions_BP[rows_B]
        if self._mask_BT is not None:
            self._mask_BT = self._mask_BT[rows_B]
        if self._prompt_BP is not None:
            self._prompt_BP = self._prompt_BP[rows_B]
            return
        # Not batch_select_indices, which the layers of state space models do not have.
        self._cache.reorder_cache(rows_B)
        if self._mask_BT is not None and self._has_columns_only:
            self._drop_columns(int(self._mask_BT.argmax(1).min()))

    def _drop_columns(self, count: int) -> None:
        """Drop the first columns, in which no row has a token. Some families have tables limited to their context."""
        if count:
            self._mask_BT = self._mask_BT[:, count:]
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[:, :, count:], layer.values[:, :, count:]


class LengthGroupedDecoding:
    """Decode prompts in groups of equal length, for models that do not support padding.

    These are, for example, models with learned positions that the caller cannot pass.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray]):
        lengths, run = np.array([len(prompt) for prompt in prompts]), _Pass(backbone)
        self._groups = [
            (torch.from_numpy(rows), PlainDecoding(backbone, [prompts[b] for b in rows], run))
            for rows in (np.flatnonzero(lengths == length) for length in np.unique(lengths))
        ]

    def logits(self, tokens_B: torch.Tensor | None) -> torch.Tensor:
        parts = [
            (rows, decoding.logits(None if tokens_B is None else tokens_B[rows.to(tokens_B.device)]))
            for rows, decoding in self._groups
        ]
        order = torch.cat([rows for rows, _ in parts]).argsort()
        logits_BV = torch.cat([part_BV for _, part_BV in parts])
        return logits_BV[order.to(logits_BV.device)]

    def keep(self, rows_B: torch.Tensor) -> None:
        rows_B, groups = rows_B.cpu(), []
        for rows, decoding in self._groups:
            in_group_B = torch.isin(rows_B, rows)  # positions in the new batch
            if in_group_B.any():
                decoding.keep(torch.searchsorted(rows, rows_B[in_group_B]))
                groups.append((in_group_B.nonzero()[:, 0], decoding))
        self._groups = groups


class FastDecoding:
    """Read prompts of similar length in one pass each, then decode all rows together over a contiguous cache (`cache`)."""

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray], *, step: bool):
        self._backbone = backbone
        self._pass = _Pass(backbone)
        self._step = decode_step_of(backbone.trunk) if step and not backbone.own_logits else None  # see models/cpu
        self._prompts: list[np.ndarray] | None = list(prompts)

    @torch.no_grad()
    def logits(self, tokens_B: torch.Tensor | None) -> torch.Tensor:
        check_call_order(tokens_B, self._prompts is not None)
        if tokens_B is None:
            return self._read_prompts()
        self._positions_B1 = self._positions_B1 + 1
        ids_B1 = tokens_B.to(self._positions_B1.device)[:, None]
        if self._step is not None:
            with torch.autocast(ids_B1.device.type, enabled=False):
                return self._pass.head.logits(self._step(ids_B1[:, 0], self._positions_B1, self._cache))
        # On CPUs transformers' kernels are slow for short queries.
        is_ours = ids_B1.device.type == "cpu" and cpu.is_enabled()
        with one_token_attention_in(self._pass.config) if is_ours else nullcontext():
            mask_B11C = self._cache.mask().expand(
                len(ids_B1), -1, -1, -1
            )  # XGLM does not accept a mask shared by all rows
            return self._pass(ids_B1, self._cache, mask_B11C, self._positions_B1)

    def _read_prompts(self) -> torch.Tensor:
        prompts, self._prompts = self._prompts, None
        device, lengths = self._backbone.device, [len(prompt) for prompt in prompts]
        self._cache = ContiguousCache(len(prompts), max(lengths), self._backbone.context)
        self._positions_B1 = torch.tensor(lengths, device=device)[:, None] - 1
        logits_BV = None
        for rows in group_by_length(lengths):
            ids_BP, mask_BP, positions_BP = _left_padded([prompts[b] for b in rows], device)
            part = DynamicCache(config=self._backbone.model.config)
            part_BV = self._pass(ids_BP, part, None if mask_BP.all() else mask_BP, positions_BP)
            self._cache.store(rows, part)
            if logits_BV is None:
                logits_BV = part_BV.new_empty((len(prompts), part_BV.shape[1]))
            logits_BV[rows] = part_BV
        # Our own step computes the softmax in float32; other kernels need the mask in the dtype of the keys.
        self._cache.start(lengths, self._backbone.model.dtype if self._step is None else torch.float32)
        return logits_BV

    def keep(self, rows_B: torch.Tensor) -> None:
        if self._prompts is not None:
            self._prompts = [self._prompts[b] for b in rows_B.tolist()]
            return
        rows_B = rows_B.to(self._positions_B1.device)
        self._positions_B1 = self._positions_B1[rows_B]
        self._cache.keep(rows_B)


class BlockDecoding(PlainDecoding):
    """Process several tokens at once and remove the latest ones, for models with full attention.

    In these each token has one column in the cache. Removing tokens moves a row's remaining columns to the right, so that
    all rows end in the same column and are padded on the left like prompts. G: tokens of a block, C: columns of the cache.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray]):
        super().__init__(backbone, prompts)
        if self._mask_BT is None:
            self._mask_BT = torch.ones_like(self._prompt_BP)

    @torch.no_grad()
    def logits_after(self, tokens_BG: torch.Tensor) -> torch.Tensor:
        """Append these tokens to the rows. Return next-token logits [B, G, V], float32, after each."""
        if self._prompt_BP is not None:
            raise ValueError("call logits(None) for the prompts first")
        G, device = tokens_BG.shape[1], self._positions_BP.device
        self._positions_BP = self._positions_BP[:, -1:] + torch.arange(1, G + 1, device=device)
        self._mask_BT = F.pad(self._mask_BT, (0, G), value=1)
        return self._pass(tokens_BG.to(device), self._cache, self._mask_BT, self._positions_BP, every=True)

    def retract(self, counts_B: torch.Tensor) -> None:
        """Remove this many of each row's latest tokens after its prompt."""
        counts_B = counts_B.to(self._positions_BP.device)
        if not counts_B.any():
            return
        self._positions_BP = self._positions_BP[:, -1:] - counts_B[:, None]
        lowest = int(counts_B.min())
        columns = self._mask_BT.shape[1] - lowest
        from_BC = torch.arange(columns, device=counts_B.device) - (counts_B - lowest)[:, None]
        has_token_BC = from_BC >= 0
        from_BC = from_BC.clamp_min(0)
        self._mask_BT = self._mask_BT.gather(1, from_BC) * has_token_BC
        for layer in self._cache.layers:
            index = from_BC[:, None, :, None]
            layer.keys, layer.values = (
                states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
                for states in (layer.keys, layer.values)
            )


def _accepted(module: nn.Module) -> set[str]:
    """Return the optional inputs of decoding that the module's forward accepts."""
    names = ("past_key_values", "cache_params", "position_ids", "logits_to_keep")
    accepts = inspect.signature(module.forward).parameters
    # The signature of a wrapper, forward(*args, **kwargs), names no inputs. The usual ones are assumed.
    usual = "input_ids" not in accepts
    return {n for n in names if n in accepts or (usual and n != "cache_params")}


class _Pass:
    """Run the model on ids [B, T] with a cache.

    Return float32 logits after the last token [B, vocab], or with ``every`` after each token [B, T, vocab].
    """

    def __init__(self, backbone: Backbone):
        self._own_logits = backbone.own_logits
        self._vocab = backbone.vocab
        self._runs = backbone.model if self._own_logits else backbone.trunk
        self._modules = list(backbone.model.modules())
        self.head = None if self._own_logits else backbone.head().prepared()
        self.config = self._runs.config
        self._accepts = _accepted(self._runs)
        self._cache_name = next((n for n in ("past_key_values", "cache_params") if n in self._accepts), None)
        self.recurrent = self._cache_name == "cache_params"
        if self._cache_name is None or family_of(backbone.model.config.model_type).decodes_in_layers:
            raise cannot_generate(backbone, "it has no standard cache")

    def __call__(
        self,
        ids_BT: torch.Tensor,
        cache: Cache,
        mask: torch.Tensor | None,
        positions_BT: torch.Tensor,
        every: bool = False,
    ) -> torch.Tensor:
        last = slice(None) if every else -1
        inputs: dict[str, Any] = {"attention_mask": mask, self._cache_name: cache}
        if "position_ids" in self._accepts:  # learned positions would count the padding too
            inputs["position_ids"] = positions_BT
        # In training mode gradient checkpointing would drop the cache without an error.
        with eval_mode_of(self._modules), torch.autocast(ids_BT.device.type, enabled=False):
            if self._own_logits:
                if "logits_to_keep" in self._accepts and not every:
                    inputs["logits_to_keep"] = 1
                return self._runs(input_ids=ids_BT, use_cache=True, **inputs).logits[:, last, : self._vocab].float()
            states_BTD = self._runs(input_ids=ids_BT, use_cache=True, **inputs)[0]
            return self.head.logits(states_BTD[:, last])


def cannot_generate(backbone: Backbone, why: str) -> ModelError:
    """Return the error for a model that can be trained but not decoded."""
    return ModelError(
        "model.cannot_generate",
        f"cannot generate with a {backbone.model.config.model_type} model: {why}",
        hint="it can be trained on data set rows: --set schedule.kind=off --set train.select=valid_loss",
    )


def check_call_order(tokens_B: torch.Tensor | None, unread: bool) -> None:
    """Raise ValueError if the prompts are passed twice or tokens come before them."""
    if (tokens_B is None) != unread:
        raise ValueError("the first call processes the prompts (None), and later calls need one token per row")


def _left_padded(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Return ids, mask and positions, each [B, P]; positions count from each prompt's first token."""
    B, P = len(prompts), max(len(prompt) for prompt in prompts)
    ids_BP, mask_BP = np.zeros((B, P), dtype=np.int64), np.zeros((B, P), dtype=np.int64)
    for b, prompt in enumerate(prompts):
        ids_BP[b, P - len(prompt) :] = prompt
        mask_BP[b, P - len(prompt) :] = 1
    positions_BP = np.maximum(mask_BP.cumsum(1) - 1, 0)
    return tuple(torch.from_numpy(x).to(device) for x in (ids_BP, mask_BP, positions_BP))


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Return row numbers in groups of similar length."""
    groups: list[list[int]] = []
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        longest = lengths[groups[-1][0]] if groups else 0
        is_similar = lengths[b] >= min(CLOSE_RATIO * longest, longest - CLOSE_LENGTH)
        if groups and is_similar and (len(groups[-1]) + 1) * longest <= PASS_TOKENS:
            groups[-1].append(b)
        else:
            groups.append([b])
    return groups
