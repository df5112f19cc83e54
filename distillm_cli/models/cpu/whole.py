"""Whole sequences through a GPT-2 or a Llama-like trunk, written out: states at the supervised positions, and no more.

What transformers computes, less what nobody reads: of the last block only keys and values are needed at every position;
queries, output projection, MLP and final norm at the supervised ones alone. GPT-2's GELU is one operation, attention in
bfloat16 is products over blocks of queries, and weights that are frozen are laid out once (`products.Linear`). The layers
are called as modules, so that autocast, dropout and gradients are theirs. Like the step for one token (`steps.py`) this is
used for the classes of transformers it was written after and nothing else, and only where it gives the trunk's own states.

Shape letters: B sequences, T time, M = B·T positions, N supervised positions, Q most supervised positions of a sequence,
D width, H heads, K key-value heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distillm_cli.models.cpu.products import Packs, can_pack
from distillm_cli.models.cpu.steps import altered, fused_act, is_gpt2, is_llama, is_small, weights_of
from distillm_cli.models.generation.cache import fits
from distillm_cli.types import Batch

# Queries of a block: its keys end where it ends, which is where a causal mask saves half of the work.
_QUERIES = 128

# In training the blocks keep their weights, T² of them for a head, which the kernel for long sequences does not: up to
# here that is a fraction of what else a block keeps.
_LONGEST = 512

KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")  # for which a pass is written out

Whole = Callable[[Batch], Tensor]


class Late:
    """The gradient of a tied matrix by its use as an embedding, held back until that by its use as a head is there.

    A batch looks up few of the matrix's rows. Autograd would make a table of its height for each batch, or copy the head's
    for each sparse one; here the rows are added to ``weight.grad`` where their tokens are, at the end of each backward pass.
    """

    def __init__(self, weight_VD: nn.Parameter):
        self.weight_VD = weight_VD
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def rows(self, ids_BT: Tensor, padding: int | None) -> Tensor:
        """[B, T, D]. padding: the token whose row learns nothing here."""
        return _LateRows.apply(self.weight_VD, ids_BT, padding, self)

    def hold(self, ids_M: Tensor, grad_MD: Tensor) -> None:
        """In a backward pass: until its end, when all other gradients are there."""
        if not self._waiting:
            torch.autograd.Variable._execution_engine.queue_callback(self._add)
        self._waiting.append((ids_M, grad_MD))

    def drop(self) -> None:
        """What a backward pass left that did not come to its end."""
        self._waiting.clear()

    def _add(self) -> None:
        weight_VD = self.weight_VD
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        for ids_M, grad_MD in self._waiting:
            weight_VD.grad.index_add_(0, ids_M, grad_MD.to(weight_VD.grad.dtype))
        self._waiting.clear()


class _LateRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_VD: Tensor, ids_BT: Tensor, padding: int | None, late: Late) -> Tensor:
        ctx.ids_M, ctx.padding, ctx.late = ids_BT.flatten(), padding, late
        return F.embedding(ids_BT, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTD: Tensor) -> tuple[None, ...]:
        ids_M, grad_MD = ctx.ids_M, grad_BTD.flatten(0, 1)
        if ctx.padding is not None:
            ids_M, grad_MD = ids_M[(kept := ids_M != ctx.padding)], grad_MD[kept]
        ctx.late.hold(ids_M, grad_MD)
        return None, None, None, None


def whole_of(trunk: nn.Module | None, packs: Packs, late: Late | None = None) -> Whole | None:
    """The pass over this trunk, its weights as they are now: batch → last hidden states [N, D]; None where none was
    written for it. packs: the layouts of frozen weights, kept from one pass to the next. late: of the embedding matrix,
    where that is the head's too.

    On a CPU only: elsewhere transformers' own kernels are good, and this was not measured.
    """
    if trunk is None or next(trunk.parameters()).device.type != "cpu" or not fits(trunk.config):
        return None
    if trunk.config._attn_implementation not in ("sdpa", "eager") or any(altered(module) for module in trunk.modules()):
        return None
    if trunk.training and getattr(trunk, "gradient_checkpointing", False):
        return None
    packs = packs if is_small(weights_of(trunk)) else None
    if is_gpt2(trunk):
        return _Gpt2(trunk, packs, late)
    return _Llama(trunk, packs, late) if is_llama(trunk) else None


def has_layouts(kind: str, weights: int) -> bool:
    """Whether the frozen bf16 weights of a model of this kind (``model_type``) and size lie here in a second layout too."""
    return kind in KINDS and is_small(weights) and can_pack()


class _Supervised:
    """Where a batch's supervised positions are, as rows of queries [B, Q]; shorter rows are filled up."""

    def __init__(self, batch: Batch):
        self.positions_N = batch.positions_N
        self.B, self.T = batch.ids_BT.shape
        counts_B = torch.bincount(batch.rows_N, minlength=self.B)
        self.Q = max(int(counts_B.max()), 1)
        slot_N = torch.arange(len(batch.rows_N)) - (counts_B.cumsum(0) - counts_B)[batch.rows_N]
        self.place_N = batch.rows_N * self.Q + slot_N
        self.is_full = len(self.place_N) == self.B * self.Q
        self.time_N = self.positions_N % self.T
        time_BQ = torch.zeros(self.B * self.Q, dtype=torch.int64)
        time_BQ[self.place_N] = self.time_N
        self.hidden_B1QT = torch.arange(self.T) > time_BQ.view(self.B, 1, self.Q, 1)

    def spread(self, x_ND: Tensor) -> Tensor:
        """[N, D] → [B, Q, D]."""
        if not self.is_full:
            x_ND = x_ND.new_zeros(self.B * self.Q, x_ND.shape[1]).index_copy(0, self.place_N, x_ND)
        return x_ND.view(self.B, self.Q, -1)

    def gather(self, x_BQD: Tensor) -> Tensor:
        """Back again."""
        x_ND = x_BQD.reshape(self.B * self.Q, -1)
        return x_ND if self.is_full else x_ND.index_select(0, self.place_N)


class _Gpt2:
    def __init__(self, trunk: nn.Module, packs: Packs | None, late: Late | None):
        self.trunk, self.late = trunk, late
        self.blocks = [_Gpt2Block(block, packs, last=block is trunk.h[-1]) for block in trunk.h]

    def __call__(self, batch: Batch) -> Tensor:
        trunk, ids_BT = self.trunk, batch.ids_BT
        x_BTD = trunk.drop(_embedded(trunk.wte, ids_BT, self.late) + trunk.wpe(torch.arange(ids_BT.shape[1])))
        x_MD, supervised = x_BTD.flatten(0, 1), _Supervised(batch)
        for block in self.blocks:
            x_MD = block(x_MD, supervised)
        return trunk.ln_f(x_MD)


class _Gpt2Block:
    """Of the last one the states at the supervised positions [N, D], of the others all [M, D]."""

    def __init__(self, block: nn.Module, packs: Packs | None, *, last: bool):
        attention, mlp = block.attn, block.mlp
        self.block, self.act, self.last = block, fused_act(mlp.act), last
        D = attention.embed_dim
        parts = (slice(0, D), slice(D, 3 * D)) if last else (slice(0, 3 * D),)
        self.qkv = [_Product(attention.c_attn, packs, part) for part in parts]
        self.out, self.up, self.down = (_Product(layer, packs) for layer in (attention.c_proj, mlp.c_fc, mlp.c_proj))

    def __call__(self, x_MD: Tensor, supervised: _Supervised) -> Tensor:
        block, attention, T = self.block, self.block.attn, supervised.T
        normed_MD = block.ln_1(x_MD)

        def heads(states: Tensor, kinds: int) -> tuple[Tensor, ...]:
            """[B · times, kinds · D] → as many [B, H, times, W]."""
            states = states.view(supervised.B, -1, kinds, attention.num_heads, attention.head_dim)
            return states.permute(2, 0, 3, 1, 4).unbind(0)

        if self.last:
            x_MD, query_ND = x_MD.index_select(0, supervised.positions_N), self._query(normed_MD, supervised)
            (query,) = heads(supervised.spread(query_ND).flatten(0, 1), 1)
            key, value = heads(self.qkv[1](normed_MD), 2)
        else:
            query, key, value = heads(self.qkv[0](normed_MD), 3)
        dropout = attention.attn_dropout.p if attention.training else 0.0
        seen = attend(query, key, value, attention.scaling, supervised.hidden_B1QT if self.last else None, dropout)
        seen = supervised.gather(seen) if self.last else seen.reshape(supervised.B * T, -1)
        x_MD = x_MD + attention.resid_dropout(self.out(seen))
        return x_MD + block.mlp.dropout(self.down(self.up(block.ln_2(x_MD), self.act)))

    def _query(self, normed_MD: Tensor, supervised: _Supervised) -> Tensor:
        return self.qkv[0](normed_MD.index_select(0, supervised.positions_N))


class _Llama:
    def __init__(self, trunk: nn.Module, packs: Packs | None, late: Late | None):
        self.trunk, self.late = trunk, late
        layers = trunk.layers[: trunk.config.num_hidden_layers]
        self.layers = [_LlamaLayer(layer, packs, last=layer is layers[-1]) for layer in layers]

    def __call__(self, batch: Batch) -> Tensor:
        trunk, ids_BT = self.trunk, batch.ids_BT
        x_BTD, supervised = _embedded(trunk.embed_tokens, ids_BT, self.late), _Supervised(batch)
        cos_1TW, sin_1TW = trunk.rotary_emb(x_BTD, torch.arange(supervised.T)[None])
        x_MD = x_BTD.flatten(0, 1)
        for layer in self.layers:
            x_MD = layer(x_MD, supervised, cos_1TW[0, :, None], sin_1TW[0, :, None])
        return trunk.norm(x_MD)


class _LlamaLayer:
    """Of the last one the states at the supervised positions [N, D], of the others all [M, D]."""

    def __init__(self, layer: nn.Module, packs: Packs | None, *, last: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.act, self.last = layer, fused_act(mlp.act_fn), last
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        self.query, self.key, self.value, self.out = (_Product(linear, packs) for linear in projections)
        self.gate, self.up, self.down = (
            _Product(linear, packs) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )

    def __call__(self, x_MD: Tensor, supervised: _Supervised, cos_T1W: Tensor, sin_T1W: Tensor) -> Tensor:
        layer, attention, B, T = self.layer, self.layer.self_attn, supervised.B, supervised.T
        normed_MD = layer.input_layernorm(x_MD)
        key, value = (product(normed_MD).view(B, T, -1, attention.head_dim) for product in (self.key, self.value))
        key = self._turned(key, "k_norm", cos_T1W, sin_T1W)
        if self.last:
            x_MD, time_N = x_MD.index_select(0, supervised.positions_N), supervised.time_N
            query = self.query(normed_MD.index_select(0, supervised.positions_N)).view(
                len(x_MD), -1, attention.head_dim
            )
            query = self._turned(query, "q_norm", cos_T1W[time_N], sin_T1W[time_N])
            query = supervised.spread(query.flatten(1)).view(B, supervised.Q, -1, attention.head_dim)
        else:
            query = self.query(normed_MD).view(B, T, -1, attention.head_dim)
            query = self._turned(query, "q_norm", cos_T1W, sin_T1W)
        dropout = attention.attention_dropout if attention.training else 0.0
        hidden = supervised.hidden_B1QT if self.last else None
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        seen = attend(query, key, value, attention.scaling, hidden, dropout)
        seen = supervised.gather(seen) if self.last else seen.reshape(B * T, -1)
        x_MD = x_MD + self.out(seen)
        normed_MD = layer.post_attention_layernorm(x_MD)
        return x_MD + self.down(self.act(self.gate(normed_MD)) * self.up(normed_MD))

    def _turned(self, states: Tensor, norm: str, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed where the family does that, and turned by its position: [..., heads, W], in the dtype it came in."""
        normed = getattr(self.layer.self_attn, norm)(states) if hasattr(self.layer.self_attn, norm) else states
        first, second = normed.chunk(2, -1)
        return (normed * cos + torch.cat([-second, first], -1) * sin).to(states.dtype)


def _embedded(table: nn.Embedding, ids_BT: Tensor, late: Late | None) -> Tensor:
    if late is None or table.max_norm is not None or table.scale_grad_by_freq or not torch.is_grad_enabled():
        return table(ids_BT)
    return late.rows(ids_BT, table.padding_idx)


class _Product:
    """What a layer, or some of its outputs, makes of x [rows, in]."""

    def __init__(self, layer: nn.Module, packs: Packs | None, part: slice | None = None):
        self.layer, self.packs, self.part = layer, packs, part
        self.is_conv = not isinstance(layer, nn.Linear)  # transformers' Conv1D, whose weight is [in, out]

    def __call__(self, x: Tensor, act: nn.Module | None = None) -> Tensor:
        packed = self._packed(x)
        if packed is not None:
            return packed(x, act)
        if self.part is None or self.part == slice(0, self.layer.weight.shape[1]):
            y = self.layer(x)
        else:
            y = torch.addmm(self.layer.bias[self.part], x, self.layer.weight[:, self.part])
        return y if act is None else act(y)

    def _packed(self, x: Tensor):
        weight = self.layer.weight
        if self.packs is None or weight.requires_grad or x.requires_grad or x.dtype != weight.dtype:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        start, stop = (0, None) if self.part is None else (self.part.start, self.part.stop)
        return self.packs.of(weight, self.layer.bias, start, stop, transposed=self.is_conv)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden_B1QT: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """softmax(query · keyᵀ · scaling) · value: queries [B, H, Q, W] over keys and values [B, K, T, W] → [B, Q, H, W].

    hidden_B1QT: keys that a query does not see; None is causal, with Q = T. In bfloat16 scores are rounded to bfloat16, as
    in transformers' plain attention, and their softmax is in float32; other dtypes go to torch's own kernel.
    """
    B, H, Q, W = query.shape
    if key.shape[1] < H:
        key, value = (states.repeat_interleave(H // key.shape[1], 1) for states in (key, value))
    training = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    if query.dtype != torch.bfloat16 or (training and key.shape[2] > _LONGEST):
        mask = None if hidden_B1QT is None else ~hidden_B1QT
        more = {"dropout_p": dropout, "is_causal": mask is None, "scale": scaling}
        return F.scaled_dot_product_attention(query, key, value, mask, **more).transpose(1, 2)
    query, key, value = (states.reshape(B * H, -1, W) for states in (query, key, value))
    blocks = []
    for start in range(0, Q, _QUERIES):
        end = min(start + _QUERIES, Q)
        if hidden_B1QT is None:
            reach = end
            mask = torch.full((end - start, end), -torch.inf, dtype=query.dtype).triu_(start + 1)
            mask = mask.expand(B * H, -1, -1)
        else:
            reach = key.shape[1]
            mask = torch.zeros((B, 1, end - start, reach), dtype=query.dtype)
            mask.masked_fill_(hidden_B1QT[:, :, start:end], -torch.inf)
            mask = mask.expand(B, H, -1, -1).reshape(B * H, end - start, reach)
        scores = torch.baddbmm(mask, query[:, start:end], key[:, :reach].transpose(1, 2), alpha=scaling)
        blocks.append(torch.bmm(F.dropout(scores.softmax(-1), dropout, dropout > 0), value[:, :reach]))
    seen = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
    return seen.view(B, H, Q, W).transpose(1, 2)
