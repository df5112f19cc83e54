"""What a person sees while a run goes on, told as short runs with a clock that the test moves."""

from __future__ import annotations

import io
import json
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
from distillm_cli.ui.console import console, memory_in_use, print_json
from distillm_cli.ui.display import Memory, legend, render_stages, sparkline, stacked_bar
from distillm_cli.ui.summary import next_steps
from distillm_cli.utils.text import format_count, format_duration, format_percent

CURSOR_OFF, CURSOR_ON = "\x1b[?25l", "\x1b[?25h"


class Stage:
    """A console, the text it wrote and the clock it reads."""

    def __init__(self, terminal=False, width=100, height=40, **options):
        self.now = 1000.0
        self.out = io.StringIO()
        colours = "truecolor" if terminal else "auto"
        self.screen = Terminal(
            file=self.out, force_terminal=terminal, width=width, height=height, color_system=colours, _environ={}
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
        """The live display as text, without colours."""
        page = io.StringIO()
        Terminal(file=page, width=width or self.screen.width, force_terminal=False).print(self.ui.frame())
        return page.getvalue()


def test_a_log_file_gets_plain_lines():
    stage = Stage()
    with stage.ui as ui:
        ui(Note("1,250 rows dropped: longer than 512 tokens"))
        stage.start(steps=200, loss="srkl", divergence="srkl")
        ui(Validated(0, 3.412, 0.0))
        stage.step(1)
        ui(Warned("no pad token; <|endoftext|> stands in"))
        stage.step(2)
        ui(Validated(100, 1.836, 0.0, best=True, scores={"valid_divergence": 0.612}))
        ui(Saved(100, "runs/a/checkpoints/step-000100"))
        stage.step(200, "rollout", phi=0.1)
        ui(Validated(200, 1.946, 0.1, rose=False))
        ui(RunEnded(200, "done", 75.0))
    assert stage.out.getvalue().splitlines() == [
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


def test_a_log_file_never_sees_an_escape_code_even_under_force_color(monkeypatch, capsys):
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
    stage = Stage()
    stage.start(steps=2000)
    for n in range(100, 600, 100):
        stage.step(n)
        stage.ui(Validated(n, 3.0 - n / 1000, 0.0, best=True))
        stage.ui(Saved(n, f"runs/a/checkpoints/step-{n}"))
    told = [line.split()[1] for line in stage.lines if line.startswith("step")][1:]  # without the first step
    assert told == ["100", "100", "200", "300", "400", "500"]


def test_the_live_display_ends_with_an_empty_line_for_the_terminals_own_text():
    """A terminal prints ^C at the cursor: behind a full line it would wrap, and a border would stay."""
    stage = Stage(terminal=True, width=40)
    stage.start()
    stage.step(1)
    stage.ui._live.refresh()
    written = stage.out.getvalue()
    stage.ui.__exit__(None, None, None)
    assert written.endswith("\n")
    assert "╯" in written.splitlines()[-1]


def test_a_command_to_type_is_one_line_on_a_narrow_terminal():
    stage = Stage(terminal=True, width=40)
    stage.ui.show(next_steps("runs/a", prompt="say 2 or please repeat the number that I named"))
    typed = next(line for line in stage.lines if "generate" in line)
    assert shlex.split(typed)[-1] == "say 2 or please repeat the number that I named"


def test_long_lines_are_not_wrapped_in_a_log_file():
    stage = Stage(width=40)
    stage.ui(Note("word " * 60 + "[bold]not markup[/bold]"))
    assert stage.lines == ["word " * 60 + "[bold]not markup[/bold]"]


def test_an_event_is_one_line_whatever_it_names():
    stage = Stage()
    stage.start()
    for event in (Note("a\nb"), Warned("c\n\nd"), Saved(1, "runs/e\nf")):
        stage.ui(event)
    assert stage.lines[-3:] == ["a b", "warning: c  d", "step   1 · saved runs/e f"]


def test_step_lines_in_a_log_come_first_then_every_ten_seconds_then_last():
    stage = Stage()
    stage.start(steps=50)
    for n in range(1, 51):
        stage.step(n, seconds=1.0)
    told = [int(line.split()[1]) for line in stage.lines if line.startswith("step")]
    assert told == [1, 11, 21, 31, 41, 50]


def test_a_validation_that_moves_phi_says_from_where_to_where():
    stage = Stage()
    stage.start()
    stage.ui(Validated(200, 1.265, 0.1))
    stage.step(399, "rollout", phi=0.1)
    stage.ui(Validated(400, 1.234, 0.2, rose=True, best=True))
    assert stage.lines[-1] == "step 400 · epoch 4.0 · valid CE 1.234 (−0.031) · φ 0.10 → 0.20 · selected"


def test_the_loss_before_training_is_never_told_after_later_steps():
    """It is measured at the first validation, when steps have been told already."""
    stage = Stage()
    stage.start(steps=200)
    stage.step(1)
    stage.ui(Validated(0, 3.412, 0.0))
    stage.ui(Validated(100, 1.836, 0.0, best=True))
    stage.ui(Validated(200, 1.800, 0.0))
    stage.ui(RunEnded(200, "done", 75.0))
    steps = [int(line.split()[1]) for line in stage.lines if line.startswith("step")]
    assert steps == sorted(steps)
    assert stage.lines[-3:] == [
        "step 100 · epoch 1.0 · valid CE 1.836 (−1.576 from 3.412 at step 0) · selected",
        "step 200 · epoch 2.0 · valid CE 1.800 (−0.036)",
        "done · step 200 of 200 · 1:15 · valid CE 3.412 → 1.800",
    ]


def test_a_validation_loss_at_the_end_names_its_step_where_it_is_not_the_first_or_the_last():
    stage = Stage()
    stage.start(steps=600, first_step=300)
    stage.ui(Validated(400, 1.9, 0.0))
    stage.ui(Validated(500, 1.8, 0.0))
    stage.step(550)
    stage.ui(RunEnded(550, "interrupted", 75.0))
    assert stage.lines[-1].endswith(" · valid CE 1.900 at step 400 → 1.800 at step 500")


def test_a_resumed_run_goes_on_where_it_was():
    stage = Stage(terminal=True)
    with stage.ui:
        stage.start(first_step=300)
        assert "resumed after step 300" in "".join(stage.lines)
        assert "300/600  epoch 3.0  0:00 elapsed  – left" in stage.frame()
        stage.step(301, seconds=2.0)
        assert "301/600  epoch 3.0  0:02 elapsed  9:58 left" in stage.frame()


def test_time_left_counts_validations_in_and_runs_down_between_steps():
    stage = Stage(terminal=True)
    with stage.ui:
        stage.start(steps=100)
        stage.now += 500  # a long validation before training says nothing about the steps
        stage.step(1, seconds=1.0)
        assert "1:39 left" in stage.frame()
        stage.now += 9
        assert "1:30 left" in stage.frame()
        stage.step(2, seconds=1.0)  # two steps and nine seconds of something else: 5.5 s each
        assert "8:59 left" in stage.frame()


def test_the_panel_tells_the_figures_of_an_adaptive_run():
    stage = Stage(terminal=True)
    with stage.ui as ui:
        stage.start(loss="CE + jeffreys")
        ui(Validated(0, 3.412, 0.0, trigger=3.512))
        for n in range(1, 301):
            stage.step(n, ("dataset", "dataset", "rollout", "replay")[n % 4], loss=3.0 - n / 200, phi=0.2)
        ui(Validated(300, 1.3, 0.3, rose=True, best=True, trigger=1.4))
        frame = stage.frame()
        assert "distillm · 226 k parameters · cpu · fp32" in frame
        assert "300/600  epoch 3.0  2:30 elapsed  2:30 left" in frame
        assert re.search(r"CE \+ jeffreys +1\.54\d  █[▁-█]+▁ ", frame)  # smoothed: a little behind the last value, 1.5
        assert "valid CE       1.300 ↓  best 1.300 at 300" in frame
        assert "φ              0.30 ▰▰▰▱▱▱▱▱▱▱ rises at valid CE ≥ 1.400" in frame
        assert "█ dataset 50%  ▓ rollout 25%  ▒ replay 25%" in frame
        for label, value in (("tokens/s", "1,600"), ("lr", "4.0e-03"), ("grad norm", "0.83"), ("memory", "1.42 GB")):
            assert re.search(rf"{label} +{re.escape(value)} ", frame)
        assert "GPU" not in frame


def test_gpu_memory_is_shown_where_there_is_some():
    stage = Stage(terminal=True)
    stage.memory = Memory(1.42e9, 12.3e9)
    with stage.ui:
        stage.start()
        stage.step(1)
        assert re.search(r"GPU +12\.3 GB", stage.frame())


@pytest.mark.parametrize(("epsilon", "said"), [(0.1, "valid CE + 0.1"), (-0.03, "valid CE − 0.03")])
def test_panel_shows_phi_and_its_trigger_from_the_start(epsilon, said):
    stage = Stage(terminal=True, width=80)
    with stage.ui as ui:
        stage.start(epsilon=epsilon, phi=0.2)
        assert f"φ           0.20 ▰▰▱▱▱▱▱▱▱▱ rises at {said} " in stage.frame()
        ui(Validated(100, 9.0, 0.2, trigger=9 + epsilon))
        assert f"φ           0.20 ▰▰▱▱▱▱▱▱▱▱ rises at valid CE ≥ {9 + epsilon:.3f} " in stage.frame()
        ui(Validated(200, 9.0, 1.0, trigger=None))
        assert "φ           1.00 ▰▰▰▰▰▰▰▰▰▰ " in stage.frame()
        assert "rises" not in stage.frame(), "it is at its highest"


@pytest.mark.parametrize("method", ["sft", "distillm"])
def test_shares_are_hidden_while_they_say_nothing(method):
    stage = Stage(terminal=True)
    with stage.ui:
        stage.start(method)
        stage.step(1)
        assert not re.search("dataset|sources", stage.frame())
        stage.step(2, "rollout" if method == "distillm" else "dataset", phi=0.1 if method == "distillm" else 0.0)
        assert bool(re.search("φ", stage.frame())) == (method == "distillm")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_schedule_that_goes_by_no_phi_shows_its_sources_alone(terminal):
    stage = Stage(terminal=terminal)
    with stage.ui:
        stage.start("gkd", has_phi=False)
        stage.step(1, "rollout")
        stage.ui(Validated(1, 2.0, 0.0, False, True, {}))
        told = stage.frame() if terminal else "\n".join(stage.lines)
    assert "rollout 100%" in told
    assert "φ" not in told + "".join(stage.lines)


@pytest.mark.parametrize("width", [20, 59, 60, 70, 79, 80, 100, 240])
@pytest.mark.parametrize("height", [5, 13, 24, 60])
def test_the_display_fits_every_terminal(width, height):
    stage = Stage(terminal=True, width=width, height=height)
    with stage.ui as ui:
        stage.start(steps=1_234_567)
        ui(Validated(0, 12.345, 0.0))
        for n, source in enumerate(["dataset", "rollout", "replay", "teacher"] * 3, 1):
            stage.step(n, source, phi=0.95)
        ui(Progress("sampling from a student with a long name", 3, 128, "sequences"))
        stage.now += 1
        lines = stage.frame().splitlines()
        assert max(map(cell_len, lines)) <= width
        if width >= 60:
            assert "12/1,234,567" in "".join(lines)
            assert len(lines) <= max(height - 3, 2)  # room for the talk above
            assert height < 24 or "▒ replay" in "".join(lines)
            assert height < 24 or "sampling from a student" in lines[-1]


def test_events_do_not_redraw_the_display():
    stage = Stage(terminal=True)
    with stage.ui:
        stage.start()
        before = len(stage.out.getvalue())
        for n in range(1, 300):
            stage.step(n, seconds=0.0)
        drawn = stage.out.getvalue()[before:].count("distillm")
    assert drawn <= 4  # at most what Rich's own thread drew meanwhile


def test_talk_stays_above_the_display_and_the_display_goes():
    stage = Stage(terminal=True)
    with stage.ui as ui:
        stage.start(steps=2)
        stage.step(1)
        ui(Validated(1, 1.5, 0.0))
        assert stage.frame().strip()
        ui(RunEnded(2, "early stop", 3.0))
        assert not stage.frame().strip()
        ui.show("best [of] all")
    written = stage.out.getvalue()
    assert written.count(CURSOR_OFF) == written.count(CURSOR_ON) == 1
    assert stage.lines[-2:] == ["early stop · step 2 of 2 · 0:03 · valid CE 1.500 at step 1", "best [of] all"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_terminal_is_restored_whatever_happens(error):
    stage, stderr, threads = Stage(terminal=True), sys.stderr, set(threading.enumerate())

    def run():
        with stage.ui as ui:
            ui(Progress("loading", 0, 1))
            stage.start()
            stage.step(1)
            raise error

    with pytest.raises(error):
        run()
    assert stage.out.getvalue().rfind(CURSOR_ON) > stage.out.getvalue().rfind(CURSOR_OFF) >= 0
    assert sys.stderr is stderr
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_stdout_stays_the_callers_own_while_the_display_runs(capsys):
    stage = Stage(terminal=True)
    with stage.ui:
        stage.start()
        print("data")
    assert capsys.readouterr().out == "data\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_work_leaves_a_line_only_when_it_took_a_while(terminal):
    stage = Stage(terminal=terminal)
    with stage.ui as ui:
        for task, total, unit, seconds in (("loading gpt2", 1, "", 3.21), ("reading", 40, "rows", 0.9)):
            ui(Progress(task, 0, total, unit))
            stage.now += seconds
            ui(Progress(task, total, total, unit))
        ui(Progress("tokenizing", 5, 11_435, "rows"))
        stage.now += 75
        ui(Progress("tokenizing", 11_435, 11_435, "rows"))
        ui(Progress("nothing to do", 0, 0))
    kept = [line.strip() for line in stage.lines if " · " in line]
    assert kept == ["loading gpt2 · 3.2 s", "tokenizing · 11,435 rows · 1:15"]


def test_bars_show_how_far_work_has_come_but_not_for_a_blink():
    stage = Stage(terminal=True)
    with stage.ui as ui:
        ui(Progress("tokenizing", 0, 200, "rows"))
        assert not stage.frame().strip()
        stage.now += 5
        ui(Progress("tokenizing", 50, 200, "rows"))
        ui(Progress("loading gpt2", 0, 1))
        stage.now += 5
        frame = stage.frame()
        assert re.search(r"tokenizing +━+.* 50/200 rows", frame)
        assert re.search(r"loading gpt2 .* 0:05", frame)


def test_work_within_a_run_shows_in_the_border_and_leaves_no_lines():
    stage = Stage(terminal=True)
    with stage.ui as ui:
        stage.start()
        height = len(stage.frame().splitlines())
        ui(Progress("validating", 0, 1000, "rows"))
        stage.now += 2
        ui(Progress("validating", 320, 1000, "rows"))
        lines = stage.frame().splitlines()
        assert "validating 320/1,000 rows" in lines[-1]
        assert len(lines) == height
        ui(Progress("validating", 1000, 1000, "rows"))
        assert "validating" not in stage.frame()
    assert not any("validating · " in line for line in stage.lines)


def test_a_log_file_hears_of_long_work_now_and_then():
    stage = Stage()
    for done in range(100):
        stage.ui(Progress("generating", done, 1000, "rows"))
        stage.now += 0.5
    assert stage.lines == [f"generating · {n}/1,000 rows" for n in (20, 40, 60, 80)]


def test_quiet_lets_warnings_through_only():
    stage = Stage(terminal=True, quiet=True)
    with stage.ui as ui:
        ui(Progress("loading", 0, 1))
        ui(Note("hello"))
        stage.start()
        stage.step(1)
        ui(Validated(1, 1.0, 0.0))
        ui(Warned("the disk is nearly full"))
        ui(RunEnded(1, "done", 1.0))
        ui.show("a table")
    assert stage.lines == ["warning: the disk is nearly full"]
    assert CURSOR_OFF not in stage.out.getvalue()


def test_a_screen_without_colours_gets_none():
    stage = Stage(terminal=True)
    stage.screen.no_color = True
    with stage.ui as ui:
        stage.start()
        ui(Validated(0, 3.0, 0.1))
        stage.step(1, "rollout", phi=0.1)
        ui(Validated(1, 2.0, 0.2, rose=True))
    styles = set(re.findall(r"\x1b\[([0-9;]+)m", stage.out.getvalue()))
    assert {code for style in styles for code in style.split(";")} <= {"0", "1", "2", "39", "49"}  # bold, dim, none


def test_a_listener_survives_events_out_of_order():
    stage = Stage()
    stage.ui(Validated(0, 3.4, 0.0))
    stage.ui(Saved(0, "a"))
    stage.ui(RunEnded(0, "interrupted", 0.0))
    assert stage.lines[0] == "step 0 · valid CE 3.400"


def test_the_answer_is_one_line_of_json_and_only_when_asked(capsys):
    for json_mode in (False, True):
        with Stage(json_mode=json_mode).ui as ui:
            ui(Note("talk"))
            ui.result({"command": "distill", "train_loss": float("nan"), "phi": 0.1, "output": "läufe/ä"})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"command": "distill", "train_loss": None, "phi": 0.1, "output": "läufe/ä"}


def test_json_survives_any_locale_and_nesting(tmp_path, capsys):
    print_json({"path": tmp_path, "suites": {"dolly": {"seeds": {10: float("inf")}, "rows": (1, 2)}}, "name": "φ"})
    out = capsys.readouterr().out
    assert out.isascii()
    answer = json.loads(out)
    assert answer == {"path": str(tmp_path), "suites": {"dolly": {"seeds": {"10": None}, "rows": [1, 2]}}, "name": "φ"}


def test_the_display_loads_no_torch():
    code = (
        "import sys; from distillm_cli.ui import console, summary; print(console.memory_in_use().gpu);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_memory_is_that_of_this_process():
    before = memory_in_use().process
    held = bytearray(b"x") * 60_000_000
    assert memory_in_use().process - before > 40e6
    del held


def test_refreshes_are_calm():
    assert 1 <= console_module.REFRESHES_PER_SECOND <= 8


def test_a_stacked_bar_fills_its_width_and_hides_no_one():
    bar = stacked_bar([("dataset", 0.989), ("rollout", 0.001), ("replay", 0.01)], 40).plain
    assert bar == "█" * 38 + "▓" + "▒"
    assert stacked_bar([("dataset", 0.5), ("rollout", 0.25), ("unheard-of", 0.25)], 8).plain == "████▓▓░░"
    assert stacked_bar([("replay", 1.0)], 5).plain == "▒" * 5
    assert legend([("dataset", 0.999), ("replay", 0.001)]).plain == "█ dataset 99%  ▒ replay 1%"


def test_a_sparkline_keeps_slow_progress_visible():
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
def test_amounts(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (65.9, "1:05"), (7391, "2:03:11"), (3 * 86400 + 4 * 3600, "3 days 4 h")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("share", "text"), [(0, "0%"), (0.001, "1%"), (0.5, "50%"), (0.999, "99%"), (1, "100%")])
def test_percents(share, text):
    assert format_percent(share) == text


def test_a_pipeline_shows_its_stages_above_whatever_goes_on():
    names = ("teacher", "student", "distill", "eval")
    stage = Stage(terminal=True, width=100, height=40)
    with stage.ui as ui:
        ui(Staged(names, ("done", "left out", "now", "later")))
        assert stage.frame().strip() == "✓ teacher   – student   ▶ distill   · eval", "between two tasks too"
        ui(Progress("loading gpt2", 0, 1))
        stage.now += 1
        assert [line.split()[0] for line in stage.frame().splitlines()] == ["✓", "loading"]
        stage.start()
        stage.step(1)
        head, top, *_ = stage.frame().splitlines()
        assert "▶ distill" in head
        assert top.startswith("╭─ distillm")
        ui(Staged(names, ("done", "left out", "done", "done")))
    assert stage.out.getvalue().endswith(CURSOR_ON) or CURSOR_ON in stage.out.getvalue()


def test_stages_that_do_not_fit_give_way_to_the_present_one():
    names = tuple(f"distill-{size}m" for size in (120, 340, 760))
    staged = Staged(names, ("done", "now", "later"))
    assert render_stages(staged, 60).plain == "✓ distill-120m   ▶ distill-340m   · distill-760m"
    assert render_stages(staged, 40).plain == "▶ distill-340m  2 of 3"
    assert cell_len(render_stages(staged, 10).plain) <= 10
