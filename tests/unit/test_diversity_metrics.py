"""Test metrics without references, pass@k, and sums by row, against independent calculations."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from distillm_cli import plugins
from distillm_cli.config.fields import is_lower_better
from distillm_cli.evaluation.metrics import RatioMetric, pass_at_k, register_metric, undefined_reason
from distillm_cli.plugins import metrics

TEXTS = ["the cat sat on the mat", "a dog", "", "the cat sat on the cat sat on the cat"]
REFERENCES = [("the cat sat on a mat", "cat"), ("a big dog 3",), ("x",), ("the cat sat 4",)]


def test_distinct_counts_ngrams_of_the_whole_set():
    words = [word for text in TEXTS for word in text.split()]
    assert metrics["distinct_1"].corpus_score(TEXTS, REFERENCES) == pytest.approx(100 * len(set(words)) / len(words))
    pairs = [pair for text in TEXTS for pair in zip(text.split(), text.split()[1:], strict=False)]
    assert metrics["distinct_2"].corpus_score(TEXTS, REFERENCES) == pytest.approx(100 * len(set(pairs)) / len(pairs))
    assert metrics["distinct_2"].score("one", []) == 0


def test_repetition_is_the_share_of_repeated_4grams():
    # "the cat sat on the cat sat on the cat" has seven 4-grams, four of them different.
    assert metrics["repetition"].score(TEXTS[3], []) == pytest.approx(100 * 3 / 7)
    assert metrics["repetition"].corpus_score(TEXTS, REFERENCES) == pytest.approx(100 * 3 / 7 / 4)


def test_length_is_in_words_and_has_no_direction():
    assert metrics["length"].corpus_score(TEXTS, REFERENCES) == pytest.approx((6 + 2 + 0 + 10) / 4)
    assert not is_lower_better("length")
    assert is_lower_better("repetition")


@pytest.mark.parametrize("samples", [2, 5])
def test_pass_at_k_matches_all_subsets(samples):
    correct = [0, 1, 2, samples]
    for k in range(1, samples + 1):
        subsets = list(combinations(range(samples), k))
        expected = np.mean([np.mean([any(i < c for i in subset) for subset in subsets]) for c in correct])
        assert pass_at_k(correct, samples, k) == pytest.approx(100 * expected)


@pytest.mark.parametrize("name", [name for name in metrics if not name.startswith("distinct")])
def test_sums_of_rows_determine_the_figure(name):
    metric = metrics[name]
    sums = metric.row_sums(TEXTS, REFERENCES)
    for rows in ([0, 1, 2, 3], [3, 0], [1, 1, 0, 3, 3]):
        expected = metric.corpus_score([TEXTS[i] for i in rows], [REFERENCES[i] for i in rows])
        assert metric.figure_of_sums(sums[rows].sum(0, keepdims=True)) == pytest.approx([expected])


def test_missing_references_leave_metrics_without_them():
    assert "2 of 3 have no reference" in undefined_reason("rouge_l", [("a",), (), ()])
    assert undefined_reason("length", [(), ()]) is None


def test_metric_without_its_library_is_named(monkeypatch):
    class Needy(RatioMetric):
        def count(self, prediction, references):
            import absent_library

            return absent_library.count(prediction), 1

    register = plugins.metrics.register
    monkeypatch.setattr(plugins.metrics, "register", lambda *a: plugins.metrics._entries.update({a[0]: a[1]}))
    register_metric("needy", label="needy", higher_is_better=True)(Needy)
    monkeypatch.setattr(plugins.metrics, "register", register)
    try:
        assert "needs the package absent_library" in undefined_reason("needy", [("a",)])
    finally:
        del plugins.metrics._entries["needy"]
