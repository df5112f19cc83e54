"""Train against cached states with the teacher's head alone, and load the rest of the teacher only if it is needed.

A record beside the caches on disk says which weight files were loaded for a cache, which of their tensors is the head, and
the digests of the loaded teacher. A later run with the same files needs nothing else of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from distillm_cli.models.backbone import Backbone, Head
from distillm_cli.models.loading import load_config, read_generation_config
from distillm_cli.models.model_paths import ModelLocation, adapter_chain, locate_model
from distillm_cli.models.students import auto_class
from distillm_cli.models.tokenizer_files import quiet
from distillm_cli.training.distributed import in_first_process
from distillm_cli.types import Batch
from distillm_cli.utils.storage import atomic_write, file_sha256

_FORMAT = 1


@dataclass
class TeacherRecord:
    """Hold what a run needs of a teacher beside its head and its cached states.

    files: name, bytes and SHA-256 of its config and weight files. dtype: of the weights. libraries: that loaded them. head:
    file and name of the tensor that is the head's matrix, and of its bias if there is one. fingerprint: of the weights, as
    in checkpoints. state_bytes: of one hidden state. digests: of the teacher, by the size of the vocabulary.
    """

    files: list[tuple[str, int, str]]
    dtype: str
    head: tuple[str, str]
    bias: tuple[str, str] | None
    fingerprint: str
    state_bytes: int
    libraries: str
    digests: dict[str, str] = field(default_factory=dict)


class UnloadedTeacher(Backbone):
    """Hold a teacher of which config, tokenizer and head are loaded. The first other use loads the whole model.

    load: returns the whole model, in its place.
    """

    def __init__(
        self, skeleton: Backbone, head: Head, record: TeacherRecord, load: Callable[[], Backbone], device: torch.device
    ):
        super().__init__(skeleton.model, skeleton.tokenizer)
        self.record: TeacherRecord = record
        self._own_head = head
        self._device = device
        self._load = load
        self._whole: list[Backbone] = []  # a list, so that it is not a submodule

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def whole(self) -> Backbone:
        if not self._whole:
            loaded = self._load()
            loaded.tokenizer = self.tokenizer
            loaded.vocab = self.vocab
            loaded.model.generation_config = self.model.generation_config
            self._whole.append(loaded)
        return self._whole[0]

    @property
    def is_whole(self) -> bool:
        return bool(self._whole)

    @property
    def is_dispatched(self) -> bool:
        return self.is_whole and self.whole.is_dispatched

    def fingerprint(self) -> str:
        return self.record.fingerprint

    def full_head(self) -> Head:
        return self._own_head

    def check_head(self, batch: Batch) -> bool:
        """Return True: the head was compared with the model's own logits when the record was made."""
        return True

    def hidden(self, batch: Batch, *, for_backward: bool = False) -> Tensor:
        return self.whole.hidden(batch)

    def logits(self, batch: Batch) -> Tensor:
        return self.whole.logits(batch)

    def check_decoding(self) -> bool:
        return self.whole.check_decoding()

    def decode(self, prompts: Any) -> Any:
        return self.whole.decode(prompts)

    def on_device(self) -> AbstractContextManager[None]:
        return self.whole.on_device()  # a caller is about to use it

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Backbone:
        self._whole.clear()  # released, or moved to another device: loaded again at the next use
        return super()._apply(fn, recurse)


@in_first_process
def find_record(root: Path, path: str, dtype: torch.dtype) -> TeacherRecord | None:
    """Return the record of a teacher whose files have not changed; None without one.

    root: directory of the caches. path: of the teacher.
    """
    records = sorted(root.glob("teacher-*.json"))
    files = _weight_files(path) if records else None
    if files is None:
        return None
    for place in records:
        with suppress(OSError, ValueError, TypeError, KeyError):
            found = json.loads(place.read_text(encoding="utf-8"))
            if found.pop("format") != _FORMAT:
                continue
            record = TeacherRecord(**found)
            sizes = [(name, size) for name, size, _ in record.files]
            is_of_files = sizes == [(file.name, file.stat().st_size) for file in files]
            if not is_of_files or record.dtype != str(dtype) or record.libraries != _libraries():
                continue
            if all(file_sha256(file) == digest for file, (_, _, digest) in zip(files, record.files, strict=True)):
                return record
    return None


@in_first_process
def record_teacher(root: Path, path: str, teacher: Backbone, digest: str, state_bytes: int) -> None:
    """Record the teacher of a cache in ``root``, if its weights are in local files and its head is one of their tensors."""
    files = None if teacher.own_logits or teacher.is_quantized or teacher.is_encoder_decoder else _weight_files(path)
    if files is None:
        return
    head = teacher.full_head()
    assert head.weight_VD is not None
    weight = _tensor_in(files, head.weight_VD)
    bias = None if head.bias_V is None else _tensor_in(files, head.bias_V)
    if weight is None or (head.bias_V is not None and bias is None):
        return
    record = TeacherRecord(
        files=[(file.name, file.stat().st_size, file_sha256(file)) for file in files],
        dtype=str(head.weight_VD.dtype),
        head=weight,
        bias=bias,
        fingerprint=teacher.fingerprint(),
        state_bytes=state_bytes,
        libraries=_libraries(),
        digests={str(teacher.vocab): digest},
    )
    name = hashlib.sha256(json.dumps([record.files, record.dtype, record.libraries]).encode()).hexdigest()
    place = root / f"teacher-{name[:32]}.json"
    with suppress(OSError, ValueError, KeyError):
        record.digests |= json.loads(place.read_text(encoding="utf-8"))["digests"]
    with suppress(OSError):  # the run has its cache; only a later run loads more than it needs
        atomic_write(place, json.dumps({"format": _FORMAT, **asdict(record)}, indent=1))


def load_unloaded(
    path: str,
    record: TeacherRecord,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
    load: Callable[[], Backbone],
) -> UnloadedTeacher:
    """Return the teacher with the head of its files. load: loads the whole model."""
    config = load_config(path)
    with quiet(), torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False).eval()
    model.generation_config = model.generation_config or GenerationConfig()
    read_generation_config([ModelLocation(path, True)], model)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    directory = Path(locate_model(path)[0])
    weight_VD = _read(directory, record.head).to(device, dtype)
    bias_V = None if record.bias is None else _read(directory, record.bias).to(device, dtype)
    model.get_output_embeddings().weight = nn.Parameter(weight_VD, requires_grad=False)
    skeleton = Backbone(model, tokenizer)
    head = Head(weight_VD, bias_V, skeleton.head_scale, skeleton.head_softcap)
    return UnloadedTeacher(skeleton, head, record, load, device)


def _weight_files(path: str) -> list[Path] | None:
    """Return config and weight files of a local model in safetensors files; None for another model."""
    adapters, base, _ = adapter_chain(path)
    name, is_local = locate_model(base)
    if adapters or not is_local:
        return None
    weights = sorted(Path(name).glob("*.safetensors"))
    return [Path(name) / "config.json", *weights] if weights else None


def _tensor_in(files: list[Path], tensor: Tensor) -> tuple[str, str] | None:
    """Return file and name of the tensor in the files that equals ``tensor``, in its dtype."""
    for file, name in _names(files):
        with safe_open(file, framework="pt") as opened:
            if tuple(opened.get_slice(name).get_shape()) != tuple(tensor.shape):
                continue
            if torch.equal(opened.get_tensor(name).to(tensor.dtype), tensor.cpu()):
                return file.name, name
    return None


def _names(files: list[Path]) -> Iterator[tuple[Path, str]]:
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names = sorted(opened.keys())
            yield from ((file, name) for name in names)


def _read(directory: Path, place: tuple[str, str]) -> Tensor:
    file, name = place
    with safe_open(directory / file, framework="pt") as opened:
        return opened.get_tensor(name)


def _libraries() -> str:
    return f"torch {torch.__version__} transformers {version('transformers')}"
