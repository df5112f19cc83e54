"""Run command lines and cache their results, so that an interrupted benchmark can be resumed."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path


def last_json(command: list[str], threads: int) -> dict:
    """Run a command and read its last line. Its stderr is shown only when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cached_json(place: Path, command: list[str], threads: int) -> dict:
    """Return ``last_json`` of a command, cached in ``PLACE.json``."""
    found = place.with_name(place.name + ".json")
    if not found.exists():
        found.write_text(json.dumps(last_json(command, threads)) + "\n")
    return json.loads(found.read_text())


def run(place: Path, argv: list[str], threads: int) -> dict:
    """Run ``distillm ARGV --json``, with a cached result."""
    return cached_json(place, [sys.executable, "-m", "distillm_cli", *argv, "--json", "--quiet"], threads)


def sets(*fields: str) -> list[str]:
    """Return the fields with ``--set`` before each."""
    return [word for field in fields for word in ("--set", field)]


def mean_sd(values: list[float], *, sign: bool = False) -> str:
    """Format mean and sample standard deviation: ``12.34 ± 0.56``. sign: ``+12.34``."""
    mean = f"{statistics.mean(values):{'+' if sign else ''}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def write_blocks(page: Path, blocks: dict[str, str]) -> None:
    """Write each block between its marks in a page. The text around them is not changed."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        whole = f"{begin}\n{block}\n{end}"
        if begin in text:
            text = re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: whole, text, flags=re.DOTALL)  # noqa: B023
        else:
            text += f"\n{whole}\n"
    page.write_text(text, encoding="utf-8")
