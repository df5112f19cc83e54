"""Named methods: presets over the schema, each a choice of objective, sequences and schedule (METHODS C).

A preset states what makes the method that method and nothing else; the recipe, the flags and ``--set`` override it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Method:
    """A named preset. verb: the command that runs it. preset: dotted key → value. paper: where it comes from."""

    name: str
    verb: Literal["sft", "distill"]
    summary: str
    paper: str
    preset: Mapping[str, Any]


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="sft",
            verb="sft",
            summary="cross-entropy on the data set's responses; the best weights by held-out loss",
            paper="DistiLLM (2402.03898), appendix: how teachers and students are prepared",
            preset={
                "objective.kd_weight": 0.0,
                "schedule.kind": "off",
                "train.epochs": 3.0,
                "train.lr": 5e-5,
                "train.select": "valid_loss",
            },
        ),
        Method(
            name="kd",
            verb="distill",
            summary="KL(teacher ‖ student) on the data set's responses",
            paper="Hinton et al. 2015 (1503.02531), word-level as in Kim and Rush 2016 (1606.07947)",
            preset={"objective.divergence": "kl", "schedule.kind": "off"},
        ),
        Method(
            name="imitkd",
            verb="distill",
            summary="KL on responses that turn, step by step, from the data set's into the student's own",
            paper="ImitKD, Lin et al. 2020 (2009.07253)",
            preset={
                "objective.divergence": "kl",
                "schedule.kind": "annealed",
                "schedule.fresh": "buffer",
            },
        ),
        Method(
            name="gkd",
            verb="distill",
            summary="generalised JSD; half of the steps on fresh samples of the student",
            paper="GKD, Agarwal et al. 2024 (2306.13649); β as in DistiLLM's official script",
            preset={
                "objective.divergence": "jsd",
                "objective.beta": 0.1,
                "schedule.kind": "mixed",
                "schedule.mix": 0.5,
            },
        ),
        Method(
            name="minillm",
            verb="distill",
            summary="policy gradient of the reverse KL between outputs, on rounds of samples drawn with the teacher's help",
            paper="MiniLLM, Gu et al. 2024 (2306.08543)",
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
        ),
        Method(
            name="distillm",
            verb="distill",
            summary="skew KL; student samples come in, and are replayed, as the held-out loss asks for them",
            paper="DistiLLM, Ko et al. 2024 (2402.03898)",
            preset={
                "objective.divergence": "skl",
                "objective.alpha": 0.1,
                "schedule.kind": "adaptive",
            },
        ),
    )
}
