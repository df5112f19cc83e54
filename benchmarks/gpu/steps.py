"""Compare one training step, teacher forward to backward, with the same step under other losses.

The models are whole, with random weights: the teacher in bf16, the student's weights in float32 under bf16 autocast. All
steps have the same tokens: prompts of 128, responses of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from losses import trl_loss
from measure import error_line, measured
from models import PAIRS, TINY_PAIRS, backbone
from torch import Tensor

from distillm_cli.config.objective import ObjectiveConfig
from distillm_cli.config.schema import Recipe
from distillm_cli.losses import kernels, objectives
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.models.backbone import Backbone
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.teachers.cached import CachedTeacher
from distillm_cli.teachers.local import LocalTeacher
from distillm_cli.types import Rollout, collate, micro_batches, pass_overhead

BATCHES = {"GPT-2 XL → GPT-2": (8, 32), "Llama 8B → 1B": (8,)}


class Step:
    """Hold a pair and a batch of sequences, and run training steps on them."""

    def __init__(self, teacher: Backbone, student: Backbone, sequences: list[Rollout], device: torch.device):
        self.teacher, self.student = teacher, student
        self.sequences = sequences
        self.device = device
        objective: ObjectiveConfig = Recipe(objective={"divergence": "skl", "alpha": 0.1}).objective
        self.loss = StudentLoss(
            student, objectives.build(objective), teacher_head=teacher.head(), matmul_dtype=torch.bfloat16
        ).train()
        self.weights = self.loss.criterion.weights(Source.DATASET)
        self.overhead = pass_overhead(device.type, student.head().weight_VD.shape[1])

    def ours(self, teacher: LocalTeacher) -> Tensor:
        """Run the trainer's step up to the optimizer."""
        self.loss.zero_grad(set_to_none=True)
        count = self.loss.criterion.count(self.sequences)
        total = torch.zeros((), device=self.device)
        for groups in micro_batches(self.sequences, len(self.sequences), self.overhead):
            batches = [collate(group).to(self.device) for group in groups]
            hidden_ND = torch.cat([teacher.hidden(b, group) for b, group in zip(batches, groups, strict=True)])
            with torch.autocast(self.device.type, torch.bfloat16):
                part, _ = self.loss(batches, hidden_ND, self.weights, scale=1 / count)
            part.backward()
            total += part.detach()
        return total

    def whole_logits(self) -> Tensor:
        """Run the step as it is usually written: both models' logits at every position, and a mask."""
        self.loss.zero_grad(set_to_none=True)
        batch = collate(self.sequences).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            z_NV = self.student.model(input_ids=batch.ids_BT, use_cache=False).logits.flatten(0, 1)
        with torch.no_grad():
            teacher_NV = self.teacher.model(input_ids=batch.ids_BT, use_cache=False).logits.flatten(0, 1)
        p_NV = F.softmax(teacher_NV, -1, dtype=torch.float32)
        q_NV = F.softmax(z_NV, -1, dtype=torch.float32)
        value_N = (p_NV * (p_NV.clamp_min(1e-30) / (0.1 * p_NV + 0.9 * q_NV)).log()).sum(-1)
        loss = value_N[batch.positions_N].sum() / batch.tokens
        loss.backward()
        return loss.detach()

    def with_trl_loss(self) -> Callable[[], Tensor]:
        """Return the step with TRL's chunked JSD (β = ½) on the same hidden states."""
        loss = trl_loss(0.5)

        class Inputs:
            hidden_ND: Tensor
            weight_VD: Tensor
            teacher_ND: Tensor
            teacher_VD: Tensor

        def run() -> Tensor:
            self.loss.zero_grad(set_to_none=True)
            batch = collate(self.sequences).to(self.device)
            inputs = Inputs()
            with torch.no_grad():
                inputs.teacher_ND = self.teacher.hidden(batch)
            with torch.autocast(self.device.type, torch.bfloat16):
                inputs.hidden_ND = self.student.hidden(batch).bfloat16()
            inputs.weight_VD, inputs.teacher_VD = self.student.head().weight_VD, self.teacher.head().weight_VD
            value = loss(inputs) / batch.tokens
            value.backward()
            return value.detach()

        return run


def rows(context: Any) -> Iterator[dict[str, Any]]:
    device = context.device
    rounds = 2 if context.tiny else 5
    prompt, response = (8, 16) if context.tiny else (128, 256)
    for name, (teacher_config, student_config) in (TINY_PAIRS if context.tiny else PAIRS).items():
        teacher = backbone(teacher_config, torch.bfloat16, device)
        student = backbone(student_config, torch.float32, device)
        for size in BATCHES.get(name, (4,)):
            random = np.random.default_rng(0)
            ids = random.integers(0, student_config.vocab_size, (size, prompt + response), dtype=np.int32)
            sequences = [Rollout(row[:prompt], row[prompt:], i) for i, row in enumerate(ids)]
            step = Step(teacher, student, sequences, device)
            group = f"{name}, batch {size}, prompt {prompt}, response {response}"
            variants: dict[str, Callable[[], Callable[[], Tensor]]] = {
                "ours, teacher in the step": lambda step=step: lambda: step.ours(LocalTeacher(step.teacher)),
                "ours, teacher cached": lambda step=step: _cached(step),
                "ours, kernel auto, teacher in the step": lambda step=step: _with_kernel(step),
                "TRL's chunked JSD, same hidden states": lambda step=step: step.with_trl_loss(),
                "whole logits": lambda step=step: step.whole_logits,
            }
            if device.type != "cuda":
                del variants["ours, kernel auto, teacher in the step"]
                yield {"group": group, "skipped": "ours, kernel auto: needs a GPU"}
            base = None
            for label, build in variants.items():
                if context.remaining < 5:
                    yield {"group": group, "skipped": f"{label}: out of time"}
                    continue
                try:
                    work = build()
                    found = measured(work, device, rounds)
                    base = base or found["ms"]
                    yield {
                        "group": group, "step": label, **found, "× ours": found["ms"] / base,
                        "tokens/s": round(1e3 * size * response / found["ms"]), "loss": float(work()),
                    }  # fmt: skip
                except Exception as error:
                    yield {"group": group, "skipped": f"{label}: {error_line(error)}"}
            step.loss.zero_grad(set_to_none=True)
        del teacher, student, step


def _cached(step: Step) -> Callable[[], Tensor]:
    teacher = CachedTeacher(step.teacher, mode="memory", caches_rollouts=True)
    return lambda: step.ours(teacher)


def _with_kernel(step: Step) -> Callable[[], Tensor]:
    name, found = kernels.choose_kernel(
        "auto", step.student.head(), step.teacher.head(), step.weights.divergence, torch.bfloat16
    )
    print(found)
    step.loss.kernel = None if name == "eager" else kernels.KERNELS[name]()

    def run() -> Tensor:
        return step.ours(LocalTeacher(step.teacher))

    return run
