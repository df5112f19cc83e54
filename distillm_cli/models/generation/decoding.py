"""Token by token from prompts: the fast way for models that attend to everything, the plain way for all others.

Both have the same two methods, and the plain one is what the fast one is checked against. `logits(None)` reads the
prompts; `logits(tokens_B)` appends one token to every row. Both return float32 logits [B, vocab] for the next token.
`keep(rows_B)` goes on with these rows only, in this order. Gradients off, dropout off, modes restored, autocast off: the
weights are in the dtype to decode in already (`Backbone.decode`).

Shape letters: B sequences, T time, P prompt length (padded), V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache, DynamicCache, PretrainedConfig

from distillm_cli.errors import DistillmError, ModelError, out_of_memory
from distillm_cli.models.cpu.steps import fused_act, step_of
from distillm_cli.models.generation.cache import ContiguousCache, fits, one_token_attention_in
from distillm_cli.models.modes import evaluating

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone
    from distillm_cli.models.lora import Adapter

# Families whose layers hold the state of decoding themselves, where no row can be padded or dropped.
_STATE_IN_LAYERS = ("recurrent_gemma", "xlstm")

# Prompts are read together when the shortest is at least this share of the longest, or this near it: below that, padding
# costs more than another pass. More tokens than that at once leave the processor's caches.
_ALIKE, _NEAR, _TOKENS = 7 / 8, 8, 4096

# Of the trial of padding: tokens of the short prompt, and of padding before it. No family compresses by a multiple of 7.
_SHORT, _PADDING = 4, 7


class PlainDecoding:
    """All prompts in one pass, padded on the left; transformers' own cache, of whatever kind the model has."""

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray], run: _Pass | None = None):
        self._pass = run or _Pass(backbone)
        self._columns_alone = fits(backbone.model.config)  # what the cache holds is a column for each token
        self._prompt_BP, mask_BP, self._positions_BP = _left_padded(prompts, backbone.device)
        self._mask_BT = None if mask_BP.all() else mask_BP
        self._cache = DynamicCache(config=backbone.model.config)

    @torch.no_grad()
    def logits(self, tokens_B: torch.Tensor | None) -> torch.Tensor:
        check_turn(tokens_B, self._prompt_BP is not None)
        if tokens_B is None:
            ids_BT, self._prompt_BP = self._prompt_BP, None
        else:
            ids_BT = tokens_B.to(self._positions_BP.device)[:, None]
            self._positions_BP = self._positions_BP[:, -1:] + 1
            if self._mask_BT is not None:
                # A pure state space model has the padding behind it once the prompt is read.
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
        if self._mask_BT is not None and self._columns_alone:
            self._drop_columns(int(self._mask_BT.argmax(1).min()))

    def _drop_columns(self, count: int) -> None:
        """The first columns, where no row has a token: some families have tables no longer than their context."""
        if count:
            self._mask_BT = self._mask_BT[:, count:]
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[:, :, count:], layer.values[:, :, count:]


class ByLength:
    """Prompts of one length at a time, each group in a plain decoding of its own, for models that padding misleads: those
    with learned positions that a caller cannot name, say.
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
        rows_B, kept = rows_B.cpu(), []
        for rows, decoding in self._groups:
            there_B = torch.isin(rows_B, rows)  # places in the batch to be
            if there_B.any():
                decoding.keep(torch.searchsorted(rows, rows_B[there_B]))
                kept.append((there_B.nonzero()[:, 0], decoding))
        self._groups = kept


class FastDecoding:
    """Prompts of like length in a pass of their own, then all rows together over a cache in one piece (`cache.py`)."""

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray], *, step: bool):
        self._backbone, self._pass = backbone, _Pass(backbone)
        self._step = step_of(backbone.trunk) if step and not backbone.own_logits else None
        self._prompts: list[np.ndarray] | None = list(prompts)

    @torch.no_grad()
    def logits(self, tokens_B: torch.Tensor | None) -> torch.Tensor:
        check_turn(tokens_B, self._prompts is not None)
        if tokens_B is None:
            return self._read_prompts()
        self._positions_B1 = self._positions_B1 + 1
        ids_B1 = tokens_B.to(self._positions_B1.device)[:, None]
        if self._step is not None:
            with torch.autocast(ids_B1.device.type, enabled=False):
                return self._pass.head.logits(self._step(ids_B1[:, 0], self._positions_B1, self._cache))
        # transformers' own kernels are made for long queries; on other devices they are good at short ones too.
        attention = one_token_attention_in(self._pass.config) if ids_B1.device.type == "cpu" else nullcontext()
        with attention:
            mask_B11C = self._cache.mask().expand(len(ids_B1), -1, -1, -1)  # XGLM takes no mask that all rows share
            return self._pass(ids_B1, self._cache, mask_B11C, self._positions_B1)

    def _read_prompts(self) -> torch.Tensor:
        prompts, self._prompts = self._prompts, None
        device, lengths = self._backbone.device, [len(prompt) for prompt in prompts]
        self._cache = ContiguousCache(len(prompts), max(lengths), self._backbone.context)
        self._positions_B1 = torch.tensor(lengths, device=device)[:, None] - 1
        logits_BV = None
        for rows in alike(lengths):
            ids_BP, mask_BP, positions_BP = _left_padded([prompts[b] for b in rows], device)
            part = DynamicCache(config=self._backbone.model.config)
            part_BV = self._pass(ids_BP, part, None if mask_BP.all() else mask_BP, positions_BP)
            self._cache.take(rows, part)
            if logits_BV is None:
                logits_BV = part_BV.new_empty((len(prompts), part_BV.shape[1]))
            logits_BV[rows] = part_BV
        # The scores' softmax is in float32 where it is ours, and others want the mask in the dtype of the keys.
        self._cache.start(lengths, self._backbone.model.dtype if self._step is None else torch.float32)
        return logits_BV

    def keep(self, rows_B: torch.Tensor) -> None:
        if self._prompts is not None:
            self._prompts = [self._prompts[b] for b in rows_B.tolist()]
            return
        rows_B = rows_B.to(self._positions_B1.device)
        self._positions_B1 = self._positions_B1[rows_B]
        self._cache.keep(rows_B)


def _accepted(module: nn.Module) -> set[str]:
    """Which of the inputs that decoding may want to give the module's forward takes."""
    names = ("past_key_values", "cache_params", "position_ids", "logits_to_keep")
    accepts = inspect.signature(module.forward).parameters
    # A wrapper's forward(*args, **kwargs) names nothing; what is behind it is taken to be of the usual kind.
    usual = "input_ids" not in accepts
    return {n for n in names if n in accepts or (usual and n != "cache_params")}


class _Pass:
    """One pass of the model: ids [B, T] behind a cache → float32 logits [B, vocab] after the last of them, or, where
    ``every`` is asked for, after each: [B, T, vocab]."""

    def __init__(self, backbone: Backbone):
        self._own_logits, self._vocab = backbone.own_logits, backbone.vocab
        self._runs = backbone.model if self._own_logits else backbone.trunk
        self._modules = list(backbone.model.modules())
        self.head = None if self._own_logits else backbone.head().prepared()
        self.config = self._runs.config
        self._accepts = _accepted(self._runs)
        self._cache_name = next((n for n in ("past_key_values", "cache_params") if n in self._accepts), None)
        self.recurrent = self._cache_name == "cache_params"
        if self._cache_name is None or backbone.model.config.model_type in _STATE_IN_LAYERS:
            raise _mute(backbone, "it has no cache of the usual kind")

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
        with evaluating(self._modules), torch.autocast(ids_BT.device.type, enabled=False):
            if self._own_logits:
                if "logits_to_keep" in self._accepts and not every:
                    inputs["logits_to_keep"] = 1
                return self._runs(input_ids=ids_BT, use_cache=True, **inputs).logits[:, last, : self._vocab].float()
            states_BTD = self._runs(input_ids=ids_BT, use_cache=True, **inputs)[0]
            return self.head.logits(states_BTD[:, last])


def cast(model: nn.Module, dtype: torch.dtype, adapter: Adapter | None = None) -> nn.Module:
    """A copy in evaluation mode, its float32 weights in ``dtype``; config and most buffers are the model's own.

    What transformers keeps in float32 when it loads a model in this dtype stays float32 here too, rotary frequencies
    among it. Tables of sinusoids are cast as it casts them: they are added to states. Weights that need no cast are not
    copied. adapter: the one in the model's layers, merged into the copy, which is a plain model.
    """
    kept = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    if dtype == torch.float16:
        kept += [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    memo: dict[int, Any] = {id(model.config): model.config} | {id(buffer): buffer for buffer in model.buffers()}
    to_cast = _cast_buffers(model, dtype)
    memo |= {id(buffer): buffer.to(dtype) for name, buffer in model.named_buffers() if name in to_cast}

    def made(name: str, weight: torch.Tensor) -> nn.Parameter:
        same = weight.dtype != torch.float32 or any(part in name.split(".") for part in kept)
        return nn.Parameter(weight.detach() if same else weight.detach().to(dtype), requires_grad=False)

    adapted = {} if adapter is None else adapter.folded(made)
    memo |= adapted
    inside = {id(weight) for module in model.modules() if id(module) in adapted for weight in module.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) not in inside:
            memo[id(weight)] = made(name, weight)
    # Whatever the memo holds is not copied, so the float32 weights are never there twice, and tied ones stay tied.
    twin = copy.deepcopy(model, memo).eval()
    vars(twin).pop("peft_config", None)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if (fused := fused_act(child)) is not child:
                setattr(module, name, fused)
    return twin


_CAST_BUFFERS: WeakKeyDictionary[nn.Module, dict[torch.dtype, set[str]]] = WeakKeyDictionary()


def _cast_buffers(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Names of float32 buffers that transformers makes in ``dtype`` for a model of that dtype. None that are saved with the
    weights: they take part in float32.
    """
    known = _CAST_BUFFERS.setdefault(model, {})
    if dtype not in known:
        found = {name for name, buffer in model.named_buffers() if buffer.dtype == torch.float32}
        found.difference_update(model.state_dict())
        if dtype != torch.float32 and found:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                bare = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
            found &= {name for name, buffer in bare.named_buffers() if buffer.dtype == dtype}
        known[dtype] = found
    return known[dtype]


def check_decoding(backbone: Backbone, decode: Callable[[Backbone, Sequence[np.ndarray]], Any]) -> bool:
    """Return whether prompts of different lengths may stand side by side, by trying it on a few tokens.

    decode: the plain way for such a model. A short prompt is answered beside one of its own length and beside a longer one,
    where it is padded. Families differ in how they treat padding, also those that take positions: some count it, or
    compress tokens in blocks that padding shifts. Raises ModelError for a model that cannot decode at all.
    """
    room = backbone.context or math.inf
    short = max(1, min(_SHORT + _compression(backbone.model.config), room - 2))
    padding = max(1, min(_PADDING, room - short - 1))
    ids = np.arange(1, short + padding + 2) * 7 % backbone.vocab
    prompt, token, other = ids[:short], int(ids[short]), (ids[:short] + 1) % backbone.vocab

    def tried(first: np.ndarray) -> torch.Tensor:
        decoding = decode(backbone, [first, prompt])
        logits_BV = decoding.logits(None)
        tokens_B = torch.full((1,), token, device=logits_BV.device)
        decoding.keep(torch.tensor([1], device=logits_BV.device))
        return torch.cat([logits_BV[1:], decoding.logits(tokens_B)])

    try:
        alone = tried(prompt)
    except DistillmError:
        raise
    except Exception as error:  # of any type, for it is the family's own code that stumbles
        if out_of_memory(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _mute(backbone, said[:200]) from error
    try:
        padded = tried(ids[: short + padding])
        if close(padded, alone, backbone.model.dtype):
            return True
        # In few bits a router may choose otherwise beside any other row: no fault of padding.
        rounding = (tried(other) - alone).abs().max()
        return bool((padded - alone).abs().max() <= 2 * rounding)
    except Exception as error:
        if out_of_memory(error):
            raise
        return False


def _compression(config: PretrainedConfig) -> int:
    """Return how many tokens the coarsest of a model's attention layers compresses into one; 0 where none does."""
    rates = getattr(config.get_text_config(), "compress_rates", None) or {}
    return max(rates.values(), default=0)


def _mute(backbone: Backbone, why: str) -> ModelError:
    return ModelError(
        f"cannot generate with a {backbone.model.config.model_type} model: {why}",
        hint="it can be trained, on data set rows: --set schedule.kind=off --set train.select=valid_loss",
    )


class Ways(NamedTuple):
    """What was found to give a model's own logits. fast: the cache in one piece. step: the written-out step over it."""

    fast: bool
    step: bool


def ways(backbone: Backbone) -> Ways:
    """Which ways suit the model, by trying them on short prompts and a few tokens after them, in the weights' dtype."""
    fast = fits(backbone.model.config) and _agrees(backbone, step=False)
    written = not backbone.own_logits and step_of(backbone.trunk) is not None
    return Ways(fast, fast and written and _agrees(backbone, step=True))


@torch.no_grad()
def _agrees(backbone: Backbone, *, step: bool) -> bool:
    ids = np.arange(4 * _NEAR) * 7 % backbone.vocab
    prompts = [ids[: 2 * _NEAR], ids[:3], ids[3 : 3 + 2 * _NEAR]]
    fast, plain = FastDecoding(backbone, prompts, step=step), PlainDecoding(backbone, prompts)
    tokens_B = None
    for at in range(4):
        expected_BV = plain.logits(tokens_B)
        try:
            found_BV = fast.logits(tokens_B)
        except Exception:  # a family that reads masks or caches in a way of its own; the plain way is there for it
            return False
        if not close(found_BV, expected_BV, backbone.model.dtype):
            return False
        tokens_B = expected_BV.argmax(-1)
        if at == 1:
            rows_B = torch.tensor([2, 1], device=tokens_B.device)
            tokens_B = tokens_B[rows_B]
            fast.keep(rows_B)
            plain.keep(rows_B)
    return True


def close(ours_NV: torch.Tensor, own_NV: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether logits are the same up to 1e-3 of their spread and the rounding of the model's dtype.

    What is −inf on one side must be −inf on the other.
    """
    suppressed_NV = torch.isneginf(own_NV)
    if suppressed_NV.any():
        if not torch.equal(suppressed_NV, torch.isneginf(ours_NV)):
            return False
        ours_NV, own_NV = ours_NV[~suppressed_NV], own_NV[~suppressed_NV]
    tolerance = 1e-3 * own_NV.std() + 4 * torch.finfo(dtype).eps * own_NV.abs().max()
    return bool((ours_NV - own_NV).abs().max() <= tolerance)


def check_turn(tokens_B: torch.Tensor | None, unread: bool) -> None:
    """Raises ValueError where the prompts are read twice, or tokens come before them."""
    if (tokens_B is None) != unread:
        raise ValueError("the first call reads the prompts (None), every later one takes a token per row")


def _left_padded(prompts: Sequence[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """(ids, mask, positions), each [B, P]; positions count from each prompt's first token."""
    B, P = len(prompts), max(len(prompt) for prompt in prompts)
    ids_BP, mask_BP = np.zeros((B, P), dtype=np.int64), np.zeros((B, P), dtype=np.int64)
    for b, prompt in enumerate(prompts):
        ids_BP[b, P - len(prompt) :] = prompt
        mask_BP[b, P - len(prompt) :] = 1
    positions_BP = np.maximum(mask_BP.cumsum(1) - 1, 0)
    return tuple(torch.from_numpy(x).to(device) for x in (ids_BP, mask_BP, positions_BP))


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers in groups of like length."""
    groups: list[list[int]] = []
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        longest = lengths[groups[-1][0]] if groups else 0
        alike = lengths[b] >= min(_ALIKE * longest, longest - _NEAR)
        if groups and alike and (len(groups[-1]) + 1) * longest <= _TOKENS:
            groups[-1].append(b)
        else:
            groups.append([b])
    return groups
