"""Score a loaded model on tasks of lm-eval, EleutherAI's evaluation harness, through its Python API.

``--suite lm-eval:hellaswag`` names a task, and ``--suite lm-eval:tasks/own.yaml`` the file of one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from distillm_cli.config.suite_file import LM_EVAL, SUFFIXES
from distillm_cli.errors import DataError, UsageError
from distillm_cli.evaluation.results import load_summary, write_results
from distillm_cli.models.backbone import Backbone
from distillm_cli.training.distributed import in_first_process
from distillm_cli.training.events import Listener, Note

_LABEL = "lm-eval"  # of the directory of a task's results
_NO_SCORES = ("alias", "name", "sample_len", "sample_count")


def split_suites(names: Iterable[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return the suites that this package scores, and the tasks of lm-eval. Raises UsageError if lm-eval is missing."""
    own = tuple(name for name in names if not name.startswith(LM_EVAL))
    tasks = [name.removeprefix(LM_EVAL) for name in names if name.startswith(LM_EVAL)]
    if tasks and find_spec("lm_eval") is None:
        what = f"--suite {LM_EVAL}{tasks[0]} needs the package lm-eval"
        raise UsageError("usage.missing_package", what, hint="pip install 'distillm[lm-eval]'")
    return own, tasks


def score_tasks(
    model: Backbone, tasks: SequenceOf[str], *, limit: int | None, batch_size: int, listener: Listener
) -> dict[str, dict[str, Any]]:
    """Return the object of each task: rows, and value and standard error of each of its metrics, as lm-eval gives them.

    Raises DataError for a task that lm-eval does not have or cannot run, with its own message.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    directories = sorted({str(Path(task).parent) for task in tasks if task.endswith(SUFFIXES)})
    names = {_task_name(task): task for task in tasks}
    listener(Note(f"lm-eval: {', '.join(names)}"))
    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size),
            tasks=list(names),
            limit=limit,
            log_samples=False,
            task_manager=TaskManager(include_path=directories or None),
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        hint = "`lm-eval ls tasks` lists the tasks; their data must be on the hub or local"
        raise DataError(
            "data.lm_eval_failed", f"lm-eval cannot score {', '.join(names)}: {reason}", hint=hint
        ) from error
    results = found["results"]
    return {f"{LM_EVAL}{names.get(name, name)}": _as_json(results[name], found, name) for name in results}


def _as_json(scores: Mapping[str, Any], found: Mapping[str, Any], name: str) -> dict[str, Any]:
    counted = found.get("n-samples", {}).get(name, {})
    better = found.get("higher_is_better", {}).get(name, {})
    figures: dict[str, Any] = {}
    for key, value in scores.items():
        metric, _, filtered = key.partition(",")
        if metric in _NO_SCORES or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = scores.get(f"{metric}_stderr,{filtered}")
        label = metric if filtered in ("", "none") else f"{metric} ({filtered})"
        figures[label] = {
            "value": value,
            "stderr": error if isinstance(error, int | float) else None,
            "higher_is_better": better.get(metric),
        }
    return {"rows": counted.get("effective"), "lm_eval": figures}


def _task_name(task: str) -> str:
    """Return the name of a task: that in its file, if it is one."""
    if not task.endswith(SUFFIXES):
        return task
    from distillm_cli.config.merging import read_document
    from distillm_cli.config.yaml_io import pairs

    path = Path(task).expanduser()
    if not path.is_file():
        raise DataError("data.not_found", f"no file {path}", where=f"{LM_EVAL}{task}", hint="check the path")
    named = {key: getattr(value, "value", None) for key, _, value in pairs(read_document(path, task), task)}
    return str(named.get("task") or path.stem)


@in_first_process
def save_task(root: Path, name: str, about: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """Write the results of a task under ``root``."""
    write_results(_directory(root, name), {**about, **scores}, {})


@in_first_process
def load_task(root: Path, name: str, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the object that was saved for a task with the same ``about``, None if none was."""
    return load_summary(_directory(root, name), about)


def _directory(root: Path, name: str) -> Path:
    return root / _LABEL / Path(name.removeprefix(LM_EVAL)).stem
