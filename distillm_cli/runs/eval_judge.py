"""Let a model on a server judge responses: a rating of each one, and the better of two in both orders.

The judge reads the responses of the first pass. A pair counts as a win only if the same response is preferred in both
orders, since judges prefer the first or the second place (Zheng et al. 2023, arXiv 2306.05685).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

from distillm_cli.evaluation.predictions import Predictions
from distillm_cli.runs.eval_options import JudgeOptions
from distillm_cli.servers.judge_client import JudgeClient, Messages, Reply, cost_of
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.utils.storage import cache_root
from distillm_cli.utils.text import counted

_RATE = (
    "Rate the response to the task from 1 (wrong or useless) to 10 (correct, complete and clear). Judge its content, not "
    "its length or style. Write one or two sentences of reasons, then a last line 'Rating: N'."
)
_CHOOSE = (
    "Which response to the task is better? Judge the content, not length, style or order. Write one or two sentences of "
    "reasons, then a last line 'Verdict: 1', 'Verdict: 2' or 'Verdict: tie'."
)
_RATING = re.compile(r"rating\W{0,6}(\d+(?:\.\d+)?)", re.I)
_VERDICT = re.compile(r"verdict\W{0,6}(1|2|tie)\b", re.I)
_LARGEST = 10


@dataclass
class Judgments:
    """Ask a judge, and hold all replies for the cost. problems: the number of requests by problem."""

    options: JudgeOptions
    listener: Listener
    replies: list[Reply] = field(default_factory=list)
    problems: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.client = JudgeClient(self.options.model, self.options.url, cache_root("judge", None))

    def rate(self, suite: str, predictions: Predictions) -> dict[str, float]:
        """Return the rating of each response by the name of its row, without those that have none."""
        name, texts = next(iter(predictions.texts.items()))
        self.listener(Note(f"{self.options.model} rates {counted(len(texts), 'response')} of {suite} ({name})"))
        rows = zip(predictions.prompts, predictions.references, texts, strict=True)
        requests = [_request(_RATE, prompt, references, {"response": text}) for prompt, references, text in rows]
        ratings: dict[str, float] = {}
        for where, reply in zip(predictions.where, self._ask(requests), strict=True):
            rating = self._read(reply, _RATING)
            if rating is not None and 1 <= float(rating) <= _LARGEST:
                ratings[where] = float(rating)
            elif rating is not None:
                self.problems[f"a rating that is not from 1 to {_LARGEST}"] += 1
        return ratings

    def choose(self, suite: str, a: tuple[str, Predictions], b: tuple[str, Predictions]) -> dict[str, Any]:
        """Return how often the response of ``b`` is better than that of ``a``, for the rows in the same order."""
        texts_a, texts_b = (next(iter(of.texts.values())) for _, of in (a, b))
        requests: list[Messages] = []
        for prompt, references, first, second in zip(a[1].prompts, a[1].references, texts_a, texts_b, strict=True):
            for pair in ((first, second), (second, first)):
                answers = {"response-1": pair[0], "response-2": pair[1]}
                requests.append(_request(_CHOOSE, prompt, references, answers))
        self.listener(Note(f"{self.options.model} compares {counted(len(texts_a), 'pair')} of {suite} in both orders"))
        verdicts = [self._read(reply, _VERDICT) for reply in self._ask(requests)]
        found = Counter[str]()
        for forward, backward in zip(verdicts[::2], verdicts[1::2], strict=True):
            found[_outcome(forward, backward)] += 1
        counts = {name: found[name] for name in ("wins", "losses", "ties", "order_dependent", "unjudged")}
        judged = sum(found.values()) - found["unjudged"]
        share = None if not judged else 100 * (found["wins"] + (judged - found["wins"] - found["losses"]) / 2) / judged
        return {"suite": suite, "a": a[0], "b": b[0], **counts, "win_rate": share}

    def _ask(self, requests: SequenceOf[Messages]) -> list[Reply]:
        replies = self.client.ask_all(requests)
        self.replies += replies
        return replies

    def _read(self, reply: Reply, pattern: re.Pattern[str]) -> str | None:
        """Return the judgment in a reply, the last one; None with a problem if there is none."""
        found = pattern.findall(reply.text or "")
        if found:
            return str(found[-1]).lower()
        self.problems[reply.problem or "an answer without a judgment"] += 1
        return None

    def summary(self) -> dict[str, Any]:
        """Return the object ``judge`` of ``--json``: requests, tokens, cost and problems. Warn about each problem."""
        for problem, count in self.problems.items():
            self.listener(Warned(f"judge {self.options.model}: {counted(count, 'request')}: {problem}"))
        found = {"model": self.options.model, "url": self.client.url, **cost_of(self.replies, self.options.prices)}
        return {**found, "problems": dict(self.problems)}


def ratings_json(ratings: dict[str, float], rows: int) -> dict[str, Any]:
    """Return the object ``judge`` of a suite. mean: of the rated rows, 1 to 10."""
    mean = sum(ratings.values()) / len(ratings) if ratings else None
    return {"mean": mean, "rated": len(ratings), "rows": rows}


def _outcome(forward: str | None, backward: str | None) -> str:
    """Return the outcome of a pair for the response that is second in ``forward`` and first in ``backward``."""
    if forward is None or backward is None:
        return "unjudged"
    if (forward, backward) == ("2", "1"):
        return "wins"
    if (forward, backward) == ("1", "2"):
        return "losses"
    return "ties" if forward == backward == "tie" else "order_dependent"


def _request(task: str, prompt: str, references: SequenceOf[str], answers: dict[str, str]) -> Messages:
    parts = [task, f"<task>\n{prompt}\n</task>"]
    if references:
        parts.append(f"<reference>\n{references[0]}\n</reference>")
    parts += [f"<{name}>\n{text}\n</{name}>" for name, text in answers.items()]
    return [{"role": "user", "content": "\n\n".join(parts)}]
