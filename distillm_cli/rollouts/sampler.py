"""Sample responses from a model: student rollouts, ``generate`` and ``eval`` all go through ``sample``.

Each row has its own randomness: token t of row (seed, row) is drawn with the t-th uniform of a Philox stream keyed by that
pair, against the cumulative sum of the row's probabilities. One uniform replaces one random number per vocabulary entry,
and the other rows of the batch do not change a row's sample (except for the rounding of a differently shaped matmul).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from distillm_cli.config.schema import RolloutConfig
from distillm_cli.errors import DataError
from distillm_cli.rollouts.next_token import Sampling, check_chosen, choose
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Progress, Warned, silent
from distillm_cli.types import Rollout, Sequence
from distillm_cli.utils.memory import retry_halved


class Decoding(Protocol):
    """Decode one batch, with its key-value cache."""

    def logits(self, tokens_B: Tensor | None) -> Tensor:
        """Return next-token logits [B, V], float32. None prefills the prompts; later calls pass the chosen tokens."""

    def keep(self, rows_B: Tensor) -> None:
        """Continue with only these rows."""


@runtime_checkable
class ScoringDecoding(Decoding, Protocol):
    """Decode with several models, and give their log-probabilities of the tokens just chosen."""

    def log_probs(self, tokens_B: Tensor) -> Tensor:
        """Return the log-probabilities [B, K] of these tokens, in the columns of ``Rollout.log_probs_NK``."""


class Decoder(Protocol):
    """Decode with a model. ``context`` is its longest sequence, None if unbounded.

    is_encoder_decoder: prompt and response are separate, and ``no_repeat_ngram_size`` applies to the response alone.
    forced_first: the first token of every response, None for none.
    """

    @property
    def context(self) -> int | None: ...
    @property
    def is_encoder_decoder(self) -> bool: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def forced_first(self) -> int | None: ...

    def decode(self, prompts: SequenceOf[np.ndarray]) -> Decoding: ...


@runtime_checkable
class Responder(Protocol):
    """Sample outside this process, such as by a server. ``sample`` accepts it in place of a ``Decoder``."""

    @property
    def context(self) -> int | None: ...

    def respond(
        self,
        prompts: SequenceOf[np.ndarray],
        sampling: Sampling,
        seeds: SequenceOf[tuple[int, int]],
        limits: SequenceOf[int],
    ) -> list[SampledOutput]:
        """Return one output per prompt. limits: largest number of new tokens per row."""


@dataclass(frozen=True, slots=True, eq=False)
class SampledOutput:
    """Hold one output: token ids (int32), with the stop token if it is complete.

    complete: False if the length limit cut it. entropy: mean entropy in nats of the model's unfiltered next-token
    distributions (temperature 1) over the output's tokens; None unless requested. log_probs_NK: as in ``Rollout``; None
    unless requested. text: from a server that gives no token ids, which are −1 then; otherwise None.
    """

    tokens: np.ndarray
    complete: bool
    entropy: float | None = None
    log_probs_NK: np.ndarray | None = None
    text: str | None = None


class Sampler(Protocol):
    """Sample a model's outputs during training, by the built-in sampler or another engine."""

    def sample(self, prompts: SequenceOf[Sequence], step: int, places: SequenceOf[int] | None = None) -> list[Rollout]:
        """Return a response of the current model to each prompt. The prompts' own responses are ignored.

        places: index of each prompt in the whole draw, if these are a share of it.
        """


def sample_together(sampler: Sampler, prompts: SequenceOf[Sequence], step: int) -> list[Rollout]:
    """Return a response to each prompt. Each process samples a share of them, and all return all.

    Each row has its own randomness, so the responses do not depend on the number of processes. If a server does the work
    (``is_remote``), the first process asks it for all responses.
    """
    dist = world()
    if dist.size == 1 or getattr(sampler, "is_remote", False):
        return dist.broadcast(lambda: sampler.sample(prompts, step))

    def sample_share(places: list[int]) -> list[tuple[np.ndarray, Tensor | None]]:
        sampled = sampler.sample([prompts[i] for i in places], step, places)
        return [(rollout.response, rollout.log_probs_NK) for rollout in sampled]

    parts = dist.map(sample_share, range(len(prompts)), [len(s.prompt) for s in prompts])
    return [Rollout.to(s, response, log_probs_NK) for s, (response, log_probs_NK) in zip(prompts, parts, strict=True)]


class ModelSampler:
    """Sample with a model in this process.

    config: the recipe's ``rollout`` section. max_length: prompt + response, tokens. steps: of the run, over which
    ``rollout.prefix`` grows. seed: with the step it fixes the draw.
    by_row: a row's randomness is (seed, step, row); otherwise (seed, step, index in the draw). with_log_probs: rollouts
    carry the log-probabilities of their tokens from the decoding. is_teacher: the model is the teacher, which sees its own
    prompts.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: RolloutConfig,
        *,
        max_length: int,
        seed: int,
        steps: int = 1,
        by_row: bool = False,
        with_log_probs: bool = False,
        is_teacher: bool = False,
        listener: Listener = silent,
    ):
        self.is_teacher = is_teacher
        self.decoder = decoder
        self.config = config
        self.max_length = max_length
        self.steps = steps
        self.seed = seed
        self.by_row = by_row
        self.with_log_probs = with_log_probs
        self.sampling = Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
        self.width = DecodeWidth(listener)

    def sample(self, prompts: SequenceOf[Sequence], step: int, places: SequenceOf[int] | None = None) -> list[Rollout]:
        longest = self.config.most_new_tokens(step / self.steps)
        outputs = sample(
            self.decoder,
            [s.for_teacher.prompt if self.is_teacher else s.prompt for s in prompts],
            self.sampling,
            row_seeds(self.seed, prompts, step, places, by_row=self.by_row),
            limits=[min(self.max_length - s.prompt_length, longest) for s in prompts],
            with_log_probs=self.with_log_probs,
            width=self.width,
        )
        return [_rollout(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


def row_seeds(
    seed: int, prompts: SequenceOf[Sequence], step: int, places: SequenceOf[int] | None = None, *, by_row: bool
) -> list[tuple[int, int]]:
    """Return the random key of each row of a draw. by_row: it depends on the row, otherwise on its index in the draw."""
    if by_row:
        return [(seed, (step << 32) + s.row) for s in prompts]
    return [(seed, (step << 24) + i) for i in places or range(len(prompts))]


def _rollout(prompt: Sequence, output: SampledOutput) -> Rollout:
    log_probs_NK = None if output.log_probs_NK is None else torch.from_numpy(output.log_probs_NK)
    return Rollout.to(prompt, output.tokens, log_probs_NK)


class DecodeWidth:
    """Hold the number of rows that are decoded together: all until memory runs out, then half as many, and so on.

    It is shared by successive draws, so that memory does not run out in every draw.
    """

    def __init__(self, listener: Listener = silent):
        self.rows: int | None = None
        self.listener = listener

    def halve(self, rows: int) -> None:
        """Halve the number of rows after memory ran out with ``rows``, at least two."""
        self.rows = rows // 2
        self.listener(Warned(f"out of memory while decoding {rows} rows in one batch: continuing with {self.rows}"))


@torch.no_grad()
def sample(
    decoder: Decoder | Responder,
    prompts: SequenceOf[np.ndarray],
    sampling: Sampling,
    seeds: SequenceOf[tuple[int, int]],
    *,
    limits: SequenceOf[int] | None = None,
    entropy: bool = False,
    with_log_probs: bool = False,
    width: DecodeWidth | None = None,
) -> list[SampledOutput]:
    """Sample one output per prompt, decoded in one batch. Finished rows are removed from the batch.

    seeds: (seed, row) per prompt. limits: largest number of new tokens per row, in addition to
    ``sampling.max_new_tokens`` and the context. with_log_probs: return log-probabilities of the chosen tokens, under the
    model at temperature 1 without filters (K = 1), or those of a ``ScoringDecoding``. width: number of rows that fit into
    memory; if it is smaller than the batch, the same outputs are sampled in groups. Raises DataError if a prompt leaves no
    room for a new token, NonFiniteError if the logits are not finite.
    """
    token_limits = []
    context = decoder.context  # read once: config attributes are slow
    for i, prompt in enumerate(prompts):
        limit = None if limits is None else limits[i]
        token_limits.append(max_response_tokens(len(prompt), sampling, context, limit))
    if isinstance(decoder, Responder):
        return decoder.respond(prompts, sampling, seeds, token_limits)
    return decode_in_groups(
        len(prompts),
        width or DecodeWidth(),
        lambda rows: _decode_batch(
            decoder, prompts[rows], sampling, seeds[rows], token_limits[rows], entropy, with_log_probs
        ),
    )


def decode_in_groups(
    count: int, width: DecodeWidth, decode: Callable[[slice], list[SampledOutput]]
) -> list[SampledOutput]:
    """Return the outputs of ``count`` rows, decoded together or, if memory runs out, in smaller groups."""
    outputs: list[SampledOutput] = []

    def rows() -> int:
        remaining = count - len(outputs)
        return remaining if width.rows is None else min(width.rows, remaining)

    def halve() -> bool:
        if rows() == 1:
            return False
        width.halve(rows())
        return True

    def group() -> list[SampledOutput]:
        return decode(slice(len(outputs), len(outputs) + rows()))

    while len(outputs) < count:
        outputs += retry_halved(group, halve)
    return outputs


class _Responses:
    """Collect the tokens of the rows of a batch while they are decoded, and record which rows are done.

    token_limits: largest number of new tokens of each row, at least one. stop_ids: tokens that complete a response.
    """

    def __init__(self, token_limits: SequenceOf[int], stop_ids: frozenset[int]):
        B = len(token_limits)
        self.horizon = max(token_limits)
        self.stops = np.array(sorted(stop_ids), dtype=np.int64)
        self.done_B = np.zeros(B, dtype=bool)
        self.entropies_B = np.zeros(B)  # sums over the tokens
        self._limits_B = np.array(token_limits)
        self._tokens_BT = np.zeros((B, self.horizon), dtype=np.int32)
        self._counts_B = np.zeros(B, dtype=np.int64)
        self._complete_B = np.zeros(B, dtype=bool)
        self._log_probs: list[list[np.ndarray]] = [[] for _ in token_limits]

    def append(self, t: int, rows: np.ndarray, chosen: Tensor) -> np.ndarray:
        """Add token ``t`` of these rows. Return those of them that it belongs to: rows that were not done."""
        self._tokens_BT[rows, t] = chosen.cpu().numpy()
        check_chosen(self._tokens_BT[rows, t])
        active = rows[~self.done_B[rows]]
        self._counts_B[active] += 1
        self._complete_B[active] = (self._tokens_BT[active, t, None] == self.stops).any(-1)
        self.done_B[active] = self._complete_B[active] | (self._counts_B[active] >= self._limits_B[active])
        return active

    def append_log_probs(self, rows: np.ndarray, chosen_BK: Tensor) -> None:
        for i, log_probs_K in zip(rows, chosen_BK.float().cpu().numpy(), strict=True):
            self._log_probs[i].append(log_probs_K)

    def last_token(self, row: int) -> int:
        return int(self._tokens_BT[row, self._counts_B[row] - 1])

    def outputs(self, *, entropy: bool, with_log_probs: bool) -> list[SampledOutput]:
        return [
            SampledOutput(
                self._tokens_BT[i, :n].copy(),
                bool(self._complete_B[i]),
                self.entropies_B[i] / n if entropy else None,
                np.stack(self._log_probs[i][:n]) if with_log_probs else None,
            )
            for i, n in enumerate(self._counts_B)
        ]


def _decode_batch(
    decoder: Decoder,
    prompts: SequenceOf[np.ndarray],
    sampling: Sampling,
    seeds: SequenceOf[tuple[int, int]],
    token_limits: SequenceOf[int],
    entropy: bool,
    with_log_probs: bool,
) -> list[SampledOutput]:
    """Decode rows together. token_limits: largest number of new tokens of each row, at least one."""
    responses = _Responses(token_limits, decoder.stop_ids)
    lengths_B = np.array([len(p) for p in prompts])
    uniforms_BT = uniforms(seeds, responses.horizon)
    context = decoder.context  # read once: config attributes are slow
    ngrams = None
    if sampling.no_repeat_ngram_size:
        # The input of an encoder is not part of the response: a summary may quote it.
        ngrams = [_NGrams(sampling.no_repeat_ngram_size, p[:0] if decoder.is_encoder_decoder else p) for p in prompts]

    decoding = decoder.decode(prompts)
    scoring = decoding if isinstance(decoding, ScoringDecoding) else None
    batch_rows = np.arange(len(prompts))  # rows that are still in the batch
    chosen = None
    forced = decoder.forced_first
    for t in range(responses.horizon):
        logits_BV = decoding.logits(chosen)
        if with_log_probs and scoring is None:
            log_probs_BV = logits_BV.log_softmax(-1)
        if entropy:
            entropies_B = _entropy(logits_BV).cpu().numpy()
            responses.entropies_B[batch_rows] += np.where(responses.done_B[batch_rows], 0, entropies_B)
        if t < sampling.min_new_tokens:
            logits_BV[:, torch.from_numpy(responses.stops).to(logits_BV.device)] = -torch.inf
        if ngrams is not None:
            _mask_banned(logits_BV, [ngrams[i].banned() for i in batch_rows])
        chosen = choose(logits_BV, sampling, torch.from_numpy(uniforms_BT[batch_rows, t]))
        if t == 0 and forced is not None:
            chosen = torch.full_like(chosen, forced)
        active = responses.append(t, batch_rows, chosen)
        if with_log_probs:
            # Without a teacher: the student's alone, column LOG_Q.
            chosen_BK = scoring.log_probs(chosen) if scoring else log_probs_BV.gather(-1, chosen[:, None])
            responses.append_log_probs(batch_rows, chosen_BK)
        if ngrams is not None:
            for i in active:
                ngrams[i].append_token(responses.last_token(i))
        is_unfinished = ~responses.done_B[batch_rows]
        if not is_unfinished.any():
            break
        # Removing rows copies the cache. It pays off once an eighth has finished, and it is necessary before the position
        # of a finished row exceeds the context.
        exceeds_context = context is not None and lengths_B[batch_rows].max() + t + 2 > context
        if not is_unfinished.all() and (is_unfinished.mean() <= 7 / 8 or exceeds_context):
            rows = torch.from_numpy(np.flatnonzero(is_unfinished)).to(chosen.device)
            decoding.keep(rows)
            batch_rows, chosen = batch_rows[is_unfinished], chosen[rows]
    return responses.outputs(entropy=entropy, with_log_probs=with_log_probs)


@torch.no_grad()
def stream(decoder: Decoder, prompt: np.ndarray, sampling: Sampling, seed: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield one prompt's output after every token: its ids so far, int32. The last ones are those of ``sample``.

    seed: (seed, row). ``no_repeat_ngram_size`` and ``min_new_tokens`` are not used. Raises DataError if the prompt leaves
    no room for a token, NonFiniteError if the logits are not finite.
    """
    limit = max_response_tokens(len(prompt), sampling, decoder.context, None)
    uniforms_1T = uniforms([seed], limit)
    tokens = np.zeros(limit, dtype=np.int32)
    decoding = decoder.decode([prompt])
    chosen = None
    for t in range(limit):
        chosen = choose(decoding.logits(chosen), sampling, torch.from_numpy(uniforms_1T[:, t]))
        if t == 0 and decoder.forced_first is not None:
            chosen = torch.full_like(chosen, decoder.forced_first)
        tokens[t] = int(chosen)
        check_chosen(tokens[t : t + 1])
        yield tokens[: t + 1]
        if tokens[t] in decoder.stop_ids:
            return


def sample_all(
    decoder: Decoder | Responder,
    prompts: SequenceOf[np.ndarray],
    sampling: Sampling,
    *,
    seed: int,
    batch_size: int,
    listener: Listener = silent,
    task: str = "generating",
    rows: SequenceOf[int] | None = None,
    entropy: bool = False,
) -> Iterator[tuple[int, SampledOutput]]:
    """Yield (index, output) for every prompt, in batches of similar length, so not in input order.

    Each process samples whole batches, the same as a single process, and all yield all.

    rows: the second half of each row's random key. [default: the prompt's index]
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    width = DecodeWidth(listener)
    dist = world()

    def sample_own(group: list[list[int]]) -> list[SampledOutput]:
        if dist.rank >= len(group):
            return []
        picks = group[dist.rank]
        seeds = [(seed, i if rows is None else rows[i]) for i in picks]
        return sample(decoder, [prompts[i] for i in picks], sampling, seeds, entropy=entropy, width=width)

    for first in range(0, len(batches), dist.size):
        listener(Progress(task, first * batch_size, len(order), "responses"))
        group = batches[first : first + dist.size]
        for picks, outputs in zip(group, dist.gather(partial(sample_own, group)), strict=False):
            yield from zip(picks, outputs, strict=True)
    listener(Progress(task, len(order), len(order), "responses"))


def _entropy(logits_BV: Tensor) -> Tensor:
    """Return −Σ p log p, without a second pass of exponentials: log p = x − log Z."""
    shifted_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    p_BV = shifted_BV.softmax(-1)
    # The most likely token has p = exp(0) / Z. Logits of −inf are clamped, since 0 · −inf is nan.
    log_z_B = -p_BV.amax(-1).log()
    return log_z_B - torch.linalg.vecdot(p_BV, shifted_BV.clamp_min_(torch.finfo(torch.float32).min))


def uniforms(seeds: SequenceOf[tuple[int, int]], count: int) -> np.ndarray:
    """Return uniforms in [0, 1), [B, count]: the beginning of the Philox stream of each row's key.

    One generator is set to each key in turn: creating a new one reads a seed from the operating system and costs five times
    as much as the numbers.
    """
    philox = np.random.Philox(key=0)
    random, start = np.random.Generator(philox), philox.state
    uniforms_BT = np.empty((len(seeds), count))
    for uniforms_T, (seed, row) in zip(uniforms_BT, seeds, strict=True):
        start["state"]["key"][:] = seed % 2**64, row % 2**64
        philox.state = start
        random.random(out=uniforms_T)
    return uniforms_BT


def max_response_tokens(prompt: int, sampling: Sampling, context: int | None, limit: int | None) -> int:
    """Return the largest number of new tokens after a prompt of ``prompt`` tokens. Raises DataError if it is 0."""
    tokens = sampling.max_new_tokens
    if context is not None:
        tokens = min(tokens, context - prompt)
    if limit is not None:
        tokens = min(tokens, limit)
    if tokens < 1:
        raise DataError(
            "data.row_too_long",
            f"a prompt of {prompt} tokens leaves no room for a response in {context if limit is None else limit + prompt}",
            hint="shorten the prompt, or lower data.max_prompt_length so that such rows are dropped",
        )
    return tokens


class _NGrams:
    """Collect the n-grams of one row, for ``no_repeat_ngram_size``."""

    def __init__(self, n: int, prompt: np.ndarray):
        self.n = n
        self.tokens: list[int] = []
        self.following: dict[tuple[int, ...], set[int]] = defaultdict(set)
        for token in prompt.tolist():
            self.append_token(token)

    def append_token(self, token: int) -> None:
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


def _mask_banned(logits_BV: Tensor, banned: list[set[int]]) -> None:
    pairs = [(b, token) for b, tokens in enumerate(banned) for token in tokens]
    if pairs:
        rows, tokens = zip(*pairs, strict=True)
        logits_BV[list(rows), list(tokens)] = -torch.inf
