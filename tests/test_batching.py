"""Requests that wait together are one call and get the bits that each gets alone; what comes too late is refused at once."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from recsys_moe.predictor import Predictor
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from tests.test_serving import save


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("batching") / "bundle")


def request(colour: str | None, prices: list[Any]) -> dict[str, Any]:
    return {"user": {"colour": colour}, "candidates": {"ids": list(range(len(prices))), "features": {"price": prices}}}


async def ask_all(api: Any, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """Send all at once; the answers in their order."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=api), base_url="http://here") as client:
        return await asyncio.gather(*(client.post("/v1/rank", json=body) for body in bodies))


class Held:
    """The predictor's calls wait while it is entered: what comes meanwhile stands in a queue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.entered = threading.Event(), threading.Event()
        inner = Predictor.score_inputs

        def score(predictor: Predictor, inputs: Any) -> Any:
            self.entered.set()
            self.go.wait(10)
            return inner(predictor, inputs)

        monkeypatch.setattr(Predictor, "score_inputs", score)

    def let_go_in(self, seconds: float) -> None:
        threading.Timer(seconds, self.go.set).start()


def batch_requests(api: FastAPI) -> list[Sample]:
    api.state.batcher.settle()
    families = text_string_to_metric_families(api.state.service.metrics_page().decode())
    return [sample for family in families if family.name == "recsys_moe_batch_requests" for sample in family.samples]


def test_what_waits_together_is_scored_together_and_bit_for_bit(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    bodies = [
        request(colour, draw.normal(size=n).tolist())
        for colour, n in zip(draw.choice(["red", "green", "blue"], 12), draw.integers(1, 60, 12).tolist(), strict=True)
    ]
    bodies += [request("red", [1e30, None, 1e-30] * 9), request(None, [])]  # what strangers send beside them
    api = build_api(bundle, ServeConfig(deadline_ms=10_000))
    held = Held(monkeypatch)
    held.let_go_in(0.5)
    answers = asyncio.run(ask_all(api, bodies))
    assert answers[-1].status_code == 422  # and nobody else
    samples = {s.name: s.value for s in batch_requests(api) if s.labels.get("le", "3.0") == "3.0"}
    assert samples["recsys_moe_batch_requests_count"] > samples["recsys_moe_batch_requests_bucket"]  # some had more than 3
    predictor = Predictor(bundle)
    for body, answer in zip(bodies[:-1], answers, strict=False):
        prices = body["candidates"]["features"]["price"]
        rows = pa.table({"colour": [body["user"]["colour"]] * len(prices), "price": pa.array(prices, pa.float64())})
        found = answer.json()
        expected = predictor.score(rows)[:, found["positions"]].astype(float).tolist()
        assert list(found["scores"].values()) == expected
    api.state.batcher.close()


def test_numbers_that_overflow_fail_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = save(tmp_path / "bundle")
    weights = safetensors.numpy.load_file(bundle / "model.safetensors")
    gate = "network.router.linear.weight"
    safetensors.numpy.save_file(weights | {gate: weights[gate] * 1000}, bundle / "model.safetensors")
    api = build_api(bundle, ServeConfig(deadline_ms=10_000))
    held = Held(monkeypatch)
    held.let_go_in(0.5)
    bodies = [request("red", [1.0, 2.0]), request("red", [1.0, 1e38]), request("green", [3.0])]
    answers = asyncio.run(ask_all(api, [request("red", [0.0]), *bodies]))[1:]  # the first is scored while they wait
    assert [answer.status_code for answer in answers] == [200, 422, 200]
    assert "the router's logits of row 1 are not finite" in answers[1].text
    api.state.batcher.close()


def test_a_lone_request_does_not_wait(bundle: Path) -> None:
    api = build_api(bundle, ServeConfig())
    answers = [asyncio.run(ask_all(api, [request("red", [1.0])]))[0] for _ in range(5)]
    assert min(answer.json()["timings_ms"]["wait"] for answer in answers) < 20
    api.state.batcher.close()


def test_too_much_is_refused_at_once_and_what_waited_too_long_as_well(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = build_api(bundle, ServeConfig(deadline_ms=300))
    asyncio.run(ask_all(api, [request("red", [1.0] * 50)]))
    api.state.batcher.settle()  # the answer comes before its time is counted
    api.state.batcher._seconds_each = 0.002  # as on a slow machine: 0.2 s for each of these
    held = Held(monkeypatch)

    async def overload() -> list[httpx.Response]:
        first = [asyncio.create_task(ask_all(api, [request("red", [1.0] * 50)])) for _ in range(4)]
        while sum(task.done() for task in first) < 3:  # refused while the one that is scored is held
            await asyncio.sleep(0.01)
        held.go.set()
        return [(await task)[0] for task in first]

    answers = asyncio.run(asyncio.wait_for(overload(), 60))
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429, 429]
    (told,) = {answer.json()["error"] for answer in answers if answer.status_code == 429}
    assert told == "more is asked than can be answered within 300 ms; try again in 1 s"
    assert {answer.headers["retry-after"] for answer in answers if answer.status_code == 429} == {"1"}
    # And it recovers: the time that a row takes is measured again as soon as something is let through.
    assert asyncio.run(ask_all(api, [request("red", [1.0])]))[0].status_code == 200
    api.state.batcher.close()


def test_what_has_waited_longer_than_the_deadline_is_not_scored(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = build_api(bundle, ServeConfig(deadline_ms=100))
    held = Held(monkeypatch)

    async def two() -> list[httpx.Response]:
        first = asyncio.create_task(ask_all(api, [request("red", [1.0])]))
        while not held.entered.is_set():
            await asyncio.sleep(0.01)
        held.let_go_in(0.5)
        return [(await ask_all(api, [request("red", [1.0])]))[0], (await first)[0]]

    late, first = asyncio.run(two())
    assert (late.status_code, first.status_code) == (429, 200)
    api.state.batcher.close()
