"""Sample from a mixture of student and teacher: each token from p̃ = α·p + (1 − α)·q, p the teacher, q the student.

MiniLLM (Gu et al., arXiv 2306.08543, section 2.2): sampling from the student alone leads to outputs that exploit the
reward. Mixing in the teacher prevents this, and since p̃ is known, the weight q/p̃ corrects for it (``MiniLLM`` in
``losses``). Both models decode the same prompts, each with its own cache, and ``sampler`` draws from their mixture.
Each row has its own random stream, and finished rows are removed from the batch.

Shape letters: B rows, V vocabulary, N tokens of an output.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillm_cli.config.schema import RolloutConfig
from distillm_cli.rollouts.next_token import Sampling, distribution
from distillm_cli.rollouts.sampler import Decoder, Decoding, ModelSampler
from distillm_cli.training.events import Listener, silent
from distillm_cli.types import LOG_DRAWN, LOG_P, LOG_Q


class MixtureSampler(ModelSampler):
    """Sample from the mixture; rollouts carry their log-probabilities [N, 3].

    config: the recipe's ``rollout`` section; ``teacher_mix`` is α, and temperature, top-k and top-p shape each model's
    distribution before they are mixed.
    """

    def __init__(
        self,
        student: Decoder,
        teacher: Decoder,
        config: RolloutConfig,
        *,
        max_length: int,
        seed: int,
        steps: int = 1,
        listener: Listener = silent,
    ):
        shape = Sampling(config.temperature, config.top_p, config.top_k)
        plain = config.model_copy(update={"temperature": 1.0, "top_p": 1.0, "top_k": 0})
        mixture = Mixture(student, teacher, config.teacher_mix, shape)
        super().__init__(
            mixture, plain, max_length=max_length, seed=seed, steps=steps, with_log_probs=True, listener=listener
        )


class Mixture:
    """Combine two decoders: the next-token distribution is α times the teacher's plus 1 − α times the student's.

    Stop tokens are the student's.
    """

    def __init__(self, student: Decoder, teacher: Decoder, alpha: float, shape: Sampling):
        self.student = student
        self.teacher = teacher
        self.alpha = alpha
        self.shape = shape
        self.context = min((d.context for d in (student, teacher) if d.context is not None), default=None)
        self.stop_ids = student.stop_ids
        self.forced_first = student.forced_first

    @property
    def is_encoder_decoder(self) -> bool:
        return self.student.is_encoder_decoder

    def decode(self, prompts: SequenceOf[np.ndarray]) -> _MixtureDecoding:
        student = self.student.decode(prompts)
        # The teacher computes in its own dtype, independent of the student's.
        with ExitStack() as stack:
            for device in ("cpu", "cuda", "mps"):
                stack.enter_context(torch.autocast(device, enabled=False))
            teacher = self.teacher.decode(prompts)
        return _MixtureDecoding(student, teacher, self.alpha, self.shape)


class _MixtureDecoding:
    def __init__(self, student: Decoding, teacher: Decoding, alpha: float, shape: Sampling):
        self.student = student
        self.teacher = teacher
        self.alpha = alpha
        self.shape = shape

    def logits(self, tokens_B: Tensor | None) -> Tensor:
        """Return log p̃ [B, V], −inf where both models have probability 0."""
        p_BV, q_BV = self.teacher.logits(tokens_B), self.student.logits(tokens_B)
        shaped_q_BV, shaped_p_BV = distribution(q_BV, self.shape), distribution(p_BV, self.shape)
        drawn_BV = torch.lerp(shaped_q_BV, shaped_p_BV, self.alpha).log_()
        self._logs = {LOG_Q: F.log_softmax(q_BV, -1), LOG_P: F.log_softmax(p_BV, -1), LOG_DRAWN: drawn_BV}
        return drawn_BV

    def log_probs(self, tokens_B: Tensor) -> Tensor:
        """Return the log-probabilities [B, 3] of the tokens just chosen, in the columns of ``Rollout.log_probs_NK``."""
        return torch.cat([self._logs[column].gather(-1, tokens_B[:, None]) for column in sorted(self._logs)], -1)

    def keep(self, rows_B: Tensor) -> None:
        self.student.keep(rows_B)
        self.teacher.keep(rows_B)
