"""Define the weights of a token's loss: per step (``LossWeights``) and per token (``TokenWeights``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from distillm_cli.losses.divergences import Divergence


@dataclass(frozen=True)
class LossWeights:
    """Hold the weights of a token's loss, ``kd`` · divergence + ``ce`` · cross-entropy."""

    kd: float
    ce: float
    divergence: Divergence | None = None


CROSS_ENTROPY = LossWeights(kd=0.0, ce=1.0)


class Surrogate(Protocol):
    """Compute a loss of N supervised tokens from their log-probabilities [N]: values [N] and −d value / d log q [N]."""

    def __call__(self, log_q_N: Tensor) -> tuple[Tensor, Tensor]: ...
    def __getitem__(self, tokens: slice | Tensor) -> Surrogate: ...
    def to(self, device: torch.device | str) -> Surrogate: ...


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """Hold the loss weights of single tokens, each [N] or None if all tokens have the same.

    weights_N: factor of the whole loss. kd_weights_N: additional factor of the divergence. divergence_args_N: passed to
    ``Divergence.for_tokens``. surrogate: an additional term.
    """

    weights_N: Tensor | None = None
    divergence_args_N: Tensor | None = None
    kd_weights_N: Tensor | None = None
    surrogate: Surrogate | None = None

    def __getitem__(self, tokens: slice | Tensor) -> TokenWeights:
        return self._map(lambda part: part[tokens])

    def to(self, device: torch.device | str) -> TokenWeights:
        return self._map(lambda part: part.to(device))

    def _map(self, change: Callable[[Any], Any]) -> TokenWeights:
        parts = [getattr(self, field.name) for field in fields(self)]
        return TokenWeights(*(None if part is None else change(part) for part in parts))


NO_WEIGHTS = TokenWeights()
