"""Python's search for garbage, put off while a process starts.

Importing torch and transformers makes a million objects that stay, and the collector walks through them again and again
on the way: a sixth of a start. Nothing is lost by waiting: what is not part of a cycle is freed at once as ever.
"""

from __future__ import annotations

import gc

_is_put_off = False


def put_off() -> None:
    """No search until ``take_up``. For a process of our own only: whoever imports us decides for themselves."""
    global _is_put_off
    if gc.isenabled():
        gc.disable()
        _is_put_off = True


def take_up() -> None:
    """From here on as usual, but for what there is by now, which is never looked at again. To be called before weights are
    loaded: those must not stay for being part of a cycle. Does nothing where nothing was put off."""
    global _is_put_off
    if _is_put_off:
        gc.freeze()
        gc.enable()
        _is_put_off = False
