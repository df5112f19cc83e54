"""How much memory a process may take, on systems that say so in different ways; and what it does with what is freed."""

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
from tests.typed import call

GB = 10**9


def system(root, *, free_kb=None, group="/", **groups):
    """Files as Linux shows them. groups: name of a control group (``top`` or below it) → (limit, used, page cache)."""
    (root / "proc/self").mkdir(parents=True)
    if free_kb is not None:
        (root / "proc/meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {free_kb} kB\n")
    (root / "proc/self/cgroup").write_text(f"0::{group}\n")
    for name, (limit, used, cache) in groups.items():
        place = root / "sys/fs/cgroup" / ("" if name == "top" else name)
        place.mkdir(parents=True, exist_ok=True)
        (place / "memory.max").write_text(f"{limit}\n")
        (place / "memory.current").write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    return root


def test_the_machine_says_what_is_available(tmp_path):
    assert available_memory(system(tmp_path, free_kb=8_000_000)) == 8_192_000_000


def test_a_container_with_less_counts_and_page_cache_is_free(tmp_path):
    root = system(tmp_path, free_kb=8_000_000, top=(4 * GB, 3 * GB, 2 * GB))
    assert available_memory(root) == 3 * GB


def test_the_tightest_group_above_the_process_counts(tmp_path):
    root = system(tmp_path, free_kb=8_000_000, group="/jobs", top=(2 * GB, GB, 0), jobs=("max", GB, 0))
    assert available_memory(root) == GB


def test_this_machine_has_some():
    assert available_memory() > 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc's malloc")
@pytest.mark.parametrize("told", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}], ids=["", "environment"])
def test_freed_memory_is_kept_for_the_next_tensor_until_it_is_given_back(told):
    """Large tensors, one after the other, each written to: how many pages the system had to clear for them."""
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
found = {"as it is": faults()}
memory.keep_freed_memory()
faults()
found |= {"kept": faults(), "resident": resident()}
memory.return_freed_memory()
print(json.dumps(found | {"given back": resident()}))
"""
    environment = {name: value for name, value in os.environ.items() if name not in memory._MALLOC_SETTINGS} | told
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if told:
        assert found["kept"] > found["as it is"] / 2
    else:
        assert found["kept"] < found["as it is"] / 20
        assert found["given back"] < found["resident"] - 40e6


@pytest.mark.parametrize("wanted", [None, 1, cores() + 1, 10**6, 2**70])
def test_threads_are_at_most_the_cores(wanted):
    """In a process of its own: with a million torch ends it."""
    script = """
import json, sys, torch
from distillm_cli.utils.threads import set_threads
before, told = torch.get_num_threads(), []
set_threads(json.loads(sys.argv[1]), told.append)
print(json.dumps([before, torch.get_num_threads(), [event.text for event in told]]))
torch.ones(300, 300) @ torch.ones(300, 300)
"""
    done = subprocess.run([sys.executable, "-c", script, json.dumps(wanted)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, told = json.loads(done.stdout)
    assert after == (before if wanted is None else min(wanted, cores()))
    assert len(told) == (wanted is not None and wanted > cores())
    assert all(f"train.threads = {wanted} is more than {cores()} CPU core" in text for text in told)


@pytest.mark.parametrize("command", ["sft", "generate"])
def test_every_command_that_computes_keeps_to_the_cores(tmp_path, capsys, monkeypatch, command):
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
