"""Run a frozen teacher in this process: compute its last hidden states at the response positions.

The head is applied to the states chunk by chunk in the fused loss, so the logits are never stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

import torch
from torch import Tensor

from distillm_cli.losses.fused import HeadLike
from distillm_cli.training.distributed import world
from distillm_cli.types import Batch, Embedded, Sequence, collate


class LanguageModel(Protocol):
    """Define the interface of a model in training."""

    @property
    def vocab(self) -> int: ...

    def hidden(self, batch: Batch, *, for_backward: bool = False) -> Tensor:
        """Return the last hidden states [N, D] at ``batch.positions_N``.

        for_backward: ``backward()`` follows (not ``autograd.grad``). A model with tied embeddings may then defer the
        embedding's gradient until the head's has been computed.
        """

    def hidden_and_router_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return ``hidden`` and the auxiliary loss of a mixture of experts' routers, a scalar, of one pass."""

    def head(self) -> HeadLike:
        """Return the map from hidden states to logits."""

    def embed(self, batch: Batch) -> Embedded:
        """Return the input embeddings that the trunk looks up for a batch, with their graph."""

    def hidden_of(self, embedded: Embedded) -> Tensor:
        """Return the last hidden states [N, D] at ``embedded.positions_N``, computed from input embeddings."""

    def token_embeddings(self, ids: Tensor, *, decoder: bool = False) -> Tensor:
        """Return the input embeddings of token ids, as the trunk scales them. decoder: of an encoder-decoder's decoder."""

    def to(self, device: str) -> LanguageModel:
        """Move the model to a device, as ``nn.Module.to``."""


class LocalTeacher:
    """Compute a model's hidden states at every call.

    tokens: number of response positions computed over the whole run. Those that a resumed run computes again count twice.
    """

    mode: str = "off"  # of the cache, as checkpoints record it
    has_released_model: bool = False

    def __init__(self, model: LanguageModel):
        self.model = model
        self.tokens = 0

    @property
    def head(self) -> HeadLike:
        return self.model.head()

    @torch.no_grad()
    def hidden(self, batch: Batch, sequences: SequenceOf[Sequence]) -> Tensor:
        """Return the last hidden states [N, D_teacher] of the batch that ``sequences`` were collated to, without a graph."""
        return self.compute(self.seen(batch, sequences))

    @staticmethod
    def seen(batch: Batch, sequences: SequenceOf[Sequence]) -> Batch:
        """Return the batch with the teacher's prompts, if these differ. It has the same supervised tokens in order."""
        if all(s.teacher_prompt is None for s in sequences):
            return batch
        return collate([s.for_teacher for s in sequences]).to(batch.ids_BT.device)

    def compute(self, batch: Batch) -> Tensor:
        """Run the model on the batch in the teacher's own dtype, independent of autocast."""
        self.tokens += batch.tokens
        with torch.autocast(batch.ids_BT.device.type, enabled=False):
            return self.model.hidden(batch)

    def begin_step(self) -> None:
        """Mark the state that ``roll_back`` returns to."""

    def roll_back(self) -> None:
        """Drop the states cached since ``begin_step``."""

    def exchange(self, sequences: SequenceOf[Sequence], device: torch.device) -> None:
        """Share cached states with the other processes. Every process calls it, with all sequences of the step."""

    def total_tokens(self) -> int:
        """Return the tokens that all processes have computed. Every process calls it."""
        return sum(world().gather(lambda: self.tokens))

    def state_dict(self) -> dict[str, str | int]:
        """Return the state for a checkpoint. Every process calls it."""
        return {"teacher_cache": self.mode, "teacher_tokens": self.total_tokens()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add the count of ``state`` to the tokens that this process has computed, such as for a cache on disk."""
        if world().is_first:
            self.tokens += state["teacher_tokens"]
