"""Derive from a recipe: the recipes of its stages and baselines, and the values that a resume must not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from distillm_cli import plugins
from distillm_cli.config import student_spec
from distillm_cli.config.explain import leaves
from distillm_cli.config.extras import EXTRAS
from distillm_cli.config.field_usage import has_field, value_of
from distillm_cli.config.load import Resolved, nested
from distillm_cli.config.methods import METHODS
from distillm_cli.config.objective import ObjectiveConfig
from distillm_cli.config.schema import Recipe
from distillm_cli.utils.text import redact

_ORIGIN = "student.sft_epochs"
_PTP = "student.ptp"
_EXTRAS = tuple(f"{name}." for name in EXTRAS)

# Fields that may differ between a run and its resume, because no later step depends on them.
_CHANGEABLE = (
    "rollout.server_dir", "teacher.cache_dir", "teacher.device_map", "teacher.max_memory", "teacher.offload", "train.keep",
    "train.log_steps", "train.health_every", "train.on_alarm", "train.device", "train.threads", "train.offload_activations",
    "data.workers", "data.store",
    "data.store_dir", "eval.suites", "eval.batch_size", "eval.report_teacher",
)  # fmt: skip
_SERVERS = ("teacher.server", "rollout.server")  # another address is the same run, with a server or without is not


def sft_stage_recipe(resolved: Resolved) -> Resolved | None:
    """Return the recipe of the fine-tuning that ``student.sft_epochs`` asks for, as `distillm sft` would run it, or None.

    It has the same student, rows and seed. It uses the preset of method sft, ``sft_epochs`` epochs at ``sft_lr``, a
    validation and a checkpoint after each, and selects the best by validation loss.
    """
    student = resolved.recipe.student
    if not student.sft_epochs:
        return None
    changed: dict[str, tuple[Any, str]] = {key: (value, "method sft") for key, value in METHODS["sft"].preset.items()}
    changed |= {
        "method": ("sft", _ORIGIN),
        "train.epochs": (student.sft_epochs, _ORIGIN),
        "train.steps": (None, _ORIGIN),
        "train.eval_steps": ("epoch", _ORIGIN),
        "train.save_steps": ("epoch", _ORIGIN),
        "train.patience": (None, _ORIGIN),
        "train.lr": _stage_lr(resolved, "student.sft_lr"),
        "student.save_dtype": ("fp32", _ORIGIN),  # distillation starts from exactly these weights
        "student.sft_epochs": (type(student).model_fields["sft_epochs"].default, _ORIGIN),
        "student.sft_lr": (None, _ORIGIN),
        "student.ptp": (0.0, _ORIGIN),
        "student.ptp_lr": (None, _ORIGIN),
        "data.mixup": (0.0, _ORIGIN),
    }
    return _derived(resolved, changed, ("objective.", "schedule.", *_EXTRAS))  # fine-tuning does not use them


def ptp_stage_recipe(resolved: Resolved) -> Resolved | None:
    """Return the recipe of the pre-training that ``student.ptp`` asks for, or None.

    It has the run's models, rows and seed, and ``student.ptp`` epochs at ``student.ptp_lr`` with a validation and a
    checkpoint after each. Every other setting of the distillation has its default.
    """
    student = resolved.recipe.student
    if not student.ptp:
        return None
    changed: dict[str, tuple[Any, str]] = {key: (value, _PTP) for key, value in METHODS["kd"].preset.items()}
    changed |= {
        "method": ("kd", _PTP),
        "train.epochs": (student.ptp, _PTP),
        "train.steps": (None, _PTP),
        "train.eval_steps": ("epoch", _PTP),
        "train.save_steps": ("epoch", _PTP),
        "train.select": ("last", _PTP),
        "train.patience": (None, _PTP),
        "train.lr": _stage_lr(resolved, "student.ptp_lr"),
        "student.sft_epochs": (0.0, _PTP),
        "data.mixup": (0.0, _PTP),
        "student.sft_lr": (None, _PTP),
        "student.ptp_lr": (None, _PTP),
    }
    return _derived(resolved, changed, ("objective.", "schedule.", *_EXTRAS))


def _stage_lr(resolved: Resolved, key: str) -> tuple[Any, str]:
    """Return a stage's learning rate and its origin: the value of ``key``, else that of the run."""
    lr = value_of(resolved.recipe, key)
    return (resolved.recipe.train.lr, resolved.origin["train.lr"]) if lr is None else (lr, key)


def mask_stage_recipe(resolved: Resolved) -> Resolved | None:
    """Return the recipe of the stage that learns the masks of ``robustkd``, or None.

    It has the same rows, of which it uses a share, and seed. A validation follows each epoch.
    """
    masks = resolved.recipe.robustkd
    if not masks.blocks:
        return None
    changed: dict[str, tuple[Any, str]] = {
        "objective.kd_weight": (0.0, "robustkd.blocks"),
        "schedule.kind": ("off", "robustkd.blocks"),
        "train.epochs": (masks.mask_epochs, "robustkd.mask_epochs"),
        "train.steps": (None, "robustkd.mask_epochs"),
        "train.lr": (masks.mask_lr, "robustkd.mask_lr"),
        "train.lr_schedule": ("constant", "robustkd.mask_lr"),
        "train.warmup": (0.0, "robustkd.mask_lr"),
        "train.weight_decay": (0.0, "robustkd.blocks"),
        "train.eval_steps": ("epoch", "robustkd.blocks"),
        "train.select": ("last", "robustkd.blocks"),
        "train.patience": (None, "robustkd.blocks"),
        "student.sft_epochs": (0.0, "robustkd.blocks"),
        "student.sft_lr": (None, "robustkd.blocks"),
        "student.ptp": (0.0, "robustkd.blocks"),
        "data.mixup": (0.0, "robustkd.blocks"),
        "student.ptp_lr": (None, "robustkd.blocks"),
    }
    return _derived(resolved, changed, ("objective.", "schedule.", "rollout."))


def baseline_recipes(
    resolved: Resolved, run_steps: int, steps: int, stage: str, stage_steps: int
) -> dict[str, Resolved]:
    """Return the recipes of a distillation's baselines by name, each on data set rows alone.

    sft: cross-entropy, with the best weights by validation loss. off-policy: the run's divergence; left out if the run has
    no other steps. Both start from the run's student. If the run fine-tuned it first, in the directory ``stage`` with
    ``stage_steps`` steps, off-policy starts after that, and sft has as many steps more.

    run_steps: of the distillation. steps: of a baseline.
    """
    origin = "--compare"
    train = resolved.recipe.train
    default = ObjectiveConfig()
    common: dict[str, tuple[Any, str]] = {"schedule.kind": ("off", origin)}
    common["train.on_alarm"] = ("warn", origin)  # a baseline is trained to its end
    common |= {"student.sft_epochs": (0.0, origin), "student.sft_lr": (None, origin)}
    common |= {"student.ptp": (0.0, origin), "student.ptp_lr": (None, origin)}
    common["data.mixup"] = (0.0, origin)
    common["eval.report_page"] = (False, origin)
    for name in ("by_source", "curriculum", "policy_gradient", "row_weight", "input_gradient", "hidden"):
        common[f"objective.{name}"] = (getattr(default, name), origin)
    for name in ("eval_steps", "save_steps"):  # as often as in the run
        every = getattr(train, name)
        if isinstance(every, int):
            common[f"train.{name}"] = (max(round(every * steps / run_steps), 1), origin)
    sft = common | {
        "objective.kd_weight": (0.0, origin),
        "train.select": ("valid_loss", origin),
        "train.steps": (steps + stage_steps, origin),
    }
    off_policy = common | {"train.steps": (steps, origin)}
    if stage_steps and student_spec.shares_layers(
        resolved.recipe.student.path
    ):  # the stage's model has no shared layers
        off_policy |= {
            key: (value_of(resolved.recipe, key), origin) for key in ("student.sft_epochs", "student.sft_lr")
        }
    elif stage_steps:
        off_policy["student.path"] = (stage, origin)
    left_out = ("schedule.", "rollout.", *_EXTRAS)
    recipes = {"sft": _derived(resolved, sft, left_out), "off-policy": _derived(resolved, off_policy, left_out)}
    if resolved.recipe.schedule.kind == "off":
        del recipes["off-policy"]
    return recipes


def _derived(resolved: Resolved, changed: Mapping[str, tuple[Any, str]], left_out: tuple[str, ...]) -> Resolved:
    """Return the recipe with changed values, each with its origin. Fields that start with ``left_out`` get defaults."""
    unchanged = {key: value_of(resolved.recipe, key) for key in resolved.origin if not key.startswith(left_out)}
    values = unchanged | {key: value for key, (value, _) in changed.items()}
    recipe = Recipe.model_validate(nested(values))
    origins = {key: resolved.origin[key] for key in unchanged} | {key: origin for key, (_, origin) in changed.items()}
    origin = {key: origins.get(key, "default") for key in leaves() if has_field(recipe, key)}
    overridden = {key: value for key, value in resolved.overridden.items() if key in unchanged and key not in changed}
    return Resolved(recipe, origin, overridden, name=resolved.name)


def fixed_values(recipe: Recipe) -> dict[str, object]:
    """Return the values of a recipe that a resume must find unchanged, by dotted key.

    Credentials in addresses are removed, since the values are written to disk. The ``eval`` section is included if a
    metric of generated answers selects the checkpoint.
    """
    changeable = _CHANGEABLE if recipe.train.select in plugins.metrics else (*_CHANGEABLE, "eval")

    def flatten(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in section.items():
            dotted = f"{prefix}{key}"
            if dotted in changeable or (dotted in _SERVERS and value is None):
                continue
            if dotted in _SERVERS:
                value = "a server"
            if isinstance(value, dict):
                yield from flatten(value, f"{dotted}.")
            else:
                yield dotted, redact(value) if isinstance(value, str) else value

    return dict(flatten(recipe.model_dump(mode="json"), ""))
