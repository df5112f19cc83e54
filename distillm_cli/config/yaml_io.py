"""Read and write the YAML of recipes: strictly, safely, and so that it reads back the same.

Reading follows the scalars of YAML 1.2, while PyYAML follows 1.1: ``5e-4`` is a number, and ``off``, ``on``, ``yes`` and
``no`` are words (a schedule may be ``off``). Writing quotes text that either version would read as another type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from distillm_cli.errors import RecipeError

_TAG = "tag:yaml.org,2002:"
_NOUNS = {"bool": "boolean", "int": "integer", "float": "number"}
_INT = re.compile(r"[-+]?[0-9][0-9_]*$")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_SCALARS = (  # tag, pattern, first characters; the first match counts
    ("null", re.compile(r"~$|null$|Null$|NULL$|$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
)


class _Loader(yaml.SafeLoader):
    """Compose nodes without aliases. Only the reader and composer are used, so no tag constructs an object."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read in recipes", mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_section(dumper: yaml.SafeDumper, section: BaseModel) -> yaml.Node:
    return dumper.represent_dict(section.model_dump(exclude_defaults=True))


_Dumper.add_multi_representer(BaseModel, _represent_section)
_Loader.yaml_implicit_resolvers = {}  # without the base class's
for _name, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


def compose(text: str, label: str) -> yaml.Node | None:
    """Parse text into the document's root node; None if it is empty. ``label`` names the text in errors.

    Raises RecipeError with label:line for text that is not YAML, for a second document, and for aliases.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = location(label, mark.line + 1) if mark else label
        problem = " ".join(part for part in (error.context, error.problem) if part)
        hint = "indent with spaces, not tabs" if r"'\t'" in problem else None
        raise RecipeError("recipe.invalid_yaml", f"{place}: not a YAML document ({problem})", hint=hint) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            "recipe.invalid_yaml", f"{location(label, line)}: not a YAML document ({error.reason})"
        ) from None
    except RecursionError:
        raise RecipeError("recipe.invalid_yaml", f"{label}: nested too deeply for a recipe") from None
    finally:
        if loader is not None:
            loader.dispose()


def location(label: str, line: int) -> str:
    """Return the location for a message: file:line, or the flag that gave the text."""
    return label if label.startswith("--") else f"{label}:{line}"


def line_of(node: yaml.Node) -> int:
    """Return the node's line, counted from 1."""
    return node.start_mark.line + 1


def pairs(node: yaml.MappingNode, label: str, prefix: str = "") -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Yield (key, key node, value node) of a mapping. Raises RecipeError for a repeated key or one that is not text."""
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        place = location(label, line_of(key_node))
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError("recipe.invalid_yaml", f"{place}: a key must be a name, not a list or mapping")
        key = key_node.value
        if key in seen:
            raise RecipeError(
                "recipe.given_twice",
                f"{place}: {prefix}{key} occurs twice, first in line {seen[key]}",
                hint="keep one of them",
            )
        seen[key] = line_of(key_node)
        yield key, key_node, value_node


def node_value(node: yaml.Node | None, label: str, *, texts: bool = False) -> Any:
    """Convert a node to None, bool, int, float, str, list or dict.

    texts: the field takes text only, so a scalar that looks like a number (a revision ``1234567``) stays text. Raise
    RecipeError for any other tag.
    """
    if node is None:
        return None
    if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
        return [node_value(item, label, texts=texts) for item in node.value]
    if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
        return {key: node_value(value, label) for key, _, value in pairs(node, label)}
    kind, text = node.tag.removeprefix(_TAG), node.value
    try:
        if kind == "null":
            return None
        if kind == "str" or (texts and kind in ("bool", "int", "float")):
            return text
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            return int(text.replace("_", ""))
        if kind == "float":
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower().replace("_", "")))
    except (ValueError, KeyError):
        raise RecipeError(
            "recipe.invalid_yaml",
            f"{location(label, line_of(node))}: {text[:40]} is not a valid {_NOUNS[kind]}",
        ) from None
    raise RecipeError(
        "recipe.invalid_yaml",
        f"{location(label, line_of(node))}: tag {node.tag} is not read in recipes",
        hint="write the value itself, without a tag",
    )


def text_of(value: Any) -> str:
    """Format a scalar, or a list of scalars or sections, as one line of YAML.

    Floats have a point (``1.0e-07``), as YAML 1.1 needs.
    """

    def dumped(style: str | None) -> str:
        whole = yaml.dump(
            [value],
            Dumper=_Dumper,
            default_flow_style=True,
            default_style=style,
            width=float("inf"),
            allow_unicode=True,
        )
        return whole.rstrip("\n")[1:-1]

    text = dumped(None)
    return text if len(text.splitlines()) <= 1 else dumped('"')
