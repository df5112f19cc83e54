"""Estimate the cost of a run: memory by part, the work of a step, and time on known GPUs.

All figures are computed, none are measured. ``gpus.ASSUMED`` lists the assumptions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distillm_cli.config.schema import Recipe, TrainConfig, chosen
from distillm_cli.losses import objectives
from distillm_cli.models.model_families import family_of
from distillm_cli.models.shapes import Sizes
from distillm_cli.rollouts.scheduler import Scheduler, Source, build_scheduler
from distillm_cli.runs.gpus import (
    BACKWARD_LAUNCH_S,
    DECODING_LAUNCH_S,
    FORWARD_LAUNCH_S,
    GPUS,
    Gpu,
    Part,
    Work,
    fits_in_memory,
    seconds,
)

# Bytes of compiled bf16 matrix products on a CPU, one for each shape. Measured for vocabularies of 60 to 50,257 tokens;
# it does not depend on the model. `app.set_environment` limits how many are cached.
_COMPILED_PRODUCTS = 250_000_000


# Cost of the gradient of an input gradient's function, in plain training passes: its products (2.2 for small GPT-2 and Llama
# models) and its saved tensors (2.4 and 3.1). Both were counted.
_SECOND_DERIVATIVE = 2.2
_SECOND_DERIVATIVE_MEMORY = 3.0


@dataclass(frozen=True)
class Lengths:
    """Hold the lengths of the rows, in tokens.

    longest: prompt and response of the longest row. mean: of prompt and response. response: mean of the response.
    rows, steps, steps_per_epoch: None if they are not known.
    """

    longest: int
    mean: float
    response: float
    rows: int | None = None
    steps: int | None = None
    steps_per_epoch: int | None = None

    @property
    def prompt(self) -> float:
        """Return the mean length of a prompt."""
        return self.mean - self.response


def step_sequences(train: TrainConfig, rows: int | None, mean_length: float) -> int:
    """Return the number of data set rows of a step, on average if steps are of tokens. rows: all, None if unknown."""
    wanted = train.batch_size * train.accumulate
    if train.tokens_per_step is not None:
        wanted = max(1, round(train.tokens_per_step / mean_length))
    return min(wanted, rows or wanted)


@dataclass(frozen=True)
class Workload:
    """Hold the properties of a run that its cost depends on.

    itemsize: bytes of the compute dtype. teacher_itemsize: of the teacher's weights. cached_bytes: the teacher's hidden
    states in memory, by part. caches_rows: the teacher computes each row once. caches_samples: its states of sampled
    sequences are cached too. has_head_only: of the teacher only the head is loaded, since its states are cached. stages:
    those before the distillation, by name. labelling: work for each step of one epoch, before the first step. processes:
    among which each step is shared; memory and work are those of one of them.
    """

    recipe: Recipe
    student: Sizes
    teacher: Sizes | None
    vocab: int
    lengths: Lengths
    itemsize: int
    teacher_itemsize: int = 2
    device: str = "cuda"
    cached_bytes: Mapping[str, int] | None = None
    caches_rows: bool = False
    caches_samples: bool = True
    has_head_only: bool = False
    stages: Mapping[str, Workload] = field(default_factory=dict)
    labelling: Work = ()
    processes: int = 1

    @property
    def shards(self) -> int:
        """Return the number of processes over which the student is distributed; 1: each has all of it."""
        return self.processes if self.recipe.train.shard == "full" else 1

    @property
    def micro_batch(self) -> int:
        """Return the largest number of sequences of the longest length in a micro-batch."""
        tokens = self.recipe.train.tokens_per_batch
        most = self.recipe.train.batch_size if tokens is None else max(1, tokens // self.lengths.longest)
        return min(most, self.sequences)

    @property
    def sequences(self) -> int:
        """Return the largest number of sequences of a process in an optimizer step."""
        return -(-self.step_sequences // self.processes)

    @property
    def step_sequences(self) -> int:
        """Return the number of sequences of an optimizer step."""
        return step_sequences(self.recipe.train, self.lengths.rows, self.lengths.mean)

    @property
    def new_tokens(self) -> int:
        """Return the number of tokens of a sampled response: the maximum of the recipe at the end of the run."""
        longest = int(chosen(self.recipe.data.max_length) - self.lengths.prompt)
        return max(1, min(self.recipe.rollout.most_new_tokens(1.0), longest))

    @property
    def schedule(self) -> Scheduler:
        """Return the schedule in its initial state."""
        recipe = self.recipe
        steps = self.lengths.steps or 1
        return build_scheduler(recipe.schedule, steps=steps, seed=recipe.train.seed, batches=recipe.rollout.bulk)

    @property
    def student_samples(self) -> bool:
        """Return whether the student samples during the run."""
        return self.teacher is not None and self.schedule.config.uses_student_outputs

    @property
    def teacher_samples(self) -> bool:
        """Return whether the teacher samples during the run."""
        if self.teacher is None:
            return False
        return self.schedule.config.uses_teacher_samples and self.recipe.data.teacher_samples is None

    @property
    def student_is_served(self) -> bool:
        """Return whether a server samples the student's outputs, whose memory and time are not counted."""
        return self.recipe.rollout.server is not None

    @property
    def teacher_is_served(self) -> bool:
        """Return whether a server computes the teacher's hidden states, whose memory and time are not counted."""
        return self.recipe.teacher.server is not None

    @property
    def trains_teacher(self) -> bool:
        """Return whether weights of the teacher are trained."""
        return self.teacher is not None and (self.recipe.ctcd.enabled or self.recipe.okd.rank is not None)

    @property
    def trained_teacher_itemsize(self) -> int:
        """Return the bytes of the dtype that a trained teacher computes in: its own under an adapter, else the student's."""
        return self.itemsize if self.recipe.ctcd.enabled else self.teacher_itemsize

    def recomputes(self, model: Sizes) -> bool:
        """Return whether a model recomputes its activations. A teacher with an adapter does not."""
        is_frozen = model is self.teacher and not self.recipe.ctcd.enabled
        return self.recipe.train.gradient_checkpointing and not is_frozen

    @property
    def samples_from_mixture(self) -> bool:
        """Return whether outputs are sampled from a mixture of student and teacher, so that both decode each token."""
        return self.teacher is not None and self.recipe.samples_from_mixture


def memory(run: Workload) -> dict[str, int]:
    """Return the bytes of each part. Weights, gradients and optimizer are counted exactly (``_optimizer_bytes``).

    Activations: of one micro-batch of the longest rows, 34 values per position, layer and unit of width (saved tensors of
    GPT-2, OPT, Llama and Qwen 3, without attention scores, are 19 to 36). With gradient checkpointing 2, which may be in
    host memory, and 34 for the one layer that is recomputed. Attention scores are added if attention on a CPU saves them
    (``_attention_score_bytes``). A teacher that is trained is counted in the same way.

    Adapters of every linear layer add 9, their inputs in float32, and 15 more in GPT-2, whose GELU is many operations.

    Copies: under autocast every matrix in the compute dtype; while the student samples, every weight, with an adapter merged
    in. The loss holds its chunks and, if the head is trained, one gradient of the head. A process has its share of a student
    that is distributed (``_gathered_bytes``), and all of its copies.

    On a CPU the matrices of a bf16 teacher are in memory twice, once in the layout of the products, for the families of
    ``models/cpu/``. So are those of a model that samples in bf16. The weights from before training, which the first
    validation needs, are not counted: gradients take at least as much, and do not exist at that point
    (`Prepared.with_start_weights`).
    """
    from distillm_cli.losses.fused import work_bytes

    recipe = run.recipe
    student = run.student
    is_quantized = recipe.student.quantize != "none"
    trainable = student.parameters["trainable"]
    sampled = run.lengths.prompt + run.new_tokens
    is_sampled = run.student_samples or run.teacher_samples
    longest = max(run.lengths.longest, math.ceil(sampled) if is_sampled else 0)
    positions = run.micro_batch * longest
    parts = {
        "student_weights": _student_weight_bytes(run, student) // run.shards,
        "gathered_weights": _gathered_bytes(run, student),
        "gradients": 4 * trainable // run.shards,
        "optimizer": _optimizer_bytes(run, student) // run.shards,
        "cast_weights": 0 if is_quantized else _cast_weight_bytes(run, student),
        "activations": round(_activation_passes(run) * _activation_bytes(run, student, run.itemsize, longest)),
        "loss": work_bytes(positions, run.vocab, run.itemsize, run.device) + _head_gradient_bytes(run, student),
    }
    if run.teacher is not None:
        parts |= _teacher_bytes(run, run.teacher, positions)
    if run.teacher is not None and run.trains_teacher:
        parts |= _trained_teacher_bytes(run, run.teacher, longest)
        if not run.teacher.adapted:
            parts["loss"] += _head_gradient_bytes(run, run.teacher)
    if recipe.train.gradient_checkpointing and recipe.train.offload_activations:
        host = 2 * run.itemsize * student.all_layers * student.width * run.micro_batch * longest
        parts["host_activations"] = round(_activation_passes(run) * host)
    parts |= run.cached_bytes or {}
    parts |= _sampling_bytes(run, longest)
    return {name: size for name, size in parts.items() if size}


def _teacher_bytes(run: Workload, teacher: Sizes, positions: int) -> dict[str, int]:
    """Return the bytes of a teacher that is not trained. positions: of a micro-batch."""
    from distillm_cli.models.cpu.forward import has_layouts

    quantize = run.recipe.teacher.quantize
    parts = _teacher_weight_bytes(run, _weight_bytes(teacher, run.teacher_itemsize, quantize))
    is_here = not (run.has_head_only or run.teacher_is_served)
    is_bf16_on_cpu = run.device == "cpu" and run.teacher_itemsize == 2
    if is_here and is_bf16_on_cpu and has_layouts(teacher.kind, teacher.parameters["total"]):
        parts["teacher_layouts"] = teacher.matmul * run.teacher_itemsize
    of_layers = 1 if run.teacher_is_served else 8  # the states alone, or one layer without a graph
    parts["teacher_activations"] = positions * teacher.width * run.teacher_itemsize * of_layers
    return parts


def _sampling_bytes(run: Workload, longest: int) -> dict[str, int]:
    """Return the bytes of sampling: copies that decode, keys and values, and on a CPU layouts of bf16 matrices."""
    from distillm_cli.models.cpu.forward import has_layouts

    recipe = run.recipe
    student = run.student
    parts: dict[str, int] = {}
    positions = run.sequences * recipe.rollout.bulk * longest
    if run.student_samples:
        is_quantized = recipe.student.quantize != "none"
        parts["rollout_weights"] = 0 if is_quantized else decoding_copy_bytes(student, run.itemsize)
        if not run.student_is_served:
            parts["rollout_cache"] = kv_cache_bytes(student, positions, run.itemsize)
    if run.teacher is not None and (run.teacher_samples or recipe.decodes_with_teacher):
        parts["teacher_rollout_cache"] = kv_cache_bytes(run.teacher, positions, run.teacher_itemsize)
    if run.device == "cpu":
        sampling = []
        if "rollout_cache" in parts and run.itemsize == 2:
            sampling.append(student)
        if run.teacher is not None and "teacher_rollout_cache" in parts and run.teacher_itemsize == 2:
            sampling.append(run.teacher)
        layouts = [2 * (m.matmul + run.vocab * m.head_in) for m in sampling if has_layouts(m.kind, m.merged)]
        is_bf16 = run.itemsize == 2 or (run.teacher is not None and run.teacher_itemsize == 2)
        parts["rollout_layouts"] = sum(layouts)
        parts["compiled_products"] = _COMPILED_PRODUCTS if is_bf16 else 0
    return parts


def _gathered_bytes(run: Workload, student: Sizes) -> int:
    """Return the bytes of whole weights and gradients that a process with a shard of the student has in a step.

    Embeddings and head are gathered for the whole pass, with a gradient if they are trained, and of the blocks two, one of
    them with a gradient.
    """
    if run.shards == 1:
        return 0
    parameters = student.parameters
    ends = parameters["total"] - parameters["trunk"]
    block = parameters["trunk"] / max(1, student.all_layers)
    return round(4 * (ends * (1 if student.adapted else 2) + block * (2 if student.adapted else 3)))


def _optimizer_bytes(run: Workload, model: Sizes) -> int:
    """Return the bytes of the optimizer's state, in float32 unless it has 8 bits.

    AdamW has two moments of each parameter. bitsandbytes has 8-bit moments and a float32 scale for each 256 of them.
    Adafactor has a row and a column for each matrix.
    """
    trainable = model.parameters["trainable"]
    match run.recipe.train.optimizer:
        case "adafactor":
            return 4 * model.factored
        case "adamw_8bit" | "paged_adamw_8bit":
            return 2 * (trainable + 4 * trainable // 256)
        case _:
            return 8 * trainable


def _weight_bytes(model: Sizes, itemsize: int, quantize: str) -> int:
    """Return the bytes of a model's weights. quantize: of the linear layers."""
    bits = {"none": 8 * itemsize, "8bit": 8, "4bit": 4}[quantize]
    return (model.parameters["total"] - model.matrices) * itemsize + model.matrices * bits // 8


def _student_weight_bytes(run: Workload, student: Sizes) -> int:
    """Return the bytes of the student's weights: float32, unless they are quantized below an adapter."""
    quantize = run.recipe.student.quantize
    if quantize == "none":
        return 4 * student.parameters["total"]
    return _weight_bytes(student, run.itemsize, quantize) + (4 - run.itemsize) * student.parameters["trainable"]


def _cast_weight_bytes(run: Workload, student: Sizes) -> int:
    return (student.matrices - student.repeated) * run.itemsize if run.itemsize < 4 else 0


def _teacher_weight_bytes(run: Workload, size: int) -> dict[str, int]:
    """Return the bytes of a frozen teacher's weights, by their place. size: of all weights.

    The head of a teacher that is not whole on the device is there too. In a run on the CPU the weights beyond
    ``teacher.max_memory`` stay on disk.
    """
    assert run.teacher is not None
    config = run.recipe.teacher
    head = run.vocab * run.teacher.head_in * run.teacher_itemsize
    if run.has_head_only or run.teacher_is_served:
        return {"teacher_weights": head}
    is_cpu = run.device == "cpu"
    if config.offload and not is_cpu:
        return {"teacher_head": head, "offloaded_teacher": size, "host_teacher_weights": size}
    if config.device_map == "none" or (config.device_map == "cpu" and is_cpu):
        return {"teacher_weights": size}
    on_device = 0 if config.device_map == "cpu" else size
    if on_device and config.max_memory is not None:
        on_device = min(size, round(config.max_memory * 1e9))
    return {
        "teacher_head": head,
        "teacher_weights": on_device,
        "host_teacher_weights": 0 if is_cpu else size - on_device,
    }


def _trained_teacher_bytes(run: Workload, teacher: Sizes, longest: int) -> dict[str, int]:
    """Return the bytes that a teacher needs, besides its weights, because it is trained: an adapter in it, or all of it."""
    trainable = teacher.parameters["trainable"]
    itemsize = run.trained_teacher_itemsize
    return {
        "teacher_gradients": 4 * trainable,
        "teacher_optimizer": _optimizer_bytes(run, teacher),
        "teacher_cast_weights": teacher.matrices * itemsize if itemsize < run.teacher_itemsize else 0,
        "teacher_activations": _activation_bytes(run, teacher, itemsize, longest),
    }


def _head_gradient_bytes(run: Workload, model: Sizes) -> int:
    """Return the bytes of the gradient of a model's head, and of its copy in the compute dtype."""
    return run.vocab * model.head_in * ((0 if model.adapted else 4) + (0 if run.itemsize == 4 else 2))


def _activation_bytes(run: Workload, model: Sizes, itemsize: int, longest: int) -> int:
    """Return the bytes of one micro-batch's activations for a backward pass (see ``memory``)."""
    layers = model.layers if model.encoder is None else max(model.layers, model.encoder.layers)
    adapter_bytes = 4 * family_of(model.kind).values_under_adapter * model.adapted / max(1, model.matrices)
    saved = layers * (34 * itemsize + adapter_bytes)
    if run.recomputes(model):
        inputs = 0 if run.recipe.train.offload_activations else layers * 2 * itemsize
        saved = saved / layers + inputs
    return round(run.micro_batch * longest * model.width * saved) + _attention_score_bytes(run, model, longest)


def _attention_score_bytes(run: Workload, model: Sizes, longest: int) -> int:
    """Return the bytes of attention scores that are saved for a model's backward pass.

    torch's attention on a CPU saves them if it has dropout: 12 bytes each, counted on T5. The forward passes of
    ``models/cpu/`` do not. longest: tokens of the longest row.
    """
    from distillm_cli.models.cpu.forward import has_forward

    recomputes = run.recomputes(model)
    has_own_forward = has_forward(model.kind) and not model.adapted and not recomputes
    if run.device != "cpu" or has_own_forward:
        return 0
    response = longest * run.lengths.response / max(run.lengths.mean, 1)
    prompt = longest - response
    layers = model.layers
    pairs: list[float] = [longest**2] * layers
    if model.encoder is not None:
        # The decoder attends to its own tokens and to the prompt.
        pairs = [prompt**2] * model.encoder.layers + [response * longest] * layers
    saved = max(pairs) if recomputes else sum(pairs)
    return round(12 * run.micro_batch * model.dropout_heads * saved)


def _activation_passes(run: Workload) -> float:
    """Return the number of plain passes whose activations a micro-batch has in memory together."""
    recipe = run.recipe
    passes = 1.0 + (recipe.data.mixup > 0) + (recipe.train.adversarial != "none")
    has_gradient = run.teacher is not None and recipe.objective.input_gradient > 0
    return passes + (_SECOND_DERIVATIVE_MEMORY if has_gradient else 0.0)


_STEP_PARTS = (
    "gathered_weights", "gradients", "cast_weights", "activations", "loss", "teacher_activations", "teacher_gradients",
    "teacher_cast_weights",
)  # fmt: skip
_TEACHER_PARTS = ("offloaded_teacher",)
_SAMPLING_PARTS = ("rollout_weights", "rollout_cache", "teacher_rollout_cache")


def peak_memory(parts: Mapping[str, int], device: str) -> int:
    """Return the peak memory in bytes. A step, the sampling before it and an offloaded teacher's pass do not overlap.

    Parts named ``host_…`` are not on the device. On a CPU all parts add up: the allocator keeps freed memory for tensors of
    the same sizes (`host.keep_freed_memory`).
    """
    if device == "cpu":
        return sum(parts.values())
    parts = {name: size for name, size in parts.items() if not name.startswith("host_")}
    phases = [sum(parts.get(name, 0) for name in names) for names in (_STEP_PARTS, _SAMPLING_PARTS, _TEACHER_PARTS)]
    return sum(parts.values()) - sum(phases) + max(phases)


def decoding_copy_bytes(student: Sizes, itemsize: int) -> int:
    """Return the bytes of the copy of the student that decodes.

    It holds every weight, with the adapter merged in, if the compute dtype is not float32; else only the adapted
    layers.
    """
    return itemsize * student.merged if itemsize < 4 else 4 * student.adapted


def kv_cache_bytes(model: Sizes, positions: int, itemsize: int) -> int:
    """Return the bytes of keys and values; in an encoder-decoder, of the decoder: of its own tokens and of the prompt."""
    return positions * model.layers * 2 * model.kv * itemsize


def forward_flops(
    model: Sizes, sequences: float, prompt: float, response: float, predicted: float, vocab: int
) -> float:
    """Return the FLOPs of one forward pass (Kaplan et al. 2020, arXiv 2001.08361).

    - 2 for each weight and token in matrix products;
    - 2·layers·width·length per token for causal attention, where a token attends to half of ``length`` on average;
    - 2·width·vocab for each of the ``predicted`` tokens, in the head.

    In an encoder-decoder the encoder computes the prompt, with attention to all of it. The decoder computes the response,
    with attention to half of the response and to all of the prompt.
    """
    head = 2 * sequences * predicted * model.head_in * vocab
    if model.encoder is None:
        length = prompt + response
        return sequences * length * (2 * model.matmul + 2 * model.layers * model.attention * length) + head
    encoder = model.encoder
    encoding = prompt * (
        2 * encoder.matmul + 4 * encoder.layers * model.attention * prompt + 2 * encoder.cross_attention
    )
    attention = 2 * model.layers * model.attention * (response + 2 * prompt)
    return sequences * (encoding + response * (2 * (model.matmul - encoder.cross_attention) + attention)) + head


def decoding_work(model: Sizes, rows: float, prompt: float, new: int, vocab: int, itemsize: int) -> Part:
    """Return the work of decoding ``new`` tokens for each of ``rows`` prompts in one batch.

    Each decoding step reads the decoder's weights once for the batch, and the keys and values of each row: those of the
    prompt and, on average, of half of the new tokens.
    """
    decoder = model.matmul - (0 if model.encoder is None else model.encoder.cross_attention)
    attended = prompt + new / 2
    prefill = forward_flops(model, rows, prompt, 0, 0, vocab)
    per_token = 2 * decoder + 4 * model.layers * model.attention * attended + 2 * model.head_in * vocab
    weights = (decoder + model.head_in * vocab) * itemsize
    traffic = new * (weights + rows * attended * kv_cache_bytes(model, 1, itemsize))
    return Part(prefill + rows * new * per_token, traffic, new * model.layers * DECODING_LAUNCH_S, itemsize)


def step_work(run: Workload) -> dict[str, Work]:
    """Return the work of an optimizer step, by the source that it trains on. FLOPs and seconds are computed from it.

    Sources: data set rows and the teacher's samples (each also as ``_cached``, if the teacher's states are cached), a
    new rollout, a replayed one, a pair of samples of both models. Sources that the schedule never draws are left out.

    For interleaved sampling, the teacher's check of the drafted tokens counts as one more forward pass.
    """
    response = run.lengths.response
    new = run.new_tokens
    train_rows = _log_prob_work(run, response) + _training_work(run, response)
    train_samples = _log_prob_work(run, new) + _training_work(run, new)
    if run.teacher is None:
        return {"dataset": train_rows + _input_embedding_work(run, response, is_labeled=True)}
    recipe = run.recipe
    schedule = run.schedule
    # With cross-entropy alone the teacher computes nothing on rows. Student outputs always need it.
    has_kd = recipe.objective.kd_weight > 0 or run.trains_teacher
    teacher_rows = _teacher_work(run, run.teacher, response) if has_kd else ()
    teacher_rows_cached = (_teacher_head(run, run.teacher, response),) if has_kd else ()
    teacher_samples = _teacher_work(run, run.teacher, new)
    teacher_samples_cached = (_teacher_head(run, run.teacher, new),) if run.caches_samples else teacher_samples
    work: dict[str, Work] = {}
    if schedule.config.uses_rows:
        work["dataset"] = train_rows + teacher_rows
        if run.caches_rows:
            work["dataset_cached"] = train_rows + teacher_rows_cached
    rollout: Work = ()  # sampling from the student and training on it
    if run.student_samples:
        rollout = _decoding_copy_work(run)
        if not run.student_is_served:
            rollout += (_sampling_work(run, run.student, run.itemsize),)
        if run.samples_from_mixture:
            rollout += (_sampling_work(run, run.teacher, run.teacher_itemsize),)
        if schedule.config.drafts:
            rollout += (_teacher_forward(run, run.teacher, new),)
        rollout += teacher_samples + train_samples
    if schedule.config.uses_teacher_samples:
        sampling: Work = ()
        if run.teacher_samples:
            sampling = (_sampling_work(run, run.teacher, run.teacher_itemsize),)
        fresh = sampling + train_samples + (teacher_samples if has_kd else ())
        cached = train_samples + (teacher_samples_cached if has_kd else ())
        name = Source.PAIR.value if schedule.in_pairs else Source.TEACHER.value
        work[name] = fresh + rollout[:-1]  # a pair has one optimizer update
        if schedule.reuses_teacher_samples:
            work[f"{name}_cached"] = cached + rollout[:-1]
    elif rollout:
        rows: Work = ()  # trained on in the same step
        if recipe.objective.row_weight:
            rows = train_rows[:-1] + (teacher_rows_cached if run.caches_rows else teacher_rows)
        work["rollout"] = rollout + rows
        if schedule.config.may_replay:
            work["replay"] = train_samples + teacher_samples_cached + rows
    for name in work:
        is_output = name in (Source.ROLLOUT.value, Source.REPLAY.value)
        length = response if name.startswith(Source.DATASET.value) else new
        work[name] += _input_embedding_work(run, length, is_labeled=not is_output)
    return work


def _input_embedding_work(run: Workload, response: float, *, is_labeled: bool) -> Work:
    """Return the work of the passes on input embeddings that a step has in addition.

    data.mixup: a training pass, and one of the teacher. objective.input_gradient: ``_SECOND_DERIVATIVE`` training passes,
    and forward pass and input gradient of the teacher. train.adversarial: a training pass after the search, which has
    forward pass and input gradient in each step. The last two are for labels only, not for student outputs.
    """
    recipe = run.recipe
    training = _training_work(run, response)[0]
    found: list[Part] = []
    if recipe.data.mixup:
        found.append(training)
        if run.teacher is not None and recipe.mixkd.kd_weight:
            found.append(_teacher_forward(run, run.teacher, response))
    if run.teacher is not None and recipe.objective.input_gradient and is_labeled:
        every = recipe.kdiga.every
        found.append(training.divided(every / _SECOND_DERIVATIVE))
        found.append(_teacher_forward(run, run.teacher, response).divided(every / 2))
    if recipe.train.adversarial != "none" and is_labeled:
        steps = recipe.train.adversarial_steps if recipe.train.adversarial == "pgd" else 1
        passes = 2 * steps + (1 if steps > 1 else 0)  # of a training pass's three
        found += [training, training.divided(3 / passes)]
    return tuple(found)


def _training_work(run: Workload, response: float) -> Work:
    """Return the work of training the student on a step's sequences."""
    return _training_work_of(run, run.student, response, run.itemsize)


def _training_work_of(run: Workload, model: Sizes, response: float, itemsize: int) -> Work:
    """Return the work of training a model on a step's sequences: forward and backward pass, and the optimizer's update.

    Gradients of the activations cost as much as the forward pass, and so do those of the weights, for the share that is
    trained. Gradient checkpointing adds one more forward pass. The optimizer reads gradients, and reads and writes weights
    and moments: 28 bytes per parameter with AdamW, 16 with 8-bit moments or Adafactor.
    """
    recomputes = run.recomputes(model)
    forward = forward_flops(model, run.sequences, run.lengths.prompt, response, 0, run.vocab)
    head = 2 * run.sequences * response * model.head_in * run.vocab
    passes = 2 + model.trainable_share + (1 if recomputes else 0)
    launch_s = FORWARD_LAUNCH_S + BACKWARD_LAUNCH_S + (FORWARD_LAUNCH_S if recomputes else 0.0)
    both_passes = Part(
        forward * passes + 3 * head,  # the head is not recomputed
        launch_s=_micro_batches(run) * model.all_layers * launch_s,
        itemsize=itemsize,
    )
    per_parameter = 28 if run.recipe.train.optimizer == "adamw" else 16
    return both_passes, Part(traffic=per_parameter * model.parameters["trainable"])


def _log_prob_work(run: Workload, response: float) -> Work:
    """Return the student's forward pass for an objective that needs log-probabilities before it trains; else no work."""
    if run.teacher is None or "student" not in objectives.build(run.recipe.objective, 1.0).needs_log_probs_of:
        return ()
    launch_s = _micro_batches(run) * run.student.all_layers * FORWARD_LAUNCH_S
    flops = forward_flops(run.student, run.sequences, run.lengths.prompt, response, response, run.vocab)
    return (Part(flops, launch_s=launch_s, itemsize=run.itemsize),)


def _teacher_work(run: Workload, teacher: Sizes, response: float) -> Work:
    """Return the teacher's work on a step's sequences: its forward pass, and its training if it is trained."""
    if run.trains_teacher:
        return _training_work_of(run, teacher, response, run.trained_teacher_itemsize)
    return (_teacher_forward(run, teacher, response),)


def _teacher_forward(run: Workload, teacher: Sizes, response: float) -> Part:
    """Return the teacher's forward pass over a step's sequences, head included. On a server, the head alone is here."""
    if run.teacher_is_served:
        return _teacher_head(run, teacher, response)
    flops = forward_flops(teacher, run.sequences, run.lengths.prompt, response, response, run.vocab)
    launch_s = _micro_batches(run) * teacher.all_layers * FORWARD_LAUNCH_S
    return Part(flops, launch_s=launch_s, itemsize=run.teacher_itemsize)


def _teacher_head(run: Workload, teacher: Sizes, response: float) -> Part:
    """Return the work of the teacher's head alone, on cached states."""
    return Part(2 * run.sequences * response * teacher.head_in * run.vocab, itemsize=run.itemsize)


def _sampling_work(run: Workload, model: Sizes, itemsize: int) -> Part:
    """Return a step's share of the responses that are sampled ``bulk`` batches at a time."""
    bulk = run.recipe.rollout.bulk
    rows = run.sequences * bulk
    return decoding_work(model, rows, run.lengths.prompt, run.new_tokens, run.vocab, itemsize).divided(bulk)


def _decoding_copy_work(run: Workload) -> Work:
    """Return a step's share of copying the weights for decoding: reading and writing them, and merging an adapter."""
    student = run.student
    size = decoding_copy_bytes(student, run.itemsize)
    if not size:
        return ()
    weights = size / min(run.itemsize, 4)
    copying = Part(2 * student.rank * student.adapted, traffic=4 * weights + size, itemsize=4)
    return (copying.divided(run.recipe.rollout.bulk),)


def _micro_batches(run: Workload) -> int:
    tokens = run.recipe.train.tokens_per_batch
    if tokens is not None:
        return math.ceil(run.sequences * run.lengths.mean / tokens)
    return math.ceil(run.sequences / max(1, run.micro_batch))


def source_shares(run: Workload, steps: int, phi: float | None = None) -> dict[str, float]:
    """Return the share of each source in a run's steps, from the schedule's own draws.

    phi: fixed for the whole run (adaptive schedule).
    """
    recipe = run.recipe
    config = recipe.schedule if phi is None else recipe.schedule.model_copy(update={"phi": phi})
    drawn_steps = min(
        steps, 2000
    )  # the shares hardly depend on the number of steps, except for filling the replay buffer
    scheduler = build_scheduler(config, steps=drawn_steps, seed=recipe.train.seed, batches=recipe.rollout.bulk)
    buffered = 0.0
    batch = run.step_sequences * steps / drawn_steps
    counts: Counter[str] = Counter()
    for step in range(drawn_steps):
        source = scheduler.draw(step, int(buffered))
        counts[source.value] += 1
        if source is Source.ROLLOUT:
            buffered = min(scheduler.capacity(run.step_sequences), buffered + batch)
    return {source: n / drawn_steps for source, n in counts.items()}


def gpu_figures(run: Workload, need: int) -> dict[str, dict[str, Any]]:
    """Return figures for each known GPU.

    fits: whether ``need`` bytes fit its memory. step_s: seconds of a step, by source. run_s: minimum and maximum
    seconds of the run, including the stages before it (``sft_s`` and ``ptp_s`` alone). The two differ only for the adaptive
    schedule, where φ may stay at its initial value or be 1 from the first step.
    """
    figures = {}
    work = step_work(run)
    steps = run.lengths.steps
    is_phi_open = run.schedule.has_phi and run.teacher is not None
    for gpu in GPUS:
        step_s = {source: seconds(parts, gpu) for source, parts in work.items()}
        entry: dict[str, Any] = {"fits": fits_in_memory(need, gpu), "step_s": step_s}
        if steps is not None:
            run_s = [_run_seconds(run, step_s, steps, phi) for phi in ((None, 1.0) if is_phi_open else (None,))]
            stages = {f"{name}_s": _stage_seconds(stage, gpu) for name, stage in run.stages.items()}
            before_s = sum(stages.values())
            entry |= stages
            entry["run_s"] = [before_s + min(run_s), before_s + max(run_s)]
        figures[gpu.name] = entry
    return figures


def _stage_seconds(stage: Workload, gpu: Gpu) -> float:
    """Return the seconds of a stage before a distillation, whose number of steps is known if the run's is."""
    steps = stage.lengths.steps or 0
    labelling = (stage.lengths.steps_per_epoch or 0) * seconds(stage.labelling, gpu) if stage.labelling else 0.0
    return steps * seconds(step_work(stage)["dataset"], gpu) + labelling


def labelling_work(run: Workload) -> Work:
    """Return the work of the teacher's labels for each step's rows, none if its states are cached for the run anyway."""
    if run.teacher is None or run.caches_rows:
        return ()
    return (_teacher_forward(run, run.teacher, run.lengths.response),)


def _run_seconds(run: Workload, step_s: Mapping[str, float], steps: int, phi: float | None) -> float:
    """Return the seconds of all steps. Sources that are cached take the longer time in the first epoch."""
    mix = {"dataset": 1.0} if run.teacher is None else source_shares(run, steps, phi)
    epoch = min(run.lengths.steps_per_epoch or steps, steps)
    total = 0.0
    for source, share in mix.items():
        count = share * steps
        cached_s = step_s.get(f"{source}_cached")
        if cached_s is None:
            total += count * step_s[source]
            continue
        first = min(count, epoch)
        total += first * step_s[source] + (count - first) * cached_s
    return total


def network_bytes(run: Workload) -> int:
    """Return the bytes that each process sends, and receives, in a step: a ring, in float32.

    They are the gradients. Of a distributed student they are, in each pass, its weights, twice, and its gradients.
    """
    if run.shards > 1:
        passes = math.ceil(run.sequences / run.micro_batch)
        of_pass = 4 * (2 * run.student.parameters["total"] + run.student.parameters["trainable"])
        return round(passes * of_pass * (run.processes - 1) / run.processes)
    trained = [run.student] if run.teacher is None else [run.student, run.teacher]
    gradients = 4 * sum(model.parameters["trainable"] for model in trained)
    return round(2 * (run.processes - 1) / run.processes * gradients)
