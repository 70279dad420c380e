"""Features by id: what a request leaves out comes from a mapped file, which may be replaced at any time."""

import os
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
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.features import FeatureTable
from recsys_moe.typed import parse
from tests.test_serving import save


def write(path: Path, table: pa.Table, **options: Any) -> Path:
    """As the README says: beside it, then renamed."""
    temporary = path.with_suffix(".tmp")
    with pa.ipc.new_file(temporary, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as file:
        file.write_table(table)
    os.replace(temporary, path)
    return path


ITEMS = pa.table({"item": [7, 40, 9], "price": [1.0, 2.0, None]})
USERS = pa.table({"user": ["u1", "u2"], "colour": ["red", "green"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("features")
    save(made / "bundle")
    return made


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    config = ServeConfig(
        item_key="item",
        user_key="user",
        item_features=str(write(folder / "items.arrow", ITEMS)),
        user_features=str(write(folder / "users.arrow", USERS)),
    )
    with TestClient(build_api(folder / "bundle", config)) as client:
        yield client


def scores(client: TestClient, **request: Any) -> tuple[list[float], int]:
    answer = client.post("/v1/rank", json=request)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    by_place = sorted(zip(found["positions"], found["scores"]["click"], strict=True))
    return [score for _, score in by_place], found["unknown_ids"]


def expected(folder: Path, colours: list[str | None], prices: list[float | None]) -> list[float]:
    table = pa.table({"colour": pa.array(colours, pa.string()), "price": pa.array(prices, pa.float64())})
    found: list[float] = Predictor(folder / "bundle").score(table)[0].astype(float).tolist()
    return found


def test_ids_are_enough(client: TestClient, folder: Path) -> None:
    got = scores(client, user_id="u2", candidates={"ids": [9, "7", 40]})
    assert got == (expected(folder, ["green"] * 3, [None, 1.0, 2.0]), 0)


def test_what_the_file_lacks_is_missing_and_counted(client: TestClient, folder: Path) -> None:
    got = scores(client, user_id="stranger", candidates={"ids": [7, 8, 10**30]})
    assert got == (expected(folder, [None] * 3, [1.0, None, None]), 3)
    assert scores(client, candidates={"ids": [7]}) == (expected(folder, [None], [1.0]), 1)


def test_what_is_sent_goes_before_what_is_stored(client: TestClient, folder: Path) -> None:
    got = scores(client, user_id="u1", user={"colour": "blue"}, candidates={"ids": [7], "features": {"price": [5]}})
    assert got == (expected(folder, ["blue"], [5.0]), 0)


def test_a_file_that_is_replaced_is_read_again_and_a_bad_one_is_not_taken(client: TestClient, folder: Path) -> None:
    def now() -> tuple[list[float], int]:
        for refresh in client.app.state.service.refreshed:  # type: ignore[attr-defined]
            refresh()
        return scores(client, user_id="u1", candidates={"ids": [7]})

    assert now() == (expected(folder, ["red"], [1.0]), 0)
    write(folder / "items.arrow", pa.table({"item": ["7"], "price": [9]}))
    assert now() == (expected(folder, ["red"], [9.0]), 0)
    (folder / "new").write_bytes(b"junk")
    os.replace(folder / "new", folder / "items.arrow")
    assert now() == (expected(folder, ["red"], [9.0]), 0)
    assert "items.arrow" in client.get("/v1/models").json()["refused"][0]
    (folder / "items.arrow").unlink()
    assert now() == (expected(folder, ["red"], [9.0]), 0)
    write(folder / "items.arrow", ITEMS)
    assert now() == (expected(folder, ["red"], [1.0]), 0)
    assert client.get("/v1/models").json()["refused"] == []


@given(
    st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, max_size=30) | st.lists(st.text("ab1.", min_size=1), max_size=30),
    st.data(),
)
def test_rows_are_found_as_a_dictionary_finds_them(
    tmp_path_factory: pytest.TempPathFactory, keys: list[Any], data: st.DataObject
) -> None:
    column = pa.array(keys, pa.int64() if all(isinstance(key, int) for key in keys) else pa.string())
    texts = as_category(column, "k").to_pylist()
    table = pa.table({"k": column, "row": pa.array(range(len(keys)), pa.int64())})
    path = write(tmp_path_factory.getbasetemp() / "found.arrow", table)
    if len(set(texts)) < len(texts):
        with pytest.raises(UserError, match="in two rows; keep one of them"):
            FeatureTable(path, "k")
        return
    wanted = data.draw(st.lists(st.sampled_from([*texts, "9", "absent", None]), max_size=20))
    found = FeatureTable(path, "k")
    rows = found.find(pa.array(wanted, pa.string()))
    place = {text: row for row, text in enumerate(texts)}
    assert rows.tolist() == [place.get(text, -1) for text in wanted]
    assert found.take("row", rows).to_pylist() == [place.get(text) for text in wanted]


def test_nothing_but_the_index_is_read_into_memory(tmp_path: Path) -> None:
    rows = 50_000
    table = pa.table({"k": np.arange(rows), "vector": pa.FixedSizeListArray.from_arrays(np.zeros(rows * 64, np.float32), 64)})
    before = pa.total_allocated_bytes()
    mapped = FeatureTable(write(tmp_path / "large.arrow", table), "k")
    assert pa.total_allocated_bytes() - before < 100_000
    assert mapped.find(pa.array(["49999"])).tolist() == [rows - 1]
    packed = FeatureTable(write(tmp_path / "packed.arrow", table, compression="zstd"), "k")
    assert packed.find(pa.array(["49999"])).tolist() == [rows - 1]


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (pa.table({"id": [1]}), "has no column 'item'; add it, or set serve.item_key"),
        (pa.table({"item": [1, None]}), "has a row without 'item'; leave it out"),
        (pa.table({"item": ["7", "7.0"]}), "has 'item' = '7' in two rows"),
    ],
    ids=["column", "null", "twice"],
)
def test_a_file_that_is_no_such_table(tmp_path: Path, table: pa.Table, told: str) -> None:
    with pytest.raises(UserError, match=told):
        FeatureTable(write(tmp_path / "bad.arrow", table), "item")


def test_a_file_needs_a_key() -> None:
    with pytest.raises(UserError, match=r"'items.arrow' needs a key column; set serve.item_key"):
        parse(ServeConfig, {"item_features": "items.arrow"}, "serve")
