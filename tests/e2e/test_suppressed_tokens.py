"""Test models that suppress tokens with a bias of −inf."""

import json
import math

import pytest
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.command_line import assert_error
from tests.marks import long

ROWS = [{"instruction": "Say it.", "input": a + b, "output": b + a} for a in "bcdefghk" for b in "lmnop"]


@pytest.fixture
def save_model(tmp_path):
    """Return a function that saves a model whose head suppresses tokens."""

    def save(name, *suppressed):
        directory = tmp_path / name
        tiny.save(directory, "phi", max_position_embeddings=128, spread=0.5, seed=len(name))
        model = AutoModelForCausalLM.from_pretrained(directory)
        model.lm_head.bias.data[list(suppressed)] = -math.inf
        model.save_pretrained(directory)
        return directory

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return save


def distill(cli, divergence, teacher, student):
    return cli(
        "distill", "--method", "kd", "--teacher", teacher, "--student", student, "--data", "rows.jsonl", "--json",
        "--output", f"runs/{divergence}", "--steps", "3", "--dtype", "fp32", "--batch-size", "4",
        "--set", f"objective.divergence={divergence}", "--set", "data.template=plain", "--set", "eval.report_rows=2",
        "--set", "eval.max_new_tokens=4",
    )  # fmt: skip


@pytest.mark.parametrize(
    "divergence", ["kl", "taid", *(long(name) for name in ("rkl", "jeffreys", "akl", "ab", "atkd", "amid"))]
)
def test_pair_that_suppresses_the_same_token_trains(cli, save_model, divergence):
    code, result, err = distill(cli, divergence, save_model("teacher", 40), save_model("student", 40))
    assert code == 0, err
    assert math.isfinite(result["train_loss"])
    assert "slower" not in err, "the fast loss supports the bias"


def test_infinite_divergence_is_an_error(cli, save_model):
    teacher, student = save_model("teacher", 40), save_model("student")
    assert_error(distill(cli, "rkl", teacher, student), "numbers.infinite_loss", "skl")
    code, result, err = distill(cli, "skl", teacher, student)
    assert code == 0, err
    assert math.isfinite(result["train_loss"])
