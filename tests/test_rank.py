"""Ranking: the scores of plain rows, fused and ordered; user features looked at once; one sentence for every mistake."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from recsys_moe.columns import as_category
from recsys_moe.errors import UserError
from recsys_moe.predictor import Predictor
from recsys_moe.schema import Schema
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import FormulaConfig, ServeConfig
from recsys_moe.serving.fuse import Formula
from recsys_moe.transforms import PartialStatistics, Transform
from recsys_moe.typed import parse
from tests.test_serving import save

WEIGHED = FormulaConfig("product", {"click": 2.0, "buy": 1.0}, {"buy": 0.5})
CANDIDATES = {"ids": ["a", "b", 3], "features": {"price": [1.0, None, 3]}}
REQUEST: dict[str, Any] = {"request_id": "r1", "user": {"colour": "red"}, "candidates": CANDIDATES}
ROWS = pa.table({"colour": ["red"] * 3, "price": [1.0, None, 3.0]})


def prices(*values: Any, name: str = "price") -> dict[str, Any]:
    return {"candidates": {"ids": list(range(len(values))), "features": {name: values}}}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("rank") / "bundle")


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[TestClient]:
    config = ServeConfig(max_candidates=100, max_body_mb=0.5, formula=WEIGHED, request_formula=True)
    with TestClient(build_api(bundle, config), raise_server_exceptions=False) as client:
        yield client


def rank(client: TestClient, **changes: Any) -> dict[str, Any]:
    answer = client.post("/v1/rank", json=REQUEST | changes)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_scores_are_the_bits_of_plain_rows_and_the_order_is_the_formulas(client: TestClient, bundle: Path) -> None:
    answer = rank(client)
    click, buy = Predictor(bundle).score(ROWS).astype(np.float64)
    fused = 2.0 * click * np.sqrt(buy)
    order = np.argsort(-fused, kind="stable").tolist()
    assert answer["request_id"] == "r1"
    assert answer["positions"] == order
    assert answer["ranking"] == [CANDIDATES["ids"][place] for place in order]  # type: ignore[index]
    assert answer["scores"] == {"click": click[order].tolist(), "buy": buy[order].tolist()}
    np.testing.assert_allclose(answer["fused"], fused[order], rtol=1e-15)
    assert answer["model"]["name"] == "bundle"
    assert set(answer["timings_ms"]) == {"parse", "wait", "features", "score", "rank"}


def test_tasks_and_top_n_choose_what_is_returned(client: TestClient) -> None:
    whole, part = rank(client), rank(client, tasks=["buy"], top_n=2)
    assert part["ranking"] == whole["ranking"][:2]
    assert part["scores"] == {"buy": whole["scores"]["buy"][:2]}
    assert part["fused"] == whole["fused"][:2]


def test_of_equals_the_first_comes_first(client: TestClient) -> None:
    answer = rank(client, candidates={"ids": list("dbca"), "features": {"price": [1, 1.0, 1, 1]}})
    assert answer["ranking"] == list("dbca")


def test_a_request_may_bring_its_formula(client: TestClient) -> None:
    answer = rank(client, formula={"form": "sum", "weights": {"buy": -1.0}})
    assert answer["fused"] == [-score for score in answer["scores"]["buy"]]
    assert answer["scores"]["buy"] == sorted(answer["scores"]["buy"])


def test_the_nearer_value_counts_and_names_that_are_no_features_are_told(client: TestClient) -> None:
    answer = rank(client, context={"colour": "green", "hour": 7}, user={"colour": "red", "age": 1})
    assert answer["scores"] == rank(client, user={"colour": "green"})["scores"]
    assert sorted(answer["ignored"]) == ["age", "hour"]


def test_a_user_is_transformed_once(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(column: Any, name: str) -> Any:
        seen.append((name, len(column)))
        return as_category(column, name)

    monkeypatch.setattr("recsys_moe.transforms.as_category", watched)
    for _ in range(2):
        rank(client, user={"colour": "not seen before"})
    assert seen == [("colour", 1)]  # and kept


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"candidates": {"ids": []}}, "candidates.ids is []: list should have at least 1 item"),
        ({"candidates": {"ids": list(range(101))}}, "101 candidates, more than serve.max_candidates = 100; send fewer"),
        ({"candidates": {"ids": [1.5]}}, "candidates.ids.0"),
        ({"candidates": {"ids": [1], "features": {"price": [1, 2]}}}, "candidates.features.price has 2 values for 1 cand"),
        (prices(1, name="prise"), "feature 'price' is in none of candidates.features, context and user"),
        (prices(1, name="prise"), "did you mean 'prise'?"),
        (prices(1, "x"), "candidate 1 has 'price' = 'x', which is not a number"),
        (prices({"eur": 1}), "candidate 0 has 'price' = {'eur': 1}, which is not"),
        (prices(1e300), "too large for float32"),
        ({"user": {"colour": ["red"]}}, "user has 'colour' = ['red'], which is not one value"),
        ({"context": {"colour": {}}}, "context has 'colour' = {}, which is not one value"),
        ({"tasks": ["clik"]}, "tasks names 'clik', which model 'bundle' does not have; did you mean 'click'?"),
        ({"tasks": []}, "tasks is []"),
        ({"model": "other"}, "model 'other' is not served here; valid: bundle"),
        ({"top_n": 0}, "top_n is 0"),
        ({"top_n": "2"}, "top_n is '2': input should be a valid integer"),
        ({"top_n": True}, "top_n is True"),
        (
            {"formula": {"weights": {"clik": 1}}},
            "the formula names 'clik', which the model does not score",
        ),
        ({"formula": {"form": "max"}}, "formula.form is 'max'"),
        ({"request_id": "x" * 201}, "request_id is 'xxx"),
        ({"usr": {}}, "usr is {}: extra inputs are not permitted"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_a_mistake_is_told_in_one_sentence(client: TestClient, changes: dict[str, Any], told: str) -> None:
    answer = client.post("/v1/rank", json=REQUEST | changes)
    assert answer.status_code == 422, answer.text
    assert list(answer.json()) == ["error"]
    assert told in answer.json()["error"]
    assert "\n" not in answer.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{not json",
        b"[]",
        b"null",
        b'{"user": ' + b"[" * 100_000,
        b'{"candidates": {"ids": [' + b"9" * 5000 + b"]}}",
    ],
    ids=["empty", "json", "list", "null", "depth", "digits"],
)
def test_a_body_that_is_no_request(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/rank", content=body)
    assert answer.status_code == 422
    assert len(answer.json()["error"]) < 300


def test_infinity_is_refused_and_nan_is_missing(client: TestClient) -> None:
    def post(price: str) -> Any:
        body = json.dumps(REQUEST | {"candidates": {"ids": [1], "features": {"price": ["?"]}}}).replace('"?"', price)
        return client.post("/v1/rank", content=body)

    assert "column 'price' holds an infinite value" in post("Infinity").json()["error"]
    assert "column 'price' holds an infinite value" in post("1e999").json()["error"]
    assert post("NaN").json()["scores"] == post("null").json()["scores"]


def test_a_formula_is_the_services_unless_it_is_told_otherwise(bundle: Path) -> None:
    with TestClient(build_api(bundle, ServeConfig())) as client:
        answer = client.post("/v1/rank", json=REQUEST | {"formula": {}})
    assert (answer.status_code, answer.json()["error"][:36]) == (422, "formula is the service's to choose; ")


def test_a_service_of_an_impossible_formula_does_not_start(bundle: Path) -> None:
    with pytest.raises(UserError, match="the formula names 'like', which the model does not score"):
        build_api(bundle, ServeConfig(formula=FormulaConfig(weights={"like": 1.0})))


def test_the_documented_request_is_the_one_that_is_taken(client: TestClient) -> None:
    form = client.get("/openapi.json").json()["paths"]["/v1/rank"]["post"]
    schema = form["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) >= {*REQUEST, "top_n", "tasks", "formula", "model", "context", "user_id"}
    assert "$ref" not in json.dumps(schema)


# -- the formula


@given(
    st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
    st.lists(st.floats(-3, 3), min_size=2, max_size=2),
    st.lists(st.floats(-3, 3), min_size=2, max_size=2),
)
def test_formulas_are_what_they_say(scores: list[float], weights: list[float], powers: list[float]) -> None:
    table = np.array(scores, np.float32).reshape(2, 2)
    for form in ("sum", "product"):
        config = FormulaConfig(form, dict(zip("ab", weights, strict=True)), dict(zip("ab", powers, strict=True)))  # type: ignore[arg-type]
        for row, fused in enumerate(Formula(config, ("a", "b"))(table)):
            terms = []
            for score, weight, power in zip(table[:, row].tolist(), weights, powers, strict=True):
                terms.append(weight * (max(score, 1e-12) if power < 0 else score) ** power)
            expected = sum(terms) if form == "sum" else terms[0] * terms[1]
            assert fused == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_a_root_of_a_negative_score_is_refused() -> None:
    with pytest.raises(UserError, match="no finite number for 'profit'; choose another power"):
        Formula(FormulaConfig(powers={"profit": 0.5}), ("click", "profit"))(np.array([[1], [-2]], np.float32))


# -- a user's features for all candidates at once

EVERY_KIND: Schema = parse(
    Schema,
    {
        "features": [
            {"name": "city", "kind": "categorical"},
            {"name": "user", "kind": "hashed", "buckets": 50},
            {"name": "item", "kind": "hashed", "buckets": 50, "collisions": "none"},
            {"name": "both", "kind": "cross", "of": ["user", "item"], "buckets": 99},
            {"name": "age", "kind": "numeric", "buckets": 4, "missing_indicator": True, "log1p": True},
            {"name": "tags", "kind": "multi"},
            {"name": "seen", "kind": "sequence", "max_length": 2},
            {"name": "look", "kind": "embedding", "dim": 2},
        ],
        "tasks": [{"name": "click", "label": "y == 1"}],
    },
    "schema",
)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "city": st.none() | st.sampled_from(["a", "b", "c"]),
    "user": st.none() | st.integers(0, 9),
    "item": st.none() | st.integers(0, 9),
    "age": st.none() | st.floats(-5, 5),
    "tags": st.none() | st.lists(st.sampled_from("xyz"), max_size=3),
    "seen": st.none() | st.lists(st.sampled_from("xyz"), max_size=3),
    "look": st.none() | st.lists(st.floats(-1, 1), min_size=2, max_size=2),
}
TYPES = {"city": pa.string(), "user": pa.int64(), "item": pa.int64(), "age": pa.float64(), "look": pa.list_(pa.float64())}


@given(data=st.data(), once=st.sets(st.sampled_from(sorted(VALUES))), rows=st.integers(1, 4))
def test_one_value_for_all_rows_is_that_value_in_each(data: st.DataObject, once: set[str], rows: int) -> None:
    columns, table = {}, {}
    for name, values in VALUES.items():
        number = 1 if name in once else rows
        drawn = data.draw(st.lists(values, min_size=number, max_size=number), name)
        kind = TYPES.get(name, pa.list_(pa.string()))
        columns[name] = pa.chunked_array([pa.array(drawn, kind)])
        table[name] = pa.chunked_array([pa.array(drawn * (rows if name in once else 1), kind)])
    transform = Transform(EVERY_KIND, PartialStatistics.of(pa.table(table), EVERY_KIND).finish(EVERY_KIND))
    short, whole = transform.of_columns(columns, rows), transform(pa.table(table))
    np.testing.assert_array_equal(short.ids, whole.ids)
    np.testing.assert_array_equal(short.dense, whole.dense)
    for one, other in zip(short.lists, whole.lists, strict=True):
        np.testing.assert_array_equal(one.values, other.values)
        np.testing.assert_array_equal(one.offsets, other.offsets)


@given(value=st.floats(-1e30, 1e30), log1p=st.booleans(), standardise=st.booleans(), buckets=st.sampled_from([0, 4]))
def test_a_users_number_becomes_what_a_column_of_it_does(value: float, log1p: bool, standardise: bool, buckets: int) -> None:
    feature = {"name": "price", "kind": "numeric", "missing_indicator": True, "log1p": log1p, "standardise": standardise}
    task = {"name": "click", "label": "click == 1"}
    schema: Schema = parse(Schema, {"features": [feature | {"buckets": buckets}], "tasks": [task]}, "schema")
    transform = Transform(schema, PartialStatistics.of(pa.table({"price": [1.0, 2.0, 3.5, None]}), schema).finish(schema))
    one, column = transform.encode_number("price", value), transform.encode("price", pa.chunked_array([[value]]))
    np.testing.assert_array_equal(one.dense, column.dense)
    np.testing.assert_array_equal(one.ids, column.ids)
