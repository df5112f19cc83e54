"""Commands as they are typed."""

from __future__ import annotations

import json

import pytest

from distillm_cli.cli.app import main


@pytest.fixture
def typed(capsys, tmp_path, monkeypatch):
    """Types a command line in an empty directory; (exit code, the JSON object, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call
