"""Test the clients of servers: addresses, keys, retries, faults, and the parts of vLLM's protocol."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import pytest
import torch

from distillm_cli.config.fields import checked_url
from distillm_cli.servers.completions import Request, chat, complete, find_model, seed_of
from distillm_cli.servers.http import KEY, TIMEOUT, Server, in_parallel
from distillm_cli.servers.vllm import (
    check_reloads,
    check_vllm,
    hidden_states,
    prompt_log_probs,
    reload_weights,
    untried_version,
)
from tests import tiny
from tests.codes import raises_code
from tests.protocol_server import serving


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def served(directory):
    with serving(directory, pools=True) as found:
        yield found


def client(served, **options):
    """Return a client of the server that does not wait between tries, and the pauses it would have made."""
    pauses: list[float] = []
    return Server(served.url, name="rollout.server", sleep=pauses.append, **options), pauses


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://a b", ""])
def test_address_must_be_one_of_http(url):
    with pytest.raises(ValueError, match="expected an address like"):
        checked_url(url)


def test_impossible_port_is_refused():
    with raises_code("usage.invalid_value", "--server", "http://host:99999"):
        Server("http://host:99999", name="--server")


@pytest.mark.parametrize("url", ["http://user:secret@host", "https://host/v1?key=secret"])
def test_address_with_a_key_is_refused(url):
    with raises_code("usage.invalid_value", "DISTILLM_SERVER_KEY") as caught:
        Server(url, name="--server")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "root", "api"),
    [
        ("http://h:1", "http://h:1", "http://h:1/v1"),
        ("http://h:1/v1/", "http://h:1", "http://h:1/v1"),
        ("https://h/api/openai", "https://h/api/openai", "https://h/api/openai"),
    ],
)
def test_paths_follow_the_address(url, root, api):
    server = Server(url, name="--server")
    assert (server.root, server.api) == (root, api)


def test_key_is_sent_and_not_printed(served, monkeypatch):
    monkeypatch.setenv(KEY, "abc-secret")
    server, _ = client(served)
    server.get("v1/models")
    assert served.keys == ["Bearer abc-secret"]
    for status, code in ((401, "server.unauthorized"), (400, "server.bad_request")):
        served.fail["/v1/models"] = deque([status])
        with raises_code(code) as caught:
            server.get("v1/models")
        assert "secret" not in str(caught.value)


def test_no_key_is_sent_without_one(served, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    client(served)[0].get("v1/models")
    assert served.keys == [None]


def test_failures_are_retried_with_growing_pauses(served):
    server, pauses = client(served)
    served.fail["/v1/models"] = deque([500, 503, 429])
    assert find_model(server, served.name).name == served.name
    assert pauses == [0.5, 1.0, 2.0]


def test_pause_that_the_server_asks_for_is_kept(served):
    server, pauses = client(served)
    served.fail["/v1/models"] = deque([429])
    served.headers = {"retry-after": "7"}
    server.get("v1/models")
    assert pauses == [7.0]


def test_lasting_failure_is_an_error_with_the_servers_message(served):
    server, pauses = client(served)
    served.fail["/v1/models"] = deque([500] * 9)
    with raises_code("server.failed", "status 500", "fault 500", "rollout.server"):
        server.get("v1/models")
    assert len(pauses) == 4


def test_stopped_server_is_unreachable(served):
    server, pauses = client(served)
    served.stop()
    with raises_code("server.unreachable", served.url):
        server.get("v1/models")
    assert server.lost_connections == len(pauses) + 1 == 5


def test_slow_server_times_out_without_a_retry(served, monkeypatch):
    monkeypatch.setenv(TIMEOUT, "0.2")
    served.delay = 1.0
    server, pauses = client(served)
    with raises_code("server.timeout", "0.2 s", TIMEOUT):
        server.get("v1/models")
    assert pauses == []


def test_invalid_timeout_is_refused(served, monkeypatch):
    monkeypatch.setenv(TIMEOUT, "soon")
    with raises_code("usage.invalid_value", TIMEOUT):
        client(served)


def test_missing_endpoint_and_bad_request_are_told_apart(served):
    server, _ = client(served)
    with raises_code("server.no_endpoint", "/v1/unknown"):
        server.post("v1/unknown", {})
    served.fail["/v1/completions"] = deque([400])
    with raises_code("server.bad_request", "fault 400"):
        server.post("v1/completions", {})


def test_results_of_threads_come_with_their_index():
    def work(number: int) -> int:
        time.sleep(0.01 * (3 - number))
        return number * number

    assert dict(in_parallel(work, [0, 1, 2, 3], 4)) == {0: 0, 1: 1, 2: 4, 3: 9}
    assert list(in_parallel(work, [], 4)) == []


def test_error_in_a_thread_is_raised_and_stops_the_others():
    started = []

    def work(number: int) -> None:
        started.append(number)
        time.sleep(0.01)
        raise KeyError(number)

    with pytest.raises(KeyError):
        list(in_parallel(work, range(100), 2))
    time.sleep(0.05)
    assert len(started) < 10


# Models and responses


def test_only_model_is_found_under_another_name(served):
    server, _ = client(served)
    model = find_model(server, "some/name")
    assert (model.name, model.is_vllm) == (served.name, True)
    with raises_code("server.no_model", served.name):
        find_model(server, "some/name", is_required=True)


def test_model_that_is_not_vllm_is_refused(directory):
    with serving(directory, owner="other") as served:
        server, _ = client(served)
        with raises_code("server.not_vllm", "other"):
            check_vllm(server, find_model(server, served.name))


def test_release_that_was_not_tried_is_reported(served):
    server, _ = client(served)
    assert untried_version(server) is None
    served.version = f"{served.version}+cpu"
    assert untried_version(server) is None
    served.version = "9.9.9"
    assert untried_version(server) == "9.9.9"


def test_api_without_a_list_of_models_is_trusted(served):
    server, _ = client(served)
    served.fail["/v1/models"] = deque([404])
    assert find_model(server, "gpt", is_required=True).name == "gpt"


def test_greedy_token_ids_equal_those_of_the_model(served):
    server, _ = client(served)
    model = find_model(server, served.name)
    request = Request(6, temperature=0.0, stop_ids=(0,), with_log_probs=True)
    found = complete(server, model, [5, 6, 7], request)
    ids = [5, 6, 7, *(found.token_ids or [])]
    logits_TV = served.model(torch.tensor([ids])).logits[0, 2:-1]
    assert found.token_ids == logits_TV.argmax(-1).tolist()
    own = logits_TV.log_softmax(-1).max(-1).values
    assert np.allclose(found.log_probs, own.tolist(), atol=1e-5)
    assert (found.tokens, found.complete) == (len(ids) - 3, ids[-1] == 0)


def test_samples_depend_on_the_seed_alone(served):
    server, _ = client(served)
    model = find_model(server, served.name)

    def sampled(seed):
        return complete(server, model, [5, 6, 7], Request(8, seed=seed)).token_ids

    assert sampled(1) == sampled(1) != sampled(2)


def test_seeds_of_rows_differ_and_fit_into_31_bits():
    seeds = [seed_of(10, row) for row in range(1000)]
    assert len(set(seeds)) == 1000
    assert min(seeds) >= 0
    assert max(seeds) < 2**31


def test_other_servers_get_no_parameters_of_vllm(directory):
    with serving(directory, owner="other") as served:
        server, _ = client(served)
        model = find_model(server, served.name)
        found = complete(server, model, "abc", Request(4, stop_ids=(0,), suppressed=(3,)))
        assert found.token_ids is None
        assert set(served.bodies["/v1/completions"][0]) == {
            "model", "max_tokens", "temperature", "top_p", "seed", "prompt"
        }  # fmt: skip
        answer = chat(server, model, [{"role": "user", "content": "abc"}], Request(4, temperature=0.0))
        assert answer.text == served.tokenizer.decode(
            served._generate(served.tokenizer("abc")["input_ids"], served.bodies["/v1/chat/completions"][0])[0],
            skip_special_tokens=True,
        )


def test_suppressed_tokens_are_never_chosen(served):
    server, _ = client(served)
    model = find_model(server, served.name)
    chosen = complete(server, model, [5, 6], Request(1, temperature=0.0)).token_ids
    others = complete(server, model, [5, 6], Request(1, temperature=0.0, suppressed=tuple(chosen))).token_ids
    assert chosen != others


# Weights and states


def test_new_weights_change_the_answers(served, tmp_path):
    server, _ = client(served)
    model = find_model(server, served.name)
    before = complete(server, model, [5, 6, 7], Request(4, temperature=0.0, with_log_probs=True))
    reload_weights(server, tmp_path / tiny.save(tmp_path / "other", seed=5))
    after = complete(server, model, [5, 6, 7], Request(4, temperature=0.0, with_log_probs=True))
    assert before.log_probs != after.log_probs
    assert served.log["/reset_prefix_cache"] == 1


def test_failed_reload_names_the_directory_and_is_not_retried(served, tmp_path):
    server, _ = client(served)
    served.fail["/collective_rpc"] = deque([500])
    with raises_code("server.failed", str(tmp_path), "rollout.server_dir"):
        reload_weights(server, tmp_path)
    assert served.log["/collective_rpc"] == 1


def test_server_without_reloads_is_refused(directory):
    with serving(directory, reloads=False) as served, raises_code("server.no_reload", "VLLM_SERVER_DEV_MODE"):
        check_reloads(client(served)[0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_hidden_states_are_those_of_the_model(served, dtype):
    server, _ = client(served)
    rows = [[5, 6, 7, 8], [9, 3]]
    states = hidden_states(server, find_model(server, served.name), rows, dtype=dtype, width=32)
    for ids, state in zip(rows, states, strict=True):
        with torch.no_grad():
            own = served.model.base_model(torch.tensor([ids]))[0][0]
        assert np.allclose(state, own.numpy(), atol=1e-6 if dtype == "float32" else 1e-2)


def test_bfloat16_states_are_raw_bits(served):
    server, _ = client(served)
    (state,) = hidden_states(server, find_model(server, served.name), [[5, 6]], dtype="bfloat16", width=32)
    with torch.no_grad():
        own = served.model.base_model(torch.tensor([[5, 6]]))[0][0].to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(state.copy()).view(torch.bfloat16), own)


def test_missing_states_are_an_error(served):
    server, _ = client(served)
    served.lose_states = 1
    with raises_code("server.invalid_answer", "[3, 32]", "[4, 32]"):
        hidden_states(server, find_model(server, served.name), [[5, 6, 7, 8]], dtype="float32", width=32)


def test_server_without_pooling_is_refused(directory):
    with serving(directory) as served:
        server, _ = client(served)
        with raises_code("server.no_pooling", "distillm serve teacher"):
            hidden_states(server, find_model(server, served.name), [[5]], dtype="float32", width=32)


def test_log_probs_of_a_prompt_are_those_of_the_model(served):
    server, _ = client(served)
    ids = [5, 6, 7, 8]
    found = prompt_log_probs(server, find_model(server, served.name), ids)
    with torch.no_grad():
        log_probs_TV = served.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert np.allclose(found, [log_probs_TV[i, t].item() for i, t in enumerate(ids[1:])], atol=1e-5)
    served.generates = False
    assert prompt_log_probs(server, find_model(server, served.name), ids) is None
