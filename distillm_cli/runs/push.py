"""Upload a finished run's output directory to the Hugging Face hub (``--push``), by huggingface_hub.

The directory is complete before the upload starts. If the upload fails, a warning has the command for a later attempt. The
token comes from the environment or the hub's own login, and is in no message.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from distillm_cli.errors import UsageError
from distillm_cli.runs import output_dir
from distillm_cli.training.distributed import in_first_process
from distillm_cli.training.events import Listener, Note, Warned
from distillm_cli.utils.text import counted, format_bytes, redact

# Not uploaded: what only a resume needs, stages before the run, and the files of trackers.
_FOLDERS = (output_dir.CHECKPOINTS, *output_dir.STAGES, output_dir.COMPARE, "tensorboard", "wandb")
_LEFT_OUT = ("manifest.json", "trackers.json", ".*", *(f"{folder}/*" for folder in _FOLDERS))


def check_push(name: str | None, *, dry_run: bool) -> None:
    """Raise UsageError, before the run, if its upload could not succeed."""
    if name is None:
        if dry_run:
            raise UsageError("usage.unused_option", "--push-dry-run without --push", hint="add --push NAME, or drop it")
        return
    from huggingface_hub import get_token
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError("usage.invalid_value", f"--push {name}: {error}", hint="give NAME or USER/NAME") from error
    if dry_run:
        return
    if is_offline_mode():
        raise UsageError("usage.cannot_push", f"--push {name}: HF_HUB_OFFLINE is set", hint="unset it, or drop --push")
    if get_token() is None:
        hint = "set HF_TOKEN, or run `hf auth login`; --push-dry-run needs no token"
        raise UsageError("usage.cannot_push", f"--push {name}: no token for the hub", hint=hint)


@in_first_process
def push_output(output: Path, name: str, listener: Listener, *, dry_run: bool) -> str | None:
    """Upload the output directory to the repository ``name``; return its address, None if nothing was uploaded.

    A new repository is private.
    """
    files = pushed_files(output)
    size = format_bytes(sum(path.stat().st_size for path in files))
    what = f"{counted(len(files), 'file')} ({size}) of {output}"
    names = [path.relative_to(output).as_posix() for path in files]
    if dry_run:
        listener(Note(f"--push-dry-run: would upload {what} to {name}: {', '.join(names)}"))
        return None
    from huggingface_hub import HfApi, get_token

    try:
        api = HfApi()
        address = api.create_repo(name, private=True, exist_ok=True)
        message = f"Upload {output.resolve().name}"
        api.upload_folder(repo_id=address.repo_id, folder_path=output, allow_patterns=names, commit_message=message)
    except Exception as error:
        reason = " ".join(redact(str(error)).split())
        if (token := get_token()) is not None:
            reason = reason.replace(token, "…")
        left_out = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in _LEFT_OUT)
        command = f"hf upload {shlex.quote(name)} {shlex.quote(str(output))} . --private {left_out}"
        listener(
            Warned(
                f"nothing was uploaded to {name}: {type(error).__name__}: {reason[:300]}; upload it later: {command}"
            )
        )
        return None
    listener(Note(f"Uploaded {what} to {address}"))
    return str(address)


def pushed_files(output: Path) -> list[Path]:
    """Return the files of an output directory that are uploaded."""
    from huggingface_hub.utils import filter_repo_objects

    files = sorted(path for path in output.rglob("*") if path.is_file())
    names = filter_repo_objects(
        (path.relative_to(output).as_posix() for path in files), ignore_patterns=list(_LEFT_OUT)
    )
    return [output / name for name in names]
