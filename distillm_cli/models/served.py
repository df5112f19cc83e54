"""Connect models with servers: a teacher whose hidden states a vLLM pooling server computes, and a student for rollouts.

Of a served teacher only config, tokenizer and head are loaded here. The head is applied to the server's states, so losses,
caches and schedules are the same as with the whole model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distillm_cli.errors import ModelError, ServerError
from distillm_cli.models.backbone import Backbone, Head
from distillm_cli.models.loading import load_config, read_generation_config
from distillm_cli.models.model_paths import ModelLocation, adapter_chain, cached_hub_file, locate_model, model_file
from distillm_cli.models.shared import save_plain
from distillm_cli.models.students import auto_class
from distillm_cli.models.tokenizer_files import TokenizerCache, load_error, quiet
from distillm_cli.servers.completions import ServedModel
from distillm_cli.servers.http import Server
from distillm_cli.servers.vllm import connect, hidden_states, prompt_log_probs
from distillm_cli.types import Batch, Sequence, collate
from distillm_cli.utils.modules import weights_fingerprint

_WEIGHTS = "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_ENCODER_DECODER = "vLLM does not serve encoder-decoder models"

# Relative difference of two states, and mean difference of log-probabilities (nats), up to which they count as equal.
_ROUNDING = {torch.float32: (1e-4, 1e-3), torch.float16: (0.02, 0.1), torch.bfloat16: (0.1, 0.1)}


class ServedTeacher(Backbone):
    """Hold a teacher whose last hidden states come from a server.

    model: on the meta device, except for the head. fingerprint: of the weights in its files.
    """

    is_served = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        server: Server,
        served: ServedModel,
        fingerprint: str,
    ):
        super().__init__(model, tokenizer)
        if self.own_logits:
            raise _not_served(model.config.name_or_path, "its head is not a plain matrix product")
        self.server = server
        self.served = served
        self._fingerprint = fingerprint
        self.has_log_probs = False  # whether ``check_head`` compared the server's own log-probabilities

    @property
    def device(self) -> torch.device:
        """Return the device of the head."""
        return self.model.get_output_embeddings().weight.device

    def fingerprint(self) -> str:
        return self._fingerprint

    def state_dict(self, *args: Any, **keywords: Any) -> Mapping[str, Tensor]:  # type: ignore[override]
        """Return the head, and in place of the other weights their fingerprint."""
        digest = torch.frombuffer(bytearray(self._fingerprint.encode()), dtype=torch.uint8)
        head = {name: tensor for name, tensor in self.model.named_parameters() if tensor.device.type != "meta"}
        return {**head, "fingerprint": digest}

    @torch.no_grad()
    def hidden(self, batch: Batch, *, for_backward: bool = False) -> Tensor:
        """Return the last hidden states [N, D] that predict the supervised tokens, from the server."""
        B, T = batch.ids_BT.shape
        ids_BT = batch.ids_BT.cpu().numpy()
        positions_N = batch.positions_N.cpu().numpy()
        ends = np.searchsorted(positions_N, np.arange(1, B) * T)
        rows = {b: places - b * T for b, places in enumerate(np.split(positions_N, ends)) if len(places)}
        states = self._states([ids_BT[b, : places[-1] + 1].tolist() for b, places in rows.items()])
        parts = [state[torch.from_numpy(places)] for state, places in zip(states, rows.values(), strict=True)]
        weight_VD = self.model.get_output_embeddings().weight
        found_ND = torch.cat([weight_VD.new_zeros(0, weight_VD.shape[1], device="cpu"), *parts])
        return found_ND.to(batch.ids_BT.device)

    def _states(self, ids: SequenceOf[SequenceOf[int]]) -> list[Tensor]:
        if not ids:
            return []
        weight_VD = self.model.get_output_embeddings().weight
        name = str(weight_VD.dtype).removeprefix("torch.")
        found = hidden_states(self.server, self.served, ids, dtype=name, width=weight_VD.shape[1])
        states = [torch.from_numpy(array.copy()) for array in found]
        return [state.view(torch.bfloat16) if name == "bfloat16" else state for state in states]

    @torch.no_grad()
    def check_head(self, batch: Batch) -> bool:
        """Check that the server gives the same states twice and, if it has them, the head's log-probabilities.

        Returns True. Raises ServerError.
        """
        states_tolerance, nats = _ROUNDING[self.model.get_output_embeddings().weight.dtype]
        first_ND, second_ND = self.hidden(batch).float(), self.hidden(batch).float()
        difference = ((first_ND - second_ND).norm() / first_ND.norm().clamp_min(1e-12)).item()
        if not difference <= states_tolerance:  # also if it is NaN
            raise self._other_model(f"two requests for the same tokens differ by {difference:.2g} of their size")
        own = prompt_log_probs(self.server, self.served, batch.ids_BT[0].tolist())
        if own is not None:
            ids = batch.ids_BT[0].cpu().numpy().astype("int32")
            inside = collate([Sequence(ids[:1], ids[1:])]).to(self.device)
            head = self.model.get_output_embeddings()
            whole = Head(
                head.weight, getattr(head, "bias", None), self.head_scale, self.head_softcap
            )  # as the server's
            found = _target_log_probs(whole.logits(self.hidden(inside)), inside)
            difference = (found.cpu() - torch.tensor(own)).abs().mean().item()
            if not difference <= nats:
                raise self._other_model(f"its log-probabilities differ from the head's by {difference:.2g} nats")
            self.has_log_probs = True
        return True

    def check_better_than_chance(self, sequences: SequenceOf[Sequence]) -> float | None:
        """Return the mean cross-entropy of the rows' responses, nats; None without any.

        Raises ServerError if it is not below that of equal probabilities: the states are not those of this head.
        """
        answered = [sequence for sequence in sequences if sequence.supervised]
        if not answered:
            return None
        batch = collate(answered).to(self.device)
        loss = -_target_log_probs(self.head().logits(self.hidden(batch)), batch).mean().item()
        chance = math.log(self.vocab)
        if not loss < chance and not self.has_log_probs:
            raise self._other_model(
                f"with this head, the rows' responses have {loss:.3g} nats per token, no better than chance ({chance:.3g})"
            )
        return loss

    def _other_model(self, why: str) -> ServerError:
        what = f"{self.server.url} does not serve the teacher {self.model.config.name_or_path}: {why}"
        hint = "serve this teacher, in the dtype of teacher.dtype; `distillm serve teacher` prints the command"
        return ServerError("server.other_model", what, where=self.server.name, hint=hint)

    def check_decoding(self) -> bool:
        raise ModelError("model.served", "a served teacher gives hidden states, and does not generate")

    def check_embeddings(self) -> None:
        raise ModelError("model.served", "a served teacher does not run on input embeddings")


class StudentFiles:
    """Give a student to ``ServerSampler``: its weights as files, and its log-probabilities.

    dtype: of the saved weights, that of the computation in training.
    """

    def __init__(self, student: Backbone, dtype: torch.dtype):
        if student.is_encoder_decoder:
            raise _not_served(student.model.config.name_or_path, _ENCODER_DECODER)
        if student.is_quantized:
            raise _not_served(student.model.config.name_or_path, "its weights are quantized and cannot be sent")
        self.student = student
        self.dtype = dtype

    @property
    def context(self) -> int | None:
        return self.student.context

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.student.stop_ids

    @property
    def suppressed_ids(self) -> tuple[int, ...]:
        """Return the ids of the head's matrix that are not in the vocabulary of the loss."""
        return tuple(range(self.student.vocab, self.student.model.get_output_embeddings().weight.shape[0]))

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @torch.no_grad()
    def save(self, directory: Path) -> None:
        """Save the current weights, with an adapter merged in."""
        student = self.student
        if student.adapter is not None or student.model.dtype != self.dtype:
            student = student.plain(self.dtype)
        with quiet():
            save_plain(student.model, directory)

    @torch.no_grad()
    def log_probs(self, sequences: SequenceOf[Sequence]) -> Tensor:
        """Return the log-probabilities of the response tokens [N], nats, over all rows of the head's matrix."""
        batch = collate(sequences).to(self.student.device)
        logits_BTV = self.student.model(input_ids=batch.ids_BT, attention_mask=None, use_cache=False).logits
        logits_NV = logits_BTV.flatten(0, 1).index_select(0, batch.positions_N).float()
        return _target_log_probs(logits_NV, batch)


def _target_log_probs(logits_NV: Tensor, batch: Batch) -> Tensor:
    """Return the log-probabilities of a batch's supervised tokens [N], nats, over all rows of the logits."""
    return logits_NV.log_softmax(-1).gather(-1, batch.targets_N[:, None])[:, 0]


def load_served_teacher(
    path: str,
    url: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    tokenizers: TokenizerCache | None = None,
) -> ServedTeacher:
    """Load config, tokenizer and head of a teacher that a vLLM pooling server runs.

    dtype: of the head and of the states. Raises ModelError, ServerError.
    """
    server, served = connect(url, "teacher.server", path)
    skeleton = load_skeleton(path, dtype=dtype, revision=revision, tokenizers=tokenizers)
    weights = _WeightFiles(path, revision)
    head = skeleton.model.get_output_embeddings()
    if head is None:
        raise _not_served(path, "it has no head")
    (name,) = [name for name, module in skeleton.model.named_modules() if module is head]
    names = [f"{name}.weight", *(n for n, w in skeleton.model.named_parameters() if w is head.weight)]
    for part, candidates in (("weight", names), ("bias", [f"{name}.bias"])):
        empty = getattr(head, part, None)
        if empty is not None:
            found = weights.find(candidates, tuple(empty.shape))
            setattr(head, part, nn.Parameter(found.to(device, dtype), requires_grad=False))
    return ServedTeacher(skeleton.model, skeleton.tokenizer, server, served, weights.fingerprint(head.weight))


def served_config(path: str, *, revision: str | None = None) -> PretrainedConfig:
    """Return the config of a model that vLLM can serve. Raises ModelError for an adapter and for an encoder-decoder."""
    if adapter_chain(path, revision)[0]:
        raise _not_served(path, "it is a LoRA adapter; merge it into its model first")
    config = load_config(path, revision=revision)
    if config.is_encoder_decoder:
        raise _not_served(path, _ENCODER_DECODER)
    return config


def load_skeleton(
    path: str, *, dtype: torch.dtype, revision: str | None = None, tokenizers: TokenizerCache | None = None
) -> Backbone:
    """Load a causal model without weights: config, tokenizer and end tokens. Raises ModelError."""
    config = served_config(path, revision=revision)
    tokenizer = (tokenizers or TokenizerCache()).load(path, revision)
    with quiet(), torch.device("meta"):
        try:
            model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False).eval()
        except Exception as error:  # the type depends on the family
            raise load_error("config", path, True, error) from error
    if model.generation_config is None:
        model.generation_config = GenerationConfig()
    read_generation_config([ModelLocation(path, False, revision)], model)
    return Backbone(model, tokenizer)


class _WeightFiles:
    """Read single tensors from a model's safetensors files, and fingerprint the files that are present."""

    def __init__(self, path: str, revision: str | None):
        self.path = path
        self.revision = revision
        index = model_file(path, _INDEX, revision)
        if index is not None:
            try:
                self.files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (OSError, ValueError, KeyError) as error:
                raise load_error("weights", path, True, error) from error
        else:
            self.files = dict.fromkeys(self._names(_WEIGHTS), _WEIGHTS)

    def find(self, candidates: SequenceOf[str], shape: tuple[int, ...]) -> Tensor:
        """Return the tensor with one of these names, or with the end of one of them as in other versions of the model."""
        for candidate in candidates:
            parts = candidate.split(".")
            for start in range(len(parts) - 1):
                end = ".".join(parts[start:])
                found = [name for name in self.files if name == end or name.endswith(f".{end}")]
                if len(found) == 1:
                    tensor = self._read(found[0])
                    if tuple(tensor.shape) == shape:
                        return tensor
        raise ModelError(
            "model.weights_mismatch",
            f"{self.path}: its files have no head of shape {list(shape)} ({', '.join(candidates)})",
            hint="the teacher's directory needs config, tokenizer and the safetensors file with the head",
        )

    def fingerprint(self, head: Tensor) -> str:
        """Return a digest of all weights whose files are present, and of the head's dtype."""
        return hashlib.sha256(f"{weights_fingerprint(self._present())} {head.dtype}".encode()).hexdigest()

    def _present(self) -> Iterator[tuple[str, Tensor]]:
        name, local = locate_model(self.path)
        for file in sorted(set(self.files.values())):
            place = Path(name) / file if local else cached_hub_file(name, file, self.revision)
            if place is not None and place.is_file():
                with safe_open(place, framework="pt") as opened:
                    for key in sorted(opened.keys()):
                        yield key, opened.get_tensor(key)

    def _read(self, name: str) -> Tensor:
        with self._open(self.files[name]) as opened:
            return opened.get_tensor(name)

    def _names(self, file: str) -> list[str]:
        with self._open(file) as opened:
            return list(opened.keys())

    def _open(self, file: str) -> Any:
        place = model_file(self.path, file, self.revision)
        if place is None:
            hint = "the head is read from safetensors files: save the model with save_pretrained"
            raise ModelError("model.no_weights", f"{self.path} has no {file}", hint=hint)
        try:
            return safe_open(place, framework="pt")
        except Exception as error:  # SafetensorError, OSError
            raise load_error("weights", self.path, True, error) from error


def _not_served(path: str, why: str) -> ModelError:
    return ModelError("model.not_served", f"{path} cannot be used with a server: {why}", hint="run it in this process")
