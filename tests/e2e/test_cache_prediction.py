"""Compare the teacher cache that `distillm plan` predicts with the cache of a tiny run."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from distillm_cli.config.load import resolve
from distillm_cli.runs.cache_size import CacheWorkload
from distillm_cli.runs.defaults import fitted
from distillm_cli.runs.plan import plan_from_configs
from tests.marks import long

FIELDS = [
    "data.size=60",
    "data.seed=3",
    "data.template=plain",
    "data.max_length=64",
    "data.max_prompt_length=40",
    "data.valid_limit=6",
    "rollout.max_new_tokens=12",
    "schedule.phi=0.6",
    "train.device=cpu",
    "train.steps=30",
    "train.batch_size=4",
    "train.lr=0.003",
    "train.warmup=0",
    "train.save_steps=10",
    "train.select=valid_divergence",
    "eval.report_rows=0",
    "student.dtype=fp32",
    "teacher.dtype=fp32",
]
MODELS = ["--teacher", "builtin", "--student", "random:1x32", "--data", "builtin"]


def arguments(*fields: str) -> list[str]:
    return [*MODELS, "--json", *(word for field in (*FIELDS, *fields) for word in ("--set", field))]


@pytest.mark.parametrize("mode", ["auto", long("memory"), long("disk")])
def test_cache_has_the_planned_size(mode, cli, tmp_path):
    more = (f"teacher.cache={mode}", f"teacher.cache_dir={tmp_path / 'cache'}")
    _, plan, err = cli("plan", *arguments(*more))
    predicted = plan["teacher_cache"]
    code, result, err = cli("distill", *arguments(*more), "--output", "run")
    assert code == 0, err
    cache = result["teacher_cache"]
    assert (predicted["mode"], predicted["bytes"]) == (cache["mode"], cache["bytes"])
    assert cache["bytes"] > 0
    if mode == "disk":
        assert sum(file.stat().st_size for file in (tmp_path / "cache").rglob("states*")) >= cache["bytes"]
    rollouts = [
        sum(t.numel() * t.element_size() for name, t in load_file(file).items() if name.endswith(".teacher_hidden"))
        for file in (tmp_path / "run" / "checkpoints").glob("*/training.safetensors")
    ]
    assert 0 < max(rollouts) <= predicted["rollout_bytes"], "the replay buffer is not larger than predicted"
    assert plan["memory"]["rollout_states"] == predicted["rollout_bytes"]


@pytest.mark.parametrize("mode", ["memory", "auto"])
def test_plan_from_configs_predicts_the_same_cache(mode, cli):
    more = (f"teacher.cache={mode}",)
    _, plan, _ = cli("plan", *arguments(*more))
    shapes, _ = plan_from_configs(fitted(resolve(command="plan", flags=flags(), sets=[*FIELDS, *more])))
    for key in ("bytes", "rollout_bytes", "sample_bytes", "rows"):
        assert shapes["teacher_cache"][key] == plan["teacher_cache"][key], key


def flags() -> dict[str, str]:
    return {"teacher.path": "builtin", "student.path": "random:1x32", "data.source": "builtin"}


def workload(**changes) -> CacheWorkload:
    recipe = resolve(command="distill", flags=flags(), sets=["data.max_length=64", "train.batch_size=4"]).recipe
    facts = {"rows": 100, "row_tokens": 1000, "steps": 50, "steps_per_epoch": 25, "validation_tokens": 80}
    return CacheWorkload(recipe, **{"bytes_per_token": 256, **facts, **changes})


def test_auto_uses_memory_if_a_quarter_is_enough():
    size = workload().size("auto").total
    assert size > 1000 * 256
    assert workload().choose(4 * size)[0] == "memory"
    assert workload().choose(None)[0] == "memory"
    mode, reason = workload().choose(4 * size - 4)
    assert (mode, "more than a quarter" in reason) == ("off", True)


def test_auto_caches_rows_only_for_several_epochs():
    single_epoch = workload(steps=25)
    assert (single_epoch.size("auto").rows, single_epoch.size("memory").rows) == (0, 256_000)
    assert workload().size("auto").rows == 256_000
    assert workload().size("off").total == 0
    assert workload().size("disk").in_memory("disk")["teacher_states"] == 0, "a cache on disk is memory-mapped"
