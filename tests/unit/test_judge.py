"""Test ratings and pairs of a judge against a local server with the same protocol."""

from __future__ import annotations

import pytest

from distillm_cli.config.schema import EvalConfig
from distillm_cli.evaluation.predictions import Predictions
from distillm_cli.runs.eval_judge import Judgments
from distillm_cli.runs.eval_options import EvalOptions, JudgeOptions
from distillm_cli.servers import judge_client
from distillm_cli.training.events import Warned
from tests.codes import raises_code
from tests.judge_server import answer_in, judging


@pytest.fixture(autouse=True)
def _environment(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTILLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def predictions(*texts: str) -> Predictions:
    rows = range(len(texts))
    return Predictions(
        EvalConfig(),
        where=[f"t:{i}" for i in rows],
        prompts=[f"Say {i}." for i in rows],
        references=[("right",)] * len(texts),
        texts={"10": list(texts), "20": ["never read"] * len(texts)},
    )


def judgments(server, events=None, prices=None) -> Judgments:
    return Judgments(JudgeOptions("judge", server.url, prices), (events if events is not None else []).append)


def by_length(prompt: str) -> str:
    return f"I rate by length, not 'Rating: 3'. Rating: {len(answer_in(prompt, 'response'))}"


def longer(prompt: str) -> str:
    first, second = (len(answer_in(prompt, f"response-{i}")) for i in (1, 2))
    return "Verdict: tie" if first == second else f"Verdict: {1 if first > second else 2}"


def test_ratings_are_those_of_the_judge():
    with judging(by_length) as server:
        asked = judgments(server)
        assert asked.rate("words", predictions("a", "ab", "abc")) == {"t:0": 1, "t:1": 2, "t:2": 3}
    assert "<task>\nSay 0.\n</task>" in "".join(server.prompts)
    assert "<reference>\nright\n</reference>" in server.prompts[0]
    assert set(server.keys) == {"Bearer sk-secret"}


def test_cached_ratings_cost_nothing():
    with judging(by_length) as server:
        judgments(server).rate("words", predictions("a", "ab"))
        again = judgments(server, prices=(1.0, 2.0))
        assert again.rate("words", predictions("a", "ab", "abc")) == {"t:0": 1, "t:1": 2, "t:2": 3}
        assert len(server.prompts) == 3
    found = again.summary()
    assert (found["requests"], found["cached"], found["tokens_in"], found["tokens_out"]) == (3, 2, 100, 10)
    assert found["cost"] == pytest.approx((100 * 1 + 10 * 2) / 1e6)


def test_pair_wins_only_in_both_orders():
    with judging(longer) as server:
        pair = judgments(server).choose("s", ("a", predictions("x", "xyz", "xx")), ("b", predictions("xy", "x", "yy")))
    assert {k: pair[k] for k in ("wins", "losses", "ties", "order_dependent", "unjudged")} == {
        "wins": 1,
        "losses": 1,
        "ties": 1,
        "order_dependent": 0,
        "unjudged": 0,
    }
    assert pair["win_rate"] == 50
    with judging(lambda prompt: "Verdict: 1") as server:
        pair = judgments(server).choose("s", ("a", predictions("q")), ("b", predictions("r")))
    assert (pair["wins"], pair["losses"], pair["order_dependent"]) == (0, 0, 1)


def test_nonsense_is_named_and_the_rest_is_rated():
    def reply(prompt):
        return {"a": "Rating: 7", "b": "I would rather not say.", "c": "Rating: 99"}[answer_in(prompt, "response")]

    events = []
    with judging(reply) as server:
        asked = judgments(server, events)
        assert asked.rate("words", predictions("a", "b", "c")) == {"t:0": 7}
        problems = asked.summary()["problems"]
    assert problems == {"an answer without a judgment": 1, "a rating that is not from 1 to 10": 1}
    assert sum(isinstance(event, Warned) for event in events) == 2


@pytest.mark.parametrize(("status", "problem"), [(401, "refused the key in OPENAI_API_KEY"), (404, "NotFoundError")])
def test_refusal_is_named_without_the_key(status, problem, monkeypatch):
    monkeypatch.setattr(judge_client, "_WORKERS", 1)
    events = []
    with judging(by_length) as server:
        server.status = status
        asked = judgments(server, events)
        assert asked.rate("words", predictions(*"abcdef")) == {}
        found = asked.summary()
        assert len(server.prompts) == 3, "no request is sent after three failures"
    assert found["failed"] == 6
    assert any(problem in text for text in found["problems"])
    assert "sk-secret" not in repr(found) + repr(events)


def test_timeout_and_absent_server_are_named(monkeypatch):
    monkeypatch.setenv("DISTILLM_SERVER_TIMEOUT", "0.05")
    monkeypatch.setattr(judge_client, "_RETRIES", 0)
    with judging(by_length) as server:
        server.delay = 0.5
        asked = judgments(server)
        assert asked.rate("words", predictions("a")) == {}
        assert "did not answer in time" in next(iter(asked.problems))
    asked = judgments(server)
    assert asked.rate("words", predictions("b")) == {}
    assert "cannot reach" in next(iter(asked.problems))


def test_missing_key_is_an_error_before_anything_is_loaded(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with raises_code("usage.no_key", "OPENAI_API_KEY"):
        EvalOptions(judge=JudgeOptions("judge")).check(1, on_server=False)
    EvalOptions(judge=JudgeOptions("judge", "http://127.0.0.1:1/v1")).check(1, on_server=False)
