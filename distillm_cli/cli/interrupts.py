"""Ctrl-C and SIGTERM, heard alike from the first import on. Nothing is imported here that takes time."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from distillm_cli.errors import Pressed, Terminated


@contextmanager
def heard() -> Iterator[None]:
    """Either signal ends what is inside: cleaned up, one line, with --json one object. A host's own handlers stay."""
    usual = {signal.SIGINT: (signal.default_int_handler, Pressed), signal.SIGTERM: (signal.SIG_DFL, Terminated)}
    main_thread = threading.current_thread() is threading.main_thread()
    own = {n: stop for n, (handler, stop) in usual.items() if main_thread and signal.getsignal(n) == handler}

    def raised(number, frame):
        raise own[number]

    for number in own:
        signal.signal(number, raised)
    try:
        yield
    finally:
        for number in own:
            signal.signal(number, usual[number][0])
