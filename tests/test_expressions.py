"""Expressions against Python's own evaluation of the same text, row by row."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_moe.errors import UserError
from recsys_moe.expressions import Expression

TABLE = pa.table(
    {
        "age": [17, 30, 65, None],
        "income": [0.5, None, -2.0, 8.0],
        "state": ["Never married", "Widowed", None, "Divorced"],
        "member": [True, False, None, True],
    }
)


def value(text: str, table: pa.Table = TABLE) -> list[object]:
    return Expression(text)(table).to_pylist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('state == "Never married"', [True, False, None, False]),
        ('state != "Widowed"', [True, False, None, True]),
        ("age < 30", [True, False, False, None]),
        ("age <= 30", [True, True, False, None]),
        ("30 > age", [True, False, False, None]),
        ("age >= 30", [False, True, True, None]),
        ("18 <= age < 65", [False, True, False, None]),
        ("income > -2", [True, None, False, True]),
        ("member", [True, False, None, True]),
        ("not member", [False, True, None, False]),
        ("member == True", [True, False, None, True]),
        ("state in ['Widowed', 'Divorced']", [False, True, None, True]),
        ("state not in ('Widowed', 'Divorced')", [True, False, None, False]),
        ("age in []", [False, False, False, None]),
        ("age in [17, 65]", [True, False, True, None]),
        # Whole numbers over whole numbers give fractions, as in Python 3.
        ("age / 2 == 8.5", [True, False, False, None]),
        ("age * 2 - 4 + 1", [31, 57, 127, None]),
        ("-age", [-17, -30, -65, None]),
        ("1 < 2", [True] * 4),
    ],
)
def test_value_by_row(text: str, expected: list[object]) -> None:
    assert value(text) == expected


def kleene(op: str, a: bool | None, b: bool | None) -> bool | None:
    decisive = op == "or"
    if decisive in (a, b):
        return decisive
    return None if None in (a, b) else not decisive


@pytest.mark.parametrize("op", ["and", "or"])
def test_nulls_follow_kleenes_truth_table(op: str) -> None:
    truth = [True, False, None]
    rows = [(a, b) for a in truth for b in truth]
    table = pa.table({"a": pa.array([a for a, _ in rows], pa.bool_()), "b": pa.array([b for _, b in rows], pa.bool_())})
    assert value(f"a {op} b", table) == [kleene(op, a, b) for a, b in rows]


numbers = st.recursive(
    st.sampled_from(["x", "y", "1", "2.5", "3"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=6,
)
comparisons = st.tuples(numbers, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), numbers).map(" ".join)
conditions = st.recursive(
    comparisons,
    lambda inner: (
        inner.map(lambda t: f"not ({t})")
        | st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({t[0]}) {t[1]} ({t[2]})")
    ),
    max_leaves=4,
)
# Quarters: sums and products stay exact, so == means the same on both sides.
quarters = st.integers(-40, 40).map(lambda n: n / 4)


@given(text=conditions, rows=st.lists(st.tuples(quarters, quarters), min_size=1, max_size=5))
def test_agrees_with_python(text: str, rows: list[tuple[float, float]]) -> None:
    table = pa.table({"x": [x for x, _ in rows], "y": [y for _, y in rows]})
    expected = [eval(text, {}, {"x": x, "y": y}) for x, y in rows]
    assert value(text, table) == expected


def test_columns_are_the_names_read() -> None:
    assert Expression("b > 1 and a in ['c'] or b < 0").columns == ("a", "b")


def test_evaluates_chunked_tables_and_tables_without_rows() -> None:
    assert value("age > 20", pa.concat_tables([TABLE, TABLE])) == 2 * value("age > 20")
    assert value("age > 20", TABLE.slice(0, 0)) == []


@pytest.mark.parametrize("op", ["==", "in"])
def test_a_dictionary_encoded_column_compares_as_its_values(op: str) -> None:
    # What pandas writes for its categories.
    table = pa.table({"state": pa.array(["Widowed", None, "Divorced"]).dictionary_encode()})
    wanted = "'Widowed'" if op == "==" else "['Widowed']"
    assert value(f"state {op} {wanted}", table) == [True, None, False]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("len(state) > 3", "Call"),
        ("state.name == 1", "Attribute"),
        ("state[0] == 'N'", "Subscript"),
        ("[a for a in state]", "ListComp"),
        ("(lambda: 1)()", "Call"),
        ("age ** 2 > 4", "Pow"),
        ("state is None", "Is"),
        ("f'{state}' == 'x'", "JoinedStr"),
    ],
)
def test_refuses_the_rest_of_python(text: str, part: str) -> None:
    # An expression comes from a file: it must never be able to run anything.
    with pytest.raises(UserError, match=f"uses {part}, which is not part of the language"):
        Expression(text)


@pytest.mark.parametrize("text", ["age >", "age = 3", "", "age == 1; age"])
def test_syntax_errors_are_told(text: str) -> None:
    with pytest.raises(UserError, match="can't be read"):
        Expression(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("agge > 3", "needs column 'agge', which the data lacks; did you mean 'age'"),
        ("age == 'old'", r"can't be evaluated, since age is int64 \(.*; mend the column"),
        ("not age", r"can't be evaluated, since age is int64 \(.*; mend the column"),
        ("state + 1 == 2", r"can't be evaluated, since state is string such as .* \(.*; mend the column"),
        ("[1, 2]", "only behind 'in'"),
        ("age in state", "write a list of constants behind 'in'"),
        ("age in ['old']", r"can't be evaluated, since age is int64 \(.*; mend the column"),
    ],
)
def test_evaluation_errors_name_the_column_and_its_type(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        value(text)


def test_in_a_list_with_a_value_that_the_column_cannot_hold() -> None:
    # 17 == 1.5 is false, not an error: so is 17 in [1.5].
    assert value("age in [17, 1.5]") == [True, False, False, None]


def test_a_number_that_no_column_holds_is_told() -> None:
    with pytest.raises(UserError, match="can't be evaluated, since y is int64"):
        Expression("y > 99999999999999999999")(pa.table({"y": [1, 2]}))
