"""Test ``distillm plan``: published parameter counts, FLOPs and memory computed by hand, and all shipped recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distillm_cli.cli.app import main
from distillm_cli.config.load import shipped
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.cpu.packed import can_pack
from distillm_cli.models.shapes import sizes
from distillm_cli.runs import costs
from tests import tiny
from tests.command_line import assert_error_line, call

GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
OPT = {"model_type": "opt", "vocab_size": 50272, "max_position_embeddings": 2048}
QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "tie_word_embeddings": True, "head_dim": 128}
QWEN2 = {"model_type": "qwen2", "max_position_embeddings": 32768}
LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}
T5 = {"is_encoder_decoder": True, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 64}


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


def t5(kind, layers, width, inner, heads, vocab):
    """Return the config of a T5 1.1 or mT5: untied head, three feed-forward matrices, heads independent of the width."""
    return T5 | {
        "model_type": kind, "num_layers": layers, "num_decoder_layers": layers, "d_model": width, "d_ff": inner,
        "num_heads": heads, "vocab_size": vocab, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip


# name → (config, number of parameters of the published checkpoint)
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
    "Qwen/Qwen2.5-0.5B": (rotary(QWEN2, 24, 896, 4864, 14, 2, 151936), 494_032_768),
    "Qwen/Qwen2.5-1.5B": (rotary(QWEN2, 28, 1536, 8960, 12, 2, 151936), 1_543_714_304),
    "meta-llama/Llama-3.2-1B-Instruct": (rotary(LLAMA, 16, 2048, 8192, 32, 8, 128256), 1_235_814_400),
    "meta-llama/Llama-3.2-3B-Instruct": (rotary(LLAMA, 28, 3072, 8192, 24, 8, 128256), 3_212_749_824),
    "openlm-research/open_llama_3b_v2": (rotary(LLAMA, 26, 3200, 8640, 32, 32, 32000, tied=False), 3_426_473_600),
    "openlm-research/open_llama_7b_v2": (rotary(LLAMA, 32, 4096, 11008, 32, 32, 32000, tied=False), 6_738_415_616),
    "google/t5-v1_1-small": (t5("t5", 8, 512, 1024, 6, 32128), 76_961_152),
    "google/t5-v1_1-xl": (t5("t5", 24, 2048, 5120, 32, 32128), 2_849_757_184),
    "google/t5-small-lm-adapt": (t5("t5", 8, 512, 1024, 6, 32128), 76_961_152),
    "google/t5-xl-lm-adapt": (t5("t5", 24, 2048, 5120, 32, 32128), 2_849_757_184),
    "google/mt5-small": (t5("mt5", 8, 512, 1024, 6, 250112), 300_176_768),
    "google/mt5-xl": (t5("mt5", 24, 2048, 5120, 32, 250112), 3_742_619_648),
}
OFFLINE = ("quickstart", "questions", "quickstart-pipeline", "quickstart-teacher")  # need no files from the hub
USER_DATA = ("g2p", "g2p-teacher")  # need rows and a teacher of the user


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Write a directory with only a config.json for each published model, and a hub cache with the same configs."""
    home = tmp_path_factory.mktemp("configs")
    for name, (config, _) in PUBLISHED.items():
        snapshot = home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
        refs = snapshot.parent.parent / "refs"
        for directory in (home / name, snapshot):
            directory.mkdir(parents=True)
            (directory / "config.json").write_text(json.dumps(config))
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
        plan = json.loads(capsys.readouterr().out)
        assert code == 0, plan
        return plan

    return call


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_as_published(name, configs, planned):
    plan = planned("--method", "sft", "--student", configs / name)
    student = plan["models"]["student"]
    assert student["parameters"] == PUBLISHED[name][1]
    assert sum(student["parts"].values()) == student["parameters"]
    assert plan["memory"]["student_weights"] == 4 * student["parameters"]
    assert plan["memory"]["optimizer"] == 8 * student["parameters"]


def test_gpt2_pair_is_planned_from_configs_alone(configs, planned):
    """Check FLOPs of a step and bytes of each part for GPT-2 XL → GPT-2. A directory and its config.json give one plan."""
    pair = ("--teacher", configs / "gpt2-xl" / "config.json", "--student", configs / "gpt2")
    plan = planned("--recipe", "dolly-gpt2", *pair)
    assert plan == planned("--recipe", "dolly-gpt2", "--teacher", configs / "gpt2-xl", "--student", configs / "gpt2")
    tokens, length, response, vocab = 8 * 512, 512, 256, 50257
    trunk, teacher_trunk = 12 * (12 * 768**2), 48 * (12 * 1600**2)  # 4 D² of attention and 8 D² of feed-forward a layer
    student = 3 * (2 * tokens * (trunk + 12 * 768 * length) + 2 * 8 * response * 768 * vocab)
    teacher = 2 * tokens * (teacher_trunk + 48 * 1600 * length) + 2 * 8 * response * 1600 * vocab
    assert plan["step_flops"]["dataset"] == pytest.approx(student + teacher, rel=2e-3)
    assert plan["memory"]["teacher_weights"] == 2 * 1_557_611_200
    assert plan["memory"]["rollout_cache"] == 8 * 8 * 512 * 12 * 2 * 768 * 2
    assert plan["teacher_cache"]["bytes_per_token"] == 3200, "3.2 KB per token for GPT-2 XL"
    assert plan["steps"] is None
    assert any("no rows of dolly available" in note for note in plan["notes"])
    assert set(plan["gpus"]) == {"RTX 4090", "L40S", "A100 80GB", "H100 SXM", "H200"}
    assert all("run_s" not in gpu for gpu in plan["gpus"].values())
    assert plan["gpus"]["H200"]["step_s"]["dataset"] < plan["gpus"]["A100 80GB"]["step_s"]["dataset"]


def test_plan_for_several_processes(configs, planned):
    llama = configs / "meta-llama"
    run = ("--teacher", llama / "Llama-3.2-3B-Instruct", "--student", llama / "Llama-3.2-1B-Instruct",
           "--data", "builtin", "--set", "data.size=600", "--batch-size", 12, "--set", "train.accumulate=2")  # fmt: skip
    alone, eight = planned(*run), planned(*run, "--processes", 8)
    several = eight.pop("processes")
    assert (several["number"], several["sequences_each"]) == (8, 3)
    # A ring sends 7/8 of the float32 gradients twice: 2.16 GB for each GB of weights in bf16.
    assert several["network_bytes"] == round(2 * 7 / 8 * 4 * 1_235_814_400)
    assert several["network_s"]["NVLink"] == pytest.approx(0.029, abs=1e-3)
    for same in ("steps", "sequences_per_step", "models"):
        assert alone[same] == eight[same]
    assert eight["memory"]["activations"] == alone["memory"]["activations"] / 4
    assert eight["memory"]["optimizer"] == alone["memory"]["optimizer"]
    assert eight["step_flops"]["dataset"] == pytest.approx(alone["step_flops"]["dataset"] / 8, rel=1e-3)
    one = planned(*run, "--processes", 1)
    assert one == alone
    assert "processes" not in one


def test_plan_of_a_distributed_student(configs, planned):
    llama = configs / "meta-llama"
    run = ("--teacher", llama / "Llama-3.2-3B-Instruct", "--student", llama / "Llama-3.2-1B-Instruct",
           "--data", "builtin", "--set", "data.size=600", "--batch-size", 2, "--set", "train.accumulate=8",
           "--processes", 4)  # fmt: skip
    whole, shards = planned(*run), planned(*run, "--set", "train.shard=full")
    total, ends, layer = 1_235_814_400, 128_256 * 2048 + 2048, 60_821_504
    assert total == ends + 16 * layer
    for part, size in (("student_weights", 4), ("gradients", 4), ("optimizer", 8)):
        assert (whole["memory"][part], shards["memory"][part]) == (size * total, size * total // 4)
    assert "gathered_weights" not in whole["memory"]
    assert shards["memory"]["gathered_weights"] == pytest.approx(4 * (2 * ends + 3 * layer), rel=1e-3)
    assert shards["memory"]["rollout_weights"] == whole["memory"]["rollout_weights"]
    # Two passes of two sequences: the weights twice and the gradients once in each.
    assert shards["processes"]["network_bytes"] == round(2 * 3 * 4 * total * 3 / 4)


def test_steps_per_epoch_without_a_tokenizer(configs, planned):
    """Check that only full batches count, 2 for 20 rows by 8, but at least one."""
    pair = ("--teacher", configs / "gpt2-xl", "--student", configs / "gpt2", "--data", "builtin", "--epochs", 3)
    for rows, per_epoch in ((20, 2), (24, 3), (5, 1)):
        plan = planned(*pair, "--batch-size", 8, "--set", f"data.size={rows}")
        assert "no tokenizer available" in " ".join(plan["notes"])
        assert (plan["steps_per_epoch"], plan["steps"]) == (per_epoch, 3 * per_epoch)


def test_plan_measures_available_rows_and_tokenizer(configs, planned, shared_data, monkeypatch, tmp_path):
    import shutil

    tokens = shared_data / "tokenizers" / "gpt2"
    for name in ("gpt2", "gpt2-xl"):
        shutil.copytree(tokens, tmp_path / name)
        shutil.copy(configs / name / "config.json", tmp_path / name)
    monkeypatch.setenv("DISTILLM_DATA", str(shared_data))
    few = ("--set", "data.limit=800", "--epochs", "3")
    plan = planned("--recipe", "dolly-gpt2", "--teacher", "gpt2-xl", "--student", "./gpt2", *few)
    assert plan["data"]["rows"] == 800
    assert plan["data"]["kept"] + plan["data"]["dropped"] == 800
    assert plan["steps"] == 3 * plan["steps_per_epoch"]
    assert plan["teacher_cache"]["bytes"] == pytest.approx(plan["data"]["response_tokens"] * 3200, rel=1e-6)
    shortest, maximum = plan["gpus"]["H100 SXM"]["run_s"]
    assert 0 < shortest < maximum, "time with φ at its start, and with φ = 1"
    assert plan["step_flops"]["dataset_cached"] < plan["step_flops"]["dataset"]
    assert "fits is not known" not in " ".join(plan["notes"])


def test_plan_from_weights_matches_plan_from_configs(planned, tmp_path):
    """Check the quickstart, whose weights are available: the plan from loaded models equals the plan from configs."""
    from distillm_cli.config.load import resolve
    from distillm_cli.runs.defaults import fitted
    from distillm_cli.runs.plan import plan_from_configs

    few = ["data.size=200", "train.device=cpu", "teacher.cache=memory"]
    sets = [word for field in few for word in ("--set", field)]
    loaded = planned("--recipe", "questions", *sets)
    shapes, _ = plan_from_configs(fitted(resolve(command="plan", recipe="questions", sets=few)))
    for key in ("models", "vocabulary", "steps", "memory", "step_flops", "gpus"):
        assert loaded[key] == shapes[key], key
    assert loaded["teacher_cache"]["bytes"] == shapes["teacher_cache"]["bytes"]


def test_pipeline_is_planned_stage_by_stage(planned):
    plan = planned("--recipe", "quickstart-pipeline", "--set", "defaults.data.size=400")
    stages = plan["stages"]
    assert list(stages) == ["teacher", "student", "distill", "eval"]
    models = stages["distill"]["models"]
    assert models["teacher"]["parameters"] == stages["teacher"]["models"]["student"]["parameters"]
    assert models["student"]["parameters"] == stages["student"]["models"]["student"]["parameters"]
    assert stages["distill"]["steps"] == 1000


@pytest.fixture(scope="module")
def plans(configs):
    """Plan every shipped recipe of hub models, with only their configs in the hub cache.

    Return {name: (exit code, JSON object, stderr at 80 columns)}.
    """
    script = (
        "import contextlib, io, json, sys\n"
        "from distillm_cli.cli.app import main\n"
        "for name in sys.argv[1:]:\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        code = main(['plan', '--recipe', name, '--json'])\n"
        "    print(json.dumps([name, code, json.loads(out.getvalue()), err.getvalue()]))\n"
    )
    names = [name for name in shipped() if name not in OFFLINE + USER_DATA]
    overrides = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "HF_HUB_CACHE": str(configs / "hub")}
    environment = {**os.environ, **overrides, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    environment.pop("DISTILLM_DATA", None)
    command = [sys.executable, "-c", script, *names]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    found = {name: (code, plan, err) for name, code, plan, err in map(json.loads, process.stdout.splitlines())}
    assert list(found) == names, process.stderr
    return found


@pytest.mark.long
def test_every_shipped_recipe_is_planned_from_configs(plans):
    assert {code for code, _, _ in plans.values()} == {0}
    sizes = {
        name: [s["models"]["student"]["parameters"] for s in plan["stages"].values() if "student" in s["models"]]
        for name, (_, plan, _) in plans.items()
        if "stages" in plan
    }
    assert sizes["dolly-gpt2-pipeline"] == [1557611200, *[124439808] * 2, *[354823168] * 2, *[774030080] * 2]
    assert sizes["llama-3.2-pipeline"] == [1235814400] * 2


@pytest.mark.long
def test_plan_fits_80_columns_and_has_units(plans):
    for name, (_, _, table) in plans.items():
        # Only tables: lines of text are wrapped by the terminal.
        lines = [line for line in table.splitlines() if line[:1] in "╭│├╰"]
        assert 0 < max(map(len, lines)) <= 80, name
    training, stages = plans["samsum-t5"][2], plans["dolly-gpt2-pipeline"][2]
    for text in ("24 + 24 × 2048", "8 + 8 × 512", "TFLOP", "GB", "ms"):
        assert text in training
    assert "unknown: no tokenizer available; 32,128 rows in common" in training
    for text in ("1.56 B → 124 M", "FLOP of each", "– steps", "– answers", "ms", "too large"):
        assert text in stages


@pytest.mark.parametrize(
    ("argv", "code", "mention"),
    [
        (["--student", "nowhere/config.json"], "model.no_config", "nowhere/config.json"),
        (["--student", "./nowhere"], "model.not_found", "nowhere"),
        (["--recipe", "dolly-gpt2-pipeline", "--lr", "1"], "usage.recipe_of_stages", "--lr"),
        (["--data", "rows.jsonl", "--student", "random:2x32"], "data.not_found", "rows.jsonl"),
        (["--data", "builtin", "--student", "layers:6"], "usage.no_teacher", "layers:6"),
    ],
)
def test_invalid_plan_arguments_are_errors(argv, code, mention, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["plan", *argv, *(["--method", "sft"] if "--recipe" not in argv else []), "--debug"]
    assert_error_line((main(argv), *capsys.readouterr()), code, mention)


@pytest.mark.parametrize("student", ["gpt2", "random:2x32"])
@pytest.mark.parametrize(
    ("sets", "code", "mention"),
    [
        (("teacher.cache=disk", "schedule.kind=on"), "usage.no_teacher_cache", "schedule.kind on"),
        (("train.select=rouge_l", "eval.report_rows=0"), "usage.invalid_selection", "eval.report_rows"),
    ],
)
def test_plan_reports_the_errors_of_the_run(student, sets, code, mention, configs, capsys):
    teacher = "builtin" if student.startswith("random") else configs / "gpt2-xl"
    pair = ["--teacher", teacher, "--student", student if teacher == "builtin" else configs / student]
    argv = ["plan", *pair, "--data", "builtin", "--set", "data.size=48", "--debug"]
    argv += [word for field in ("data.template=plain", *sets) for word in ("--set", field)]
    status = main([str(word) for word in argv])
    assert_error_line((status, *capsys.readouterr()), code, mention)


def test_adapter_parameters_and_memory(configs, planned):
    """Check r·(in + out) weights for each linear layer of OpenLLaMA2 3 B, with r = 16."""
    base = ("--method", "sft", "--student", configs / "openlm-research/open_llama_3b_v2")
    full, adapter = planned(*base), planned(*base, "--set", "student.lora.r=16")
    layer = 4 * 16 * (3200 + 3200) + 3 * 16 * (3200 + 8640)
    assert adapter["models"]["student"]["trainable"] == 26 * layer
    assert adapter["models"]["student"]["parameters"] == full["models"]["student"]["parameters"] + 26 * layer
    assert adapter["memory"]["optimizer"] == 8 * 26 * layer
    assert adapter["step_flops"]["dataset"] < 0.8 * full["step_flops"]["dataset"], "no gradients of frozen weights"


@pytest.mark.long
def test_encoder_decoder_flops(plans):
    """Check FLOPs of T5-XL → T5-small on SAMSum, for 32 rows of 1,024 + 128 tokens.

    Prompts pass the encoder and the keys and values of cross-attention, responses the decoder and the head.
    """
    _, plan, _ = plans["samsum-t5"]

    def forward(layers, width, inner, heads):
        projection = 64 * heads
        encoder, decoder = 4 * width * projection + 3 * width * inner, 6 * width * projection + 3 * width * inner
        # Self-attention of the encoder, causal self-attention of the decoder, cross-attention.
        attention = 4 * projection * (1024 * 1024 + 128 * 64 + 128 * 1024)
        return 32 * layers * (2 * (1024 * (encoder + 2 * width * projection) + 128 * decoder) + attention)

    def head(width):
        return 2 * 32 * 128 * width * 32128

    teacher = forward(24, 2048, 5120, 32) + head(2048)
    student = 3 * (forward(8, 512, 1024, 6) + head(512))
    assert plan["step_flops"]["dataset"] == pytest.approx(teacher + student, rel=1e-3)
    assert plan["step_flops"]["replay"] == pytest.approx(student + head(2048), rel=1e-3)
    assert plan["memory"]["rollout_cache"] == 32 * 8 * 1152 * 8 * 2 * 384 * 2, "decoder cache of response and prompt"
    assert (plan["models"]["student"]["encoder_layers"], plan["models"]["student"]["layers"]) == (8, 8)


@pytest.mark.long
def test_flops_and_seconds_of_a_step(plans):
    """Check FLOPs of every source of the adaptive schedule, and its time on an H200, for GPT-2 XL → GPT-2."""
    _, plan, _ = plans["dolly-gpt2"]
    vocab, prompt, new = 50257, 256, 256
    trunk, teacher_trunk = 12 * 12 * 768**2, 48 * 12 * 1600**2

    def forward(matrices, layers, width, tokens):
        return 8 * tokens * (2 * matrices + 2 * layers * width * tokens)

    train = 3 * (forward(trunk, 12, 768, 512) + 2 * 8 * new * 768 * vocab)
    teacher_pass = forward(teacher_trunk, 48, 1600, 512) + 2 * 8 * new * 1600 * vocab
    teacher_head = 2 * 8 * new * 1600 * vocab
    each = 2 * trunk + 4 * 12 * 768 * (prompt + new / 2) + 2 * 768 * vocab
    sample = forward(trunk, 12, 768, prompt) + 8 * new * each
    flops = {"dataset": train + teacher_pass, "rollout": sample + teacher_pass + train, "replay": train + teacher_head}
    assert plan["step_flops"] == pytest.approx(flops, rel=1e-3)

    peak, bandwidth = 0.4 * 989e12, 0.6 * 4.8e12
    optimizer = 28 * 124_439_808 / bandwidth
    train_s = max(train / peak, 12 * 1.5e-3) + optimizer
    teacher_s = max(teacher_pass / peak, 48 * 0.5e-3)
    # Eight batches are sampled at once: weights are read once per token for all of them, keys and values once per row.
    read = 2 * (trunk + 768 * vocab) / 8 + 8 * (prompt + new / 2) * 12 * 2 * 768 * 2
    sample_s = max(sample / peak, new * read / bandwidth, new * 12 * 2e-4 / 8)
    copy_s = (4 + 2) * 124_439_808 / 8 / bandwidth
    seconds = plan["gpus"]["H200"]["step_s"]
    assert seconds["dataset"] == pytest.approx(train_s + teacher_s, rel=1e-6)
    assert seconds["replay"] == pytest.approx(train_s + teacher_head / peak, rel=1e-6)
    assert seconds["rollout"] == pytest.approx(copy_s + sample_s + teacher_s + train_s, rel=1e-6)


@pytest.mark.long
def test_total_memory_is_the_peak(plans):
    """Check that activations and sampling are not added up: OpenLLaMA2 7 B → 3 B with an adapter fits 80 GB."""
    plan = plans["dolly-openllama-pipeline"][1]["stages"]["distill"]
    memory = dict(plan["memory"])
    maximum = memory.pop("total")
    step = sum(memory.get(p, 0) for p in ("gradients", "cast_weights", "activations", "loss", "teacher_activations"))
    sampling = memory["rollout_weights"] + memory["rollout_cache"]
    assert memory["rollout_weights"] == 2 * 3_426_473_600, "all weights are merged in bf16, embeddings included"
    assert maximum == sum(memory.values()) - min(step, sampling)
    assert [plan["gpus"][name]["fits"] for name in ("L40S", "A100 80GB", "H200")] == [False, True, True]


def test_cpu_memory_is_the_sum_of_all_parts(configs, planned):
    """Check that the total is the sum of all parts for GPT-2 medium → GPT-2 on student outputs in bf16."""
    pair = ("--teacher", configs / "gpt2-medium", "--student", configs / "gpt2", "--method", "gkd", "--dtype", "bf16")
    memory = planned(*pair, "--device", "cpu")["memory"]
    assert memory.pop("total") == sum(memory.values())
    assert memory.get("rollout_layouts") == (2 * (12 * 12 * 768**2 + 50257 * 768) if can_pack() else None)
    assert memory["compiled_products"] == 250e6
    fp32 = planned(*pair[:-1], "fp32", "--device", "cpu", "--set", "teacher.dtype=fp32")["memory"]
    assert not {"rollout_layouts", "compiled_products", "teacher_layouts"} & fp32.keys()
    assert not {"rollout_layouts", "compiled_products"} & planned(*pair)["memory"].keys()


def test_adapter_activations(configs, planned, tmp_path):
    """Check the saved tensors of an adapter. With dropout it also saves attention scores, as transformers' forward does."""
    config = json.loads((configs / "gpt2" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attn_pdrop": 0.0}))
    pair = (
        "--teacher",
        configs / "gpt2-xl",
        "--student",
        tmp_path / "config.json",
        "--method",
        "kd",
        "--dtype",
        "fp32",
    )
    full, adapter = (planned(*pair, *lora, "--device", "cpu")["memory"] for lora in ((), ("--lora", 16)))
    assert full["loss"] - adapter["loss"] == 4 * 50257 * 768
    assert adapter["activations"] / full["activations"] == pytest.approx((34 + 24) / 34, rel=0.02)
    pair = (*pair[:3], configs / "gpt2", *pair[4:])
    plan = planned(*pair, "--lora", 16, "--device", "cpu")
    rows, longest = 8, plan["memory"]["teacher_activations"] / (8 * 1600 * 8 * 4)
    scores = 12 * rows * 12 * 12 * longest**2  # bytes, heads, layers
    assert plan["memory"]["activations"] == pytest.approx(adapter["activations"] + scores, rel=1e-3)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to read the peak from")
def peak_memory(argv):
    """Return the peak memory of a run in bytes, beyond that of a process with the libraries loaded."""
    script = """
import contextlib, io, re, sys
from pathlib import Path
import distillm_cli.runs.train, transformers.models.gpt2.modeling_gpt2, transformers.models.t5.modeling_t5
from distillm_cli.cli.app import main

def status(name):
    return int(re.search(rf"^{name}:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1]) * 1024

before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
with contextlib.redirect_stdout(io.StringIO()):
    code = main(["distill", *sys.argv[1:], "--output", "out", "--json", "--quiet"])
print(code, status("VmHWM") - before)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, env=env)
    code, found = map(int, process.stdout.split())
    assert code == 0, process.stderr
    return found


@pytest.mark.long
def test_cpu_run_uses_planned_memory(planned, tmp_path):
    """Check the planned total against a run with a large vocabulary on student outputs in bf16."""
    words = tiny.tokenizer(size=12_000)
    for name, width in (("teacher", 320), ("student", 256)):
        tiny.save(tmp_path / name, "gpt2", rows=12_000, own_tokenizer=words, n_embd=width, n_layer=3, n_positions=256)
    rows = [{"prompt": "ab" * (20 + i % 20), "completion": "cd" * (20 + i % 9)} for i in range(27)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "--teacher", "./teacher", "--student", "./student", "--data", "rows.jsonl", "--device", "cpu", "--method", "gkd",
        "--dtype", "bf16", "--batch-size", "8", "--set", "schedule.kind=on", "--set", "teacher.dtype=bf16",
        "--set", "rollout.max_new_tokens=40", "--set", "rollout.bulk=2", "--set", "eval.report_rows=0", "--epochs", "1",
        "--set", "train.threads=1", "--set", "data.template=plain",
    ]  # fmt: skip
    assert 0.75 < planned(*argv)["memory"]["total"] / peak_memory(argv) < 1.5


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "fields", "more"),
    [
        ("gpt2", {"n_embd": 192, "n_layer": 4, "n_positions": 512}, ["--set", "train.gradient_checkpointing=true"]),
        ("t5", {"d_model": 192, "num_layers": 3, "num_heads": 6, "dropout_rate": 0.1}, []),
    ],
)
def test_cpu_run_on_long_rows_uses_planned_memory(family, fields, more, planned, tmp_path):
    """Check runs dominated by activations: of the recomputed layer, and of attention scores with dropout."""
    tiny.save(tmp_path / "model", family, own_tokenizer=tiny.tokenizer(), **fields)
    rows = [{"prompt": "ab" * (110 + i), "completion": "cd" * (30 + i % 4)} for i in range(36)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        "--teacher", "./model", "--student", "./model", "--data", "rows.jsonl", "--device", "cpu", "--method", "kd",
        "--dtype", "fp32", "--batch-size", "16", "--teacher-cache", "off", "--set", "eval.report_rows=0", "--steps", "2",
        "--set", "train.threads=1", "--set", "data.template=plain", "--set", "data.max_prompt_length=400", *more,
    ]  # fmt: skip
    assert 0.9 < planned(*argv)["memory"]["total"] / peak_memory(argv) < 1.8


def test_adapter_is_merged_into_a_copy_for_sampling(configs, planned):
    """Check GPT-2 with r = 16: in float32 only the adapted layers are copied, in bf16 every weight."""
    pair = ("--teacher", configs / "gpt2-xl", "--student", configs / "gpt2", "--method", "gkd")
    memory = {
        dtype: planned(*pair, "--lora", 16, "--dtype", dtype, "--device", "cpu")["memory"] for dtype in ("fp32", "bf16")
    }
    assert memory["fp32"]["rollout_weights"] == 4 * 12 * 12 * 768**2
    assert memory["bf16"]["rollout_weights"] == 2 * 124_439_808
    full = planned(*pair, "--dtype", "fp32", "--device", "cpu")
    assert "rollout_weights" not in full["memory"], "a model in its compute dtype is not copied"
    off = planned("--teacher", configs / "gpt2-xl", "--student", configs / "gpt2", "--method", "kd", "--lora", 16)
    assert not {"rollout_weights", "rollout_cache"} & off["memory"].keys()


@pytest.mark.parametrize(
    ("method", "sets", "sources", "stored"),
    [
        ("minillm", [], {"rollout", "replay"}, 4 * 8),
        ("minillm", ["rollout.bulk=2", "train.accumulate=3"], {"rollout", "replay"}, 2 * 8 * 3),
        ("minillm", ["schedule.inner_epochs=1"], {"rollout"}, 0),
        ("distillm", ["schedule.capacity=77"], {"dataset", "rollout", "replay"}, 77),
        ("gkd", [], {"dataset", "rollout"}, 0),
        ("skd", [], {"rollout"}, 0),
        ("distillm2", [], {"teacher+rollout"}, 0),
        ("seqkd", [], {"teacher", "teacher_cached"}, 0),
        ("kd", [], {"dataset"}, 0),
    ],
)
def test_schedule_sets_sources_and_rollout_buffer(configs, planned, method, sets, sources, stored):
    """Check the size of the buffer of student outputs: its capacity, or one round."""
    words = [word for field in sets for word in ("--set", field)]
    pair = ("--teacher", configs / "gpt2-xl", "--student", configs / "gpt2", "--set", "rollout.max_new_tokens=100")
    plan = planned("--method", method, *pair, *words)
    assert set(plan["step_flops"]) == sources
    assert plan["memory"].get("rollout_states", 0) == stored * 100 * 3200


def test_sft_before_distillation_is_planned(planned):
    """Check three epochs of sft before distillation: steps, FLOPs of one model, and the total time."""
    sets = ("--set", "data.size=200", "--epochs", 2, "--device", "cpu")
    plain = planned("--recipe", "questions", *sets)
    plan = planned("--recipe", "questions", *sets, "--set", "student.sft_epochs=3")
    per_epoch = plain["steps_per_epoch"]
    assert plan["sft"]["steps"] == 3 * per_epoch
    assert plan["steps"] == plain["steps"] == 2 * per_epoch
    assert plan["sft"]["step_flops"]["dataset"] < 0.6 * plan["step_flops"]["dataset"]
    for name, gpu in plan["gpus"].items():
        assert gpu["sft_s"] == pytest.approx(3 * per_epoch * 3 * 1.5e-3, rel=0.02), (
            "three layers, limited by kernel launches"
        )
        assert gpu["run_s"] == pytest.approx([s + gpu["sft_s"] for s in plain["gpus"][name]["run_s"]])


PIPELINE = """
defaults:
  data: {source: builtin, template: plain, max_length: 64, size: 400}
  rollout: {max_new_tokens: 24}
  eval: {max_new_tokens: 20, batch_size: 50, seeds: [1, 2, 3], limit: 30}
stages:
  samples: {verb: generate, model: builtin, n: 2, limit: 100}
  student:
    verb: sft
    student: {path: "random:2x64", tokenizer: builtin, dtype: fp32}
    data: {source: stage:samples}
    train: {epochs: 1}
  eval: {verb: eval, models: [builtin, stage:student], eval: {suites: [builtin, stage:samples]}}
"""


def test_generate_and_eval_stages_are_planned(planned, tmp_path):
    """Check 100 prompts with two samples each, and 30 rows of two suites by two models with three seeds."""
    (tmp_path / "three.yaml").write_text(PIPELINE)
    stages = planned("--recipe", "three.yaml")["stages"]
    assert [stage["verb"] for stage in stages.values()] == ["generate", "sft", "eval"]
    samples, scores = stages["samples"], stages["eval"]
    assert (samples["responses"], samples["new_tokens"]) == (200, 24)
    assert (scores["responses"], scores["new_tokens"]) == (2 * 2 * 3 * 30, 20)
    assert stages["student"]["data"]["rows"] == 100
    assert (
        "stage:samples does not exist yet: planned with the first 100 rows of builtin, once instead of 2 times"
        in (stages["student"]["notes"])
    )
    (model,) = samples["models"].values()
    assert (model["layers"], model["width"]) == (4, 128)

    prompt, vocab = samples["prompt_tokens"][0], 60
    matrices = model["parts"]["trunk"] - (2 * 4 + 1) * 128  # all but the norms
    attention = 4 * 4 * 128 * (prompt + 12)
    read = prompt * (2 * matrices + 2 * 4 * 128 * prompt)
    answer = read + 24 * (2 * matrices + attention + 2 * 128 * vocab)
    assert samples["response_flops"] == pytest.approx([answer] * 2, rel=1e-3)
    assert samples["memory"]["weights"] == 2 * model["parameters"]
    # The small model is limited by kernel launches: 4 layers and 24 tokens for each batch of 50.
    seconds = 200 / 50 * 24 * 4 * 2e-4
    assert samples["gpus"]["H100 SXM"]["run_s"] == pytest.approx([seconds] * 2)
    assert scores["gpus"]["H100 SXM"]["run_s"] == pytest.approx([2 * 3 * (4 + 2) * 20 * 2e-4] * 2), (
        "30 rows are one batch"
    )


def test_student_built_from_teacher_is_planned(configs, planned):
    def student(spec):
        return planned("--teacher", configs / "gpt2-xl", "--student", spec)["models"]["student"]

    layer = 12 * 1600**2 + 13 * 1600
    ends = (50257 + 1024) * 1600 + 2 * 1600
    assert student("layers:6")["parameters"] == 6 * layer + ends
    assert (student("width:0.5")["layers"], student("width:0.5")["width"]) == (48, 800)
    plan = planned("--method", "sft", "--set", f"teacher.path={configs / 'gpt2-xl'}", "--student", "layers:0,47")
    assert plan["models"]["student"]["parameters"] == 2 * layer + ends
    assert "teacher" not in plan["models"]


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5-v1.1", "bart"])
def test_forward_flops_match_torch_counter(family):
    """Check the formula against torch's FLOP counter, in a model wide enough that attention matters little."""
    layers = {"num_decoder_layers": 3} if family == "t5-v1.1" else {}
    encoder_decoder = {"d_model": 256, "d_kv": 64, "d_ff": 512, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512}
    decoder_only = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "n_embd": 256}
    config = tiny.config(family, 101).to_dict()
    names = {name: size for name, size in (encoder_decoder | decoder_only).items() if config.get(name) is not None}
    model = tiny.model(family, 101, **names, **layers)
    batch = tiny.batch([(12, 8)] * 3, 101)
    backbone = Backbone(model, tiny.tokenizer(size=101))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if backbone.is_encoder_decoder:
            backbone.hidden(batch)
        else:  # the forward of transformers: the hand-written one skips unsupervised positions
            model.base_model(input_ids=batch.ids_BT)
    read = 8 if backbone.is_encoder_decoder else 7  # response tokens read: a causal model does not read the last one
    assert costs.forward_flops(sizes(model), 3, 12, read, 0, 101) == pytest.approx(counter.get_total_flops(), rel=0.015)


def test_bf16_teacher_on_cpu_has_packed_weights(configs, planned):
    def layouts(teacher: str, device: str, dtype: str = "bf16"):
        pair = ("--teacher", configs / teacher, "--student", configs / "gpt2", "--set", f"teacher.dtype={dtype}")
        plan = planned("--recipe", "dolly-gpt2", *pair, "--set", f"train.device={device}")
        return plan["memory"].get("teacher_layouts")

    assert layouts("gpt2-medium", "cpu") == (2 * 24 * 12 * 1024**2 if can_pack() else None)
    assert layouts("gpt2-medium", "auto") is None, "auto plans for a GPU"
    assert layouts("gpt2-medium", "cpu", "fp32") is None
    assert layouts("gpt2-xl", "cpu") is None, "too large for a second copy"
    assert layouts("facebook/opt-125m", "cpu") is None, "no hand-written forward pass for OPT"


def test_work_of_servers_is_not_counted_and_they_are_not_asked(capsys):
    own = call(capsys, "plan", "--recipe", "quickstart", "--json")[1]
    servers = ["--teacher-server", "http://127.0.0.1:9", "--rollout-server", "http://127.0.0.1:9"]
    code, served, err = call(capsys, "plan", "--recipe", "quickstart", *servers, "--json")
    assert code == 0, err
    assert served["memory"]["teacher_weights"] < own["memory"]["teacher_weights"] / 10, "the head alone"
    assert "rollout_cache" in own["memory"]
    assert "rollout_cache" not in served["memory"]
    for source in ("dataset", "rollout"):
        assert served["step_flops"][source] < own["step_flops"][source]
