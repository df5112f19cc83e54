"""Shared ground: no network, one place for the real data, small models built on the spot."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a test is small, and its neighbour has the other core

import pytest

# nohup and a shell's background jobs start with these ignored; a test that sends one would wait for ever.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """Set aside what imports have left: recovery from lack of memory collects garbage, and would go over all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_this_machine(tmp_path_factory):
    """What earlier runs of this person keep on disk must not decide a test."""
    os.environ["DISTILLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data nobody here wrote; a test that needs it is skipped, with the reason, where it is absent."""
    place = Path(os.environ.get("DISTILLM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not place.is_dir():
        pytest.skip(f"no real data at {place}; set DISTILLM_SHARED_DATA")
    return place
