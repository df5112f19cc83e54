"""Test which rows of a suite are found in training rows."""

from __future__ import annotations

from distillm_cli.data.sources import Row
from distillm_cli.evaluation.leakage import find_leakage

SENTENCE = "one two three four five six seven eight nine ten eleven twelve thirteen"


def row(prompt, *references):
    return Row(instruction=prompt, references=references or ("answer",), where=prompt)


def test_same_prompts_and_rows_are_counted():
    suite = [row("Say A!", "x"), row("say b", "y"), row("say c", "z")]
    found = find_leakage(suite, [row("say a", "X."), row("say  b", "other"), row("say d", "z"), row("say a", "x")])
    assert (found.same_prompts, found.same_rows, found.ngram_rows) == ({0, 1}, {0}, set())
    assert (found.train_rows, found.clean) == (4, [2])


def test_thirteen_words_in_a_row_are_found_anywhere():
    suite = [
        row("Read this. " + SENTENCE, "z"),
        row("Write.", SENTENCE.upper()),
        row(SENTENCE.replace("six", "6"), "z"),
    ]
    found = find_leakage(suite, [row("Repeat", "well " + SENTENCE + " fourteen")])
    assert found.ngram_rows == {0, 1}
    assert find_leakage(suite, [row("Repeat", SENTENCE.removesuffix(" thirteen"))]).ngram_rows == set()


def test_ngrams_span_prompt_and_response():
    words = SENTENCE.split()
    suite = [row(" ".join(words[:6]), " ".join(words[6:]))]
    assert find_leakage(suite, [row("x", SENTENCE)]).ngram_rows == {0}


def test_text_of_a_template_does_not_count():
    suite = [row(f"{SENTENCE} {i}") for i in range(5)]
    assert find_leakage(suite, [row(f"{SENTENCE} 99")]).ngram_rows == set()
    assert find_leakage(suite[:2], [row(f"{SENTENCE} 99")]).ngram_rows == {0, 1}


def test_messages_and_exact_prompts_are_read():
    messages = [{"role": "user", "content": SENTENCE}]
    suite = [Row(messages=messages, references=("x",)), Row(prompt=SENTENCE, references=("x",))]
    assert find_leakage(suite, [row(SENTENCE, "x")]).same_rows == {0, 1}
