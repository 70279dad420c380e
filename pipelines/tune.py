"""`recsys-moe tune`: settings by Optuna's TPE through Ray Tune; ASHA stops what falls behind.

Trials are child runs in MLflow. Only the validation part is looked at. What is searched stands in `conf/search`: the same
number of trials for trees, for a linear model and for a network is the same care for each.

    runs/tune/NAME-MODEL-DIGEST/
        tune.json          what is tuned, and MLflow's run
        trials/ID.json     a trial that has ended: its settings, its quality, after how many epochs
        best.json          the best settings so far

The same command goes on with the trials that are missing, and Optuna is told of those that are there.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import optuna
import ray
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field, model_validator
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch

from recsys_moe.baselines import BASELINES, Baseline, BaselineConfig, Part
from recsys_moe.config import conf_dir
from recsys_moe.errors import UserError
from recsys_moe.heads import mean_quality
from recsys_moe.models import ModelConfig
from recsys_moe.pipelines.cluster import RayConfig, ray_cluster
from recsys_moe.pipelines.prepare import Progress, prepare
from recsys_moe.pipelines.tracking import TrackingConfig, TrackingLost, describe_data, flatten, open_client, open_run
from recsys_moe.pipelines.train import TrainJob, settle_model
from recsys_moe.process import keep_freed_memory, use_all_cores
from recsys_moe.shards import PreparedData, write_json
from recsys_moe.sources import DataConfig
from recsys_moe.storage import locate
from recsys_moe.trainer import TrainConfig, Trainer
from recsys_moe.typed import dump, parse, plain, typed

WORTHLESS = -1.0
"""The quality of a trial that failed: its loss was not finite."""


@typed
class Range:
    """Numbers from `low` to `high`, perhaps on a logarithmic scale or whole ones only."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"a range from {self.low} to {self.high} is none{': log needs low > 0' if self.log else ''}")
        return self


Space = dict[str, Range | Annotated[tuple[Any, ...], Field(min_length=1)]]


@typed
class TuneConfig:
    """How long is searched: `trials` in all, or until `seconds` are over (0: no such bound), `parallel` at a time."""

    trials: Annotated[int, Field(ge=1)] = 20
    seconds: Annotated[float, Field(ge=0)] = 0.0
    parallel: Annotated[int, Field(ge=1)] = 1


@typed
class TuneJob:
    """All that `recsys-moe tune` is told. `model` and `train` hold what is not searched."""

    model: ModelConfig | BaselineConfig
    data: DataConfig
    train: TrainConfig
    space: Space
    tune: TuneConfig = TuneConfig()
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()
    runs_dir: str = "runs"


def default_space(model: str) -> dict[str, Any]:
    """What `conf/search` says of a model's name, as plain data.

    >>> sorted(default_space("home"))[0]
    'model.dropout'
    """
    name = model if model in BASELINES else "network"
    found: dict[str, Any] = yaml.safe_load((conf_dir() / "search" / f"{name}.yaml").read_text())
    return found


def parse_space(values: dict[str, Any]) -> Space:
    """Ranges and choices from plain data; a key without a value is left out.

    Raises:
        UserError: neither a range nor a list.
    """
    space: Space = {}
    for key, value in values.items():
        if not isinstance(value, list | dict | None):
            raise UserError(f"search.{key} is {value!r}; write a list of choices, [1, 2, 4], or a range, {{low: 1, high: 9}}")
        if value is not None:
            space[key] = parse(Range, value, f"search.{key}") if isinstance(value, dict) else tuple(value)
            if not space[key]:
                raise UserError(f"search.{key} is an empty list; name choices or leave it out with null")
    return space


def with_settings(model: Any, train: TrainConfig, settings: dict[str, Any]) -> tuple[Any, TrainConfig]:
    """Both with `settings` (`train.lr`, `model.dropout`, …) laid over them.

    Raises:
        UserError: a key that is neither's, or a value that it can't have.
    """
    parts: dict[str, dict[str, Any]] = {"model": dump(model), "train": dump(train)}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        if section not in parts or name not in parts[section]:
            raise UserError(f"{key!r} can't be searched; name a key of model or train, such as train.lr")
        parts[section][name] = value
    kind = BaselineConfig if model.name in BASELINES else ModelConfig
    return parse(kind, parts["model"], "model"), parse(TrainConfig, parts["train"], "train")


def tune(job: TuneJob, on_progress: Progress = lambda phase, done, total: None) -> dict[str, Any]:
    """Search until there are as many trials as asked for; returns the summary (the JSON of `recsys-moe tune --json`): `best`
    has the settings, `quality` their mean validation quality.

    Raises:
        UserError: a mistake in what was given, or not one trial that worked.
    """
    runs_dir = Path(job.runs_dir).absolute()
    job = replace(job, data=replace(job.data, source=str(locate(job.data.source))), train=replace(job.train, workers=1))
    if job.model.name not in BASELINES:
        network = TrainJob(job.data, job.model, job.train)  # type: ignore[arg-type]
        job = replace(job, model=settle_model(network).model)
    with_settings(job.model, job.train, {key: _first(values) for key, values in job.space.items()})
    with ray_cluster(job.ray):
        data = prepare(job.data, runs_dir, on_progress)
        folder = runs_dir / "tune" / f"{job.data.name}-{job.model.name}-{_digest(job, data)}"
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        file, uri = folder / "tune.json", job.tracking.resolve(runs_dir)
        known = json.loads(file.read_text()) if file.exists() else {}
        run_id = known.get("run_id") if known.get("uri") == uri else None
        settings = {"tune": dump(job.tune), "model": dump(job.model), "space": dump(job)["space"], "data": dump(job.data)}
        client, name = open_client(uri), f"tune {folder.name}"
        with open_run(client, job.tracking, name, settings, describe_data(data.manifest), run_id) as run:
            write_json(file, {"uri": uri, "run_id": run.run_id, "job": dump(job)})
            missing = job.tune.trials - len(_ended(folder))
            if missing > 0:
                _search(job, folder, data, Trial(dump(job), str(data.folder), run.run_id, uri), missing, on_progress)
            trials = _ended(folder)
            worked = [t for t in trials if t["quality"] > WORTHLESS]
            if not worked:
                raise UserError(
                    f"none of the {len(trials)} trials worked ({trials[-1]['error'] if trials else 'no time for one'})"
                )
            best = max(worked, key=lambda trial: trial["quality"])
            summary = {"folder": str(folder), "run_id": run.run_id, "model": job.model.name, "trials": len(trials)}
            summary |= {"best": best["settings"], "quality": best["quality"], "epochs": best["epoch"]}
            write_json(folder / "best.json", summary)
            run.leave([folder / "best.json"], {}, {"best_quality": best["quality"]})
    return summary


def _digest(job: TuneJob, data: PreparedData) -> str:
    told = {"data": data.manifest.digest, **{key: dump(job)[key] for key in ("model", "train", "space")}}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


def _first(values: Range | tuple[Any, ...]) -> Any:
    if isinstance(values, Range):
        return int(values.low) if values.whole else values.low
    return values[0]


def _ended(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted((folder / "trials").glob("*.json"))]


# ---- the search --------------------------------------------------------------------------------------------------------


def _search(job: TuneJob, folder: Path, data: PreparedData, trial: "Trial", missing: int, on_progress: Progress) -> None:
    # Ctrl-C is ours; no tables between our own lines, no files for dashboards that nobody asked for.
    os.environ |= {"TUNE_DISABLE_SIGINT_HANDLER": "1", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    before = [t for t in _ended(folder) if set(t["settings"]) == set(job.space)]
    space = {key: _distribution(values) for key, values in job.space.items()}
    chosen = {key: values for key, values in job.space.items() if not isinstance(values, Range)}
    begun, start = [_places(t["settings"], chosen) for t in before], _start(job)
    searcher = OptunaSearch(
        space,
        metric="quality",
        mode="max",
        seed=job.train.seed + len(before),
        points_to_evaluate=begun or ([_places(start, chosen)] if start else None),
        evaluated_rewards=[t["quality"] for t in before] or None,
    )

    cores = ray.cluster_resources()["CPU"] - 1
    asha = ASHAScheduler("epoch", "quality", "max", max_t=max(job.train.epochs, 1), grace_period=1, reduction_factor=3)
    with tempfile.TemporaryDirectory() as scratch:
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(
                lambda settings: run_trial(trial, _values(settings, chosen)), {"CPU": cores / job.tune.parallel}
            ),
            tune_config=ray_tune.TuneConfig(
                search_alg=searcher,
                scheduler=asha,
                num_samples=missing,
                max_concurrent_trials=job.tune.parallel,
                time_budget_s=job.tune.seconds or None,
            ),
            run_config=ray_tune.RunConfig(
                storage_path=scratch, name="tune", verbose=0, callbacks=[Keep(folder, chosen, job.tune.trials, on_progress)]
            ),
        )
        for result in tuner.fit():
            if result.error is not None:
                raise UserError(f"a trial failed ({' '.join(str(result.error).split())[-300:]}); mend the cause and go on")


def _start(job: TuneJob) -> dict[str, Any] | None:
    """What the search begins with, so that it ends no worse than it was asked: the settings that are given, if they are within
    what is searched."""
    given = {f"{section}.{key}": value for section in ("model", "train") for key, value in dump(job)[section].items()}
    for key, values in job.space.items():
        within = values.low <= given[key] <= values.high if isinstance(values, Range) else _plain(given[key]) in _plain(values)
        if not within:
            return None
    return {key: given[key] for key in job.space}


class Keep(ray_tune.Callback):
    """Writes down each trial that ends, and tells how far the search is. Ray Tune pickles it, without whom it tells."""

    def __init__(self, folder: Path, chosen: dict[str, tuple[Any, ...]], trials: int, on_progress: Progress) -> None:
        self.folder, self.chosen, self.trials, self.on_progress = folder, chosen, trials, on_progress

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "on_progress": None}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ended = {key: trial.last_result.get(key) for key in ("quality", "epoch", "error", "run_id")}
        if ended["quality"] is None:  # the time was over before its first epoch
            return
        name = f"{time.time_ns()}-{trial.trial_id}.json"
        write_json(self.folder / "trials" / name, plain({"settings": _values(trial.config, self.chosen), **ended}))
        self.on_progress("trials", len(_ended(self.folder)), self.trials)


def _distribution(values: Range | tuple[Any, ...]) -> Any:
    if not isinstance(values, Range):
        return CategoricalDistribution(range(len(values)))  # a choice may be a list, which Optuna can't have
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def _values(places: dict[str, Any], chosen: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {key: chosen[key][value] if key in chosen else value for key, value in places.items()}


def _places(settings: dict[str, Any], chosen: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {key: _plain(chosen[key]).index(_plain(value)) if key in chosen else value for key, value in settings.items()}


def _plain(value: Any) -> Any:
    """A choice, or all of them, as JSON has it."""
    return json.loads(json.dumps(value))


# ---- in a trial's process -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What every trial is told."""

    job: dict[str, Any]
    prepared: str
    parent: str
    uri: str


def run_trial(told: Trial, settings: dict[str, Any]) -> None:
    """Train or fit with these settings in a child run, and report the best mean validation quality after each epoch."""
    use_all_cores()
    keep_freed_memory()
    job: TuneJob = parse(TuneJob, told.job, "tune")
    model, train = with_settings(job.model, job.train, settings)
    data = PreparedData(Path(told.prepared), verify=False)
    name = f"trial {ray_tune.get_context().get_trial_id()}"
    tags = {"mlflow.parentRunId": told.parent, "model": model.name}
    parameters, stopped = {"model": dump(model), "train": dump(train)}, False
    with open_run(open_client(told.uri), job.tracking, name, parameters, describe_data(data.manifest), tags=tags) as run:
        best, epochs = WORTHLESS, 0

        def report(epoch: int, quality: float, metrics: dict[str, Any]) -> None:
            nonlocal best, epochs
            best, epochs = max(best, quality), epoch
            run.log({"validation.mean_quality": quality, **flatten({"validation": metrics})}, epoch, time.time())
            ray_tune.report({"quality": best, "epoch": epochs, "error": None, "run_id": run.run_id})

        try:
            try:
                _fit(model, train, data, report)
            except TrackingLost:
                raise
            except UserError as error:  # a loss that is not finite is an answer
                ray_tune.report({"quality": WORTHLESS, "epoch": epochs + 1, "error": str(error), "run_id": run.run_id})
        except SystemExit:  # Ray Tune's way to stop a trial, at any report
            stopped = True
        run.client.set_tag(run.run_id, "stopped_early", str(stopped).lower())
    if stopped:
        raise SystemExit(0)


def _fit(model: Any, train: TrainConfig, data: PreparedData, report: Callable[[int, float, dict[str, Any]], None]) -> None:
    if model.name in BASELINES:
        baseline, part = Baseline(model, data, train.seed), Part(data, "validation")
        measured = baseline.heads.metrics([(baseline.scores(part), part.labels, part.weights, part.groups)])
        if math.isnan(mean := mean_quality(measured)):
            raise UserError(
                "no task has both classes, or labels that differ, in the validation part; make data.split.validation larger"
            )
        report(1, mean, {task: plain(asdict(m)) for task, m in measured.items()})
        return

    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "epoch":
            report(event["epoch"], event["validation.mean_quality"], plain(event["validation"]))

    Trainer(data, model, train, on_event).fit()
