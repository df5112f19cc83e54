"""Run the parts of the GPU benchmark, each in its own process with its own time, and write RESULTS.md and results.json.

    benchmarks/gpu/run.sh [--tiny] [--parts NAME…] [--out DIR] [--seconds N]

A part yields rows, which are stored as they come: a part that fails or runs out of time keeps the rows it has, its error or
its time is recorded, and the next one runs. ``--tiny`` uses shapes of a few thousand parameters, which run on a CPU in about
two minutes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PARTS = {  # name → seconds that it may take; a module of this directory with a function `rows`
    "machine": 25,
    "losses": 120,
    "gpu_tests": 90,
    "steps": 70,
    "rollouts": 60,
    "whole_runs": 60,
    "features": 45,
}
_GRACE_S = 5  # for a part to stop by itself


def run_part(name: str, seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    """Run a part in a process of its own. Return its rows, its state and how long it took."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        rows = Path(directory, "rows.jsonl")
        errors = Path(directory, "errors.txt")
        command = [sys.executable, __file__, "--part", name, "--rows", str(rows), "--seconds", str(seconds)]
        with errors.open("w") as file:
            process = subprocess.Popen(
                command + ["--tiny"] * args.tiny, stdout=file, stderr=file, start_new_session=True, cwd=ROOT
            )
            try:
                code: int | None = process.wait(seconds + _GRACE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = None
        found = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
        said = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
    state = "done"
    if code is None or any(row.get("skipped") == OUT_OF_TIME for row in found):
        state = f"out of time after {seconds:.0f} s"
    elif code:
        state = f"failed: {said[-1] if said else f'exit code {code}'}"
    result: dict[str, Any] = {"state": state, "seconds": round(time.perf_counter() - started, 1), "rows": found}
    if code != 0:
        result["output"] = said[-40:]
    return result


OUT_OF_TIME = "out of time"


class Context:
    """Hold what a part is given. remaining: seconds that it has left."""

    def __init__(self, seconds: float, tiny: bool):
        import torch

        self.tiny = tiny
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._deadline = time.perf_counter() + seconds

    @property
    def remaining(self) -> float:
        return self._deadline - time.perf_counter()


def write_rows(name: str, place: Path, seconds: float, tiny: bool) -> None:
    """Run a part in this process, and store its rows as they come."""
    warnings.filterwarnings("ignore")
    context = Context(seconds, tiny)
    with place.open("w") as file:
        for row in importlib.import_module(name).rows(context):
            file.write(json.dumps(row) + "\n")
            file.flush()
            if context.remaining <= 0:
                file.write(json.dumps({"skipped": OUT_OF_TIME}) + "\n")
                return


def markdown(result: dict[str, Any]) -> str:
    """Return the results as a page: a table for each part and group of rows."""
    command = "benchmarks/gpu/run.sh" + (" --tiny" if result["tiny"] else "")
    lines = ["# Results on a GPU", "", f"{result['date']}, {result['wall_s']:.0f} s, `{command}`.", ""]
    if result["tiny"]:
        lines += ["A dry run with tiny shapes. Its figures mean nothing.", ""]
    lines += ["| part | state | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {part['state']} | {part['seconds']} |" for name, part in result["parts"].items()]
    for name, part in result["parts"].items():
        lines += ["", f"## {name}", ""]
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in part["rows"]:
            groups.setdefault(row.get("group", ""), []).append({k: v for k, v in row.items() if k != "group"})
        for group, rows in groups.items():
            lines += [f"### {group}", ""] if group else []
            notes = [row["skipped"] for row in rows if "skipped" in row]
            rows = [row for row in rows if "skipped" not in row]
            if rows:
                columns = list(dict.fromkeys(key for row in rows for key in row))
                lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
                lines += [f"| {' | '.join(_cell(row.get(column)) for column in columns)} |" for row in rows]
                lines.append("")
            lines += [f"- Skipped: {note}" for note in notes] + ([""] if notes else [])
    return "\n".join(lines).rstrip() + "\n"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="shapes for a dry run on a CPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="directory of the results; default: $OUT, or this directory")
    parser.add_argument("--seconds", type=float, default=460, help="time for all parts")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        write_rows(args.part, args.rows, args.seconds, args.tiny)
        return
    out = args.out or Path(os.environ.get("OUT") or HERE)
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "tiny": args.tiny,
        "parts": {},
    }
    for name in args.parts:
        left = args.seconds - (time.perf_counter() - started) - _GRACE_S
        if left < 5:
            result["parts"][name] = {"state": "skipped: no time left", "seconds": 0.0, "rows": []}
        else:
            limit = left if args.tiny else min(PARTS[name], left)  # a dry run may be on a busy CPU
            result["parts"][name] = run_part(name, limit, args)
        print(f"{name}: {result['parts'][name]['state']}", file=sys.stderr, flush=True)
        result["wall_s"] = round(time.perf_counter() - started, 1)
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")  # after each part: it may be the last
        (out / "RESULTS.md").write_text(markdown(result), encoding="utf-8")
    print(json.dumps({name: part["state"] for name, part in result["parts"].items()}))


if __name__ == "__main__":
    main()
