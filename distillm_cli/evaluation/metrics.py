"""How good an answer is, on well-kept libraries: ROUGE-L, exact match, error rate (METHODS D).

Every metric compares one prediction with all accepted references and keeps the best. Figures are on a scale of 0 to 100
(an error rate may pass 100: insertions count).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer


class _StemmedWords(DefaultTokenizer):
    """rouge_score's own words and stems, remembered: each seed meets the same references again."""

    def __init__(self):
        super().__init__(use_stemmer=True)
        self._remembered = lru_cache(maxsize=8192)(super().tokenize)

    def tokenize(self, text: str) -> list[str]:
        return self._remembered(text)


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=_StemmedWords())


# A metric counts (points, of) for a row; a row's score is 100 · points / of, a set's 100 · Σ points / Σ of.
Count = tuple[float, float]


def _rouge_l(prediction: str, references: Sequence[str]) -> Count:
    return _scorer().score_multi(references, prediction)["rougeL"].fmeasure, 1


def _exact_match(prediction: str, references: Sequence[str]) -> Count:
    return prediction.strip() in {reference.strip() for reference in references}, 1


def _error_rate(prediction: str, references: Sequence[str]) -> Count:
    said = prediction.split()
    wanted = [reference.split() for reference in references]
    # An empty reference counts as one token, so that its rate is defined.
    counts = [(Levenshtein.distance(said, tokens), max(len(tokens), 1)) for tokens in wanted]
    return min(counts, key=lambda count: count[0] / count[1])


@dataclass(frozen=True)
class Metric:
    """What it is called, in recipes and in tables, how it counts one row, and which way is better."""

    name: str
    label: str
    count: Callable[[str, Sequence[str]], Count]
    higher_is_better: bool = True

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """One prediction against its references, the best of them, ×100."""
        return ratio([self.count(prediction, references)])


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        # F1 of lower-cased, Porter-stemmed words, by `rouge_score`. Its words are runs of a-z and 0-9: text in other
        # scripts scores 0. A set's figure is the mean over rows.
        Metric("rouge_l", "ROUGE-L", _rouge_l),
        # Character for character, white space at the ends aside. A set's figure is the share of rows that match.
        Metric("exact_match", "exact match", _exact_match),
        # Levenshtein edits between space-separated tokens per token of the reference, for the reference where that is
        # lowest (the first of equals). A set's figure is all edits over all those tokens, not a mean of rates; with
        # phonemes as tokens it is the phoneme error rate.
        Metric("error_rate", "error rate", _error_rate, higher_is_better=False),
    )
}


def ratio(counts: Iterable[Count]) -> float:
    """The figure for a set of rows, from each row's count: 100 · Σ points / Σ of. Raises ValueError for an empty set."""
    points, of = 0.0, 0.0
    for point, whole in counts:
        points, of = points + point, of + whole
    if not of:
        raise ValueError("no rows to score")
    return 100 * points / of


def corpus(name: str, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The figure for a set of predictions. Raises ValueError when there is none, or a row has no reference."""
    if not all(references):
        raise ValueError(f"row {next(i for i, wanted in enumerate(references) if not wanted)} has no reference")
    count = METRICS[name].count
    return ratio(count(said, wanted) for said, wanted in zip(predictions, references, strict=True))
