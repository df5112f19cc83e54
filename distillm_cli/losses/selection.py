"""Select the tokens of a step that enter the loss (``objective.tokens``), after TIP (arXiv 2604.14084).

The paper finds that half of the tokens of student outputs, those where the student's entropy is highest, train as well as
all of them, and that confident tokens far from the teacher are the other informative ones. Here the share is taken of each
response, so that the selection does not depend on the micro-batches. The student's scores need one product with its head
for all tokens; only the selected ones need the teacher's logits (with ``entropy``) and a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSelection:
    """Select a share of the tokens of each response.

    score: the student's entropy, or the divergence to the teacher; the highest are selected. share: above 0, below 1.
    """

    score: Literal["entropy", "divergence"]
    share: float

    @classmethod
    def parse(cls, text: str) -> TokenSelection | None:
        """Return the selection of ``objective.tokens``: ``all`` (None), ``entropy:0.5`` or ``divergence:0.5``."""
        if text == "all":
            return None
        score, share = text.split(":")
        return cls(cast(Literal["entropy", "divergence"], score), float(share))

    def kept(self, tokens: int) -> int:
        """Return the number of tokens selected from a response of ``tokens``, rounded up."""
        return math.ceil(tokens * self.share - 1e-9)  # 0.1 · 30 is a little above 3

    def indices(self, scores_N: Tensor, rows_N: Tensor) -> Tensor:
        """Return the indices [K] of the selected tokens, ascending.

        rows_N: the response of each token, ascending from 0. Of equal scores the earlier token is selected.
        """
        lengths = torch.bincount(rows_N).tolist()
        starts_B = torch.tensor([0, *lengths[:-1]], device=rows_N.device).cumsum(0)
        kept_B = torch.tensor([self.kept(n) for n in lengths], device=rows_N.device)
        order_N = scores_N.argsort(descending=True, stable=True)
        order_N = order_N[rows_N[order_N].argsort(stable=True)]  # by response, the highest scores first
        rank_N = torch.arange(len(rows_N), device=rows_N.device) - starts_B[rows_N]
        return order_N[rank_N < kept_B[rows_N]].sort().values
