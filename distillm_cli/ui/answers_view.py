"""Draw the answers of one or two models to a message."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text


def answers_side_by_side(answers: Mapping[str, str]) -> RenderableType:
    """Return the answers, by model; several are columns with the models' names above."""
    if len(answers) == 1:
        return Text(*answers.values())
    grid = Table.grid(padding=(0, 3, 0, 0), expand=True)
    for _ in answers:
        grid.add_column(ratio=1, overflow="fold")
    grid.add_row(*(Text(name, "dim") for name in answers))
    grid.add_row(*map(Text, answers.values()))
    return grid


def answer_lines(answers: Mapping[str, str]) -> str:
    """Return the answers for a file or a pipe; of several, each begins with its model's name."""
    if len(answers) == 1:
        return "".join(f"{text}\n" for text in answers.values())
    return "".join(f"{name}: {text}\n" for name, text in answers.items())
