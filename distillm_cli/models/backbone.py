"""One face for causal language models: hidden states at supervised positions, the head that reads them, and decoding.

Shape letters: B sequences, T time, N supervised positions, P prompt length (padded), V vocabulary, D width of the last
hidden state.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distillm_cli.errors import ModelError
from distillm_cli.sequences import Batch

# What stands between `hidden @ weight.T + bias` and a family's logits, by the config field that says so: the scale is
# multiplied by the field to this power. One name, two meanings, in the second table; None: the family ignores it.
_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "logits_mup_width_multiplier": -1}
_SCALE_EXCEPTIONS = {("hyperclovax", "logits_scaling"): 1, ("mpt", "logit_scale"): None}
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Families whose layers hold the state of decoding themselves, where no row can be padded or dropped.
_STATE_IN_LAYERS = ("recurrent_gemma", "xlstm")

# Random models have logits so small that a soft cap would not show; the head is checked at this magnitude too.
_PROBE = 50.0


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Dropout off inside; each submodule's own mode is back afterwards, also after an exception."""
    return _eval_mode(model.modules())


@contextmanager
def _eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Highest token id + 1, added tokens included: what `len(tokenizer)` is when there are no holes."""
    return max(tokenizer.get_vocab().values()) + 1


@dataclass(frozen=True, eq=False)
class Head:
    """logits = cap(scale · (hidden @ weight.T + bias)), cap(x) = softcap · tanh(x / softcap).

    weight_VD None: the "hidden states" are the logits already.
    """

    weight_VD: torch.Tensor | None
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_ND: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """float32 logits [N, V]. dtype: of the product (unset: the weight's; under autocast, autocast's)."""
        if self.weight_VD is None:
            return hidden_ND.float()
        dtype = dtype or self.weight_VD.dtype
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        logits_NV = F.linear(hidden_ND.to(dtype), self.weight_VD.to(dtype), bias_V).float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


class Backbone(nn.Module):
    """A causal model with its tokenizer. The model is the only submodule: parameters and buffers are exactly its own.

    vocab: how many token ids meet the loss; matrices with more rows than that (padded vocabularies) are cut. Unset: the
    tokenizer's. Raises ModelError where the model has fewer rows than the tokenizer has ids.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab: int | None = None):
        super().__init__()
        self.model = model
        self.training = model.training
        self.tokenizer = tokenizer
        self.vocab = vocabulary_size(tokenizer) if vocab is None else vocab
        self._scale, self._softcap = _head_quirks(model.config)
        self._own_logits = _trunk(model) is None or not isinstance(_head_weight(model), torch.Tensor)

    @property
    def vocab(self) -> int:
        return self._vocab

    @vocab.setter
    def vocab(self, value: int) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        head = _head_weight(self.model)
        rows = rows if head is None else min(rows, head.shape[0])
        if value > rows:
            raise ModelError(
                f"the tokenizer has {value:,} token ids and the model only {rows:,}",
                where=self.model.config.name_or_path or self.model.config.model_type,
                hint="use the tokenizer that belongs to this model",
            )
        self._vocab = value

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """The most positions the model can tell apart, prompt and response together; None where there is no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a response: the tokenizer's end-of-sequence and those of the generation config."""
        generation = getattr(self.model, "generation_config", None)
        declared = getattr(generation, "eos_token_id", None)
        ids = declared if isinstance(declared, list | tuple) else [declared]
        return frozenset(i for i in [self.tokenizer.eos_token_id, *ids] if i is not None and i < self.vocab)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.hidden(batch)

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The last hidden states [N, D] that predict the supervised tokens, after the final norm and any projection.

        No attention mask: padding is on the right, where causal attention does not look. In the fallback that
        `check_head` may switch to: the model's own logits [N, V].
        """
        if self._own_logits:
            return self.logits(batch)
        states = _trunk(self.model)(input_ids=batch.ids_BT, attention_mask=None, use_cache=False)[0]
        return states.flatten(0, 1).index_select(0, batch.positions_N)

    def head(self) -> Head:
        """What turns `hidden` into logits. Tensors are views of the live parameters, cut to `vocab` rows."""
        if self._own_logits:
            return Head(None)
        weight, bias = _head_weight(self.model), getattr(self.model.get_output_embeddings(), "bias", None)
        if weight.shape[0] > self.vocab:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        return Head(weight, bias, self._scale, self._softcap)

    def logits(self, batch: Batch) -> torch.Tensor:
        """float32 logits [N, vocab] by the model's own forward, which makes them at every position."""
        logits_BTV = self.model(input_ids=batch.ids_BT, attention_mask=None, use_cache=False).logits
        return logits_BTV.flatten(0, 1).index_select(0, batch.positions_N)[:, : self.vocab].float()

    @torch.no_grad()
    def check_head(self, batch: Batch) -> bool:
        """Whether `head().logits(hidden(batch))` is what the model itself computes; if not, use its own logits from now on.

        Compared on the batch as it is and again with the head's input scaled up until the logits are large, where a
        soft cap shows. Tolerance: 1e-3 of the logits' spread, and the rounding of the model's dtype.
        """
        if self._own_logits:
            return False
        with eval_mode(self.model), torch.autocast(self.device.type, enabled=False):
            hidden_ND, own_NV = self.hidden(batch), self.logits(batch)
            agrees = _close(self.head().logits(hidden_ND), own_NV, self.model.dtype)
            gain = _PROBE / max(own_NV.abs().max().item(), 1e-6)
            if agrees and gain > 1:
                reached = []

                def amplify(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                    reached.append(True)
                    return (inputs[0] * gain, *inputs[1:])

                hook = self.model.get_output_embeddings().register_forward_pre_hook(amplify)
                try:
                    loud_NV = self.logits(batch)
                finally:
                    hook.remove()
                # A model that uses the head's weight without calling the head cannot be probed this way.
                agrees = not reached or _close(self.head().logits(hidden_ND * gain), loud_NV, self.model.dtype)
        self._own_logits = not agrees
        return agrees

    def decode(self, prompts: Sequence[np.ndarray]) -> Decoding:
        """Start decoding these prompts (token ids, one array each, at least one token) side by side.

        Nothing bounds the length: prompt and new tokens together must stay within `context`.
        """
        return Decoding(self, prompts)


class Decoding:
    """Token by token with a key-value cache, prompts padded on the left. Gradients off, dropout off, modes restored.

    `logits(None)` reads the prompts; `logits(tokens_B)` appends one token to every row. Both return float32 logits
    [B, vocab] for the next token. `keep(rows_B)` goes on with these rows only, in this order.

    Autocast, where wanted, is entered around the decoding and left before training goes on: the weights it casts and
    remembers here carry no gradient.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray]):
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or min(lengths) == 0:
            raise ValueError("decoding needs prompts, and a token in each")
        B, P = len(prompts), max(lengths)
        ids_BP, mask_BP = np.zeros((B, P), dtype=np.int64), np.zeros((B, P), dtype=np.int64)
        for b, prompt in enumerate(prompts):
            ids_BP[b, P - len(prompt) :] = prompt
            mask_BP[b, P - len(prompt) :] = 1
        device = backbone.device
        self._backbone = backbone
        self._modules = list(backbone.model.modules())  # walking the tree for every token would show
        self._prompt_BP: torch.Tensor | None = torch.from_numpy(ids_BP).to(device)
        # Learned positions would shift by the padding if they were left to count columns.
        self._positions_BP = torch.from_numpy(np.maximum(mask_BP.cumsum(1) - 1, 0)).to(device)
        self._mask_BT = None if min(lengths) == P else torch.from_numpy(mask_BP).to(device)
        self._cache = DynamicCache(config=backbone.model.config)
        self._runs = backbone.model if backbone._own_logits else _trunk(backbone.model)
        names = ("past_key_values", "cache_params", "position_ids", "logits_to_keep")
        accepts = inspect.signature(self._runs.forward).parameters
        # A wrapper's forward(*args, **kwargs) names nothing; what is behind it is taken to be of the usual kind.
        usual = "input_ids" not in accepts
        self._accepts = {n for n in names if n in accepts or (usual and n != "cache_params")}
        self._cache_name = next((n for n in names[:2] if n in self._accepts), None)
        family = backbone.model.config.model_type
        if self._cache_name is None or family in _STATE_IN_LAYERS:
            raise ModelError(
                f"cannot generate with a {family} model: it has no cache of the usual kind",
                hint="train on data set rows only: --set schedule.kind=off",
            )

    @torch.no_grad()
    def logits(self, tokens_B: torch.Tensor | None) -> torch.Tensor:
        if (tokens_B is None) != (self._prompt_BP is not None):
            raise ValueError("the first call reads the prompts (None), every later one takes a token per row")
        if tokens_B is None:
            ids_BT, positions_BT, self._prompt_BP = self._prompt_BP, self._positions_BP, None
        else:
            ids_BT = tokens_B.to(self._positions_BP.device)[:, None]
            positions_BT = self._positions_BP[:, -1:] + 1
            # A pure state space model (cache_params) has the padding behind it once the prompt is read.
            recurrent = self._cache_name == "cache_params"
            if self._mask_BT is not None:
                self._mask_BT = None if recurrent else F.pad(self._mask_BT, (0, 1), value=1)
        self._positions_BP = positions_BT
        inputs: dict[str, Any] = {"attention_mask": self._mask_BT, self._cache_name: self._cache}
        if "position_ids" in self._accepts:
            inputs["position_ids"] = positions_BT
        backbone = self._backbone
        # In training mode gradient checkpointing would drop the cache without an error.
        with _eval_mode(self._modules):
            if backbone._own_logits:
                if "logits_to_keep" in self._accepts:
                    inputs["logits_to_keep"] = 1
                return self._runs(input_ids=ids_BT, use_cache=True, **inputs).logits[:, -1, : backbone.vocab].float()
            states_BTD = self._runs(input_ids=ids_BT, use_cache=True, **inputs)[0]
            return backbone.head().logits(states_BTD[:, -1])

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


def _trunk(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part whose output the head reads: OPT's decoder with its projection, a multimodal model's language model."""
    for candidate in (model.get_decoder(), model.base_model):
        if isinstance(candidate, PreTrainedModel) and candidate is not model:
            return candidate
    return None


def _head_weight(model: PreTrainedModel) -> torch.Tensor | None:
    return getattr(model.get_output_embeddings(), "weight", None)


def _head_quirks(config: PretrainedConfig) -> tuple[float, float | None]:
    config = config.get_text_config()
    scale = 1.0
    for name, power in _SCALES.items():
        power = _SCALE_EXCEPTIONS.get((config.model_type, name), power)
        value = getattr(config, name, None)
        if power is not None and value is not None:
            scale *= float(value) ** power
    caps = (getattr(config, name, None) for name in _SOFT_CAPS)
    return scale, next((float(cap) for cap in caps if cap is not None), None)


def _close(ours_NV: torch.Tensor, own_NV: torch.Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-3 * own_NV.std() + 4 * torch.finfo(dtype).eps * own_NV.abs().max()
    return bool((ours_NV - own_NV).abs().max() <= tolerance)
