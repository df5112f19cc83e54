"""Test the pages of reports: escaped, self-contained, and complete without the library of charts."""

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from distillm_cli.models.backbone import Backbone
from distillm_cli.runs import charts, token_divergence
from distillm_cli.runs.plan import training_flops
from distillm_cli.runs.recorded_run import read_metrics, read_run
from distillm_cli.runs.report_page import run_page
from distillm_cli.runs.report_runs import ReportOptions, report_runs
from distillm_cli.runs.token_divergence import RowDistances, TokenDistance, row_distances
from distillm_cli.training.events import silent
from distillm_cli.types import Sequence, TeacherPrompt, collate
from distillm_cli.utils.energy import EnergyMeter
from tests import tiny
from tests.recorded_runs import write_evaluation, write_run

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{7*7}}"
LOADING = {"script", "img", "iframe", "link", "object", "embed", "video", "audio", "form", "base"}


class Tags(HTMLParser):
    """Collect the elements of a page, their attributes and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {(name, value) for name, value in attrs}

    def handle_data(self, data):
        self.text.append(data)


def write_responses(run, text):
    for name in ("student-before", "student-after", "teacher"):
        place = run / "eval/report"
        place.mkdir(parents=True, exist_ok=True)
        content = {"answers": [text] * 3, "prompts": [text] * 3, "references": [[text]] * 3}
        (place / f"{name}.json").write_text(json.dumps(content))


def assert_self_contained(page):
    """Check that a page has no element or attribute that loads or runs something."""
    found = Tags(page)
    assert not found.tags & LOADING
    assert not [name for name, _ in found.attributes if name.startswith("on")]
    assert not [value for name, value in found.attributes if name in ("src", "href", "xlink:href")]
    assert "url(" not in page
    assert len(page) < 2_000_000
    return found


def test_everything_from_data_is_escaped(tmp_path):
    run = write_run(tmp_path / "run", f"teacher.path={json.dumps(HOSTILE)}", exact_match=5.0)
    write_responses(run, HOSTILE)
    result = json.loads((run / "result.json").read_text())
    result |= {"findings": [{"code": HOSTILE, "what": HOSTILE}], "machine": {HOSTILE: HOSTILE}, "measured_on": HOSTILE}
    result["report"][HOSTILE] = {HOSTILE: 1.0}
    (run / "result.json").write_text(json.dumps(result))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, "alarm": HOSTILE, "message": HOSTILE, "cure": HOSTILE}) + "\n")
        file.write(json.dumps({"step": 40, "source": HOSTILE, "loss": 1.0, "seconds": 1}) + "\n")
        file.write(json.dumps({"step": 40, "valid_loss": 1.0, HOSTILE: 1.0}) + "\n")
    token = TokenDistance(HOSTILE, 0.5, 0.1, 0.2, ((HOSTILE, 0.9),), ((HOSTILE, 0.8),))
    page = run_page(read_run(run), [RowDistances(HOSTILE, (token,))], "")
    found = assert_self_contained(page)
    assert "".join(found.text).count(HOSTILE) >= 12


def test_page_of_runs_is_escaped_and_self_contained(tmp_path):
    for i, name in enumerate((HOSTILE, "b")):
        sets = (f"teacher.path={json.dumps(name)}", f"train.lr={1e-3 * (i + 1)}")
        run = write_run(tmp_path / f"runs/{i}", *sets, seconds=10 + i, exact_match=5.0 + i)
        write_evaluation(run, "dolly", "t1", "rouge_l", 20.0, 24.0 + i)
    (tmp_path / "runs/<b>").mkdir()
    paths = [*sorted((tmp_path / "runs").iterdir()), tmp_path / "absent"]
    result = report_runs(paths, ReportOptions(html=True, output=tmp_path / "out"), silent)
    assert result.written == (str(tmp_path / "out/report.html"),)
    page = (tmp_path / "out/report.html").read_text()
    text = "".join(assert_self_contained(page).text)
    assert HOSTILE in text
    assert "does not exist" in text


def test_page_without_the_library_of_charts_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    page = run_page(read_run(write_run(tmp_path / "run", exact_match=5.0)), [], "Left out: no models.")
    assert "distillm[report]" in page
    assert "<svg" not in page
    assert "Left out: no models." in page


def test_plots_are_svg_and_png_files(tmp_path):
    pytest.importorskip("vl_convert")
    for i, alpha in enumerate((0.1, 0.2, 0.3)):
        write_run(tmp_path / f"runs/{i}", f"objective.alpha={alpha}", seconds=5 + i, exact_match=10 * alpha)
    written = report_runs([tmp_path / "runs"], ReportOptions(plots=True), silent).written
    names = {path.rpartition("/")[2] for path in written}
    assert {"exact-match-by-objective-alpha.svg", "exact-match-by-seconds.png", "validation.svg"} <= names
    svg = (tmp_path / "runs/plots/exact-match-by-objective-alpha.svg").read_text()
    assert "currentColor" not in svg
    assert (tmp_path / "runs/plots/exact-match-by-seconds.png").read_bytes().startswith(b"\x89PNG")


def test_front_has_the_groups_that_no_other_beats():
    places = ((1, 10.0), (2, 8.0), (3, 12.0), (4, 12.0), (5, 30.0))
    points = [charts.Point(x, value, None, str(x)) for x, value in places]
    chart = charts.front_chart("m", points, lower_is_better=False)
    front = chart.spec["layer"][0]["data"]["values"]
    assert [point["x"] for point in front] == [1, 3, 5]


def test_plots_of_many_groups_are_thinned():
    points = [charts.Point(i, float(i), None, str(i)) for i in range(10_000)]
    chart = charts.sweep_chart("lr", "m", points)
    assert 125 <= len(chart.spec["data"]["values"]) <= 250
    assert "10,000 groups" in chart.caption
    front = charts.front_chart("m", points, lower_is_better=True).spec["layer"][0]["data"]["values"]
    assert [point["x"] for point in front] == [0]  # of all groups


def test_charts_of_a_run_live_without_any_key(tmp_path):
    run = write_run(tmp_path / "run")
    lines = list(read_metrics(run / "metrics.jsonl"))
    assert [chart.name for chart in charts.run_charts(lines, 10.0)] == ["loss", "validation", "sources", "quality-time"]
    assert charts.health_charts(lines) == []
    assert charts.run_charts([], None) == []
    figures = {"rollout_length": 3.0, "rollout_cut": 0.5, "student_entropy": 1.0, "acceptance": 0.7, "replay_age": 4}
    assert len(charts.health_charts([{"step": 1, **figures}, {"step": 2, "kl_teacher_student": 0.3}])) == 6


def test_seconds_of_a_validation_follow_the_logged_steps():
    steps = [{"step": s, "loss": 1.0, "seconds": 1.0 if s <= 2 else 3.0} for s in (1, 2, 3, 4)]
    lines = [*steps, *({"step": s, "valid_loss": 1.0} for s in (0, 2, 4))]
    chart = next(c for c in charts.run_charts(lines, 16.0) if c.name == "quality-time")
    assert [value["step"] for value in chart.spec["data"]["values"]] == [0.0, 4.0, 16.0]


def test_distances_are_those_of_the_models_own_distributions():
    words = tiny.tokenizer()
    student, teacher = (Backbone(tiny.model("llama", len(words), seed=seed), words) for seed in (0, 1))
    rows = tiny.sequences([(3, 5), (2, 4)], len(words))
    found = row_distances(student, teacher, rows, len(words), shown=2)
    assert found[0].mean >= found[1].mean
    assert all(token.distance < 1e-6 for token in row_distances(student, student, rows, len(words), 1)[0].tokens)
    row = max(rows, key=lambda row: len(row.response))
    shown = next(item for item in found if len(item.tokens) == len(row.response))
    log_q_NV, log_p_NV = (model.logits(collate([row])).double().log_softmax(-1) for model in (student, teacher))
    mean_NV = (log_q_NV.exp() + log_p_NV.exp()) / 2
    kl = [(a.exp() * (a - mean_NV.log())).sum(-1) for a in (log_p_NV, log_q_NV)]
    expected = (kl[0] + kl[1]) / 2 / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(
        torch.tensor([token.distance for token in shown.tokens]), expected.float(), atol=1e-4, rtol=1e-3
    )
    assert shown.tokens[0].p == pytest.approx(log_p_NV[0, int(row.response[0])].exp().item(), rel=1e-3)
    assert [p for _, p in shown.tokens[0].teacher_top] == sorted(
        (p for _, p in shown.tokens[0].teacher_top), reverse=True
    )


def test_each_model_is_compared_on_its_own_prompt():
    words = tiny.tokenizer()
    student, teacher = (Backbone(tiny.model("llama", len(words), seed=seed), words) for seed in (0, 1))
    (row,) = tiny.sequences([(3, 5)], len(words))
    (other,) = tiny.sequences([(6, 1)], len(words), seed=7)
    both = replace(row, teacher_prompt=TeacherPrompt(other.prompt))
    (found,) = row_distances(student, teacher, [both], len(words), shown=1)
    log_p_NV = teacher.logits(collate([Sequence(other.prompt, row.response)])).log_softmax(-1)
    expected = log_p_NV.exp()[range(5), row.response.tolist()]
    torch.testing.assert_close(torch.tensor([token.p for token in found.tokens]), expected, atol=1e-6, rtol=1e-4)


def test_tokens_without_probability_have_a_distance():
    log_p_NV = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    log_q_NV = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]).log()
    found = token_divergence._distances(tiny.tokenizer(), [0, 1], log_p_NV, log_q_NV)
    assert [token.distance for token in found] == pytest.approx([0.0, 1.0])


def test_teacher_runs_once_on_cached_rows():
    by_source = {"dataset": 10.0, "dataset_cached": 6.0, "rollout": 20.0}
    assert training_flops(by_source, {"dataset": 5, "rollout": 2}, 3) == 3 * 10 + 2 * 6 + 2 * 20


def zone(root, name, number, energy, top=1000):
    place = root / f"intel-rapl:{number}"
    place.mkdir(parents=True)
    (place / "name").write_text(name)
    (place / "max_energy_range_uj").write_text(str(top * 10**6))
    (place / "energy_uj").write_text(str(energy * 10**6))
    return place / "energy_uj"


def test_energy_of_packages_survives_a_restart_of_the_counter(tmp_path):
    first, second = zone(tmp_path, "package-0", 0, 990), zone(tmp_path, "package-1", 1, 5)
    zone(tmp_path, "core", "0:0", 7)
    with EnergyMeter(tmp_path, gpus=False) as meter:
        first.write_text(str(20 * 10**6))  # 10 to the end of the range, 20 from 0
        second.write_text(str(9 * 10**6))
        assert meter.joules() == 34.0
    assert EnergyMeter(tmp_path / "none", gpus=False).__enter__().joules() is None


def test_page_shows_cost_and_what_was_saved(tmp_path):
    run = write_run(tmp_path / "run", exact_match=5.0)
    text = re.sub(r"\s+", " ", " ".join(Tags(run_page(read_run(run), [], "")).text))
    assert "33% of the sampling" in text
    assert "the teacher ran on 1,000 of 4,000 tokens: 75% from the cache" in text
