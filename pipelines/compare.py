"""`recsys-moe compare`: the grid of models and seeds as Ray tasks, child runs of one MLflow run, and what they say together.

    runs/compare/NAME-DIGEST/
        comparison.json             what is compared, and MLflow's run
        cells/MODEL-seedS-foldF/    cell.json once it is done, scores.npy: its test rows' scores; progress.json meanwhile
        result.json result.html     the outcome, beside its pictures

A cell that is done is not done again, and one that was cut off goes on from its checkpoint: the same command resumes.
"""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import Field, model_validator

from recsys_moe.baselines import BASELINES, Baseline, BaselineConfig, Part
from recsys_moe.bundle import Bundle
from recsys_moe.comparison import (
    Comparison,
    FoldRows,
    Result,
    compare_results,
    cost_table,
    page,
    table,
)
from recsys_moe.config import compose, options, plain_value
from recsys_moe.costs import Budget, Cost, cost_of, to_budget
from recsys_moe.errors import UserError, nearest
from recsys_moe.heads import Heads
from recsys_moe.models import ModelConfig
from recsys_moe.pipelines.cluster import RayConfig, ray_cluster
from recsys_moe.pipelines.prepare import Progress, prepare
from recsys_moe.pipelines.runs import all_runs
from recsys_moe.pipelines.tracking import Run, TrackingConfig, describe_data, flatten, open_client, open_run
from recsys_moe.pipelines.train import TrainJob, resume, settle_model, train
from recsys_moe.pipelines.tune import TuneConfig, TuneJob, default_space, parse_space, tune, with_settings
from recsys_moe.process import keep_freed_memory, use_all_cores
from recsys_moe.shards import PreparedData, write_json
from recsys_moe.sources import DataConfig
from recsys_moe.storage import locate
from recsys_moe.trainer import TrainConfig, score_part
from recsys_moe.typed import dump, parse, plain, typed


@typed
class CompareConfig:
    """What is compared, how often and how closely.

    `models` are names of `model=`, `trees` or `logistic`, each perhaps with settings of its own: `home+self_gates=false`.
    Each is trained with `seeds` seeds, `parallel` at a time. `budget` makes the networks' experts so wide that all have as many
    dense `params` or as many `flops` a sample as `baseline` (None: the first of the models), to which they are compared by
    `draws` bootstrap draws. With `trials`, each is tuned first (`recsys-moe tune`), all with that many trials; the embeddings'
    width is searched without a `budget` only. With `folds`, all is done for each fold of the data (see `data.split`), tuning
    included, and figures are means over them.
    """

    models: Annotated[tuple[str, ...], Field(min_length=1)] = ("shared_bottom", "mmoe", "ple", "home")
    seeds: Annotated[int, Field(ge=1, le=1000)] = 3
    budget: Budget = "none"
    baseline: str | None = None
    draws: Annotated[int, Field(ge=0)] = 1000
    parallel: Annotated[int, Field(ge=1)] = 1
    trials: Annotated[int, Field(ge=0)] = 0
    folds: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        for label in self.models:
            if self.models.count(label) > 1:
                raise ValueError(f"models names {label!r} twice; name it once, or tell them apart by settings behind a +")
        return self


@typed
class CompareJob:
    """All that `recsys-moe compare` is told: `models` are the configurations by the labels of `compare.models`."""

    compare: CompareConfig
    models: dict[str, ModelConfig | BaselineConfig]
    data: DataConfig
    train: TrainConfig
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()
    runs_dir: str = "runs"

    @property
    def baseline(self) -> str:
        return self.compare.baseline or self.compare.models[0]


def model_of(label: str, shared: Sequence[str] = ()) -> Any:
    """The configuration that a label such as `mmoe` or `home+self_gates=false+experts_per_group=4` names.

    Args:
        shared: overrides `model.KEY=value` of all networks; the label's own settings go before them.

    >>> model_of("home+self_gates=false").self_gates, model_of("home+dropout=0", ["model.dropout=0.5"]).dropout
    (False, 0.0)

    Raises:
        UserError: no such model or setting.
    """
    name, *settings = label.split("+")
    if name in BASELINES:
        values = {key: plain_value(key, text) for key, _, text in (setting.partition("=") for setting in settings)}
        return parse(BaselineConfig, {"name": name, **values}, f"model {label!r}")
    if name not in options("model"):
        raise UserError(f"model {name!r} is unknown; {nearest(name, [*options('model'), *BASELINES])}")
    config = compose([f"model={name}", *shared, *(f"model.{setting}" for setting in settings)], needs_data=False)
    return parse(ModelConfig, config["model"], f"model {label!r}")


@dataclass(frozen=True)
class Cell:
    """One model with one seed: what a task is told."""

    label: str
    seed: int
    fold: int
    folder: str
    model: dict[str, Any]
    job: dict[str, Any] | None  # a network's
    prepared: str
    parent: str
    uri: str
    tracking: dict[str, Any]
    parallel: int

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def name(self) -> str:
        return f"{self.label} seed {self.seed}" + (f" fold {self.fold}" if self.fold else "")

    @property
    def tags(self) -> dict[str, str]:
        """The parent by which MLflow's pages nest runs, and what they can be filtered by."""
        return {"mlflow.parentRunId": self.parent, "model": self.label, "seed": str(self.seed), "fold": str(self.fold)}


def compare(
    job: CompareJob,
    on_message: Callable[[str], None] = lambda message: None,
    on_progress: Progress = lambda phase, done, total: None,
) -> tuple[Comparison, dict[str, Any]]:
    """Run the grid, or what of it is not done; returns what it says, and the summary (the JSON of `compare --json`).

    Raises:
        UserError: a mistake in what was given; or cells that failed, each of which is named (the others are kept).
    """
    runs_dir = Path(job.runs_dir).absolute()
    job = replace(job, runs_dir=str(runs_dir), data=replace(job.data, source=str(locate(job.data.source))))
    networks = _networks(job)
    workers = job.train.workers
    with ray_cluster(job.ray, workers if isinstance(workers, int) else workers[0]):
        folds = [replace(job, data=source) for source in _folds(job.data, job.compare.folds)]
        data = [prepare(fold.data, runs_dir, on_progress) for fold in folds]
        heads = [Heads(d.schema, d.transform.statistics) for d in data]

        def cost(config: Any) -> Cost:
            return cost_of(config, data[0].transform, heads[0].widths)

        fitted = job.models | to_budget(networks, job.compare.budget, job.baseline, cost)
        settings = [tuned(replace(fold, models=fitted), on_message, on_progress) for fold in folds]
        folder = runs_dir / "compare" / f"{job.data.name}-{_digest(settings, data)}"
        with _parent_run(job, folder, data[0]) as run:
            cells = _cells(job, settings, data, folder, run)
            _run_cells(cells, job.compare.parallel, on_message, on_progress)
            comparison = compare_results(
                job.data.name,
                heads,
                [FoldRows.of(d) for d in data],
                [_result(cell) for cell in cells],
                mean_costs(settings, cost),
                job.baseline,
                job.compare.draws,
                on_draw=partial(on_progress, "bootstrap"),
            )
            summary = {"folder": str(folder), "run_id": run.run_id, **plain(comparison.to_json())}
            _leave(comparison, folder, run, summary)
    return comparison, summary


def _folds(data: DataConfig, folds: int) -> list[DataConfig]:
    if folds == 1:
        return [data]
    return [replace(data, split=replace(data.split, folds=folds, fold=fold)) for fold in range(folds)]


def _networks(job: CompareJob) -> dict[str, Any]:
    """The networks among the models, with what they take from the schema.

    Raises:
        UserError: a baseline that is not compared or has no budget, or a network that is not for the schema's tasks.
    """
    if job.baseline not in job.models:
        raise UserError(f"baseline {job.baseline!r} is none of the models; {nearest(job.baseline, job.models)}")
    networks = {label: config for label, config in job.models.items() if config.name not in BASELINES}
    if job.compare.budget != "none" and job.baseline not in networks:
        raise UserError(f"budget={job.compare.budget} is a network's, which {job.baseline!r} is not; name one as baseline=")
    return {label: settle_model(_train_job(job, config, job.train)).model for label, config in networks.items()}


def _train_job(job: CompareJob, model: Any, train: TrainConfig) -> TrainJob:
    # Registered models are for serving: a grid's are logged only. The tasks are in the cluster already.
    return TrainJob(job.data, model, train, replace(job.tracking, alias=None), RayConfig(), job.runs_dir)


Settings = dict[str, tuple[Any, TrainConfig]]
"""How each model is configured and trained, by its label."""


def tuned(job: CompareJob, on_message: Callable[[str], None], on_progress: Progress) -> Settings:
    """The models and their training as they are given, or tuned if that is asked for; what a budget has made equally large
    stays so."""
    settings: Settings = {label: (config, job.train) for label, config in job.models.items()}
    for label, config in job.models.items() if job.compare.trials else ():
        search = TuneConfig(job.compare.trials, parallel=job.compare.parallel)
        sizes = ("model.embedding_dim",) if job.compare.budget != "none" else ()
        space = {key: values for key, values in parse_space(default_space(config.name)).items() if key not in sizes}
        told = TuneJob(config, job.data, job.train, space, search, job.tracking, RayConfig(), job.runs_dir)
        found = tune(told, partial(_under, on_progress, label))
        settings[label] = with_settings(config, job.train, found["best"])
        on_message(f"tune {label}: mean validation quality {found['quality']:.4f} with {json.dumps(found['best'])}")
    return settings


def mean_costs(settings: Sequence[Settings], cost: Callable[[Any], Cost]) -> dict[str, Cost | None]:
    """What each network costs as it is trained, the mean over the folds, in which it may have been tuned to other sizes."""
    costs: dict[str, Cost | None] = {}
    for label, (config, _) in settings[0].items():
        costs[label] = None
        if config.name not in BASELINES:
            found = [cost(of_fold[label][0]) for of_fold in settings]
            costs[label] = Cost(*(round(sum(x) / len(found)) for x in zip(*((c.params, c.flops) for c in found), strict=True)))
    return costs


def _under(on_progress: Progress, label: str, phase: str, done: int, total: int) -> None:
    on_progress(f"tune {label}: {phase}", done, total)


def _digest(settings: list[Settings], data: list[PreparedData]) -> str:
    """Of what decides the cells: how many seeds there are, and how they are compared, may change later."""
    told = [
        {
            "data": d.manifest.digest,
            **{label: [dump(model), dump(replace(train, seed=0))] for label, (model, train) in s.items()},
        }
        for s, d in zip(settings, data, strict=True)
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


# ---- the grid ---------------------------------------------------------------------------------------------------------


@contextmanager
def _parent_run(job: CompareJob, folder: Path, data: PreparedData) -> Iterator[Run]:
    """The comparison's own run in MLflow: made now, or opened again."""
    file = folder / "comparison.json"
    folder.mkdir(parents=True, exist_ok=True)
    uri = job.tracking.resolve(Path(job.runs_dir))
    known = json.loads(file.read_text()) if file.exists() else {}
    run_id = known.get("run_id") if known.get("uri") == uri else None
    settings = {"compare": dump(job.compare), "train": dump(job.train), "data": dump(job.data)}
    tags = {"comparison": folder.name}
    client = open_client(uri)
    with open_run(
        client, job.tracking, f"compare {folder.name}", settings, describe_data(data.manifest), run_id, tags=tags
    ) as run:
        write_json(file, {"uri": uri, "run_id": run.run_id, "job": dump(job)})
        yield run


def _cells(job: CompareJob, settings: list[Settings], data: list[PreparedData], folder: Path, run: Run) -> list[Cell]:
    """Seed by seed, so that all models have something to show early. What no seed changes is fitted once."""
    told = {"parent": run.run_id, "uri": run.uri, "tracking": dump(job.tracking), "parallel": job.compare.parallel}
    sources = _folds(job.data, len(data))
    cells = []
    for seed, fold, label in itertools.product(range(job.compare.seeds), range(len(data)), job.models):
        model, train = settings[fold][label]
        if model.name == "logistic" and seed:
            continue
        training = None
        if model.name not in BASELINES:
            training = dump(_train_job(replace(job, data=sources[fold]), model, replace(train, seed=seed)))
        place = folder / "cells" / f"{label}-seed{seed}-fold{fold}"
        cells.append(Cell(label, seed, fold, str(place), dump(model), training, str(data[fold].folder), **told))
    return cells


def _run_cells(cells: list[Cell], parallel: int, on_message: Callable[[str], None], on_progress: Progress) -> None:
    """Run what is not done yet, some at a time.

    Raises:
        UserError: some failed; the others are done.
    """
    import ray

    task = ray.remote(run_cell).options(num_cpus=0, max_retries=0)
    waiting = [cell for cell in cells if not (cell.path / "cell.json").exists()]
    if len(waiting) < len(cells):
        on_message(f"{len(cells) - len(waiting)} of {len(cells)} are done already")
    running: dict[Any, Cell] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                cell = waiting.pop(0)
                running[task.remote(cell)] = cell
            ended, _ = ray.wait(list(running), timeout=0.5)
            for cell in running.values():
                _show(cell, on_progress)
            for reference in ended:
                cell = running.pop(reference)
                try:
                    error = ray.get(reference)
                except ray.exceptions.RayError as raised:
                    error = " ".join(str(raised).split())[-300:]
                if error:
                    failed.append(f"{cell.name}: {error}")
                on_message(f"{cell.name}: {'failed' if error else _told(cell)}")
                on_progress("grid", sum((c.path / "cell.json").exists() for c in cells), len(cells))
    finally:
        for reference in running:
            with suppress(Exception):
                ray.cancel(reference, force=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(cells)} runs failed ({'; '.join(failed)}); mend the cause and give the same command again: "
            "what is done is kept"
        )


def _show(cell: Cell, on_progress: Progress) -> None:
    with suppress(OSError, ValueError, KeyError):
        told = json.loads((cell.path / "progress.json").read_text())
        on_progress(cell.name, told["done"], told["total"])


def _told(cell: Cell) -> str:
    done = json.loads((cell.path / "cell.json").read_text())
    qualities = [next(iter(metrics.values())) for metrics in done["test"].values()]
    known = [q for q in qualities if q is not None]
    return f"mean test quality {sum(known) / len(known):.4f}" if known else "no task has a quality on the test part"


def _result(cell: Cell) -> Result:
    done = json.loads((cell.path / "cell.json").read_text())
    return Result(cell.label, cell.seed, np.load(cell.path / "scores.npy", mmap_mode="r"), done["samples_per_s"], cell.fold)


# ---- in a Ray task ----------------------------------------------------------------------------------------------------


def run_cell(cell: Cell) -> str | None:
    """Train or fit one cell and keep its test rows' scores; returns a user's mistake, which is told once for all."""
    use_all_cores(cell.parallel)
    keep_freed_memory()
    cell.path.mkdir(parents=True, exist_ok=True)
    try:
        done = _fit_baseline(cell) if cell.job is None else _train(cell)
    except UserError as error:
        return str(error)
    write_json(cell.path / "cell.json", plain({"label": cell.label, "seed": cell.seed, **done}))
    return None


def _train(cell: Cell) -> dict[str, Any]:
    """Through the same road as `recsys-moe train`; a run that was cut off goes on.

    One worker trains in this process: starting Ray Train's for each of hundreds of short runs would take longer than they do.
    """
    job: TrainJob = parse(TrainJob, cell.job, cell.name)
    here = job.train.workers == 1
    on_event = _Watch(cell).on_event
    run = next((run for run in all_runs(Path(job.runs_dir)) if run.record.tags == cell.tags), None)
    if run is None:
        summary = train(job, on_event, name=cell.name, tags=cell.tags, here=here)
    elif run.record.status == "FINISHED":  # trained, but MLflow or this task was lost before it was told
        summary = {"bundle": str(run.bundle), **json.loads((run.bundle / "metrics.json").read_text())}
    else:
        _, summary = resume(str(run.path), Path(job.runs_dir), {}, on_event, here=here)
    bundle = Bundle(Path(summary["bundle"]))
    _keep_scores(cell, score_part(bundle.model, PreparedData(Path(cell.prepared), verify=False), "test").scores)
    return {"bundle": summary["bundle"], "test": summary["test"], "samples_per_s": summary["train"]["samples_per_s"]}


def _fit_baseline(cell: Cell) -> dict[str, Any]:
    """Fit trees or a linear model, in a run of its own."""
    data = PreparedData(Path(cell.prepared), verify=False)
    config = parse(BaselineConfig, cell.model, cell.name)
    tracking: TrackingConfig = parse(TrackingConfig, cell.tracking, "tracking")
    client, dataset = open_client(cell.uri), describe_data(data.manifest)
    settings = {"model": cell.model, "train": {"seed": cell.seed}}
    with open_run(client, tracking, cell.name, settings, dataset, tags=cell.tags) as run:
        baseline = Baseline(config, data, cell.seed, _Watch(cell).on_step)
        for part in ("validation", "test"):
            rows = Part(data, part)
            scores = baseline.scores(rows)
            measured = baseline.heads.metrics([(scores, rows.labels, rows.weights, rows.groups)])
            found = {task: plain(asdict(m)) for task, m in measured.items()}
            run.log(flatten({part: found}), 0, time.time())
    _keep_scores(cell, scores)
    return {"bundle": None, "test": found, "samples_per_s": None}


def _keep_scores(cell: Cell, scores: Any) -> None:
    temporary = cell.path / "scores.tmp.npy"
    np.save(temporary, np.asarray(scores))
    temporary.replace(cell.path / "scores.npy")


class _Watch:
    """Leaves a cell's progress where the driver looks for it."""

    def __init__(self, cell: Cell) -> None:
        self._file = cell.path / "progress.json"

    def on_event(self, event: dict[str, Any]) -> None:
        if event["kind"] in ("step", "epoch"):
            self.on_step(event["step"], event["total_steps"])

    def on_step(self, done: int, total: int) -> None:
        write_json(self._file, {"done": done, "total": total})


# ---- what it leaves ---------------------------------------------------------------------------------------------------


def _leave(comparison: Comparison, folder: Path, run: Run, summary: dict[str, Any]) -> None:
    """The outcome as files beside the cells, and in the parent's run: figures, tables and metrics of one name a model."""
    from recsys_moe.pictures import draw_differences, draw_pareto, drawing, render  # matplotlib, when all is done

    write_json(folder / "result.json", summary)
    with drawing():
        figures = {"Quality against cost": draw_pareto(comparison), "Differences to the baseline": draw_differences(comparison)}
        (folder / "result.html").write_text(page(comparison, figures))
        for name, figure in zip(("pareto.png", "differences.png"), figures.values(), strict=True):
            (folder / name).write_bytes(render(figure))
    tables = {"comparison.json": table(comparison), "costs.json": cost_table(comparison)}
    metrics: dict[str, float | None] = {
        f"{line.task}.{line.metric}.{line.model}": line.score.value for line in comparison.lines
    }
    run.leave([folder / name for name in ("result.json", "result.html", "pareto.png", "differences.png")], tables, metrics)
