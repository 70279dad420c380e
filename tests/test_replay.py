"""The feature log holds what was served, and scoring it again gives the same bits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient

from recsys_moe.errors import UserError
from recsys_moe.replay import replay
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.featurelog import FeatureLog
from tests.test_features import ITEMS, USERS, write
from tests.test_selftest import other_weights
from tests.test_serving import save


@pytest.fixture
def logged(tmp_path: Path) -> tuple[Path, Path, list[dict[str, Any]]]:
    """A bundle, the feature log of some requests to it, and their answers."""
    bundle = save(tmp_path / "bundle")
    config = ServeConfig(
        item_key="item",
        item_features=str(write(tmp_path / "items.arrow", ITEMS)),
        user_key="user",
        user_features=str(write(tmp_path / "users.arrow", USERS)),
        feature_log=str(tmp_path / "log"),
        feature_log_share=1.0,
    )
    draw = np.random.default_rng(0)
    requests: list[dict[str, Any]] = [
        {"user_id": "u1", "candidates": {"ids": [9, 7, 8]}},
        {"user": {"colour": 7}, "candidates": {"ids": ["a", "b"], "features": {"price": [1, None]}}},
    ]
    for colour in ("red", None, "unseen"):
        prices = draw.normal(size=40).tolist()
        requests.append({"user": {"colour": colour}, "candidates": {"ids": list(range(40)), "features": {"price": prices}}})
    with TestClient(build_api(bundle, config)) as client:
        answers = [client.post("/v1/rank", json=request).json() for request in requests]
        assert client.post("/v1/score", json={"rows": [{"colour": "red", "price": 0.5}] * 7}).status_code == 200
        refused = {"candidates": {"ids": [1], "features": {"price": [2]}}, "user": {"colour": "red"}, "tasks": ["nobody"]}
        assert client.post("/v1/rank", json=refused).status_code == 422
    return bundle, tmp_path / "log", answers


def test_scored_again_the_log_has_the_same_bits(logged: tuple[Path, Path, list[dict[str, Any]]]) -> None:
    _, log, answers = logged
    found = replay(log)
    assert (found.rows, found.differ, found.difference) == (132, 0, 0.0)  # all candidates, and the plain rows
    assert found.files > 1  # a text in one request, a number in the next
    rows = {row["request_id"]: [] for table in map(pq.read_table, log.glob("*.parquet")) for row in table.to_pylist()}
    for table in map(pq.read_table, log.glob("*.parquet")):
        for row in table.to_pylist():
            rows[row["request_id"]].append(row)
    for answer in answers:
        own = sorted(rows[answer["request_id"]], key=lambda row: row["position"])
        assert [own[place]["score.click"] for place in answer["positions"]] == answer["scores"]["click"]
    first = sorted(rows[answers[0]["request_id"]], key=lambda row: row["position"])
    assert [(row["feature.colour"], row["feature.price"]) for row in first] == [("red", None), ("red", 1.0), ("red", None)]


def test_another_bundle_is_told(logged: tuple[Path, Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    bundle, log, _ = logged
    other = Path(shutil.copytree(bundle, tmp_path / "other"))
    assert replay(log, other).differ == 0
    other_weights(other)
    with pytest.raises(UserError, match="name the bundle of that version"):
        replay(log, other)
    with pytest.raises(UserError, match="is gone from this disk"):
        replay(log, tmp_path / "nothing")
    with pytest.raises(UserError, match="holds no feature log"):
        replay(tmp_path / "bundle")


def test_the_command_says_so(logged: tuple[Path, Path, list[dict[str, Any]]], cli: Callable[..., Any], tmp_path: Path) -> None:
    told = cli("replay", str(logged[1]), "--json", cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "132 rows of" in told.stdout
    assert '"differ": 0' in told.stdout


def test_lists_of_one_size_with_a_gap_can_be_read_back(tmp_path: Path) -> None:
    """Parquet writes them, but does not read them; whoever asks chooses the form."""
    log = FeatureLog(tmp_path / "log")
    model: Any = SimpleNamespace(
        described={"name": "m", "version": "1", "digest": "d"},
        predictor=SimpleNamespace(score_names=("click",), bundle=SimpleNamespace(folder=tmp_path)),
    )
    rows = pa.table({"look": pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))})
    log.add("r1", model, rows, np.zeros((1, 2), np.float32))
    log.flush()
    (file,) = (tmp_path / "log").glob("*.parquet")
    assert pq.read_table(file)["feature.look"].to_pylist() == [[1.0, 2.0], None]
