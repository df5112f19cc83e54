"""Ctrl-C and SIGTERM, heard alike from the first import on. Nothing is imported here that takes time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from distillm_cli.errors import Pressed, Terminated

_came: list[type[KeyboardInterrupt]] = []  # since the outermost ``heard`` began


@contextmanager
def heard() -> Iterator[None]:
    """Either signal ends what is inside: cleaned up, one line, with --json one object. A host's own handlers stay."""
    usual = {signal.SIGINT: (signal.default_int_handler, Pressed), signal.SIGTERM: (signal.SIG_DFL, Terminated)}
    main_thread = threading.current_thread() is threading.main_thread()
    own = {n: stop for n, (handler, stop) in usual.items() if main_thread and signal.getsignal(n) == handler}

    def raised(number, frame):
        _came.append(own[number])
        raise own[number]

    if own:
        _came.clear()
    for number in own:
        signal.signal(number, raised)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, usual[number][0])


def lost() -> KeyboardInterrupt | None:
    """The signal that came, if one did: for those who meet another error, or none. Code in C may take what a signal's
    handler raises for a failure of its own: a tensor whose reading is stopped has "no shape", and its file looks damaged.
    """
    return _came[-1]() if _came else None
