"""Which criterion an ``objective`` section asks for: the one place that knows them all."""

from __future__ import annotations

from distillm_cli.config.schema import Objective as Config
from distillm_cli.losses.contrast import BySource, Curriculum
from distillm_cli.losses.criterion import Criterion, HardAndEasy, Interpolating
from distillm_cli.losses.policy_gradient import PolicyGradient

_OF_DIVERGENCE = {"taid": Interpolating, "atkd": HardAndEasy}


def build(config: Config | None, epochs: float = 1.0) -> Criterion:
    """The criterion of a recipe's ``objective`` section; None is SFT. epochs: of the whole run."""
    if config is None:
        return Criterion(None)
    if config.by_source:
        return (Curriculum if config.curriculum == "on" else BySource)(config, epochs)
    if config.policy_gradient:
        return PolicyGradient(config)
    return _OF_DIVERGENCE.get(config.divergence, Criterion)(config)
