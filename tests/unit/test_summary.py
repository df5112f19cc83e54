"""Test the final report of a run at several terminal widths."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console as Terminal
from rich.text import Text

from distillm_cli.runs.run_results import Outcome, PipelineResult, Sample, StageResult
from distillm_cli.ui.summary import (
    crop,
    next_steps,
    outcome_table,
    pipeline_next_steps,
    pipeline_summary,
    samples_table,
    sources_sentence,
    table,
)

OUTCOMES = [
    Outcome("student before", 3.4123, {"rouge_l": 12.345, "exact_match": 1.0, "error_rate": 80.2}),
    Outcome("student after", 0.8712, {"rouge_l": 71.4, "exact_match": 0.5, "error_rate": 20.1}),
    Outcome("teacher", None, {"rouge_l": 97.7, "exact_match": 95.0}),
]
SAMPLES = [
    Sample("Sort: dbca", ["abcd"], {"student before": "aab", "student after": " abcd\n", "teacher": "abcd"}),
    Sample(
        "Write a letter about the weather " * 9, ["Dear friend, " * 99], {"student before": "", "teacher": "so " * 999}
    ),
    Sample("12 + 30 =", ["42"], {"student before": "4", "student after": "41", "teacher": "42"}),
]


def page(renderable, width, color=False) -> str:
    out = io.StringIO()
    Terminal(
        file=out, width=width, force_terminal=color, color_system="standard" if color else "auto", _environ={}
    ).print(renderable)
    return out.getvalue()


def rows(text: str) -> list[list[str]]:
    """Return the cells of each line of a table."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[0] == "│"]


def test_outcome_table_shows_differences_to_the_start():
    assert rows(page(outcome_table(OUTCOMES), 100)) == [
        ["", "valid CE", "ROUGE-L", "exact match", "error rate"],
        ["student before", "3.412", "12.35", "1.00", "80.20"],
        ["student after", "0.871 −2.541", "71.40 +59.06", "0.50 −0.50", "20.10 −60.10"],
        ["teacher", "–", "97.70 +85.36", "95.00 +94.00", "–"],
    ]


def test_outcome_table_is_transposed_on_narrow_terminal():
    lines = rows(page(outcome_table(OUTCOMES), 60))
    assert ["error rate", "80.20", "20.10 −60.10", "–"] in lines
    assert ["valid CE", "3.412", "0.871 −2.541", "–"] in lines


def test_outcome_table_shows_zero_difference_and_caption():
    outcomes = [Outcome("before", 2.3746, {"x": 1.0}), Outcome("after", 2.3744, {"x": 1.0}), Outcome("teacher", 2.3757)]
    for width in (100, 56):
        text = page(outcome_table(outcomes, caption="on 7 held-out rows"), width)
        assert "2.374 ±0.000" in text
        assert "1.00 ±0.00" in text
        assert "2.376 +0.001" in text
        assert "on 7 held-out rows" in " ".join(text.split())


def test_differences_are_colored_by_direction():
    text = page(outcome_table(OUTCOMES), 100, color=True)
    green, yellow = "\x1b[32m", "\x1b[33m"
    for better in ("−2.541", "+59.06", "−60.10"):
        assert green + better in text
    assert yellow + "−0.50" in text
    worse = page(
        outcome_table([Outcome("a", 1.0, {"error_rate": 1.0}), Outcome("b", 2.0, {"error_rate": 2.0})]),
        100,
        True,
    )
    assert worse.count(yellow) == 2


def test_missing_metrics_are_left_out_and_nan_is_shown():
    lines = rows(page(outcome_table([Outcome("a", None, {"x": float("nan")}), Outcome("b", None, {"x": 1.0})]), 100))
    assert lines == [["", "x"], ["a", "nan"], ["b", "1.00"]]


def test_samples_table_marks_exact_answers():
    lines = rows(page(samples_table(SAMPLES), 110))
    assert lines[0] == ["prompt", "reference", "student before", "student after", "teacher"]
    assert ["Sort: dbca", "abcd", "aab", "✓ abcd", "✓ abcd"] in lines
    assert ["12 + 30 =", "42", "4", "41", "✓ 42"] in lines
    second = lines[2]
    assert second[2:4] == ["(nothing)", "–"]
    assert len(lines) < 12  # the long texts are cropped


def test_samples_are_stacked_on_narrow_terminal():
    lines = rows(page(samples_table(SAMPLES), 60))
    assert lines[:5] == [
        ["prompt", "Sort: dbca"],
        ["reference", "abcd"],
        ["student before", "aab"],
        ["student after", "✓ abcd"],
        ["teacher", "✓ abcd"],
    ]


@pytest.mark.parametrize("width", [40, 60, 79, 80, 120, 200])
def test_nothing_is_wider_than_the_terminal(width):
    wide = [[f"{i:05}" * 9, i, "x " * 40] for i in range(3)]
    for renderable in (
        outcome_table(OUTCOMES),
        samples_table(SAMPLES),
        next_steps("runs/" + "a" * 99, prompt="b " * 99),
        table("Rows", ["name", "n", "what"], wide),
    ):
        assert max(cell_len(line) for line in page(renderable, width).splitlines()) <= width


def test_control_characters_of_samples_are_replaced():
    sample = Sample("[red]p[/red]", ["r"], {"student": "\x1b[2J\x07[bold]x[/bold]\u202e"})
    text = page(samples_table([sample]), 100)
    assert "�[2J�[bold]x[/bold]�" in text
    assert "[red]p[/red]" in text
    assert not set(text) & {"\x1b", "\x07", "\u202e"}


def test_crop_cuts_at_words():
    assert crop("a  short\ntext", 20) == "a short text"
    assert crop("the quick brown fox", 19) == "the quick brown fox"
    assert crop("the quick brown fox", 18) == "the quick brown…"
    assert crop("the quick brown fox", 16) == "the quick brown…"
    assert crop("the quick brown fox", 15) == "the quick…"
    assert crop("a " + "b" * 50, 20) == "a " + "b" * 17 + "…"
    assert all(len(crop("one two three four", n)) <= n for n in range(1, 20))


def test_next_steps_are_valid_shell_commands():
    text = page(next_steps("runs/my run", suites=["dolly"], prompt="it's 12 + 30", commands=["ls 'runs/my run'"]), 100)
    lines = [line.strip() for line in text.splitlines()]
    assert "model        runs/my run" in lines
    assert "checkpoints  runs/my run/checkpoints/" in lines
    assert shlex.split(next(line for line in lines if "eval" in line)) == [
        "distillm", "eval", "runs/my run", "--suite", "dolly",
    ]  # fmt: skip
    assert shlex.split(next(line for line in lines if "generate" in line)) == [
        "distillm", "generate", "--model", "runs/my run", "--prompt", "it's 12 + 30",
    ]  # fmt: skip
    assert "ls 'runs/my run'" in lines
    assert "│" not in text


@pytest.mark.parametrize("prompt", ["two\nlines", "word " * 50, "\x1b[2J"])
def test_next_steps_replace_a_long_prompt(prompt):
    assert "generate --model out --prompt 'YOUR PROMPT'" in page(next_steps("out", prompt=prompt), 80)


@pytest.mark.parametrize("prompt", [None, "", " "])
def test_next_steps_replace_an_empty_prompt(prompt):
    assert "generate --model out --prompt 'YOUR PROMPT'" in page(next_steps("out", prompt=prompt), 80)


def test_next_steps_omit_eval_without_rows():
    assert "distillm eval" not in page(next_steps("out", scored=False), 80)


def test_next_steps_list_given_files():
    text = page(next_steps("out", files={"answers": "eval/dolly.jsonl"}), 100)
    assert "answers  out/eval/dolly.jsonl" in text
    assert "recipe" not in text
    assert "distillm eval out\n" in "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_table_aligns_numbers_and_shows_markup_literally():
    text = page(
        table("Suites", ["suite", "ROUGE-L", "rows", "loss"], [
            ["[b]dolly[/b]", "25.39 ± 0.31", 500, 1.0], [Text("sni"), "4.1 ± 0.2", 1694, None],
        ]),
        100,
    )  # fmt: skip
    assert "│ [b]dolly[/b] │ 25.39 ± 0.31 │   500 │ 1.000 │" in text
    assert "│ sni          │    4.1 ± 0.2 │ 1,694 │     – │" in text
    assert text.startswith("Suites")


def test_wide_table_becomes_a_block_per_row():
    text = page(table("Runs", ["name", "path"], [["a", "x" * 50], ["b", "y" * 20]]), 40)
    assert rows(text)[0] == ["name", "a"]
    assert "".join(cells[1] for cells in rows(text)[1:3]) == "x" * 50


def test_empty_table_has_a_header():
    assert rows(page(table("Runs", ["name", "loss"], []), 80)) == [["name", "loss"]]


@pytest.mark.parametrize(
    ("counts", "phi", "sentence"),
    [
        (
            {"dataset": 600},
            [0.0, 0.0, 0.0],
            "φ never rose: it stayed 0, every step used data set rows.",
        ),
        (
            {"dataset": 480, "rollout": 70, "replay": 50},
            [0.2, 0.2],
            "φ never rose: it stayed 0.20. Of 600 steps 480 (80%) used data set rows, 70 (12%) fresh rollouts "
            "and 50 (8%) replayed rollouts.",
        ),
        (
            {"dataset": 480, "rollout": 1, "replay": 119},
            [0.0, 0.1, 0.1, 0.2, 0.3],
            "Of 600 steps 480 (80%) used data set rows, 1 (1%) a fresh rollout and 119 (20%) replayed rollouts. "
            "φ rose 3 times, from 0 to 0.30.",
        ),
        (
            {"dataset": 600},
            [0.0, 0.0, 0.1],
            "Every step used data set rows (600 steps). φ rose once, from 0 to 0.10. No student outputs were drawn.",
        ),
        ({"dataset": 1200, "rollout": 0}, None, "Every step used data set rows (1,200 steps)."),
        (
            {"dataset": 300, "rollout": 100},
            [0.5, 0.2, 0.6, 0.4],
            "Of 400 steps 300 (75%) used data set rows and 100 (25%) fresh rollouts. "
            "φ went from 0.50 to 0.40, between 0.20 and 0.60.",
        ),
        ({"rollout": 600}, None, "Every step used fresh rollouts (600 steps)."),
        ({"dataset": 1}, None, "The one step used data set rows."),
        ({"dataset": 2, "other": 2}, None, "Of 4 steps 2 (50%) used data set rows and 2 (50%) other."),
        ({}, [], "No steps were run."),
    ],
)
def test_sources_sentence(counts, phi, sentence):
    assert sources_sentence(counts, phi) == sentence


def test_any_correct_answer_is_marked():
    sample = Sample("A rhyme for howe", ["jowe", "rowe", "nowe"], {"student": "howe", "teacher": "rowe"})
    text = page(samples_table([sample]), 100)
    assert "✓ rowe" in text
    assert "✓ howe" not in text
    assert "jowe (or 2 more)" in " ".join(text.split())


def test_pipeline_summary_includes_skipped_stages():
    report = {
        "student_before": {"valid_loss": 3.0, "rouge_l": 1.0},
        "student_after": {"valid_loss": 1.25, "rouge_l": 40.5},
    }
    score = {"mean": 41.25, "sd": 0.5, "seeds": [40.75, 41.75]}
    scores = {"output": "p/score", "wall_s": 2.0, "suites": {"held-out": {"rows": 7, "rouge_l": score, "entropy": 0.5}}}
    stages = {
        "distill": StageResult("skipped", "distill", "p/distill", {"report": report, "wall_s": 1.0}),
        "score": StageResult("skipped", "eval", "p/score", scores),
    }
    result = PipelineResult(Path("p"), 0.1, stages)
    text = "".join(page(item, 100) for item in pipeline_summary(result))
    assert ["distill", "1.250", "40.50"] in rows(text)
    assert ["held-out", "7", "41.25 ± 0.50", "0.500"] in rows(text)
    commands = page(pipeline_next_steps(result), 100)
    assert "distillm generate --model p/distill --prompt 'YOUR PROMPT'" in commands
    assert "distillm eval" not in commands, "a stage has already evaluated the model"
