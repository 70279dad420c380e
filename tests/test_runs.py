"""Runs on disk: their records, and what MLflow is told of them later."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from recsys_moe.errors import UserError
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.pipelines.drive import sync
from recsys_moe.pipelines.runs import RunBusy, RunFolder, all_runs, find_run
from recsys_moe.pipelines.tracking import TrackingConfig, open_client, open_run
from recsys_moe.pipelines.train import TrainJob, resume
from recsys_moe.pipelines.worker import EventLog
from recsys_moe.sources import DataConfig
from recsys_moe.trainer import TrainConfig
from recsys_moe.typed import dump

DATASET = {"name": "d", "digest": "0", "source_type": "local", "source": "{}", "profile": "{}"}
EVENTS = [
    {"kind": "start", "step": 0, "total_steps": 20, "time": 100.0},
    {"kind": "step", "step": 5, "train.loss": 0.5, "time": 101.0},
    {"kind": "epoch", "step": 10, "train.loss": 0.4, "validation": {"click": {"auc": 0.7, "gauc": None}}, "time": 102.5},
    {"kind": "warning", "message": "", "time": 103.0},
]
DONE = {"kind": "done", "validation": {}, "test": {"click": {"auc": 0.6}}, "train": {"steps": 20}, "time": 104.0}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of which MLflow knows nothing."""
    job = TrainJob(DataConfig("d", "logs", "schema.yaml"), MMoEConfig(), TrainConfig(), runs_dir=str(tmp_path))
    made = RunFolder.create(tmp_path, "d-mmoe-seed0", dump(job), TrackingConfig().resolve(tmp_path))
    made.events_file.write_text("".join(json.dumps(event) + "\n" for event in EVENTS))
    made.update(dataset=DATASET, created=99.0)
    return made


def look(step: int, zero: float) -> dict[str, Any]:
    """The event of a look at a mixture of two experts."""
    one = {
        "gates": ["click"],
        "experts": ["expert 0", "expert 1"],
        "sees": [[True, True]],
        "zero": [zero, 0.5],
        "dead": [0.0, 0.0],
    }
    one |= {"mean": [0.1, 0.2], "variance": [0.3, 0.4], "weight": [[0.25, 0.75]], "deviation": [[0.1, 0.1]], "entropy": [0.5]}
    one |= {"share": [[0.25, 0.75]], "gradient": [[1.0, 2.0]]}
    health = {"tasks": ["click"], "cosine": [[1.0]], "plans": {"experts": one}}
    return {"kind": "health", "step": step, "seconds": 0.1, "health": health, "time": 102.0}


def warning(step: int, expert: str) -> dict[str, Any]:
    where = {"anomaly": "collapse", "plan": "experts", "experts": [expert]}
    return {"kind": "warning", "message": f"step {step}: {expert} has collapsed", **where, "time": 102.0}


def test_mlflow_is_told_of_the_experts_that_it_missed(folder: RunFolder) -> None:
    # A worker was lost after step 8, and what it had seen was seen again.
    events = [look(4, 0.6), warning(8, "expert 1"), look(8, 0.7), look(6, 0.65), warning(8, "expert 0"), warning(9, "expert 1")]
    with folder.events_file.open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in [*events, look(8, 0.95)])
    finish(folder)
    (told,) = sync(folder.path.parents[1])
    client = open_client(folder.record.uri)
    zero = client.get_metric_history(told["run_id"], "health.experts.expert_0.zero")
    assert sorted((m.step, m.value) for m in zero) == [(4, 0.6), (6, 0.65), (8, 0.7), (8, 0.95)]
    names = {artifact.path for artifact in client.list_artifacts(told["run_id"], "health")}
    assert names == {f"health/{n}" for n in ("experts_experts.png", "training_experts.png", "experts.csv", "warnings.txt")}
    assert (folder.health / "warnings.txt").read_text() == "step 8: expert 1 has collapsed\nstep 8: expert 0 has collapsed\n"
    table = (folder.health / "experts.csv").read_text().splitlines()
    assert table[0] == "plan,expert,zero,dead,mean,variance,held,held by,gradient.click,weight.click"
    assert table[1] == "experts,expert 0,0.95,0,0.1,0.3,,,1,0.25"  # with one task nothing is held by one of several


def finish(folder: RunFolder) -> None:
    with folder.events_file.open("a") as file:
        file.write(json.dumps(DONE) + "\n")
    folder.bundle.mkdir()
    (folder.bundle / "config.json").write_text("{}")
    folder.update(status="FINISHED", ended=105.0)


def test_a_record_is_what_was_written(folder: RunFolder) -> None:
    assert RunFolder(folder.path).record == folder.record
    assert [run.path for run in all_runs(folder.path.parents[1])] == [folder.path]
    folder.update(run_id="abc")
    for name in (str(folder.path), folder.path.name, "abc"):
        assert find_run(name, folder.path.parents[1]).path == folder.path


def test_a_name_that_no_run_has(folder: RunFolder) -> None:
    with pytest.raises(UserError, match=f"run 'd-mmoe' is neither a folder .*{folder.path.name}"):
        find_run("d-mmoe", folder.path.parents[1])


@pytest.mark.parametrize(("text", "sentence"), [("{", "is not whole"), ('{"format": 1}', "is missing"), (None, "is not a run")])
def test_a_damaged_record_is_told(text: str | None, sentence: str, folder: RunFolder) -> None:
    file = folder.path / "run.json"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=sentence):
        RunFolder(folder.path)


def test_a_run_has_one_driver(folder: RunFolder) -> None:
    with folder.locked():
        with pytest.raises(RunBusy, match="is being trained by another process"), RunFolder(folder.path).locked():
            pass
        assert sync(folder.path.parents[1]) == []  # it tells MLflow itself
    with folder.locked():
        pass


def test_a_line_that_a_killed_worker_left_half_written_is_no_event(folder: RunFolder) -> None:
    with folder.events_file.open("a") as file:
        file.write('{"kind": "ep')
    assert folder.events() == EVENTS
    with EventLog(folder.events_file) as log:
        log.tell(DONE)
    assert [event | {"time": 0} for event in folder.events()] == [event | {"time": 0} for event in (*EVENTS, DONE)]
    size = os.path.getsize(folder.events_file)
    with EventLog(folder.events_file):
        pass
    assert os.path.getsize(folder.events_file) == size


@pytest.mark.parametrize("known", [False, True], ids=["never heard of it", "lost on the way"])
def test_mlflow_is_told_what_it_missed(known: bool, folder: RunFolder) -> None:
    runs_dir, client = folder.path.parents[1], open_client(folder.record.uri)
    if known:
        job: Any = folder.record.job
        with open_run(client, TrackingConfig(), "d-mmoe-seed0", job, DATASET) as run:
            run.log({"train.loss": 0.5}, 5, 101.0)
        folder.update(run_id=run.run_id)
    finish(folder)
    (told,) = sync(runs_dir)
    assert (told["run"], told["version"], told["status"]) == (str(folder.path), "models:/d/1", "FINISHED")
    found = client.get_run(told["run_id"])
    assert not known or told["run_id"] == run.run_id
    assert found.info.status == "FINISHED"
    assert known or (found.info.start_time, found.info.end_time) == (99_000, 105_000)
    assert found.data.params["train.seed"] == "0"
    losses = client.get_metric_history(told["run_id"], "train.loss")
    assert [(m.step, m.value, m.timestamp) for m in losses] == [(5, 0.5, 101_000), (10, 0.4, 102_500)]
    assert client.get_metric_history(told["run_id"], "validation.click.auc")[0].value == 0.7
    assert client.get_model_version_by_alias("d", "candidate").run_id == told["run_id"]
    assert sync(runs_dir) == []
    # Told once more, nothing changes.
    folder = RunFolder(folder.path)
    folder.update(synced=False)
    (again,) = sync(runs_dir, folder.path.name)
    assert again == told
    assert len(client.get_metric_history(told["run_id"], "train.loss")) == 2
    assert len(client.search_model_versions("name='d'")) == 1


def test_a_server_that_is_away_keeps_no_other_run_from_being_told(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def open_known(uri: str) -> Any:
        if uri == "http://away":
            raise UserError("it does not answer")
        return open_client(uri)

    monkeypatch.setattr("recsys_moe.pipelines.drive.open_client", open_known)
    runs_dir = folder.path.parents[1]
    finish(folder)
    for name in ("a", "z"):  # before and after it in any order
        other = RunFolder.create(runs_dir, name, folder.record.job, "http://away")
        other.events_file.write_text("")
        other.update(dataset=DATASET)
    with pytest.raises(UserError, match="1 runs were told of, 2 were not") as told:
        sync(runs_dir)
    assert f"{other.path.name}: it does not answer" in str(told.value)
    assert RunFolder(folder.path).record.synced


def test_a_run_whose_driver_was_killed_has_failed(folder: RunFolder) -> None:
    (told,) = sync(folder.path.parents[1])
    assert (told["status"], told["version"]) == ("FAILED", None)
    assert open_client(folder.record.uri).get_run(told["run_id"]).info.status == "FAILED"


def test_a_run_that_has_finished_is_not_resumed(folder: RunFolder) -> None:
    finish(folder)
    with pytest.raises(UserError, match=r"has finished, its bundle is .*; tell MLflow of it with `recsys-moe runs sync`"):
        resume(folder.path.name, folder.path.parents[1], {})


def test_two_bounds_of_workers_have_an_order() -> None:
    with pytest.raises(ValueError, match=r"train.workers is \[4, 2\]: write the smaller bound first"):
        TrainConfig(workers=(4, 2))


class Full:
    """A file that takes so many bytes more."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        return int(self.file.write(taken))

    def truncate(self, size: int) -> None:
        self.file.truncate(size)

    def __enter__(self) -> None:
        self.file.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)


def test_events_wait_while_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = tmp_path / "events.jsonl"
    log = EventLog(events)
    log.tell({"kind": "start"})
    full = Full(log._file, room=10)
    monkeypatch.setattr(log, "_file", full)
    log.tell({"kind": "step"})
    log.tell({"kind": "epoch"})
    assert len(events.read_text().splitlines()) == 1  # and no half line behind it
    full.room = 10**6
    with log:
        log.tell({"kind": "done"})
    assert [json.loads(line)["kind"] for line in events.read_text().splitlines()] == ["start", "step", "epoch", "done"]
    log = EventLog(events)
    monkeypatch.setattr(log, "_file", Full(log._file, room=0))
    with pytest.raises(OSError, match="No space left"), log:
        log.tell({"kind": "done"})
