"""Test teachers whose weights are not on the device, and activations in host memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from distillm_cli.config.schema import Recipe, TeacherConfig, TrainConfig
from distillm_cli.models.activations import saved_in_host_memory
from distillm_cli.models.devices import check_offload
from distillm_cli.models.loading import load_backbone
from distillm_cli.models.placement import PlacedTeacher, dispatch_arguments
from distillm_cli.models.shapes import sizes
from distillm_cli.runs import costs
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.teachers.teacher_cache import teacher_digest
from distillm_cli.training.optimizer import build_optimizer, optimizer_tensors
from distillm_cli.utils.host_space import HostSpace
from tests import tiny
from tests.codes import raises_code

CPU = torch.device("cpu")


@pytest.fixture(params=["llama", "gpt2"])
def directory(request, tmp_path):
    return tiny.save(tmp_path / "model", request.param)


def placed(directory, **fields):
    config = TeacherConfig(path=directory, **fields)
    loaded = load_backbone(directory, dtype=torch.float32, device=CPU, dispatch=dispatch_arguments(config, CPU))
    return PlacedTeacher(loaded.requires_grad_(False), CPU, is_offloaded=False)


@pytest.mark.parametrize("device_map", ["auto", "sequential"])
def test_layers_on_disk_give_the_same_states(directory, device_map):
    plain = load_backbone(directory, dtype=torch.float32, device=CPU)
    weights = sum(p.numel() * 4 for p in plain.parameters())
    teacher = placed(directory, device_map=device_map, max_memory=0.6 * weights / 1e9)
    assert "disk" in teacher.model.hf_device_map.values()
    assert any(parameter.is_meta for parameter in teacher.parameters())
    assert teacher.is_dispatched
    batch = tiny.batch([(5, 4), (3, 2)], plain.vocab)
    torch.testing.assert_close(LocalTeacher(teacher).hidden(batch, []), LocalTeacher(plain).hidden(batch, []))
    assert teacher.check_head(batch)
    assert torch.equal(teacher.head().weight_VD, plain.head().weight_VD)
    assert teacher.fingerprint() == plain.fingerprint()
    assert teacher_digest(teacher, "") == teacher_digest(plain, "")
    assert list(teacher.state_dict()) == list(plain.state_dict())


def test_adapter_is_not_dispatched(tmp_path, directory):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{directory}"}}')
    dispatch = dispatch_arguments(TeacherConfig(path=directory, device_map="auto"), CPU)
    with raises_code("model.cannot_place", "adapter"):
        load_backbone(str(tmp_path / "adapter"), dtype=torch.float32, device=CPU, dispatch=dispatch)


def test_memory_limit_is_of_gpus_or_of_the_host(monkeypatch):
    import accelerate.utils

    monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda: {0: 80, 1: 80, "cpu": 500})
    config = TeacherConfig(path="m", device_map="auto", max_memory=2)
    assert dispatch_arguments(config, torch.device("cuda"))["max_memory"] == {0: 2e9, 1: 2e9, "cpu": 500}
    assert dispatch_arguments(config, CPU)["max_memory"] == {"cpu": 2e9}
    free = config.model_copy(update={"max_memory": None})
    assert dispatch_arguments(free, torch.device("cuda"))["max_memory"] == {0: 80, 1: 80, "cpu": 500}
    assert dispatch_arguments(config.model_copy(update={"device_map": "cpu"}), CPU) is None


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"teacher": {"path": "m", "offload": True}}, "teacher.offload"),
        (
            {"teacher": {"path": "m"}, "train": {"gradient_checkpointing": True, "offload_activations": True}},
            "train.offload_activations",
        ),
    ],
)
def test_offload_on_cpu_is_refused(section, key):
    recipe = Recipe.model_validate(section)
    with raises_code("usage.nothing_to_offload", key, "CPU"):
        check_offload(recipe, CPU)
    check_offload(recipe, torch.device("cuda"))
    check_offload(Recipe(), CPU)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"teacher": {"quantize": "4bit"}}, "quantized"),
        ({"okd": {"rank": 4}}, "okd.rank"),
        ({"rollout": {"teacher_mix": 0.2}, "schedule": {"kind": "on"}}, "decodes with the student"),
        ({"student": {"path": "layers:2"}}, "copy the teacher's layers"),
        ({"objective": {"input_gradient": 0.1}, "schedule": {"kind": "off"}}, "input embeddings"),
        ({"schedule": {"kind": "teacher"}}, "data.teacher_samples"),
    ],
)
def test_senseless_combinations_are_refused_by_name(fields, problem):
    teacher = {"path": "m", "device_map": "auto"} | fields.get("teacher", {})
    with pytest.raises(ValueError, match=f"teacher.device_map auto: .*{problem}"):
        Recipe.model_validate({**fields, "teacher": teacher})
    with pytest.raises(ValueError, match="only one of them"):
        Recipe.model_validate({"teacher": teacher | {"offload": True, "quantize": "none"}})


def test_saved_tensors_are_in_host_memory_and_gradients_are_the_same():
    """On a CPU every tensor is in host memory: the device of the saved tensors is compared with another one."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64))
    inputs = torch.randn(128, 64)
    module(inputs).square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    with saved_in_host_memory():
        module(inputs).square().sum().backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(module.parameters(), expected, strict=True))


def test_plan_counts_memory_by_its_place():
    model = tiny.model("llama", 101, hidden_size=64, num_hidden_layers=4)
    student = sizes(model)
    teacher = replace(student, parameters=student.parameters | {"trainable": 0})
    weights = 2 * student.parameters["total"]
    head = 2 * 101 * 64

    def memory(**sections):
        recipe = Recipe.model_validate({"data": {"max_length": 64, "max_prompt_length": 32}, **sections})
        run = costs.Workload(recipe, student, teacher, 101, costs.Lengths(64, 40, 20), itemsize=2)
        parts = costs.memory(run)
        return parts, costs.peak_memory(parts, "cuda")

    plain, peak = memory()
    assert plain["teacher_weights"] == weights
    for fields, on_device in (
        ({"offload": True}, {"teacher_head": head, "offloaded_teacher": weights}),
        ({"device_map": "cpu"}, {"teacher_head": head}),
        ({"device_map": "auto", "max_memory": 1e-5}, {"teacher_head": head, "teacher_weights": 10_000}),
    ):
        parts, placed_peak = memory(teacher=fields)
        host = {"host_teacher_weights": weights - on_device.get("teacher_weights", 0)}
        found = {name: size for name, size in parts.items() if name not in plain or name == "teacher_weights"}
        assert found == {**on_device, **host}
        assert placed_peak == peak - weights + head + on_device.get("teacher_weights", 0)
    checkpointed, _ = memory(train={"gradient_checkpointing": True})
    offloaded, _ = memory(train={"gradient_checkpointing": True, "offload_activations": True})
    moved = checkpointed["activations"] - offloaded["activations"]
    assert offloaded["host_activations"] == moved == 4 * 2 * 2 * 64 * 64 * 8
    trainable = student.parameters["trainable"]
    assert plain["optimizer"] == 8 * trainable
    assert memory(train={"optimizer": "adamw_8bit"})[0]["optimizer"] == pytest.approx(2.03 * trainable, rel=1e-2)
    optimizer = build_optimizer(model, TrainConfig(lr=1e-3, optimizer="adafactor"))
    model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
    optimizer.step()
    state = sum(tensor.numel() for tensor in optimizer_tensors(optimizer, HostSpace(Path())).values() if tensor.ndim)
    assert memory(train={"optimizer": "adafactor"})[0]["optimizer"] == 4 * state
