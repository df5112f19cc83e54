"""Find the tokens of held-out rows on which teacher and student disagree most.

The distance of two distributions is the Jensen-Shannon divergence in bits: 0 for equal ones, 1 for disjoint ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distillm_cli.config.explain import leaves
from distillm_cli.config.load import resolve, with_resolved_values
from distillm_cli.config.schema import Recipe
from distillm_cli.errors import DistillmError, UsageError, out_of_memory
from distillm_cli.losses.plain import head_logits
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.loading import load_backbone
from distillm_cli.runs.output_dir import RECIPE
from distillm_cli.runs.prepare import prepare
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Listener, Note, silent
from distillm_cli.types import Sequence, collate
from distillm_cli.utils.modules import eval_mode

MEASURED_ROWS = 32  # held-out rows on which the models are compared
_MAX_TOKENS = 160  # of a response
_TOP = 4  # most likely tokens of each model


@dataclass(frozen=True)
class TokenDistance:
    """Hold a response token. p, q: its probability for teacher and student. top: most likely tokens of each model."""

    text: str
    distance: float
    p: float
    q: float
    teacher_top: tuple[tuple[str, float], ...]
    student_top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class RowDistances:
    """Hold a held-out row and the distance of the models at each token of its response."""

    prompt: str
    tokens: tuple[TokenDistance, ...]

    @property
    def mean(self) -> float:
        return sum(token.distance for token in self.tokens) / len(self.tokens)


def distances_of_run(path: Path, listener: Listener, shown: int) -> tuple[list[RowDistances], str]:
    """Load both models of a finished run; return the rows of ``row_distances``, or none and the reason.

    The first process does it alone.
    """
    try:
        return world().broadcast(lambda: (_distances_of_run(path, listener, shown), ""))
    except DistillmError as error:
        return [], str(error)
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            return [], "there is not enough memory for both models"
        raise


def _distances_of_run(path: Path, listener: Listener, shown: int) -> list[RowDistances]:
    recipe = _recipe_here(path)
    if recipe.disco.enabled:
        raise UsageError("usage.not_comparable", "embeddings have no distribution over tokens")
    listener(Note(f"{path}: comparing teacher and student token by token"))
    run = prepare(recipe, silent)
    teacher = run.pair.teacher
    if teacher is None or teacher.is_served or not teacher.is_whole:
        raise UsageError("usage.not_comparable", "the teacher is not in the memory of this process")
    student = load_backbone(str(path), dtype=run.dtype, device=run.device, listener=silent)
    student.vocab = run.pair.vocab
    return row_distances(student, teacher, run.answered, run.pair.vocab, shown)


def _recipe_here(path: Path) -> Recipe:
    """Return the run's recipe with the settings for the machine of that run reset."""
    file = path / RECIPE
    resolved = resolve(command="distill", recipe=file)
    reset = {key: (leaves()[key].default, "default") for key in ("train.device", "train.threads")}
    return with_resolved_values(resolved, reset).recipe


@torch.no_grad()
def row_distances(
    student: Backbone, teacher: Backbone, rows: SequenceOf[Sequence], vocab: int, shown: int
) -> list[RowDistances]:
    """Return the rows with the largest mean distance, of the first ``MEASURED_ROWS``. vocab: shared token ids."""
    tokenizer = student.tokenizer
    found = []
    for row in [row for row in rows[:MEASURED_ROWS] if len(row.response)]:
        response = row.response[:_MAX_TOKENS]
        log_q_NV = _log_probs(student, Sequence(row.prompt, response), vocab)
        log_p_NV = _log_probs(teacher, Sequence(row.for_teacher.prompt, response), vocab)
        distances = _distances(tokenizer, response.tolist(), log_p_NV, log_q_NV)
        found.append(RowDistances(str(tokenizer.decode(row.prompt)), distances))
    return sorted(found, key=lambda row: -row.mean)[:shown]


def _log_probs(model: Backbone, row: Sequence, vocab: int) -> torch.Tensor:
    with eval_mode(model), model.on_device(), torch.autocast(model.device.type, enabled=False):
        hidden_ND = model.hidden(collate([row]).to(model.device))
        logits_NV = head_logits(hidden_ND, model.head())
    return logits_NV[:, :vocab].float().log_softmax(-1).cpu()


def _distances(
    tokenizer: Any, ids: list[int], log_p_NV: torch.Tensor, log_q_NV: torch.Tensor
) -> tuple[TokenDistance, ...]:
    p_NV, q_NV = log_p_NV.exp(), log_q_NV.exp()
    log_mean_NV = ((p_NV + q_NV) / 2).clamp_min(1e-38).log()
    # A token without probability, whose logarithm is −inf, adds nothing.
    kl_p_N, kl_q_N = (
        (prob_NV * (log_NV - log_mean_NV).masked_fill(prob_NV == 0, 0.0)).sum(-1)
        for prob_NV, log_NV in ((p_NV, log_p_NV), (q_NV, log_q_NV))
    )
    nats_N = (kl_p_N + kl_q_N) / 2
    bits = (nats_N / math.log(2)).clamp(0, 1).tolist()
    return tuple(
        TokenDistance(
            text,
            bits[i],
            p_NV[i, ids[i]].item(),
            q_NV[i, ids[i]].item(),
            _top(tokenizer, p_NV[i]),
            _top(tokenizer, q_NV[i]),
        )
        for i, text in enumerate(_texts(tokenizer, ids))
    )


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return the text that each token adds to those before it; the name of a token that adds none."""
    ends = [str(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    starts = ["", *ends[:-1]]
    added = [end[len(start) :] if end.startswith(start) else "" for start, end in zip(starts, ends, strict=True)]
    return [text or _token_text(tokenizer, token) for text, token in zip(added, ids, strict=True)]


def _token_text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token])) or str(tokenizer.convert_ids_to_tokens(token))


def _top(tokenizer: Any, prob_V: torch.Tensor) -> tuple[tuple[str, float], ...]:
    probs, ids = prob_V.topk(min(_TOP, len(prob_V)))
    return tuple(
        (_token_text(tokenizer, int(token)), float(prob))
        for token, prob in zip(ids.tolist(), probs.tolist(), strict=True)
    )
