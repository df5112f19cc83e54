"""Test students whose layers run several times with the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from distillm_cli.config.schema import StudentConfig, TrainConfig
from distillm_cli.config.student_spec import SharedLayers
from distillm_cli.models import cpu
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.layers import build_from_layers, chosen_layers
from distillm_cli.models.pair import create_student
from distillm_cli.models.shapes import sizes
from distillm_cli.models.shared import SwappedConv1D, save_plain
from distillm_cli.training.optimizer import build_optimizer
from distillm_cli.utils.modules import eval_mode
from tests import tiny
from tests.codes import raises_code

TOKENIZER = tiny.tokenizer(size=41)
MHA = {"num_key_value_heads": 4}  # as many keys as queries
FAMILIES = {"llama": MHA, "gpt2": {}, "qwen2": MHA, "qwen3": MHA, "opt": {}}
SPECS = ["shared:2x2", "shared:2x2:swap", "shared:1x3:swap", "shared:2x3"]


def teacher(family: str, **fields) -> Backbone:
    depth = {"n_layer" if family == "gpt2" else "num_hidden_layers": 3}
    return Backbone(tiny.model(family, 41, **depth, **FAMILIES.get(family, {}), **fields), TOKENIZER)


def student(family: str, spec: str, **fields) -> Backbone:
    return Backbone(build_from_layers(spec, teacher(family, **fields)), TOKENIZER)


def layers_of(model):
    return model.transformer.h if hasattr(model, "transformer") else model.get_decoder().layers


@pytest.mark.parametrize(
    ("spec", "depth", "stored"),
    [("shared:3x2", 12, 3), ("shared:0.5x2", 12, 6), ("shared:0.5x2", 3, 2), ("shared:0.1x2", 3, 1)],
)
def test_first_layers_run_in_every_pass(spec, depth, stored):
    assert chosen_layers(spec, depth) == list(range(stored)) * 2


def test_share_is_rounded_half_up():
    assert SharedLayers(share=0.5).stored(5) == 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_parameters_are_counted_and_updated_once(family, spec):
    shared = student(family, spec)
    stored = int(spec[7])
    unshared = student_of_layers(family, stored)
    count = sum(p.numel() for p in shared.parameters())
    assert count == sum(p.numel() for p in unshared.parameters())
    passes = int(spec[9])
    counted, once = sizes(shared.model), sizes(unshared.model)
    assert counted.parameters["total"] == counted.parameters["trainable"] == count
    assert counted.layers == passes * stored
    assert counted.matmul == passes * once.matmul
    assert counted.matmul - counted.repeated == once.matmul
    optimizer = build_optimizer(shared, TrainConfig(lr=1e-3))
    updated = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(updated) == len(set(updated)) == len(list(unshared.parameters()))


def student_of_layers(family: str, count: int) -> Backbone:
    return Backbone(build_from_layers(f"layers:{count}:first", teacher(family)), TOKENIZER)


@pytest.mark.parametrize("family", FAMILIES)
def test_swap_is_a_no_op_with_equal_queries_and_keys(family):
    full = teacher(family)
    plain, swapped = (Backbone(build_from_layers(spec, full), TOKENIZER) for spec in ("shared:2x2", "shared:2x2:swap"))
    batch = tiny.batch([(3, 4), (5, 9)], 41)
    with torch.no_grad():
        assert not torch.allclose(plain.logits(batch), swapped.logits(batch), atol=1e-2)
        for model in (plain.model, swapped.model):
            for layer in layers_of(model)[:2]:
                equate_queries_and_keys(layer)
        assert torch.allclose(plain.logits(batch), swapped.logits(batch), atol=1e-6, rtol=1e-5)


def equate_queries_and_keys(layer) -> None:
    attention = layer.attn if hasattr(layer, "attn") else layer.self_attn
    if hasattr(attention, "c_attn"):
        for weight in (attention.c_attn.weight, attention.c_attn.bias):
            width = weight.shape[-1] // 3
            weight[..., width : 2 * width] = weight[..., :width]
        return
    for name in ("proj", "norm"):
        if hasattr(attention, f"q_{name}"):
            getattr(attention, f"k_{name}").load_state_dict(getattr(attention, f"q_{name}").state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_swap_uses_weights_of_keys_for_queries(family):
    """Compare with a teacher model whose weights were exchanged by hand, layer by layer."""
    full = teacher(family)
    swapped = Backbone(build_from_layers("shared:1x2:swap", full), TOKENIZER)
    by_hand = build_from_layers("layers:2:first", full)
    first, second = layers_of(by_hand)
    second.load_state_dict(first.state_dict())
    attention = second.attn if hasattr(second, "attn") else second.self_attn
    with torch.no_grad():
        if hasattr(attention, "c_attn"):
            for weight in (attention.c_attn.weight, attention.c_attn.bias):
                q, k, v = weight.clone().chunk(3, -1)
                weight.copy_(torch.cat([k, q, v], -1))
        for name in ("proj", "norm"):
            if hasattr(attention, f"q_{name}"):
                q, k = getattr(attention, f"q_{name}"), getattr(attention, f"k_{name}")
                setattr(attention, f"q_{name}", k)
                setattr(attention, f"k_{name}", q)
        batch = tiny.batch([(3, 4), (5, 9)], 41)
        assert torch.allclose(swapped.logits(batch), Backbone(by_hand, TOKENIZER).logits(batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("spec", SPECS)
def test_gradients_equal_those_of_a_loop(family, spec):
    """Compare with an explicit loop over the stored layers, in float64."""
    shared = student(family, spec)
    shared.model.double()
    stored, passes, swap = int(spec[7]), int(spec[9]), spec.endswith("swap")
    plain = student_of_layers(family, stored).model.double()
    batch = tiny.batch([(3, 4), (5, 9)], 41)
    weights = torch.randn(batch.tokens, 41, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (shared.model(input_ids=batch.ids_BT).logits.flatten(0, 1)[batch.positions_N] * weights).sum().backward()
    (looped_logits(plain, batch.ids_BT, passes, swap).flatten(0, 1)[batch.positions_N] * weights).sum().backward()
    of_loop = dict(plain.named_parameters())
    found = dict(shared.model.named_parameters())
    assert found.keys() == of_loop.keys()
    for name, parameter in found.items():
        assert torch.allclose(parameter.grad, of_loop[name].grad, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "qwen3"])
@pytest.mark.parametrize("spec", ["shared:2x2", "shared:2x2:swap"])
def test_hand_written_pass_has_the_same_gradients(family, spec, monkeypatch):
    gradients = []
    for fast in ("1", "0"):
        monkeypatch.setenv(cpu.SWITCH, fast)
        shared = student(family, spec, **(MHA if family == "llama-tied" else {}))
        batch = tiny.batch([(3, 4), (5, 9)], 41)
        has_pass = shared._cpu_forward.find_pass(shared) is not None
        assert has_pass == (fast == "1" and (family, spec) != ("gpt2", "shared:2x2:swap"))
        logits = shared.head().logits(shared.hidden(batch, for_backward=True))
        logits.log_softmax(-1)[torch.arange(batch.tokens), batch.targets_N].sum().backward()
        gradients.append([p.grad for p in shared.parameters()])
    for ours, reference in zip(*gradients, strict=True):
        assert torch.allclose(ours, reference, rtol=1e-4, atol=1e-5)


def looped_logits(model, ids_BT, passes, swap):
    """Run the layers of a model several times; a hook exchanges queries and keys, which is independent of the builder."""
    trunk = model.get_decoder()
    layers = layers_of(model)
    positions = torch.arange(ids_BT.shape[1])[None]
    is_gpt2 = hasattr(model, "transformer")
    if is_gpt2:
        states = trunk.wte(ids_BT) + trunk.wpe(positions)
        extra = {}
    else:
        states = trunk.embed_tokens(ids_BT)
        extra = {"position_embeddings": trunk.rotary_emb(states, positions), "position_ids": positions}
    for number in range(passes):
        hooks = []
        if swap and number % 2:
            for layer in layers:
                hooks += swapping_hooks(layer)
        for layer in layers:
            out = layer(states, **extra)
            states = out[0] if isinstance(out, tuple) else out
        for hook in hooks:
            hook.remove()
    norm = trunk.ln_f if is_gpt2 else trunk.norm
    return model.lm_head(norm(states))


def swapping_hooks(layer):
    if hasattr(layer, "attn"):

        def exchange(module, inputs, output):
            q, k, v = output.chunk(3, -1)
            return torch.cat([k, q, v], -1)

        return [layer.attn.c_attn.register_forward_hook(exchange)]
    q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
    as_linear = torch.nn.functional.linear
    return [
        q.register_forward_hook(lambda module, inputs, output: as_linear(inputs[0], k.weight, k.bias)),
        k.register_forward_hook(lambda module, inputs, output: as_linear(inputs[0], q.weight, q.bias)),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fast", ["1", "0"])
def test_greedy_decoding_equals_decoding_without_cache(family, fast, tmp_path, monkeypatch):
    monkeypatch.setenv(cpu.SWITCH, fast)
    shared = student(family, "shared:2x2:swap")
    prompts = [s.prompt for s in tiny.sequences([(5, 1), (3, 1), (8, 1)], 41, seed=3)]
    save_plain(shared.model, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad(), eval_mode(shared):
        decoding = shared.decode(prompts)
        tokens = [[] for _ in prompts]
        ids_B = None
        for _ in range(10):
            ids_B = decoding.logits(ids_B).argmax(-1)
            for row, token in enumerate(ids_B.tolist()):
                tokens[row].append(token)
    for prompt, found in zip(prompts, tokens, strict=True):
        ids = torch.tensor(prompt, dtype=torch.int64)[None]
        without_cache = ids
        with torch.no_grad():
            for _ in range(10):
                token = shared.model(without_cache, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                without_cache = torch.cat([without_cache, token], 1)
        assert without_cache[0, ids.shape[1] :].tolist() == found
        generated = saved.generate(
            ids, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=1, attention_mask=ids * 0 + 1
        )
        assert generated[0, ids.shape[1] :].tolist() == found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", SPECS)
def test_saved_model_loads_without_this_package(family, spec, tmp_path):
    shared = student(family, spec)
    batch = tiny.batch([(3, 4), (5, 9)], 41)
    for name, backbone in (("full", shared), ("bf16", shared.plain(torch.float32).to(torch.bfloat16))):
        save_plain(backbone.model, tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=backbone.model.dtype)
        with torch.no_grad():
            logits = Backbone(loaded, TOKENIZER).logits(batch)
            assert torch.allclose(logits, backbone.logits(batch), atol=1e-6 if name == "full" else 0.5), name
        stored = sum(p.numel() for p in shared.parameters())
        assert sum(p.numel() for p in loaded.parameters()) > stored
    # The weights of a checkpoint go back into the shared layers.
    again = Backbone(build_from_layers(spec, teacher(family)), TOKENIZER)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_state(AutoModelForCausalLM.from_pretrained(tmp_path / "full").state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), shared.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(again.logits(batch), shared.logits(batch))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_swapped_states_and_working_copies_keep_the_ties(family):
    shared = student(family, "shared:2x2:swap")
    before = [p.detach().clone() for p in shared.parameters()]
    other = {name: t.clone() for name, t in student(family, "shared:2x2:swap", seed=1).state().items()}
    expected = [p.detach().clone() for p in student(family, "shared:2x2:swap", seed=1).parameters()]
    shared.swap_state(other)
    assert all(torch.equal(a, b) for a, b in zip(shared.parameters(), expected, strict=True))
    shared.swap_state(other)
    assert all(torch.equal(a, b) for a, b in zip(shared.parameters(), before, strict=True))
    copied = shared.plain(torch.bfloat16)
    assert len(list(copied.parameters())) == len(before)
    is_wrapped = any(isinstance(module, SwappedConv1D) for module in copied.modules())
    assert is_wrapped == (family == "gpt2")


@pytest.mark.parametrize(
    ("family", "fields", "spec", "code"),
    [
        ("llama", {"num_key_value_heads": 2}, "shared:2x2:swap", "model.cannot_swap"),
        ("gpt_neox", {}, "shared:2x2:swap", "model.cannot_swap"),
        ("mamba", {}, "shared:2x2:swap", "model.cannot_swap"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "shared:2x2", "model.cannot_take_layers"),
        ("t5", {}, "shared:2x2", "model.cannot_take_layers"),
        ("llama", MHA, "shared:3x2", "usage.invalid_layers"),
    ],
)
def test_layers_that_cannot_be_shared_are_rejected(family, fields, spec, code):
    full = Backbone(tiny.model(family, 41, **fields), TOKENIZER)
    with raises_code(code, spec):
        create_student(StudentConfig(path=spec), seed=0, device=torch.device("cpu"), teacher=full, max_length=32)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "mamba"])
def test_layers_are_shared_without_swap_in_other_families(family):
    full = Backbone(tiny.model(family, 41), TOKENIZER)  # llama: fewer keys than queries
    shared = Backbone(build_from_layers("shared:2x2", full), TOKENIZER)
    assert sum(p.numel() for p in shared.parameters()) == sum(p.numel() for p in full.parameters())
    batch = tiny.batch([(3, 4), (5, 9)], 41)
    assert shared.check_head(batch)
    assert shared.logits(batch).isfinite().all()
