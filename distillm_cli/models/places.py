"""Where a model is: a local directory, a hub name, the one shipped here; and what an adapter found there belongs to."""

from __future__ import annotations

import functools
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub

from distillm_cli.config.student_spec import BUILTIN, is_built_without_file, is_on_hub
from distillm_cli.errors import ModelError
from distillm_cli.utils.storage import leads_nowhere

CONFIG = "adapter_config.json"  # what makes a directory an adapter's
BUILTIN_TEACHER = Path(__file__).resolve().parent.parent / "assets" / "quickstart-teacher"


def locate(path: str) -> tuple[str, bool]:
    """`path` as transformers takes it, and whether it is a local directory. `builtin` is the teacher shipped here."""
    place = BUILTIN_TEACHER if path == BUILTIN else Path(path).expanduser()
    if place.is_dir():
        return str(place), True
    if place.is_file():
        raise ModelError(f"{path} is a file, not a model directory", hint=f"pass {place.parent}")
    if leads_nowhere(place):
        raise ModelError(f"{path} is a symbolic link that leads nowhere", hint="correct the link, or pass another path")
    if not is_on_hub(path):
        raise ModelError(f"no model at {place}: no such directory", hint="check the path")
    return path, False


@dataclass(frozen=True)
class Place:
    """A name as transformers takes it, whether it is a local directory, and which revision of it."""

    name: str
    local: bool
    revision: str | None = None


def cached(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a hub repository as it was fetched before; None where it was not."""
    found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def file_of(path: str, file: str, revision: str | None = None) -> Path | None:
    """Return one of a model's small files, fetched from the hub where that is needed and possible; None without it."""
    name, local = locate(path)
    if local:
        place = Path(name) / file
        return place if place.is_file() else None
    found = cached(name, file, revision)
    if found is None and hub_is_there():
        with suppress(Exception):  # no such file, no such repository, no access: the loader reports it
            found = Path(huggingface_hub.hf_hub_download(name, file, revision=revision))
    return found


@functools.cache
def hub_is_there() -> bool:
    """Whether the hub answers; asked once, and not where HF_HUB_OFFLINE is set.

    Where it does not, this process goes on as under HF_HUB_OFFLINE: what was downloaded before is read. The hub's client
    would try each file of a model six times, for half a minute each.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10, follow_redirects=False)
    except Exception:  # name resolution, refusal, a proxy, a certificate: whatever it is, nothing can be fetched
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return False
    return True


def base_of(name: str, *, local: bool, revision: str | None) -> tuple[str, str | None] | None:
    """The model that an adapter (a directory, or a hub name) belongs to, and its revision; None for anything else."""
    from transformers.utils.peft_utils import find_adapter_config_file

    if not local:
        hub_is_there()
    try:
        file = find_adapter_config_file(name, revision=revision, local_files_only=local)
    except Exception:  # no such repository, no network: whoever loads the model says it better
        return None
    if file is None:
        return None
    return base_in(Path(file))


def base_in(file: Path) -> tuple[str, str | None]:
    """The model that an adapter's config names, and its revision. Raises ModelError."""
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        base = told.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"cannot read {file}: {error}", hint="copy or download the adapter again") from error
    if not base:
        raise ModelError(f"{file} does not name the model it adapts", hint="add base_model_name_or_path to it")
    return base, told.get("revision")


def adapters_of(path: str, revision: str | None = None) -> tuple[list[Place], str, str | None]:
    """LoRA adapters, the outermost first, and what they adapt: its path and revision. For a model: none, and itself."""
    adapters: list[Place] = []
    while True:
        if adapters and is_built_without_file(path):
            raise ModelError(
                f"{adapters[-1].name} is an adapter of a model that its run built ({path}) and that is not kept",
                hint="give the run's output directory",
            )
        try:
            name, local = locate(path)
        except ModelError as error:
            raise error if not adapters else no_base(adapters[-1], path, error) from error
        found = base_of(name, local=local, revision=revision)
        if found is None:
            return adapters, path, revision
        if any(place.name == name for place in adapters):
            raise ModelError(f"{name} is an adapter of itself", hint=f"see base_model_name_or_path in its {CONFIG}")
        adapters.append(Place(name, local, revision))
        path, revision = found


def lasting(path: str) -> str:
    """A model's name as another place may read it: a directory in full, a hub name as it is."""
    name, local = locate(path)
    return str(Path(name).resolve()) if local else name


def no_base(adapter: Place, base: str, error: ModelError) -> ModelError:
    return ModelError(
        f"{adapter.name} is an adapter of {base}, which does not load: {error.what}",
        hint=f"put that model there, or name its new place in {adapter.name}/{CONFIG} (base_model_name_or_path)",
    )
