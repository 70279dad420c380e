"""Runs in MLflow: how they are closed, and what is said when the server is gone by then."""

import errno
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from recsys_moe.errors import UserError
from recsys_moe.pipelines.tracking import (
    TrackingConfig,
    TrackingLost,
    answering,
    open_client,
    open_run,
    pinned,
    promote,
    resolve_model,
)

DATASET = {"name": "d", "digest": "0", "source_type": "local", "source": "{}", "profile": "{}"}


def statuses(runs_dir: Path) -> list[str]:
    with sqlite3.connect(runs_dir / "mlflow.db") as connection:
        return [status for (status,) in connection.execute("select status from runs")]


def test_how_a_run_ends_is_its_status(tmp_path: Path) -> None:
    config = TrackingConfig()
    client = open_client(config.resolve(tmp_path))
    with open_run(client, config, "good", {}, DATASET):
        assert statuses(tmp_path) == ["RUNNING"]
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), open_run(client, config, "bad", {}, DATASET):
            raise error
    assert sorted(statuses(tmp_path)) == ["FAILED", "FINISHED", "KILLED"]


def lose_the_server(runs_dir: Path, error: Exception | None) -> None:
    """A run in whose midst MLflow's table of runs goes away."""
    config = TrackingConfig()
    client = open_client(config.resolve(runs_dir))
    with open_run(client, config, "lost", {}, DATASET):
        with sqlite3.connect(runs_dir / "mlflow.db") as connection:
            connection.execute("alter table runs rename to gone")
        if error:
            raise error


def test_a_server_lost_at_the_close_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrackingLost, match=r"run [0-9a-f]{32} is left open there, though it is FINISHED"):
        lose_the_server(tmp_path, None)
    assert "Traceback" not in capfd.readouterr().err  # MLflow would log one of its own


def test_a_lost_server_hides_no_other_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        lose_the_server(tmp_path, ZeroDivisionError())


def test_a_local_store_is_resolved_once_and_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    expected = {
        None: f"sqlite:///{tmp_path}/runs/mlflow.db",
        "sqlite:///rel.db": f"sqlite:///{tmp_path}/rel.db",
        "sqlite:///sub/rel.db?timeout=60": f"sqlite:///{tmp_path}/sub/rel.db?timeout=60",
        "sqlite:////abs/my.db": "sqlite:////abs/my.db",
        "sqlite:///~/my.db": "sqlite:////home/me/my.db",
        "./mlruns": f"file://{tmp_path}/mlruns",
        "file:mlruns": f"file://{tmp_path}/mlruns",
        "file:///abs/mlruns": "file:///abs/mlruns",
        "http://127.0.0.1:5000": "http://127.0.0.1:5000",
        "databricks": "databricks",
    }
    assert {uri: TrackingConfig(uri).resolve(Path("runs")) for uri in expected} == expected


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_keeps_nothing(uri: str) -> None:
    with pytest.raises(UserError, match=r"names no file; write sqlite:///"):
        TrackingConfig(uri).resolve(Path("runs"))


@pytest.mark.parametrize("form", ["sqlite:///my.db", "sqlite:///{}/my.db"])
def test_artifacts_lie_beside_the_database(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrackingConfig(form.format(tmp_path))
    client = open_client(config.resolve(tmp_path / "runs"))
    with open_run(client, config, "good", {}, DATASET):
        pass
    assert client.get_experiment_by_name(config.experiment).artifact_location == f"file://{tmp_path}/artifacts"
    assert list((tmp_path / "artifacts").glob("*/artifacts/config.json"))


def test_a_machine_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrackingConfig()
    client = open_client(config.resolve(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with open_run(client, config, "good", {}, DATASET) as run:
        tags = client.get_run(run.run_id).data.tags
    assert statuses(tmp_path) == ["FINISHED"]
    assert "mlflow.source.git.commit" not in tags


def test_artifacts_that_cannot_be_written_are_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("in the way")
    config = TrackingConfig()
    client = open_client(config.resolve(tmp_path))
    with pytest.raises(TrackingLost, match=r"a file for MLflow at .* can't be read or written .*/artifacts"):  # noqa: SIM117
        with open_run(client, config, "bad", {}, DATASET):
            pass


def test_a_database_that_cannot_be_made_is_told_as_that(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrackingLost, match=r"can't be read or written .*file"):
        open_client(TrackingConfig(f"sqlite:///{tmp_path}/file/my.db").resolve(tmp_path))
    (tmp_path / "text.db").write_text("not a database " * 100)
    with pytest.raises(TrackingLost, match=r"MLflow's store 'sqlite:.*' can't be used \(.*not a database"):
        open_client(TrackingConfig(f"sqlite:///{tmp_path}/text.db").resolve(tmp_path))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), r"can't be read or written \(.*No space left.*/tmp/x"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "does not answer"),
        (requests.ConnectionError("Max retries exceeded"), "does not answer"),
    ],
)
def test_only_the_network_is_a_server_that_does_not_answer(error: Exception, sentence: str) -> None:
    with pytest.raises(TrackingLost, match=sentence), answering("http://127.0.0.1:9"):
        raise error


def test_a_model_that_is_not_there_is_told_in_one_sentence(tmp_path: Path) -> None:
    uri = TrackingConfig().resolve(tmp_path)
    for look in (lambda n: resolve_model(n, tmp_path, uri), lambda n: pinned(n, uri), lambda n: promote(n, "champion", uri)):
        sentence = r"^model 'models:/shop@best' is not to be had from 'sqlite:.*' \(.*\); check the name or set tracking\.uri$"
        with pytest.raises(UserError, match=sentence):
            look("models:/shop@best")


OPEN = """
import sys, time
from pathlib import Path
from recsys_moe.pipelines.tracking import TrackingConfig, open_client, open_run
import mlflow.tracking
Path(sys.argv[2]).touch()
while len(list(Path(sys.argv[1]).parent.glob("*.ready"))) < 3:
    time.sleep(0.001)
config = TrackingConfig()
with open_run(open_client(config.resolve(Path(sys.argv[1]))), config, "one", {}, %r):
    pass
"""


def test_first_runs_at_once(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", OPEN % DATASET, str(tmp_path / "runs"), str(tmp_path / f"{i}.ready")] for i in range(3)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert statuses(tmp_path / "runs") == ["FINISHED"] * 3
