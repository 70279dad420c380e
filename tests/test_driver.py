"""The driver of a training, and how it meets faults: MLflow and the run's folder are real, the worker runs in this process.
tests/test_road.py kills real workers, drivers and servers."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from recsys_moe.errors import UserError
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.pipelines import cluster, drive, prepare, train
from recsys_moe.pipelines.runs import RunFolder, all_runs
from recsys_moe.pipelines.tracking import TrackingConfig, open_client, promote
from recsys_moe.pipelines.train import TrainJob
from recsys_moe.predictor import Predictor
from recsys_moe.sources import DataConfig
from recsys_moe.trainer import TrainConfig, Trainer
from recsys_moe.typed import dump


def map_here(chunks: list[Any], work: Callable[[Any], Any], progress: Callable[[int], None]) -> Iterator[Any]:
    yield from map(work, chunks)


class TrainerHere:
    """Ray's TorchTrainer with one worker, in this process."""

    def __init__(self, worker: Callable[[Any], None], train_loop_config: dict[str, Any], **settings: Any) -> None:
        self.worker, self.config = worker, train_loop_config

    def fit(self) -> None:
        self.worker(self.config)


@pytest.fixture(scope="module", autouse=True)
def without_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "ray_cluster", lambda config, workers: nullcontext())
        patch.setattr(prepare, "_map_chunks", map_here)
        patch.setattr("ray.train.torch.TorchTrainer", TrainerHere)
        for name in ("use_all_cores", "keep_freed_memory"):  # they are for a whole process
            patch.setattr(f"recsys_moe.pipelines.worker.{name}", lambda *anything: None)
        yield


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume") / "runs"


@pytest.fixture(scope="module")
def monday(runs_dir: Path, clicks: Any, clicks_schema: Any) -> TrainJob:
    """A job of which a champion is registered: models:/clicks/1."""
    folder = runs_dir.parent
    (folder / "schema.yaml").write_text(yaml.safe_dump(dump(clicks_schema)))
    pq.write_table(clicks(800, 1), folder / "monday.parquet")
    tuesday = clicks(800, 2)
    colours = ["violet" if n % 4 == 0 else old for n, old in enumerate(tuesday["colour"].to_pylist())]
    pq.write_table(tuesday.set_column(0, "colour", pa.array(colours)), folder / "tuesday.parquet")
    data = DataConfig("clicks", str(folder / "monday.parquet"), str(folder / "schema.yaml"))
    model = MMoEConfig(embedding_dim=4, num_experts=2, expert_dims=(8,), tower_dims=(4,), dropout=0.2)
    job = TrainJob(data, model, TrainConfig(epochs=2, batch_size=64), runs_dir=str(runs_dir))
    assert train.train(job)["version"] == "models:/clicks/1"
    promote("models:/clicks/1", "champion", job.tracking.resolve(runs_dir))
    return job


def train_until(step: int, job: TrainJob, runs_dir: Path) -> RunFolder:
    """The folder of a run that Ctrl-C stops as soon as the state of that step is written."""
    before, save = {run.path for run in all_runs(runs_dir)}, Trainer._save

    def save_and_stop(self: Trainer) -> None:
        save(self)
        if self.step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(job)
    (stopped,) = [run for run in all_runs(runs_dir) if run.path not in before]
    return stopped


def weights(summary: dict[str, Any]) -> bytes:
    return (Path(summary["bundle"]) / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [3, 12], ids=["in the first epoch", "in the second"])
def test_a_run_that_goes_on_from_a_champion_is_resumed_to_the_same_bits(step: int, monday: TrainJob, runs_dir: Path) -> None:
    data = replace(monday.data, source=str(runs_dir.parent / "tuesday.parquet"))
    job = replace(monday, data=data, start="models:/clicks@champion", train=replace(monday.train, checkpoint_steps=3))
    whole = train.train(job)
    stopped = train_until(step, job, runs_dir)
    assert (stopped.record.status, stopped.record.job["start"]) == ("KILLED", "models:/clicks/1")
    promote(whole["version"], "champion", job.tracking.resolve(runs_dir))  # the alias names another model by now
    try:
        events: list[dict[str, Any]] = []
        resumed, summary = train.resume(stopped.path.name, runs_dir, {}, events.append)
    finally:
        promote("models:/clicks/1", "champion", job.tracking.resolve(runs_dir))
    assert resumed.start == "models:/clicks/1"
    assert next(event["step"] for event in events if event["kind"] == "resume") == step
    assert not any(event["kind"] == "before" for event in events)
    assert weights(summary) == weights(whole)
    assert summary["test"] == whole["test"]
    assert summary["run_id"] == stopped.record.run_id
    vocabulary = json.loads((Path(summary["bundle"]) / "statistics.json").read_text())["categorical"][0]["vocabulary"]
    assert vocabulary[-1] == "violet"


def test_a_run_that_was_lost_before_it_had_its_start_fetches_it(monday: TrainJob, runs_dir: Path) -> None:
    data = replace(monday.data, source=str(runs_dir.parent / "tuesday.parquet"))
    job = replace(monday, data=data, start="models:/clicks@champion", train=replace(monday.train, epochs=1))
    lost = RunFolder.create(runs_dir, "lost", dump(train.settle_model(job)), job.tracking.resolve(runs_dir))
    resumed, summary = train.resume(str(lost.path), runs_dir, {})
    assert resumed.start == "models:/clicks@champion"
    assert RunFolder(lost.path).record.job["start"] == "models:/clicks/1"
    assert (lost.path / "start" / "model.safetensors").exists()
    assert Path(summary["bundle"]).parent == lost.path


def test_what_mlflow_missed_while_it_was_away_is_sent_later(monday: TrainJob, runs_dir: Path) -> None:
    job = replace(monday, train=replace(monday.train, epochs=4, patience=0))
    database, events = runs_dir / "mlflow.db", list[dict[str, Any]]()

    def rename(table: str, name: str) -> None:
        with sqlite3.connect(database) as connection:
            connection.execute(f"alter table {table} rename to {name}")

    def lose_it_in_the_second_epoch(event: dict[str, Any]) -> None:
        if event["kind"] == "epoch" and event["epoch"] == 2:
            rename("metrics", "gone")
        events.append(event)

    with pytest.raises(UserError, match=r"can't be used .*`recsys-moe runs sync` tells it all; the trained bundle is kept in"):
        train.train(job, lose_it_in_the_second_epoch)
    rename("gone", "metrics")
    assert [event["epoch"] for event in events if event["kind"] == "epoch"] == [1, 2, 3, 4]
    assert any("Metrics are kept in the run's events.jsonl" in e["message"] for e in events if e["kind"] == "warning")
    (told,) = drive.sync(runs_dir)
    assert told["status"] == "FINISHED"
    client = open_client(job.tracking.resolve(runs_dir))
    history = client.get_metric_history(told["run_id"], "validation.click.auc")
    epochs = [event for event in events if event["kind"] == "epoch"]
    assert [(m.step, m.value, m.timestamp) for m in history] == [
        (e["step"], e["validation"]["click"]["auc"], int(e["time"] * 1000)) for e in epochs
    ]
    assert client.get_model_version_by_alias("clicks", "candidate").run_id == told["run_id"]
    assert drive.sync(runs_dir) == []


def test_an_mlflow_that_was_never_there_leaves_the_bundle(monday: TrainJob) -> None:
    # Nothing listens on the discard port.
    told: list[dict[str, Any]] = []
    with pytest.raises(UserError, match=r"does not answer .*`recsys-moe runs sync` tells it all") as lost:
        train.train(replace(monday, tracking=TrackingConfig("http://127.0.0.1:9")), told.append)
    assert any("Training goes on without it" in event["message"] for event in told if event["kind"] == "warning")
    bundle = Path(str(lost.value).split("kept in ")[1].strip("'"))
    assert Predictor(bundle).score_names == ("click", "buy")


def test_a_run_that_fails_early_leaves_no_folder(monday: TrainJob, tmp_path: Path) -> None:
    job = replace(monday, data=replace(monday.data, source=str(tmp_path / "nowhere")), runs_dir=str(tmp_path / "runs"))
    with pytest.raises(UserError, match="does not exist"):
        train.train(job)
    assert not (tmp_path / "runs" / "train").exists()


def test_a_loss_that_explodes_late_leaves_the_bundle(monday: TrainJob) -> None:
    # The weight decay is harmless while the learning rate rises and multiplies the weights once it is high.
    job = replace(monday, train=replace(monday.train, epochs=20, patience=0, weight_decay=5000.0))
    with pytest.raises(
        UserError,
        match=r"(the loss became|(outputs on|logits of) .* are not finite).*the bundle of the best epoch before is kept in",
    ) as exploded:
        train.train(job)
    bundle = Path(str(exploded.value).split("kept in ")[1].strip("'"))
    assert Predictor(bundle).score_names == ("click", "buy")
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle", "events.jsonl", "lock", "run.json"]


def test_a_machine_too_busy_for_ray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: Any) -> None:
        raise Exception("The current node timed out during startup. This could happen because …")

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    with pytest.raises(UserError, match="Ray did not come up"), cluster.local_ray():
        pass
