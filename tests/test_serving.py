"""The scoring service without a cluster: what valid JSON is worth, and one form for every refusal."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recsys_moe.bundle import FORMAT, BundleConfig, save_bundle
from recsys_moe.errors import UserError
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.predictor import Predictor
from recsys_moe.ranker import Ranker
from recsys_moe.schema import Schema
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.requests import as_text, rows_to_table
from recsys_moe.sources import DataConfig, read_rows
from recsys_moe.transforms import PartialStatistics, Transform
from recsys_moe.typed import parse

ROW: dict[str, Any] = {"colour": "red", "price": 1.5}


SCHEMA: Schema = parse(
    Schema,
    {
        "features": [{"name": "colour", "kind": "categorical"}, {"name": "price", "kind": "numeric", "buckets": 4}],
        "tasks": [{"name": "click", "label": "click == 1"}, {"name": "buy", "label": "buy == 1"}],
    },
    "schema",
)
TRAINING = pa.table({"colour": ["red", "red", "green", None], "price": [1.0, 2.0, 3.0, None]})


def save(folder: Path, seed: int = 0) -> Path:
    """A bundle of a model as it is before training."""
    transform = Transform(SCHEMA, PartialStatistics.of(TRAINING, SCHEMA).finish(SCHEMA))
    config = MMoEConfig(embedding_dim=4, num_experts=2, expert_dims=(8,), tower_dims=(4,))
    described = BundleConfig(FORMAT, config, "fp32", DataConfig(name="clicks", source="nowhere", schema="-"), "0" * 64)
    torch.manual_seed(seed)
    model = Ranker(config, transform.sparse_names, transform.cardinalities, len(transform.dense_names), {"click": 1, "buy": 1})
    save_bundle(folder, model.state_dict(), described, transform, {})
    return folder


@contextmanager
def listening(api: FastAPI) -> Iterator[int]:
    """A real server of the interface; yields its port on loopback."""
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    (port,) = {listener.getsockname()[1] for each in server.servers for listener in each.sockets}
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("serving") / "bundle")


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[TestClient]:
    api = build_api(bundle, ServeConfig(max_rows=100, max_body_mb=0.5))
    with TestClient(api, raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, body: Any) -> tuple[int, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/v1/score", content=content, headers={"Content-Type": "application/json"})
    return answer.status_code, answer.json()


def sentence(client: TestClient, body: Any, status: int = 422) -> str:
    got, answer = post(client, body)
    assert got == status, answer
    assert list(answer) == ["error"]
    assert "\n" not in answer["error"]
    assert len(answer["error"]) < 400
    return str(answer["error"])


def test_scores_are_the_predictors(client: TestClient, bundle: Path) -> None:
    status, answer = post(client, {"rows": TRAINING.to_pylist()})
    assert status == 200
    np.testing.assert_allclose(list(answer["scores"].values()), Predictor(bundle).score(TRAINING), atol=1e-6)


# -- one value, one id


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (272, "272"),
        (272.0, "272"),
        ("272.0", "272"),
        (2**62 + 1, str(2**62 + 1)),
        (10**400, str(10**400)),
        (True, "true"),
        ("True", "true"),
        (1.5, "1.5"),
        (1.76e18, "1760000000000000000"),
        (-0.0, "0"),
        (float("nan"), None),
        ("", None),
        (None, None),
    ],
    ids=lambda v: str(v)[:20],
)
def test_a_category_as_text(value: Any, text: str | None) -> None:
    assert as_text(value) == text


CODES: Schema = parse(
    Schema,
    {
        "features": [{"name": "code", "kind": "categorical"}, {"name": "x", "kind": "numeric"}],
        "tasks": [{"name": "t", "label": "y == 1"}],
    },
    "schema",
)
TEXTS = ["a", "b c", "é", '"', "007", "True", "false", "1", "1.0", "-0", "1e+16", "", "nan"]
columns = st.one_of(
    st.lists(st.none() | st.integers(-(2**53), 2**53), min_size=1, max_size=6),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6),
    st.lists(st.none() | st.booleans(), min_size=1, max_size=6),
    st.lists(st.none() | st.integers(-(2**60), 2**60).map(float) | st.just(-0.0), min_size=1, max_size=6),
    st.lists(st.none() | st.sampled_from(TEXTS), min_size=1, max_size=6),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=columns, seen=st.integers(1, 6))
def test_rows_have_the_same_ids_as_parquet_csv_and_json(values: list[Any], seen: int, tmp_path: Path) -> None:
    frame = pd.DataFrame({"code": values, "x": 1.0})
    frame.to_parquet(tmp_path / "rows.parquet")
    frame.to_csv(tmp_path / "rows.csv", index=False)
    forms = [pa.concat_tables(read_rows(tmp_path / f"rows.{kind}", CODES, labels=False)) for kind in ("parquet", "csv")]
    forms.append(rows_to_table(json.loads(json.dumps(frame.to_dict("records"))), CODES))
    # Whatever form the vocabulary was learnt from, every form of the rows gets the same ids.
    transforms = [Transform(CODES, PartialStatistics.of(form.slice(0, seen), CODES).finish(CODES)) for form in forms]
    ids = [transform(form).ids.tolist() for transform in transforms for form in forms]
    assert ids == [ids[0]] * 9


def test_numbers_are_rounded_as_preparation_rounds_them(client: TestClient, bundle: Path, tmp_path: Path) -> None:
    large = 2**53 + 1  # the first whole number that float64 can't hold
    pq.write_table(pa.table({"colour": ["red"], "price": [large]}), tmp_path / "large.parquet")
    (table,) = read_rows(tmp_path / "large.parquet", Predictor(bundle).bundle.schema, labels=False)
    status, answer = post(client, {"rows": [ROW | {"price": large}]})
    assert status == 200
    np.testing.assert_allclose(list(answer["scores"].values()), Predictor(bundle).score(table), atol=1e-6)


def test_nan_is_missing(client: TestClient) -> None:
    status, answer = post(client, {"rows": [{"colour": float("nan"), "price": float("nan")}, {"colour": None, "price": None}]})
    assert status == 200
    assert all(first == second for first, second in answer["scores"].values())


def test_a_whole_number_of_any_length_may_be_a_category(client: TestClient) -> None:
    assert post(client, {"rows": [ROW | {"colour": 10**400}]})[0] == 200


# -- refusals


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"colour": "red"}, "row 0 has no feature 'price'; add it, or null"),
        (ROW | {"price": "cheap"}, "row 0 has 'price' = 'cheap', which is not a number"),
        (ROW | {"price": True}, "row 0 has 'price' = True, which is not a number"),
        (ROW | {"price": 10**400}, "row 0 has 'price' = 1000"),
        (ROW | {"price": 1e300}, "column 'price' holds a value too large"),
        (ROW | {"price": float("inf")}, "column 'price' holds an infinite value"),
        (ROW | {"colour": float("-inf")}, "row 0 has 'colour' = -inf, which is no category"),
        (ROW | {"colour": "\ud800"}, "the body can't be read as JSON (unexpected end of hex escape"),
        (ROW | {"colour": ["red"]}, "row 0 has 'colour' = ['red'], which is not one value"),
        (ROW | {"price": {"eur": 1}}, "row 0 has 'price' = {'eur': 1}, which is not one value"),
        (ROW | {"price": "9" * 10_000}, "row 0 has 'price' = '999"),
        (["red", 1.5], "rows.0 is "),
        (None, "rows.0 is "),
    ],
    ids=lambda v: str(v)[:50].encode("ascii", "backslashreplace").decode(),
)
def test_a_bad_row_is_told_in_one_sentence(client: TestClient, row: Any, expected: str) -> None:
    assert expected in sentence(client, {"rows": [row]})


def test_what_is_no_feature_is_not_looked_at(client: TestClient) -> None:
    assert post(client, {"rows": [ROW | {"more": {}}]})[0] == 200


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"rows": [{"colour": "\xff", "price": 1}]}', 422),
        (b'{"rows": ' + b"[" * 100_000, 422),
        (b'{"rows": [{"colour": ' + b"9" * 5000 + b', "price": 1}]}', 422),
        (b"{not json", 422),
        (b"", 422),
        (b"[]", 422),
        (b'{"rows": []}', 422),
        (b'{"rows": [{}], "more": 1}', 422),
        (b"0" * 2**20, 413),
        (json.dumps({"rows": [ROW] * 101}).encode(), 422),
    ],
    ids=["utf-8", "depth", "digits", "json", "empty", "list", "no rows", "extra", "large", "many"],
)
def test_a_bad_body_is_told_in_one_sentence(client: TestClient, body: bytes, status: int) -> None:
    sentence(client, body, status)


@pytest.mark.parametrize(
    ("method", "path", "status", "expected"),
    [
        ("POST", "/v1/score/", 404, "POST '/v1/score/' is not part of this service; see /docs"),
        ("GET", "/v2/score", 404, "GET '/v2/score' is not part of this service; see /docs"),
        ("GET", "/" + "x" * 9999, 404, "GET '/xxxxxxxxxxx...xxxxxxxxxxxxx' is not part of this service; see /docs"),
        ("GET", "/v1/score", 405, "GET '/v1/score' is not part of this service; see /docs"),
        ("POST", "/v1/model", 405, "POST '/v1/model' is not part of this service; see /docs"),
    ],
)
def test_another_path_or_method(client: TestClient, method: str, path: str, status: int, expected: str) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json() == {"error": expected}


def test_a_mistake_of_ours_tells_no_internals(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("internal/path.py is broken")

    monkeypatch.setattr(Predictor, "score_inputs", fail)
    told = sentence(client, {"rows": [ROW]}, 500)
    assert "internal" not in told.replace("internal error", "")
    assert post(client, {"rows": [ROW]})[0] == 500  # and it goes on


# -- what is served


def test_a_model_that_was_trained_again_has_another_name(tmp_path: Path) -> None:
    def name(folder: Path) -> str:
        with TestClient(build_api(folder, ServeConfig())) as client:
            served = client.get("/v1/model").json()["model"]
            assert post(client, {"rows": [ROW]})[1]["model"] == served
            return str(served)

    first = name(save(tmp_path / "first", seed=0))
    assert first.startswith("mmoe:")
    assert first == name(save(tmp_path / "same", seed=0))
    assert first != name(save(tmp_path / "again", seed=1))


def test_rows_to_table_names_the_row() -> None:
    with pytest.raises(UserError, match="row 1 has 'x' = 'many'"):
        rows_to_table([{"code": "a", "x": 1}, {"code": "a", "x": "many"}], CODES)
