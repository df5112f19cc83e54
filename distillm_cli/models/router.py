"""Compute the load-balancing auxiliary loss of a mixture of experts (Fedus et al. 2021, 2101.03961).

transformers adds it to the loss of a model whose config sets `output_router_logits`, with weight
`router_aux_loss_coef`. It is computed here by transformers' own function from the outputs of the trunk's routers,
without padding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PretrainedConfig

from distillm_cli.errors import ModelError, out_of_memory
from distillm_cli.training.events import Listener, Note, Warned, silent
from distillm_cli.types import Batch
from distillm_cli.utils.modules import eval_mode

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone

RouterLoss = Callable[[tuple[Tensor, ...], Tensor], Tensor]  # the routers' logits, the attention mask → the loss

_FUNCTION = "load_balancing_loss_func"  # in the module of each family that has such a loss
_FIELD = "objective.router_aux"


def config_weight(config: PretrainedConfig) -> float:
    """Return the weight that a model's config gives to the auxiliary loss, 0 by default."""
    text = config.get_text_config()
    return (
        float(getattr(text, "router_aux_loss_coef", None) or 0) if getattr(text, "output_router_logits", False) else 0.0
    )


def set_router_loss(setting: float | str, student: Backbone, listener: Listener = silent) -> float:
    """Make the student compute its routers' auxiliary loss, and return the weight of that loss.

    setting: `objective.router_aux`; auto is the weight in the student's config, or 0, with a warning, if transformers
    has no such loss for its family. Raises ModelError if a weight was set for such a student.
    """
    weight = config_weight(student.model.config) if setting == "auto" else float(setting)
    if not weight:
        return 0.0
    student.router_loss = _find_loss(student)
    if student.router_loss is not None:
        listener(Note(f"router auxiliary loss: weight {weight:g} ({_FIELD} {setting})"))
        return weight
    kind = student.model.config.model_type
    what = f"the student ({kind}) has no router with an auxiliary loss in transformers"
    if setting != "auto":
        raise ModelError("model.no_router", what, where=f"{_FIELD} = {setting}", hint=f"--set {_FIELD}=0")
    listener(Warned(f"{what}, and its config has router_aux_loss_coef {weight:g}: training without it"))
    return 0.0


def attention_mask(batch: Batch) -> Tensor:
    """Return the attention mask [B, T] of a batch: 1 up to a row's last supervised position, 0 on the padding after it."""
    B, T = batch.ids_BT.shape
    last_B = torch.zeros(B, dtype=torch.int64, device=batch.ids_BT.device)
    last_B = last_B.scatter_reduce(0, batch.rows_N, batch.positions_N % T, "amax")
    return (torch.arange(T, device=last_B.device) <= last_B[:, None]).long()


def _find_loss(student: Backbone) -> RouterLoss | None:
    """Return the loss function of the student's family if it matches the model's own loss; else None."""
    function = getattr(sys.modules[type(student.model).__module__], _FUNCTION, None)
    top_k = getattr(student.model.config.get_text_config(), "num_experts_per_tok", None)
    if function is None or top_k is None or student.own_logits or student.is_encoder_decoder:
        return None

    def loss(logits: tuple[Tensor, ...], mask_BT: Tensor) -> Tensor:
        return function(logits, logits[0].shape[-1], top_k, mask_BT)

    ids_BT = torch.arange(10, device=student.device).view(2, 5) % student.vocab
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=student.device)
    inputs = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False, "output_router_logits": True}
    try:
        with torch.no_grad(), eval_mode(student.model):
            own = student.model(**inputs).aux_loss
            ours = loss(student.trunk(**inputs).router_logits, mask_BT)
    except Exception as error:  # a family whose inputs or outputs have other names
        if out_of_memory(error):
            raise
        return None
    return loss if own is not None and torch.allclose(ours, own.to(ours), rtol=1e-4) else None
