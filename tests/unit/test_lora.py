"""Test LoRA adapters: attaching, training, merging, saving and loading, compared with peft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from distillm_cli.config.schema import AdapterConfig, StudentConfig
from distillm_cli.losses.objectives import CrossEntropy
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import CROSS_ENTROPY
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.generation.decoding import FastDecoding
from distillm_cli.models.loading import load_backbone, load_config
from distillm_cli.models.lora import attach
from distillm_cli.models.model_paths import base_model_of
from distillm_cli.models.pair import create_student
from distillm_cli.rollouts.next_token import Sampling
from distillm_cli.rollouts.sampler import sample
from tests import tiny
from tests.codes import raises_code

CPU = torch.device("cpu")
BATCH = tiny.batch([(3, 4), (5, 9)], tiny.VOCAB)
FAMILIES = ["gpt2", "opt-350m", "llama", "llama-tied", "qwen3", "gemma2"]


def load(path, **options) -> Backbone:
    return load_backbone(str(path), dtype=torch.float32, device=CPU, **options)


def student(path, *, seed: int = 0, **fields) -> Backbone:
    """Return a student with an adapter of rank 4 and no dropout by default."""
    config = {"r": 4, "dropout": 0.0} | fields
    return create_student(
        StudentConfig(path=str(path), lora=AdapterConfig(**config)), seed=seed, device=CPU, max_length=32
    )


def randomize_adapter(backbone: Backbone, seed: int = 0) -> Backbone:
    """Set the adapter's B matrices, which are initially zero, to random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in backbone.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5, generator=generator)
    return backbone


def save(backbone: Backbone, directory: Path) -> Path:
    directory.mkdir()
    backbone.adapter.save(directory)
    backbone.tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_is_trained_and_starts_at_zero(family, tmp_path):
    path = tiny.save(tmp_path / "m", family)
    backbone, plain_base = student(path), load(path)
    assert all(("lora_" in name) == p.requires_grad for name, p in backbone.model.named_parameters())
    assert isinstance(backbone.model, type(plain_base.model)), "the model has its transformers class"
    with torch.no_grad():
        assert torch.equal(backbone.logits(BATCH), plain_base.logits(BATCH))
        assert backbone.check_head(BATCH)
    objective = StudentLoss(backbone, CrossEntropy())
    objective.train()
    total, _ = objective([BATCH], None, CROSS_ENTROPY)
    total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
    linear = [m for m in plain_base.model.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    head = plain_base.model.get_output_embeddings()
    assert sum(1 for _ in backbone.adapter.layers()) == len([m for m in linear if m is not head])


def test_initial_adapter_depends_only_on_the_seed(tmp_path):
    path = tiny.save(tmp_path / "m")
    torch.manual_seed(5)
    first = dict(student(path, seed=1).model.named_parameters())
    torch.rand(3)
    before = torch.get_rng_state()
    second = dict(student(path, seed=1).model.named_parameters())
    assert torch.equal(before, torch.get_rng_state())
    other = dict(student(path, seed=2).model.named_parameters())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_gradients_match_the_merged_weights(family, tmp_path):
    """Compare gradients of A and B through the fused loss with float64 autograd through W + (α/r)·B·A."""
    backbone = randomize_adapter(student(tiny.save(tmp_path / "m", family), alpha=12.0))
    exact = backbone.model.double()
    hidden_ND = backbone.hidden(BATCH)
    logits_NV = backbone.head().logits(hidden_ND, torch.float64).double()
    expected_loss = torch.nn.functional.cross_entropy(logits_NV, BATCH.targets_N, reduction="sum")
    # the adapter's logits are those of the merged weights
    layers = dict(backbone.adapter.layers())
    for layer in layers.values():
        delta = 12.0 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        is_conv = type(layer.get_base_layer()).__name__ == "Conv1D"
        torch.testing.assert_close(layer.get_delta_weight("default"), delta.T if is_conv else delta)
    expected_loss.backward()
    expected_grads = {n: p.grad.clone() for n, p in exact.named_parameters() if p.requires_grad}
    exact.zero_grad()
    backbone.model.float()
    total, _ = StudentLoss(backbone, CrossEntropy())([BATCH], None, CROSS_ENTROPY)
    total.backward()
    assert total.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for name, p in backbone.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad.double(), expected_grads[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapter_loads_with_peft_and_transformers(family, tmp_path):
    path = tiny.save(tmp_path / "m", family)
    backbone = randomize_adapter(student(path))
    directory = save(backbone, tmp_path / "adapter")
    assert {p.name for p in directory.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    }
    assert (directory / "adapter_model.safetensors").stat().st_size < (Path(path) / "model.safetensors").stat().st_size
    with torch.no_grad():
        adapter_logits = backbone.logits(BATCH)
        base = AutoModelForCausalLM.from_pretrained(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # peft warns about keys that do not match
            models = [
                PeftModel.from_pretrained(base, directory),
                AutoPeftModelForCausalLM.from_pretrained(directory),
                AutoModelForCausalLM.from_pretrained(directory),
            ]
        for model in models:
            expected = model.eval()(input_ids=BATCH.ids_BT).logits.flatten(0, 1)[BATCH.positions_N][:, : backbone.vocab]
            torch.testing.assert_close(expected, adapter_logits, rtol=1e-4, atol=1e-4)
        merged = load(directory)
        torch.testing.assert_close(merged.logits(BATCH), adapter_logits, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert len(AutoTokenizer.from_pretrained(directory)) == len(backbone.tokenizer)
    assert load_config(str(directory)).model_type == base.config.model_type


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollouts_use_the_current_adapter_weights(family, dtype, tmp_path):
    path = tiny.save(tmp_path / "m", family)
    backbone = student(path)
    prompts = [s.prompt for s in tiny.sequences([(3, 1), (5, 1), (4, 1)], tiny.VOCAB)]
    greedy, seeds = Sampling(temperature=0.0, max_new_tokens=8), [(0, i) for i in range(3)]

    def generated(model: Backbone):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return [out.tokens.tolist() for out in sample(model, prompts, greedy, seeds)]

    outputs, before = [], torch.empty(0)
    for update in range(3):
        if update:
            randomize_adapter(backbone, update)
        directory = save(backbone, tmp_path / f"adapter-{update}")
        outputs.append(generated(backbone))
        if dtype == torch.float32:
            plain = load(directory)
            assert outputs[-1] == generated(plain)
            logits = [model.decode(prompts).logits(None) for model in (backbone, plain)]
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
            assert not torch.equal(logits[0], before), "logits of the current weights"
            before = logits[0]
            ids = torch.tensor(np.array([prompts[0]]), dtype=torch.long)
            expected = plain.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=0)
            output = outputs[-1][0]
            assert expected[0, ids.shape[1] :].tolist()[: len(output)] == output
    if family != "gemma2":  # its large embeddings make it repeat one token
        assert outputs[0] != outputs[1] != outputs[2]
    if family in ("gpt2", "llama", "qwen3"):
        decoding = backbone.decode(prompts)
        assert isinstance(decoding, FastDecoding)
        assert decoding._step is not None, "the merged model uses the hand-written step"


def test_merged_copy_does_not_change_the_student(tmp_path):
    """Check this and that unchanged weights are shared, not copied."""
    backbone = randomize_adapter(student(tiny.save(tmp_path / "m", "llama-tied")))
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    plain = backbone.plain(torch.float32)
    assert all(torch.equal(p, before[name]) for name, p in backbone.model.named_parameters())
    assert plain.model.get_input_embeddings().weight is plain.model.get_output_embeddings().weight
    copied, original = (m.model.get_input_embeddings().weight for m in (plain, backbone))
    assert copied.data_ptr() == original.data_ptr()
    plain.model.to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    assert backbone.model.dtype == torch.float32
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {n for n, _ in reloaded.named_parameters()} == {n for n, _ in plain.model.named_parameters()}
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_training_continues_on_a_matching_adapter(tmp_path):
    path = tiny.save(tmp_path / "m")
    first = randomize_adapter(student(path))
    directory = save(first, tmp_path / "adapter")
    reloaded = student(directory)
    with torch.no_grad():
        assert torch.equal(reloaded.logits(BATCH), first.logits(BATCH))
    assert {n for n, p in reloaded.model.named_parameters() if p.requires_grad} == {
        n for n, p in first.model.named_parameters() if p.requires_grad
    }
    assert reloaded.adapter.config.base_model_name_or_path == str(Path(path).resolve())
    for fields, mentions in (
        ({"r": 8}, ("student.lora.r is 8", "4")),
        ({"alpha": 3.0}, ("student.lora.alpha is 3.0", "16")),
        ({"targets": ("q_proj",)}, ("student.lora.targets",)),
    ):
        with raises_code("model.invalid_adapter", *mentions):
            student(directory, **fields)
    merged = create_student(StudentConfig(path=str(directory)), seed=0, device=CPU, max_length=32)
    assert merged.adapter is None
    assert all(p.requires_grad for p in merged.parameters())
    with torch.no_grad():
        torch.testing.assert_close(merged.logits(BATCH), first.logits(BATCH), rtol=1e-4, atol=1e-4)


def test_lora_targets_must_exist(tmp_path):
    path = tiny.save(tmp_path / "m")
    backbone = student(path, targets=("q_proj", "v_proj"))
    assert {name.rpartition(".")[2] for name, _ in backbone.adapter.layers()} == {"q_proj", "v_proj"}
    for target in ("c_attn", "lm_head", "embed_tokens"):
        with raises_code("model.no_lora_target", f"'{target}'", "student.lora.targets", "k_proj"):
            student(path, targets=("q_proj", target))


def test_linear_layers_in_a_module_list_are_adapted(tmp_path):
    """Check Gemma 3n, whose numbered linear layers must not be mistaken for decoder layers."""
    fields = {
        name: tiny.config("gemma3").to_dict()[name] for name in ("head_dim", "num_key_value_heads", "sliding_window")
    }
    config = AutoConfig.for_model(
        "gemma3n_text",
        **fields | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": [48, 48]},
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
        **{"vocab_size": 41, "vocab_size_per_layer_input": 41, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
        **{"num_kv_shared_layers": 0, "altup_num_inputs": 2, "max_position_embeddings": tiny.CONTEXT},
    )
    model = AutoModelForCausalLM.from_config(config)
    linear = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    adapter = attach(model, AdapterConfig(r=2), seed=0, base="base", revision=None)
    assert {name for name, _ in adapter.layers()} == linear
    assert "model.altup_projections.0" in linear


def test_adapter_made_by_peft_is_merged(tmp_path):
    """Check a DoRA adapter on attention and head, which can be merged but not trained further."""
    path = tiny.save(tmp_path / "m")
    base = AutoModelForCausalLM.from_pretrained(path)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "lm_head"], use_dora=True, task_type="CAUSAL_LM", init_lora_weights=False
    )
    peft_model = get_peft_model(base, config).eval()
    peft_model.save_pretrained(tmp_path / "adapter")
    merged = load(tmp_path / "adapter")
    with torch.no_grad():
        expected = peft_model(input_ids=BATCH.ids_BT).logits.flatten(0, 1)[BATCH.positions_N]
        torch.testing.assert_close(merged.logits(BATCH), expected, rtol=1e-4, atol=1e-4)
    assert len(merged.tokenizer) == tiny.VOCAB, "the base model's tokenizer is used if the adapter has none"
    with raises_code("model.invalid_adapter"):
        student(tmp_path / "adapter", r=2)


@pytest.mark.parametrize("family", ["mamba", "falcon_h1"])
def test_default_targets_of_state_space_models(family, tmp_path):
    adapted = randomize_adapter(student(tiny.save(tmp_path / "m", family)))
    names = {name.rpartition(".")[2] for name, _ in adapted.adapter.layers()}
    assert "in_proj" in names
    assert not names & {"out_proj", "x_proj", "dt_proj"}
    merged = adapted.plain(torch.float32)
    torch.testing.assert_close(merged.logits(BATCH), adapted.logits(BATCH), rtol=1e-3, atol=1e-3)


def peft_adapter(base, directory: Path, **config):
    """Save an adapter with random weights made by peft, and return the unmerged peft model."""
    kind = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    peft_model = get_peft_model(base, LoraConfig(r=2, task_type=kind, init_lora_weights=False, **config)).eval()
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    peft_model.save_pretrained(directory)
    return peft_model


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
        ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama-tied", {"target_modules": ["lm_head", "embed_tokens"]}),
        ("llama-tied", {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ],
    ids=["embedding", "head", "both", "both tied", "saved embedding"],
)
def test_merged_adapter_on_tied_weight_matches_peft(family, config, tmp_path):
    path = tiny.save(tmp_path / "m", family)
    peft_model = peft_adapter(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter", **config)
    merged = load(tmp_path / "adapter")
    merged.model.save_pretrained(tmp_path / "again")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = peft_model(input_ids=BATCH.ids_BT).logits.flatten(0, 1)[BATCH.positions_N]
        for logits in (merged.logits(BATCH), merged.head().logits(merged(BATCH))):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        saved = reloaded(input_ids=BATCH.ids_BT).logits.flatten(0, 1)[BATCH.positions_N]
        torch.testing.assert_close(saved, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config", [{"target_modules": ["q", "shared"]}, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}]
)
def test_adapter_that_unties_umt5_weights_is_rejected(config, tmp_path):
    """Check that weights stay tied, because umT5 scales the input of a tied head only."""
    path = tiny.save(tmp_path / "m", "umt5", tie_word_embeddings=True)
    peft_adapter(AutoModelForSeq2SeqLM.from_pretrained(path), tmp_path / "adapter", **config)
    with raises_code("model.invalid_adapter", "umt5"):
        load(tmp_path / "adapter")


def test_invalid_adapter_is_rejected(tmp_path):
    path = tiny.save(tmp_path / "m")
    directory = save(randomize_adapter(student(path)), tmp_path / "adapter")
    config = json.loads((directory / "adapter_config.json").read_text())

    def check_rejected(code: str, *mentions: str, **changes) -> None:
        (directory / "adapter_config.json").write_text(json.dumps(config | changes))
        with raises_code(code, str(directory), *mentions) as caught:
            load(directory)
        assert caught.value.exit_code == 4
        assert "\n" not in str(caught.value)

    missing, base = str(tmp_path / "gone"), "base_model_name_or_path"
    check_rejected("model.no_adapter_base", missing, base, **{base: missing})
    check_rejected("model.no_adapter_base", "'nobody/nothing'", **{base: "nobody/nothing"})
    check_rejected("model.no_adapter_base", "layers:2", **{base: "layers:2"})
    check_rejected("model.no_adapter_base", base, **{base: str(directory)})
    check_rejected("model.invalid_adapter", base, **{base: None})
    narrower = tiny.save(tmp_path / "other", hidden_size=16, head_dim=4)
    check_rejected("model.invalid_adapter", **{base: narrower})
    deeper = tiny.save(tmp_path / "deeper", num_hidden_layers=3)
    check_rejected("model.invalid_adapter", **{base: deeper})
    shallower = tiny.save(tmp_path / "shallower", num_hidden_layers=1)
    check_rejected("model.invalid_adapter", "base_model.model.model.layers.1.", **{base: shallower})
    (directory / "adapter_config.json").write_text("{")
    with raises_code("model.invalid_adapter", "adapter_config.json"):
        load(directory)


def test_nested_adapters_are_merged(tmp_path):
    path = tiny.save(tmp_path / "m")
    inner = save(randomize_adapter(student(path), 1), tmp_path / "inner")
    outer_student = randomize_adapter(student(tiny.save(tmp_path / "copy", "llama")), 2)
    outer = save(outer_student, tmp_path / "outer")
    config = json.loads((outer / "adapter_config.json").read_text())
    (outer / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(inner)}))
    both, plain_base = load(outer), load(path)
    deltas = [dict(load(p).model.named_parameters()) for p in (inner, tmp_path / "m")]
    alone = dict(outer_student.plain(torch.float32).model.named_parameters())
    for name, weight in both.model.named_parameters():
        base = dict(plain_base.model.named_parameters())[name]
        torch.testing.assert_close(weight, base + (deltas[0][name] - base) + (alone[name] - base), rtol=1e-4, atol=1e-5)
    with raises_code("model.invalid_adapter", str(outer)):
        student(outer)


def test_gradient_checkpointing_works_with_an_adapter(tmp_path):
    grads = []
    for checkpointing in (False, True):
        backbone = randomize_adapter(student(tiny.save(tmp_path / f"m{checkpointing}", "gpt2")))
        if checkpointing:
            enable = getattr(backbone.model, "activation_checkpointing_enable", None)
            (enable or backbone.model.gradient_checkpointing_enable)()
        objective = StudentLoss(backbone, CrossEntropy())
        backbone.model.train()
        for module in backbone.model.modules():  # dropout draws would differ
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        total, _ = objective([BATCH], None, CROSS_ENTROPY)
        total.backward()
        grads.append({n: p.grad for n, p in backbone.model.named_parameters() if p.requires_grad})
    assert all(g is not None and torch.allclose(g, grads[1][n], atol=1e-5) for n, g in grads[0].items())


def test_plain_model_has_no_adapter_base(tmp_path):
    assert base_model_of(tiny.save(tmp_path / "m"), local=True, revision=None) is None
