"""Run command lines with ``--json`` in this process, and check the errors that they report."""

from __future__ import annotations

import json
import re

from distillm_cli.cli.app import main
from distillm_cli.cli.options import collect_field_flags
from distillm_cli.config.methods import METHODS

# The exit code of each area of error codes (the part before the dot).
EXIT_CODES = {
    "unexpected": 1,
    "usage": 2,
    "recipe": 2,
    "data": 3,
    "model": 4,
    "checkpoint": 5,
    "numbers": 6,
    "memory": 7,
    "storage": 8,
    "process": 9,
    "server": 10,
    "alarm": 11,
}

# Keys of a line of metrics.jsonl that depend on the clock.
CLOCK = ("seconds", "train_tokens_per_second", "sampling_tokens_per_second")


def untimed(line: dict) -> dict:
    """Return a line of metrics.jsonl without the figures that depend on the clock."""
    return {key: value for key, value in line.items() if key not in CLOCK}


def exit_code(code: str) -> int:
    """Return the exit code of an error code."""
    return EXIT_CODES[code.partition(".")[0]]


def flags(verb="distill", **given):
    """Return the flags of a command by parameter name, as ``resolve`` takes them."""
    return collect_field_flags(verb, given)


def call(capsys, *argv):
    """Run a command line. Return (exit code, the JSON object on stdout, stderr)."""
    capsys.readouterr()
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1, out
    return code, json.loads(out), err


def assert_error(outcome, code, *mentions):
    """Check that a command with ``--json`` failed with this error code, and that its message mentions each string.

    outcome: (exit code, JSON object, stderr). Return the message.
    """
    status, answer, err = outcome
    assert (answer["status"], answer.get("error")) == ("error", code), err
    assert status == answer["code"] == exit_code(code)
    assert len([line for line in err.splitlines() if line.startswith("error")]) == 1, err
    for text in mentions:
        assert str(text) in answer["message"]
    return answer["message"]


def assert_error_line(outcome, code, *mentions):
    """Check that a command with ``--debug`` failed with this error code, and that its message mentions each string.

    outcome: (exit code, stdout, stderr). Return the message.
    """
    status, _, err = outcome
    (line,) = [line for line in err.splitlines() if line.startswith("error")]
    found, message = re.fullmatch(r"error \[(\S+)\]: (.*)", line).groups()
    assert found == code, line
    assert status == exit_code(code)
    for text in mentions:
        assert str(text) in message
    return message


def fields_of(method, fields):
    """Return the assignments of fields that a method has: one that distills embeddings has no responses."""
    if not METHODS[method].preset.get("disco.enabled"):
        return tuple(fields)
    return tuple(field for field in fields if not field.startswith(("rollout.", "objective.", "eval.")))
