"""Build students from scratch: from a shape such as `random:4x256` or `width:0.5`, or from a config.json."""

from __future__ import annotations

import re
from numbers import Real
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from distillm_cli.config.student_spec import (
    RandomModel,
    SharedLayers,
    StudentSpec,
    TeacherLayers,
    TeacherWidth,
    parse_student,
)
from distillm_cli.errors import ModelError, UsageError, out_of_memory
from distillm_cli.models.backbone import vocabulary_size
from distillm_cli.models.composite import check_causal_class, is_composite
from distillm_cli.models.model_families import (
    DECODER_DEPTH_FIELDS,
    FEED_FORWARD_FIELDS,
    IDENTITY_FIELDS,
    INITIAL_SPREAD_FIELDS,
    KEY_VALUE_HEADS_FIELDS,
    context_of,
    family_of,
    t5_head_scale,
)

_DROPOUT = re.compile(r"(?!classifier|summary|layer)\w*(dropout|pdrop)(_prob|_rate|_p)?")


def build_random(
    spec: str,
    tokenizer: Tokenizer,
    *,
    teacher_config: PretrainedConfig | None,
    max_length: int,
    seed: int,
    dropout: float | None = None,
) -> PreTrainedModel:
    """Build a model with random float32 weights, a function of the seed and the shape alone.

    spec: ``random:[FAMILY:]LAYERSxWIDTH``, or ``width:…``, as deep as the teacher. FAMILY: llama, gpt2 or t5, or the
    teacher's own, which is also the default: its config with layers, width, heads and feed-forward scaled. Without a
    teacher: llama. An encoder-decoder has this number of layers in each stack. Context: the teacher's, else
    2·max_length. dropout: unset is 0. Raises UsageError for an impossible shape.
    """
    model = _random_model(spec, teacher_config)
    layers, width = model.layers, model.width
    text = None if teacher_config is None else teacher_config.get_text_config()
    context = max(2 * max_length, 128) if text is None else context_of(text)
    shape = {"layers": layers, "width": width, "context": context or max(2 * max_length, 128)}
    family = model.family or ("llama" if text is None else text.model_type)
    if text is not None and family == text.model_type:
        if text is not teacher_config:
            check_causal_class(text, spec)
        config = _scaled(text, layers, width, spec)
    elif family in _SHAPES:
        config = _SHAPES[family](**shape, spec=spec)
    else:
        teacher = "" if text is None or text.model_type in _SHAPES else f", {text.model_type}"
        raise UsageError(
            "usage.invalid_student",
            f"unknown family {family!r} in {spec!r}",
            hint=f"families: {', '.join(_SHAPES)}{teacher}",
        )
    config.vocab_size = vocabulary_size(tokenizer)
    set_dropout(config, dropout or 0.0, where=spec)
    _set_initial_spread(config, width)
    return _build(config, tokenizer, seed, spec)


def build_random_trunk(
    spec: str, teacher_config: PretrainedConfig, *, seed: int, dropout: float | None = None
) -> PreTrainedModel:
    """Build a model without a head, of the teacher's family and with random float32 weights, for sentence embeddings.

    spec: as in ``build_random``. Raises UsageError for an impossible shape or another family.
    """
    model = _random_model(spec, teacher_config)
    text = teacher_config.get_text_config()
    if model.family not in (None, text.model_type):
        raise UsageError(
            "usage.invalid_student",
            f"{spec}: a student for embeddings that is built has the teacher's family, {text.model_type}",
            hint=f"try random:{model.layers}x{model.width}",
        )
    config = _scaled(text, model.layers, model.width, spec)
    set_dropout(config, dropout or 0.0, where=spec)
    _set_initial_spread(config, model.width)
    return build_trunk(config, seed=seed, where=spec)


def build_trunk(config: PretrainedConfig, *, seed: int, where: str) -> PreTrainedModel:
    """Build a model without a head from its config, with random float32 weights. Raises ModelError."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False).eval()
        except Exception as error:  # every family checks its sizes in its own way, or fails on them
            if out_of_memory(error):
                raise
            raise ModelError(
                "model.invalid_shape",
                f"cannot build a {config.model_type} of this shape: {error}",
                where=where,
                hint="try random:4x256",
            ) from error


def build_from_config(
    config: PretrainedConfig, tokenizer: Tokenizer, *, seed: int, dropout: float | None = None, where: str
) -> PreTrainedModel:
    """Build a model with random float32 weights of the shape that a config.json gives. where: that file, for messages.

    Raises ModelError when the tokenizer has more token ids than the config's vocab_size.
    """
    rows, needed = config.get_text_config().vocab_size, vocabulary_size(tokenizer)
    if rows < needed:
        raise ModelError(
            "model.tokenizer_mismatch",
            f"the tokenizer has {needed:,} token ids, vocab_size is {rows:,}",
            where=where,
            hint=f"set vocab_size to {needed} or more, or pass another --tokenizer",
        )
    if dropout is not None:
        set_dropout(config, dropout, where=where)
    return _build(config, tokenizer, seed, where)


def check_has_teacher(text: str, spec: StudentSpec, teacher: object | None) -> None:
    """Raise UsageError if a student is built from a teacher and there is none."""
    if teacher is not None:
        return
    if isinstance(spec, TeacherLayers | SharedLayers):
        what = f"{text} copies layers of a teacher, but there is no teacher"
        raise UsageError("usage.no_teacher", what, hint="set it with --set teacher.path=PATH")
    if isinstance(spec, TeacherWidth):
        raise UsageError(
            "usage.no_teacher",
            f"{text} has the depth of a teacher, but there is no teacher",
            hint="write random:LAYERSxWIDTH",
        )


def _random_model(text: str, teacher_config: PretrainedConfig | None) -> RandomModel:
    """Return family, layers and width of ``random:`` or ``width:``. Raises UsageError.

    No weights are copied for a width, since narrower matrices do not correspond to wider ones.
    """
    spec = parse_student(text)
    check_has_teacher(text, spec, teacher_config)
    if isinstance(spec, RandomModel):
        return spec
    teacher = teacher_config.get_text_config()
    width = spec.size if spec.size is not None else _multiple(spec.share * teacher.hidden_size)
    if not 1 <= width <= teacher.hidden_size:
        raise UsageError(
            "usage.invalid_student",
            f"{text}: the teacher is {teacher.hidden_size} wide",
            hint=f"give 1 to {teacher.hidden_size}",
        )
    return RandomModel(teacher.num_hidden_layers, width)


def set_dropout(config: PretrainedConfig, dropout: float, *, where: str) -> None:
    """Set every dropout of a config: on embeddings, attention, residuals and activations alike."""
    text = config.get_text_config()
    names = [
        name
        for name, value in text.to_dict().items()
        if _DROPOUT.fullmatch(name) and isinstance(value, Real) and not isinstance(value, bool)
    ]
    if not names and dropout:
        raise ModelError(
            "model.no_dropout",
            f"{text.model_type} has no dropout to set",
            where=where,
            hint="leave student.dropout unset",
        )
    for name in names:
        setattr(text, name, dropout)


def _set_initial_spread(config: PretrainedConfig, width: int) -> None:
    """Set the standard deviation √(2/(5·width)) for random weights (small init, Nguyen & Salazar, arXiv 1910.05895).

    The families' constant 0.02 suits a width of about 1,000. In a model of width 64, layers would have almost no effect
    at first, and the first hundreds of steps would only increase the weights.
    """
    text = config.get_text_config()
    for name in INITIAL_SPREAD_FIELDS:
        if hasattr(text, name):
            setattr(text, name, (2 / (5 * width)) ** 0.5)


def adopt_special_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Set the special tokens in a model's config to those of another model's tokenizer, for `generate`."""
    _set_special_tokens(model.config, tokenizer)
    if model.generation_config is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(model.generation_config, name, getattr(tokenizer, name))
        if model.config.is_encoder_decoder:
            model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id


def _set_special_tokens(config: PretrainedConfig, tokenizer: Tokenizer) -> None:
    if config.is_encoder_decoder:
        config.decoder_start_token_id = _start_token(config, tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    # The embedding of config.pad_token_id gets no gradient in several families, so a pad token that is also the
    # end-of-sequence must not be set here, only in the generation config.
    pad = tokenizer.pad_token_id
    config.pad_token_id = None if pad in (tokenizer.eos_token_id, tokenizer.bos_token_id) else pad


def _start_token(config: PretrainedConfig, tokenizer: Tokenizer) -> int:
    """Return the start token of the decoder: the token in the same role as before, T5's pad or BART's end-of-sequence."""
    start = getattr(config, "decoder_start_token_id", None)
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if start is not None and start == getattr(config, name, None) and getattr(tokenizer, name) is not None:
            return getattr(tokenizer, name)
    return tokenizer.pad_token_id if start is None or start >= vocabulary_size(tokenizer) else start


def auto_class(config: PretrainedConfig) -> type[_BaseAutoModelClass]:
    """Return the class of transformers that loads and builds such a model.

    A composite model is loaded completely, although its causal class would load only the text model.
    """
    if is_composite(config):
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _build(config: PretrainedConfig, tokenizer: Tokenizer, seed: int, where: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        # Only the CPU generator: torch.manual_seed would also seed those of the devices, which are not forked here.
        torch.default_generator.manual_seed(seed)
        try:
            _set_special_tokens(config, tokenizer)  # before the embedding is created, which may use the pad token
            model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
        except Exception as error:  # every family checks its sizes in its own way, or fails on them
            if out_of_memory(error):
                raise
            raise ModelError(
                "model.invalid_shape",
                f"cannot build a {config.model_type} of this shape: {error}",
                where=where,
                hint="try random:llama:4x256",
            ) from error
    adopt_special_tokens(model, tokenizer)
    _scale_embeddings(model)
    return model.eval()


@torch.no_grad()
def _scale_embeddings(model: PreTrainedModel) -> None:
    """Scale the embeddings of a T5-like model, which have a standard deviation of 1, if they are tied to the head.

    Without a scale of the head's input, the first logits would have a standard deviation of √width.
    """
    if tied_from_scratch(model):
        model.get_input_embeddings().weight.mul_(model.config.hidden_size**-0.5)


def heads_are_tied(model: PreTrainedModel) -> bool:
    """Return whether the loaded head is the embedding matrix itself. A config may differ from its weights."""
    return getattr(model.get_output_embeddings(), "weight", None) is model.get_input_embeddings().weight


def tied_from_scratch(model: PreTrainedModel) -> bool:
    """Return whether transformers ties embeddings and head of a new T5 v1.1 or mT5. Checkpoints have both."""
    is_t5 = family_of(model.config.model_type).has_t5_head
    return heads_are_tied(model) and is_t5 and t5_head_scale(model.config) == 1.0


def _llama(*, layers: int, width: int, context: int, spec: str) -> PretrainedConfig:
    head = _head_size(width, 32, spec)
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=_multiple(width * 8 / 3),
        num_hidden_layers=layers,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        head_dim=head,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )


def _gpt2(*, layers: int, width: int, context: int, spec: str) -> PretrainedConfig:
    # gelu_pytorch_tanh is gelu_new in one kernel rather than eight.
    return GPT2Config(
        n_embd=width,
        n_layer=layers,
        n_head=width // _head_size(width, 32, spec),
        n_positions=context,
        activation_function="gelu_pytorch_tanh",
    )


def _t5(*, layers: int, width: int, context: int, spec: str) -> PretrainedConfig:
    head = _head_size(width, 32, spec)
    return T5Config(
        d_model=width,
        d_kv=head,
        num_heads=width // head,
        d_ff=_multiple(width * 8 / 3),
        num_layers=layers,
        feed_forward_proj="gated-gelu_pytorch_tanh",
    )


_SHAPES = {"llama": _llama, "gpt2": _gpt2, "t5": _t5}


def with_layers(old: PretrainedConfig, keep: list[int], spec: str) -> PretrainedConfig:
    """Return the config for these of the layers, with its per-layer lists reduced accordingly."""
    fields: dict[str, Any] = {k: v for k, v in old.to_dict().items() if k not in IDENTITY_FIELDS}
    depth = old.num_hidden_layers
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == depth and "layer" in name:
            fields[name] = [value[i] for i in keep]
    fields[old.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(keep)
    if fields.get("max_window_layers") is not None:
        fields["max_window_layers"] = sum(i < fields["max_window_layers"] for i in keep)
    try:
        return type(old).from_dict(fields)
    except Exception as error:  # every family validates its sizes in its own way
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(
            "model.cannot_take_layers",
            f"cannot copy {len(keep)} layers of the teacher's {old.model_type}: {reason}",
            where=spec,
        ) from error


def _scaled(old: PretrainedConfig, layers: int, width: int, spec: str) -> PretrainedConfig:
    """Return the config at another depth and width, with dependent sizes in proportion."""
    fields: dict[str, Any] = {k: v for k, v in old.to_dict().items() if k not in IDENTITY_FIELDS}

    def key(name: str) -> str:
        return old.attribute_map.get(name, name)

    ratio = width / old.hidden_size
    old_layers = old.num_hidden_layers
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == old_layers and "layer" in name:
            fields[name] = _resampled(value, layers)
    fields[key("hidden_size")], fields[key("num_hidden_layers")] = width, layers
    for name in DECODER_DEPTH_FIELDS:
        if fields.get(name):
            fields[name] = max(1, round(layers * fields[name] / old_layers))
    for name in FEED_FORWARD_FIELDS:
        if isinstance(fields.get(name), int):
            fields[name] = _multiple(fields[name] * ratio)
    if heads := getattr(old, "num_attention_heads", None):
        old_head = getattr(old, "head_dim", None) or old.hidden_size // heads
        head = _head_size(width, min(old_head, max(16, width // 4)), spec)
        fields[key("num_attention_heads")] = width // head
        if "decoder_attention_heads" in fields:
            fields["decoder_attention_heads"] = width // head
        if fields.get(key("head_dim")) is not None:
            fields[key("head_dim")] = head
        for name in KEY_VALUE_HEADS_FIELDS:
            if fields.get(key(name)):
                fields[key(name)] = _shared_heads(width // head, fields[key(name)] / heads)
        if fields.get("query_pre_attn_scalar") is not None:
            fields["query_pre_attn_scalar"] = head
        if fields.get("attention_multiplier") is not None:
            fields["attention_multiplier"] *= old_head / head
        if fields.get("rotary_dim") is not None:
            fields["rotary_dim"] = min(fields["rotary_dim"], head)
    if fields.get("word_embed_proj_dim") is not None:
        whole = fields["word_embed_proj_dim"] == old.hidden_size
        fields["word_embed_proj_dim"] = (
            width if whole else min(width, _multiple(fields["word_embed_proj_dim"] * ratio, 8))
        )
    if fields.get("max_window_layers") is not None:
        fields["max_window_layers"] = min(fields["max_window_layers"], layers)
    if fields.get("activation_function") == "gelu_new":
        fields["activation_function"] = "gelu_pytorch_tanh"
    try:
        return type(old).from_dict(fields)
    except Exception as error:  # every family validates its sizes in its own way
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(
            "model.cannot_scale",
            f"cannot scale the teacher's {old.model_type} to {layers} layers of {width}: {reason}",
            where=spec,
            hint=f"set a family: random:llama:{layers}x{width}",
        ) from error


def _resampled(values: list[Any], layers: int) -> list[Any]:
    """Resample a per-layer list for another number of layers: evenly spaced, ending with the last entry."""
    n = len(values)
    return [values[-(-(i + 1) * n // layers) - 1] for i in range(layers)]


def _head_size(width: int, target: int, spec: str) -> int:
    """Return a head size: an even divisor of the width, with at least two heads, as close as possible to the target."""
    sizes = [d for d in range(8, 257, 2) if width % d == 0 and (2 * d <= width or width < 32)]
    if not sizes:
        raise UsageError(
            "usage.invalid_student",
            f"a width of {width} does not divide into attention heads",
            where=spec,
            hint="use a multiple of 16",
        )
    return min(sizes, key=lambda d: (d != target, width == d, d % 16 != 0, d % 8 != 0, abs(d - target), -d))


def _shared_heads(heads: int, share: float) -> int:
    """Return the key-value heads: the largest divisor of the heads that does not exceed the teacher's share of them."""
    return max(k for k in range(1, heads + 1) if heads % k == 0 and k <= max(1.0, heads * share + 1e-9))


def _multiple(size: float, factor: int = 16) -> int:
    return max(factor, round(size / factor) * factor)
