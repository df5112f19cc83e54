"""Decide which runs use a field, and build the error for a given value that the run does not use.

The conditions come from the schema (``explain.condition``), the presets of methods from ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from distillm_cli.config.explain import condition, format_value, leaves
from distillm_cli.config.extras import EXTRAS
from distillm_cli.config.fields import Condition, Values
from distillm_cli.config.merging import GivenValue
from distillm_cli.config.methods import METHODS
from distillm_cli.config.schema import EvalConfig, ObjectiveConfig, Recipe, Section
from distillm_cli.config.shortcuts import flag_of
from distillm_cli.config.student_spec import is_built
from distillm_cli.errors import RecipeError

ValueOf = Callable[[str], Any]  # dotted key → its value in a recipe

_DISTILLATION_SECTIONS = (
    "objective.",
    "schedule.",
    *(f"{name}." for name in EXTRAS),
)  # fine-tuning uses only _FINE_TUNING_FIELDS of these
_FINE_TUNING_FIELDS = ("objective.router_aux",)
SAMPLING = ("rollout.temperature", "rollout.top_p", "rollout.top_k", "rollout.max_new_tokens", "train.seed")
_FINE_TUNING_TEACHER_FIELDS = (
    "teacher.path",
    "teacher.dtype",
    "teacher.revision",
)  # used to build a student

# Fields that a run on sentence embeddings uses (``disco.enabled``).
_EMBEDDING_SECTIONS = ("disco.", "train.", "eval.")
_EMBEDDING_FIELDS = frozenset((
    "method", "schedule.kind", "teacher.path", "teacher.dtype", "teacher.revision", "student.path", "student.dtype",
    "student.dropout", "student.save_dtype", "student.revision", "data.source", "data.valid", "data.columns.prompt",
    "data.max_length",
    "data.limit", "data.valid_limit", "data.size", "data.tasks", "data.seed", "data.skip_bad_rows", "data.bucket",
))  # fmt: skip

# Fields that commands without training use: how rows are read and written, and the device. Flags and ``--set`` for other
# fields are refused there.
_INFERENCE_FIELDS = (
    "train.device", "train.threads", "student.dtype", "data.template", "data.skip_bad_rows", "data.seed", "data.tasks",
    "data.columns.prompt", "data.columns.input", "data.columns.response",
    "data.chat_template", "data.chat_template_kwargs", "data.tools", "data.documents", "data.date",
    "data.special_tokens_in_text", "data.source_language", "data.target_language",
)  # fmt: skip
_USED_WITHOUT_TRAINING = {
    "generate": (*_INFERENCE_FIELDS, *SAMPLING, "eval.batch_size", "data.size", "data.valid_limit"),
    "eval": (
        *_INFERENCE_FIELDS,
        *(f"eval.{name}" for name in EvalConfig.model_fields if name not in ("report_rows", "report_page")),
    ),
}
_HELD_OUT_FIELDS = (
    "data.source",
    "data.sources",
    "data.valid",
    "data.valid_limit",
)  # sources of the rows that `eval` scores without a suite
_STAGE_FIELDS = {"generate": ("data.source", "data.limit")}  # in a pipeline, which has no --data and --limit
_REPLACEMENTS = {
    "generate": {
        "student.path": "--model", "data.source": "--data", "data.valid": "--split valid", "data.limit": "--limit",
        "data.max_length": "--max-new-tokens", "eval.suites": "--data", "eval.limit": "--limit", "eval.seeds": "--seed",
        "eval.greedy": "--greedy", "eval.temperature": "--temperature", "eval.top_p": "--top-p", "eval.top_k": "--top-k",
        "eval.max_new_tokens": "--max-new-tokens",
    },
    "eval": {
        "data.source": "--suite", "data.valid": "--suite", "data.limit": "--limit", "data.valid_limit": "--limit",
        "data.size": "--limit", "data.max_length": "--max-new-tokens", "eval.report_rows": "--limit",
        "train.seed": "--seeds", "student.path": "`distillm eval CKPT`",
        "rollout.temperature": "--temperature", "rollout.top_p": "--top-p", "rollout.top_k": "--set eval.top_k",
        "rollout.max_new_tokens": "--max-new-tokens",
    },
}  # fmt: skip
_SELF_EXPLANATORY = ("objective.divergence", "schedule.kind")  # their values need no field name
_SYMBOLS = {"alpha": "α", "beta": "β", "lambda": "λ", "mu": "μ", "start": "t₀"}


def has_field(section: Section, key: str) -> bool:
    """Return whether a recipe has the dotted key. In a union section this depends on the selected member."""
    *parents, name = key.split(".")
    for parent in parents:
        section = getattr(section, parent)
    return name in type(section).model_fields


def value_of(section: Section, key: str) -> Any:
    """Return the value at a dotted key, or the default if this recipe's objective or schedule does not have the key."""
    if not has_field(section, key):
        return leaves()[key].default
    for name in key.split("."):
        section = getattr(section, name)
    return section


def trains(command: str) -> bool:
    """Return whether the command trains."""
    return command not in _USED_WITHOUT_TRAINING


def is_used_without_training(key: str, given: GivenValue, value: ValueOf, command: str) -> bool:
    """Return whether a command that does not train uses the field."""
    if key in _HELD_OUT_FIELDS and command == "eval":
        return not value("eval.suites")
    if key in _USED_WITHOUT_TRAINING[command]:
        return not key.startswith("eval.") or is_used(key, value)
    return bool(given.prefix) and key in _STAGE_FIELDS.get(command, ())


def is_used(key: str, value: ValueOf) -> bool:
    """Return whether a run with these values uses the field."""
    if _is_distillation_field(key) and _is_fine_tuning(value):
        return False
    if _is_unused_teacher_field(key, value) or _is_unused_by_embeddings(key, value):
        return False
    when = condition(key)
    return when is None or any(not _required_changes(alternative, value) for alternative in when.alternatives)


def _alternatives(key: str) -> tuple[Mapping[str, Values], ...]:
    """Return the alternatives of the field's condition, none if every run uses it."""
    when = condition(key)
    return () if when is None else when.alternatives


def is_general(key: str, value: ValueOf) -> bool:
    """Return whether a recipe may set the field for other commands: sampling for `generate`, or a teacher."""
    return key in (*SAMPLING, "rollout.bulk") or _is_unused_teacher_field(key, value)


def _required_changes(alternative: Mapping[str, Values], value: ValueOf) -> dict[str, Values]:
    """Return the changes that would meet one alternative of a condition: keys and required values."""
    found: dict[str, Values] = {}
    for deciding_key, values in alternative.items():
        if value(deciding_key) not in values:
            found[deciding_key] = values
        if further := _alternatives(deciding_key):
            others = (_required_changes(other, value) for other in further)
            found |= min(others, key=len) | found
    return found


def parameters(value: ValueOf) -> list[str]:
    """Return the fields that depend on the method and that a run with these values uses, in the schema's order."""
    return [key for key in leaves() if (when := condition(key)) and when.of_method and is_used(key, value)]


def unused_field_error(key: str, given: GivenValue, value: ValueOf, command: str) -> RecipeError:
    """Return the error for a given value that the run does not use. It names the runs that use it and a fix."""
    problem = f"{given.location} = {format_value(given.value)}"
    method = value("method")
    it = "it" if key in given.location else key
    distills = _is_distillation_field(key)
    if not trains(command) and not (key.startswith("eval.") and key in _USED_WITHOUT_TRAINING[command]):
        other = None if given.prefix else _REPLACEMENTS[command].get(key)
        hint = f"remove it, or try {other}" if other else "remove it"
        if key in _HELD_OUT_FIELDS and command == "eval":
            where = f"{it} applies to held-out rows, but eval.suites is {format_value(value('eval.suites'))}"
        else:
            where = f"{it} applies to {commands_using(key)}; {command} does not train"
        return RecipeError("recipe.unused_field", problem, where=where, hint=hint)
    if _is_fine_tuning(value) and (distills or _is_unused_teacher_field(key, value)):
        where = f"{it} applies to {commands_using(key)}; {method} uses only cross-entropy"
        return RecipeError("recipe.unused_field", problem, where=where, hint="remove it")
    if _is_unused_by_embeddings(key, value):
        where = f"{it} does not apply to sentence embeddings (method {method})"
        return RecipeError("recipe.unused_field", problem, where=where, hint="remove it, or choose another method")
    alternatives = [_required_changes(alternative, value) for alternative in _alternatives(key)]
    unmet = dict.fromkeys(next(iter(changes)) for changes in alternatives)
    current = " and ".join(f"{k} is {_format_word(value(k))}" for k in unmet)
    where = f"{it} applies to {describe_users(key)}, but {current}" + (f" (method {method})" if distills else "")
    nearest = min(alternatives, key=len)
    other = " ".join(
        _command_line_form(deciding_key, next(iter(values)), command) for deciding_key, values in nearest.items()
    )
    own_parameters = [k for k in parameters(value) if set(_alternatives(k)[0]) == {"objective.divergence"}]
    own_hint = (
        f"{value('objective.divergence')} uses {', '.join(own_parameters)}; "
        if "objective.divergence" in nearest
        else ""
    )
    return RecipeError(
        "recipe.unused_field",
        problem,
        where=where,
        hint=f"{own_hint if own_parameters else ''}remove it, or try {other}",
    )


def commands_using(key: str) -> str:
    """Describe the commands that use the field."""
    if key in _USED_WITHOUT_TRAINING["eval"] and key.startswith("eval."):
        return "`distillm eval`"
    found = ["distill"] if _is_distillation_field(key) or key.startswith("teacher.") else ["sft", "distill"]
    found += ["generate"] if key in SAMPLING else []
    built = ", and to models built from a teacher (layers:4, width:0.5)" if key in _FINE_TUNING_TEACHER_FIELDS else ""
    return _join_values(tuple(f"`distillm {verb}`" for verb in found)) + built


def _command_line_form(key: str, value: Any, command: str) -> str:
    flag = flag_of(key, command)
    return f"{flag} {_format_word(value)}" if flag else f"--set {key}={_format_word(value)}"


def describe_users(key: str) -> str:
    """Describe the runs that use the field: "skl and srkl (method distillm)", "akl", "data.source builtin"."""
    found = []
    for alternative in _alternatives(key):
        (deciding_key, values), *more = alternative.items()
        listed = [] if isinstance(values, Condition) else values  # a condition such as "above 0" is met by most methods
        methods = [name for name, m in METHODS.items() if m.preset.get(deciding_key) in listed and name not in listed]
        prefix = "" if deciding_key in _SELF_EXPLANATORY else f"{deciding_key} "
        further = [f" with {k.rpartition('.')[2]} {_join_values(others, 'or')}" for k, others in more]
        found.append(prefix + _join_values(values) + "".join(further))
        if methods and len(listed) < 3:
            found[-1] += f" ({'method' if len(methods) == 1 else 'methods'} {', '.join(methods)})"
    return ", and to ".join(found)


def describe_objective(objective: ObjectiveConfig) -> str:
    """Describe an objective in a few words: "skl α=0.1", "amid a=0.5 λ=0.1 divergence=kl from=teacher"."""
    if objective.kd_weight == 0:
        return "cross-entropy"
    recipe, name = Recipe(objective=objective), objective.divergence
    values = [name]
    for key in parameters(lambda k: value_of(recipe, k)):
        section, _, field = key.partition(".")
        if section == "objective":
            symbol, value = field.removeprefix(f"{name}_"), getattr(objective, field)
            values.append(
                f"{_SYMBOLS.get(symbol, symbol)}={value:g}" if isinstance(value, float) else f"{symbol}={value}"
            )
    return " ".join(values) + (f", kd_weight {objective.kd_weight:g}" if objective.kd_weight < 1 else "")


def _is_distillation_field(key: str) -> bool:
    """Return whether the field, or a field of its condition, is in a section that fine-tuning does not use."""
    deciding_keys = chain.from_iterable(_alternatives(key))
    return key not in _FINE_TUNING_FIELDS and any(
        name.startswith(_DISTILLATION_SECTIONS) for name in (key, *deciding_keys)
    )


def _is_unused_teacher_field(key: str, value: ValueOf) -> bool:
    """Return whether the field describes a teacher and the run is fine-tuning that builds no student from it."""
    if not key.startswith("teacher.") or not _is_fine_tuning(value):
        return False
    return key not in _FINE_TUNING_TEACHER_FIELDS or not is_built(value("student.path"))


def _is_unused_by_embeddings(key: str, value: ValueOf) -> bool:
    """Return whether the run trains sentence embeddings, and the field is of models of tokens."""
    if not value("disco.enabled"):
        return False
    return key not in _EMBEDDING_FIELDS and not key.startswith(_EMBEDDING_SECTIONS)


def _is_fine_tuning(value: ValueOf) -> bool:
    method = value("method")
    return isinstance(method, str) and method in METHODS and METHODS[method].verb == "sft"


def _join_values(values: Values, joint: str = "and") -> str:
    if isinstance(values, Condition):
        return values.description
    *others, last = map(_format_word, values)
    return f"{', '.join(others)} {joint} {last}" if others else last


def _format_word(word: Any) -> str:
    return word if isinstance(word, str) else format_value(word)
