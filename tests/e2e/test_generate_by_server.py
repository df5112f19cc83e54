"""Generate and score responses by servers, and train on what a server generated."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pytest

from distillm_cli.servers import http
from tests import tiny
from tests.command_line import assert_error
from tests.marks import long
from tests.protocol_server import serving


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save(tmp_path_factory.mktemp("model") / "m", seed=3)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(http, "_FIRST_PAUSE", 0.0)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [{"instruction": word, "output": word[::-1]} for word in ("abc", "bcd", "cde", "def", "efg", "fgh")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def generate(*more):
    return ["generate", "--max-new-tokens", 6, "--batch-size", 2, "--json", *more]


def test_greedy_responses_equal_those_of_the_model(cli, model, rows):
    """Check prompts sent as token ids of the model's own tokenizer."""
    common = ["--model", model, "--data", rows, "--greedy", "--dtype", "fp32", "--template", "plain"]
    code, own, err = cli(*generate(*common, "--output", "own.jsonl"))
    assert code == 0, err
    with serving(model) as server:
        code, served, err = cli(*generate(*common, "--server", server.url, "--output", "served.jsonl"))
        assert code == 0, err
        assert all(isinstance(body["prompt"], list) for body in server.bodies["/v1/completions"])
    assert read("served.jsonl") == read("own.jsonl")
    assert (served["rows"], served["tokens"], served["cut"]) == (own["rows"], own["tokens"], own["cut"])


@pytest.mark.parametrize(
    ("template", "path", "key"),
    [("auto", "/v1/chat/completions", "messages"), ("alpaca", "/v1/completions", "prompt")],
)
def test_name_on_the_server_gets_text_or_messages(cli, model, rows, template, path, key):
    with serving(model, owner="other") as server:
        server.name = "big-model"
        options = ["--model", "big-model", "--data", rows, "--template", template, "--server", f"{server.url}/v1"]
        code, result, err = cli(*generate(*options, "--output", "out.jsonl"))
        assert code == 0, err
        sent = [body[key] for body in server.bodies[path]]
    lines = read("out.jsonl")
    assert [line["instruction"] for line in lines] == ["abc", "bcd", "cde", "def", "efg", "fgh"]
    assert result["tokens"] > 0
    if key == "messages":
        assert [{"role": "user", "content": "abc"}] in sent
        assert lines[0]["prompt"] == "abc"
    else:
        assert lines[0]["prompt"] in sent
        assert lines[0]["prompt"].endswith("### Response:\n")


def test_interrupted_generation_is_resumed(cli, model, rows):
    options = ["--model", model, "--data", rows, "--n", 8, "--template", "plain", "--output", "out.jsonl"]
    with serving(model) as server:
        code, _, err = cli(*generate(*options, "--server", server.url))
        assert code == 0, err
        whole = read("out.jsonl")
    with serving(model) as server:
        server.die_after["/v1/completions"] = 30
        outcome = cli(*generate(*options, "--server", server.url, "--overwrite"))
        assert_error(outcome, "server.unreachable", "--server")
        assert read("out.jsonl") == whole[:16]
        server.die_after.clear()
        server.restart()
        code, _, err = cli(*generate(*options, "--server", server.url, "--resume"))
        assert code == 0, err
        assert server.log["/v1/completions"] < 80
    assert read("out.jsonl") == whole


def test_busy_server_is_asked_again(cli, model, rows):
    with serving(model) as server:
        server.fail["/v1/completions"] = deque([429, 500, 503])
        options = ["--model", model, "--data", rows, "--template", "plain", "--server", server.url]
        code, result, err = cli(*generate(*options, "--output", "out.jsonl"))
    assert code == 0, err
    assert result["rows"] == 6


def test_resume_with_another_model_of_the_server_is_refused(cli, model, rows):
    with serving(model) as server:
        server.name = "one"
        options = ["--data", rows, "--server", server.url, "--output", "out.jsonl"]
        assert cli(*generate("--model", "one", *options))[0] == 0
        server.name = "two"
        outcome = cli(*generate("--model", "two", *options, "--resume"))
    assert_error(outcome, "checkpoint.changed", "one", "two")


def test_name_that_the_server_does_not_have_is_refused(cli, model, rows):
    with serving(model) as server:
        server.name = "one"
        outcome = cli(*generate("--model", "other", "--data", rows, "--server", server.url, "--output", "out.jsonl"))
    assert_error(outcome, "server.no_model", "other", "one")


def test_chat_rows_with_tools_are_not_sent_as_text(cli, model, tmp_path):
    path = tmp_path / "tools.jsonl"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "abc"}], "tools": [tool]}) + "\n")
    with serving(model) as server:
        server.name = "one"
        outcome = cli(*generate("--model", "one", "--data", path, "--server", server.url, "--output", "out.jsonl"))
    assert_error(outcome, "data.template_mismatch", "tools")


def test_scores_of_a_served_model_equal_its_own(cli, model, rows):
    common = ["eval", model, "--suite", rows, "--greedy", "--max-new-tokens", 6, "--dtype", "fp32", "--json"]
    common += ["--template", "plain", "--set", "eval.no_repeat_ngram_size=0"]
    code, own, err = cli(*common, "--output", "own")
    assert code == 0, err
    with serving(model) as server:
        code, served, err = cli(*common, "--output", "served", "--server", server.url)
        assert code == 0, err
    (mine,) = own["suites"].values()
    (theirs,) = served["suites"].values()
    for figure in ("rows", "rouge_l", "exact_match", "tokens", "complete"):
        assert theirs[figure] == mine[figure]
    assert theirs["entropy"] is None
    results = json.loads(next(Path("served").rglob("results.json")).read_text())
    assert (results["dtype"], results["weights"]) == ("server", f"{server.name} on a server")


def test_name_on_a_server_is_scored_from_text(cli, model, rows):
    with serving(model, owner="other") as server:
        server.name = "big-model"
        code, result, err = cli(
            "eval", "big-model", "--suite", rows, "--greedy", "--max-new-tokens", 6, "--output", "out",
            "--server", server.url, "--set", "eval.no_repeat_ngram_size=0", "--json",
        )  # fmt: skip
    assert code == 0, err
    assert next(iter(result["suites"].values()))["rows"] == 6


@pytest.mark.parametrize(
    ("more", "mention"),
    [
        ([], "eval.no_repeat_ngram_size = 6"),
        (["--set", "eval.no_repeat_ngram_size=0", "--attack", "fgsm"], "attack"),
        (["--set", "eval.no_repeat_ngram_size=0", "--trigger", "a", "--target", "b"], "trigger"),
    ],
    ids=["n-grams", "attack", "trigger"],
)
def test_settings_that_servers_lack_are_refused(cli, rows, more, mention):
    outcome = cli("eval", "big-model", "--suite", rows, "--server", "http://127.0.0.1:9", "--json", *more)
    assert_error(outcome, "usage.not_on_server", mention)


def test_several_checkpoints_of_a_server_are_refused(cli, rows):
    outcome = cli("eval", "one", "two", "--suite", rows, "--server", "http://127.0.0.1:9", "--json")
    assert_error(outcome, "usage.exclusive_options", "--server")


def test_invalid_address_is_refused(cli, model, rows):
    outcome = cli(*generate("--model", model, "--data", rows, "--server", "host:1", "--output", "out.jsonl"))
    assert_error(outcome, "usage.invalid_value", "--server", "http://127.0.0.1:8000")


@pytest.mark.parametrize("template", ["auto", long("plain")])
def test_teacher_that_is_only_an_api_serves_sequence_level_distillation(cli, model, rows, template, tmp_path):
    """Check that a student trains on responses of a server's model, of which nothing is here."""
    teacher = tiny.save(tmp_path / "teacher", seed=8)
    student = tiny.save(tmp_path / "student", seed=9)
    with serving(model, owner="other") as server:
        server.name = "closed-model"
        options = ["--model", "closed-model", "--data", rows, "--template", template, "--server", server.url]
        code, _, err = cli(*generate(*options, "--n", 2, "--output", "samples.jsonl"))
        assert code == 0, err
    code, result, err = cli(
        "sft", "--model", student, "--data", "samples.jsonl", "--steps", 2, "--set", "eval.report_rows=0", "--max-length",
        32, "--set", f"data.valid={rows}", "--dtype", "fp32", "--set", "data.template=plain", "--output", "sft", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert result["dataset_steps"] == 2, "without a teacher, its responses are the data"
    code, result, err = cli(
        "distill", "--method", "seqkd", "--teacher", teacher, "--student", student, "--data", rows, "--steps", 4,
        "--set", "data.teacher_samples=samples.jsonl", "--set", "data.template=plain", "--set", "eval.report_rows=0",
        "--set", f"data.valid={rows}", "--max-length", 32, "--dtype", "fp32", "--output", "out", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert result["teacher_steps"] == 4
    assert result["teacher_sampled_sequences"] == 0, "all samples come from the file"


PIPELINE = """
defaults:
  data: {{source: {rows}, valid: {rows}, template: plain, max_length: 32}}
  train: {{steps: 2, threads: 1}}
  eval: {{report_rows: 0, max_new_tokens: 4, no_repeat_ngram_size: 0, greedy: true}}
stages:
  answers: {{verb: generate, server: {url}, model: big-model, n: 2, rollout: {{max_new_tokens: 4}}}}
  student: {{verb: sft, student: {{path: {student}}}, data: {{source: stage:answers}}}}
  scores: {{verb: eval, server: {url}, models: [big-model], eval: {{suites: [{rows}]}}}}
"""


def test_stages_of_a_pipeline_use_a_server(cli, model, rows, tmp_path):
    def write(url):
        (tmp_path / "api.yaml").write_text(PIPELINE.format(rows=rows, url=url, student=model))

    run = ["run", "api.yaml", "--output", "out", "--json"]
    write("http://127.0.0.1:9")
    assert_error(cli(*run, "--set", "stages.scores.eval.no_repeat_ngram_size=3"), "usage.not_on_server")
    assert_error(cli(*run, "--set", "stages.scores.models=[one, two]"), "recipe.invalid_stage", "2 models")
    assert_error(cli(*run, "--set", "stages.answers.server=host:1"), "recipe.invalid_value", "server")
    assert_error(cli(*run, "--set", "stages.student.server=http://127.0.0.1:9"), "recipe.unknown_field", "server")
    assert not (tmp_path / "out").exists()
    with serving(model, owner="other") as server:
        server.name = "big-model"
        write(server.url)
        code, result, err = cli(*run)
        assert code == 0, err
    assert {stage["status"] for stage in result["stages"].values()} == {"done"}
    assert len(read("out/answers/samples.jsonl")) == 2 * 5, "without the row that is held out"
    assert result["stages"]["student"]["result"]["dataset_steps"] == 2
    write("http://127.0.0.1:9")
    code, result, err = cli(*run)
    assert code == 0, err
    assert {stage["status"] for stage in result["stages"].values()} == {"skipped"}, "another address of the server"
    code, plan, err = cli("plan", "--recipe", "api.yaml", "--json")
    assert code == 0, err
    assert list(plan["stages"]) == ["student"]


def test_library_generates_by_a_server(model):
    import distillm_cli as distillm

    with serving(model) as server:
        result = distillm.generate(model, ["abc"], server=server.url, greedy=True, max_new_tokens=4, template="plain")
        assert server.log["/v1/completions"] == 1
    assert len(result.responses) == 1


@pytest.mark.long
def test_ctrl_c_ends_a_generation_that_waits_for_its_server(model, tmp_path):
    with serving(model) as server:
        command = [sys.executable, "-m", "distillm_cli", "generate", "--model", model, "--prompt", "abc", "--n", "4"]
        command += ["--template", "plain", "--server", server.url, "--output", str(tmp_path / "out.jsonl"), "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        server.delay = 0.5
        while server.log["/v1/completions"] < 4:
            server.delay = 120 if server.log["/v1/models"] else 0.5
            time.sleep(0.05)
            assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume" in json.loads(out)["message"]
