"""Commands as they are typed."""

from __future__ import annotations

from functools import partial

import pytest

from tests.typed import call


@pytest.fixture
def typed(capsys, tmp_path, monkeypatch):
    """Types a command line in an empty directory; (exit code, the JSON object, stderr)."""
    monkeypatch.chdir(tmp_path)

    return partial(call, capsys)
