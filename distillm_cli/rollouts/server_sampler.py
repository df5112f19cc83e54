"""Sample rollouts by a vLLM server, which gets the student's weights before each draw.

The weights go through files that both sides see, once for each draw (``rollout.bulk`` batches). The server's answers are
compared with the student before the first draw and in every draw: a server that has restarted, or that another run uses
too, has other weights and would answer all the same.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from distillm_cli.config.schema import RolloutConfig
from distillm_cli.errors import NonFiniteError, ServerError
from distillm_cli.rollouts.next_token import Sampling
from distillm_cli.rollouts.sampler import max_response_tokens, row_seeds
from distillm_cli.servers.completions import Completion, Request, ServedModel, complete, seed_of
from distillm_cli.servers.http import Server, in_parallel
from distillm_cli.servers.vllm import reload_weights
from distillm_cli.training.events import Listener, Note, Warned, silent
from distillm_cli.types import Rollout, Sequence
from distillm_cli.utils.storage import storing

_WORKERS = 128  # requests at once, which vLLM batches
_PROBE_ROWS = 2
_PROBE = Sampling(temperature=0.0, max_new_tokens=8)
_SHARED_MEMORY = Path("/dev/shm")
_DIRECTORY = re.compile(r"distillm-weights-(\d+)-.*")  # with the number of its process

# Mean difference of log-probabilities up to which server and student are the same model, in nats, by the bytes of a weight:
# float32 differs by the order of sums, the 16-bit types by the rounding in every layer.
_TOLERANCE = {4: 1e-3, 2: 0.1}


class ServedStudent(Protocol):
    """Give the current student to the sampler.

    suppressed_ids: ids in the head's matrix that are not in the vocabulary. itemsize: bytes of a saved weight.
    """

    @property
    def context(self) -> int | None: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def suppressed_ids(self) -> tuple[int, ...]: ...
    @property
    def itemsize(self) -> int: ...

    def save(self, directory: Path) -> None:
        """Save the current weights as a model directory."""

    def log_probs(self, sequences: SequenceOf[Sequence]) -> Tensor:
        """Return the log-probabilities of the response tokens of all sequences [N], nats, as the server computes them."""


class ServerSampler:
    """Sample a student's outputs by a vLLM server.

    config, max_length, seed, steps, by_row: as for ``ModelSampler``. The random numbers are the server's own, so other
    outputs are drawn than by the built-in sampler, except at temperature 0.
    """

    is_remote = True

    def __init__(
        self,
        student: ServedStudent,
        server: Server,
        model: ServedModel,
        config: RolloutConfig,
        *,
        max_length: int,
        seed: int,
        steps: int = 1,
        by_row: bool = False,
        listener: Listener = silent,
    ):
        self.student = student
        self.server = server
        self.model = model
        self.config = config
        self.max_length = max_length
        self.seed = seed
        self.steps = steps
        self.by_row = by_row
        self.emit = listener
        self.sampling = Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens)
        self._is_checked = False

    def sample(self, prompts: SequenceOf[Sequence], step: int, places: SequenceOf[int] | None = None) -> list[Rollout]:
        """Return a response of the current student to each prompt. places: as for ``Sampler``.

        If the server lost the weights or the connection, both steps are repeated once.
        """
        try:
            self.synchronize()
            return self.ask(prompts, step, places)
        except ServerError as error:
            if error.code not in ("server.unreachable", "server.other_weights"):
                raise
            self.emit(Warned(f"{error.what}: sending the weights again"))
        self.synchronize()
        return self.ask(prompts, step, places)

    def synchronize(self) -> None:
        """Send the current weights to the server."""
        with _weights_directory(self.config.server_dir) as directory:
            self.student.save(directory)
            reload_weights(self.server, directory)

    def ask(self, prompts: SequenceOf[Sequence], step: int, places: SequenceOf[int] | None = None) -> list[Rollout]:
        """Return the server's response to each prompt, with the weights that it has. Raises ServerError.

        A restarted server has other weights: the last response is compared with the student, and no connection may have
        been lost.
        """
        if not self._is_checked:
            self._check_model(prompts[:_PROBE_ROWS])
        lost = self.server.lost_connections
        seeds = [seed_of(*key) for key in row_seeds(self.seed, prompts, step, places, by_row=self.by_row)]
        longest = self.config.most_new_tokens(step / self.steps)
        rollouts, log_probs = self._responses(prompts, seeds, self.sampling, longest, with_log_probs={len(prompts) - 1})
        difference = self._difference(rollouts[-1:], log_probs[-1:])
        if self.server.lost_connections != lost or difference > _TOLERANCE[self.student.itemsize]:
            what = f"{self.server.url} no longer has the student's weights"
            hint = "give each run a server of its own; look at its log"
            raise ServerError("server.other_weights", what, where=self.server.name, hint=hint)
        return rollouts

    def _check_model(self, prompts: SequenceOf[Sequence]) -> None:
        """Raise ServerError unless the server computes what the student computes, on a few greedy tokens."""
        rows = range(len(prompts))
        rollouts, log_probs = self._responses(prompts, rows, _PROBE, _PROBE.max_new_tokens, with_log_probs=set(rows))
        difference = self._difference(rollouts, log_probs)
        tolerance = _TOLERANCE[self.student.itemsize]
        if difference > tolerance:
            what = f"{self.server.url} ({self.model.name}) computes other log-probabilities than the student"
            where = f"mean difference {difference:.2g} nats, allowed {tolerance:g}"
            hint = (
                "serve a model of the student's shape, with its tokenizer, in its dtype: see `distillm serve rollouts`"
            )
            raise ServerError("server.other_model", what, where=where, hint=hint)
        self._is_checked = True
        self.emit(Note(f"rollouts: {self.server.url} computes what the student computes, to {difference:.1g} nats"))

    def _difference(self, rollouts: SequenceOf[Rollout], log_probs: SequenceOf[SequenceOf[float] | None]) -> float:
        """Return the mean difference of the tokens' log-probabilities between server and student, nats."""
        own = self.student.log_probs(rollouts).double().cpu().numpy()
        if not np.isfinite(own).all():
            hint = "its weights have diverged or are damaged: use an earlier checkpoint"
            raise NonFiniteError("numbers.not_finite", "logits are not finite during sampling", hint=hint)
        served = np.concatenate([np.asarray(row, dtype=np.float64) for row in log_probs if row is not None])
        difference = float(np.abs(own - served).mean())
        return difference if math.isfinite(difference) else math.inf

    def _responses(
        self,
        prompts: SequenceOf[Sequence],
        seeds: SequenceOf[int],
        sampling: Sampling,
        longest: int,
        *,
        with_log_probs: set[int],
    ) -> tuple[list[Rollout], list[list[float] | None]]:
        """Return the responses and, for the rows in ``with_log_probs``, the log-probabilities of their tokens."""
        context = self.student.context
        limits = [
            max_response_tokens(len(s.prompt), sampling, context, min(self.max_length - len(s.prompt), longest))
            for s in prompts
        ]
        shared = Request(
            max(limits),
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            stop_ids=tuple(sorted(self.student.stop_ids)),
            suppressed=self.student.suppressed_ids,
        )

        def ask(i: int) -> Completion:
            request = replace(shared, max_new_tokens=limits[i], seed=seeds[i], with_log_probs=i in with_log_probs)
            return complete(self.server, self.model, prompts[i].prompt.tolist(), request)

        completions = dict(in_parallel(ask, range(len(prompts)), _WORKERS))
        suppressed = set(shared.suppressed)
        rollouts = []
        for i, prompt in enumerate(prompts):
            token_ids = completions[i].token_ids
            if not token_ids or len(token_ids) > limits[i]:
                raise self.server.invalid(f"{len(token_ids or ())} token ids, expected 1 to {limits[i]}")
            if not suppressed.isdisjoint(token_ids):
                raise self.server.invalid("a token id that is not in the vocabulary")
            rollouts.append(Rollout.to(prompt, np.array(token_ids, dtype=np.int32)))
        return rollouts, [completions[i].log_probs for i in range(len(prompts))]


@contextmanager
def _weights_directory(configured: str | None) -> Iterator[Path]:
    """Yield an empty directory for the weights of one draw, in shared memory by default, and remove it afterwards."""
    if configured is not None:
        root = Path(configured).expanduser().absolute()
    else:
        root = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        _remove_leftovers(root)
    hint = "set rollout.server_dir to a directory that the server sees, with room for the student"
    with storing(f"cannot write the student's weights to {root}", hint):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"distillm-weights-{os.getpid()}-", dir=root) as directory:
            yield Path(directory)


def _remove_leftovers(root: Path) -> None:
    """Remove the directories of processes of this machine that were killed."""
    for directory in root.glob("distillm-weights-*"):
        found = _DIRECTORY.fullmatch(directory.name)
        if found is None:
            continue
        try:
            os.kill(int(found[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(directory, ignore_errors=True)  # of another user, it stays
        except OSError:
            continue
