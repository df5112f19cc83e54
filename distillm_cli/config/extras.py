"""Define the recipe's sections of the related systems (docs/related.md). Each is off by default.

The switch of a system is one of its fields; the others are used only when it is on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from distillm_cli.config.fields import Condition, Count, Positive, Section, UsedWhen

_OKD = UsedWhen({"okd.rank": Condition("that is given", 16, lambda rank: rank is not None)})

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


_DISCO = UsedWhen({"disco.enabled": (True,)})
_INFONCE = UsedWhen({"disco.loss": ("infonce",)})
_PAIRS = UsedWhen({"disco.pairs_epochs": Condition("above 0", 1, lambda epochs: bool(epochs) and epochs > 0)})


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
EXTRAS: dict[str, type[Section]] = {"okd": OKDConfig, "disco": DisCoConfig}
