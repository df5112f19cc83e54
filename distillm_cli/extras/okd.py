"""Train an adapter in the frozen teacher together with the student, in the style of OKD (arXiv 2409.12512).

The paper's idea is that a fixed teacher is the reason why students need their own outputs: a small part of the teacher
trains along on data set rows instead. Its exact loss was not available; this one is a reconstruction from the abstract and
from the first author's earlier PESF-KD (arXiv 2205.15308), whose adapter also learns from the data and from the student:

    student  D(p_φ, q_θ) + ce·CE(q_θ, y), with p_φ as a constant
    adapter  CE(p_φ, y) + weight·KL(q_θ ‖ p_φ), with q_θ as a constant

On student outputs, whose tokens are not labels, neither side has a cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from distillm_cli.config.extras import OKDConfig
from distillm_cli.config.schema import AdapterConfig
from distillm_cli.losses.divergences import KL
from distillm_cli.losses.extra import StudentPass, TrainedTeacher, with_cross_entropy
from distillm_cli.losses.fused import fused_loss
from distillm_cli.losses.objectives import STUDENT_OUTPUTS
from distillm_cli.losses.student_loss import concatenate
from distillm_cli.losses.weights import LossWeights
from distillm_cli.models import lora
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.lora import Adapter
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.training.state import RunInfo
from distillm_cli.types import Batch, Sequence, collate

_SEED = 0x6F6B64  # added to the run's seed, so that the adapter does not start with the student's random numbers
_DIRECTORY = "teacher"  # of the adapter in a checkpoint


class OKD(TrainedTeacher):
    """Train a LoRA adapter in the teacher. config: the recipe's ``okd`` section, with a rank."""

    def __init__(self, teacher: Backbone, config: OKDConfig, *, seed: int):
        assert config.rank is not None
        adapter = AdapterConfig(r=config.rank, dropout=0.0)
        name = teacher.model.config.name_or_path
        teacher.adapter = lora.attach(teacher.model, adapter, seed=seed + _SEED, base=name, revision=None)
        super().__init__(teacher)
        self.config = config
        self.lr_ratio = config.lr_ratio

    @property
    def adapter(self) -> Adapter:
        """Return the adapter that is trained."""
        assert self.teacher.adapter is not None
        return self.teacher.adapter

    def train(self, mode: bool = True) -> OKD:
        """Keep the teacher in evaluation mode: it is frozen, and its adapter has no dropout."""
        super().train(mode)
        self.teacher.eval()
        return self

    def hidden(self, batches: SequenceOf[Batch]) -> Tensor:
        with torch.autocast(batches[0].ids_BT.device.type, enabled=False):  # as for a frozen teacher
            return concatenate([self.teacher.hidden(batch) for batch in batches])

    def student_weights(self, weights: LossWeights, source: Source) -> LossWeights:
        ce = 0.0 if source in STUDENT_OUTPUTS else self.config.ce
        return replace(weights, ce=weights.ce + ce)

    def loss_name(self, name: str) -> str:
        return with_cross_entropy(name) if self.config.ce else name

    def loss(self, done: StudentPass) -> Tensor | None:
        ce = 0.0 if done.source in STUDENT_OUTPUTS else 1.0
        weights = LossWeights(kd=self.config.weight, ce=ce, divergence=KL())
        return self.own_loss(done, weights)

    def measure(self, batches: SequenceOf[SequenceOf[Sequence]], run: RunInfo) -> dict[str, float]:
        """Return the teacher's drift KL(p₀ ‖ p) from the model without adapter, nats per token."""
        drift = tokens = 0.0
        for sequences in batches:
            batch = collate(sequences).to(run.device)
            hidden_ND = self.hidden([batch])
            with self.adapter.disabled():
                start_ND = self.hidden([batch])
            head = self.teacher.head()
            drift += fused_loss(
                hidden_ND,
                head,
                batch.targets_N,
                weights=LossWeights(kd=1.0, ce=0.0, divergence=KL()),
                teacher_hidden_ND=start_ND,
                teacher_head=head,
            ).item()
            tokens += batch.tokens
        return {"teacher_drift": drift / tokens} if tokens else {}

    def start_weights(self) -> Mapping[str, Tensor]:
        """Return the adapter that changes nothing: its second factor B is 0."""
        state = {name: weight.detach().to("cpu", copy=True) for name, weight in self.teacher.state().items()}
        return {name: weight.zero_() if ".lora_B." in name else weight for name, weight in state.items()}

    def save_weights(self, directory: Path) -> None:
        (directory / _DIRECTORY).mkdir()
        self.adapter.save(directory / _DIRECTORY)

    def load_weights(self, directory: Path) -> None:
        self.teacher.load_state(self.adapter.read(directory / _DIRECTORY))
