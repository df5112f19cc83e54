"""What a run costs, by arithmetic: memory by part, the work of a step, time on known GPUs.

Nothing is measured here. Every formula stands beside the code that uses it, and every assumption in ``gpus.ASSUMED``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distillm_cli.config.schema import Recipe
from distillm_cli.losses import objectives
from distillm_cli.models.model_families import family_of
from distillm_cli.models.shapes import Sizes
from distillm_cli.rollouts.scheduler import Scheduler, Source, build_scheduler
from distillm_cli.runs.gpus import (
    BACKWARD_LAYER,
    DECODING_LAYER,
    FORWARD_LAYER,
    GPUS,
    Part,
    Work,
    fits_in_memory,
    seconds,
)

# On a CPU: what products in bf16, compiled for each of their shapes, come to hold, whatever the model (measured from one of
# 60 tokens of vocabulary to one of 50,257; `app.set_environment` says how many are kept).
_COMPILED_PRODUCTS = 250_000_000


@dataclass(frozen=True)
class Lengths:
    """Of the rows, in tokens: the longest (prompt and response), the means of both together and of the response.

    rows, steps, steps_per_epoch: None where they are not known.
    """

    longest: int
    mean: float
    response: float
    rows: int | None = None
    steps: int | None = None
    steps_per_epoch: int | None = None

    @property
    def prompt(self) -> float:
        return self.mean - self.response


@dataclass(frozen=True)
class Run:
    """All that the arithmetic needs. itemsize: of the compute dtype, bytes; teacher_itemsize: of the teacher's weights.

    states: bytes kept of the teacher's states, by part; cached: whether rows are asked of the teacher once only; keeps:
    whether what it says of sampled sequences is kept. before: the fine-tuning that comes first, as a run of its own.
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
    keeps: bool = True
    before: Run | None = None

    @property
    def micro_batch(self) -> int:
        return min(self.recipe.train.batch_size, self.lengths.rows or self.recipe.train.batch_size)

    @property
    def sequences(self) -> int:
        """Of one optimizer step."""
        train = self.recipe.train
        return min(train.batch_size * train.accumulate, self.lengths.rows or train.batch_size * train.accumulate)

    @property
    def new_tokens(self) -> int:
        """Of a sampled response: as many as the recipe allows."""
        return max(1, min(self.recipe.rollout.max_new_tokens, int(self.recipe.data.max_length - self.lengths.prompt)))

    @property
    def schedule(self) -> Scheduler:
        """The schedule at its beginning."""
        recipe, steps = self.recipe, self.lengths.steps or 1
        return build_scheduler(recipe.schedule, steps=steps, seed=recipe.train.seed, batches=recipe.rollout.bulk)

    @property
    def samples_of_the_student(self) -> bool:
        return self.teacher is not None and self.schedule.config.uses_student_outputs

    @property
    def samples_of_the_teacher(self) -> bool:
        """Whether the teacher samples during the run."""
        if self.teacher is None:
            return False
        return self.schedule.config.uses_teacher_samples and self.recipe.data.teacher_samples is None

    @property
    def mixes(self) -> bool:
        """Whether the teacher decodes beside the student, for outputs drawn from a mixture of both."""
        return self.teacher is not None and self.recipe.samples_from_mixture


def memory(run: Run) -> dict[str, int]:
    """Bytes by part. Weights, gradients and optimizer are counted exactly (AdamW: two float32 moments).

    Activations: 34 values a position, layer and width, of one micro-batch of the longest rows (saved tensors, counted on
    GPT-2, OPT, Llama and Qwen 3 with attention scores not kept, are 19 to 36), or with gradient checkpointing 2, and one
    layer's 34 while it is computed again; and scores, where the CPU's attention keeps them (``_scores``). Adapters
    of every linear layer add 9, their inputs in float32, and 15 more in GPT-2, whose own GELU is many operations. Under
    autocast there is a copy of every matrix in the compute dtype, and while the student samples another one of every
    weight, an adapter merged in. The loss holds its chunks and, where it is trained, one gradient of the head.

    On a CPU the matrices of a bf16 teacher of the families with a written-out pass are there twice, once laid out for the
    products, and so are those of a model that samples in bf16. At the first validation the weights from before training are
    there beside those reached: never more than the gradients, which are not there then (`Prepared.with_start_weights`).
    """
    from distillm_cli.losses.fused import work_bytes
    from distillm_cli.models.cpu.forward import has_layouts

    recipe, student = run.recipe, run.student
    total, trainable = student.parameters["total"], student.parameters["trainable"]
    sampled = run.lengths.prompt + run.new_tokens
    is_sampled = run.samples_of_the_student or run.samples_of_the_teacher
    longest = max(run.lengths.longest, math.ceil(sampled) if is_sampled else 0)
    positions = run.micro_batch * longest
    layers = student.layers if student.encoder is None else max(student.layers, student.encoder.layers)
    width, head = student.width, run.vocab * student.head_in
    by_adapters = 4 * family_of(student.kind).values_under_adapter * student.adapted / max(1, student.matrices)
    saved = layers * (34 * run.itemsize + by_adapters)
    if recipe.train.gradient_checkpointing:
        saved = saved / layers + layers * 2 * run.itemsize
    head_gradient = head * ((0 if student.adapted else 4) + (0 if run.itemsize == 4 else 2))
    parts = {
        "student_weights": 4 * total,
        "gradients": 4 * trainable,
        "optimizer": 8 * trainable,
        "cast_weights": student.matrices * run.itemsize if run.itemsize < 4 else 0,
        "activations": round(positions * width * saved) + _scores(run, longest),
        "loss": work_bytes(positions, run.vocab, run.itemsize, run.device) + head_gradient,
    }
    if run.teacher is not None:
        teacher = run.teacher
        bits = {"none": 8 * run.teacher_itemsize, "8bit": 8, "4bit": 4}[recipe.teacher.quantize]  # of linear layers
        others = teacher.parameters["total"] - teacher.matrices
        parts["teacher_weights"] = others * run.teacher_itemsize + teacher.matrices * bits // 8
        if run.device == "cpu" and run.teacher_itemsize == 2 and has_layouts(teacher.kind, teacher.parameters["total"]):
            parts["teacher_layouts"] = teacher.matmul * run.teacher_itemsize
        parts["teacher_activations"] = positions * teacher.width * run.teacher_itemsize * 8  # one layer, no graph
    parts |= run.states or {}
    positions = run.sequences * recipe.rollout.bulk * longest
    if run.samples_of_the_student:
        parts["rollout_weights"] = copied(student, run.itemsize)
        parts["rollout_cache"] = cache_bytes(student, positions, run.itemsize)
    if run.samples_of_the_teacher or (run.teacher is not None and recipe.decodes_with_teacher):
        parts["teacher_rollout_cache"] = cache_bytes(run.teacher, positions, run.teacher_itemsize)
    if run.device == "cpu":
        caches = {
            "rollout_cache": (student, run.itemsize),
            "teacher_rollout_cache": (run.teacher, run.teacher_itemsize),
        }
        sampling = [model for part, (model, itemsize) in caches.items() if part in parts and itemsize == 2]
        laid_out = [2 * (m.matmul + run.vocab * m.head_in) for m in sampling if has_layouts(m.kind, m.merged)]
        is_bf16 = run.itemsize == 2 or (run.teacher is not None and run.teacher_itemsize == 2)
        parts["rollout_layouts"] = sum(laid_out)
        parts["compiled_products"] = _COMPILED_PRODUCTS if is_bf16 else 0
    return {name: size for name, size in parts.items() if size}


def _scores(run: Run, longest: int) -> int:
    """Bytes of the attention scores that the student's backward pass needs: torch's attention on a CPU keeps them (12 bytes
    each, counted on T5) where it has dropout, but for the families whose pass is written out here. longest: tokens of a row.
    """
    from distillm_cli.models.cpu.forward import has_forward

    student, again = run.student, run.recipe.train.gradient_checkpointing
    is_written_out = has_forward(student.kind) and not student.adapted and not again
    if run.device != "cpu" or is_written_out:
        return 0
    response = longest * run.lengths.response / max(run.lengths.mean, 1)
    prompt, layers = longest - response, student.layers
    pairs = [longest**2] * layers
    if student.encoder is not None:
        pairs = [prompt**2] * student.encoder.layers + [response * longest] * layers  # its own tokens, and the prompt's
    kept = max(pairs) if again else sum(pairs)
    return round(12 * run.micro_batch * student.dropout_heads * kept)


_IN_A_STEP = ("gradients", "cast_weights", "activations", "loss", "teacher_activations")
_IN_SAMPLING = ("rollout_weights", "rollout_cache", "teacher_rollout_cache")


def at_once(parts: Mapping[str, int], device: str) -> int:
    """The most bytes in use at once: a step and the sampling for it are not there together.

    Only on a CPU are they as good as that, where what is freed is kept for tensors of the same sizes
    (`host.keep_freed_memory`).
    """
    if device == "cpu":
        return sum(parts.values())
    in_a_step, in_sampling = (sum(parts.get(name, 0) for name in names) for names in (_IN_A_STEP, _IN_SAMPLING))
    return sum(parts.values()) - min(in_a_step, in_sampling)


def copied(student: Sizes, itemsize: int) -> int:
    """Bytes of the copy that decodes: every weight in a compute dtype that is not the weights' own (float32), with its
    adapter merged in; else the adapted layers alone, where there are any."""
    return itemsize * student.merged if itemsize < 4 else 4 * student.adapted


def cache_bytes(model: Sizes, positions: int, itemsize: int) -> int:
    """Keys and values; of an encoder-decoder, the decoder's of its own tokens and of the prompt's."""
    return positions * model.layers * 2 * model.kv * itemsize


def forward(model: Sizes, sequences: float, prompt: float, response: float, predicted: float, vocab: int) -> float:
    """FLOPs of one forward pass: 2 for each weight and token in matrix products (Kaplan et al. 2020, arXiv 2001.08361),
    2·layers·width·length a token for causal attention, which sees half of the ``length`` before it on average, and
    2·width·vocab for each of the ``predicted`` tokens that meet the head.

    Of an encoder-decoder the prompt's tokens meet the encoder, where attention sees all of the prompt, and the response's
    the decoder, where it sees half of the response and all of the prompt.
    """
    head = 2 * sequences * predicted * model.head_in * vocab
    if model.encoder is None:
        length = prompt + response
        return sequences * length * (2 * model.matmul + 2 * model.layers * model.attention * length) + head
    encoder = model.encoder
    read = prompt * (2 * encoder.matmul + 4 * encoder.layers * model.attention * prompt + 2 * encoder.cross_attention)
    seen = 2 * model.layers * model.attention * (response + 2 * prompt)
    return sequences * (read + response * (2 * (model.matmul - encoder.cross_attention) + seen)) + head


def decoded(model: Sizes, rows: float, prompt: float, new: int, vocab: int, itemsize: int) -> Part:
    """``new`` tokens for each of ``rows`` prompts, side by side until the last one has ended. Each step reads the decoder's
    weights once for all rows, and each row's keys and values: on average half of the new ones, and the prompt's."""
    met = model.matmul - (0 if model.encoder is None else model.encoder.cross_attention)
    seen = prompt + new / 2
    once = forward(model, rows, prompt, 0, 0, vocab)
    each = 2 * met + 4 * model.layers * model.attention * seen + 2 * model.head_in * vocab
    weights = (met + model.head_in * vocab) * itemsize
    read = new * (weights + rows * seen * cache_bytes(model, 1, itemsize))
    return Part(once + rows * new * each, read, new * model.layers * DECODING_LAYER, itemsize)


def steps(run: Run) -> dict[str, Work]:
    """What an optimizer step does, by what it trains on: data set rows and the teacher's samples (the first time, and when
    the teacher's part is kept), a fresh rollout, a replayed one, a pair of both models' samples. Sources that the schedule
    never draws are left out. FLOPs and seconds are both read from this table.

    A token that the teacher mends is read by it as it is drafted: that counts as one more forward pass.
    """
    response, new = run.lengths.response, run.new_tokens
    learn, learn_new = (_looked(run, n) + _learned(run, n) for n in (response, new))
    if run.teacher is None:
        return {"dataset": learn}
    recipe, schedule = run.recipe, run.schedule
    # Cross-entropy alone asks the teacher nothing; on student outputs there is none of it.
    taught = recipe.objective.kd_weight > 0
    ask, tell = ((_asked(run, response),), (_told(run, response),)) if taught else ((), ())
    ask_new, tell_new = (_asked(run, new),), (_told(run, new) if run.keeps else _asked(run, new),)
    found: dict[str, Work] = {}
    if schedule.config.uses_rows:
        found["dataset"] = learn + ask
        if run.cached:
            found["dataset_cached"] = learn + tell
    own: Work = ()
    if run.samples_of_the_student:
        own = (*_copied(run), _sampled(run, run.student, run.itemsize))
        own += (_sampled(run, run.teacher, run.teacher_itemsize),) if run.mixes else ()
        own += ask_new if schedule.config.drafts else ()
        own += ask_new + learn_new
    if schedule.config.uses_teacher_samples:
        drawn = (_sampled(run, run.teacher, run.teacher_itemsize),) if run.samples_of_the_teacher else ()
        kept = learn_new + (tell_new if taught else ())
        fresh = drawn + learn_new + (ask_new if taught else ())
        name = Source.PAIR.value if schedule.in_pairs else Source.TEACHER.value
        # Of a pair one optimizer step is enough.
        found[name] = fresh + own[:-1]
        if schedule.reuses_teacher_samples:
            found[f"{name}_cached"] = kept + own[:-1]
    elif own:
        beside = learn[:-1] + (tell if run.cached else ask) if recipe.objective.row_weight else ()
        found["rollout"] = own + beside
        if schedule.config.may_replay:
            found["replay"] = learn_new + tell_new + beside
    return found


def _learned(run: Run, response: float) -> Work:
    """Training the student on a step's sequences: forward, gradients of the activations (as much again) and of the weights
    (as much again, for the share that is trained), with gradient checkpointing the forward once more; and the optimizer's
    pass over its 28 bytes a parameter."""
    student, again = run.student, run.recipe.train.gradient_checkpointing
    once = forward(student, run.sequences, run.lengths.prompt, response, 0, run.vocab)
    head = 2 * run.sequences * response * student.head_in * run.vocab
    passes = 2 + student.trainable_share + (1 if again else 0)
    starts = FORWARD_LAYER + BACKWARD_LAYER + (FORWARD_LAYER if again else 0.0)
    # The head's forward runs once, and its gradients with it.
    update = Part(once * passes + 3 * head, starts=_pieces(run) * student.all_layers * starts, itemsize=run.itemsize)
    return update, Part(read=28 * student.parameters["trainable"])


def _looked(run: Run, response: float) -> Work:
    """What an objective that looks at the step before it trains asks of the student: a forward pass."""
    if run.teacher is None or "student" not in objectives.build(run.recipe.objective, 1.0).needs_log_probs_of:
        return ()
    starts = _pieces(run) * run.student.all_layers * FORWARD_LAYER
    work = forward(run.student, run.sequences, run.lengths.prompt, response, response, run.vocab)
    return (Part(work, starts=starts, itemsize=run.itemsize),)


def _asked(run: Run, response: float) -> Part:
    """The teacher's forward pass over a step's sequences, head included."""
    work = forward(run.teacher, run.sequences, run.lengths.prompt, response, response, run.vocab)
    starts = _pieces(run) * run.teacher.all_layers * FORWARD_LAYER
    return Part(work, starts=starts, itemsize=run.teacher_itemsize)


def _told(run: Run, response: float) -> Part:
    """The teacher's head alone, over states that are kept."""
    return Part(2 * run.sequences * response * run.teacher.head_in * run.vocab, itemsize=run.itemsize)


def _sampled(run: Run, model: Sizes, itemsize: int) -> Part:
    """A step's share of responses that are sampled ``bulk`` batches side by side."""
    bulk, lengths = run.recipe.rollout.bulk, run.lengths
    return decoded(model, run.sequences * bulk, lengths.prompt, run.new_tokens, run.vocab, itemsize).shared(bulk)


def _copied(run: Run) -> Work:
    """A step's share of making the copy that decodes: weights read and written; an adapter's two matrices multiplied."""
    size, student = copied(run.student, run.itemsize), run.student
    if not size:
        return ()
    weights = size / min(run.itemsize, 4)
    made = Part(2 * student.rank * student.adapted, read=4 * weights + size, itemsize=4)
    return (made.shared(run.recipe.rollout.bulk),)


def _pieces(run: Run) -> int:
    return math.ceil(run.sequences / max(1, run.micro_batch))


def shares(run: Run, steps: int, phi: float | None = None) -> dict[str, float]:
    """The share of each source in a run's steps, by the schedule's own draws. phi: held there all along (adaptive)."""
    recipe = run.recipe
    config = recipe.schedule if phi is None else recipe.schedule.model_copy(update={"phi": phi})
    few = min(steps, 2000)  # shares of a run do not depend on how many steps it has, but for the buffer's filling
    scheduler = build_scheduler(config, steps=few, seed=recipe.train.seed, batches=recipe.rollout.bulk)
    buffered, batch, found = 0.0, run.sequences * steps / few, Counter()
    for step in range(few):
        source = scheduler.draw(step, int(buffered))
        found[source.value] += 1
        buffered = min(scheduler.capacity(run.sequences), buffered + batch) if source is Source.ROLLOUT else buffered
    return {source: n / few for source, n in found.items()}


def on_gpus(run: Run, need: int) -> dict[str, dict[str, Any]]:
    """For each known GPU: whether ``need`` bytes fit it, seconds by kind of step, and seconds of the run, least and most,
    fine-tuning before it included (``sft_s`` alone).

    The two differ where φ of the adaptive schedule decides: held at its start, or at 1 from the first step on.
    """
    found, work, count = {}, steps(run), run.lengths.steps
    open_phi = run.schedule.has_phi and run.teacher is not None
    for gpu in GPUS:
        each = {source: seconds(parts, gpu) for source, parts in work.items()}
        entry: dict[str, Any] = {"fits": fits_in_memory(need, gpu), "step_s": each}
        if count is not None:
            span = [_whole(run, each, count, phi) for phi in ((None, 1.0) if open_phi else (None,))]
            first = 0.0
            if run.before is not None:
                first = entry["sft_s"] = run.before.lengths.steps * seconds(steps(run.before)["dataset"], gpu)
            entry["run_s"] = [first + min(span), first + max(span)]
        found[gpu.name] = entry
    return found


def _whole(run: Run, each: Mapping[str, float], count: int, phi: float | None) -> float:
    mix = {"dataset": 1.0} if run.teacher is None else shares(run, count, phi)
    epoch = min(run.lengths.steps_per_epoch or count, count)
    whole = 0.0
    for source, share in mix.items():
        taken = share * count
        new = min(taken, epoch) if f"{source}_cached" in each else taken
        whole += new * each[source] + (taken - new) * each.get(f"{source}_cached", each[source])
    return whole
