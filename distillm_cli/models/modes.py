"""How a model is run: in training or evaluation mode, module by module; on rows of one sequence each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from transformers import PreTrainedModel, masking_utils

_LOOK = "find_packed_sequence_indices"
_LOOK_FOR_PADDING = "warn_if_padding_and_no_attention_mask"


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


def padded_on_the_right(model: nn.Module) -> None:
    """From now on this model does not look for padding tokens among ids that come without a mask.

    GPT-2 does, and warns that results may be wrong. Here padding is on the right, where causal attention does not look, or
    has a mask, and a student may sample the padding token like any other; to look is to wait for an accelerator, too.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and hasattr(part, _LOOK_FOR_PADDING):
            setattr(part, _LOOK_FOR_PADDING, _do_not_look)


def _do_not_look(*args: object) -> None:
    pass


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Inside, transformers does not look at the positions for rows that several sequences share.

    A batch here has none, and without a padding mask each forward pass would look: on an accelerator that is to wait, pass
    by pass, for all work in hand. There is no switch for it; where the function is gone, nothing is changed.
    """
    look = getattr(masking_utils, _LOOK, None)
    if look is None:
        yield
        return
    setattr(masking_utils, _LOOK, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, _LOOK, look)
