"""Generate the JSON Schema of recipes and pipelines from the models, for editors and other programs."""

from __future__ import annotations

from typing import Any

from distillm_cli.config.explain import choices, leaves, section_keys, takes_list, union_of
from distillm_cli.config.fields import Section, TaggedUnion
from distillm_cli.config.pipeline_recipe import STAGE_CONFIGS
from distillm_cli.config.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"
STAGE_NAME = r"^[A-Za-z][A-Za-z0-9_-]*$"

Schema = dict[str, Any]


def recipe_schema() -> Schema:
    """Return the JSON Schema of a recipe file: sections, or a pipeline with ``defaults`` and ``stages``.

    It holds descriptions, defaults, bounds and choices, including those of plug-ins. ``distillm recipes validate`` also
    checks which fields a run uses and rules over several fields.
    """
    generated = Recipe.model_json_schema()
    definitions = generated.pop("$defs")
    written = {name: _section(schema, definitions, name) for name, schema in generated["properties"].items()}
    references = {name: {"$ref": f"#/$defs/{name}"} for name in written}
    recipe = {"type": "object", "properties": references, "additionalProperties": False}
    stages = {verb: _stage(verb, references) for verb in STAGE_CONFIGS}
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
                "properties": {name: part for name, part in references.items() if name != "method"},
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


def _stage(verb: str, references: dict[str, Schema]) -> Schema:
    """Return the schema of a stage: its own keys and the sections of a recipe."""
    generated = STAGE_CONFIGS[verb].model_json_schema()
    own = {name: _value(schema, {}) for name, schema in generated["properties"].items()}
    own["verb"] = {"const": verb}
    for name, schema in own.items():
        if schema.get("type") == "array":
            own[name] = _list_or_item(schema)
    return {
        "type": "object",
        "required": generated["required"],
        "properties": {**own, **references},
        "additionalProperties": False,
    }


def _section(schema: Schema, definitions: dict[str, Schema], key: str) -> Schema:
    """Return the schema of a section or field without references."""
    if key in leaves():
        found = _value(schema, definitions)
        if takes_list(key):
            found = _list_or_item(found)
        if found.get("type") == "string" and choices(key):
            found["enum"] = choices(key)
        return found
    union = union_of(Recipe.model_fields[key]) if key in Recipe.model_fields else None
    whole = _resolved(schema, definitions) if union is None else _merged(schema, definitions, union)
    return {
        "type": "object",
        "description": " ".join(whole["description"].split("\n\n")[0].split()),
        "properties": {
            name: _section(whole["properties"][name], definitions, f"{key}.{name}") for name in section_keys()[key]
        },
        "additionalProperties": False,
    }


def _resolved(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """Resolve a reference and add the keys that are written next to it."""
    if "$ref" not in schema:
        return schema
    siblings = {name: part for name, part in schema.items() if name != "$ref"}
    return definitions[schema["$ref"].rpartition("/")[2]] | siblings


def _merged(schema: Schema, definitions: dict[str, Schema], union: TaggedUnion[Section]) -> Schema:
    """Merge the members of a union into one section with the fields of all."""
    members = dict(zip(union.members, (_resolved(part, definitions) for part in schema["oneOf"]), strict=True))
    properties = {}
    for name in union.names():
        holders = {tag: members[tag]["properties"][name] for tag in union.fields(name)}
        variants = [part for i, part in enumerate(holders.values()) if part not in list(holders.values())[:i]]
        part = variants[0] if len(variants) == 1 else {"anyOf": variants, **_annotations(variants[0])}
        if len(holders) < len(members):
            meaning = part.get("description", "").rstrip(".")
            part = part | {"description": f"{meaning}. Used with {union.tag} {', '.join(holders)}."}
        properties[name] = part
    tag = union.base.model_fields[union.tag]
    properties[union.tag] = {
        "type": "string",
        "description": tag.description,
        "default": union.default,
        "enum": list(members),
    }
    return {"description": union.base.__doc__, "properties": properties}


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
        elif name == "properties":
            part = {key: _value(schema, definitions) for key, schema in part.items()}
        found["anyOf" if name == "oneOf" else name] = part
    return found


def _list_or_item(schema: Schema) -> Schema:
    """Allow a list of one item to be given as that item: ``suites: dolly`` is ``suites: [dolly]``."""
    arrays = [part for part in schema.get("anyOf", [schema]) if part.get("type") == "array"]
    if "items" not in arrays[0]:
        return schema  # of a fixed length
    others = [part for part in schema.get("anyOf", []) if part.get("type") != "array"]
    items = arrays[0]["items"]
    if "properties" in items:  # a section, for which a text is its required field
        (required,) = items["required"]
        arrays[0] = arrays[0] | {"items": {"anyOf": [items["properties"][required], items]}}
    bare = {name: part for name, part in arrays[0].items() if name not in ("description", "default")}
    return {"anyOf": [bare, arrays[0]["items"], *others], **_annotations(schema)}
