"""``distillm plan``: estimate what a run needs before it is started."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from distillm_cli.cli import options
from distillm_cli.cli.options import FieldFlags, command
from distillm_cli.cli.usage import check_complete
from distillm_cli.utils.text import counted

if TYPE_CHECKING:
    from distillm_cli.runs.prepare import Prepared

SHOWN = 3  # sequences of the decoded batch


@command(
    "plan",
    panel=options.OTHER_COMMANDS,
    examples=(
        "distillm plan --recipe quickstart",
        "distillm plan --teacher gpt2-xl --student gpt2 --data rows.jsonl --batch-size 16",
        "distillm plan --method sft --student gpt2 --data rows.jsonl",
        "distillm plan --teacher configs/gpt2-xl --student configs/gpt2/config.json --data dolly",
        "distillm plan --recipe dolly-gpt2-pipeline",
    ),
)
def plan(
    fields: FieldFlags,
    recipe: options.Recipe = None,
    sets: options.Set = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Estimate what a run needs: whether the pair fits, sizes, dropped rows, memory, FLOPs, time on known GPUs.

    No step is taken. Models whose weights are in a local directory are loaded. For others the config is enough (a
    directory with a config.json, the file itself, or a hub name), and no weights are downloaded. A pipeline is planned
    stage by stage.
    """
    from distillm_cli.config.load import resolve
    from distillm_cli.config.pipeline_recipe import is_pipeline
    from distillm_cli.runs.defaults import fitted, fitted_line
    from distillm_cli.training.events import Note
    from distillm_cli.ui.console import console

    if recipe is not None and is_pipeline(recipe):
        _plan_stages(recipe, fields, sets, json, quiet)
        return
    resolved = fitted(resolve(command="plan", recipe=recipe, flags=fields, sets=sets))
    check_complete(resolved.recipe)
    is_default = resolved.origin["data.source"] == "default"
    notes = ["no --data: planned for Dolly (data.source dolly)"] if is_default else []
    notes += filter(None, [fitted_line(resolved)])
    with console(json_mode=json, quiet=quiet) as ui:
        for note in notes:
            ui(Note(note))
        from distillm_cli.runs.plan import survey

        found, run = survey(resolved, ui)
        ui.show(*_pages(found), *(_batch(run) if run is not None else ()))
        ui.result({"command": "plan", "status": "ok", **found})


def _plan_stages(recipe: str, flags: FieldFlags, sets: list[str] | None, json: bool, quiet: bool) -> None:
    from distillm_cli.config.pipeline_recipe import load_pipeline
    from distillm_cli.errors import UsageError
    from distillm_cli.runs.defaults import fitted_pipeline
    from distillm_cli.ui.console import console

    if flags:
        flag = next(iter(flags.values())).name
        raise UsageError(
            f"{flag} with {recipe}, a recipe of stages", hint="try --set stages.NAME.section.key=VALUE, or defaults.…"
        )
    pipeline = fitted_pipeline(load_pipeline(recipe, sets or ()))
    with console(json_mode=json, quiet=quiet) as ui:
        from distillm_cli.runs.plan_stages import of_pipeline

        found = of_pipeline(pipeline, ui)
        ui.show(*_stages_page(found))
        ui.result({"command": "plan", "status": "ok", "pipeline": pipeline.name, "stages": found})


def _pages(found: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    from distillm_cli.ui.display import size
    from distillm_cli.ui.summary import facts, table

    needs = [[_PARTS.get(name, name.replace("_", " ")), size(n)] for name, n in found["memory"].items()]
    work = [[_SOURCES[source], _flop(flops)] for source, flops in found["step_flops"].items()]
    if "sft" in found:
        work.insert(0, ["fine-tuning before it, data set rows", _flop(found["sft"]["step_flops"]["dataset"])])
    return [
        _models(found),
        facts("Run", _facts(found)),
        *_place(found.get("teacher_cache")),
        table("Memory, estimated", ["part", "size"], needs),
        table("One step", ["trains on", "work"], work),
        table("On GPUs, estimated", ["", "fits", "a step", "the run"], _gpus(found["gpus"])),
        Text(f"Assumed: {found['assumed']}.", "dim"),
    ]


def _facts(found: dict[str, Any]) -> list[tuple[str, str]]:
    from distillm_cli.data.sources import listed_shares

    data = found["data"]
    told = [("pair", _pair(found)), ("rows", _rows(data))]
    if data.get("format"):
        told.append(("format", data["format"]))
    if data.get("columns_not_read"):
        told.append(("columns not read", listed_shares(data["columns_not_read"])))
    if data.get("bad_rows_skipped"):
        told.append(("broken rows skipped", f"{data['bad_rows_skipped']:,}"))
    if "kept" in data:
        prompts = f" ({data['dropped_prompts']:,} for the prompt alone)"
        told.append(("dropped as too long", f"{data['dropped']:,}{prompts}" if data["dropped"] else "none"))
        told.append(("cut", f"{data['truncated']:,}"))
        lengths = f"mean {data['mean_length']}, longest {data['longest']:,} tokens of prompt and response"
    else:
        lengths = f"not known: taken to be {data['longest']:,} tokens of prompt and response, the most allowed"
    told.append(("lengths", lengths))
    if "response_tokens" in data:
        told.append(("supervised", f"{counted(data['response_tokens'], 'response token')} an epoch"))
    sequences = counted(found["sequences_per_step"], "sequence")
    if found["steps"] is None:
        told.append(("steps", f"number not known; {sequences} each"))
    else:
        epoch = f", {found['steps_per_epoch']:,} an epoch" if found["steps_per_epoch"] else ""
        told.append(("steps", f"{found['steps']:,} of {sequences}{epoch}"))
    if (before := found.get("sft")) is not None:
        number = "" if before["steps"] is None else f", {counted(before['steps'], 'step')}"
        told.append(
            (
                "fine-tuned before it",
                f"{before['epochs']:g} {'epoch' if before['epochs'] == 1 else 'epochs'} of sft{number}, without the teacher",
            )
        )
    told.append(("computes on", f"{found['device']}, {found['dtype']}"))
    if "teacher_cache" in found:
        told.append(("teacher's states", found["teacher_cache"]["why"]))
    return told


def _place(kept: dict[str, Any] | None) -> list[Any]:
    """Where a cache on disk is or would be, and whether it fits."""
    from rich.text import Text

    from distillm_cli.ui.display import size

    if kept is None or "place" not in kept:
        return []
    free = kept["disk_free"] or 0
    short = not kept["hit"] and kept["bytes"] > 0.95 * free
    said = "there already" if kept["hit"] else f"{'does not fit: ' if short else ''}{size(free)} free"
    return [Text(f"The teacher's states are kept in {kept['place']} ({said})", "yellow" if short else "")]


_PARTS = {
    "total": "most at once",
    "rollout_weights": "copy that samples",
    "rollout_layouts": "that copy, laid out",
}

_SOURCES = {
    "dataset": "data set rows",
    "dataset_cached": "data set rows, teacher's states kept",
    "teacher": "fresh samples of the teacher",
    "teacher_cached": "the teacher's samples, its states kept",
    "teacher+rollout": "a fresh sample of each, in pairs",
    "teacher+rollout_cached": "a kept sample of the teacher, a fresh rollout",
    "rollout": "a fresh rollout",
    "replay": "a replayed rollout",
}


def _models(found: dict[str, Any]) -> Any:
    """A column for each model."""
    from distillm_cli.ui.summary import table

    models = {name: found["models"][name] for name in ("teacher", "student") if name in found["models"]}
    lines = {
        "kind": lambda m: m["kind"],
        "parameters": lambda m: _count(m["parameters"]),
        "  embeddings": lambda m: _count(m["parts"]["embeddings"]),
        "  trunk": lambda m: _count(m["parts"]["trunk"]),
        "  head": lambda m: _count(m["parts"]["head"]) if m["parts"]["head"] else "the embeddings",
        "  not text": lambda m: _count(m["parts"]["outside"]) if m["parts"]["outside"] else "none",
        "that train": lambda m: "none" if not m["trainable"] else _count(m["trainable"]),
        "layers × width": _layers,
        "context": lambda m: "no limit" if m["context"] is None else f"{m['context']:,}",
        "weights in": lambda m: m["dtype"],
    }
    if not any(m["parts"]["outside"] for m in models.values()):
        del lines["  not text"]
    return table("Models", ["", *models], [[line, *map(told, models.values())] for line, told in lines.items()])


def _layers(model: dict[str, Any]) -> str:
    both = f"{model['encoder_layers']} + {model['layers']}" if "encoder_layers" in model else model["layers"]
    return f"{both} × {model['width']}"


def _count(number: int) -> str:
    from distillm_cli.ui.display import parameters

    return parameters(number).removesuffix(" parameters")


def _flop(number: float) -> str:
    """14.6 TFLOP, 691 MFLOP."""
    from distillm_cli.ui.display import amount

    said = amount(number)
    return f"{said}FLOP" if said[-1].isalpha() else f"{said} FLOP"


def _pair(found: dict[str, Any]) -> str:
    if "teacher" not in found["models"]:
        return "one model, no teacher"
    if any("vocabularies fit is not known" in note for note in found.get("notes", ())):
        return f"not known: no tokenizer at hand; {found['vocabulary']:,} rows in common"
    return f"fits: {found['vocabulary']:,} shared tokens"


def _rows(data: dict[str, Any]) -> str:
    if data["rows"] is None:
        return f"{data['source']}, not at hand"
    kept = f", {data['kept']:,} kept" if "kept" in data else ""
    held = f"; {data['valid_rows']:,} held out" if "valid_rows" in data else ""
    return f"{data['rows']:,} from {data['source']}{kept}{held}"


def _gpus(gpus: dict[str, Any]) -> list[list[str]]:
    return [
        [name, "yes" if told["fits"] else "no", _span(told["step_s"].values()), _span(told.get("run_s"))]
        for name, told in gpus.items()
    ]


_UNITS = (("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 7200), ("h", 3600, 48 * 3600), ("days", 86400, math.inf))


def _span(times: Iterable[float] | None) -> str:
    """12 ms, 0.2–3.4 s, 25–31 min, 2.6 h: the least and the most of some seconds, in the unit of the most; an estimate has
    no more digits than that."""
    if times is None:
        return "–"
    ordered = sorted(times)
    unit, length, _ = next(known for known in _UNITS if ordered[-1] < known[2])
    said = (f"{t:.0f}" if t >= 10 else f"{t:.2g}" for t in (ordered[0] / length, ordered[-1] / length))
    return f"{'–'.join(dict.fromkeys(said))} {unit}"


def _stages_page(found: dict[str, dict[str, Any]]) -> list[Any]:
    from rich.text import Text

    from distillm_cli.ui.display import size
    from distillm_cli.ui.summary import table

    parts = []
    for name, told in found.items():
        listed = [f"{_PARTS.get(p, p.replace('_', ' '))} {size(b)}" for p, b in told["memory"].items() if p != "total"]
        parts.append(Text.assemble((f"  {name}  ", "cyan"), ", ".join(listed)))
    columns = ["", "models", "number", "FLOP of each", "memory"]
    notes = dict.fromkeys(note for told in found.values() for note in told["notes"])
    return [
        table("Stages", columns, [_stage(name, told) for name, told in found.items()]),
        Text("Memory by part, estimated", "bold"),
        *parts,
        *_times(found),
        Text(f"Assumed: {next(iter(found.values()))['assumed']}.", "dim"),
        *(Text(note, "dim") for note in notes),
    ]


def _stage(name: str, told: dict[str, Any]) -> list[str]:
    from distillm_cli.ui.display import size

    models, trains = told["models"], "step_flops" in told
    if trains:
        which = " → ".join(_count(models[model]["parameters"]) for model in ("teacher", "student") if model in models)
        count, what, work = told["steps"], "steps", told["step_flops"].values()
    else:
        which = ", ".join(dict.fromkeys(_count(model["parameters"]) for model in models.values()))
        count, what, work = told["responses"], "answers", told["response_flops"]
    number = f"{'–' if count is None else f'{count:,}'} {what}"
    return [name, which, number, _amounts(work), size(told["memory"]["total"])]


def _amounts(numbers: Iterable[float]) -> str:
    """3.01–16.3 T, 292 M: the least and the most, in the unit of the most."""
    from distillm_cli.ui.display import amount

    least, most = min(numbers), max(numbers)
    digits, _, unit = amount(most).partition(" ")
    if not unit or float(f"{least:.3g}") == float(f"{most:.3g}"):
        return amount(most)
    return f"{least / 1000 ** (' kMGT'.index(unit)):.3g}–{digits} {unit}"


def _times(found: dict[str, dict[str, Any]]) -> list[Any]:
    """Of whole stages where it is known how much there is to do, else of a step or an answer."""
    from distillm_cli.ui.summary import table

    gpus = list(next(iter(found.values()))["gpus"])
    whole, each = [], []
    for name, told in found.items():
        entries = [told["gpus"][gpu] for gpu in gpus]
        is_known = "run_s" in entries[0]
        what = "run_s" if is_known else "step_s" if "step_flops" in told else "response_s"
        times = [entry[what].values() if what == "step_s" else entry[what] for entry in entries]
        cells = [_span(t) if entry["fits"] else "too large" for t, entry in zip(times, entries, strict=True)]
        (whole if is_known else each).append([name, *cells])
    if len(whole) > 1:
        total = ["all together" if not each else "together"]
        for gpu in gpus:
            known = [told["gpus"][gpu] for told in found.values() if "run_s" in told["gpus"][gpu]]
            spans = [sum(entry["run_s"][i] for entry in known) for i in (0, 1)]
            total.append(_span(spans) if all(entry["fits"] for entry in known) else "–")
        whole.append(total)
    titles = {
        "Time of each stage, estimated": whole,
        "Time of a step, or of an answer within its batch, estimated": each,
    }
    return [table(title, ["", *gpus], rows) for title, rows in titles.items() if rows]


def _batch(run: Prepared) -> list[Any]:
    from rich.text import Text

    head = "One batch, decoded; supervised tokens are in ⟦ ⟧ (the last one ends the response, unless it was cut)"
    tokenizer, lines = run.pair.tokenizer, [Text(head, "bold")]
    for sequence in run.batch(0)[:SHOWN]:
        text, context = Text(style="dim"), []
        turns = set() if sequence.turns is None else set(sequence.turns.tolist())
        for at, token in enumerate([*sequence.prompt.tolist(), *sequence.response.tolist()]):
            if at < len(sequence.prompt) and at not in turns:
                context.append(token)
                continue
            text.append(tokenizer.decode(context))
            context = []
            text.append(f"⟦{tokenizer.decode([token])}⟧", style="not dim green")
        lines += [text, Text("─" * 20, "dim")]
    return lines
