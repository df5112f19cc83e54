"""One face for causal and encoder-decoder models: hidden states at supervised positions, the head that reads them, and
decoding.

Shape letters: B sequences, T time, N supervised positions, V vocabulary, D width of the last hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distillm_cli.errors import ModelError, NonFiniteError
from distillm_cli.models import seq2seq
from distillm_cli.models.contexts import context_of
from distillm_cli.models.cpu.products import Linear, Packs
from distillm_cli.models.cpu.whole import Late, Whole, whole_of
from distillm_cli.models.generation.blocks import BlockDecoding, takes_back
from distillm_cli.models.generation.decoding import (
    ByLength,
    FastDecoding,
    PlainDecoding,
    Ways,
    cast,
    check_decoding,
    close,
    ways,
)
from distillm_cli.models.modes import eval_mode, one_sequence_a_row, padded_on_the_right
from distillm_cli.models.router import RouterLoss, mask_of
from distillm_cli.types import Batch, collate
from distillm_cli.types import Sequence as Tokens

if TYPE_CHECKING:
    from distillm_cli.models.lora import Adapter

# What stands between `hidden @ weight.T + bias` and a family's logits, by the config field that says so: the scale is
# multiplied by the field to this power. One name, two meanings, in the second table; None: the family ignores it.
_SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "logits_mup_width_multiplier": -1}
_SCALE_EXCEPTIONS = {("hyperclovax", "logits_scaling"): 1, ("mpt", "logit_scale"): None}
_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Random models have logits so small that a soft cap would not show; the head is checked at this magnitude too.
_PROBE = 50.0

_PROBE_TOKENS = 12  # of the longest prompt that the written-out pass is tried on


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Highest token id + 1, added tokens included: what `len(tokenizer)` is when there are no holes."""
    return max(tokenizer.get_vocab().values()) + 1


@dataclass(frozen=True, eq=False)
class Head:
    """logits = cap(scale · (hidden @ weight.T + bias)), cap(x) = softcap · tanh(x / softcap).

    weight_VD None: the "hidden states" are the logits already. product: hidden @ weight.T + bias, see `prepared`.
    """

    weight_VD: torch.Tensor | None
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    product: Linear | None = None

    def prepared(self) -> Head:
        """For many products with few rows under no autocast, with the weight as it is now (`products.Linear`)."""
        return self if self.weight_VD is None else replace(self, product=Linear(self.weight_VD, self.bias_V))

    def logits(self, hidden_ND: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """float32 logits [N, V]. dtype: of the product (unset: the weight's; under autocast, autocast's)."""
        if self.weight_VD is None:
            return hidden_ND.float()
        dtype = dtype or self.weight_VD.dtype
        if self.product is not None and dtype == self.weight_VD.dtype:
            logits_NV = self.product(hidden_ND.to(dtype)).float()
        else:
            bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
            logits_NV = F.linear(hidden_ND.to(dtype), self.weight_VD.to(dtype), bias_V).float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV


class Backbone(nn.Module):
    """A causal or an encoder-decoder model with its tokenizer. The model is the only submodule: parameters and buffers are
    exactly its own.

    vocab: how many token ids meet the loss; matrices with more rows than that (padded vocabularies) are cut. Unset: the
    tokenizer's. adapter: the one that trains in the model's layers, the rest being frozen. Raises ModelError where the
    model has fewer rows than the tokenizer has ids.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab: int | None = None):
        super().__init__()
        self.model = model
        self.adapter: Adapter | None = None
        self.router_loss: RouterLoss | None = None  # of a mixture of experts that trains with it (`router.weight_of`)
        self.training = model.training
        self.tokenizer = tokenizer
        self.vocab = vocabulary_size(tokenizer) if vocab is None else vocab
        self._tried: tuple[bool, bool] | None = None  # with these `own_logits`: whether prompts may be padded
        self._ways: Ways | None = None  # to decode; not known before the first decoding
        self._takes_back: bool | None = None  # so too
        self._is_written_out: bool | None = None  # whether the pass over whole sequences is; tried before the first one
        self._packs = Packs()
        self._late: Late | None = None
        self._scale, self._softcap = _head_quirks(model.config)
        self.own_logits = _trunk(model) is None or not isinstance(_head_weight(model), torch.Tensor)
        padded_on_the_right(model)

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
    def trunk(self) -> PreTrainedModel | None:
        """The part of the model whose output the head reads."""
        return _trunk(self.model)

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether prompt and response are two texts, each with its own end, rather than one."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def start(self) -> int:
        """The token that the decoder of an encoder-decoder begins with."""
        return seq2seq.start_token(self.model.config)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """The most positions the model can tell apart, prompt and response together; None where there is no limit.

        An encoder-decoder with learned positions has as many on either side; together is less than it could take.
        """
        return context_of(self.model.config)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a response: the tokenizer's end-of-sequence and those of the generation config."""
        generation = getattr(self.model, "generation_config", None)
        declared = getattr(generation, "eos_token_id", None)
        ids = declared if isinstance(declared, list | tuple) else [declared]
        return frozenset(i for i in [self.tokenizer.eos_token_id, *ids] if i is not None and i < self.vocab)

    @property
    def forced_first(self) -> int | None:
        """Return the token that responses of an encoder-decoder begin with (``forced_bos_token_id``), None for none."""
        if not self.is_encoder_decoder:
            return None
        for config in (getattr(self.model, "generation_config", None), self.model.config):
            if (token := getattr(config, "forced_bos_token_id", None)) is not None:
                return token
        return None

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.hidden(batch)

    def hidden(self, batch: Batch, *, for_backward: bool = False) -> torch.Tensor:
        """The last hidden states [N, D] that predict the supervised tokens, after the final norm and any projection.

        for_backward: ``backward()`` follows, so that a tied embedding's own gradient may be added to ``grad`` at its end.

        No attention mask for a causal model: padding is on the right, where causal attention does not look. In the
        fallback that `check_head` may switch to: the model's own logits [N, V].
        """
        if self.own_logits:
            return self.logits(batch)
        if self.is_encoder_decoder:
            return seq2seq.states(self.model, batch, self.start)
        whole = self._whole(for_backward)
        return self._states(batch) if whole is None else whole(batch)

    def hidden_and_router_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `hidden` and the auxiliary loss of the routers over the batch, a scalar, of one pass."""
        with one_sequence_a_row():
            found = self.trunk(input_ids=batch.ids_BT, attention_mask=None, use_cache=False, output_router_logits=True)
        hidden_ND = found[0].flatten(0, 1).index_select(0, batch.positions_N)
        return hidden_ND, self.router_loss(found.router_logits, mask_of(batch))

    def _states(self, batch: Batch) -> torch.Tensor:
        """By the trunk's own forward, which makes them at every position."""
        with one_sequence_a_row():
            states = self.trunk(input_ids=batch.ids_BT, attention_mask=None, use_cache=False)[0]
        return states.flatten(0, 1).index_select(0, batch.positions_N)

    def _whole(self, for_backward: bool = False) -> Whole | None:
        """The written-out pass, where there is one for this trunk as it is now and it gives the trunk's own states."""
        if self._is_written_out is False:
            return None
        whole = whole_of(self.trunk, self._packs, self._late_rows() if for_backward else None)
        if whole is None:
            return None
        if self._is_written_out is None:
            self._is_written_out = self._agrees(whole)
        return whole if self._is_written_out else None

    def _late_rows(self) -> Late | None:
        """What holds the embedding's gradient back until the head's is there; None where they are not one matrix."""
        weight_VD = self.model.get_input_embeddings().weight
        if _head_weight(self.model) is not weight_VD or not weight_VD.requires_grad:
            return None
        if self._late is None or self._late.weight_VD is not weight_VD:
            self._late = Late(weight_VD)
        self._late.drop()
        return self._late

    @torch.no_grad()
    def _agrees(self, whole: Whole) -> bool:
        ids = np.arange(8 * _PROBE_TOKENS, dtype=np.int32) * 7 % self.vocab
        sizes = [(1, 5), (_PROBE_TOKENS, 3), (4, 0), (2, _PROBE_TOKENS - 1)]
        batch = collate([Tokens(ids[:p], ids[p : p + r]) for p, r in sizes]).to(self.device)
        with eval_mode(self.model), torch.autocast(self.device.type, enabled=False):
            return close(whole(batch), self._states(batch), self.model.dtype)

    def _apply(self, fn: Callable, recurse: bool = True) -> Backbone:
        self._packs = Packs()  # the weights are about to become others
        return super()._apply(fn, recurse)

    def head(self) -> Head:
        """What turns `hidden` into logits. Tensors are views of the live parameters, cut to `vocab` rows."""
        if self.own_logits:
            return Head(None)
        weight, bias = _head_weight(self.model), getattr(self.model.get_output_embeddings(), "bias", None)
        if weight.shape[0] > self.vocab:
            weight, bias = weight[: self.vocab], None if bias is None else bias[: self.vocab]
        return Head(weight, bias, self._scale, self._softcap)

    def logits(self, batch: Batch) -> torch.Tensor:
        """float32 logits [N, vocab] by the model's own forward, which makes them at every position."""
        if self.is_encoder_decoder:
            return seq2seq.own_logits(self.model, batch, self.start)[:, : self.vocab].float()
        with one_sequence_a_row():
            logits_BTV = self.model(input_ids=batch.ids_BT, attention_mask=None, use_cache=False).logits
        return logits_BTV.flatten(0, 1).index_select(0, batch.positions_N)[:, : self.vocab].float()

    @torch.no_grad()
    def check_head(self, batch: Batch) -> bool:
        """Whether `head().logits(hidden(batch))` is what the model itself computes; if not, use its own logits from now on.

        Compared on the batch as it is and again with the head's input scaled up until the logits are large, where a
        soft cap shows. Tolerance: 1e-3 of the logits' spread, and the rounding of the model's dtype. Raises NonFiniteError
        where the model's own logits have no finite maximum: not the head is at fault then.
        """
        if self.own_logits:
            return False
        with eval_mode(self.model), torch.autocast(self.device.type, enabled=False):
            hidden_ND, own_NV = self.hidden(batch), self.logits(batch)
            if not own_NV.amax(-1).isfinite().all():
                raise NonFiniteError(
                    "the model's logits are not finite",
                    where=self.model.config.name_or_path or self.model.config.model_type,
                    hint="its weights have diverged or are damaged: take an earlier checkpoint; in fp16 try fp32",
                )
            agrees = close(self.head().logits(hidden_ND), own_NV, self.model.dtype)
            gain = _PROBE / max(own_NV[own_NV.isfinite()].abs().max().item(), 1e-6)
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
                agrees = not reached or close(self.head().logits(hidden_ND * gain), loud_NV, self.model.dtype)
        self.own_logits = not agrees
        return agrees

    def check_decoding(self) -> bool:
        """Raises ModelError for a model that cannot decode; the first call tries it on a few tokens. Whether prompts may be
        padded."""
        if self._tried is None or self._tried[0] != self.own_logits:
            plain = seq2seq.Seq2SeqDecoding if self.is_encoder_decoder else PlainDecoding
            self._tried = self.own_logits, check_decoding(self, plain)
        return self._tried[1]

    def decode(
        self, prompts: Sequence[np.ndarray]
    ) -> FastDecoding | PlainDecoding | ByLength | seq2seq.Seq2SeqDecoding:
        """Start decoding these prompts (token ids, one array each, at least one token) side by side.

        Nothing bounds the length: prompt and new tokens together must stay within `context`. Under autocast the float32
        weights are cast once, here, into a copy that lives as long as the decoding: it is of the weights as they are now.
        An adapter is merged into such a copy. Raises ModelError as `check_decoding` does.
        """
        if not prompts or min(len(prompt) for prompt in prompts) == 0:
            raise ValueError("decoding needs prompts, and a token in each")
        may_be_padded = self.check_decoding()
        if self._ways is None and may_be_padded and not self.is_encoder_decoder:
            self._ways = ways(self if self.adapter is None else self.plain(self.model.dtype))
        runs = self._as_decoded()
        if self.is_encoder_decoder:
            return seq2seq.Seq2SeqDecoding(runs, prompts)
        if not may_be_padded:
            return ByLength(runs, prompts)
        return FastDecoding(runs, prompts, step=self._ways.step) if self._ways.fast else PlainDecoding(runs, prompts)

    def decode_blocks(self, prompts: Sequence[np.ndarray]) -> BlockDecoding | None:
        """As `decode`, with tokens that come several at a time and can be taken back; None where the model cannot."""
        if self._takes_back is None:
            self._takes_back = not self.is_encoder_decoder and takes_back(self)
        return BlockDecoding(self._as_decoded(), prompts) if self._takes_back else None

    def _as_decoded(self) -> Backbone:
        """This model in the dtype to decode in, an adapter merged in."""
        device = self.device.type
        if torch.is_autocast_enabled(device) and self.model.dtype == torch.float32 and not self.is_quantized:
            return self.plain(torch.get_autocast_dtype(device))
        return self if self.adapter is None else self.plain(self.model.dtype)

    def plain(self, dtype: torch.dtype) -> Backbone:
        """A copy to compute with in this dtype, of the weights as they are now, an adapter merged in."""
        twin = Backbone(cast(self.model, dtype, self.adapter), self.tokenizer, self.vocab)
        twin.own_logits = self.own_logits
        return twin

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors that training changes, live: the model's, or its adapter's alone."""
        state = self.model.state_dict()
        if self.adapter is None:
            return state
        return {name: state[name] for name, weight in self.model.named_parameters() if weight.requires_grad}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` gave."""
        absent, unknown = self.model.load_state_dict(state, strict=self.adapter is None)
        if unknown or set(absent) & self.state().keys():
            raise ValueError(f"these are not the adapter's weights: {[*unknown, *absent][:2]}")

    @torch.no_grad()
    def swap_state(self, state: dict[str, torch.Tensor]) -> None:
        """Takes back what `state` gave, and leaves in it, on the CPU, what there was: the same again undoes it.

        A tensor after the other, so that no second copy of them all is needed. One that has two names, as a tied head, is
        left under the first.
        """
        tensors, swapped = self.model.state_dict(keep_vars=True), set()  # the same object under both names
        for name in self.state():
            live = tensors[name]
            if id(live) not in swapped:
                swapped.add(id(live))
                there_was = live.detach().to("cpu", copy=True)
                live.copy_(state[name])
                state[name] = there_was

    @property
    def is_quantized(self) -> bool:
        """Whether weights are kept in 8 or 4 bits, which are no numbers to cast, merge into or copy."""
        return bool(getattr(self.model, "is_quantized", False))


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
    scale = seq2seq.head_scale(config)
    for name, power in _SCALES.items():
        power = _SCALE_EXCEPTIONS.get((config.model_type, name), power)
        value = getattr(config, name, None)
        if power is not None and value is not None:
            scale *= float(value) ** power
    caps = (getattr(config, name, None) for name in _SOFT_CAPS)
    return scale, next((float(cap) for cap in caps if cap is not None), None)
