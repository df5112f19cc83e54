"""Measure the energy of the processors by the counters that the machine has: RAPL of Linux, NVML of NVIDIA GPUs.

The counters are of the whole machine, so other programs are included. Most virtual machines have none.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_PERIOD = 60.0  # seconds between readings: the counter of a package restarts after some minutes
_NVML = "libnvidia-ml.so.1"


class EnergyMeter:
    """Count the energy from the start of the block. root: directory of the RAPL counters."""

    def __init__(self, root: Path = POWERCAP, *, gpus: bool = True):
        self._zones = _zones(root)
        self._nvml = _Nvml() if gpus else None
        self._last: Mapping[str, float] = {}
        self._total = 0.0
        self._has_counters = False
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> EnergyMeter:
        self._last = self._read()
        self._has_counters = bool(self._last)
        if self._has_counters:
            self._thread = threading.Thread(target=self._watch, name="energy", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def joules(self) -> float | None:
        """Return the energy until now in J; None if the machine has no counter."""
        if not self._has_counters:
            return None
        self.update()
        return self._total

    def update(self) -> None:
        """Add the energy since the last reading. A counter that went down has started again at 0."""
        with self._lock:
            now = self._read()
            for name, value in now.items():
                before = self._last.get(name, value)
                self._total += value - before if value >= before else value - before + self._zones.get(name, before)
            self._last = now

    def _watch(self) -> None:
        while not self._done.wait(_PERIOD):
            self.update()

    def _read(self) -> dict[str, float]:
        found = {}
        for zone in self._zones:
            with suppress(OSError, ValueError):  # only root may read them on many systems
                found[zone] = int(Path(zone, "energy_uj").read_text()) / 1e6
        return found | (self._nvml.joules() if self._nvml else {})


def _zones(root: Path) -> dict[str, float]:
    """Return the range of the counter of each processor package, in J. Parts of a package are not counted twice."""
    found = {}
    for zone in sorted(root.glob("*-rapl:[0-9]*")):
        with suppress(OSError, ValueError):
            is_package = (zone / "name").read_text().startswith("package")
            if is_package and zone.name.count(":") == 1:
                found[str(zone)] = int((zone / "max_energy_range_uj").read_text()) / 1e6
    return found


class _Nvml:
    """Read the energy counters of NVIDIA GPUs (Volta and later), in mJ since the driver was loaded."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        with suppress(OSError):
            library = ctypes.CDLL(_NVML)
            if library.nvmlInit_v2() == 0:
                self._library = library

    def joules(self) -> dict[str, float]:
        """Return the counter of each GPU in J."""
        found: dict[str, float] = {}
        if self._library is None:
            return found
        count = ctypes.c_uint()
        if self._library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return found
        for i in range(count.value):
            device = ctypes.c_void_p()
            value = ctypes.c_ulonglong()
            if self._library.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(device)) != 0:
                continue
            if self._library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(value)) == 0:
                found[f"gpu{i}"] = value.value / 1000
        return found
