"""The page at /: what it asks for is the model's own, nothing comes from elsewhere; and a real browser scores a row on it."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from recsys_moe.predictor import Predictor
from recsys_moe.selftest import write_selftest
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from tests.test_serving import TRAINING, listening, save

ROW = {"colour": "red", "price": 1.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save(tmp_path_factory.mktemp("page") / "<b>shop")
    write_selftest(folder, [TRAINING])
    return folder


@pytest.fixture(scope="module")
def client(bundle: Path) -> Iterator[TestClient]:
    with TestClient(build_api(bundle, ServeConfig()), raise_server_exceptions=False) as client:
        yield client


def test_the_page_takes_nothing_from_elsewhere(client: TestClient) -> None:
    page, script = client.get("/"), client.get("/page.js")
    assert page.headers["content-type"].startswith("text/html")
    assert script.headers["content-type"].startswith("text/javascript")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert re.findall(r'src="([^"]*)"', page.text) == ["page.js"]
    for text in (page.text, script.text.replace("http://www.w3.org/2000/svg", "")):
        assert "//" not in re.sub(r"^\s*//.*$|\s// .*$", "", text, flags=re.MULTILINE)
    assert "innerHTML" not in script.text


def test_the_sample_is_the_selftests_first_row(client: TestClient) -> None:
    answer = client.get("/v1/sample").json()
    assert answer["row"] == ROW
    assert answer["kinds"] == {"colour": "categorical", "price": "numeric"}
    assert client.post("/v1/gates", json={"row": answer["row"]}).status_code == 200


def test_without_a_selftest_the_sample_is_empty(tmp_path: Path) -> None:
    with TestClient(build_api(save(tmp_path / "bare"), ServeConfig())) as client:
        assert client.get("/v1/sample").json()["row"] == {"colour": None, "price": None}


def test_gates_and_scores_are_the_models(client: TestClient, bundle: Path) -> None:
    answer = client.post("/v1/gates", json={"row": ROW, "model": bundle.name}).json()
    predictor, table = Predictor(bundle), pa.table({"colour": ["red"], "price": [1.0]})
    assert list(answer["scores"].values()) == predictor.score(table)[:, 0].astype(float).tolist()
    (plan,) = answer["plans"].values()
    assert plan["gates"] == ["click", "buy"]
    assert plan["experts"] == ["expert 0", "expert 1"]
    np.testing.assert_array_equal(np.float32(plan["weights"]), predictor.gates(table)["experts"][0])
    np.testing.assert_allclose(np.sum(plan["weights"], 1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"row": {"colour": "red"}}, "row 0 has no feature 'price'"),
        ({"row": ROW | {"price": "cheap"}}, "'price' = 'cheap', which is not a number"),
        ({"row": ROW, "model": "nobody"}, "model 'nobody' is not served here"),
        ({"row": [ROW]}, "row is "),
        ({}, "row: field required"),
    ],
)
def test_a_mistake_is_told(client: TestClient, body: Any, told: str) -> None:
    answer = client.post("/v1/gates", json=body)
    assert answer.status_code == 422
    assert told in answer.json()["error"]


@pytest.fixture
def address(bundle: Path) -> Iterator[str]:
    """The service on a port of its own."""
    with listening(build_api(bundle, ServeConfig())) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.mark.long
def test_a_browser_scores_a_row_and_draws_its_gates(address: str, bundle: Path, tmp_path: Path) -> None:
    from playwright.sync_api import expect, sync_playwright

    browser_path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert browser_path, "this test needs Chromium: install Debian's package chromium, or name its program in CHROMIUM"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        asked, wrong = list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        expect(page.locator("#status")).to_have_text("serving")
        expect(page.locator("#models td").first).to_have_text(bundle.name)  # as text, not as a tag
        expect(page.get_by_label("price (numeric)")).to_have_value("1")
        page.get_by_label("price (numeric)").fill("2.5")
        page.get_by_role("button", name="Score").click()
        predictor, table = Predictor(bundle), pa.table({"colour": ["red"], "price": [2.5]})
        for number, name in enumerate(predictor.score_names):
            cells = page.locator(f"#scores tr:nth-child({number + 1}) td")
            expect(cells.first).to_have_text(name)
            assert float(cells.nth(1).inner_text()) == pytest.approx(float(predictor.score(table)[number, 0]), rel=1e-5)
        picture = page.get_by_role("img", name="weights of the gates click, buy on the experts expert 0, expert 1")
        weights = predictor.gates(table)["experts"][0]
        drawn = [
            float(each or 0) for each in picture.locator("rect").evaluate_all("r => r.map(x => x.getAttribute('fill-opacity'))")
        ]
        np.testing.assert_allclose(drawn, weights.ravel(), atol=1e-6)
        page.screenshot(path=tmp_path / "page.png", full_page=True)
        page.get_by_label("price (numeric)").fill("cheap")
        page.get_by_role("button", name="Score").click()
        expect(page.get_by_role("alert")).to_contain_text("'price' = 'cheap', which is not a number")
        browser.close()
    assert all(url.startswith(address) or url == "data:," for url in asked), asked
    assert len(wrong) == 1  # what the browser says of a 422
    assert "422" in wrong[0]
