"""Serve the part of vLLM's protocol that the package uses, with a tiny model in this process, and faults on request."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_cli.servers.vllm import TESTED

_BYTES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ProtocolServer:
    """Answer requests with the model in a directory.

    generates, pools: whether it has /v1/completions and /v1/chat/completions, or /pooling. reloads: whether it has the
    endpoints that load weights. dtype: of the model. owner: of the model in /v1/models.

    Faults: ``fail`` gives the status of the next requests to a path, as many as it has; ``delay``, seconds before every
    answer; ``die_after``, requests to a path until the server stops for good, losing those in flight; ``lose_states``, the
    number of states missing from every answer; ``ignores_weights``, reloads have no effect. ``log`` counts requests,
    ``bodies`` has them, and ``keys`` their Authorization headers.
    """

    def __init__(
        self,
        directory: str,
        *,
        generates: bool = True,
        pools: bool = False,
        reloads: bool = True,
        dtype: torch.dtype = torch.float32,
        owner: str = "vllm",
        context: int | None = None,
    ):
        self.directory = directory
        self.generates = generates
        self.pools = pools
        self.reloads = reloads
        self.dtype = dtype
        self.owner = owner
        self.fail: dict[str, deque[int]] = {}
        self.headers: dict[str, str] = {}
        self.delay = 0.0
        self.die_after: dict[str, int] = {}
        self.lose_states = 0
        self.ignores_weights = False
        self.log: Counter[str] = Counter()
        self.bodies: dict[str, list[Any]] = {}
        self.keys: list[str | None] = []
        self.name = directory
        self.context = context
        self.version = TESTED[-1]
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self._lock = threading.Lock()
        self._stopping = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self.port = 0
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=self.dtype).eval()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def load(self, directory: str) -> None:
        """Replace the weights.

        ``from_pretrained`` changes classes of transformers while it runs. Requests are answered in threads, so a run in this
        process that loads a model at the same time would leave them changed.
        """
        weights = {}
        for path in sorted(Path(directory).glob("*.safetensors")):
            weights |= load_file(path)
        missing, unexpected = self.model.load_state_dict(weights, strict=False)
        assert weights
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}, missing  # of a tied head

    def start(self) -> None:
        """Listen, on the same port as before if it was stopped."""
        owner = self

        class Handler(_Handler):
            served = owner

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening; requests in flight get no answer."""
        if self._http is not None:
            self._stop(self._http)

    def _stop(self, http: ThreadingHTTPServer) -> None:
        """Stop this listener, unless it is stopped already: several requests can ask for it, some after a restart."""
        with self._stopping:
            if self._http is not http:
                return
            self._http = None
        http.shutdown()
        http.server_close()

    @property
    def is_running(self) -> bool:
        return self._http is not None

    def restart(self) -> None:
        """Stop, and start again with the model's first weights, as a server process does."""
        self.stop()
        self.load(self.directory)
        self.start()

    # Answers

    def answer(self, path: str, body: dict[str, Any]) -> tuple[dict[str, str], bytes] | int:
        """Return headers and content, or a status."""
        if path == "/v1/models":
            entry = {"id": self.name, "root": self.directory, "owned_by": self.owner, "max_model_len": self.context}
            return _json({"object": "list", "data": [entry]})
        if path == "/version" and self.owner == "vllm":
            return _json({"version": self.version})
        with self._lock, torch.no_grad():
            if path == "/reset_prefix_cache" and self.reloads:
                return _json({"success": True})
            if path == "/collective_rpc" and self.reloads:
                assert body["method"] == "reload_weights"
                if not self.ignores_weights:
                    self.load(body["kwargs"]["weights_path"])
                return _json({"results": [None]})
            if path == "/v1/completions" and self.generates:
                return self._complete(body)
            if path == "/v1/chat/completions" and self.generates:
                return self._chat(body)
            if path == "/pooling" and self.pools:
                return self._pool(body)
        return 404

    def _complete(self, body: dict[str, Any]) -> tuple[dict[str, str], bytes] | int:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        if max(prompt) >= self.model.config.vocab_size:
            return 400
        if body.get("prompt_logprobs") is not None:
            log_probs_TV = self.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
            entries = [None, *({str(t): {"logprob": log_probs_TV[i, t].item()}} for i, t in enumerate(prompt[1:]))]
            choice = {"text": "", "token_ids": [], "prompt_logprobs": entries, "finish_reason": "length"}
            return _json({"choices": [choice], "usage": {"completion_tokens": 0}})
        tokens, log_probs, is_complete = self._generate(prompt, body)
        choice: dict[str, Any] = {"text": self._text(tokens), "finish_reason": "stop" if is_complete else "length"}
        if body.get("return_token_ids"):
            choice["token_ids"] = tokens
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": log_probs}
        return _json({"choices": [choice], "usage": {"completion_tokens": len(tokens)}})

    def _chat(self, body: dict[str, Any]) -> tuple[dict[str, str], bytes]:
        prompt = self.tokenizer(" ".join(message["content"] for message in body["messages"]))["input_ids"]
        tokens, _, is_complete = self._generate(prompt, body)
        choice = {"message": {"content": self._text(tokens)}, "finish_reason": "stop" if is_complete else "length"}
        return _json({"choices": [choice], "usage": {"completion_tokens": len(tokens)}})

    def _generate(self, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], list[float], bool]:
        generator = torch.Generator().manual_seed(body["seed"])
        eos = self.tokenizer.eos_token_id
        stops = set(body.get("stop_token_ids") or ()) | {eos}
        tokens: list[int] = []
        log_probs: list[float] = []
        while len(tokens) < body["max_tokens"]:
            logits_V = self.model(torch.tensor([prompt + tokens])).logits[0, -1].float()
            own_V = logits_V.log_softmax(-1)
            for token, bias in (body.get("logit_bias") or {}).items():
                logits_V[int(token)] += bias
            if body["temperature"] == 0:
                chosen = int(logits_V.argmax())
            else:
                probabilities_V = (logits_V / body["temperature"]).softmax(-1)
                chosen = int(torch.multinomial(probabilities_V, 1, generator=generator))
            tokens.append(chosen)
            log_probs.append(own_V[chosen].item())
            if chosen in stops:
                return tokens, log_probs, True
        return tokens, log_probs, False

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def _pool(self, body: dict[str, Any]) -> tuple[dict[str, str], bytes]:
        assert (body["task"], body["encoding_format"]) == ("token_embed", "bytes")
        assert body["use_activation"] is body["add_special_tokens"] is False
        rows, content = [], b""
        for i, ids in enumerate(body["input"]):
            states_TD = self.model.base_model(torch.tensor([ids]))[0][0][self.lose_states :]
            raw = states_TD.to(_BYTES[body["embed_dtype"]]).contiguous().view(torch.uint8).numpy().tobytes()
            start = len(content)
            content += raw
            rows.append({"index": i, "start": start, "end": len(content), "shape": list(states_TD.shape)})
        return {"metadata": json.dumps({"data": rows}), "content-type": "application/octet-stream"}, content


class _Handler(BaseHTTPRequestHandler):
    served: ProtocolServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle({})

    def do_POST(self) -> None:
        self._handle(json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}"))

    def _handle(self, body: dict[str, Any]) -> None:
        server = self.served
        server.log[self.path] += 1
        server.bodies.setdefault(self.path, []).append(body)
        server.keys.append(self.headers["authorization"])
        time.sleep(server.delay)
        if self.path in server.die_after:
            server.die_after[self.path] -= 1
            if server.die_after[self.path] < 0:
                threading.Thread(target=server._stop, args=(self.server,), daemon=True).start()
        if not server.is_running or server.die_after.get(self.path, 0) < 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        failing = server.fail.get(self.path)
        found = failing.popleft() if failing else server.answer(self.path, body)
        if isinstance(found, int):
            message = json.dumps({"error": {"message": f"fault {found} for {self.headers['authorization']}"}}).encode()
            self._send(found, dict(server.headers), message)
        else:
            self._send(200, *found)

    def _send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {"content-length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(directory: str, **options: Any) -> Iterator[ProtocolServer]:
    """Run a server inside the block."""
    server = ProtocolServer(str(directory), **options)
    try:
        yield server
    finally:
        server.stop()


def _json(value: Any) -> tuple[dict[str, str], bytes]:
    return {"content-type": "application/json"}, json.dumps(value).encode()
