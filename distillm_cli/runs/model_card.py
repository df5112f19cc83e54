"""Write the model card of a trained student: the front matter that the hub reads, figures, cost and limits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import distillm_cli
from distillm_cli.config.field_usage import describe_objective
from distillm_cli.config.load import Resolved, resolve
from distillm_cli.config.schema import Recipe, StudentConfig
from distillm_cli.config.student_spec import SharedLayers, may_have_revision, parse_student
from distillm_cli.config.yaml_io import text_of
from distillm_cli.data.known import HubDataset, find_dataset
from distillm_cli.data.locations import is_path, local_path
from distillm_cli.errors import UsageError
from distillm_cli.models.model_paths import cached_hub_file
from distillm_cli.runs import output_dir
from distillm_cli.runs.machine import machine_title
from distillm_cli.runs.recorded_run import RecordedRun, RecordedScore, held_out_figures
from distillm_cli.runs.report import AFTER, TEACHER, ModelReport, model_title
from distillm_cli.runs.run_groups import metric_title
from distillm_cli.training.distributed import in_first_process
from distillm_cli.training.state import TrainerState
from distillm_cli.utils import manifest
from distillm_cli.utils.storage import atomic_write, storing
from distillm_cli.utils.text import format_duration, redact

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class CardFacts:
    """Hold what a model card says about a run besides recipe and figures.

    measured_on: description of the rows and of the decoding. findings: of the checks before the first step; empty if they
    did not run. energy_j: None if the machine has no counter. suites: scores of evaluations, by suite with its settings
    and metric. machine: name of processor or device.
    """

    measured_on: str
    findings: tuple[Mapping[str, Any], ...] = ()
    energy_j: float | None = None
    suites: Mapping[str, RecordedScore] = field(default_factory=dict)
    machine: str | None = None


def model_card(
    resolved: Resolved, state: TrainerState, report: Mapping[str, Any], about: CardFacts, *, task: str
) -> str:
    """Return the model card: Markdown with the front matter that the hub reads.

    report: by model name, with ``valid_loss`` and ``scores``. task: the hub's name for the model's task.
    """
    recipe = resolved.recipe
    student = recipe.student
    verb = "fine-tuned" if recipe.method == "sft" else "distilled"
    lines = ["---"]
    lines += [f"{key}: {text_of(value)}" for key, value in front_matter(resolved, task).items()]
    path = student.required_path
    title = f"{Path(path).name if Path(path).is_dir() else path}, {verb}"
    lines += _model_index(title, recipe, report, about, task)
    lines += ["---", "", f"# {title}", ""]
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
    order = sorted(report, key=lambda name: ("before" not in name, name.startswith(TEACHER), name == AFTER))
    titles = {model_title(name, recipe): report[name] for name in order}
    lines += ["", "## Held-out figures", "", *_figures_table(titles)]
    lines += ["", f"{about.measured_on[0].upper()}{about.measured_on[1:]}.", ""]
    lines += ["Valid CE: mean cross-entropy per response token, nats. `recipe.yaml` has all settings.", ""]
    lines += _suites_section(about.suites)
    lines += _overlap(about.findings)
    command = f"distillm {'sft' if recipe.method == 'sft' else 'distill'} --recipe recipe.yaml --output reproduced"
    lines += ["## Reproduce", "", "```sh", command, "```", ""]
    lines += _impact(state, about)
    lines += ["## Limits", "", *_limits(recipe, about), ""]
    return redact("\n".join(lines))


def _model_index(title: str, recipe: Recipe, report: Mapping[str, Any], about: CardFacts, task: str) -> list[str]:
    """Return the ``model-index`` of the front matter: scores on held-out rows and on suites."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    source = " + ".join(_hub_dataset(name) or Path(name).name or "rows" for name in recipe.data.names)
    after = report.get(AFTER)
    figures = {} if after is None else {"valid_loss": after.valid_loss, **after.scores}
    found = [(f"{source}, held-out rows", name, value) for name, value in figures.items() if value is not None]
    found += [(name.rpartition(" ")[0], name.rpartition(" ")[2], score.mean) for name, score in about.suites.items()]
    results = [
        EvalResult(
            task_type=task,
            dataset_type=source if "held-out" in dataset else dataset.partition("/")[0],
            dataset_name=dataset,
            metric_type="loss" if metric == "valid_loss" else metric,
            metric_name=metric_title(metric),
            metric_value=round(value, 4),
        )
        for dataset, metric, value in found
        if math.isfinite(value)
    ]
    if not results:
        return []
    index = {"model-index": eval_results_to_model_index(title, results)}
    return yaml.safe_dump(index, sort_keys=False, allow_unicode=True).splitlines()


def _suites_section(suites: Mapping[str, RecordedScore]) -> list[str]:
    if not suites:
        return []
    lines = ["## Evaluations", "", "| suite / settings | metric | score | passes |", "|---|---|---|---|"]
    for name, score in suites.items():
        place, _, metric = name.rpartition(" ")
        sd = "" if score.sd is None else f" ± {score.sd:.2f}"
        lines.append(f"| {place} | {metric_title(metric)} | {score.mean:.2f}{sd} | {score.seeds} |")
    return [*lines, "", "± standard deviation over the seeds of generation.", ""]


def _overlap(findings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the checks before the first step found about training rows among the held-out rows."""
    if not findings:
        return []
    found = [str(finding["what"]) for finding in findings if finding.get("code") == "data.overlap"]
    text = found[0] if found else "no training row has the prompt of a held-out row"
    return ["## Overlap", "", f"{text[0].upper()}{text[1:]}.", ""]


def _impact(state: TrainerState, about: CardFacts) -> list[str]:
    lines = ["## Environmental impact", "", f"- **training**: {format_duration(state.seconds)}"]
    lines += [f"- **machine**: {about.machine}"] if about.machine else []
    if about.energy_j is None:
        return [*lines, "- **energy**: not measured, the machine has no counters", ""]
    energy = f"{about.energy_j / 3.6e6:.4g} kWh of the processors"
    return [*lines, f"- **energy**: {energy}; times the carbon intensity of the grid, this is the carbon emitted", ""]


def _limits(recipe: Recipe, about: CardFacts) -> list[str]:
    lines = [f"- It was trained on `{recipe.data.title}` alone: expect less on other tasks, languages and formats."]
    if recipe.method != "sft":
        lines.append("- It imitates its teacher, with the teacher's errors and biases, and has less capacity.")
    lines.append(f"- The figures are of one training (seed {recipe.train.seed}). Other seeds give other figures.")
    if not about.suites:
        lines.append("- It was scored on held-out rows of its own data only.")
    lines.append("- Its safety was not evaluated. Licenses of the base model, the teacher and the data apply.")
    return lines


def updated_card(run: RecordedRun) -> str:
    """Return the card of a finished run with the scores of its evaluations. Raises RecipeError."""
    recipe_path = run.path / output_dir.RECIPE
    resolved = resolve(command="sft" if run.setting("method") == "sft" else "distill", recipe=recipe_path)
    result = run.result
    counts = {name.removesuffix("_steps"): run.number(name) for name in result if name.endswith("_steps")}
    sources = {name: int(count) for name, count in counts.items() if count}
    state = TrainerState(
        step=int(result["steps"]),
        tokens=int(result["tokens"]),
        seconds=float(result["train_s"]),
        sources=Counter(sources),
        best_step=result.get("best_step"),
    )
    report = {
        name.replace("_", " "): ModelReport(figures.pop("valid_loss", None), figures, [])
        for name, figures in held_out_figures(result).items()
    }
    machine = result.get("machine")
    about = CardFacts(
        str(result.get("measured_on", "on held-out rows")),
        tuple(finding for finding in result.get("findings", ()) if isinstance(finding, dict)),
        run.number("energy_j"),
        {name: score for name, score in run.scores.items() if " " in name},
        machine_title(machine) if isinstance(machine, dict) else None,
    )
    return model_card(resolved, state, report, about, task=_task_of(run.path))


def _task_of(path: Path) -> str:
    """Return the hub's name for the task of the model in a directory."""
    card = (path / output_dir.CARD).read_text(encoding="utf-8")
    found = re.search(r"^pipeline_tag: (\S+)$", card, re.MULTILINE)
    return found[1] if found and found[1] in _CLASSES else "text-generation"


@in_first_process
def update_card(run: RecordedRun) -> Path:
    """Write the card of a finished run again, with the scores of its evaluations. Raises UsageError, StorageError.

    A card that the user has edited is not replaced.
    """
    path = run.path / output_dir.CARD
    sealed = manifest.recorded(run.path).get(output_dir.CARD)
    if not run.result or not path.is_file():
        raise UsageError("usage.no_card", f"{run.path} has no model card", hint="wait until the run has finished")
    if sealed is None or not manifest.matches_seal(path, sealed):
        hint = "move it away and copy the new parts by hand"
        raise UsageError("usage.edited_card", f"{path} was edited, or not written by a run", hint=hint)
    with storing(f"cannot write {path}", "free disk space"):
        atomic_write(path, updated_card(run))
        manifest.record(run.path, [], seals={output_dir.CARD: manifest.seal(path)})
    return path


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
