"""``distillm plan``: what a run would need and do, before it is started."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import typer

from distillm_cli.cli import options

if TYPE_CHECKING:
    from distillm_cli.cli.assembly import Prepared

SHOWN = 3  # sequences of the decoded batch


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        rich_help_panel=options.AROUND,
        epilog=options.examples(
            "distillm plan --recipe quickstart",
            "distillm plan --teacher gpt2-xl --student gpt2 --data rows.jsonl --batch-size 16",
            "distillm plan --method sft --student gpt2 --data rows.jsonl",
            "distillm plan --teacher configs/gpt2-xl --student configs/gpt2/config.json --data dolly",
            "distillm plan --recipe dolly-gpt2-pipeline",
        ),
    )(plan)


def plan(
    ctx: typer.Context,
    teacher: options.Teacher = None,
    student: options.Student = None,
    lora: options.Lora = None,
    data: options.Data = None,
    tokenizer: options.Tokenizer = None,
    max_length: options.MaxLength = None,
    skip_bad_rows: options.SkipBadRows = None,
    method: options.Method = None,
    divergence: options.Divergence = None,
    alpha: options.Alpha = None,
    schedule: options.Schedule = None,
    teacher_cache: options.TeacherCache = None,
    lr: options.Lr = None,
    batch_size: options.BatchSize = None,
    epochs: options.Epochs = None,
    steps: options.Steps = None,
    seed: options.Seed = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    recipe: options.Recipe = None,
    sets: options.Set = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """What a run would need: whether the pair fits, sizes, dropped rows, memory, FLOPs, time on known GPUs.

    Takes no step. Models whose weights are in a directory here are loaded as the run would; of others the config is enough
    (a directory with a config.json, the file itself, or a hub name), and no weights are downloaded. A recipe of stages
    is planned stage by stage.
    """
    from distillm_cli.cli.launch import check_complete
    from distillm_cli.config.load import resolve
    from distillm_cli.config.pipeline import is_pipeline
    from distillm_cli.ui.console import console

    if recipe is not None and is_pipeline(recipe):
        _plan_stages(recipe, options.given(ctx), sets, json, quiet)
        return
    resolved = resolve(command="plan", recipe=recipe, flags=options.given(ctx), sets=sets)
    check_complete(resolved.recipe)
    with console(json_mode=json, quiet=quiet) as ui:
        from distillm_cli.cli.planning import survey

        found, run = survey(resolved.recipe, ui)
        ui.show(*_pages(found), *(_batch(run) if run is not None else ()))
        ui.result({"command": "plan", "status": "ok", **found})


def _plan_stages(recipe: str, flags: dict[str, Any], sets: list[str] | None, json: bool, quiet: bool) -> None:
    from distillm_cli.config.pipeline import load_pipeline
    from distillm_cli.errors import UsageError
    from distillm_cli.ui.console import console

    if flags:
        flag = next(iter(flags.values())).name
        raise UsageError(
            f"{flag} with {recipe}, a recipe of stages", hint="try --set stages.NAME.section.key=VALUE, or defaults.…"
        )
    pipeline = load_pipeline(recipe, sets or ())
    with console(json_mode=json, quiet=quiet) as ui:
        from distillm_cli.cli.planning import of_pipeline

        found = of_pipeline(pipeline, ui)
        ui.show(*_stages_page(found))
        ui.result({"command": "plan", "status": "ok", "pipeline": pipeline.name, "stages": found})


def _pages(found: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    from distillm_cli.ui.display import amount
    from distillm_cli.ui.summary import table

    data, memory = found["data"], found["memory"]
    facts = [["pair", _pair(found)], ["rows", _rows(data)]]
    if data.get("bad_rows_skipped"):
        facts.append(["broken rows skipped", f"{data['bad_rows_skipped']:,}"])
    if "kept" in data:
        prompts = f" ({data['dropped_prompts']:,} for the prompt alone)"
        facts.append(["dropped as too long", f"{data['dropped']:,}{prompts}" if data["dropped"] else "none"])
        facts.append(["cut", f"{data['truncated']:,}"])
    facts.append(["lengths", f"mean {data['mean_length']}, longest {data['longest']:,} tokens of prompt and response"])
    if "response_tokens" in data:
        facts.append(["supervised", f"{data['response_tokens']:,} response tokens an epoch"])
    steps = "not known" if found["steps"] is None else f"{found['steps']:,}"
    epoch = f", {found['steps_per_epoch']:,} an epoch" if found["steps_per_epoch"] else ""
    facts += [
        ["steps", f"{steps} of {found['sequences_per_step']} sequences{epoch}"],
        ["computes on", f"{found['device']}, {found['dtype']}"],
    ]
    kept, where = found.get("teacher_cache"), []
    if kept is not None:
        facts.append(["teacher's states", kept["why"]])
    if kept is not None and "place" in kept:
        free = kept["disk_free"] or 0
        short = not kept["hit"] and kept["bytes"] > 0.95 * free
        said = "there already" if kept["hit"] else f"{'does not fit: ' if short else ''}{amount(free)}B free"
        where = [Text(f"The teacher's states are kept in {kept['place']} ({said})", "yellow" if short else "")]
    needs = [[name.replace("_", " "), f"{amount(size)}B"] for name, size in memory.items()]
    work = [[_SOURCES[source], f"{flops / 1e12:.3g}"] for source, flops in found["step_flops"].items()]
    return [
        table("Models", ["", "kind", "parameters", "in parts", "layers × width", "context", "dtype"], _models(found)),
        table("Run", ["", ""], facts),
        table("Memory, estimated", ["part", "size"], needs),
        *where,
        table("One step", ["trains on", "TFLOP"], work),
        table("On GPUs, estimated", ["", "fits", "a step", "the run"], _gpus(found["gpus"])),
        Text(f"Assumed: {found['assumed']}.", "dim"),
    ]


_SOURCES = {
    "dataset": "data set rows",
    "dataset_cached": "data set rows, teacher's states kept",
    "teacher": "fresh samples of the teacher",
    "teacher_cached": "the teacher's samples, its states kept",
    "teacher+rollout": "a fresh sample of each, in pairs",
    "rollout": "a fresh rollout",
    "replay": "a replayed rollout",
}


def _models(found: dict[str, Any]) -> list[list[Any]]:
    from distillm_cli.ui.display import parameters

    def short(count: int) -> str:
        return parameters(count).removesuffix(" parameters")

    rows = []
    for name in ("teacher", "student"):
        if (m := found["models"].get(name)) is not None:
            parts = ", ".join(f"{part} {short(n)}" for part, n in m["parts"].items() if n)
            rows.append(
                [
                    name,
                    m["kind"],
                    short(m["parameters"]),
                    parts,
                    f"{m['layers']} × {m['width']}",
                    m["context"],
                    m["dtype"],
                ]
            )
    return rows


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
    rows = []
    for name, entry in gpus.items():
        span = entry.get("run_s")
        rows.append(
            [
                name,
                "yes" if entry["fits"] else "no",
                _between(entry["step_s"].values(), _rough),
                "–" if span is None else _between(span, _rough),
            ]
        )
    return rows


def _between(values: Iterable[float], form: Callable[[float], str]) -> str:
    """The least and the most of some figures; one alone where both read the same."""
    ordered = sorted(values)
    return " to ".join(dict.fromkeys((form(ordered[0]), form(ordered[-1]))))


def _rough(seconds: float) -> str:
    """12 ms, 3.4 s, 25 min, 2.6 h, 3.1 days: an estimate has no more digits than that."""
    for unit, size, most in (("ms", 1e-3, 1), ("s", 1, 120), ("min", 60, 7200), ("h", 3600, 48 * 3600)):
        if seconds < most:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _stages_page(found: dict[str, dict[str, Any]]) -> list[Any]:
    from rich.text import Text

    from distillm_cli.ui.display import amount, parameters
    from distillm_cli.ui.summary import table

    def short(models: dict[str, Any], name: str) -> str:
        return parameters(models[name]["parameters"]).removesuffix(" parameters") if name in models else "–"

    stages, parts = [], []
    for name, told in found.items():
        span = _between(
            told["step_flops"].values(), lambda flops: f"{flops / 1e12:.2g}" if flops < 1e13 else f"{flops / 1e12:.0f}"
        )
        cache = told.get("teacher_cache")
        stages.append(
            [
                name, short(told["models"], "teacher"), short(told["models"], "student"),
                "–" if told["steps"] is None else f"{told['steps']:,}", span,
                f"{amount(told['memory']['total'])}B", f"{amount(cache['bytes'])}B" if cache and cache["bytes"] else "–",
            ]
        )  # fmt: skip
        listed = ", ".join(f"{p.replace('_', ' ')} {amount(b)}B" for p, b in told["memory"].items())
        parts.append(Text.assemble((f"  {name}  ", "cyan"), listed))
    gpus = next(iter(found.values()))["gpus"]
    times = []
    for name, told in found.items():
        row = [name]
        for gpu in gpus:
            entry = told["gpus"][gpu]
            if "run_s" in entry:
                said = _between(entry["run_s"], _rough)
            else:
                said = f"{_between(entry['step_s'].values(), _rough)} a step"
            row.append(said if entry["fits"] else "does not fit")
        times.append(row)
    notes = dict.fromkeys(note for told in found.values() for note in told["notes"])
    return [
        table("Stages", ["", "teacher", "student", "steps", "TFLOP/step", "memory", "states"], stages),
        Text("Memory by part, estimated", "bold"),
        *parts,
        table("Time, estimated", ["", *gpus], times),
        Text(f"Assumed: {next(iter(found.values()))['assumed']}.", "dim"),
        *(Text(note, "dim") for note in notes),
    ]


def _batch(run: Prepared) -> list[Any]:
    from rich.text import Text

    head = "One batch, decoded; supervised tokens stand in ⟦ ⟧ (the last is end-of-sequence unless cut)"
    tokenizer, lines = run.pair.tokenizer, [Text(head, "bold")]
    for sequence in run.batch(0)[:SHOWN]:
        text = Text(tokenizer.decode(sequence.prompt), style="dim")
        for token in sequence.response:
            text.append(f"⟦{tokenizer.decode([int(token)])}⟧", style="not dim green")
        lines += [text, Text("─" * 20, "dim")]
    return lines
