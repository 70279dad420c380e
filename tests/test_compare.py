"""`recsys-moe compare` through Ray and MLflow: cut off, gone on with, read back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from recsys_moe.config import compose
from recsys_moe.costs import Budget, Cost
from recsys_moe.errors import UserError
from recsys_moe.models.home import HoMEConfig
from recsys_moe.pipelines.cluster import local_ray
from recsys_moe.pipelines.compare import CompareConfig, CompareJob, compare, mean_costs, model_of, tuned
from recsys_moe.pipelines.tracking import TrackingConfig, open_client, resolve_model
from recsys_moe.pipelines.tune import TuneJob, default_space
from recsys_moe.predictor import Predictor
from recsys_moe.typed import dump, parse
from tests.conftest import CLICKS_SCHEMA


def test_labels_name_models_and_their_settings() -> None:
    found = model_of("home+self_gates=false+expert_dims=[16]")
    assert isinstance(found, HoMEConfig)
    assert not found.self_gates
    assert found.expert_dims == (16,)
    assert model_of("trees+leaves=7").leaves == 7
    shared = ["model.front.first_order=true", "model.dropout=0.5"]  # of all networks, before a label's own
    both = model_of("home+dropout=0", shared)
    assert (both.front.first_order, both.dropout) == (True, 0.0)
    assert model_of("trees+leaves=7", shared).leaves == 7
    for label, told in [
        ("mmeo", "did you mean 'mmoe'"),
        ("home+gates=1", "unknown key 'gates'"),
        ("trees+leafs=7", "'leaves'"),
        ("trees+leaves=x", "'leaves' is 'x'"),
        ("trees+leaves", "'leaves' is None"),
        ("trees+leaves=[1", "which is no value"),
    ]:
        with pytest.raises(UserError, match=told):
            model_of(label)


def job(folder: Path, clicks: Any, models: str, **settings: Any) -> CompareJob:
    logs = folder / "logs"
    if not logs.exists():
        logs.mkdir()
        pq.write_table(clicks(1500, 1), logs / "a.parquet")
        (folder / "clicks.yaml").write_text(yaml.safe_dump(CLICKS_SCHEMA))
    config = compose(
        ["data=custom", "data.name=clicks", f"data.source={logs}", f"data.schema={folder / 'clicks.yaml'}", "train.epochs=1",
         f"runs_dir={folder / 'runs'}", "train.batch_size=128"]
    )  # fmt: skip
    grid = CompareConfig(tuple(models.split(",")), **settings)
    parts = {key: config[key] for key in ("data", "train", "tracking", "ray", "runs_dir")}
    return parse(CompareJob, parts | {"compare": dump(grid), "models": {n: dump(model_of(n)) for n in grid.models}}, "job")


def test_mistakes_are_told_before_anything_is_done(tmp_path: Path, clicks: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="baseline 'ple' is none of the models"):
        compare(job(tmp_path, clicks, "mmoe,home", baseline="ple"))
    with pytest.raises(UserError, match="budget=params is a network's, which 'trees' is not"):
        compare(job(tmp_path, clicks, "trees,mmoe", budget="params"))
    with pytest.raises(UserError, match="'draws' is -1"):
        parse(CompareConfig, {"draws": -1}, "compare")
    with pytest.raises(UserError, match="models names 'mmoe' twice"):
        parse(CompareConfig, {"models": ["mmoe", "home", "mmoe"]}, "compare")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("budget", ["none", "params"])
def test_what_is_tuned_costs_what_it_was_tuned_to(
    budget: Budget, tmp_path: Path, clicks: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = job(tmp_path, clicks, "mmoe,trees", trials=1, budget=budget)
    searched: dict[str, Any] = {}

    def found(told: TuneJob, on_progress: Any) -> dict[str, Any]:
        searched[told.model.name] = set(told.space)
        return {"best": {key: 16 for key in told.space if key == "model.embedding_dim"}, "quality": 0.5}

    monkeypatch.setattr("recsys_moe.pipelines.compare.tune", found)
    settings = tuned(asked, lambda message: None, lambda phase, done, total: None)
    # A width of the embeddings is the experts' input too: models that were made equally large would not stay so.
    assert ("model.embedding_dim" in searched["mmoe"]) == (budget == "none")
    assert {"train.lr", "model.dropout"} < searched["mmoe"]
    assert searched["trees"] == set(default_space("trees"))
    untuned = {label: (config, asked.train) for label, config in asked.models.items()}
    costs = mean_costs([settings, untuned], lambda config: Cost(config.embedding_dim, 2 * config.embedding_dim))
    assert costs == {"mmoe": Cost(12, 24) if budget == "none" else Cost(8, 16), "trees": None}


def test_a_grid_that_was_cut_off_goes_on(tmp_path: Path, clicks: Callable[..., Any]) -> None:
    asked = job(tmp_path, clicks, "mmoe+gate=topk,logistic", seeds=1, draws=20, budget="flops")
    told: list[str] = []

    def interrupt(message: str) -> None:
        told.append(message)
        raise KeyboardInterrupt

    with local_ray():
        with pytest.raises(KeyboardInterrupt):
            compare(asked, interrupt)
        (folder,) = (tmp_path / "runs/compare").iterdir()
        (done,) = folder.glob("cells/*/cell.json")
        first = done.stat().st_mtime_ns
        comparison, summary = compare(asked, told.append)
    assert told[0].startswith("mmoe+gate=topk seed 0: mean test quality 0.")
    assert told[1] == "1 of 2 are done already"
    assert done.stat().st_mtime_ns == first
    assert len(list(folder.glob("cells/*/cell.json"))) == 2
    assert Path(summary["folder"]) == folder
    assert {p.name for p in folder.iterdir()} >= {"result.json", "result.html", "pareto.png", "differences.png"}
    assert json.loads((folder / "result.json").read_text()) == json.loads(json.dumps(summary))
    assert comparison.costs["logistic"] is None

    # MLflow: one parent, two children that ended well; models are logged, none is registered.
    uri = TrackingConfig().resolve(tmp_path / "runs")
    client = open_client(uri)
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("recsys_moe").experiment_id])}
    children = ["logistic seed 0", "mmoe+gate=topk seed 0"]
    assert sorted(runs) == [f"compare {folder.name}", *children]
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in children} == {summary["run_id"]}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parent = runs[f"compare {folder.name}"]
    assert parent.data.metrics["click.auc.mmoe-gate-topk"] == pytest.approx(
        comparison.of("mmoe+gate=topk", "click", "auc").score.value
    )  # type: ignore[union-attr]
    assert {a.path for a in client.list_artifacts(summary["run_id"])} >= {"result.html", "comparison.json", "pareto.png"}
    assert client.search_registered_models() == []

    # The cell's scores are those of its bundle on the raw test rows, and its metrics the run's.
    cell = json.loads((folder / "cells/mmoe+gate=topk-seed0-fold0/cell.json").read_text())
    scores = np.load(folder / "cells/mmoe+gate=topk-seed0-fold0/scores.npy")
    predictor = Predictor(resolve_model(f"runs:/{runs['mmoe+gate=topk seed 0'].info.run_id}", tmp_path / "runs", uri))
    from recsys_moe.sources import read_part

    raw = list(read_part(asked.data, predictor.bundle.schema, "test"))
    assert np.array_equal(np.concatenate([predictor.score(t) for t in raw], 1), scores)
    assert cell["test"]["click"]["auc"] == pytest.approx(parent.data.metrics["click.auc.mmoe-gate-topk"])
