"""Test the JSON Schema of recipes: what it accepts and rejects, and that the shipped file is up to date."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from distillm_cli.cli.app import main
from distillm_cli.config import yaml_io
from distillm_cli.config.explain import choices, leaves
from distillm_cli.config.json_schema import recipe_schema
from distillm_cli.config.load import resolve, shipped, to_yaml
from distillm_cli.config.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = recipe_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def value_of(text: str):
    """Return a YAML text parsed as in recipes: ``5e-4`` is a number, ``off`` a string."""
    return yaml_io.node_value(yaml_io.compose(text, "recipe"), "recipe")


def problems(text: str) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(value_of(text))]


def test_schema_is_valid_draft_2020_12():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_shipped_schema_matches_the_command(capfd):
    assert main(["schema"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert out == (ROOT / "recipes" / "schema.json").read_text(encoding="utf-8"), (
        "update it with distillm schema > recipes/schema.json"
    )


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipe_names_the_schema_and_is_valid(name):
    text = shipped()[name].read_text(encoding="utf-8")
    assert "# yaml-language-server: $schema=schema.json" in text.splitlines()[:3]
    assert (shipped()[name].parent / "schema.json").is_file()
    assert problems(text) == []


@pytest.mark.parametrize("name", METHODS)
def test_resolved_recipe_is_valid(name):
    resolved = resolve(command=METHODS[name].verb, sets=[f"method={name}"])
    assert problems(to_yaml(resolved)) == []


def test_every_field_has_description_default_and_choices():
    for key, field in leaves().items():
        *sections, name = key.split(".")
        node = SCHEMA["$defs"]
        for section in sections:
            node = node[section] if node is SCHEMA["$defs"] else node["properties"][section]
        found = node[name] if not sections else node["properties"][name]
        assert field.description in found["description"], key
        default = json.loads(json.dumps(field.default))
        assert found["default"] == default, key
        assert all(f'"{word}"' in json.dumps(found) for word in choices(key)), key


@pytest.mark.parametrize(
    "text",
    [
        "objective: {alpha: 1.4}",
        "objective: {alhpa: 0.1}",
        "objective: {divergence: kll}",
        "method: distilm",
        "train: {lr: fast}",
        "train: {lr: 0}",
        "train: {batch_size: 3.5}",
        "train: {epochs: true}",
        "train: {betas: [0.9]}",
        "train: {select: rouge}",
        "train: 3",
        "train:",
        "trian: {}",
        "eval: {metrics: [rouge]}",
        "eval: {metrics: []}",
        "eval: {seeds: [true]}",
        "student: {lora: {rank: 4}}",
        "stages: {}",
        "stages: {a: {student: {path: gpt2}}}",
        "stages: {a: {verb: train, student: {path: gpt2}}}",
        "stages: {a: {verb: sft, models: [x]}}",
        "stages: {a: {verb: eval}}",
        "stages: {1a: {verb: sft}}",
        "{stages: {a: {verb: sft}}, train: {lr: 1e-3}}",
        "{stages: {a: {verb: sft}}, defaults: {method: kd}}",
    ],
)
def test_invalid_recipe_is_rejected(text):
    assert problems(text)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "train: {lr: auto, epochs: 1e1, eval_steps: epoch, save_steps: 50}",
        "train: {lr: 5e-4}",
        "schedule: {kind: off}",
        "eval: {suites: dolly, metrics: rouge_l, seeds: 3}",
        "eval: {suites: [dolly, a.jsonl]}",
        "student: {lora: {r: 16, targets: [q_proj]}}",
        "data: {chat_template_kwargs: {enable_thinking: false}, valid: null}",
        "objective: {divergence: akl, akl_mu: 0.3}",
        "stages: {a: {verb: sft, student: {path: gpt2}}, b: {verb: eval, models: stage:a}}",
        "stages: {a: {verb: generate, model: gpt2, n: 2, limit: 3}, b: {verb: eval, models: [gpt2]}}",
        "{defaults: , stages: {a: {verb: distill, recipe: quickstart}}}",
    ],
)
def test_valid_recipe_is_accepted(text):
    assert problems(text) == []
