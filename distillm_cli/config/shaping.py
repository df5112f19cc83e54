"""The part of a recipe that decides what the steps of a run compute."""

from __future__ import annotations

from collections.abc import Iterator

from distillm_cli.config.schema import Recipe

# What may differ between a run and its resume, because no later step depends on it.
_FREE = ("teacher.cache_dir", "train.keep", "train.log_steps", "train.device", "train.threads", "data.workers", "eval")


def shaping(recipe: Recipe) -> dict:
    """The part of a recipe that shapes the steps of a run, as dotted keys: what a resume must find unchanged."""

    def flat(section: dict, prefix: str) -> Iterator[tuple[str, object]]:
        for key, value in section.items():
            dotted = f"{prefix}{key}"
            if dotted in _FREE:
                continue
            if isinstance(value, dict):
                yield from flat(value, f"{dotted}.")
            else:
                yield dotted, value

    return dict(flat(recipe.model_dump(mode="json"), ""))
