"""Stopping between steps: the first signal asks, a second one insists."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from distillm_cli.errors import Pressed


@dataclass
class Stop:
    signal: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """The first SIGINT or SIGTERM asks the loop to stop after the step in hand; a second SIGINT stops at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number, frame):
        if stop.signal is not None and number == signal.SIGINT:
            raise Pressed
        stop.signal = number

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
