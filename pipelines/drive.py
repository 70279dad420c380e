"""The road that every training goes, whatever is trained: a run's folder, Ray Train, MLflow, and going on after a loss.

The workers train, and the first of them appends what happens to `events.jsonl`; the driver follows that file, shows it and
sends it to MLflow. So a worker needs no MLflow, a run outlives the loss of its server, and `sync` tells it later.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from recsys_moe.errors import UserError
from recsys_moe.health import Health
from recsys_moe.pipelines.cluster import RayConfig, check_device, ray_cluster
from recsys_moe.pipelines.runs import Event, Kind, RunBusy, RunFolder, all_runs, find_run
from recsys_moe.pipelines.tracking import Run, TrackingConfig, TrackingLost, open_client, open_run
from recsys_moe.pipelines.worker import Train, run_training, train_worker
from recsys_moe.shards import write_json
from recsys_moe.typed import dump, parse

Tell = Callable[[Event], None]


class TrainSettings(Protocol):
    """What the road has to know of how a job trains."""

    @property
    def workers(self) -> int | tuple[int, int]: ...
    @property
    def device(self) -> Literal["cpu", "cuda"]: ...
    @property
    def max_failures(self) -> int: ...


class Job(Protocol):
    """What a job of any kind says."""

    @property
    def train(self) -> TrainSettings: ...
    @property
    def tracking(self) -> TrackingConfig: ...
    @property
    def ray(self) -> RayConfig: ...
    @property
    def runs_dir(self) -> str: ...


@dataclass(frozen=True)
class Prepared:
    """What a job trains on: MLflow's description of the data set, and what the workers are told beside the run's places."""

    dataset: dict[str, str]
    told: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """A job's own part: `prepare` its data, when Ray is there, and `train` in a worker, with what that is told."""

    job: Job
    model: str
    prepare: Callable[[], Prepared]
    train: Train


def begin(kind: Kind, job: Job, name: str, tags: dict[str, str] | None) -> RunFolder:
    """The folder of a run that begins now.

    Raises:
        UserError: it can't be written.
    """
    runs_dir = Path(job.runs_dir)
    try:
        return RunFolder.create(runs_dir, name, dump(job), job.tracking.resolve(runs_dir), tags, kind)
    except OSError as error:
        raise UserError(f"runs_dir {job.runs_dir!r} can't be written ({error.strerror}); choose another folder") from None


@contextmanager
def unless_empty(folder: RunFolder) -> Iterator[None]:
    """Remove a run that fails with nothing to go on from."""
    try:
        yield
    except BaseException:
        if not any(event["kind"] in ("epoch", "checkpoint") for event in folder.events()):
            shutil.rmtree(folder.path, ignore_errors=True)
            with suppress(OSError):  # other runs are in it
                folder.path.parent.rmdir()
        raise


def unfinished(name: str, runs_dir: Path, kind: Kind, changes: dict[str, dict[str, Any]]) -> tuple[RunFolder, dict[str, Any]]:
    """A run to go on with, and its settings, over which `changes` are laid by section.

    Raises:
        UserError: no such run, one of another kind, or one that has finished.
    """
    folder = find_run(name, runs_dir)
    if folder.record.kind != kind:
        command = {"ranker": "recsys-moe train", "lm": "recsys-moe llm train"}[folder.record.kind]
        raise UserError(f"run {folder.path.name!r} is another kind of training; go on with `{command} --resume`")
    if folder.record.status == "FINISHED":
        later = "" if folder.record.synced else "; tell MLflow of it with `recsys-moe runs sync`"
        raise UserError(f"run {folder.path.name!r} has finished, its bundle is {str(folder.bundle)!r}{later}")
    return folder, {k: v | changes[k] if k in changes else v for k, v in folder.record.job.items()}


def drive(folder: RunFolder, start: Callable[[RunFolder], Work], on_event: Tell, here: bool) -> dict[str, Any]:
    """Train a run to its end; returns its summary.

    `start` fetches what training starts from and says what is to be done. `here` trains in this process, a Ray worker already.

    Raises:
        UserError: a mistake in what was given; training failed, or MLflow is lost, in which cases the message says what is
            kept where.
    """
    with folder.locked(), _status_kept(folder), ThreadPoolExecutor(1) as pool:
        # Before the thread: two that import MLflow at once fail on each other's half-made modules.
        work = start(folder)
        job = work.job
        # Importing MLflow and migrating its database takes seconds: meanwhile Ray starts.
        opening = pool.submit(open_client, folder.record.uri)
        workers = job.train.workers
        with ray_cluster(job.ray, workers if isinstance(workers, int) else workers[0]):
            check_device(job.train.device)
            prepared = work.prepare()
            folder.update(dataset=prepared.dataset)
            summary = None
            try:
                with _tracked(opening.result(), folder) as run:
                    summary = _fit(work, folder, prepared, on_event, run, here)
                    _tell_rest(run, folder)
                    _tell_bundle(run, folder, summary)
                    _tell_health(run, folder)
                    _tell_expert_use(run, folder)
            except TrackingLost as lost:
                if summary is None:
                    on_event({"kind": "warning", "message": f"{lost}. Training goes on without it."})
                    summary = _fit(work, folder, prepared, on_event, None, here)
                folder.update(status="FINISHED", ended=time.time())
                raise UserError(
                    f"{lost}; once it answers, `recsys-moe runs sync` tells it all; the trained bundle is kept in "
                    f"{summary['bundle']!r}"
                ) from None
            folder.update(synced=True)
    return {"model": work.model, "run_id": folder.record.run_id, "version": folder.record.version, **summary}


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
def _tracked(client: Any, folder: RunFolder) -> Iterator[Run]:
    """The run in MLflow: opened now, or once more."""
    record = folder.record
    assert record.dataset is not None
    told = (record.dataset, record.run_id, record.created, record.tags)
    with open_run(client, _tracking(folder), record.name, record.job, *told) as run:
        folder.update(run_id=run.run_id)
        yield run


def _tell_rest(run: Run, folder: RunFolder) -> None:
    """Send the metrics again if some were lost on the way; one of the same time, step and value is one."""
    if run.lost:
        run.lost = False
        for event in folder.events():
            _log(run, event)


def _tracking(folder: RunFolder) -> TrackingConfig:
    tracking: TrackingConfig = parse(TrackingConfig, folder.record.job["tracking"], str(folder.path / "run.json"))
    return tracking


def _tell_bundle(run: Run, folder: RunFolder, summary: dict[str, Any]) -> None:
    if folder.record.version is None:
        name = folder.record.job["data"]["name"]
        folder.update(version=run.log_bundle(folder.bundle, _tracking(folder), name, summary))


def _tell_health(run: Run, folder: RunFolder) -> None:
    """Draw what was seen of the experts in training, and store the pictures, a table and the warnings with the run."""
    events = folder.events()
    # A step that was lost with its worker is trained, and may be looked at, again: the later look counts.
    looks = {event["step"]: Health.from_json(event["health"]) for event in events if event["kind"] == "health"}
    if looks:
        from recsys_moe.pictures import save_health  # matplotlib, when training has ended

        save_health(sorted(looks.items()), _anomalies(events), folder.health)
        run.log_files(folder.health, "health")


def _tell_expert_use(run: Run, folder: RunFolder) -> None:
    """Draw how a language model's experts were used, and store the picture and a table with the run."""
    looks = {event["step"]: event["layers"] for event in folder.events() if event["kind"] == "experts"}
    if looks:
        from recsys_moe.pictures import save_expert_use

        save_expert_use(sorted(looks.items()), folder.health)
        run.log_files(folder.health, "experts")


def expert_metrics(layers: dict[str, Any]) -> dict[str, float]:
    """{"layer 0": {"load": [0.25, 0.75], "dead": [], …}} → {"experts.layer_0.load.0": 0.25, …, "experts.layer_0.dead": 0}."""
    found: dict[str, float] = {}
    for layer, figures in layers.items():
        at = f"experts.{layer.replace(' ', '_')}"
        for name, value in figures.items():
            if name == "dead":
                found[f"{at}.dead"] = len(value)
            elif isinstance(value, list):
                found |= {f"{at}.{name}.{e}": x for e, x in enumerate(value)}
            else:
                found[f"{at}.{name}"] = value
    return found


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
    events = folder.events()
    status = "FAILED" if folder.record.status == "RUNNING" else folder.record.status
    with _tracked(open_client(folder.record.uri), folder) as run:
        run.lost = True
        _tell_rest(run, folder)
        if status == "FINISHED":
            _tell_bundle(run, folder, events[-1])
            _tell_health(run, folder)
            _tell_expert_use(run, folder)
        run.ends_as, run.ended = status, folder.record.ended
    folder.update(status=status, synced=True)
    record = folder.record
    return {"run": str(folder.path), "run_id": record.run_id, "version": record.version, "status": status}


def _fit(work: Work, folder: RunFolder, prepared: Prepared, on_event: Tell, run: Run | None, here: bool) -> dict[str, Any]:
    """Train; returns the bundle's place, its metrics and the training's own figures.

    Raises:
        UserError: training failed; says what there is to go on from, or names the bundle of the best epoch before.
    """
    told = {
        **prepared.told,
        "events": str(folder.events_file),
        "state": str(folder.state),
        "bundle": str(folder.bundle),
    }
    folder.events_file.touch()
    with _following(folder.events_file, lambda event: _tell(event, on_event, run)):
        if here:
            run_training(told, work.train)
        else:
            _fit_behind_ray(work, folder, told)
    final = folder.events()[-1]
    if final["kind"] == "error":
        if not any(folder.state.glob("step-*.json")):  # nothing to go on from: the best weights are in the bundle
            shutil.rmtree(folder.state, ignore_errors=True)
        kept = f"; the bundle of the best epoch before is kept in {str(folder.bundle)!r}" if final["bundle"] else ""
        raise UserError(f"{final['message']}{kept}")
    measured: dict[str, Any] = {key: final[key] for key in ("validation", "test", "train") if key in final}
    write_json(folder.bundle / "metrics.json", measured)
    shutil.rmtree(folder.state, ignore_errors=True)
    return {"bundle": str(folder.bundle), **measured, "anomalies": _anomalies(folder.events())}


def _fit_behind_ray(work: Work, folder: RunFolder, told: dict[str, Any]) -> None:
    """Let Ray Train's workers train, anew when one is lost.

    Raises:
        UserError: they were lost too often.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    job, train = work.job, work.train

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
        lambda told: train_worker(told, train),
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
    command = {"ranker": "recsys-moe train", "lm": "recsys-moe llm train"}[folder.record.kind]
    return UserError(
        f"training failed once more than train.max_failures allows ({last[:300]}; the whole of it is in {str(log)!r}); mend "
        f"the cause and go on with `{command} --resume {folder.path}`"
    )


@contextmanager
def _following(path: Path, tell: Tell) -> Iterator[None]:
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


def _tell(event: Event, on_event: Tell, run: Run | None) -> None:
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
    elif event["kind"] == "experts":
        metrics = expert_metrics(event["layers"])
    elif event["kind"] in ("before", "step", "epoch", "evaluation"):
        metrics = {k: v for k, v in event.items() if k.startswith(("train.", "validation.", "before."))}
        for part in ("validation", "before"):
            for task, values in event.get(part, {}).items():
                metrics |= {f"{part}.{task}.{name}": value for name, value in values.items()}
    else:
        return
    run.log(metrics, event["step"], event["time"])
