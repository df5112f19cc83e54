"""Use what vLLM has beyond OpenAI's API: new weights from files, and the last hidden states of a pooling server.

vLLM's API changes between releases. Everything that depends on it is in this file and in ``completions``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np

from distillm_cli.errors import ServerError
from distillm_cli.servers.completions import ServedModel, find_model
from distillm_cli.servers.http import Server

TESTED = ("0.32.0",)  # releases that were tried, see docs/scale.md
DEV_MODE = "VLLM_SERVER_DEV_MODE"  # environment variable of vLLM: enables the endpoints that load weights
_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}  # bf16 as raw bits


def connect(url: str, name: str, model: str) -> tuple[Server, ServedModel]:
    """Return a vLLM server and its model. name: the field with the address. model: name or path, if it serves several."""
    server = Server(url, name=name)
    found = find_model(server, model)
    check_vllm(server, found)
    return server, found


def check_vllm(server: Server, model: ServedModel) -> None:
    """Raise ServerError unless the server is vLLM."""
    if not model.is_vllm:
        owner = f" (owned by {model.owner})" if model.owner else ""
        raise ServerError(
            "server.not_vllm",
            f"{server.url} is not a vLLM server{owner}",
            where=server.name,
            hint="start vLLM; `distillm serve` prints the command",
        )


def untried_version(server: Server) -> str | None:
    """Return the server's release of vLLM if this package was not tried with it."""
    try:
        answer = server.get("version")
    except ServerError as error:
        if error.code != "server.no_endpoint":
            raise
        return None
    version = str(answer.get("version", "")) if isinstance(answer, dict) else ""
    return None if version.partition("+")[0] in TESTED else version or None


def check_reloads(server: Server) -> None:
    """Raise ServerError unless the server can load new weights."""
    if not server.has("reset_prefix_cache"):
        what = f"{server.url} does not accept new weights"
        hint = f"start it on a loopback address with {DEV_MODE}=1; `distillm serve rollouts` prints the command"
        raise ServerError("server.no_reload", what, where=server.name, hint=hint)


def reload_weights(server: Server, directory: Path) -> None:
    """Make the server load the weights of a model directory. Raises ServerError.

    vLLM 0.32 stops if it cannot read them.
    """
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(directory)}}
    try:
        server.post("collective_rpc", body, retry=False)
        server.has("reset_prefix_cache")  # the cache has keys and values of the earlier weights
    except ServerError as error:
        if error.code == "server.timeout":
            raise
        what = f"{server.url} did not load the weights in {directory}: {error.what}"
        hint = "start it again; it must see this directory, as the same user (rollout.server_dir)"
        raise ServerError(error.code, what, where=server.name, hint=hint) from error


def hidden_states(
    server: Server, model: ServedModel, ids: SequenceOf[SequenceOf[int]], *, dtype: str, width: int
) -> list[np.ndarray]:
    """Return the last hidden states [T, width] of each list of token ids, after the final norm.

    dtype: float32, float16, or bfloat16, whose values are returned as raw bits (uint16). Raises ServerError unless there
    is a state for each token.
    """
    body = {
        "model": model.name,
        "input": [list(row) for row in ids],
        "task": "token_embed",
        "encoding_format": "bytes",
        "embed_dtype": dtype,
        "endianness": "little",
        "use_activation": False,
        "add_special_tokens": False,
    }
    try:
        answer = server.post_for_bytes("pooling", body)
    except ServerError as error:
        if error.code in ("server.no_endpoint", "server.bad_request"):
            what = f"{server.url} gives no hidden states: {error.what}"
            hint = "start a pooling server; `distillm serve teacher` prints the command"
            raise ServerError("server.no_pooling", what, where=server.name, hint=hint) from error
        raise
    try:
        entries = sorted(json.loads(answer.headers["metadata"])["data"], key=lambda entry: entry["index"])
        spans = [(entry["start"], entry["end"], tuple(entry["shape"])) for entry in entries]
        states = [np.frombuffer(answer.content[start:end], dtype=_DTYPES[dtype]) for start, end, _ in spans]
    except (KeyError, TypeError, ValueError):
        raise server.invalid("no description of its hidden states") from None
    if len(states) != len(ids):
        raise server.invalid(f"hidden states of {len(states)} sequences, expected {len(ids)}")
    found = []
    for row, state, (*_, shape) in zip(ids, states, spans, strict=True):
        if shape != (len(row), width) or state.size != len(row) * width:
            raise server.invalid(f"hidden states of shape {list(shape)}, expected {[len(row), width]}")
        found.append(state.reshape(len(row), width))
    return found


def prompt_log_probs(server: Server, model: ServedModel, ids: SequenceOf[int]) -> list[float] | None:
    """Return the server's log-probability of each token but the first, nats; None if the server does not generate."""
    body = {"model": model.name, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    try:
        answer = server.post("v1/completions", body)
    except ServerError as error:
        if error.code in ("server.no_endpoint", "server.bad_request"):
            return None
        raise
    try:
        listed = answer["choices"][0]["prompt_logprobs"][1:]
        return [float(entry[str(token)]["logprob"]) for token, entry in zip(ids[1:], listed, strict=True)]
    except (KeyError, IndexError, TypeError, ValueError):
        raise server.invalid("no log-probabilities of the prompt") from None
