"""Whose a parameter is: which runs read a field, and what to say where one that is not read was given by hand.

The schema says it beside each field (``fields.ReadWhen``); methods with those values are looked up in ``methods.METHODS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distillm_cli.config.explain import leaves, shown
from distillm_cli.config.fields import ReadWhen, Such, Values
from distillm_cli.config.layers import Given
from distillm_cli.config.methods import METHODS
from distillm_cli.config.schema import Objective, Recipe, Section
from distillm_cli.config.shortcuts import flag_of
from distillm_cli.errors import RecipeError

ValueOf = Callable[[str], Any]  # dotted key → its value in some recipe

_OF_DISTILLATION = ("objective.", "schedule.")  # sections of which fine-tuning (verb sft) reads nothing
_OF_TRAINING = (*_OF_DISTILLATION, "train.", "rollout.")  # of which verbs that train nothing read these fields alone
SAMPLING = ("rollout.temperature", "rollout.top_p", "rollout.top_k", "rollout.max_new_tokens", "train.seed")
_WHERE = ("train.device", "train.threads")
_READ_WITHOUT_TRAINING = {"generate": (*SAMPLING, *_WHERE), "eval": _WHERE}
_NAMED_BY_WORD = ("objective.divergence", "schedule.kind")  # whose words are names that stand for themselves
_SYMBOLS = {"alpha": "α", "beta": "β", "lambda": "λ", "mu": "μ", "start": "t₀"}


def value_of(section: Section, key: str) -> Any:
    """The value at a dotted key."""
    for name in key.split("."):
        section = getattr(section, name)
    return section


def condition(key: str) -> ReadWhen | None:
    """What decides whether a run reads the field; None where every run does."""
    return next((part for part in leaves()[key].metadata if isinstance(part, ReadWhen)), None)


def trains(command: str) -> bool:
    """Whether the verb trains, and so reads what training reads."""
    return command not in _READ_WITHOUT_TRAINING


def is_of_training_alone(key: str, command: str) -> bool:
    """Whether the field says how to train, to a verb that does not and reads nothing of it."""
    return key.startswith(_OF_TRAINING) and key not in _READ_WITHOUT_TRAINING.get(command, (key,))


def is_read(key: str, value: ValueOf) -> bool:
    """Whether a run with these values reads the field."""
    if _is_of_distillation(key) and _is_fine_tuning(value):
        return False
    when = condition(key)
    return when is None or any(not _missing(way, value) for way in when.ways)


def _missing(way: Mapping[str, Values], value: ValueOf) -> dict[str, Values]:
    """What would have to change for this way to lead to the field: deciders, and the values they must have."""
    found = {}
    for decider, words in way.items():
        if value(decider) not in words:
            found[decider] = words
        if condition(decider) is not None:
            found |= min((_missing(other, value) for other in condition(decider).ways), key=len) | found
    return found


def parameters(value: ValueOf) -> list[str]:
    """The fields that a run with these values reads and others do not, in the schema's order."""
    return [key for key in leaves() if (when := condition(key)) and when.of_method and is_read(key, value)]


def misplaced(key: str, given: Given, value: ValueOf, command: str) -> RecipeError:
    """The error for a value, given by hand, that the run never reads: whose it is, and what this run is instead."""
    what, method = f"{given.place} = {shown(given.value)}", value("method")
    it = "it" if key in given.place else key
    distills = _is_of_distillation(key)
    if not trains(command):
        verbs = "`distillm distill`" if distills else "`distillm sft` and `distillm distill`"
        return RecipeError(what, where=f"{it} belongs to {verbs}; {command} trains nothing", hint="leave it out")
    if distills and _is_fine_tuning(value):
        where = f"{it} belongs to `distillm distill`; {method} trains on cross-entropy alone"
        return RecipeError(what, where=where, hint="leave it out")
    ways = [_missing(way, value) for way in condition(key).ways]
    here = " and ".join(f"{k} is {_said(value(k))}" for k in dict.fromkeys(next(iter(lacks)) for lacks in ways))
    where = f"{it} belongs to {owners(key)}, and here {here}" + (f" (method {method})" if distills else "")
    nearest = min(ways, key=len)
    other = " ".join(_typed(decider, next(iter(words)), command) for decider, words in nearest.items())
    mine = [k for k in parameters(value) if set(condition(k).ways[0]) == {"objective.divergence"}]
    instead = f"{value('objective.divergence')} reads {', '.join(mine)}; " if "objective.divergence" in nearest else ""
    return RecipeError(what, where=where, hint=f"{instead if mine else ''}leave it out, or try {other}")


def _typed(key: str, value: Any, command: str) -> str:
    flag = flag_of(key, command)
    return f"{flag} {_said(value)}" if flag else f"--set {key}={_said(value)}"


def owners(key: str) -> str:
    """Whose the field is: "skl and srkl (method distillm)", "mixed (method gkd)", "akl", "data.source builtin"."""
    told = []
    for way in condition(key).ways:
        (decider, words), *more = way.items()
        named = [] if isinstance(words, Such) else words  # what is told by a test is most methods' anyway
        methods = [name for name, m in METHODS.items() if m.preset.get(decider) in named and name not in named]
        whose = "" if decider in _NAMED_BY_WORD else f"{decider} "
        told.append(
            whose + _listed(words) + "".join(f" with {k.rpartition('.')[2]} {_listed(w, 'or')}" for k, w in more)
        )
        if methods and len(named) < 3:
            told[-1] += f" ({'method' if len(methods) == 1 else 'methods'} {', '.join(methods)})"
    return ", and to ".join(told)


def objective_words(objective: Objective) -> str:
    """The objective of a recipe in a few words: "skl α=0.1", "amid a=0.5 λ=0.1 divergence=kl from=teacher"."""
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
    """Whether the field, or what decides on it, is of the sections that fine-tuning does without."""
    when = condition(key)
    deciders = [] if when is None else [decider for way in when.ways for decider in way]
    return any(name.startswith(_OF_DISTILLATION) for name in (key, *deciders))


def _is_fine_tuning(value: ValueOf) -> bool:
    method = value("method")
    return isinstance(method, str) and method in METHODS and METHODS[method].verb == "sft"


def _listed(words: Values, joint: str = "and") -> str:
    if isinstance(words, Such):
        return words.said
    *others, last = map(_said, words)
    return f"{', '.join(others)} {joint} {last}" if others else last


def _said(word: Any) -> str:
    return word if isinstance(word, str) else shown(word)
