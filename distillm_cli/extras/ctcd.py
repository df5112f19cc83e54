"""Train teacher and student together, each with the other as its teacher, in the style of CTCD (arXiv 2311.02849).

The paper trains two encoders from scratch with masked tokens. Here every response token is one, and the models may also
be trained ones. With y the data, T the temperature, p and q the distributions of teacher and student at logits / T:

    student  hard_student·CE(y) + soft_student·T²·KL(p ‖ q), with p as a constant
    teacher  hard_teacher·CE(y) + soft_teacher·T²·KL(q ‖ p), with q as a constant

The form of the loss is that of a replication, in which all weights are 1 and T is 2; the paper's own weights were not
available. On student outputs, whose tokens are not labels, neither side has a cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distillm_cli.config.extras import CTCDConfig
from distillm_cli.losses.divergences import KL
from distillm_cli.losses.extra import StudentPass, TrainedTeacher, with_cross_entropy
from distillm_cli.losses.families import Tempered
from distillm_cli.losses.objectives import STUDENT_OUTPUTS
from distillm_cli.losses.student_loss import concatenate
from distillm_cli.losses.weights import LossWeights
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.composite import copy_processor, is_composite
from distillm_cli.models.tokenizer_files import quiet
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import Batch

_DIRECTORY = "teacher"  # of the teacher, in checkpoints and in the output directory


class CTCD(TrainedTeacher):
    """Train all weights of the teacher.

    config: the recipe's ``ctcd`` section. tokenizer: saved with the teacher. rebuild: returns the teacher with its weights
    from before training, on the CPU. matmul_dtype: of the head, as in ``StudentLoss``.
    """

    in_training_precision = True

    def __init__(
        self,
        teacher: Backbone,
        config: CTCDConfig,
        *,
        tokenizer: PreTrainedTokenizerBase,
        rebuild: Callable[[], Backbone],
        matmul_dtype: torch.dtype | None,
    ):
        super().__init__(teacher)
        self.config = config
        self.lr_ratio = config.lr_ratio
        self.tokenizer = tokenizer
        self.rebuild = rebuild
        self.matmul_dtype = matmul_dtype

    def hidden(self, batches: SequenceOf[Batch]) -> Tensor:
        return concatenate([self.teacher.hidden(batch, for_backward=self.training) for batch in batches])

    def student_weights(self, weights: LossWeights, source: Source) -> LossWeights:
        config = self.config
        divergence = weights.divergence
        if divergence is not None:
            divergence = Tempered(divergence, config.temperature)
        ce = 0.0 if source in STUDENT_OUTPUTS else config.hard_student
        return replace(weights, kd=config.soft_student * weights.kd, ce=weights.ce + ce, divergence=divergence)

    def loss_name(self, name: str) -> str:
        return with_cross_entropy(name) if self.config.hard_student else name

    def loss(self, done: StudentPass) -> Tensor | None:
        config = self.config
        ce = 0.0 if done.source in STUDENT_OUTPUTS else config.hard_teacher
        divergence = Tempered(KL(), config.temperature)
        weights = LossWeights(kd=config.soft_teacher, ce=ce, divergence=divergence)
        return self.own_loss(done, weights, matmul_dtype=self.matmul_dtype)

    def start_weights(self) -> Mapping[str, Tensor]:
        return self.rebuild().state()

    def save_weights(self, directory: Path) -> None:
        with quiet():
            self.teacher.model.save_pretrained(directory / _DIRECTORY)

    def load_weights(self, directory: Path) -> None:
        with quiet():
            model = type(self.teacher.model)
            saved = model.from_pretrained(directory / _DIRECTORY, dtype=torch.float32, local_files_only=True)
        self.teacher.load_state(saved.state_dict())

    def export(self, directory: Path) -> None:
        """Write the teacher and its tokenizer into ``teacher/``, in float32."""
        self.save_weights(directory)
        with quiet():
            self.tokenizer.save_pretrained(directory / _DIRECTORY)
        config = self.teacher.model.config
        if is_composite(config):
            copy_processor(config.name_or_path, None, directory / _DIRECTORY)
