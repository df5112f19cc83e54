"""Train tiny sentence encoders with ``--method disco``, and score them with ``eval``."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from distillm_cli.models.sentence import load_encoder
from tests import tiny
from tests.command_line import assert_error, call
from tests.marks import long

SMALL = [
    "--batch-size", "8", "--lr", "3e-4", "--dtype", "fp32", "--set", "train.threads=1", "--set", "train.save_steps=2",
    "--set", "train.eval_steps=2", "--set", "train.log_steps=1", "--json", "--quiet",
]  # fmt: skip
WORDS = ["plane", "dog", "runs", "takes", "off", "girl", "hair", "plays", "man", "eats", "soccer", "beach"]
CPU = torch.device("cpu")


def rows(count, seed):
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        first = draw.sample(WORDS, 4)
        shared = draw.randint(0, 4)
        second = first[:shared] + draw.sample(WORDS, 4 - shared)
        found.append({"sentence1": " ".join(first), "sentence2": " ".join(second), "score": shared * 1.25})
    return found


def write(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for seed, (split, count) in enumerate((("train", 40), ("valid", 20), ("test", 20))):
        write(tmp_path / f"data/{split}.jsonl", rows(count, seed))
    tiny.save_encoder(tmp_path / "teacher")
    return tmp_path


@pytest.fixture
def cli(capsys):
    return lambda *argv: call(capsys, *argv)


def distill(student="layers:2", **sets):
    fields = [word for key, value in sets.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    return [
        "distill",
        "--method",
        "disco",
        "--teacher",
        "teacher",
        "--student",
        student,
        "--data",
        "data",
        *SMALL,
        *fields,
    ]


def weights(output):
    return load_file(Path(output) / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def normalized(directory, texts):
    encoder = load_encoder(str(directory), dtype=torch.float32, device=CPU)
    return F.normalize(encoder.embed(encoder.sequences(texts)), dim=1)


def test_run_writes_a_model_for_two_libraries(cli, workdir):
    """Check the output directory, its figures, the resume of a finished run, and the scores of ``eval``."""
    code, result, err = cli(*distill(), "--steps", "6", "--output", "run")
    assert code == 0, err
    assert result["report"].keys() == {"student_before", "student_after", "teacher"}
    assert result["steps"] == result["dataset_steps"] == 6
    assert {"spearman", "pearson", "teacher_cosine", "valid_loss"} == result["report"]["student_after"].keys()
    lines = [json.loads(line) for line in (workdir / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 2, 4, 6]
    assert all(line["temperature"] > 0 for line in steps)
    assert len({line["temperature"] for line in steps}) > 1

    directory = workdir / "run"
    model = AutoModel.from_pretrained(directory)
    assert model.config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(directory)("a")["input_ids"]
    for name in ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "README.md"):
        assert (directory / name).is_file()
    assert "sentence-similarity" in (directory / "README.md").read_text()
    listed = json.loads((directory / "manifest.json").read_text())["written"]
    assert {"1_Pooling/config.json", "2_Normalize/config.json"} <= listed.keys()

    code, scores, err = cli("eval", "run", "teacher", "--suite", "data", "--dtype", "fp32", "--json", "--quiet")
    assert code == 0, err
    (suite,) = scores["suites"].values()
    assert suite["rows"] == 20
    assert suite["spearman"]["seeds"] == {"cosine": suite["spearman"]["mean"]}
    code, held_out, err = cli("eval", "run", "--dtype", "fp32", "--json", "--quiet")
    assert code == 0, err
    assert held_out["suites"]["held-out"]["spearman"]["mean"] == pytest.approx(
        result["report"]["student_after"]["spearman"], abs=1e-9
    )
    saved = json.loads((directory / "eval/data/cosine/results.json").read_text())
    assert saved["spearman"]["mean"] == suite["spearman"]["mean"]
    assert len((directory / "eval/data/cosine/predictions-cosine.jsonl").read_text().splitlines()) == 20

    before = weights("run")
    assert cli("distill", "--resume", "--output", "run", "--json", "--quiet")[0] == 0
    assert same(before, weights("run"))
    code, _, err = cli(*distill(), "--steps", "2", "--output", "run", "--overwrite")
    assert code == 0, err


def test_mse_brings_the_student_closer_to_the_teacher(cli, workdir):
    code, result, err = cli(*distill(disco__loss="mse"), "--steps", "12", "--output", "run")
    assert code == 0, err
    before, after = (result["report"][f"student_{when}"]["teacher_cosine"] for when in ("before", "after"))
    assert after > before + 1
    assert result["valid_loss"] == pytest.approx(1 - after / 100, abs=1e-6)


def test_output_in_sentence_transformers(cli, workdir):
    """Check that sentence-transformers computes the same embeddings, with and without the projection."""
    library = pytest.importorskip("sentence_transformers")
    texts = ["girl plays soccer", "dog"]
    for output, fields in (("plain", {}), ("dense", {"disco__keep_projection": "true"})):
        code, _, err = cli(*distill("random:1x16", **fields), "--steps", "2", "--output", output)
        assert code == 0, err
        found = torch.tensor(library.SentenceTransformer(output, device="cpu").encode(texts))
        assert found.shape == (2, 16 if output == "plain" else 32)
        torch.testing.assert_close(found, normalized(output, texts), rtol=1e-5, atol=1e-6)


def test_kept_projection_is_in_the_output(cli, workdir):
    code, result, err = cli(*distill("random:1x16", disco__keep_projection="true"), "--steps", "4", "--output", "run")
    assert code == 0, err
    assert normalized("run", ["dog"]).shape == (1, 32)
    code, scores, err = cli("eval", "run", "--dtype", "fp32", "--json", "--quiet")
    assert code == 0, err
    assert scores["suites"]["held-out"]["spearman"]["mean"] == pytest.approx(
        result["report"]["student_after"]["spearman"],
        abs=1,  # pairs of the same words in another order have almost equal cosines
    )


def without_steps_after(output, step):
    """Remove everything written after the checkpoint of ``step``, as if the run had been killed then."""
    for path in (Path(output) / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    for name in ("model.safetensors", "README.md", "result.json"):
        (Path(output) / name).unlink(missing_ok=True)


@pytest.mark.parametrize("fields", [{}, long({"data__bucket": 2, "train__accumulate": 2})])
def test_resume_restores_queue_and_temperature(cli, workdir, fields):
    """Check that a resumed run has the same weights, queue, τ and W as an uninterrupted one, to the bit."""
    argv = [*distill(train__keep=3, **({"disco__queue": 20} | fields)), "--steps", "6"]
    for output in ("full", "parts"):
        code, _, err = cli(*argv, "--output", output)
        assert code == 0, err
    without_steps_after("parts", 2)
    state = load_file("parts/checkpoints/step-000002/training.safetensors")
    assert len(state["extras.disco.queue_QD"]) == min(20, 16 * fields.get("train__accumulate", 1))
    code, result, err = cli("distill", "--resume", "--output", "parts", "--json", "--quiet")
    assert (code, result["steps"]) == (0, 6), err
    assert same(weights("full"), weights("parts"))
    states = [load_file(f"{name}/checkpoints/step-000006/training.safetensors") for name in ("full", "parts")]
    assert same(*states)


@pytest.mark.long
def test_killed_process_resumes_to_the_same_bits(cli, workdir):
    argv = [*distill(), "--steps", "30"]
    code, _, err = cli(*argv, "--output", "full")
    assert code == 0, err
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([sys.executable, "-m", "distillm_cli", *argv, "--output", "killed"], env=environment)
    deadline = time.monotonic() + 60
    while not any((workdir / "killed/checkpoints").glob("step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (workdir / "killed/result.json").exists()
    code, result, err = cli("distill", "--resume", "--output", "killed", "--json", "--quiet")
    assert (code, result["steps"]) == (0, 30), err
    assert same(weights("full"), weights("killed"))


@pytest.mark.parametrize("killed_in", ["distilled", long(".")])
def test_pairs_follow_the_distillation(cli, workdir, killed_in):
    """Check both stages, and a resume in either of them."""
    argv = [*distill(disco__pairs_epochs=1.2, disco__pairs_lr=1e-3, train__keep=5), "--steps", "4"]
    code, result, err = cli(*argv, "--output", "full")
    assert code == 0, err
    assert result["steps"] == 6
    assert list(result["report"]) == ["student_before", "student_after_distillation", "student_after", "teacher"]
    assert not same(weights("full"), weights("full/distilled"))
    shutil.copytree("full", "parts")
    without_steps_after("parts", 2)
    if killed_in == "distilled":
        shutil.rmtree("parts/checkpoints")
        without_steps_after("parts/distilled", 2)
    code, result, err = cli("distill", "--resume", "--output", "parts", "--json", "--quiet")
    assert (code, result["steps"]) == (0, 6), err
    assert same(weights("full"), weights("parts"))
    assert same(weights("full/distilled"), weights("parts/distilled"))


def test_resume_refuses_other_scores(cli, workdir):
    argv = [*distill(disco__pairs_epochs=1), "--steps", "2", "--output", "run"]
    assert cli(*argv)[0] == 0
    write(workdir / "data/train.jsonl", [row | {"score": 5 - row["score"]} for row in rows(40, 0)])
    outcome = cli("distill", "--resume", "--output", "run", "--json", "--quiet")
    assert_error(outcome, "checkpoint.changed", "pairs have changed")


def test_similar_pairs_without_scores(cli, workdir):
    for split, seed in (("train", 1), ("valid", 2)):
        triples = [
            {"anchor": row["sentence1"], "positive": row["sentence2"], "negative": "dog"} for row in rows(24, seed)
        ]
        write(workdir / f"data/{split}.jsonl", triples)
    code, result, err = cli(*distill(disco__pairs_epochs=1), "--steps", "2", "--output", "run")
    assert code == 0, err
    assert result["steps"] == 3
    assert result["valid_loss"] > 0


def test_best_weights_by_spearman(cli, workdir):
    code, result, err = cli(*distill(train__select="spearman"), "--steps", "8", "--output", "run")
    assert code == 0, err
    lines = [json.loads(line) for line in (workdir / "run/metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line["spearman"] for line in lines if "spearman" in line and line["step"]}
    assert values[result["best_step"]] == max(values.values())
    assert result["report"]["student_after"]["spearman"] == pytest.approx(max(values.values()), abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_other_teachers_and_students(cli, workdir, family):
    """Check a causal model, and an encoder-decoder, as the teacher and as the student."""
    tiny.save(workdir / "other", family, own_tokenizer=tiny.tokenizer("abcdefghijklmnopqrstuvwxyz ", size=tiny.VOCAB))
    code, _, err = cli(*distill("other"), "--steps", "2", "--output", "a")
    assert code == 0, err
    argv = distill("random:1x16")
    argv[argv.index("teacher")] = "other"
    code, _, err = cli(*argv, "--steps", "2", "--output", "b", "--set", "disco.pooling=last")
    assert code == 0, err
    for output in ("a", "b"):
        assert AutoModel.from_pretrained(output)
        assert load_encoder(output, dtype=torch.float32, device=CPU).pooling == {"a": "mean", "b": "last"}[output]
        assert cli("eval", output, "--suite", "data", "--dtype", "fp32", "--json", "--quiet")[0] == 0


def test_student_directory_with_its_own_tokenizer(cli, workdir):
    """Check that teacher and student may have different vocabularies: only embeddings are compared."""
    tiny.save_encoder(workdir / "small", pooling=None, num_hidden_layers=1, hidden_size=16, vocab_size=60)
    tiny.tokenizer("zyxwvutsrqponmlkjihgfedcba ", size=60).save_pretrained(workdir / "small")
    code, _, err = cli(*distill("small"), "--steps", "2", "--output", "run")
    assert code == 0, err
    assert AutoTokenizer.from_pretrained("run").get_vocab() == AutoTokenizer.from_pretrained("small").get_vocab()


def test_out_of_memory_halves_the_batch(cli, workdir, monkeypatch):
    """Check that a step whose first attempt fails has the loss and the queue of a step that does not fail."""
    from distillm_cli.models import sentence

    argv = [*distill(student__dropout=0.0, disco__queue=16), "--steps", "4"]
    code, expected, err = cli(*argv, "--output", "full")
    assert code == 0, err
    forward, calls = sentence.SentenceEncoder.forward, []

    def failing(self, batch):
        if self.training:
            calls.append(batch.size)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
        return forward(self, batch)

    monkeypatch.setattr(sentence.SentenceEncoder, "forward", failing)
    code, result, err = cli(*argv, "--output", "halved")
    assert code == 0, err
    assert "out of memory with micro-batches" in err
    assert result["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)


def test_bad_input_is_one_line(cli, workdir):
    """Check the errors, each before anything is loaded or written."""
    write(workdir / "texts.jsonl", [{"sentence": f"dog {word}"} for word in WORDS])
    write(workdir / "prompts.jsonl", [{"prompt": word, "completion": word} for word in WORDS])
    cases = [
        ([*distill(), "--compare"], "usage.exclusive_options", "--compare"),
        ([*distill(), "--warm-teacher-cache"], "usage.exclusive_options", "--warm-teacher-cache"),
        ([*distill(), "--rebuild-teacher-cache"], "usage.exclusive_options", "--rebuild-teacher-cache"),
        ([*distill(), "--teacher-cache", "disk"], "recipe.unused_field", "teacher.cache"),
        ([*distill(disco__pairs_epochs=1), "--data", "texts.jsonl"], "data.no_pairs", "texts.jsonl:1"),
        ([*distill(train__select="spearman"), "--data", "texts.jsonl"], "data.no_held_out_rows", "spearman"),
        (distill("layers:9"), "usage.invalid_layers", "4 layers"),
        (distill("random:gpt2:1x16"), "usage.invalid_student", "bert"),
        (distill("nowhere/x/y"), "model.not_found", "nowhere"),
        (["distill", "--method", "kd", *distill()[3:], "--data", "prompts.jsonl"], "model.not_causal", "DisCo only"),
        (
            ["generate", "--model", "teacher", "--prompt", "a", "--output", "bad.jsonl", "--json", "--quiet"],
            "model.not_causal",
            "DisCo only",
        ),
    ]
    for argv, code, mention in cases:
        if argv.count("--data") > 1:
            del argv[argv.index("--data") : argv.index("--data") + 2]
        target = [] if argv[0] == "generate" or "--warm-teacher-cache" in argv else ["--output", "bad"]
        assert_error(cli(*argv, *target), code, mention)
        assert not (workdir / "bad").exists()


def test_teacher_without_pooling_is_refused(cli, workdir):
    (workdir / "teacher/1_Pooling/config.json").unlink()
    message = assert_error(cli(*distill(), "--output", "bad"), "model.no_pooling", "teacher", "disco.pooling=mean")
    assert not (workdir / "bad").exists(), message
    assert cli(*distill(disco__pooling="cls"), "--steps", "1", "--output", "run")[0] == 0
    assert_error(cli("eval", "teacher", "--suite", "data", "--json", "--quiet"), "model.no_pooling")


def test_settings_of_responses_are_refused_for_pairs(cli, workdir):
    for words in (["--metric", "rouge_l"], ["--greedy"], ["--seeds", "1"], ["--set", "eval.top_k=3"]):
        outcome = cli("eval", "teacher", "--suite", "data", *words, "--json", "--quiet")
        assert_error(outcome, "usage.unused_option", words[-1] if words[0] == "--set" else words[0])


def test_mixed_suite_is_refused(cli, workdir):
    write(workdir / "mixed.jsonl", [*rows(2, 0), {"prompt": "a", "completion": "b"}])
    assert_error(cli("eval", "teacher", "--suite", "mixed.jsonl", "--json", "--quiet"), "data.mixed_rows", "2 of 3")
    write(workdir / "plain.jsonl", [{"prompt": "a", "completion": "b"}])
    outcome = cli("eval", "teacher", "--suite", "plain.jsonl", "--json", "--quiet")
    assert_error(outcome, "model.not_causal", "DisCo only")


def test_plan_counts_steps_and_negatives(cli, workdir):
    sets = ["--set", "disco.queue=10", "--set", "disco.pairs_epochs=2", "--batch-size", "8", "--json", "--quiet"]
    models = ["--method", "disco", "--teacher", "teacher", "--student", "layers:2"]
    code, result, err = cli("plan", *models, "--data", "data", *sets)
    assert code == 0, err
    assert (result["negatives"], result["pair_steps"]) == (17, 10)
    assert result["models"]["student"]["layers"] == 2
    assert result["steps"] == 5 * result["steps_per_epoch"]


PIPELINE = """
stages:
  embed:
    verb: distill
    method: disco
    teacher: {path: teacher}
    student: {path: "layers:2", dtype: fp32}
    data: {source: data}
    train: {steps: 4, batch_size: 8, save_steps: 2, threads: 1}
  score:
    verb: eval
    models: ["stage:embed"]
    eval: {suites: [data]}
"""


def test_pipeline_of_distillation_and_scores(cli, workdir):
    (workdir / "all.yaml").write_text(PIPELINE)
    code, result, err = cli("run", "all.yaml", "--output", "all", "--json", "--quiet")
    assert code == 0, err
    suites = result["stages"]["score"]["result"]["suites"]
    assert suites["data"]["spearman"]["mean"] == pytest.approx(suites["data"]["spearman"]["seeds"]["cosine"])
    code, again, err = cli("run", "all.yaml", "--output", "all", "--json", "--quiet")
    assert (code, again["stages"]["embed"]["status"]) == (0, "skipped"), err
    assert_error(cli("plan", "--recipe", "all.yaml", "--json", "--quiet"), "recipe.invalid_stage", "embed")
