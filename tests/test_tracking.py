"""Runs in MLflow: how they are closed, and what is said when the server is gone by then."""

import sqlite3
from pathlib import Path

import pytest

from recsys_moe.pipelines.tracking import TrackingConfig, TrackingLost, open_client, open_run

DATASET = {"name": "d", "digest": "0", "source_type": "local", "source": "{}", "profile": "{}"}


def statuses(runs_dir: Path) -> list[str]:
    with sqlite3.connect(runs_dir / "mlflow.db") as connection:
        return [status for (status,) in connection.execute("select status from runs")]


def test_how_a_run_ends_is_its_status(tmp_path: Path) -> None:
    config = TrackingConfig()
    client = open_client(config.resolve(tmp_path))
    with open_run(client, config, tmp_path, "good", {}, DATASET):
        assert statuses(tmp_path) == ["RUNNING"]
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), open_run(client, config, tmp_path, "bad", {}, DATASET):
            raise error
    assert sorted(statuses(tmp_path)) == ["FAILED", "FINISHED", "KILLED"]


def lose_the_server(runs_dir: Path, error: Exception | None) -> None:
    """A run in whose midst MLflow's table of runs goes away."""
    config = TrackingConfig()
    client = open_client(config.resolve(runs_dir))
    with open_run(client, config, runs_dir, "lost", {}, DATASET):
        with sqlite3.connect(runs_dir / "mlflow.db") as connection:
            connection.execute("alter table runs rename to gone")
        if error:
            raise error


def test_a_server_lost_at_the_close_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrackingLost, match=r"run [0-9a-f]{32} is left open there, though it is FINISHED"):
        lose_the_server(tmp_path, None)


def test_a_lost_server_hides_no_other_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        lose_the_server(tmp_path, ZeroDivisionError())
