"""Raw columns → model inputs, with statistics fitted on the training part only.

The same code runs in preparation, offline scoring and serving, from the statistics that the bundle carries: training and
serving cannot differ.

Fitting is a sum over chunks: `PartialStatistics.of(table)` anywhere, `merge` in chunk order, `finish` once.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import Any, Literal, TypeGuard

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recsys_moe.columns import as_category, as_lists, as_number, as_vectors, signed_log1p
from recsys_moe.errors import UserError
from recsys_moe.hashing import Hashes, combine, hash_texts
from recsys_moe.labels import target_scale
from recsys_moe.schema import (
    BUCKET_SUFFIX,
    MISSING_SUFFIX,
    Categorical,
    Cross,
    Embedding,
    Hashed,
    Multi,
    Numeric,
    Schema,
    Sequence,
)
from recsys_moe.typed import typed

Columns = Mapping[str, pa.ChunkedArray]

MISSING, UNKNOWN = 0, 1
"""Ids of a category that is null and of one that the training part does not have; the vocabulary or the buckets follow."""

_FEW = 5000
"""A table of fewer rows than this is a request's."""

_SKETCH = 4096
"""Quantile points kept per chunk and column: exact while a chunk has no more distinct values than that."""


@typed
class CategoricalStatistics:
    """The vocabulary of a feature that has one, most frequent first; value i has id i + 2."""

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
class TargetStatistics:
    """A task's labels in the training rows that observe it: how many, their moments (after log1p where asked for; of a
    class, its position), and how many there are of each class."""

    name: str
    rows: int = 0
    mean: float = 0.0
    std: float = 1.0
    counts: tuple[int, ...] = ()


@typed
class Statistics:
    """What was fitted, in the order of the schema's features and tasks."""

    categorical: tuple[CategoricalStatistics, ...]
    numeric: tuple[NumericStatistics, ...]
    targets: tuple[TargetStatistics, ...] = ()


@dataclass
class Jagged:
    """Rows of any number of ids: row i has `values[offsets[i]:offsets[i + 1]]`. int32 `[V]` and `[N + 1]`."""

    values: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int32]

    def take(self, rows: npt.NDArray[np.int32]) -> "Jagged":
        """The rows that `rows` names, the last one by −1.

        >>> Jagged(np.array([5, 6, 7], np.int32), np.array([0, 2, 3], np.int32)).take(np.array([-1, 0])).values.tolist()
        [7, 5, 6]
        """
        starts, lengths = self.offsets[:-1][rows], np.diff(self.offsets)[rows]
        offsets = np.r_[0, np.cumsum(lengths)].astype(np.int32)
        place = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Jagged(self.values[place], offsets)


@dataclass
class Inputs:
    """Model inputs of N rows: `ids` int32 `[F + H, N]` (one row per embedded feature of one id, two for each of the H that
    have rows of their own: the halves of its 64-bit hash, the lower first), `dense` float32 `[D, N]`, and `lists`, one for
    each feature of many ids a row."""

    ids: npt.NDArray[np.int32]
    dense: npt.NDArray[np.float32]
    lists: tuple[Jagged, ...] = ()


def concatenate(pieces: SequenceOf[Inputs]) -> Inputs:
    """The rows of all pieces, one piece after the other."""
    if len(pieces) == 1:
        return pieces[0]
    lists = []
    for parts in zip(*(piece.lists for piece in pieces), strict=True):
        ends = np.cumsum([0, *(len(part.values) for part in parts)])
        offsets = [part.offsets[1:] + end for part, end in zip(parts, ends, strict=False)]
        lists.append(Jagged(np.concatenate([part.values for part in parts]), np.concatenate([[0], *offsets]).astype(np.int32)))
    ids, dense = (np.concatenate([getattr(piece, name) for piece in pieces], 1) for name in ("ids", "dense"))
    return Inputs(ids, dense, tuple(lists))


@dataclass
class Encoded:
    """What becomes of one feature's column of N rows, before the features are put together; what its kind has not is None.

    `ids` int32 `[N]` (a category, a number's bucket), `dense` float32 `[k, N]` (a number and, where asked for, whether it is
    missing; a vector), `hashes` and `null` `[N]` (of what crosses read, or has rows of its own), `lists` (many ids a row).
    """

    ids: Any = None
    dense: Any = None
    hashes: Any = None
    null: Any = None
    lists: Jagged | None = None

    def take(self, rows: npt.NDArray[np.int32]) -> "Encoded":
        """The rows that `rows` `[M]` names, the last one by −1."""
        ids, dense, hashes, null = (None if e is None else e[..., rows] for e in (self.ids, self.dense, self.hashes, self.null))
        return Encoded(ids, dense, hashes, null, None if self.lists is None else self.lists.take(rows))


@dataclass(frozen=True)
class ListInput:
    """A feature of many ids a row: its embedding table's rows, what becomes of a row's embeddings, its ids at most."""

    name: str
    cardinality: int
    pooling: Literal["mean", "sum", "last"]
    max_length: int | None


class Vocabulary:
    """Texts → ids: 0 missing, 1 unknown, 2… their places in the vocabulary."""

    def __init__(self, values: tuple[str, ...]) -> None:
        self.cardinality = len(values) + 2
        self._texts, self._values = values, pa.array(values, pa.string())

    @cached_property
    def _ids(self) -> dict[str | None, int]:
        return {None: MISSING, **{text: place + 2 for place, text in enumerate(self._texts)}}

    def __call__(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        if len(texts) < _FEW:  # Arrow numbers the whole vocabulary in each call
            found = self._ids
            return np.array([found.get(text, UNKNOWN) for text in texts.to_pylist()], np.int32)
        position = pc.fill_null(pc.index_in(texts, value_set=self._values), UNKNOWN - 2).to_numpy()
        missing = pc.is_null(texts).to_numpy(zero_copy_only=False)
        ids: npt.NDArray[np.int32] = np.where(missing, MISSING, position + 2)
        return ids


class Buckets:
    """Texts → ids: 0 missing, 2 + hash mod buckets; 1 is never given."""

    def __init__(self, buckets: int) -> None:
        self.cardinality = buckets + 2
        self._buckets = np.uint64(buckets)

    def __call__(self, texts: pa.Array) -> npt.NDArray[np.int32]:
        return self.of_hashes(hash_texts(texts), pc.is_null(texts).to_numpy(zero_copy_only=False))

    def of_hashes(self, hashes: Hashes, missing: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
        ids: npt.NDArray[np.int32] = np.where(missing, MISSING, (hashes % self._buckets).astype(np.int32) + 2)
        return ids


class Transform:
    """Apply a schema's feature transforms with fitted statistics.

    `sparse_names` and `cardinalities` describe the tables of one id a row, whose last ones are those of `own_rows`; `id_names`
    the rows of `Inputs.ids`, `dense_names` those of `Inputs.dense`, `lists` those of `Inputs.lists`.
    """

    def __init__(self, schema: Schema, statistics: Statistics) -> None:
        self.schema, self.statistics = schema, statistics
        vocabularies = {s.name: s.vocabulary for s in statistics.categorical}
        numeric = {s.name: s for s in statistics.numeric}
        for f in schema.features:
            if (_has_vocabulary(f) and f.name not in vocabularies) or (isinstance(f, Numeric) and f.name not in numeric):
                raise UserError(f"the statistics lack feature {f.name!r} of the schema; fit them again")

        def encoder(feature: Categorical | Hashed | Cross | Multi | Sequence) -> Vocabulary | Buckets:
            buckets = None if isinstance(feature, Categorical) else feature.buckets
            return Buckets(buckets) if buckets else Vocabulary(vocabularies[feature.name])

        own = [f for f in schema.features if isinstance(f, Hashed) and f.collisions == "none"]
        single = [(f, encoder(f)) for f in schema.features if isinstance(f, Categorical | Hashed) and f not in own]
        self._single = [f for f, _ in single]
        self._crosses = [(f, Buckets(f.buckets)) for f in schema.features if isinstance(f, Cross)]
        self._lists = [(f, encoder(f)) for f in schema.features if isinstance(f, Multi | Sequence)]
        self._numeric = [(f, numeric[f.name]) for f in schema.features if isinstance(f, Numeric)]
        self._numeric_by_name = {f.name: (f, s) for f, s in self._numeric}
        self._embeddings = [f for f in schema.features if isinstance(f, Embedding)]
        bucketed = [(f, s) for f, s in self._numeric if f.buckets]
        one_id = [*single, *self._crosses]
        self.sparse_names = [f.name for f, _ in one_id] + [f.name + BUCKET_SUFFIX for f, _ in bucketed]
        self.cardinalities = [e.cardinality for _, e in one_id] + [len(s.boundaries) + 2 for _, s in bucketed]
        self.own_rows = [f.name for f in own]
        self.id_names = [f"id.{name}" for name in self.sparse_names]
        self.id_names += [f"{half}.{name}" for name in self.own_rows for half in ("low", "high")]
        self.sparse_names += self.own_rows
        self.cardinalities += [f.buckets + 2 for f in own]
        self.dense_names = [f.name for f, _ in self._numeric]
        self.dense_names += [f.name + MISSING_SUFFIX for f, _ in self._numeric if f.missing_indicator]
        self.dense_names += [f"{f.name}.{i}" for f in self._embeddings for i in range(f.dim)]
        self.lists = [ListInput(f.name, encoder.cardinality, f.pooling, f.max_length) for f, encoder in self._lists]
        crossed = {name for cross, _ in self._crosses for name in cross.of}
        self._encoders: dict[str, Callable[[pa.ChunkedArray], Encoded]] = {
            **{f.name: partial(self._category, name=f.name, encoder=e, hashed=f.name in crossed) for f, e in single},
            **{f.name: partial(self._category, name=f.name, encoder=None, hashed=True) for f in own},
            **{f.name: partial(self._number, number=f, fitted=s) for f, s in self._numeric},
            **{f.name: partial(_vector, feature=f) for f in self._embeddings},
            **{f.name: partial(_list, feature=f, encoder=e) for f, e in self._lists},
        }

    def __call__(self, table: pa.Table) -> Inputs:
        """Transform the rows of `table`, which has at least the feature columns.

        Raises:
            UserError: a value of the wrong kind; names the column and the value.
        """
        return self.of_columns({name: table[name] for name in self.schema.feature_columns}, table.num_rows)

    def of_columns(self, columns: Columns, rows: int) -> Inputs:
        """Transform `rows` rows of columns, of which those with a single value (a user's) hold it for all rows: it is
        checked and looked up once.

        Raises:
            UserError: a value of the wrong kind; names the column and the value.
        """
        return self.assemble({name: self.encode(name, columns[name]) for name in self.schema.feature_columns}, rows)

    def encode(self, name: str, column: pa.ChunkedArray | pa.Array) -> Encoded:
        """What a feature's column becomes by itself.

        Raises:
            UserError: a value of the wrong kind; names the column and the value.
        """
        return self._encoders[name](column)

    def encode_number(self, name: str, value: float) -> Encoded:
        """What a finite number of a numeric feature becomes: as `encode` of a column of one, which takes Arrow five times as
        long.

        Raises:
            UserError: it is too large.
        """
        return self._numbers(np.array([value]), *self._numeric_by_name[name])

    def assemble(self, encoded: Mapping[str, Encoded], rows: int) -> Inputs:
        """The inputs of `rows` rows, from what their columns have become; one of a single row counts for all."""
        ids = np.empty((len(self.id_names), rows), np.int32)
        dense = np.empty((len(self.dense_names), rows), np.float32)
        for row, feature in enumerate(self._single):
            ids[row] = encoded[feature.name].ids
        row = len(self._single)
        for cross, buckets in self._crosses:
            parts = [encoded[name] for name in cross.of]
            ids[row] = buckets.of_hashes(
                combine([part.hashes for part in parts]),
                reduce(np.logical_or, [part.null for part in parts]),
            )
            row += 1
        flag = len(self._numeric)
        for place, (number, _) in enumerate(self._numeric):
            found = encoded[number.name]
            dense[place] = found.dense[0]
            if number.missing_indicator:
                dense[flag] = found.dense[1]
                flag += 1
            if number.buckets:
                ids[row] = found.ids
                row += 1
        for vector in self._embeddings:
            dense[flag : flag + vector.dim] = encoded[vector.name].dense
            flag += vector.dim
        # int64 ids of all would double a batch; two int32 ones of few do not.
        for name in self.own_rows:
            found = encoded[name]
            halves = np.where(found.null, MISSING, np.maximum(found.hashes, 1)).astype("<u8")
            ids[row : row + 2] = halves.view("<i4").reshape(-1, 2).T
            row += 2
        lists = (encoded[feature.name].lists for feature, _ in self._lists)
        return Inputs(ids, dense, tuple(_repeated(found, rows) for found in lists if found is not None))

    def _category(self, column: pa.ChunkedArray, name: str, encoder: Vocabulary | Buckets | None, hashed: bool) -> Encoded:
        texts = as_category(column, name)
        hashes, null = _hash_column(texts) if hashed else (None, None)
        return Encoded(ids=None if encoder is None else encoder(texts), hashes=hashes, null=null)

    def _number(self, column: pa.ChunkedArray, number: Numeric, fitted: NumericStatistics) -> Encoded:
        return self._numbers(as_number(column, number.name), number, fitted)

    def _numbers(self, x: npt.NDArray[np.float64], number: Numeric, fitted: NumericStatistics) -> Encoded:
        missing = np.isnan(x)
        bucket = None
        if number.buckets:
            place = np.searchsorted(np.asarray(fitted.boundaries), x, side="right") + 1
            bucket = np.where(missing, MISSING, place).astype(np.int32)
        x = signed_log1p(x) if number.log1p else x
        x = (x - fitted.mean) / fitted.std if number.standardise else x
        x = np.where(missing, 0.0, x)
        if np.abs(x).max(initial=0) > np.finfo(np.float32).max:
            raise UserError(f"column {number.name!r} holds a value too large for float32; replace it by null")
        dense = np.stack([x, missing]) if number.missing_indicator else x[None]
        return Encoded(ids=bucket, dense=dense.astype(np.float32))


def _hash_column(texts: pa.Array) -> tuple[Hashes, npt.NDArray[np.bool_]]:
    return hash_texts(texts), pc.is_null(texts).to_numpy(zero_copy_only=False)


def _has_vocabulary(feature: Any) -> TypeGuard[Categorical | Multi | Sequence]:
    return isinstance(feature, Categorical) or (isinstance(feature, Multi | Sequence) and not feature.buckets)


def _list_texts(column: pa.ChunkedArray, feature: Multi | Sequence) -> tuple[npt.NDArray[np.int64], pa.Array]:
    """How many values of each row the model sees, and which, on end."""
    lengths, texts = as_lists(column, feature.name, feature.separator)
    if isinstance(feature, Multi) and texts.null_count:
        rows = np.repeat(np.arange(len(lengths)), lengths)
        present = pc.is_valid(texts).to_numpy(zero_copy_only=False)
        lengths, texts = np.bincount(rows[present], minlength=len(lengths)), texts.drop_null()
    limit = feature.max_length
    if limit is not None and lengths.max(initial=0) > limit:
        place = np.arange(len(texts)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = place >= np.repeat(lengths - limit, lengths) if isinstance(feature, Sequence) else place < limit
        lengths, texts = np.minimum(lengths, limit), texts.filter(pa.array(kept))
    return lengths, texts


def _repeated(found: Jagged, rows: int) -> Jagged:
    """The one row's ids for all rows; as it is where every row has its own."""
    if len(found.offsets) == rows + 1:
        return found
    offsets = np.arange(rows + 1, dtype=np.int32) * np.int32(len(found.values))
    return Jagged(np.tile(found.values, rows), offsets)


def _jagged(column: pa.ChunkedArray, feature: Multi | Sequence, encoder: Vocabulary | Buckets) -> Jagged:
    lengths, texts = _list_texts(column, feature)
    if len(texts) > np.iinfo(np.int32).max:
        raise UserError(
            f"column {feature.name!r} holds {len(texts):,} values in {len(lengths):,} rows, which is too many; set max_length"
        )
    return Jagged(encoder(texts), np.r_[0, np.cumsum(lengths)].astype(np.int32))


def _list(column: pa.ChunkedArray, feature: Multi | Sequence, encoder: Vocabulary | Buckets) -> Encoded:
    return Encoded(lists=_jagged(column, feature, encoder))


def _vector(column: pa.ChunkedArray, feature: Embedding) -> Encoded:
    return Encoded(dense=as_vectors(column, feature.name, feature.dim).T)


class PartialStatistics:
    """Mergeable statistics of some training rows; `to_json` / `from_json` carry them between processes."""

    def __init__(
        self,
        counts: dict[str, Counter[str]],
        moments: dict[str, list[float]],
        sketches: dict[str, Any],
        targets: dict[str, tuple[list[float], list[int]]],
    ) -> None:
        self._counts, self._moments, self._sketches, self._targets = counts, moments, sketches, targets

    @classmethod
    def empty(cls) -> "PartialStatistics":
        return cls({}, {}, {}, {})

    @classmethod
    def of(cls, table: pa.Table, schema: Schema) -> "PartialStatistics":
        """The features' statistics of the rows of `table`.

        Raises:
            UserError: a value of the wrong kind; names the column and the value.
        """
        partial = cls.empty()
        for feature in schema.features:
            match feature:
                case Categorical():
                    partial._counts[feature.name] = _count(as_category(table[feature.name], feature.name))
                case Multi() | Sequence() if not feature.buckets:
                    partial._counts[feature.name] = _count(_list_texts(table[feature.name], feature)[1])
                case Numeric():
                    x = as_number(table[feature.name], feature.name)
                    x = x[~np.isnan(x)]
                    partial._moments[feature.name] = _moments(signed_log1p(x) if feature.log1p else x)
                    if feature.buckets:
                        partial._sketches[feature.name] = _sketch(*np.unique(x, return_counts=True))
        return partial

    @classmethod
    def of_labels(
        cls, labels: npt.NDArray[np.float32], weights: npt.NDArray[np.float32], schema: Schema
    ) -> "PartialStatistics":
        """The targets' statistics of some rows' labels and weights, each `[T, N]`."""
        partial = cls.empty()
        for row, task in enumerate(schema.tasks):
            y = labels[row][weights[row] > 0].astype(np.float64)
            classes = len(task.classes_as_text)
            counts = np.bincount(y.astype(np.int64), minlength=classes).tolist() if classes else []
            partial._targets[task.name] = _moments(target_scale(y, task)), counts
        return partial

    def merge(self, other: "PartialStatistics") -> None:
        """Take in the statistics of further rows."""
        for name, counts in other._counts.items():
            self._counts.setdefault(name, Counter()).update(counts)
        for name, moments in other._moments.items():
            self._moments[name] = _add_moments(self._moments.get(name, _NO_MOMENTS), moments)
        for name, (values, weights) in other._sketches.items():
            old_values, old_weights = self._sketches.get(name, ([], []))
            self._sketches[name] = _combine([*old_values, *values], [*old_weights, *weights])
        for name, (moments, classes) in other._targets.items():
            old_moments, old_classes = self._targets.get(name, (_NO_MOMENTS, [0] * len(classes)))
            added = [a + b for a, b in zip(old_classes, classes, strict=True)]
            self._targets[name] = _add_moments(old_moments, moments), added

    def to_json(self) -> dict[str, Any]:
        return {"counts": self._counts, "moments": self._moments, "sketches": self._sketches, "targets": self._targets}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "PartialStatistics":
        counts = {k: Counter(v) for k, v in data["counts"].items()}
        return cls(counts, data["moments"], data["sketches"], data["targets"])

    def finish(self, schema: Schema) -> Statistics:
        """The fitted statistics: deterministic whatever the order in which equal counts were met."""
        categorical, numeric, targets = [], [], []
        for feature in schema.features:
            match feature:
                case Categorical() | Multi() | Sequence() if _has_vocabulary(feature):
                    counts = self._counts.get(feature.name, Counter())
                    ranked = sorted((-n, v) for v, n in counts.items() if n >= feature.min_count)
                    vocabulary = tuple(v for _, v in ranked[: feature.max_size])
                    categorical.append(CategoricalStatistics(feature.name, vocabulary))
                case Numeric():
                    n, mean, m2 = self._moments.get(feature.name, _NO_MOMENTS)
                    std = math.sqrt(m2 / n) if n else 0.0
                    values, weights = self._sketches.get(feature.name, ([], []))
                    boundaries = _boundaries(values, weights, feature.buckets)
                    # A constant column has no spread to divide by.
                    numeric.append(NumericStatistics(feature.name, mean, std if std > 0 else 1.0, boundaries))
        for task in schema.tasks:
            (n, mean, m2), classes = self._targets.get(task.name, (_NO_MOMENTS, []))
            targets.append(TargetStatistics(task.name, int(n), mean, math.sqrt(m2 / n) if n else 0.0, tuple(classes)))
        return Statistics(tuple(categorical), tuple(numeric), tuple(targets))


def extend(schema: Schema, start: Statistics, fitted: Statistics) -> Statistics:
    """`start` with the values that `fitted` has besides, behind its own: ids stay what they were, new values get new ones, as
    far as a feature's `max_size` has room for.

    Everything else stays `start`'s: a model that was trained on numbers standardised and bucketed in one way, on labels of
    one scale, would read shifted ones wrongly.

    >>> from recsys_moe.schema import BinaryTask
    >>> first, second = (Statistics((CategoricalStatistics("city", values),), ()) for values in (("b", "a"), ("c", "a", "d")))
    >>> schema = Schema((Categorical("city", "categorical", max_size=3),), (BinaryTask("click", "y"),))
    >>> extend(schema, first, second).categorical[0].vocabulary
    ('b', 'a', 'c')
    """
    vocabularies = []
    features = [f for f in schema.features if _has_vocabulary(f)]
    for feature, old, new in zip(features, start.categorical, fitted.categorical, strict=True):
        known = set(old.vocabulary)
        added = [value for value in new.vocabulary if value not in known]
        room = max(0, feature.max_size - len(old.vocabulary))
        vocabularies.append(CategoricalStatistics(old.name, (*old.vocabulary, *added[:room])))
    return Statistics(tuple(vocabularies), start.numeric, start.targets)


def _count(texts: pa.Array) -> Counter[str]:
    counts = pc.value_counts(texts)
    pairs = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
    return Counter({v: n for v, n in pairs if v is not None})


_NO_MOMENTS = [0, 0.0, 0.0]


def _moments(x: npt.NDArray[np.float64]) -> list[float]:
    """Number, mean and sum of squared deviations."""
    mean = float(x.mean()) if len(x) else 0.0
    return [len(x), mean, float(((x - mean) ** 2).sum())]


def _add_moments(a: list[float], b: list[float]) -> list[float]:
    """The moments of the values of both (Chan et al. 1979)."""
    (n_a, mean_a, m2_a), (n_b, mean_b, m2_b) = a, b
    n = n_a + n_b
    delta = mean_b - mean_a
    share = n_b / n if n else 0.0
    return [n, mean_a + delta * share, m2_a + m2_b + delta * delta * n_a * share]


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
