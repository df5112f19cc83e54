"""Test the parser of student specifications."""

from __future__ import annotations

import pytest

from distillm_cli.config.student_spec import (
    BuiltinModel,
    ConfigFile,
    RandomModel,
    SavedModel,
    SharedLayers,
    StageOutput,
    TeacherLayers,
    TeacherWidth,
    is_built,
    is_built_without_file,
    may_have_revision,
    parse_student,
)
from tests.codes import raises_code


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("random:4x256", RandomModel(4, 256)),
        ("random:llama:4x256", RandomModel(4, 256, "llama")),
        ("width:0.5", TeacherWidth(share=0.5)),
        ("width:.25", TeacherWidth(share=0.25)),
        ("width:256", TeacherWidth(size=256)),
        ("layers:6", TeacherLayers(6)),
        ("layers:4:first", TeacherLayers(4, "first")),
        ("layers:4:last", TeacherLayers(4, "last")),
        ("layers:0,3", TeacherLayers(indices=(0, 3))),
        ("layers:all", TeacherLayers()),
        ("shared:3x2", SharedLayers(3)),
        ("shared:3x4:swap", SharedLayers(3, passes=4, swap=True)),
        ("shared:0.5x2:swap", SharedLayers(share=0.5, swap=True)),
        ("shapes/small.json", ConfigFile("shapes/small.json")),
        ("stage:teacher", StageOutput("teacher")),
        ("builtin", BuiltinModel()),
        ("builtin:pronounce", BuiltinModel("builtin:pronounce")),
        ("openai-community/gpt2", SavedModel("openai-community/gpt2")),
        ("./layers:4", SavedModel("./layers:4")),
    ],
)
def test_every_specification_is_parsed(text, spec):
    assert parse_student(text) == spec
    is_variant_built = isinstance(spec, RandomModel | TeacherWidth | TeacherLayers | SharedLayers | ConfigFile)
    assert is_built(text) == is_variant_built
    assert is_built_without_file(text) == (is_variant_built and not isinstance(spec, ConfigFile))


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("random:", "random:[FAMILY:]LAYERSxWIDTH"),
        ("random:0x8", "random:[FAMILY:]LAYERSxWIDTH"),
        ("width:1.5", "width:256"),
        ("width:0.0", "width:256"),
        ("layers:six", "layers:6"),
        ("layers:6:middle", "layers:6"),
        ("shared:3", "shared:3x2"),
        ("shared:3x1", "shared:3x2"),
        ("shared:0x2", "shared:3x2"),
        ("shared:3x2:swapped", "shared:3x2"),
    ],
)
def test_malformed_specification_is_rejected(text, form):
    with raises_code("usage.invalid_student", repr(text), form):
        parse_student(text)


def test_only_hub_names_have_revisions(tmp_path):
    assert may_have_revision("org/model")
    assert not any(may_have_revision(text) for text in (str(tmp_path), "builtin", "random:2x8", "stage:a", "a.json"))
