"""Mark cases of parametrized tests."""

import pytest


def long(*values, **options):
    """Return a case that only ``-m long`` runs. options: those of ``pytest.param``."""
    return pytest.param(*values, marks=pytest.mark.long, **options)
