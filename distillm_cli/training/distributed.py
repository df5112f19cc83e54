"""Let one run be the same run in any number of processes, which accelerate or torchrun started. Imports nothing slow.

    world().map(make, things, costs)  the results of ``make`` for all things, each process working on a share of them
    world().gather(make)              the results of ``make`` in all processes, by rank
    world().broadcast(make)           the result of ``make`` in the first process, in all of them
    world().sum_gradients(…)          the sums of gradients, once a step

Rows, schedule, samples and decisions are the same in every process, and only work is shared. Two rules keep it so:

- Whatever is written, and whatever is read from clock, free memory, disk or names, is in ``broadcast``, or in a function
  with ``@in_first_process``.
- Every collective starts by exchanging errors. An error of one process reaches the others at their next collective, and
  all raise the first one. Code that handles an error of a step (out of memory) asks ``agree`` first, so that all do.

A single process exchanges nothing, and every function returns what it would return without this module.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from distillm_cli.errors import OutOfMemoryError, PeerProcessError, UsageError, out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

DEBUG = "DISTILLM_DEBUG_COLLECTIVES"  # set to 1: compare the call sites of every collective
_TIMEOUT = timedelta(hours=2)  # longer than any work that one process does alone
_BUFFER_BYTES = 64 * 2**20  # of small gradients that are summed together
_EXCHANGED = "_distillm_exchanged"  # attribute of an error that every process has, or that must not be exchanged
_LONE = "_distillm_lone"  # attribute of the latter

_T = TypeVar("_T")
_S = TypeVar("_S")
_P = ParamSpec("_P")


class World:
    """Hold the processes of a run, and exchange objects and sums with them.

    rank: of this process. machine: ranks of the processes on this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, machine: SequenceOf[int] = (0,)):
        self.rank = rank
        self.size = size
        self.machine = tuple(machine)
        self.is_debugging = os.environ.get(DEBUG, "0") not in ("", "0")

    @property
    def is_first(self) -> bool:
        """Return whether this process prints, writes files and decides."""
        return self.rank == 0

    @property
    def is_first_on_machine(self) -> bool:
        """Return whether this process has the lowest rank on its machine."""
        return self.rank == self.machine[0]

    def share(self, costs: SequenceOf[float]) -> list[int]:
        """Return the indices of the things that this process works on, ascending. costs: of each thing.

        The costliest thing goes to the process with the least work so far, which all processes compute alike.
        """
        return [i for i, rank in enumerate(self.owners(costs)) if rank == self.rank]

    def owners(self, costs: SequenceOf[float]) -> list[int]:
        """Return the rank of the process that works on each thing."""
        work = [0.0] * self.size
        owners = [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[i] = min(range(self.size), key=work.__getitem__)
            work[owners[i]] += costs[i]
        return owners

    def idle_turns(self, things: int) -> int:
        """Return how many turns this process has none of ``things``, dealt in turn, while another process has one."""
        return -(-things // self.size) - len(range(self.rank, things, self.size))

    def rows_each(self, rows: int) -> int:
        """Return the largest number of rows of a process if all have about as many."""
        return max(1, -(-rows // self.size))

    def gather(self, make: Callable[[], _T]) -> list[_T]:
        """Return the results of ``make`` in all processes, by rank. Raises the first error of any of them.

        Results are pickled. ``make`` may use other collectives, if it does so in every process.
        """
        if self.size == 1:
            return [make()]
        value: Any = None
        error: BaseException | None = None
        try:
            value = make()
        except BaseException as caught:
            if is_exchanged(caught):
                raise
            error = caught
        return self._exchange(value, error)

    def broadcast(self, make: Callable[[], _T]) -> _T:
        """Return the result of ``make`` in the first process, which alone calls it. Raises its error in all.

        Within ``make`` the first process is a single one: functions that share work among processes do all of it.
        """
        if self.size == 1:
            return make()
        found: list[Any] = self.gather(lambda: _alone(make) if self.is_first else None)
        return found[0]

    def check_same(self, values: Mapping[str, object]) -> None:
        """Raise PeerProcessError if these values, by what they describe, differ between processes."""
        found = self.gather(lambda: dict(values))
        for rank, others in enumerate(found):
            for name, value in found[0].items():
                if others.get(name) != value:
                    texts = [str(v) for v in (value, others.get(name))]
                    where = " and ".join(texts) if max(map(len, texts)) < 100 else None
                    what = f"processes 0 and {rank} differ: {name}"
                    hint = "start every process with the same command, files and versions"
                    raise PeerProcessError("process.different", what, where=where, hint=hint)

    def map(
        self,
        make: Callable[[list[_T]], SequenceOf[_S]],
        things: SequenceOf[_T],
        costs: SequenceOf[float],
        *,
        always: bool = False,
    ) -> list[_S]:
        """Return the results of ``make`` for all things, in order. Each process calls it with its share of them, if any.

        make: returns one result for each thing. always: call it without things too.
        """
        if self.size == 1:
            return list(make(list(things)))
        owners = self.owners(costs)
        own = [thing for thing, rank in zip(things, owners, strict=True) if rank == self.rank]
        parts = [iter(part) for part in self.gather(lambda: list(make(own)) if own or always else [])]
        return [next(parts[rank]) for rank in owners]

    def agree(self, error: BaseException | None) -> BaseException | None:
        """Return the first error of any process, to be handled by all alike; None if no process has one."""
        if self.size == 1 or (error is not None and is_exchanged(error)):
            return error
        try:
            self._exchange(None, error)
        except BaseException as first:
            return first
        return None

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of one process in all of them: at their next collective, or at the end of the block."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        first = self.agree(error)
        if first is not None:
            raise first

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter], loss: Tensor) -> None:
        """Replace gradients and the loss, a scalar, by their sums over all processes. The sums are the same in all.

        A parameter without a gradient here has one afterwards if it has one elsewhere: the optimizer then treats it alike
        in all processes.
        """
        if self.size == 1:
            return
        trained = list(parameters)
        buffers: dict[tuple[torch.dtype, torch.device], Tensor] = {}

        def prepare() -> bytes:
            buffers.update(_new_buffers(trained))  # here, since memory may run out
            return bytes(p.grad is not None for p in trained)

        have = self.gather(prepare)
        anywhere = [any(of_all) for of_all in zip(*have, strict=True)]
        summed = [p for p, is_summed in zip(trained, anywhere, strict=True) if is_summed]
        if any(of_rank != bytes(anywhere) for of_rank in have):
            self.gather(lambda: _add_missing_gradients(summed))
        for (dtype, device), buffer in buffers.items():
            of_kind = [p.grad for p in summed if p.grad is not None and (p.dtype, p.device) == (dtype, device)]
            _sum_together(of_kind, buffer)
        _all_reduce(loss)

    def _exchange(self, value: Any, error: BaseException | None = None) -> list[Any]:
        """Return the values of all processes, or raise the first error of any."""
        from accelerate.utils import gather_object

        site = _call_site() if self.is_debugging else None
        try:
            found = gather_object([(site, value, None if error is None else _portable(error))])
        except RuntimeError as lost:
            raise _peer_error() from lost
        for rank, (_, _, of_rank) in enumerate(found):
            if of_rank is not None:
                raise _marked(error if rank == self.rank and error is not None else of_rank)
        if len({site for site, _, _ in found}) > 1:
            sites = ", ".join(f"{rank}: {site}" for rank, (site, _, _) in enumerate(found))
            raise _marked(
                PeerProcessError(
                    "process.out_of_step", "the processes do different things", where=sites, hint="report it"
                )
            )
        return [value if rank == self.rank else other for rank, (_, other, _) in enumerate(found)]


_ALONE = World()
_current = _ALONE


def _alone(make: Callable[[], _T]) -> _T:
    """Return the result of ``make`` with this process as the only one."""
    global _current
    before = _current
    _current = _ALONE
    try:
        return make()
    finally:
        _current = before


def in_first_process(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a function run in the first process alone. Its result, which is pickled, or its error reach all."""

    @wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return world().broadcast(partial(function, *args, **kwargs))

    return run


def world() -> World:
    """Return the processes of this run: those that ``joined`` has joined, else this process alone."""
    return _current


def launched_processes() -> int:
    """Return how many processes a launcher (accelerate, torchrun) has started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched_rank() -> int:
    """Return the rank of this process among those that a launcher has started; 0 without a launcher."""
    return int(os.environ.get("RANK") or 0) if launched_processes() > 1 else 0


def local_rank() -> int:
    """Return the rank of this process among those on its machine, which selects its device."""
    return int(os.environ.get("LOCAL_RANK") or 0) if launched_processes() > 1 else 0


def local_processes() -> int:
    """Return the number of processes that a launcher has started on this machine; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if launched_processes() > 1 else 1


@contextmanager
def joined() -> Iterator[World]:
    """Join the processes that a launcher started, and raise an error of one of them in all. Does nothing in a single one."""
    global _current
    if launched_processes() == 1:
        yield _ALONE
        return
    if _current.size > 1:  # of an enclosing call
        with _current.together():
            yield _current
        return
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise _marked(
            UsageError(
                "usage.deepspeed",
                "a run in several processes does not use DeepSpeed",
                where="configuration of accelerate",
                hint="choose multi-GPU or FSDP in `accelerate config`, or use torchrun",
            )
        )
    import torch

    is_own = not torch.distributed.is_initialized()
    _current = _join()
    try:
        with _current.together():
            _current.check_same(_versions())
            yield _current
    finally:
        _current = _ALONE
        if is_own:
            _leave()


def _join() -> World:
    """Join the process group of the launcher's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT)."""
    import torch
    from accelerate import PartialState

    # With fewer GPUs than processes the choice of a device raises the error, or it is the CPU.
    has_gpu = torch.cuda.is_available() and local_processes() <= torch.cuda.device_count()
    has_gpu = has_gpu and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    if not torch.distributed.is_initialized():
        try:
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout=_TIMEOUT)
        except (RuntimeError, ValueError) as error:
            what = "cannot join the other processes of the run"
            where = str(error).splitlines()[0][:200]
            hint = "start it with torchrun or accelerate launch, and check MASTER_ADDR and MASTER_PORT"
            raise PeerProcessError("process.cannot_join", what, where=where, hint=hint) from error
    state = PartialState(cpu=not has_gpu)
    machines = World(state.process_index, state.num_processes).gather(_machine_name)
    here = [rank for rank, machine in enumerate(machines) if machine == machines[state.process_index]]
    return World(state.process_index, state.num_processes, here)


def _leave() -> None:
    """Leave the process group, without waiting for processes that are still in it."""
    import torch
    from accelerate import PartialState

    PartialState._reset_state()
    torch.distributed.destroy_process_group()


def _versions() -> dict[str, str]:
    """Return what must be the same in all processes before they can work together."""
    import torch

    import distillm_cli

    command = " ".join(sys.argv[1:])
    return {"version of distillm": distillm_cli.__version__, "version of torch": torch.__version__, "command": command}


def _machine_name() -> str:
    """Return a name of this machine that differs from those of others, and between containers without common memory."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/dev/shm').stat().st_dev}"
    except OSError:
        return socket.gethostname()


def is_exchanged(error: BaseException) -> bool:
    """Return whether every process has this error, or the one that it was raised from."""
    current: BaseException | None = error
    while current is not None:
        if getattr(current, _EXCHANGED, False):
            return True
        current = current.__cause__
    return False


def _marked(error: BaseException) -> BaseException:
    setattr(error, _EXCHANGED, True)
    return error


def lone_error(error: BaseException) -> BaseException:
    """Return an error that ends this process without an exchange, since the others wait for it or have ended."""
    import torch

    if is_exchanged(error):
        return error
    if isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return _marked(_peer_error())
    if isinstance(error, RuntimeError | MemoryError) and out_of_memory(error):
        hint = "continue with --resume and a smaller --batch-size, or in more processes"
        error = OutOfMemoryError("memory.exhausted", f"out of memory in process {world().rank}", hint=hint)
    setattr(error, _LONE, True)
    return _marked(error)


def is_lone(error: BaseException) -> bool:
    """Return whether this process alone has an error, and has to report it."""
    return getattr(error, _LONE, False)


def _portable(error: BaseException) -> BaseException:
    """Return an error that other processes can read: itself, or one with its message."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _peer_error() -> BaseException:
    """Return the error for a collective that failed: another process has ended, and no further collective succeeds."""
    what = "another process of the run ended, or does not answer"
    return _marked(PeerProcessError("process.lost", what, hint="see its messages, then continue with --resume"))


def _call_site() -> str:
    """Return file and line of the caller of this module."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename in (__file__, _CONTEXTLIB):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


_CONTEXTLIB = contextmanager.__code__.co_filename


def _new_buffers(parameters: SequenceOf[torch.nn.Parameter]) -> dict[tuple[torch.dtype, torch.device], Tensor]:
    """Return a buffer for the small gradients of parameters, for each dtype and device."""
    import torch

    numbers: dict[tuple[torch.dtype, torch.device], int] = {}
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        numbers[kind] = numbers.get(kind, 0) + parameter.numel()
    return {
        (dtype, device): torch.empty(min(_BUFFER_BYTES // dtype.itemsize, count), dtype=dtype, device=device)
        for (dtype, device), count in numbers.items()
    }


def _add_missing_gradients(parameters: SequenceOf[torch.nn.Parameter]) -> None:
    import torch

    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _sum_together(tensors: SequenceOf[Tensor], buffer: Tensor) -> None:
    """Sum tensors over all processes, in place. Those that fit into the buffer are copied into it, several at a time."""
    waiting: list[Tensor] = []
    used = 0

    def flush() -> None:
        nonlocal used
        if waiting:
            parts = buffer[:used].split([tensor.numel() for tensor in waiting])
            for part, tensor in zip(parts, waiting, strict=True):
                part.copy_(tensor.reshape(-1))
            _all_reduce(buffer[:used])
            for part, tensor in zip(parts, waiting, strict=True):
                tensor.copy_(part.view_as(tensor))
        waiting.clear()
        used = 0

    for tensor in tensors:
        if tensor.numel() > len(buffer) // 2:
            dense = tensor.contiguous()
            _all_reduce(dense)
            if dense is not tensor:
                tensor.copy_(dense)
            continue
        if used + tensor.numel() > len(buffer):
            flush()
        waiting.append(tensor)
        used += tensor.numel()
    flush()


def _all_reduce(tensor: Tensor) -> None:
    import torch

    try:
        torch.distributed.all_reduce(tensor)
    except RuntimeError as lost:
        raise _peer_error() from lost
