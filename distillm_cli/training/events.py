"""Define the events that trainers, loaders and samplers emit: plain data, no formatting.

A listener is any callable that takes an event. ``ui`` turns events into rich output, plain lines and JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Event:
    """Base class of all events."""


@dataclass(frozen=True, slots=True)
class Note(Event):
    """Report a sentence for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Warned(Event):
    """Report a problem that did not stop the run."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress(Event):
    """Report progress outside the training loop: loading, tokenizing, generating, scoring. It ends at done == total."""

    task: str
    done: int
    total: int
    unit: str = ""


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """Report that the training loop starts, at ``first_step`` after a resume.

    parameters, teacher_parameters: number that is trained of the student and, if it is trained too, of the teacher.
    has_phi: whether the schedule uses φ, which later events always have. loss, divergence, valid: names of the training
    loss ("skl", "CE"), of the held-out divergence and of the validation loss. epsilon, trigger: φ rises when the validation
    loss has risen by epsilon, to trigger nats; None if it is not known yet or φ cannot rise.
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
    valid: str = "CE"
    phi: float = 0.0
    epsilon: float | None = None
    trigger: float | None = None
    teacher_parameters: int = 0


@dataclass(frozen=True, slots=True)
class Stepped(Event):
    """Report an optimizer step, counted from 1. loss: mean per supervised token, nats. seconds: wall time of this step.

    figures: further figures of the method, by name. health: those of ``training.health``.
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
    health: dict[str, float] = field(default_factory=dict)


STEP_KEYS = ("step", "epoch", "source", "loss", "lr", "grad_norm", "phi", "tokens", "seconds")  # in each step's line


@dataclass(frozen=True, slots=True)
class Validated(Event):
    """Report a validation. valid_loss: mean cross-entropy per token of the student on held-out rows, nats.

    scores: further held-out figures (a divergence, ROUGE-L, …) by name; None for an undefined one. rose: whether φ rose.
    best: whether the quantity that selects checkpoints has its best value so far. trigger: the loss at which φ rises, nats;
    None if it cannot.
    """

    step: int
    valid_loss: float
    phi: float
    rose: bool = False
    best: bool = False
    scores: dict[str, float | None] = field(default_factory=dict)
    trigger: float | None = None


@dataclass(frozen=True, slots=True)
class Alarmed(Event):
    """Report that the figures of the run show a problem (``training.alarms``). cure: settings to try."""

    step: int
    name: str
    message: str
    cure: str

    @property
    def text(self) -> str:
        """Return the alarm as one line."""
        return f"step {self.step:,}: {self.message}; {self.cure}"

    def as_json(self) -> dict[str, object]:
        """Return the alarm as in metrics.jsonl and results."""
        return {"alarm": self.name, "step": self.step, "message": self.message, "cure": self.cure}


@dataclass(frozen=True, slots=True)
class Saved(Event):
    """Report that a checkpoint was saved."""

    step: int
    path: str


@dataclass(frozen=True, slots=True)
class RunEnded(Event):
    """Report that the training loop ended. reason: "done", "early stop" or "interrupted"."""

    step: int
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Staged(Event):
    """Report the progress of a pipeline. states: "done", "now", "later" or "left out", by stage.

    At the end, no stage is "now".
    """

    names: tuple[str, ...]
    states: tuple[str, ...]


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore the event. The listener for callers without one."""
