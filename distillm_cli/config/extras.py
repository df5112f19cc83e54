"""Define the recipe's sections of the related systems (docs/related.md). Each is off by default.

The switch of a system is one of its fields; the others are used only when it is on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distillm_cli.config.fields import Condition, Count, Positive, Section, UsedWhen

_OKD = UsedWhen({"okd.rank": Condition("that is given", 16, lambda rank: rank is not None)})
_CTCD = UsedWhen({"ctcd.enabled": (True,)})

_DISCO = UsedWhen({"disco.enabled": (True,)})
_INFONCE = UsedWhen({"disco.loss": ("infonce",)})
_PAIRS = UsedWhen({"disco.pairs_epochs": Condition("above 0", 1, lambda epochs: bool(epochs) and epochs > 0)})
_ROBUSTKD = UsedWhen({"robustkd.blocks": Condition("above 0", 3, lambda blocks: blocks > 0)})

_MIXUP = UsedWhen({"data.mixup": Condition("above 0", 0.4, lambda alpha: isinstance(alpha, int | float) and alpha > 0)})
_INPUT_GRADIENT = {
    "objective.input_gradient": Condition("above 0", 0.2, lambda w: isinstance(w, int | float) and w > 0)
}

_HIDDEN = {"objective.hidden": Condition("above 0", 1.0, lambda w: isinstance(w, int | float) and w > 0)}

Weight = Annotated[float, Field(ge=0)]
BlockPairs = Annotated[
    str, Field(pattern=r"^[1-9][0-9]*:[1-9][0-9]*(,[1-9][0-9]*:[1-9][0-9]*)*$", examples=["1:4,2:8"])
]


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


class RobustKDConfig(Section):
    """Configure RobustKD: masks on the last blocks of a teacher that may have a backdoor (in the style of arXiv 2406.03409).

    A stage before the run learns the masks on a share of the rows.
    """

    blocks: Count = Field(
        0, description="Number of the teacher's last blocks with a mask. 0: the teacher is unchanged."
    )
    mask_rows: Annotated[float, Field(gt=0, le=1), _ROBUSTKD] = Field(
        0.05, description="Share of the training rows on which the masks are learned."
    )
    mask_epochs: Annotated[float, Field(gt=0), _ROBUSTKD] = Field(1, description="Epochs of learning the masks.")
    mask_lr: Annotated[float, Field(gt=0), _ROBUSTKD] = Field(0.05, description="Learning rate of the masks, constant.")
    mask_weight: Annotated[Weight, _ROBUSTKD] = Field(
        0.1, description="λ, the weight of the features' relative variance in the loss of the masks."
    )
    connector_weight: Annotated[Weight, _ROBUSTKD] = Field(
        1.0,
        description="Weight of the relative squared error between the teacher's masked features and the connected features "
        "of the student. 0: no connectors.",
    )


class CTCDConfig(Section):
    """Configure CTCD: teacher and student train together and distil both ways (arXiv 2311.02849).

    Each side's loss is hard·CE + soft·T²·KL(other ‖ own), with the other's distribution as a constant.
    """

    enabled: bool = Field(
        False, description="Train all weights of the teacher, in float32, and save it in OUTPUT/teacher/."
    )
    hard_teacher: Annotated[Weight, _CTCD] = Field(
        1.0, description="Weight of the teacher's cross-entropy, on data set rows and teacher samples."
    )
    soft_teacher: Annotated[Weight, _CTCD] = Field(
        1.0, description="Weight of T²·KL(student ‖ teacher) in the teacher's loss."
    )
    hard_student: Annotated[Weight, _CTCD] = Field(
        1.0, description="Weight of the student's cross-entropy, on data set rows and teacher samples."
    )
    soft_student: Annotated[Weight, _CTCD] = Field(
        1.0, description="Weight of T²·D(teacher, student) in the student's loss, D the objective's divergence."
    )
    temperature: Annotated[float, Field(gt=0), _CTCD] = Field(
        2.0, description="T, by which the logits of both models are divided in the divergences."
    )
    lr_ratio: Annotated[Weight, _CTCD] = Field(
        1.0, description="Learning rate of the teacher, as a multiple of train.lr."
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


class HiddenConfig(Section):
    """Configure the distance between blocks of student and teacher, with ``objective.hidden``."""

    layers: Annotated[Literal["last", "even"] | BlockPairs, UsedWhen(_HIDDEN)] = Field(
        "last",
        description="Matched blocks STUDENT:TEACHER, counted from 1: 1:4,2:8. last: the last of each. even: each of "
        "the student's with one of the teacher's, evenly spread (TinyBERT).",
    )
    loss: Annotated[Literal["mse", "cosine"], UsedWhen(_HIDDEN)] = Field(
        "mse", description="Distance. mse: mean squared error over the width. cosine: 1 − cos."
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
        64, description="Number of tokens of the vocabulary that swap compares, a new draw in each step."
    )
    every: Annotated[Positive, UsedWhen(_INPUT_GRADIENT)] = Field(
        1, description="Compute the term in every k-th step only."
    )


class DisCoConfig(Section):
    """Configure DisCo: distillation of sentence embeddings (DisCo, DistilCSE, arXiv 2112.05638).

    The loss of sentence i is −log exp(τ·u_i·t_i) / Σ_j exp(τ·u_i·t_j), u = norm(W·student), t = norm(teacher), over the
    sentences j of the step and of a queue of earlier steps.
    """

    enabled: bool = Field(
        False, description="Train the student to imitate the teacher's sentence embeddings instead of its tokens."
    )
    loss: Annotated[Literal["infonce", "mse"], _DISCO] = Field(
        "infonce", description="Loss of the distillation. infonce: contrastive. mse: ‖u − t‖², the usual baseline."
    )
    queue: Annotated[Count, _INFONCE] = Field(
        4096,
        description="Maximum number of teacher embeddings of earlier steps that serve as negatives. The paper has 65,536 "
        "for 5 million sentences.",
    )
    temperature: Annotated[float, Field(gt=0), _INFONCE] = Field(
        20.0,
        description="Initial value of τ, the trained scale of the cosines. The released code has 20, its training "
        "script e, which the method sets.",
    )
    pooling: Annotated[Literal["auto", "cls", "mean", "last"], _DISCO] = Field(
        "auto",
        description="Pooling of the last hidden states: of the first token, the mean, or of the last token. auto: what "
        "each model's directory declares (1_Pooling/config.json), for the student else the teacher's, else mean.",
    )
    keep_projection: Annotated[bool, _DISCO] = Field(
        False, description="Write W as a Dense module of the student, which then has the teacher's embedding width."
    )
    pairs_epochs: Annotated[float, Field(ge=0), _DISCO] = Field(
        0, description="Epochs of fine-tuning on sentence pairs after the distillation. The rows need pairs."
    )
    pairs_lr: Annotated[float, Field(gt=0), _PAIRS] = Field(
        5e-5, description="Peak learning rate of the fine-tuning on pairs."
    )


# Sections by name, in the order of the recipe. Fine-tuning and the baselines of --compare leave them out.
EXTRAS: dict[str, type[Section]] = {
    "okd": OKDConfig,
    "ctcd": CTCDConfig,
    "mixkd": MixKDConfig,
    "kdiga": KDIGAConfig,
    "hidden": HiddenConfig,
    "disco": DisCoConfig,
    "robustkd": RobustKDConfig,
}
