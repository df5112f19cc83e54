"""Ask an OpenAI-compatible server for responses: to token ids, to text, or to the messages of a chat."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillm_cli.errors import ServerError
from distillm_cli.servers.http import Server

_VLLM = "vllm"
_LISTED = 5  # models named in a message


@dataclass(frozen=True)
class ServedModel:
    """Describe a model of a server. context: its longest sequence, None if it is unknown. owner: its software."""

    name: str
    context: int | None = None
    owner: str = ""

    @property
    def is_vllm(self) -> bool:
        return self.owner == _VLLM


@dataclass(frozen=True)
class Request:
    """Hold the settings of one response. The stop tokens apply to token ids alone.

    top_k 0 and top_p 1 are off. suppressed: token ids that must not be chosen. with_log_probs: the answer has them.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    suppressed: tuple[int, ...] = ()
    with_log_probs: bool = False


@dataclass(frozen=True)
class Completion:
    """Hold one response. token_ids: None if the server gives text alone. tokens: their number.

    complete: False if the length limit cut it. log_probs: of its tokens at temperature 1 without filters, nats.
    """

    text: str
    token_ids: list[int] | None
    tokens: int
    complete: bool
    log_probs: list[float] | None = None


def seed_of(*parts: int) -> int:
    """Return the seed of one request, from 0 to 2^31 − 1, which every server takes. parts: the run's seed, the row, …"""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "little") >> 1


def find_model(server: Server, name: str, *, is_required: bool = False) -> ServedModel:
    """Return the server's model with this name or path; unless ``is_required``, also its only model under another name.

    Raises ServerError.
    """
    try:
        answer = server.get("v1/models")
    except ServerError as error:
        if error.code != "server.no_endpoint" or not is_required:
            raise
        return ServedModel(name)  # some APIs list no models
    listed = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) and "id" in entry for entry in listed):
        raise server.invalid("no list of models")
    wanted = {name, str(Path(name).expanduser().resolve())}
    chosen = [entry for entry in listed if wanted & {entry["id"], entry.get("root")}]
    if not chosen and len(listed) == 1 and not is_required:
        chosen = listed
    if not chosen:
        names = ", ".join(entry["id"] for entry in listed[:_LISTED]) or "none"
        more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        where = f"it serves {names}{more}"
        raise ServerError("server.no_model", f"{server.url} has no model {name}", where=where, hint="use one of these")
    entry = chosen[0]
    context = entry.get("max_model_len")
    return ServedModel(str(entry["id"]), context if isinstance(context, int) else None, str(entry.get("owned_by", "")))


def complete(server: Server, model: ServedModel, prompt: SequenceOf[int] | str, request: Request) -> Completion:
    """Return the response to a prompt, as token ids or text."""
    body = _sampling(model, request) | {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
    if model.is_vllm:
        body |= {"return_token_ids": True, "skip_special_tokens": False}
        if request.stop_ids:
            body["stop_token_ids"] = list(request.stop_ids)
        if request.suppressed:
            body["logit_bias"] = {str(token): -100 for token in request.suppressed}
    if request.with_log_probs:
        body["logprobs"] = 0
    answer = server.post("v1/completions", body)
    choice = _choice(server, answer)
    token_ids = choice.get("token_ids")
    log_probs = None
    if request.with_log_probs:
        log_probs = (choice.get("logprobs") or {}).get("token_logprobs")
        if not isinstance(log_probs, list) or (token_ids is not None and len(log_probs) != len(token_ids)):
            raise server.invalid("no log-probabilities of its tokens")
    return _completion(server, answer, choice, choice.get("text"), token_ids, log_probs)


def chat(server: Server, model: ServedModel, messages: SequenceOf[Mapping[str, Any]], request: Request) -> Completion:
    """Return the response to the messages of a chat. The server applies the chat template."""
    answer = server.post("v1/chat/completions", _sampling(model, request) | {"messages": list(messages)})
    choice = _choice(server, answer)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else None
    return _completion(server, answer, choice, text, None, None)


def _sampling(model: ServedModel, request: Request) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model.name,
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }
    if request.top_k:  # not part of OpenAI's API, whose servers refuse unknown keys
        body["top_k"] = request.top_k
    if model.is_vllm:  # otherwise the defaults of the model's generation config apply
        body |= {"top_k": request.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
    return body


def _choice(server: Server, answer: Any) -> dict[str, Any]:
    try:
        choice = answer["choices"][0]
    except (TypeError, KeyError, IndexError):
        raise server.invalid("an answer without a choice") from None
    if not isinstance(choice, dict):
        raise server.invalid("an answer without a choice")
    return choice


def _completion(
    server: Server,
    answer: dict[str, Any],
    choice: dict[str, Any],
    text: Any,
    token_ids: Any,
    log_probs: list[float] | None,
) -> Completion:
    if not isinstance(text, str):
        raise server.invalid("a response without text")
    if token_ids is not None and not (isinstance(token_ids, list) and all(isinstance(i, int) for i in token_ids)):
        raise server.invalid("token ids that are not integers")
    usage = answer.get("usage")
    reported = usage.get("completion_tokens") if isinstance(usage, dict) else None
    tokens = len(token_ids) if token_ids is not None else reported if isinstance(reported, int) else 0
    return Completion(text, token_ids, tokens, choice.get("finish_reason") != "length", log_probs)
