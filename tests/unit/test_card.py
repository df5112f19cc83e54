"""The model card: front matter that any YAML reader takes, whatever the base model is called."""

import pytest
import yaml

from distillm_cli.config.load import resolve
from distillm_cli.runs.publish import model_card
from distillm_cli.training.state import TrainerState

NAMES = [
    "gpt2",
    "models/a: b",
    "@home/x",
    "a #1",
    "[x]",
    "'quoted'",
    '"',
    "*star",
    "- dash",
    "1e5",
    "null",
    "C:\\new\\model",
    "ü {y}",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output", ["adapter", "merged"])
@pytest.mark.parametrize("command", ["sft", "distill"])
def test_the_front_matter_is_yaml(name, output, command):
    sets = ["student.lora.r=4", f"student.lora_output={output}"]
    flags = {"student.path": name, **({"teacher.path": "gpt2-xl"} if command == "distill" else {})}
    card = model_card(
        resolve(command=command, flags=flags, sets=sets), TrainerState(), {}, task="text-generation", measured_on="x"
    )
    opening, front, _ = card.split("---\n", 2)
    read = yaml.safe_load(front)
    assert opening == ""
    assert read["library_name"] == ("peft" if output == "adapter" else "transformers")
    assert read.get("base_model") == (name if output == "adapter" else None)
    assert read["pipeline_tag"] == "text-generation"
    assert "lora" in read["tags"]
    assert ("knowledge-distillation" in read["tags"]) == (command == "distill")
