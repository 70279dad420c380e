"""`recsys-moe train`: prepare, train behind Ray Train, track in MLflow, leave a bundle.

The worker runs the plain trainer and appends what happens to `events.jsonl`; the driver follows that file, shows it and
sends it to MLflow. So the worker needs no MLflow, and a run outlives the loss of its server.
"""

import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from recsys_moe.errors import UserError
from recsys_moe.models import ModelConfig
from recsys_moe.pipelines.cluster import local_ray
from recsys_moe.pipelines.prepare import Progress, prepare
from recsys_moe.pipelines.tracking import Run, TrackingConfig, TrackingLost, describe_data, open_client, open_run
from recsys_moe.shards import write_json
from recsys_moe.sources import DataConfig
from recsys_moe.trainer import TrainConfig
from recsys_moe.typed import dump, typed

Event = dict[str, Any]


@typed
class TrainJob:
    """All that `recsys-moe train` is told."""

    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    tracking: TrackingConfig = TrackingConfig()
    runs_dir: str = "runs"


def train(
    job: TrainJob,
    on_event: Callable[[Event], None] = lambda event: None,
    on_prepare: Progress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Run a job; returns its summary (the JSON of `recsys-moe train --json`).

    Raises:
        UserError: a mistake in what was given; or MLflow is lost, in which case the message says where the bundle is.
    """
    runs_dir = Path(job.runs_dir).absolute()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    run_name = f"{job.data.name}-{job.model.name}-seed{job.train.seed}"
    folder = runs_dir / "train" / f"{stamp}-{run_name}-{uuid.uuid4().hex[:6]}"
    uri = job.tracking.resolve(runs_dir)
    with _run_folder(folder, job.runs_dir), ThreadPoolExecutor(1) as pool:
        # Importing MLflow and migrating its database takes seconds: meanwhile Ray starts.
        opening = pool.submit(open_client, uri)
        with local_ray():
            data = prepare(job.data, runs_dir, on_prepare)
            described = describe_data(data.manifest)
            summary = None
            try:
                with open_run(opening.result(), job.tracking, run_name, dump(job), described) as run:
                    summary = _fit(job, folder, data.folder, on_event, run)
                    version = run.log_bundle(Path(summary["bundle"]), job.tracking, job.data.name, summary)
            except TrackingLost as lost:
                if summary is None:
                    on_event({"kind": "warning", "message": f"{lost}. Training goes on without it."})
                    summary = _fit(job, folder, data.folder, on_event, None)
                raise UserError(f"{lost}; the trained bundle is kept in {summary['bundle']!r}") from None
    return {"model": job.model.name, "run_id": run.run_id, "version": version, **summary}


@contextmanager
def _run_folder(folder: Path, runs_dir: str) -> Iterator[None]:
    """The folder of a run, which goes again when the run ends before it has finished an epoch."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"runs_dir {runs_dir!r} can't be written ({error.strerror}); choose another folder") from None
    try:
        yield
    except BaseException:
        events = folder / "events.jsonl"
        if not (events.exists() and '"kind": "epoch"' in events.read_text()):
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # other runs are in it
                folder.parent.rmdir()
        raise


def _fit(job: TrainJob, folder: Path, data: Path, on_event: Callable[[Event], None], run: Run | None) -> dict[str, Any]:
    """Train through Ray; returns the bundle's place, its metrics and the training's own figures.

    Raises:
        UserError: training failed; names the bundle of the best epoch if there was one before.
    """

    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from recsys_moe.pipelines.worker import train_worker

    class InterruptibleTrainer(TorchTrainer):
        """Ray's own handler of Ctrl-C ends in SystemExit or in an actor's error; without it, KeyboardInterrupt comes."""

        def _register_sigint_handler(self, controller: Any) -> None:
            pass

    events = folder / "events.jsonl"
    events.touch()
    trainer = InterruptibleTrainer(
        train_worker,
        train_loop_config={
            "prepared": str(data),
            "data": dump(replace(job.data, source=str(Path(job.data.source).absolute()))),
            "model": dump(job.model),
            "train": dump(job.train),
            "events": str(events),
        },
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            storage_path=str(folder),
            name="ray",
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="mean_quality", checkpoint_score_order="max"
            ),
        ),
    )
    with _following(events, lambda event: _tell(event, on_event, run)):
        result = trainer.fit()
    final = json.loads(events.read_text().splitlines()[-1])
    bundle = folder / "bundle"
    if final["kind"] == "error":
        if result.checkpoint is None:
            raise UserError(final["message"])
        _keep_bundle(result.checkpoint, bundle)
        raise UserError(f"{final['message']}; the bundle of the best epoch before is kept in {str(bundle)!r}")
    if result.checkpoint is None:
        raise RuntimeError("training ended without a checkpoint")
    measured = {key: final[key] for key in ("validation", "test", "train")}
    _keep_bundle(result.checkpoint, bundle, measured)
    return {"bundle": str(bundle), **measured}


def _keep_bundle(checkpoint: Any, bundle: Path, metrics: dict[str, Any] | None = None) -> None:
    """Copy a checkpoint to its place, whole or not at all; `metrics` replace its validation metrics.

    Only an epoch that is the best so far leaves a checkpoint: the last one is the best.
    """
    temporary = bundle.with_name(f".{bundle.name}.tmp")
    with checkpoint.as_directory() as best:
        shutil.copytree(best, temporary)
    if metrics:
        write_json(temporary / "metrics.json", metrics)
    temporary.rename(bundle)


@contextmanager
def _following(path: Path, tell: Callable[[Event], None]) -> Iterator[None]:
    """Tell every line of a growing file of JSON lines, in the background, until the block ends."""
    ended = threading.Event()

    def follow() -> None:
        with path.open() as file:
            rest = ""
            while True:
                last_look = ended.is_set()
                rest += file.read()
                *lines, rest = rest.split("\n")
                for line in lines:
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
    if run is None or "step" not in event:
        return
    metrics = {k: v for k, v in event.items() if k.startswith(("train.", "validation."))}
    for task, values in event.get("validation", {}).items():
        metrics |= {f"validation.{task}.{name}": value for name, value in values.items()}
    try:
        run.log(metrics, event["step"])
    except TrackingLost as lost:  # the metrics stay in events.jsonl; training must not end with its observer
        on_event({"kind": "warning", "message": f"{lost}. Metrics are kept in the run's events.jsonl."})
