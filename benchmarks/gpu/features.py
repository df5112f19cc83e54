"""Run what only a GPU can: quantized teachers, 8-bit optimizers, a teacher placed by a device map, NCCL with one process."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import error_line
from whole_runs import last_json, save_models, save_rows

from distillm_cli.config.schema import TeacherConfig, TrainConfig


def nccl_world_of_one(device: torch.device) -> dict[str, Any]:
    """Sum a tensor in a process group of one process: NCCL on a GPU, gloo elsewhere."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group(backend, rank=0, world_size=1)
    tensor = torch.ones(1 << 20, device=device)
    torch.distributed.all_reduce(tensor)
    total = float(tensor.sum())
    torch.distributed.destroy_process_group()
    if total != 1 << 20:
        raise RuntimeError(f"the sum is {total}")
    return {"check": f"{backend}, world of one", "result": "ok"}


def rows(context: Any) -> Iterator[dict[str, Any]]:
    try:
        yield nccl_world_of_one(context.device)
    except Exception as error:
        yield {"check": "world of one", "result": error_line(error)}
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    runs: dict[str, list[str]] = {"plain": []}
    if context.device.type == "cuda":
        runs["train.loss_kernel auto"] = ["train.loss_kernel=auto"]
    else:
        yield {"skipped": "train.loss_kernel auto: needs a GPU"}
    for bits in ("8bit", "4bit"):
        if has_bitsandbytes:
            runs[f"teacher.quantize {bits}"] = [f"teacher.quantize={bits}"]
        else:
            yield {"skipped": f"teacher.quantize {bits}: bitsandbytes is not installed"}
    for name in ("adamw_8bit", "paged_adamw_8bit", "adafactor"):
        if "optimizer" not in TrainConfig.model_fields:
            yield {"skipped": f"train.optimizer {name}: this version has no train.optimizer"}
        elif "8bit" in name and not has_bitsandbytes:
            yield {"skipped": f"train.optimizer {name}: bitsandbytes is not installed"}
        else:
            runs[f"train.optimizer {name}"] = [f"train.optimizer={name}"]
    if "device_map" in TeacherConfig.model_fields:
        runs["teacher.device_map auto"] = ["teacher.device_map=auto"]
    else:
        yield {"skipped": "teacher.device_map: this version has none"}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_rows(directory, save_models(directory, context.tiny), 16, 6, 6)
        command = [
            sys.executable, "-m", "distillm_cli", "distill", "--teacher", str(directory / "teacher"), "--student",
            str(directory / "student"), "--data", str(directory / "rows.jsonl"), "--steps", "3", "--batch-size", "4",
            "--set", "data.template=plain", "--set", "eval.report_rows=0", "--method", "kd", "--json", "--quiet",
        ]  # fmt: skip
        losses: dict[str, float] = {}
        for label, fields in runs.items():
            if context.remaining < 5:
                yield {"skipped": f"{label}: out of time"}
                continue
            sets = [word for field in fields for word in ("--set", field)]
            try:
                found = last_json([*command, *sets, "--output", str(directory / label)], context.remaining)
            except Exception as error:
                yield {"check": label, "result": error_line(error)}
                continue
            losses[label] = found["train_loss"]
            yield {"check": label, "result": "ok", "train loss": losses[label], "plain": losses.get("plain")}
