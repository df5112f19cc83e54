"""Store keys and values in contiguous tensors, and attend to them from one new token.

A cache that grows by concatenation copies itself for every token, and a kernel made for long queries spends most of its
time packing. Here a layer's keys and values are contiguous tensors [B, K, C, W] with a few empty columns at the end,
and a token's attention is two batched products over them. Empty columns are masked.

Shape letters: B sequences, C capacity in columns, H heads, K key-value heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

ATTENTION = "distillm_one_token"

# Columns added at a time. The cache is copied once per this many tokens and has at most this many empty columns.
_COLUMNS = 32

# Arguments of attention functions that this one does not support; a model that needs them uses plain decoding.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


class ContiguousLayer(DynamicLayer):
    """Hold one layer's keys and values in contiguous tensors. length: number of filled columns."""

    def __init__(self, rows: int, columns: int, max_columns: int | None):
        super().__init__()
        self.rows = rows
        self.length = columns
        self.max_columns = max_columns

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def store(self, rows: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the states of some rows' prompts. Their last token is in column ``length − 1``."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            capacity = _grown(self.length, self.max_columns)
            self.keys, self.values = (_zeros(x, self.rows, capacity) for x in (keys, values))
        columns = slice(self.length - keys.shape[2], self.length)
        self.keys[rows, :, columns], self.values[rows, :, columns] = keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.append(key_states[:, :, 0], value_states[:, :, 0])
        return self.keys, self.values

    def append(self, key_BKW: torch.Tensor, value_BKW: torch.Tensor) -> None:
        """Append one token of every row."""
        if self.length == self.capacity:
            columns = _grown(self.length, self.max_columns)
            self.keys, self.values = _longer(self.keys, columns), _longer(self.values, columns)
        self.keys[:, :, self.length], self.values[:, :, self.length] = key_BKW, value_BKW
        self.length += 1

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0


class ContiguousCache(Cache):
    """Hold contiguous layers and the mask of their filled columns.

    rows: B. columns: of the longest prompt. max_columns: the model's context, to which some tables are limited. The
    additive mask [B or 1, 1, 1, C] is 0 or the least number.
    """

    def __init__(self, rows: int, columns: int, max_columns: int | None = None):
        super().__init__(layers=[])
        self.rows = rows
        self.columns = columns
        self.max_columns = max_columns
        self.mask_B11C: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return self.layers[0].length

    def store(self, rows: list[int], part: DynamicCache) -> None:
        """Store the cache ``part`` of a pass over some rows' prompts, padded on the left."""
        if not self.layers:
            self.layers = [ContiguousLayer(self.rows, self.columns, self.max_columns) for _ in part.layers]
        for mine, theirs in zip(self.layers, part.layers, strict=True):
            mine.store(rows, theirs.keys, theirs.values)

    def start(self, lengths: list[int], dtype: torch.dtype) -> None:
        """Mask the padding of the stored prompts and the empty columns. dtype: of the scores."""
        lengths = lengths[:1] if min(lengths) == max(lengths) else lengths
        device = self.layers[0].keys.device
        column_C = torch.arange(self.layers[0].capacity, device=device)
        start_B1 = self.columns - torch.tensor(lengths, device=device)[:, None]
        hidden_BC = (column_C < start_B1) | (column_C >= self.columns)
        mask_BC = torch.zeros(hidden_BC.shape, dtype=dtype, device=device)
        self.mask_B11C = mask_BC.masked_fill_(hidden_BC, torch.finfo(dtype).min)[:, None, None]

    def mask(self) -> torch.Tensor:
        """Return the mask for the next token, which attends to itself."""
        if self.length == self.mask_B11C.shape[-1]:
            minimum = torch.finfo(self.mask_B11C.dtype).min
            more = _grown(self.length, self.max_columns) - self.length
            self.mask_B11C = torch.nn.functional.pad(self.mask_B11C, (0, more), value=minimum)
        self.mask_B11C[..., self.length] = 0
        return self.mask_B11C

    def keep(self, rows_B: torch.Tensor) -> None:
        if self.mask_B11C.shape[0] > 1:
            self.mask_B11C = self.mask_B11C[rows_B]
        empty = int((self.mask_B11C[:, 0, 0] == 0).int().argmax(1).min())  # columns where none of the rows has a token
        self.mask_B11C = self.mask_B11C[..., empty:]
        for layer in self.layers:
            layer.keys, layer.values = (x[:, :, empty:].index_select(0, rows_B) for x in (layer.keys, layer.values))
            layer.length -= empty


def has_plain_cache(config: PretrainedConfig) -> bool:
    """Return whether every layer attends to all earlier tokens: no sliding window, state space or shared cache."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def one_token_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Compute attention with transformers' signature: queries of one token [B, H, 1, W] → [B, 1, H, W], no weights.

    The softmax is in float32; the mask comes in the model's dtype, for families with their own attention.
    """
    if unsupported := [name for name in _UNKNOWN if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention with {' and '.join(unsupported)}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_one_token(query[:, :, 0], key, value, attention_mask.float(), scaling)[:, None], None


def attend_one_token(
    query_BHW: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask_B11C: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return softmax(query · keyᵀ · scaling + mask) · value [B, H, W], one query per head over keys, values [B, K, C, W].

    Scores are rounded to the dtype of the keys; their softmax is in the mask's. Heads that share keys are computed in
    one product.
    """
    B, K, C, W = key.shape
    query = query_BHW.reshape(B * K, -1, W)
    scores = torch.bmm(query, key.view(B * K, C, W).transpose(1, 2)).view(B, K, -1, C)
    weights = torch.softmax(torch.add(mask_B11C, scores, alpha=scaling), -1).to(value.dtype)
    return torch.bmm(weights.view(B * K, -1, C), value.view(B * K, C, -1)).view(B, -1, value.shape[-1])


AttentionInterface.register(ATTENTION, one_token_attention)


@contextmanager
def one_token_attention_in(config: PretrainedConfig) -> Iterator[None]:
    """Make models with this config use `one_token_attention` inside the block."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _zeros(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    # Zeros, not empty: a masked column is multiplied by a weight of 0, and 0 · nan is nan.
    return torch.zeros((rows, like.shape[1], columns, like.shape[3]), dtype=like.dtype, device=like.device)


def _grown(length: int, max_columns: int | None) -> int:
    """Return the new number of columns, given the number of full ones; larger by at least one, even beyond the context."""
    return length + _COLUMNS if max_columns is None else max(length + 1, min(length + _COLUMNS, max_columns))


def _longer(states: torch.Tensor, columns: int) -> torch.Tensor:
    longer = _zeros(states, states.shape[0], columns)
    longer[:, :, : states.shape[2]] = states
    return longer
