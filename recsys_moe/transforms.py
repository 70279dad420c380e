"""Raw columns → model inputs, with statistics fitted on the training part only.

The same code runs in preparation, offline scoring and serving, from the statistics that the bundle carries: training and
serving cannot differ.

Fitting is a sum over chunks: `PartialStatistics.of(table)` anywhere, `merge` in chunk order, `finish` once.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_moe.errors import UserError
from recsys_moe.schema import BUCKET_SUFFIX, MISSING_SUFFIX, Categorical, Numeric, Schema
from recsys_moe.typed import typed

MISSING, UNKNOWN = 0, 1
"""Ids of a category that is null and of one that the training part does not have; the vocabulary follows."""

_WHOLE = re.compile(r"-?[0-9]+\.0+|-0")
_LARGE = re.compile(r"-?[0-9](\.[0-9]+)?e\+[0-9]+", re.IGNORECASE)
_NOT_CANONICAL = rf"(?i)^(|true|false|{_WHOLE.pattern}|{_LARGE.pattern})$"

_SKETCH = 4096
"""Quantile points kept per chunk and column: exact while a chunk has no more distinct values than that."""


@typed
class CategoricalStatistics:
    """The vocabulary, most frequent first; value i has id i + 2."""

    name: str
    vocabulary: tuple[str, ...]


@typed
class NumericStatistics:
    """Moments after log1p (where asked for) and the inner bucket boundaries before it."""

    name: str
    mean: float
    std: float
    boundaries: tuple[float, ...]


@typed
class Statistics:
    """What was fitted, in the order of the schema's features."""

    categorical: tuple[CategoricalStatistics, ...]
    numeric: tuple[NumericStatistics, ...]


@dataclass
class Inputs:
    """Model inputs of N rows: `ids` int32 `[F, N]` (one row per embedded feature), `dense` float32 `[D, N]`."""

    ids: npt.NDArray[np.int32]
    dense: npt.NDArray[np.float32]


class Transform:
    """Apply a schema's feature transforms with fitted statistics.

    `sparse_names` and `cardinalities` describe the rows of `Inputs.ids`, `dense_names` those of `Inputs.dense`.
    """

    def __init__(self, schema: Schema, statistics: Statistics) -> None:
        self.schema, self.statistics = schema, statistics
        categorical = {s.name: s for s in statistics.categorical}
        numeric = {s.name: s for s in statistics.numeric}
        for f in schema.features:
            if f.name not in (categorical if isinstance(f, Categorical) else numeric):
                raise UserError(f"the statistics lack feature {f.name!r} of the schema; fit them again")
        self._categorical = [
            (f, pa.array(categorical[f.name].vocabulary, pa.string())) for f in schema.features if isinstance(f, Categorical)
        ]
        self._numeric = [(f, numeric[f.name]) for f in schema.features if isinstance(f, Numeric)]
        bucketed = [(f, s) for f, s in self._numeric if f.buckets]
        self.sparse_names = [f.name for f, _ in self._categorical] + [f.name + BUCKET_SUFFIX for f, _ in bucketed]
        self.cardinalities = [len(v) + 2 for _, v in self._categorical] + [len(s.boundaries) + 2 for _, s in bucketed]
        self.dense_names = [f.name for f, _ in self._numeric]
        self.dense_names += [f.name + MISSING_SUFFIX for f, _ in self._numeric if f.missing_indicator]

    def __call__(self, table: pa.Table) -> Inputs:
        """Transform the rows of `table`, which has at least the feature columns.

        Raises:
            UserError: a value of the wrong kind; names the column and the value.
        """
        ids = np.empty((len(self.sparse_names), table.num_rows), np.int32)
        dense = np.empty((len(self.dense_names), table.num_rows), np.float32)
        for row, (feature, vocabulary) in enumerate(self._categorical):
            values = as_category(table[feature.name], feature.name)
            position = pc.fill_null(pc.index_in(values, value_set=vocabulary), UNKNOWN - 2).to_numpy()
            ids[row] = np.where(pc.is_null(values).to_numpy(zero_copy_only=False), MISSING, position + 2)
        next_id, next_flag = len(self._categorical), len(self._numeric)
        for row, (number, fitted) in enumerate(self._numeric):
            x = as_number(table[number.name], number.name)
            missing = np.isnan(x)
            if number.buckets:
                bucket = np.searchsorted(np.asarray(fitted.boundaries), x, side="right") + 1
                ids[next_id] = np.where(missing, MISSING, bucket)
                next_id += 1
            if number.missing_indicator:
                dense[next_flag] = missing
                next_flag += 1
            x = _log1p(x) if number.log1p else x
            x = (x - fitted.mean) / fitted.std if number.standardise else x
            x = np.where(missing, 0.0, x)
            if np.abs(x).max(initial=0) > np.finfo(np.float32).max:
                raise UserError(f"column {number.name!r} holds a value too large for float32; replace it by null")
            dense[row] = x
        return Inputs(ids, dense)


def as_category(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    """The values of a categorical column as strings in the form of `category_text`, null where missing.

    Raises:
        UserError: a column of fractions, lists or structures.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # more than one piece is left only where offsets would overflow
        array = pa.concat_arrays(array.chunks)
    if pa.types.is_dictionary(array.type):
        return as_category(array.dictionary, name).take(array.indices)
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        try:
            array = array.cast(pa.int64())
        except pa.ArrowInvalid:
            raise UserError(
                f"column {name!r} is categorical but holds fractions or numbers beyond 64 bits ({array.type}); declare it "
                "kind: numeric with buckets"
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
        UserError: strings that are no numbers, or infinite values.
    """
    if not _is_number(column.type):
        sample = next((v for v in column.to_pylist() if v is not None and not _reads_as_number(v)), None)
        if sample is None and column.null_count < len(column):
            sample = column.drop_null()[0].as_py()
        if sample is not None:
            raise UserError(
                f"column {name!r} is numeric in the schema but holds {sample!r} ({column.type}); mend the data or declare "
                "kind: categorical"
            )
        return np.full(len(column), np.nan)
    x: npt.NDArray[np.float64] = pc.cast(column, pa.float64(), safe=False).to_numpy().astype(np.float64, copy=False)
    if np.isinf(x).any():
        raise UserError(f"column {name!r} holds an infinite value; replace it by null or a finite number")
    return x


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)


def _reads_as_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _log1p(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.sign(x) * np.log1p(np.abs(x))


class PartialStatistics:
    """Mergeable statistics of some training rows; `to_json` / `from_json` carry them between processes."""

    def __init__(self, counts: dict[str, Counter[str]], moments: dict[str, list[float]], sketches: dict[str, Any]) -> None:
        self._counts, self._moments, self._sketches = counts, moments, sketches

    @classmethod
    def empty(cls) -> "PartialStatistics":
        return cls({}, {}, {})

    @classmethod
    def of(cls, table: pa.Table, schema: Schema) -> "PartialStatistics":
        """The statistics of the rows of `table`.

        Raises:
            UserError: a value of the wrong kind; names the column and the value.
        """
        partial = cls.empty()
        for feature in schema.features:
            if isinstance(feature, Categorical):
                counts = pc.value_counts(as_category(table[feature.name], feature.name))
                pairs = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
                partial._counts[feature.name] = Counter({v: n for v, n in pairs if v is not None})
                continue
            x = as_number(table[feature.name], feature.name)
            x = x[~np.isnan(x)]
            y = _log1p(x) if feature.log1p else x
            mean = float(y.mean()) if len(y) else 0.0
            partial._moments[feature.name] = [len(y), mean, float(((y - mean) ** 2).sum())]
            if feature.buckets:
                partial._sketches[feature.name] = _sketch(*np.unique(x, return_counts=True))
        return partial

    def merge(self, other: "PartialStatistics") -> None:
        """Take in the statistics of further rows (Chan et al. 1979 for the moments)."""
        for name, counts in other._counts.items():
            self._counts.setdefault(name, Counter()).update(counts)
        for name, (n_b, mean_b, m2_b) in other._moments.items():
            n_a, mean_a, m2_a = self._moments.get(name, [0, 0.0, 0.0])
            n = n_a + n_b
            delta = mean_b - mean_a
            share = n_b / n if n else 0.0
            self._moments[name] = [n, mean_a + delta * share, m2_a + m2_b + delta * delta * n_a * share]
        for name, (values, weights) in other._sketches.items():
            old_values, old_weights = self._sketches.get(name, ([], []))
            self._sketches[name] = _combine([*old_values, *values], [*old_weights, *weights])

    def to_json(self) -> dict[str, Any]:
        return {"counts": self._counts, "moments": self._moments, "sketches": self._sketches}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PartialStatistics":
        return cls({k: Counter(v) for k, v in data["counts"].items()}, data["moments"], data["sketches"])

    def finish(self, schema: Schema) -> Statistics:
        """The fitted statistics: deterministic whatever the order in which equal counts were met."""
        categorical, numeric = [], []
        for feature in schema.features:
            if isinstance(feature, Categorical):
                counts = self._counts.get(feature.name, Counter())
                ranked = sorted((-n, v) for v, n in counts.items() if n >= feature.min_count)
                vocabulary = tuple(v for _, v in ranked[: feature.max_size])
                categorical.append(CategoricalStatistics(feature.name, vocabulary))
            else:
                n, mean, m2 = self._moments.get(feature.name, [0, 0.0, 0.0])
                std = math.sqrt(m2 / n) if n else 0.0
                values, weights = self._sketches.get(feature.name, ([], []))
                boundaries = _boundaries(values, weights, feature.buckets)
                # A constant column has no spread to divide by.
                numeric.append(NumericStatistics(feature.name, mean, std if std > 0 else 1.0, boundaries))
        return Statistics(tuple(categorical), tuple(numeric))


def _sketch(values: npt.NDArray[Any], weights: npt.NDArray[Any]) -> tuple[list[float], list[float]]:
    """At most _SKETCH weighted values with the same distribution: midpoints of equal shares of the weight."""
    if len(values) > _SKETCH:
        total = weights.cumsum()
        edges = np.linspace(0, total[-1], _SKETCH + 1)
        chosen = np.searchsorted(total, (edges[1:] + edges[:-1]) / 2)
        values, weights = values[chosen], np.diff(edges)
    return values.tolist(), weights.tolist()


def _combine(values: list[float], weights: list[float]) -> tuple[list[float], list[float]]:
    unique, where = np.unique(values, return_inverse=True)
    # Kept 16 times finer while merging, so that the error of repeated compression stays below a bucket's width.
    totals = np.bincount(where, weights, minlength=len(unique))
    if len(unique) <= 16 * _SKETCH:
        return unique.tolist(), totals.tolist()
    return _sketch(unique, totals)


def _boundaries(values: list[float], weights: list[float], buckets: int) -> tuple[float, ...]:
    """Inner boundaries: bucket i holds boundaries[i-1] ≤ x < boundaries[i].

    A value that alone fills a bucket's share gets a bucket of its own, and the others share the rest: plain quantiles of a
    column that is zero in 96 % of its rows would all be zero.
    """
    if buckets < 2 or len(values) < 2:
        return ()
    x, w = np.asarray(values), np.asarray(weights, np.float64)
    heavy = w >= w.sum() / buckets
    alone = np.flatnonzero(heavy)
    starts = set(alone) | set(alone + 1)
    light = np.flatnonzero(~heavy)
    shares = buckets - len(alone)
    if shares > 0 and len(light):
        total = np.cumsum(w[light])
        cuts = np.searchsorted(total, np.arange(1, shares) / shares * total[-1], side="right")
        starts |= set(light[np.minimum(cuts, len(light) - 1)])
    # The first value starts the first bucket, which needs no boundary.
    return tuple(float(x[i]) for i in sorted(starts) if 0 < i < len(x))
