"""Check the shards of a student in two processes: what is read of its files, their size, and the copies with all weights."""

import os
import subprocess
import sys

import pytest
import torch

from tests import tiny
from tests.conftest import ROOT

SCRIPT = """
from pathlib import Path

import torch
from torch import nn

from distillm_cli.models.backbone import Backbone
from distillm_cli.models.sharded_student import ShardedStudent, _blocks
from distillm_cli.training.distributed import joined, world
from distillm_cli.training.sharding import gathered
from distillm_cli.utils.distributed_tensors import full_tensor, like
from distillm_cli.utils.host_space import HostSpace
from tests import tiny

def local_size(model):
    return sum(weight.to_local().numel() for weight in model.parameters())


class Root(nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, batch):
        return self.student.head().logits(self.student.hidden(batch))


with joined():
    for family in ("llama", "llama-tied", "gpt2"):
        model = tiny.model(family, 102)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        total = sum(weight.numel() for weight in model.parameters())
        student = Backbone(model, tiny.tokenizer(), 102)
        batch = tiny.batch([(4, 3), (2, 5)], 102)
        expected = student.head().logits(student.trunk_states(batch)).detach()
        root = Root(student)
        assert len(_blocks(model)) == 2
        sharding = ShardedStudent(student, root, student.device)
        assert local_size(model) == total / 2
        with torch.no_grad():
            torch.testing.assert_close(root(batch), expected)

        with sharding.whole(to_save=HostSpace(Path())):
            for name, weight in student.model.named_parameters():
                assert weight.is_meta != world().is_first
                assert weight.is_meta or torch.equal(weight, before[name])
        with torch.autocast("cpu", torch.bfloat16), sharding.whole():
            plain = student.model
            assert {weight.dtype for weight in plain.parameters()} == {torch.bfloat16}
            for name, weight in plain.named_parameters():
                assert torch.equal(weight, before[name].bfloat16())
        assert all(weight.is_meta for weight in plain.parameters())
        assert student.model is model

        twice = {name: 2 * tensor for name, tensor in state.items()}
        student.load_state(twice)
        held = dict(state)
        for weights in (before, twice):  # the second swap reverses the first
            student.swap_state(held)
            for name, weight in model.named_parameters():
                assert torch.equal(full_tensor(weight), weights[name])
        student.load_state(state)

        optimizer = torch.optim.AdamW(root.parameters(), lr=0.1)
        root(batch).logsumexp(-1).sum().mul(1 / world().size).backward()
        gradients = {name: full_tensor(weight.grad) for name, weight in model.named_parameters()}
        optimizer.step()
        state = optimizer.state[next(model.parameters())]["exp_avg"]
        whole = full_tensor(state)
        assert like(whole, state).to_local().equal(state.to_local())
        in_first = gathered({"state": state}, HostSpace(Path()))["state"]
        assert in_first.equal(whole if world().is_first else whole.new_empty(0))
        for name, weight in model.named_parameters():
            assert not torch.equal(full_tensor(weight), before[name]) or not gradients[name].any()
        sharding.end()
        assert student.model is not model
        assert all(weight.is_meta for weight in student.model.parameters())
        assert student.is_to_be_sharded
        student.load_state(twice)
        for name, weight in student.model.named_parameters():
            assert weight.requires_grad
            assert weight.data_ptr() == twice[name].data_ptr()  # not a copy
            assert torch.equal(weight, twice[name])
        alone = tiny.model(family, 102)
        alone.load_state_dict(before, strict=False)
        twin = Backbone(alone, tiny.tokenizer(), 102)
        twin.stop_cpu_forward()
        twin.head().logits(twin.hidden(batch)).logsumexp(-1).sum().backward()
        for name, weight in alone.named_parameters():
            torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-4, atol=1e-5)  # the sum of both processes'

    shared = tiny.model("llama")
    shared.model.layers[1].mlp = shared.model.layers[0].mlp
    assert _blocks(shared) == []
    print("all checked")
"""


def check_in_two_processes(script, directory):
    (directory / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=directory, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all checked") == 2


@pytest.mark.long
def test_shards_of_a_student(tmp_path):
    check_in_two_processes(SCRIPT, tmp_path)


FILES = """
import json
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from distillm_cli.config.schema import StudentConfig
from distillm_cli.models.pair import create_student
from distillm_cli.models.sharded_student import ShardedStudent
from distillm_cli.training.distributed import joined
from distillm_cli.utils.distributed_tensors import full_tensor
from distillm_cli.utils.host_space import HostSpace


def is_mapped(tensor):
    \"\"\"Return whether the memory of a tensor is that of a file of weights.\"\"\"
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return line.endswith(".safetensors")
    return False


class Allocated(TorchDispatchMode):
    \"\"\"Record the bytes of the largest tensor that an operation allocates.\"\"\"

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            tensor = getattr(tensor, "_local_tensor", tensor)
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and not is_mapped(tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return found


class Root(nn.Module):
    def __init__(self, student):
        super().__init__()
        self.student = student


with joined():
    for name, mapped in (("one", True), ("several", True), ("half", True), ("scaled", True), ("float16", False)):
        whole = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        student = create_student(StudentConfig(path=name), seed=0, device=None, max_length=32)
        assert all(is_mapped(weight) for weight in student.parameters()) == mapped, name
        assert student.model.config.to_dict() == whole.config.to_dict()
        buffers = dict(whole.named_buffers())
        assert all(torch.equal(buffer, buffers[key]) for key, buffer in student.model.named_buffers())
        allocated = Allocated()
        with allocated:
            sharding = ShardedStudent(student, Root(student), torch.device("cpu"))
        largest = max(4 * weight.numel() for weight in whole.parameters())
        if mapped:
            assert 0 < allocated.largest <= largest / 2
        shards = dict(student.model.named_parameters())
        assert shards.keys() == dict(whole.named_parameters()).keys()
        for key, weight in whole.named_parameters():
            assert torch.equal(full_tensor(shards[key]), weight)
            assert shards[key].dtype == torch.float32
        with sharding.whole(to_save=HostSpace(Path())):
            assert student.model.dtype == torch.float32
    print("all checked")
"""


@pytest.mark.long
def test_each_process_reads_its_part_of_the_files(tmp_path):
    """Check one file, several, and bfloat16 weights, also with buffers that bfloat16 would round; float16 is not mapped."""
    for name, family, options in (
        ("one", "llama-tied", {}),
        ("several", "llama", {"max_shard_size": "20KB"}),
        ("half", "llama-tied", {}),
        ("scaled", "gemma2", {}),
        ("float16", "llama", {}),
    ):
        dtype = {"half": torch.bfloat16, "scaled": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
        tiny.model(family, tiny.VOCAB).to(dtype).save_pretrained(tmp_path / name, **options)
        tiny.tokenizer(size=tiny.VOCAB).save_pretrained(tmp_path / name)
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    check_in_two_processes(FILES, tmp_path)
