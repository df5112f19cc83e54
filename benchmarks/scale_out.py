"""Compare a run in one, two and four processes on this machine: replicated and sharded, teacher cached and live, rollouts.

    python benchmarks/scale_out.py [--processes 1 2 4] [--steps 12] [--student random:6x384] [--rollout-server URL] [--json]

Each case is ``distillm distill`` under torchrun with one thread per process, on the built-in teacher and rows: 32 rows a
step, a student from scratch. tokens/s: of the training loop, without validation. collectives: share of the loop's time that
the first process spends in them, waiting for the slowest one included. memory: highest resident size of a process, the
largest of all. The first step is a part of the figures, so runs should have a dozen steps.

With ``--rollout-server``, only the cases of student outputs are measured: by the built-in sampler, and by that server, which
``distillm serve rollouts`` started for the student's ``config.json`` (``--student``).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COLLECTIVES = (
    "all_gather_object", "all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor",
    "all_gather_single", "reduce_scatter_single",  # the names of torch 2.13
)  # fmt: skip
ROLLOUTS = ("schedule.kind=on", "rollout.max_new_tokens=16", "rollout.bulk=4")
CASES = {  # name → method and fields
    "rows, teacher cached": ("kd", ("teacher.cache=memory",)),
    "rows, teacher live": ("kd", ("teacher.cache=off",)),
    "student outputs, built-in sampler": ("distillm", ROLLOUTS),
}


class Clock:
    """Count the seconds in collectives, of which one may call another one."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            self._depth += 1
            try:
                done = function(*args, **kwargs)
                if hasattr(done, "wait"):  # on a CPU nothing overlaps with it
                    done.wait()
                return done
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - start

        return run


def worker(directory: Path, argv: list[str]) -> None:
    """Run a command line in one of the processes, and write what it took."""
    import torch

    from distillm_cli.cli.app import main
    from distillm_cli.training.trainer import Trainer

    clock = Clock()
    for name in COLLECTIVES:
        if hasattr(torch.distributed, name):
            setattr(torch.distributed, name, clock.timed(getattr(torch.distributed, name)))
    step = Trainer.train_step
    steps: list[tuple[float, float]] = []  # seconds of each step, and those in collectives

    def train_step(trainer: Trainer) -> None:
        start, before = time.perf_counter(), clock.seconds
        step(trainer)
        steps.append((time.perf_counter() - start, clock.seconds - before))

    Trainer.train_step = train_step
    code = main(argv)
    figures = {
        "seconds": sum(seconds for seconds, _ in steps),
        "collectives": sum(seconds for _, seconds in steps),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (directory / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(figures))
    sys.exit(code)


def measure(name: str, processes: int, shard: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a case; return its figures."""
    method, fields = CASES[name]
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        values = (
            *fields, "data.size=400", "data.valid_limit=8", "eval.report_rows=0", "train.eval_steps=100000",
            "train.save_steps=100000", "train.threads=1", "train.batch_size=32", "data.max_length=64",
            f"train.shard={shard}", "student.dtype=fp32", "teacher.dtype=fp32", "data.template=plain",
        )  # fmt: skip
        argv = ["distill", "--method", method, "--teacher", "builtin", "--data", "builtin", "--student"]
        argv += [args.student, "--steps", str(args.steps), "--output", str(directory / "run")]
        argv += ["--json", "--quiet", *(word for value in values for word in ("--set", value))]
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [*launch, __file__, "--worker", str(directory), *argv]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        result = json.loads(done.stdout.strip().splitlines()[-1])
        figures = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(processes)]
    first = figures[0]
    return {
        "case": name, "processes": processes, "shard": shard, "tokens_per_s": result["tokens"] / first["seconds"],
        "collectives": first["collectives"] / first["seconds"], "memory": max(f["memory"] for f in figures),
        "loss": result["train_loss"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--student", default="random:6x384", help="a student from scratch, or its config.json")
    parser.add_argument("--rollout-server", help="URL of a server for student outputs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cases = [name for name, (_, fields) in CASES.items() if fields == ROLLOUTS or not args.rollout_server]
    if args.rollout_server:
        cases.append("student outputs, server")
        CASES["student outputs, server"] = ("distillm", (*ROLLOUTS, f"rollout.server={args.rollout_server}"))
    results = []
    for name in cases:
        for processes in args.processes:
            for shard in ("none", "full") if processes > 1 else ("none",):
                results.append(measure(name, processes, shard, args))
                print(f"{name}, {processes}, {shard}: {results[-1]['tokens_per_s']:.0f}", file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(results))
        return
    print("| case | processes | `train.shard` | tokens/s | × one process | in collectives | memory of a process |")
    print("|---|---|---|---|---|---|---|")
    base: dict[str, float] = {}
    for found in results:
        alone = base.setdefault(found["case"], found["tokens_per_s"])
        cells = [
            found["case"], str(found["processes"]), found["shard"], f"{found['tokens_per_s']:.0f}",
            f"{found['tokens_per_s'] / alone:.2f}", f"{found['collectives']:.0%}", f"{found['memory'] / 1e6:.0f} MB",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "--worker":
        worker(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
