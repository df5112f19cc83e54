"""Handle Ctrl-C, SIGTERM and SIGHUP alike from the first import on. Nothing is imported here that takes time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from distillm_cli.errors import HungUp, Pressed, Terminated

_IMPORTING = "<frozen importlib._bootstrap>"  # where the frames of an import under way are
_OURS = __name__.partition(".")[0]
_came: list[type[KeyboardInterrupt]] = []  # since the outermost ``heard`` began


@contextmanager
def heard() -> Iterator[None]:
    """End what is inside at any of the signals: cleaned up, one line, with --json one object. A host's handlers stay, and
    a signal that was ignored at start (SIGHUP under nohup, SIGINT in a shell's background job) stays ignored.

    One that comes while we import a library waits until that is through: half of torch's import is calls from C++, where an
    exception ends the process, or is caught and the rest imported twice. Another one does not wait.
    """
    usual = {signal.SIGINT: (signal.default_int_handler, Pressed), signal.SIGTERM: (signal.SIG_DFL, Terminated)}
    if hasattr(signal, "SIGHUP"):  # not on Windows
        usual[signal.SIGHUP] = (signal.SIG_DFL, HungUp)
    main_thread = threading.current_thread() is threading.main_thread()
    own = {n: stop for n, (handler, stop) in usual.items() if main_thread and signal.getsignal(n) == handler}
    waiting = False

    def raised(number, frame):
        nonlocal waiting
        if own[number] is HungUp and HungUp in _came:  # the kernel sends it, and the shell again
            return
        _came.append(own[number])
        under_way = _import_in(frame)
        if waiting or under_way is None or sys.gettrace() is not None:
            raise own[number]
        waiting = True
        _after(under_way, own[number])

    if own:
        _came.clear()
    for number in own:
        signal.signal(number, raised)
    try:
        yield
    finally:
        if waiting:
            sys.settrace(None)
        for number in own:
            signal.signal(number, usual[number][0])


def _import_in(frame: FrameType | None) -> FrameType | None:
    """The import that is under way in ``frame``: the one that our own code waits for, with all that it imports in turn."""
    found = None
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] != _OURS:
        found = frame if frame.f_code.co_filename == _IMPORTING else found
        frame = frame.f_back
    return found


def _after(frame: FrameType, stop: type[KeyboardInterrupt]) -> None:
    """Raises ``stop`` in the caller of ``frame`` once that returns."""

    def local(_: FrameType, event: str, __: Any) -> Callable | None:
        if event == "return":
            sys.settrace(None)
            raise stop
        return local

    frame.f_trace, frame.f_trace_lines = local, False
    sys.settrace(lambda *_: None)


def lost() -> KeyboardInterrupt | None:
    """The signal that came, if one did: for those who meet another error, or none. Code in C may take what a signal's
    handler raises for a failure of its own: a tensor whose reading is stopped has "no shape", and its file looks damaged.
    """
    if threading.current_thread() is not threading.main_thread():
        return None  # what came, came to an earlier command of the main thread
    return _came[-1]() if _came else None


def stop_the_shell_too(code: int) -> None:
    """At a terminal, ends this process by Ctrl-C if that is what it ends with: only then does a shell leave its loop, and
    not go on with the next run of a sweep. ``$?`` is 130 either way; other callers get the code as it is."""
    if _is_for_the_shell(code):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        hurry(code)
        os.kill(os.getpid(), signal.SIGINT)


def hurry(code: int) -> None:
    """For the way out: another Ctrl-C then ends a process that will die by it at once. Python's own handler would raise
    into whichever library is cleaning up, and print its traceback behind the one line."""
    if _is_for_the_shell(code):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_for_the_shell(code: int) -> bool:
    at_terminal = os.name == "posix" and sys.stderr is not None and sys.stderr.isatty()
    return at_terminal and code == 128 + signal.SIGINT
