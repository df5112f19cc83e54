"""Test the output during a run, with a clock that the test controls."""

from __future__ import annotations

import io
import json
import mmap
import re
import shlex
import subprocess
import sys
import threading
from itertools import accumulate

import pytest
from rich.cells import cell_len
from rich.console import Console as Terminal

from distillm_cli.training.events import Note, Progress, RunEnded, RunStarted, Saved, Staged, Stepped, Validated, Warned
from distillm_cli.ui import console as console_module
from distillm_cli.ui.console import console, memory_in_use
from distillm_cli.ui.display import Memory, legend, render_stages, sparkline, stacked_bar
from distillm_cli.ui.summary import next_steps
from distillm_cli.utils.stdout import write_json
from distillm_cli.utils.text import format_count, format_duration, format_percent

CURSOR_OFF, CURSOR_ON = "\x1b[?25l", "\x1b[?25h"


class RecordedConsole:
    """Record the output of a console whose clock the test controls."""

    def __init__(self, terminal=False, width=100, height=40, **options):
        self.now = 1000.0
        self.out = io.StringIO()
        color_system = "truecolor" if terminal else "auto"
        self.screen = Terminal(
            file=self.out, force_terminal=terminal, width=width, height=height, color_system=color_system, _environ={}
        )
        self.memory = Memory(1.42e9)
        self.ui = console(stderr=self.screen, clock=lambda: self.now, memory=lambda: self.memory, **options)

    def start(self, method="distillm", steps=600, first_step=0, **more):
        self.ui(RunStarted(steps, first_step, 100, method, 226_304, "cpu", "fp32", **more))

    def step(self, n, source="dataset", *, loss=2.0, phi=0.0, seconds=0.5):
        self.now += seconds
        self.ui(Stepped(n, n / 100, source, loss, 4e-3, 0.83, phi, 800, seconds))

    @property
    def lines(self):
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.out.getvalue()).splitlines()

    def frame(self, width=None):
        """Return the live display as text, without colors."""
        page = io.StringIO()
        Terminal(file=page, width=width or self.screen.width, force_terminal=False).print(self.ui.frame())
        return page.getvalue()


def test_log_file_has_plain_lines():
    recorded = RecordedConsole()
    with recorded.ui as ui:
        ui(Note("1,250 rows dropped: longer than 512 tokens"))
        recorded.start(steps=200, loss="srkl", divergence="srkl")
        ui(Validated(0, 3.412, 0.0))
        recorded.step(1)
        ui(Warned("no pad token; <|endoftext|> stands in"))
        recorded.step(2)
        ui(Validated(100, 1.836, 0.0, best=True, scores={"valid_divergence": 0.612}))
        ui(Saved(100, "runs/a/checkpoints/step-000100"))
        recorded.step(200, "rollout", phi=0.1)
        ui(Validated(200, 1.946, 0.1, rose=False))
        ui(RunEnded(200, "done", 75.0))
    assert recorded.out.getvalue().splitlines() == [
        "1,250 rows dropped: longer than 512 tokens",
        "distillm · 200 steps, 2.0 epochs · 226 k parameters · cpu · fp32",
        "step   0 · epoch 0.0 · valid CE 3.412",
        "step   1 · epoch 0.0 · srkl 2.000 · lr 4.0e-03 · 1,600 tokens/s · 1.42 GB · 1:39 left",
        "warning: no pad token; <|endoftext|> stands in",
        "step 100 · epoch 1.0 · valid CE 1.836 (−1.576) · valid srkl 0.612 · selected",
        "step 100 · saved runs/a/checkpoints/step-000100",
        "step 200 · epoch 2.0 · srkl 2.000 · φ 0.10 · dataset 67% rollout 33% · lr 4.0e-03 · 1,600 tokens/s · 1.42 GB"
        " · 0:00 left",
        "step 200 · epoch 2.0 · valid CE 1.946 (+0.110) · φ 0.10",
        "done · step 200 of 200 · 1:15 · valid CE 3.412 → 1.946",
    ]


def test_log_file_has_no_escape_codes_with_force_color(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with console() as ui:
        ui(RunStarted(1, 0, 1, "sft", 10, "cpu", "fp32"))
        ui(Validated(0, 3.4, 0.0))
        ui(Warned("look"))
    captured = capsys.readouterr()
    assert "\x1b" not in captured.err
    assert captured.err.splitlines()[-1] == "warning: look"
    assert captured.out == ""


def test_each_epoch_after_the_first_is_one_line():
    recorded = RecordedConsole()
    recorded.start(steps=2000)
    for n in range(100, 600, 100):
        recorded.step(n)
        recorded.ui(Validated(n, 3.0 - n / 1000, 0.0, best=True))
        recorded.ui(Saved(n, f"runs/a/checkpoints/step-{n}"))
    logged = [line.split()[1] for line in recorded.lines if line.startswith("step")][1:]  # without the first step
    assert logged == ["100", "100", "200", "300", "400", "500"]


def test_live_display_ends_with_an_empty_line():
    """Check that ^C, which a terminal prints at the cursor, does not wrap a full line and leave part of the border."""
    recorded = RecordedConsole(terminal=True, width=40)
    recorded.start()
    recorded.step(1)
    recorded.ui._live.refresh()
    written = recorded.out.getvalue()
    recorded.ui.__exit__(None, None, None)
    assert written.endswith("\n")
    assert "╯" in written.splitlines()[-1]


def test_suggested_command_is_one_line_on_narrow_terminal():
    recorded = RecordedConsole(terminal=True, width=40)
    recorded.ui.show(next_steps("runs/a", prompt="say 2 or please repeat the number that I named"))
    command = next(line for line in recorded.lines if "generate" in line)
    assert shlex.split(command)[-1] == "say 2 or please repeat the number that I named"


def test_log_file_does_not_wrap_long_lines():
    recorded = RecordedConsole(width=40)
    recorded.ui(Note("word " * 60 + "[bold]not markup[/bold]"))
    assert recorded.lines == ["word " * 60 + "[bold]not markup[/bold]"]


def test_event_with_newlines_is_one_line():
    recorded = RecordedConsole()
    recorded.start()
    for event in (Note("a\nb"), Warned("c\n\nd"), Saved(1, "runs/e\nf")):
        recorded.ui(event)
    assert recorded.lines[-3:] == ["a b", "warning: c  d", "step   1 · saved runs/e f"]


def test_log_has_first_and_last_step_and_every_ten_seconds():
    recorded = RecordedConsole()
    recorded.start(steps=50)
    for n in range(1, 51):
        recorded.step(n, seconds=1.0)
    logged = [int(line.split()[1]) for line in recorded.lines if line.startswith("step")]
    assert logged == [1, 11, 21, 31, 41, 50]


def test_validation_line_shows_change_of_phi():
    recorded = RecordedConsole()
    recorded.start()
    recorded.ui(Validated(200, 1.265, 0.1))
    recorded.step(399, "rollout", phi=0.1)
    recorded.ui(Validated(400, 1.234, 0.2, rose=True, best=True))
    assert recorded.lines[-1] == "step 400 · epoch 4.0 · valid CE 1.234 (−0.031) · φ 0.10 → 0.20 · selected"


def test_initial_loss_is_not_logged_after_later_steps():
    """Check the order of lines when the initial loss is measured after steps were logged."""
    recorded = RecordedConsole()
    recorded.start(steps=200)
    recorded.step(1)
    recorded.ui(Validated(0, 3.412, 0.0))
    recorded.ui(Validated(100, 1.836, 0.0, best=True))
    recorded.ui(Validated(200, 1.800, 0.0))
    recorded.ui(RunEnded(200, "done", 75.0))
    steps = [int(line.split()[1]) for line in recorded.lines if line.startswith("step")]
    assert steps == sorted(steps)
    assert recorded.lines[-3:] == [
        "step 100 · epoch 1.0 · valid CE 1.836 (−1.576 from 3.412 at step 0) · selected",
        "step 200 · epoch 2.0 · valid CE 1.800 (−0.036)",
        "done · step 200 of 200 · 1:15 · valid CE 3.412 → 1.800",
    ]


def test_final_line_names_steps_of_validation_losses():
    recorded = RecordedConsole()
    recorded.start(steps=600, first_step=300)
    recorded.ui(Validated(400, 1.9, 0.0))
    recorded.ui(Validated(500, 1.8, 0.0))
    recorded.step(550)
    recorded.ui(RunEnded(550, "interrupted", 75.0))
    assert recorded.lines[-1].endswith(" · valid CE 1.900 at step 400 → 1.800 at step 500")


def test_resumed_run_continues_step_and_epoch():
    recorded = RecordedConsole(terminal=True)
    with recorded.ui:
        recorded.start(first_step=300)
        assert "resumed after step 300" in "".join(recorded.lines)
        assert "300/600  epoch 3.0  0:00 elapsed  – left" in recorded.frame()
        recorded.step(301, seconds=2.0)
        assert "301/600  epoch 3.0  0:02 elapsed  9:58 left" in recorded.frame()


def test_time_left_includes_validations_and_counts_down():
    recorded = RecordedConsole(terminal=True)
    with recorded.ui:
        recorded.start(steps=100)
        recorded.now += 500  # a long validation before training does not count for the time per step
        recorded.step(1, seconds=1.0)
        assert "1:39 left" in recorded.frame()
        recorded.now += 9
        assert "1:30 left" in recorded.frame()
        recorded.step(2, seconds=1.0)  # two steps and nine seconds of other work: 5.5 s each
        assert "8:59 left" in recorded.frame()


def test_panel_shows_figures_of_an_adaptive_run():
    recorded = RecordedConsole(terminal=True)
    with recorded.ui as ui:
        recorded.start(loss="CE + jeffreys")
        ui(Validated(0, 3.412, 0.0, trigger=3.512))
        for n in range(1, 301):
            recorded.step(n, ("dataset", "dataset", "rollout", "replay")[n % 4], loss=3.0 - n / 200, phi=0.2)
        ui(Validated(300, 1.3, 0.3, rose=True, best=True, trigger=1.4))
        frame = recorded.frame()
        assert "distillm · 226 k parameters · cpu · fp32" in frame
        assert "300/600  epoch 3.0  2:30 elapsed  2:30 left" in frame
        # smoothed, so slightly above the last value, 1.5
        assert re.search(r"CE \+ jeffreys +1\.54\d  █[▁-█]+▁ ", frame)
        assert "valid CE       1.300 ↓  best 1.300 at 300" in frame
        assert "φ              0.30 ▰▰▰▱▱▱▱▱▱▱ rises at valid CE ≥ 1.400" in frame
        assert "█ dataset 50%  ▓ rollout 25%  ▒ replay 25%" in frame
        for label, value in (("tokens/s", "1,600"), ("lr", "4.0e-03"), ("grad norm", "0.83"), ("memory", "1.42 GB")):
            assert re.search(rf"{label} +{re.escape(value)} ", frame)
        assert "GPU" not in frame


def test_panel_shows_gpu_memory():
    recorded = RecordedConsole(terminal=True)
    recorded.memory = Memory(1.42e9, 12.3e9)
    with recorded.ui:
        recorded.start()
        recorded.step(1)
        assert re.search(r"GPU +12\.3 GB", recorded.frame())


@pytest.mark.parametrize(("epsilon", "trigger"), [(0.1, "valid CE + 0.1"), (-0.03, "valid CE − 0.03")])
def test_panel_shows_phi_and_its_trigger_from_the_start(epsilon, trigger):
    recorded = RecordedConsole(terminal=True, width=80)
    with recorded.ui as ui:
        recorded.start(epsilon=epsilon, phi=0.2)
        assert f"φ           0.20 ▰▰▱▱▱▱▱▱▱▱ rises at {trigger} " in recorded.frame()
        ui(Validated(100, 9.0, 0.2, trigger=9 + epsilon))
        assert f"φ           0.20 ▰▰▱▱▱▱▱▱▱▱ rises at valid CE ≥ {9 + epsilon:.3f} " in recorded.frame()
        ui(Validated(200, 9.0, 1.0, trigger=None))
        assert "φ           1.00 ▰▰▰▰▰▰▰▰▰▰ " in recorded.frame()
        assert "rises" not in recorded.frame(), "phi is at its maximum"


@pytest.mark.parametrize("method", ["sft", "distillm"])
def test_shares_are_hidden_for_a_single_source(method):
    recorded = RecordedConsole(terminal=True)
    with recorded.ui:
        recorded.start(method)
        recorded.step(1)
        assert not re.search("dataset|sources", recorded.frame())
        recorded.step(2, "rollout" if method == "distillm" else "dataset", phi=0.1 if method == "distillm" else 0.0)
        assert bool(re.search("φ", recorded.frame())) == (method == "distillm")


@pytest.mark.parametrize("terminal", [True, False])
def test_schedule_without_phi_shows_only_sources(terminal):
    recorded = RecordedConsole(terminal=terminal)
    with recorded.ui:
        recorded.start("gkd", has_phi=False)
        recorded.step(1, "rollout")
        recorded.ui(Validated(1, 2.0, 0.0, False, True, {}))
        logged = recorded.frame() if terminal else "\n".join(recorded.lines)
    assert "rollout 100%" in logged
    assert "φ" not in logged + "".join(recorded.lines)


@pytest.mark.parametrize("width", [20, 59, 60, 70, 79, 80, 100, 240])
@pytest.mark.parametrize("height", [5, 13, 24, 60])
def test_display_fits_every_terminal(width, height):
    recorded = RecordedConsole(terminal=True, width=width, height=height)
    with recorded.ui as ui:
        recorded.start(steps=1_234_567)
        ui(Validated(0, 12.345, 0.0))
        for n, source in enumerate(["dataset", "rollout", "replay", "teacher"] * 3, 1):
            recorded.step(n, source, phi=0.95)
        ui(Progress("sampling from a student with a long name", 3, 128, "sequences"))
        recorded.now += 1
        lines = recorded.frame().splitlines()
        assert max(map(cell_len, lines)) <= width
        if width >= 60:
            assert "12/1,234,567" in "".join(lines)
            assert len(lines) <= max(height - 3, 2)  # room for log lines above
            assert height < 24 or "▒ replay" in "".join(lines)
            assert height < 24 or "sampling from a student" in lines[-1]


def test_events_do_not_redraw_the_display():
    recorded = RecordedConsole(terminal=True)
    with recorded.ui:
        recorded.start()
        before = len(recorded.out.getvalue())
        for n in range(1, 300):
            recorded.step(n, seconds=0.0)
        drawn = recorded.out.getvalue()[before:].count("distillm")
    assert drawn <= 4  # at most the draws of Rich's own refresh thread


def test_log_lines_stay_and_the_display_is_removed():
    recorded = RecordedConsole(terminal=True)
    with recorded.ui as ui:
        recorded.start(steps=2)
        recorded.step(1)
        ui(Validated(1, 1.5, 0.0))
        assert recorded.frame().strip()
        ui(RunEnded(2, "early stop", 3.0))
        assert not recorded.frame().strip()
        ui.show("best [of] all")
    written = recorded.out.getvalue()
    assert written.count(CURSOR_OFF) == written.count(CURSOR_ON) == 1
    assert recorded.lines[-2:] == ["early stop · step 2 of 2 · 0:03 · valid CE 1.500 at step 1", "best [of] all"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_terminal_is_restored_after_an_error(error):
    recorded, stderr, threads = RecordedConsole(terminal=True), sys.stderr, set(threading.enumerate())

    def run():
        with recorded.ui as ui:
            ui(Progress("loading", 0, 1))
            recorded.start()
            recorded.step(1)
            raise error

    with pytest.raises(error):
        run()
    assert recorded.out.getvalue().rfind(CURSOR_ON) > recorded.out.getvalue().rfind(CURSOR_OFF) >= 0
    assert sys.stderr is stderr
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_display_does_not_capture_stdout(capsys):
    recorded = RecordedConsole(terminal=True)
    with recorded.ui:
        recorded.start()
        print("data")
    assert capsys.readouterr().out == "data\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_only_long_tasks_are_logged(terminal):
    recorded = RecordedConsole(terminal=terminal)
    with recorded.ui as ui:
        for task, total, unit, seconds in (("loading gpt2", 1, "", 3.21), ("reading", 40, "rows", 0.9)):
            ui(Progress(task, 0, total, unit))
            recorded.now += seconds
            ui(Progress(task, total, total, unit))
        ui(Progress("tokenizing", 5, 11_435, "rows"))
        recorded.now += 75
        ui(Progress("tokenizing", 11_435, 11_435, "rows"))
        ui(Progress("nothing to do", 0, 0))
    task_lines = [line.strip() for line in recorded.lines if " · " in line]
    assert task_lines == ["loading gpt2 · 3.2 s", "tokenizing · 11,435 rows · 1:15"]


def test_progress_bars_appear_for_long_tasks():
    recorded = RecordedConsole(terminal=True)
    with recorded.ui as ui:
        ui(Progress("tokenizing", 0, 200, "rows"))
        assert not recorded.frame().strip()
        recorded.now += 5
        ui(Progress("tokenizing", 50, 200, "rows"))
        ui(Progress("loading gpt2", 0, 1))
        recorded.now += 5
        frame = recorded.frame()
        assert re.search(r"tokenizing +━+.* 50/200 rows", frame)
        assert re.search(r"loading gpt2 .* 0:05", frame)


def test_progress_during_training_is_shown_in_the_border():
    recorded = RecordedConsole(terminal=True)
    with recorded.ui as ui:
        recorded.start()
        height = len(recorded.frame().splitlines())
        ui(Progress("validating", 0, 1000, "rows"))
        recorded.now += 2
        ui(Progress("validating", 320, 1000, "rows"))
        lines = recorded.frame().splitlines()
        assert "validating 320/1,000 rows" in lines[-1]
        assert len(lines) == height
        ui(Progress("validating", 1000, 1000, "rows"))
        assert "validating" not in recorded.frame()
    assert not any("validating · " in line for line in recorded.lines)


def test_log_file_has_progress_every_ten_seconds():
    recorded = RecordedConsole()
    for done in range(100):
        recorded.ui(Progress("generating", done, 1000, "rows"))
        recorded.now += 0.5
    assert recorded.lines == [f"generating · {n}/1,000 rows" for n in (20, 40, 60, 80)]


def test_quiet_prints_only_warnings():
    recorded = RecordedConsole(terminal=True, quiet=True)
    with recorded.ui as ui:
        ui(Progress("loading", 0, 1))
        ui(Note("hello"))
        recorded.start()
        recorded.step(1)
        ui(Validated(1, 1.0, 0.0))
        ui(Warned("the disk is nearly full"))
        ui(RunEnded(1, "done", 1.0))
        ui.show("a table")
    assert recorded.lines == ["warning: the disk is nearly full"]
    assert CURSOR_OFF not in recorded.out.getvalue()


def test_no_color_terminal_gets_no_colors():
    recorded = RecordedConsole(terminal=True)
    recorded.screen.no_color = True
    with recorded.ui as ui:
        recorded.start()
        ui(Validated(0, 3.0, 0.1))
        recorded.step(1, "rollout", phi=0.1)
        ui(Validated(1, 2.0, 0.2, rose=True))
    styles = set(re.findall(r"\x1b\[([0-9;]+)m", recorded.out.getvalue()))
    assert {code for style in styles for code in style.split(";")} <= {"0", "1", "2", "39", "49"}  # bold, dim, none


def test_events_without_run_started_are_accepted():
    recorded = RecordedConsole()
    recorded.ui(Validated(0, 3.4, 0.0))
    recorded.ui(Saved(0, "a"))
    recorded.ui(RunEnded(0, "interrupted", 0.0))
    assert recorded.lines[0] == "step 0 · valid CE 3.400"


def test_result_is_one_line_of_json_in_json_mode(capsys):
    for json_mode in (False, True):
        with RecordedConsole(json_mode=json_mode).ui as ui:
            ui(Note("talk"))
            ui.result({"command": "distill", "train_loss": float("nan"), "phi": 0.1, "output": "läufe/ä"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"command": "distill", "train_loss": None, "phi": 0.1, "output": "läufe/ä"}


def test_json_is_ascii_with_nested_non_finite_values(tmp_path, capsys):
    write_json({"path": tmp_path, "suites": {"dolly": {"seeds": {10: float("inf")}, "rows": (1, 2)}}, "name": "φ"})
    out = capsys.readouterr().out
    assert out.isascii()
    parsed = json.loads(out)
    assert parsed == {"path": str(tmp_path), "suites": {"dolly": {"seeds": {"10": None}, "rows": [1, 2]}}, "name": "φ"}


def test_display_imports_no_torch():
    code = (
        "import sys; from distillm_cli.ui import console, summary; print(console.memory_in_use().gpu);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_memory_in_use_is_that_of_this_process():
    before = memory_in_use().process
    with mmap.mmap(-1, 60_000_000) as allocated:  # new pages, not memory that earlier tests freed
        allocated[:] = bytes(60_000_000)
        assert memory_in_use().process - before > 40e6


def test_refresh_rate_is_at_most_eight_per_second():
    assert 1 <= console_module.REFRESHES_PER_SECOND <= 8


def test_stacked_bar_fills_width_and_shows_every_part():
    bar = stacked_bar([("dataset", 0.989), ("rollout", 0.001), ("replay", 0.01)], 40).plain
    assert bar == "█" * 38 + "▓" + "▒"
    assert stacked_bar([("dataset", 0.5), ("rollout", 0.25), ("unheard-of", 0.25)], 8).plain == "████▓▓░░"
    assert stacked_bar([("replay", 1.0)], 5).plain == "▒" * 5
    assert legend([("dataset", 0.999), ("replay", 0.001)]).plain == "█ dataset 99%  ▒ replay 1%"


def test_sparkline_shows_slow_progress():
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▄▄"
    assert sparkline([0.0, 7.0]) == "▁█"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁█"
    halves = list(accumulate([8.0] + [0.5] * 7, lambda a, b: a * b))
    assert sparkline(halves) == "█▇▆▅▄▃▂▁"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (9999, "9,999"), (10_000, "10.0 k"), (226_304, "226 k"), (999_999, "1.00 M"), (1.56e9, "1.56 G")],
)
def test_format_count(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65.9, "1:05"), (7391, "2:03:11"), (3 * 86400 + 4 * 3600, "3 days 4 h")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("share", "text"), [(0, "0%"), (0.001, "1%"), (0.5, "50%"), (0.999, "99%"), (1, "100%")])
def test_format_percent(share, text):
    assert format_percent(share) == text


def test_pipeline_stages_are_shown_above_the_display():
    names = ("teacher", "student", "distill", "eval")
    recorded = RecordedConsole(terminal=True, width=100, height=40)
    with recorded.ui as ui:
        ui(Staged(names, ("done", "left out", "now", "later")))
        assert recorded.frame().strip() == "✓ teacher   – student   ▶ distill   · eval", "also between two tasks"
        ui(Progress("loading gpt2", 0, 1))
        recorded.now += 1
        assert [line.split()[0] for line in recorded.frame().splitlines()] == ["✓", "loading"]
        recorded.start()
        recorded.step(1)
        head, top, *_ = recorded.frame().splitlines()
        assert "▶ distill" in head
        assert top.startswith("╭─ distillm")
        ui(Staged(names, ("done", "left out", "done", "done")))
    assert recorded.out.getvalue().endswith(CURSOR_ON) or CURSOR_ON in recorded.out.getvalue()


def test_narrow_terminal_shows_only_the_current_stage():
    names = tuple(f"distill-{size}m" for size in (120, 340, 760))
    staged = Staged(names, ("done", "now", "later"))
    assert render_stages(staged, 60).plain == "✓ distill-120m   ▶ distill-340m   · distill-760m"
    assert render_stages(staged, 40).plain == "▶ distill-340m  2 of 3"
    assert cell_len(render_stages(staged, 10).plain) <= 10
