"""`distillm eval` and `distillm generate` as they are typed, on a tiny model, down to files and exit codes."""

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
from tests.limits import file_size

ROWS = [
    {"instruction": "Reverse it.", "input": word, "output": [word[::-1], word[::-1].upper()]}
    for word in ("abc", "stop", "a", "later", "redo", "pools", "drawer", "on", "mix", "not so short")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A small model with its tokenizer, a directory of data, and nothing else."""
    home = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer("chars", iter([string.printable]))
    fields = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = tiny.model("llama", len(tokenizer) + 1, max_position_embeddings=320, spread=1.0, **fields)
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    (home / "data").mkdir()
    for split in ("train", "dev", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (home / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return home


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """Work here: `model/` (its files, a directory of its own) and `data/`."""
    (tmp_path / "model").mkdir()
    for file in (made / "model").iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    (tmp_path / "data").symlink_to(made / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILLM_DATA", raising=False)
    return tmp_path


@pytest.fixture
def typed(capsys):
    """Types a command line; gives its exit code, stdout and stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def lines(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


SHORT = ("--max-new-tokens", 8)
GENERATE = ("generate", "--model", "model", "--data", "data", *SHORT)


# ---------------------------------------------------------------------------------------------------------------- eval


def test_json_is_one_object_as_scripts_expect_it(place, typed):
    code, out, err = typed("eval", "model", "--suite", "data", "--seeds", "10,20", *SHORT, "--json")
    assert code == 0, err
    told = json.loads(out)
    assert {"command": "eval", "status": "ok", "output": "model/eval"}.items() <= told.items()
    assert told["wall_s"] > 0
    suite = told["suites"]["data"]
    assert suite["rows"] == 10
    assert set(suite["rouge_l"]) == set(suite["exact_match"]) == {"mean", "sd", "seeds"}
    assert set(suite["rouge_l"]["seeds"]) == {"10", "20"}
    assert "ROUGE-L" in err, "the table is talk, and goes to stderr"
    code, out, err = typed(
        "eval", "model", "--suite", "data", "--seeds", "10", *SHORT, "--dtype", "bf16", "--output", "low"
    )
    assert "decoded in bf16; results and predictions: low" in err, "the report of a run is of float32 weights"
    results = json.loads((place / "model/eval/data/t1-n8/results.json").read_text(encoding="utf-8"))
    assert results["rouge_l"] == suite["rouge_l"]
    assert results["settings"]["template"] == "auto"


def test_several_checkpoints_and_suites_in_one_call(place, typed):
    (place / "other").symlink_to(place / "model")
    told = json.loads(
        typed(
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
    assert set(told["checkpoints"]) == {"model", "other"}
    assert told["suites"] == told["checkpoints"]["model"]["suites"]
    assert set(told["suites"]) == {"data", "data-train", "builtin"}
    assert told["suites"]["builtin"]["rows"] == 4
    assert set(told["suites"]["builtin"]["tasks"]) <= {row.task for row in load_suite("builtin", Recipe()).rows}
    assert told["suites"]["data"]["error_rate"]["seeds"].keys() == {"greedy"}
    assert (place / "out/other/data-train/greedy-n8-limit4/predictions-greedy.jsonl").is_file()
    assert not (place / "model/eval").exists()


def test_a_model_is_asked_in_the_template_of_its_own_recipe(place, typed):
    (place / "model/recipe.yaml").write_text(
        f"method: sft\ndata: {{source: {place / 'data'}, template: plain}}\n"
        "train: {device: 'cuda:7', threads: 99}\neval: {suites: [data], greedy: true, max_new_tokens: 4}\n",
        encoding="utf-8",
    )
    assert typed("eval", "model")[0] == 0
    assert lines("model/eval/data/greedy-n4-plain/predictions-greedy.jsonl")[0]["prompt"] == "Reverse it.\nabc\n"
    assert typed("eval", "model", "--template", "alpaca")[0] == 0
    assert "### Response:" in lines("model/eval/data/greedy-n4-alpaca/predictions-greedy.jsonl")[0]["prompt"]
    assert typed("eval", "model", "--seeds", 1)[0] == 0, "a flag of sampling asks for sampling"
    assert (place / "model/eval/data/t1-n4-plain/predictions-seed1.jsonl").is_file()
    out = typed("generate", "--model", "model", "--prompt", "Reverse it.", *SHORT)[1]
    assert json.loads(out)["prompt"] == "Reverse it.\n"
    assert typed("eval", "model", "--device", "cuda:7")[0] == 2, (
        "of the run's machine nothing is taken over, of a flag all"
    )
    (place / "model/checkpoints/step-000005").mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (place / "model/checkpoints/step-000005" / file).symlink_to(place / "model" / file)
    assert typed("eval", "model/checkpoints/step-000005")[0] == 0, "its recipe is the run's"


def test_the_rows_a_run_held_out_are_the_suite_where_none_is_named(place, typed):
    (place / "model/recipe.yaml").write_text("data: {source: data/train.jsonl, template: plain}\n", encoding="utf-8")
    code, out, err = typed("eval", "model", "--greedy", *SHORT, "--json")
    assert code == 0, err
    assert list(json.loads(out)["suites"]) == ["held-out"]


def test_a_recipe_of_another_program_beside_the_model_is_told_and_left_alone(place, typed):
    (place / "model/recipe.yaml").write_text("quant_stage: {modifiers: []}\n", encoding="utf-8")
    code, _, err = typed("eval", "model", "--suite", "data", "--greedy", "--limit", 1, *SHORT)
    assert code == 0
    assert "warning: model/recipe.yaml is not used" in err


@pytest.mark.parametrize(
    ("code", "words", "said"),
    [
        (2, ["eval", "model"], "no suite to score model on; use --suite"),
        (2, ["eval", "model", "--suite", "data", "--metric", "meteor"], "--metric"),
        (2, ["eval", "model", "--suite", "data", "--seeds", "ten"], "--seeds"),
        (
            2,
            ["eval", "model", "--suite", "data", "--greedy", "--seeds", "10"],
            "--greedy and --seeds are mutually exclusive",
        ),
        (3, ["eval", "model", "--suite", "missing.jsonl"], "missing.jsonl: no such file"),
        (3, ["eval", "model", "--suite", "long.jsonl"], "long.jsonl:2: a prompt of"),
        (3, ["eval", "model", "--suite", "empty.jsonl"], "empty.jsonl"),
        (4, ["eval", "data", "--suite", "data"], "data has no config.json"),
        (4, ["eval", "./nowhere", "--suite", "data"], "no such directory"),
        (4, ["eval", "nowhere"], "cannot find 'nowhere'"),
        (4, ["eval", "data"], "data has no config.json"),
        (4, ["eval", "model", "nowhere", "--suite", "data"], "cannot find 'nowhere'"),
        (2, ["eval", "model", "--suite", "data", "--seeds", f"1,{2**63}"], "each an integer < 2^63"),
        (2, ["generate", "--model", "model", "--prompt", "x", "--seed", f"{2**63}"], "an integer ≥ 0 and < 2^63"),
        (2, ["generate", "--model", "model", "--prompt", "x", "--prompt", " "], "empty --prompt"),
        (8, ["eval", "model", "--suite", "data", "--output", "empty.jsonl/out"], "cannot write to"),
        (2, ["generate", "--prompt", "x"], "give --model"),
        (2, ["generate", "--model", "model"], "no prompts; use one of"),
        (
            2,
            ["generate", "--model", "model", "--prompt", "x", "--data", "data"],
            "--data and --prompt are mutually exclusive",
        ),
        (2, ["generate", "--model", "model", "--prompt", "x", "--json"], "give --output FILE"),
        (2, ["generate", "--model", "model", "--prompt", "x", "--n", "2", "--temperature", "0"], "temperature 0"),
        (2, ["generate", "--model", "model", "--prompt", "x", "--n", "2", "--greedy"], "temperature 0"),
        (
            2,
            ["generate", "--model", "model", "--prompt", "x", "--greedy", "--temperature", "0.7"],
            "are mutually exclusive",
        ),
        (2, ["generate", "--model", "model", "--prompt", "x", "--n", "0"], "--n = 0"),
        (2, ["generate", "--model", "model", "--data", "data", "--split", "dev"], "train, valid or test"),
        (2, ["generate", "--model", "model", "--prompt", "x", "--output", "out.txt"], "try --output out.txt.jsonl"),
        (2, ["generate", "--model", "model", "--prompt", "x", "--top-p", "0"], "--top-p"),
        (3, ["generate", "--model", "model", "--data", "long.jsonl"], "long.jsonl:2: a prompt of"),
        (
            3,
            ["generate", "--model", "model", "--data", "data/dev.jsonl", "--split", "test"],
            "dev.jsonl: no test rows; there are train and valid (held out of train)",
        ),
        (3, ["generate", "--model", "model", "--input", "absent.txt"], "absent.txt: No such file"),
    ],
)
def test_what_is_wrong_is_one_line_and_an_exit_code(place, typed, code, words, said):
    long = {"prompt": "x" * 400, "output": "y"}
    (place / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (ROWS[0], long)), encoding="utf-8")
    (place / "empty.jsonl").write_text("", encoding="utf-8")
    before = sorted(path.name for path in place.iterdir())
    got, out, err = typed(*words)
    assert got == code, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert out == "" or json.loads(out)["code"] == code
    assert sorted(path.name for path in place.iterdir()) == before, "a mistake leaves nothing behind"


# ------------------------------------------------------------------------------------------------------------ generate


def test_rows_come_in_the_order_of_the_prompts_and_do_not_depend_on_the_batch(place, typed):
    code, out, err = typed(*GENERATE, "--n", 2, "--batch-size", 3, "--output", "a.jsonl", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert {"command": "generate", "status": "ok", "output": "a.jsonl", "rows": 20}.items() <= told.items()
    assert told["tokens"] > 0
    assert told["tokens_per_s"] > 0
    rows = lines("a.jsonl")
    assert [(row["input"], row["sample"]) for row in rows] == [(row["input"], j) for row in ROWS for j in (0, 1)]
    assert any(a["output"] != b["output"] for a, b in zip(rows[::2], rows[1::2], strict=True))
    assert typed(*GENERATE, "--batch-size", 32, "--output", "b.jsonl")[0] == 0
    assert lines("b.jsonl") == rows[::2], "a prompt's first sample is the same with and without a second"
    assert typed(*GENERATE, "--seed", 11, "--output", "c.jsonl")[0] == 0
    assert [row["output"] for row in lines("c.jsonl")] != [row["output"] for row in lines("b.jsonl")]


def test_what_is_written_reads_back_as_exactly_those_prompts_and_responses(place, typed):
    assert typed(*GENERATE, "--template", "alpaca", "--output", "told.jsonl")[0] == 0
    back = load_rows(DataConfig(source="told.jsonl"), "test")
    told = lines("told.jsonl")
    assert [row.references for row in back] == [(row["output"],) for row in told]
    tokenizer = load_tokenizer("model")
    asked = Encoder(tokenizer, DataConfig(template="alpaca")).prompts(
        list(load_rows(DataConfig(source="data"), "test"))
    )
    for ours, theirs in zip(Encoder(tokenizer, DataConfig()).prompts(list(back)), asked, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert typed(*GENERATE[:3], "--data", "told.jsonl", "--output", "again.jsonl", *SHORT)[0] == 0


def test_a_chat_prompt_reads_back_with_one_beginning_of_sequence(place, typed):
    tokenizer = tiny.tokenizer(string.printable)
    tokenizer.add_special_tokens({"bos_token": "<s>"})  # the model has one row more than the other tokenizer needs
    tokenizer.backend_tokenizer.post_processor = _begins_with(tokenizer, "<s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[reply] "
    )
    for file in (place / "model").glob("*token*"):
        file.unlink()
    tokenizer.save_pretrained(place / "model")
    assert typed(*GENERATE, "--template", "chat", "--output", "chat.jsonl")[0] == 0
    tokenizer = load_tokenizer("model")
    rows = list(load_rows(DataConfig(source="data"), "test"))
    asked = Encoder(tokenizer, DataConfig(template="chat")).prompts(rows)
    back = Encoder(tokenizer, DataConfig()).prompts(list(load_rows(DataConfig(source="chat.jsonl"), "test")))
    for ours, theirs in zip(back, asked, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert list(ours).count(tokenizer.bos_token_id) == 1


def _begins_with(tokenizer, token: str):
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=f"{token} $A", special_tokens=[(token, tokenizer.convert_tokens_to_ids(token))])


def test_prompts_from_the_command_line_a_text_file_and_stdin(place, typed, monkeypatch):
    code, out, _ = typed("generate", "--model", "model", "--prompt", "one", "--prompt", "two", *SHORT)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["instruction"] for row in rows] == ["one", "two"]
    assert all("### Instruction:\n" in row["prompt"] for row in rows)
    (place / "asked.txt").write_text('one\n\n{"prompt": "exactly this: "}\n{not json\n', encoding="utf-8")
    code, out, _ = typed("generate", "--model", "model", "--input", "asked.txt", *SHORT)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row.get("instruction") for row in rows] == ["one", None, "{not json"]
    assert rows[1]["prompt"] == "exactly this: "
    with (place / "asked.txt").open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert typed("generate", "--model", "model", "--input", "-", *SHORT)[1] == out


def test_greedy_is_the_same_every_time_and_cut_responses_say_so(place, typed):
    first = typed(*GENERATE, "--temperature", 0, "--limit", 2)[1]
    assert typed(*GENERATE, "--greedy", "--limit", 2)[1] == first
    assert typed(*GENERATE, "--temperature", 0, "--limit", 2, "--seed", 5)[1] == first.replace(
        '"seed": 10', '"seed": 5'
    )
    rows = [json.loads(line) for line in first.splitlines()]
    assert len(rows) == 2
    cut = json.loads(typed(*GENERATE, "--max-new-tokens", 1, "--output", "cut.jsonl", "--json")[1])["cut"]
    assert cut == sum(not row["complete"] for row in lines("cut.jsonl")) > 0


def test_an_existing_file_is_not_overwritten_unasked(place, typed):
    (place / "mine.jsonl").write_text("precious\n", encoding="utf-8")
    assert typed(*GENERATE, "--output", "mine.jsonl")[0] == 2
    assert typed(*GENERATE, "--output", "mine.jsonl", "--resume")[0] == 5
    assert (place / "mine.jsonl").read_text(encoding="utf-8") == "precious\n"
    assert typed(*GENERATE, "--output", "mine.jsonl", "--overwrite")[0] == 0
    assert len(lines("mine.jsonl")) == 10


@pytest.mark.parametrize("data", ["rows.jsonl", "set"])
def test_rows_that_are_read_are_not_replaced_by_what_is_made_of_them(place, typed, data):
    (place / "set").mkdir()
    for name in ("rows.jsonl", "set/train.jsonl"):
        (place / name).write_text('{"instruction": "go on", "output": "x"}\n', encoding="utf-8")
    output = "set/train.jsonl" if data == "set" else "./rows.jsonl"
    before = (place / output).read_bytes()
    argv = ("--model", "model", "--template", "plain", "--max-new-tokens", 2, "--output", output, "--overwrite")
    code, _, err = typed("generate", "--data", data, *argv)
    assert code == 2
    assert err.endswith(f"--output {output.removeprefix('./')} is an input of --data {data}; choose another --output\n")
    assert (place / output).read_bytes() == before


def test_what_another_run_wrote_while_this_one_was_loading_is_not_replaced(place, typed, monkeypatch):
    begin = ResponseFile.begin

    def late(self, *told):
        (place / "rows.jsonl").write_text("another's\n", encoding="utf-8")
        begin(self, *told)

    monkeypatch.setattr(ResponseFile, "begin", late)
    code, _, err = typed(*GENERATE, "--output", "rows.jsonl", "--limit", 4)
    assert (code, err.rpartition("error: ")[2].startswith("--output rows.jsonl exists; choose another")) == (2, True)
    assert (place / "rows.jsonl").read_text(encoding="utf-8") == "another's\n"


def test_of_two_runs_into_one_file_the_second_is_refused(place, typed):
    assert typed(*GENERATE, "--output", "rows.jsonl", "--limit", 4)[0] == 0
    before = (place / "rows.jsonl").read_bytes()
    with locked(place / "rows.jsonl", pytest.fail):
        for how in ("--resume", "--overwrite"):
            code, _, err = typed(*GENERATE, "--output", "rows.jsonl", how)
            assert code == 2
            assert "another run is writing rows.jsonl; wait for it, or choose another --output" in err
    assert (place / "rows.jsonl").read_bytes() == before
    assert typed(*GENERATE, "--output", "rows.jsonl", "--overwrite")[0] == 0


def test_a_disk_without_room_for_the_first_byte_leaves_no_file(place, typed):
    with file_size(0):
        code, _, err = typed(*GENERATE, "--output", "rows.jsonl")
    assert code == 8
    assert "cannot write rows.jsonl: File too large" in err
    assert not [path.name for path in place.iterdir() if "rows.jsonl" in path.name and path.name != "rows.jsonl"]
    assert not (place / "rows.jsonl").exists()
    assert typed(*GENERATE, "--output", "rows.jsonl", "--resume")[0] == 0


def test_a_stopped_run_goes_on_where_it_was(place, typed):
    command = (*GENERATE, "--output", "rows.jsonl", "--resume")
    assert typed(*command)[0] == 0, "where nothing is, --resume starts"
    whole = (place / "rows.jsonl").read_bytes()
    (place / "rows.jsonl").write_bytes(whole[: len(whole) // 2])  # half a line at the end
    code, out, err = typed(*command, "--json")
    assert code == 0, err
    assert (place / "rows.jsonl").read_bytes() == whole
    assert json.loads(out)["rows"] == 10
    assert typed(*command)[0] == 0, "and a finished one is left as it is"
    assert (place / "rows.jsonl").read_bytes() == whole


def test_going_on_with_something_else_is_refused(place, typed):
    assert typed(*GENERATE, "--output", "rows.jsonl")[0] == 0
    command = (*GENERATE, "--output", "rows.jsonl", "--resume")
    code, _, err = typed(*command, "--temperature", 0.5)
    assert code == 5
    assert "temperature was 1.0, now 0.5" in err
    assert typed(*command, "--limit", 5)[0] == 5
    changed = (place / "rows.jsonl").read_text(encoding="utf-8").replace("stop", "st0p")
    (place / "rows.jsonl").write_text(changed, encoding="utf-8")
    code, _, err = typed(*command)
    assert code == 5
    assert "rows.jsonl:2 is not the expected row" in err


def test_control_c_keeps_what_is_written_and_resume_completes_it(place, typed):
    many = [{"instruction": f"Say {i}.", "output": "x"} for i in range(160)]
    (place / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many), encoding="utf-8")
    command = ("generate", "--model", "model", "--data", "many.jsonl", "--template", "plain", "--batch-size", 4)
    command += ("--max-new-tokens", 4)
    written = place / "rows.jsonl"

    def press() -> None:
        while not (written.exists() and written.stat().st_size):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    finger = threading.Thread(target=press, daemon=True)
    finger.start()
    code, out, err = typed(*command, "--output", written, "--json")
    finger.join()
    assert code == 130
    message = err.split("error: ", 1)[1].strip()
    assert json.loads(out) == {"status": "error", "code": 130, "error": "interrupted", "message": message}
    assert "continue with --resume" in err
    kept = lines(written)
    assert 0 < len(kept) < 160
    assert typed(*command, "--output", written, "--resume")[0] == 0
    assert typed(*command, "--output", "once.jsonl")[0] == 0
    assert written.read_bytes() == (place / "once.jsonl").read_bytes()
