"""A first look at somebody's log rows: what is in each column, and a schema to train on them with.

What is proposed is meant to run as it is and to err on the safe side: a column that may be known only after the event, or
that gives a label away, is left out of the features and listed under `outcomes`, with the reason beside it.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from recsys_moe.errors import UserError
from recsys_moe.looks import ID, Column, encoded, look_at, percent, printable, short, words
from recsys_moe.sampling import read_sample
from recsys_moe.schema import BUCKET_SUFFIX, MISSING_SUFFIX
from recsys_moe.sources import DataConfig, list_files
from recsys_moe.storage import AnyPath
from recsys_moe.targets import mark_labels, mark_leaks, named_task, suspected_tasks

_YAML_WORDS = ("yes", "no", "on", "off", "true", "false", "null", "y", "n")
_GROUPS = (
    "user",
    "uid",
    "member",
    "customer",
    "visitor",
    "viewer",
    "account",
    "person",
    "client",
    "device",
    "session",
    "query",
)
_TASK_KEYS = ("name", "kind", "label", "log1p", "classes", "levels")

COLUMN_TITLES = ("column", "type", "values", "missing", "proposed as", "what they are", "why")


@dataclass(frozen=True)
class Description:
    """The columns, the tasks (named, or else suspected), what else the schema says, and the schema's text."""

    source: AnyPath
    rows: int
    sampled: int
    columns: tuple[Column, ...]
    tasks: tuple[dict[str, Any], ...]
    named: bool
    group: str | None
    time: str | None
    schema: str = ""

    def train_command(self, schema: Path | None) -> str:
        """What to run next."""
        if not self.named or schema is None:
            chosen = [task["column"] for task in self.tasks][: None if self.named else 1] or ["COLUMN"]
            labels = [part for column in chosen for part in ("--label", column)]
            return shlex.join(["recsys-moe", "data", "describe", str(self.source), *labels, "--output", "schema.yaml"])
        name = re.sub(r"[^A-Za-z0-9_-]+", "_", self.source.name.split(".")[0]) or "mine"
        split = ["data.split.order=sorted", f"data.split.by={self.time}"] if self.time else []
        keys = ["data=custom", f"data.name={name}", f"data.schema={schema}", f"data.source={self.source}", *split]
        return shlex.join(["recsys-moe", "train", *keys])

    def table(self) -> list[tuple[str, ...]]:
        """A row of printable text for each column, under COLUMN_TITLES."""
        rows = []
        for c in self.columns:
            use = c.feature["kind"] if c.use == "feature" else c.use
            distinct = "" if c.distinct is None else f"{c.distinct:,}"
            missing = percent(c.missing) if c.missing else ""
            rows.append((c.name, c.type, distinct, missing, use, c.values, c.note))
        return [tuple(map(printable, row)) for row in rows]

    def to_json(self) -> dict[str, Any]:
        hidden = ("task", "same_as")
        shown = (asdict(c if c.use == "feature" else replace(c, feature={})) for c in self.columns)
        columns = [{k: v for k, v in column.items() if k not in hidden} for column in shown]
        tasks = [{k: v for k, v in task.items() if k != "column"} for task in self.tasks]
        return {
            "source": str(self.source),
            "rows": self.rows,
            "sampled": self.sampled,
            "columns": columns,
            "tasks": tasks,
            "named": self.named,
            "group": self.group,
            "time": self.time,
            "schema": self.schema,
        }


def describe(
    source: AnyPath, labels: Sequence[str] = (), progress: Callable[[int, int], None] = lambda done, total: None
) -> Description:
    """Look at a Parquet or CSV file, or at a folder of them, and propose a schema.

    `labels` are columns, or `NAME=EXPRESSION`: of two values a binary task is made, of few whole numbers an ordinal one, of few
    texts a multiclass one, of other numbers a regression. Without any, what looks like a label is proposed as a comment.
    Everything is judged by a random sample of at most SAMPLE_ROWS rows, the same for the same file; memory does not grow
    with the file.

    Raises:
        UserError: a source that can't be read, a label that is not there or is none, no column that could be a feature.
    """
    files, _ = list_files(DataConfig(name="described", source=str(source), schema="-"))
    sample, rows, left_out = read_sample(files, progress)
    looks = [look_at(name, sample[name], rows) for name in sample.column_names if name not in left_out]
    looks += [Column(name, "", use="left out", note=note) for name, note in left_out.items()]
    looks = _mark_duplicates(looks, sample)
    named = [named_task(label, looks, sample) for label in labels]
    looks = mark_labels(looks, named)
    tasks = named or suspected_tasks(looks)
    looks = mark_leaks(looks, tasks, sample)
    looks = _mark_collisions(looks)
    if not any(c.use == "feature" for c in looks):
        raise UserError(f"{str(source)!r} has no column that could be a feature; see what is said of each with --json")
    found = Description(
        source, rows, sample.num_rows, tuple(looks), tuple(tasks), bool(named), _group(looks), _time(looks, sample)
    )
    return replace(found, schema=_render(found))


def _mark_duplicates(looks: list[Column], sample: pa.Table) -> list[Column]:
    """Leave out what repeats an earlier column value for value."""
    seen: dict[bytes, str] = {}
    out = []
    for look in looks:
        if look.use != "feature" or look.feature["kind"] == "embedding":
            out.append(look)
            continue
        codes = encoded(sample[look.name])
        whole = hashlib.sha256(codes.indices.fill_null(-1).to_numpy().astype(np.int64).tobytes())
        for text in codes.dictionary.cast(pa.string()).to_pylist():
            whole.update(f"{text}\0".encode())
        first = seen.setdefault(whole.digest(), look.name)
        again = replace(look, use="left out", note=f"the same as {first}", same_as=first)
        out.append(look if first == look.name else again)
    return out


def _mark_collisions(looks: list[Column]) -> list[Column]:
    """Leave out a feature whose inputs would be called like another one's."""
    taken: set[str] = set()
    out = []
    for look in looks:
        if look.use == "feature":
            inputs = _inputs(look)
            if taken & inputs:
                look = replace(look, use="left out", note="its inputs would be called like another feature's: rename it")
            else:
                taken |= inputs
        out.append(look)
    return out


def _inputs(look: Column) -> set[str]:
    """What the inputs of a feature are called, tables and numbers apart."""
    name = look.name
    match look.feature["kind"]:
        case "numeric":
            return {f"table {(name + BUCKET_SUFFIX).replace('.', '__')}", f"dense {name}", f"dense {name}{MISSING_SUFFIX}"}
        case "embedding":
            return {f"dense {name}.{number}" for number in range(look.feature["dim"])}
    return {f"table {name.replace('.', '__')}"}


def _group(looks: list[Column]) -> str | None:
    """Whose rows GAUC should rank: users before sessions."""
    single = [c for c in looks if c.use == "feature" and c.feature["kind"] in ("categorical", "hashed")]
    ids = [c for c in single if ID.search("_".join(words(c.name)))]
    for word in _GROUPS:
        for look in ids:
            if word in {part for w in words(look.name) for part in (w, w.removesuffix("id"))}:
                return look.name
    return None


def _time(looks: list[Column], sample: pa.Table) -> str | None:
    """The finest time that rows can be sorted by."""
    times = [c for c in looks if c.is_time and not c.missing and c.use == "left out"]
    return (
        max(times, key=lambda c: (c.distinct or 0, pa.types.is_temporal(sample[c.name].type)), default=Column("", "")).name
        or None
    )


# The schema's text


def _render(found: Description) -> str:
    def lines() -> Iterator[str]:
        sampled = "" if found.sampled == found.rows else f", judged by a random sample of {found.sampled:,}"
        yield f"# Proposed by `recsys-moe data describe` for {short(found.source.name)}: {found.rows:,} rows{sampled}."
        if found.time:
            yield f"# Rows have a time: split them by it with data.split.order=sorted data.split.by={short(found.time)}"
        yield "features:"
        for look in found.columns:
            if look.use == "feature":
                yield f"  - {_flow(look.feature)}  # {_comment(look)}"
        if left_out := [look for look in found.columns if look.use == "left out"]:
            yield "# Left out:"
            yield from (f"#   {short(look.name) or '(no name)'}: {_comment(look)}" for look in left_out)
        yield "tasks:" + ("" if found.named else "  # uncomment what is to be learnt, or name it with --label")
        for task in found.tasks:
            mark = "" if found.named else "# "
            written = {key: task[key] for key in _TASK_KEYS if key in task}
            yield f"  {mark}- {_flow(written)}  # {_task_comment(task, found)}"
        if found.group:
            yield f"group: {_flow(found.group)}"
        if late := [look for look in found.columns if look.use in ("outcome", "suspected label")]:
            yield "outcomes:  # never inputs; move one to the features if it is known beforehand"
            yield from (f"  - {_flow(look.name)}  # {_comment(look)}" for look in late)

    return "\n".join(lines()) + "\n"


def _task_comment(task: dict[str, Any], found: Description) -> str:
    if "rate" in task:
        return f"{percent(task['rate'])} positive"
    sampled = found.sampled < found.rows
    more = "; add what the sample has not met" if sampled and {"classes", "levels"} & task.keys() else ""
    values = {c.name: c.values for c in found.columns}.get(task["label"])
    return printable(values or "a number") + more


def _comment(look: Column) -> str:
    missing = f"{percent(look.missing)} missing" if look.missing else ""
    distinct = "" if look.distinct is None else f"{look.distinct:,} values"
    return printable("; ".join(part for part in (look.note, look.type, distinct, missing, look.values) if part))


def _flow(value: Any) -> str:
    """YAML on one line; text is quoted wherever it might be taken for something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*( (==|<=?|>=?) [0-9]+)?", value) and value.lower() not in _YAML_WORDS:
            return value
        quoted: str = yaml.safe_dump(value, default_style='"', width=float("inf"), allow_unicode=True)
        return quoted.rstrip("\n")
    return json.dumps(value)
