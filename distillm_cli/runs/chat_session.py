"""Answer messages with a student and, beside it, its teacher: ``distillm chat``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from distillm_cli.config.schema import ModelSide, Recipe
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.rows import Row
from distillm_cli.errors import UsageError
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.sampler import Sampling, stream
from distillm_cli.runs import inference
from distillm_cli.runs.inference import Settings
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Note

_MESSAGE = "message"  # names a row in errors


@dataclass
class Participant:
    """Hold a model and its conversation.

    With a chat template it reads the system message and all messages. Otherwise it reads the last one alone, as an
    instruction, or as the input to the instruction in the place of a system message.
    """

    name: str
    path: str
    model: Backbone
    encoder: Encoder
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def has_memory(self) -> bool:
        """Return whether earlier messages are a part of the prompt."""
        renderer = self.encoder.renderer
        return renderer.has_chat and renderer.template in ("auto", "chat")

    def prompt(self, text: str, system: str | None) -> np.ndarray:
        """Return the token ids of a message, after those of the conversation."""
        if not self.has_memory:
            row = Row(instruction=text) if system is None else Row(instruction=system, input=text)
            return self.encoder.prompt_ids(replace(row, where=_MESSAGE))
        first = [] if system is None else [{"role": "system", "content": system}]
        messages = [*first, *self.messages, {"role": "user", "content": text}]
        return self.encoder.prompt_ids(Row(messages=messages, where=_MESSAGE))

    def remember(self, text: str, answer: str) -> None:
        """Add a message and its answer to the conversation."""
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


@dataclass
class ChatSession:
    """Hold a conversation with one or two models.

    sampling: of all answers; commands change it. seed: with the number of the message it fixes the answers. system: the
    system message, or the instruction of models without a chat template. turn: number of messages so far, also across
    ``reset``.
    """

    participants: list[Participant]
    sampling: Sampling
    seed: int
    system: str | None = None
    turn: int = 0

    def answer(self, text: str) -> Iterator[dict[str, str]]:
        """Yield the answers so far by participant, after every token. All models generate in turn.

        The answers become part of the conversation, also if the caller stops early. Raises DataError for a message that
        leaves no room for an answer; the conversation is unchanged then.
        """
        prompts = [participant.prompt(text, self.system) for participant in self.participants]
        row = self.turn
        answers = {participant.name: "" for participant in self.participants}
        streams = [
            stream(participant.model, prompt, self.sampling, (self.seed, row))
            for participant, prompt in zip(self.participants, prompts, strict=True)
        ]
        try:
            for outputs in zip_longest(*streams):
                for participant, prompt, tokens in zip(self.participants, prompts, outputs, strict=True):
                    if tokens is not None:
                        answers[participant.name] = participant.encoder.decode(prompt, tokens)
                yield dict(answers)
        finally:
            if any(answers.values()):
                self.turn += 1
                for participant in self.participants:
                    participant.remember(text, answers[participant.name])

    def reset(self) -> None:
        """Forget the conversation."""
        for participant in self.participants:
            participant.messages.clear()

    def set_temperature(self, temperature: float) -> None:
        """Set the temperature of the next answers; 0 is greedy."""
        self.sampling = replace(self.sampling, temperature=temperature)

    def set_max_new_tokens(self, count: int) -> None:
        """Set the largest number of tokens of the next answers."""
        self.sampling = replace(self.sampling, max_new_tokens=count)


def open_session(
    student: str, teacher: str | None, settings: Settings, listener: Listener, system: str | None = None
) -> ChatSession:
    """Load the models, with the templates of their sides and the sampling settings of the student's recipe.

    Raises UsageError in several processes, and ModelError for a model that cannot generate.
    """
    if world().size > 1:
        raise UsageError("usage.one_process", "chat in several processes", hint="start a single process")
    recipe = inference.resolve_settings("generate", student, settings, listener)[0].recipe
    participants = [_participant("student" if teacher else "model", student, recipe, listener)]
    if teacher is not None:
        own_dtype = recipe.student.model_copy(update={"dtype": recipe.teacher.dtype})
        of_teacher = recipe.model_copy(update={"student": own_dtype})
        participants.append(_participant("teacher", teacher, of_teacher, listener, side="teacher"))
    rollout = recipe.rollout
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens)
    return ChatSession(participants, sampling, recipe.train.seed, system)


def _participant(
    name: str, path: str, recipe: Recipe, listener: Listener, side: ModelSide | None = None
) -> Participant:
    model, encoder = inference.load_model(path, recipe, listener, side)
    found = Participant(name, path, model, encoder)
    row = Row(instruction="a", where=_MESSAGE)
    inference.check_model(model, encoder, row, listener)
    memory = "" if found.has_memory else " · each message alone"
    listener(Note(f"{name}: {path} · template {encoder.renderer.form(row)}{memory}"))
    return found


# Commands of a conversation: name, arguments, description.
COMMANDS = (
    ("/reset", "", "forget the conversation"),
    (
        "/system",
        "TEXT",
        "set the system message; without a chat template, the instruction to which messages are the input",
    ),
    ("/temperature", "T", "set the temperature; 0 is greedy"),
    ("/max-tokens", "N", "set the largest number of tokens of an answer"),
    ("/help", "", "list the commands"),
    ("/exit", "", "leave, as Ctrl-D"),
)


def run_command(session: ChatSession, line: str) -> str | None:
    """Run a line that begins with a slash, and return what to print; None to leave. Raises UsageError."""
    name, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if name in ("/exit", "/quit"):
        return None
    if name == "/help":
        return "\n".join(f"{f'{command} {value}':<16}{text}" for command, value, text in COMMANDS)
    if name == "/reset":
        session.reset()
        return "the conversation starts again"
    if name == "/system":
        session.system = argument or None
        return f"system message: {argument}" if argument else "no system message"
    if name == "/temperature":
        session.set_temperature(_number(name, argument, float, lambda value: 0 <= value < float("inf"), "a number ≥ 0"))
        return f"temperature {session.sampling.temperature:g}"
    if name == "/max-tokens":
        session.set_max_new_tokens(_number(name, argument, int, lambda value: 1 <= value < 2**31, "an integer ≥ 1"))
        return f"answers of at most {session.sampling.max_new_tokens:,} tokens"
    hint = "/help lists the commands; a message that begins with a slash needs a space before it"
    raise UsageError("usage.unknown_command", f"no command {name}", hint=hint)


def _number(name: str, text: str, kind: type, is_valid: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_valid(value):
        raise UsageError(
            "usage.invalid_value", f"{name} = {text}" if text else f"{name} alone", where=f"expected {expected}"
        )
    return value
