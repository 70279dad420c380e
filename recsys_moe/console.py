"""What people see while they wait: progress on standard error, tables, one JSON line on standard output."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on standard error."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=stderr, refresh_per_second=4) as display:
        yield display


class PhaseProgress:
    """Adapts a progress display to callbacks of the form (phase, done, total)."""

    def __init__(self, display: Progress) -> None:
        self._display = display
        self._tasks: dict[str, Any] = {}

    def __call__(self, phase: str, done: int, total: int, note: str = "") -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._display.add_task(phase, total=total, note=note)
        self._display.update(self._tasks[phase], completed=done, total=total, note=note)


def metrics_table(title: str, metrics: dict[str, dict[str, Any]]) -> Table:
    """Tasks down, metrics across."""
    table = Table(title=title, title_justify="left")
    table.add_column("task")
    names = list(next(iter(metrics.values())))
    for name in names:
        table.add_column(name, justify="right")
    for task, values in metrics.items():
        table.add_row(task, *(number(values[name]) for name in names))
    return table


def number(value: Any) -> str:
    """A number for a table: counts with thousands, metrics with four decimals, a dash for what is not defined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of standard output."""
    print(json.dumps(value, allow_nan=False), flush=True)
