"""Choose the chat template of a pair of models, and the tokens that end a response.

Rows, rollouts, teacher samples, the loss and the output directory's generation config must agree on these.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from distillm_cli.errors import ModelError, UsageError
from distillm_cli.training.events import Listener, Note, Warned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distillm_cli.config.schema import DataConfig
    from distillm_cli.data.encoder import Encoder
    from distillm_cli.models.backbone import Backbone
    from distillm_cli.models.pair import Pair


def set_chat_template(pair: Pair, data: DataConfig, listener: Listener, *, is_shared: bool = True) -> None:
    """Set the chat template of the pair's tokenizer from ``data.chat_template``: student's, teacher's or a file's.

    is_shared: the teacher sees it too. Raises UsageError for a template that does not exist.
    """
    own, other = pair.templates["student"], pair.templates.get("teacher")
    pair.tokenizer.chat_template = _template_of(pair, data.chat_template)
    if data.chat_template != "auto" or other is None:
        return
    if own is None:
        listener(Note("the student's tokenizer has no chat template: the teacher's is used and saved with it"))
    elif own != other and is_shared:
        listener(
            Warned(
                "teacher and student have different chat templates: the student's is used; "
                "--set data.chat_template=teacher uses the teacher's, and --set teacher.chat_template=teacher "
                "shows each model its own"
            )
        )


def teacher_tokenizer(pair: Pair, data: DataConfig) -> PreTrainedTokenizerBase:
    """Return the pair's tokenizer with the chat template of the teacher's side. Raises UsageError."""
    tokenizer = copy(pair.tokenizer)
    tokenizer.chat_template = _template_of(pair, data.chat_template)
    return tokenizer


def _template_of(pair: Pair, choice: str) -> str | dict[str, str] | None:
    """Return the chat template that a value of ``chat_template`` names. Raises UsageError."""
    if choice == "auto":
        own = pair.templates["student"]
        return pair.templates.get("teacher") if own is None else own
    if choice not in ("student", "teacher"):
        return read_template(choice)
    if pair.templates.get(choice) is None:
        raise UsageError("usage.no_chat_template", f"chat_template = {choice}, but the {choice}'s tokenizer has none")
    return pair.templates[choice]


def read_template(path: str) -> str:
    """Read a chat template from a file. Raises UsageError."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "usage.unreadable_template",
            f"chat_template = {path}: {error}",
            hint="use auto, student, teacher, or a Jinja file",
        ) from None


def set_languages(tokenizer: Any, data: DataConfig, models: Iterable[Backbone]) -> None:
    """Set the language codes of a translation tokenizer (NLLB, M2M100, mBART), and the first token of responses.

    Raises UsageError if the tokenizer has no such codes.
    """
    for key, name, code in (
        ("data.source_language", "src_lang", data.source_language),
        ("data.target_language", "tgt_lang", data.target_language),
    ):
        if code is None:
            continue
        if not hasattr(tokenizer, name):
            raise UsageError(
                "usage.invalid_language",
                f"{key} = {code}, but the tokenizer has no language codes",
                hint="remove it",
            )
        given = "text" if name == "src_lang" else "text_target"
        try:
            setattr(tokenizer, name, code)
            ids = tokenizer(**{given: "a"})["input_ids"]
            plain_ids = tokenizer(**{given: "a"}, add_special_tokens=False)["input_ids"]
            is_known = ids.count(tokenizer.unk_token_id) == plain_ids.count(tokenizer.unk_token_id)
        except Exception:  # KeyError, ValueError, …: by the family
            is_known = False
        if not is_known:
            raise UsageError(
                "usage.invalid_language",
                f"{key} = {code}: the tokenizer does not know this language",
                hint="see its documentation",
            )
        if name == "tgt_lang":
            for model in models:
                generation_config(model).forced_bos_token_id = int(ids[0])


def default_end_token(data: DataConfig, pair: Pair, listener: Listener) -> int:
    """Return the end token of responses without a chat template, one at which both models stop.

    It is ``data.eos``, else the student's end-of-sequence token, or, if the teacher does not stop at that, the teacher's.
    """
    if data.eos is not None:
        return token_id(pair, data.eos, "data.eos")
    student = pair.tokenizer.eos_token_id
    teacher = pair.teacher_stops
    if teacher is None or student in teacher:
        return student
    shared = [token for token in teacher if token < pair.vocab]
    name = pair.tokenizer.convert_ids_to_tokens
    if not shared:
        raise ModelError(
            "model.different_ends",
            f"teacher and student end responses differently: the student with {name(student)}, the teacher with tokens "
            "that the student does not have",
            hint="choose a student of the teacher's family, or set eos_token in the student's tokenizer_config.json",
        )
    common = [token for token in shared if token in pair.student.stop_ids]
    end = common[0] if common else shared[0]
    listener(
        Note(
            f"responses end with {name(end)}, where the teacher stops; the student's end-of-sequence is {name(student)}"
        )
    )
    return end


def token_id(pair: Pair, token: str, key: str) -> int:
    """Return the id of a token named in the recipe. Raises UsageError for one that a model lacks."""
    found = pair.tokenizer.get_vocab().get(token)
    if found is None or found >= pair.vocab:
        raise UsageError(
            "usage.unknown_token",
            f"{key} = {token!r}: not a token of the models",
            hint="give a single token as the tokenizer writes it",
        )
    return found


def set_stop_tokens(pair: Pair, encoder: Encoder, is_chat: bool, listener: Listener) -> None:
    """Make both models stop at the end tokens of the rows, and add these to the student's generation config.

    is_chat: whether rows are written by the chat template. Warns if the teacher's own configuration lacks the token,
    since the teacher may then give it little probability. Raises ModelError for a token that the models lack.
    """
    name = pair.tokenizer.convert_ids_to_tokens
    ends = [encoder.end_id]
    if is_chat and encoder.renderer.chat is not None:
        turn = encoder.renderer.chat.turn_end
        if turn.token is not None:
            ends = [turn.token]
        elif turn.text.strip():
            listener(
                Note(f"the chat template ends a turn with text that is no token; {name(encoder.end_id)} is appended")
            )
    for end in ends:
        if end >= pair.vocab:
            raise ModelError(
                "model.different_ends",
                f"the chat template ends a turn with {name(end)}, which teacher and student do not share",
                hint="use another template with --set data.chat_template=FILE",
            )
        if pair.teacher_stops is not None and end not in pair.teacher_stops:
            listener(
                Warned(
                    f"the teacher's configuration does not stop at {name(end)}, which ends the responses here; it may "
                    "give that token little probability"
                )
            )
    for model in pair.models.values():
        add_stop_tokens(model, ends)
    if is_chat and pair.teacher_stops is not None:  # its tool calls may end with another token than its answers
        add_stop_tokens(pair.student, [token for token in pair.teacher_stops if token < pair.vocab], after=True)


def add_stop_tokens(model: Backbone, ends: Iterable[int], *, after: bool = False) -> None:
    """Add tokens to those that end a response. They are saved in the model's generation config.

    after: add them after the known ones. The first is the usual one.
    """
    known = model.stop_ids
    ends = [end for end in ends if not (after and end in known)]
    if all(end in known for end in ends):
        return
    declared = generation_config(model).eos_token_id
    listed = declared if isinstance(declared, list | tuple) else [declared]
    others = [token for token in dict.fromkeys([*listed, *sorted(known)]) if token in known and token not in ends]
    generation_config(model).eos_token_id = [*others, *ends] if after else [*ends, *others]


def usual_end_token(model: Backbone) -> int | None:
    """Return the token that a model's responses usually end with: the first of its generation config."""
    declared = generation_config(model).eos_token_id
    first = next(iter(declared), None) if isinstance(declared, list | tuple) else declared
    return first if first in model.stop_ids else model.tokenizer.eos_token_id


def generation_config(model: Backbone) -> GenerationConfig:
    """Return the model's generation config, which is created if it has none."""
    if getattr(model.model, "generation_config", None) is None:
        model.model.generation_config = GenerationConfig()
    return model.model.generation_config
