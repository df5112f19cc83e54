"""Going on where memory runs out: the same work once more, in smaller pieces."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch

from distillm_cli.errors import out_of_memory

T = TypeVar("T")


def retry_halved(attempt: Callable[[], T], halve: Callable[[], bool]) -> T:
    """What ``attempt`` gives, at first or after as many calls of ``halve`` as it takes.

    halve: makes the next attempt's pieces smaller; False where they cannot be, and the error is the caller's.
    """
    while True:
        try:
            return attempt()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            release(error)
            if not halve():
                raise


def release(error: BaseException) -> None:
    """Lets go of what filled the memory: the frames that the error came through hold it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    gc.collect()
    torch.cuda.empty_cache()  # what torch keeps for itself, cuBLAS and cuDNN cannot have; without CUDA in use, nothing
