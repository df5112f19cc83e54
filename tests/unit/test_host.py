"""Test how much memory a process may take, and the reuse of freed memory."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

from distillm_cli.utils import memory
from distillm_cli.utils.memory import available_memory
from distillm_cli.utils.threads import cores
from tests import tiny
from tests.command_line import call

GB = 10**9


def fake_system(root, *, free_kb=None, group="/", **groups):
    """Write the files in which Linux shows memory limits, and return their root.

    groups: name of a control group (``top`` or one below it) → (limit, used, page cache).
    """
    (root / "proc/self").mkdir(parents=True)
    if free_kb is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {free_kb} kB\n")
    (root / "proc/self/cgroup").write_text(f"0::{group}\n")
    for name, (limit, used, cache) in groups.items():
        directory = root / "sys/fs/cgroup" / ("" if name == "top" else name)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "memory.max").write_text(f"{limit}\n")
        (directory / "memory.current").write_text(f"{used}\n")
        (directory / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    return root


def test_available_memory_is_that_of_the_machine(tmp_path):
    assert available_memory(fake_system(tmp_path, free_kb=8_000_000)) == 8_192_000_000


def test_container_limit_applies_and_page_cache_is_free(tmp_path):
    root = fake_system(tmp_path, free_kb=8_000_000, top=(4 * GB, 3 * GB, 2 * GB))
    assert available_memory(root) == 3 * GB


def test_lowest_limit_of_the_parent_groups_applies(tmp_path):
    root = fake_system(tmp_path, free_kb=8_000_000, group="/jobs", top=(2 * GB, GB, 0), jobs=("max", GB, 0))
    assert available_memory(root) == GB


def test_this_machine_has_available_memory():
    assert available_memory() > 0


@pytest.mark.long
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc's malloc")
@pytest.mark.parametrize(
    "environment_settings", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}], ids=["default", "environment"]
)
def test_freed_memory_is_reused_until_it_is_returned(environment_settings):
    """Count the page faults for large tensors that are allocated, written and freed one after the other."""
    script = """
import json, resource, torch
from pathlib import Path
from distillm_cli.utils import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.empty(10 << 20).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
found = {"before": faults()}
memory.keep_freed_memory()
faults()
found |= {"reused": faults(), "resident": resident()}
memory.return_freed_memory()
print(json.dumps(found | {"given back": resident()}))
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in memory._MALLOC_SETTINGS
    } | environment_settings
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if environment_settings:
        assert found["reused"] > found["before"] / 2
    else:
        assert found["reused"] < found["before"] / 20
        assert found["given back"] < found["resident"] - 40e6


def test_threads_are_limited_to_the_cores():
    """Check in a subprocess, because torch aborts with a million threads."""
    asked = [None, 1, cores() + 1, 10**6, 2**70]
    script = """
import json, sys, torch
from distillm_cli.utils.threads import set_threads
for threads in json.loads(sys.argv[1]):
    before, events = torch.get_num_threads(), []
    set_threads(threads, events.append)
    print(json.dumps([before, torch.get_num_threads(), [event.text for event in events]]))
    torch.ones(300, 300) @ torch.ones(300, 300)
"""
    done = subprocess.run([sys.executable, "-c", script, json.dumps(asked)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for threads, line in zip(asked, done.stdout.splitlines(), strict=True):
        before, after, events = json.loads(line)
        assert after == (before if threads is None else min(threads, cores()))
        assert len(events) == (threads is not None and threads > cores())
        assert all(f"train.threads = {threads} is more than {cores()} CPU core" in text for text in events)


@pytest.mark.parametrize("command", ["sft", "generate"])
def test_commands_limit_threads_to_the_cores(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "a {c}", "completion": "b"}}\n' for c in "cdefghijkl"))
    argv = {
        "sft": "sft --model model --data rows.jsonl --steps 1 --output run --set eval.report_rows=0",
        "generate": "generate --model model --prompt a --template plain --max-new-tokens 2 --output o.jsonl",
    }[command]
    code, _, err = call(capsys, *argv.split(), "--set", "train.threads=999999999999", "--quiet", "--json")
    torch.set_num_threads(1)
    assert code == 0
    assert err.startswith("warning: train.threads = 999999999999 is more than ")
