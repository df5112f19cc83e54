"""Training and evaluation mode, module by module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn


def eval_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Dropout off inside; each submodule's own mode is back afterwards, also after an exception."""
    return evaluating(model.modules())


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The same for modules that were listed beforehand: walking a model's tree for every token would show."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
