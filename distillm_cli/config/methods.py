"""Define the methods: presets of objective, sequences and schedule (docs/methods.md#presets).

A preset holds only the values that characterize the method. The recipe, the flags and ``--set`` override it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distillm_cli import plugins


@dataclass(frozen=True)
class Method:
    """Hold a named preset.

    verb: the command that runs it. preset: dotted key → value. paper: the source. objective, sequences: descriptions, if
    those of the preset's divergence and schedule are not enough. also_needs: inputs other than those of every method of
    the verb, such as teacher samples.
    """

    name: str
    verb: Literal["sft", "distill"]
    summary: str
    paper: str
    preset: Mapping[str, Any]
    objective: str | None = None
    sequences: str | None = None
    also_needs: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the inputs that must exist before the method can run."""
        return (("rows",) if self.verb == "sft" else ("rows", "teacher")) + self.also_needs

    def trains_on(self, schedule: str) -> str:
        """Describe its sequences with this kind of schedule."""
        from distillm_cli.config.schedule import (
            SCHEDULE,
        )  # imported here, since the help needs only the names of methods

        return self.sequences or SCHEDULE.members[schedule].trains_on


def register_method(method: Method, origin: str | None = None) -> Method:
    """Register a method under its name. origin: the module that it comes from, for messages; None: the caller."""
    plugins.methods.register(method.name, method, origin or sys._getframe(1).f_globals["__name__"])
    return method


METHODS: Mapping[str, Method] = plugins.methods

register_method(
    Method(
        name="sft",
        verb="sft",
        summary="cross-entropy on the data set's responses, with the best weights by validation loss",
        paper="DistiLLM (2402.03898), appendix on the preparation of teachers and students",
        preset={
            "objective.kd_weight": 0.0,
            "schedule.kind": "off",
            "train.select": "valid_loss",
        },
    )
)
register_method(
    Method(
        name="kd",
        verb="distill",
        summary="KL(teacher ‖ student) on the data set's responses",
        paper="Hinton et al. 2015 (1503.02531), word-level as in Kim and Rush 2016 (1606.07947)",
        preset={"objective.divergence": "kl", "schedule.kind": "off"},
    )
)
register_method(
    Method(
        name="seqkd",
        verb="distill",
        summary="cross-entropy on responses sampled from the teacher",
        paper="SeqKD, Kim and Rush 2016 (1606.07947); sampled as in DistiLLM, while the paper uses beam search",
        preset={"objective.divergence": "kl", "objective.kd_weight": 0.0, "schedule.kind": "teacher"},
    )
)
register_method(
    Method(
        name="imitkd",
        verb="distill",
        summary="KL on a mix that shifts gradually from data set rows to student outputs",
        paper="ImitKD, Lin et al. 2020 (2009.07253)",
        preset={
            "objective.divergence": "kl",
            "schedule.kind": "annealed",
            "schedule.fresh": "buffer",
        },
    )
)
register_method(
    Method(
        name="gkd",
        verb="distill",
        summary="generalized JSD, half of the steps on rollouts",
        paper="GKD, Agarwal et al. 2024 (2306.13649); β as in DistiLLM's official script",
        preset={
            "objective.divergence": "jsd",
            "objective.beta": 0.1,
            "schedule.kind": "mixed",
            "schedule.mix": 0.5,
        },
    )
)
register_method(
    Method(
        name="fdistill",
        verb="distill",
        summary="JSD split by source: KL(p ‖ m) on teacher samples, KL(q ‖ m) on student samples for the same prompts",
        paper="f-distill, Wen et al. 2023 (2307.15190); --divergence tvd is its other symmetric variant",
        objective="jsd, split by source",
        preset={
            "objective.divergence": "jsd",
            "objective.beta": 0.5,
            "objective.by_source": True,
            "schedule.kind": "pairs",
        },
    )
)
register_method(
    Method(
        name="skd",
        verb="distill",
        summary="KL on student drafts, with each token outside the teacher's top 25 replaced by a teacher sample",
        paper="speculative KD, Xu et al. 2024 (2410.11325)",
        preset={
            "objective.divergence": "kl",
            "schedule.kind": "interleaved",
            "rollout.temperature": 0.5,
            "rollout.top_p": 0.5,
            "rollout.teacher_temperature": 0.2,
            "rollout.teacher_top_p": 0.5,
            "rollout.draft": 5,
            "rollout.accept": 25,
        },
    )
)
register_method(
    Method(
        name="minillm",
        verb="distill",
        summary="policy gradient of the reverse KL between outputs, on rounds of samples from a mixture with the teacher",
        paper="MiniLLM, Gu et al. 2024 (2306.08543)",
        objective="rkl and its policy gradient; CE and kl on rows",
        preset={
            "objective.divergence": "rkl",
            "objective.policy_gradient": True,
            "objective.kd_weight": 0.5,
            "objective.row_weight": 1.0,
            "schedule.kind": "rounds",
            "rollout.teacher_mix": 0.2,
            "rollout.bulk": 4,
            "student.dropout": 0.0,
        },
    )
)
register_method(
    Method(
        name="distillm",
        verb="distill",
        summary="skew KL, with a share of rollouts and replay that rises with the validation loss",
        paper="DistiLLM, Ko et al. 2024 (2402.03898)",
        preset={
            "objective.divergence": "skl",
            "objective.alpha": 0.1,
            "schedule.kind": "adaptive",
        },
    )
)
register_method(
    Method(
        name="distillm2",
        verb="distill",
        summary="skew KL on teacher samples and skew reverse KL on student samples, both redrawn in each epoch",
        paper="DistiLLM-2, Ko et al. 2025 (2503.07067)",
        objective="skl on teacher samples, srkl on student samples",
        preset={
            "objective.divergence": "skl",
            "objective.alpha": 0.1,
            "objective.by_source": True,
            "objective.curriculum": "on",
            "objective.reduction": "sequence",
            "schedule.kind": "pairs",
            "schedule.redraw": "epoch",
        },
    )
)
register_method(
    Method(
        name="akl",
        verb="distill",
        summary="KL and reverse KL, weighted by the gap between the models in the teacher's head and tail",
        paper="Wu et al. 2024 (2404.02657)",
        preset={"objective.divergence": "akl", "schedule.kind": "off"},
    )
)
register_method(
    Method(
        name="ab",
        verb="distill",
        summary="α-β divergence, with exponents that weight large gaps and likely tokens",
        paper="ABKD, Wang et al. 2025 (2505.04560)",
        preset={"objective.divergence": "ab", "schedule.kind": "off"},
    )
)
register_method(
    Method(
        name="amid",
        verb="distill",
        summary="divergence to an assistant distribution between teacher and student, with a parameter for its shape",
        paper="AMiD, Shin et al. 2026 (2510.15982)",
        preset={"objective.divergence": "amid", "schedule.kind": "adaptive"},
    )
)
register_method(
    Method(
        name="taid",
        verb="distill",
        summary="KL to a target that moves from the student's distribution to the teacher's during training",
        paper="TAID, Shing et al. 2025 (2501.16937)",
        preset={"objective.divergence": "taid", "schedule.kind": "off"},
    )
)
register_method(
    Method(
        name="atkd",
        verb="distill",
        summary="decoupled KL: only the non-target part where the teacher is confident, both parts elsewhere",
        paper="ATKD, Zhong et al. 2024 (2402.11890)",
        preset={"objective.divergence": "atkd", "schedule.kind": "off"},
    )
)
register_method(
    Method(
        name="peakd",
        verb="distill",
        summary="KL, for a student that runs half of the teacher's layers twice, pre-trained on the teacher's confidence",
        paper="Pea-KD, 2020 (2009.14822), in the style of: labels by token, and no loss of hidden states",
        preset={
            "objective.divergence": "kl",
            "schedule.kind": "off",
            "student.path": "shared:0.5x2:swap",
            "student.ptp": 1.0,
        },
    )
)
register_method(
    Method(
        name="okd",
        verb="distill",
        summary="KL from a teacher whose LoRA adapter trains along, towards the data and the student",
        paper="OKD, 2024 (2409.12512), in the style of: the loss of the adapter is a reconstruction",
        preset={"objective.divergence": "kl", "schedule.kind": "off", "okd.rank": 16},
    )
)
register_method(
    Method(
        name="ctcd",
        verb="distill",
        summary="cross-entropy and softened KL for teacher and student, which train together",
        paper="CTCD, Lee et al. 2023 (2311.02849), in the style of: weights of a replication, next tokens for masked ones",
        objective="CE and softened KL, both ways",
        preset={"objective.divergence": "kl", "schedule.kind": "off", "ctcd.enabled": True},
    )
)
register_method(
    Method(
        name="mixkd",
        verb="distill",
        summary="KL on data set rows, and on mixtures of the input embeddings of two rows, with mixed labels",
        paper="MixKD, Liang et al. 2021 (2011.00593), in the style of: adapted from classification to tokens",
        preset={"objective.divergence": "kl", "schedule.kind": "off", "data.mixup": 0.4},
    )
)
register_method(
    Method(
        name="kdiga",
        verb="distill",
        summary="KL and the alignment of the gradients of the cross-entropy by the input, which transfers robustness",
        paper="KDIGA, Shao et al. 2021 (2110.12072), in the style of: adapted from images to token embeddings",
        preset={"objective.divergence": "kl", "schedule.kind": "off", "objective.input_gradient": 0.2},
    )
)
register_method(
    Method(
        name="robustkd",
        verb="distill",
        summary="KL from a teacher with masks on its last blocks, which suppress a backdoor, and its masked features",
        paper="RobustKD, 2024 (2406.03409), in the style of: the learning of the masks is a reconstruction",
        preset={"objective.divergence": "kl", "schedule.kind": "off", "robustkd.blocks": 3},
    )
)
register_method(
    Method(
        name="disco",
        verb="distill",
        summary="contrastive distillation of sentence embeddings, with a queue of teacher embeddings as negatives",
        paper="DisCo / DistilCSE, Gao et al. 2021 (2112.05638)",
        objective="InfoNCE of projected student embeddings and teacher embeddings",
        sequences="sentences of the data set",
        preset={
            "schedule.kind": "off",
            "disco.enabled": True,
            "disco.temperature": 2.718,
            "data.max_length": 128,
            "train.batch_size": 64,
            "train.epochs": 5.0,
            "train.lr": 2e-4,
            "train.warmup": 0.1,
        },
    )
)
