"""A part's loss compiled by ``torch.compile``, used where a trial in the beginning of a run finds it faster.

Between its matrix products the loss makes some twenty passes over tables of the vocabulary's width; a compiler makes a few
of them, and reads bfloat16 as it goes. On two CPU cores these passes then take two thirds of their time, and a whole step
hardly less (lab book), for which nobody would have two runs of one seed differ by what a trial found; on a GPU, where they
are most of the loss, it should do more. Compiling takes some ten seconds, so short runs do not try; and the choice is in
the checkpoint, so that a resumed run computes what the uninterrupted one would have.

Only parts with a gradient are compiled: validation is short, and would be compiled once more.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from distillm_cli.core.events import Listener, Warned, silent
from distillm_cli.core.part import Way, part_loss
from distillm_cli.core.terms import NOTHING, Terms
from distillm_cli.errors import out_of_memory

ROUNDS, CALLS = 3, 5  # a timing is the least of so many rounds of calls
WORTH = 120.0  # seconds of a whole run in these parts: below, it is over before compiling has paid
GAIN = 0.9  # the compiled part is taken when it needs at most so much of the plain one's time


class CompiledPart:
    """``part_loss`` compiled on its first calls; where that fails in the middle of a run, said once, the plain one.

    Sizes and settings that change from call to call (rows, α, weights) become arguments of the compiled code.
    """

    def __init__(self, backend: str = "inductor", listener: Listener = silent):
        for name in ("torch._dynamo", "torch._inductor"):
            logging.getLogger(name).setLevel(logging.ERROR)  # they tell of every shape that is new to them
        # By default inductor keeps a process per core waiting for work, each with torch in it.
        torch._inductor.config.compile_threads = 1
        self._compiled, self._say, self._works = (
            torch.compile(part_loss, backend=backend, fullgraph=True),
            listener,
            True,
        )

    def __call__(self, *arguments):
        if not self._works:
            return part_loss(*arguments)
        try:
            return self._compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:  # before anything was computed
            if out_of_memory(error):
                raise
            self._works = False
            self._say(Warned(f"the loss cannot be compiled here ({type(error).__name__}): going on with it as it is"))
            return part_loss(*arguments)


@dataclass(frozen=True)
class Shape:
    """A part as the run will have it. dtypes: of the products of student and teacher; ways: theirs to the logits, None
    for a teacher that is not asked."""

    rows: int
    vocab: int
    device: torch.device
    dtypes: tuple[torch.dtype, torch.dtype]
    ways: tuple[Way, Way | None]
    terms: Terms

    def arguments(self, rows: int) -> tuple:
        """Of a call with random products; the gradient goes where the student's product is, the first of them."""
        seeded = torch.Generator(self.device).manual_seed(rows)

        def product(dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, self.vocab, dtype=dtype, device=self.device).normal_(0, 2, generator=seeded)

        student = product(self.dtypes[0])
        teacher = None if self.ways[1] is None else product(self.dtypes[1])
        targets = torch.arange(rows, device=self.device) * 7 % self.vocab
        exact = torch.float64 if self.dtypes[0] == torch.float64 else torch.float32
        return student, teacher, targets, NOTHING, self.ways, self.terms, exact, student, False


@dataclass(frozen=True)
class Trial:
    """Seconds of a part, plain and compiled. why_not: what keeps the compiled one from being used."""

    plain_s: float
    compiled_s: float | None = None
    why_not: str | None = None

    @property
    def wins(self) -> bool:
        return self.compiled_s is not None and self.compiled_s <= GAIN * self.plain_s

    def __str__(self) -> str:
        if self.compiled_s is None:
            return f"the loss is not compiled: {self.why_not}"
        how = "faster" if self.wins else "no faster"
        compiled_ms, plain_ms = 1e3 * self.compiled_s, 1e3 * self.plain_s
        return f"the loss is {how} compiled: {compiled_ms:.3g} ms a part in the trial, without {plain_ms:.3g}"


def pays(shape: Shape, parts: float) -> bool:
    """Whether a run of so many parts is long enough to try. Takes two parts' time."""
    return parts * _seconds(part_loss, shape, rounds=1, calls=1) >= WORTH


def tried(part: CompiledPart, shape: Shape) -> Trial:
    """Both beside each other."""
    plain_s = _seconds(part_loss, shape)
    try:
        for rows in (shape.rows, max(2, shape.rows // 2)):  # of two sizes, so that the number of rows is left open
            if not _agree(part, shape.arguments(rows), shape.arguments(rows)):
                return Trial(plain_s, why_not="it then gives other numbers")
        return Trial(plain_s, _seconds(part, shape))
    except Exception as error:  # compilers that are missing or fail do so in too many ways to name
        return Trial(plain_s, why_not=f"that fails here ({type(error).__name__})")


@torch.no_grad()
def _agree(part: CompiledPart, first: tuple, second: tuple) -> bool:
    """Whether values and gradients are the plain part's but for rounding, on the same arguments twice."""
    expected_R, found_R = part_loss(*first)[0], part._compiled(*second)[0]
    expected_RV, found_RV = (arguments[0].to(expected_R.dtype) for arguments in (first, second))
    tolerance = max(1e-4, 4 * torch.finfo(first[0].dtype).eps)  # of an entry, and of a usual one where it is small
    values = torch.allclose(found_R, expected_R, rtol=1e-4, atol=1e-5)
    usual = expected_RV.abs().mean().item()
    return values and torch.allclose(found_RV, expected_RV, rtol=tolerance, atol=tolerance * usual)


@torch.no_grad()
def _seconds(part, shape: Shape, rounds: int = ROUNDS, calls: int = CALLS) -> float:
    """Of one call, with the device waited for."""
    arguments, wait = shape.arguments(shape.rows), torch.get_device_module(shape.device).synchronize
    part(*arguments)
    least = float("inf")
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        for _ in range(calls):
            part(*arguments)
        wait()
        least = min(least, (time.perf_counter() - began) / calls)
    return least
