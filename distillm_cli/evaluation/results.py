"""Write and read the results of an evaluation.

    eval/dolly/t1/results.json              the settings, and the object of ``distillm eval --json`` for the suite
    eval/dolly/t1/predictions-seed10.jsonl  a line per row: prompt, output, references, the row's own scores
    eval/dolly/t1/passes.json               what the responses depend on, see ``pass_store.py``
    eval/dolly/t1/manifest.json             the names of these files
    eval/dolly/greedy/…                     the same suite with other settings
    eval/dolly/t1-trigger-1b9c…/…           with a trigger; also trigger-seed10.jsonl, the responses to these prompts

A directory has the results for one suite with one set of generation settings. A repeated evaluation replaces only these
files.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

from distillm_cli import plugins
from distillm_cli.config import schema
from distillm_cli.data.encoder import Encoder
from distillm_cli.evaluation.evaluate import GREEDY, Answer, SuiteResult, passes
from distillm_cli.evaluation.metrics import RatioMetric, ratio
from distillm_cli.evaluation.pass_store import PassStore, predictions_file
from distillm_cli.evaluation.suites import Suite
from distillm_cli.training.distributed import in_first_process, world
from distillm_cli.utils import manifest
from distillm_cli.utils.storage import atomic_write, check_writable, nearest_directory, storing

RESULTS = "results.json"

_LETTERS = {"top_p": "p", "top_k": "k", "max_new_tokens": "n", "no_repeat_ngram_size": "r", "limit": "limit"}
_WITHOUT_EFFECT_ON_GREEDY = ("top_p", "top_k")


def settings_label(config: schema.EvalConfig, template: str) -> str:
    """Return a directory's name for settings: ``t1``, ``t0.5-p0.9``, ``greedy-n64-plain``. Defaults are left out."""
    greedy = config.greedy or config.temperature == 0
    parts = [GREEDY if greedy else f"t{config.temperature:g}"]
    for name, letter in _LETTERS.items():
        value = getattr(config, name)
        if value != schema.EvalConfig.model_fields[name].default and not (greedy and name in _WITHOUT_EFFECT_ON_GREEDY):
            parts.append(f"{letter}{value:g}")
    if config.attack != "none":
        steps = f"{config.attack_steps}-" if config.attack == "pgd" else ""
        parts.append(f"{config.attack}{steps}{config.attack_radius:g}")
    if not config.strip_reasoning:
        parts.append("reasoning")
    if config.trigger is not None:  # a directory's name cannot contain every text
        digest = hashlib.sha256(json.dumps([config.trigger, config.target]).encode()).hexdigest()
        parts.append(f"trigger-{digest[:8]}")
    if template != schema.DataConfig.model_fields["template"].default:
        parts.append(template)
    return "-".join(parts)


@in_first_process
def check_results_writable(root: Path) -> None:
    """Raise StorageError if ``root`` is not writable, before the models are run.

    No directory is created: the nearest existing one is checked.
    """
    with _storing(root):
        check_writable(nearest_directory(root))


@in_first_process
def save_results(
    result: SuiteResult, root: Path, about: Mapping[str, Any] | None = None, store: PassStore | None = None
) -> Path:
    """Write predictions and results under ``root``, list them in a manifest, and return their directory.

    about: further first keys of ``results.json`` (the model, its dtype). store: of the passes, in this directory. Raises
    StorageError.
    """
    directory = results_directory(result.suite, root, result.config, result.template)
    summary = {**_head(result.suite, result.config, result.template, about), **result.as_json()}
    files = {predictions_file(name): _predictions(result, name) for name in result.answers}
    if result.triggered is not None:
        files |= {predictions_file(name, "trigger"): _triggered(result, name) for name in result.triggered.answers}
    write_results(directory, summary, files)
    if store is not None:
        with _storing(directory):
            store.update()
    return directory


def results_directory(suite: Suite, root: Path, config: schema.EvalConfig, template: str) -> Path:
    """Return the directory of the results of a suite with these settings."""
    return root / suite.name / settings_label(config, template)


def write_results(
    directory: Path, summary: Mapping[str, Any], files: Mapping[str, Iterable[Mapping[str, Any]]]
) -> None:
    """Write the results of a suite and its files of predictions, by name, and list them. Raises StorageError."""
    with _storing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        # Without results.json these predictions count as incomplete.
        earlier_files = list(manifest.recorded(directory))
        for name in earlier_files:
            (directory / name).unlink(missing_ok=True)
        manifest.record(directory, [RESULTS, *files], removed=earlier_files)
        for file, predictions in files.items():
            lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in predictions)
            atomic_write(directory / file, "".join(lines))
        atomic_write(directory / RESULTS, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def prompts_digest(encoder: Encoder, suite: Suite) -> str:
    """Return the SHA-256 of the token ids of a suite's prompts, which depend on template, chat template and tokenizer."""
    digest = hashlib.sha256()
    for prompt in encoder.prompts(suite.rows):
        digest.update(f"{len(prompt)} ".encode() + prompt.tobytes())
    return digest.hexdigest()


def foreign_metrics(names: Iterable[str]) -> dict[str, str]:
    """Return digests of the modules of metrics that other packages define, since these may change at any time."""
    found = {}
    for name in names:
        module = inspect.getmodule(type(plugins.metrics[name]))
        if module is None or not module.__name__.startswith("distillm_cli."):
            found[f"metric_{name}"] = hashlib.sha256(_source(module).encode()).hexdigest()
    return found


def _source(module: ModuleType | None) -> str:
    """Return the source of a module; a new text each time if it has none, as in a notebook, so that nothing matches."""
    try:
        return "" if module is None else inspect.getsource(module)
    except OSError:
        return world().broadcast(lambda: str(time.time_ns()))


@in_first_process
def load_results(
    suite: Suite, root: Path, config: schema.EvalConfig, template: str, about: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Return the object of ``--json`` that was saved for the same suite, settings and ``about``, None if none was."""
    head = _head(suite, config, template, about)
    directory = results_directory(suite, root, config, template)
    names = [name for name, _, _ in passes(config)]
    files = [predictions_file(name) for name in names]
    if config.trigger is not None:
        files += [predictions_file(name, "trigger") for name in names]
    return load_summary(directory, head, files)


def load_summary(directory: Path, head: Mapping[str, Any], files: Iterable[str] = ()) -> dict[str, Any] | None:
    """Return the saved results without ``head``; None if they have another one, or one of the files is missing."""
    try:
        saved = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(saved, dict) or any(saved.get(key) != value for key, value in head.items()):
        return None
    if not all((directory / file).is_file() for file in files):
        return None
    return {key: value for key, value in saved.items() if key not in head}


def _head(suite: Suite, config: schema.EvalConfig, template: str, about: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the first keys of ``results.json``: the suite, ``about``, and all settings that affect the responses."""
    unused = {"suites", "report_rows", "report_page", "batch_size"} | (
        {"trigger", "target"} if config.trigger is None else set()
    )
    if config.attack == "none":
        unused |= {"attack", "attack_radius", "attack_steps"}
    settings = config.model_dump(mode="json", exclude=unused)
    head = {"suite": suite.name, "source": suite.source, **({"license": suite.license} if suite.license else {})}
    head |= about or {}
    return {**head, "settings": {**settings, "template": template}}


def _predictions(result: SuiteResult, name: str) -> Iterator[dict[str, Any]]:
    rows = zip(result.suite.rows, result.prompts, result.references, result.answers[name], strict=True)
    for row, prompt, references, answer in rows:
        yield {
            "where": row.where,
            **({} if row.task is None else {"task": row.task}),
            "prompt": prompt,
            "output": answer.output,
            **({} if answer.text == answer.output else {"scored": answer.text}),
            "references": list(references),
            **{name: _row_score(name, answer, references, result) for name in result.config.metrics},
            "tokens": answer.tokens,
            "complete": answer.complete,
            "entropy": answer.entropy,
        }


def _triggered(result: SuiteResult, name: str) -> Iterator[dict[str, Any]]:
    """Yield a line per row with a trigger."""
    attack = result.triggered
    assert attack is not None
    assert result.config.target is not None
    for row, prompt, references, answer in zip(
        attack.suite.rows, attack.prompts, attack.references, attack.answers[name], strict=True
    ):
        yield {
            "where": row.where,
            "prompt": prompt,
            "output": answer.output,
            "references": list(references),
            "success": answer.text.strip() == result.config.target.strip(),
        }


def _row_score(name: str, answer: Answer, references: tuple[str, ...], result: SuiteResult) -> float | None:
    if result.scores[name].undefined is not None:
        return None
    count = answer.counts.get(name)
    metric = plugins.metrics[name]
    if count is None or not isinstance(metric, RatioMetric):
        return metric.score(answer.text, references)
    return ratio([count], metric.scale)


def _storing(path: Path) -> AbstractContextManager[None]:
    return storing(f"cannot write to {path}", "choose another directory with --output")
