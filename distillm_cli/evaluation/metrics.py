"""Score responses against references: ROUGE, BLEU, chrF, exact match, error rate, final number.

A metric is a class, registered with its name in recipes, its label in tables, and the direction that is better.

    @register_metric("exact_match", label="exact match", higher_is_better=True)
    class ExactMatch(RatioMetric):
        def count(self, prediction, references):
            return prediction in references, 1

Every metric compares one prediction with all accepted references. A RatioMetric adds up over the rows: the figure of a
set is a ratio of sums. A CorpusMetric is defined on a whole set and is not a mean over rows. All are on a scale of 0 to
100 (an error rate may exceed 100, since insertions count). Libraries are imported when a metric is first computed, so
that the names are available without them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import cache, cached_property, lru_cache
from typing import Any, ClassVar, TypeVar

from distillm_cli import plugins

# The numerator and denominator that a row adds to a ratio. The figure of a set is 100 · Σ numerators / Σ denominators.
RatioParts = tuple[float, float]


class Metric(ABC):
    """Compare predictions with references. Subclass RatioMetric or CorpusMetric instead.

    signature: the library's description of how the metric was computed, None if there is none. alternative: the metric
    to use if this one is undefined.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    higher_is_better: ClassVar[bool]
    signature: str | None = None
    alternative: ClassVar[str] = "exact_match"

    @abstractmethod
    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Return the score of one prediction, 0 to 100."""

    @abstractmethod
    def corpus_score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Return the figure of a set of predictions, 0 to 100. Raises ValueError for an empty set."""

    def undefined(self, references: Iterable[str]) -> str | None:
        """Return the reason why the metric is undefined on these references, None if it is defined."""
        return None


class RatioMetric(Metric):
    """Add up a numerator and a denominator over the rows."""

    @abstractmethod
    def count(self, prediction: str, references: Sequence[str]) -> RatioParts:
        """Return the numerator and denominator that a row adds to the ratio."""

    def score(self, prediction: str, references: Sequence[str]) -> float:
        return ratio([self.count(prediction, references)])

    def corpus_score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        rows = zip(predictions, references, strict=True)
        return ratio(self.count(prediction, accepted) for prediction, accepted in rows)


class CorpusMetric(Metric):
    """Compute one figure of a whole set. The mean of the rows' scores is another number."""

    @abstractmethod
    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """Return the figure of a set that is not empty."""

    def corpus_score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} rows")
        if not predictions:
            raise ValueError("no rows to score")
        return self.compute(predictions, references)


_M = TypeVar("_M", bound=type[Metric])


def register_metric(name: str, *, label: str, higher_is_better: bool) -> Callable[[_M], _M]:
    """Register a metric class under the name that recipes and ``--metric`` use. label: its name in tables."""

    def register(metric: _M) -> _M:
        metric.name = name
        metric.label = label
        metric.higher_is_better = higher_is_better
        plugins.metrics.register(name, metric(), metric.__module__)
        return metric

    return register


# ROUGE


class _StemmedWords:
    """Cache the stemmed words of rouge_score, since every seed is compared with the same references."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.tokenize = lru_cache(maxsize=8192)(DefaultTokenizer(use_stemmer=True).tokenize)


class _Characters:
    """Split text into lower-case characters without white space, for languages that do not separate words by spaces."""

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text.lower() if not character.isspace()]


@cache
def _rouge_tokenizer(name: str) -> _StemmedWords | _Characters:
    return _Characters() if name == "characters" else _StemmedWords()


@cache
def _rouge_scorer(kind: str, tokenizer: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_rouge_tokenizer(tokenizer))


class Rouge(RatioMetric):
    """Compute the F1 of lower-cased, Porter-stemmed words by `rouge_score`, the best over the references.

    Its words are runs of a-z and 0-9. On text in other scripts it is undefined, and ``eval.rouge_tokenizer: characters``
    compares characters instead. The figure of a set is the mean over rows.
    """

    kind: ClassVar[str]
    alternative = "chrf, or --set eval.rouge_tokenizer=characters"

    def __init__(self, tokenizer: str = "words"):
        self.tokenizer = tokenizer

    def count(self, prediction: str, references: Sequence[str]) -> RatioParts:
        scores = _rouge_scorer(self.kind, self.tokenizer).score_multi(references, prediction)
        return scores[self.kind].fmeasure, 1

    def undefined(self, references: Iterable[str]) -> str | None:
        if self.tokenizer == "characters":
            return None
        characters = [character for text in references for character in text if character.isalnum()]
        if 2 * sum(character.isascii() for character in characters) > len(characters):
            return None
        return "its words are runs of a-z and 0-9, which are rare in these references"


@register_metric("rouge_l", label="ROUGE-L", higher_is_better=True)
class RougeL(Rouge):
    """Compare the longest common subsequence of words."""

    kind = "rougeL"


@register_metric("rouge_1", label="ROUGE-1", higher_is_better=True)
class Rouge1(Rouge):
    """Compare single words."""

    kind = "rouge1"


@register_metric("rouge_2", label="ROUGE-2", higher_is_better=True)
class Rouge2(Rouge):
    """Compare pairs of words."""

    kind = "rouge2"


# sacrebleu


class _SacrebleuMetric(CorpusMetric):
    """Compute a metric of `sacrebleu` with its defaults."""

    @abstractmethod
    def make_scorer(self, *, of_row: bool) -> Any:
        """Return the scorer of sacrebleu, for a whole set or for single rows."""

    @cached_property
    def _corpus_scorer(self) -> Any:
        return self.make_scorer(of_row=False)

    @cached_property
    def _row_scorer(self) -> Any:
        return self.make_scorer(of_row=True)

    @cached_property
    def signature(self) -> str:  # type: ignore[override]  # computed when it is first read; others assign it
        scorer = self.make_scorer(of_row=False)
        scorer.num_refs = "var"  # the signature counts references, and rows may have different numbers of them
        return str(scorer.get_signature())

    def score(self, prediction: str, references: Sequence[str]) -> float:
        return self._row_scorer.sentence_score(prediction, references).score

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        count = max(len(accepted) for accepted in references)
        reference_streams = [
            [accepted[i] if i < len(accepted) else None for accepted in references] for i in range(count)
        ]
        return self._corpus_scorer.corpus_score(predictions, reference_streams).score


@register_metric("bleu", label="BLEU", higher_is_better=True)
class Bleu(_SacrebleuMetric):
    """Count words by the 13a rules, n-grams to 4, case included.

    A row is scored by the n-grams that it is long enough for.
    """

    def make_scorer(self, *, of_row: bool) -> Any:
        from sacrebleu.metrics import BLEU

        return BLEU(effective_order=of_row)


@register_metric("chrf", label="chrF", higher_is_better=True)
class ChrF(_SacrebleuMetric):
    """Count characters, n-grams to 6 (chrF2)."""

    def make_scorer(self, *, of_row: bool) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF()


# Exact match, error rate, final number


@register_metric("exact_match", label="exact match", higher_is_better=True)
class ExactMatch(RatioMetric):
    """Compare character for character, ignoring white space at the ends.

    A set's figure is the share of rows that match.
    """

    def count(self, prediction: str, references: Sequence[str]) -> RatioParts:
        return prediction.strip() in {reference.strip() for reference in references}, 1


@register_metric("error_rate", label="error rate", higher_is_better=False)
class ErrorRate(RatioMetric):
    """Count Levenshtein edits between space-separated tokens, per token of the reference.

    A row uses the reference with the lowest rate, the first if several are equal. The figure of a set is the number of
    edits divided by the number of these tokens, not a mean of rates. With phonemes as tokens it is the phoneme error
    rate.
    """

    def count(self, prediction: str, references: Sequence[str]) -> RatioParts:
        from rapidfuzz.distance import Levenshtein

        tokens = prediction.split()
        accepted = [reference.split() for reference in references]
        # An empty reference counts as one token, so that its rate is defined.
        counts = [
            (Levenshtein.distance(tokens, reference_tokens), max(len(reference_tokens), 1))
            for reference_tokens in accepted
        ]
        return min(counts, key=lambda count: count[0] / count[1])


# "$1,234.50", "-7" and "2.5e-3"; in "5-3" and "1,2,3" the last 3; not the full stop at the end of a sentence.
_NUMBER = re.compile(
    r"(?<!\w)(?<!\d\.)[-−]?\$?[-−]?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)(?:[eE][-−+]?\d{1,4}(?!\w))?"
)


def final_number(text: str) -> Decimal | None:
    """Return the first number after the last ``####``, where GSM8K writes its answers, else the last number in the text.

    ``1e5`` is 100000. Dollar signs and commas before three digits are ignored. Other commas separate numbers. None
    without a number.
    """
    _, has_marker, answer = text.rpartition("####")
    found = _NUMBER.findall(answer if has_marker else text)
    if not found:
        return None
    return Decimal(re.sub(r"[$,]", "", found[0 if has_marker else -1]).replace("−", "-"))


@register_metric("final_number", label="final number", higher_is_better=True)
class FinalNumber(RatioMetric):
    """Compare the last number with the reference's as numbers: 18 is 18.00. GSM8K's measure."""

    def count(self, prediction: str, references: Sequence[str]) -> RatioParts:
        number = final_number(prediction)
        return number is not None and number in {final_number(reference) for reference in references}, 1

    def undefined(self, references: Iterable[str]) -> str | None:
        return None if any(final_number(text) is not None for text in references) else "no reference contains a number"


# Access by name


def get_metric(name: str, rouge_tokenizer: str = "words") -> Metric:
    """Return a metric by name, ROUGE on words or on characters."""
    metric = plugins.metrics[name]
    return type(metric)(rouge_tokenizer) if isinstance(metric, Rouge) else metric


def undefined_reason(name: str, references: Sequence[Sequence[str]], rouge_tokenizer: str = "words") -> str | None:
    """Return the reason why a metric is undefined on these rows, with an alternative; None if it is defined."""
    metric = get_metric(name, rouge_tokenizer)
    reason = metric.undefined(text for accepted in references for text in accepted)
    return None if reason is None else f"{name} is undefined on these rows: {reason}; use {metric.alternative}"


def ratio(counts: Iterable[RatioParts]) -> float:
    """Return the figure of a set from the counts of its rows. Raises ValueError for an empty set."""
    numerators = 0.0
    denominators = 0.0
    for numerator, denominator in counts:
        numerators += numerator
        denominators += denominator
    if not denominators:
        raise ValueError("no rows to score")
    return 100 * numerators / denominators
