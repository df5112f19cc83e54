"""The buffer of student outputs: earlier rollouts, drawn uniformly; the oldest leave first."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np
import torch

from distillm_cli.types import Sequence


class ReplayBuffer:
    """At most ``capacity`` sequences. A draw is a pure function of (seed, step) and the content."""

    def __init__(self, capacity: int, *, seed: int):
        self.capacity, self.seed = capacity, seed
        self.sequences: deque[Sequence] = deque(maxlen=capacity)

    def __len__(self) -> int:
        return len(self.sequences)

    def add(self, sequences: Iterable[Sequence]) -> None:
        self.sequences.extend(sequences)

    def draw(self, count: int, step: int) -> list[Sequence]:
        """``count`` sequences, without repetition while the buffer holds that many."""
        random = np.random.default_rng([self.seed, step, 0x5265706C])
        picks = random.choice(len(self), size=count, replace=len(self) < count)
        return [self.sequences[i] for i in picks]


class Round(ReplayBuffer):
    """The student outputs of a round: ``batches`` batches of ``rows`` sequences, gone through ``inner_epochs`` times, each
    time after the first in an order of its own. The next round's outputs push them out."""

    def __init__(self, batches: int, *, rows: int, inner_epochs: int, seed: int):
        super().__init__(batches * rows, seed=seed)
        self.batches, self.inner_epochs = batches, inner_epochs

    def draw(self, count: int, step: int) -> list[Sequence]:
        """The batch of step ``step`` (from 0) of the run."""
        epoch, index = divmod(step, self.batches)
        order = np.random.default_rng([self.seed, epoch, 0x526F756E]).permutation(len(self))
        return [self.sequences[i] for i in order[index * count : (index + 1) * count]]


def pack(sequences: Iterable[Sequence], prefix: str) -> dict[str, torch.Tensor]:
    """Ragged sequences as three flat tensors, for a checkpoint."""
    sequences = list(sequences)

    def flat(name: str) -> torch.Tensor:
        arrays = [getattr(s, name) for s in sequences]
        return (
            torch.from_numpy(np.concatenate(arrays).astype(np.int32)) if arrays else torch.zeros(0, dtype=torch.int32)
        )

    lengths = [(len(s.prompt), len(s.response), s.row) for s in sequences]
    return {
        f"{prefix}.lengths": torch.tensor(lengths, dtype=torch.int64).reshape(-1, 3),
        f"{prefix}.prompts": flat("prompt"),
        f"{prefix}.responses": flat("response"),
    }


def unpack(tensors: dict[str, torch.Tensor], prefix: str) -> list[Sequence]:
    """The sequences that ``pack`` took."""
    prompts, responses = tensors[f"{prefix}.prompts"].numpy(), tensors[f"{prefix}.responses"].numpy()
    sequences, p, r = [], 0, 0
    for P, R, row in tensors[f"{prefix}.lengths"].tolist():
        sequences.append(Sequence(prompts[p : p + P].copy(), responses[r : r + R].copy(), row))
        p, r = p + P, r + R
    return sequences
