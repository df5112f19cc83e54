"""Parse the specification of a model: ``student.path`` and every other field that names a model.

random:4x256, random:llama:4x256   `RandomModel`    random weights, with this number of layers and width
width:0.5, width:256               `TeacherWidth`   random weights, as deep as the teacher
layers:6, layers:6:first,          `TeacherLayers`  copies of the teacher's layers
layers:6:last, layers:0,3,7,
layers:all
shared:3x2, shared:3x2:swap,       `SharedLayers`   copies of the teacher's first layers, run several times
shared:0.5x2
config.json, any *.json            `ConfigFile`     random weights, of the shape that the file gives
stage:NAME                         `StageOutput`    the output of an earlier stage of a pipeline
builtin, builtin:pronounce         `BuiltinModel`   a model shipped with the package
anything else                      `SavedModel`     a directory or a hub name

The first five are built by the run. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from distillm_cli.errors import UsageError

STAGE_PREFIX = "stage:"
BUILTIN = "builtin"
BUILTIN_MODELS = {BUILTIN: "quickstart-teacher", "builtin:pronounce": "pronounce-teacher"}  # directories in assets/


@dataclass(frozen=True)
class RandomModel:
    """Request random weights. family: None selects the teacher's, or llama without a teacher."""

    layers: int
    width: int
    family: str | None = None


@dataclass(frozen=True)
class TeacherWidth:
    """Request random weights, as deep as the teacher. Exactly one of size and share (of the teacher's width) is set."""

    size: int | None = None
    share: float | None = None


Position = Literal["evenly", "first", "last"]


@dataclass(frozen=True)
class TeacherLayers:
    """Request copies of the teacher's layers. indices: counted from 0. count: number of layers from ``position``.

    With neither, all layers are copied.
    """

    count: int | None = None
    position: Position = "evenly"
    indices: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SharedLayers:
    """Request copies of the teacher's first layers, which run ``passes`` times with the same weights.

    Exactly one of count and share (of the teacher's layers) is set. swap: queries and keys swap their projections in
    every second pass.
    """

    count: int | None = None
    share: float | None = None
    passes: int = 2
    swap: bool = False

    def stored(self, depth: int) -> int:
        """Return the number of layers that are stored, of a teacher with ``depth``: a share is rounded half up."""
        return self.count if self.count is not None else max(1, int((self.share or 0) * depth + 0.5))


@dataclass(frozen=True)
class ConfigFile:
    """Request random weights with the shape in a JSON file."""

    path: str


@dataclass(frozen=True)
class StageOutput:
    """Name the output of an earlier stage of the same pipeline."""

    stage: str


@dataclass(frozen=True)
class BuiltinModel:
    """Name a model shipped with the package."""

    name: str = BUILTIN


@dataclass(frozen=True)
class SavedModel:
    """Name a directory or a hub repository."""

    path: str


StudentSpec = (
    RandomModel | TeacherWidth | TeacherLayers | SharedLayers | ConfigFile | StageOutput | BuiltinModel | SavedModel
)

_RANDOM = re.compile(r"random:(?:(?P<family>[A-Za-z][\w-]*):)?(?P<layers>\d+)x(?P<width>\d+)")
_WIDTH = re.compile(r"width:(?:(?P<size>\d+)|(?P<share>0?\.\d+))")
_LAYERS = re.compile(r"layers:(?:all|(?P<list>\d+(?:,\d+)+)|(?P<count>\d+)(?::(?P<position>evenly|first|last))?)")
_SHARED = re.compile(r"shared:(?:(?P<count>\d+)|(?P<share>0?\.\d+))x(?P<passes>\d+)(?P<swap>:swap)?")

# prefix → what to write
FORMS = {
    "random:": "random:[FAMILY:]LAYERSxWIDTH, for example random:4x256 or random:gpt2:4x256",
    "width:": "width:256, or width:0.5 for half of the teacher's",
    "layers:": "layers:6 (evenly spaced), layers:6:first, layers:6:last, layers:0,3,7 or layers:all",
    "shared:": "shared:3x2 (three layers that run twice), shared:3x2:swap, or shared:0.5x2 for half of the teacher's",
}


def parse_student(text: str) -> StudentSpec:
    """Parse a specification. Raises UsageError for a malformed one of ``FORMS``."""
    found: StudentSpec | None
    if text.startswith("random:"):
        found = _parse_random(text)
    elif text.startswith("width:"):
        found = _parse_width(text)
    elif text.startswith("layers:"):
        found = _parse_layers(text)
    elif text.startswith("shared:"):
        found = _parse_shared(text)
    elif text.endswith(".json"):
        found = ConfigFile(text)
    elif text.startswith(STAGE_PREFIX):
        found = StageOutput(text.removeprefix(STAGE_PREFIX))
    else:
        found = BuiltinModel(text) if text in BUILTIN_MODELS else SavedModel(text)
    if found is None:
        form = next(form for prefix, form in FORMS.items() if text.startswith(prefix))
        raise UsageError(
            "usage.invalid_student", f"cannot read the student specification {text!r}", hint=f"write {form}"
        )
    return found


def is_built(text: str | None) -> bool:
    """Return whether the run builds this model instead of loading trained weights. Does not raise for malformed texts."""
    return text is not None and (_has_prefix(text) or text.endswith(".json"))


def is_built_without_file(text: str | None) -> bool:
    """Return whether the model is built without a file: one of ``FORMS``."""
    return text is not None and _has_prefix(text)


def is_random(text: str | None) -> bool:
    """Return whether the model is ``random:…``, of random weights."""
    return text is not None and text.startswith("random:")


def copies_layers(text: str | None) -> bool:
    """Return whether the model copies the teacher's layers."""
    return text is not None and text.startswith(("layers:", "shared:"))


def shares_layers(text: str | None) -> bool:
    """Return whether the model runs layers several times."""
    return text is not None and text.startswith("shared:")


def is_on_hub(text: str) -> bool:
    """Return whether a name can only be a hub name: it is neither a path nor on this machine."""
    is_path = text.startswith((".", "~")) or Path(text).is_absolute() or text.count("/") > 1
    return not (is_path or text in BUILTIN_MODELS or Path(text).exists())


def may_have_revision(text: str) -> bool:
    """Return whether a model may have branches and tags. Only hub names have, and these have no colon."""
    return is_on_hub(text) and not is_built(text) and ":" not in text


def _has_prefix(text: str) -> bool:
    return text.startswith(tuple(FORMS))


def _parse_random(text: str) -> RandomModel | None:
    match = _RANDOM.fullmatch(text)
    if match is None or int(match["layers"]) < 1 or int(match["width"]) < 1:
        return None
    return RandomModel(int(match["layers"]), int(match["width"]), match["family"])


def _parse_width(text: str) -> TeacherWidth | None:
    match = _WIDTH.fullmatch(text)
    if match is None:
        return None
    if match["size"]:
        return TeacherWidth(size=int(match["size"]))
    share = float(match["share"])
    return TeacherWidth(share=share) if share else None


def _parse_layers(text: str) -> TeacherLayers | None:
    match = _LAYERS.fullmatch(text)
    if match is None:
        return None
    if match["list"]:
        return TeacherLayers(indices=tuple(int(i) for i in match["list"].split(",")))
    if match["count"]:
        return TeacherLayers(int(match["count"]), cast(Position, match["position"] or "evenly"))
    return TeacherLayers()


def _parse_shared(text: str) -> SharedLayers | None:
    match = _SHARED.fullmatch(text)
    if match is None or int(match["passes"]) < 2:
        return None
    count = int(match["count"]) if match["count"] else None
    share = float(match["share"]) if match["share"] else None
    return SharedLayers(count, share, int(match["passes"]), bool(match["swap"])) if count or share else None
