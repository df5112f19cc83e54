"""Define one interface for causal and encoder-decoder models: supervised hidden states, the head, decoding.

Shape letters: B sequences, T time, N supervised positions, V vocabulary, D width of the last hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, masking_utils

from distillm_cli.errors import ModelError, NonFiniteError
from distillm_cli.models import seq2seq
from distillm_cli.models.cpu.forward import CpuForward
from distillm_cli.models.cpu.packed import PackedLinear
from distillm_cli.models.generation.decoding import (
    BlockDecoding,
    FastDecoding,
    LengthGroupedDecoding,
    PlainDecoding,
)
from distillm_cli.models.generation.decoding_checks import (
    FastPaths,
    can_retract,
    check_decoding,
    find_fast_paths,
    logits_match,
)
from distillm_cli.models.generation.working_copy import working_copy
from distillm_cli.models.model_families import context_of, head_scale_and_cap
from distillm_cli.models.router import RouterLoss, attention_mask
from distillm_cli.types import Batch, Embedded, Sequence, collate
from distillm_cli.utils.distributed_tensors import is_distributed, like
from distillm_cli.utils.modules import assign_state, eval_mode, weights_fingerprint

if TYPE_CHECKING:
    from distillm_cli.models.lora import Adapter
    from distillm_cli.models.unloaded import TeacherRecord

# Random models have logits too small to reveal a soft cap, so the head is also checked at this magnitude.
_PROBE = 50.0
_PROBE_TOKENS = 8  # for the check of input embeddings

# Functions of transformers that are skipped: they synchronize the accelerator for each batch without effect.
_FIND_PACKED_SEQUENCES = "find_packed_sequence_indices"
_WARN_OF_PADDING = "warn_if_padding_and_no_attention_mask"


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the highest token id + 1, added tokens included: `len(tokenizer)` if ids have no gaps."""
    return max(tokenizer.get_vocab().values()) + 1


@dataclass(frozen=True, eq=False)
class Head:
    """Compute logits = cap(scale · (hidden @ weight.T + bias)), cap(x) = softcap · tanh(x / softcap).

    weight_VD None: the "hidden states" are the logits already. product: hidden @ weight.T + bias, see `prepared`.
    """

    weight_VD: torch.Tensor | None
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    product: PackedLinear | None = None

    def prepared(self) -> Head:
        """Return a head for many products with few rows outside autocast, with its current weight (`models/cpu`)."""
        return self if self.weight_VD is None else replace(self, product=PackedLinear(self.weight_VD, self.bias_V))

    def to(self, device: torch.device, dtype: torch.dtype) -> Head:
        """Return the head on a device, in a dtype."""
        weight_VD = None if self.weight_VD is None else self.weight_VD.to(device, dtype)
        bias_V = None if self.bias_V is None else self.bias_V.to(device, dtype)
        return replace(self, weight_VD=weight_VD, bias_V=bias_V)

    def logits(self, hidden_ND: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return float32 logits [N, V]. dtype: of the product. None: the weight's, or autocast's under autocast."""
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
    """Hold a causal or an encoder-decoder model with its tokenizer.

    The model is the only submodule, so parameters and buffers are those of the model.

    vocab: number of token ids in the loss. Larger matrices (padded vocabularies) are cut. Unset: the tokenizer's.
    adapter: the adapter that trains in the model's layers, which are frozen. Raises ModelError if the model has fewer
    rows than the tokenizer has ids.
    """

    is_to_be_sharded = False  # whether its weights are on the CPU, maybe mapped from files, until they are distributed
    is_served = False  # whether a server computes its states, so that it cannot generate or be trained here
    record: TeacherRecord | None = None  # of a model of which only the head was loaded (``models/unloaded.py``)

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, vocab: int | None = None):
        super().__init__()
        self.model = model
        self.adapter: Adapter | None = None
        self.router_loss: RouterLoss | None = None  # set by `router.set_router_loss`
        self.reshard: Callable[[], None] | None = None  # drops gathered weights, while the model is distributed
        self.training = model.training
        self.tokenizer = tokenizer
        self.vocab = vocabulary_size(tokenizer) if vocab is None else vocab
        # Results of tests, filled at first use. The first: whether prompts may be padded, by the value of `own_logits`.
        self._may_be_padded: tuple[bool, bool] | None = None
        self._fast_paths: FastPaths | None = None
        self._can_retract: bool | None = None
        self._cpu_forward = CpuForward()
        self.head_scale, self.head_softcap = head_scale_and_cap(model.config)
        self.own_logits = _trunk(model) is None or not isinstance(_head_weight(model), torch.Tensor)
        _skip_padding_warning(model)

    @property
    def vocab(self) -> int:
        """Return the number of token ids in the loss."""
        return self._vocab

    @vocab.setter
    def vocab(self, value: int) -> None:
        rows = self.model.get_input_embeddings().weight.shape[0]
        head = _head_weight(self.model)
        rows = rows if head is None else min(rows, head.shape[0])
        if value > rows:
            raise ModelError(
                "model.tokenizer_mismatch",
                f"the tokenizer has {value:,} token ids and the model only {rows:,}",
                where=self.model.config.name_or_path or self.model.config.model_type,
                hint="use the tokenizer that belongs to this model",
            )
        self._vocab = value

    @property
    def trunk(self) -> PreTrainedModel | None:
        """Return the part of the model whose output the head reads."""
        return _trunk(self.model)

    @property
    def is_encoder_decoder(self) -> bool:
        """Return whether prompt and response are two separate texts, each with its own end."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def start(self) -> int:
        """Return the start token of the decoder of an encoder-decoder."""
        return seq2seq.start_token(self.model.config)

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.model.parameters()).device

    @property
    def context(self) -> int | None:
        """Return the maximum number of positions of prompt and response together, None without a limit.

        An encoder-decoder with learned positions has this number for each of the two, so the limit is conservative.
        """
        return context_of(self.model.config)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Return the token ids that end a response: the tokenizer's end-of-sequence and those of the generation config."""
        generation = getattr(self.model, "generation_config", None)
        declared = getattr(generation, "eos_token_id", None)
        ids = declared if isinstance(declared, list | tuple) else [declared]
        return frozenset(i for i in [self.tokenizer.eos_token_id, *ids] if i is not None and i < self.vocab)

    @property
    def forced_first(self) -> int | None:
        """Return the first token of the responses of an encoder-decoder (``forced_bos_token_id``), None without one."""
        if not self.is_encoder_decoder:
            return None
        for config in (getattr(self.model, "generation_config", None), self.model.config):
            if (token := getattr(config, "forced_bos_token_id", None)) is not None:
                return token
        return None

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.hidden(batch)

    def hidden(self, batch: Batch, *, for_backward: bool = False) -> torch.Tensor:
        """Return the last hidden states [N, D] that predict the supervised tokens, after the final norm and any projection.

        for_backward: ``backward()`` follows, so that a tied embedding's own gradient may be added to ``grad`` at its end.

        A causal model gets no attention mask: padding is on the right, to which causal attention does not attend. If
        `check_head` found a different head, the result is the model's own logits [N, V].
        """
        if self.own_logits:
            return self.logits(batch)
        if self.is_encoder_decoder:
            return seq2seq.states(self.model, batch, self.start)
        states_ND = self._cpu_forward.hidden(self, batch, for_backward=for_backward)  # None off CPUs; see models/cpu
        return self.trunk_states(batch) if states_ND is None else states_ND

    def hidden_and_router_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `hidden` and the routers' auxiliary loss over the batch, a scalar, from one pass."""
        with _no_packed_sequences():
            outputs = self.trunk(
                input_ids=batch.ids_BT, attention_mask=None, use_cache=False, output_router_logits=True
            )
        hidden_ND = outputs[0].flatten(0, 1).index_select(0, batch.positions_N)
        return hidden_ND, self.router_loss(outputs.router_logits, attention_mask(batch))

    def trunk_states(self, batch: Batch) -> torch.Tensor:
        """Return `hidden` of a causal model, computed by the trunk's own forward at every position."""
        with _no_packed_sequences():
            states = self.trunk(input_ids=batch.ids_BT, attention_mask=None, use_cache=False)[0]
        return states.flatten(0, 1).index_select(0, batch.positions_N)

    def token_embeddings(self, ids: torch.Tensor, *, decoder: bool = False) -> torch.Tensor:
        """Return the input embeddings of token ids, as the trunk scales them. decoder: of an encoder-decoder's decoder."""
        if not self.is_encoder_decoder:
            return self.model.get_input_embeddings()(ids)
        part = self.model.get_decoder() if decoder else self.model.get_encoder()
        return part.get_input_embeddings()(ids)

    def embed(self, batch: Batch) -> Embedded:
        """Return the input embeddings that the trunk looks up for a batch, with their graph."""
        if not self.is_encoder_decoder:
            return Embedded(self.token_embeddings(batch.ids_BT), batch.positions_N)
        parts = seq2seq.split_batch(batch, self.start)
        return Embedded(
            self.token_embeddings(parts.ids_BS),
            parts.positions_N,
            mask_BT=parts.mask_BS,
            decoder_BRD=self.token_embeddings(parts.decoder_ids_BR, decoder=True),
        )

    def hidden_of(self, embedded: Embedded) -> torch.Tensor:
        """Return `hidden` of input embeddings, computed by transformers' forward at every position.

        Equal to `hidden` for the result of `embed`, which `check_embeddings` tests.
        """
        if self.is_encoder_decoder:
            found = seq2seq.states_of(self.model, embedded, own_logits=self.own_logits)
        else:
            inputs = {"inputs_embeds": embedded.inputs_BTD, "attention_mask": None, "use_cache": False}
            with _no_packed_sequences():
                found = self.model(**inputs).logits if self.own_logits else self.trunk(**inputs)[0]
        found_ND = found.flatten(0, 1).index_select(0, embedded.positions_N)
        return found_ND[:, : self.vocab].float() if self.own_logits else found_ND

    @torch.no_grad()
    def check_embeddings(self) -> None:
        """Raise ModelError unless the model computes the same states from input embeddings as from token ids.

        Some families use the ids elsewhere too, or scale embeddings only after looking them up.
        """
        half = max(1, min(_PROBE_TOKENS, self.context or _PROBE_TOKENS) // 2)
        ids = np.arange(1, half + 1, dtype=np.int32) % self.vocab
        batch = collate([Sequence(ids, ids), Sequence(ids[: max(1, half - 1)], ids)]).to(self.device)
        with eval_mode(self.model), torch.autocast(self.device.type, enabled=False):
            try:
                agrees = logits_match(self.hidden_of(self.embed(batch)), self.hidden(batch), self.model.dtype)
                reason = "its states differ"
            except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
                agrees = False
                reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if not agrees:
            kind = self.model.config.model_type
            raise ModelError(
                "model.no_input_embeddings",
                f"{kind} models cannot run on input embeddings ({reason})",
                where=self.model.config.name_or_path or kind,
                hint="turn off data.mixup, objective.input_gradient, train.adversarial and --attack for this model",
            )

    def _apply(self, fn: Callable, recurse: bool = True) -> Backbone:
        self._cpu_forward.forget_weights()  # the weights are about to be replaced
        return super()._apply(fn, recurse)

    def head(self) -> Head:
        """Return the map from `hidden` to logits. Its tensors are views of the parameters, cut to `vocab` rows."""
        head = self.full_head()
        if head.weight_VD is None or head.weight_VD.shape[0] <= self.vocab:
            return head
        bias_V = None if head.bias_V is None else head.bias_V[: self.vocab]
        return replace(head, weight_VD=head.weight_VD[: self.vocab], bias_V=bias_V)

    def full_head(self) -> Head:
        """Return `head` with every row of the model's matrix."""
        if self.own_logits:
            return Head(None)
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        return Head(_head_weight(self.model), bias, self.head_scale, self.head_softcap)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return float32 logits [N, vocab], computed by the model's own forward at every position."""
        if self.is_encoder_decoder:
            return seq2seq.own_logits(self.model, batch, self.start)[:, : self.vocab].float()
        with _no_packed_sequences():
            logits_BTV = self.model(input_ids=batch.ids_BT, attention_mask=None, use_cache=False).logits
        return logits_BTV.flatten(0, 1).index_select(0, batch.positions_N)[:, : self.vocab].float()

    @torch.no_grad()
    def check_head(self, batch: Batch) -> bool:
        """Return whether `head().logits(hidden(batch))` equals the model's own logits. If not, use those from now on.

        They are compared on the batch, and with the head's input scaled up until the logits are large enough to reveal
        a soft cap. Tolerance: 1e-3 of the logits' spread, and the rounding of the model's dtype. Raises NonFiniteError
        if the model's own logits have no finite maximum, which is not a fault of the head.
        """
        if self.own_logits:
            return False
        with eval_mode(self.model), torch.autocast(self.device.type, enabled=False):
            hidden_ND, own_NV = self.hidden(batch), self.logits(batch)
            if not own_NV.amax(-1).isfinite().all():
                raise NonFiniteError(
                    "numbers.not_finite",
                    "the model's logits are not finite",
                    where=self.model.config.name_or_path or self.model.config.model_type,
                    hint="its weights have diverged or are damaged: use an earlier checkpoint; in fp16 try fp32",
                )
            agrees = logits_match(self.head().logits(hidden_ND), own_NV, self.model.dtype)
            gain = _PROBE / max(own_NV[own_NV.isfinite()].abs().max().item(), 1e-6)
            if agrees and gain > 1:
                calls = []

                def amplify(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                    calls.append(True)
                    return (inputs[0] * gain, *inputs[1:])

                hook = self.model.get_output_embeddings().register_forward_pre_hook(amplify)
                try:
                    amplified_NV = self.logits(batch)
                finally:
                    hook.remove()
                # A model that uses the head's weight without calling the head cannot be tested this way.
                agrees = not calls or logits_match(self.head().logits(hidden_ND * gain), amplified_NV, self.model.dtype)
        self.own_logits = not agrees
        return agrees

    def check_decoding(self) -> bool:
        """Return whether prompts may be padded, tested on a few tokens by the first call.

        Raises ModelError for a model that cannot decode.
        """
        if self._may_be_padded is None or self._may_be_padded[0] != self.own_logits:
            plain = seq2seq.Seq2SeqDecoding if self.is_encoder_decoder else PlainDecoding
            self._may_be_padded = self.own_logits, check_decoding(self, plain)
        return self._may_be_padded[1]

    def decode(
        self, prompts: SequenceOf[np.ndarray]
    ) -> FastDecoding | PlainDecoding | LengthGroupedDecoding | seq2seq.Seq2SeqDecoding:
        """Start decoding these prompts (token ids, one array each, at least one token) in one batch.

        The caller must keep prompt and new tokens together within `context`. Under autocast the current float32 weights
        are cast once into a copy that exists until decoding ends. An adapter is merged into such a copy. Raises
        ModelError as `check_decoding` does.
        """
        if not prompts or min(len(prompt) for prompt in prompts) == 0:
            raise ValueError("decoding needs prompts of at least one token")
        may_be_padded = self.check_decoding()
        if self._fast_paths is None and may_be_padded and not self.is_encoder_decoder:
            is_own = self.adapter is None or self.is_quantized
            self._fast_paths = find_fast_paths(self if is_own else self.plain(self.model.dtype))
        model = self._as_decoded()
        if self.is_encoder_decoder:
            return seq2seq.Seq2SeqDecoding(model, prompts)
        if not may_be_padded:
            return LengthGroupedDecoding(model, prompts)
        if not self._fast_paths.cache:
            return PlainDecoding(model, prompts)
        return FastDecoding(model, prompts, step=self._fast_paths.step)

    def decode_blocks(self, prompts: SequenceOf[np.ndarray]) -> BlockDecoding | None:
        """Start decoding with blocks of tokens that can be removed; None if the model does not support it."""
        if self._can_retract is None:
            self._can_retract = not self.is_encoder_decoder and can_retract(self)
        return BlockDecoding(self._as_decoded(), prompts) if self._can_retract else None

    def _as_decoded(self) -> Backbone:
        """Return this model in the dtype for decoding, with an adapter merged in."""
        if self.is_quantized:  # an adapter stays beside its weights
            return self
        device = self.device.type
        if torch.is_autocast_enabled(device) and self.model.dtype == torch.float32:
            return self.plain(torch.get_autocast_dtype(device))
        return self if self.adapter is None else self.plain(self.model.dtype)

    def stop_cpu_forward(self) -> None:
        """Compute hidden states by the model's own forward from now on."""
        self._cpu_forward = CpuForward()
        self._cpu_forward.agrees = False

    def forget_fast_paths(self) -> None:
        """Test the ways to decode again at the next use, after hooks were added or removed."""
        self._fast_paths = None

    def plain(self, dtype: torch.dtype) -> Backbone:
        """Return a copy of the current weights in this dtype, with an adapter merged in."""
        twin = Backbone(working_copy(self.model, dtype, self.adapter), self.tokenizer, self.vocab)
        twin.own_logits = self.own_logits
        return twin

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors that training changes, not copied: the model's, or the adapter's alone."""
        state = self.model.state_dict()
        if self.adapter is None:
            return state
        return {name: state[name] for name, weight in self.model.named_parameters() if weight.requires_grad}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what `state` returned.

        A model that will be distributed takes the tensors without a copy, and a distributed one its part of each.
        """
        if self.reshard is not None:
            self.reshard()
            own = self.model.state_dict()
            state = {name: like(value, own.get(name)) for name, value in state.items()}
        load = partial(assign_state, self.model) if self.is_to_be_sharded else self.model.load_state_dict
        absent, unknown = load(state, strict=self.adapter is None)
        if unknown or set(absent) & self.state().keys():
            raise ValueError(f"weights do not match the adapter: {[*unknown, *absent][:2]}")

    @torch.no_grad()
    def swap_state(self, state: dict[str, torch.Tensor]) -> None:
        """Swap the weights with tensors on the CPU that `state` returned. A second call reverses the first.

        Tensors are swapped one by one, so that no second copy of all of them is needed. A tensor with two names, such
        as a tied head, is stored under the first.
        """
        if self.reshard is not None:
            self.reshard()
        tensors, swapped = self.model.state_dict(keep_vars=True), set()  # the same object under both names
        for name in self.state():
            live = tensors[name]
            if id(live) not in swapped:
                swapped.add(id(live))
                previous = live.detach().clone() if is_distributed(live) else live.detach().to("cpu", copy=True)
                live.copy_(like(state[name], live))
                state[name] = previous

    def fingerprint(self) -> str:
        """Return a digest of some numbers of each weight.

        They are rounded to bf16 first, since `auto` may load another dtype on another device.
        """
        return weights_fingerprint(self.model.state_dict().items(), torch.bfloat16)

    def on_device(self) -> AbstractContextManager[None]:
        """Return a context inside which the weights are on ``device``. They are, unless they are offloaded."""
        return nullcontext()

    @property
    def is_whole(self) -> bool:
        """Return whether the whole model is loaded, and not its head alone."""
        return True

    @property
    def whole(self) -> Backbone:
        """Return the whole model. If only the head is loaded, the rest is loaded now."""
        return self

    @property
    def is_dispatched(self) -> bool:
        """Return whether accelerate moves the layers, so that the weights cannot be moved or released."""
        return False

    @property
    def is_quantized(self) -> bool:
        """Return whether weights are quantized to 8 or 4 bits, so that they cannot be cast, merged or copied."""
        return bool(getattr(self.model, "is_quantized", False))


def _trunk(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return the part whose output the head reads: OPT's decoder with its projection, a composite model's text model."""
    for candidate in (model.get_decoder(), model.base_model):
        if isinstance(candidate, PreTrainedModel) and candidate is not model:
            return candidate
    return None


def _head_weight(model: PreTrainedModel) -> torch.Tensor | None:
    return getattr(model.get_output_embeddings(), "weight", None)


def _skip_padding_warning(model: nn.Module) -> None:
    """Prevent this model from searching for padding tokens in ids that have no mask.

    GPT-2 does so and warns that results may be wrong. Here padding is on the right, to which causal attention does not
    attend, or is masked, and a student may sample the padding token like any other.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and hasattr(part, _WARN_OF_PADDING):
            setattr(part, _WARN_OF_PADDING, _do_nothing)


def _do_nothing(*args: object) -> None:
    pass


@contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """Prevent transformers from checking positions for packed sequences, inside the block.

    A batch here has none, and transformers has no option for it. A version without the function is not changed.
    """
    look = getattr(masking_utils, _FIND_PACKED_SEQUENCES, None)
    if look is None:
        yield
        return
    setattr(masking_utils, _FIND_PACKED_SEQUENCES, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, _FIND_PACKED_SEQUENCES, look)
