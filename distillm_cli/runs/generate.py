"""The work of ``distillm generate``: prompts → responses, chunk by chunk, so that a stopped run keeps what it has."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distillm_cli.config.load import Resolved
from distillm_cli.config.schema import Recipe
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Row, local_place
from distillm_cli.errors import Interrupted, UsageError, signal_number
from distillm_cli.evaluation.evaluate import rows_in_context
from distillm_cli.evaluation.suites import Suite
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.model_paths import locate_model
from distillm_cli.rollouts.sampler import Sampling, sample_all
from distillm_cli.runs import inference
from distillm_cli.runs.prompt_source import PromptSource, prompts_of, rereadable
from distillm_cli.runs.responses import Line, Responses, text_of
from distillm_cli.training.events import Event, Listener, Note, Progress
from distillm_cli.ui.console import Console
from distillm_cli.utils.modules import weights_fingerprint
from distillm_cli.utils.text import counted, escaped

_MOST = 2**31  # of rows, and of samples of each
_BATCHES = 8  # sorted by length together, and written together: what a stopped run loses at most


def run(
    model: str,
    wanted: PromptSource,
    *,
    recipe: str | Resolved | None,
    flags: Mapping[str, Any],
    sets: list[str] | None,
    output: str | None,
    resume: bool,
    overwrite: bool,
    ui: Console,
) -> dict[str, Any]:
    """Generates into ``output`` (None: stdout) and returns the result object of ``--json``."""
    began = time.perf_counter()
    _check(wanted, output, resume, overwrite)
    responses = None if output is None else Responses(Path(output), resume=resume, overwrite=overwrite)
    if overwrite:
        _check_spared(wanted, Path(output))
    resolved, _ = inference.settings("generate", model, recipe=recipe, flags=flags, sets=sets, listener=ui)
    r = resolved.recipe
    if wanted.samples > 1 and r.rollout.temperature == 0:
        raise UsageError(f"--n {wanted.samples} with temperature 0", where="the responses would all be the same")
    locate_model(model)
    rows = prompts_of(wanted, r.data, ui)
    backbone, encoder = inference.load(model, r, ui)
    inference.check_head(backbone, encoder, rows[0], ui)
    inference.name_template(encoder, rows, ui)
    work = _Work.of(rows, wanted.samples, backbone, encoder, r, ui)
    try:
        if responses is not None:
            responses.begin(work.settings(), work.heads())
        tokens, cut, seconds = work.go(responses, ui)
    finally:
        if responses is not None:
            responses.close()
    total = len(work)
    if responses is not None:
        ui(Note(f"{counted(total, 'row')} in {output}"))
    if cut:
        were = f"{counted(cut, 'response')} {'was' if cut == 1 else 'were'}"
        ui(Note(f"{were} cut at --max-new-tokens or the context: `complete: false`"))
    return {
        "command": "generate",
        "status": "ok",
        "output": output,
        "wall_s": round(time.perf_counter() - began, 3),
        "rows": total,
        "tokens": tokens,
        "tokens_per_s": round(tokens / max(seconds, 1e-9), 1),
        "cut": cut,
    }


def _check(wanted: PromptSource, output: str | None, resume: bool, overwrite: bool) -> None:
    sources = {"--data": wanted.data, "--prompt": wanted.prompts, "--input": wanted.input}
    given = [flag for flag, value in sources.items() if value is not None]
    if len(given) != 1:
        what = f"{' and '.join(given)} exclude each other" if given else "no prompts"
        raise UsageError(what, hint="give one of --data SOURCE, --prompt TEXT, --input FILE")
    for flag, count in (("--limit", wanted.limit), ("--n", wanted.samples)):
        if count is not None and not 1 <= count < _MOST:
            raise UsageError(f"{flag} = {count}", where="expected a whole number ≥ 1 and < 2^31")
    if any(not text.strip() for text in wanted.prompts or ()):
        raise UsageError("an empty --prompt", where="no row that is trained on may have one", hint="give it a text")
    if wanted.split is not None and wanted.data is None:
        raise UsageError(f"--split {wanted.split} without --data", hint="drop it, or give --data")
    if wanted.split not in (None, "train", "valid", "test"):
        raise UsageError(f"--split = {wanted.split}", where="expected train, valid or test")
    if output is None and (resume or overwrite):
        raise UsageError(f"{'--resume' if resume else '--overwrite'} without --output", hint="give --output FILE")


def _check_spared(wanted: PromptSource, output: Path) -> None:
    """Raises UsageError where the file to be replaced is one that the prompts are read from."""
    for flag, name in (("--data", wanted.data), ("--input", wanted.input)):
        place = None if name in (None, "-", "builtin") else local_place(name)
        read = () if place is None else (place, place / "data") if place.is_dir() else (place,)
        if output.exists() and any(
            output.samefile(p) or output.resolve().parent == p.resolve() for p in read if p.exists()
        ):
            raise UsageError(f"--output {output} is among what {flag} {name} reads", hint="choose another --output")


@dataclass(frozen=True)
class _Work:
    """Every response that is wanted, in order: sample j of row i is number ``i · samples + j``."""

    rows: list[Row]
    ids: list[np.ndarray]
    prompts: list[str]
    samples: int
    seed: int
    sampling: Sampling
    batch_size: int
    backbone: Backbone
    encoder: Encoder

    @classmethod
    def of(
        cls, rows: list[Row], samples: int, backbone: Backbone, encoder: Encoder, r: Recipe, listener: Listener
    ) -> _Work:
        suite, ids = rows_in_context(
            Suite("prompts", rows, ""), encoder, backbone.context, listener, skip_long=r.data.skip_bad_rows
        )
        sampling = Sampling(r.rollout.temperature, r.rollout.top_p, r.rollout.top_k, r.rollout.max_new_tokens)
        prompts = rereadable(suite.rows, ids, encoder, listener)
        return cls(suite.rows, ids, prompts, samples, r.train.seed, sampling, r.eval.batch_size, backbone, encoder)

    def __len__(self) -> int:
        return len(self.rows) * self.samples

    def settings(self) -> dict[str, Any]:
        """All that shapes the responses. Batch size and device are not among it."""
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
        how = {name: getattr(self.sampling, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
        dtype = str(self.backbone.model.dtype).removeprefix("torch.")
        head = {"rows": len(self), "samples": self.samples, "seed": self.seed, **how, "dtype": dtype}
        return {
            **head,
            "weights": weights_fingerprint(self.backbone.model.state_dict().items()),
            "prompts": digest.hexdigest(),
        }

    def heads(self) -> list[Line]:
        """Return the fields of each row that are known before there is a response."""
        return [
            {
                **_asked(row),
                "prompt": prompt,
                "seed": self.seed,
                "sample": j,
            }
            for row, prompt in zip(self.rows, self.prompts, strict=True)
            for j in range(self.samples)
        ]

    def go(self, responses: Responses | None, listener: Listener) -> tuple[int, int, float]:
        """Generates what is missing. Returns tokens, responses that were cut, and seconds, of this call."""
        heads, tokens, cut, began = self.heads(), 0, 0, time.perf_counter()
        start = 0 if responses is None else responses.count
        if start:
            listener(Note(f"going on after {start:,} of {counted(len(self), 'row')}"))
        step = _BATCHES * self.batch_size
        try:
            for at in range(start, len(self), step):
                chunk = range(at, min(at + step, len(self)))
                said = dict(
                    sample_all(
                        self.backbone,
                        [self.ids[k // self.samples] for k in chunk],
                        self.sampling,
                        seed=self.seed,
                        batch_size=self.batch_size,
                        listener=self._overall(at, listener),
                        # A key of its own for each sample, whatever else is generated with it.
                        rows=[k // self.samples + (k % self.samples << 32) for k in chunk],
                    )
                )
                lines = []
                for offset, k in enumerate(chunk):
                    head, out = heads[k], said[offset]
                    text = {"output": self.encoder.decode(self.ids[k // self.samples], out.tokens)}
                    lines.append(_placed(head, text) | {"complete": out.complete})
                    tokens += len(out.tokens)
                    cut += not out.complete
                if responses is None:
                    _print(lines)
                else:
                    responses.add(lines)
        except KeyboardInterrupt as stop:
            number = signal_number(stop)
            if responses is None:
                raise Interrupted("interrupted", signal_number=number) from None
            where = f"{responses.count:,} of {len(self):,} rows are in {responses.path}"
            raise Interrupted("interrupted", signal_number=number, where=where, hint="go on with --resume") from None
        return tokens, cut, time.perf_counter() - began

    def _overall(self, before: int, listener: Listener) -> Listener:
        """A chunk's progress as progress of the whole."""

        def heard(event: Event) -> None:
            if isinstance(event, Progress):
                event = Progress(event.task, before + event.done, len(self), event.unit)
            listener(event)

        return heard


def _asked(row: Row) -> Line:
    """Return the prompt of a row in the columns that it is read from."""
    columns = {"messages": row.messages, "tools": row.tools, "documents": row.documents}
    columns |= {"chat_template_kwargs": row.template_kwargs}
    if row.instruction is not None:
        columns |= {"instruction": row.instruction, "input": row.input}
    return {name: value for name, value in columns.items() if value is not None}


def _placed(head: Line, text: Line) -> Line:
    """The row with the output beside its prompt, where a reader looks for it."""
    line = {}
    for key, value in head.items():
        line[key] = value
        if key == "prompt":
            line |= text
    return line


def _print(lines: list[Line]) -> None:
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    sys.stdout.write("".join(escaped(text_of(line, ascii_only=ascii_only)) for line in lines))
    sys.stdout.flush()
