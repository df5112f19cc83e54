"""Sample from a model on a server in ``generate`` and ``eval``: no weights are needed here.

With a model directory, prompts are tokenized by its tokenizer and sent as token ids. With the name of a model on the
server, they are sent as text or as chat messages, which any OpenAI-compatible server takes.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from pathlib import Path

import numpy as np

from distillm_cli.config.schema import EvalConfig, Recipe
from distillm_cli.config.student_spec import BUILTIN_MODELS
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.text_prompts import TextEncoder, text_or_messages
from distillm_cli.errors import UsageError
from distillm_cli.rollouts.next_token import Sampling
from distillm_cli.rollouts.sampler import SampledOutput
from distillm_cli.runs import inference
from distillm_cli.runs.run_results import SERVER
from distillm_cli.servers.completions import Completion, Request, ServedModel, chat, complete, find_model, seed_of
from distillm_cli.servers.http import Server, in_parallel
from distillm_cli.training.events import Listener, Note

_FLAG = "--server"


class ServerModel:
    """Answer prompts by a server, in place of a model in this process.

    context: tokens of prompt and response; None if the server decides. stop_ids: of the responses to token ids.
    is_text: whether prompts come from ``TextEncoder``.
    """

    def __init__(
        self, server: Server, model: ServedModel, *, context: int | None, stop_ids: frozenset[int], is_text: bool
    ):
        self.server = server
        self.model = model
        self.context = context
        self.stop_ids = stop_ids
        self.is_text = is_text

    @property
    def identity(self) -> dict[str, str]:
        """Return what identifies the model in results, in place of a dtype and a fingerprint of weights."""
        return {"dtype": SERVER, "weights": f"{self.model.name} on a server"}

    def respond(
        self,
        prompts: SequenceOf[np.ndarray],
        sampling: Sampling,
        seeds: SequenceOf[tuple[int, int]],
        limits: SequenceOf[int],
    ) -> list[SampledOutput]:
        def ask(i: int) -> Completion:
            request = Request(
                limits[i],
                sampling.temperature,
                sampling.top_p,
                sampling.top_k,
                seed=seed_of(*seeds[i]),
                stop_ids=tuple(sorted(self.stop_ids)),
            )
            if not self.is_text:
                return complete(self.server, self.model, prompts[i].tolist(), request)
            prompt = text_or_messages(prompts[i])
            if isinstance(prompt, str):
                return complete(self.server, self.model, prompt, request)
            return chat(self.server, self.model, prompt, request)

        found = dict(in_parallel(ask, range(len(prompts)), len(prompts)))
        return [self._output(found[i]) for i in range(len(prompts))]

    def _output(self, completion: Completion) -> SampledOutput:
        if completion.token_ids is not None and not self.is_text:
            return SampledOutput(np.array(completion.token_ids, dtype=np.int32), completion.complete)
        unknown = np.full(completion.tokens, -1, dtype=np.int32)
        return SampledOutput(unknown, completion.complete, text=completion.text)


def is_server_name(model: str) -> bool:
    """Return whether ``--model`` is a name on the server, and not a directory with a tokenizer."""
    return model not in BUILTIN_MODELS and not Path(model).expanduser().is_dir()


def check_eval_on_server(model: str, config: EvalConfig) -> None:
    """Raise UsageError for a setting of ``eval`` that servers do not have."""
    problem = hint = None
    if config.no_repeat_ngram_size:
        problem = f"eval.no_repeat_ngram_size = {config.no_repeat_ngram_size}: servers do not limit repeated n-grams"
        hint = "try --set eval.no_repeat_ngram_size=0, which is another setting than the paper's"
    elif config.attack != "none":
        problem, hint = "eval.attack changes the model's input embeddings", "score the model without --server"
    elif config.trigger is not None and is_server_name(model):
        problem = "eval.trigger must be one token, and the tokenizer is on the server"
        hint = "pass a directory with the model's tokenizer in place of its name"
    if problem is not None:
        raise UsageError("usage.not_on_server", problem, where=_FLAG, hint=hint)


def connect_model(model: str, url: str, recipe: Recipe, listener: Listener) -> tuple[ServerModel, Encoder]:
    """Return a model of a server and the encoder of its prompts. Raises ServerError, ModelError."""
    server = Server(url, name=_FLAG)
    is_text = is_server_name(model)
    served = find_model(server, model, is_required=is_text)
    if is_text:
        listener(Note(f"{served.name} on {server.url}: prompts are sent as text, and the server tokenizes them"))
        data = recipe.data_of(inference.side_of(model, recipe))
        return ServerModel(server, served, context=None, stop_ids=frozenset(), is_text=True), TextEncoder(data)
    skeleton, encoder = inference.load_without_weights(model, recipe)
    bounds = [bound for bound in (skeleton.context, served.context) if bound is not None]
    listener(Note(f"{served.name} on {server.url}: prompts are sent as token ids of {model}"))
    return (
        ServerModel(server, served, context=min(bounds, default=None), stop_ids=skeleton.stop_ids, is_text=False),
        encoder,
    )
