"""Labels and weights of the tasks, from a schema's expressions."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_moe.errors import UserError
from recsys_moe.expressions import Expression
from recsys_moe.schema import Schema, Task


def task_labels(table: pa.Table, schema: Schema) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Labels (0 or 1) and weights (0 = not part of the task's rows), each float32 `[T, N]`.

    A row counts for a task where its label is not null, its mask, if any, is true, and its weight, if any, is neither 0 nor
    null: for the loss, the counts and the metrics alike.

    Raises:
        UserError: a label that is NaN, infinite or neither 0 nor 1; a negative weight; names the task and the remedy.
    """
    labels = np.zeros((len(schema.tasks), table.num_rows), np.float32)
    weights = np.zeros_like(labels)
    for row, task in enumerate(schema.tasks):
        for column in Expression(task.label).columns:
            _check_finite(table, column, task)
        y = Expression(task.label)(table)
        if not _is_number(y):
            raise UserError(f"label {task.label!r} of task {task.name!r} is {y.type}, not true or false; compare it")
        observed = pc.is_valid(y).to_numpy()
        values = pc.fill_null(pc.cast(y, pa.float64(), safe=False), 0.0).to_numpy()
        bad = values[observed & (values != 0) & (values != 1)]
        if len(bad):
            raise UserError(
                f"label {task.label!r} of task {task.name!r} gives {bad[0]:g}; a binary label is 0 or 1, so compare it"
            )
        weight = np.ones(table.num_rows, np.float32)
        if task.weight:
            w = Expression(task.weight)(table)
            if not _is_number(w):
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
            observed &= weight > 0
        if task.mask:
            mask = Expression(task.mask)(table)
            if not pa.types.is_boolean(mask.type):
                raise UserError(f"mask {task.mask!r} of task {task.name!r} is {mask.type}, not true or false; compare it")
            observed &= pc.fill_null(mask, False).to_numpy()
        labels[row] = np.where(observed, values, 0.0)
        weights[row] = np.where(observed, weight, 0.0)
    return labels, weights


def group_ids(table: pa.Table, schema: Schema) -> npt.NDArray[np.int64] | None:
    """A whole number for each row's group (GAUC), equal for equal values in every chunk; None without a group column."""
    if schema.group is None:
        return None
    column = table[schema.group]
    if pa.types.is_integer(column.type):
        # Nulls are one more group; whether a chunk has any must not change what the others are called.
        numbers = pc.fill_null(pc.cast(column, pa.int64(), safe=False), np.iinfo(np.int64).min)
        return np.asarray(numbers.to_numpy(), np.int64)
    from pandas.util import hash_array

    return hash_array(np.asarray(column.to_pylist(), dtype=object).astype(str).astype(object)).astype(np.int64)


def _is_number(values: pa.ChunkedArray) -> bool:
    kind = values.type
    return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _check_finite(table: pa.Table, column: str, task: Task) -> None:
    if column in table.column_names and pa.types.is_floating(table.schema.field(column).type):
        bad = pc.sum(pc.invert(pc.is_finite(pc.drop_null(table[column])))).as_py() or 0
        if bad:
            raise UserError(
                f"label column {column!r} of task {task.name!r} holds NaN or an infinite value in {bad} rows; "
                "use null where the label was not observed"
            )
