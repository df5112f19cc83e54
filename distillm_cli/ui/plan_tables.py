"""Render the plan of a run or of a pipeline as tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from distillm_cli.runs.run_results import DecodedSequence, PipelinePlan, PlanResult
from distillm_cli.ui.summary import facts, table
from distillm_cli.utils.text import (
    counted,
    described_source,
    format_bytes,
    format_count,
    format_parameters,
    listed_shares,
)


def tables_of(result: PlanResult | PipelinePlan) -> Iterator[RenderableType]:
    """Yield the tables of a plan, of one run or of a pipeline."""
    return pipeline_tables(result) if isinstance(result, PipelinePlan) else plan_tables(result)


def plan_tables(result: PlanResult) -> Iterator[RenderableType]:
    """Yield the tables of one run's plan, and the decoded batch if there is one."""
    found = result.figures
    if "memory" not in found:
        yield from _embedding_tables(found)
        return
    yield _model_table(found)
    yield facts("Run", _run_facts(found))
    yield from _cache_place(found.get("teacher_cache"))
    needs = [[_part_label(name), format_bytes(size)] for name, size in found["memory"].items()]
    several = found.get("processes")
    each = " of each process" if several else ""
    yield table(f"Memory{each}, estimated", ["part", "size"], needs)
    work = []
    for name, (title, *_) in _STAGES.items():
        if name in found:
            flops = found[name]["step_flops"]["dataset"]
            work.append([f"{title} before distillation, data set rows", _flop(flops)])
    work += [[_SOURCES[source], _flop(flops)] for source, flops in found["step_flops"].items()]
    yield table(f"One step{each}", ["trains on", "work"], work)
    if several:
        yield facts("Processes", _process_facts(several))
    yield table("On GPUs, estimated", ["", "fits", "a step", "the run"], _gpu_rows(found["gpus"]))
    yield Text(f"Assumed: {found['assumed']}.", "dim")
    if result.batch:
        yield from _batch_lines(result.batch)
    yield from _finding_tables(found)


def _finding_tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the answers of both models to a few prompts, and what may make the run fail."""
    answers = found.get("answers", [])
    if answers:
        models = list(answers[0]["answers"])
        rows = []
        for item in answers:
            texts = [item["answers"][name] + ("" if item["ended"][name] else " …") for name in models]
            rows.append([Text(" ".join(text.split())) for text in (item["prompt"], *texts)])
        yield table("Greedy answers before training (… is cut)", ["prompt", *models], rows)
    if "findings" in found:
        marks = {"warning": Text("warning", "yellow"), "note": Text("note", "dim")}
        lines = [[marks[f["severity"]], f["code"], f"{f['what']} ({f['where']})", f["cure"]] for f in found["findings"]]
        if lines:
            yield table("Checks", ["", "check", "found", "try"], lines)
        else:
            yield Text("Checks: nothing found.", "dim")


def _embedding_tables(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the tables of a plan for sentence embeddings, which has no estimates."""
    columns = ("kind", "parameters", "layers", "width", "pooling")
    models = [[name, *(model[column] for column in columns)] for name, model in found["models"].items()]
    yield table("Models", ["", *columns], models)
    data = found["data"]
    rows: list[tuple[str, object]] = [
        ("rows", f"{data['rows']:,} with {data['sentences']:,} distinct sentences; {data['valid_rows']:,} held out"),
        ("lengths", f"mean {data['mean_length']} tokens"),
        (
            "steps",
            f"{found['steps']:,} of {found['sequences_per_step']} sentences, {found['steps_per_epoch']:,} per epoch",
        ),
        ("negatives", f"up to {found['negatives']:,} of each sentence"),
    ]
    if "pair_steps" in found:
        rows.append(("fine-tuning on pairs", f"{found['pair_steps']:,} steps"))
    yield facts("Run", [*rows, ("device", found["device"])])
    yield from (Text(note, "dim") for note in found["notes"])


def pipeline_tables(result: PipelinePlan) -> Iterator[RenderableType]:
    """Yield the tables of a pipeline's plan."""
    stages = result.stages
    columns = ["", "models", "number", "FLOP of each", "memory"]
    yield table("Stages", columns, [_stage_row(name, stage) for name, stage in stages.items()])
    yield Text("Memory by part, estimated", "bold")
    for name, stage in stages.items():
        parts = [f"{_part_label(p)} {format_bytes(size)}" for p, size in stage["memory"].items() if p != "total"]
        yield Text.assemble((f"  {name}  ", "cyan"), ", ".join(parts))
    yield from _time_tables(stages)
    yield Text(f"Assumed: {next(iter(stages.values()))['assumed']}.", "dim")
    for note in dict.fromkeys(note for stage in stages.values() for note in stage["notes"]):
        yield Text(note, "dim")


# name → in the table of steps; in the facts: what, of which kind, with which teacher
_STAGES = {
    "sft": ("fine-tuning", "fine-tuned first", "of sft", "without the teacher"),
    "ptp": ("pre-training", "pre-trained first", "on the teacher's confidence", "with one pass of the teacher"),
}


def _run_facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = found["data"]
    rows = [("pair", _pair(found)), ("rows", _rows(data))]
    for i, source in enumerate(data.get("sources", ())):
        rows.append(("" if i else "an epoch", described_source(source)))
    if data.get("format"):
        rows.append(("format", data["format"]))
    if data.get("columns_not_read"):
        rows.append(("columns not read", listed_shares(data["columns_not_read"])))
    if data.get("bad_rows_skipped"):
        rows.append(("broken rows skipped", f"{data['bad_rows_skipped']:,}"))
    if "kept" in data:
        prompts = f" ({data['dropped_prompts']:,} for the prompt alone)"
        rows.append(("dropped as too long", f"{data['dropped']:,}{prompts}" if data["dropped"] else "none"))
        rows.append(("truncated", f"{data['truncated']:,}"))
        lengths = f"mean {data['mean_length']}, longest {data['longest']:,} tokens of prompt and response"
    else:
        lengths = f"unknown: assumed to be the maximum, {data['longest']:,} tokens of prompt and response"
    rows.append(("lengths", lengths))
    if "response_tokens" in data:
        rows_counted = "in all rows" if data.get("sources") else "per epoch"
        rows.append(("supervised", f"{counted(data['response_tokens'], 'response token')} {rows_counted}"))
    sequences = counted(found["sequences_per_step"], "sequence")
    if (tokens := found.get("tokens_per_step")) is not None:
        sequences = f"about {tokens:,} tokens ({sequences})"
    if found["steps"] is None:
        rows.append(("steps", f"unknown number; {sequences} each"))
    else:
        epoch = f", {found['steps_per_epoch']:,} per epoch" if found["steps_per_epoch"] else ""
        rows.append(("steps", f"{found['steps']:,} of {sequences}{epoch}"))
    for name, (_, title, kind, teacher) in _STAGES.items():
        if (stage := found.get(name)) is not None:
            epochs = f"{stage['epochs']:g} {'epoch' if stage['epochs'] == 1 else 'epochs'}"
            number = "" if stage["steps"] is None else f", {counted(stage['steps'], 'step')}"
            rows.append((title, f"{epochs} {kind}{number}, {teacher}"))
    if (masks := found.get("masks")) is not None:
        epochs = f"{masks['epochs']:g} {'epoch' if masks['epochs'] == 1 else 'epochs'}"
        rows.append(("masks first", f"{epochs} on {masks['share_of_rows']:.0%} of the rows, not in the estimates"))
    rows.append(("device", f"{found['device']}, {found['dtype']}"))
    if "teacher_cache" in found:
        rows.append(("teacher cache", found["teacher_cache"]["why"]))
    return rows


def _process_facts(several: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = ", ".join(f"{_span([s])} over {link}" for link, s in several["network_s"].items())
    return [
        ("rows of a step", f"at most {several['sequences_each']:,} in each of {several['number']:,} processes"),
        ("gradients of a step", f"{format_bytes(several['network_bytes'])} sent by each process"),
        ("time for that", f"{seconds}; not in the times below"),
    ]


def _cache_place(cache: Mapping[str, Any] | None) -> Iterator[Text]:
    """Yield the location of a cache on disk and whether it fits."""
    if cache is None or "place" not in cache:
        return
    free = cache["disk_free"] or 0
    is_short = not cache["hit"] and cache["bytes"] > 0.95 * free
    state = "exists" if cache["hit"] else f"{'does not fit: ' if is_short else ''}{format_bytes(free)} free"
    yield Text(f"The teacher's hidden states are cached in {cache['place']} ({state})", "yellow" if is_short else "")


_PARTS = {
    "total": "peak",
    "rollout_weights": "copy for sampling",
    "rollout_layouts": "packed copy for sampling",
}

_SOURCES = {
    "dataset": "data set rows",
    "dataset_cached": "data set rows, teacher cached",
    "teacher": "new teacher samples",
    "teacher_cached": "teacher samples, teacher cached",
    "teacher+rollout": "pairs of new samples",
    "teacher+rollout_cached": "pairs of a stored teacher sample and a rollout",
    "rollout": "a rollout",
    "replay": "a replayed rollout",
}


def _model_table(found: Mapping[str, Any]) -> RenderableType:
    """Return a table with a column for each model."""
    models = {name: found["models"][name] for name in ("teacher", "student") if name in found["models"]}
    lines = {
        "kind": lambda m: m["kind"],
        "parameters": lambda m: _count(m["parameters"]),
        "  embeddings": lambda m: _count(m["parts"]["embeddings"]),
        "  trunk": lambda m: _count(m["parts"]["trunk"]),
        "  head": lambda m: _count(m["parts"]["head"]) if m["parts"]["head"] else "tied",
        "  not text": lambda m: _count(m["parts"]["outside"]) if m["parts"]["outside"] else "none",
        "trainable": lambda m: "none" if not m["trainable"] else _count(m["trainable"]),
        "layers × width": _layers,
        "context": lambda m: "no limit" if m["context"] is None else f"{m['context']:,}",
        "dtype": lambda m: m["dtype"],
    }
    if not any(m["parts"]["outside"] for m in models.values()):
        del lines["  not text"]
    rows = [[name, *map(value, models.values())] for name, value in lines.items()]
    return table("Models", ["", *models], rows)


def _layers(model: Mapping[str, Any]) -> str:
    both = f"{model['encoder_layers']} + {model['layers']}" if "encoder_layers" in model else model["layers"]
    return f"{both} × {model['width']}"


def _count(number: int) -> str:
    return format_parameters(number).removesuffix(" parameters")


def _flop(number: float) -> str:
    """Format floating-point operations: "14.6 TFLOP", "691 MFLOP"."""
    text = format_count(number)
    return f"{text}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def _part_label(part: str) -> str:
    return _PARTS.get(part, part.replace("_", " "))


def _pair(found: Mapping[str, Any]) -> str:
    if "teacher" not in found["models"]:
        return "one model, no teacher"
    if any("vocabularies are not checked" in note for note in found.get("notes", ())):
        return f"unknown: no tokenizer available; {found['vocabulary']:,} rows in common"
    return f"compatible: {found['vocabulary']:,} shared tokens"


def _rows(data: Mapping[str, Any]) -> str:
    if data["rows"] is None:
        return f"{data['source']}, not available"
    used = f", {data['kept']:,} used" if "kept" in data else ""
    held = f"; {data['valid_rows']:,} held out" if "valid_rows" in data else ""
    return f"{data['rows']:,} from {data['source']}{used}{held}"


def _gpu_rows(gpus: Mapping[str, Any]) -> list[list[str]]:
    return [
        [name, "yes" if gpu["fits"] else "no", _span(gpu["step_s"].values()), _span(gpu.get("run_s"))]
        for name, gpu in gpus.items()
    ]


_UNITS = (("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 7200), ("h", 3600, 48 * 3600), ("days", 86400, math.inf))


def _span(times: Iterable[float] | None) -> str:
    """Format a range of seconds in the unit of the longest, with few digits: "12 ms", "0.2–3.4 s", "25–31 min", "2.6 h"."""
    if times is None:
        return "–"
    ordered = sorted(times)
    unit, length, _ = next(known for known in _UNITS if ordered[-1] < known[2])
    digits = (f"{t:.0f}" if t >= 10 else f"{t:.2g}" for t in (ordered[0] / length, ordered[-1] / length))
    return f"{'–'.join(dict.fromkeys(digits))} {unit}"


def _stage_row(name: str, stage: Mapping[str, Any]) -> list[str]:
    models, trains = stage["models"], "step_flops" in stage
    if trains:
        sizes = " → ".join(_count(models[model]["parameters"]) for model in ("teacher", "student") if model in models)
        count, unit, work = stage["steps"], "steps", stage["step_flops"].values()
    else:
        sizes = ", ".join(dict.fromkeys(_count(model["parameters"]) for model in models.values()))
        count, unit, work = stage["responses"], "answers", stage["response_flops"]
    number = f"{'–' if count is None else f'{count:,}'} {unit}"
    return [name, sizes, number, _count_range(work), format_bytes(stage["memory"]["total"])]


def _count_range(numbers: Iterable[float]) -> str:
    """Format a range of counts in the unit of the largest: "3.01–16.3 T", "292 M"."""
    low, high = min(numbers), max(numbers)
    digits, _, unit = format_count(high).partition(" ")
    if not unit or float(f"{low:.3g}") == float(f"{high:.3g}"):
        return format_count(high)
    return f"{low / 1000 ** (' kMGT'.index(unit)):.3g}–{digits} {unit}"


def _time_tables(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[RenderableType]:
    """Yield the times of whole stages if their length is known, else of a step or an answer."""
    gpus = list(next(iter(stages.values()))["gpus"])
    stage_times, step_times = [], []
    for name, stage in stages.items():
        entries = [stage["gpus"][gpu] for gpu in gpus]
        is_known = "run_s" in entries[0]
        unit = "run_s" if is_known else "step_s" if "step_flops" in stage else "response_s"
        times = [entry[unit].values() if unit == "step_s" else entry[unit] for entry in entries]
        cells = [_span(t) if entry["fits"] else "too large" for t, entry in zip(times, entries, strict=True)]
        (stage_times if is_known else step_times).append([name, *cells])
    if len(stage_times) > 1:
        total = ["total" if not step_times else "together"]
        for gpu in gpus:
            known = [stage["gpus"][gpu] for stage in stages.values() if "run_s" in stage["gpus"][gpu]]
            spans = [sum(entry["run_s"][i] for entry in known) for i in (0, 1)]
            total.append(_span(spans) if all(entry["fits"] for entry in known) else "–")
        stage_times.append(total)
    titles = {
        "Time of each stage, estimated": stage_times,
        "Time of a step, or of a response within its batch, estimated": step_times,
    }
    for title, rows in titles.items():
        if rows:
            yield table(title, ["", *gpus], rows)


def _batch_lines(batch: Sequence[DecodedSequence]) -> Iterator[RenderableType]:
    head = (
        "One batch, decoded. Supervised tokens are in ⟦ ⟧; the last one is the end token, unless the response was cut."
    )
    yield Text(head, "bold")
    if any(sequence.seen for sequence in batch):
        sides = [[_marked(sequence.seen), _marked(sequence.pieces)] for sequence in batch]
        yield table("What both models see", ["teacher", "student"], sides)
        return
    for sequence in batch:
        yield _marked(sequence.pieces)
        yield Text("─" * 20, "dim")


def _marked(pieces: Sequence[tuple[str, bool]]) -> Text:
    """Return the text of a sequence with its supervised tokens marked."""
    line = Text(style="dim")
    for text, is_supervised in pieces:
        if is_supervised:
            line.append(f"⟦{text}⟧", style="not dim green")
        else:
            line.append(text)
    return line
