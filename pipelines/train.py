"""`recsys-moe train`: prepare, train behind Ray Train, track in MLflow, leave a bundle.

The workers run the plain trainer, and the first of them appends what happens to `events.jsonl`; the driver follows that file,
shows it and sends it to MLflow. So a worker needs no MLflow, a run outlives the loss of its server, and `sync` tells it later.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from recsys_moe.balancing import balancer_of
from recsys_moe.config import conf_dir
from recsys_moe.errors import UserError
from recsys_moe.heads import Heads
from recsys_moe.health import Health
from recsys_moe.models import MODELS, ModelConfig, settle
from recsys_moe.pipelines.cluster import RayConfig, check_device, ray_cluster
from recsys_moe.pipelines.prepare import Progress, prepare
from recsys_moe.pipelines.runs import Event, RunBusy, RunFolder, all_runs, find_run
from recsys_moe.pipelines.tracking import (
    Run,
    TrackingConfig,
    TrackingLost,
    describe_data,
    open_client,
    open_run,
    pinned,
    resolve_model,
)
from recsys_moe.pipelines.worker import run_training, train_worker
from recsys_moe.schema import Hashed
from recsys_moe.shards import write_json
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
    runs_dir = Path(job.runs_dir).absolute()
    uri = job.tracking.resolve(runs_dir)
    # Whoever goes on with the run may stand elsewhere.
    settled = replace(job, runs_dir=str(runs_dir), data=replace(job.data, source=str(locate(job.data.source))))
    try:
        name = name or f"{job.data.name}-{job.model.name}-seed{job.train.seed}"
        folder = RunFolder.create(runs_dir, name, dump(settled), uri, tags)
    except OSError as error:
        raise UserError(f"runs_dir {job.runs_dir!r} can't be written ({error.strerror}); choose another folder") from None
    try:
        return _run(settled, folder, on_event, on_prepare, here)
    except BaseException:
        # A run that has nothing to go on from goes again.
        if not any(event["kind"] in ("epoch", "checkpoint") for event in folder.events()):
            shutil.rmtree(folder.path, ignore_errors=True)
            with suppress(OSError):  # other runs are in it
                folder.path.parent.rmdir()
        raise


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
    folder = find_run(name, runs_dir)
    settings = {k: v | changes[k] if k in changes else v for k, v in folder.record.job.items()}
    job: TrainJob = parse(TrainJob, settings, str(folder.path / "run.json"))
    if folder.record.status == "FINISHED":
        later = "" if folder.record.synced else "; tell MLflow of it with `recsys-moe runs sync`"
        raise UserError(f"run {folder.path.name!r} has finished, its bundle is {str(folder.bundle)!r}{later}")
    return job, _run(job, folder, on_event, on_prepare, here)


def _run(
    job: TrainJob, folder: RunFolder, on_event: Callable[[Event], None], on_prepare: Progress, here: bool
) -> dict[str, Any]:
    with folder.locked(), _status_kept(folder), ThreadPoolExecutor(1) as pool:
        # Before the thread: two that import MLflow at once fail on each other's half-made modules.
        job, start = _fetch_start(job, folder)
        # Importing MLflow and migrating its database takes seconds: meanwhile Ray starts.
        opening = pool.submit(open_client, folder.record.uri)
        workers = job.train.workers
        with ray_cluster(job.ray, workers if isinstance(workers, int) else workers[0]):
            check_device(job.train.device)
            data = prepare(job.data, Path(job.runs_dir), on_prepare, start=start)
            folder.update(dataset=describe_data(data.manifest))
            summary = None
            try:
                with _tracked(opening.result(), job, folder) as run:
                    summary = _fit(job, folder, data.folder, on_event, run, here)
                    _tell_rest(run, folder)
                    _tell_bundle(run, job, folder, summary)
                    _tell_health(run, folder)
            except TrackingLost as lost:
                if summary is None:
                    on_event({"kind": "warning", "message": f"{lost}. Training goes on without it."})
                    summary = _fit(job, folder, data.folder, on_event, None, here)
                folder.update(status="FINISHED", ended=time.time())
                raise UserError(
                    f"{lost}; once it answers, `recsys-moe runs sync` tells it all; the trained bundle is kept in "
                    f"{summary['bundle']!r}"
                ) from None
            folder.update(synced=True)
    return {"model": job.model.name, "run_id": folder.record.run_id, "version": folder.record.version, **summary}


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


@contextmanager
def _status_kept(folder: RunFolder) -> Iterator[None]:
    """Write into the record how the run ends; a driver that is killed leaves RUNNING there."""
    folder.update(status="RUNNING", ended=None, synced=False)
    try:
        yield
    except BaseException as error:
        if folder.record.status == "RUNNING":
            with suppress(OSError):  # the error on its way matters more
                folder.update(status="KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", ended=time.time())
        raise
    folder.update(status="FINISHED", ended=time.time())


@contextmanager
def _tracked(client: Any, job: TrainJob, folder: RunFolder) -> Iterator[Run]:
    """The run in MLflow: opened now, or once more."""
    record = folder.record
    assert record.dataset is not None
    told = (record.dataset, record.run_id, record.created, record.tags)
    with open_run(client, job.tracking, record.name, dump(job), *told) as run:
        folder.update(run_id=run.run_id)
        yield run


def _tell_rest(run: Run, folder: RunFolder) -> None:
    """Send the metrics again if some were lost on the way; one of the same time, step and value is one."""
    if run.lost:
        run.lost = False
        for event in folder.events():
            _log(run, event)


def _tell_bundle(run: Run, job: TrainJob, folder: RunFolder, summary: dict[str, Any]) -> None:
    if folder.record.version is None:
        folder.update(version=run.log_bundle(folder.bundle, job.tracking, job.data.name, summary))


def _tell_health(run: Run, folder: RunFolder) -> None:
    """Draw what was seen of the experts in training, and store the pictures, a table and the warnings with the run."""
    events = folder.events()
    # A step that was lost with its worker is trained, and may be looked at, again: the later look counts.
    looks = {event["step"]: Health.from_json(event["health"]) for event in events if event["kind"] == "health"}
    if looks:
        from recsys_moe.pictures import save_health  # matplotlib, when training has ended

        save_health(sorted(looks.items()), _anomalies(events), folder.health)
        run.log_files(folder.health, "health")


def _anomalies(events: list[Event]) -> list[str]:
    """Each warning of an anomaly once, though a run that went on may have told it again."""
    first: dict[tuple[str, ...], str] = {}
    for event in events:
        if "anomaly" in event:
            first.setdefault((event["anomaly"], event["plan"], *event["experts"]), event["message"])
    return list(first.values())


def sync(runs_dir: Path, name: str | None = None) -> list[dict[str, Any]]:
    """Tell MLflow all that it missed of each run, or of one: metrics, the bundle, how it ended.

    Runs that are going on are left alone; one whose driver was killed has FAILED. A run whose server is away keeps no other
    from being told.

    Returns:
        For each run that was not known whole: its folder, MLflow's run id, the registered version (None: it left no bundle)
        and its status.

    Raises:
        UserError: no such run, or MLflow can't be used for one of them.
    """
    told, untold = [], []
    for folder in [find_run(name, runs_dir)] if name else all_runs(runs_dir):
        try:
            with folder.locked():
                folder = RunFolder(folder.path)  # as the process that had the lock has left it
                if not folder.record.synced and folder.record.dataset is not None:
                    told.append(_sync(folder))
        except RunBusy:
            if name:
                raise
        except UserError as error:
            if name:
                raise
            untold.append(f"{folder.path.name}: {error}")
    if untold:
        done = f"{len(told)} runs were told of, {len(untold)} were not" if told else f"{len(untold)} runs were not told of"
        raise UserError(f"{done} ({'; '.join(untold)})")
    return told


def _sync(folder: RunFolder) -> dict[str, Any]:
    job: TrainJob = parse(TrainJob, folder.record.job, str(folder.path / "run.json"))
    events = folder.events()
    status = "FAILED" if folder.record.status == "RUNNING" else folder.record.status
    with _tracked(open_client(folder.record.uri), job, folder) as run:
        run.lost = True
        _tell_rest(run, folder)
        if status == "FINISHED":
            _tell_bundle(run, job, folder, events[-1])
            _tell_health(run, folder)
        run.ends_as, run.ended = status, folder.record.ended
    folder.update(status=status, synced=True)
    record = folder.record
    return {"run": str(folder.path), "run_id": record.run_id, "version": record.version, "status": status}


def _fit(
    job: TrainJob, folder: RunFolder, data: Path, on_event: Callable[[Event], None], run: Run | None, here: bool
) -> dict[str, Any]:
    """Train; returns the bundle's place, its metrics and the training's own figures.

    Raises:
        UserError: training failed; says what there is to go on from, or names the bundle of the best epoch before.
    """
    told = {
        "prepared": str(data),
        "data": dump(job.data),
        "model": dump(job.model),
        "train": dump(job.train),
        "events": str(folder.events_file),
        "state": str(folder.state),
        "bundle": str(folder.bundle),
        "start": str(folder.start) if job.start else None,
    }
    folder.events_file.touch()
    with _following(folder.events_file, lambda event: _tell(event, on_event, run)):
        if here:
            run_training(told)
        else:
            _fit_behind_ray(job, folder, told)
    final = folder.events()[-1]
    if final["kind"] == "error":
        if not any(folder.state.glob("step-*.json")):  # nothing to go on from: the best weights are in the bundle
            shutil.rmtree(folder.state, ignore_errors=True)
        kept = f"; the bundle of the best epoch before is kept in {str(folder.bundle)!r}" if final["bundle"] else ""
        raise UserError(f"{final['message']}{kept}")
    measured = {key: final[key] for key in ("validation", "test", "train")}
    write_json(folder.bundle / "metrics.json", measured)
    shutil.rmtree(folder.state, ignore_errors=True)
    return {"bundle": str(folder.bundle), **measured, "anomalies": _anomalies(folder.events())}


def _fit_behind_ray(job: TrainJob, folder: RunFolder, told: dict[str, Any]) -> None:
    """Let Ray Train's workers train, anew when one is lost.

    Raises:
        UserError: they were lost too often.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    class Fitter(TorchTrainer):
        """Without what Ray Train does for others.

        Its handler of Ctrl-C ends in SystemExit or in an actor's error; without it, KeyboardInterrupt comes. Its cleaner of
        placement groups asks the dashboard whether the controller lives, and where there is none, as in a Ray of our own,
        which goes with its command, ends ten seconds after training.
        """

        def _register_sigint_handler(self, controller: Any) -> None:
            pass

        def _create_default_callbacks(self) -> list[Any]:
            callbacks: list[Any] = super()._create_default_callbacks()
            if job.ray.address is not None:
                return callbacks
            return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]

    workers = job.train.workers
    if isinstance(workers, tuple) and job.ray.address is None:  # this machine has room for as many as it has cores
        workers = (workers[0], max(workers[0], min(workers[1], len(os.sched_getaffinity(0)))))
    trainer = Fitter(
        train_worker,
        train_loop_config=told,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=job.train.device == "cuda", resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            storage_path=str(folder.path), name="ray", failure_config=FailureConfig(max_failures=job.train.max_failures)
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _training_failed(error, folder) from None


def _training_failed(error: Exception, folder: RunFolder) -> UserError:
    """What is said when workers are lost more often than `train.max_failures` allows; the traceback goes into a file."""
    log = folder.path / "failure.txt"
    with suppress(OSError):  # the disk may be what is full
        log.write_text(str(error))
    last = [line for line in str(error).splitlines() if line.strip()][-1].strip()
    return UserError(
        f"training failed once more than train.max_failures allows ({last[:300]}; the whole of it is in {str(log)!r}); mend "
        f"the cause and go on with `recsys-moe train --resume {folder.path}`"
    )


@contextmanager
def _following(path: Path, tell: Callable[[Event], None]) -> Iterator[None]:
    """Tell every line that a file of JSON lines grows by, in the background, until the block ends."""
    ended = threading.Event()
    start = path.stat().st_size

    def follow() -> None:
        with path.open() as file:
            file.seek(start)
            rest = ""
            while True:
                last_look = ended.is_set()
                rest += file.read()
                *lines, rest = rest.split("\n")
                for line in lines:
                    with suppress(json.JSONDecodeError):  # what a killed worker left half written
                        tell(json.loads(line))
                if last_look:
                    return
                ended.wait(0.2)

    thread = threading.Thread(target=follow, name="follow-events")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _tell(event: Event, on_event: Callable[[Event], None], run: Run | None) -> None:
    on_event(event)
    if run is None or run.lost:
        return
    try:
        _log(run, event)
    except TrackingLost as lost:  # the metrics stay in events.jsonl; training must not end with its observer
        on_event({"kind": "warning", "message": f"{lost}. Metrics are kept in the run's events.jsonl."})


def _log(run: Run, event: Event) -> None:
    """Send an event's metrics, as of when it happened."""
    if event["kind"] == "health":
        metrics = dict[str, Any](Health.from_json(event["health"]).metrics())
    elif event["kind"] in ("before", "step", "epoch"):
        metrics = {k: v for k, v in event.items() if k.startswith(("train.", "validation.", "before."))}
        for part in ("validation", "before"):
            for task, values in event.get(part, {}).items():
                metrics |= {f"{part}.{task}.{name}": value for name, value in values.items()}
    else:
        return
    run.log(metrics, event["step"], event["time"])
