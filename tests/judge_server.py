"""Serve chat completions as a judge does, by a rule in place of a model, with faults on request."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JudgeServer:
    """Answer chat requests. reply: the text for a prompt. status: of every answer. delay: seconds before it.

    ``prompts`` and ``keys`` have the messages and the Authorization headers of all requests.
    """

    def __init__(self, reply: Callable[[str], str]):
        self.reply = reply
        self.status = 200
        self.delay = 0.0
        self.prompts: list[str] = []
        self.keys: list[str | None] = []
        owner = self

        class Handler(_Handler):
            judge = owner

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    judge: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        judge = self.judge
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"]
        judge.prompts.append(prompt)
        judge.keys.append(self.headers["authorization"])
        time.sleep(judge.delay)
        found: dict[str, Any]
        if judge.status == 200:
            message = {"role": "assistant", "content": judge.reply(prompt)}
            found = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
            }
        else:
            found = {"error": {"message": f"bad key {self.headers['authorization']}"}}
        content = json.dumps(found).encode()
        self.send_response(judge.status)
        for name, value in {"content-length": len(content), "content-type": "application/json"}.items():
            self.send_header(name, str(value))
        with suppress(OSError):  # the client may have stopped waiting
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def judging(reply: Callable[[str], str]) -> Iterator[JudgeServer]:
    """Run a judge inside the block."""
    server = JudgeServer(reply)
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def answer_in(prompt: str, name: str) -> str:
    """Return the text of a part of a judge's prompt."""
    found = re.search(rf"<{name}>\n(.*?)\n</{name}>", prompt, re.S)
    assert found is not None, prompt
    return found[1]
