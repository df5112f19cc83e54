"""Print the computed tables of docs/scale.md: the memory and network traffic that ``distillm plan`` predicts.

    python docs/make_scale_tables.py

The models are given by their configs alone, as published. A test compares the output with the page.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

GB = 1e9


def llama(layers: int, width: int, inner: int, heads: int, *, tied: bool) -> dict[str, Any]:
    """Return the config of a Llama 3, with 128,256 tokens and eight key-value heads."""
    return {
        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner,
        "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
    }  # fmt: skip


MODELS = {
    "1B": llama(16, 2048, 8192, 32, tied=True),
    "8B": llama(32, 4096, 14336, 32, tied=False),
    "70B": llama(80, 8192, 28672, 64, tied=False),
    "405B": llama(126, 16384, 53248, 128, tied=False),
}
# Pair, processes, train.shard.
RUNS = (
    ("8B", "1B", 1, "none"),
    ("8B", "1B", 8, "none"),
    ("8B", "1B", 8, "full"),
    ("70B", "8B", 8, "none"),
    ("70B", "8B", 8, "full"),
    ("405B", "70B", 64, "none"),
    ("405B", "70B", 64, "full"),
)
PARTS = {
    "weights, gradients, AdamW": ("student_weights", "gradients", "optimizer"),
    "gathered": ("gathered_weights",),
    "bf16 copies": ("cast_weights", "rollout_weights"),
    "activations, loss, keys and values": ("activations", "loss", "rollout_cache", "teacher_activations"),
    "teacher": ("teacher_weights",),
}


def planned(directory: Path, teacher: str, student: str, processes: int, shard: str) -> dict[str, Any]:
    """Return the plan of a run with eight sequences of at most 512 tokens for each process and step."""
    import distillm_cli

    result = distillm_cli.plan(
        teacher=str(directory / teacher), student=str(directory / student), data="builtin", batch_size=8,
        processes=processes, max_length=512, dtype="bf16", teacher_cache="off",
        **{"train.accumulate": processes, "train.gradient_checkpointing": True, "train.shard": shard, "rollout.bulk": 1},
    )  # fmt: skip
    return result.as_json()


def tables() -> str:
    """Return the tables in Markdown."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for model, config in MODELS.items():
            (directory / model).mkdir()
            (directory / model / "config.json").write_text(json.dumps(config))
        lines = [f"| teacher → student | processes | `train.shard` | {' | '.join(PARTS)} | peak | sent in a step |"]
        lines.append("|---" * (len(PARTS) + 5) + "|")
        for teacher, student, processes, shard in RUNS:
            plan = planned(directory, teacher, student, processes, shard)
            memory = plan["memory"]
            sizes = [_gb(sum(memory.get(part, 0) for part in parts)) for parts in PARTS.values()]
            sent = _gb(plan["processes"]["network_bytes"]) if processes > 1 else "–"
            cells = [f"{teacher} → {student}", str(processes), shard, *sizes, _gb(memory["total"]), sent]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gb(size: float) -> str:
    return f"{size / GB:.2g}" if size < 10 * GB else f"{size / GB:.0f}"


if __name__ == "__main__":
    print(tables(), end="")
