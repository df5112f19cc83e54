"""Generate responses to prompts in chunks, which are written one by one, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distillm_cli.config.schema import Recipe
from distillm_cli.data.encoder import Encoder
from distillm_cli.data.sources import Row
from distillm_cli.errors import Interrupted, UsageError, signal_number
from distillm_cli.evaluation.evaluate import rows_in_context
from distillm_cli.evaluation.suites import Suite
from distillm_cli.models.backbone import Backbone
from distillm_cli.models.model_paths import locate_model
from distillm_cli.rollouts.sampler import Sampling, sample_all
from distillm_cli.runs import inference
from distillm_cli.runs.inference import Settings
from distillm_cli.runs.prompt_source import PromptSource, check_request, exact_texts, read_prompts
from distillm_cli.runs.responses import Line, ResponseFile
from distillm_cli.runs.run_results import Generated, GenerateResult
from distillm_cli.training.distributed import world
from distillm_cli.training.events import Event, Listener, Note, Progress
from distillm_cli.utils.modules import weights_fingerprint
from distillm_cli.utils.text import counted

_CHUNK_BATCHES = 8  # batches that are sorted by length and written together; an interrupted run loses at most these


def generate_responses(
    model: str,
    source: PromptSource,
    settings: Settings,
    listener: Listener,
    *,
    output: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> GenerateResult:
    """Generate responses into a file.

    output: ``.jsonl``; None: the rows are in the result and in ``Generated`` events.
    """
    started = time.perf_counter()
    check_request(source, output, resume=resume, overwrite=overwrite)
    file = None if output is None else ResponseFile(Path(output), resume=resume, overwrite=overwrite)
    recipe = inference.resolve_settings("generate", model, settings, listener)[0].recipe
    if source.samples > 1 and recipe.rollout.temperature == 0:
        raise UsageError(
            "usage.exclusive_options",
            f"--n {source.samples} with temperature 0",
            where="all responses would be the same",
        )
    locate_model(model)
    rows = read_prompts(source, recipe.data, listener)
    backbone, encoder = inference.load_model(model, recipe, listener)
    inference.check_model(backbone, encoder, rows[0], listener)
    inference.report_template(encoder, rows, listener)
    generation = _generation(rows, source.samples, backbone, encoder, recipe, listener)
    if world().size > 1:
        world().check_same(generation.settings())
    try:
        if file is not None:
            file.begin(generation.settings(), generation.prompt_fields())
        done = generation.run(file, listener)
    finally:
        if file is not None:
            file.close()
    if file is not None:
        listener(Note(f"{counted(len(generation), 'row')} in {output}"))
    if done.cut:
        were = f"{counted(done.cut, 'response')} {'was' if done.cut == 1 else 'were'}"
        listener(Note(f"{were} cut at --max-new-tokens or the context: `complete: false`"))
    return GenerateResult(
        output=output,
        wall_s=round(time.perf_counter() - started, 3),
        rows=len(generation),
        tokens=done.tokens,
        tokens_per_s=round(done.tokens / max(done.seconds, 1e-9), 1),
        cut=done.cut,
        responses=tuple(done.responses),
    )


@dataclass
class _Generated:
    """Hold the results of this call: counts, seconds, and, without an output file, the rows."""

    tokens: int = 0
    cut: int = 0
    seconds: float = 0.0
    responses: list[Line] = field(default_factory=list)


@dataclass(frozen=True)
class _Generation:
    """Hold the prompts and settings of all responses, in order: sample j of row i is number ``i · samples + j``."""

    rows: list[Row]
    ids: list[np.ndarray]
    prompts: list[str]
    samples: int
    seed: int
    sampling: Sampling
    batch_size: int
    backbone: Backbone
    encoder: Encoder

    def __len__(self) -> int:
        return len(self.rows) * self.samples

    def settings(self) -> dict[str, Any]:
        """Return all settings that affect the responses, which excludes batch size and device."""
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i4").tobytes())
        return {
            "rows": len(self),
            "samples": self.samples,
            "seed": self.seed,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            "max_new_tokens": self.sampling.max_new_tokens,
            "dtype": str(self.backbone.model.dtype).removeprefix("torch."),
            "weights": weights_fingerprint(self.backbone.model.state_dict().items()),
            "prompts": digest.hexdigest(),
        }

    def prompt_fields(self) -> list[Line]:
        """Return the fields of each row that do not depend on the response."""
        return [
            {**_prompt_columns(row), "prompt": prompt, "seed": self.seed, "sample": j}
            for row, prompt in zip(self.rows, self.prompts, strict=True)
            for j in range(self.samples)
        ]

    def run(self, file: ResponseFile | None, listener: Listener) -> _Generated:
        """Generate the responses that are not in the file yet; without a file, all responses."""
        fields = self.prompt_fields()
        done = _Generated()
        started = time.perf_counter()
        start = 0 if file is None else file.count
        if start:
            listener(Note(f"continuing after {start:,} of {counted(len(self), 'row')}"))
        step = _CHUNK_BATCHES * self.batch_size
        try:
            for first in range(start, len(self), step):
                lines = self._chunk(range(first, min(first + step, len(self))), fields, done, listener)
                if file is None:
                    done.responses += lines
                    listener(Generated(lines))
                else:
                    file.add(lines)
        except KeyboardInterrupt as stop:
            number = signal_number(stop)
            if file is None:
                raise Interrupted("interrupted", signal_number=number) from None
            where = f"{file.count:,} of {len(self):,} rows are in {file.path}"
            raise Interrupted("interrupted", signal_number=number, where=where, hint="continue with --resume") from None
        done.seconds = time.perf_counter() - started
        return done

    def _chunk(
        self, numbers: SequenceOf[int], fields: SequenceOf[Line], done: _Generated, listener: Listener
    ) -> list[Line]:
        """Generate the responses of these numbers, and return them as rows."""
        sampled = dict(
            sample_all(
                self.backbone,
                [self.ids[k // self.samples] for k in numbers],
                self.sampling,
                seed=self.seed,
                batch_size=self.batch_size,
                listener=self._overall_progress(numbers[0], listener),
                # Each sample has its own random key, so it does not depend on the rest of its batch.
                rows=[k // self.samples + (k % self.samples << 32) for k in numbers],
            )
        )
        lines = []
        for offset, k in enumerate(numbers):
            response = sampled[offset]
            text = self.encoder.decode(self.ids[k // self.samples], response.tokens)
            lines.append(_with_output(fields[k], text) | {"complete": response.complete})
            done.tokens += len(response.tokens)
            done.cut += not response.complete
        return lines

    def _overall_progress(self, start: int, listener: Listener) -> Listener:
        """Return a listener that reports the progress of a chunk, which begins at ``start``, as overall progress."""

        def listen(event: Event) -> None:
            if isinstance(event, Progress):
                event = replace(event, done=start + event.done, total=len(self))
            listener(event)

        return listen


def _generation(
    rows: list[Row], samples: int, backbone: Backbone, encoder: Encoder, recipe: Recipe, listener: Listener
) -> _Generation:
    suite, ids = rows_in_context(
        Suite("prompts", rows, ""), encoder, backbone.context, listener, skip_long=recipe.data.skip_bad_rows
    )
    rollout = recipe.rollout
    return _Generation(
        rows=suite.rows,
        ids=ids,
        prompts=exact_texts(suite.rows, ids, encoder, listener),
        samples=samples,
        seed=recipe.train.seed,
        sampling=Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_new_tokens),
        batch_size=recipe.eval.batch_size,
        backbone=backbone,
        encoder=encoder,
    )


def _prompt_columns(row: Row) -> Line:
    """Return the prompt of a row in the columns that it was read from."""
    columns: Line = {"messages": row.messages, "tools": row.tools, "documents": row.documents}
    columns |= {"chat_template_kwargs": row.template_kwargs}
    if row.instruction is not None:
        columns |= {"instruction": row.instruction, "input": row.input}
    return {name: value for name, value in columns.items() if value is not None}


def _with_output(fields: Line, text: str) -> Line:
    """Return a row with its output right after its prompt."""
    line = {}
    for key, value in fields.items():
        line[key] = value
        if key == "prompt":
            line["output"] = text
    return line
