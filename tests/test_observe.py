"""What the service tells of itself: metrics, drift, a line of JSON for each request, the caller's trace."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from recsys_moe.selftest import write_selftest
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.metrics import Drift
from recsys_moe.serving.observe import Observe, log_as_json
from tests.conftest import ROOT
from tests.test_rank import REQUEST, prices
from tests.test_serving import ROW, save


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    folder = save(tmp_path / "bundle")
    random = np.random.default_rng(0)
    write_selftest(folder, [pa.table({"colour": random.choice(["red", "green"], 500), "price": random.normal(size=500)})])
    with TestClient(build_api(folder, ServeConfig())) as client:
        yield client


def samples(client: TestClient) -> dict[tuple[str, ...], float]:
    """Every sample by its name and labels."""
    client.app.state.batcher.settle()  # type: ignore[attr-defined]  # what follows an answer is counted behind it
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, *(v for _, v in sorted(s.labels.items()))): s.value for family in families for s in family.samples}


@pytest.mark.parametrize(("raised", "status"), [(asyncio.CancelledError(), 499), (RuntimeError(), 500)])
def test_a_client_that_goes_is_no_failure(raised: BaseException, status: int) -> None:
    """Ray Serve cancels the request of a client that has gone."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise raised

    answered: list[tuple[str, int]] = []
    observed = Observe(app, answered=lambda route, status, seconds: answered.append((route, status)))
    with pytest.raises(type(raised)):
        asyncio.run(observed({"type": "http", "method": "POST", "headers": []}, None, None))  # type: ignore[arg-type]
    assert answered == [("other", status)]


def test_requests_and_candidates_are_counted(client: TestClient) -> None:
    for _ in range(3):
        client.post("/v1/rank", json=REQUEST)
    client.post("/v1/rank", json={})
    client.post("/v1/score", json={"rows": [ROW] * 2})
    client.get("/no/such/path")
    client.get("/another/path")
    found = samples(client)
    assert found["recsys_moe_requests_total", "/v1/rank", "200"] == 3
    assert found["recsys_moe_requests_total", "/v1/rank", "422"] == 1
    assert found["recsys_moe_requests_total", "other", "404"] == 2
    assert found["recsys_moe_candidates_total", "bundle", "local"] == 11  # rows of /v1/score, too
    assert found["recsys_moe_batch_requests_count",] == found["recsys_moe_batch_rows_count",] == 4
    assert found["recsys_moe_batch_rows_sum",] == 11
    assert found["recsys_moe_candidates_per_request_bucket", "10.0"] == 3
    assert found["recsys_moe_request_seconds_count", "/v1/rank"] == 4
    assert found["recsys_moe_rank_step_seconds_count", "score"] == 3
    assert ("recsys_moe_request_seconds_bucket", "0.00025", "/v1/rank") in found
    (info,) = [labels for labels in found if labels[0] == "recsys_moe_model_info"]
    assert (info[2:], info[1].startswith("mmoe:"), found[info]) == (("bundle", "local"), True, 1)
    assert found["recsys_moe_refused",] == 0


def test_drift_is_told_of_scores_that_training_had_not(client: TestClient) -> None:
    random = np.random.default_rng(1)

    def drift() -> float:
        return samples(client)["recsys_moe_score_drift_psi", "bundle", "click"]

    for colour in ("red", "green"):
        client.post("/v1/rank", json=REQUEST | prices(*random.normal(size=1000)) | {"user": {"colour": colour}})
    assert 0 <= drift() < 0.1
    for _ in range(4):
        client.post("/v1/rank", json=REQUEST | prices(*random.normal(30, size=1000)))
    assert drift() > 0.25


def test_the_index_is_its_formula() -> None:
    random = np.random.default_rng(2)
    trained, served = random.normal(size=(2, 4000)).astype(np.float32), random.normal(0.3, size=(2, 900)).astype(np.float32)
    drift = Drift(trained)
    assert drift.psi().tolist() == [0, 0]
    drift.add(served[:, :400])
    drift.add(served[:, 400:])
    for row, found in enumerate(drift.psi()):
        edges = [-np.inf, *np.quantile(trained[row], np.arange(1, 10) / 10), np.inf]
        p, q = (np.histogram(scores[row], edges)[0] / scores.shape[1] for scores in (trained, served))
        assert found == pytest.approx(((q - p) * np.log(q / p)).sum(), rel=1e-3)


def test_a_request_is_a_line_of_json_with_its_trace(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recsys_moe.requests")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    answer = client.post("/v1/rank", json=REQUEST, headers={"traceparent": trace})
    assert answer.headers["traceparent"] == trace
    line = dict(caplog.records[-1].__dict__["told"])
    assert line.pop("ms") > 0
    assert line == {
        "method": "POST",
        "route": "/v1/rank",
        "status": 200,
        "request_id": "r1",
        "model": "bundle",
        "version": "local",
        "candidates": 3,
        "trace": "0af7651916cd43dd8448eb211c80319c",
    }
    answer = client.post("/v1/rank", json=REQUEST, headers={"traceparent": trace, "tracestate": "vendor=7"})
    assert answer.headers["tracestate"] == "vendor=7"


@pytest.mark.parametrize(
    "junk",
    [
        "00-junk",
        f"00-{'0' * 32}-b7ad6b7169203331-01",
        f"00-0af7651916cd43dd8448eb211c80319c-{'0' * 16}-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    ],
)
def test_what_is_no_trace_is_not_passed_on(client: TestClient, caplog: pytest.LogCaptureFixture, junk: str) -> None:
    caplog.set_level(logging.INFO, "recsys_moe.requests")
    answer = client.post("/v1/rank", json={}, headers={"traceparent": junk, "tracestate": "vendor=7"})
    assert not {"traceparent", "tracestate"} & set(answer.headers)
    line = caplog.records[-1].__dict__["told"]
    assert (line["status"], "trace" in line) == (422, False)


def test_every_line_has_a_request_id_refusals_and_failures_too(
    client: TestClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "recsys_moe")

    def told(path: str, body: Any, **headers: str) -> dict[str, Any]:
        client.post(path, json=body, headers=headers)
        line: dict[str, Any] = caplog.records[-1].__dict__["told"]
        return line

    assert told("/v1/rank", REQUEST | {"model": "nobody"})["request_id"] == "r1"
    assert told("/v1/rank", {}, **{"X-Request-Id": "abc-1"})["request_id"] == "abc-1"
    first, second = (told("/v1/rank", {}, **{"X-Request-Id": "no id"})["request_id"] for _ in range(2))
    assert len({first, second, "no id"}) == 3
    line = told("/v1/score", {"rows": [ROW]}, **{"X-Request-Id": "abc-2"})
    assert (line["request_id"], line["model"], line["version"], line["rows"]) == ("abc-2", "bundle", "local", 1)
    tensors = [
        {"name": "colour", "shape": [1], "datatype": "BYTES", "data": ["red"]},
        {"name": "price", "shape": [1], "datatype": "FP64", "data": [1.0]},
    ]
    assert told("/v2/models/bundle/infer", {"id": "t1", "inputs": tensors})["request_id"] == "t1"
    monkeypatch.setattr("recsys_moe.serving.routes.Rank", None)
    patient = TestClient(client.app, raise_server_exceptions=False)
    assert patient.post("/v1/rank", json=REQUEST | {"request_id": "r9"}).status_code == 500
    failed = [record for record in caplog.records if record.exc_info]
    assert [record.__dict__["told"] for record in failed] == [{"request_id": "r9"}]


def test_the_log_is_lines_of_json(tmp_path: Path) -> None:
    package = logging.getLogger("recsys_moe")
    before = (package.handlers, package.propagate, package.level)
    try:
        log_as_json(str(tmp_path / "log"))
        log = logging.getLogger("recsys_moe.serving.test")
        log.info("answered", extra={"told": {"status": 200, "request_id": 'a"\n'}})
        try:
            raise ValueError("broken")
        except ValueError:
            log.exception("it failed")
        package.handlers[0].close()
    finally:
        package.handlers, package.propagate, package.level = before
    answered, failed = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert (answered["level"], answered["status"], answered["request_id"]) == ("INFO", 200, 'a"\n')
    assert (failed["level"], failed["message"]) == ("ERROR", "it failed")
    assert "ValueError: broken" in failed["exception"]


def test_the_dashboard_asks_for_metrics_that_there_are(client: TestClient) -> None:
    client.post("/v1/rank", json=REQUEST)
    names = {name for name, *_ in samples(client)}
    dashboard = json.loads((ROOT / "docs" / "grafana.json").read_text())
    asked = {
        name for panel in dashboard["panels"] for t in panel["targets"] for name in re.findall(r"recsys_moe_\w+", t["expr"])
    }
    assert len(asked) > 6
    assert asked <= names
