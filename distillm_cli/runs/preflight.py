"""Check, before the first step, whether a prepared run is likely to work: ends, templates, teacher, rows, memory, disk.

Most distillations that fail do so because of a mismatch that nothing reported. A check yields findings; each finding has
what is wrong, where, and the setting that cures it. ``distillm plan`` shows all of them, and a run those that are warnings.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from distillm_cli.data.batching import batches_by_length
from distillm_cli.data.rows import Row
from distillm_cli.errors import DataError, ModelError, UsageError
from distillm_cli.losses.objectives import CrossEntropy
from distillm_cli.losses.student_loss import StudentLoss
from distillm_cli.losses.weights import CROSS_ENTROPY
from distillm_cli.runs.cache_planning import CachePlan
from distillm_cli.runs.prepare import Prepared
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.training.state import RunInfo
from distillm_cli.training.validation import mean_loss
from distillm_cli.types import Sequence, last_tokens, response_lengths
from distillm_cli.utils.modules import eval_mode
from distillm_cli.utils.text import counted, format_bytes

if TYPE_CHECKING:
    from distillm_cli.models.backbone import Backbone

Severity = Literal["warning", "note"]

_READ_ROWS = 100_000  # that are checked
_MEASURED_ROWS = 32  # held-out rows on which the losses of both models are compared, …
_MEASURED_TOKENS = 4096  # … of at most this many tokens, apart from the first row
_MEASURED_AT_ONCE = 8  # rows of a pass
_PROBED_ROWS = 8  # prompts that both models answer
_PROBED_TOKENS = 64  # of an answer
_MANY = 0.05  # share of rows above which a finding is a warning
# Characters of text that was decoded with the wrong encoding (UTF-8 as Latin-1), and of text that could not be decoded.
_MISREAD = ("Ã¤", "Ã¶", "Ã¼", "Ã©", "Ã¨", "Ã ", "Â ", "â€™", "â€œ", "â€“", "�")


@dataclass(frozen=True)
class Finding:
    """Describe a property of a run that may make it fail.

    code: stable name, ``data.duplicates``. where: the file, model or setting. cure: the setting to change; empty for a
    note that needs none. is_reported: preparing the run has already reported it.
    """

    severity: Severity
    code: str
    what: str
    where: str
    cure: str = ""
    is_reported: bool = False

    def as_json(self) -> dict[str, str]:
        """Return its public fields."""
        return {key: value for key, value in asdict(self).items() if key != "is_reported"}

    @property
    def text(self) -> str:
        """Return it as a sentence."""
        return f"{self.what} ({self.where})" + (f"; {self.cure}" if self.cure else "")


@dataclass(frozen=True)
class Answers:
    """Hold a prompt and the greedy answers of both models to it, cut at a few tokens. ended: by model."""

    prompt: str
    answers: dict[str, str]
    ended: dict[str, bool]


def preflight(run: Prepared, cache_plan: CachePlan | None, output: Path | None = None) -> list[Finding]:
    """Return what may make this run fail, the warnings first. output: its output directory, for the space on the disk."""
    found = [finding for check in _CHECKS for finding in check(run)]
    found += _memory(run, cache_plan)
    if output is not None:
        found += _disk(run, output)
    return sorted(found, key=lambda finding: finding.severity == "note")


def report_findings(findings: SequenceOf[Finding], listener: Listener) -> None:
    """Report the warnings that are not yet reported."""
    for finding in findings:
        if finding.severity == "warning" and not finding.is_reported:
            listener(Warned(finding.text))


def check_strict(findings: SequenceOf[Finding], *, strict: bool) -> None:
    """Raise UsageError for any warning if the run is ``strict``."""
    warnings = [finding for finding in findings if finding.severity == "warning"]
    if strict and warnings:
        first = warnings[0]
        others = f" (and {counted(len(warnings) - 1, 'other warning')})" if len(warnings) > 1 else ""
        raise UsageError(
            "usage.strict",
            f"{first.code}: {first.what}{others}",
            where=first.where,
            hint=f"{first.cure}, or drop --strict" if first.cure else "drop --strict",
        )


def greedy_answers(run: Prepared, listener: Listener) -> list[Answers]:
    """Return the greedy answers of student and teacher to a few held-out prompts, or to training prompts without any."""
    rows = run.answered[:_PROBED_ROWS] or run.train.sequences[:_PROBED_ROWS]
    loaded = {name: model for name, model in run.pair.models.items() if model.is_whole}
    models = {name: model for name, model in loaded.items() if not _cannot_decode(model, name, listener)}
    tokenizer = run.pair.tokenizer
    found = [Answers(str(tokenizer.decode(row.prompt)), {}, {}) for row in rows]
    for name, model in models.items():
        seen = rows if model is run.student else [row.for_teacher for row in rows]
        for answers, (text, has_ended) in zip(found, _greedy(run, model, seen), strict=True):
            answers.answers[name] = text
            answers.ended[name] = has_ended
    return found if models else []


def _cannot_decode(model: Backbone, name: str, listener: Listener) -> bool:
    try:
        model.check_decoding()
    except ModelError as error:
        listener(Note(f"no answers of the {name}: {error.what}"))
        return True
    return False


def _greedy(run: Prepared, model: Backbone, rows: SequenceOf[Sequence]) -> Iterator[tuple[str, bool]]:
    from distillm_cli.rollouts.next_token import Sampling
    from distillm_cli.rollouts.sampler import sample

    limit = min(_PROBED_TOKENS, run.recipe.rollout.max_new_tokens)
    with eval_mode(model), torch.no_grad():
        outputs = sample(
            model, [row.prompt for row in rows], Sampling(0.0, 1.0, 0, limit), [(0, i) for i in range(len(rows))]
        )
    for output in outputs:
        text = str(run.pair.tokenizer.decode(output.tokens, skip_special_tokens=True))
        yield text, output.complete


# ------------------------------------------------------------------------------------------------------------ ends


def _ends(run: Prepared) -> Iterator[Finding]:
    """Compare the tokens that end a response in the rows, for the teacher and for the student."""
    name = run.pair.tokenizer.convert_ids_to_tokens
    trained = set(run.encoder.end_ids) | run.train.end_ids
    teacher = set(run.pair.teacher_stops or ())
    student = run.student.stop_ids
    ends = last_tokens(run.train.sequences, _READ_ROWS)
    reached = int(np.isin(ends, sorted(trained)).sum())
    if reached < len(ends):
        share = reached / len(ends)
        what = f"{share:.0%} of the responses reach the token that ends them, the others are cut"
        if not reached:
            what = "no response reaches the token that ends it: the student never learns to stop"
        severity: Severity = "warning" if share < 1 - _MANY else "note"
        yield Finding(severity, "end.cut", what, run.train_rows.name, "raise --max-length")
    if teacher and not trained & teacher:
        what = f"responses end with {_names(name, trained)}, and the teacher stops at {_names(name, teacher)}"
        cure = f"try --set data.eos={name(min(teacher))!r}"
        yield Finding("warning", "end.teacher", what, "teacher's generation config", cure, is_reported=True)
    missing = {token for token in teacher if token < run.pair.vocab} - student
    if missing and run.recipe.schedule.uses_student_outputs:
        what = f"the teacher also stops at {_names(name, missing)}, where the student continues"
        cure = f"try --set student.stop_tokens={name(min(missing))!r}"
        yield Finding("note", "end.student", what, "student's generation config", cure)
    pad = run.pair.tokenizer.pad_token_id
    if pad is not None and pad in trained:
        what = f"the padding token {name(pad)} also ends responses, which is fine: positions of padding have no loss"
        yield Finding("note", "end.padding", what, "tokenizer")


def _names(name: Callable[..., Any], tokens: set[int]) -> str:
    return ", ".join(str(name(token)) for token in sorted(tokens)[:3])


# ------------------------------------------------------------------------------------------------------- templates


def _templates(run: Prepared) -> Iterator[Finding]:
    """Compare the rendered prompts of both sides, and look for tokens that a template adds twice or not at all."""
    rows = run.train.rows[:_MEASURED_ROWS]
    form = run.encoder.renderer.form
    seen = (run.teacher_encoder or run.encoder).renderer.form
    own, others = run.pair.templates.get("student"), run.pair.templates.get("teacher")
    if run.pair.teacher is not None and others is not None and any(seen(row) != "chat" for row in rows):
        whose = "the student has none" if own is None else "of both models"
        what = f"the teacher has a chat template ({whose}), and rows are written without it: it may answer worse so"
        cure = "try --set teacher.template=chat, or data.template=chat for both models"
        yield Finding("warning", "template.not_chat", what, "data.template", cure)
    differs = own is not None and others is not None and own != others and run.teacher_encoder is None
    if differs and (different := _rendered_differently(run, rows)) is not None:
        what = f"the chat templates of teacher and student write the prompt of {different} differently"
        cure = "try --set teacher.chat_template=teacher"
        yield Finding("warning", "template.different", what, "data.chat_template", cure, is_reported=True)
    if run.teacher_encoder is not None:
        count = sum(
            s.teacher_prompt is not None and not np.array_equal(s.prompt, s.teacher_prompt.ids)
            for s in run.train.sequences[:_MEASURED_ROWS]
        )
        what = f"teacher and student see different prompts in {count:,} of {counted(len(rows), 'checked row')}"
        yield Finding("note", "template.sides", what, "teacher.template, teacher.chat_template")
    bos = run.pair.tokenizer.bos_token_id
    doubled = [row for row, s in zip(rows, run.train.sequences, strict=False) if _starts_twice(s.prompt, bos)]
    if doubled:
        what = f"prompts start with two {run.pair.tokenizer.bos_token}, as in {doubled[0].where}"
        cure = "remove the token from the rows, or from the chat template"
        yield Finding("warning", "template.double_bos", what, run.train_rows.name, cure)
    chat = run.encoder.renderer.chat
    conversations = [row for row in rows if form(row) == "chat"]
    if chat is not None and conversations and not chat.adds_generation_prompt(conversations[0]):
        what = "the chat template adds nothing after the user's turn: a prompt does not say that the answer follows"
        cure = "choose another one with --set data.chat_template=FILE"
        yield Finding("warning", "template.no_generation_prompt", what, "chat template", cure)


def _starts_twice(prompt: np.ndarray, bos: int | None) -> bool:
    return bos is not None and len(prompt) > 1 and bool((prompt[:2] == bos).all())


def _rendered_differently(run: Prepared, rows: SequenceOf[Row]) -> str | None:
    """Return where the first row is from whose prompt both chat templates write differently; None if there is none."""
    templates = [template for template in run.pair.templates.values() if template is not None]
    encoders = [run.encoder.with_chat_template(template) for template in templates]
    for row in rows:
        if run.encoder.renderer.form(row) != "chat":
            continue
        try:
            own, other = (encoder.renderer.prompt(row) for encoder in encoders)
        except (DataError, ModelError):  # one of them refuses the row
            return row.where or "the first row"
        if own != other:
            return row.where or "the first row"
    return None


# --------------------------------------------------------------------------------------------------------- teacher


def _teacher(run: Prepared) -> Iterator[Finding]:
    """Compare the losses of teacher and student on held-out rows."""
    teacher = run.pair.teacher
    rows = run.answered[:_MEASURED_ROWS]
    ends = np.cumsum([len(row) for row in rows])
    rows = [row for row, end in zip(rows, ends, strict=True) if end <= _MEASURED_TOKENS] or rows[:1]
    if teacher is None or not rows or run.recipe.has_random_teacher or not teacher.is_whole:
        return
    seen = {"teacher": [row.for_teacher for row in rows], "student": rows}
    losses = {name: _loss(run, model, seen[name]) for name, model in run.pair.models.items()}
    where = f"cross-entropy of {counted(len(rows), 'held-out row')}"
    numbers = f"{losses['teacher']:.3f} nats per token, the student before training {losses['student']:.3f}"
    if not math.isfinite(losses["teacher"]):
        yield Finding(
            "warning", "teacher.loss", "the teacher's loss is not finite", where, "try --set teacher.dtype=fp32"
        )
    elif losses["teacher"] >= losses["student"]:
        what = f"the teacher is no better than the student: it has {numbers}"
        cure = "fine-tune the teacher first (distillm sft), or check template and data"
        yield Finding("warning", "teacher.loss", what, where, cure)
    else:
        yield Finding("note", "teacher.loss", f"the teacher has {numbers}", where)


@torch.no_grad()
def _loss(run: Prepared, model: Backbone, rows: SequenceOf[Sequence]) -> float:
    """Return the mean cross-entropy per token of a model in the precision of its weights, nats."""
    module = StudentLoss(model, CrossEntropy())
    batches = batches_by_length(rows, _MEASURED_AT_ONCE)
    device = run.student.device if model is run.student else run.device  # a student to be distributed is on the CPU
    info = RunInfo(steps=1, steps_per_epoch=1, device=device)
    with eval_mode(module):
        return mean_loss(batches, CROSS_ENTROPY, module, info, None, autocast=False)


# ------------------------------------------------------------------------------------------------------------ rows


def _rows(run: Prepared) -> Iterator[Finding]:
    """Look for rows that teach nothing or the wrong thing."""
    name = run.train_rows.name
    rows = run.train.rows[:_READ_ROWS]
    count = len(rows)
    keys = Counter((row.key, row.references[:1]) for row in rows)
    repeated = count - len(keys)
    if repeated:
        times = max(keys.values())
        what = f"{repeated:,} of {counted(count, 'row')} repeat another one, one of them {times:,} times"
        yield _shared("data.duplicates", what, name, repeated / count, "remove duplicates")
    if run.overlap:
        valid = len(run.valid_rows)
        shared = f"{run.overlap:,} of {counted(valid, 'held-out row')}"
        what = f"{shared} have the prompt of a training row, so that validation looks too good"
        cure = "set others with --set data.valid=FILE"
        yield _shared("data.overlap", what, name, run.overlap / valid, cure, reported=True)
    if run.recipe.needs_responses:
        empty = [row for row in rows if row.references and not row.references[0].strip() and row.answer is None]
        if empty:
            what = (
                f"{counted(len(empty), 'response')} of {counted(count, 'row')} are empty, the first in {empty[0].where}"
            )
            yield _shared("data.empty_responses", what, name, len(empty) / count, "remove these rows")
    odd = [row for row in rows if any(sign in _text(row) for sign in _MISREAD)]
    if odd:
        what = (
            f"{counted(len(odd), 'row')} of {count:,} have characters of a wrongly read encoding, as in {odd[0].where}"
        )
        yield _shared("data.odd_characters", what, name, len(odd) / count, "write the file again in UTF-8")
    lost = run.train.dropped + len(run.train.refused)
    if lost:
        what = f"{lost:,} of {counted(lost + len(run.train), 'row')} are left out as too long or not readable"
        share = lost / (lost + len(run.train))
        yield _shared("data.dropped", what, name, share, "raise --max-length", reported=True)
    if run.recipe.schedule.uses_student_outputs:
        yield from _long_responses(run)


def _long_responses(run: Prepared) -> Iterator[Finding]:
    limit = run.recipe.rollout.max_new_tokens
    lengths = response_lengths(run.train.sequences)[:_READ_ROWS]
    share = float((lengths > limit).mean())
    if share:
        wanted = int(np.quantile(lengths, 0.99))
        what = f"{share:.0%} of the rows' responses have more than {limit} tokens, at which student outputs are cut"
        cure = f"try --set rollout.max_new_tokens={wanted}" if wanted > limit else ""
        yield _shared("data.long_responses", what, "rollout.max_new_tokens", share, cure)


def _shared(code: str, what: str, where: str, share: float, cure: str, *, reported: bool = False) -> Finding:
    """Return a finding on a share of the rows: a warning if it is large."""
    return Finding("warning" if share > _MANY else "note", code, what, where, cure, is_reported=reported)


def _text(row: Row) -> str:
    parts = [row.instruction or "", row.input, row.prompt or "", *row.references]
    parts += [str(message.get("content", "")) for message in row.messages or ()]
    return "\n".join(parts)


# ---------------------------------------------------------------------------------------------------- memory, disk


def _memory(run: Prepared, cache_plan: CachePlan | None) -> Iterator[Finding]:
    """Compare the estimated peak memory with that of the device."""
    from distillm_cli.runs.plan import memory_estimate
    from distillm_cli.utils.memory import available_memory

    needed = memory_estimate(run, cache_plan)
    if run.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(run.device)
        held = torch.cuda.memory_allocated(run.device)
    else:
        models = [model for model in run.pair.models.values() if not model.is_to_be_sharded]
        held = sum(t.numel() * t.element_size() for model in models for t in model.state_dict().values())
        found = available_memory()
        if found is None:
            return
        free = found
    if needed > free + held:
        what = f"an estimated {format_bytes(needed)} of memory are needed, and {format_bytes(free + held)} are there"
        cure = "lower --batch-size (and raise train.accumulate), or --max-length"
        yield Finding("warning", "memory.short", what, str(run.device), cure)


def _disk(run: Prepared, output: Path) -> Iterator[Finding]:
    """Compare the size of the checkpoints with the free space."""
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    trained = sum(p.numel() for p in run.student.model.parameters() if p.requires_grad)
    stored = sum(p.numel() for p in run.student.model.parameters()) if run.student.adapter is None else trained
    kept = max(run.recipe.train.keep, 1) + 1  # and the one that is being written
    needed = kept * 4 * (stored + 2 * trained) + 4 * stored
    if needed > free:
        what = f"up to {format_bytes(needed)} of checkpoints are written, and {format_bytes(free)} are free"
        yield Finding("warning", "disk.short", what, str(output), "lower --keep, or choose another --output")


_CHECKS: tuple[Callable[[Prepared], Iterator[Finding]], ...] = (_ends, _templates, _teacher, _rows)
