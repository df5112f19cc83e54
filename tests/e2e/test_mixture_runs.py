"""Test runs on a mixture of three real sources: interrupted and resumed, planned, and evaluated."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distillm_cli.training.trainer import Trainer
from tests.command_line import assert_error, untimed

SOURCES = (
    "[{source: g2p, weight: 2, limit: 200, template: plain}, {source: banking77, weight: 1, limit: 120}, "
    "{source: dolly, weight: 1, limit: 200, template: plain}]"
)
SMALL = [
    "--teacher", "builtin", "--student", "random:1x32", "--batch-size", "4", "--set", f"data.sources={SOURCES}",
    "--set", "data.valid_limit=12", "--set", "rollout.max_new_tokens=4", "--set", "eval.report_rows=0", "--lr", "1e-3",
    "--set", "train.threads=1", "--set", "train.log_steps=1", "--json",
]  # fmt: skip


@pytest.fixture(autouse=True)
def named(shared_data, monkeypatch):
    monkeypatch.setenv("DISTILLM_DATA", str(shared_data))


def interrupt_at(step, monkeypatch):
    """Send SIGTERM within a step."""
    begin_step = Trainer._begin_step

    def interrupt(self, *args):
        if self.state.step == step:
            signal.raise_signal(signal.SIGTERM)
        return begin_step(self, *args)

    monkeypatch.setattr(Trainer, "_begin_step", interrupt)


def assert_same_run(one, other):
    weights = [load_file(f"{directory}/model.safetensors") for directory in (one, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert lines(one) == lines(other)


def lines(directory):
    found = [json.loads(line) for line in Path(directory, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [untimed(line) for line in found]


def test_resumed_run_is_the_uninterrupted_one(cli, monkeypatch):
    argv = ["distill", *SMALL, "--steps", "6", "--method", "distillm", "--set", "schedule.phi=0.5"]
    code, _, err = cli(*argv, "--output", "full")
    assert code == 0, err
    assert "an epoch has" in err
    with monkeypatch.context() as patched:
        interrupt_at(3, patched)
        assert cli(*argv, "--output", "resumed")[0] == 143
    code, result, err = cli(*argv, "--output", "resumed", "--resume")
    assert (code, result["steps"]) == (0, 6), err
    assert_same_run("full", "resumed")
    assert [(s["source"], s["share"]) for s in result["mixture"]] == [
        ("g2p", 0.5),
        ("banking77", 0.25),
        ("dolly", 0.25),
    ]
    other = [word.replace("weight: 2", "weight: 3") for word in argv]
    assert_error(cli(*other, "--output", "resumed", "--resume"), "checkpoint.changed", "data.sources")
    argv = [
        "eval",
        "resumed",
        "--set",
        "eval.limit=6",
        "--greedy",
        "--max-new-tokens",
        "2",
        "--skip-bad-rows",
        "--json",
    ]
    code, result, err = cli(*argv)
    assert code == 0, err
    assert "template: exact (unchanged prompts), plain" in err, "each source has its own template here too"


def test_plan_shows_shares(cli):
    code, plan, err = cli("plan", *SMALL, "--steps", "6")
    assert code == 0, err
    sources = plan["data"]["sources"]
    assert [(s["source"], s["share"]) for s in sources] == [("g2p", 0.5), ("banking77", 0.25), ("dolly", 0.25)]
    assert sum(s["rows"] for s in sources) == plan["data"]["kept"]
    assert sum(s["rows_per_epoch"] for s in sources) == plan["steps_per_epoch"] * 4
