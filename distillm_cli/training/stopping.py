"""Stopping between steps: the first signal asks, a second one insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from distillm_cli.errors import CtrlC


@dataclass
class Stop:
    signal: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Ask the loop to stop after the current step at the first SIGINT, SIGTERM or SIGHUP; a second SIGINT stops at once.

    Signals that are ignored stay ignored: SIGHUP under nohup, SIGINT in a shell's background job.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number, frame):
        if stop.signal is not None and number == signal.SIGINT:
            raise CtrlC
        stop.signal = number

    known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heeded = [number for number in known if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
