"""Send requests to a server: its address and key, timeouts, retries, and errors of one line."""

from __future__ import annotations

import ipaddress
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, TypeVar

import httpx2

from distillm_cli.config.fields import checked_url
from distillm_cli.errors import ServerError, UsageError

KEY = "DISTILLM_SERVER_KEY"  # environment variables
TIMEOUT = "DISTILLM_SERVER_TIMEOUT"
_TIMEOUT_SECONDS = 600.0
_CONNECT_SECONDS = 10.0
_TRIES = 5
_FIRST_PAUSE = 0.5  # seconds before the second try, doubled for each further one
_LONGEST_PAUSE = 60.0  # that a server may ask for
_MESSAGE_CHARS = 300  # of a server's own message in an error
_IN_FLIGHT = 256  # connections at most

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Server:
    """Send requests to one server.

    url: ``http://HOST:PORT``, or the base of an API such as ``https://HOST/v1``. name: the field or flag that has it, for
    messages. sleep: waits before a retry.

    The key in ``$DISTILLM_SERVER_KEY`` is sent as a bearer token and appears in no message. An answer is awaited for
    ``$DISTILLM_SERVER_TIMEOUT`` seconds (600). A refused connection and the statuses 429 and 5xx are retried.
    lost_connections: number of requests that found no server or lost it, retried ones included.
    """

    def __init__(self, url: str, *, name: str, sleep: Callable[[float], None] = time.sleep):
        try:
            url = checked_url(url)
        except ValueError as error:
            raise UsageError("usage.invalid_value", f"{name} = {url}", where=str(error)) from None
        parsed = httpx2.URL(url)
        self.url = url
        self.name = name
        self.root = url.removesuffix("/v1")
        self.api = url if parsed.path.strip("/") else f"{url}/v1"
        self.lost_connections = 0
        self._sleep = sleep
        self._timeout = answer_timeout()
        key = self._key = os.environ.get(KEY)
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(self._timeout, connect=_CONNECT_SECONDS, pool=None),
            limits=httpx2.Limits(max_connections=_IN_FLIGHT),
            trust_env=not _is_loopback(parsed.host),  # a proxy cannot reach this machine's own address
        )

    def get(self, path: str) -> Any:
        """Return the JSON answer to a GET request. path: from the server's root, or ``v1/…`` of its API."""
        return self._json(self._send("GET", path, None, tries=_TRIES))

    def post(self, path: str, body: Mapping[str, Any], *, retry: bool = True) -> Any:
        """Return the JSON answer to a POST request. Raises ServerError. retry: whether failures are tried again."""
        return self._json(self.post_for_bytes(path, body, retry=retry))

    def post_for_bytes(self, path: str, body: Mapping[str, Any], *, retry: bool = True) -> httpx2.Response:
        """Return the whole answer to a POST request, for an answer that is not JSON."""
        return self._send("POST", path, body, tries=_TRIES if retry else 1)

    def has(self, path: str) -> bool:
        """Return whether the server has this endpoint, which is called with an empty body."""
        try:
            self._send("POST", path, {}, tries=_TRIES)
        except ServerError as error:
            if error.code == "server.no_endpoint":
                return False
            if error.code != "server.bad_request":
                raise
        return True

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, *, tries: int) -> httpx2.Response:
        url = f"{self.api}/{path.removeprefix('v1/')}" if path.startswith("v1/") else f"{self.root}/{path}"
        pause = _FIRST_PAUSE
        for remaining in reversed(range(tries)):
            asked_pause = None
            try:
                response = self._client.request(method, url, json=body)
            except httpx2.TimeoutException as error:
                raise self._timed_out(error) from None
            except (httpx2.TransportError, OSError) as error:
                problem = self._lost(error)
                self.lost_connections += 1
            else:
                if response.is_success:
                    return response
                problem = self._refused(response, path)
                if response.status_code != 429 and response.status_code < 500:
                    raise problem
                asked_pause = _retry_after(response)
            if remaining:
                self._sleep(pause if asked_pause is None else asked_pause)
                pause *= 2
        raise problem

    def _json(self, response: httpx2.Response) -> Any:
        try:
            return response.json()
        except ValueError:
            raise self.invalid(f"an answer that is not JSON: {_shortened(response.text)!r}") from None

    def invalid(self, what: str) -> ServerError:
        """Return the error for an answer that the client cannot use."""
        hint = "check that the address is that of the server's API"
        return ServerError("server.invalid_answer", f"{self.url} gave {what}", where=self.name, hint=hint)

    def _timed_out(self, error: httpx2.TimeoutException) -> ServerError:
        if isinstance(error, httpx2.ConnectTimeout):
            return self._lost(error)
        return ServerError(
            "server.timeout",
            f"{self.url} did not answer within {self._timeout:g} s",
            where=self.name,
            hint=f"look at its log, or set {TIMEOUT} to more seconds",
        )

    def _lost(self, error: Exception) -> ServerError:
        reason = str(error).strip() or type(error).__name__
        return ServerError(
            "server.unreachable",
            f"cannot reach {self.url}: {_shortened(reason)}",
            where=self.name,
            hint="start the server, or check the address and the server's log",
        )

    def _refused(self, response: httpx2.Response, path: str) -> ServerError:
        status = response.status_code
        message = _message(response)
        if self._key:
            message = message.replace(self._key, "…")
        if status in (401, 403):
            hint = f"set {KEY} to the server's key"
            return ServerError("server.unauthorized", f"{self.url} refused the key", where=self.name, hint=hint)
        if status in (404, 405, 501) and not _names_a_model(message):
            what = f"{self.url} has no endpoint /{path}"
            return ServerError("server.no_endpoint", what, where=self.name, hint="see docs/scale.md for its command")
        what = f"{self.url} answered /{path} with status {status}: {message}"
        if status == 429 or status >= 500:
            return ServerError("server.failed", what, where=self.name, hint="see the server's log")
        return ServerError("server.bad_request", what, where=self.name, hint="see the server's log")


def in_parallel(
    function: Callable[[_Item], _Result], items: SequenceOf[_Item], workers: int
) -> Iterator[tuple[int, _Result]]:
    """Yield (index, result) of ``function`` for every item, as they are ready, from at most ``workers`` threads.

    The first error ends the iteration and no further item is started. The threads do not keep the process alive.
    """
    numbers = iter(range(len(items)))
    lock = threading.Lock()
    found: queue.SimpleQueue[tuple[int, _Result | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                i = next(numbers, None)
            if i is None:
                return
            try:
                found.put((i, function(items[i]), None))
            except BaseException as error:
                found.put((i, None, error))
                return

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            i, result, error = found.get()
            if error is not None:
                raise error
            yield i, result  # type: ignore[misc]  # a result without an error
    finally:
        stopped.set()


def answer_timeout() -> float:
    """Return the time limit of an answer in seconds. Raises UsageError for a variable that is no number of seconds."""
    return _seconds(TIMEOUT, _TIMEOUT_SECONDS)


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable, "")
    try:
        seconds = float(text or default)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise UsageError("usage.invalid_value", f"{variable} = {text}", where="expected seconds above 0")
    return seconds


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _retry_after(response: httpx2.Response) -> float | None:
    """Return the pause that the server asks for, in seconds; None if it asks for none."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(max(seconds, 0.0), _LONGEST_PAUSE)


def _message(response: httpx2.Response) -> str:
    """Return the server's own message."""
    try:
        body = response.json()
    except ValueError:
        return _shortened(response.text) or response.reason_phrase
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    return _shortened(str(message))


def _names_a_model(message: str) -> bool:
    """Return whether a message of status 404 is about an unknown model, not an unknown endpoint."""
    return "model" in message.lower()


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MESSAGE_CHARS else f"{text[:_MESSAGE_CHARS]}…"
