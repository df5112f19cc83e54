"""Check the servers of a run before its models are loaded, and connect to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillm_cli.config.schema import AUTO, Recipe, chosen
from distillm_cli.errors import ServerError

if TYPE_CHECKING:
    from distillm_cli.runs.prepare import Prepared
    from distillm_cli.servers.completions import ServedModel
    from distillm_cli.servers.http import Server

_CHECKED_ROWS = 8


def check_servers(recipe: Recipe) -> None:
    """Check that the servers of a fitted recipe are there and have what the run needs. Raises ServerError, UsageError."""
    if recipe.method == "sft" or recipe.data.max_length == AUTO:  # auto: loading the models reports why
        return
    for key, connect in (("rollout.server", rollout_server), ("teacher.server", teacher_server)):
        if (recipe.rollout if key.startswith("rollout") else recipe.teacher).server is None:
            continue
        server, model = connect(recipe)
        longest = chosen(recipe.data.max_length)
        if model.context is not None and model.context < longest:
            what = f"{server.url} serves at most {model.context:,} tokens, and data.max_length is {longest:,}"
            hint = f"start it with --max-model-len {longest}, or try --max-length {model.context}"
            raise ServerError("server.context_too_short", what, where=server.name, hint=hint)


def rollout_server(recipe: Recipe) -> tuple[Server, ServedModel]:
    """Return the server of ``rollout.server`` and its model. Raises ServerError unless it can load new weights."""
    from distillm_cli.servers.completions import find_model
    from distillm_cli.servers.http import Server
    from distillm_cli.servers.vllm import check_reloads, check_vllm

    server = Server(str(recipe.rollout.server), name="rollout.server")
    model = find_model(server, recipe.student.required_path)
    check_vllm(server, model)
    check_reloads(server)
    return server, model


def teacher_server(recipe: Recipe) -> tuple[Server, ServedModel]:
    """Return the server of ``teacher.server`` and its model. Raises ServerError."""
    from distillm_cli.servers.completions import find_model
    from distillm_cli.servers.http import Server
    from distillm_cli.servers.vllm import check_vllm

    server = Server(str(recipe.teacher.server), name="teacher.server")
    model = find_model(server, str(recipe.teacher.path))
    check_vllm(server, model)
    return server, model


def check_served_teacher(run: Prepared) -> None:
    """Check that a teacher on a server predicts the training rows. Raises ServerError."""
    from distillm_cli.models.served import ServedTeacher

    if isinstance(run.pair.teacher, ServedTeacher):
        run.pair.teacher.check_better_than_chance(run.train.sequences[:_CHECKED_ROWS])
