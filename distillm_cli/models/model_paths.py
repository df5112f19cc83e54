"""Find a model (a local directory, a hub name or a built-in one) and the base model of an adapter."""

from __future__ import annotations

import functools
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from distillm_cli.config.student_spec import BUILTIN, BUILTIN_MODELS, is_built_without_file, is_on_hub
from distillm_cli.errors import ModelError
from distillm_cli.utils.storage import ASSETS, is_broken_link

ADAPTER_CONFIG = "adapter_config.json"  # a directory with this file is an adapter
BUILTIN_TEACHER = ASSETS / BUILTIN_MODELS[BUILTIN]


def locate_model(path: str) -> tuple[str, bool]:
    """Return the name for transformers, and whether it is a local directory. `builtin` is a model of this package."""
    directory = ASSETS / BUILTIN_MODELS[path] if path in BUILTIN_MODELS else Path(path).expanduser()
    if directory.is_dir():
        return str(directory), True
    if directory.is_file():
        raise ModelError("model.not_found", f"{path} is a file, not a model directory", hint=f"pass {directory.parent}")
    if is_broken_link(directory):
        raise ModelError(
            "model.not_found",
            f"{path} is a broken symbolic link",
            hint="correct the link, or pass another path",
        )
    if not is_on_hub(path):
        raise ModelError("model.not_found", f"no model at {directory}: no such directory", hint="check the path")
    return path, False


@dataclass(frozen=True)
class ModelLocation:
    """Hold a name for transformers, whether it is a local directory, and its revision."""

    name: str
    local: bool
    revision: str | None = None


def cached_hub_file(name: str, file: str, revision: str | None) -> Path | None:
    """Return a file of a hub repository that was downloaded before; None if it was not."""
    found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def model_file(path: str, file: str, revision: str | None = None) -> Path | None:
    """Return the path of one of a model's small files, downloaded if needed; None if it is not available."""
    name, local = locate_model(path)
    if local:
        local_file = Path(name) / file
        return local_file if local_file.is_file() else None
    found = cached_hub_file(name, file, revision)
    if found is None and hub_is_reachable():
        with suppress(Exception):  # no such file, no such repository, no access: the loader reports it
            found = Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
    return found


@functools.cache
def hub_is_reachable() -> bool:
    """Return whether the hub can be reached. It is tried once, or not at all if HF_HUB_OFFLINE is set.

    If it cannot, this process continues as with HF_HUB_OFFLINE: downloaded files are read. The hub's client would
    otherwise try each file of a model six times, for half a minute each.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10, follow_redirects=False)
    except Exception:  # name resolution, refusal, a proxy, a certificate: the hub cannot be reached
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return False
    return True


def base_model_of(name: str, *, local: bool, revision: str | None) -> tuple[str, str | None] | None:
    """Return the base model of an adapter (a directory or a hub name) and its revision; None for anything else."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if not local:
        hub_is_reachable()
    try:
        file = find_adapter_config_file(name, revision=revision, local_files_only=local)
    except Exception:  # no such repository, no network: the loader reports it with more detail
        return None
    if file is None:
        return None
    return read_base_model(Path(file))


def read_base_model(file: Path) -> tuple[str, str | None]:
    """Return the base model that an adapter's config names, and its revision. Raises ModelError."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        base = config.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            "model.invalid_adapter", f"cannot read {file}: {error}", hint="copy or download the adapter again"
        ) from error
    if not base:
        raise ModelError(
            "model.invalid_adapter",
            f"{file} does not name its base model",
            hint="add base_model_name_or_path to it",
        )
    return base, config.get("revision")


def adapter_chain(path: str, revision: str | None = None) -> tuple[list[ModelLocation], str, str | None]:
    """Return the LoRA adapters of a path, the outermost first, and path and revision of their model.

    For a model: no adapters.
    """
    adapters: list[ModelLocation] = []
    while True:
        if adapters and is_built_without_file(path):
            raise ModelError(
                "model.no_adapter_base",
                f"{adapters[-1].name} is an adapter of a model that its run built ({path}) and did not save",
                hint="use the run's output directory",
            )
        try:
            name, local = locate_model(path)
        except ModelError as error:
            raise error if not adapters else base_not_loaded(adapters[-1], path, error) from error
        base = base_model_of(name, local=local, revision=revision)
        if base is None:
            return adapters, path, revision
        if any(adapter.name == name for adapter in adapters):
            raise ModelError(
                "model.no_adapter_base",
                f"{name} is an adapter of itself",
                hint=f"see base_model_name_or_path in its {ADAPTER_CONFIG}",
            )
        adapters.append(ModelLocation(name, local, revision))
        path, revision = base


def portable_name(path: str) -> str:
    """Return a model's name that is valid from any directory: an absolute path, or a hub name."""
    name, local = locate_model(path)
    return str(Path(name).resolve()) if local else name


def base_not_loaded(adapter: ModelLocation, base: str, error: ModelError) -> ModelError:
    """Return the error for an adapter whose model does not load."""
    return ModelError(
        "model.no_adapter_base",
        f"{adapter.name} is an adapter of {base}, which does not load: {error.what}",
        hint=f"restore that model, or set its new path in {adapter.name}/{ADAPTER_CONFIG} (base_model_name_or_path)",
    )
