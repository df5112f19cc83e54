"""Data sets of the hub: the real client against a small hub of our own on this machine."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePath

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "a" * 40


def parquet(*records: dict) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(records)), written)
    return written.getvalue()


PARQUET = parquet({"translation": {"de": "ein Hund", "en": "a dog"}})
QUESTIONS = "\n".join(json.dumps({"instruction": f"question {i}", "input": "", "output": f"{i}"}) for i in range(40))
FILES = {
    # As upstream has it: plain-text twins beside the rows, and the test split under the name of another.
    "MiniLLM/dolly": {
        "raw.jsonl": QUESTIONS,
        "raw.txt": "text",
        "valid.jsonl": '{"instruction": "tested", "input": "", "output": ["a", "b"]}',
        "valid.txt": "text",
    },
    "MiniLLM/uinst": {
        "0_2/valid.jsonl": '{"instruction": "short", "output": "x"}',
        "11_/valid.jsonl": '{"instruction": "long", "output": "x"}',
    },
    "knkarthick/samsum": {
        "train.csv": "id,dialogue,summary\n1,A: hi,They greet.\n",
        "validation.csv": "id,dialogue,summary\n2,B: bye,They part.\n",
        "test.csv": 'id,dialogue,summary\n3,"A: one\nB: two",They count.\n',
    },
    "IWSLT/iwslt2017": {"iwslt2017-en-de/test/0000.parquet": PARQUET},
    "someone/sums": {
        "train.jsonl": '{"question": "1 + 1", "answer": "2"}',
        "test.jsonl": '{"question": "2 + 1", "answer": "3"}',
    },
}

SCRIPT = """
import json, sys
from distillm_cli.config.schema import DataConfig
from distillm_cli.data.sources import load_rows
from distillm_cli.errors import DataError
for name, split in (question.split(".") for question in sys.argv[1:]):
    try:
        rows = load_rows(DataConfig(source=name), split)
        print(json.dumps([len(rows), rows[0].instruction, rows[0].where, rows[0].input, rows[0].references]))
    except DataError as error:
        print(json.dumps(str(error)))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as loading JSON lines takes."""

    def answer(self, body: bytes, code: int = 200, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        match = re.match(r"/(?:api/)?datasets/([^/]+/[^/?]+)(?:/(tree|resolve|revision)/[^/?]+/?([^?]*))?", self.path)
        files = FILES.get(match[1]) if match else None
        if files is None:
            self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        elif match[2] == "resolve" and match[3] in files:
            body = files[match[3]]
            self.answer(body if isinstance(body, bytes) else body.encode(), ETag=f'"{match[3]}"')
        elif match[2] == "tree" and (names := self.listed(files, match[3])):
            self.answer(json.dumps(names).encode())
        elif match[2] in ("resolve", "tree"):
            self.answer(b"", 404, X_Error_Code="EntryNotFound")
        else:
            siblings = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": match[1], "sha": COMMIT, "tags": [], "siblings": siblings}).encode())

    @staticmethod
    def listed(files: dict[str, str], folder: str) -> list[dict]:
        inside = [PurePath(name) for name in files if PurePath(folder) in PurePath(name).parents]
        here = {PurePath(folder, path.relative_to(folder).parts[0]) for path in inside}
        kinds = {path: "file" if str(path) in files else "directory" for path in sorted(here)}
        return [{"type": kind, "path": str(path), "size": 1, "oid": COMMIT} for path, kind in kinds.items()]

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def ask(tmp_path):
    """Loads NAME.SPLIT of the small hub in a process of its own (this one is offline for good)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DISTILLM_"))}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}

    def ask(*questions: str, **more: str) -> list:
        command = [sys.executable, "-c", SCRIPT, *questions]
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, check=True, timeout=60)
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield ask
    server.shutdown()
    server.server_close()


def test_sets_of_the_hub(ask):
    said = ask("dolly.train", "dolly.test", "unni.test", "someone/sums.train", "someone/sums.test", "vicuna.test")
    said = [line[:3] if isinstance(line, list) else line for line in said]
    assert said[0][0] == 38  # of 40: two are held out, because this set has no validation rows
    assert said[1] == [1, "tested", "valid.jsonl:1"]
    assert said[2] == [1, "long", "valid.jsonl:1"]
    assert said[3] == [1, "1 + 1", "someone/sums train row 1"]
    assert said[4] == [1, "2 + 1", "someone/sums test row 1"]
    assert "no data set `vicuna`: $DISTILLM_DATA is not set, and MiniLLM/Vicuna is not on the hub (404" in said[5]
    # What was downloaded once is there without a network.
    again = ask("dolly.test", "someone/sums.test", HF_HUB_OFFLINE="1")
    assert [line[:3] for line in again] == [said[1], said[4]]


def test_sets_whose_columns_are_their_own(ask):
    said = ask("samsum.test", "samsum.valid", "iwslt.test", "iwslt.train", HF_HUB_DISABLE_XET="1")
    assert said[0] == [1, "Summarize the conversation.", "test.csv:2", "A: one\nB: two", ["They count."]]
    assert said[1][3:] == ["B: bye", ["They part."]]
    assert said[2] == [1, "Translate English to German.", "0000.parquet row 1", "a dog", ["ein Hund"]]
    assert "cannot be read from the hub" in said[3]
