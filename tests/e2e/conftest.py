"""Define the fixture that runs command lines."""

from __future__ import annotations

from functools import partial

import pytest

from tests.command_line import call


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """Change to an empty directory. Return a function: command line → (exit code, the JSON object, stderr)."""
    monkeypatch.chdir(tmp_path)

    return partial(call, capsys)
