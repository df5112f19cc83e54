"""A process of its own that reads and tokenizes rows, so that imports here do not wait for the interpreter's lock.

It does what it was asked, in order, and nothing else. What goes wrong in it is not told: whoever asked does the work
instead, meets it again, and says so in its own turn.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distillm_cli.config.schema import DataConfig
from distillm_cli.data.sources import Rows, load_rows
from distillm_cli.data.templates import Renderer
from distillm_cli.data.token_ids import CHUNK, TokenIds, chunks, rules_for, token_ids
from distillm_cli.training.events import Event
from distillm_cli.utils.host import cores

_MAIN = "import sys; sys.path[:] = {path!r}; from distillm_cli.data.helper import main; main()"


class Lost(Exception):
    """The process could not do what it was asked, or is not there any more."""


class Helper:
    """The process, seen from here. Its answers, each once: training rows, held-out rows, rules, then ids chunk by chunk.

    find: as of ``rules_for``; can be pickled. Raises OSError where no process can be started.
    """

    def __init__(self, data: DataConfig, find: Callable[[], Path | None], require_output: bool = True):
        task = pickle.dumps((data, find, require_output), protocol=pickle.HIGHEST_PROTOCOL)
        command = [sys.executable, "-c", _MAIN.format(path=sys.path)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        try:
            self._process.stdin.write(task)
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # told by the first answer

    def rows(self) -> tuple[Rows, list[Event]]:
        """Those of the next split, and what was said while they were read. Raises Lost, as all of these."""
        return self._next()

    def rules(self) -> str | None:
        """As of ``rules_for``, as text."""
        return self._next()

    def ids(self) -> list[TokenIds]:
        """Return those of the next chunk."""
        prompts, responses, moved = self._next()
        parts = zip(np.split(*prompts), np.split(*responses), moved, strict=True)
        return [TokenIds(prompt, response, moved=spans) for prompt, response, spans in parts]

    def _next(self) -> Any:
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise Lost from error

    def stop(self) -> None:
        """Wherever it is. Who waits for an answer gets Lost."""
        self._process.kill()
        self._process.wait()


def _answers(data: DataConfig, find: Callable[[], Path | None], require_output: bool) -> Iterator[Any]:
    sources = []
    for split in ("train", "valid"):
        said: list[Event] = []
        sources.append(load_rows(data, split, listener=said.append, require_output=require_output))
        yield sources[-1], said
    renderer = Renderer(data)
    rules = rules_for(sources, renderer, find)
    yield None if rules is None else rules.to_str()
    for rows, at in chunks(sources) if rules is not None else ():
        made = token_ids([renderer.text(row) for row in rows[at : at + CHUNK]], rules)
        yield _flat([ids.prompt for ids in made]), _flat([ids.response for ids in made]), [ids.moved for ids in made]


def _flat(ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return one array, and where all parts but the last end: one array is sent sooner than five hundred."""
    return np.concatenate(ids), np.cumsum([len(one) for one in ids])[:-1]


def main() -> None:
    """The process, seen from inside: a pickled task on standard input, pickled answers on standard output."""
    # A core is left to whoever waits: the tokenizers' own threads would take all of them.
    os.environ.setdefault("RAYON_NUM_THREADS", str(max(1, cores() - 1)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started it, who then stops it
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed must not stand between them
        for answer in _answers(*pickle.load(sys.stdin.buffer)):
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
