"""Publish the trained student: model, tokenizer and model card in the output directory."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import distillm_cli
from distillm_cli.config.field_usage import describe_objective
from distillm_cli.config.load import Resolved
from distillm_cli.config.schema import Recipe, StudentConfig
from distillm_cli.config.student_spec import SharedLayers, may_have_revision, parse_student
from distillm_cli.config.yaml_io import text_of
from distillm_cli.data.known import HubDataset, find_dataset
from distillm_cli.data.locations import is_path, local_path
from distillm_cli.models.composite import is_composite
from distillm_cli.models.model_paths import cached_hub_file
from distillm_cli.runs import output_dir
from distillm_cli.runs.report import model_title
from distillm_cli.training.distributed import in_first_process
from distillm_cli.utils.storage import storing
from distillm_cli.utils.text import redact

if TYPE_CHECKING:
    from distillm_cli.runs.prepare import Prepared
    from distillm_cli.runs.report import ModelReport
    from distillm_cli.training.state import TrainerState


@in_first_process
def publish_model(
    run: Prepared,
    output: Path,
    resolved: Resolved,
    state: TrainerState,
    report: Mapping[str, ModelReport],
    measured_on: str,
    export_extras: Callable[[Path], None],
) -> None:
    """Write the student, its tokenizer and its card into ``output``, where ``from_pretrained(output)`` finds them.

    report: by model name. measured_on: description of the rows and of the decoding. export_extras: writes more of what was
    trained into a directory. Raises StorageError.
    """
    hint = "free disk space, then run the command again with --resume: the training is not repeated"
    with storing(f"cannot write the model into {output}", hint), output_dir.publishing(output) as staged:
        run.export_model(staged)
        export_extras(staged)
        task = "text2text-generation" if run.student.is_encoder_decoder else "text-generation"
        if is_composite(run.student.model.config):
            task = "image-text-to-text"
        card = model_card(resolved, state, report, task=task, measured_on=measured_on)
        (staged / output_dir.CARD).write_text(card, encoding="utf-8")


def model_card(
    resolved: Resolved, state: TrainerState, report: Mapping[str, Any], *, task: str, measured_on: str
) -> str:
    """Return the model card: Markdown with the front matter that the hub reads.

    report: by model name, with ``valid_loss`` and ``scores``. task: the hub's name for the model's task.
    measured_on: description of the rows and of the decoding.
    """
    recipe = resolved.recipe
    student = recipe.student
    verb = "fine-tuned" if recipe.method == "sft" else "distilled"
    lines = ["---"]
    lines += [f"{key}: {text_of(value)}" for key, value in front_matter(resolved, task).items()]
    path = student.required_path
    lines += ["---", "", f"# {Path(path).name if Path(path).is_dir() else path}, {verb}", ""]
    facts = {
        "method": recipe.method,
        "model" if recipe.method == "sft" else "student": student.path,
        "trained": _trained_part(student),
        "layers": _shared_part(student),
        "fine-tuned before": f"{student.sft_epochs:g} × the rows" if student.sft_epochs else None,
        "pre-trained before": f"{student.ptp:g} × the rows, on the teacher's confidence" if student.ptp else None,
        "teacher": _teacher(recipe) if recipe.method != "sft" else None,
        "data": recipe.data.title,
        "objective": "cross-entropy" if recipe.method == "sft" else describe_objective(recipe.objective),
        "schedule": recipe.schedule.kind if recipe.method != "sft" else None,
        "steps": f"{state.step:,} ({', '.join(f'{n:,} {source}' for source, n in sorted(state.sources.items()))})",
        "supervised tokens": f"{state.tokens:,}",
        "seed": recipe.train.seed,
        "created with": f"distillm {distillm_cli.__version__}",
    }
    lines += [f"- **{name}**: {value}" for name, value in facts.items() if value is not None]
    lines += ["", *_usage(task, student)]
    titles = {model_title(name, recipe): model for name, model in report.items()}
    lines += ["", "## Held-out figures", "", *_figures_table(titles)]
    lines += ["", f"{measured_on[0].upper()}{measured_on[1:]}.", ""]
    lines += ["Valid CE: mean cross-entropy per response token, nats. `recipe.yaml` has all settings.", ""]
    return redact("\n".join(lines))


def _teacher(recipe: Recipe) -> str:
    """Return the teacher's path, and how it was trained if it was."""
    path = str(recipe.teacher.path)
    if recipe.ctcd.enabled:
        return f"{path}, trained together with the student; the result is in `{output_dir.TRAINED_TEACHER}/`"
    if recipe.okd.rank is not None:
        return f"{path}, with an adapter of rank {recipe.okd.rank} that was trained together with the student"
    return path


def front_matter(resolved: Resolved, task: str) -> dict[str, Any]:
    recipe = resolved.recipe
    is_adapter = recipe.student.lora_output == "adapter"
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": task}
    base = recipe.student.required_path
    known = _card_of(base)
    if (name := base if _is_hub_name(base) else known.get("base_model")) is not None:
        front["base_model"] = name
        front["base_model_relation"] = "adapter" if is_adapter else "finetune"
    if (license_name := known.get("license")) is not None:
        front["license"] = license_name
    if datasets := [name for source in recipe.data.names if (name := _hub_dataset(source)) is not None]:
        front["datasets"] = datasets
    front["tags"] = [recipe.method]
    if recipe.student.lora.r is not None:
        front["tags"].append("lora")
    if recipe.method != "sft":
        front["tags"].append("knowledge-distillation")
    return front


def _is_hub_name(path: str) -> bool:
    """Return whether a model's name is one on the hub. A local path, a built model and `builtin` are not."""
    return may_have_revision(path) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path, re.ASCII) is not None


def _card_of(path: str) -> dict[str, Any]:
    """Return the hub name of the base model and the license in the card of a local model."""
    directory = Path(path).expanduser()
    card = directory / output_dir.CARD if directory.is_dir() else None
    if card is None and _is_hub_name(path):
        card = cached_hub_file(path, output_dir.CARD, None)
    if card is None:
        return {}
    try:
        front = yaml.safe_load(card.read_text(encoding="utf-8").split("---\n", 2)[1])
        found = {key: front[key] for key in ("base_model", "license") if isinstance(front.get(key), str)}
    except (AttributeError, IndexError, OSError, ValueError, yaml.YAMLError):  # no card, or one without front matter
        return {}
    if "base_model" in found and not _is_hub_name(found["base_model"]):
        del found["base_model"]
    return found


def _hub_dataset(source: str) -> str | None:
    """Return the hub name of a data source; None for a file, a directory and generated rows."""
    known = find_dataset(source)
    if known is not None:
        return known.repo if isinstance(known, HubDataset) else None
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", source, re.ASCII) is not None
    return source if is_hub_name and not is_path(source) and local_path(source) is None else None


_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "image-text-to-text": "AutoModelForImageTextToText",
}


def _usage(task: str, student: StudentConfig) -> list[str]:
    """Return the lines of the card that show how to load the model."""
    library = "transformers"
    name = _CLASSES[task]
    lines = ["## Usage", "", "```python"]
    if student.lora_output == "adapter":
        library = "peft"
        name = name.replace("Auto", "AutoPeft", 1) if task != "image-text-to-text" else "AutoPeftModel"
        lines += [f"from {library} import {name}", "from transformers import AutoTokenizer"]
    else:
        lines.append(f"from {library} import {name}, AutoTokenizer")
    return [
        *lines,
        "",
        'path = "."  # this directory, or its name on the hub',
        f"model = {name}.from_pretrained(path)",
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        'inputs = tokenizer("Name three rivers.", return_tensors="pt")',
        "outputs = model.generate(**inputs, max_new_tokens=64)",
        "print(tokenizer.decode(outputs[0], skip_special_tokens=True))",
        "```",
        "",
        "With the template of the training: `distillm generate --model . --prompt 'Name three rivers.'`",
    ]


def _trained_part(student: StudentConfig) -> str | None:
    if student.lora.r is None:
        return None
    what = f"a LoRA adapter of rank {student.lora.r}"
    is_adapter = student.lora_output == "adapter"
    return f"{what}; this directory has only the adapter" if is_adapter else f"{what}, merged into the weights"


def _shared_part(student: StudentConfig) -> str | None:
    spec = parse_student(student.required_path)
    if not isinstance(spec, SharedLayers):
        return None
    swap = ", with queries and keys swapped in every second pass" if spec.swap else ""
    return (
        f"run {spec.passes} times with the same weights{swap}; the weight file has a copy for each pass, and training on "
        "from it trains the copies separately"
    )


def _figures_table(report: Mapping[str, Any]) -> list[str]:
    metrics = list(dict.fromkeys(metric for model in report.values() for metric in model.scores))
    lines = [f"| model | valid CE |{''.join(f' {name} |' for name in metrics)}"]
    lines.append("|---" * (2 + len(metrics)) + "|")
    for name, model in report.items():
        figures = [model.valid_loss, *(model.scores.get(metric) for metric in metrics)]
        lines.append(f"| {name} | " + " | ".join("–" if f is None else f"{f:.3f}" for f in figures) + " |")
    return lines
