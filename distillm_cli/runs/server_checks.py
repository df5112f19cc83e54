"""Check the servers of a run before its models are loaded, and connect to the one for rollouts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillm_cli.config.schema import AUTO, Recipe, chosen
from distillm_cli.errors import ServerError
from distillm_cli.training.events import Listener, Note

if TYPE_CHECKING:
    from distillm_cli.runs.prepare import Prepared
    from distillm_cli.servers.completions import ServedModel
    from distillm_cli.servers.http import Server

_CHECKED_ROWS = 8


def check_servers(recipe: Recipe, listener: Listener) -> None:
    """Check that the servers of a fitted recipe are there and have what the run needs. Raises ServerError, UsageError."""
    if recipe.method == "sft" or recipe.data.max_length == AUTO:  # auto: loading the models reports why
        return
    if recipe.rollout.server is not None:
        server, model = rollout_server(recipe)
        _check(server, model, recipe, listener)
    if recipe.teacher.server is not None:
        from distillm_cli.servers.vllm import connect

        server, model = connect(recipe.teacher.server, "teacher.server", str(recipe.teacher.path))
        _check(server, model, recipe, listener)


def rollout_server(recipe: Recipe) -> tuple[Server, ServedModel]:
    """Return the server of ``rollout.server`` and its model. Raises ServerError unless it can load new weights."""
    from distillm_cli.servers.vllm import check_reloads, connect

    server, model = connect(str(recipe.rollout.server), "rollout.server", recipe.student.required_path)
    check_reloads(server)
    return server, model


def _check(server: Server, model: ServedModel, recipe: Recipe, listener: Listener) -> None:
    """Raise ServerError for a server that takes shorter sequences than the run has; report a release that was not tried."""
    from distillm_cli.servers.vllm import TESTED, untried_version

    if (version := untried_version(server)) is not None:
        listener(Note(f"{server.url} runs vLLM {version}, which was not tried ({', '.join(TESTED)} was)"))
    longest = chosen(recipe.data.max_length)
    if model.context is not None and model.context < longest:
        what = f"{server.url} serves at most {model.context:,} tokens, and data.max_length is {longest:,}"
        hint = f"start it with --max-model-len {longest}, or try --max-length {model.context}"
        raise ServerError("server.context_too_short", what, where=server.name, hint=hint)


def check_served_teacher(run: Prepared) -> None:
    """Check that a teacher on a server predicts the training rows. Raises ServerError."""
    if run.recipe.teacher.server is None:
        return
    from distillm_cli.models.served import ServedTeacher

    if isinstance(run.pair.teacher, ServedTeacher):
        run.pair.teacher.check_better_than_chance([s.for_teacher for s in run.train.sequences[:_CHECKED_ROWS]])
