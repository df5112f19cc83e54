"""Loading models and tokenizers, and what goes wrong there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, ViTConfig

from distillm_cli.errors import ModelError
from distillm_cli.models.backbone import vocabulary_size
from distillm_cli.models.loading import load_backbone
from distillm_cli.models.tokenizer_files import load_tokenizer
from distillm_cli.training.events import Progress
from tests import tiny

CPU = torch.device("cpu")
VOCAB = tiny.VOCAB
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}


def load(path: str, **options):
    return load_backbone(path, dtype=torch.float32, device=CPU, **options)


def test_a_directory_loads_silently_with_progress_in_eval_mode(tmp_path, capfd):
    path = tiny.save(tmp_path / "m", "gpt2", rows=VOCAB + 7)
    heard = []
    capfd.readouterr()
    backbone = load(path, listener=heard.append)
    assert capfd.readouterr() == ("", "")
    assert heard == [Progress(f"loading {path}", 0, 1), Progress(f"loading {path}", 1, 1)]
    assert not any(module.training for module in backbone.modules())
    assert backbone.vocab == VOCAB
    original = tiny.model("gpt2", VOCAB + 7)
    assert all(torch.equal(p, q) for p, q in zip(backbone.parameters(), original.parameters(), strict=True))
    assert backbone.check_head(tiny.batch([(3, 4)], VOCAB))


def test_weights_take_the_dtype_asked_for(tmp_path):
    backbone = load_backbone(tiny.save(tmp_path / "m"), dtype=torch.bfloat16, device=CPU)
    assert {p.dtype for p in backbone.parameters()} == {torch.bfloat16}


def no_such_directory(place: Path) -> str:
    return str(place / "nowhere")


def a_file(place: Path) -> str:
    return str(Path(tiny.save(place)) / "config.json")


def without_config(place: Path) -> str:
    place.mkdir()
    return str(place)


def broken_config(place: Path) -> str:
    place.mkdir()
    (place / "config.json").write_text("{")
    return str(place)


def unknown_architecture(place: Path) -> str:
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "perceptron"}')
    return str(place)


def without_weights(place: Path) -> str:
    tiny.save(place)
    (place / "model.safetensors").unlink()
    return str(place)


def truncated_weights(place: Path) -> str:
    tiny.save(place)
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return str(place)


def weights_of_another_shape(place: Path) -> str:
    tiny.save(place)
    config = json.loads((place / "config.json").read_text()) | {"intermediate_size": 64}
    (place / "config.json").write_text(json.dumps(config))
    return str(place)


def a_trunk_without_its_head(place: Path) -> str:
    tiny.save(place)
    tiny.model("llama", VOCAB).model.save_pretrained(place)
    return str(place)


def without_tokenizer(place: Path) -> str:
    return tiny.save(place, "gpt2", own_tokenizer=False)


def tokenizer_too_large(place: Path) -> str:
    return tiny.save(place, rows=30)


def bidirectional(place: Path) -> str:
    BertForMaskedLM(BertConfig(vocab_size=VOCAB, num_hidden_layers=1, **SMALL)).save_pretrained(place)
    tiny.tokenizer(size=VOCAB).save_pretrained(place)
    return str(place)


def no_language_model(place: Path) -> str:
    ViTConfig(num_hidden_layers=1, **SMALL).save_pretrained(place)
    return str(place)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_such_directory, r"no model at .*nowhere: no such directory"),
        (a_file, r"config.json is a file, not a model directory; pass .*m$"),
        (without_config, r"has no config.json"),
        (broken_config, r"cannot read the config of .*not a valid JSON"),
        (unknown_architecture, r"cannot read the config of .*perceptron"),
        (without_weights, r"has a config.json but no weights.*to start from scratch, pass .*m/config.json"),
        (truncated_weights, r"cannot read the weights of .*damaged or incomplete safetensors"),
        (weights_of_another_shape, r"another shape than in its config: model.layers.0.mlp.*and 4 more"),
        (a_trunk_without_its_head, r"weights absent: lm_head.weight"),
        (without_tokenizer, r"has no tokenizer; pass --tokenizer"),
        (tokenizer_too_large, r"41 token ids and the model only 30"),
        (bidirectional, r"is not a causal language model \(BertForMaskedLM\)"),
        (no_language_model, r"is not a causal language model \(vit\)"),
    ],
)
def test_what_is_wrong_with_a_directory_is_one_line_with_its_cause(make, message, tmp_path, capfd):
    path = make(tmp_path / "m")
    capfd.readouterr()
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["gpt3-small", "someone/some-model", "not a name"])
def test_a_name_that_is_neither_local_nor_reachable(name):
    with pytest.raises(ModelError, match=f"cannot find '{name}': no such directory.*HF_HUB_OFFLINE") as caught:
        load(name)
    assert caught.value.exit_code == 4
    assert "pass a local directory" in str(caught.value)


@pytest.mark.parametrize("path", ["./missing", "~/missing-model", "a/b/c", "/missing"])
def test_a_path_is_never_looked_for_on_the_hub(path):
    with pytest.raises(ModelError, match="no such directory; check the path"):
        load(path)


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    place = tmp_path / "m"
    place.mkdir()
    (place / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (place / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    with pytest.raises(ModelError, match="custom code"):
        load(str(place))
    assert not (tmp_path / "ran").exists()


# Tokenizers


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "qwen3", "gemma2"])
def test_a_saved_tokenizer_comes_back_as_it_was_beside_any_family(family, tmp_path):
    tokenizer = tiny.tokenizer(size=VOCAB)
    loaded = load_tokenizer(tiny.save(tmp_path / "m", family, own_tokenizer=tokenizer))
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("hello world").input_ids == tokenizer("hello world").input_ids


def test_a_missing_pad_token_is_arranged_and_lasts(tmp_path):
    loaded = load_tokenizer(tiny.save(tmp_path / "m", own_tokenizer=tiny.tokenizer(pad=False, size=VOCAB)))
    assert (loaded.pad_token, loaded.eos_token) == ("<eos>", "<eos>")
    loaded.save_pretrained(tmp_path / "again")
    assert load_tokenizer(str(tmp_path / "again")).pad_token == "<eos>"
    assert "local" not in (tmp_path / "again" / "tokenizer_config.json").read_text()


def test_a_loaded_model_can_generate_batches_without_a_pad_token_of_its_own(tmp_path):
    backbone = load(tiny.save(tmp_path / "m", own_tokenizer=tiny.tokenizer(pad=False, size=VOCAB)))
    assert backbone.model.generation_config.pad_token_id == backbone.tokenizer.eos_token_id
    assert backbone.model.config.pad_token_id is None


def test_a_tokenizer_without_an_end_of_sequence_is_refused(tmp_path):
    tokenizer = tiny.tokenizer(size=VOCAB)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        load_tokenizer(tiny.save(tmp_path / "m", own_tokenizer=tokenizer))


def test_gpt2s_own_tokenizer_files(shared_data):
    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "gpt2"))
    assert vocabulary_size(tokenizer) == 50_257
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 50_256
    assert tokenizer.decode(tokenizer("### Response:\n don't").input_ids) == "### Response:\n don't"


def test_without_a_network_what_was_downloaded_before_loads_and_the_rest_is_refused_at_once(tmp_path):
    """In a process of its own: not reaching the hub lasts as long as the process."""
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
    print(error.what)
"""
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    vocab, refusal = done.stdout.splitlines()
    assert int(vocab) == VOCAB
    assert refusal.endswith("http://127.0.0.1:9 cannot be reached")
    assert "Retry" not in done.stderr, "the hub's client tries every file six times, for half a minute"


def test_a_model_for_which_memory_does_not_suffice_is_no_damaged_model(tmp_path):
    """The system gives this process no more than it has, and 4 MB."""
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
    print(error.exit_code, error)
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.stdout.startswith(f"7 out of memory while reading the weights of {tmp_path}/large; "), done.stderr


@pytest.mark.parametrize("depth", [0, -1])
def test_a_model_without_layers_is_none(tmp_path, depth):
    tiny.save(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": depth}))
    with pytest.raises(ModelError, match=f"num_hidden_layers is {depth}; its config.json must have at least one layer"):
        load_backbone(str(tmp_path / "model"), dtype=torch.float32, device=torch.device("cpu"))
