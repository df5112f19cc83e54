"""Test the words and phonemes that the package ships, and the teacher trained on them."""

from pathlib import Path

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.sources import load_rows
from distillm_cli.models.model_paths import locate_model
from distillm_cli.utils.storage import ASSETS

PHONEMES = """AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"""


def test_splits_of_pronounce():
    rows = {split: load_rows(DataConfig(source="pronounce"), split).rows for split in ("train", "valid", "test")}
    assert {split: len(found) for split, found in rows.items()} == {"train": 1000, "valid": 400, "test": 1000}
    words = {split: {row.input for row in found} for split, found in rows.items()}
    assert all(len(words[split]) == len(rows[split]) for split in rows)
    assert not words["train"] & (words["valid"] | words["test"])
    assert not words["valid"] & words["test"]
    answers = [answer for found in rows.values() for row in found for answer in row.references]
    assert {phoneme for answer in answers for phoneme in answer.split()} <= set(PHONEMES.split())


def test_license_is_shipped():
    license_text = (ASSETS / "pronounce/LICENSE").read_text(encoding="utf-8")
    assert "Carnegie Mellon University" in license_text


def test_shipped_models_are_local():
    places = [locate_model(name) for name in ("builtin", "builtin:pronounce")]
    assert all(is_local and (Path(place) / "model.safetensors").is_file() for place, is_local in places)
