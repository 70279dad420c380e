"""Labels and weights of the tasks, from a schema's expressions."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_moe.columns import as_category, is_number, kind_of, signed_log1p
from recsys_moe.errors import UserError, nearest
from recsys_moe.expressions import Expression
from recsys_moe.schema import RegressionTask, Schema, Task


def task_labels(table: pa.Table, schema: Schema) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Labels and weights (0 = not part of the task's rows), each float32 `[T, N]`.

    A binary label is 0 or 1, a class or level its place among those declared, a regression's label the number itself.

    A row counts for a task where its label is not null and no column of it NaN, its mask, if any, is true, and its weight, if
    any, is neither 0 nor null: for the loss, the counts and the metrics alike.

    Raises:
        UserError: a label that is infinite or none that its kind of task has; a negative weight; names the task and
            the remedy.
    """
    labels = np.zeros((len(schema.tasks), table.num_rows), np.float32)
    weights = np.zeros_like(labels)
    for row, task in enumerate(schema.tasks):
        y = Expression(task.label)(_observed(table, task))
        counts = pc.is_valid(y).to_numpy()
        weight = np.ones(table.num_rows, np.float32)
        if task.weight:
            w = Expression(task.weight)(table)
            if not is_number(w.type):
                raise UserError(f"weight {task.weight!r} of task {task.name!r} is {w.type}; name a column of numbers ≥ 0")
            exact = pc.fill_null(pc.cast(w, pa.float64(), safe=False), 0.0).to_numpy()
            if not np.isfinite(exact).all() or (exact < 0).any():
                raise UserError(f"weight {task.weight!r} of task {task.name!r} is negative or not finite; make it ≥ 0")
            with np.errstate(over="ignore"):
                weight = exact.astype(np.float32)
            lost = exact[np.isinf(weight) | ((weight == 0) & (exact > 0))]
            if len(lost):
                raise UserError(
                    f"weight {task.weight!r} of task {task.name!r} is {lost[0]:g}, which float32 can't hold; scale it"
                )
            counts &= weight > 0
        if task.mask:
            mask = Expression(task.mask)(table)
            if not pa.types.is_boolean(mask.type):
                raise UserError(f"mask {task.mask!r} of task {task.name!r} is {mask.type}, not true or false; compare it")
            counts &= pc.fill_null(mask, False).to_numpy()
        values, observed = _READ[task.kind](y, task, counts)
        labels[row] = np.where(observed, values, 0.0)
        weights[row] = np.where(observed, weight, 0.0)
    return labels, weights


def group_ids(table: pa.Table, schema: Schema) -> npt.NDArray[np.int64] | None:
    """A whole number for each row's group (GAUC), equal for equal values in every chunk; None without a group column.

    Raises:
        UserError: a column of lists or the like.
    """
    if schema.group is None:
        return None
    column = table[schema.group]
    if pa.types.is_nested(column.type):
        raise UserError(f"group column {schema.group!r} is {column.type}, which names no group; name a column of ids")
    if pa.types.is_integer(column.type):
        # Nulls are one more group; whether a chunk has any must not change what the others are called.
        numbers = pc.fill_null(pc.cast(column, pa.int64(), safe=False), np.iinfo(np.int64).min)
        return np.asarray(numbers.to_numpy(), np.int64)
    from pandas.util import hash_array

    return hash_array(np.asarray(column.to_pylist(), dtype=object).astype(str).astype(object)).astype(np.int64)


def target_scale(labels: npt.NDArray[np.float64], task: Task) -> npt.NDArray[np.float64]:
    """Labels as the task's statistics see them: after log1p where the task asks for it."""
    return signed_log1p(labels) if isinstance(task, RegressionTask) and task.log1p else labels


Bools = npt.NDArray[np.bool_]
Labels = tuple[npt.NDArray[np.float64], Bools]
"""Values, and in which of the rows that count for the task they were observed."""


def _read_binary(y: pa.ChunkedArray, task: Task, counts: Bools) -> Labels:
    if not is_number(y.type):
        raise UserError(f"label {task.label!r} of task {task.name!r} is {kind_of(y)}, not true or false; compare it")
    values = _numbers(y)
    bad = values[counts & (values != 0) & (values != 1)]
    if len(bad):
        raise UserError(f"label {task.label!r} of task {task.name!r} gives {bad[0]:g}; a binary label is 0 or 1, so compare it")
    return values, counts


def _read_number(y: pa.ChunkedArray, task: Task, counts: Bools) -> Labels:
    if not is_number(y.type):
        raise UserError(f"label {task.label!r} of task {task.name!r} is {kind_of(y)}, not a number; a regression needs one")
    values = _numbers(y)
    bad = values[counts & ~(np.abs(values) <= np.finfo(np.float32).max)]
    if len(bad):
        raise UserError(
            f"label {task.label!r} of task {task.name!r} gives {bad[0]:g}, which float32 can't hold; scale it, or use null "
            "where it was not observed"
        )
    return values, counts


def _read_class(y: pa.ChunkedArray, task: Task, counts: Bools) -> Labels:
    try:
        texts = as_category(y, task.label)
    except UserError:
        raise UserError(
            f"label {task.label!r} of task {task.name!r} is {y.type}, whose values are no classes; use whole numbers or text"
        ) from None
    position = pc.index_in(texts, value_set=pa.array(task.classes_as_text, pa.string()))
    observed = counts & pc.is_valid(texts).to_numpy(zero_copy_only=False)
    strange = texts.filter(pa.array(observed & pc.is_null(position).to_numpy(zero_copy_only=False)))
    if len(strange):
        raise UserError(
            f"label {task.label!r} of task {task.name!r} gives {strange[0].as_py()!r}, which the task does not declare; "
            f"{nearest(strange[0].as_py(), task.classes_as_text)} Declare it, or mask such rows out"
        )
    return pc.fill_null(position, 0).to_numpy().astype(np.float64), observed


_READ = {"binary": _read_binary, "regression": _read_number, "multiclass": _read_class, "ordinal": _read_class}


def _numbers(y: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    values: npt.NDArray[np.float64] = pc.fill_null(pc.cast(y, pa.float64(), safe=False), 0.0).to_numpy()
    return values


def _observed(table: pa.Table, task: Task) -> pa.Table:
    """The label's columns with null for NaN, which is how pandas writes that nothing was observed: a comparison would take
    NaN for a negative."""
    columns = [name for name in Expression(task.label).columns if name in table.column_names]
    table = table.select(columns)
    for place, name in enumerate(columns):
        column = table[name]
        if pa.types.is_floating(column.type):
            infinite = pc.sum(pc.is_inf(column)).as_py() or 0
            if infinite:
                raise UserError(
                    f"label column {name!r} of task {task.name!r} holds an infinite value in {infinite} rows; use null where "
                    "the label was not observed"
                )
            table = table.set_column(place, name, pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column))
    return table
