"""Models that suppress tokens with a bias of −inf, from the command line."""

import json
import math

import pytest
from transformers import AutoModelForCausalLM

from distillm_cli.errors import NonFiniteError
from tests import tiny

ROWS = [{"instruction": "Say it.", "input": a + b, "output": b + a} for a in "bcdefghk" for b in "lmnop"]


@pytest.fixture
def models(tmp_path):
    """Return a function that saves a model whose head never gives certain tokens."""

    def make(name, *suppressed):
        place = tmp_path / name
        tiny.save(place, "phi", max_position_embeddings=128, spread=0.5, seed=len(name))
        model = AutoModelForCausalLM.from_pretrained(place)
        model.lm_head.bias.data[list(suppressed)] = -math.inf
        model.save_pretrained(place)
        return place

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return make


def distill(typed, divergence, teacher, student):
    return typed(
        "distill", "--method", "kd", "--teacher", teacher, "--student", student, "--data", "rows.jsonl", "--json",
        "--output", f"runs/{divergence}", "--steps", "3", "--dtype", "fp32", "--batch-size", "4",
        "--set", f"objective.divergence={divergence}", "--set", "data.template=plain", "--set", "eval.report_rows=2",
        "--set", "eval.max_new_tokens=4",
    )  # fmt: skip


@pytest.mark.parametrize("divergence", ["kl", "rkl", "jeffreys", "akl", "ab", "taid", "atkd", "amid"])
def test_a_pair_that_suppresses_the_same_token_trains(typed, models, divergence):
    code, told, err = distill(typed, divergence, models("teacher", 40), models("student", 40))
    assert code == 0, err
    assert math.isfinite(told["train_loss"])
    assert "slower" not in err, "a head that suppresses tokens is still a plain one"


def test_an_infinite_divergence_names_its_cause(typed, models):
    teacher, student = models("teacher", 40), models("student")
    code, told, _ = distill(typed, "rkl", teacher, student)
    assert code == NonFiniteError.exit_code
    assert "probability 0 (a logit of −inf)" in told["message"]
    assert "skl" in told["message"]
    code, told, err = distill(typed, "skl", teacher, student)
    assert code == 0, err
    assert math.isfinite(told["train_loss"])
