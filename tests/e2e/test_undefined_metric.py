"""A metric that says nothing on the rows selects no checkpoint."""

from __future__ import annotations

import json

from tests import typed


def _rows(place) -> str:
    colors = "红绿蓝黄白黑紫灰粉棕"
    lines = [
        json.dumps({"prompt": f"说 {a}{b}\n", "completion": f"{a}{b}色"}, ensure_ascii=False)
        for a in colors
        for b in "深浅"
    ]
    place.write_text("\n".join(lines), encoding="utf-8")
    return str(place)


def test_rouge_on_chinese_is_refused_as_a_selector(tmp_path, capsys):
    argv = ["sft", "--model", "random:1x32", "--tokenizer", "chars", "--data", _rows(tmp_path / "rows.jsonl")]
    argv += ["--steps", 2, "--set", "eval.max_new_tokens=4", "--output", tmp_path / "out", "--json"]
    code, told, _ = typed.call(capsys, *argv, "--set", "train.select=rouge_l")
    assert code == 2
    assert "chrf" in told["message"]
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    code, told, err = typed.call(capsys, *argv)
    assert code == 0
    assert told["report"]["student_after"]["rouge_l"] is None
    assert "rouge_l is undefined" in err
    selected = ("--set", "train.select=rouge_l", "--set", "eval.rouge_tokenizer=characters", "--overwrite")
    code, told, _ = typed.call(capsys, *argv, *selected)
    assert code == 0
    assert told["report"]["student_after"]["rouge_l"] is not None
