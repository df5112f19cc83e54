"""Run encoder-decoder models: the encoder reads the prompt, the decoder the response.

The decoder's input is its start token and then the response, shifted by one, so its state at position t predicts
response token t. Batches are those of causal models, whose supervised positions separate prompts and responses.

Shape letters: B sequences, S prompt length (padded), R response length (padded), N supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from distillm_cli.errors import ModelError
from distillm_cli.models.generation.decoding import check_call_order, group_by_length
from distillm_cli.types import Batch, Embedded
from distillm_cli.utils.modules import eval_mode_of

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone


@dataclass(frozen=True)
class EncoderDecoderBatch:
    """Hold the inputs of encoder and decoder of a batch.

    mask_BS: None if no prompt is padded. positions_N: indices into [B·R].
    """

    ids_BS: torch.Tensor
    mask_BS: torch.Tensor | None
    decoder_ids_BR: torch.Tensor
    positions_N: torch.Tensor


def split_batch(batch: Batch, start: int) -> EncoderDecoderBatch:
    """Return prompts and responses of a batch, both padded on the right. start: the start token of the decoder."""
    B, T = batch.ids_BT.shape
    device = batch.ids_BT.device
    # Not by bincount, which synchronizes the device to find the largest value.
    lengths_B = torch.zeros(B, dtype=torch.int64, device=device).index_add_(
        0, batch.rows_N, torch.ones_like(batch.rows_N)
    )
    first_B = lengths_B.cumsum(0) - lengths_B  # index of each row's first supervised token among the N
    # The state that predicts the first response token is the prompt's last.
    last_B = batch.positions_N[first_B.clamp(max=batch.tokens - 1)] - torch.arange(B, device=device) * T
    prompts_B = torch.where(lengths_B > 0, last_B + 1, 1)
    # One transfer for all three sizes, since each transfer synchronizes the device.
    S, shortest, R = torch.stack([prompts_B.max(), prompts_B.min(), lengths_B.max()]).tolist()
    mask_BS = torch.arange(S, device=device) < prompts_B[:, None]
    index_N = torch.arange(batch.tokens, device=device) - first_B[batch.rows_N]
    decoder_ids = torch.full((B, R + 1), start, dtype=torch.int64, device=device)
    decoder_ids[batch.rows_N, index_N + 1] = batch.targets_N
    return EncoderDecoderBatch(
        ids_BS=batch.ids_BT[:, :S].masked_fill(~mask_BS, 0),
        mask_BS=None if shortest == S else mask_BS.long(),
        decoder_ids_BR=decoder_ids[:, :R],
        positions_N=batch.rows_N * R + index_N,
    )


def states(model: PreTrainedModel, batch: Batch, start: int) -> torch.Tensor:
    """Return the decoder's last hidden states [N, D] at the supervised positions."""
    parts = split_batch(batch, start)
    encoded = model.get_encoder()(input_ids=parts.ids_BS, attention_mask=parts.mask_BS)[0]
    decoded = model.get_decoder()(
        input_ids=parts.decoder_ids_BR,
        encoder_hidden_states=encoded,
        encoder_attention_mask=parts.mask_BS,
        use_cache=False,
    )[0]
    return decoded.flatten(0, 1).index_select(0, parts.positions_N)


def states_of(model: PreTrainedModel, embedded: Embedded, *, own_logits: bool = False) -> torch.Tensor:
    """Return the decoder's states [B, R, D], or the model's own logits [B, R, V], of input embeddings."""
    encoded = model.get_encoder()(inputs_embeds=embedded.inputs_BTD, attention_mask=embedded.mask_BT)[0]
    if own_logits:
        return model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=embedded.mask_BT,
            decoder_inputs_embeds=embedded.decoder_BRD,
            use_cache=False,
        ).logits
    return model.get_decoder()(
        inputs_embeds=embedded.decoder_BRD,
        encoder_hidden_states=encoded,
        encoder_attention_mask=embedded.mask_BT,
        use_cache=False,
    )[0]


def own_logits(model: PreTrainedModel, batch: Batch, start: int) -> torch.Tensor:
    """Return the model's own logits [N, rows of its head], which its forward computes at every position."""
    parts = split_batch(batch, start)
    logits_BRV = model(
        input_ids=parts.ids_BS, attention_mask=parts.mask_BS, decoder_input_ids=parts.decoder_ids_BR, use_cache=False
    ).logits
    return logits_BRV.flatten(0, 1).index_select(0, parts.positions_N)


def start_token(config: PretrainedConfig) -> int:
    """Return the start token of the decoder: the config's decoder_start_token_id, else its pad token, as in T5.

    Raises ModelError if there is neither.
    """
    for name in ("decoder_start_token_id", "pad_token_id"):
        if (token := getattr(config, name, None)) is not None:
            return token
    raise ModelError(
        "model.no_start_token",
        "no start token for the decoder",
        where=config.name_or_path or config.model_type,
        hint="set decoder_start_token_id in config.json",
    )


class Seq2SeqDecoding:
    """Decode as in ``decoding.py``: the prompts are encoded once, the decoder caches the keys and values of both sides.

    All rows start with the start token at the same time, so the decoder's side has no padding.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[np.ndarray]):
        model = backbone.model
        self._start = backbone.start
        self._vocab = backbone.vocab
        self._own_logits = backbone.own_logits
        self._model = model
        self._encoder = model.get_encoder()
        self._decoder = model.get_decoder()
        self._modules: list[nn.Module] = list(model.modules())
        self._device = backbone.device
        self._head = None if backbone.own_logits else backbone.head().prepared()
        self._prompts: list[np.ndarray] | None = list(prompts)
        # Without a config: that would count the encoder's layers, and the decoder may have more.
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    @torch.no_grad()
    def logits(self, tokens_B: torch.Tensor | None) -> torch.Tensor:
        check_call_order(tokens_B, self._prompts is not None)
        with eval_mode_of(self._modules), torch.autocast(self._device.type, enabled=False):
            if tokens_B is None:
                prompts, self._prompts = self._prompts, None
                self._encode(prompts)
                tokens_B = torch.full((len(prompts),), self._start, device=self._device)
            return self._pass(tokens_B.to(self._device)[:, None])

    def keep(self, rows_B: torch.Tensor) -> None:
        if self._prompts is not None:
            self._prompts = [self._prompts[b] for b in rows_B.tolist()]
            return
        rows_B = rows_B.to(self._device)
        self._encoded_BSD = self._encoded_BSD[rows_B]
        self._mask_BS = None if self._mask_BS is None else self._mask_BS[rows_B]
        self._cache.reorder_cache(rows_B)

    def _encode(self, prompts: Sequence[np.ndarray]) -> None:
        """Encode prompts of similar length in one pass each."""
        lengths = [len(prompt) for prompt in prompts]
        S, encoded = max(lengths), None
        for rows in group_by_length(lengths):
            ids_BS, mask_BS = _right_padded([prompts[b] for b in rows])
            ids_BS, mask_BS = ids_BS.to(self._device), mask_BS.to(self._device)
            part = self._encoder(input_ids=ids_BS, attention_mask=None if mask_BS.all() else mask_BS)[0]
            if encoded is None:
                encoded = part.new_zeros((len(prompts), S, part.shape[-1]))
            encoded[rows, : part.shape[1]] = part
        self._encoded_BSD = encoded
        lengths_B = torch.tensor(lengths, device=self._device)
        self._mask_BS = (
            None if min(lengths) == S else (torch.arange(S, device=self._device) < lengths_B[:, None]).long()
        )

    def _pass(self, ids_B1: torch.Tensor) -> torch.Tensor:
        shared: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True}
        if self._own_logits:
            logits_B1V = self._model(
                encoder_outputs=BaseModelOutput(last_hidden_state=self._encoded_BSD),
                attention_mask=self._mask_BS,
                decoder_input_ids=ids_B1,
                **shared,
            ).logits
            return logits_B1V[:, -1, : self._vocab].float()
        decoded = self._decoder(
            input_ids=ids_B1,
            encoder_hidden_states=self._encoded_BSD,
            encoder_attention_mask=self._mask_BS,
            **shared,
        )[0]
        return self._head.logits(decoded[:, -1])


def _right_padded(prompts: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    B, S = len(prompts), max(len(prompt) for prompt in prompts)
    ids_BS, mask_BS = np.zeros((B, S), dtype=np.int64), np.zeros((B, S), dtype=np.int64)
    for b, prompt in enumerate(prompts):
        ids_BS[b, : len(prompt)] = prompt
        mask_BS[b, : len(prompt)] = 1
    return torch.from_numpy(ids_BS), torch.from_numpy(mask_BS)
