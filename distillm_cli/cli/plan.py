"""``distillm plan``: what a run would need and do, before it is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from distillm_cli.cli import options

if TYPE_CHECKING:
    from distillm_cli.cli.assembly import Prepared
    from distillm_cli.cli.teaching import Keeping
    from distillm_cli.models.backbone import Backbone

SHOWN = 3  # sequences of the decoded batch


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(
        rich_help_panel=options.AROUND,
        epilog=options.examples(
            "distillm plan --recipe quickstart",
            "distillm plan --teacher gpt2-xl --student gpt2 --data rows.jsonl --batch-size 16",
            "distillm plan --method sft --student gpt2 --data rows.jsonl",
        ),
    )(plan)


def plan(
    ctx: typer.Context,
    teacher: options.Teacher = None,
    student: options.Student = None,
    data: options.Data = None,
    tokenizer: options.Tokenizer = None,
    max_length: options.MaxLength = None,
    skip_bad_rows: options.SkipBadRows = None,
    method: options.Method = None,
    divergence: options.Divergence = None,
    alpha: options.Alpha = None,
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
    """What a run would need: whether the pair fits, sizes, tokens, dropped rows, memory, one decoded batch.

    Reads the rows and loads the models as the run would, and takes no step.
    """
    from distillm_cli.cli.launch import check_complete
    from distillm_cli.config.load import resolve
    from distillm_cli.ui.console import console

    resolved = resolve(command="plan", recipe=recipe, flags=options.given(ctx), sets=sets)
    check_complete(resolved.recipe)
    with console(json_mode=json, quiet=quiet) as ui:
        from distillm_cli.cli.assembly import prepare

        run = prepare(resolved.recipe, ui)
        found = survey(run)
        ui.show(*_pages(run, found))
        ui.result({"command": "plan", "status": "ok", **found})


def survey(run: Prepared) -> dict[str, Any]:
    """The plan as data: models, data, steps, memory in bytes by part, what is kept of the teacher's states."""
    from distillm_cli.cli.teaching import plan_keeping

    recipe = run.recipe
    models = {"student": _model(run.student)}
    if run.pair.teacher is not None:
        models["teacher"] = _model(run.pair.teacher)
        models["ratio"] = round(models["teacher"]["parameters"] / models["student"]["parameters"], 2)
    lengths = run.train.lengths
    keeping = None if run.pair.teacher is None else plan_keeping(run)
    memory = memory_estimate(run, keeping)
    return {
        "method": recipe.method,
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "models": models,
        "vocabulary": run.pair.vocab,
        "data": {
            "source": run.train_rows.name,
            "rows": len(run.train_rows),
            "kept": len(run.train),
            "dropped": run.train.dropped,
            "dropped_prompts": run.train.dropped_prompts,
            "truncated": run.train.truncated,
            "bad_rows_skipped": len(run.train_rows.skipped),
            "valid_rows": len(run.valid),
            "response_tokens": run.train.tokens,
            "longest": int(lengths.max()),
            "mean_length": round(float(lengths.mean()), 1),
        },
        "steps": run.steps,
        "steps_per_epoch": run.order.steps_per_epoch,
        "sequences_per_step": run.step_rows * (2 if recipe.objective.row_weight else 1),
        "memory": memory | {"total": sum(memory.values())},
        **({} if keeping is None else {"teacher_cache": _kept(run, keeping)}),
    }


def _kept(run: Prepared, keeping: Keeping) -> dict[str, Any]:
    """What would be kept of the teacher's states: bytes of rows and, at most, of replayed rollouts."""
    from distillm_cli.cli.teaching import disk_free

    told = {
        "mode": keeping.mode,
        "rows": len(run.train) if keeping.rows_bytes else 0,
        "bytes": keeping.rows_bytes,
        "rollout_bytes": keeping.rollout_bytes,
        "why": keeping.why,
    }
    if keeping.place is None:
        return told
    return told | {"place": str(keeping.place), "hit": keeping.is_made, "disk_free": disk_free(keeping.place)}


def _model(model: Backbone) -> dict[str, Any]:
    config = model.model.config.get_text_config()
    return {
        "kind": config.model_type,
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "layers": getattr(config, "num_hidden_layers", None),
        "width": getattr(config, "hidden_size", None),
        "context": model.context,
        "dtype": str(model.model.dtype).removeprefix("torch."),
    }


def memory_estimate(run: Prepared, keeping: Keeping | None = None) -> dict[str, int]:
    """Bytes by part. Weights, gradients and optimizer are counted exactly; activations are the usual estimate of
    34 values per position, layer and width (Korthikanti et al. 2022, arXiv 2205.05198, without attention scores), or 2
    with gradient checkpointing; one micro-batch of the longest length. The loss holds its chunks and one head gradient.

    keeping: of the teacher's states; those on disk are mapped, and take no memory that others need.
    """
    from distillm_cli.core.fused import work_bytes

    recipe, student = run.recipe, run.student.model
    trainable = sum(p.numel() for p in student.parameters() if p.requires_grad)
    config = student.config.get_text_config()
    layers, width = getattr(config, "num_hidden_layers", 1), getattr(config, "hidden_size", 1)
    value = 4 if run.dtype.itemsize == 4 else 2
    positions = min(recipe.train.batch_size, len(run.train)) * int(run.train.lengths.max())
    head = run.pair.vocab * width * (4 if value == 4 else 6)  # its gradient, and its copy in the products' dtype
    parts = {
        "student_weights": sum(p.numel() * p.element_size() for p in student.parameters()),
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "activations": positions * layers * width * value * (2 if recipe.train.gradient_checkpointing else 34),
        "loss": work_bytes(positions, run.pair.vocab, run.dtype.itemsize, run.device.type) + head,
    }
    if run.pair.teacher is not None:
        teacher = run.pair.teacher.model
        wide = getattr(teacher.config.get_text_config(), "hidden_size", width)
        parts["teacher_weights"] = sum(p.numel() * p.element_size() for p in teacher.parameters())
        parts["teacher_activations"] = positions * wide * teacher.dtype.itemsize * 8  # one layer at a time, no graph
    if keeping is not None and keeping.mode != "off":
        parts["teacher_states"] = keeping.held_out_bytes + (keeping.rows_bytes if keeping.mode == "memory" else 0)
        parts["rollout_states"] = keeping.rollout_bytes
        parts = {name: size for name, size in parts.items() if size}
    if recipe.schedule.kind != "off":
        positions = recipe.train.batch_size * recipe.train.accumulate * recipe.rollout.bulk * recipe.data.max_length
        parts["rollout_cache"] = positions * _cached_values(config) * value
        if run.pair.teacher is not None and (recipe.rollout.teacher_mix or recipe.objective.policy_gradient):
            teacher = run.pair.teacher.model
            parts["rollout_cache"] += (
                positions * _cached_values(teacher.config.get_text_config()) * teacher.dtype.itemsize
            )
    return parts


def _cached_values(config: Any) -> int:
    """Keys and values that a model keeps of one position while it decodes."""
    heads = getattr(config, "num_attention_heads", 1)
    head_width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 1) // heads
    return (
        getattr(config, "num_hidden_layers", 1)
        * 2
        * (getattr(config, "num_key_value_heads", None) or heads)
        * head_width
    )


def _pages(run: Prepared, found: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    from distillm_cli.ui.display import amount, parameters
    from distillm_cli.ui.summary import table

    models = [
        [
            name,
            m["kind"],
            parameters(m["parameters"]).removesuffix(" parameters"),
            f"{m['layers']} × {m['width']}",
            m["context"],
            m["dtype"],
        ]
        for name in ("teacher", "student")
        if (m := found["models"].get(name))
    ]
    data, memory = found["data"], found["memory"]
    dropped = f"{data['dropped']:,} ({data['dropped_prompts']:,} for the prompt alone)" if data["dropped"] else "none"
    facts = [
        [
            "pair",
            f"fits: {run.pair.vocab:,} shared tokens" if run.pair.teacher is not None else "one model, no teacher",
        ],
        ["rows", f"{data['rows']:,} from {data['source']}, {data['kept']:,} kept; {data['valid_rows']:,} held out"],
        ["dropped as too long", dropped],
        ["cut", f"{data['truncated']:,}"],
        ["lengths", f"mean {data['mean_length']}, longest {data['longest']:,} tokens of prompt and response"],
        ["supervised", f"{data['response_tokens']:,} response tokens an epoch"],
        [
            "steps",
            f"{found['steps']:,} of {found['sequences_per_step']} sequences, {found['steps_per_epoch']:,} an epoch",
        ],
        ["computes on", f"{found['device']}, {found['dtype']}"],
    ]
    if (kept := found.get("teacher_cache")) is not None:
        facts.append(["teacher's states", kept["why"]])
    where = []
    if kept is not None and "place" in kept:
        free = kept["disk_free"] or 0
        short = not kept["hit"] and kept["bytes"] > 0.95 * free
        said = "there already" if kept["hit"] else f"{'does not fit: ' if short else ''}{amount(free)}B free"
        where = [Text(f"The teacher's states are kept in {kept['place']} ({said})", "yellow" if short else "")]
    if data["bad_rows_skipped"]:
        facts.insert(2, ["broken rows skipped", f"{data['bad_rows_skipped']:,}"])
    needs = [[name.replace("_", " "), f"{amount(size)}B"] for name, size in memory.items()]
    return [
        table("Models", ["", "kind", "parameters", "layers × width", "context", "dtype"], models),
        table("Run", ["", ""], facts),
        table("Memory, estimated", ["part", "size"], needs),
        *where,
        Text("One batch, decoded; supervised tokens stand in ⟦ ⟧ (the last is end-of-sequence unless cut)", "bold"),
        *_decoded(run),
    ]


def _decoded(run: Prepared) -> list[Any]:
    from rich.text import Text

    tokenizer, lines = run.pair.tokenizer, []
    for sequence in run.batch(0)[:SHOWN]:
        text = Text(tokenizer.decode(sequence.prompt), style="dim")
        for token in sequence.response:
            text.append(f"⟦{tokenizer.decode([int(token)])}⟧", style="not dim green")
        lines += [text, Text("─" * 20, "dim")]
    return lines
