"""Test the model card: its front matter is valid YAML for any base model name."""

import pytest
import yaml
from huggingface_hub import ModelCard

from distillm_cli.config.load import resolve
from distillm_cli.data.known import find_dataset
from distillm_cli.runs.model_card import CardFacts, model_card, update_card
from distillm_cli.runs.recorded_run import read_run
from distillm_cli.training.state import TrainerState
from distillm_cli.utils import manifest
from tests.codes import raises_code
from tests.recorded_runs import write_evaluation, write_run

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
HUB_NAMES = ("gpt2", "1e5", "null")
RELATIONS = {"adapter": "adapter", "merged": "finetune"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("output", ["adapter", "merged"])
@pytest.mark.parametrize("command", ["sft", "distill"])
def test_front_matter_is_valid_yaml(name, output, command):
    sets = ["student.lora.r=4", f"student.lora_output={output}"]
    flags = {"student.path": name, **({"teacher.path": "gpt2-xl"} if command == "distill" else {})}
    card = model_card(
        resolve(command=command, flags=flags, sets=sets), TrainerState(), {}, CardFacts("x"), task="text-generation"
    )
    opening, front, _ = card.split("---\n", 2)
    read = yaml.safe_load(front)
    assert opening == ""
    assert read["library_name"] == ("peft" if output == "adapter" else "transformers")
    assert read.get("base_model") == (name if name in HUB_NAMES else None)
    assert read.get("base_model_relation") == ((RELATIONS[output]) if name in HUB_NAMES else None)
    assert read["pipeline_tag"] == "text-generation"
    assert "lora" in read["tags"]
    assert ("knowledge-distillation" in read["tags"]) == (command == "distill")


def front_matter(command, **flags):
    """Return the front matter of a run's card and the card itself."""
    keys = {"student": "student.path", "teacher": "teacher.path", "data": "data.source"}
    resolved = resolve(command=command, flags={keys[name]: value for name, value in flags.items()})
    card = model_card(resolved, TrainerState(), {}, CardFacts("x"), task="text-generation")
    return yaml.safe_load(card.split("---\n", 2)[1]), card


def test_local_model_inherits_base_model_from_its_card(tmp_path):
    (tmp_path / "plain").mkdir()
    assert "base_model" not in front_matter("sft", student=str(tmp_path / "plain"))[0]
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned/README.md").write_text("---\nlicense: mit\nbase_model: openai-community/gpt2\n---\n# x\n")
    front, _ = front_matter("sft", student=str(tmp_path / "tuned"))
    assert (front["base_model"], front["license"]) == ("openai-community/gpt2", "mit")


def test_card_lists_only_hub_datasets(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    for source, name in (
        ("org/rows", "org/rows"),
        ("dolly", find_dataset("dolly").repo),
        (f"{tmp_path}/rows.jsonl", None),
    ):
        front, _ = front_matter("distill", student="gpt2", teacher="gpt2-xl", data=source)
        assert front.get("datasets") == (None if name is None else [name])


@pytest.mark.parametrize(("task", "name"), [("text-generation", "CausalLM"), ("text2text-generation", "Seq2SeqLM")])
def test_usage_example_is_valid_python(task, name):
    resolved = resolve(command="sft", flags={"student.path": "gpt2"})
    card = model_card(resolved, TrainerState(), {}, CardFacts("x"), task=task)
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert f"AutoModelFor{name}.from_pretrained(path)" in code


def finished_run(place):
    """Write a run with a sealed card and an evaluation. Return its directory."""
    run = write_run(place / "run", exact_match=12.5, error_rate=30.0)
    write_evaluation(run, "dolly", "t1", "rouge_l", 20.0, 24.0)
    (run / "README.md").write_text("---\npipeline_tag: text2text-generation\n---\n")
    manifest.record(run, [], seals={"README.md": manifest.seal(run / "README.md")})
    return run


def test_updated_card_is_valid_for_the_hub(tmp_path):
    run = finished_run(tmp_path)
    update_card(read_run(run))
    card = ModelCard.load(run / "README.md")
    assert card.data.pipeline_tag == "text2text-generation"
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert found["pronounce, held-out rows", "exact_match"] == 12.5
    assert found["dolly/t1", "rouge_l"] == 22.0
    assert "| dolly/t1 | ROUGE-L | 22.00 ± 1.50 | 2 |" in card.text
    for heading in ("Reproduce", "Environmental impact", "Limits"):
        assert f"## {heading}" in card.text
    update_card(read_run(run))  # its seal is that of the new card


def test_edited_card_is_not_replaced(tmp_path):
    run = finished_run(tmp_path)
    (run / "README.md").write_text("mine")
    with raises_code("usage.edited_card"):
        update_card(read_run(run))
    (run / "README.md").unlink()
    with raises_code("usage.no_card"):
        update_card(read_run(run))
    assert not (run / "README.md").exists()


def test_card_tells_overlap_and_energy():
    resolved = resolve(command="distill", flags={"student.path": "gpt2", "teacher.path": "gpt2-xl"})
    finding = {"code": "data.overlap", "what": "3 training rows have the prompt of a held-out row"}
    facts = CardFacts("x", (finding,), energy_j=7.2e6, machine="M")
    card = model_card(resolved, TrainerState(seconds=60.0), {}, facts, task="text-generation")
    assert "3 training rows have the prompt of a held-out row." in card
    assert "2 kWh" in card
    assert "model-index" not in card
