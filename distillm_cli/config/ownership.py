"""Decide which runs use a field, and describe the error for a value that was given and is not used.

The conditions are those of the schema (``explain.condition``); methods with their values are looked up in ``METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distillm_cli.config.explain import condition, leaves, shown
from distillm_cli.config.fields import Condition, Values
from distillm_cli.config.merging import Given
from distillm_cli.config.methods import METHODS
from distillm_cli.config.schema import EvalConfig, ObjectiveConfig, Recipe, Section
from distillm_cli.config.shortcuts import flag_of
from distillm_cli.config.student_spec import is_built
from distillm_cli.errors import RecipeError

ValueOf = Callable[[str], Any]  # dotted key → its value in a recipe

_OF_DISTILLATION = ("objective.", "schedule.")  # sections of which fine-tuning uses nothing but _OF_TRAINING
_OF_TRAINING = ("objective.router_aux",)
SAMPLING = ("rollout.temperature", "rollout.top_p", "rollout.top_k", "rollout.max_new_tokens", "train.seed")
_BUILDS_AFTER = ("teacher.path", "teacher.dtype", "teacher.revision")  # what fine-tuning uses of a teacher, if anything

# What commands that do not train use: how rows are read and written, and the device. Flags and ``--set`` of other fields are
# refused there.
_ASKING = (
    "train.device", "train.threads", "student.dtype", "data.template", "data.skip_bad_rows", "data.seed", "data.tasks",
    "data.columns.prompt", "data.columns.input", "data.columns.response",
    "data.chat_template", "data.chat_template_kwargs", "data.tools", "data.documents", "data.date",
    "data.special_tokens_in_text", "data.source_language", "data.target_language",
)  # fmt: skip
_READ_WITHOUT_TRAINING = {
    "generate": (*_ASKING, *SAMPLING, "eval.batch_size", "data.size", "data.valid_limit"),
    "eval": (*_ASKING, *(f"eval.{name}" for name in EvalConfig.model_fields if name != "report_rows")),
}
_OF_HELD_OUT = ("data.source", "data.valid", "data.valid_limit")  # which `eval` scores on where no suite is named
_OF_A_STAGE = {"generate": ("data.source", "data.limit")}  # in a pipeline, where --data and --limit are no flags
_INSTEAD = {
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
_NAMED_BY_WORD = ("objective.divergence", "schedule.kind")  # whose words are names that stand for themselves
_SYMBOLS = {"alpha": "α", "beta": "β", "lambda": "λ", "mu": "μ", "start": "t₀"}


def has(section: Section, key: str) -> bool:
    """Return whether a recipe has the dotted key: of a union, only those of its member."""
    *parents, name = key.split(".")
    for parent in parents:
        section = getattr(section, parent)
    return name in type(section).model_fields


def value_of(section: Section, key: str) -> Any:
    """Return the value at a dotted key, and the default of a key that this recipe's objective or schedule does not have."""
    if not has(section, key):
        return leaves()[key].default
    for name in key.split("."):
        section = getattr(section, name)
    return section


def trains(command: str) -> bool:
    """Return whether the command trains, and so uses what training uses."""
    return command not in _READ_WITHOUT_TRAINING


def is_read_without_training(key: str, given: Given, value: ValueOf, command: str) -> bool:
    """Return whether a command that does not train uses the field."""
    if key in _OF_HELD_OUT and command == "eval":
        return not value("eval.suites")
    return key in _READ_WITHOUT_TRAINING[command] or (bool(given.at) and key in _OF_A_STAGE.get(command, ()))


def is_read(key: str, value: ValueOf) -> bool:
    """Return whether a run with these values uses the field."""
    if _is_of_distillation(key) and _is_fine_tuning(value):
        return False
    if _is_of_no_teacher(key, value):
        return False
    when = condition(key)
    return when is None or any(not _changes_for(way, value) for way in when.ways)


def is_general(key: str, value: ValueOf) -> bool:
    """Return whether a recipe may have the field for other commands too: what `generate` samples with, and a teacher."""
    return key in (*SAMPLING, "rollout.bulk") or _is_of_no_teacher(key, value)


def _changes_for(way: Mapping[str, Values], value: ValueOf) -> dict[str, Values]:
    """Return what would have to change for a field to be used in this way: keys, and the values they must have."""
    found = {}
    for decider, words in way.items():
        if value(decider) not in words:
            found[decider] = words
        if condition(decider) is not None:
            found |= min((_changes_for(other, value) for other in condition(decider).ways), key=len) | found
    return found


def parameters(value: ValueOf) -> list[str]:
    """Return the fields that a run with these values uses and others do not, in the schema's order."""
    return [key for key in leaves() if (when := condition(key)) and when.of_method and is_read(key, value)]


def misplaced(key: str, given: Given, value: ValueOf, command: str) -> RecipeError:
    """Return the error for a given value that the run does not use: who uses it, and what this run is instead."""
    what, method = f"{given.place} = {shown(given.value)}", value("method")
    it = "it" if key in given.place else key
    distills = _is_of_distillation(key)
    if not trains(command):
        other = None if given.at else _INSTEAD[command].get(key)
        hint = f"leave it out, or try {other}" if other else "leave it out"
        if key in _OF_HELD_OUT and command == "eval":
            where = f"{it} is of held-out rows, and here eval.suites is {shown(value('eval.suites'))}"
        else:
            where = f"{it} belongs to {_verbs(key)}; {command} trains nothing"
        return RecipeError(what, where=where, hint=hint)
    if _is_fine_tuning(value) and (distills or _is_of_no_teacher(key, value)):
        where = f"{it} belongs to {_verbs(key)}; {method} trains on cross-entropy alone"
        return RecipeError(what, where=where, hint="leave it out")
    ways = [_changes_for(way, value) for way in condition(key).ways]
    here = " and ".join(f"{k} is {_word(value(k))}" for k in dict.fromkeys(next(iter(lacks)) for lacks in ways))
    where = f"{it} belongs to {owners(key)}, and here {here}" + (f" (method {method})" if distills else "")
    nearest = min(ways, key=len)
    other = " ".join(_typed(decider, next(iter(words)), command) for decider, words in nearest.items())
    mine = [k for k in parameters(value) if set(condition(k).ways[0]) == {"objective.divergence"}]
    instead = f"{value('objective.divergence')} reads {', '.join(mine)}; " if "objective.divergence" in nearest else ""
    return RecipeError(what, where=where, hint=f"{instead if mine else ''}leave it out, or try {other}")


def _verbs(key: str) -> str:
    """Return the commands that use the field, for a message of one that does not."""
    if key in _READ_WITHOUT_TRAINING["eval"] and key.startswith("eval."):
        return "`distillm eval`"
    found = ["distill"] if _is_of_distillation(key) or key.startswith("teacher.") else ["sft", "distill"]
    found += ["generate"] if key in SAMPLING else []
    built = ", and to models built of a teacher (layers:4, width:0.5)" if key in _BUILDS_AFTER else ""
    return _listed(tuple(f"`distillm {verb}`" for verb in found)) + built


def _typed(key: str, value: Any, command: str) -> str:
    flag = flag_of(key, command)
    return f"{flag} {_word(value)}" if flag else f"--set {key}={_word(value)}"


def owners(key: str) -> str:
    """Return who uses the field: "skl and srkl (method distillm)", "mixed (method gkd)", "akl", "data.source builtin"."""
    found = []
    for way in condition(key).ways:
        (decider, words), *more = way.items()
        named = [] if isinstance(words, Condition) else words  # a test, such as "above 0", holds for most methods
        methods = [name for name, m in METHODS.items() if m.preset.get(decider) in named and name not in named]
        whose = "" if decider in _NAMED_BY_WORD else f"{decider} "
        found.append(
            whose + _listed(words) + "".join(f" with {k.rpartition('.')[2]} {_listed(w, 'or')}" for k, w in more)
        )
        if methods and len(named) < 3:
            found[-1] += f" ({'method' if len(methods) == 1 else 'methods'} {', '.join(methods)})"
    return ", and to ".join(found)


def objective_words(objective: ObjectiveConfig) -> str:
    """Return the objective of a recipe in a few words: "skl α=0.1", "amid a=0.5 λ=0.1 divergence=kl from=teacher"."""
    if objective.kd_weight == 0:
        return "cross-entropy"
    recipe, name = Recipe(objective=objective), objective.divergence
    words = [name]
    for key in parameters(lambda k: value_of(recipe, k)):
        section, _, field = key.partition(".")
        if section == "objective":
            short, value = field.removeprefix(f"{name}_"), getattr(objective, field)
            words.append(f"{_SYMBOLS.get(short, short)}={value:g}" if isinstance(value, float) else f"{short}={value}")
    return " ".join(words) + (f", kd_weight {objective.kd_weight:g}" if objective.kd_weight < 1 else "")


def _is_of_distillation(key: str) -> bool:
    """Return whether the field, or what decides on it, is in a section that fine-tuning does not use."""
    when = condition(key)
    deciders = [] if when is None else [decider for way in when.ways for decider in way]
    return key not in _OF_TRAINING and any(name.startswith(_OF_DISTILLATION) for name in (key, *deciders))


def _is_of_no_teacher(key: str, value: ValueOf) -> bool:
    """Return whether the field describes a teacher, in fine-tuning that builds no model from one."""
    if not key.startswith("teacher.") or not _is_fine_tuning(value):
        return False
    return key not in _BUILDS_AFTER or not is_built(value("student.path"))


def _is_fine_tuning(value: ValueOf) -> bool:
    method = value("method")
    return isinstance(method, str) and method in METHODS and METHODS[method].verb == "sft"


def _listed(words: Values, joint: str = "and") -> str:
    if isinstance(words, Condition):
        return words.description
    *others, last = map(_word, words)
    return f"{', '.join(others)} {joint} {last}" if others else last


def _word(word: Any) -> str:
    return word if isinstance(word, str) else shown(word)
