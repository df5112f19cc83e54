"""Build the vLLM command that serves a recipe's student for rollouts, or its teacher for hidden states."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from distillm_cli.config.load import Resolved
from distillm_cli.config.schema import AUTO, Recipe, chosen
from distillm_cli.errors import UsageError
from distillm_cli.runs.defaults import fitted
from distillm_cli.training.events import Listener, Note, Warned

if TYPE_CHECKING:
    import torch

Role = Literal["rollouts", "teacher"]
ROLES: tuple[Role, ...] = ("rollouts", "teacher")
PROGRAM = "DISTILLM_VLLM"  # environment variable: path of the vllm program
_PORTS: dict[Role, int] = {"rollouts": 8000, "teacher": 8001}
_USUAL_PORTS = {"http": 80, "https": 443}
_LOOPBACK = "127.0.0.1"
_POOLER = {"task": "token_embed", "tok_pooling_type": "ALL", "use_activation": False}
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class ServeCommand:
    """Describe a command. arguments: the program first. environment: its additional variables. url: for the recipe."""

    role: Role
    arguments: tuple[str, ...]
    url: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """Return the command as a line for a POSIX shell."""
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), shlex.join(self.arguments)])

    def as_json(self) -> dict[str, Any]:
        """Return the object of ``--json``."""
        return {
            "command": "serve",
            "status": "ok",
            "role": self.role,
            "arguments": list(self.arguments),
            "environment": dict(self.environment),
            "line": self.line,
            "url": self.url,
        }

    def start(self) -> None:
        """Replace this process by the server. Raises UsageError if the program is not found."""
        program = shutil.which(self.arguments[0])
        if program is None:
            hint = f"install vllm in an environment of its own, and set {PROGRAM} to its vllm program"
            raise UsageError("usage.no_vllm", f"no program {self.arguments[0]}", hint=hint)
        os.execve(program, list(self.arguments), {**os.environ, **self.environment})


def serve_command(role: Role, resolved: Resolved, more: SequenceOf[str], listener: Listener) -> ServeCommand:
    """Return the command for a role. A student that the run builds is built and saved first, for vLLM to load.

    more: further options of `vllm serve`. Raises UsageError, ModelError.
    """
    from distillm_cli.models.devices import dtype_name, resolve_device, resolve_dtype
    from distillm_cli.servers.vllm import DEV_MODE, TESTED

    recipe = fitted(resolved).recipe
    is_teacher = role == "teacher"
    if (recipe.teacher.path if is_teacher else recipe.student.path) is None:
        what = "no teacher to serve" if is_teacher else "no student to serve"
        raise UsageError("usage.no_model", what, hint="give --model, or --recipe with one")
    device = resolve_device(recipe.train.device)
    dtype = resolve_dtype(recipe.teacher_dtype if is_teacher else recipe.student.dtype, device)
    model = _teacher_name(recipe) if is_teacher else _student_name(recipe, dtype, listener)
    url = (recipe.teacher.server if is_teacher else recipe.rollout.server) or f"http://{_LOOPBACK}:{_PORTS[role]}"
    address = urlsplit(url)
    host = address.hostname or _LOOPBACK
    arguments = [os.environ.get(PROGRAM, "vllm"), "serve", model, "--dtype", _DTYPES[dtype_name(dtype)]]
    revision = recipe.teacher.revision if is_teacher else recipe.student.revision
    if Path(model).is_dir():
        revision = None
    length = _length(recipe, model, revision)
    arguments += [] if length is None else ["--max-model-len", str(length)]
    arguments += [] if revision is None else ["--revision", revision]
    environment = {}
    if is_teacher:
        arguments += ["--runner", "pooling", "--convert", "embed", "--pooler-config", json.dumps(_POOLER)]
    else:
        arguments += ["--generation-config", "vllm"]  # without the sampling defaults of the model's own
        environment[DEV_MODE] = "1"
        if host not in (_LOOPBACK, "localhost", "::1"):
            listener(Warned(f"{DEV_MODE} lets everyone who reaches {host} run the server's internal functions"))
    port = address.port or _USUAL_PORTS[address.scheme]
    arguments += ["--host", host, "--port", str(port), *more]
    listener(Note(f"for vLLM {', '.join(TESTED)}; the recipe's address is {url}"))
    return ServeCommand(role, tuple(arguments), url, environment)


def _length(recipe: Recipe, model: str, revision: str | None) -> int | None:
    """Return the longest sequence that the server must take: that of the run, within the model's context.

    None without a recipe: vLLM takes the model's context.
    """
    from distillm_cli.models.model_families import context_of
    from distillm_cli.models.served import served_config

    context = context_of(served_config(model, revision=revision))
    if recipe.data.max_length == AUTO:
        return None
    longest = chosen(recipe.data.max_length)
    return longest if context is None else min(longest, context)


def _teacher_name(recipe: Recipe) -> str:
    from distillm_cli.models.model_paths import portable_name

    return portable_name(str(recipe.teacher.path))


def _student_name(recipe: Recipe, dtype: torch.dtype, listener: Listener) -> str:
    """Return a directory or hub name with the student's shape; vLLM gets the weights before each draw."""
    from distillm_cli.models.model_paths import adapter_chain, portable_name

    path = recipe.student.required_path
    if not (recipe.student.is_built or adapter_chain(path, recipe.student.revision)[0]):
        return portable_name(path)
    place = _saved_student(recipe, dtype, listener)
    listener(Note(f"the student {path} is saved in {place}, for vLLM to load"))
    return str(place)


def _saved_student(recipe: Recipe, dtype: torch.dtype, listener: Listener) -> Path:
    """Build or load the student, and save it with its tokenizer in the user's cache."""
    import torch

    from distillm_cli.config.student_spec import copies_layers
    from distillm_cli.models.pair import create_student, load_backbone
    from distillm_cli.models.served import StudentFiles, load_skeleton
    from distillm_cli.runs.prepare import texts_of
    from distillm_cli.runs.start import prefetch_rows
    from distillm_cli.utils.storage import atomic_directory, cache_root, storing

    device = torch.device("cpu")
    teacher = None
    if recipe.student.is_built and recipe.teacher.path is not None:
        path, revision = recipe.teacher.path, recipe.teacher.revision
        if copies_layers(recipe.student.path):
            teacher = load_backbone(path, dtype=torch.float32, device=device, revision=revision)
        else:
            teacher = load_skeleton(path, dtype=torch.float32, revision=revision)
    with prefetch_rows(recipe) as rows:
        student = create_student(
            recipe.student,
            seed=recipe.train.seed,
            device=device,
            teacher=teacher,
            texts=lambda tokenizer: texts_of(rows.rows("train", listener), recipe.data, tokenizer),
            max_length=chosen(recipe.data.max_length),
            listener=listener,
        )
    files = StudentFiles(student, dtype)
    place = cache_root("students", None) / student.fingerprint()[:16]
    with storing(f"cannot write {place}", "set DISTILLM_CACHE to a directory with room"):
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(place) as staged:
            files.save(staged)
            student.tokenizer.save_pretrained(staged)
    return place
