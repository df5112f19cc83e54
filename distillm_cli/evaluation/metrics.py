"""How good an answer is, on well-kept libraries: ROUGE, BLEU, chrF, exact match, error rate, a final number (METHODS D).

Every metric compares one prediction with all accepted references. Most keep the best and add up: a set's figure is a ratio
of sums over its rows. BLEU and chrF are figures of a whole set, no mean over rows. All are on a scale of 0 to 100 (an error
rate may pass 100: insertions count).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache, lru_cache, partial

from rapidfuzz.distance import Levenshtein
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric as SacreMetric


class _StemmedWords(DefaultTokenizer):
    """rouge_score's own words and stems, remembered: each seed meets the same references again."""

    def __init__(self):
        super().__init__(use_stemmer=True)
        self._remembered = lru_cache(maxsize=8192)(super().tokenize)

    def tokenize(self, text: str) -> list[str]:
        return self._remembered(text)


class _Characters(Tokenizer):
    """Make a lower-case token of every character but white space, for text that does not separate words by spaces."""

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text.lower() if not character.isspace()]


@cache
def _tokenizer(name: str) -> Tokenizer:
    return _Characters() if name == "characters" else _StemmedWords()


@cache
def _scorer(kind: str, tokenizer: str) -> RougeScorer:
    return RougeScorer([kind], tokenizer=_tokenizer(tokenizer))


# A metric counts (points, of) for a row; a row's score is 100 · points / of, a set's 100 · Σ points / Σ of.
Count = tuple[float, float]


def _rouge(prediction: str, references: Sequence[str], *, kind: str, tokenizer: str = "words") -> Count:
    return _scorer(kind, tokenizer).score_multi(references, prediction)[kind].fmeasure, 1


def _no_words(references: Iterable[str]) -> str | None:
    """Return why ROUGE is undefined on these references: most of their letters are not a-z, the only ones in its words."""
    letters = [character for text in references for character in text if character.isalnum()]
    if 2 * sum(character.isascii() for character in letters) > len(letters):
        return None
    return "its words are runs of a-z and 0-9, which these references hardly have"


def _exact_match(prediction: str, references: Sequence[str]) -> Count:
    return prediction.strip() in {reference.strip() for reference in references}, 1


def _error_rate(prediction: str, references: Sequence[str]) -> Count:
    said = prediction.split()
    wanted = [reference.split() for reference in references]
    # An empty reference counts as one token, so that its rate is defined.
    counts = [(Levenshtein.distance(said, tokens), max(len(tokens), 1)) for tokens in wanted]
    return min(counts, key=lambda count: count[0] / count[1])


# "$1,234.50", "-7" and "2.5e-3", but of "5-3" and of "1,2,3" the 3; not the full stop that ends a sentence.
_NUMBER = re.compile(
    r"(?<!\w)(?<!\d\.)[-−]?\$?[-−]?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)(?:[eE][-−+]?\d{1,4}(?!\w))?"
)


def final_number(text: str) -> Decimal | None:
    """Return the first number after the last ``####``, where GSM8K writes its answers, else the last number in the text.

    ``1e5`` is 100000. Dollar signs and commas before three digits are no part of a number; other commas stand between
    numbers. None where there is no number.
    """
    _, marked, answer = text.rpartition("####")
    found = _NUMBER.findall(answer if marked else text)
    if not found:
        return None
    return Decimal(re.sub(r"[$,]", "", found[0 if marked else -1]).replace("−", "-"))


def _final_number(prediction: str, references: Sequence[str]) -> Count:
    said = final_number(prediction)
    return said is not None and said in {final_number(reference) for reference in references}, 1


def _no_numbers(references: Iterable[str]) -> str | None:
    """Return why the final number is undefined on these references: none of them has a number."""
    return None if any(final_number(text) is not None for text in references) else "no reference holds a number"


def _corpus(scorer: SacreMetric, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """A figure of sacrebleu for a whole set; its rows may have different numbers of references."""
    most = max(len(wanted) for wanted in references)
    streams = [[wanted[i] if i < len(wanted) else None for wanted in references] for i in range(most)]
    return scorer.corpus_score(predictions, streams).score


def _sentence(scorer: SacreMetric, prediction: str, references: Sequence[str]) -> float:
    return scorer.sentence_score(prediction, references).score


@dataclass(frozen=True)
class Metric:
    """Describe a metric: its name in recipes and tables, how it is computed, and which way is better.

    count: what one row adds to a ratio. Where there is none, ``whole`` is the figure of a set and ``single`` that of one
    row, which is for reading: their mean is not the set's figure. signature: in sacrebleu's words how it was computed.
    undefined: why the metric is undefined on a set's references, for any predictions; None where it is defined.
    """

    name: str
    label: str
    count: Callable[[str, Sequence[str]], Count] | None = None
    higher_is_better: bool = True
    whole: Callable[[Sequence[str], Sequence[Sequence[str]]], float] | None = None
    single: Callable[[str, Sequence[str]], float] | None = None
    signature: str | None = None
    undefined: Callable[[Iterable[str]], str | None] = lambda references: None

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """One prediction against its references, ×100."""
        return ratio([self.count(prediction, references)]) if self.count else self.single(prediction, references)

    def figure(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        """A set of predictions against their references, ×100. Raises ValueError for an empty set."""
        if self.count is not None:
            return ratio(self.count(said, wanted) for said, wanted in zip(predictions, references, strict=True))
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} rows")
        if not predictions:
            raise ValueError("no rows to score")
        return self.whole(predictions, references)


def _of_sacrebleu(name: str, label: str, whole: SacreMetric, single: SacreMetric) -> Metric:
    # The signature counts references, which are as many as each row has; the rest is known before anything is scored.
    whole.num_refs = "var"
    signature = str(whole.get_signature())
    return Metric(name, label, whole=partial(_corpus, whole), single=partial(_sentence, single), signature=signature)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        # F1 of lower-cased, Porter-stemmed words, by `rouge_score`: the longest common subsequence, single words, pairs.
        # Its words are runs of a-z and 0-9: on text in other scripts it is undefined, and `eval.rouge_tokenizer: characters`
        # takes characters instead. A set's figure is the mean over rows.
        Metric("rouge_l", "ROUGE-L", partial(_rouge, kind="rougeL"), undefined=_no_words),
        Metric("rouge_1", "ROUGE-1", partial(_rouge, kind="rouge1"), undefined=_no_words),
        Metric("rouge_2", "ROUGE-2", partial(_rouge, kind="rouge2"), undefined=_no_words),
        # By `sacrebleu` with its defaults. BLEU: words by the 13a rules, n-grams to 4, case counts; a row's own figure is
        # over the n-grams it is long enough for. chrF2: characters, n-grams to 6.
        _of_sacrebleu("bleu", "BLEU", BLEU(), BLEU(effective_order=True)),
        _of_sacrebleu("chrf", "chrF", CHRF(), CHRF()),
        # Character for character, white space at the ends aside. A set's figure is the share of rows that match.
        Metric("exact_match", "exact match", _exact_match),
        # Levenshtein edits between space-separated tokens per token of the reference, for the reference where that is
        # lowest (the first of equals). A set's figure is all edits over all those tokens, not a mean of rates; with
        # phonemes as tokens it is the phoneme error rate.
        Metric("error_rate", "error rate", _error_rate, higher_is_better=False),
        # The share of rows whose last number is the reference's (the one after ####, where there is that mark), as numbers:
        # 18 is 18.00. GSM8K's measure.
        Metric("final_number", "final number", _final_number, undefined=_no_numbers),
    )
}


def metric_of(name: str, rouge_tokenizer: str = "words") -> Metric:
    """Return a metric by name, ROUGE on words or on characters."""
    metric = METRICS[name]
    if metric.undefined is not _no_words or rouge_tokenizer == "words":
        return metric
    count = partial(metric.count, tokenizer=rouge_tokenizer)
    return replace(metric, count=count, undefined=lambda references: None)


def undefined_on(name: str, references: Sequence[Sequence[str]], rouge_tokenizer: str = "words") -> str | None:
    """Return why a metric is undefined on these rows, and what to use instead; None where it is defined."""
    why = metric_of(name, rouge_tokenizer).undefined(text for wanted in references for text in wanted)
    if why is None:
        return None
    instead = (
        "chrf, or --set eval.rouge_tokenizer=characters" if METRICS[name].undefined is _no_words else "exact_match"
    )
    return f"{name} is undefined on these rows: {why}; use {instead}"


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
    return METRICS[name].figure(predictions, references)
