"""Compute MiniLLM's loss (Gu et al., arXiv 2306.08543): the gradient of the reverse KL between whole outputs, KL(q ‖ p).

At token t of an output of T tokens, drawn from p̃ (``mixture``), with r = log p − log q at the time of sampling, p the
teacher and q the student, the gradient has two parts (the paper's section 2.2):

- the effect on token t itself, exact over the vocabulary: ∇ KL(q ‖ p) at its prefix, weighted with w = q/p̃ at the time of
  sampling, at most 1/(1 − α);
- the effect on all later tokens: the policy gradient −w·A·∇ log q(token) with A the mean of r over the tokens after t
  (length normalization), 0 at the last one. There is no baseline. Over several steps on the same outputs it is PPO's
  clipped surrogate (arXiv 1707.06347), −min(ρA, clip(ρ, 1 ± ε)·A), ρ = q/p̃ with q as it is now.

An output that was cut is treated as ending there. The end-of-sequence token of a complete output is an ordinary token.

Differences to the sources: the paper prints 1/(T − t − 1) for a mean of T − t terms, this module uses their mean. The
authors' code (microsoft/LMOps, minillm/losses.py) also clips ρ against the sampler, but it includes r at t itself in A,
standardizes A over the batch and does not weight the exact part with w. This module follows the paper's formulas.

Shape letters: N supervised tokens of a micro-batch; 3 log-probabilities of each (see ``types.Rollout``).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.losses.divergences import KL
from distillm_cli.losses.objectives import KD, STUDENT_OUTPUTS, SourceBatch, TokenLogProbs
from distillm_cli.losses.weights import LossWeights, TokenWeights
from distillm_cli.rollouts.scheduler import Source
from distillm_cli.types import LOG_DRAWN, LOG_P, LOG_Q, Rollout, Sequence


@dataclass(frozen=True, eq=False)
class ClippedSurrogate:
    """Compute −min(ρA, clip(ρ, 1 − clip, 1 + clip)·A) with ρ = q(token)/p̃(token), in the unit of A.

    advantages_N: A, constants. log_drawn_N: log p̃ of each token when it was drawn.
    """

    advantages_N: Tensor
    log_drawn_N: Tensor
    clip: float

    def __call__(self, log_q_N: Tensor) -> tuple[Tensor, Tensor]:
        ratio_N = (log_q_N - self.log_drawn_N.to(log_q_N)).exp()
        advantages_N = self.advantages_N.to(log_q_N)
        unclipped_N = ratio_N * advantages_N
        clipped_N = ratio_N.clamp(1 - self.clip, 1 + self.clip) * advantages_N
        # d(ρA)/d log q = ρA, but 0 where the clipped value is smaller, since it does not depend on q.
        return -torch.minimum(unclipped_N, clipped_N), torch.where(unclipped_N <= clipped_N, unclipped_N, 0.0)

    def __getitem__(self, tokens: slice | Tensor) -> ClippedSurrogate:
        return ClippedSurrogate(self.advantages_N[tokens], self.log_drawn_N[tokens], self.clip)

    def to(self, device: torch.device | str) -> ClippedSurrogate:
        return ClippedSurrogate(self.advantages_N.to(device), self.log_drawn_N.to(device), self.clip)


def advantages(rewards_N: Tensor) -> Tensor:
    """Return the mean of one output's rewards after each token, [N]; 0 after the last."""
    N = len(rewards_N)
    reward_to_go_N = rewards_N.double().flip(0).cumsum(0).flip(0)
    means_N = torch.zeros_like(reward_to_go_N)
    means_N[:-1] = reward_to_go_N[1:] / torch.arange(N - 1, 0, -1, device=rewards_N.device)
    return means_N.to(rewards_N.dtype)


class MiniLLM(KD):
    """Train with MiniLLM: w·D + the clipped surrogate per token of student outputs, where the paper's D is ``rkl``.

    Each step also has data set rows, weighted with ``row_weight``: (1 − kd_weight)·CE + kd_weight·KL(p ‖ q) per token. This
    is the authors' term on plain text, applied to the rows' responses.

    The loss is a mean over the outputs' tokens plus row_weight times a mean over the rows', nats per token. The exact part
    is the reverse KL at a token, the surrogate an estimate of its mean over later tokens. Both are 0 if the models agree.
    """

    def __init__(self, config: ObjectiveConfig):
        super().__init__(config)
        self.rows_beside = config.row_weight > 0
        self._reward: float | None = None

    @property
    def name(self) -> str:
        return f"PG + {self.config.divergence}"

    def weights(self, source: Source, progress: float = 1.0) -> LossWeights:
        if source in STUDENT_OUTPUTS:
            return LossWeights(kd=1.0, ce=0.0, divergence=self.divergence)
        plain = super().weights(source, progress)
        return LossWeights(plain.kd, plain.ce, KL())

    def begin_step(
        self, parts: SequenceOf[SourceBatch], log_probs: SequenceOf[TokenLogProbs], progress: float
    ) -> list[TokenWeights | None]:
        outputs = [s for part in parts if part.source in STUDENT_OUTPUTS for s in part.sequences]
        rows = [s for part in parts if part.source not in STUDENT_OUTPUTS for s in part.sequences]
        self._reward = self._reward_of(outputs) if outputs else None
        if not outputs:
            return [None] * len(parts)
        # The sum is divided by the number of all tokens, so a mean over a part has weight all/part.
        total = self.count(outputs) + self.count(rows)
        output_weight = min(1.0, progress / self.config.kd_warmup) if self.config.kd_warmup else 1.0
        output_weight *= total / self.count(outputs)
        row_weight = self.config.row_weight * total / max(self.count(rows), 1)
        token_weights: list[TokenWeights | None] = []
        for part in parts:
            N = sum(s.supervised for s in part.sequences)
            if part.source in STUDENT_OUTPUTS:
                token_weights.append(self._output_weights(part.sequences, torch.full((N,), output_weight)))
            else:
                token_weights.append(TokenWeights(weights_N=torch.full((N,), row_weight)))
        return token_weights

    def _output_weights(self, sequences: SequenceOf[Sequence], weights_N: Tensor) -> TokenWeights:
        by_output = [_log_probs(s) for s in sequences]
        log_probs_N3 = torch.cat(by_output)
        rewards = [output_N3[:, LOG_P] - output_N3[:, LOG_Q] for output_N3 in by_output]
        surrogate = ClippedSurrogate(
            torch.cat([advantages(r_N) for r_N in rewards]), log_probs_N3[:, LOG_DRAWN], self.config.ratio_clip
        )
        return TokenWeights(weights_N=weights_N, kd_weights_N=_weights(log_probs_N3), surrogate=surrogate)

    def _reward_of(self, outputs: SequenceOf[Sequence]) -> float:
        log_probs_N3 = torch.cat([_log_probs(s) for s in outputs])
        w_N = _weights(log_probs_N3)
        return float((w_N * (log_probs_N3[:, LOG_P] - log_probs_N3[:, LOG_Q])).sum() / w_N.sum().clamp_min(1e-12))

    def figures(self) -> dict[str, float]:
        """Return the reward: the mean of log p − log q per token of the step's outputs when they were sampled, nats.

        It is weighted from the mixture to the student, and so estimates −KL(q ‖ p) per token.
        """
        return {} if self._reward is None else {"reward": self._reward}


def _log_probs(output: Sequence) -> Tensor:
    """Return the log-probabilities [N, 3] of an output, which ``MixtureSampler`` has stored with it."""
    assert isinstance(output, Rollout)
    assert output.log_probs_NK is not None
    return output.log_probs_NK


def _weights(log_probs_N3: Tensor) -> Tensor:
    """Return w = q/p̃ at the time of sampling."""
    return (log_probs_N3[:, LOG_Q] - log_probs_N3[:, LOG_DRAWN]).exp()
