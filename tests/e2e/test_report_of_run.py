"""Test the page that a run writes at its end, and the report of the finished run."""

import json
import shutil
import subprocess

import pytest

from distillm_cli.cli.app import main
from distillm_cli.runs.output_dir import REPORT
from distillm_cli.utils import manifest
from tests.command_line import call

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ARGV = (
    *(
        "distill",
        "--recipe",
        "quickstart",
        "--steps",
        "4",
        "--schedule",
        "mixed",
        "--batch-size",
        "8",
        "--device",
        "cpu",
    ),
    *(
        "--set",
        "data.limit=40",
        "--set",
        "data.valid_limit=8",
        "--set",
        "eval.report_rows=4",
        "--set",
        "train.eval_steps=2",
    ),
    *("--set", "student.sft_epochs=0", "--set", "train.log_steps=1", "--json"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train a run that writes its page. Return its directory."""
    output = tmp_path_factory.mktemp("report") / "run"
    assert main([*ARGV, "--output", str(output), "--set", "eval.report_page=true"]) == 0
    return output


def test_run_writes_its_page(run):
    page = (run / REPORT).read_text()
    assert REPORT in manifest.recorded(run)  # --overwrite removes it
    assert page.count('class="token"') > 10  # both models were loaded
    assert "teacher p" in page
    assert "student before" in page
    result = json.loads((run / "result.json").read_text())
    assert result["flops"] > 0
    assert result["machine"]["torch"] in page
    assert result["measured_on"].split(";")[0] in page


def test_report_of_a_finished_run(run, capsys):
    code, found, _ = call(capsys, "report", run, "--html", "--card", "--rows", "0", "--json")
    assert code == 0
    assert found["written"] == [str(run / "README.md"), str(run / REPORT)]
    assert 'class="token"' not in (run / REPORT).read_text()
    assert found["groups"][0]["scores"].keys() == {"valid_loss", "error_rate", "exact_match"}


def test_page_off_by_default(capsys):
    code, found, _ = call(capsys, "distill", "--teacher", "gpt2-xl", "--student", "gpt2", "--dry-run", "--json")
    assert code == 0
    assert found["recipe"]["eval"]["report_page"] is False


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_is_narrow_enough_for_a_phone(run, tmp_path):
    # A script, which the policy of the page forbids, measures whether the page must be scrolled sideways.
    policy = "default-src 'none'; "
    html = (run / REPORT).read_text().replace(policy, f"{policy} script-src 'unsafe-inline'; ")
    measure = "<script>document.title = [innerWidth, document.documentElement.scrollWidth].join(' ')</script>"
    (tmp_path / "page.html").write_text(html.replace("</body>", f"{measure}</body>"))
    arguments = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    arguments += ["--window-size=500,900", "--dump-dom", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True).stdout
    inner, scrolled = map(int, dom.split("<title>")[1].split("</title>")[0].split())
    assert inner <= 500
    assert scrolled <= inner
