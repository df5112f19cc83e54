"""Test metrics that are undefined for some references."""

from __future__ import annotations

import pytest

from distillm_cli.evaluation.metrics import get_metric, undefined_reason

CHINESE = [["红色"], ["iPhone 手机 很好"], ["今天天气不错。"]]


def test_rouge_is_undefined_without_latin_words():
    for name in ("rouge_l", "rouge_1", "rouge_2"):
        assert "chrf" in undefined_reason(name, CHINESE)
        assert undefined_reason(name, [["…"], ["?!"]]) is not None
        assert undefined_reason(name, CHINESE, "characters") is None
        assert undefined_reason(name, [["Grüße aus Köln"], ["红"]]) is None
    assert undefined_reason("chrf", CHINESE) is None
    assert undefined_reason("final_number", CHINESE) is not None
    assert undefined_reason("final_number", [["no"], ["#### 4"]]) is None


def test_rouge_on_characters_matches_hand_calculation():
    count = get_metric("rouge_l", "characters").count
    # Longest common subsequence 天气好 of 4 and 5 characters: precision 3/4, recall 3/5.
    points, _ = count("天气 真好", ["今天天气好"])
    assert points == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert count("Same text", ["same TEXT"])[0] == 1
    assert get_metric("rouge_l").count("天气真好", ["天气真好"])[0] == 0
