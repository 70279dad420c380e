"""The binary form of a ranking request, packed bodies, and streams that would unfold into gigabytes."""

import gzip
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys_moe.serving.api import build_api
from recsys_moe.serving.arrow import MEDIA_TYPE
from recsys_moe.serving.config import ServeConfig
from tests.test_rank import REQUEST
from tests.test_serving import save

HEAD = {"request_id": "r1", "user": {"colour": "red"}}
TABLE = pa.table({"id": ["a", "b", "c"], "price": [1.0, None, 3.0]})
JSON = {"candidates": {"ids": ["a", "b", "c"], "features": {"price": [1, None, 3]}}}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder: Path = save(tmp_path_factory.mktemp("arrow") / "bundle")
    config = ServeConfig(max_candidates=100, max_body_mb=0.25)
    with TestClient(build_api(folder, config), raise_server_exceptions=False) as client:
        yield client


def stream(table: pa.Table, head: Any = HEAD, **options: Any) -> bytes:
    table = table.replace_schema_metadata({"rank": json.dumps(head)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as file:
        file.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def post(client: TestClient, body: bytes, **headers: str) -> Any:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return client.post("/v1/rank", content=body, headers={"content-type": MEDIA_TYPE, **named})


def test_both_forms_say_the_same(client: TestClient) -> None:
    plain = client.post("/v1/rank", json=HEAD | JSON).json()
    binary = post(client, stream(TABLE)).json()
    assert {**binary, "timings_ms": {}} == {**plain, "timings_ms": {}}
    answer = post(client, stream(TABLE), accept=MEDIA_TYPE)
    assert answer.headers["content-type"] == MEDIA_TYPE
    table = pa.ipc.open_stream(answer.content).read_all()
    assert table["id"].to_pylist() == plain["ranking"]
    assert table["position"].to_pylist() == plain["positions"]
    assert table["fused"].to_pylist() == plain["fused"]
    assert {name: table[f"score.{name}"].to_pylist() for name in plain["scores"]} == plain["scores"]
    assert json.loads(table.schema.metadata[b"rank"])["model"] == plain["model"]


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_packed_bodies_are_unpacked(client: TestClient, packing: str) -> None:
    for kind, body in ((MEDIA_TYPE, stream(TABLE)), ("application/json", json.dumps(REQUEST).encode())):
        packed = pa.compress(body, packing, asbytes=True) if packing == "zstd" else gzip.compress(body)
        answer = post(client, packed, content_encoding=packing, content_type=kind)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["ranking"]) == 3


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_a_zip_bomb_is_413(client: TestClient, packing: str) -> None:
    bomb = b"0" * 10**8
    packed = pa.compress(bomb, packing, asbytes=True) if packing == "zstd" else gzip.compress(bomb)
    assert len(packed) < 2**18
    before = pa.total_allocated_bytes()
    answer = post(client, packed, content_encoding=packing, content_type="application/json")
    assert (answer.status_code, pa.total_allocated_bytes() - before < 10**6) == (413, True)
    assert "the unpacked body is larger than 262,144 bytes" in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "headers", "status", "told"),
    [
        (b"junk", {"content_encoding": "gzip"}, 400, "no whole gzip stream"),
        (gzip.compress(b"0" * 5000)[:-10], {"content_encoding": "gzip"}, 400, "no whole gzip stream"),
        (b"junk", {"content_encoding": "zstd"}, 400, "no whole zstd stream"),
        (b"junk", {"content_encoding": "br"}, 415, "Content-Encoding 'br' is unknown; send gzip, zstd or none"),
        (b"junk", {"content_type": "text/html"}, 415, "Content-Type 'text/html' is unknown; send application/json or"),
        (b"", {}, 422, "no whole Arrow IPC stream"),
        (b"junk" * 100, {}, 422, "no whole Arrow IPC stream"),
        (stream(TABLE)[:-30], {}, 422, "no whole Arrow IPC stream"),
        (stream(TABLE, compression="zstd"), {}, 422, "compressed buffers; write it without"),
        (stream(TABLE, compression="lz4"), {}, 422, "compressed buffers; write it without"),
        (stream(pa.table({"id": pa.array(["a"]).dictionary_encode()})), {}, 422, "column 'id' is dictionary"),
        (stream(pa.table({"id": ["a"], "x": pa.array(["a"], pa.string_view())})), {}, 422, "column 'x' is string_view"),
        (stream(pa.table({"id": ["a"], "x": [[["a"]]]})), {}, 422, "column 'x' is list<"),
        (stream(TABLE.drop_columns("id")), {}, 422, "no column 'id'"),
        (stream(TABLE.slice(0, 0)), {}, 422, "no column 'id'"),
        (stream(pa.table({"id": [1.5]})), {}, 422, "column 'id' is double"),
        (stream(pa.Table.from_arrays([pa.array([1])] * 3, ["id", "price", "price"])), {}, 422, "two columns of one name"),
        (stream(pa.table({"id": range(101), "price": range(101)})), {}, 422, "more than serve.max_candidates = 100"),
        (stream(pa.table({"id": [1], "price": ["x"]})), {}, 422, "column 'price' is numeric in the schema but holds 'x'"),
        (stream(TABLE, {"usr": 1}), {}, 422, "usr is 1: extra inputs"),
        (stream(TABLE).replace(b"price", b"pri\xff\xff"), {}, 422, "no whole Arrow IPC stream"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, str) else "",
)
def test_what_is_refused(client: TestClient, body: bytes, headers: dict[str, str], status: int, told: str) -> None:
    answer = post(client, body, **headers)
    assert (answer.status_code, list(answer.json())) == (status, ["error"]), answer.text
    assert told in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_offsets_that_point_elsewhere_are_refused(client: TestClient) -> None:
    good = stream(pa.table({"id": ["a"]}))
    offsets = struct.pack("<ii", 0, 1)
    before, found, after = good.rpartition(offsets)
    assert found
    answer = post(client, before + struct.pack("<ii", 0, 10**9) + after)
    assert answer.status_code == 422
    assert "no whole Arrow IPC stream" in answer.json()["error"]


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        ([-(2**63), 2**63 - 1], pa.int64()),
        ([1, 2**64 - 1], pa.uint64()),
        ([-1, 2**64 - 1], pa.string()),
        ([1, 10**400], pa.string()),
        (["7", 7], pa.string()),
        (["7", "a"], pa.string()),
    ],
    ids=str,
)
def test_any_id_comes_back(client: TestClient, ids: list[Any], kind: pa.DataType) -> None:
    request = {"user": {"colour": "red"}, "candidates": {"ids": ids, "features": {"price": [1.0, 2.0]}}}
    answer = client.post("/v1/rank", json=request, headers={"Accept": MEDIA_TYPE})
    assert answer.status_code == 200, answer.text
    column = pa.ipc.open_stream(answer.content).read_all()["id"]
    assert column.type == kind
    assert set(map(str, column.to_pylist())) == set(map(str, ids))


@given(st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=300)
def test_no_stream_is_a_5xx(client: TestClient, changes: list[tuple[int, int]]) -> None:
    body = bytearray(stream(TABLE))
    for place, byte in changes:
        body[place % len(body)] = byte
    assert post(client, bytes(body), accept=MEDIA_TYPE).status_code < 500
