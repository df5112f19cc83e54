"""Run the tests with the marker ``gpu``."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LINE = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\s+(tests/\S+)|(tests/\S+)\s+(PASSED|FAILED|ERROR|SKIPPED)")


def rows(context: Any) -> Iterator[dict[str, Any]]:
    files = sorted(str(file) for file in Path("tests").rglob("test_*.py") if "pytest.mark.gpu" in file.read_text())
    command = [sys.executable, "-m", "pytest", "-vv", "-m", "gpu", "-p", "no:cacheprovider", *files]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "1" if context.tiny else "8", "--dist", "loadfile" if context.tiny else "load"]
    environment = dict(os.environ)
    if context.tiny:
        command += ["-k", "losses_on_rows or float64"]
        environment["DISTILLM_TEST_DEVICE"] = "cpu"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    counts: dict[str, int] = {}
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        match = _LINE.search(line)
        if match is None:
            continue
        state, test = match[1] or match[4], match[2] or match[3]
        counts[state] = counts.get(state, 0) + 1
        if state in ("FAILED", "ERROR"):
            yield {"group": "failures", "test": test, "state": state}
        if context.remaining <= 0:
            process.kill()
            break
    process.wait()
    if not counts:
        raise RuntimeError("no test ran")
    yield {"group": "counts", **{f"tests {state.lower()}": number for state, number in sorted(counts.items())}}
