"""Check the shards of a student in two processes: their size, the copies with all weights, and what stays of them."""

import os
import subprocess
import sys

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

        optimizer = torch.optim.AdamW(root.parameters(), lr=0.1)
        root(batch).logsumexp(-1).sum().mul(1 / world().size).backward()
        gradients = {name: full_tensor(weight.grad) for name, weight in model.named_parameters()}
        optimizer.step()
        state = optimizer.state[next(model.parameters())]["exp_avg"]
        whole = full_tensor(state)
        assert like(whole, state).to_local().equal(state.to_local())
        in_first = gathered({"state": state}, HostSpace(Path()))["state"]
        assert in_first.equal(whole if world().is_first else whole.new_empty(0))
        sharding.end()
        assert student.model is not model
        for name, weight in student.model.named_parameters():
            assert weight.requires_grad
            assert not torch.equal(weight, before[name]) or not gradients[name].any()
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


def test_shards_of_a_student(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all checked") == 2
