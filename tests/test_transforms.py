"""Feature transforms against naive numpy; fitting in pieces against fitting at once."""

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_moe.columns import as_category, as_number, category_text
from recsys_moe.errors import UserError
from recsys_moe.hashing import combine, hash_texts
from recsys_moe.labels import task_labels
from recsys_moe.schema import Schema
from recsys_moe.transforms import PartialStatistics, Transform
from recsys_moe.typed import parse


def schema_of(*features: dict[str, Any]) -> Schema:
    parsed: Schema = parse(Schema, {"features": features, "tasks": [{"name": "t", "label": "y == 1"}]}, "schema")
    return parsed


def categorical(**keys: Any) -> Schema:
    return schema_of({"name": "c", "kind": "categorical"} | keys)


def numeric(**keys: Any) -> Schema:
    return schema_of({"name": "x", "kind": "numeric"} | keys)


def fit(schema: Schema, *tables: pa.Table) -> Transform:
    partial = PartialStatistics.empty()
    for table in tables:
        partial.merge(PartialStatistics.of(table, schema))
    return Transform(schema, partial.finish(schema))


def vocabulary(schema: Schema, values: Any) -> tuple[str, ...]:
    return fit(schema, pa.table({"c": values})).statistics.categorical[0].vocabulary


def category_ids(transform: Transform, values: Any) -> list[int]:
    return transform(pa.table({"c": values})).ids[0].tolist()


# -- categories


def test_vocabulary_is_ordered_by_frequency_then_by_name() -> None:
    assert vocabulary(categorical(), list("bbbccaad") + [None] * 9) == ("b", "a", "c", "d")


def test_min_count_and_max_size_cut_the_rare_end() -> None:
    values = list("aaaabbbccd")
    assert vocabulary(categorical(min_count=2), values) == ("a", "b", "c")
    assert vocabulary(categorical(max_size=2), values) == ("a", "b")


def test_ids_are_missing_0_unknown_1_then_the_vocabulary() -> None:
    transform = fit(categorical(), pa.table({"c": ["b", "b", "a"]}))
    assert category_ids(transform, ["a", "b", "never seen", None, "b"]) == [3, 2, 1, 0, 2]
    assert (transform.sparse_names, transform.cardinalities) == (["c"], [4])


def test_a_value_that_min_count_cut_is_unknown() -> None:
    transform = fit(categorical(min_count=2), pa.table({"c": ["b", "b", "a"]}))
    assert category_ids(transform, ["a", "b"]) == [1, 2]


def test_a_column_without_values_still_transforms() -> None:
    transform = fit(categorical(), pa.table({"c": pa.array([None, None], pa.string())}))
    assert category_ids(transform, ["a", None]) == [1, 0]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([7, 40, None], pa.int16()),
        pa.array([7.0, 40.0, None]),
        pa.array([7.0, 40.0, float("nan")]),  # what pandas makes of whole numbers with a gap
        pa.array(["7", "40", None]),
        pa.array(["7", "40", None], pa.large_string()),
        pa.array(["7.0", "40.0", None]),  # what pandas writes of them into CSV
        pa.array(["7", "40", None]).dictionary_encode(),
        pa.array([7.0, 40.0, float("nan")]).dictionary_encode(),
        pa.DictionaryArray.from_arrays([0, 1, 2], ["7.0", "40", None]),
        pa.array([7, 40, None]).dictionary_encode(),
        pa.array([7, 40, None], pa.decimal128(10, 0)),
        pa.array([7, 40, None], pa.decimal128(10, 2)),
    ],
    ids=lambda a: str(a.type)[:40],
)
def test_ids_are_the_same_in_every_type_they_arrive_in(values: pa.Array) -> None:
    # Logs say int64, pandas makes floats of them, JSON sends strings: one user must stay one user.
    assert as_category(pa.chunked_array([values]), "c").to_pylist() == ["7", "40", None]


CANONICAL = {
    "272.0": "272",
    "-3.00": "-3",
    "-0.0": "0",
    "-0": "0",
    "1.76e+18": "1760000000000000000",  # how a whole number of 64 bits is written once it has been a float
    "1E+16": "10000000000000000",
    "True": "true",
    "FALSE": "false",
    "": None,  # CSV can't tell an empty text from a missing one
}


@pytest.mark.parametrize(("text", "canonical"), CANONICAL.items())
def test_a_category_has_one_text_however_it_was_written(text: str, canonical: str | None) -> None:
    assert category_text(text) == canonical
    assert as_category(pa.chunked_array([[text, "other", None]]), "c").to_pylist() == [canonical, "other", None]


@pytest.mark.parametrize(
    "text", ["007", "1.5", "1.0.0", "1.", ".0", "v1.0", "truely", "12e5", "nan", " 1.0", "1.0\n", "١.0", "1e+999"]
)
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert category_text(text) == text
    assert as_category(pa.chunked_array([[text]]), "c").to_pylist() == [text]


@given(st.lists(st.none() | st.text("01e+.-TRUEtrue", max_size=8) | st.sampled_from(list(CANONICAL)), max_size=8))
def test_columns_and_single_values_have_the_same_text(texts: list[str | None]) -> None:
    expected = [None if text is None else category_text(text) for text in texts]
    column = pa.chunked_array([pa.array(texts, pa.string())])
    assert as_category(column, "c").to_pylist() == expected
    assert as_category(column.dictionary_encode(), "c").to_pylist() == expected
    assert [text and category_text(text) for text in expected] == expected


def test_forms_of_one_value_are_counted_as_one() -> None:
    transform = fit(
        categorical(min_count=3), pa.table({"c": ["1", "1.0", "1.00", "True"]}), pa.table({"c": ["true", "TRUE", ""]})
    )
    assert transform.statistics.categorical[0].vocabulary == ("1", "true")
    assert category_ids(transform, [1, 1, None]) == [2, 2, 0]
    assert category_ids(transform, [True, False, None]) == [3, 1, 0]


def test_large_ids_lose_no_digit() -> None:
    large = 2**62 + 1
    assert as_category(pa.chunked_array([[large]]), "c").to_pylist() == [str(large)]


def test_booleans_are_categories() -> None:
    assert as_category(pa.chunked_array([[True, False, None]]), "c").to_pylist() == ["true", "false", None]


def test_chunks_are_read_as_one_column() -> None:
    assert as_category(pa.chunked_array([["a"], [], [None, "b"]], pa.string()), "c").to_pylist() == ["a", None, "b"]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ([1.5, 2.0], "'c' is categorical but holds fractions"),
        ([float("inf")], "'c' is categorical but holds fractions"),
        ([[1], [2]], "'c' is list<.*a categorical feature holds one value a row"),
    ],
)
def test_values_that_are_no_category(values: list[Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        as_category(pa.chunked_array([values]), "c")


# -- numbers


@pytest.mark.parametrize("log1p", [False, True])
@pytest.mark.parametrize("standardise", [False, True])
def test_dense_inputs_are_log1p_then_standardised_then_zero_where_missing(log1p: bool, standardise: bool) -> None:
    random = np.random.default_rng(0)
    train, test = (np.round(random.normal(3, 20, n), 2) for n in (200, 50))
    transform = fit(numeric(log1p=log1p, standardise=standardise), pa.table({"x": train}))

    def log(x: np.ndarray) -> np.ndarray:
        return np.sign(x) * np.log(1 + np.abs(x)) if log1p else x

    expected = (log(test) - log(train).mean()) / log(train).std() if standardise else log(test)
    got = transform(pa.table({"x": [*test, None, float("nan")]})).dense[0]
    assert got[:-2] == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert got[-2:].tolist() == [0, 0]


def test_missing_values_take_no_part_in_the_moments() -> None:
    with_gaps = fit(numeric(), pa.table({"x": [1.0, None, 5.0, float("nan")]})).statistics.numeric[0]
    assert (with_gaps.mean, with_gaps.std) == (3.0, 2.0)


def test_a_constant_column_becomes_zero_and_one_without_values_too() -> None:
    assert fit(numeric(), pa.table({"x": [4, 4]}))(pa.table({"x": [4, 5]})).dense[0].tolist() == [0, 1]
    empty = fit(numeric(buckets=4), pa.table({"x": pa.array([None], pa.float64())}))
    assert empty(pa.table({"x": [2.0, None]})).dense[0].tolist() == [2, 0]
    assert empty(pa.table({"x": [2.0, None]})).ids[0].tolist() == [1, 0]


def test_missing_indicator() -> None:
    transform = fit(numeric(missing_indicator=True), pa.table({"x": [1.0, 3.0]}))
    assert transform.dense_names == ["x", "x.missing"]
    assert transform(pa.table({"x": [None, 1.0, float("nan")]})).dense[1].tolist() == [1, 0, 1]


def test_buckets_lie_between_the_training_quantiles() -> None:
    random = np.random.default_rng(1)
    train = random.lognormal(size=1000)
    transform = fit(numeric(buckets=8, log1p=True), pa.table({"x": train}))
    # The k-th boundary is the smallest training value with more than k/8 of the values at or below it.
    boundaries = np.sort(train)[np.arange(1, 8) * 1000 // 8]
    assert transform.statistics.numeric[0].boundaries == tuple(boundaries)
    assert transform.cardinalities == [9]
    x = np.r_[random.lognormal(size=50), boundaries, 0.0, 1e9]
    naive = [1 + sum(value >= b for b in boundaries) for value in x]
    assert transform(pa.table({"x": [*x, None]})).ids[0].tolist() == [*naive, 0]


def test_equal_quantiles_give_fewer_buckets_and_no_empty_one() -> None:
    train = [0.0] * 80 + [1.0, 2.0, 3.0, 4.0] * 5
    transform = fit(numeric(buckets=10), pa.table({"x": train}))
    ids = transform(pa.table({"x": train})).ids[0]
    assert set(ids) == set(range(1, transform.cardinalities[0]))


def test_a_value_that_fills_a_buckets_share_has_a_bucket_of_its_own() -> None:
    # Zero in 90 % of the rows: plain quantiles would all be zero and tell nothing about the rest.
    random = np.random.default_rng(3)
    train = np.r_[np.zeros(900), random.lognormal(size=100)]
    transform = fit(numeric(buckets=5), pa.table({"x": train}))
    counts = np.bincount(transform(pa.table({"x": train})).ids[0])
    assert counts.tolist() == [0, 900, 25, 25, 25, 25]


@given(
    st.lists(st.tuples(st.integers(-30, 30), st.integers(1, 200)), min_size=1, max_size=30, unique_by=lambda t: t[0]),
    st.sampled_from([2, 4, 8, 16]),
)
def test_no_bucket_is_empty_or_mixes_a_heavy_value_with_others(counted: list[tuple[int, int]], buckets: int) -> None:
    values, counts = (np.array(c) for c in zip(*counted, strict=True))
    transform = fit(numeric(buckets=buckets), pa.table({"x": np.repeat(values, counts)}))
    ids = transform(pa.table({"x": values})).ids[0]
    assert set(ids) == set(range(1, transform.cardinalities[0]))
    assert (np.diff(ids[np.argsort(values)]) >= 0).all()  # larger values, later buckets
    heavy = counts >= counts.sum() / buckets
    for bucket in set(ids):
        inside = ids == bucket
        assert inside.sum() == 1 or not heavy[inside].any()
        # The light values share what is left evenly, as far as whole values allow.
        if not heavy[inside].any():
            shares = buckets - heavy.sum()
            assert counts[inside].sum() <= counts[~heavy].sum() / shares + counts[inside].max() + 1e-6


def test_two_values_are_told_apart_by_two_buckets() -> None:
    transform = fit(numeric(buckets=2), pa.table({"x": [0, 1] * 10}))
    assert transform(pa.table({"x": [0, 1]})).ids[0].tolist() == [1, 2]


def test_quantiles_of_many_distinct_values_are_close() -> None:
    # Beyond 4096 distinct values a chunk is compressed; a bucket's share must stay right within a fraction of itself.
    random = np.random.default_rng(2)
    chunks = [pa.table({"x": random.normal(size=20_000)}) for _ in range(4)]
    transform = fit(numeric(buckets=32), *chunks)
    ids = np.concatenate([transform(chunk).ids[0] for chunk in chunks])
    shares = np.bincount(ids, minlength=33)[1:] / len(ids)
    assert len(shares) == 32
    assert shares == pytest.approx(np.full(32, 1 / 32), rel=0.05)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, None, 3], pa.int8()),
        pa.array([1, None, 3], pa.uint64()),
        pa.array([1, None, 3], pa.float32()),
        pa.array([1, None, 3], pa.decimal128(5, 2)),
    ],
    ids=lambda a: str(a.type),
)
def test_every_kind_of_number_is_read(values: pa.Array) -> None:
    np.testing.assert_array_equal(as_number(pa.chunked_array([values]), "x"), [1, np.nan, 3])


def test_whole_numbers_beyond_double_precision_are_rounded() -> None:
    # Time stamps in nanoseconds, for example.
    large = 1_760_000_000_000_000_001
    assert as_number(pa.chunked_array([[large]]), "x").tolist() == [float(large)]


def test_a_column_of_nulls_has_no_type_of_its_own() -> None:
    assert np.isnan(as_number(pa.chunked_array([pa.nulls(3)]), "x")).all()
    assert np.isnan(as_number(pa.chunked_array([pa.array([None], pa.string())]), "x")).all()


def test_a_string_in_a_numeric_column_names_the_value() -> None:
    with pytest.raises(UserError, match="column 'x' is numeric in the schema but holds 'many'"):
        fit(numeric(), pa.table({"x": [None, "many"]}))


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_an_infinite_value_is_an_error(value: float) -> None:
    with pytest.raises(UserError, match="column 'x' holds an infinite value"):
        fit(numeric(), pa.table({"x": [1.0, value]}))


@pytest.mark.parametrize("standardise", [False, True])
def test_a_value_that_float32_cannot_hold_is_an_error_too(standardise: bool) -> None:
    # Else the model would see an infinity, and answer NaN.
    transform = fit(numeric(standardise=standardise), pa.table({"x": [1.0, 2.0]}))
    with pytest.raises(UserError, match="column 'x'"):
        transform(pa.table({"x": [1e300]}))


# -- whole schemas


def test_rows_of_the_inputs_are_categories_then_buckets_and_numbers_then_flags() -> None:
    transform = fit(
        schema_of(
            {"name": "x", "kind": "numeric", "buckets": 2, "missing_indicator": True},
            {"name": "c", "kind": "categorical"},
            {"name": "z", "kind": "numeric", "standardise": False},
        ),
        pa.table({"x": [1.0, 2.0], "c": ["a", "a"], "z": [5, 6]}),
    )
    assert transform.sparse_names == ["c", "x.bucket"]
    assert transform.dense_names == ["x", "z", "x.missing"]
    inputs = transform(pa.table({"x": [2.0, None], "c": ["a", "b"], "z": [5, 7]}))
    assert inputs.ids.tolist() == [[2, 1], [2, 0]]
    assert inputs.dense.tolist() == [[1, 0], [5, 7], [0, 1]]


MIXED = schema_of(
    {"name": "c", "kind": "categorical", "min_count": 2},
    {"name": "x", "kind": "numeric", "buckets": 4, "log1p": True},
)
rows = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "é", None]), st.none() | st.integers(-999, 999).map(lambda n: n / 8)),
    max_size=40,
)


def mixed(drawn: list[tuple[str | None, float | None]]) -> pa.Table:
    return pa.table(
        {
            "c": pa.array([c for c, _ in drawn], pa.string()),
            "x": pa.array([x for _, x in drawn], pa.float64()),
        }
    )


@given(rows, st.lists(st.integers(0, 40), max_size=4))
def test_merged_partial_statistics_are_those_of_a_single_pass(
    drawn: list[tuple[str | None, float | None]], cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(drawn)) for cut in cuts), len(drawn)]
    pieces = [mixed(drawn[low:high]) for low, high in pairwise(edges)]
    merged = PartialStatistics.empty()
    for piece in pieces:
        # Through JSON, as it travels between processes.
        merged.merge(PartialStatistics.from_json(json.loads(json.dumps(PartialStatistics.of(piece, MIXED).to_json()))))
    in_pieces, at_once = merged.finish(MIXED), PartialStatistics.of(mixed(drawn), MIXED).finish(MIXED)
    assert in_pieces.categorical == at_once.categorical
    assert in_pieces.numeric[0].boundaries == at_once.numeric[0].boundaries
    assert in_pieces.numeric[0].mean == pytest.approx(at_once.numeric[0].mean, rel=1e-9, abs=1e-9)
    assert in_pieces.numeric[0].std == pytest.approx(at_once.numeric[0].std, rel=1e-6, abs=1e-6)


@given(rows)
def test_vocabulary_is_the_counters(drawn: list[tuple[str | None, float | None]]) -> None:
    counts = Counter(c for c, _ in drawn if c is not None)
    naive = sorted((c for c, n in counts.items() if n >= 2), key=lambda c: (-counts[c], c))
    assert fit(MIXED, mixed(drawn)).statistics.categorical[0].vocabulary == tuple(naive)


@given(rows)
def test_a_row_transforms_the_same_alone_and_in_company(drawn: list[tuple[str | None, float | None]]) -> None:
    # Serving scores single rows with what training saw in batches.
    transform = fit(MIXED, mixed([("a", 1.0), ("a", 2.0), ("b", 4.0), ("b", 8.0)]))
    together = transform(mixed(drawn))
    for row in range(min(len(drawn), 5)):
        alone = transform(mixed(drawn[row : row + 1]))
        assert np.array_equal(alone.ids[:, 0], together.ids[:, row])
        assert np.array_equal(alone.dense[:, 0], together.dense[:, row])


# -- hashed categories and crosses


def single_ids(transform: Transform, table: pa.Table, name: str) -> list[int]:
    return transform(table).ids[transform.sparse_names.index(name)].tolist()


HASHED = schema_of(
    {"name": "user", "kind": "hashed", "buckets": 50},
    {"name": "hour", "kind": "categorical", "min_count": 2},
    {"name": "both", "kind": "cross", "of": ["user", "hour"], "buckets": 1000},
    {"name": "turned", "kind": "cross", "of": ["hour", "user"], "buckets": 1000},
)


def test_hashed_ids_are_missing_0_then_2_and_the_hash_modulo_the_buckets() -> None:
    transform = fit(HASHED, pa.table({"user": ["a"], "hour": [1]}))
    users = [f"user {n}" for n in range(2000)]
    ids = np.array(single_ids(transform, pa.table({"user": users, "hour": [1] * 2000}), "user"))
    assert (ids == 2 + hash_texts(pa.array(users)) % np.uint64(50)).all()
    assert set(ids) == set(range(2, 52))
    assert transform.cardinalities == [52, 2, 1002, 1002]
    table = pa.table({"user": ["272", None, "272.0", ""], "hour": [1, 1, 1, 1]})
    first, *others = single_ids(transform, table, "user")
    assert others == [0, first, 0]  # one text form, hashed too


def test_a_cross_tells_every_combination_of_values_apart() -> None:
    # Of values, not of ids: those that the vocabulary lacks are crossed as well.
    transform = fit(HASHED, pa.table({"user": ["a"], "hour": [1]}))
    pairs = [(f"u{n % 5}", n // 5) for n in range(25)]
    table = pa.table({"user": [u for u, _ in pairs], "hour": [h for _, h in pairs]})
    both, turned = (single_ids(transform, table, name) for name in ("both", "turned"))
    assert len(set(both)) >= 24  # of 1000 buckets: a collision at most
    assert both != turned
    assert both == single_ids(transform, table, "both")
    expected = combine([hash_texts(pa.array([u])) for u in ("u3",)] + [hash_texts(pa.array(["2"]))]) % np.uint64(1000)
    assert both[pairs.index(("u3", 2))] == 2 + int(expected[0])


def test_a_cross_is_missing_where_one_of_its_values_is() -> None:
    transform = fit(HASHED, pa.table({"user": ["a"], "hour": [1]}))
    table = pa.table({"user": ["a", None, "a", None], "hour": pa.array([None, 1, 1, None], pa.int64())})
    assert [n > 0 for n in single_ids(transform, table, "both")] == [False, False, True, False]


# -- many values a row


def many(kind: str, **keys: Any) -> Schema:
    return schema_of({"name": "c", "kind": kind} | keys)


def list_ids(transform: Transform, column: Any) -> list[list[int]]:
    (jagged,) = transform(pa.table({"c": column})).lists
    assert jagged.values.dtype == jagged.offsets.dtype == np.int32
    return [jagged.values[low:high].tolist() for low, high in pairwise(jagged.offsets)]


TAGS = [["b", "a"], ["b"], None, ["b", None, "a", "b"], []]


@pytest.mark.parametrize("pieces", [1, 2, 5])
def test_a_multis_vocabulary_counts_every_value(pieces: int) -> None:
    schema = many("multi", min_count=2)
    size = -(-len(TAGS) // pieces)
    tables = [pa.table({"c": pa.array(TAGS[low : low + size], pa.list_(pa.string()))}) for low in range(0, len(TAGS), size)]
    transform = fit(schema, *tables)
    assert transform.statistics.categorical[0].vocabulary == ("b", "a")
    assert list_ids(transform, TAGS) == [[2, 3], [2], [], [2, 3, 2], []]
    assert list_ids(transform, [["z", "a"]]) == [[1, 3]]
    assert [(f.name, f.cardinality, f.pooling, f.max_length) for f in transform.lists] == [("c", 4, "mean", None)]


def test_a_missing_value_keeps_its_place_in_a_sequence() -> None:
    transform = fit(many("sequence", max_length=9), pa.table({"c": TAGS}))
    assert list_ids(transform, TAGS) == [[2, 3], [2], [], [2, 0, 3, 2], []]


@given(
    st.lists(st.none() | st.lists(st.none() | st.sampled_from("abcd"), max_size=6), min_size=1, max_size=8),
    st.integers(1, 4),
    st.sampled_from([None, 7]),
)
def test_long_lists_keep_their_beginning_and_long_sequences_their_end(
    rows: list[list[str | None] | None], limit: int, buckets: int | None
) -> None:
    table = pa.table({"c": pa.array(rows, pa.list_(pa.string()))})
    for kind in ("multi", "sequence"):
        transform = fit(many(kind, max_length=limit, buckets=buckets), table)
        whole = fit(many("sequence", max_length=99, buckets=buckets), pa.table({"c": [["d", "c", "c", "b", "b", "b"]]}))
        if buckets:
            ids = dict(zip("abcd", list_ids(whole, [list("abcd")])[0], strict=True))
        else:
            vocabulary = transform.statistics.categorical[0].vocabulary
            ids = {text: n for n, text in enumerate(vocabulary, 2)}
        expected = []
        for row in rows:
            kept = [t for t in row or [] if t is not None] if kind == "multi" else row or []
            kept = kept[:limit] if kind == "multi" else kept[-limit:]
            expected.append([0 if t is None else ids[t] for t in kept])
        assert list_ids(transform, table["c"]) == expected


def test_what_is_cut_off_is_not_counted() -> None:
    transform = fit(many("sequence", max_length=1), pa.table({"c": [["a", "b"], ["a", "b"]]}))
    assert transform.statistics.categorical[0].vocabulary == ("b",)


def test_separated_text_and_lists_get_the_same_ids() -> None:
    transform = fit(many("multi", separator="|"), pa.table({"c": ["b|a", "b", None, ""]}))
    assert list_ids(transform, pa.array([["b", "a"], ["b"], None, []])) == [[2, 3], [2], [], []]
    assert list_ids(transform, ["b|a", "b", None, ""]) == [[2, 3], [2], [], []]


# -- vectors


def test_vectors_stand_behind_the_numbers_as_they_are() -> None:
    schema = schema_of(
        {"name": "v", "kind": "embedding", "dim": 3},
        {"name": "x", "kind": "numeric", "missing_indicator": True},
        {"name": "w", "kind": "embedding", "dim": 1},
    )
    table = pa.table({"v": [[1.0, 2.0, 3.0], None], "x": [1.0, None], "w": [[9.0], [8.0]]})
    transform = fit(schema, table)
    assert transform.dense_names == ["x", "x.missing", "v.0", "v.1", "v.2", "w.0"]
    assert transform(table).dense.T.tolist() == [[0, 0, 1, 2, 3, 9], [0, 1, 0, 0, 0, 8]]


# -- labels


TARGETS: Schema = parse(
    Schema,
    {
        "features": [{"name": "c", "kind": "categorical"}],
        "tasks": [
            {"name": "b", "label": "b"},
            {"name": "r", "kind": "regression", "label": "r", "log1p": True, "mask": "b == 1"},
            {"name": "m", "kind": "multiclass", "label": "m", "classes": ["x", "y", "z"]},
            {"name": "o", "kind": "ordinal", "label": "o", "levels": [1, 2, 5]},
        ],
    },
    "schema",
)


@pytest.mark.parametrize("pieces", [1, 3, 50])
def test_targets_are_fitted_on_the_rows_that_observe_them(pieces: int) -> None:
    random = np.random.default_rng(0)
    table = pa.table(
        {
            "b": random.integers(0, 2, 50),
            "r": random.normal(0, 50, 50),
            "m": pa.array(random.choice(list("xy"), 50), mask=random.random(50) < 0.2),
            "o": random.choice([1, 2, 5], 50),
        }
    )
    partial = PartialStatistics.empty()
    for piece in range(pieces):
        part = table.slice(piece * 50 // pieces, (piece + 1) * 50 // pieces - piece * 50 // pieces)
        found = PartialStatistics.of_labels(*task_labels(part, TARGETS), TARGETS)
        partial.merge(PartialStatistics.from_json(json.loads(json.dumps(found.to_json()))))
    b, r, m, o = partial.finish(TARGETS).targets
    frame = table.to_pandas()
    assert b.counts == tuple(np.bincount(frame["b"]))
    assert (b.rows, b.mean) == (50, pytest.approx(frame["b"].mean()))
    y = frame["r"][frame["b"] == 1].astype(np.float32).astype(float)
    z = np.sign(y) * np.log1p(np.abs(y))
    assert (r.rows, r.mean, r.std) == (len(y), pytest.approx(z.mean()), pytest.approx(z.std(ddof=0)))
    assert r.counts == ()
    assert m.counts == ((frame["m"] == "x").sum(), (frame["m"] == "y").sum(), 0)
    assert o.counts == tuple((frame["o"] == level).sum() for level in (1, 2, 5))
