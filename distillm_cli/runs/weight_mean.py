"""Average a student's weights over the last steps of an unfinished run.

The learning rate of an unfinished run is still high, and its weights are noisier than those at the end, the more so the
higher the rate. The mean over the last steps is near the weights after a decay of the rate, so that runs with different
rates can be compared early (Izmailov et al. 2018, arXiv 1803.05407; Hägele et al. 2024, arXiv 2405.18392).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distillm_cli.models.backbone import Backbone

_FILE = "mean.safetensors"
_WINDOW = 1 / 3  # of the steps so far
_SNAPSHOTS = 8


def snapshot_steps(until: int) -> list[int]:
    """Return the steps whose weights enter the mean after ``until`` steps."""
    start = (1 - _WINDOW) * until
    return sorted({round(start + (until - start) * (i + 1) / _SNAPSHOTS) for i in range(_SNAPSHOTS)})


class WeightMean:
    """Hold the sum of some snapshots of the student's weights, on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, state: Mapping[str, torch.Tensor]) -> None:
        """Add a snapshot: what ``Backbone.state`` returns."""
        for name, weight in state.items():
            if weight.is_floating_point():
                part = weight.detach().to("cpu", torch.float32)
                self._sums[name] = part.clone() if name not in self._sums else self._sums[name] + part
        self.count += 1

    @contextmanager
    def used_by(self, student: Backbone) -> Iterator[None]:
        """Give the student the mean inside the block, and its own weights afterwards. Without snapshots, its own."""
        if not self.count:
            yield
            return
        state = dict(student.state())
        weights = {name: weight.to("cpu", copy=True) for name, weight in state.items()}
        weights |= {name: (total / self.count).to(state[name].dtype) for name, total in self._sums.items()}
        student.swap_state(weights)
        try:
            yield
        finally:
            student.swap_state(weights)

    def save(self, place: Path, step: int) -> None:
        """Write the sum for a resume from the checkpoint of ``step``."""
        if self.count:
            save_file(self._sums, place / _FILE, metadata={"step": str(step), "count": str(self.count)})

    @classmethod
    def load(cls, place: Path, step: int) -> WeightMean:
        """Return the sum that belongs to the checkpoint of ``step``; an empty one if there is none."""
        found = cls()
        if not (place / _FILE).is_file():
            return found
        with safe_open(place / _FILE, "pt") as file:
            facts = file.metadata()
            if facts["step"] == str(step):
                found.count = int(facts["count"])
                found._sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        return found
