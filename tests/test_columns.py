"""Raw columns of many values: lists and vectors, from every Arrow type that they come in."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_moe.columns import as_category, as_lists, as_number, as_vectors, category_text
from recsys_moe.errors import UserError

ROWS: list[Any] = [["a", "b"], None, [], ["c", None, "a"]]


def taken_apart(lengths: np.ndarray, texts: pa.Array) -> list[list[str | None]]:
    ends = np.cumsum(lengths)
    assert ends[-1] == len(texts)
    return [texts.to_pylist()[end - length : end] for length, end in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(ROWS),
        pa.array(ROWS, pa.large_list(pa.large_string())),
        pa.array(ROWS, pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        pa.array([["x"], *ROWS, ["y"]]).slice(1, 4),
        pa.chunked_array([ROWS[:1], ROWS[1:]]),
    ],
    ids=lambda a: str(a.type)[:40],
)
def test_lists_of_every_type(column: Any) -> None:
    assert taken_apart(*as_lists(column, "c")) == [["a", "b"], [], [], ["c", None, "a"]]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([[7, 40], None]), [["7", "40"], []]),
        (pa.array([[7.0, None], [float("nan")]]), [["7", None], [None]]),
        (pa.array([["7.0", "True"], [""]]), [["7", "true"], [None]]),
        (pa.array([[7, 40], None], pa.list_(pa.int8(), 2)), [["7", "40"], []]),
        (pa.nulls(2), [[], []]),
        (pa.array([None, []], pa.list_(pa.null())), [[], []]),
        (pa.array([], pa.list_(pa.string())), []),
    ],
    ids=lambda a: str(a)[:30],
)
def test_their_values_have_the_form_of_categories(column: Any, expected: list[Any]) -> None:
    lengths, texts = as_lists(column, "c")
    assert (taken_apart(lengths, texts) if len(lengths) else []) == expected


@given(st.lists(st.none() | st.lists(st.text("ab1.0", max_size=4), max_size=4), min_size=1, max_size=6))
def test_a_separated_text_is_its_list(rows: list[list[str] | None]) -> None:
    # One empty value and no value at all are one text: both are missing.
    texts = [None if row is None else "|".join(row) for row in rows]
    expected = [[category_text(t) for t in text.split("|")] if text else [] for text in texts]
    for column in (pa.array(texts, pa.string()), pa.array(texts, pa.string()).dictionary_encode()):
        assert taken_apart(*as_lists(column, "c", "|")) == expected


def test_lists_stay_lists_where_a_separator_is_declared() -> None:
    assert taken_apart(*as_lists(pa.array([["a|b"]]), "c", "|")) == [["a|b"]]


def test_a_separator_means_itself() -> None:
    assert taken_apart(*as_lists(pa.array(["a, b.c", "d"]), "c", ", ")) == [["a", "b.c"], ["d"]]
    assert taken_apart(*as_lists(pa.array(["a.b"]), "c", ".")) == [["a", "b"]]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (pa.array(["a|b"]), "'c' holds text, not lists; declare the feature's separator"),
        (pa.array([1, 2]), "'c' is int64, but the feature takes lists; declare kind: categorical or hashed"),
        (pa.array([[[1]], [[2]]]), "'c' is list<.*list<.*each of its lists must hold single values"),
        (pa.array([[{"a": 1}]]), "'c' is list<.*struct<.*each of its lists must hold single values"),
        (pa.array([[1.5]]), "'c' .* fractions"),
        (pa.array([[b"\xff"]]), "'c' is binary, which has no text form"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_values_that_are_no_lists_of_categories(values: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        as_lists(values, "c")
    assert "\n" not in str(caught.value)


# -- vectors


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.int8(), pa.bool_()], ids=str)
@pytest.mark.parametrize("shape", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)], ids=["list", "large", "fixed"])
def test_vectors_of_every_type(kind: pa.DataType, shape: Any) -> None:
    rows: list[Any] = [[False, True], None, [True, True]] if kind == pa.bool_() else [[0, 1], None, [1, 1]]
    column = pa.chunked_array([pa.array(rows, shape(kind)).slice(1), pa.array(rows, shape(kind)).slice(0, 1)])
    vectors = as_vectors(column, "v", 2)
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[0, 0], [1, 1], [0, 1]]


def test_missing_vectors_are_zeros() -> None:
    assert as_vectors(pa.nulls(2), "v", 3).tolist() == [[0, 0, 0]] * 2
    assert as_vectors(pa.array([], pa.list_(pa.float32())), "v", 3).shape == (0, 3)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (pa.array([[1.0, 2.0], [1.0]]), "'v' holds a list of 1 numbers, but the embedding's dim is 2"),
        (pa.array([[1.0, 2.0], []]), "'v' holds a list of 0 numbers"),
        (pa.array([[1.0] * 3], pa.list_(pa.float32(), 3)), "'v' holds a list of 3 numbers"),
        (pa.array([[1.0, None]]), "'v' holds a list with a null in it"),
        (pa.array([[1.0, float("nan")]]), "'v' holds a number in a list that is not finite"),
        (pa.array([[1.0, 1e300]]), "'v' holds a number in a list that is not finite in float32"),
        (pa.array([["1", "2"]]), r"'v' is list<.*string>, but an embedding is a list of 2 numbers"),
        (pa.array([[[1.0, 2.0]]]), r"'v' is list<.*list<.*, but an embedding is a list of 2 numbers"),
        (pa.array([1.0]), "'v' is double, but an embedding is a list of 2 numbers"),
        (pa.array(["[1, 2]"]), "'v' is string, but an embedding is a list of 2 numbers"),
    ],
    ids=lambda v: str(v)[:40],
)
def test_values_that_are_no_vector(values: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        as_vectors(values, "v", 2)
    assert "\n" not in str(caught.value)


# -- instants


@pytest.mark.parametrize(
    "kind",
    [pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.timestamp("s", "Asia/Shanghai"), pa.time64("us"), pa.duration("ms")],
    ids=str,
)
def test_instants_are_neither_categories_nor_numbers(kind: pa.DataType) -> None:
    # One instant has another text in every zone and unit: as a category it would be unknown in serving.
    column = pa.chunked_array([pa.array([1_650_000_000, None], pa.int64()).cast(kind)])
    for read in (as_category, as_number):
        with pytest.raises(UserError, match=r"'t' is .*depends on its unit and time zone; derive hour"):
            read(column, "t")
    with pytest.raises(UserError, match="depends on its unit"):
        as_lists(pa.array([[1], None], pa.list_(pa.int64())).cast(pa.list_(kind)), "t")


def test_a_date_is_a_category() -> None:
    assert as_category(pa.chunked_array([pa.array([19_090, None], pa.date32())]), "d").to_pylist() == ["2022-04-08", None]
