"""What strangers send: a sentence and a 4xx for each, quickly, and the service goes on."""

import asyncio
import gzip
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.limits import LimitBody
from tests.test_serving import save

GOOD: dict[str, Any] = {"user": {"colour": "red"}, "candidates": {"ids": [1, 2], "features": {"price": [1, 2]}}}
TENSORS = [
    {"name": "colour", "shape": [1], "datatype": "BYTES", "data": ["red"]},
    {"name": "price", "shape": [1], "datatype": "FP64", "data": [1.0]},
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    bundle = save(tmp_path_factory.mktemp("abuse") / "bundle")
    with TestClient(build_api(bundle, ServeConfig(max_body_mb=8)), raise_server_exceptions=False) as client:
        yield client


def post(client: TestClient, content: bytes, path: str = "/v1/rank", **headers: str) -> tuple[int, str]:
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"} | headers)
    return answer.status_code, "" if answer.status_code == 200 else answer.json()["error"]


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize("path", ["/v1/rank", "/v1/score", "/v2/models/bundle/infer"])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\x00" * 100,
        b"\xff\xfe",
        b"null",
        b"[" * 1_000_000,
        b'{"a":' * 1_000_000,
        b'{"candidates": {"ids": [' + b"1," * 1_000_000 + b"1]}}",
        b'{"rows": [' + b"{}," * 1_000_000 + b"{}]}",
        b'{"candidates": {"ids": [' + b"9" * 1_000_000 + b"]}}",
        b'{"candidates": {"ids": [NaN]}}',
        b'{"candidates": {"ids": [1e999]}}',
        b'{"candidates": {"ids": {"a": 1}}}',
        b'{"rows": {"colour": "red"}}',
        b'{"inputs": [{"name": "x", "shape": [9999999999999999999], "datatype": "FP64", "data": []}]}',
    ],
    ids=lambda body: body[:14].decode("latin-1").encode("unicode_escape").decode() + f" {len(body)}",
)
def test_a_bad_body_is_a_4xx_in_no_time(client: TestClient, path: str, body: bytes) -> None:
    started = time.monotonic()
    status, told = post(client, body, path)
    assert 400 <= status < 500
    assert told
    assert len(told) < 500
    assert time.monotonic() - started < 20
    assert post(client, dumped(GOOD))[0] == 200


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_a_bomb_is_not_unpacked(client: TestClient, packing: str) -> None:
    large = b" " * 2**26
    bomb = gzip.compress(large, 1) if packing == "gzip" else pa.compress(large, "zstd", asbytes=True)
    del large
    before = pa.total_allocated_bytes()
    status, told = post(client, bomb, **{"Content-Encoding": packing})
    assert status == 413
    assert "unpacked body is larger" in told
    assert pa.total_allocated_bytes() - before < 2**24


KINDS = ["text/plain", "application/xml", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded", "x" * 5000]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[:20])
@pytest.mark.parametrize("path", ["/v1/rank", "/v1/score", "/v2/models/bundle/infer"])
def test_another_content_type(client: TestClient, path: str, kind: str) -> None:
    status, told = post(client, dumped(GOOD), path, **{"Content-Type": kind})
    assert status == 415
    assert "send application/json" in told


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["ids", "features", "price", "colour"]), inner),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("user", "context", "user_id", "tasks", "top_n", "formula", "model", "request_id", "x"), values),
            "candidates": values | st.fixed_dictionaries({"ids": values, "features": values}),
        },
    )
)
def test_no_request_is_a_5xx(client: TestClient, changes: dict[str, Any]) -> None:
    for body in (GOOD | changes, {"rows": changes.get("candidates")}, {"inputs": changes.get("user")}):
        for path in ("/v1/rank", "/v1/score", "/v2/models/bundle/infer"):
            assert post(client, json.dumps(body).encode(errors="surrogatepass"), path)[0] < 500


@given(change=st.dictionaries(st.sampled_from(["name", "shape", "datatype", "data", "parameters"]), values))
def test_no_tensor_is_a_5xx(client: TestClient, change: dict[str, Any]) -> None:
    assert post(client, dumped({"inputs": [TENSORS[0], TENSORS[1] | change]}), "/v2/models/bundle/infer")[0] < 500


def test_a_body_that_does_not_arrive_is_refused() -> None:
    sent: list[Message] = []

    async def slow() -> Message:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: Message) -> None:
        sent.append(message)

    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("called")

    asyncio.run(LimitBody(never, 100, 0.2)({"type": "http", "headers": []}, slow, send))
    assert sent[0]["status"] == 408
    assert b"did not arrive within 0.2 s" in sent[1]["body"]


def test_the_service_answers_while_a_million_candidates_are_read(client: TestClient) -> None:
    large = b'{"candidates": {"ids": [' + b"1," * 1_000_000 + b"1]}}"
    sender = threading.Thread(target=post, args=(client, large))
    sender.start()
    assert client.get("/healthz").status_code == 200
    sender.join()


LONG = "abcdefgh" * 500_000


@pytest.mark.parametrize(
    "changes",
    [
        {"model": LONG},
        {"tasks": [LONG]},
        {"user": {f"colou{number}": 1 for number in range(300_000)}},
        {"user": {LONG: 1}},
        {LONG: 1},
    ],
    ids=["model", "task", "names", "name", "field"],
)
def test_long_names_and_many_cost_neither_time_nor_a_long_answer(client: TestClient, changes: dict[str, Any]) -> None:
    body = dumped(GOOD | changes)
    started = time.monotonic()
    status, told = post(client, body)
    assert time.monotonic() - started < 3
    assert status == 422
    assert len(told) <= 500


def test_long_values_are_not_kept(client: TestClient) -> None:
    """Else some thousands of requests fill the memory."""
    model = client.app.state.service.models.find(None)  # type: ignore[attr-defined]
    for value, more in (("x" * 100_000, 0), ("short", 1)):
        before = model.kept.cache_info().currsize
        assert post(client, dumped(GOOD | {"user": {"colour": value}}))[0] == 200
        assert model.kept.cache_info().currsize - before == more
