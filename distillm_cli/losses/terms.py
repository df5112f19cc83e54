"""What a token costs, as the loss is told it: by the step, and by the token itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from distillm_cli.losses.divergences import Divergence


@dataclass(frozen=True)
class Terms:
    """What a token costs: ``kd`` · divergence + ``ce`` · cross-entropy."""

    kd: float
    ce: float
    divergence: Divergence | None = None


class Surrogate(Protocol):
    """A loss of N supervised tokens by their log-probabilities [N]: its values [N], and −d value / d log q [N]."""

    def __call__(self, log_q_N: Tensor) -> tuple[Tensor, Tensor]: ...
    def __getitem__(self, tokens: slice) -> Surrogate: ...
    def to(self, device: torch.device | str) -> Surrogate: ...


@dataclass(frozen=True, eq=False)
class PerToken:
    """What a token has of its own; each [N], and absent where all tokens are alike.

    weights_N: of the whole of its loss. ce_weights_N: of its cross-entropy, beside that; may be negative (an advantage).
    marks_N: what ``Divergence.at`` is told of it. kd_weights_N: of its divergence, beside ``weights_N``. surrogate: one
    more term of its loss.
    """

    weights_N: Tensor | None = None
    ce_weights_N: Tensor | None = None
    marks_N: Tensor | None = None
    kd_weights_N: Tensor | None = None
    surrogate: Surrogate | None = None

    def __getitem__(self, tokens: slice) -> PerToken:
        return self._each(lambda part: part[tokens])

    def to(self, device: torch.device | str) -> PerToken:
        return self._each(lambda part: part.to(device))

    def _each(self, do: Callable) -> PerToken:
        parts = (getattr(self, f.name) for f in fields(self))
        return PerToken(*(None if part is None else do(part) for part in parts))


NOTHING = PerToken()
