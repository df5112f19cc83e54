"""What a run costs, by arithmetic: memory by part, floating-point operations of a step, time on known GPUs.

Nothing is measured here. Every formula stands beside the code that uses it, and every assumption in ``ASSUMED``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distillm_cli.config.schema import Recipe
from distillm_cli.core.scheduler import Scheduler, Source
from distillm_cli.models.shapes import Sizes


@dataclass(frozen=True)
class Gpu:
    """From its maker's data sheet, dense: TFLOP/s in bf16 with float32 sums, and in float32; memory in bytes; bytes/s."""

    name: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float


GPUS = (
    Gpu("RTX 4090", 165.2, 82.6, 24e9, 1.008e12),
    Gpu("L40S", 362.0, 91.6, 48e9, 0.864e12),
    Gpu("A100 80GB", 312.0, 19.5, 80e9, 2.039e12),
    Gpu("H100 SXM", 989.0, 67.0, 80e9, 3.35e12),
    Gpu("H200", 989.0, 67.0, 141e9, 4.8e12),
)
USED_FLOPS = 0.4  # of the peak, by matrix products in training and scoring
USED_BANDWIDTH = 0.6  # by weights and caches read while decoding, and by the optimizer
# At least so many seconds go by for a layer of one micro-batch, whatever its size: starting its kernels from Python.
FORWARD_LAYER, BACKWARD_LAYER, DECODING_LAYER = 5e-4, 1e-3, 2e-4
USABLE = 0.92  # of the memory: the rest is the driver's and lost between blocks
ASSUMED = (
    f"{USED_FLOPS:.0%} of the data sheet's dense peak in matrix products, {USED_BANDWIDTH:.0%} of its bandwidth while "
    f"decoding and in the optimizer, and for each layer at least {1e3 * FORWARD_LAYER:g} ms forward, "
    f"{1e3 * BACKWARD_LAYER:g} ms backward and {1e3 * DECODING_LAYER:g} ms in a decoding step. Arithmetic, not measured; "
    "validations, checkpoints and scores are not in it"
)


@dataclass(frozen=True)
class Lengths:
    """Of the rows, in tokens: the longest (prompt and response), the means of both together and of the response.

    rows, steps, steps_per_epoch: None where they are not known. known: measured on the rows, not the recipe's limits.
    """

    longest: int
    mean: float
    response: float
    rows: int | None = None
    steps: int | None = None
    steps_per_epoch: int | None = None
    known: bool = True


@dataclass(frozen=True)
class Run:
    """All that the arithmetic needs. itemsize: of the compute dtype, bytes; teacher_itemsize: of the teacher's weights.

    states: bytes kept of the teacher's states, by part; cached: whether rows are asked of the teacher once only.
    """

    recipe: Recipe
    student: Sizes
    teacher: Sizes | None
    vocab: int
    lengths: Lengths
    itemsize: int
    teacher_itemsize: int = 2
    device: str = "cuda"
    states: Mapping[str, int] | None = None
    cached: bool = False

    @property
    def micro_batch(self) -> int:
        return min(self.recipe.train.batch_size, self.lengths.rows or self.recipe.train.batch_size)

    @property
    def sequences(self) -> int:
        """Of one optimizer step."""
        train = self.recipe.train
        return min(train.batch_size * train.accumulate, self.lengths.rows or train.batch_size * train.accumulate)


def memory(run: Run) -> dict[str, int]:
    """Bytes by part. Weights, gradients and optimizer are counted exactly (AdamW: two float32 moments).

    Activations: 34 values a position, layer and width, of one micro-batch of the longest rows (saved tensors, counted on
    GPT-2, OPT, Llama and Qwen 3 with attention scores not kept, are 19 to 36), or 2 with gradient checkpointing. Under
    autocast there is a copy of every matrix in the compute dtype. The loss holds its chunks and one gradient of the head.
    On a CPU the matrices of a bf16 teacher of the families with a written-out pass are there twice, once laid out for
    the products.
    """
    from distillm_cli.core.fused import work_bytes
    from distillm_cli.models.whole import has_layouts

    recipe, student = run.recipe, run.student
    total, trainable = student.parameters["total"], student.parameters["trainable"]
    positions = run.micro_batch * run.lengths.longest
    layers, width, head = student.layers, student.width, run.vocab * student.head_in
    parts = {
        "student_weights": 4 * total,
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "cast_weights": student.matmul * run.itemsize if run.itemsize < 4 else 0,
        "activations": positions * layers * width * run.itemsize * (2 if recipe.train.gradient_checkpointing else 34),
        "loss": work_bytes(positions, run.vocab, run.itemsize, run.device) + head * (4 if run.itemsize == 4 else 6),
    }
    if run.teacher is not None:
        teacher = run.teacher
        parts["teacher_weights"] = teacher.parameters["total"] * run.teacher_itemsize
        if run.device == "cpu" and run.teacher_itemsize == 2 and has_layouts(teacher.kind, teacher.parameters["total"]):
            parts["teacher_layouts"] = teacher.matmul * run.teacher_itemsize
        parts["teacher_activations"] = positions * teacher.width * run.teacher_itemsize * 8  # one layer, no graph
    parts |= run.states or {}
    schedule = Scheduler(recipe.schedule, steps=1, seed=0)
    positions = recipe.train.batch_size * recipe.train.accumulate * recipe.rollout.bulk * run.lengths.longest
    if schedule.may_use_student_outputs:
        parts["rollout_cache"] = positions * layers * 2 * student.kv * run.itemsize
    sampled = schedule.may_use_teacher_samples and recipe.data.teacher_samples is None
    if run.teacher is not None and (sampled or mixes(run) or recipe.schedule.kind == "interleaved"):
        parts["teacher_rollout_cache"] = positions * run.teacher.layers * 2 * run.teacher.kv * run.teacher_itemsize
    return {name: size for name, size in parts.items() if size}


def forward(model: Sizes, sequences: float, length: float, predicted: float, vocab: int) -> float:
    """FLOPs of one forward pass: 2 for each weight and token in matrix products (Kaplan et al. 2020, arXiv 2001.08361),
    2·layers·width·length a token for causal attention, which sees half of the ``length`` before it on average, and
    2·width·vocab for each of the ``predicted`` tokens that meet the head."""
    tokens = sequences * length
    return (
        tokens * (2 * model.matmul + 2 * model.layers * model.attention * length)
        + 2 * predicted * model.head_in * vocab
    )


def update(run: Run, length: float, response: float) -> float:
    """FLOPs of training the student on a step's sequences: forward, gradients of the activations (as much again) and of
    the weights (as much again, for the share that is trained); with gradient checkpointing the forward once more."""
    student, sequences = run.student, run.sequences
    once = forward(student, sequences, length, 0, run.vocab)
    head = 2 * sequences * response * student.head_in * run.vocab
    passes = 2 + student.trainable_share + (1 if run.recipe.train.gradient_checkpointing else 0)
    return once * passes + 3 * head  # the head's forward runs once, and its gradients with it


def asked(run: Run, length: float, response: float) -> float:
    """FLOPs of the teacher's forward pass over a step's sequences, head included."""
    if run.teacher is None:
        return 0.0
    return forward(run.teacher, run.sequences, length, run.sequences * response, run.vocab)


def told(run: Run, response: float) -> float:
    """FLOPs of the teacher's head alone, over states that are kept."""
    return 0.0 if run.teacher is None else 2 * run.sequences * response * run.teacher.head_in * run.vocab


def decoding(run: Run, model: Sizes, itemsize: int) -> tuple[float, float, int]:
    """(FLOPs, bytes read, decoding steps) of sampling one step's worth of responses, ``bulk`` batches side by side.

    Every response is taken to be as long as the recipe lets it be: the batch decodes until its last row has ended. Each
    step reads the weights once for the whole batch, and each row's cache.
    """
    bulk = run.recipe.rollout.bulk
    prompt, new = run.lengths.mean - run.lengths.response, _new_tokens(run)
    rows, length = run.sequences * bulk, prompt + new / 2
    flops = forward(model, run.sequences, prompt, run.sequences, run.vocab)
    flops += run.sequences * new * (2 * model.matmul + 4 * model.layers * model.attention * length)
    flops += 2 * run.sequences * new * model.head_in * run.vocab
    weights = (model.matmul + model.head_in * run.vocab) * itemsize
    cache = rows * length * 2 * model.layers * model.kv * itemsize
    return flops, new * (weights + cache) / bulk, new


def _new_tokens(run: Run) -> int:
    prompt = run.lengths.mean - run.lengths.response
    return max(1, min(run.recipe.rollout.max_new_tokens, int(run.recipe.data.max_length - prompt)))


def mixes(run: Run) -> bool:
    """Whether the teacher decodes beside the student, for outputs drawn from a mixture of both."""
    return run.teacher is not None and run.recipe.mixes_in_the_teacher


def step_flops(run: Run) -> dict[str, float]:
    """FLOPs of an optimizer step by what it trains on: data set rows and the teacher's samples (the first time, and when
    the teacher's part is kept), a fresh rollout, a replayed one, a pair of both models' samples. A token that the teacher
    mends is read by it as it is drafted: that counts as one more forward pass. Sources that the schedule never draws are
    left out."""
    length, response = run.lengths.mean, run.lengths.response
    found = {"dataset": update(run, length, response) + asked(run, length, response)}
    if run.cached:
        found["dataset_cached"] = update(run, length, response) + told(run, response)
    if run.teacher is None:
        return found
    schedule, new = Scheduler(run.recipe.schedule, steps=1, seed=0), _new_tokens(run)
    long = length - response + new
    train, fresh = update(run, long, new), decoding(run, run.student, run.itemsize)[0]
    fresh += decoding(run, run.teacher, run.teacher_itemsize)[0] if mixes(run) else 0.0
    if schedule.may_use_student_outputs:
        mended = asked(run, long, new) if run.recipe.schedule.kind == "interleaved" else 0.0
        beside = update(run, length, response) + told(run, response) if run.recipe.objective.row_weight else 0.0
        found["rollout"] = fresh + mended + asked(run, long, new) + train + beside
        found["replay"] = train + told(run, new) + beside
    if schedule.may_use_teacher_samples:
        drawn = 0.0 if run.recipe.data.teacher_samples else decoding(run, run.teacher, run.teacher_itemsize)[0]
        found["teacher"] = drawn + asked(run, long, new) + train
        found["teacher_cached"] = train + told(run, new)
        found[Source.PAIR.value] = found["teacher"] + fresh + asked(run, long, new) + train
    return found


def shares(recipe: Recipe, steps: int, phi: float | None = None) -> dict[str, float]:
    """The share of each source in a run's steps, by the schedule's own draws. phi: held there all along (adaptive)."""
    config = recipe.schedule if phi is None else recipe.schedule.model_copy(update={"phi": phi})
    few = min(steps, 2000)  # shares of a run do not depend on how many steps it has, but for the buffer's filling
    scheduler, buffered = Scheduler(config, steps=few, seed=recipe.train.seed), 0
    scale = steps / few
    batch = recipe.train.batch_size * recipe.train.accumulate * scale
    found = dict.fromkeys(("dataset", "rollout", "replay"), 0)
    for step in range(few):
        source = scheduler.draw(step, int(buffered))
        found[source.value] = found.get(source.value, 0) + 1
        buffered = min(config.capacity, buffered + batch) if source is Source.ROLLOUT else buffered
    return {source: n / few for source, n in found.items() if n}


def seconds(run: Run, gpu: Gpu) -> dict[str, float]:
    """Seconds of a step by source, as ``step_flops``: each part as long as its arithmetic, its reading or the starting of
    its kernels takes, whichever is longest; and the optimizer's pass over its 28 bytes a parameter."""
    peak = (gpu.bf16 if run.itemsize < 4 else gpu.fp32) * 1e12 * USED_FLOPS
    bandwidth = gpu.bandwidth * USED_BANDWIDTH
    pieces = math.ceil(run.sequences / max(1, run.micro_batch))
    again = FORWARD_LAYER if run.recipe.train.gradient_checkpointing else 0.0
    start_update = pieces * run.student.layers * (FORWARD_LAYER + BACKWARD_LAYER + again)
    start_asking = 0.0 if run.teacher is None else pieces * run.teacher.layers * FORWARD_LAYER
    optimizer = 28 * run.student.parameters["trainable"] / bandwidth

    def train(length: float, response: float) -> float:
        return max(update(run, length, response) / peak, start_update) + optimizer

    def ask(length: float, response: float) -> float:
        return max(asked(run, length, response) / peak, start_asking)

    length, response, wanted = run.lengths.mean, run.lengths.response, step_flops(run)
    found = {"dataset": train(length, response) + ask(length, response)}
    if "dataset_cached" in wanted:
        found["dataset_cached"] = train(length, response) + told(run, response) / peak

    def decode(model: Sizes, itemsize: int) -> float:
        flops, read, new = decoding(run, model, itemsize)
        return max(flops / peak, read / bandwidth, new * model.layers * DECODING_LAYER / run.recipe.rollout.bulk)

    new = _new_tokens(run)
    long = length - response + new
    if "rollout" in wanted:
        mended = ask(long, new) if run.recipe.schedule.kind == "interleaved" else 0.0
        beside = train(length, response) + told(run, response) / peak if run.recipe.objective.row_weight else 0.0
        fresh = decode(run.student, run.itemsize) + (decode(run.teacher, run.teacher_itemsize) if mixes(run) else 0.0)
        found["rollout"] = fresh + mended + ask(long, new) + train(long, new) + beside
        found["replay"] = train(long, new) + told(run, new) / peak + beside
    if "teacher" in wanted:
        drawn = 0.0 if run.recipe.data.teacher_samples else decode(run.teacher, run.teacher_itemsize)
        found["teacher"] = drawn + ask(long, new) + train(long, new)
        found["teacher_cached"] = train(long, new) + told(run, new) / peak
        found[Source.PAIR.value] = (
            found["teacher"] + decode(run.student, run.itemsize) + ask(long, new) + train(long, new)
        )
    return found


def on_gpus(run: Run, need: int) -> dict[str, dict[str, Any]]:
    """For each known GPU: whether ``need`` bytes fit it, seconds by kind of step, and seconds of the run, least and most.

    The two differ where φ of the adaptive schedule decides: held at its start, or at 1 from the first step on.
    """
    found = {}
    steps = run.lengths.steps
    for gpu in GPUS:
        each = seconds(run, gpu)
        entry: dict[str, Any] = {"fits": need <= USABLE * gpu.memory, "step_s": each}
        if steps is not None:
            span = [_whole(run, each, steps, phi) for phi in ((None, 1.0) if _is_open(run) else (None,))]
            entry["run_s"] = [min(span), max(span)]
        found[gpu.name] = entry
    return found


def _is_open(run: Run) -> bool:
    return run.recipe.schedule.kind == "adaptive" and run.teacher is not None


def _whole(run: Run, each: Mapping[str, float], steps: int, phi: float | None) -> float:
    if run.teacher is None:
        return steps * each["dataset"]
    mix = shares(run.recipe, steps, phi)
    epoch = min(run.lengths.steps_per_epoch or steps, steps)
    first = {"dataset": epoch if run.cached else steps}
    if Scheduler(run.recipe.schedule, steps=1, seed=0).samples_come_back:
        first["teacher"] = epoch
    whole = 0.0
    for source, share in mix.items():
        count = share * steps
        new = min(count, first.get(source, count))
        whole += new * each[source] + (count - new) * each.get(f"{source}_cached", each[source])
    return whole
