"""List known GPUs with the figures of their data sheets, and estimate the time of work on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Hold the figures of a data sheet.

    bf16, fp32: dense TFLOP/s, bf16 with float32 accumulation. memory: bytes. bandwidth: bytes/s.
    """

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
# Links between processes: bytes/s that a ring of them reaches in one direction.
LINKS = {"NVLink": 300e9, "InfiniBand 400 Gb/s": 45e9, "PCIe 4": 22e9, "Ethernet 100 Gb/s": 11e9}
USED_FLOPS = 0.4  # share of the peak in matrix products, in training and scoring
USED_BANDWIDTH = 0.6  # share of the peak while decoding and in the optimizer
# Minimum seconds for one layer and micro-batch, to launch its kernels from Python.
FORWARD_LAUNCH_S = 5e-4
BACKWARD_LAUNCH_S = 1e-3
DECODING_LAUNCH_S = 2e-4
USABLE_MEMORY = 0.92  # the rest is used by the driver and fragmentation
ASSUMED = (
    f"{USED_FLOPS:.0%} of the data sheet's dense peak in matrix products, {USED_BANDWIDTH:.0%} of its bandwidth while "
    f"decoding and in the optimizer, and for each layer at least {1e3 * FORWARD_LAUNCH_S:g} ms forward, "
    f"{1e3 * BACKWARD_LAUNCH_S:g} ms backward and {1e3 * DECODING_LAUNCH_S:g} ms in a decoding step. Sampled "
    "responses have maximum length. Computed, not measured; excludes validations, checkpoints and the report at the "
    "end of a run"
)


@dataclass(frozen=True)
class Part:
    """Hold a part of some work.

    flops: floating-point operations in matrix products. traffic: bytes to and from the GPU's memory. launch_s: minimum
    seconds for launching its kernels. itemsize: bytes of a value.
    """

    flops: float = 0.0
    traffic: float = 0.0
    launch_s: float = 0.0
    itemsize: int = 2

    def seconds(self, gpu: Gpu) -> float:
        """Return the maximum of the times for arithmetic, memory traffic and kernel launches."""
        peak = (gpu.bf16 if self.itemsize < 4 else gpu.fp32) * 1e12 * USED_FLOPS
        return max(self.flops / peak, self.traffic / (gpu.bandwidth * USED_BANDWIDTH), self.launch_s)

    def divided(self, by: float) -> Part:
        """Return one of ``by`` equal shares."""
        return Part(self.flops / by, self.traffic / by, self.launch_s / by, self.itemsize)


Work = tuple[Part, ...]  # executed in sequence


def flops(work: Iterable[Part]) -> float:
    """Return the floating-point operations of all parts."""
    return sum(part.flops for part in work)


def seconds(work: Iterable[Part], gpu: Gpu) -> float:
    """Return the seconds of all parts."""
    return sum(part.seconds(gpu) for part in work)


def fits_in_memory(need: int, gpu: Gpu) -> bool:
    """Return whether ``need`` bytes fit the usable memory."""
    return need <= USABLE_MEMORY * gpu.memory
