"""Profile a whole run of `distillm distill` with torch.profiler, by stage and by operator.

    python benchmarks/where.py [--top N] [--threads N] -- distill --teacher DIR --student DIR --data FILE --steps 30 …

Arguments after ``--`` are those of `distillm`. The stages are the engine's own calls (nested ones count for the
innermost); the rest is "between". Profiling costs a few percent, so use shares, not seconds.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from contextlib import contextmanager


class Stages:
    """Measure seconds by stage. The clock of an outer stage stops while an inner one runs."""

    def __init__(self):
        self.seconds, self.calls = defaultdict(float), defaultdict(int)
        self.open: list[str] = []
        self.last = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds[self.open[-1] if self.open else "between"] += now - self.last
        self.last = now

    @contextmanager
    def stage(self, name: str):
        self._tick()
        self.open.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._tick()
            self.open.pop()

    def watch(self, owner, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def watched(*args, **kwargs):
            with self.stage(name):
                return inner(*args, **kwargs)

        setattr(owner, method, watched)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    stages = Stages()
    with stages.stage("import"):
        import torch
        from torch.profiler import ProfilerActivity, profile

        from distillm_cli.cli.app import main as distillm
        from distillm_cli.losses import student_loss
        from distillm_cli.rollouts import sampler
        from distillm_cli.runs import report, train
        from distillm_cli.teachers.local import LocalTeacher
        from distillm_cli.training.trainer import Trainer
    stages.watch(train, "prepare", "prepare: rows, models, tokens")
    stages.watch(train, "open_teacher", "open the teacher")
    stages.watch(Trainer, "validate", "validation")
    stages.watch(Trainer, "save", "checkpoint")
    stages.watch(Trainer, "_forward_backward", "step: backward")
    stages.watch(Trainer, "train_step", "step: the rest")
    stages.watch(sampler, "sample", "rollouts")
    stages.watch(LocalTeacher, "compute", "step: teacher forward")
    stages.watch(student_loss, "fused_loss", "step: fused loss, gradients of the heads included")
    stages.watch(student_loss.StudentLoss, "forward", "step: student forward")
    stages.watch(torch.optim.AdamW, "step", "step: optimizer")
    stages.watch(report.Report, "all", "report")
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        code = distillm([*args.command[args.command[:1] == ["--"] :], "--set", f"train.threads={args.threads}"])
    stages._tick()
    total = sum(stages.seconds.values())
    print("\n| stage | seconds | share | calls |\n|---|---|---|---|")
    for name, seconds in sorted(stages.seconds.items(), key=lambda pair: -pair[1]):
        print(f"| {name} | {seconds:.2f} | {100 * seconds / total:.1f} % | {stages.calls[name] or ''} |")
    print()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=args.top, max_name_column_width=48))
    return code


if __name__ == "__main__":
    sys.exit(main())
