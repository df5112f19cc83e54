"""Compare the seconds until a run's first step with the minimum: the imports and loading both models.

    python benchmarks/startup.py --teacher DIR --student DIR --data FILE [--rounds 3] [--json]

The bare script imports torch and transformers and loads both models and the tokenizer; ours is `distillm distill` on the
same models and rows, until the engine draws its first step. Separate processes in turns, the best of each.
Goal: ≤ 1.3. Exits 1 when it is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

GOAL = 1.3
BARE = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for place in sys.argv[1:3]:
    AutoModelForCausalLM.from_pretrained(place)
AutoTokenizer.from_pretrained(sys.argv[1])
"""
OURS = """
from distillm_cli.__main__ import main
from distillm_cli.rollouts.scheduler import Scheduler

class FirstStep(BaseException):
    pass

def stop(*_):
    raise FirstStep

Scheduler.draw = stop
teacher, student, data, output = sys.argv[1:]
sys.argv[1:] = ["distill", "--teacher", teacher, "--student", student, "--data", data, "--output", output]
sys.argv += ["--overwrite", "--quiet"]
try:
    main()
except FirstStep:
    pass
"""
TIMED = "import sys, time\nstart = time.perf_counter()\n{}\nprint(time.perf_counter() - start)"


def seconds(script: str, *argv: str) -> float:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    # So that a checkout's modules are compiled once, like those of an installed program.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(
        [sys.executable, "-c", TIMED.format(script), *argv], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    bare = ours = float("inf")
    with tempfile.TemporaryDirectory() as output:
        for _ in range(args.rounds):
            bare = min(bare, seconds(BARE, args.teacher, args.student))
            ours = min(ours, seconds(OURS, args.teacher, args.student, args.data, output))
    print(
        json.dumps({"bare": bare, "distillm": ours, "ratio": ours / bare})
        if args.json
        else f"bare {bare:.2f} s, distillm {ours:.2f} s: {ours / bare:.2f} (goal ≤ {GOAL})"
    )
    sys.exit(ours > GOAL * bare)


if __name__ == "__main__":
    main()
