"""Make a task with long answers whose errors compound: sums written out step by step.

    python benchmarks/running_sums.py DIR [--rows 30000]

A row lists twelve numbers; the answer adds them one at a time, as ``37 + 58 = 95; 95 + 64 = 159; …``, about 200 characters.
Each step starts with the sum before it, so an error is carried to the end, and a teacher can continue from a wrong sum.
Writes train.jsonl, valid.jsonl (500 rows) and test.jsonl (500 rows), the same for the same seed.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

NUMBERS = 12


def row(rng: random.Random) -> dict[str, str]:
    """Return a row with its instruction, its numbers and the answer."""
    numbers = [rng.randint(10, 99) for _ in range(NUMBERS)]
    total, steps = numbers[0], []
    for number in numbers[1:]:
        steps.append(f"{total} + {number} = {total + number}")
        total += number
    return {"instruction": "Add.", "input": " ".join(map(str, numbers)), "output": "; ".join(steps)}


def write(place: Path, rows: int, seed: int = 10) -> None:
    """Write the three files. No list of numbers occurs twice."""
    rng = random.Random(seed)
    made: dict[str, dict[str, str]] = {}
    while len(made) < rows + 1000:
        new = row(rng)
        made.setdefault(new["input"], new)
    listed = list(made.values())
    place.mkdir(parents=True, exist_ok=True)
    for name, part in (("valid", listed[:500]), ("test", listed[500:1000]), ("train", listed[1000:])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in part), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path)
    parser.add_argument("--rows", type=int, default=30000)
    args = parser.parse_args()
    write(args.place, args.rows)
