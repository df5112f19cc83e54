"""What the engine, the loaders and the samplers say while they work: plain data, no formatting.

A listener is any callable that takes an event. Rich output, plain lines and JSON live in ``ui``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True, slots=True)
class Note(Event):
    """A sentence for the person watching."""

    text: str


@dataclass(frozen=True, slots=True)
class Warned(Event):
    """Something to look at that did not stop the run."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """Work outside the training loop: loading, tokenizing, generating, scoring. done == total ends it."""

    task: str
    done: int
    total: int
    unit: str = ""


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """Report that the loop begins its first step (``first_step`` after a resume).

    has_phi: whether the schedule goes by φ, which later events bear all the same. loss, divergence: names of the training
    figure ("skl", "CE") and of the held-out divergence. epsilon, trigger: φ rises when the validation loss has risen by
    epsilon, which is at trigger nats; None where that is not known yet or φ cannot rise.
    """

    steps: int
    first_step: int
    steps_per_epoch: int
    method: str
    parameters: int
    device: str
    dtype: str
    has_phi: bool = True
    loss: str = "loss"
    divergence: str = "divergence"
    phi: float = 0.0
    epsilon: float | None = None
    trigger: float | None = None


@dataclass(frozen=True, slots=True)
class Stepped(Event):
    """One optimizer step, counted from 1. loss: mean per supervised token, nats. seconds: wall time of this step.

    figures: what else the method has to show of the step, by name.
    """

    step: int
    epoch: float
    source: str
    loss: float
    lr: float
    grad_norm: float
    phi: float
    tokens: int
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Validated(Event):
    """Report a validation. valid_loss: mean cross-entropy per token of the student on held-out rows, nats.

    scores: further held-out figures (a divergence, ROUGE-L, …) by name. rose: φ rose because of it. best: this is the
    best value so far of the quantity checkpoints are selected by. trigger: the loss at which φ rises, nats; None where it
    cannot.
    """

    step: int
    valid_loss: float
    phi: float
    rose: bool = False
    best: bool = False
    scores: dict[str, float] = field(default_factory=dict)
    trigger: float | None = None


@dataclass(frozen=True, slots=True)
class Saved(Event):
    """A checkpoint became visible."""

    step: int
    path: str


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    """The loop is over. reason: "done", "early stop" or "interrupted"."""

    step: int
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Staged(Event):
    """Where a pipeline is. states, one for each of names: "done", "now", "later" or "left out"; none now: it is over."""

    names: tuple[str, ...]
    states: tuple[str, ...]


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener that listens to nothing."""
