"""Test rows that are longer than the original context of a longrope model."""

from __future__ import annotations

import json

import pytest

from tests import tiny


@pytest.mark.parametrize(("length", "count"), [(48, 1), (24, 0)])
def test_longrope_warns_once_about_long_rows(cli, tmp_path, length, count):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24, **factors}
    tiny.save(tmp_path / "student", rope_parameters=rope)
    tiny.save(tmp_path / "teacher")
    rows = [{"prompt": f"say {c}", "completion": c * 3} for c in "abcdefghij"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = cli(
        "distill", "--teacher", "teacher", "--student", "student", "--data", "rows.jsonl", "--output", "out",
        "--method", "kd", "--steps", "1", "--max-length", length, "--dtype", "fp32", "--json",
        "--set", "data.max_prompt_length=12", "--set", "data.template=plain", "--set", "eval.report_rows=0",
    )  # fmt: skip
    assert code == 0, err
    assert err.count("longer than 24 tokens, where the student's rotary factors change (longrope)") == count
