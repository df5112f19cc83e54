"""The one parser of what stands for a model."""

from __future__ import annotations

import pytest

from distillm_cli.config.student_spec import (
    BuiltinModel,
    ConfigFile,
    RandomModel,
    SavedModel,
    StageOutput,
    TeacherLayers,
    TeacherWidth,
    is_built,
    is_built_without_file,
    may_have_revision,
    parse_student,
)
from distillm_cli.errors import UsageError


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
        ("shapes/small.json", ConfigFile("shapes/small.json")),
        ("stage:teacher", StageOutput("teacher")),
        ("builtin", BuiltinModel()),
        ("openai-community/gpt2", SavedModel("openai-community/gpt2")),
        ("./layers:4", SavedModel("./layers:4")),
    ],
)
def test_every_form_has_its_variant(text, spec):
    assert parse_student(text) == spec
    is_variant_built = isinstance(spec, RandomModel | TeacherWidth | TeacherLayers | ConfigFile)
    assert is_built(text) == is_variant_built
    assert is_built_without_file(text) == (is_variant_built and not isinstance(spec, ConfigFile))


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("random:", "write random:[FAMILY:]LAYERSxWIDTH"),
        ("random:0x8", "write random:[FAMILY:]LAYERSxWIDTH"),
        ("width:1.5", "write width:256, or width:0.5"),
        ("width:0.0", "write width:256, or width:0.5"),
        ("layers:six", "write layers:6 (evenly spaced)"),
        ("layers:6:middle", "write layers:6 (evenly spaced)"),
    ],
)
def test_malformed_texts_share_one_error(text, form):
    with pytest.raises(UsageError) as caught:
        parse_student(text)
    assert str(caught.value).startswith(f"cannot read the student specification {text!r}; {form}")


def test_only_hub_names_have_revisions(tmp_path):
    assert may_have_revision("org/model")
    assert not any(may_have_revision(text) for text in (str(tmp_path), "builtin", "random:2x8", "stage:a", "a.json"))
