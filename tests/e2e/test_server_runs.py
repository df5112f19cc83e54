"""Train with a server for rollouts, for the teacher's hidden states, or both, and with servers that fail."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distillm_cli.rollouts import server_sampler
from tests import tiny
from tests.command_line import assert_error, untimed
from tests.marks import long
from tests.protocol_server import serving

WORDS = ("abc", "bcd", "cde", "def", "efg", "fgh", "ghi", "hij", "ijk", "jkl", "klm", "lmn")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the directories of a teacher and a student, and a file of rows."""
    root = tmp_path_factory.mktemp("models")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": word, "output": word[::-1] + word}) + "\n" for word in WORDS))
    teacher = tiny.save(root / "teacher", hidden_size=48, seed=1)
    student = tiny.save(root / "student", seed=2)
    return {"teacher": teacher, "student": student, "rows": str(rows)}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    """Wait for nothing between tries."""
    monkeypatch.setattr("distillm_cli.servers.http._FIRST_PAUSE", 0.0)


def arguments(models, *more):
    return [
        "distill", "--teacher", models["teacher"], "--student", models["student"], "--data", models["rows"],
        "--set", f"data.valid={models['rows']}", "--dtype", "fp32", "--device", "cpu", "--batch-size", "4",
        "--steps", "8", "--max-length", "32", "--lr", "1e-3", "--set", "schedule.kind=mixed", "--set", "rollout.bulk=2",
        "--set", "rollout.max_new_tokens=6", "--set", "train.eval_steps=4", "--set", "train.save_steps=100",
        "--set", "eval.report_rows=2", "--set", "eval.max_new_tokens=4", "--set", "eval.greedy=true",
        "--set", "train.threads=1", "--set", "train.log_steps=1", "--json", *more,
    ]  # fmt: skip


def run(cli, models, output, *more):
    """Train; return the lines of metrics.jsonl without seconds."""
    code, result, err = cli(*arguments(models, "--output", output, *more))
    assert code == 0, err
    return metrics(output), result


def metrics(output):
    lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    return [untimed(line) for line in lines]


def losses(lines):
    return np.array([line.get("loss", line.get("valid_loss")) for line in lines])


def weights(output):
    return load_file(f"{output}/model.safetensors")


def assert_equal_weights(one, other, tolerance=0.0):
    first, second = weights(one), weights(other)
    assert max((first[name] - second[name]).abs().max().item() for name in first) <= tolerance


# Rollouts


@pytest.mark.parametrize("lora", [pytest.param(False, id="full"), long(True, id="lora")])
def test_greedy_rollouts_of_a_server_give_the_same_run(cli, models, lora):
    more = ["--set", "rollout.temperature=0", *(["--lora", 4] if lora else [])]
    own, _ = run(cli, models, "own", *more)
    with serving(models["student"]) as server:
        served, result = run(cli, models, "served", *more, "--rollout-server", server.url)
        draws = server.log["/collective_rpc"]
        assert all("logprobs" in body for body in server.bodies["/v1/completions"][:2]), (
            "the probe before the first draw"
        )
    assert served == own
    assert_equal_weights("own", "served")
    assert result["sampled_tokens"] > 0
    assert 0 < draws <= result["rollout_steps"], "one synchronization for each bulk"


@pytest.mark.long
def test_padded_rows_of_the_head_are_never_sampled(cli, models, tmp_path):
    padded = {**models, "student": tiny.save(tmp_path / "padded", rows=tiny.VOCAB + 7, seed=2)}
    own, _ = run(cli, padded, "own", "--set", "rollout.temperature=0")
    with serving(padded["student"]) as server:
        served, _ = run(cli, padded, "served", "--set", "rollout.temperature=0", "--rollout-server", server.url)
        biases = server.bodies["/v1/completions"][-1]["logit_bias"]
    assert served == own
    assert sorted(map(int, biases)) == list(range(tiny.VOCAB, tiny.VOCAB + 7))


@pytest.mark.long
def test_student_in_bf16_is_sent_and_compared_in_bf16(cli, models):
    with serving(models["student"], dtype=torch.bfloat16) as server:
        run(cli, models, "out", "--set", "student.dtype=bf16", "--rollout-server", server.url)
        assert server.model.dtype == torch.bfloat16


@pytest.mark.parametrize("student", ["layers:1", long("random:2x32"), long("shared:1x2")])
def test_student_that_the_run_builds_is_served(cli, models, student):
    """Check that the directory of ``distillm serve rollouts`` takes the weights of the run."""
    built = {**models, "student": student}
    more = ["--set", "rollout.temperature=0"]
    fields = ["--set", f"teacher.path={models['teacher']}", "--set", f"data.source={models['rows']}"]
    fields += ["--set", "data.max_length=32", "--set", "student.dtype=fp32"]
    code, answer, err = cli("serve", "rollouts", "--model", student, *fields, "--json")
    assert code == 0, err
    own, _ = run(cli, built, "own", *more)
    with serving(answer["arguments"][2]) as server:
        served, _ = run(cli, built, "served", *more, "--rollout-server", server.url)
    assert served == own


def test_each_row_has_its_own_seed(cli, models):
    with serving(models["student"]) as server:
        run(cli, models, "a", "--rollout-server", server.url)
        first = [body["seed"] for body in server.bodies["/v1/completions"] if body["temperature"]]
        run(cli, models, "b", "--rollout-server", server.url)
        both = [body["seed"] for body in server.bodies["/v1/completions"] if body["temperature"]]
    assert len(set(first)) == len(first)
    assert sorted(both) == sorted(first * 2)
    assert metrics("a") == metrics("b")


def test_weights_go_through_the_configured_directory_and_leave_nothing(cli, models, tmp_path):
    shared = tmp_path / "shared"
    with serving(models["student"]) as server:
        run(cli, models, "out", "--rollout-server", server.url, "--set", f"rollout.server_dir={shared}")
        paths = [body["kwargs"]["weights_path"] for body in server.bodies["/collective_rpc"]]
    assert all(path.startswith(str(shared)) for path in paths)
    assert list(shared.iterdir()) == []


@pytest.mark.long
def test_student_of_both_halves_of_pairs_is_sampled_by_the_server(cli, models):
    more = ["--method", "distillm2", "--set", "schedule.kind=pairs", "--set", "rollout.temperature=0"]
    own, _ = run(cli, models, "own", *more)
    with serving(models["student"]) as server:
        served, _ = run(cli, models, "served", *more, "--rollout-server", server.url)
    assert np.allclose(losses(served), losses(own), atol=1e-6)


@pytest.mark.parametrize("change", ["other weights", "bfloat16"])
def test_server_of_another_model_or_dtype_is_refused(cli, models, tmp_path, change):
    options = {"dtype": torch.bfloat16} if change == "bfloat16" else {}
    with serving(models["student"], **options) as server:
        server.ignores_weights = change == "other weights"
        server.load(tiny.save(tmp_path / "x", seed=7)) if server.ignores_weights else None
        outcome = cli(*arguments(models, "--output", "out", "--rollout-server", server.url))
    assert_error(outcome, "server.other_model", "nats", server.url)


def test_two_runs_on_one_server_are_noticed(cli, models, tmp_path):
    """Check that a draw from the weights of another run is an error."""
    other = tiny.save(tmp_path / "x", seed=7)
    with serving(models["student"]) as server:
        answer = server.answer

        def overwritten(path, body):
            found = answer(path, body)
            if path == "/collective_rpc" and server.log[path] > 1:
                server.load(other)
            return found

        server.answer = overwritten
        outcome = cli(*arguments(models, "--output", "out", "--rollout-server", server.url))
    assert_error(outcome, "server.other_weights", "a server of its own", "--resume")


def test_restarted_server_gets_the_weights_again(cli, models):
    more = ["--set", "rollout.temperature=0"]
    own, _ = run(cli, models, "own", *more)
    with serving(models["student"]) as server:
        answer = server.answer

        def restarting(path, body):
            if path == "/v1/completions" and server.log[path] == 12:
                server.load(server.directory)  # what a restarted process has
                return 503
            return answer(path, body)

        server.answer = restarting
        served, _ = run(cli, models, "served", *more, "--rollout-server", server.url)
    assert served == own
    assert_equal_weights("own", "served")


def test_run_survives_the_death_of_its_server(cli, models):
    """Check the exit code, the saved steps, and that a resume gives the run that was never interrupted."""
    more = ["--set", "rollout.temperature=0"]
    with serving(models["student"]) as server:
        run(cli, models, "whole", *more, "--rollout-server", server.url)
        requests = server.log["/v1/completions"]
    with serving(models["student"]) as server:
        server.die_after["/v1/completions"] = requests - 3
        more += ["--output", "out", "--rollout-server", server.url]
        outcome = cli(*arguments(models, *more))
        assert_error(outcome, "server.unreachable", "nothing was applied", "--resume")
        saved = metrics("out")[-1]["step"]
        assert 0 < saved < 8
        assert_error(cli(*arguments(models, *more, "--resume")), "server.unreachable")
        server.die_after.clear()
        server.restart()
        code, _, err = cli(*arguments(models, *more, "--resume"))
        assert code == 0, err
    assert metrics("out") == metrics("whole")
    assert_equal_weights("out", "whole")


def test_slow_server_is_an_error_after_the_timeout(cli, models, monkeypatch):
    monkeypatch.setenv("DISTILLM_SERVER_TIMEOUT", "0.3")
    with serving(models["student"]) as server:
        answer = server.answer
        server.answer = lambda path, body: (
            answer(path, body) if path != "/v1/completions" else setattr(server, "delay", 1.0) or answer(path, body)
        )
        outcome = cli(*arguments(models, "--output", "out", "--rollout-server", server.url))
    assert_error(outcome, "server.timeout", "0.3 s")


# A served teacher


@pytest.mark.parametrize(
    ("method", "cache"),
    [
        ("distillm", "memory"),
        *(long("distillm", cache) for cache in ("off", "disk")),
        *(long("jsd", cache) for cache in ("off", "memory", "disk")),
    ],
)
def test_served_teacher_gives_the_same_run(cli, models, tmp_path, cache, method):
    more = ["--set", f"teacher.cache_dir={tmp_path}/cache", "--set", "rollout.temperature=0"]
    more += ["--divergence", "jsd"] if method == "jsd" else []
    own, _ = run(cli, models, "own", *more, "--teacher-cache", cache)
    with serving(models["teacher"], pools=True, generates=False) as server:
        # Random weights do not beat chance, so this server has log-probabilities to compare.
        server.generates = True
        served, result = run(cli, models, "served", *more, "--teacher-cache", cache, "--teacher-server", server.url)
        assert server.log["/pooling"] > 0
    assert np.allclose(losses(served), losses(own), atol=1e-6)
    assert_equal_weights("own", "served", 1e-5)
    assert result["report"]["teacher"]["valid_loss"] is not None
    assert result["teacher_cache"]["mode"] == cache


@pytest.mark.parametrize("family", ["gpt2", "llama-tied", "gemma2", "cohere", "opt", "phi"])
def test_head_is_read_from_the_files_of_each_family(family, tmp_path):
    """Check log-probabilities against the model's own: tied and untied heads, bias, scale and soft cap."""
    from distillm_cli.models.loading import load_backbone
    from distillm_cli.models.served import load_served_teacher

    directory = tiny.save(tmp_path / family, family)
    backbone = load_backbone(directory, dtype=torch.float32, device=torch.device("cpu"))
    batch = tiny.batch([(4, 3), (2, 5)], tiny.VOCAB)
    with serving(directory, pools=True) as server, torch.no_grad():
        teacher = load_served_teacher(directory, server.url, dtype=torch.float32, device=torch.device("cpu"))
        assert teacher.check_head(batch)
        assert teacher.has_log_probs
        found_NV = teacher.head().logits(teacher.hidden(batch))
        assert torch.allclose(found_NV, backbone.head().logits(backbone.hidden(batch)), atol=1e-4)
    held = sum(p.numel() for p in teacher.model.parameters() if p.device.type != "meta")
    assert held <= tiny.VOCAB * 33, "only the head is loaded"


@pytest.mark.long
def test_warm_disk_cache_is_shared_by_served_runs(cli, models, tmp_path):
    more = ["--set", f"teacher.cache_dir={tmp_path}/cache", "--teacher-cache", "disk"]
    with serving(models["teacher"], pools=True) as server:
        more += ["--teacher-server", server.url]
        _, first = run(cli, models, "a", *more)
        _, second = run(cli, models, "b", *more, "--alpha", "0.3")
    assert (first["teacher_cache"]["hit"], second["teacher_cache"]["hit"]) == (False, True)
    assert second["teacher_tokens"] < first["teacher_tokens"]


@pytest.mark.long
def test_served_teacher_that_dies_is_an_error_and_the_run_goes_on(cli, models):
    more = ["--teacher-cache", "off", "--set", "rollout.temperature=0"]
    with serving(models["teacher"], pools=True) as server:
        whole, _ = run(cli, models, "whole", *more, "--teacher-server", server.url)
        requests = server.log["/pooling"]
    for stop in (requests // 2, requests - 1):  # within the steps, and in the report after the last one
        output = f"out{stop}"
        with serving(models["teacher"], pools=True) as server:
            server.die_after["/pooling"] = stop
            options = [*more, "--output", output, "--teacher-server", server.url]
            outcome = cli(*arguments(models, *options))
            assert_error(outcome, "server.unreachable")
            server.die_after.clear()
            server.restart()
            code, _, err = cli(*arguments(models, *options, "--resume"))
            assert code == 0, err
        assert metrics(output) == whole
        assert_equal_weights(output, "whole")


@pytest.mark.long
def test_validation_that_fails_is_made_up_for(cli, models):
    more = ["--teacher-cache", "off", "--set", "train.select=valid_divergence"]
    with serving(models["teacher"], pools=True) as server:
        whole, _ = run(cli, models, "whole", *more, "--teacher-server", server.url)
    with serving(models["teacher"], pools=True) as server:
        answer = server.answer

        def failing(path, body):
            has_begun = Path("out/metrics.jsonl").exists() and metrics("out")
            if path == "/pooling" and has_begun and metrics("out")[-1]["step"] == 4:  # its validation is not logged yet
                server.die_after["/pooling"] = 0
                return 500
            return answer(path, body)

        server.answer = failing
        options = [*more, "--output", "out", "--teacher-server", server.url]
        assert_error(cli(*arguments(models, *options)), "server.unreachable", "validation after step 4", "--resume")
        server.answer = answer
        server.die_after.clear()
        server.restart()
        code, _, err = cli(*arguments(models, *options, "--resume"))
        assert code == 0, err
    assert metrics("out") == whole
    assert_equal_weights("out", "whole")


def test_pooling_server_of_another_teacher_is_refused(cli, models, tmp_path):
    other = tiny.save(tmp_path / "x", hidden_size=48, seed=7)
    with serving(other, pools=True) as server:
        outcome = cli(*arguments(models, "--output", "out", "--teacher-server", server.url))
    assert_error(outcome, "server.other_model", "log-probabilities differ")


def test_states_no_better_than_chance_are_refused(cli, models, tmp_path):
    """Check a pooling server without log-probabilities: what the head makes of its states must predict the rows."""
    with serving(models["teacher"], pools=True, generates=False) as server:
        outcome = cli(*arguments(models, "--output", "out", "--teacher-server", server.url))
    assert_error(outcome, "server.other_model", "no better than chance")


@pytest.mark.long
def test_teacher_that_knows_the_rows_is_accepted_and_compared(cli):
    """Check a stock pooling server, and the baselines of a run whose teacher has no scores."""
    from distillm_cli.models.model_paths import locate_model

    options = [
        "distill",
        "--recipe",
        "quickstart",
        "--steps",
        "2",
        "--set",
        "student.sft_epochs=0",
        "--batch-size",
        "8",
    ]
    options += [
        "--set",
        "data.limit=24",
        "--set",
        "eval.report_rows=4",
        "--set",
        "data.valid_limit=8",
        "--compare",
        "--json",
    ]
    with serving(locate_model("builtin:pronounce")[0], pools=True, generates=False) as server:
        code, result, err = cli(*options, "--output", "out", "--teacher-server", server.url)
    assert code == 0, err
    assert result["report"]["teacher"]["valid_loss"] < 2
    assert "error_rate" not in result["report"]["teacher"]


def test_missing_states_stop_the_run_before_the_first_step(cli, models):
    with serving(models["teacher"], pools=True) as server:
        server.lose_states = 1
        outcome = cli(*arguments(models, "--output", "out", "--teacher-server", server.url))
    assert_error(outcome, "server.invalid_answer", "shape")


@pytest.mark.long
def test_both_servers_give_the_same_run(cli, models):
    more = ["--set", "rollout.temperature=0", "--method", "gkd"]
    own, _ = run(cli, models, "own", *more)
    with serving(models["student"]) as rollouts, serving(models["teacher"], pools=True) as teacher:
        served, _ = run(cli, models, "served", *more, "--rollout-server", rollouts.url, "--teacher-server", teacher.url)
    assert np.allclose(losses(served), losses(own), atol=1e-6)


# Before anything is loaded


def test_server_that_is_not_there_is_an_error_before_models_are_loaded(cli, models):
    for flag in ("--teacher-server", "--rollout-server"):
        outcome = cli(*arguments(models, "--output", "out", flag, "http://127.0.0.1:9"))
        assert_error(outcome, "server.unreachable", "http://127.0.0.1:9", flag[2:].replace("-", "."))


def test_server_with_a_short_context_is_refused(cli, models):
    with serving(models["student"], context=16) as server:
        outcome = cli(*arguments(models, "--output", "out", "--rollout-server", server.url))
    assert_error(outcome, "server.context_too_short", "16", "32")


def test_rollout_server_that_loads_no_weights_is_refused(cli, models):
    with serving(models["student"], reloads=False) as server:
        outcome = cli(*arguments(models, "--output", "out", "--rollout-server", server.url))
    assert_error(outcome, "server.no_reload", "VLLM_SERVER_DEV_MODE=1")


@pytest.mark.parametrize("method", ["minillm", "skd"])
def test_methods_that_decode_with_the_teacher_refuse_servers(cli, models, method):
    for flag, field in (("--teacher-server", "teacher.server"), ("--rollout-server", "rollout.server")):
        outcome = cli(
            "distill", "--method", method, "--teacher", models["teacher"], "--student", models["student"],
            "--data", models["rows"], flag, "http://127.0.0.1:9", "--json",
        )  # fmt: skip
        assert_error(outcome, "recipe.fields_conflict", field, method)


@pytest.mark.parametrize(
    "more",
    [
        ["--set", "ctcd.enabled=true"],
        ["--set", "okd.rank=4"],
        ["--student", "layers:1"],
        ["--set", "data.mixup=0.4"],
        ["--method", "seqkd"],
    ],
    ids=lambda more: more[-1],
)
def test_runs_that_need_the_teacher_itself_refuse_a_server(cli, models, more):
    outcome = cli(
        "distill", "--teacher", models["teacher"], "--student", models["student"], "--data", models["rows"],
        "--teacher-server", "http://127.0.0.1:9", "--json", *more,
    )  # fmt: skip
    assert_error(outcome, "recipe.fields_conflict", "teacher.server")


def test_freshness_refuses_a_rollout_server(cli, models):
    outcome = cli(
        "distill", "--teacher", models["teacher"], "--student", models["student"], "--data", models["rows"],
        "--rollout-server", "http://127.0.0.1:9", "--set", "schedule.kind=adaptive", "--set", "schedule.freshness=true",
        "--json",
    )  # fmt: skip
    assert_error(outcome, "recipe.fields_conflict", "schedule.freshness")


def test_rollout_server_without_rollouts_is_an_unused_field(cli, models):
    outcome = cli(
        "distill", "--method", "kd", "--teacher", models["teacher"], "--student", models["student"],
        "--data", models["rows"], "--rollout-server", "http://127.0.0.1:9", "--json",
    )  # fmt: skip
    assert_error(outcome, "recipe.unused_field", "--rollout-server")


@pytest.mark.long
def test_resume_may_move_the_server_but_not_drop_it(cli, models):
    more = ["--output", "out", "--set", "rollout.temperature=0"]
    with serving(models["student"]) as server:
        run(cli, models, "out", "--rollout-server", server.url, "--set", "rollout.temperature=0")
    with serving(models["student"]) as server:
        code, _, err = cli(*arguments(models, *more, "--resume", "--rollout-server", server.url))
        assert code == 0, err
    outcome = cli(*arguments(models, *more, "--resume", "--set", "rollout.server=null"))
    assert_error(outcome, "checkpoint.changed", "rollout.server")


def test_weights_of_a_killed_run_are_removed(tmp_path, monkeypatch):
    killed = subprocess.Popen(["true"])
    killed.wait()
    left = tmp_path / f"distillm-weights-{killed.pid}-abc"
    running = tmp_path / f"distillm-weights-{os.getppid()}-abc"
    for directory in (left, running):
        directory.mkdir()
    monkeypatch.setattr(server_sampler, "_SHARED_MEMORY", tmp_path)
    with server_sampler._weights_directory(None) as directory:
        assert directory.parent == tmp_path
        assert not left.exists()
        assert running.exists()
    assert not directory.exists()
