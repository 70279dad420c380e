"""What is served follows MLflow's aliases: fetched, told, kept while MLflow is away; and swapped without a mixed request."""

import json
import logging
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from recsys_moe.bundle import ADAGRAD_FILE
from recsys_moe.errors import UserError
from recsys_moe.pipelines.registry import Shelf
from recsys_moe.pipelines.tracking import TrackingLost, open_client
from recsys_moe.predictor import Predictor
from recsys_moe.selftest import write_selftest
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import CanaryConfig, ServeConfig
from recsys_moe.serving.models import Models
from recsys_moe.serving.traffic import chosen
from recsys_moe.shards import write_json
from tests.test_selftest import other_weights
from tests.test_serving import ROW, TRAINING, save

REQUEST: dict[str, Any] = {"user": {"colour": "red"}, "candidates": {"ids": [0, 1, 2], "features": {"price": [1, 2, 3]}}}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three bundles of other weights, with self-tests."""
    folders = [save(tmp_path_factory.mktemp("bundles") / str(seed), seed) for seed in range(3)]
    for folder in folders:
        write_selftest(folder, [TRAINING])
        (folder / ADAGRAD_FILE).write_bytes(b"large")
    return folders


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory, bundles: list[Path]) -> tuple[str, Any]:
    """The URI of a registry in which model `shop` has the bundles as versions 1, 2 and 3, and a client."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    client = open_client(uri)
    client.create_registered_model("shop")
    for bundle in bundles:
        client.create_model_version("shop", source=bundle.as_uri())
    return uri, client


def shelf(registered: tuple[str, Any], folder: Path, *names: str, warn: Callable[[str], None] = pytest.fail) -> Shelf:
    return Shelf(names or ("models:/shop@champion",), registered[0], folder, folder / "models.json", warn)


def versions(found: dict[str, Any], name: str = "shop@champion") -> list[str]:
    return [choice["version"] for choice in found[name]]


def test_an_alias_is_followed_and_bundles_are_kept(registered: tuple[str, Any], bundles: list[Path], tmp_path: Path) -> None:
    registered[1].set_registered_model_alias("shop", "champion", "1")
    follower = shelf(registered, tmp_path, "models:/shop@champion", "models:/shop/3", str(bundles[0]))
    found = follower.open()
    assert list(found) == ["shop@champion", "shop/3", str(bundles[0])]
    assert (versions(found), versions(found, "shop/3"), versions(found, str(bundles[0]))) == (["1"], ["3"], ["local"])
    folder = Path(found["shop@champion"][0]["folder"])
    assert folder.is_relative_to(tmp_path)
    np.testing.assert_array_equal(Predictor(folder).score(TRAINING), Predictor(bundles[0]).score(TRAINING))
    assert not (folder / ADAGRAD_FILE).exists()
    before = follower.served.stat().st_ino
    follower.refresh()
    assert follower.served.stat().st_ino == before
    registered[1].set_registered_model_alias("shop", "champion", "2")
    follower.refresh()
    assert versions(json.loads(follower.served.read_text())) == ["2", "1"]
    registered[1].set_registered_model_alias("shop", "champion", "1")
    follower.refresh()
    assert versions(json.loads(follower.served.read_text())) == ["1", "2"]


def test_without_mlflow_the_disk_serves(registered: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered[1].set_registered_model_alias("shop", "champion", "1")
    follower = shelf(registered, tmp_path, warn=(told := []).append)
    follower.open()

    def away(*args: Any) -> Any:
        raise ConnectionError("nobody there")

    with monkeypatch.context() as patch:
        patch.setattr(type(registered[1]), "get_model_version_by_alias", away)
        follower.refresh()
        follower.refresh()
        assert len(told) == 1
        assert versions(json.loads(follower.served.read_text())) == ["1"]
        # And a service that starts only now.
        assert versions(shelf(registered, tmp_path, warn=told.append).open()) == ["1"]
        assert "version 1 of models:/shop@champion is served, as it was found last" in told[1]
        with pytest.raises(TrackingLost):
            shelf(registered, tmp_path / "empty").open()
    follower.refresh()
    registered[1].set_registered_model_alias("shop", "champion", "2")
    follower.refresh()
    assert versions(json.loads(follower.served.read_text())) == ["2", "1"]


@pytest.mark.parametrize("name", ["models:/shop@nobody", "models:/shop/9", "models:/nothing@champion", "no/folder"])
def test_a_name_that_nothing_has(registered: tuple[str, Any], tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"is not to be had from|is neither a folder nor"):
        shelf(registered, tmp_path, name).open()


# -- what a replica makes of it


def tell(path: Path, **names: list[Path]) -> Path:
    """A file of what is served: versions are the bundles' folder names."""
    write_json(path, {name: [{"version": f.name, "folder": str(f)} for f in folders] for name, folders in names.items()})
    return path


def served(models: Models, name: str = "main") -> str:
    return models.find(name).version


def test_a_version_that_fails_is_refused_and_the_old_one_stays(
    bundles: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Path(shutil.copytree(bundles[1], tmp_path / "bad"))
    other_weights(bad)
    file = tell(tmp_path / "models.json", main=[bundles[0]])
    models = Models(file, lambda model: None)
    first = models.find(None)
    tell(file, main=[bad, bundles[0]])
    models.refresh()
    assert models.find("main") is first
    assert "fails its self-test" in models.refused["main"]["bad"]
    assert "version bad of main is refused" in caplog.text
    # A replica that starts now takes the one before.
    assert served(Models(file, lambda model: None)) == "0"
    with pytest.raises(UserError, match="fails its self-test"):
        Models(tell(tmp_path / "only.json", main=[bad]), lambda model: None)
    tell(file, main=[bundles[2], bad, bundles[0]], other=[bundles[1]])
    models.refresh()
    assert (served(models), served(models, "other"), models.refused) == ("2", "1", {})
    tell(file, main=[tmp_path / "gone"], other=[bundles[1]])
    models.refresh()
    assert served(models) == "2"
    assert "is not a bundle" in models.refused["main"]["gone"]


def test_a_version_that_is_served_no_more_leaves_the_memory(bundles: list[Path], tmp_path: Path) -> None:
    file = tell(tmp_path / "models.json", main=[bundles[0]])
    with TestClient(build_api(file, ServeConfig())) as client:
        service, batcher = client.app.state.service, client.app.state.batcher  # type: ignore[attr-defined]
        assert client.post("/v1/rank", json=REQUEST).status_code == 200
        batcher.settle()
        old = weakref.ref(service.models.find("main").predictor)
        tell(file, main=[bundles[1]])
        service.models.refresh()
        assert client.post("/v1/rank", json=REQUEST).json()["model"]["version"] == "1"
        batcher.settle()
        assert old() is None


def test_a_version_that_fails_in_a_way_nobody_thought_of_is_refused_too(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what else the file says is done."""
    file = tell(tmp_path / "models.json", main=[bundles[0]], other=[bundles[0]])
    models = Models(file, lambda model: None)

    def score(self: Predictor, rows: pa.Table) -> Any:
        if self.bundle.folder == bundles[1]:
            raise RuntimeError("no kernel for this processor")
        return original(self, rows)

    original = Predictor.score
    monkeypatch.setattr(Predictor, "score", score)
    tell(file, main=[bundles[1], bundles[0]], other=[bundles[2], bundles[0]])
    models.refresh()
    assert (served(models), served(models, "other")) == ("0", "2")
    assert "can't be served (RuntimeError: no kernel for this processor)" in models.refused["main"]["1"]


def test_no_request_fails_or_mixes_versions_while_models_are_swapped(bundles: list[Path], tmp_path: Path) -> None:
    file = tell(tmp_path / "models.json", main=[bundles[0]])
    rows = pa.table({"colour": ["red"] * 3, "price": [1.0, 2.0, 3.0]})
    expected = {folder.name: Predictor(folder).score(rows) for folder in bundles}
    with TestClient(build_api(file, ServeConfig())) as client:
        refresh = client.app.state.service.models.refresh  # type: ignore[attr-defined]
        stop, seen, wrong = threading.Event(), set(), []

        def ask() -> None:
            while not stop.is_set():
                answer = client.post("/v1/rank", json=REQUEST)
                if answer.status_code != 200:
                    wrong.append(answer.text)
                    continue
                found = answer.json()
                version = found["model"]["version"]
                seen.add(version)
                for row, task in enumerate(("click", "buy")):
                    if found["scores"][task] != expected[version][row][found["positions"]].astype(float).tolist():
                        wrong.append(f"{version} {task}")

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for turn in range(12):
            tell(file, main=[bundles[turn % 3]])
            refresh()
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert len(seen) > 1


def test_a_request_names_its_model_or_gets_a_canary_by_user(
    bundles: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tell(tmp_path / "models.json", main=[bundles[0]], new=[bundles[1]], dark=[bundles[2]])
    config = ServeConfig(canary=CanaryConfig("new", 0.5), shadow=CanaryConfig("dark", 1.0))
    caplog.set_level(logging.INFO, "recsys_moe")
    with TestClient(build_api(file, config)) as client:

        def version(**changes: Any) -> str:
            return str(client.post("/v1/rank", json=REQUEST | changes).json()["model"]["version"])

        assert [version(model=name, user_id=1) for name in ("main", "new", "dark")] == ["0", "1", "2"]
        for name, each in zip(("main", "new", "dark"), bundles, strict=True):
            scored = client.post("/v1/score", json={"model": name, "rows": [ROW]}).json()
            assert scored["scores"]["click"] == Predictor(each).score(pa.table({k: [v] for k, v in ROW.items()}))[0].tolist()
        by_user = {user: version(user_id=user) for user in range(20)}
        assert set(by_user.values()) == {"0", "1"}
        assert by_user == {user: version(user_id=str(user), request_id=f"again {user}") for user in range(20)}
    shadows = [record.__dict__["told"] for record in caplog.records if record.message == "shadow"]
    assert len(shadows) == 43
    expected = Predictor(bundles[2]).score(pa.table({"colour": ["red"] * 3, "price": [1.0, 2.0, 3.0]}))
    assert {s["shadow"]["version"] for s in shadows} == {"2"}
    np.testing.assert_allclose(shadows[-1]["scores"]["click"], expected[0], rtol=1e-5)
    assert shadows[-1]["request_id"] == "again 19"
    with pytest.raises(UserError, match="model 'nobody' is not served here"):
        build_api(file, ServeConfig(canary=CanaryConfig("nobody", 0.1)))


def test_a_share_is_that_share_and_grows_by_new_users_only() -> None:
    users = [f"user {n}" for n in range(20_000)]
    small, large = ({u for u in users if chosen(share, "canary new", u)} for share in (0.05, 0.2))
    assert small < large
    assert len(small) / len(users) == pytest.approx(0.05, abs=0.006)
    assert len(large) / len(users) == pytest.approx(0.2, abs=0.012)
    other = {u for u in users if chosen(0.2, "shadow new", u)}
    assert len(large & other) / len(large) == pytest.approx(0.2, abs=0.03)  # one experiment's users are not another's


def test_a_formula_file_is_read_again_and_a_bad_one_is_not_taken(bundles: list[Path], tmp_path: Path) -> None:
    file = tmp_path / "formula.yaml"
    file.write_text("weights: {click: 1.0}")
    with TestClient(build_api(bundles[0], ServeConfig(formula_file=str(file)))) as client:

        def fused_is(task: str) -> bool:
            for refresh in client.app.state.service.refreshed:  # type: ignore[attr-defined]
                refresh()
            answer = client.post("/v1/rank", json=REQUEST).json()
            return bool(answer["fused"] == answer["scores"][task])

        assert fused_is("click")
        file.write_text("weights: {buy: 1.0}")
        assert fused_is("buy")
        for bad in ("weights: {like: 1.0}", "weights: [", "form: max"):
            file.write_text(bad)
            assert fused_is("buy")
            assert client.get("/v1/models").json()["refused"]
        file.write_text("weights: {click: 1.0}  # again")
        assert fused_is("click")
        assert client.get("/v1/models").json()["refused"] == []
