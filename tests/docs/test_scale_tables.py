"""Test that the computed table of docs/scale.md is what ``distillm plan`` predicts."""

import runpy

import pytest

from tests.conftest import ROOT


@pytest.mark.long
def test_table_is_what_plan_predicts():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    table = page.split("<!-- scale table -->\n")[1].split("<!-- end of scale table -->")[0]
    assert table == runpy.run_path(str(ROOT / "docs" / "make_scale_tables.py"))["tables"]()
