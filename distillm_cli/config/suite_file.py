"""Read suites from YAML files: the source of their rows, and the settings that they are scored with.

source: questions.jsonl
license: CC BY 4.0
template: plain
metrics: [exact_match, length]
seeds: [10, 20, 30]
generation: {temperature: 0.7, max_new_tokens: 64}
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from distillm_cli.config import yaml_io
from distillm_cli.config.explain import format_value
from distillm_cli.config.fields import Name, Section
from distillm_cli.config.merging import read_document
from distillm_cli.config.schema import DataConfig, EvalConfig
from distillm_cli.errors import DataError
from distillm_cli.utils.storage import ASSETS

SUFFIXES = (".yaml", ".yml")
LM_EVAL = "lm-eval:"  # prefix of suites that are tasks of lm-eval
_OF_EVAL = ("metrics", "rouge_tokenizer", "seeds", "strip_reasoning", "limit")
_GENERATION = ("greedy", "temperature", "top_p", "top_k", "max_new_tokens", "no_repeat_ngram_size")


class SuiteFile(Section):
    """Hold the content of a suite file. source: a known data set, or a file or directory next to the suite file.

    generation: settings of the ``eval`` section by name. Settings that are not given are those of the command.
    """

    source: Name
    name: Name | None = None
    description: str = ""
    license: str | None = None
    template: str | None = None
    metrics: tuple[str, ...] | None = Field(None, min_length=1)
    rouge_tokenizer: str | None = None
    seeds: tuple[int, ...] | None = Field(None, min_length=1)
    strip_reasoning: bool | None = None
    limit: int | None = None
    generation: dict[str, Any] = Field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """Return the given values of the ``eval`` section."""
        found = {name: getattr(self, name) for name in _OF_EVAL if getattr(self, name) is not None}
        found |= self.generation
        is_sampled = self.seeds is not None or self.generation.keys() & {"temperature", "top_p", "top_k"}
        if "greedy" not in found and is_sampled:
            found["greedy"] = False  # even if the checkpoint's recipe is greedy
        return found

    def config(self, own: EvalConfig, by_hand: Collection[str] = ()) -> EvalConfig:
        """Return the settings for the suite: those of the file over ``own``.

        by_hand: keys of the command that stay. A limit of ``own`` stays too, since it has selected the rows.
        """
        changes = {key: value for key, value in self.settings().items() if f"eval.{key}" not in by_hand}
        if own.limit is not None:
            changes.pop("limit", None)
        return EvalConfig.model_validate({**own.model_dump(), **changes})


def shipped_suites() -> dict[str, Path]:
    """Return the suite files of this package: name → file."""
    return {path.stem: path for path in sorted((ASSETS / "suites").glob("*.yaml"))}


def suite_path(name: str) -> Path | None:
    """Return the file of a suite: a shipped name or the path of a YAML file; None for anything else."""
    if name in shipped_suites():
        return shipped_suites()[name]
    path = Path(name).expanduser()
    return path if path.suffix in SUFFIXES and not name.startswith(LM_EVAL) else None


def read_suite_file(path: Path) -> SuiteFile:
    """Read a suite file. Raises RecipeError for one that is not YAML, and DataError for wrong keys or values."""
    if not path.is_file():
        raise DataError("data.not_found", f"no suite file {path}", hint="`distillm eval --list` lists the shipped ones")
    node = read_document(path, str(path))
    try:
        suite = SuiteFile.model_validate(yaml_io.node_value(node, str(path)))
        unknown = sorted(set(suite.generation) - set(_GENERATION))
        if unknown:
            raise _invalid(path, f"generation.{unknown[0]}: no such setting; there are {', '.join(_GENERATION)}")
        suite.config(EvalConfig())
        DataConfig(**({"template": suite.template} if suite.template else {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        raise _invalid(path, f"{key} = {format_value(first['input'])}: {problem}") from None
    if suite_path(suite.source) is not None:
        raise _invalid(path, f"source = {suite.source}: a suite file, expected rows")
    beside = path.parent / suite.source
    if beside.exists():
        suite = suite.model_copy(update={"source": str(beside)})
    return suite


def _invalid(path: Path, problem: str) -> DataError:
    hint = f"keys are {', '.join(SuiteFile.model_fields)}; see docs/evaluation.md"
    return DataError("data.invalid_suite", f"{path}: {problem}", hint=hint)
