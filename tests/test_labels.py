"""Labels, masks, weights and groups from a schema's expressions."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_moe.errors import UserError
from recsys_moe.labels import group_ids, task_labels
from recsys_moe.schema import Schema
from recsys_moe.typed import parse

INF, NAN = float("inf"), float("nan")


def schema_of(*tasks: dict[str, Any], group: str | None = None) -> Schema:
    tasks = tuple({"name": f"t{i}"} | task for i, task in enumerate(tasks))
    parsed: Schema = parse(
        Schema, {"features": [{"name": "f", "kind": "categorical"}], "tasks": tasks, "group": group}, "schema"
    )
    return parsed


def labels(task: dict[str, Any], **columns: Any) -> tuple[list[float], list[float]]:
    y, w = task_labels(pa.table(columns), schema_of(task))
    assert y.dtype == w.dtype == np.float32
    return y[0].tolist(), w[0].tolist()


def test_a_null_label_is_unobserved() -> None:
    assert labels({"label": "y == 1"}, y=[1, 0, None]) == ([1, 0, 0], [1, 1, 0])


@pytest.mark.parametrize("values", [[True, False, None], [1, 0, None], [1.0, 0.0, None]], ids=["bool", "int", "float"])
def test_a_column_of_zeros_and_ones_is_a_label_as_it_stands(values: list[Any]) -> None:
    assert labels({"label": "y"}, y=values) == ([1, 0, 0], [1, 1, 0])


def test_the_mask_selects_rows_and_a_null_in_it_does_not() -> None:
    assert labels({"label": "y", "mask": "m > 2"}, y=[1, 1, 1, 0], m=[3, 1, None, 9]) == ([1, 0, 0, 0], [1, 0, 0, 1])


def test_the_weight_counts_where_the_label_is_observed() -> None:
    columns: dict[str, Any] = {"y": [1, 0, None, 1], "w": [0.5, 2, 7, 1], "m": [True, True, True, False]}
    assert labels({"label": "y", "weight": "w * 2", "mask": "m"}, **columns) == ([1, 0, 0, 0], [1, 4, 0, 0])


def test_a_weight_of_zero_or_null_takes_the_row_out_of_the_task() -> None:
    # Exactly as a mask would: what the loss does not see is not counted or measured either.
    columns: dict[str, Any] = {"y": [1, 1, 1, 0], "w": [2, 0, None, 1]}
    assert labels({"label": "y", "weight": "w"}, **columns) == ([1, 0, 0, 0], [2, 0, 0, 1])


@pytest.mark.parametrize("weight", [1e-60, 1e300])
def test_a_weight_that_float32_cannot_hold(weight: float) -> None:
    # The loss would be infinite, or the row would vanish without a word.
    with pytest.raises(UserError, match=r"weight 'w' of task 't0' is 1e.*, which float32 can't hold; scale it"):
        labels({"label": "y", "weight": "w"}, y=[1, 0], w=[1.0, weight])


def test_tasks_stand_in_the_schemas_order() -> None:
    schema = schema_of({"label": "y == 2"}, {"label": "y == 1", "mask": "y < 3"}, {"label": "z"})
    y, w = task_labels(pa.table({"y": [1, 2, 3], "z": [1, None, 0]}), schema)
    assert y.tolist() == [[0, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert w.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 1]]


@pytest.mark.parametrize("label", ["y", "y > 0"])
@pytest.mark.parametrize("bad", [INF, -INF])
def test_infinite_labels_are_errors_even_behind_a_comparison(label: str, bad: float) -> None:
    with pytest.raises(UserError, match="label column 'y' of task 't0' holds an infinite value in 2 rows"):
        labels({"label": label}, y=pa.chunked_array([[1.0, bad], [None, bad]]))


@pytest.mark.parametrize("label", ["y", "y > 0", "not y < 1", "y in [1]"])
def test_a_label_of_nan_is_unobserved_even_behind_a_comparison(label: str) -> None:
    # NaN > 0 is false: a lost label would silently become a negative.
    y, w = labels({"label": label}, y=pa.chunked_array([[1.0, NAN], [None, 0.0]]))
    assert (y, w) == ([1, 0, 0, 0], [1, 0, 0, 1])


@pytest.mark.parametrize("value", [2, -1, 0.5])
def test_a_label_that_is_not_binary_names_the_value(value: float) -> None:
    with pytest.raises(UserError, match=f"label 'y' of task 't0' gives {value}; a binary label is 0 or 1"):
        labels({"label": "y"}, y=[1, 0, value])


def test_a_huge_label_is_not_binary_either() -> None:
    with pytest.raises(UserError, match="label 'y' of task 't0' gives"):
        labels({"label": "y"}, y=[2**53 + 1, 0])


def test_a_label_of_strings_is_told_to_compare() -> None:
    with pytest.raises(UserError, match=r"label 'y' of task 't0' is string such as .*, not true or false; compare it"):
        labels({"label": "y"}, y=["yes", "no"])


@pytest.mark.parametrize("bad", [-1.0, NAN, INF])
def test_a_weight_is_finite_and_not_negative(bad: float) -> None:
    with pytest.raises(UserError, match="weight 'w' of task 't0' is negative or not finite"):
        labels({"label": "y", "weight": "w"}, y=[1, 0], w=[1.0, bad])


def test_a_weight_of_strings_is_told_by_its_task() -> None:
    with pytest.raises(UserError, match="weight 'w' of task 't0'"):
        labels({"label": "y", "weight": "w"}, y=[1, 0], w=["heavy", "light"])


def test_a_mask_is_true_or_false() -> None:
    with pytest.raises(UserError, match="mask 'm' of task 't0' is int64, not true or false"):
        labels({"label": "y", "mask": "m"}, y=[1, 0], m=[1, 0])


@pytest.mark.parametrize(
    "values",
    [[5, 9, 5, -2], ["a", "b", "a", "c"], [5, None, 5, 7], ["a", None, "a", ""]],
    ids=["int", "string", "int with null", "string with null"],
)
def test_groups_are_equal_where_the_values_are(values: list[Any]) -> None:
    groups = group_ids(pa.table({"g": values}), schema_of({"label": "y"}, group="g"))
    assert groups is not None
    assert groups.dtype == np.int64
    assert (groups[:, None] == groups).tolist() == [[a == b for b in values] for a in values]


@pytest.mark.parametrize("values", [[5, None], ["5", None]], ids=["int", "string"])
def test_a_group_is_the_same_in_every_chunk(values: list[Any]) -> None:
    # A null in one chunk must not give the other rows of that chunk other groups than they have elsewhere.
    schema = schema_of({"label": "y"}, group="g")
    with_null, without = (group_ids(pa.table({"g": v}), schema) for v in (values, values[:1]))
    assert with_null is not None
    assert without is not None
    assert with_null[0] == without[0]


def test_no_group_column_no_groups() -> None:
    assert group_ids(pa.table({"y": [1]}), schema_of({"label": "y"})) is None


# -- labels of other kinds

REGRESSION = {"label": "y", "kind": "regression"}
MULTICLASS = {"label": "y", "kind": "multiclass", "classes": ["a", 1, True]}
ORDINAL = {"label": "y", "kind": "ordinal", "levels": [1, 2, 5]}


def test_a_regressions_label_is_its_number_and_the_expression_may_compute_it() -> None:
    assert labels(REGRESSION, y=[1.5, None, -3.0]) == ([1.5, 0, -3.0], [1, 0, 1])
    assert labels(REGRESSION | {"label": "y / 1000"}, y=[1500, 0, None]) == ([1.5, 0, 0], [1, 1, 0])
    assert labels(REGRESSION, y=pa.array([1, 2], pa.decimal128(5, 2))) == ([1, 2], [1, 1])


@pytest.mark.parametrize(
    "values",
    [["a", "1", "true", None, ""], pa.array(["a", "1.0", "True", None, None]).dictionary_encode()],
    ids=["text", "dictionary"],
)
def test_a_class_is_its_place_among_those_declared(values: Any) -> None:
    # In the one text form that categories have.
    assert labels(MULTICLASS, y=values) == ([0, 1, 2, 0, 0], [1, 1, 1, 0, 0])


@pytest.mark.parametrize("values", [[5, 1, None], [5.0, 1.0, None], ["5", "1", None]], ids=["int", "float", "text"])
def test_a_level_is_its_place_too(values: list[Any]) -> None:
    assert labels(ORDINAL, y=values) == ([2, 0, 0], [1, 1, 0])


def test_a_class_that_is_not_declared_is_named_unless_it_is_masked_out() -> None:
    with pytest.raises(UserError, match=r"label 'y' of task 't0' gives '4', which the task does not declare; valid: 1, 2, 5"):
        labels(ORDINAL, y=[1, 4])
    with pytest.raises(UserError, match=r"gives 'aa', .* did you mean 'a'\? Declare it, or mask such rows out"):
        labels(MULTICLASS, y=["a", "aa"])
    assert labels(ORDINAL | {"mask": "y != 4"}, y=[1, 4, 5]) == ([0, 0, 2], [1, 0, 1])
    assert labels(ORDINAL | {"weight": "w"}, y=[1, 4, 5], w=[1, 0, 2]) == ([0, 0, 2], [1, 0, 2])


@pytest.mark.parametrize(
    ("task", "values", "sentence"),
    [
        (REGRESSION, ["long"], "label 'y' of task 't0' is string such as 'long', not a number; a regression needs one"),
        (REGRESSION, [1.0, INF], "holds an infinite value in 1 rows"),
        (REGRESSION, [1e39], "gives 1e[+]39, which float32 can't hold; scale it"),
        (REGRESSION | {"label": "1 / y"}, [0.0], "gives inf, which float32 can't hold"),
        (ORDINAL, [1.5], "label 'y' of task 't0' is double, whose values are no classes; use whole numbers or text"),
        (MULTICLASS, [["a"]], "label 'y' of task 't0' is list<.*, whose values are no classes"),
    ],
    ids=str,
)
def test_a_label_that_its_kind_cannot_have(task: dict[str, Any], values: list[Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        labels(task, y=pa.array(values, from_pandas=False))
    assert "\n" not in str(caught.value)


def test_a_group_of_lists_is_refused() -> None:
    features, tasks = [{"name": "c", "kind": "categorical"}], [{"name": "y", "label": "y"}]
    schema = parse(Schema, {"features": features, "tasks": tasks, "group": "g"}, "schema")
    with pytest.raises(UserError, match=r"group column 'g' is list.*which names no group"):
        group_ids(pa.table({"g": [[1], [2, 3]]}), schema)
