"""Measure the accuracy of a model's response tokens, plain and under an attack on its input embeddings.

The responses are those of the rows (teacher forcing): each token is predicted after the row's own earlier tokens.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from distillm_cli.config import schema
from distillm_cli.data.batching import batches_by_length
from distillm_cli.data.encoder import Encoder
from distillm_cli.errors import DataError
from distillm_cli.evaluation.suites import Suite, answered_sequences
from distillm_cli.losses.attacks import Attack, find_perturbation, perturbed
from distillm_cli.losses.plain import token_outcomes
from distillm_cli.teachers.local import LanguageModel
from distillm_cli.training.events import Listener, Warned, silent
from distillm_cli.types import Embedded, collate
from distillm_cli.utils.modules import eval_mode
from distillm_cli.utils.text import counted


@dataclass(frozen=True)
class TokenAccuracy:
    """Hold figures over the response tokens of a set of rows.

    tokens_right: percentage of tokens that are the most likely one. rows_right: percentage of rows all of whose tokens are.
    loss: mean cross-entropy, nats per token.
    """

    tokens_right: float
    rows_right: float
    loss: float


@dataclass(frozen=True)
class AttackResult:
    """Hold a model's accuracy on a suite, plain and under attack. rows: those with a response, within the context."""

    attack: Attack
    rows: int
    tokens: int
    plain: TokenAccuracy
    attacked: TokenAccuracy

    def as_json(self) -> dict[str, Any]:
        """Return the ``attack`` object of a suite."""
        counts = {"rows": self.rows, "tokens": self.tokens}
        return {**self.attack.as_json(), **counts, "plain": asdict(self.plain), "attacked": asdict(self.attacked)}


def attack_of(config: schema.EvalConfig) -> Attack | None:
    """Return the attack of the recipe's ``eval`` section, None if it has none."""
    return None if config.attack == "none" else Attack(config.attack, config.attack_radius, config.attack_steps)


def measure_attack(
    model: LanguageModel,
    encoder: Encoder,
    suite: Suite,
    attack: Attack,
    *,
    context: int | None,
    device: torch.device,
    batch_size: int,
    listener: Listener = silent,
) -> AttackResult:
    """Measure a model on the rows of a suite, with their first references as responses.

    Rows without a response, or longer than ``context``, are left out with a warning. Raises DataError if none is left.
    """
    _, sequences = answered_sequences(suite, encoder, context)
    if not sequences:
        raise DataError(
            "data.no_rows_to_attack",
            f"{suite.name}: no row has a response within the model's context",
            where=suite.source,
            hint="use a suite with references, or leave out --attack",
        )
    if left_out := len(suite.rows) - len(sequences):
        listener(Warned(f"{suite.name}: {counted(left_out, 'row')} left out of the attack: too long, or no response"))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    start = 0
    with eval_mode(cast(nn.Module, model)):
        for rows in batches_by_length(sequences, batch_size):
            batch = collate(rows).to(device)
            with torch.no_grad():
                embedded = model.embed(batch)
            moved = perturbed(embedded, find_perturbation(model, batch, embedded, attack))
            at_rest, under_attack = (_outcomes(model, inputs, batch.targets_N) for inputs in (embedded, moved))
            found.append((batch.rows_N.cpu() + start, at_rest, under_attack))
            start += len(rows)
    rows_N = torch.cat([rows for rows, _, _ in found])
    plain_2N = torch.cat([plain for _, plain, _ in found], dim=1)
    attacked_2N = torch.cat([moved for _, _, moved in found], dim=1)
    return AttackResult(
        attack, len(sequences), len(rows_N), _accuracy(rows_N, plain_2N), _accuracy(rows_N, attacked_2N)
    )


@torch.no_grad()
def _outcomes(model: LanguageModel, inputs: Embedded, targets_N: Tensor) -> Tensor:
    """Return the losses of the tokens, and 1 for those that are right, [2, N]."""
    parts = token_outcomes(model.hidden_of(inputs), model.head(), targets_N)
    return torch.stack([part.cpu().double() for part in parts])


def _accuracy(rows_N: Tensor, outcomes_2N: Tensor) -> TokenAccuracy:
    """Return the figures of all tokens. outcomes_2N: their losses, and 1 for those that are right."""
    losses_N, right_N = outcomes_2N
    wrong_B = torch.bincount(rows_N, weights=1 - right_N)
    rows_right = (wrong_B == 0).double().mean()
    return TokenAccuracy(float(100 * right_N.mean()), float(100 * rows_right), float(losses_N.mean()))
