"""Check how a command is used, and turn the parser's errors into errors of one line with a hint."""

from __future__ import annotations

import re
from contextlib import suppress
from difflib import get_close_matches
from itertools import takewhile
from typing import Any

import typer

from distillm_cli.config.shortcuts import FIELD_FLAGS, SAMPLING_VERBS, TRAINING_VERBS, Flag, field_flags, flag_of
from distillm_cli.errors import UsageError

# Newer versions of typer have their own copy of click, older ones import it. Get the base class from what both export.
UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]


# Names of commands and flags in other programs, with a hint for each.
_FAMILIAR_COMMANDS = {
    "help": "try `distillm --help`, or `distillm COMMAND --help`",
    "version": "try `distillm --version`",
    "train": "try `distillm sft` or `distillm distill`",
    "finetune": "try `distillm sft`",
    "fine-tune": "try `distillm sft`",
    "evaluate": "try `distillm eval`",
    "predict": "try `distillm generate`",
    "infer": "try `distillm generate`",
    "ls": "try `distillm recipes ls` or `distillm methods`",
    "info": "try `distillm env`",
    "doctor": "try `distillm env`",
}
_FAMILIAR_FLAGS = {
    "-o": "did you mean --output?",
    "--output-dir": "did you mean --output?",
    "-V": "did you mean --version?",
    "-v": "did you mean --version?",
    "--config": "did you mean --recipe?",
    "-c": "did you mean --recipe?",
    "--report-to": "did you mean --track?",
    "--logging-dir": "every run writes its metrics to metrics.jsonl in the output directory",
    "--resume-from-checkpoint": "did you mean --resume?",
    "--overwrite-output-dir": "did you mean --overwrite?",
    "--verbose": "progress is printed unless --quiet is given; --debug adds tracebacks",
}


def check_sampling_inputs(
    verb: str, models: list[str], sources: list[str], recipe: str | None, flags: dict[str, Flag], sets: list[str] | None
) -> None:
    """Raise the error for a model, a data source or a setting that cannot be used, before torch is imported.

    Checks that need the model's recipe, or the rows, follow later.
    """
    from distillm_cli.config.load import resolve
    from distillm_cli.config.suite_file import LM_EVAL, read_suite_file, suite_path
    from distillm_cli.data.locations import find_source, is_path
    from distillm_cli.models.model_paths import locate_model
    from distillm_cli.training.events import silent

    resolve(command=verb, recipe=recipe, flags=flags, sets=sets)
    for model in models:
        locate_model(model)
    for source in sources:
        file = suite_path(source) if verb == "eval" else None
        source = source if file is None else read_suite_file(file).source
        if is_path(source) and not source.startswith(LM_EVAL):
            find_source(source, silent)


def explained(problem: Any, argv: list[str]) -> UsageError:
    """Return a parser's exception as a UsageError. The default hint names the command's help."""
    context: Any = getattr(problem, "ctx", None)
    words = takewhile(lambda word: not word.startswith("-"), argv)
    path = context.command_path if context is not None else " ".join(["distillm", *words][:2])
    flag, message = getattr(problem, "option_name", None), " ".join(problem.format_message().split())
    see = f"see `{path} --help`"

    if flag is not None and hasattr(problem, "possibilities"):
        hint = _FAMILIAR_FLAGS.get(flag) or _suggestion(flag, context) or see
        return UsageError("usage.unknown_option", f"{path} has no flag {flag}", hint=hint)
    if found := re.match(r"Got unexpected extra argument\(?s?\)? \(([^\s)]+)", message):
        return UsageError(
            "usage.unexpected_argument",
            f"{path} takes no argument {found[1]}",
            hint=_argument_hint(path, found[1]) or see,
        )
    if flag is not None and "requires an argument" in message:
        return _with_field(UsageError("usage.missing_value", f"{flag} without a value", hint=see), flag, None, path)
    if found := re.match(r"No such command '(.*?)'", message):
        names = list(context.command.commands)
        close = get_close_matches(found[1], names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(names)}"
        if context.parent is None:
            hint = _FAMILIAR_COMMANDS.get(found[1]) or _recipe_hint(found[1]) or hint
        return UsageError("usage.unknown_command", f"{path} has no command {found[1]}", hint=hint)

    parameter = getattr(problem, "param", None)
    if parameter is not None and parameter.param_type_name == "option":
        raw = _typed_value(parameter.opts, argv)
        if raw is not None:
            flag = max(parameter.opts, key=len)
            plain = UsageError("usage.invalid_value", f"{flag} = {raw}", where=_clause(problem.message), hint=see)
            return _with_field(plain, flag, raw, path)
    return UsageError("usage.invalid_option", _clause(message), hint=see)


def _with_field(plain: UsageError, flag: str, raw: str | None, path: str) -> UsageError:
    """Return the error with the expected values of the recipe's field and a hint, if the flag sets a field."""
    from distillm_cli.config.explain import expected_values, suggest_fix

    verb = path.split()[-1]
    keys = next((entry.keys for entry in field_flags(verb) if entry.flag == flag), None)
    if keys is None:
        return plain
    value: Any = raw
    if raw is not None:
        with suppress(ValueError):
            value = float(raw)
    hint = suggest_fix(keys[0], value, verb, flag)
    return UsageError(plain.code, plain.what, where=f"expected {expected_values(keys[0], by_flag=True)}", hint=hint)


def _clause(message: str) -> str:
    """Return a parser's sentence as a clause: one line, no full stop, no capital at the start."""
    text = " ".join(message.split()).rstrip(".")
    return text[:1].lower() + text[1:]


def _suggestion(flag: str, context: Any) -> str | None:
    """Return the flag of this command for the same field, the nearest flag, or a --set for a field of this name."""
    from distillm_cli.config.explain import ALIASES, leaves

    flags = {opt.lstrip("-"): opt for param in context.command.params for opt in param.opts if opt.startswith("--")}
    bare = flag.lstrip("-")
    name = bare.replace("-", "_")
    verb = context.command_path.split()[-1]
    name = ALIASES.get(name, name)
    fields = [key for key in leaves() if name in (key, key.rpartition(".")[2])]
    similar_verbs = TRAINING_VERBS if verb in TRAINING_VERBS else SAMPLING_VERBS
    entries = [entry for entry in FIELD_FLAGS if entry.name == name]  # including those of other commands
    keys = [key for entry in entries if set(entry.verbs) & set(similar_verbs) for key in entry.keys]
    fields = [*keys, *fields, *(key for entry in entries for key in entry.keys)]
    if fields and entries and flag_of(fields[0], verb) in flags.values():
        return f"did you mean {flag_of(fields[0], verb)}?"
    close = get_close_matches(bare, flags, n=1, cutoff=0.75 if fields else 0.6)
    if close:
        return f"did you mean {flags[close[0]]}?"
    return f"try --set {fields[0]}=VALUE" if fields and "set" in flags else None


def _recipe_hint(word: str) -> str | None:
    """Return the command that runs a shipped recipe; None for another word."""
    from distillm_cli.config.load import shipped
    from distillm_cli.config.pipeline_recipe import is_pipeline

    if word not in shipped():
        return None
    return f"{word} is a recipe: {_recipe_command(word, is_pipeline(word))}"


def _recipe_command(name: str, has_stages: bool) -> str:
    if has_stages:
        return f"try `distillm run {name}`"
    from distillm_cli.config.load import resolve

    verb = "sft" if resolve(command="", recipe=name).recipe.method == "sft" else "distill"
    return f"try `distillm {verb} --recipe {name}`"


def _argument_hint(path: str, word: str) -> str | None:
    """Return a hint for an argument of a command that takes none: a recipe, a file or a model."""
    verb = path.split()[-1]
    if (hint := _recipe_hint(word)) is not None:
        return hint
    if word.endswith((".yaml", ".yml")) and verb in (*TRAINING_VERBS, *SAMPLING_VERBS):
        return f"try --recipe {word}"
    if verb in ("generate", "sft"):
        return f"try --model {word}"
    return None


def _typed_value(names: list[str], argv: list[str]) -> str | None:
    """Return the last value that was typed for a flag, as ``--flag value`` or ``--flag=value``; None without one."""
    value = None
    for position, word in enumerate(argv):
        if word == "--":
            break
        if word in names and position + 1 < len(argv):
            value = argv[position + 1]
        elif (match := re.match(r"(--[\w-]+)=(.*)", word, re.DOTALL)) and match[1] in names:
            value = match[2]
    return value
