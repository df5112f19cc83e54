"""Sample by speculative knowledge distillation (arXiv 2410.11325, Algorithm 1): the student drafts, the teacher corrects.

The student drafts γ tokens and the teacher scores them in one pass. The first one that is not among the teacher's K most
likely tokens is replaced by a token sampled from the teacher, the drafts after it are discarded, and the student continues
from there. The distribution of a token given its prefix is therefore the student's, with the mass outside the teacher's
top K moved to the teacher's distribution. γ changes only how often the teacher runs. Token t of a row is drafted and
corrected with the t-th uniforms of the row's two Philox streams, so the outputs depend neither on γ nor on the batch
composition.

Shape letters: B rows, G tokens drafted, T time, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from distillm_cli.config.schema import RolloutConfig
from distillm_cli.rollouts.next_token import Sampling, check_chosen, choose
from distillm_cli.rollouts.sampler import (
    Decoder,
    DecodeWidth,
    Decoding,
    SampledOutput,
    decode_in_groups,
    max_response_tokens,
    row_seeds,
    uniforms,
)
from distillm_cli.training.events import Listener, silent
from distillm_cli.types import Rollout, Sequence


class RetractableDecoding(Decoding, Protocol):
    """Decode a batch and remove its latest tokens on request."""

    def logits_after(self, tokens_BG: Tensor) -> Tensor:
        """Append these tokens; return next-token logits [B, G, V], float32, after each."""

    def retract(self, counts_B: Tensor) -> None:
        """Remove this many of each row's latest tokens."""


class Drafter(Decoder, Protocol):
    @property
    def device(self) -> torch.device: ...

    def decode_blocks(self, prompts: SequenceOf[np.ndarray]) -> RetractableDecoding | None:
        """Decode like ``decode``. Return None for a model that cannot remove tokens and has to draft one at a time."""


class InterleavedSampler:
    """Sample student drafts that the teacher corrects.

    drafting, correcting: how the student and the teacher sample; the first also has K (``accept``), γ (``draft``) and the
    longest output. max_length: prompt + response, tokens. seed: with the step it fixes the draw.
    """

    def __init__(
        self,
        student: Drafter,
        teacher: Drafter,
        drafting: RolloutConfig,
        correcting: RolloutConfig,
        *,
        max_length: int,
        seed: int,
        listener: Listener = silent,
    ):
        self.student = student
        self.teacher = teacher
        self.max_length = max_length
        self.seed = seed
        self.drafting = _sampling(drafting)
        self.correcting = _sampling(correcting)
        self.accept = drafting.accept
        self.draft = drafting.draft
        self.width = DecodeWidth(listener)

    @torch.no_grad()
    def sample(self, prompts: SequenceOf[Sequence], step: int, places: SequenceOf[int] | None = None) -> list[Rollout]:
        contexts = [model.context for model in (self.student, self.teacher) if model.context is not None]
        context = min(contexts, default=None)
        limits = [
            max_response_tokens(s.prompt_length, self.drafting, context, self.max_length - s.prompt_length)
            for s in prompts
        ]
        keys = [key for _, key in row_seeds(self.seed, prompts, step, places, by_row=False)]
        outputs = decode_in_groups(
            len(prompts), self.width, lambda rows: self._sample_group(prompts[rows], keys[rows], limits[rows])
        )
        return [Rollout.to(s, out.tokens) for s, out in zip(prompts, outputs, strict=True)]

    def _sample_group(
        self, prompts: SequenceOf[Sequence], keys: SequenceOf[int], token_limits: SequenceOf[int]
    ) -> list[SampledOutput]:
        B, horizon, token_limits_B = len(prompts), max(token_limits), np.array(token_limits)
        drafting_BT = uniforms([(self.seed, key) for key in keys], horizon)
        correcting_BT = uniforms([(self.seed + _CORRECTION_SEED_OFFSET, key) for key in keys], horizon)
        stops = np.array(sorted(self.student.stop_ids), dtype=np.int64)
        tokens_BT, counts_B = np.zeros((B, horizon), dtype=np.int32), np.zeros(B, dtype=np.int64)
        complete_B = np.zeros(B, dtype=bool)

        student, teacher, max_draft = self._start(prompts)
        batch_rows, last_token_B = np.arange(B), None
        while len(batch_rows):
            G = min(max_draft, int((token_limits_B - counts_B)[batch_rows].min()))  # stay within the context
            positions_BG = counts_B[batch_rows, None] + np.arange(G)
            drafts_BG = self._drafts(student, last_token_B, drafting_BT[batch_rows[:, None], positions_BG])
            is_invalid_BG = drafts_BG < 0  # replaced by token 0 until it is checked below
            drafts_BG.clamp_min_(0)
            teacher_logits_BGV = _teacher_logits(teacher, last_token_B, drafts_BG)
            accepted_B = self._count_accepted(teacher_logits_BGV, drafts_BG)  # tokens before the first rejected one
            is_corrected_B = accepted_B < G
            last_B = accepted_B.clamp_max(G - 1)
            rows_B = torch.arange(len(batch_rows), device=last_B.device)
            uniforms_B = correcting_BT[batch_rows, counts_B[batch_rows] + last_B.cpu().numpy()]
            corrected_B = choose(teacher_logits_BGV[rows_B, last_B], self.correcting, torch.from_numpy(uniforms_B))
            drafts_BG[rows_B, last_B] = torch.where(is_corrected_B, corrected_B, drafts_BG[rows_B, last_B])
            sizes_B, tokens_BG = (last_B + 1).cpu().numpy(), drafts_BG.masked_fill(is_invalid_BG, -1).cpu().numpy()
            check_chosen(tokens_BG)
            for b, (row, size) in enumerate(zip(batch_rows, sizes_B, strict=True)):
                ends = np.flatnonzero(np.isin(tokens_BG[b, :size], stops))
                complete_B[row] = len(ends) > 0
                size = int(ends[0]) + 1 if complete_B[row] else int(size)
                tokens_BT[row, counts_B[row] : counts_B[row] + size] = tokens_BG[b, :size]
                counts_B[row] += size
            last_token_B = drafts_BG[rows_B, last_B]
            if G > 1:
                surplus_B = G - 1 - last_B  # neither model has processed the last draft
                cast(RetractableDecoding, student).retract(surplus_B)
                cast(RetractableDecoding, teacher).retract(surplus_B)
            is_unfinished = ~complete_B[batch_rows] & (counts_B[batch_rows] < token_limits_B[batch_rows])
            if not is_unfinished.all() and is_unfinished.any():
                rows = torch.from_numpy(np.flatnonzero(is_unfinished)).to(last_token_B.device)
                student.keep(rows)
                teacher.keep(rows)
                last_token_B = last_token_B[rows]
            batch_rows = batch_rows[is_unfinished]
        return [SampledOutput(tokens_BT[i, :n].copy(), bool(complete_B[i])) for i, n in enumerate(counts_B)]

    def _start(self, prompts: SequenceOf[Sequence]) -> tuple[Decoding, Decoding, int]:
        """Prefill both models; return them and how many tokens may be drafted at once.

        If these are several, both are a RetractableDecoding.
        """
        own = [s.prompt for s in prompts]
        seen = [s.for_teacher.prompt for s in prompts]
        if self.draft > 1:
            student_blocks = self.student.decode_blocks(own)
            with torch.autocast(self.teacher.device.type, enabled=False):  # the teacher in its own dtype
                teacher_blocks = self.teacher.decode_blocks(seen)
            if student_blocks is not None and teacher_blocks is not None:
                return student_blocks, teacher_blocks, self.draft
        student = self.student.decode(own)
        with torch.autocast(self.teacher.device.type, enabled=False):
            return student, self.teacher.decode(seen), 1

    def _drafts(self, student: Decoding, last_token_B: Tensor | None, uniforms_BG: np.ndarray) -> Tensor:
        drafts = []
        for g in range(uniforms_BG.shape[1]):
            logits_BV = student.logits(last_token_B)
            drafts.append(choose(logits_BV, self.drafting, torch.from_numpy(uniforms_BG[:, g])))
            last_token_B = drafts[-1].clamp_min(0)
        return torch.stack(drafts, dim=1)

    def _count_accepted(self, teacher_logits_BGV: Tensor, drafts_BG: Tensor) -> Tensor:
        """Return how many drafted tokens precede the first one outside the teacher's top K."""
        drafted_BG1 = teacher_logits_BGV.gather(-1, drafts_BG.to(teacher_logits_BGV.device)[..., None])
        is_accepted_BG = (teacher_logits_BGV > drafted_BG1).sum(-1) < self.accept
        return is_accepted_BG.long().cumprod(-1).sum(-1)


def _sampling(config: RolloutConfig) -> Sampling:
    return Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)


_CORRECTION_SEED_OFFSET = 1 << 33  # added to the seed for the teacher's uniforms


def _teacher_logits(teacher: Decoding, last_token_B: Tensor | None, drafts_BG: Tensor) -> Tensor:
    """Return the teacher's next-token logits [B, G, V] at the positions of the drafted tokens."""
    if drafts_BG.shape[1] == 1:
        return teacher.logits(last_token_B)[:, None]
    blocks = cast(RetractableDecoding, teacher)
    if last_token_B is None:
        return torch.cat([blocks.logits(None)[:, None], blocks.logits_after(drafts_BG[:, :-1])], dim=1)
    return blocks.logits_after(torch.cat([last_token_B[:, None], drafts_BG[:, :-1]], dim=1))
