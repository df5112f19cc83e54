"""Which criterion an ``objective`` section asks for: the one place that knows them all."""

from __future__ import annotations

from distillm_cli.config.schema import ObjectiveConfig
from distillm_cli.losses.contrast import DistiLLM2, FDistill
from distillm_cli.losses.criterion import ATKD, TAID, Objective
from distillm_cli.losses.policy_gradient import MiniLLM

_OF_DIVERGENCE = {"taid": TAID, "atkd": ATKD}


def build(config: ObjectiveConfig | None, epochs: float = 1.0) -> Objective:
    """The criterion of a recipe's ``objective`` section; None is SFT. epochs: of the whole run."""
    if config is None:
        return Objective(None)
    if config.by_source:
        return (DistiLLM2 if config.curriculum == "on" else FDistill)(config, epochs)
    if config.policy_gradient:
        return MiniLLM(config)
    return _OF_DIVERGENCE.get(config.divergence, Objective)(config)
