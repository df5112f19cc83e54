"""Make small runs in this process and in several, and compare their results."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distillm_cli.cli.app import main
from tests.command_line import CLOCK

FEW = (
    "data.size=40", "data.valid_limit=6", "eval.report_rows=0", "train.threads=1", "train.eval_steps=2",
    "train.log_steps=1", "train.batch_size=4", "rollout.max_new_tokens=4", "student.dropout=0", "train.seed=3",
)  # fmt: skip


def distill(output, *fields, method="distillm", steps=3, few=FEW):
    """Return the command of a small run."""
    words = [word for field in (*few, *fields) for word in ("--set", field)]
    run = ["distill", "--recipe", "questions", "--method", method, "--steps", steps, "--output", output]
    return [*run, *words, "--json", "--quiet"]


def run_alone(argv, directory, capsys, monkeypatch):
    """Run a command in this process; return its result."""
    monkeypatch.chdir(directory)
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def run_together(processes, argv, directory, **options):
    """Run a command in ``Processes``; return the result, which the first of them reports alone."""
    first, *others = processes.run(argv, directory=directory, **options)
    assert first.code == 0, first.err
    assert [(o.code, o.out, o.err) for o in others] == [(0, "", "")] * len(others), "only the first process reports"
    return json.loads(first.out)


def metrics(directory):
    """Return the lines of an output directory's metrics."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one, two, tolerance=1e-5, weights=1e-4):
    """Check that two output directories have the same metrics and weights, but for the rounding of sums.

    Lines are compared by step: a sharded run measures the student before its first step, others later.
    """
    in_order = [sorted(metrics(d), key=lambda line: (line["step"], "valid_loss" in line)) for d in (one, two)]
    for left, right in zip(*in_order, strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - set(CLOCK):
            expected = left[key]
            if isinstance(expected, float):
                allowed = max(1e-3, tolerance) if tolerance and key == "grad_norm" else tolerance
                expected = pytest.approx(expected, rel=allowed, abs=allowed)
            assert right[key] == expected, (key, left, right)
    assert_same_weights(one, two, weights)


def assert_same_weights(one, two, tolerance):
    """Check that the models of two output directories have the same weights, but for the rounding of sums."""
    left, right = (load_file(directory / "model.safetensors") for directory in (one, two))
    assert left.keys() == right.keys()
    for name, weight in left.items():
        torch.testing.assert_close(right[name], weight, rtol=0, atol=tolerance)
