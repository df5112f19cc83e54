"""Test each metric against an independent calculation, on small examples and real references."""

from __future__ import annotations

import json
import math
from collections import Counter
from decimal import Decimal

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from distillm_cli.config import schema
from distillm_cli.evaluation.metrics import final_number, ratio
from distillm_cli.plugins import metrics
from tests.scores import corpus

rouge_l, exact_match, error_rate = (metrics[name].score for name in ("rouge_l", "exact_match", "error_rate"))


def read(path, count):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def distance(a: list[str], b: list[str]) -> int:
    """Return the Levenshtein distance (Wagner and Fischer)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[:], i
        for j, y in enumerate(b, 1):
            row[j] = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y))
    return row[-1]


def test_every_metric_name_of_the_schema_exists():
    assert set(metrics) == set(schema.MetricName.__args__)


def test_rouge_l_matches_hand_calculation():
    # "the cat sat" and "the cat is sitting" have the common subsequence "the cat": P 2/3, R 2/4, F1 = 4/7.
    assert rouge_l("The cat sat.", ["the cat is sitting"]) == pytest.approx(100 * 4 / 7)
    assert rouge_l("running dogs", ["run dog"]) == pytest.approx(100), "stems are compared, not words"
    assert rouge_l("run", ["running away", "run", "x"]) == pytest.approx(100), "the best reference is used"
    assert rouge_l("", ["something"]) == 0
    assert rouge_l("…", ["…"]) == 0, "no letters or digits to compare"


def test_rouge_l_matches_rouge_score_on_dolly(shared_data):
    plain = RougeScorer(["rougeL"], use_stemmer=True)
    rows = read(shared_data / "dolly" / "valid.jsonl", 40)
    predictions = [rows[(i * 7 + 1) % 40]["output"] for i in range(40)]
    references = [[row["output"]] for row in rows]
    single = [
        100 * plain.score(refs[0], guess)["rougeL"].fmeasure
        for guess, refs in zip(predictions, references, strict=True)
    ]
    assert corpus("rouge_l", predictions, references) == pytest.approx(sum(single) / 40)
    assert corpus("rouge_l", [refs[0] for refs in references], references) == pytest.approx(100)


def test_best_of_several_references_is_used(shared_data):
    rows = [row for row in read(shared_data / "sinst" / "valid.jsonl", 1694) if len(row["output"]) > 1][:20]
    assert rows, "the data set has rows with several references"
    plain = RougeScorer(["rougeL"], use_stemmer=True)
    for row in rows:
        row_scores = [100 * plain.score(reference, row["input"])["rougeL"].fmeasure for reference in row["output"]]
        assert rouge_l(row["input"], row["output"]) == pytest.approx(max(row_scores))
        assert exact_match(row["output"][-1], row["output"]) == 100
        assert error_rate(row["output"][-1], row["output"]) == 0


def test_rouge_1_and_2_match_hand_calculation_and_library(shared_data):
    # "the cat sat" and "the cat is sitting" share 2 of 3 and 4 words, and 1 of 2 and 3 bigrams.
    assert metrics["rouge_1"].score("The cat sat.", ["the cat is sitting"]) == pytest.approx(100 * 4 / 7)
    assert metrics["rouge_2"].score("The cat sat.", ["the cat is sitting"]) == pytest.approx(100 * 2 / 5)
    plain = RougeScorer(["rouge1", "rouge2"], use_stemmer=True)
    rows = read(shared_data / "dolly" / "valid.jsonl", 20)
    predictions, references = [rows[(i * 7 + 1) % 20]["output"] for i in range(20)], [[row["output"]] for row in rows]
    for name in ("rouge1", "rouge2"):
        single = [100 * plain.score(w[0], g)[name].fmeasure for g, w in zip(predictions, references, strict=True)]
        assert corpus(f"rouge_{name[-1]}", predictions, references) == pytest.approx(sum(single) / 20)


def expected_bleu(predictions: list[str], references: list[list[str]]) -> float:
    """Return BLEU by Papineni et al. (2002) for words separated by spaces, if n-grams of every order match."""
    prediction_length = closest_length = 0
    matched, total = [0] * 4, [0] * 4
    for prediction, row_references in zip(predictions, references, strict=True):
        words, others = prediction.split(), [reference.split() for reference in row_references]
        prediction_length += len(words)
        closest_length += min((len(w) for w in others), key=lambda n: (abs(n - len(words)), n))
        for n in range(1, 5):
            grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            limits = [Counter(tuple(w[i : i + n]) for i in range(len(w) - n + 1)) for w in others]
            matched[n - 1] += sum(min(k, max(limit[g] for limit in limits)) for g, k in grams.items())
            total[n - 1] += sum(grams.values())
    precision = math.exp(sum(math.log(m / t) for m, t in zip(matched, total, strict=True)) / 4)
    return 100 * precision * min(1.0, math.exp(1 - closest_length / prediction_length))


def test_bleu_is_a_corpus_score():
    predictions = ["the cat sat on the mat", "a b c d", "he went to the old town by train", "so it is said then"]
    references = [["the cat sat on a mat", "on the mat the cat sat"], ["a b c d e f"], ["he went to the town by train"]]
    # rows have different numbers of references
    references.append(["so it is said", "then so it is said", "it was said"])
    expected = expected_bleu(predictions, references)
    assert corpus("bleu", predictions, references) == pytest.approx(expected)
    rows = [metrics["bleu"].score(p, r) for p, r in zip(predictions, references, strict=True)]
    assert abs(sum(rows) / 4 - expected) > 0.5
    assert metrics["bleu"].score("short", ["short"]) == pytest.approx(100), "a row uses the n-gram orders that it has"
    assert "tok:13a|smooth:exp" in metrics["bleu"].signature


def test_chrf_matches_sacrebleu_with_the_best_reference():
    predictions, references = ["der Hund", "ein Haus am See"], [["der Hunde", "die Hunde"], ["das Haus am Meer"]]
    plain = sacrebleu.corpus_chrf(predictions, [[r[0] for r in references]]).score
    assert corpus("chrf", predictions, references) == pytest.approx(plain)
    assert corpus("chrf", predictions, [r[::-1] for r in references]) == pytest.approx(plain), (
        "the closer reference is used"
    )
    assert corpus("chrf", ["日本語"], [["日本語"]]) == pytest.approx(100), "any script"
    assert "nc:6|nw:0" in metrics["chrf"].signature


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("48 / 2 = 24, so 48 + 24 = 72.\n#### 72", "72"),
        ("#### 5 is wrong\n#### $1,234.50", "1234.5"),
        ("#### 18 dollars and 20 cents", "18"),
        ("The total is $3,000.", "3000"),
        ("-5 or -$7", "-7"),
        ("from 5-3", "3"),
        ("1,2,3", "3"),
        ("#### 1,2,3", "1"),
        ("#### 1,234", "1234"),
        ("$12,345,678.90 in all", "12345678.9"),
        ("either 1,234,5", "5"),
        ("#### $3,5", "3"),
        ("at most 1,2345", "2345"),
        ("about .5", "0.5"),
        ("x−4 = −4", "-4"),
        ("It is **42**.", "42"),
        ("model v2 of GPT4", None),
        ("no number", None),
        ("#### none", None),
    ],
)
def test_final_number_of_a_text(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_answers_are_compared_as_numbers(shared_data):
    rows = read(shared_data / "gsm8k" / "test.jsonl", 1319)
    references = [[row["answer"]] for row in rows]
    assert all(final_number(answer) is not None for (answer,) in references)
    written = [row["answer"].rpartition("####")[2].strip() for row in rows]
    assert corpus("final_number", [f"So the answer is {text}." for text in written], references) == 100
    assert corpus("final_number", ["I do not know"] * len(rows), references) == 0
    score = metrics["final_number"].score
    assert (score("It costs $18.00", ["... #### 18"]), score("18 or 19", ["#### 18"])) == (100, 0)
    assert score("nothing", ["nothing"]) == 0, "no number is no match"


def test_exact_match_ignores_only_surrounding_space():
    assert exact_match("  42\n", ["41", "42 "]) == 100
    assert exact_match("Yes", ["yes"]) == 0
    assert exact_match("a  b", ["a b"]) == 0
    assert corpus("exact_match", ["1", "2", "3", "4"], [["1"], ["x", "2"], [" 3"], ["5"]]) == 75


def test_phoneme_error_rate_on_real_words(shared_data):
    rows = read(shared_data / "g2p" / "test.jsonl", 200)
    references = [row["output"] for row in rows]
    assert corpus("error_rate", [refs[0] for refs in references], references) == 0
    # Without its first phoneme a word has one deletion for each reference.
    assert corpus(
        "error_rate", [refs[0].split(" ", 1)[-1] for refs in references[:1]], references[:1]
    ) == pytest.approx(100 / 6)


def test_error_rate_is_edits_divided_by_tokens():
    predictions, references = ["A B C", "X"], [["A B D E"], ["Y"]]
    counts = [metrics["error_rate"].count(p, r) for p, r in zip(predictions, references, strict=True)]
    assert counts == [(2, 4), (1, 1)]
    assert corpus("error_rate", predictions, references) == pytest.approx(100 * 3 / 5)
    assert error_rate("A B C D", ["Z"]) == 400, "insertions count, so the rate can exceed 100"
    assert error_rate("", [""]) == 0
    assert metrics["error_rate"].count("A B C", ["A B C D E F", "X B C"]) == (1, 3), "the lowest rate is chosen"


words = st.lists(st.sampled_from("ABCD"), max_size=8)


@settings(max_examples=100, deadline=None)
@given(words, st.lists(words.filter(len), min_size=1, max_size=3))
def test_error_rate_matches_edit_distance(prediction, references):
    rate = min(100 * distance(prediction, reference) / len(reference) for reference in references)
    assert error_rate(" ".join(prediction), [" ".join(reference) for reference in references]) == pytest.approx(rate)


def test_empty_or_mismatched_inputs_are_rejected():
    with pytest.raises(ValueError, match="no rows"):
        corpus("rouge_l", [], [])
    with pytest.raises(ValueError, match="no rows"):
        ratio([])
    with pytest.raises(ValueError, match="shorter"):
        corpus("rouge_l", ["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="no rows"):
        corpus("bleu", [], [])
    with pytest.raises(ValueError, match="2 predictions for 1"):
        corpus("chrf", ["a", "b"], [["a"]])


def test_metric_directions():
    assert metrics["rouge_l"].higher_is_better
    assert not metrics["error_rate"].higher_is_better


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e5", "100000"),
        ("about 1E5.", "100000"),
        ("it is -2.5e-3", "-0.0025"),
        ("−3e+2 dollars", "-300"),
        ("$1.5e6", "1500000"),
        ("#### 6.02e23", "602e21"),
        ("1,000e3", "1000000"),
        ("3e", "3"),
        ("7e5x", "7"),
        ("2e", "2"),
    ],
)
def test_scientific_notation_is_one_number(text, number):
    assert final_number(text) == Decimal(number)
    assert metrics["final_number"].score(text, [number]) == 100
