"""Check that every name in a registry or the schema is in the help of its commands and in the documentation."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from distillm_cli import plugins
from distillm_cli.cli.app import main
from distillm_cli.config.explain import choices, format_value, leaves
from distillm_cli.config.shortcuts import ALL_VERBS, field_flags
from distillm_cli.data.known import dataset_names

ROOT = Path(__file__).resolve().parents[2]
REGISTRIES = {
    "methods": (lambda: list(plugins.methods), ("distill", "plan")),
    "divergences": (lambda: list(plugins.divergences), ("distill", "plan")),
    "schedules": (lambda: choices("schedule.kind"), ("distill", "plan")),
    "metrics": (lambda: list(plugins.metrics), ("eval",)),
    "data sets": (dataset_names, ("sft", "distill", "plan", "eval")),
}


@pytest.fixture
def help_of(capfd, monkeypatch):
    """Return a function that gives the help of a command as words separated by spaces, without frames."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(verb: str) -> str:
        assert main([verb, "--help"]) == 0
        sys.stdout.flush()
        return " ".join(re.sub("[│╭╮╰╯─]", " ", capfd.readouterr().out).split())

    return call


def words_of(text: str) -> set[str]:
    return set(re.split(r"[\s,`|]+|\.\s", text))


@pytest.mark.parametrize("registry", REGISTRIES)
def test_help_lists_every_registry_entry(registry, help_of):
    entries, verbs = REGISTRIES[registry]
    assert entries()
    for verb in verbs:
        others = {"sft"} if (registry, verb) == ("methods", "distill") else set()  # sft belongs to another command
        assert set(entries()) - others <= words_of(help_of(verb)), verb


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_help_shows_the_default_of_every_field(verb, help_of):
    text = help_of(verb)
    for entry in field_flags(verb):
        _, _, rest = text.partition(f" {entry.flag} {entry.metavar}")
        shown = re.split(r" --[a-z]", rest.removeprefix(entry.off or ""))[0]
        field = leaves()[entry.keys[0]]
        if entry.off is not None:
            assert f"[default: {entry.off.removeprefix('--')}]" in text
        elif field.default is False or field.default in (None, ()):
            assert "[default:" not in shown, entry.flag
        else:
            assert f"[default: {format_value(field.default, by_flag=True)}]" in shown, entry.flag


@pytest.mark.parametrize("registry", REGISTRIES)
def test_reference_lists_every_registry_entry(registry):
    entries, _ = REGISTRIES[registry]
    assert set(entries()) <= words_of((ROOT / "docs" / "reference.md").read_text(encoding="utf-8"))


def test_reference_is_up_to_date():
    path = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = "\n".join(module.page()).rstrip() + "\n"
    assert page == (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), (
        "run python docs/make_reference.py > docs/reference.md"
    )


def test_number_flags_accept_auto(capfd):
    assert main(["distill", "--recipe", "quickstart", "--lr", "auto", "--epochs", "2.5", "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^  lr: 0\.\d+ +# auto", out, re.MULTILINE), "fitted to the models"
    assert re.search(r"^  epochs: 2\.5 +# --epochs", out, re.MULTILINE)
