"""`recsys-moe tune`: search spaces, and a search through Ray Tune and MLflow that goes on."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from recsys_moe.baselines import TreesConfig
from recsys_moe.config import conf_dir
from recsys_moe.errors import UserError
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.pipelines.cluster import local_ray
from recsys_moe.pipelines.tracking import open_client
from recsys_moe.pipelines.tune import TuneConfig, TuneJob, _first, _fit, default_space, parse_space, tune, with_settings
from recsys_moe.trainer import TrainConfig
from tests.test_compare import job as compare_job


@pytest.mark.parametrize("model", ["home", "trees", "logistic"])
def test_every_space_fits_its_model(model: str) -> None:
    from recsys_moe.pipelines.compare import model_of

    space = parse_space(default_space(model))
    found, _ = with_settings(model_of(model), TrainConfig(), {key: _first(values) for key, values in space.items()})
    assert found.name == model
    assert {path.stem for path in (conf_dir() / "search").glob("*.yaml")} == {"network", "trees", "logistic"}


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"train.lr": 5}, "search.train.lr is 5; write a list"),
        ({"train.lr": []}, "search.train.lr is an empty list"),
        ({"train.lr": {"low": 2, "high": 1}}, "search.train.lr: a range from 2.0 to 1.0 is none"),
        ({"train.lr": {"low": 0, "high": 1, "log": True}}, "log needs low > 0"),
        ({"train.lr": {"from": 0, "high": 1}}, "search.train.lr: unknown key 'from'"),
    ],
)
def test_a_space_that_is_none_is_refused(space: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse_space(space)


def test_settings_are_laid_over_model_and_training() -> None:
    model, train = with_settings(MMoEConfig(), TrainConfig(), {"train.lr": 0.5, "model.expert_dims": [8, 4]})
    assert (train.lr, model.expert_dims) == (0.5, (8, 4))
    assert with_settings(TreesConfig(), TrainConfig(), {"model.leaves": 5})[0].leaves == 5
    with pytest.raises(UserError, match=r"'model\.lr' can't be searched"):
        with_settings(MMoEConfig(), TrainConfig(), {"model.lr": 1})


def test_a_baseline_without_a_quality_says_why(
    tmp_path: Path, write_prepared: Any, clicks: Callable[..., Any], clicks_schema: Any
) -> None:
    rows = clicks(200, 2)
    nobody_clicks = rows.filter(pc.equal(rows["click"], 0))
    data = write_prepared(tmp_path / "data", clicks_schema, {"train": [clicks(200, 1)], "validation": [nobody_clicks]})
    with pytest.raises(UserError, match=r"no task has both classes, .* make data.split.validation larger"):
        _fit(TreesConfig(iterations=2), TrainConfig(), data, lambda epoch, quality, metrics: None)


@pytest.mark.long
def test_a_search_goes_on_with_the_trials_that_are_missing(tmp_path: Path, clicks: Callable[..., Any]) -> None:
    base = compare_job(tmp_path, clicks, "mmoe")
    # The second choice of the rate is absurd: training with it fails or falls behind.
    space = parse_space({"train.lr": [3e-3, 1e30], "model.dropout": {"low": 0, "high": 0.3}})
    train = replace(base.train, epochs=2)
    job = TuneJob(base.models["mmoe"], base.data, train, space, TuneConfig(2), base.tracking, base.ray, base.runs_dir)
    told: list[tuple[str, int, int]] = []
    with local_ray():
        first = tune(job, lambda *progress: told.append(progress))
        files = set((Path(first["folder"]) / "trials").iterdir())
        second = tune(replace(job, tune=TuneConfig(4)), lambda *progress: told.append(progress))
    assert [t for t in told if t[0] == "trials"] == [("trials", 1, 2), ("trials", 2, 2), ("trials", 3, 4), ("trials", 4, 4)]
    assert first["folder"] == second["folder"]
    assert first["run_id"] == second["run_id"]
    trials = [json.loads(file.read_text()) for file in (Path(second["folder"]) / "trials").iterdir()]
    # The first trial is of what was given.
    assert json.loads(min(files).read_text())["settings"] == {"train.lr": 3e-3, "model.dropout": 0.2}
    assert files < set((Path(second["folder"]) / "trials").iterdir())
    assert len(trials) == 4
    assert second["quality"] == max(t["quality"] for t in trials) > 0.6
    assert second["best"]["train.lr"] == 3e-3
    assert json.loads((Path(second["folder"]) / "best.json").read_text())["best"] == second["best"]
    client = open_client(base.tracking.resolve(tmp_path / "runs"))
    children = [client.get_run(t["run_id"]) for t in trials]
    assert {run.info.status for run in children} == {"FINISHED"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {second["run_id"]}
    best = next(
        run for run in children if math.isclose(float(run.data.params["model.dropout"]), second["best"]["model.dropout"])
    )
    assert max(m.value for m in client.get_metric_history(best.info.run_id, "validation.mean_quality")) == second["quality"]
