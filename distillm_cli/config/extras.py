"""Define the recipe's sections of the related systems (docs/related.md). Each is off by default.

The switch of a system is one of its fields; the others are used only when it is on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distillm_cli.config.fields import Condition, Positive, Section, UsedWhen

_OKD = UsedWhen({"okd.rank": Condition("that is given", 16, lambda rank: rank is not None)})

_MIXUP = UsedWhen({"data.mixup": Condition("above 0", 0.4, lambda alpha: isinstance(alpha, int | float) and alpha > 0)})
_INPUT_GRADIENT = {
    "objective.input_gradient": Condition("above 0", 0.2, lambda w: isinstance(w, int | float) and w > 0)
}

Weight = Annotated[float, Field(ge=0)]


class OKDConfig(Section):
    """Configure OKD: an adapter in the frozen teacher, which trains with the student (in the style of arXiv 2409.12512).

    The adapter's loss is CE(p, y) + weight·KL(q ‖ p), with the student's distribution q as a constant.
    """

    rank: Positive | None = Field(
        None, description="Rank of a LoRA adapter in the teacher. Unset: the teacher is frozen."
    )
    lr_ratio: Annotated[Weight, _OKD] = Field(
        0.1, description="Learning rate of the teacher's adapter, as a multiple of train.lr."
    )
    weight: Annotated[Weight, _OKD] = Field(
        0.5, description="λ, the weight of KL(student ‖ teacher) in the loss of the teacher's adapter."
    )
    ce: Annotated[Weight, _OKD] = Field(
        0.0, description="Weight of an additional cross-entropy of the student on data set rows and teacher samples."
    )


class MixKDConfig(Section):
    """Configure MixKD: distillation on mixtures of two sequences' input embeddings, with ``data.mixup`` (arXiv 2011.00593).

    For each pair (i, j) of a step's sequences it adds kd_weight·D(p, q) on the mixed input and
    ce_weight·[λ·CE(q, y_i) + (1 − λ)·CE(q, y_j)].
    """

    kd_weight: Annotated[Weight, _MIXUP] = Field(
        1.0, description="Weight of the divergence between teacher and student on mixed inputs (TMKD)."
    )
    ce_weight: Annotated[Weight, _MIXUP] = Field(
        1.0, description="Weight of the student's cross-entropy with mixed labels on mixed inputs (SM)."
    )


class KDIGAConfig(Section):
    """Configure the alignment of input gradients, with ``objective.input_gradient`` (in the style of arXiv 2110.12072)."""

    space: Annotated[Literal["auto", "shared", "swap"], UsedWhen(_INPUT_GRADIENT)] = Field(
        "auto",
        description="Space in which the gradients are compared. shared: input embeddings of equal width. swap: first-order "
        "change of the loss when a token is replaced by another one, for any widths. auto: shared for a student of the "
        "teacher's own layers (layers:N), else swap.",
    )
    candidates: Annotated[Positive, UsedWhen({**_INPUT_GRADIENT, "kdiga.space": ("auto", "swap")})] = Field(
        64, description="Number of tokens of the vocabulary that swap compares, drawn anew in each step."
    )
    every: Annotated[Positive, UsedWhen(_INPUT_GRADIENT)] = Field(
        1, description="Compute the term in every k-th step only."
    )


# Sections by name, in the order of the recipe. Fine-tuning and the baselines of --compare leave them out.
EXTRAS: dict[str, type[Section]] = {"okd": OKDConfig, "mixkd": MixKDConfig, "kdiga": KDIGAConfig}
