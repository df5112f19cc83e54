"""The part of a recipe that decides what the steps of a run compute."""

from __future__ import annotations

from collections.abc import Iterator

from distillm_cli import plugins
from distillm_cli.config.schema import Recipe
from distillm_cli.utils.text import redact

# What may differ between a run and its resume, because no later step depends on it.
_FREE = ("teacher.cache_dir", "train.keep", "train.log_steps", "train.device", "train.threads", "data.workers")
_FREE += ("eval.suites", "eval.batch_size")


def shaping(recipe: Recipe) -> dict:
    """Return the part of a recipe that shapes the steps of a run, as dotted keys: what a resume must find unchanged.

    Credentials in addresses are left out, since it is written down.

    How answers are scored is part of it where a metric of them selects the checkpoint.
    """
    free = _FREE if recipe.train.select in plugins.metrics else (*_FREE, "eval")

    def flat(section: dict, prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in section.items():
            dotted = f"{prefix}{key}"
            if dotted in free:
                continue
            if isinstance(value, dict):
                yield from flat(value, f"{dotted}.")
            else:
                yield dotted, redact(value) if isinstance(value, str) else value

    return dict(flat(recipe.model_dump(mode="json"), ""))
