"""A check of the code of an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from distillm_cli.errors import DistillmError


@contextmanager
def raises_code(code: str, *mentions: str) -> Iterator[pytest.ExceptionInfo[DistillmError]]:
    """Check that a DistillmError with this code is raised and that its message mentions each string."""
    with pytest.raises(DistillmError) as caught:
        yield caught
    assert caught.value.code == code
    for mention in mentions:
        assert mention in str(caught.value)
