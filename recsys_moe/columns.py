"""Raw columns as Arrow has them → checked values in one form, whatever file or request they came in."""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_moe.errors import UserError

_WHOLE = re.compile(r"-?[0-9]+\.0+|-0")
_LARGE = re.compile(r"-?[0-9](\.[0-9]+)?e\+[0-9]+", re.IGNORECASE)
_NOT_CANONICAL = rf"(?i)^(|true|false|{_WHOLE.pattern}|{_LARGE.pattern})$"


def as_category(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    """The values of a categorical column as strings in the form of `category_text`, null where missing.

    Raises:
        UserError: a column of fractions, instants, lists or structures.
    """
    array = _whole(column)
    _refuse_time(array.type, name)
    if pa.types.is_dictionary(array.type):
        return as_category(array.dictionary, name).take(array.indices)
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        try:
            array = array.cast(pa.int64())
        except pa.ArrowInvalid:
            raise UserError(
                f"column {name!r} is categorical but holds fractions or numbers beyond 64 bits ({array.type}); declare it "
                "kind: numeric with buckets, or if it holds lists kind: embedding"
            ) from None
    if pa.types.is_nested(array.type):
        raise UserError(f"column {name!r} is {array.type}, but a categorical feature holds one value a row; leave it out")
    try:
        texts = array.cast(pa.string())
    except pa.ArrowException:
        raise UserError(f"column {name!r} is {array.type}, which has no text form; leave the feature out") from None
    if pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        return texts
    # Patterns are matched against each text once, not against each row.
    distinct = texts.dictionary_encode()
    if not pc.any(pc.match_substring_regex(distinct.dictionary, _NOT_CANONICAL)).as_py():
        return texts
    canonical = [None if text is None else category_text(text) for text in distinct.dictionary.to_pylist()]
    return pa.array(canonical, pa.string()).take(distinct.indices)


def category_text(text: str) -> str | None:
    """The one form of a category: JSON's, which is Parquet's too; None where it is missing.

    CSV files hold what was in memory when they were written: pandas turns whole numbers with a gap into `272.0`, from 1e16
    on into `1.76e+18`, and booleans into `True`. An empty text is missing, since CSV has no other form for that.

    >>> category_text("272.0"), category_text("True"), category_text("007"), category_text("")
    ('272', 'true', '007', None)
    """
    if text.lower() in ("true", "false"):
        return text.lower()
    if _WHOLE.fullmatch(text):
        number = text.partition(".")[0]
        return "0" if number == "-0" else number
    if _LARGE.fullmatch(text) and float(text).is_integer():
        return str(int(float(text)))
    return text or None


def as_number(column: pa.ChunkedArray, name: str) -> npt.NDArray[np.float64]:
    """The values of a numeric column, NaN where missing.

    Raises:
        UserError: strings that are no numbers, instants, or infinite values.
    """
    _refuse_time(column.type, name)
    if not is_number(column.type):
        if (sample := _no_number(column)) is not None:
            raise UserError(
                f"column {name!r} is numeric in the schema but holds {sample!r} ({column.type}); mend the data or declare "
                "kind: categorical"
            )
        return np.full(len(column), np.nan)
    x: npt.NDArray[np.float64] = pc.cast(column, pa.float64(), safe=False).to_numpy().astype(np.float64, copy=False)
    if np.isinf(x).any():
        raise UserError(f"column {name!r} holds an infinite value; replace it by null or a finite number")
    return x


def as_lists(
    column: pa.ChunkedArray | pa.Array, name: str, separator: str | None = None
) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """Rows of any number of categories: how many each has `[N]`, and all of them on end, in the form of `category_text`.

    A null row has none; a null within a list stays one.

    >>> as_lists(pa.array(["a|b", None, "c"]), "tags", "|")[0].tolist()
    [2, 0, 1]

    Raises:
        UserError: a column of single values without a separator, or lists of what is no category.
    """
    array = _whole(column)
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if pa.types.is_null(array.type):
        return np.zeros(len(array), np.int64), pa.array([], pa.string())
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        if separator is None:
            raise UserError(f"column {name!r} holds text, not lists; declare the feature's separator, such as separator: '|'")
        # An empty text is missing, as everywhere: no list of one empty value.
        array = pc.split_pattern(pc.if_else(pc.equal(array, ""), pa.scalar(None, array.type), array), separator)
    if not _is_list(array.type):
        raise UserError(f"column {name!r} is {array.type}, but the feature takes lists; declare kind: categorical or hashed")
    if pa.types.is_nested(array.type.value_type):
        raise UserError(f"column {name!r} is {array.type}, but each of its lists must hold single values; leave it out")
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
    return lengths, as_category(array.drop_null().flatten(), name)


def as_vectors(column: pa.ChunkedArray | pa.Array, name: str, dim: int) -> npt.NDArray[np.float32]:
    """Rows of `dim` numbers as float32 `[N, dim]`, zeros where a row is null.

    Raises:
        UserError: a list of another length, or a value that is null, no number, or not finite in float32.
    """
    array = _whole(column)
    out = np.zeros((len(array), dim), np.float32)
    if array.null_count == len(array):
        return out
    if not _is_list(array.type) or not (is_number(array.type.value_type) or pa.types.is_null(array.type.value_type)):
        raise UserError(f"column {name!r} is {array.type}, but an embedding is a list of {dim} numbers; mend the column")
    present = array.drop_null()
    lengths = pc.list_value_length(present).to_numpy()
    if (lengths != dim).any():
        raise UserError(
            f"column {name!r} holds a list of {lengths[lengths != dim][0]} numbers, but the embedding's dim is {dim}; mend "
            "the column or the schema"
        )
    flat = present.flatten()
    if flat.null_count:
        raise UserError(f"column {name!r} holds a list with a null in it; an embedding has all its {dim} numbers or is null")
    with np.errstate(over="ignore"):
        values = pc.cast(flat, pa.float64(), safe=False).to_numpy().astype(np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"column {name!r} holds a number in a list that is not finite in float32; mend the column")
    out[array.is_valid().to_numpy(zero_copy_only=False)] = values.reshape(-1, dim)
    return out


def _whole(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # more than one piece is left only where offsets would overflow
        array = pa.concat_arrays(array.chunks)
    return array


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _refuse_time(kind: pa.DataType, name: str) -> None:
    if pa.types.is_timestamp(kind) or pa.types.is_time(kind) or pa.types.is_duration(kind):
        raise UserError(
            f"column {name!r} is {kind}, which is neither a category nor a number: what it says depends on its unit and time "
            "zone; derive hour, weekday or seconds from it, in one zone"
        )


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type holds numbers (truth values are 0 and 1)."""
    return bool(
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)
    )


def kind_of(column: pa.ChunkedArray) -> str:
    """A column's type in words: of text, with the first value that is no number, which is what made it one perhaps.

    >>> kind_of(pa.chunked_array([["0", "1", "yes"]])), kind_of(pa.chunked_array([[0.5]]))
    ("string such as 'yes'", 'double')
    """
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    value = _no_number(column) if text else None
    return str(column.type) if value is None else f"{column.type} such as {value!r}"


def _no_number(column: pa.ChunkedArray) -> Any:
    """The first value that does not read as a number, or else the first one; None where all are null."""
    values = column.drop_null().to_pylist()
    return next((value for value in values if not reads_as_number(value)), next(iter(values), None))


def reads_as_number(value: Any) -> bool:
    """Whether `float` makes a number of it."""
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def signed_log1p(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """sign(x)·log(1 + |x|)."""
    return np.sign(x) * np.log1p(np.abs(x))
