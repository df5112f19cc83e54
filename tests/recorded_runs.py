"""Write directories as finished runs leave them, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distillm_cli.config.load import resolve, to_yaml
from distillm_cli.runs.output_dir import recipe_header


def write_run(directory: Path, *sets: str, seconds: float = 10.0, **scores: float) -> Path:
    """Write the recipe, the result and the metrics of a run. scores: of the student after training."""
    directory.mkdir(parents=True)
    resolved = resolve(command="distill", recipe="quickstart", sets=list(sets))
    (directory / "recipe.yaml").write_text(recipe_header() + to_yaml(resolved))
    (directory / "result.json").write_text(json.dumps(result_of(seconds, **scores)))
    lines: list[dict[str, Any]] = []
    for step in range(1, 41):
        source = "rollout" if step % 2 else "dataset"
        lines.append({"step": step, "source": source, "loss": 1 / step, "phi": step / 40, "seconds": 0.25})
        if step % 10 == 0:
            lines.append({"step": step, "valid_loss": 2 / step, "phi": step / 40})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def result_of(seconds: float, **scores: float) -> dict[str, Any]:
    """Return the object of ``result.json``."""
    report = {"student_before": {"valid_loss": 5.0}, "student_after": {"valid_loss": 0.5, **scores}}
    return {
        "command": "distill",
        "status": "ok",
        "steps": 40,
        "tokens": 4000,
        "tokens_per_s": 4000 / seconds,
        "train_s": seconds,
        "wall_s": seconds + 1,
        "rollout_steps": 20,
        "replay_steps": 10,
        "dataset_steps": 10,
        "teacher_tokens": 1000,
        "report": report,
    }


def write_evaluation(directory: Path, suite: str, settings: str, metric: str, *values: float) -> None:
    """Write the results of an evaluation: one value per seed."""
    place = directory / "eval" / suite / settings
    place.mkdir(parents=True)
    score = {"mean": sum(values) / len(values), "sd": 1.5, "seeds": {str(10 * i): v for i, v in enumerate(values)}}
    (place / "results.json").write_text(json.dumps({"suite": suite, "rows": 7, metric: score}))
