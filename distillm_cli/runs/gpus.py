"""Known GPUs, by their makers' data sheets, and how long a piece of work takes on them, by arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """From its maker's data sheet, dense: TFLOP/s in bf16 with float32 sums, and in float32; memory in bytes; bytes/s."""

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float


GPUS = (
    Gpu("RTX 4090", 165.2, 82.6, 24e9, 1.008e12),
    Gpu("L40S", 362.0, 91.6, 48e9, 0.864e12),
    Gpu("A100 80GB", 312.0, 19.5, 80e9, 2.039e12),
    Gpu("H100 SXM", 989.0, 67.0, 80e9, 3.35e12),
    Gpu("H200", 989.0, 67.0, 141e9, 4.8e12),
)
USED_FLOPS = 0.4  # of the peak, by matrix products in training and scoring
USED_BANDWIDTH = 0.6  # by weights and caches read while decoding, and by the optimizer
# At least so many seconds go by for a layer of one micro-batch, whatever its size: starting its kernels from Python.
FORWARD_LAYER, BACKWARD_LAYER, DECODING_LAYER = 5e-4, 1e-3, 2e-4
USABLE = 0.92  # of the memory: the rest is the driver's and lost between blocks
ASSUMED = (
    f"{USED_FLOPS:.0%} of the data sheet's dense peak in matrix products, {USED_BANDWIDTH:.0%} of its bandwidth while "
    f"decoding and in the optimizer, and for each layer at least {1e3 * FORWARD_LAYER:g} ms forward, "
    f"{1e3 * BACKWARD_LAYER:g} ms backward and {1e3 * DECODING_LAYER:g} ms in a decoding step. Sampled responses are as "
    "long as they may be. Arithmetic, not measured; validations, checkpoints and the report at the end of a run are not "
    "in it"
)


@dataclass(frozen=True)
class Part:
    """A part of some work. flops: floating-point operations in matrix products of ``itemsize`` bytes a value. read: bytes
    to and from the GPU's memory. starts: seconds that starting its kernels takes at least."""

    flops: float = 0.0
    read: float = 0.0
    starts: float = 0.0
    itemsize: int = 2

    def seconds(self, gpu: Gpu) -> float:
        """As long as its arithmetic, its reading or the starting of its kernels takes, whichever is longest."""
        peak = (gpu.bf16 if self.itemsize < 4 else gpu.fp32) * 1e12 * USED_FLOPS
        return max(self.flops / peak, self.read / (gpu.bandwidth * USED_BANDWIDTH), self.starts)

    def shared(self, by: float) -> Part:
        """One of so many equal shares."""
        return Part(self.flops / by, self.read / by, self.starts / by, self.itemsize)


Work = tuple[Part, ...]  # one after the other


def flops(work: Iterable[Part]) -> float:
    """Floating-point operations of all its parts."""
    return sum(part.flops for part in work)


def seconds(work: Iterable[Part], gpu: Gpu) -> float:
    """Seconds of all its parts."""
    return sum(part.seconds(gpu) for part in work)


def fits_in_memory(need: int, gpu: Gpu) -> bool:
    """Whether so many bytes fit."""
    return need <= USABLE * gpu.memory
