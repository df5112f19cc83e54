"""Ask a model behind an OpenAI-compatible API for judgments: cached on disk, retried, and with the cost counted.

The key is read from ``$OPENAI_API_KEY`` by the ``openai`` client and appears in no message and no file.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distillm_cli.errors import UsageError
from distillm_cli.servers.http import answer_timeout, in_parallel
from distillm_cli.utils.storage import atomic_write

_KEY = "OPENAI_API_KEY"  # environment variables of the client
_BASE_URL = "OPENAI_BASE_URL"
_WORKERS = 8
_MAX_FAILURES = 3  # failed requests after which no other is sent
_RETRIES = 2  # of a request that the server may answer later
_MAX_TOKENS = 1024  # of an answer
_MESSAGE_CHARS = 200

Messages = SequenceOf[Mapping[str, str]]


@dataclass(frozen=True)
class Reply:
    """Hold the answer to a request. text: None if it failed. tokens: of input and output; 0 if it was cached."""

    text: str | None
    tokens_in: int = 0
    tokens_out: int = 0
    is_cached: bool = False
    problem: str | None = None


def check_judge(url: str | None) -> None:
    """Raise UsageError if the client is not installed, or OpenAI's own API has no key."""
    if find_spec("openai") is None:
        raise UsageError(
            "usage.missing_package", "--judge needs the package openai", hint="pip install 'distillm[judge]'"
        )
    if url is None and not os.environ.get(_BASE_URL) and not os.environ.get(_KEY):
        raise UsageError(
            "usage.no_key", "--judge without a key", where=_KEY, hint=f"set {_KEY}, or give --judge-url URL"
        )


class JudgeClient:
    """Send chat requests to a judge.

    model: its name. url: base of the API; None: that of the environment, else OpenAI's. cache: directory of answers, which
    are stored by model, address and messages. failures: requests that failed.
    """

    def __init__(self, model: str, url: str | None, cache: Path):
        from openai import OpenAI

        self.model = model
        self.url = url or os.environ.get(_BASE_URL) or "OpenAI"
        self._cache = cache
        self._key = os.environ.get(_KEY)
        # A local server needs no key, but the client does.
        self._client = OpenAI(base_url=url, api_key=self._key or "none", timeout=answer_timeout(), max_retries=_RETRIES)
        self._lock = threading.Lock()
        self.failures = 0

    def ask_all(self, requests: SequenceOf[Messages]) -> list[Reply]:
        """Return the reply to each request, in order. Failed ones are part of the result."""
        replies: list[Reply | None] = [None] * len(requests)
        for i, reply in in_parallel(self.ask, requests, _WORKERS):
            replies[i] = reply
        return [reply for reply in replies if reply is not None]

    def ask(self, messages: Messages) -> Reply:
        """Return the reply to a request, from the cache if it was sent before."""
        path = self._cache / f"{self._digest(messages)}.json"
        try:
            return Reply(json.loads(path.read_text(encoding="utf-8"))["text"], is_cached=True)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        if self.failures >= _MAX_FAILURES:
            return Reply(None, problem="not asked, since earlier requests failed")
        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=list(messages),  # type: ignore[arg-type]  # plain mappings, as the client sends them
                temperature=0,
                max_tokens=_MAX_TOKENS,
            )
            text = answer.choices[0].message.content
        except Exception as error:  # whatever the client raises for an answer that is no completion
            with self._lock:
                self.failures += 1
            return Reply(None, problem=self._problem(error))
        if not isinstance(text, str) or not text.strip():
            return Reply("", problem="an empty answer")
        usage = answer.usage
        _write_cache(path, json.dumps({"model": self.model, "text": text}))
        return Reply(text, getattr(usage, "prompt_tokens", 0), getattr(usage, "completion_tokens", 0))

    def _digest(self, messages: Messages) -> str:
        content = json.dumps([self.url, self.model, list(messages)], ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _problem(self, error: Exception) -> str:
        """Return what went wrong in one line, without the key."""
        import openai

        if isinstance(error, openai.APITimeoutError):
            return f"{self.url} did not answer in time"
        if isinstance(error, openai.APIConnectionError):
            return f"cannot reach {self.url}"
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return f"{self.url} refused the key in {_KEY}"
        message = " ".join(str(error).split())
        if self._key:
            message = message.replace(self._key, "…")
        return f"{self.url} gave no usable answer: {type(error).__name__}: {message[:_MESSAGE_CHARS]}"


def _write_cache(path: Path, text: str) -> None:
    """Write a file of the cache. A cache that cannot be written is left out."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text)
    except OSError:
        return


def cost_of(replies: SequenceOf[Reply], prices: tuple[float, float] | None) -> dict[str, Any]:
    """Return the number of requests and their tokens, and the money that they cost at prices per million tokens."""
    tokens_in = sum(reply.tokens_in for reply in replies)
    tokens_out = sum(reply.tokens_out for reply in replies)
    found: dict[str, Any] = {
        "requests": len(replies),
        "cached": sum(reply.is_cached for reply in replies),
        "failed": sum(reply.text is None for reply in replies),
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
    }
    if prices is not None:
        found["cost"] = (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6
    return found
