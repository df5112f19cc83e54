"""Sampling: the one sampler behind student rollouts, ``generate`` and ``eval``.

A row's randomness is its own: token t of row (seed, row) is drawn with the t-th uniform of a Philox stream keyed by that
pair, against the cumulative sum of the row's probabilities. So one uniform replaces a vocabulary of random numbers, and
what else is in the batch cannot change a row's sample (beyond the rounding of a differently shaped matmul).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillm_cli.config.schema import Rollout
from distillm_cli.core.events import Listener, Progress, silent
from distillm_cli.errors import DataError
from distillm_cli.sequences import Sequence


class Decoding(Protocol):
    """One batch being decoded, with its key-value cache."""

    def logits(self, tokens_B: Tensor | None) -> Tensor:
        """Next-token logits [B, V], float32. None prefills the prompts; afterwards the tokens just chosen."""

    def keep(self, rows_B: Tensor) -> None:
        """Goes on with these rows only."""


class Decoder(Protocol):
    """A model that can decode; ``context`` is its longest sequence, None when unbounded."""

    context: int | None
    stop_ids: frozenset[int]

    def decode(self, prompts: SequenceOf[np.ndarray]) -> Decoding: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a next token is chosen. temperature 0 is greedy; top_k 0, no_repeat_ngram_size 0 and top_p 1 are off.

    no_repeat_ngram_size: an n-gram of prompt and output together never occurs twice. min_new_tokens: no stop before.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """One output: token ids (int32), the stop token included when it is complete.

    complete: False where the length limit cut it. entropy: mean entropy in nats of the model's own next-token
    distributions (temperature 1, nothing filtered) over the output's tokens; None unless asked for.
    """

    tokens: np.ndarray
    complete: bool
    entropy: float | None = None


class Rollouts(Protocol):
    """Where student outputs come from; the built-in sampler is one, another engine may be."""

    def sample(self, prompts: SequenceOf[Sequence], step: int) -> list[Sequence]:
        """A response for each prompt by the student as it is now; prompts' own responses are ignored."""


class StudentRollouts:
    """Rollouts by the built-in sampler.

    config: the recipe's ``rollout`` section. max_length: prompt + response, tokens. seed: with the step it fixes the draw.
    """

    def __init__(self, decoder: Decoder, config: Rollout, *, max_length: int, seed: int):
        self.decoder, self.max_length, self.seed = decoder, max_length, seed
        self.sampling = Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)

    def sample(self, prompts: SequenceOf[Sequence], step: int) -> list[Sequence]:
        limits = [self.max_length - len(s.prompt) for s in prompts]
        seeds = [(self.seed, (step << 24) + i) for i in range(len(prompts))]
        outputs = sample(self.decoder, [s.prompt for s in prompts], self.sampling, seeds, limits=limits)
        return [Sequence(s.prompt, out.tokens, s.row) for s, out in zip(prompts, outputs, strict=True)]


@torch.no_grad()
def sample(
    decoder: Decoder,
    prompts: SequenceOf[np.ndarray],
    sampling: Sampling,
    seeds: SequenceOf[tuple[int, int]],
    *,
    limits: SequenceOf[int] | None = None,
    entropy: bool = False,
) -> list[Sampled]:
    """One output per prompt, decoded side by side; finished rows leave the batch.

    seeds: (seed, row) per prompt. limits: most new tokens per row, beside ``sampling.max_new_tokens`` and the context.
    Raises DataError where a prompt leaves no room for a single new token.
    """
    room = [
        _room(len(p), sampling, decoder.context, None if limits is None else limits[i]) for i, p in enumerate(prompts)
    ]
    horizon = max(room)
    uniforms = np.stack([_uniforms(seed, horizon) for seed in seeds])
    ngrams = [_NGrams(sampling.no_repeat_ngram_size, p) for p in prompts] if sampling.no_repeat_ngram_size else None
    stops = np.fromiter(decoder.stop_ids, dtype=np.int64)
    outputs: list[list[int]] = [[] for _ in prompts]
    entropies = np.zeros(len(prompts))
    complete = np.zeros(len(prompts), dtype=bool)
    done = np.zeros(len(prompts), dtype=bool)

    decoding, live, chosen = decoder.decode(prompts), np.arange(len(prompts)), None
    for t in range(horizon):
        logits_BV = decoding.logits(chosen)
        if entropy:
            entropies[live] += np.where(done[live], 0, _entropy(logits_BV).cpu().numpy())
        if t < sampling.min_new_tokens:
            logits_BV[:, torch.from_numpy(stops).to(logits_BV.device)] = -torch.inf
        if ngrams is not None:
            _ban(logits_BV, [ngrams[i].banned() for i in live])
        chosen = choose(logits_BV, sampling, torch.from_numpy(uniforms[live, t]).to(logits_BV.device))
        for i, token in zip(live, chosen.tolist(), strict=True):
            if done[i]:
                continue
            outputs[i].append(token)
            if ngrams is not None:
                ngrams[i].push(token)
            complete[i] = token in decoder.stop_ids
            done[i] = complete[i] or len(outputs[i]) >= room[i]
        if done.all():
            break
        left = ~done[live]
        # Dropping rows copies the cache: worth it once an eighth has finished, and due before a finished row's position
        # leaves the context.
        longest = max(len(prompts[i]) for i in live) + t + 2
        if not left.all() and (left.mean() <= 7 / 8 or (decoder.context is not None and longest > decoder.context)):
            rows = torch.from_numpy(np.flatnonzero(left)).to(chosen.device)
            decoding.keep(rows)
            live, chosen = live[left], chosen[rows]
    return [
        Sampled(np.asarray(tokens, dtype=np.int32), bool(complete[i]), entropies[i] / len(tokens) if entropy else None)
        for i, tokens in enumerate(outputs)
    ]


def sample_all(
    decoder: Decoder,
    prompts: SequenceOf[np.ndarray],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    listener: Listener = silent,
    task: str = "generating",
    rows: SequenceOf[int] | None = None,
    entropy: bool = False,
) -> Iterator[tuple[int, Sampled]]:
    """(index, output) for every prompt, in batches of like length, so not in input order.

    rows: the second half of each row's random key; the prompt's index when absent.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        listener(Progress(task, start, len(order), "responses"))
        picks = order[start : start + batch_size]
        seeds = [(seed, i if rows is None else rows[i]) for i in picks]
        outputs = sample(decoder, [prompts[i] for i in picks], sampling, seeds, entropy=entropy)
        yield from zip(picks, outputs, strict=True)
    listener(Progress(task, len(order), len(order), "responses"))


def choose(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """The next token of each row [B]: argmax at temperature 0, else the inverse of the filtered distribution's
    cumulative sum at ``uniforms_B`` (each in [0, 1))."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        kth_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    probabilities_BV = F.softmax(logits_BV, -1)
    if sampling.top_p < 1:
        probabilities_BV = _nucleus(probabilities_BV, sampling.top_p)
    # float64: fifty thousand float32 additions would bend the tail. right=True never lands on a token of probability 0.
    cumulative_BV = probabilities_BV.cumsum(-1, dtype=torch.float64)
    points_B1 = uniforms_B.unsqueeze(-1).to(torch.float64) * cumulative_BV[:, -1:]
    picks_B = torch.searchsorted(cumulative_BV, points_B1, right=True).squeeze(-1)
    return picks_B.clamp_max(logits_BV.shape[-1] - 1)


def _nucleus(probabilities_BV: Tensor, top_p: float) -> Tensor:
    """Keeps the fewest most likely tokens whose mass reaches top_p; the others become 0."""
    sorted_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    return torch.zeros_like(probabilities_BV).scatter(-1, order_BV, sorted_BV.masked_fill(before_BV >= top_p, 0.0))


def _entropy(logits_BV: Tensor) -> Tensor:
    log_p_BV = F.log_softmax(logits_BV, -1)
    return -(log_p_BV.exp() * log_p_BV).sum(-1)


def _uniforms(seed: tuple[int, int], count: int) -> np.ndarray:
    key = np.array([seed[0] % 2**64, seed[1] % 2**64], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def _room(prompt: int, sampling: Sampling, context: int | None, limit: int | None) -> int:
    room = sampling.max_new_tokens
    if context is not None:
        room = min(room, context - prompt)
    if limit is not None:
        room = min(room, limit)
    if room < 1:
        raise DataError(
            f"a prompt of {prompt} tokens leaves no room for a response in {context if limit is None else limit + prompt}",
            hint="shorten the prompt, or lower data.max_prompt_length so that such rows are dropped",
        )
    return room


class _NGrams:
    """The n-grams of one row so far, for ``no_repeat_ngram_size``."""

    def __init__(self, n: int, prompt: np.ndarray):
        self.n, self.tokens = n, []
        self.following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for token in prompt.tolist():
            self.push(token)

    def push(self, token: int) -> None:
        prefix = self._prefix()
        if prefix is not None:
            self.following[prefix].add(token)
        self.tokens.append(token)

    def banned(self) -> set[int]:
        prefix = self._prefix()
        return self.following.get(prefix, set()) if prefix is not None else set()

    def _prefix(self) -> tuple[int, ...] | None:
        width = self.n - 1
        return tuple(self.tokens[len(self.tokens) - width :]) if len(self.tokens) >= width else None


def _ban(logits_BV: Tensor, banned: list[set[int]]) -> None:
    pairs = [(b, token) for b, tokens in enumerate(banned) for token in tokens]
    if pairs:
        rows, tokens = zip(*pairs, strict=True)
        logits_BV[list(rows), list(tokens)] = -torch.inf
