"""Handle Ctrl-C, SIGTERM and SIGHUP alike from the first import on, and stop a loop at them. Imports nothing slow."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from distillm_cli.errors import CtrlC, Hangup, Terminated

_Handler = Callable[[int, FrameType | None], Any] | signal.Handlers
_IMPORTING = "<frozen importlib._bootstrap>"  # the file name of the frames of a running import
_PACKAGE = __name__.partition(".")[0]
_CHECK_SECONDS = 0.001  # interval at which the end of an import is checked
_received: list[type[KeyboardInterrupt]] = []  # since the outermost ``handle_signals`` began
_delayed: list[type[KeyboardInterrupt]] = []  # at most one, which arrived during an import and is raised after it


@contextmanager
def handle_signals() -> Iterator[None]:
    """Raise CtrlC, Terminated or Hangup in the block at SIGINT, SIGTERM or SIGHUP.

    Handlers of a host program stay, and a signal that was ignored at start stays ignored (SIGHUP under nohup, SIGINT in a
    shell's background job). A signal that arrives while a library is imported is raised after the import: half of
    torch's import runs in calls from C++, where an exception ends the process, or is caught and modules are imported twice.
    A second signal is raised at once.
    """
    default_handlers: dict[signal.Signals, tuple[_Handler, type[KeyboardInterrupt]]] = {
        signal.SIGINT: (signal.default_int_handler, CtrlC),
        signal.SIGTERM: (signal.SIG_DFL, Terminated),
    }
    if hasattr(signal, "SIGHUP"):  # not on Windows
        default_handlers[signal.SIGHUP] = (signal.SIG_DFL, Hangup)
    in_main_thread = threading.current_thread() is threading.main_thread()
    handled: dict[int, type[KeyboardInterrupt]] = {
        n: stop for n, (handler, stop) in default_handlers.items() if in_main_thread and signal.getsignal(n) == handler
    }
    can_wait = bool(handled) and hasattr(signal, "setitimer") and signal.getsignal(signal.SIGALRM) == signal.SIG_DFL

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop = handled[number]
        if stop is Hangup and Hangup in _received:  # the kernel sends it, and the shell sends it again
            return
        _received.append(stop)
        if _delayed or not can_wait or not _is_importing(frame):
            raise stop
        _delayed.append(stop)
        signal.setitimer(signal.ITIMER_REAL, _CHECK_SECONDS, _CHECK_SECONDS)

    def on_timer(_: int, frame: FrameType | None) -> None:
        if not _is_importing(frame):
            raise_delayed()

    if handled:
        _received.clear()
        _delayed.clear()
    for number in handled:
        signal.signal(number, on_signal)
    if can_wait:
        signal.signal(signal.SIGALRM, on_timer)
    try:
        yield
        raise_delayed()  # the block ended before the timer did
    finally:
        if can_wait:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number in handled:
            signal.signal(number, default_handlers[signal.Signals(number)][0])


def raise_delayed() -> None:
    """Raise the exception of the signal that arrived during an import, if any. Writing a result calls it first."""
    if _delayed:
        stop = _delayed.pop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise stop


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether an import by this package is running in ``frame``."""
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] != _PACKAGE:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


@dataclass
class StopRequest:
    """Hold the number of the signal that stops a loop; None before a signal."""

    signal: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Let the loop in the block finish its step at the first SIGINT, SIGTERM or SIGHUP; a second SIGINT raises at once.

    The yielded request has the signal's number. Signals that are ignored stay ignored: SIGHUP under nohup, SIGINT in a
    shell's background job.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise CtrlC
        request.signal = number

    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handled = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, on_signal) for number in handled}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def received_signal() -> KeyboardInterrupt | None:
    """Return the exception of the last signal that arrived, None without one, for handlers of other errors.

    C code may turn the exception of a signal handler into another error: an interrupted read of a tensor fails with "no
    shape", as if the file were damaged.
    """
    if threading.current_thread() is not threading.main_thread():
        return None  # the signal arrived during an earlier command of the main thread
    return _received[-1]() if _received else None


def exit_by_signal(code: int) -> None:
    """End this process by SIGINT if that is its exit code and stderr is a terminal.

    Only then does a shell leave its loop and not start the next run of a sweep. ``$?`` is 130 in both cases; other callers
    get the exit code.
    """
    if _ends_by_signal(code):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        restore_interrupt(code)
        os.kill(os.getpid(), signal.SIGINT)


def restore_interrupt(code: int) -> None:
    """Make another Ctrl-C end the process immediately if it is about to end by the signal.

    Python's handler would raise in a library that is cleaning up, and print its traceback after the error.
    """
    if _ends_by_signal(code):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ends_by_signal(code: int) -> bool:
    at_terminal = os.name == "posix" and sys.stderr is not None and sys.stderr.isatty()
    return at_terminal and code == 128 + signal.SIGINT
