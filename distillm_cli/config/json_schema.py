"""Generate the JSON Schema of recipes and pipelines from the models, for editors and other programs."""

from __future__ import annotations

from typing import Any

from distillm_cli.config.explain import choices, leaves, takes_list
from distillm_cli.config.pipeline_recipe import STAGE_KEYS
from distillm_cli.config.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"
STAGE_NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """Return the JSON Schema of a recipe file: sections, or a pipeline with ``defaults`` and ``stages``.

    It holds descriptions, defaults, bounds and choices, those of plug-ins included. Which fields a run uses, and rules over
    several fields, are checked by ``distillm recipes validate`` alone.
    """
    generated = Recipe.model_json_schema()
    definitions = generated.pop("$defs")
    written = {name: _section(schema, definitions, name) for name, schema in generated["properties"].items()}
    sections = {name: {"$ref": f"#/$defs/{name}"} for name in written}
    recipe = {"type": "object", "properties": sections, "additionalProperties": False}
    stages = {verb: _stage(verb, sections) for verb in STAGE_KEYS}
    stage = {
        "type": "object",
        "required": ["verb"],
        "properties": {"verb": {"enum": list(stages), "description": "The command that the stage runs."}},
        "allOf": [
            {
                "if": {"required": ["verb"], "properties": {"verb": {"const": verb}}},
                "then": {"$ref": f"#/$defs/{verb}_stage"},
            }
            for verb in stages
        ],
    }
    pipeline = {
        "type": "object",
        "required": ["stages"],
        "properties": {
            "defaults": {
                "type": ["object", "null"],
                "description": "Sections of a recipe that all stages share.",
                "properties": {name: section for name, section in sections.items() if name != "method"},
                "additionalProperties": False,
            },
            "stages": {
                "type": "object",
                "description": "Stages by name, run in this order.",
                "minProperties": 1,
                "patternProperties": {STAGE_NAME: {"$ref": "#/$defs/stage"}},
                "additionalProperties": False,
            },
        },
        "additionalProperties": False,
    }
    return {
        "$schema": DIALECT,
        "title": "distillm recipe",
        "description": "A recipe of distillm, or a pipeline of stages for distillm run.",
        "if": {"required": ["stages"]},
        "then": {"$ref": "#/$defs/pipeline"},
        "else": {"$ref": "#/$defs/recipe"},
        "$defs": {
            "recipe": recipe,
            "pipeline": pipeline,
            "stage": stage,
            **{f"{verb}_stage": schema for verb, schema in stages.items()},
            **written,
        },
    }


def _stage(verb: str, sections: dict[str, Schema]) -> Schema:
    """Return the schema of a stage: its own keys beside the sections of a recipe."""
    generated = STAGE_KEYS[verb].model_json_schema()
    own = {name: _value(schema, {}) for name, schema in generated["properties"].items()}
    own["verb"] = {"const": verb}
    for name, schema in own.items():
        if schema.get("type") == "array":
            own[name] = _list_or_item(schema)
    return {
        "type": "object",
        "required": generated["required"],
        "properties": {**own, **sections},
        "additionalProperties": False,
    }


def _section(schema: Schema, definitions: dict[str, Schema], key: str) -> Schema:
    """Return a section, or a field, without references."""
    if key in leaves():
        found = _value(schema, definitions)
        if takes_list(key):
            found = _list_or_item(found)
        if found.get("type") == "string" and choices(key):
            found["enum"] = choices(key)
        return found
    members = [_resolved(part, definitions) for part in schema.get("oneOf", schema.get("anyOf", [schema]))]
    whole = _merged(members) if len(members) > 1 else members[0]
    return {
        "type": "object",
        "description": " ".join(schema.get("description", whole.get("description", "")).split("\n\n")[0].split()),
        "properties": {
            name: _section(part, definitions, f"{key}.{name}") for name, part in whole["properties"].items()
        },
        "additionalProperties": False,
    }


def _resolved(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """Return what a reference stands for, with what is written beside it."""
    if "$ref" not in schema:
        return schema
    beside = {name: part for name, part in schema.items() if name != "$ref"}
    return definitions[schema["$ref"].rpartition("/")[2]] | beside


def _merged(members: list[Schema]) -> Schema:
    """Return one section with the fields of all members of a union. The field that decides between them takes all tags."""
    names = dict.fromkeys(name for member in members for name in member["properties"])
    tag = next(name for name in names if all("const" in member["properties"].get(name, {}) for member in members))
    tags = [member["properties"][tag]["const"] for member in members]
    properties = {}
    for name in names:
        holders = {
            value: member["properties"][name]
            for value, member in zip(tags, members, strict=True)
            if name in member["properties"]
        }
        variants = []
        for part in holders.values():
            if part not in variants:
                variants.append(part)
        part = dict(variants[0]) if len(variants) == 1 else {"anyOf": variants, **_annotations(variants[0])}
        if len(holders) < len(members):
            part["description"] = f"{part.get('description', '')} Used with {tag} {', '.join(holders)}.".strip()
        properties[name] = part
    properties[tag] = {"type": "string", **_annotations(members[0]["properties"][tag]), "enum": tags}
    return {"properties": properties, **_annotations(members[0])}


def _annotations(schema: Schema) -> Schema:
    return {name: schema[name] for name in ("description", "default") if name in schema}


def _value(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """Return the schema of a value without titles and references."""
    found = {}
    for name, part in _resolved(schema, definitions).items():
        if name == "title" and isinstance(part, str):
            continue
        if name in ("anyOf", "oneOf", "prefixItems"):
            part = [_value(option, definitions) for option in part]
        elif name == "items":
            part = _value(part, definitions)
        found["anyOf" if name == "oneOf" else name] = part
    return found


def _list_or_item(schema: Schema) -> Schema:
    """Return a list that may be given as its only item: ``suites: dolly`` is ``suites: [dolly]``."""
    arrays = [part for part in schema.get("anyOf", [schema]) if part.get("type") == "array"]
    if "items" not in arrays[0]:
        return schema  # of a fixed length
    others = [part for part in schema.get("anyOf", []) if part.get("type") != "array"]
    bare = {name: part for name, part in arrays[0].items() if name not in ("description", "default")}
    return {"anyOf": [bare, arrays[0]["items"], *others], **_annotations(schema)}
