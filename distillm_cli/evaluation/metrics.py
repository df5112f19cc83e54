"""Score responses: ROUGE, BLEU, chrF, exact match, error rate, final number against references; diversity and length.

A metric is a class, registered with its name in recipes, its label in tables, and the direction that is better.

    @register_metric("exact_match", label="exact match", higher_is_better=True)
    class ExactMatch(RatioMetric):
        def count(self, prediction, references):
            return prediction in references, 1

Every metric compares one prediction with all accepted references. A RatioMetric adds up over the rows: the figure of a
set is a ratio of sums. A CorpusMetric is defined on a whole set and is not a mean over rows. All are on a scale of 0 to
100 (an error rate may exceed 100, since insertions count), except for ``length``. Libraries are imported when a metric is
first computed, so that the names are available without them.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from functools import cache, cached_property, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from distillm_cli import plugins

if TYPE_CHECKING:
    import numpy as np

# The numerator and denominator that a row adds to a ratio. The figure of a set is scale · Σ numerators / Σ denominators,
# where the scale is 100 unless the metric has another one.
RatioParts = tuple[float, float]


class Metric(ABC):
    """Compare predictions with references. Subclass RatioMetric or CorpusMetric instead.

    signature: the library's description of how the metric was computed, None if there is none. alternative: the metric
    to use if this one is undefined. higher_is_better: None if neither direction is better. compares: whether it needs
    references. has_pass_at_k: whether a row is right or wrong, so that pass@k over the samples of a row is a figure too.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    higher_is_better: ClassVar[bool | None]
    compares: ClassVar[bool] = True
    has_pass_at_k: ClassVar[bool] = False
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

    def row_sums(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray | None:
        """Return numbers of each row, [rows, K], whose sums over any rows determine the figure of these rows.

        None if the figure is not determined by sums.
        """
        return None

    def figure_of_sums(self, sums_RK: np.ndarray) -> np.ndarray:
        """Return the figures [R] of R sets of rows from the sums of their ``row_sums``."""
        raise NotImplementedError


class RatioMetric(Metric):
    """Add up a numerator and a denominator over the rows. scale: factor of the ratio."""

    scale: ClassVar[float] = 100

    @abstractmethod
    def count(self, prediction: str, references: Sequence[str]) -> RatioParts:
        """Return the numerator and denominator that a row adds to the ratio."""

    def score(self, prediction: str, references: Sequence[str]) -> float:
        return ratio([self.count(prediction, references)], self.scale)

    def corpus_score(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        rows = zip(predictions, references, strict=True)
        return ratio((self.count(prediction, accepted) for prediction, accepted in rows), self.scale)

    def row_sums(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        import numpy as np

        rows = zip(predictions, references, strict=True)
        return np.array([self.count(prediction, accepted) for prediction, accepted in rows], dtype=np.float64)

    def figure_of_sums(self, sums_RK: np.ndarray) -> np.ndarray:
        figures: np.ndarray = self.scale * sums_RK[:, 0] / sums_RK[:, 1]
        return figures


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


def register_metric(name: str, *, label: str, higher_is_better: bool | None) -> Callable[[_M], _M]:
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
        return self._corpus_scorer.corpus_score(predictions, _streams(references)).score

    def row_sums(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        import numpy as np

        # As sacrebleu.significance does for its own paired bootstrap.
        found = self._corpus_scorer._extract_corpus_statistics(predictions, _streams(references))
        return np.array(found, dtype=np.float64)

    def figure_of_sums(self, sums_RK: np.ndarray) -> np.ndarray:
        import numpy as np

        compute = self._corpus_scorer._compute_score_from_stats
        return np.array([compute(sums_K.astype(np.int64).tolist()).score for sums_K in sums_RK])


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """Return the references as sacrebleu takes them: the first of each row, the second of each row, …"""
    count = max(len(accepted) for accepted in references)
    return [[accepted[i] if i < len(accepted) else None for accepted in references] for i in range(count)]


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
    """Compare the last number with the reference's as numbers: 18 is 18.00. GSM8K's measure.

    With several seeds, pass@k is computed over the samples of each row.
    """

    has_pass_at_k = True

    def count(self, prediction: str, references: Sequence[str]) -> RatioParts:
        number = final_number(prediction)
        return number is not None and number in {final_number(reference) for reference in references}, 1

    def undefined(self, references: Iterable[str]) -> str | None:
        return None if any(final_number(text) is not None for text in references) else "no reference contains a number"


def pass_at_k(correct: Sequence[int], samples: int, k: int) -> float:
    """Return 100 · the mean probability that at least one of k samples is correct, out of ``samples`` of each row.

    correct: number of correct samples of each row. The estimator has no bias: 1 − C(n − c, k) / C(n, k) (Chen et al. 2021,
    arXiv 2107.03374).
    """
    total = math.comb(samples, k)
    return 100 * sum(1 - math.comb(samples - c, k) / total for c in correct) / len(correct)


# Diversity and length: words are separated by white space, and references are not used.


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


class _Distinct(CorpusMetric):
    """Compute the share of different n-grams among all n-grams of the responses of a set (Li et al. 2016)."""

    n: ClassVar[int]
    compares = False

    def score(self, prediction: str, references: Sequence[str]) -> float:
        return self.compute([prediction], [references])

    def compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        found = [ngram for text in predictions for ngram in _ngrams(text, self.n)]
        return 100 * len(set(found)) / len(found) if found else 0.0


@register_metric("distinct_1", label="distinct-1", higher_is_better=True)
class Distinct1(_Distinct):
    """Compute the share of different words among all words of a set's responses."""

    n = 1


@register_metric("distinct_2", label="distinct-2", higher_is_better=True)
class Distinct2(_Distinct):
    """Compute the share of different pairs of words among all pairs of a set's responses."""

    n = 2


@register_metric("repetition", label="repetition", higher_is_better=False)
class Repetition(RatioMetric):
    """Compute the share of 4-grams of words that occurred earlier in the response, a mean over rows (seq-rep-4)."""

    compares = False

    def count(self, prediction: str, references: Sequence[str]) -> RatioParts:
        found = _ngrams(prediction, 4)
        return (1 - len(set(found)) / len(found) if found else 0.0), 1


@register_metric("length", label="length", higher_is_better=None)
class Length(RatioMetric):
    """Compute the mean number of words of a response."""

    compares = False
    scale = 1

    def count(self, prediction: str, references: Sequence[str]) -> RatioParts:
        return len(prediction.split()), 1


# Access by name


def get_metric(name: str, rouge_tokenizer: str = "words") -> Metric:
    """Return a metric by name, ROUGE on words or on characters."""
    metric = plugins.metrics[name]
    return type(metric)(rouge_tokenizer) if isinstance(metric, Rouge) else metric


def undefined_reason(name: str, references: Sequence[Sequence[str]], rouge_tokenizer: str = "words") -> str | None:
    """Return the reason why a metric is undefined on these rows, with an alternative; None if it is defined."""
    metric = get_metric(name, rouge_tokenizer)
    package = _missing_package(name)
    if package is not None:
        return f"{name} needs the package {package}, which is not installed; pip install {package}"
    if metric.compares and not all(references):
        missing = sum(not accepted for accepted in references)
        return f"{name} is undefined on these rows: {missing:,} of {len(references):,} have no reference; use length"
    reason = metric.undefined(text for accepted in references for text in accepted)
    return None if reason is None else f"{name} is undefined on these rows: {reason}; use {metric.alternative}"


@cache
def _missing_package(name: str) -> str | None:
    """Return the package that a metric needs and that is not installed, found by scoring one word; None if it works."""
    try:
        plugins.metrics[name].score("a", ["a"])
    except ImportError as error:
        return error.name or str(error)
    except Exception:  # a metric of another package may not take this word
        return None
    return None


def ratio(counts: Iterable[RatioParts], scale: float = 100) -> float:
    """Return the figure of a set from the counts of its rows. Raises ValueError for an empty set."""
    numerators = 0.0
    denominators = 0.0
    for numerator, denominator in counts:
        numerators += numerator
        denominators += denominator
    if not denominators:
        raise ValueError("no rows to score")
    return scale * numerators / denominators
