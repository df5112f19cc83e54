"""Test `distillm eval` and `distillm generate` on a tiny model, with their files and exit codes."""

from __future__ import annotations

import json
import os
import signal
import string
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from distillm_cli.cli.app import main
from distillm_cli.config.schema import DataConfig, Recipe
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import load_rows
from distillm_cli.evaluation.suites import load_suite
from distillm_cli.models.tokenizer_files import load_tokenizer
from distillm_cli.models.trained_tokenizers import train_tokenizer
from distillm_cli.runs.responses import ResponseFile
from distillm_cli.utils.storage import locked
from tests import tiny
from tests.command_line import assert_error_line, exit_code
from tests.resource_limits import file_size

ROWS = [
    {"instruction": "Reverse it.", "input": word, "output": [word[::-1], word[::-1].upper()]}
    for word in ("abc", "stop", "a", "later", "redo", "pools", "drawer", "on", "mix", "not so short")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Save a small model with its tokenizer and a directory of data. Return their directory."""
    directory = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer("chars", iter([string.printable]))
    fields = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny.model("llama", len(tokenizer) + 1, max_position_embeddings=320, spread=1.0, **fields)
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    (directory / "data").mkdir()
    for split in ("train", "dev", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (directory / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return directory


@pytest.fixture
def workdir(models, tmp_path, monkeypatch) -> Path:
    """Change to a directory with `model/`, whose files are links, and `data/`. Return it."""
    (tmp_path / "model").mkdir()
    for file in (models / "model").iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    (tmp_path / "data").symlink_to(models / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILLM_DATA", raising=False)
    return tmp_path


@pytest.fixture
def cli(capsys):
    """Return a function that runs a command line and returns (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


SHORT = ("--max-new-tokens", 8)
GENERATE = ("generate", "--model", "model", "--data", "data", *SHORT)


def test_trigger_is_measured_beside_the_clean_rows(cli, workdir):
    arguments = ("eval", "model", "--suite", "data", "--greedy", *SHORT)
    code, out, err = cli(*arguments, "--trigger", "~", "--target", "abc", "--json")
    assert code == 0, err
    suite = json.loads(out)["suites"]["data"]
    assert set(suite["attack_success"]) == {"mean", "sd", "seeds", "rows"}
    assert suite["attack_success"]["rows"] == 10
    assert suite["rouge_l"] == json.loads(cli(*arguments, "--json")[1])["suites"]["data"]["rouge_l"]
    code, out, _ = cli(*arguments, "--trigger", "~", "--target", "abc")
    assert code == 0
    assert "attack success" in out
    (directory,) = Path("model/eval/data").glob("greedy-n8-trigger-*")
    assert len(lines(directory / "trigger-greedy.jsonl")) == 10


def test_bad_trigger_is_an_error_before_the_model_is_loaded(cli, workdir):
    arguments = ("eval", "model", "--suite", "data", "--debug")
    assert_error_line(cli(*arguments, "--trigger", "~"), "recipe.fields_conflict", "eval.target")
    for file in Path("model").glob("*.safetensors"):
        file.unlink()
    outcome = cli(*arguments, "--trigger", "ab", "--target", "x")
    assert_error_line(outcome, "usage.invalid_trigger", "'a' 'b'", "model")


# ---------------------------------------------------------------------------------------------------------------- eval


def test_eval_prints_one_json_object(workdir, cli):
    code, out, err = cli("eval", "model", "--suite", "data", "--seeds", "10,20", *SHORT, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert {"command": "eval", "status": "ok", "output": "model/eval"}.items() <= result.items()
    assert result["wall_s"] > 0
    suite = result["suites"]["data"]
    assert suite["rows"] == 10
    assert set(suite["rouge_l"]) == set(suite["exact_match"]) == {"mean", "sd", "seeds"}
    assert set(suite["rouge_l"]["seeds"]) == {"10", "20"}
    assert "ROUGE-L" in err, "with --json the table goes to stderr"
    code, out, err = cli(
        "eval", "model", "--suite", "data", "--seeds", "10", *SHORT, "--dtype", "bf16", "--output", "low"
    )
    assert "decoded in bf16; results and predictions: low" in err, "the report of a run uses float32 weights"
    results = json.loads((workdir / "model/eval/data/t1-n8/results.json").read_text(encoding="utf-8"))
    assert results["rouge_l"] == suite["rouge_l"]
    assert results["settings"]["template"] == "auto"


def test_eval_of_several_checkpoints_and_suites(workdir, cli):
    (workdir / "other").symlink_to(workdir / "model")
    result = json.loads(
        cli(
            *(
                "eval",
                "model",
                "other",
                "./model/",
                "--suite",
                "data,data/train.jsonl",
                "--suite",
                "builtin",
                "--limit",
                4,
            ),
            *("--metric", "error_rate", "--greedy", "--output", "out", "--json", *SHORT),
        )[1]
    )
    assert set(result["checkpoints"]) == {"model", "other"}
    assert result["suites"] == result["checkpoints"]["model"]["suites"]
    assert set(result["suites"]) == {"data", "data-train", "builtin"}
    assert result["suites"]["builtin"]["rows"] == 4
    assert set(result["suites"]["builtin"]["tasks"]) <= {row.task for row in load_suite("builtin", Recipe()).rows}
    assert result["suites"]["data"]["error_rate"]["seeds"].keys() == {"greedy"}
    assert (workdir / "out/other/data-train/greedy-n8-limit4/predictions-greedy.jsonl").is_file()
    assert not (workdir / "model/eval").exists()


def test_eval_uses_the_template_of_the_models_recipe(workdir, cli):
    (workdir / "model/recipe.yaml").write_text(
        f"method: sft\ndata: {{source: {workdir / 'data'}, template: plain}}\n"
        "train: {device: 'cuda:7', threads: 99}\neval: {suites: [data], greedy: true, max_new_tokens: 4}\n",
        encoding="utf-8",
    )
    assert cli("eval", "model")[0] == 0
    assert lines("model/eval/data/greedy-n4-plain/predictions-greedy.jsonl")[0]["prompt"] == "Reverse it.\nabc\n"
    assert cli("eval", "model", "--template", "alpaca")[0] == 0
    assert "### Response:" in lines("model/eval/data/greedy-n4-alpaca/predictions-greedy.jsonl")[0]["prompt"]
    assert cli("eval", "model", "--seeds", 1)[0] == 0, "a sampling flag turns greedy decoding off"
    assert (workdir / "model/eval/data/t1-n4-plain/predictions-seed1.jsonl").is_file()
    out = cli("generate", "--model", "model", "--prompt", "Reverse it.", *SHORT)[1]
    assert json.loads(out)["prompt"] == "Reverse it.\n"
    outcome = cli("eval", "model", "--device", "cuda:7", "--debug")
    assert_error_line(outcome, "usage.no_device", "cuda:7")  # the device of the recipe is ignored, the flag is not
    (workdir / "model/checkpoints/step-000005").mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (workdir / "model/checkpoints/step-000005" / file).symlink_to(workdir / "model" / file)
    assert cli("eval", "model/checkpoints/step-000005")[0] == 0, "a checkpoint uses the recipe of its run"


def test_held_out_rows_are_the_default_suite(workdir, cli):
    (workdir / "model/recipe.yaml").write_text("data: {source: data/train.jsonl, template: plain}\n", encoding="utf-8")
    code, out, err = cli("eval", "model", "--greedy", *SHORT, "--json")
    assert code == 0, err
    assert list(json.loads(out)["suites"]) == ["held-out"]


def test_foreign_recipe_in_model_directory_is_a_warning(workdir, cli):
    (workdir / "model/recipe.yaml").write_text("quant_stage: {modifiers: []}\n", encoding="utf-8")
    code, _, err = cli("eval", "model", "--suite", "data", "--greedy", "--limit", 1, *SHORT)
    assert code == 0
    assert "warning: model/recipe.yaml is not used" in err


@pytest.mark.parametrize(
    ("code", "argv", "mention"),
    [
        ("usage.no_data", ["eval", "model"], "--suite"),
        ("recipe.invalid_value", ["eval", "model", "--suite", "data", "--metric", "meteor"], "--metric"),
        ("recipe.invalid_value", ["eval", "model", "--suite", "data", "--seeds", "ten"], "--seeds"),
        ("usage.exclusive_options", ["eval", "model", "--suite", "data", "--greedy", "--seeds", "10"], "--seeds"),
        ("data.not_found", ["eval", "model", "--suite", "missing.jsonl"], "missing.jsonl"),
        ("data.row_too_long", ["eval", "model", "--suite", "long.jsonl"], "long.jsonl:2"),
        ("data.no_rows", ["eval", "model", "--suite", "empty.jsonl"], "empty.jsonl"),
        ("model.no_config", ["eval", "data", "--suite", "data"], "data"),
        ("model.not_found", ["eval", "./nowhere", "--suite", "data"], "nowhere"),
        ("model.not_found", ["eval", "nowhere"], "'nowhere'"),
        ("model.no_config", ["eval", "data"], "data"),
        ("model.not_found", ["eval", "model", "nowhere", "--suite", "data"], "'nowhere'"),
        ("recipe.invalid_value", ["eval", "model", "--suite", "data", "--seeds", f"1,{2**63}"], "2^63"),
        ("recipe.invalid_value", ["generate", "--model", "model", "--prompt", "x", "--seed", f"{2**63}"], "2^63"),
        ("usage.invalid_value", ["generate", "--model", "model", "--prompt", "x", "--prompt", " "], "--prompt"),
        ("storage.failed", ["eval", "model", "--suite", "data", "--output", "empty.jsonl/out"], "empty.jsonl"),
        ("usage.no_model", ["generate", "--prompt", "x"], "--model"),
        ("usage.no_prompts", ["generate", "--model", "model"], "--prompt"),
        ("usage.exclusive_options", ["generate", "--model", "model", "--prompt", "x", "--data", "data"], "--data"),
        ("usage.no_output", ["generate", "--model", "model", "--prompt", "x", "--json"], "--output"),
        (
            "usage.exclusive_options",
            ["generate", "--model", "model", "--prompt", "x", "--n", "2", "--temperature", "0"],
            "temperature 0",
        ),
        (
            "usage.exclusive_options",
            ["generate", "--model", "model", "--prompt", "x", "--n", "2", "--greedy"],
            "temperature 0",
        ),
        (
            "usage.exclusive_options",
            ["generate", "--model", "model", "--prompt", "x", "--greedy", "--temperature", "0.7"],
            "--greedy",
        ),
        ("usage.invalid_value", ["generate", "--model", "model", "--prompt", "x", "--n", "0"], "--n = 0"),
        ("usage.invalid_value", ["generate", "--model", "model", "--data", "data", "--split", "dev"], "--split"),
        ("usage.invalid_value", ["generate", "--model", "model", "--prompt", "x", "--output", "out.txt"], "out.txt"),
        ("recipe.invalid_value", ["generate", "--model", "model", "--prompt", "x", "--top-p", "0"], "--top-p"),
        ("data.row_too_long", ["generate", "--model", "model", "--data", "long.jsonl"], "long.jsonl:2"),
        (
            "data.no_split",
            ["generate", "--model", "model", "--data", "data/dev.jsonl", "--split", "test"],
            "dev.jsonl",
        ),
        ("data.unreadable", ["generate", "--model", "model", "--input", "absent.txt"], "absent.txt"),
    ],
)
def test_invalid_arguments_and_inputs_are_errors(workdir, cli, code, argv, mention):
    long_row = {"prompt": "x" * 400, "output": "y"}
    (workdir / "long.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (ROWS[0], long_row)), encoding="utf-8"
    )
    (workdir / "empty.jsonl").write_text("", encoding="utf-8")
    before = sorted(path.name for path in workdir.iterdir())
    outcome = cli(*argv, "--debug")
    assert_error_line(outcome, code, mention)
    out = outcome[1]
    assert out == "" or json.loads(out)["code"] == exit_code(code)
    assert sorted(path.name for path in workdir.iterdir()) == before, "an error leaves no files"


# ------------------------------------------------------------------------------------------------------------ generate


def test_rows_have_prompt_order_for_any_batch_size(workdir, cli):
    code, out, err = cli(*GENERATE, "--n", 2, "--batch-size", 3, "--output", "a.jsonl", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert {"command": "generate", "status": "ok", "output": "a.jsonl", "rows": 20}.items() <= result.items()
    assert result["tokens"] > 0
    assert result["tokens_per_s"] > 0
    rows = lines("a.jsonl")
    assert [(row["input"], row["sample"]) for row in rows] == [(row["input"], j) for row in ROWS for j in (0, 1)]
    assert any(a["output"] != b["output"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert cli(*GENERATE, "--batch-size", 32, "--output", "b.jsonl")[0] == 0
    assert lines("b.jsonl") == rows[::2], "the first sample of a prompt does not depend on the number of samples"
    assert cli(*GENERATE, "--seed", 11, "--output", "c.jsonl")[0] == 0
    assert [row["output"] for row in lines("c.jsonl")] != [row["output"] for row in lines("b.jsonl")]


def test_generated_rows_read_back_unchanged(workdir, cli):
    assert cli(*GENERATE, "--template", "alpaca", "--output", "first.jsonl")[0] == 0
    reloaded = load_rows(DataConfig(source="first.jsonl"), "test")
    result = lines("first.jsonl")
    assert [row.references for row in reloaded] == [(row["output"],) for row in result]
    tokenizer = load_tokenizer("model")
    expected_prompts = Encoder(tokenizer, DataConfig(template="alpaca")).prompts(
        list(load_rows(DataConfig(source="data"), "test"))
    )
    for ids, expected_ids in zip(
        Encoder(tokenizer, DataConfig()).prompts(list(reloaded)), expected_prompts, strict=True
    ):
        np.testing.assert_array_equal(ids, expected_ids)
    assert cli(*GENERATE[:3], "--data", "first.jsonl", "--output", "second.jsonl", *SHORT)[0] == 0


def test_chat_prompt_reads_back_with_one_bos_token(workdir, cli):
    tokenizer = tiny.tokenizer(string.printable)
    tokenizer.add_special_tokens({"bos_token": "<s>"})  # the model has one row more than the original tokenizer needs
    tokenizer.backend_tokenizer.post_processor = _begins_with(tokenizer, "<s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[reply] "
    )
    for file in (workdir / "model").glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(workdir / "model")
    assert cli(*GENERATE, "--template", "chat", "--output", "chat.jsonl")[0] == 0
    tokenizer = load_tokenizer("model")
    rows = list(load_rows(DataConfig(source="data"), "test"))
    expected_prompts = Encoder(tokenizer, DataConfig(template="chat")).prompts(rows)
    reloaded = Encoder(tokenizer, DataConfig()).prompts(list(load_rows(DataConfig(source="chat.jsonl"), "test")))
    for ids, expected_ids in zip(reloaded, expected_prompts, strict=True):
        np.testing.assert_array_equal(ids, expected_ids)
        assert list(ids).count(tokenizer.bos_token_id) == 1


def _begins_with(tokenizer, token: str):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=f"{token} $A", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))])


def test_prompts_from_flags_a_text_file_and_stdin(workdir, cli, monkeypatch):
    code, out, _ = cli("generate", "--model", "model", "--prompt", "one", "--prompt", "two", *SHORT)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["instruction"] for row in rows] == ["one", "two"]
    assert all("### Instruction:\n" in row["prompt"] for row in rows)
    (workdir / "prompts.txt").write_text('one\n\n{"prompt": "exactly this: "}\n{not json\n', encoding="utf-8")
    code, out, _ = cli("generate", "--model", "model", "--input", "prompts.txt", *SHORT)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row.get("instruction") for row in rows] == ["one", None, "{not json"]
    assert rows[1]["prompt"] == "exactly this: "
    with (workdir / "prompts.txt").open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert cli("generate", "--model", "model", "--input", "-", *SHORT)[1] == out


def test_greedy_is_deterministic_and_cut_is_counted(workdir, cli):
    first = cli(*GENERATE, "--temperature", 0, "--limit", 2)[1]
    assert cli(*GENERATE, "--greedy", "--limit", 2)[1] == first
    assert cli(*GENERATE, "--temperature", 0, "--limit", 2, "--seed", 5)[1] == first.replace('"seed": 10', '"seed": 5')
    rows = [json.loads(line) for line in first.splitlines()]
    assert len(rows) == 2
    cut = json.loads(cli(*GENERATE, "--max-new-tokens", 1, "--output", "cut.jsonl", "--json")[1])["cut"]
    assert cut == sum(not row["complete"] for row in lines("cut.jsonl")) > 0


def test_existing_file_needs_overwrite(workdir, cli):
    (workdir / "mine.jsonl").write_text("precious\n", encoding="utf-8")
    assert_error_line(cli(*GENERATE, "--output", "mine.jsonl", "--debug"), "usage.output_exists", "mine.jsonl")
    outcome = cli(*GENERATE, "--output", "mine.jsonl", "--resume", "--debug")
    assert_error_line(outcome, "checkpoint.damaged", "mine.jsonl")
    assert (workdir / "mine.jsonl").read_text(encoding="utf-8") == "precious\n"
    assert cli(*GENERATE, "--output", "mine.jsonl", "--overwrite")[0] == 0
    assert len(lines("mine.jsonl")) == 10


@pytest.mark.parametrize("data", ["rows.jsonl", "set"])
def test_output_may_not_replace_the_input(workdir, cli, data):
    (workdir / "set").mkdir()
    for name in ("rows.jsonl", "set/train.jsonl"):
        (workdir / name).write_text('{"instruction": "continue", "output": "x"}\n', encoding="utf-8")
    output = "set/train.jsonl" if data == "set" else "./rows.jsonl"
    before = (workdir / output).read_bytes()
    argv = ("--model", "model", "--template", "plain", "--max-new-tokens", 2, "--output", output, "--overwrite")
    outcome = cli("generate", "--data", data, *argv, "--debug")
    mentions = (f"--output {output.removeprefix('./')}", f"--data {data}")
    assert_error_line(outcome, "usage.output_is_input", *mentions)
    assert (workdir / output).read_bytes() == before


def test_file_written_while_loading_is_not_replaced(workdir, cli, monkeypatch):
    begin = ResponseFile.begin

    def write_first(self, *args):
        (workdir / "rows.jsonl").write_text("another run\n", encoding="utf-8")
        begin(self, *args)

    monkeypatch.setattr(ResponseFile, "begin", write_first)
    outcome = cli(*GENERATE, "--output", "rows.jsonl", "--limit", 4, "--debug")
    assert_error_line(outcome, "usage.output_exists", "rows.jsonl")
    assert (workdir / "rows.jsonl").read_text(encoding="utf-8") == "another run\n"


def test_second_run_into_one_file_is_an_error(workdir, cli):
    assert cli(*GENERATE, "--output", "rows.jsonl", "--limit", 4)[0] == 0
    before = (workdir / "rows.jsonl").read_bytes()
    with locked(workdir / "rows.jsonl", pytest.fail):
        for flag in ("--resume", "--overwrite"):
            outcome = cli(*GENERATE, "--output", "rows.jsonl", flag, "--debug")
            assert_error_line(outcome, "usage.output_in_use", "rows.jsonl")
    assert (workdir / "rows.jsonl").read_bytes() == before
    assert cli(*GENERATE, "--output", "rows.jsonl", "--overwrite")[0] == 0


def test_full_disk_leaves_no_file(workdir, cli):
    with file_size(0):
        outcome = cli(*GENERATE, "--output", "rows.jsonl", "--debug")
    assert_error_line(outcome, "storage.failed", "rows.jsonl", "File too large")
    assert not [path.name for path in workdir.iterdir() if "rows.jsonl" in path.name and path.name != "rows.jsonl"]
    assert not (workdir / "rows.jsonl").exists()
    assert cli(*GENERATE, "--output", "rows.jsonl", "--resume")[0] == 0


def test_resume_completes_a_partial_file(workdir, cli):
    command = (*GENERATE, "--output", "rows.jsonl", "--resume")
    assert cli(*command)[0] == 0, "--resume starts a run if there is none"
    full = (workdir / "rows.jsonl").read_bytes()
    (workdir / "rows.jsonl").write_bytes(full[: len(full) // 2])  # ends with half a line
    code, out, err = cli(*command, "--json")
    assert code == 0, err
    assert (workdir / "rows.jsonl").read_bytes() == full
    assert json.loads(out)["rows"] == 10
    assert cli(*command)[0] == 0, "--resume does not change a finished file"
    assert (workdir / "rows.jsonl").read_bytes() == full


def test_resume_with_changed_settings_is_an_error(workdir, cli):
    assert cli(*GENERATE, "--output", "rows.jsonl")[0] == 0
    command = (*GENERATE, "--output", "rows.jsonl", "--resume")
    outcome = cli(*command, "--temperature", 0.5, "--debug")
    assert_error_line(outcome, "checkpoint.changed", "temperature", "1.0", "0.5")
    assert_error_line(cli(*command, "--limit", 5, "--debug"), "checkpoint.changed")
    changed = (workdir / "rows.jsonl").read_text(encoding="utf-8").replace("stop", "st0p")
    (workdir / "rows.jsonl").write_text(changed, encoding="utf-8")
    assert_error_line(cli(*command, "--debug"), "checkpoint.changed", "rows.jsonl:2")


def test_resume_after_ctrl_c_matches_uninterrupted_run(workdir, cli):
    rows = [{"instruction": f"Say {i}.", "output": "x"} for i in range(160)]
    (workdir / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ("generate", "--model", "model", "--data", "many.jsonl", "--template", "plain", "--batch-size", 4)
    command += ("--max-new-tokens", 4)
    written = workdir / "rows.jsonl"

    def press() -> None:
        while not (written.exists() and written.stat().st_size):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    code, out, err = cli(*command, "--output", written, "--json")
    thread.join()
    assert code == 130
    message = err.split("error: ", 1)[1].strip()
    assert json.loads(out) == {"status": "error", "code": 130, "error": "interrupted", "message": message}
    assert "continue with --resume" in err
    written_rows = lines(written)
    assert 0 < len(written_rows) < 160
    assert cli(*command, "--output", written, "--resume")[0] == 0
    assert cli(*command, "--output", "once.jsonl")[0] == 0
    assert written.read_bytes() == (workdir / "once.jsonl").read_bytes()
