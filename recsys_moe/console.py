"""What people see while they wait: progress on standard error, tables, one JSON line on standard output."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from recsys_moe.metrics import QUALITY_NAMES

# What is no terminal has no width to keep to: a file or a pipe gets every line whole.
_ENDLESS = 10_000

# Paths and messages are data: brackets in them are no markup, `:x:` is no picture.
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False, width=None if sys.stderr.isatty() else _ENDLESS)
stdout = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else _ENDLESS)

# Eight figures and a task's name fit into 80 columns.
_HEADERS = {"gauc_left_out": "left\nout", "calibration": "calib."}


@contextmanager
def progress() -> Iterator[Progress]:
    """A progress display on standard error."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=stderr, refresh_per_second=4) as display:
        yield display


class PhaseProgress:
    """Adapts a progress display to callbacks of the form (phase, done, total); None: nobody knows yet."""

    def __init__(self, display: Progress) -> None:
        self._display = display
        self._tasks: dict[str, Any] = {}

    def __call__(self, phase: str, done: int, total: int | None, note: str = "") -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._display.add_task(phase, total=total, note=note)
        self._display.update(self._tasks[phase], completed=done, total=total, note=note)

    def training(self, event: dict[str, Any], unit: str) -> None:
        """Show what every trainer tells alike: warnings, where it starts and goes on, loss and speed in `unit` a second."""
        kind = event["kind"]
        if kind == "warning":
            stderr.print(f"warning: {event['message']}", style="yellow", soft_wrap=True)
        elif kind == "start":
            self("train", event["step"], event["total_steps"])
        elif kind == "resume":
            epoch = f", in epoch {event['epoch'] + 1}" if "epoch" in event else ""
            stderr.print(f"going on from step {event['step']:,}{epoch}", soft_wrap=True)
        elif kind in ("step", "epoch"):
            note = f"loss {event['train.loss']:.4f}  {event[f'train.{unit}_per_s']:,.0f} {unit}/s"
            self("train", event["step"], event["total_steps"], note)


def print_metrics(title: str, metrics: dict[str, dict[str, Any]], console: Console = stdout) -> None:
    """Tasks down, metrics across, a table for each kind of task; whole even where the terminal is too narrow for it. GAUC
    only where one is known."""
    console.print(title, style="bold", soft_wrap=True)
    kinds: dict[tuple[str, ...], dict[str, Any]] = {}
    for task, values in metrics.items():
        kinds.setdefault(tuple(values), {})[task] = values
    for kind in kinds.values():
        _print_table(kind, console)


def _print_table(metrics: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
    table.add_column("task", no_wrap=True)
    grouped = any(values.get("gauc") is not None or values.get("gauc_left_out") for values in metrics.values())
    names = [name for name in next(iter(metrics.values())) if grouped or not name.startswith("gauc")]
    for name in names:
        table.add_column(_HEADERS.get(name, name), justify="right", vertical="bottom", no_wrap=True)
    for task, values in metrics.items():
        table.add_row(task, *(number(values[name]) for name in names))
    table.width = Measurement.get(console, console.options.update(width=_ENDLESS), table).maximum
    console.print(table, crop=False)


def qualities(metrics: dict[str, dict[str, Any]]) -> str:
    """Each task's quality, which is the first of its metrics, under its name where that changes.

    >>> qualities({"like": {"auc": 0.7, "rows": 9}, "share": {"auc": 0.6}, "minutes": {"r2": 0.5}})
    'AUC  like 0.7000  share 0.6000  R²  minutes 0.5000'
    """
    words, last = [], ""
    for task, values in metrics.items():
        name, value = next(iter(values.items()))
        if name != last:
            words.append(QUALITY_NAMES[name])
        words.append(f"{task} {number(value)}")
        last = name
    return "  ".join(words)


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]], console: Console = stdout) -> None:
    """Text in columns; what is too long for the terminal is folded."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold", soft_wrap=True)
    console.print(table)


def number(value: Any) -> str:
    """A number for a table: counts with thousands, metrics with four decimals, a dash for what is not defined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on one line of standard output."""
    print(json.dumps(value, allow_nan=False), flush=True)
