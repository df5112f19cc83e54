"""Check the complete error line of one mistake of each kind.

Other tests check codes only. Here the wording is fixed, so that a change of it is reviewed.
"""

from __future__ import annotations

import sys

import pytest

from distillm_cli.cli import app as program
from tests.command_line import exit_code

FILES = {
    "bad.jsonl": '{"instruction": "a", "output": "b"}\n{"instruction":\n',
    "unknown.yaml": "student: {path: x}\ntrian: {lr: 1}\n",
    "value.yaml": "train: {lr: fast}\n",
    "twice.yaml": "train: {lr: 0.1}\ntrain: {lr: 0.2}\n",
    "full/mine.txt": "mine\n",
}

GOLDEN = [
    ("distil", "usage.unknown_command", "distillm has no command distil; did you mean distill?"),
    ("distill --alhpa 1", "usage.unknown_option", "distillm distill has no flag --alhpa; did you mean --alpha?"),
    ("distill --beta 1", "usage.unknown_option", "distillm distill has no flag --beta; try --set objective.beta=VALUE"),
    ("generate m", "usage.unexpected_argument", "distillm generate takes no argument m; try --model m"),
    ("generate --prompt hi", "usage.no_model", "no model; give --model"),
    ("distill --set alpha", "usage.invalid_set", "--set alpha; expected section.key=value; try --set train.lr=5e-4"),
    ("distill --set train.lrr=1", "recipe.unknown_field", "--set train.lrr: no such key; did you mean train.lr?"),
    ("explain train.lrr", "usage.unknown_field", "no field train.lrr; did you mean train.lr?"),
    (
        "distill --alpha 7",
        "recipe.invalid_value",
        "--alpha = 7.0; expected a number ≥ 0 and < 1; try --alpha 0.1",
    ),
    (
        "distill --recipe unknown.yaml",
        "recipe.unknown_field",
        "unknown.yaml:2: trian: no such key; did you mean train?",
    ),
    (
        "distill --recipe value.yaml",
        "recipe.invalid_value",
        "value.yaml:1: train.lr = fast; expected a number > 0, or auto; try --set train.lr=auto",
    ),
    (
        "distill --recipe twice.yaml",
        "recipe.given_twice",
        "twice.yaml:2: train occurs twice, first in line 1; keep one of them",
    ),
    (
        "distill --student x --data bad.jsonl --output o",
        "usage.no_teacher",
        "no teacher; give --teacher PATH, or use `distillm sft`",
    ),
    (
        "distill --teacher t --student x --output o",
        "usage.no_data",
        "no data to train on; --data is not given, and Dolly is the default only for GPT-2, OPT and Llama base models; "
        "use --data PATH or NAME, such as --data rows.jsonl or --data dolly",
    ),
    (
        "distill --teacher t --student random:1x64 --data nothing.jsonl --output o",
        "data.not_found",
        "nothing.jsonl: no such file or directory; check the path",
    ),
    (
        "distill --teacher t --student random:1x64 --data bad.jsonl --output full",
        "usage.output_exists",
        "output directory full is not empty; choose another --output, or use --resume to continue or --overwrite "
        "to start over",
    ),
    (
        "distill --teacher t --student x --data bad.jsonl --output o --resume --overwrite",
        "usage.exclusive_options",
        "--resume and --overwrite are mutually exclusive; choose one of them",
    ),
    (
        "distill --resume --output nodir",
        "checkpoint.nothing_to_resume",
        "nothing to resume in nodir; no such directory; check the path, or start without --resume",
    ),
    (
        "distill --resume",
        "usage.no_output",
        "--resume without a run; give --output DIR, the directory of the run to resume",
    ),
    (
        "distill --teacher t --student x --data bad.jsonl --output o --device tpu",
        "usage.no_device",
        "unknown device 'tpu'; use auto, cpu, cuda, cuda:N or mps",
    ),
    (
        "eval nomodel --suite dolly",
        "model.not_found",
        "cannot find 'nomodel': no such directory, and not available from the hub: it is not in "
        "the cache, and HF_HUB_OFFLINE is set; pass a local directory, or check the spelling, or unset HF_HUB_OFFLINE",
    ),
]


@pytest.mark.parametrize(("command", "code", "message"), GOLDEN, ids=[command for command, _, _ in GOLDEN])
def test_message(command, code, message, capfd, tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    status = program.main([*command.split(), "--debug"])
    sys.stdout.flush()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"error [{code}]: {message}"
    assert status == exit_code(code)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine\n"
    assert not (tmp_path / "o").exists(), "nothing was written"
