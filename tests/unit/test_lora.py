"""LoRA adapters: put on, trained, merged, saved, found again; beside peft's own loading."""

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
from distillm_cli.errors import ModelError
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

CPU = torch.device("cpu")
BATCH = tiny.batch([(3, 4), (5, 9)], tiny.VOCAB)
FAMILIES = ["gpt2", "opt-350m", "llama", "llama-tied", "qwen3", "gemma2"]


def load(path, **options) -> Backbone:
    return load_backbone(str(path), dtype=torch.float32, device=CPU, **options)


def student(path, *, seed: int = 0, **fields) -> Backbone:
    """A student under an adapter of rank 4, without dropout unless told."""
    config = {"r": 4, "dropout": 0.0} | fields
    return create_student(
        StudentConfig(path=str(path), lora=AdapterConfig(**config)), seed=seed, device=CPU, max_length=32
    )


def stir(backbone: Backbone, seed: int = 0) -> Backbone:
    """An adapter that says something: B is zero at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in backbone.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5, generator=generator)
    return backbone


def save(backbone: Backbone, place: Path) -> Path:
    place.mkdir()
    backbone.adapter.save(place)
    backbone.tokenizer.save_pretrained(place)
    return place


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_adapter_trains_and_at_first_it_says_nothing(family, tmp_path):
    path = tiny.save(tmp_path / "m", family)
    backbone, bare = student(path), load(path)
    assert all(("lora_" in name) == p.requires_grad for name, p in backbone.model.named_parameters())
    assert isinstance(backbone.model, type(bare.model)), "the model stays transformers' own class"
    with torch.no_grad():
        assert torch.equal(backbone.logits(BATCH), bare.logits(BATCH))
        assert backbone.check_head(BATCH)
    objective = StudentLoss(backbone, CrossEntropy())
    objective.train()
    total, _ = objective([BATCH], None, CROSS_ENTROPY)
    total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
    linear = [m for m in bare.model.modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Conv1D"]
    head = bare.model.get_output_embeddings()
    assert sum(1 for _ in backbone.adapter.layers()) == len([m for m in linear if m is not head])


def test_the_start_is_a_function_of_the_seed_alone(tmp_path):
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
def test_the_loss_has_the_gradients_of_the_merged_weights(family, tmp_path):
    """d/dA and d/dB through the fused loss, beside autograd in float64 through W + (α/r)·B·A and the whole logits."""
    backbone = stir(student(tiny.save(tmp_path / "m", family), alpha=12.0))
    exact = backbone.model.double()
    hidden_ND = backbone.hidden(BATCH)
    logits_NV = backbone.head().logits(hidden_ND, torch.float64).double()
    truth = torch.nn.functional.cross_entropy(logits_NV, BATCH.targets_N, reduction="sum")
    # the merged model's own logits are the adapter's
    layers = dict(backbone.adapter.layers())
    for layer in layers.values():
        delta = 12.0 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        is_conv = type(layer.get_base_layer()).__name__ == "Conv1D"
        torch.testing.assert_close(layer.get_delta_weight("default"), delta.T if is_conv else delta)
    truth.backward()
    wanted = {n: p.grad.clone() for n, p in exact.named_parameters() if p.requires_grad}
    exact.zero_grad()
    backbone.model.float()
    total, _ = StudentLoss(backbone, CrossEntropy())([BATCH], None, CROSS_ENTROPY)
    total.backward()
    assert total.item() == pytest.approx(truth.item(), rel=1e-5)
    for name, p in backbone.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad.double(), wanted[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_directory_loads_with_peft_with_transformers_and_here(family, tmp_path):
    path = tiny.save(tmp_path / "m", family)
    backbone = stir(student(path))
    place = save(backbone, tmp_path / "adapter")
    assert {p.name for p in place.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert (place / "adapter_model.safetensors").stat().st_size < (Path(path) / "model.safetensors").stat().st_size
    with torch.no_grad():
        truth = backbone.logits(BATCH)
        base = AutoModelForCausalLM.from_pretrained(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # peft warns of keys that did not fit
            models = [
                PeftModel.from_pretrained(base, place),
                AutoPeftModelForCausalLM.from_pretrained(place),
                AutoModelForCausalLM.from_pretrained(place),
            ]
        for model in models:
            own = model.eval()(input_ids=BATCH.ids_BT).logits.flatten(0, 1)[BATCH.positions_N][:, : backbone.vocab]
            torch.testing.assert_close(own, truth, rtol=1e-4, atol=1e-4)
        merged = load(place)
        torch.testing.assert_close(merged.logits(BATCH), truth, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name for name, _ in merged.model.named_parameters())
    assert len(AutoTokenizer.from_pretrained(place)) == len(backbone.tokenizer)
    assert load_config(str(place)).model_type == base.config.model_type


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollouts_are_the_merged_models_and_follow_every_step(family, dtype, tmp_path):
    path = tiny.save(tmp_path / "m", family)
    backbone = student(path)
    prompts = [s.prompt for s in tiny.sequences([(3, 1), (5, 1), (4, 1)], tiny.VOCAB)]
    greedy, seeds = Sampling(temperature=0.0, max_new_tokens=8), [(0, i) for i in range(3)]

    def say(model: Backbone):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return [out.tokens.tolist() for out in sample(model, prompts, greedy, seeds)]

    said, before = [], torch.empty(0)
    for turn in range(3):
        if turn:
            stir(backbone, turn)
        place = save(backbone, tmp_path / f"adapter-{turn}")
        said.append(say(backbone))
        if dtype == torch.float32:
            plain = load(place)
            assert said[-1] == say(plain)
            logits = [model.decode(prompts).logits(None) for model in (backbone, plain)]
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
            assert not torch.equal(logits[0], before), "as the weights are now, not as they were"
            before = logits[0]
            ids = torch.tensor(np.array([prompts[0]]), dtype=torch.long)
            own = plain.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=0)
            ours = said[-1][0]
            assert own[0, ids.shape[1] :].tolist()[: len(ours)] == ours
    if family != "gemma2":  # embeddings so large that it says one token over and over
        assert said[0] != said[1] != said[2]
    if family in ("gpt2", "llama", "qwen3"):
        decoding = backbone.decode(prompts)
        assert isinstance(decoding, FastDecoding)
        assert decoding._step is not None, "merged, the model has the written-out step"


def test_a_merged_copy_leaves_the_student_alone_and_copies_only_what_it_must(tmp_path):
    backbone = stir(student(tiny.save(tmp_path / "m", "llama-tied")))
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    plain = backbone.plain(torch.float32)
    assert all(torch.equal(p, before[name]) for name, p in backbone.model.named_parameters())
    assert plain.model.get_input_embeddings().weight is plain.model.get_output_embeddings().weight
    theirs, ours = (m.model.get_input_embeddings().weight for m in (plain, backbone))
    assert theirs.data_ptr() == ours.data_ptr()
    plain.model.to(torch.bfloat16).save_pretrained(tmp_path / "merged")
    assert backbone.model.dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in plain.model.named_parameters()}
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_an_adapter_is_taken_up_again_where_it_is_the_one_asked_for(tmp_path):
    path = tiny.save(tmp_path / "m")
    first = stir(student(path))
    place = save(first, tmp_path / "adapter")
    again = student(place)
    with torch.no_grad():
        assert torch.equal(again.logits(BATCH), first.logits(BATCH))
    assert {n for n, p in again.model.named_parameters() if p.requires_grad} == {
        n for n, p in first.model.named_parameters() if p.requires_grad
    }
    assert again.adapter.config.base_model_name_or_path == str(Path(path).resolve())
    for fields, said in (
        ({"r": 8}, "student.lora.r is 8, but the adapter .* has 4"),
        ({"alpha": 3.0}, "student.lora.alpha is 3.0, but the adapter .* has 16"),
        ({"targets": ("q_proj",)}, "student.lora.targets is"),
    ):
        with pytest.raises(ModelError, match=said):
            student(place, **fields)
    whole = create_student(StudentConfig(path=str(place)), seed=0, device=CPU, max_length=32)
    assert whole.adapter is None
    assert all(p.requires_grad for p in whole.parameters())
    with torch.no_grad():
        torch.testing.assert_close(whole.logits(BATCH), first.logits(BATCH), rtol=1e-4, atol=1e-4)


def test_targets_are_layers_that_are_there(tmp_path):
    path = tiny.save(tmp_path / "m")
    backbone = student(path, targets=("q_proj", "v_proj"))
    assert {name.rpartition(".")[2] for name, _ in backbone.adapter.layers()} == {"q_proj", "v_proj"}
    for target in ("c_attn", "lm_head", "embed_tokens"):
        with pytest.raises(
            ModelError, match=rf"no linear layer '{target}' before the head; student.lora.targets; .*k_proj"
        ):
            student(path, targets=("q_proj", target))


def test_linear_layers_in_a_list_are_no_decoder_layers(tmp_path):
    """Gemma 3n calls linear layers by number, as every model calls its decoder layers."""
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


def test_adapters_of_others_are_merged_whatever_they_are_on(tmp_path):
    """With weights of embeddings and head, made by peft alone; such a one cannot be trained on here."""
    path = tiny.save(tmp_path / "m")
    base = AutoModelForCausalLM.from_pretrained(path)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "lm_head"], use_dora=True, task_type="CAUSAL_LM", init_lora_weights=False
    )
    made = get_peft_model(base, config).eval()
    made.save_pretrained(tmp_path / "adapter")
    merged = load(tmp_path / "adapter")
    with torch.no_grad():
        own = made(input_ids=BATCH.ids_BT).logits.flatten(0, 1)[BATCH.positions_N]
        torch.testing.assert_close(merged.logits(BATCH), own, rtol=1e-4, atol=1e-4)
    assert len(merged.tokenizer) == tiny.VOCAB, "the model's own tokenizer, where the adapter has none"
    with pytest.raises(ModelError, match="not a plain LoRA"):
        student(tmp_path / "adapter", r=2)


@pytest.mark.parametrize("family", ["mamba", "falcon_h1"])
def test_by_default_state_space_layers_are_adapted_where_an_adapter_takes_part(family, tmp_path):
    adapted = stir(student(tiny.save(tmp_path / "m", family)))
    names = {name.rpartition(".")[2] for name, _ in adapted.adapter.layers()}
    assert "in_proj" in names
    assert not names & {"out_proj", "x_proj", "dt_proj"}
    whole = adapted.plain(torch.float32)
    torch.testing.assert_close(whole.logits(BATCH), adapted.logits(BATCH), rtol=1e-3, atol=1e-3)


def of_others(base, place: Path, **config):
    """An adapter by peft alone that says something, saved in ``place``; as peft runs it, not merged."""
    kind = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    made = get_peft_model(base, LoraConfig(r=2, task_type=kind, init_lora_weights=False, **config)).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    made.save_pretrained(place)
    return made


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
        ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
        ("llama-tied", {"target_modules": ["lm_head", "embed_tokens"]}),
        ("llama-tied", {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}),
        ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    ],
    ids=["embedding", "head", "both", "both as one", "embedding in whole"],
)
def test_an_adapter_on_a_tied_weight_is_the_same_model_when_merged_and_when_that_is_saved(family, config, tmp_path):
    path = tiny.save(tmp_path / "m", family)
    made = of_others(AutoModelForCausalLM.from_pretrained(path), tmp_path / "adapter", **config)
    merged = load(tmp_path / "adapter")
    merged.model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        own = made(input_ids=BATCH.ids_BT).logits.flatten(0, 1)[BATCH.positions_N]
        for logits in (merged.logits(BATCH), merged.head().logits(merged(BATCH))):
            torch.testing.assert_close(logits, own, rtol=1e-4, atol=1e-4)
        saved = again(input_ids=BATCH.ids_BT).logits.flatten(0, 1)[BATCH.positions_N]
        torch.testing.assert_close(saved, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "config", [{"target_modules": ["q", "shared"]}, {"target_modules": ["q"], "modules_to_save": ["lm_head"]}]
)
def test_an_adapter_that_parts_the_tied_weights_of_an_encoder_decoder_is_refused(config, tmp_path):
    """umT5 scales what its head reads where that is tied: parted it would be another model."""
    path = tiny.save(tmp_path / "m", "umt5", tie_word_embeddings=True)
    of_others(AutoModelForSeq2SeqLM.from_pretrained(path), tmp_path / "adapter", **config)
    with pytest.raises(ModelError, match="changes only one of two tied weights of this umt5 model"):
        load(tmp_path / "adapter")


def test_what_is_wrong_with_an_adapter_is_said(tmp_path):
    path = tiny.save(tmp_path / "m")
    place = save(stir(student(path)), tmp_path / "adapter")
    config = json.loads((place / "adapter_config.json").read_text())

    def told(**changes) -> str:
        (place / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError) as caught:
            load(place)
        assert caught.value.exit_code == 4
        assert "\n" not in str(caught.value)
        return str(caught.value)

    gone = str(tmp_path / "gone")
    said = told(base_model_name_or_path=gone)
    assert said.startswith(f"{place} is an adapter of {gone}, which does not load: no model at {gone}")
    assert said.endswith("(base_model_name_or_path)")
    assert "which does not load: cannot find 'nobody/nothing'" in told(base_model_name_or_path="nobody/nothing")
    assert "an adapter of a model that its run built (layers:2)" in told(base_model_name_or_path="layers:2")
    assert "is an adapter of itself" in told(base_model_name_or_path=str(place))
    assert "does not name its base model" in told(base_model_name_or_path=None)
    other = tiny.save(tmp_path / "other", hidden_size=16, head_dim=4)
    assert "cannot attach the adapter" in told(base_model_name_or_path=other)
    deeper = tiny.save(tmp_path / "deeper", num_hidden_layers=3)
    assert "missing adapter keys" in told(base_model_name_or_path=deeper)
    shallower = tiny.save(tmp_path / "shallower", num_hidden_layers=1)
    assert "no layer for base_model.model.model.layers.1." in told(base_model_name_or_path=shallower)
    (place / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*adapter_config\.json"):
        load(place)


def test_an_adapter_on_an_adapter_is_merged_from_the_inside_out(tmp_path):
    path = tiny.save(tmp_path / "m")
    inner = save(stir(student(path), 1), tmp_path / "inner")
    outer_student = stir(student(tiny.save(tmp_path / "copy", "llama")), 2)
    outer = save(outer_student, tmp_path / "outer")
    config = json.loads((outer / "adapter_config.json").read_text())
    (outer / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(inner)}))
    both, bare = load(outer), load(path)
    deltas = [dict(load(p).model.named_parameters()) for p in (inner, tmp_path / "m")]
    alone = dict(outer_student.plain(torch.float32).model.named_parameters())
    for name, weight in both.model.named_parameters():
        base = dict(bare.model.named_parameters())[name]
        torch.testing.assert_close(weight, base + (deltas[0][name] - base) + (alone[name] - base), rtol=1e-4, atol=1e-5)
    with pytest.raises(ModelError, match="an adapter of an adapter"):
        student(outer)


def test_gradient_checkpointing_reaches_the_adapter(tmp_path):
    grads = []
    for checkpointing in (False, True):
        backbone = stir(student(tiny.save(tmp_path / f"m{checkpointing}", "gpt2")))
        if checkpointing:
            enable = getattr(backbone.model, "activation_checkpointing_enable", None)
            (enable or backbone.model.gradient_checkpointing_enable)()
        objective = StudentLoss(backbone, CrossEntropy())
        backbone.model.train()
        for module in backbone.model.modules():  # dropout would differ
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        total, _ = objective([BATCH], None, CROSS_ENTROPY)
        total.backward()
        grads.append({n: p.grad for n, p in backbone.model.named_parameters() if p.requires_grad})
    assert all(g is not None and torch.allclose(g, grads[1][n], atol=1e-5) for n, g in grads[0].items())


def test_no_adapter_is_no_peft(tmp_path):
    assert base_model_of(tiny.save(tmp_path / "m"), local=True, revision=None) is None
