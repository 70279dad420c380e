"""What may be learnt from somebody's log rows: the tasks of named labels, suspected labels, and what gives a label away."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_moe.errors import UserError, nearest
from recsys_moe.expressions import Expression
from recsys_moe.looks import Column, encoded, heavy_tail, is_a_word, percent, words
from recsys_moe.sampling import is_plain_number

LOW_RATE = 0.1
LEAK_AUC = 0.99
_BINS = 256

# fmt: off
_LABEL_WORDS = {
    "accept", "accepted", "bought", "buy", "cancel", "canceled", "cancelled", "cart", "churn", "churned", "click",
    "clicked", "collect", "collected", "comment", "commented", "complete", "completed", "conversion", "convert",
    "converted", "default", "defaulted", "dislike", "disliked", "enter", "entered", "favorite", "favourite", "finish",
    "finished", "follow", "followed", "forward", "forwarded", "fraud", "hate", "hated", "install", "installed", "label",
    "like", "liked", "love", "loved", "order", "ordered", "outcome", "paid", "pay", "purchase", "purchased", "refund",
    "refunded", "replay", "repost", "response", "return", "returned", "share", "shared", "skip", "skipped", "subscribe",
    "subscribed", "survived", "target", "view", "viewed", "watch", "watched", "win", "won", "y",
}
"""A two-valued column with one of these in its name is suspected of being a label."""
_OUTCOME_WORDS = {
    "dwell", "stay", "stayed", "watched", "revenue", "refund", "refunded", "paid", "payment", "delivered", "returned",
    "cancelled",
}
_OUTCOME_PAIRS = {
    "play time", "play duration", "play ms", "watch time", "watch duration", "watch ms", "view time", "view duration",
    "read time", "listen time", "time spent", "order status", "order total", "order amount", "order value",
}
_OUTCOME_NAMES = {"rating", "stars"}
"""A column with one of these words, or pairs of words, in its name, or that is called so, is suspected of being known only
after the event."""
_WEIGHT_PAIRS = {"instance weight", "sample weight", "survey weight", "case weight", "row weight"}
# fmt: on
_TARGET_NAMES = {"label", "target", "y", "outcome", "response"}
"""A column of more than two values that is called so is suspected of being a label."""

Task = dict[str, Any]
"""A task as the schema has it, and beside it the `column` and `columns` it is of; a binary one's `rate`."""


def named_task(label: str, looks: list[Column], sample: pa.Table) -> Task:
    """The task of a label that the user has named: a column, or NAME=EXPRESSION."""
    columns = {c.name: c for c in looks}
    match = re.fullmatch(r"([A-Za-z_]\w*)\s*=(?!=)\s*(.+)", label)
    if match and match[2] not in columns:
        return _task_of_expression(label, match[1], match[2], columns, sample)
    column = columns[_known(match[2] if match else label, columns, label)]
    if not is_a_word(column.name):
        raise UserError(f"--label {label!r} can't stand in an expression; rename the column to a word without blanks")
    if not column.task:
        raise UserError(
            f"--label {label!r} has {column.distinct or 'no countable'} values ({column.values or column.type}), of which no "
            "task can be made; say what counts, such as --label 'like=rating >= 4'"
        )
    return _task(column, looks) | ({"name": match[1]} if match else {})


def _task_of_expression(label: str, name: str, text: str, columns: dict[str, Column], sample: pa.Table) -> Task:
    expression = Expression(text)
    for column in expression.columns:
        _known(column, columns, label)
    values = expression(sample.select(list(expression.columns)))
    task: Task = {"name": name, "label": text, "column": label, "columns": expression.columns}
    if not expression.columns or not (pa.types.is_boolean(values.type) or is_plain_number(values.type)):
        raise UserError(f"--label {label!r} is neither true or false nor a number; compare a column: 'like=rating >= 4'")
    x = pc.cast(values, pa.float64(), safe=False).drop_null().to_numpy()
    x = x[np.isfinite(x)]
    if not len(x) or x.min() == x.max():
        what = f"always {x[0]:g}" if len(x) else "never known"
        raise UserError(f"--label {label!r} is {what} in the {len(values):,} rows looked at; mend the condition")
    if set(np.unique(x)) == {0, 1}:
        return task | {"rate": float(x.mean())}
    return task | {"kind": "regression"} | heavy_tail(x)


def _known(name: str, columns: Iterable[str], label: str) -> str:
    if name not in columns:
        raise UserError(
            f"--label {label!r}: there is no column {name!r}; {nearest(name, columns)} A condition is written NAME=CONDITION"
        )
    return name


def _task(column: Column, looks: list[Column]) -> Task:
    """The task whose label a column is: named like it, without is_ where nothing else is called so."""
    short = column.name.removeprefix("is_")
    taken = short in {c.name for c in looks} or not short.isidentifier()
    rate = {} if column.rate is None else {"rate": column.rate}
    plain = unicodedata.normalize("NFKD", column.name if taken else short).encode("ascii", "ignore").decode()
    return (
        {"name": plain if plain.isidentifier() else "label", "column": column.name, "columns": (column.name,)}
        | column.task
        | rate
    )


def mark_labels(looks: list[Column], named: list[Task]) -> list[Column]:
    """Find the labels, and what is known only after the event by its name."""
    labels = {name for task in named for name in task["columns"]}
    # Whatever repeats a label gives it away.
    copies = {c.same_as for c in looks if c.name in labels}
    free = [c for c in looks if c.task and c.use == "feature" and c.name not in labels | copies]
    pairs = {c.name: c for c in free if c.rate is not None}
    strong = {name for name in pairs if not _LABEL_WORDS.isdisjoint(words(name))}
    weak = {name for name, c in pairs.items() if name not in strong and _may_be_label(c)}
    suspected = strong or (set() if named else weak)
    suspected |= {c.name for c in free if c.rate is None and c.name.lower() in _TARGET_NAMES}
    out = []
    for look in looks:
        if look.name in labels:
            look = replace(look, use="label", note="")
        elif look.name in copies:
            look = replace(look, use="outcome", note="the same as a label")
        elif look.name in suspected:
            look = replace(look, use="suspected label", note="a label?" + _rate(look))
        elif look.use == "feature" and (note := _outcome_note(look.name)):
            look = replace(look, use="outcome", note=note)
        elif look.name in weak:
            look = replace(look, note="or a label?" + _rate(look))
        out.append(look)
    return out


def suspected_tasks(looks: list[Column]) -> list[Task]:
    """The tasks of what looks like a label, and after them of what is known only after the event: that may be learnt too."""
    suspected = [c for c in looks if c.use == "suspected label"]
    late = [c for c in looks if c.use == "outcome" and c.task and c.note == _LATE]
    return [_task(c, looks) for c in sorted(suspected, key=lambda c: c.rate is None) + late]


def _rate(look: Column) -> str:
    return "" if look.rate is None else f" {percent(look.rate)} positive"


_LATE = "known only after the event, by its name"


def _outcome_note(name: str) -> str:
    """Why a column of that name is no input; empty if it may be one."""
    parts = words(name)
    pairs = {f"{a} {b}" for a, b in pairwise(parts)}
    if not _WEIGHT_PAIRS.isdisjoint(pairs):
        return "a weight of the row, by its name: a task can take it as its weight"
    if not _OUTCOME_WORDS.isdisjoint(parts) or not _OUTCOME_PAIRS.isdisjoint(pairs) or name.lower() in _OUTCOME_NAMES:
        return _LATE
    return ""


def _may_be_label(look: Column) -> bool:
    flag = words(look.name)[:1] in (["is"], ["has"])
    return flag or (look.rate is not None and look.rate <= LOW_RATE)


def mark_leaks(looks: list[Column], tasks: list[Task], sample: pa.Table) -> list[Column]:
    """Leave out what predicts a label almost perfectly, alone."""
    truth = {task["name"]: _as_two(task, Expression(task["label"])(sample)) for task in tasks}
    out = []
    for look in looks:
        notes: list[str] = []
        if look.use == "feature" and look.feature["kind"] != "embedding" and truth:
            codes = _codes(sample[look.name])
            notes = [_leak_note(name, codes, *two) for name, two in truth.items()]
        note = next(filter(None, notes), None)
        out.append(replace(look, use="outcome", note=note) if note else look)
    return out


def _as_two(task: Task, y: pa.ChunkedArray) -> tuple[str, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """A label as one of two values, what the first of them is called, and where it was observed: true, or above the median,
    or the most frequent class. What gives a label away gives that away too."""
    observed = pc.is_valid(y).to_numpy()
    match task.get("kind"):
        case None:
            return "true", pc.fill_null(pc.cast(y, pa.bool_()), False).to_numpy(), observed
        case "multiclass":
            most = str(task["classes"][0])
            return most, pc.fill_null(pc.equal(pc.cast(y, pa.string()), most), False).to_numpy(), observed
    x = pc.cast(y, pa.float64(), safe=False).to_numpy()
    median = np.nanmedian(x)
    above = x > median if (x > median).any() else x >= median
    return "high", above, observed & ~np.isnan(x)


def _leak_note(
    name: str, codes: npt.NDArray[np.int64], value: str, y: npt.NDArray[np.bool_], observed: npt.NDArray[np.bool_]
) -> str:
    """Why a column gives a label away; empty if it does not."""
    auc = _auc_alone(codes, y, observed)
    if auc >= LEAK_AUC:
        return f"a leak? predicts {name} alone with AUC {auc:.4f}"
    there = observed & (codes > 0)
    if there.sum() >= 20 and there.sum() < observed.sum() and y[there].all() and y[observed].mean() < 0.9:
        return f"a leak? there only where {name} is {value}"
    return ""


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A small whole number for each row: its value, or its quantile where there are many numbers; missing is one too."""
    found = encoded(column)
    codes: npt.NDArray[np.int64] = found.indices.fill_null(-1).to_numpy().astype(np.int64)
    if is_plain_number(column.type) and not pa.types.is_integer(column.type) and len(found.dictionary) > _BINS:
        x = pc.cast(column, pa.float64(), safe=False).to_numpy()
        edges = np.nanquantile(x, np.linspace(0, 1, _BINS + 1)[1:-1])
        codes = np.where(np.isnan(x), -1, np.searchsorted(edges, x, side="right"))
    return codes + 1


def _auc_alone(codes: npt.NDArray[np.int64], y: npt.NDArray[np.bool_], observed: npt.NDArray[np.bool_]) -> float:
    """AUC of a label's rate for each code, fitted on one half of the rows and measured on the other; 0.5 if too few."""
    codes, y = codes[observed], y[observed]
    if min(y.sum(), len(y) - y.sum()) < 20:
        return 0.5
    half = np.random.default_rng(0).random(len(y)) < 0.5
    size = int(codes.max()) + 1
    aucs = []
    for fit in (half, ~half):
        seen = np.bincount(codes[fit], minlength=size)
        rate = (np.bincount(codes[fit & y], minlength=size) + y.mean()) / (seen + 1)
        negative, positive = (np.bincount(codes[~fit & (y == side)], minlength=size) for side in (False, True))
        _, where = np.unique(rate, return_inverse=True)
        negative, positive = np.bincount(where, negative), np.bincount(where, positive)
        below = np.cumsum(negative) - negative
        total = negative.sum() * positive.sum()
        aucs.append(float((positive * (below + negative / 2)).sum() / total) if total else 0.5)
    return sum(aucs) / 2
