"""``distillm plan`` from configs alone: sizes as published, arithmetic as by hand, and every pipeline of the paper."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distillm_cli.cli.app import main
from distillm_cli.models.products import can_pack

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "tie_word_embeddings": True, "head_dim": 128}
LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}


def gpt2(layers, width, heads):
    return GPT2 | {"n_layer": layers, "n_embd": width, "n_head": heads}


def opt(layers, width, heads, **more):
    return OPT | {
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "ffn_dim": 4 * width,
        "word_embed_proj_dim": width, **more,
    }  # fmt: skip


def rotary(base, layers, width, inner, heads, kv, vocab, *, tied=True):
    return base | {
        "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv, "vocab_size": vocab, "tie_word_embeddings": tied,
    }  # fmt: skip


# name → config and the number of parameters that its checkpoint has
PUBLISHED = {
    "gpt2": (gpt2(12, 768, 12), 124_439_808),
    "gpt2-medium": (gpt2(24, 1024, 16), 354_823_168),
    "gpt2-large": (gpt2(36, 1280, 20), 774_030_080),
    "gpt2-xl": (gpt2(48, 1600, 25), 1_557_611_200),
    "facebook/opt-125m": (opt(12, 768, 12), 125_239_296),
    "facebook/opt-350m": (opt(24, 1024, 16, word_embed_proj_dim=512, do_layer_norm_before=False), 331_196_416),
    "facebook/opt-1.3b": (opt(24, 2048, 32), 1_315_758_080),
    "facebook/opt-2.7b": (opt(32, 2560, 32), 2_651_596_800),
    "Qwen/Qwen3-0.6B": (rotary(QWEN3, 28, 1024, 3072, 16, 8, 151936), 596_049_920),
    "Qwen/Qwen3-4B-Instruct-2507": (rotary(QWEN3, 36, 2560, 9728, 32, 8, 151936), 4_022_468_096),
    "meta-llama/Llama-3.2-1B-Instruct": (rotary(LLAMA, 16, 2048, 8192, 32, 8, 128256), 1_235_814_400),
    "meta-llama/Llama-3.2-3B-Instruct": (rotary(LLAMA, 28, 3072, 8192, 24, 8, 128256), 3_212_749_824),
    "openlm-research/open_llama_3b_v2": (rotary(LLAMA, 26, 3200, 8640, 32, 32, 32000, tied=False), 3_426_473_600),
    "openlm-research/open_llama_7b_v2": (rotary(LLAMA, 32, 4096, 11008, 32, 32, 32000, tied=False), 6_738_415_616),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """A directory for each published shape, with a config.json and nothing else; and the same as a hub's cache."""
    home = tmp_path_factory.mktemp("configs")
    for name, (config, _) in PUBLISHED.items():
        snapshot = home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
        refs = snapshot.parent.parent / "refs"
        for place in (home / name, snapshot):
            place.mkdir(parents=True)
            (place / "config.json").write_text(json.dumps(config))
        refs.mkdir()
        (refs / "main").write_text("0")
    return home


@pytest.fixture
def planned(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTILLM_DATA", raising=False)

    def call(*argv):
        capsys.readouterr()
        code = main(["plan", *map(str, argv), "--json", "--quiet"])
        told = json.loads(capsys.readouterr().out)
        assert code == 0, told
        return told

    return call


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_published(name, configs, planned):
    told = planned("--method", "sft", "--student", configs / name)
    student = told["models"]["student"]
    assert student["parameters"] == PUBLISHED[name][1]
    assert sum(student["parts"].values()) == student["parameters"]
    assert told["memory"]["student_weights"] == 4 * student["parameters"]
    assert told["memory"]["optimizer"] == 8 * student["parameters"]


def test_the_papers_pair_from_configs_alone(configs, planned):
    """GPT-2 XL → GPT-2 by hand: FLOPs of a step, bytes of the parts; a directory and a config.json are the same."""
    pair = ("--teacher", configs / "gpt2-xl" / "config.json", "--student", configs / "gpt2")
    told = planned("--recipe", "dolly-gpt2", *pair)
    assert told == planned("--recipe", "dolly-gpt2", "--teacher", configs / "gpt2-xl", "--student", configs / "gpt2")
    tokens, length, response, vocab = 8 * 512, 512, 256, 50257
    trunk, wide = 12 * (12 * 768**2), 48 * (12 * 1600**2)  # 4 D² of attention and 8 D² of feed-forward a layer
    student = 3 * (2 * tokens * (trunk + 12 * 768 * length) + 2 * 8 * response * 768 * vocab)
    teacher = 2 * tokens * (wide + 48 * 1600 * length) + 2 * 8 * response * 1600 * vocab
    assert told["step_flops"]["dataset"] == pytest.approx(student + teacher, rel=2e-3)
    assert told["memory"]["teacher_weights"] == 2 * 1_557_611_200
    assert told["memory"]["rollout_cache"] == 8 * 8 * 512 * 12 * 2 * 768 * 2
    assert told["teacher_cache"]["bytes_per_token"] == 3200, "DESIGN: 3.2 KB a token for GPT-2 XL"
    assert told["steps"] is None
    assert any("no rows of dolly at hand" in note for note in told["notes"])
    assert set(told["gpus"]) == {"RTX 4090", "L40S", "A100 80GB", "H100 SXM", "H200"}
    assert all("run_s" not in gpu for gpu in told["gpus"].values())
    assert told["gpus"]["H200"]["step_s"]["dataset"] < told["gpus"]["A100 80GB"]["step_s"]["dataset"]


def test_rows_and_tokenizer_that_are_at_hand_are_measured(configs, planned, shared_data, monkeypatch, tmp_path):
    import shutil

    tokens = shared_data / "tokenizers" / "gpt2"
    for name in ("gpt2", "gpt2-xl"):
        shutil.copytree(tokens, tmp_path / name)
        shutil.copy(configs / name / "config.json", tmp_path / name)
    monkeypatch.setenv("DISTILLM_DATA", str(shared_data))
    few = ("--set", "data.limit=800", "--epochs", "3")
    told = planned("--recipe", "dolly-gpt2", "--teacher", "gpt2-xl", "--student", "./gpt2", *few)
    assert told["data"]["rows"] == 800
    assert told["data"]["kept"] + told["data"]["dropped"] == 800
    assert told["steps"] == 3 * told["steps_per_epoch"]
    assert told["teacher_cache"]["bytes"] == pytest.approx(told["data"]["response_tokens"] * 3200, rel=1e-6)
    least, most = told["gpus"]["H100 SXM"]["run_s"]
    assert 0 < least < most, "φ held at its start, and at 1"
    assert told["step_flops"]["dataset_cached"] < told["step_flops"]["dataset"]
    assert "fits is not known" not in " ".join(told["notes"])


def test_weights_here_are_loaded_and_counted_the_same(planned, tmp_path):
    """The quickstart has its weights: what is told of it by loading agrees with its shapes."""
    from distillm_cli.cli.planning import of_shapes
    from distillm_cli.config.load import resolve

    few = ["data.size=200", "train.device=cpu", "teacher.cache=memory"]
    sets = [word for field in few for word in ("--set", field)]
    loaded = planned("--recipe", "quickstart", *sets)
    shapes, _ = of_shapes(resolve(command="plan", recipe="quickstart", sets=few).recipe)
    for key in ("models", "vocabulary", "steps", "memory", "step_flops", "gpus"):
        assert loaded[key] == shapes[key], key
    assert loaded["teacher_cache"]["bytes"] == shapes["teacher_cache"]["bytes"]


def test_a_pipeline_is_planned_stage_by_stage_from_what_its_stages_will_make(planned):
    told = planned("--recipe", "quickstart-pipeline")
    stages = told["stages"]
    assert list(stages) == ["teacher", "student", "distill"]
    models = stages["distill"]["models"]
    assert models["teacher"]["parameters"] == stages["teacher"]["models"]["student"]["parameters"]
    assert models["student"]["parameters"] == stages["student"]["models"]["student"]["parameters"]
    assert stages["distill"]["steps"] == 1000


def test_every_shipped_pipeline_has_a_plan_from_the_hubs_configs_alone(configs):
    """As typed where the hub was asked for configs before: names of the hub, nothing else in its cache."""
    script = (
        "import contextlib, io, json, sys\n"
        "from distillm_cli.cli.app import main\n"
        "from distillm_cli.config.load import shipped\n"
        "from distillm_cli.config.pipeline import is_pipeline\n"
        "names = [n for n in shipped() if n.startswith('dolly') or (is_pipeline(n) and n != 'quickstart-pipeline')]\n"
        "for name in names:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        code = main(['plan', '--recipe', name, '--json', '--quiet'])\n"
        "    told = json.loads(out.getvalue())\n"
        "    print(name, code, *[s['models']['student']['parameters'] for s in told.get('stages', {}).values()])\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_CACHE": str(configs / "hub"), "HF_HUB_OFFLINE": "1"}
    environment.pop("DISTILLM_DATA", None)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    told = {words[0]: words[1:] for words in map(str.split, done.stdout.splitlines())}
    assert {"dolly-gpt2", "dolly-opt", "dolly-gpt2-pipeline", "dolly-opt-pipeline", "qwen3-pipeline"} <= set(told), done
    assert {words[0] for words in told.values()} == {"0"}, done.stderr
    sizes = ["1557611200", *["124439808"] * 2, *["354823168"] * 2, *["774030080"] * 2]
    assert told["dolly-gpt2-pipeline"][1:] == sizes
    assert told["llama-3.2-pipeline"][1:] == ["1235814400"] * 2


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--student", "nowhere/config.json"], "no model config at nowhere/config.json: no such file"),
        (["--student", "./nowhere"], "no such directory"),
        (
            ["--recipe", "dolly-gpt2-pipeline", "--lr", "1"],
            "--lr with dolly-gpt2-pipeline, a recipe of stages; try --set",
        ),
        (["--data", "rows.jsonl", "--student", "random:2x32"], "rows.jsonl: no such file or directory"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(argv, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *argv, *(["--method", "sft"] if "--recipe" not in argv else [])]) != 0
    err = capsys.readouterr().err
    assert line in err
    assert len([said for said in err.splitlines() if said.startswith("error: ")]) == 1


def test_an_adapter_trains_few_weights_and_needs_little_memory(configs, planned):
    """OpenLLaMA2 3 B, r 16 in every linear layer: r·(in + out) weights each, by hand."""
    base = ("--method", "sft", "--student", configs / "openlm-research/open_llama_3b_v2")
    whole, adapter = planned(*base), planned(*base, "--set", "student.lora.r=16")
    layer = 4 * 16 * (3200 + 3200) + 3 * 16 * (3200 + 8640)
    assert adapter["models"]["student"]["trainable"] == 26 * layer
    assert adapter["models"]["student"]["parameters"] == whole["models"]["student"]["parameters"] + 26 * layer
    assert adapter["memory"]["optimizer"] == 8 * 26 * layer
    assert adapter["step_flops"]["dataset"] < 0.8 * whole["step_flops"]["dataset"], "no gradients of frozen weights"


def test_on_a_cpu_a_bf16_teacher_is_there_twice_where_its_weights_are_laid_out(configs, planned):
    def layouts(teacher: str, device: str, dtype: str = "bf16"):
        pair = ("--teacher", configs / teacher, "--student", configs / "gpt2", "--set", f"teacher.dtype={dtype}")
        told = planned("--recipe", "dolly-gpt2", *pair, "--set", f"train.device={device}")
        return told["memory"].get("teacher_layouts")

    assert layouts("gpt2-medium", "cpu") == (2 * 24 * 12 * 1024**2 if can_pack() else None)
    assert layouts("gpt2-medium", "auto") is None, "planned for a GPU"
    assert layouts("gpt2-medium", "cpu", "fp32") is None
    assert layouts("gpt2-xl", "cpu") is None, "too large for a second copy"
    assert layouts("facebook/opt-125m", "cpu") is None, "no pass is written out for it"
