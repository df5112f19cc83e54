"""Test loading models and tokenizers, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, ViTConfig

from distillm_cli.models.backbone import vocabulary_size
from distillm_cli.models.loading import load_backbone
from distillm_cli.models.tokenizer_files import load_tokenizer
from distillm_cli.training.events import Progress
from tests import tiny
from tests.codes import raises_code

CPU = torch.device("cpu")
VOCAB = tiny.VOCAB
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def load(path: str, **options):
    return load_backbone(path, dtype=torch.float32, device=CPU, **options)


def test_model_loads_in_eval_mode_with_progress_events(tmp_path, capfd):
    path = tiny.save(tmp_path / "m", "gpt2", rows=VOCAB + 7)
    events = []
    capfd.readouterr()
    backbone = load(path, listener=events.append)
    assert capfd.readouterr() == ("", "")
    assert events == [Progress(f"loading {path}", 0, 1), Progress(f"loading {path}", 1, 1)]
    assert not any(module.training for module in backbone.modules())
    assert backbone.vocab == VOCAB
    original = tiny.model("gpt2", VOCAB + 7)
    assert all(torch.equal(p, q) for p, q in zip(backbone.parameters(), original.parameters(), strict=True))
    assert backbone.check_head(tiny.batch([(3, 4)], VOCAB))


def test_weights_have_the_requested_dtype(tmp_path):
    backbone = load_backbone(tiny.save(tmp_path / "m"), dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}


def no_such_directory(directory: Path) -> str:
    return str(directory / "nowhere")


def config_file(directory: Path) -> str:
    return str(Path(tiny.save(directory)) / "config.json")


def without_config(directory: Path) -> str:
    directory.mkdir()
    return str(directory)


def invalid_config(directory: Path) -> str:
    directory.mkdir()
    (directory / "config.json").write_text("{")
    return str(directory)


def unknown_architecture(directory: Path) -> str:
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "perceptron"}')
    return str(directory)


def without_weights(directory: Path) -> str:
    tiny.save(directory)
    (directory / "model.safetensors").unlink()
    return str(directory)


def truncated_weights(directory: Path) -> str:
    tiny.save(directory)
    content = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(content[: len(content) // 2])
    return str(directory)


def weights_of_other_shape(directory: Path) -> str:
    tiny.save(directory)
    config = json.loads((directory / "config.json").read_text()) | {"intermediate_size": 64}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def trunk_without_head(directory: Path) -> str:
    tiny.save(directory)
    tiny.model("llama", VOCAB).model.save_pretrained(directory)
    return str(directory)


def without_tokenizer(directory: Path) -> str:
    return tiny.save(directory, "gpt2", own_tokenizer=False)


def tokenizer_too_large(directory: Path) -> str:
    return tiny.save(directory, rows=30)


def bidirectional(directory: Path) -> str:
    BertForMaskedLM(BertConfig(vocab_size=VOCAB, num_hidden_layers=1, **SMALL)).save_pretrained(directory)
    tiny.tokenizer(size=VOCAB).save_pretrained(directory)
    return str(directory)


def vision_model(directory: Path) -> str:
    ViTConfig(num_hidden_layers=1, **SMALL).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("make", "code", "mentions"),
    [
        (no_such_directory, "model.not_found", ("nowhere",)),
        (config_file, "model.not_found", ("config.json",)),
        (without_config, "model.no_config", ("config.json",)),
        (invalid_config, "model.unreadable", ("config",)),
        (unknown_architecture, "model.unreadable", ("perceptron",)),
        (without_weights, "model.no_weights", ("model.safetensors", "m/config.json")),
        (truncated_weights, "model.unreadable", ("safetensors",)),
        (weights_of_other_shape, "model.weights_mismatch", ("model.layers.0.mlp", "4 more")),
        (trunk_without_head, "model.weights_mismatch", ("lm_head.weight",)),
        (without_tokenizer, "model.no_tokenizer", ("--tokenizer",)),
        (tokenizer_too_large, "model.tokenizer_mismatch", ("41", "30")),
        (bidirectional, "model.not_causal", ("BertForMaskedLM",)),
        (vision_model, "model.not_causal", ("vit",)),
    ],
)
def test_invalid_directory_is_rejected_in_one_line(make, code, mentions, tmp_path, capfd):
    path = make(tmp_path / "m")
    capfd.readouterr()
    with raises_code(code, str(tmp_path / "m"), *mentions) as caught:
        load(path)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["gpt3-small", "someone/some-model", "not a name"])
def test_unknown_model_name_is_rejected_offline(name):
    with raises_code("model.not_found", f"'{name}'", "HF_HUB_OFFLINE") as caught:
        load(name)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("path", ["./missing", "~/missing-model", "a/b/c", "/missing"])
def test_path_is_not_searched_on_the_hub(path):
    with raises_code("model.not_found") as caught:
        load(path)
    assert "HF_HUB_OFFLINE" not in str(caught.value)


def test_custom_code_of_a_model_is_not_run(tmp_path):
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (directory / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    with raises_code("model.unreadable"):
        load(str(directory))
    assert not (tmp_path / "ran").exists()


# Tokenizers


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "qwen3", "gemma2"])
def test_saved_tokenizer_reloads_unchanged_for_any_family(family, tmp_path):
    tokenizer = tiny.tokenizer(size=VOCAB)
    loaded = load_tokenizer(tiny.save(tmp_path / "m", family, own_tokenizer=tokenizer))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("hello world").input_ids == tokenizer("hello world").input_ids


def test_missing_pad_token_is_set_and_saved(tmp_path):
    loaded = load_tokenizer(tiny.save(tmp_path / "m", own_tokenizer=tiny.tokenizer(pad=False, size=VOCAB)))
    assert (loaded.pad_token, loaded.eos_token) == ("<eos>", "<eos>")
    loaded.save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).pad_token == "<eos>"
    assert "local" not in (tmp_path / "again" / "tokenizer_config.json").read_text()


def test_generation_config_gets_a_pad_token(tmp_path):
    backbone = load(tiny.save(tmp_path / "m", own_tokenizer=tiny.tokenizer(pad=False, size=VOCAB)))
    assert backbone.model.generation_config.pad_token_id == backbone.tokenizer.eos_token_id
    assert backbone.model.config.pad_token_id is None


def test_tokenizer_without_end_token_is_rejected(tmp_path):
    tokenizer = tiny.tokenizer(size=VOCAB)
    tokenizer.eos_token = None
    with raises_code("model.no_end_token"):
        load_tokenizer(tiny.save(tmp_path / "m", own_tokenizer=tokenizer))


def test_gpt2_tokenizer_files_load(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    assert vocabulary_size(tokenizer) == 50_257
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 50_256
    assert tokenizer.decode(tokenizer("### Response:\n don't").input_ids) == "### Response:\n don't"


def test_cached_hub_model_loads_without_network(tmp_path):
    """Check this in a subprocess, because an unreachable hub is remembered.

    Models that are not cached must be rejected at once.
    """
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "0"
    tiny.save(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    env |= {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1"}
    program = """
import torch
from distillm_cli.errors import ModelError
from distillm_cli.models.loading import load_backbone
print(load_backbone("someone/tiny", dtype=torch.float32, device=torch.device("cpu")).vocab)
try:
    load_backbone("someone/else", dtype=torch.float32, device=torch.device("cpu"))
except ModelError as error:
    print(error.code, error.what)
"""
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    vocab, refusal = done.stdout.splitlines()
    assert int(vocab) == VOCAB
    assert refusal.startswith("model.not_found ")
    assert "http://127.0.0.1:9" in refusal
    assert "Retry" not in done.stderr, "retries of the hub client take half a minute"


@pytest.mark.long
def test_out_of_memory_is_not_reported_as_damaged_model(tmp_path):
    """Check a process that may allocate 4 MB more than it has."""
    tiny.save(tmp_path / "small", "gpt2"), tiny.save(tmp_path / "large", "gpt2", n_embd=512)
    script = """
import resource, sys, torch
from pathlib import Path
from distillm_cli.errors import DistillmError
from distillm_cli.models.loading import load_backbone

def load(name):
    return load_backbone(f"{sys.argv[1]}/{name}", dtype=torch.float32, device=torch.device("cpu"))

load("small")
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + (4 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
try:
    load("large")
except DistillmError as error:
    print(error.exit_code, error.code, error)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("7 memory.exhausted "), done.stderr
    assert f"{tmp_path}/large" in done.stdout


@pytest.mark.parametrize("depth", [0, -1])
def test_model_without_layers_is_rejected(tmp_path, depth):
    tiny.save(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": depth}))
    with raises_code("model.invalid_config", f"num_hidden_layers is {depth}"):
        load_backbone(str(tmp_path / "model"), dtype=torch.float32, device=torch.device("cpu"))
