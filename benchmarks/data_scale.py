"""Measure how a run starts on many rows: seconds to the first step, and peak memory, with and without stored rows.

    python benchmarks/data_scale.py --rows 1000000 --directory DIR [--against CHECKOUT] [--only-stored]

Writes that many rows of random words to a file in the directory, and starts `distillm sft` on it with a tiny model and a
GPT-2 tokenizer: without a store, with a store that does not exist yet, and with the existing one. --against: also runs
another checkout of this repository. Needs Linux: memory is read from /proc. The directory is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
POLL_S = 0.05
RUN = ("--set", "train.steps=2", "--set", "eval.report_rows=0", "--set", "data.valid_limit=100", "--batch-size", "8")


def write_rows(path: Path, rows: int) -> None:
    """Write rows with distinct prompts, of about 300 bytes each."""
    source = random.Random(1)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 8))) for _ in range(5000)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            prompt = f"{number}: {' '.join(source.choices(words, k=source.randint(5, 45)))}"
            completion = " ".join(source.choices(words, k=source.randint(3, 30)))
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def measure(checkout: Path, arguments: list[str], output: Path, cache: Path) -> dict[str, float]:
    """Run `distillm sft`; return the seconds to its first step (on the clock, of CPU) and its peak memory in GB.

    RssAnon is the memory without mapped files, whose pages the system drops when memory is short.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout), "DISTILLM_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "distillm_cli", "sft", *arguments, "--output", str(output)]
    log = output.with_suffix(".log")
    started = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, cwd=checkout, stdout=file, stderr=file)
    seconds = cpu = 0.0
    peaks = {"VmHWM": 0, "RssAnon": 0}
    metrics = output / "metrics.jsonl"
    while process.poll() is None:
        if not seconds and metrics.is_file() and metrics.stat().st_size:
            seconds = time.perf_counter() - started
            cpu = _cpu_seconds(process.pid)
        for line in _status(process.pid):
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]))
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(log.read_text())
    return {"seconds": seconds, "cpu": cpu} | {name: round(size * 1024 / 1e9, 2) for name, size in peaks.items()}


def _status(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return []


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--tokenizer", default="gpt2", help="a tokenizer's directory or hub name")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only-stored", action="store_true", help="leave out the run without a store")
    options = parser.parse_args()
    place = options.directory
    place.mkdir(parents=True)
    try:
        data = place / "rows.jsonl"
        write_rows(data, options.rows)
        size = data.stat().st_size / 1e6
        print(f"{options.rows:,} rows, {size:,.0f} MB; until the first step, and peak memory (without mapped files)")
        arguments = ["--model", "random:gpt2:1x64", "--tokenizer", options.tokenizer, "--data", str(data), *RUN]
        cases = [(str(options.against), options.against, [])] if options.against else []
        if not options.only_stored:
            cases.append(("store off", REPOSITORY, ["--set", "data.store=off"]))
        cases += [
            ("store on, cold", REPOSITORY, ["--set", "data.store=on"]),
            ("store on, warm", REPOSITORY, ["--set", "data.store=on"]),
        ]
        for number, (name, checkout, more) in enumerate(cases):
            found = measure(checkout, [*arguments, *more], place / f"run-{number}", place / "cache")
            times = f"{found['seconds']:8.1f} s {found['cpu']:8.1f} CPU s"
            print(f"{name:24} {times} {found['VmHWM']:8.2f} GB ({found['RssAnon']:.2f})", flush=True)
        stored = sum(path.stat().st_size for path in (place / "cache").rglob("*.bin")) / 1e6
        print(f"stored: {stored:,.0f} MB")
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
