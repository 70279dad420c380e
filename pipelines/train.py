"""`recsys-moe train`: prepare, train behind Ray Train, track in MLflow, leave a bundle (the road is `pipelines.drive`)."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recsys_moe.balancing import balancer_of
from recsys_moe.config import conf_dir
from recsys_moe.heads import Heads
from recsys_moe.models import MODELS, ModelConfig, settle
from recsys_moe.pipelines.cluster import RayConfig
from recsys_moe.pipelines.drive import Prepared, Work, begin, drive, unfinished, unless_empty
from recsys_moe.pipelines.prepare import Progress, prepare
from recsys_moe.pipelines.runs import Event, RunFolder
from recsys_moe.pipelines.tracking import TrackingConfig, describe_data, pinned, resolve_model
from recsys_moe.pipelines.worker import train_ranker
from recsys_moe.schema import Hashed
from recsys_moe.sources import DataConfig
from recsys_moe.storage import locate
from recsys_moe.trainer import TrainConfig, check_own_rows
from recsys_moe.transforms import Statistics
from recsys_moe.typed import dump, parse, typed
from recsys_moe.warm_start import StartBundle


@typed
class TrainJob:
    """All that `recsys-moe train` is told. `start` names a model to go on from, as `evaluate` does."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    tracking: TrackingConfig = TrackingConfig()
    ray: RayConfig = RayConfig()
    runs_dir: str = "runs"
    start: str | None = None


def train(
    job: TrainJob,
    on_event: Callable[[Event], None] = lambda event: None,
    on_prepare: Progress = lambda phase, done, total: None,
    name: str | None = None,
    tags: dict[str, str] | None = None,
    here: bool = False,
) -> dict[str, Any]:
    """Run a job; returns its summary (the JSON of `recsys-moe train --json`). `name` and `tags` are for its run in MLflow.

    `here` trains in this process, which is a Ray worker already, rather than in new ones behind Ray Train: one worker only,
    and who is lost with it goes on by `resume`.

    Raises:
        UserError: a mistake in what was given; training failed, or MLflow is lost, in which cases the message says what is
            kept where.
    """
    job = settle_model(job)
    # Whoever goes on with the run may stand elsewhere.
    source = str(locate(job.data.source))
    job = replace(job, runs_dir=str(Path(job.runs_dir).absolute()), data=replace(job.data, source=source))
    folder = begin("ranker", job, name or f"{job.data.name}-{job.model.name}-seed{job.train.seed}", tags)
    with unless_empty(folder):
        return drive(folder, lambda folder: _start(job, folder, on_prepare), on_event, here)


def settle_model(job: TrainJob) -> TrainJob:
    """The job with what its model takes from the schema.

    The network is built once, as small as can be: what does not fit the schema's tasks is told before hours of preparation.

    Raises:
        UserError: a mistake in the schema, or a model or workers that are not for it.
    """
    schema = job.data.load_schema(conf_dir() / "schema")
    check_own_rows([f.name for f in schema.features if isinstance(f, Hashed) and f.collisions == "none"], job.train.workers)
    model = settle(job.model, schema)
    MODELS[type(model)](model, 1, Heads(schema, Statistics((), ())).widths, torch.float32)
    balancer_of(job.train.balancing, schema.task_names)
    return replace(job, model=model)


def resume(
    name: str,
    runs_dir: Path,
    changes: dict[str, dict[str, Any]],
    on_event: Callable[[Event], None] = lambda event: None,
    on_prepare: Progress = lambda phase, done, total: None,
    here: bool = False,
) -> tuple[TrainJob, dict[str, Any]]:
    """Go on with a run that was stopped, killed or lost, from its last checkpoint; returns its job and its summary.

    `changes` are laid over the run's settings, by section.

    Raises:
        UserError: no such run, or one that has finished or is still going on; and as `train` does.
    """
    folder, settings = unfinished(name, runs_dir, "ranker", changes)
    job: TrainJob = parse(TrainJob, settings, str(folder.path / "run.json"))
    return job, drive(folder, lambda folder: _start(job, folder, on_prepare), on_event, here)


def _start(job: TrainJob, folder: RunFolder, on_prepare: Progress) -> Work:
    job, start = _fetch_start(job, folder)

    def prepared() -> Prepared:
        data = prepare(job.data, Path(job.runs_dir), on_prepare, start=start)
        told = {
            "prepared": str(data.folder),
            "data": dump(job.data),
            "model": dump(job.model),
            "train": dump(job.train),
            "start": str(folder.start) if job.start else None,
        }
        return Prepared(describe_data(data.manifest), told)

    return Work(job, job.model.name, prepared, train_ranker)


def _fetch_start(job: TrainJob, folder: RunFolder) -> tuple[TrainJob, StartBundle | None]:
    """The bundle to start from, copied into the run's folder, where the workers find it even if the registry is away; and the
    job with the version in place of an alias, which may move.

    Raises:
        UserError: there is no such model, or it is not the one that the job describes.
    """
    if job.start is None:
        return job, None
    if not folder.start.exists():
        name = pinned(job.start, folder.record.uri)
        temporary = folder.start.with_name("start.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(resolve_model(name, Path(job.runs_dir), folder.record.uri), temporary)
        temporary.rename(folder.start)
        job = replace(job, start=name)
        folder.update(job=dump(job))
    start = StartBundle(folder.start)
    start.check_model(job.model, job.train.precision)
    return job, start
