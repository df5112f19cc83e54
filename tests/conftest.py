"""Configure all tests: no network, no caches of the user, and a directory of real data."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small, and the other core may run another worker

import pytest

# nohup and background jobs of a shell start with these signals ignored. A test that sends one would then wait forever.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", autouse=True)
def _frozen_objects():
    """Exclude the objects of all imports so far from garbage collection, which commands and recovery run many times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _empty_cache_directory(tmp_path_factory):
    """Use an empty cache directory, so that earlier runs of the user do not affect a test."""
    os.environ["DISTILLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the directory of real data, or skip the test if it does not exist."""
    directory = Path(os.environ.get("DISTILLM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not directory.is_dir():
        pytest.skip(f"no real data in {directory}; set DISTILLM_SHARED_DATA")
    return directory
