"""Define the types that all subpackages share: tokenized pairs of prompt and response, and batches of them.

``data`` makes sequences from rows, ``rollouts`` samples them; both are collated here, so that the supervised positions are
decided in one place.

Shape letters, here and everywhere: B sequences, T time, N supervised (response) positions of the whole batch,
V vocabulary, D width of the last hidden state.
"""

from __future__ import annotations

import hashlib
import io
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import BinaryIO, overload

import numpy as np
import torch


@dataclass(frozen=True, slots=True, eq=False)
class TeacherPrompt:
    """Hold the prompt of a sequence as the teacher sees it, rendered by another template. turns: as in ``Sequence``."""

    ids: np.ndarray
    turns: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """Hold one prompt and one response as token ids (int32 arrays).

    Every token of the response is supervised: the token that ends it is part of it when the response is complete, and
    absent when the response was cut. ``row`` is the index of the dataset row it belongs to. ``turns``: ascending indices
    of prompt tokens that are supervised too, the earlier answers of a conversation; None if there are none. ``table``:
    the table that the sequence is row ``row`` of; None for a sequence of its own. teacher_prompt: the teacher's prompt; None
    if it is the same. The response has the same tokens for both models, as have the ``turns``.

    Rows of a table are built at each access, so they are compared by table and row; other sequences by identity.
    """

    prompt: np.ndarray
    response: np.ndarray
    row: int = -1
    turns: np.ndarray | None = None
    table: PackedSequences | None = field(default=None, kw_only=True, repr=False)
    teacher_prompt: TeacherPrompt | None = field(default=None, kw_only=True, repr=False)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    def __eq__(self, other: object) -> bool:
        if self.table is None or not isinstance(other, Sequence):
            return self is other
        return other.table is self.table and other.row == self.row

    def __hash__(self) -> int:
        return object.__hash__(self) if self.table is None else hash((id(self.table), self.row))

    @property
    def supervised(self) -> int:
        """Return the number of supervised tokens: those of ``turns`` and of the response."""
        return len(self.response) + (0 if self.turns is None else len(self.turns))

    @property
    def for_teacher(self) -> Sequence:
        """Return the sequence as the teacher sees it."""
        if self.teacher_prompt is None:
            return self
        return Sequence(self.teacher_prompt.ids, self.response, self.row, self.teacher_prompt.turns)

    @property
    def prompt_length(self) -> int:
        """Return the number of tokens of the longer prompt of both models."""
        return max(len(self.prompt), len(self.for_teacher.prompt))


class PackedSequences(SequenceOf[Sequence]):
    """Hold many sequences in a few arrays, in memory or memory-mapped, and build each one when it is accessed.

    ids: int32, prompt and response of each sequence, one after the other. sizes_S3: int32 [S, 3], its numbers of prompt
    tokens, response tokens and ``turns``. turns: int32, those of all sequences. digest: ``rows_digest`` of the sequences.
    """

    def __init__(self, ids: np.ndarray, sizes_S3: np.ndarray, turns: np.ndarray, digest: str):
        self.digest = digest
        self._ids = ids
        self._sizes_S3 = sizes_S3
        self._turns = turns
        self._ends = np.cumsum(self.lengths)
        self._turn_ends = np.cumsum(sizes_S3[:, 2], dtype=np.int64) if len(turns) else None

    @cached_property
    def lengths(self) -> np.ndarray:
        """Return the number of tokens of prompt and response, per sequence."""
        return self._sizes_S3[:, :2].sum(axis=1, dtype=np.int64)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Return the number of tokens of the prompt, per sequence."""
        return self._sizes_S3[:, 0]

    @property
    def supervised(self) -> np.ndarray:
        """Return the number of supervised tokens, per sequence."""
        return self._sizes_S3[:, 1:].sum(axis=1, dtype=np.int64)

    def last_tokens(self, most: int) -> np.ndarray:
        """Return the last token of each response among the first ``most`` sequences. Empty responses have none."""
        return self._ids[self._ends[:most] - 1][self._sizes_S3[:most, 1] > 0]

    def __len__(self) -> int:
        return len(self._sizes_S3)

    @overload
    def __getitem__(self, index: int) -> Sequence: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sequence]: ...

    def __getitem__(self, index: int | slice) -> Sequence | list[Sequence]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._row(range(len(self))[index])

    def _row(self, row: int) -> Sequence:
        prompt, response, turns = self._sizes_S3[row].tolist()
        end = int(self._ends[row])
        cut = end - response
        own_turns = None
        if turns and self._turn_ends is not None:
            turn_end = int(self._turn_ends[row])
            own_turns = self._turns[turn_end - turns : turn_end]
        return Sequence(self._ids[cut - prompt : cut], self._ids[cut:end], row, own_turns, table=self)


class SequenceView(PackedSequences):
    """Present the sequences of several tables as one table, in any order, without copying them.

    places_S2: for each sequence, the number of its table and its index there. teacher_prompts: the prompts that the teacher
    sees, in the order of ``places_S2``; None if they are the same.
    """

    def __init__(
        self,
        tables: SequenceOf[PackedSequences],
        places_S2: np.ndarray,
        teacher_prompts: PackedSequences | None = None,
    ):
        self._tables = tables
        self._places_S2 = places_S2
        self._teacher_prompts = teacher_prompts
        starts = np.cumsum([0, *map(len, tables)])
        sizes_S3 = np.concatenate([table._sizes_S3 for table in tables])
        self._sizes_S3 = sizes_S3[starts[places_S2[:, 0]] + places_S2[:, 1]]
        digest = hashlib.sha256(b"view" + "".join(table.digest for table in tables).encode())
        digest.update(np.ascontiguousarray(places_S2, dtype=np.int64).tobytes())
        if teacher_prompts is not None:
            digest.update(teacher_prompts.digest.encode())
        self.digest = digest.hexdigest()

    @classmethod
    def joined(cls, tables: SequenceOf[PackedSequences]) -> SequenceView:
        """Return all sequences of the tables, one table after the other."""
        of_table = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        return cls(tables, np.stack((of_table, np.concatenate([np.arange(len(table)) for table in tables])), axis=1))

    def last_tokens(self, most: int) -> np.ndarray:
        return np.array([s.response[-1] for s in self[:most] if len(s.response)], dtype=np.int64)

    def _row(self, row: int) -> Sequence:
        table, index = self._places_S2[row].tolist()
        found = replace(self._tables[table][index], row=row, table=self)
        if self._teacher_prompts is None:
            return found
        seen = self._teacher_prompts[row]
        return replace(found, teacher_prompt=TeacherPrompt(seen.prompt, seen.turns))


class SequencePacker:
    """Collect sequences, one by one, for ``PackedSequences``. ids, turns: files that they are written to."""

    def __init__(self, ids: BinaryIO, turns: BinaryIO):
        self._ids = ids
        self._turns = turns
        self._sizes = array("i")
        self._digest = hashlib.sha256(b"rows")

    def __len__(self) -> int:
        return len(self._sizes) // 3

    def append(self, sequence: Sequence) -> None:
        turns = 0 if sequence.turns is None else len(sequence.turns)
        self._sizes.extend((len(sequence.prompt), len(sequence.response), turns))
        self._ids.write(sequence.prompt.astype(np.int32, copy=False).tobytes())
        self._ids.write(sequence.response.astype(np.int32, copy=False).tobytes())
        if sequence.turns is not None:
            self._turns.write(sequence.turns.astype(np.int32, copy=False).tobytes())
        _update_digest(self._digest, sequence)

    @property
    def sizes_S3(self) -> np.ndarray:
        return np.array(self._sizes, dtype=np.int32).reshape(-1, 3)

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def as_int32(buffer: io.BytesIO) -> np.ndarray:
    """Return the content of a buffer as int32, without a copy."""
    return np.frombuffer(buffer.getbuffer(), dtype=np.int32)


def rows_digest(sequences: SequenceOf[Sequence]) -> str:
    """Return the SHA-256 of every token of every row. It depends on tokenizer, template, rows, order and lengths."""
    if isinstance(sequences, PackedSequences):
        return sequences.digest
    digest = hashlib.sha256(b"rows")
    for sequence in sequences:
        _update_digest(digest, sequence)
    return digest.hexdigest()


def _update_digest(digest: hashlib._Hash, s: Sequence) -> None:
    digest.update(f"{len(s.prompt)} {len(s.response)} ".encode())
    digest.update(s.prompt.tobytes() + s.response.tobytes())
    if s.turns is not None:
        digest.update(b"turns" + s.turns.tobytes())


def lengths_of(sequences: SequenceOf[Sequence]) -> np.ndarray:
    """Return the number of tokens of prompt and response [S], per sequence."""
    if isinstance(sequences, PackedSequences):
        return sequences.lengths
    return np.array([len(s) for s in sequences], dtype=np.int64)


def supervised_of(sequences: SequenceOf[Sequence]) -> np.ndarray:
    """Return the number of supervised tokens [S], per sequence."""
    if isinstance(sequences, PackedSequences):
        return sequences.supervised
    return np.array([s.supervised for s in sequences], dtype=np.int64)


def response_lengths(sequences: SequenceOf[Sequence]) -> np.ndarray:
    """Return the number of tokens of the response [S], per sequence."""
    if isinstance(sequences, PackedSequences):
        return sequences.lengths - sequences.prompt_lengths
    return np.array([len(s.response) for s in sequences], dtype=np.int64)


def last_tokens(sequences: SequenceOf[Sequence], most: int) -> np.ndarray:
    """Return the last token of each response among the first ``most`` sequences. Empty responses have none."""
    if isinstance(sequences, PackedSequences):
        return sequences.last_tokens(most)
    return np.array([s.response[-1] for s in sequences[:most] if len(s.response)], dtype=np.int64)


# Columns of ``Rollout.log_probs_NK``: under the unfiltered student and teacher, and under the distribution that the token
# was drawn from. Samplers without a teacher give the first alone.
LOG_Q, LOG_P, LOG_DRAWN = range(3)


@dataclass(frozen=True, slots=True, eq=False)
class Rollout(Sequence):
    """Hold a sampled response, with what was computed for it.

    log_probs_NK: log-probabilities of its tokens when it was sampled, nats, float32 on the CPU, in the first or in all of
    the columns ``LOG_Q``, ``LOG_P``, ``LOG_DRAWN``; None if the sampler gives none. sampled_at: the step (from 0) whose
    student sampled it, if it may be replayed; None if that is not known.
    teacher_hidden_ND: the teacher's hidden states, on the CPU, once ``cache_teacher_hidden`` was called.
    """

    log_probs_NK: torch.Tensor | None = None
    teacher_hidden_ND: torch.Tensor | None = None
    sampled_at: int | None = None

    @classmethod
    def to(cls, prompt: Sequence, response: np.ndarray, log_probs_NK: torch.Tensor | None = None) -> Rollout:
        """Return a response to the prompt of a sequence. Earlier answers in the prompt are not supervised."""
        seen = prompt.teacher_prompt
        return cls(
            prompt.prompt,
            response,
            prompt.row,
            teacher_prompt=None if seen is None else TeacherPrompt(seen.ids),
            log_probs_NK=log_probs_NK,
        )

    @property
    def student_log_probs_N(self) -> torch.Tensor | None:
        """Return the log-probabilities of its tokens under the student when it was sampled, nats."""
        return None if self.log_probs_NK is None else self.log_probs_NK[:, LOG_Q]

    def cache_teacher_hidden(self, hidden_ND: torch.Tensor | None) -> None:
        """Set the teacher's hidden states, or drop them. They are released with the rollout."""
        object.__setattr__(self, "teacher_hidden_ND", hidden_ND)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Hold a batch of sequences, padded on the right.

    Under causal attention no real position attends to padding on the right, so no attention mask is needed and the
    padding token may be any id. The last token of a sequence is only ever a target, so T is the longest length − 1.

    ids_BT: int64 input ids. positions_N: index into the flattened [B·T] of the state that predicts each supervised
    token, ascending within a sequence. targets_N: that token. rows_N: the sequence (0..B−1) it belongs to. tokens: N, as
    a plain number.
    """

    ids_BT: torch.Tensor
    positions_N: torch.Tensor
    targets_N: torch.Tensor
    rows_N: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.targets_N.shape[0]

    @property
    def size(self) -> int:
        return self.ids_BT.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``; copies overlap with compute if the device allows it."""
        return replace(self, **{name: moved(getattr(self, name), device) for name in self.__slots__})


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """Hold the input embeddings of a batch, in place of its token ids.

    inputs_BTD: of prompt and response for a causal model, of the prompt for an encoder-decoder. decoder_BRD: of the
    decoder's input, None for a causal model. mask_BT: attention mask of the encoder's input, None if nothing is masked; a
    causal model has its padding on the right and needs none. positions_N: index into the flattened positions of the states
    that predict the supervised tokens, those of the decoder in an encoder-decoder.
    """

    inputs_BTD: torch.Tensor
    positions_N: torch.Tensor
    mask_BT: torch.Tensor | None = None
    decoder_BRD: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Return the embeddings: one tensor, or those of encoder and decoder."""
        return [self.inputs_BTD] if self.decoder_BRD is None else [self.inputs_BTD, self.decoder_BRD]

    def with_tensors(self, tensors: SequenceOf[torch.Tensor]) -> Embedded:
        """Return the batch with other embeddings, in the order of ``tensors``."""
        return replace(self, inputs_BTD=tensors[0], decoder_BRD=tensors[1] if len(tensors) > 1 else None)


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy a CPU tensor to ``device``. The caller may release it immediately.

    For CUDA the copy does not block: memory that is not pinned has been read when the call returns. Other devices may read
    it later, when it holds something else (MPS did up to torch 2.13: pytorch/pytorch#189690).
    """
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def collate(sequences: SequenceOf[Sequence]) -> Batch:
    """Collate sequences into one batch.

    Every prompt needs at least one token: its last state predicts the first response token. The token at index 0 of a
    prompt cannot be among its ``turns``: no state predicts it.
    """
    B, T = len(sequences), max(len(s) for s in sequences) - 1
    ids_BT = np.zeros((B, max(T, 1)), dtype=np.int64)
    positions, targets, rows = [], [], []
    for b, s in enumerate(sequences):
        P, R = len(s.prompt), len(s.response)
        if P == 0:
            raise ValueError(f"sequence of row {s.row} has an empty prompt")
        ids_BT[b, :P] = s.prompt
        if R:
            ids_BT[b, P : P + R - 1] = s.response[:-1]
        start = b * ids_BT.shape[1] - 1
        if s.turns is not None:
            positions.append(s.turns.astype(np.int64) + start)
            targets.append(s.prompt[s.turns])
        positions.append(np.arange(start + P, start + P + R, dtype=np.int64))
        targets.append(s.response)
        rows.append(np.full(s.supervised, b, dtype=np.int64))
    return Batch(
        ids_BT=torch.from_numpy(ids_BT),
        positions_N=torch.from_numpy(np.concatenate(positions)),
        targets_N=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        rows_N=torch.from_numpy(np.concatenate(rows)),
    )


MIN_PASS_OVERHEAD = 64  # in token positions


# Sequences of one micro-batch in groups of similar length: each group is a separate pass through the trunk.
LengthGroups = list[list[Sequence]]


def pass_overhead(device: str, width: int) -> int:
    """Return the overhead of one more pass through a student, in token positions.

    On a CPU it is Python and a call per operation, about the same for a narrow layer as for a wide one, while a position's
    time grows with width²; from a width of about 150 on it is the minimum, with which a random batch of 8 Dolly rows is cut
    into 3.5 groups with 7 % padding. On an accelerator, launching the kernels takes as long as many positions: 1.8 groups,
    26 %.

    device: its type. width: of the student's layers.
    """
    return max(MIN_PASS_OVERHEAD, min(512, 1_400_000 // width**2)) if device == "cpu" else 512


def length_groups(
    sequences: SequenceOf[Sequence],
    most: int,
    pass_overhead: int = MIN_PASS_OVERHEAD,
    most_tokens: int | None = None,
) -> LengthGroups:
    """Cut the sequences of one step into groups of at most ``most``, each of similar length.

    most_tokens: limit of the padded positions of a group; a longer sequence is a group of its own.

    Sums of losses do not depend on the groups, so this saves padding and changes no gradient. The cut minimizes padded
    positions plus ``pass_overhead`` per group, by dynamic programming over the sequences sorted by length.
    """
    ordered = sorted(sequences, key=len, reverse=True)
    cost, start = [0.0], [0]
    for end in range(1, len(ordered) + 1):
        first = max(0, end - most)
        while most_tokens is not None and first < end - 1 and len(ordered[first]) * (end - first) > most_tokens:
            first += 1
        costs = [cost[i] + len(ordered[i]) * (end - i) + pass_overhead for i in range(first, end)]
        cheapest = min(range(len(costs)), key=costs.__getitem__)
        cost.append(costs[cheapest])
        start.append(first + cheapest)
    cuts, end = [], len(ordered)
    while end:
        cuts.append(ordered[start[end] : end])
        end = start[end]
    return cuts[::-1]


def micro_batches(
    sequences: SequenceOf[Sequence],
    most: int,
    pass_overhead: int = MIN_PASS_OVERHEAD,
    most_tokens: int | None = None,
) -> list[LengthGroups]:
    """Gather the ``length_groups`` of one step into micro-batches of at most ``most`` sequences.

    A micro-batch has one backward pass, so its activations are in memory together. most_tokens: limit of its padded
    positions.
    """
    gathered: list[LengthGroups] = []
    room = 0
    token_room = 0
    for part in length_groups(sequences, most, pass_overhead, most_tokens):
        tokens = 0 if most_tokens is None else len(part) * max(map(len, part))
        if len(part) > room or tokens > token_room:
            gathered.append([])
            room = most
            token_room = most_tokens or 0
        gathered[-1].append(part)
        room -= len(part)
        token_room -= tokens
    return gathered
