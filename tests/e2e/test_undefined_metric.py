"""Test checkpoint selection by a metric that is undefined on the rows."""

from __future__ import annotations

import json

from tests.command_line import assert_error, call


def _rows(path) -> str:
    colors = "红绿蓝黄白黑紫灰粉棕"
    lines = [
        json.dumps({"prompt": f"说 {a}{b}\n", "completion": f"{a}{b}色"}, ensure_ascii=False)
        for a in colors
        for b in "深浅"
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_selection_by_rouge_on_chinese_is_an_error(tmp_path, capsys):
    argv = ["sft", "--model", "random:1x32", "--tokenizer", "chars", "--data", _rows(tmp_path / "rows.jsonl")]
    argv += ["--steps", 2, "--set", "eval.max_new_tokens=4", "--output", tmp_path / "out", "--json"]
    outcome = call(capsys, *argv, "--set", "train.select=rouge_l")
    assert_error(outcome, "usage.invalid_selection", "rouge_l", "chrf")
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    code, result, err = call(capsys, *argv)
    assert code == 0
    assert result["report"]["student_after"]["rouge_l"] is None
    assert "rouge_l is undefined" in err
    selected = ("--set", "train.select=rouge_l", "--set", "eval.rouge_tokenizer=characters", "--overwrite")
    code, result, _ = call(capsys, *argv, *selected)
    assert code == 0
    assert result["report"]["student_after"]["rouge_l"] is not None
