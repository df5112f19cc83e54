"""Test data sets of the hub: the real client against a small local hub server."""

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
    # Like the original repository: text files next to the rows, and the test split under another name.
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
        print(json.dumps([error.code, str(error)]))
"""


class FakeHub(BaseHTTPRequestHandler):
    """Serve the endpoints of the hub that loading data sets needs."""

    def respond(self, body: bytes, code: int = 200, **headers: str) -> None:
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
            self.respond(b"{}", 404, X_Error_Code="RepoNotFound")
        elif match[2] == "resolve" and match[3] in files:
            body = files[match[3]]
            self.respond(body if isinstance(body, bytes) else body.encode(), ETag=f'"{match[3]}"')
        elif match[2] == "tree" and (names := self.list_folder(files, match[3])):
            self.respond(json.dumps(names).encode())
        elif match[2] in ("resolve", "tree"):
            self.respond(b"", 404, X_Error_Code="EntryNotFound")
        else:
            siblings = [{"rfilename": name} for name in files]
            self.respond(json.dumps({"id": match[1], "sha": COMMIT, "tags": [], "siblings": siblings}).encode())

    @staticmethod
    def list_folder(files: dict[str, str], folder: str) -> list[dict]:
        inside = [PurePath(name) for name in files if PurePath(folder) in PurePath(name).parents]
        here = {PurePath(folder, path.relative_to(folder).parts[0]) for path in inside}
        kinds = {path: "file" if str(path) in files else "directory" for path in sorted(here)}
        return [{"type": kind, "path": str(path), "size": 1, "oid": COMMIT} for path, kind in kinds.items()]

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def load(tmp_path):
    """Return a function that loads NAME.SPLIT from the local hub in a subprocess, as this process is always offline."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DISTILLM_"))}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}

    def load(*names_and_splits: str, **more: str) -> list:
        command = [sys.executable, "-c", SCRIPT, *names_and_splits]
        done = subprocess.run(command, env=env | more, capture_output=True, text=True, check=True, timeout=60)
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield load
    server.shutdown()
    server.server_close()


@pytest.mark.long
def test_hub_datasets_load(load):
    loaded = load("dolly.train", "dolly.test", "unni.test", "someone/sums.train", "someone/sums.test", "vicuna.test")
    loaded = [line[:3] for line in loaded]
    assert loaded[0][0] == 38  # of 40: two are held out, because the data set has no validation rows
    assert loaded[1] == [1, "tested", "valid.jsonl:1"]
    assert loaded[2] == [1, "long", "valid.jsonl:1"]
    assert loaded[3] == [1, "1 + 1", "someone/sums train row 1"]
    assert loaded[4] == [1, "2 + 1", "someone/sums test row 1"]
    code, message = loaded[5]
    assert code == "data.not_found"
    assert all(text in message for text in ("`vicuna`", "$DISTILLM_DATA", "MiniLLM/Vicuna", "404"))
    # Downloaded files are used without a network.
    offline = load("dolly.test", "someone/sums.test", HF_HUB_OFFLINE="1")
    assert [line[:3] for line in offline] == [loaded[1], loaded[4]]


def test_hub_datasets_with_known_columns_load(load):
    loaded = load("samsum.test", "samsum.valid", "iwslt.test", "iwslt.train", HF_HUB_DISABLE_XET="1")
    assert loaded[0] == [1, "Summarize the conversation.", "test.csv:2", "A: one\nB: two", ["They count."]]
    assert loaded[1][3:] == ["B: bye", ["They part."]]
    assert loaded[2] == [1, "Translate English to German.", "0000.parquet row 1", "a dog", ["ein Hund"]]
    assert loaded[3][0] == "data.not_found"
