"""Run whole sequences through a GPT-2 or a Llama-like trunk on a CPU, to get the states at the supervised positions.

The results are those of transformers, without values that are not used. In the last block, keys and values are needed
at every position, but queries, output projection, MLP and final norm only at the supervised ones. GPT-2's GELU is one
operation, attention in bfloat16 consists of products over blocks of queries, and frozen weights are converted to a
faster layout once (`packed`). The layers are called as modules, so autocast, dropout and gradients work as usual. Like
the step for one token (`decode_step`), this is used only for the transformers classes that it implements, and only if
it matches the trunk's own states. ``DISTILLM_CPU_FAST=0`` turns it off.

Shape letters: B sequences, T time, M = B·T positions, N supervised positions, Q most supervised positions of a sequence,
D width, H heads, K key-value heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from distillm_cli.models import cpu
from distillm_cli.models.cpu.decode_step import is_altered, is_gpt2, is_llama, is_small, weight_count
from distillm_cli.models.cpu.packed import PackedLinear, PackedWeights, can_pack
from distillm_cli.models.generation.cache import has_plain_cache
from distillm_cli.models.generation.decoding_checks import logits_match
from distillm_cli.models.generation.working_copy import fused_activation
from distillm_cli.models.model_families import family_of
from distillm_cli.types import Batch, Sequence, collate
from distillm_cli.utils.modules import eval_mode

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone

# Queries of a block. Its keys end where the block ends, so that a causal mask saves half of the work.
_QUERIES = 128

# In training the blocks store their attention weights, T² for each head, which the kernel for long sequences does not. Up to
# this length they are a fraction of the other activations of a block.
_LONGEST = 512

_TRIAL_TOKENS = 12  # of the longest prompt that a pass is checked on

TrunkPass = Callable[[Batch], Tensor]  # batch → last hidden states [N, D]


class CpuForward:
    """Compute a model's hidden states by the hand-written pass, if there is one and it matches the trunk's own states.

    Holds the state between passes: packed weights, the embedding's deferred gradient, and the result of the check.
    """

    def __init__(self):
        self.packed = PackedWeights()
        self.embedding_grad: DeferredEmbeddingGrad | None = None
        self.agrees: bool | None = None  # None: not checked yet

    def hidden(self, backbone: Backbone, batch: Batch, *, for_backward: bool = False) -> Tensor | None:
        """Return the last hidden states [N, D]; None if the trunk's own forward must compute them."""
        run = self.find_pass(backbone, for_backward=for_backward)
        return None if run is None else run(batch)

    def find_pass(self, backbone: Backbone, *, for_backward: bool = False) -> TrunkPass | None:
        """Return the pass for this model with its current weights; None if the trunk's own forward has to run.

        for_backward: ``backward()`` follows, so that a tied embedding's own gradient may be added to ``grad`` at its end.
        """
        if self.agrees is False or not cpu.is_enabled():
            return None
        embedding_grad = self._deferred_grad(backbone) if for_backward else None
        run = trunk_pass(backbone.trunk, self.packed, embedding_grad)
        if run is None:
            return None
        if self.agrees is None:
            self.agrees = _agrees(backbone, run)
        return run if self.agrees else None

    def forget_weights(self) -> None:
        """Drop all layouts before the weights are replaced."""
        self.packed = PackedWeights()

    def _deferred_grad(self, backbone: Backbone) -> DeferredEmbeddingGrad | None:
        """Return the object that defers the embedding's gradient; None if embedding and head are not one trained matrix."""
        weight_VD = backbone.model.get_input_embeddings().weight
        head = backbone.model.get_output_embeddings()
        if getattr(head, "weight", None) is not weight_VD or not weight_VD.requires_grad:
            return None
        if self.embedding_grad is None or self.embedding_grad.weight_VD is not weight_VD:
            self.embedding_grad = DeferredEmbeddingGrad(weight_VD)
        self.embedding_grad.drop()
        return self.embedding_grad


@torch.no_grad()
def _agrees(backbone: Backbone, run: TrunkPass) -> bool:
    """Return whether a pass matches the trunk's own states for a few short sequences."""
    ids = np.arange(8 * _TRIAL_TOKENS, dtype=np.int32) * 7 % backbone.vocab
    sizes = [(1, 5), (_TRIAL_TOKENS, 3), (4, 0), (2, _TRIAL_TOKENS - 1)]
    batch = collate([Sequence(ids[:p], ids[p : p + r]) for p, r in sizes]).to(backbone.device)
    with eval_mode(backbone.model), torch.autocast(backbone.device.type, enabled=False):
        return logits_match(run(batch), backbone.trunk_states(batch), backbone.model.dtype)


class DeferredEmbeddingGrad:
    """Defer a tied matrix's gradient as an embedding until its gradient as a head exists.

    A batch uses few of the matrix's rows. Autograd would allocate a full table for each batch, or copy the head's for
    each sparse one. Here the rows are added to ``weight.grad`` in place at the end of each backward pass.
    """

    def __init__(self, weight_VD: nn.Parameter):
        self.weight_VD = weight_VD
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def embed(self, ids_BT: Tensor, padding: int | None) -> Tensor:
        """Return the embeddings [B, T, D]. padding: the token whose row gets no gradient here."""
        return _DeferredEmbedding.apply(self.weight_VD, ids_BT, padding, self)

    def hold(self, ids_M: Tensor, grad_MD: Tensor) -> None:
        """Store a gradient until the end of the backward pass, when all other gradients exist."""
        if not self._waiting:
            torch.autograd.Variable._execution_engine.queue_callback(self._add)
        self._waiting.append((ids_M, grad_MD))

    def drop(self) -> None:
        """Discard the stored gradients of a backward pass that did not finish."""
        self._waiting.clear()

    def _add(self) -> None:
        weight_VD = self.weight_VD
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        for ids_M, grad_MD in self._waiting:
            weight_VD.grad.index_add_(0, ids_M, grad_MD.to(weight_VD.grad.dtype))
        self._waiting.clear()


class _DeferredEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight_VD: Tensor, ids_BT: Tensor, padding: int | None, deferred: DeferredEmbeddingGrad) -> Tensor:
        ctx.ids_M = ids_BT.flatten()
        ctx.padding = padding
        ctx.deferred = deferred
        return F.embedding(ids_BT, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BTD: Tensor) -> tuple[None, ...]:
        ids_M, grad_MD = ctx.ids_M, grad_BTD.flatten(0, 1)
        if ctx.padding is not None:
            is_text = ids_M != ctx.padding
            ids_M, grad_MD = ids_M[is_text], grad_MD[is_text]
        ctx.deferred.hold(ids_M, grad_MD)
        return None, None, None, None


def trunk_pass(
    trunk: nn.Module | None, packed: PackedWeights, embedding_grad: DeferredEmbeddingGrad | None = None
) -> TrunkPass | None:
    """Return the pass over this trunk with its current weights; None if there is none for the family.

    packed: the layouts of frozen weights, reused by every pass. embedding_grad: for an embedding matrix that is tied to
    the head. On a CPU only: on other devices transformers' own kernels are fast, and this was not measured.
    """
    if trunk is None or next(trunk.parameters()).device.type != "cpu" or not has_plain_cache(trunk.config):
        return None
    if trunk.config._attn_implementation not in ("sdpa", "eager"):
        return None
    if any(is_altered(module) for module in trunk.modules()):
        return None
    if trunk.training and getattr(trunk, "gradient_checkpointing", False):
        return None
    layouts = packed if is_small(weight_count(trunk)) else None
    if is_gpt2(trunk):
        return _Gpt2(trunk, layouts, embedding_grad)
    return _Llama(trunk, layouts, embedding_grad) if is_llama(trunk) else None


def has_forward(model_type: str) -> bool:
    """Return whether there is a pass for models of this family."""
    return cpu.is_enabled() and family_of(model_type).cpu_layout is not None


def has_layouts(model_type: str, weights: int) -> bool:
    """Return whether frozen bf16 weights of a model of this family and size have a second layout in memory."""
    return has_forward(model_type) and is_small(weights) and can_pack()


class _Supervised:
    """Hold the supervised positions of a batch as rows of queries [B, Q], with shorter rows padded."""

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
        """Return [N, D] as [B, Q, D]."""
        if not self.is_full:
            x_ND = x_ND.new_zeros(self.B * self.Q, x_ND.shape[1]).index_copy(0, self.place_N, x_ND)
        return x_ND.view(self.B, self.Q, -1)

    def gather(self, x_BQD: Tensor) -> Tensor:
        """Return [B, Q, D] as [N, D]."""
        x_ND = x_BQD.reshape(self.B * self.Q, -1)
        return x_ND if self.is_full else x_ND.index_select(0, self.place_N)


class _Gpt2:
    def __init__(self, trunk: nn.Module, packed: PackedWeights | None, embedding_grad: DeferredEmbeddingGrad | None):
        self.trunk = trunk
        self.embedding_grad = embedding_grad
        self.blocks = [_Gpt2Block(block, packed, last=block is trunk.h[-1]) for block in trunk.h]

    def __call__(self, batch: Batch) -> Tensor:
        trunk, ids_BT = self.trunk, batch.ids_BT
        x_BTD = trunk.drop(_embedded(trunk.wte, ids_BT, self.embedding_grad) + trunk.wpe(torch.arange(ids_BT.shape[1])))
        x_MD, supervised = x_BTD.flatten(0, 1), _Supervised(batch)
        for block in self.blocks:
            x_MD = block(x_MD, supervised)
        return trunk.ln_f(x_MD)


class _Gpt2Block:
    """Return the states at the supervised positions [N, D] from the last one, all [M, D] from the others."""

    def __init__(self, block: nn.Module, packed: PackedWeights | None, *, last: bool):
        attention, mlp = block.attn, block.mlp
        self.block = block
        self.activation = fused_activation(mlp.act)
        self.last = last
        D = attention.embed_dim
        parts = (slice(0, D), slice(D, 3 * D)) if last else (slice(0, 3 * D),)
        self.qkv = [_Product(attention.c_attn, packed, part) for part in parts]
        self.out, self.up, self.down = (_Product(layer, packed) for layer in (attention.c_proj, mlp.c_fc, mlp.c_proj))

    def __call__(self, x_MD: Tensor, supervised: _Supervised) -> Tensor:
        block, attention, T = self.block, self.block.attn, supervised.T
        normed_MD = block.ln_1(x_MD)

        def heads(states: Tensor, kinds: int) -> tuple[Tensor, ...]:
            """Split [B · times, kinds · D] into ``kinds`` tensors [B, H, times, W]."""
            states = states.view(supervised.B, -1, kinds, attention.num_heads, attention.head_dim)
            return states.permute(2, 0, 3, 1, 4).unbind(0)

        if self.last:
            x_MD, query_ND = x_MD.index_select(0, supervised.positions_N), self._query(normed_MD, supervised)
            (query,) = heads(supervised.spread(query_ND).flatten(0, 1), 1)
            key, value = heads(self.qkv[1](normed_MD), 2)
        else:
            query, key, value = heads(self.qkv[0](normed_MD), 3)
        dropout = attention.attn_dropout.p if attention.training else 0.0
        hidden = supervised.hidden_B1QT if self.last else None
        attended = attend_blockwise(query, key, value, attention.scaling, hidden, dropout)
        attended = supervised.gather(attended) if self.last else attended.reshape(supervised.B * T, -1)
        x_MD = x_MD + attention.resid_dropout(self.out(attended))
        return x_MD + block.mlp.dropout(self.down(self.up(block.ln_2(x_MD), self.activation)))

    def _query(self, normed_MD: Tensor, supervised: _Supervised) -> Tensor:
        return self.qkv[0](normed_MD.index_select(0, supervised.positions_N))


class _Llama:
    def __init__(self, trunk: nn.Module, packed: PackedWeights | None, embedding_grad: DeferredEmbeddingGrad | None):
        self.trunk = trunk
        self.embedding_grad = embedding_grad
        layers = trunk.layers[: trunk.config.num_hidden_layers]
        self.layers = [_LlamaLayer(layer, packed, last=layer is layers[-1]) for layer in layers]

    def __call__(self, batch: Batch) -> Tensor:
        trunk, ids_BT = self.trunk, batch.ids_BT
        x_BTD, supervised = _embedded(trunk.embed_tokens, ids_BT, self.embedding_grad), _Supervised(batch)
        cos_1TW, sin_1TW = trunk.rotary_emb(x_BTD, torch.arange(supervised.T)[None])
        x_MD = x_BTD.flatten(0, 1)
        for layer in self.layers:
            x_MD = layer(x_MD, supervised, cos_1TW[0, :, None], sin_1TW[0, :, None])
        return trunk.norm(x_MD)


class _LlamaLayer:
    """Return the states at the supervised positions [N, D] from the last one, all [M, D] from the others."""

    def __init__(self, layer: nn.Module, packed: PackedWeights | None, *, last: bool):
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = layer
        self.activation = fused_activation(mlp.act_fn)
        self.last = last
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        self.query, self.key, self.value, self.out = (_Product(linear, packed) for linear in projections)
        self.gate, self.up, self.down = (
            _Product(linear, packed) for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )

    def __call__(self, x_MD: Tensor, supervised: _Supervised, cos_T1W: Tensor, sin_T1W: Tensor) -> Tensor:
        layer, attention, B, T = self.layer, self.layer.self_attn, supervised.B, supervised.T
        normed_MD = layer.input_layernorm(x_MD)
        key, value = (product(normed_MD).view(B, T, -1, attention.head_dim) for product in (self.key, self.value))
        key = self._rotated(key, "k_norm", cos_T1W, sin_T1W)
        if self.last:
            x_MD, time_N = x_MD.index_select(0, supervised.positions_N), supervised.time_N
            query = self.query(normed_MD.index_select(0, supervised.positions_N)).view(
                len(x_MD), -1, attention.head_dim
            )
            query = self._rotated(query, "q_norm", cos_T1W[time_N], sin_T1W[time_N])
            query = supervised.spread(query.flatten(1)).view(B, supervised.Q, -1, attention.head_dim)
        else:
            query = self.query(normed_MD).view(B, T, -1, attention.head_dim)
            query = self._rotated(query, "q_norm", cos_T1W, sin_T1W)
        dropout = attention.attention_dropout if attention.training else 0.0
        hidden = supervised.hidden_B1QT if self.last else None
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        attended = attend_blockwise(query, key, value, attention.scaling, hidden, dropout)
        attended = supervised.gather(attended) if self.last else attended.reshape(B * T, -1)
        x_MD = x_MD + self.out(attended)
        normed_MD = layer.post_attention_layernorm(x_MD)
        return x_MD + self.down(self.activation(self.gate(normed_MD)) * self.up(normed_MD))

    def _rotated(self, states: Tensor, norm: str, cos: Tensor, sin: Tensor) -> Tensor:
        """Return states [..., heads, W] after the family's norm, if any, and the rotary embedding, in their dtype."""
        normed = getattr(self.layer.self_attn, norm)(states) if hasattr(self.layer.self_attn, norm) else states
        first, second = normed.chunk(2, -1)
        return (normed * cos + torch.cat([-second, first], -1) * sin).to(states.dtype)


def _embedded(table: nn.Embedding, ids_BT: Tensor, deferred: DeferredEmbeddingGrad | None) -> Tensor:
    if deferred is None or table.max_norm is not None or table.scale_grad_by_freq or not torch.is_grad_enabled():
        return table(ids_BT)
    return deferred.embed(ids_BT, table.padding_idx)


class _Product:
    """Compute a layer, or some of its outputs, of x [rows, in]."""

    def __init__(self, layer: nn.Module, packed: PackedWeights | None, part: slice | None = None):
        self.layer = layer
        self.packed = packed
        self.part = part
        self.is_conv = not isinstance(layer, nn.Linear)  # transformers' Conv1D, whose weight is [in, out]

    def __call__(self, x: Tensor, activation: nn.Module | None = None) -> Tensor:
        product = self._packed_product(x)
        if product is not None:
            return product(x, activation)
        if self.part is None or self.part == slice(0, self.layer.weight.shape[1]):
            y = self.layer(x)
        else:
            y = torch.addmm(self.layer.bias[self.part], x, self.layer.weight[:, self.part])
        return y if activation is None else activation(y)

    def _packed_product(self, x: Tensor) -> PackedLinear | None:
        weight = self.layer.weight
        if self.packed is None or weight.requires_grad or x.requires_grad or x.dtype != weight.dtype:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        start, stop = (0, None) if self.part is None else (self.part.start, self.part.stop)
        return self.packed.linear(weight, self.layer.bias, start, stop, transposed=self.is_conv)


def attend_blockwise(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, hidden_B1QT: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Return softmax(query · keyᵀ · scaling) · value: queries [B, H, Q, W] over keys and values [B, K, T, W] → [B, Q, H, W].

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
    attended = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
    return attended.view(B, H, Q, W).transpose(1, 2)
