"""Test the table of model families against transformers."""

from __future__ import annotations

import pytest
import transformers
from transformers import CONFIG_MAPPING

from distillm_cli.models.model_families import FAMILIES, Family, family_of, family_of_hub_name


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_entry_exists_in_transformers_and_has_a_reason(family):
    assert family.name in CONFIG_MAPPING
    assert family.why != Family("other").why
    config = CONFIG_MAPPING[family.name]()
    for name in family.head_scales:
        assert hasattr(config, name)
    if family.t5_head_scale is not None:
        assert hasattr(config, family.t5_head_scale)
    if family.cpu_layout is not None:
        assert hasattr(transformers, f"{family.class_prefix}Model")


def test_family_without_entry_has_defaults():
    assert family_of("gemma3") == Family("gemma3")


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("gpt2-xl", "gpt2"),
        ("openai-community/gpt2", "gpt2"),
        ("facebook/opt-6.7b", "opt"),
        ("openlm-research/open_llama_3b", "llama"),
        ("meta-llama/Llama-3.2-1B-Instruct", None),
        ("org/other", None),
    ],
)
def test_family_of_hub_name(name, family):
    found = family_of_hub_name(name)
    assert (found.name if found else None) == family
