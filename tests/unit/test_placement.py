"""Test teachers whose weights are not on the device, and activations in host memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distillm_cli.config.schema import Recipe, TeacherConfig
from distillm_cli.models.activations import saved_in_host_memory
from distillm_cli.models.devices import check_offload
from distillm_cli.models.loading import load_backbone
from distillm_cli.models.placement import PlacedTeacher, dispatch_arguments
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.teachers.teacher_cache import teacher_digest
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
