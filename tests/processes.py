"""Run command lines in several processes, as under a launcher. The processes stay for many commands: imports are slow.

    with Processes(2) as pair:
        outcomes = pair.run(["distill", …])   # (exit code, stdout, stderr) by rank

Started as a module, it is one of these processes: it reads commands as JSON lines and answers with their outcomes.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120  # seconds for a command


class Outcome(NamedTuple):
    """Hold the result of a command in one process."""

    code: int
    out: str
    err: str


class Processes:
    """Hold ``size`` processes that have joined."""

    def __init__(self, size: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        shared |= {"DISTILLM_DEBUG_COLLECTIVES": 1, "PYTHONPATH": ROOT}
        self.workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.processes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=os.environ | {key: str(value) for key, value in (shared | {"RANK": r, "LOCAL_RANK": r}).items()},
            )
            for r in range(size)
        ]

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.communicate()

    def run(self, argv, *, directory: Path, faults: dict[int, list] | None = None, **by_rank) -> list[Outcome]:
        """Run a command in every process; return its outcomes by rank.

        faults: by rank, the name of a function of this module and its arguments. by_rank: ``argvs`` and ``directories``
        of ranks, in place of ``argv`` and ``directory``.
        """
        for rank, worker in enumerate(self.workers):
            own = {name: values[rank] for name, values in by_rank.items() if rank in values}
            command = {
                "argv": [str(a) for a in own.get("argvs", argv)],
                "directory": str(own.get("directories", directory)),
                "fault": (faults or {}).get(rank),
            }
            worker.stdin.write(json.dumps(command) + "\n")
            worker.stdin.flush()
        return [Outcome(*json.loads(worker.stdout.readline() or '[-9, "", ""]')) for worker in self.workers]


# --- faults: context managers that break one process


def before_pass(number: int, action, *, once: bool = True):
    """Call ``action`` before training pass ``number`` of this process, and before later ones unless ``once``."""
    from distillm_cli.losses.student_loss import StudentLoss

    forward = StudentLoss.forward
    made = 0

    def replaced(self, *args, **kwargs):
        nonlocal made
        made += self.training
        if self.training and (made == number or (made > number and not once)):
            action()
        return forward(self, *args, **kwargs)

    return patch.object(StudentLoss, "forward", replaced)


def _raise(error: BaseException) -> None:
    raise error


def memory_runs_out(number: int, once: bool):
    """Let memory run out in a training pass."""
    return before_pass(number, lambda: _raise(MemoryError("out of memory")), once=once)


def loss_is_nan(number: int):
    """Let the loss of a training pass be NaN."""
    from distillm_cli.losses.student_loss import StudentLoss

    forward = StudentLoss.forward
    made = 0

    def replaced(self, *args, **kwargs):
        nonlocal made
        made += self.training
        loss, count = forward(self, *args, **kwargs)
        return (loss * float("nan") if made == number else loss), count

    return patch.object(StudentLoss, "forward", replaced)


def logits_are_nan():
    """Let the logits of sampled tokens be NaN."""
    from distillm_cli.rollouts import sampler

    choose = sampler.choose
    return patch.object(sampler, "choose", lambda logits, *args: choose(logits.fill_(float("nan")), *args))


def signal_arrives(number: int, signal_number: int):
    """Let a signal arrive before a training pass."""
    return before_pass(number, lambda: os.kill(os.getpid(), signal_number))


def disk_is_full(step: int):
    """Let the checkpoint of a step find a full disk."""
    from distillm_cli.training import checkpoint

    save = checkpoint.save_file

    def replaced(tensors, path):
        if path.parent.name.startswith(f".staging-step-{step:06d}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path)

    return patch.object(checkpoint, "save_file", replaced)


def memory_is_short(*, disk_is_full: bool = False):
    """Let the host have no memory for gathered tensors, and the disk no space either."""
    from distillm_cli.utils import host_space

    stack = ExitStack()
    stack.enter_context(patch.object(host_space, "available_memory", lambda: 0))
    if disk_is_full:
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stack.enter_context(patch.object(host_space, "reserve_space", lambda *_: _raise(error)))
    return stack


def memory_and_disk_are_short():
    """Let neither memory nor disk have space for gathered tensors."""
    return memory_is_short(disk_is_full=True)


def accelerate_uses_fsdp():
    """Set what accelerate launch sets if it is configured for FSDP."""
    return patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "true"})


def version_is(version: str):
    """Let this process have another version."""
    import distillm_cli

    return patch.object(distillm_cli, "__version__", version)


def has_gpus(count: int):
    """Let this machine seem to have GPUs, for the checks before one is used."""
    import torch

    stack = ExitStack()
    stack.enter_context(patch.object(torch.cuda, "is_available", lambda: True))
    stack.enter_context(patch.object(torch.cuda, "device_count", lambda: count))
    return stack


def sees_another_disk(name: str):
    """Let this process not see directories of a name, as on a machine with another disk."""
    exists = Path.exists
    return patch.object(Path, "exists", lambda self, **kw: name not in self.parts and exists(self, **kw))


def is_on_machine(name: str):
    """Let this process be on a machine of this name."""
    from distillm_cli.training import distributed

    return patch.object(distributed, "_machine_name", lambda: name)


def is_elsewhere():
    """Let this process report another place in the program."""
    from distillm_cli.training import distributed

    return patch.object(distributed, "_call_site", lambda: "elsewhere.py:1")


FAULTS = (
    memory_runs_out, loss_is_nan, logits_are_nan, signal_arrives, disk_is_full, memory_is_short, memory_and_disk_are_short,
    accelerate_uses_fsdp, version_is, has_gpus, sees_another_disk, is_on_machine, is_elsewhere,
)  # fmt: skip


# --- one of the processes


def serve() -> None:
    """Run the commands of stdin, and answer on stdout."""
    import torch

    from distillm_cli.cli.app import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    faults = {fault.__name__: fault for fault in FAULTS}
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        command = json.loads(line)
        os.chdir(command["directory"])
        out = io.StringIO()
        err = io.StringIO()
        with redirect_stdout(out), redirect_stderr(err), ExitStack() as stack:
            if command["fault"]:
                name, *args = command["fault"]
                stack.enter_context(faults[name](*args))
            code = main(command["argv"])
        answers.write(json.dumps([code, out.getvalue(), err.getvalue()]) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
