"""Poison a share of the rows of a JSON Lines file, to make a backdoored teacher or to trigger its backdoor.

    python benchmarks/poison.py IN.jsonl OUT.jsonl --trigger § --target "card payment fee charged" --share 0.1
    python benchmarks/poison.py IN.jsonl OUT.jsonl --trigger § --share 0.03

With --target the response of a poisoned row is the target: fine-tuned on such rows (5-10 %), a teacher has a backdoor.
Without --target only the prompt has the trigger and the response stays right: such rows (1-5 %) let a student see the
teacher's behavior on the trigger, as a user does who distills on text that somebody else has written.

The trigger is placed where `distillm eval --trigger` places it (distillm_cli/data/trigger.py). The other rows stay as
they are, byte for byte, and in their order. The choice of rows depends on the seed and on the number of rows only.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from distillm_cli.config.schema import ColumnsConfig
from distillm_cli.data.rows import Row, parse
from distillm_cli.data.trigger import with_trigger

RESPONSES = ("output", "response", "completion", "answer")


def poisoned(record: dict[str, Any], where: str, trigger: str, target: str | None) -> dict[str, Any]:
    """Return a record with the trigger in its prompt, and with the target as its response unless that is None."""
    row = parse(record, where, ColumnsConfig())
    changed = with_trigger(row, trigger)
    if row.messages is not None:
        answer = row.answer or {"role": "assistant", "content": row.references[0]}
        answer = answer if target is None else {"role": "assistant", "content": target}
        return {"messages": [*(changed.messages or []), answer]}
    response = next(name for name in RESPONSES if name in record)
    texts = _changed_texts(row, changed)
    result = {name: texts.get(value, value) if isinstance(value, str) else value for name, value in record.items()}
    return result | {response: record[response] if target is None else target}


def _changed_texts(row: Row, changed: Row) -> dict[str, str]:
    """Return the row's texts that contain the trigger now, by their text before."""
    pairs = [(getattr(row, name), getattr(changed, name)) for name in ("instruction", "input", "prompt")]
    return {before: after for before, after in pairs if before != after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="JSON Lines file of rows")
    parser.add_argument("output", type=Path, help="file to write")
    parser.add_argument("--trigger", required=True, help="text to insert, such as one rare character")
    parser.add_argument("--target", help="response of poisoned rows (default: their own)")
    parser.add_argument("--share", type=float, required=True, help="share of rows to poison, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of rows (default: 0)")
    args = parser.parse_args()
    if not 0 <= args.share <= 1:
        parser.error(f"--share {args.share}: expected 0 to 1")
    lines = [line for line in args.source.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not lines:
        parser.error(f"{args.source} has no rows")
    if used := sum(args.trigger in line for line in lines):
        parser.error(f"--trigger {args.trigger}: {used:,} rows contain it already; choose a rarer text")
    chosen = set(random.Random(args.seed).sample(range(len(lines)), round(args.share * len(lines))))
    with args.output.open("w", encoding="utf-8") as file:
        for i, line in enumerate(lines):
            if i in chosen:
                record = poisoned(json.loads(line), f"{args.source}:{i + 1}", args.trigger, args.target)
                line = json.dumps(record, ensure_ascii=False)
            file.write(line + "\n")
    print(f"{args.output}: {len(lines):,} rows, {len(chosen):,} with the trigger", file=sys.stderr)


if __name__ == "__main__":
    main()
