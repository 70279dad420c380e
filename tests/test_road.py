"""The whole road through its real parts: log rows → Ray → MLflow → bundle → Ray Serve, by the commands that a user types."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_moe.predictor import Predictor

TASKS = ("effective_view", "long_view", "like")
SETTINGS = [
    "data=feed_synth",
    f"data.tasks=[{','.join(TASKS)}]",
    "data.name=tiny",
    "train.epochs=2",
    "train.batch_size=256",
]


def start(*arguments: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """A command in a process group of its own, as a terminal would start it."""
    command = [sys.executable, "-m", "recsys_moe", *arguments, "--json"]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def run(*arguments: str, cwd: Path, code: int = 0, **environment: str) -> tuple[dict[str, Any], str]:
    """A command's JSON and its standard error."""
    process = start(*arguments, cwd=cwd, **environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert "Traceback" not in err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result, err


def processes_of(marker: str) -> list[int]:
    """Processes whose environment holds `marker`: everything that a command started, however deep."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if marker.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except (OSError, ProcessLookupError):
                continue
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a tiny synthetic feed in it."""
    folder = tmp_path_factory.mktemp("road")
    summary, _ = run("data", "synth", "runs/feed_synth", "--rows", "8000", cwd=folder)
    assert summary["rows"] == 8000
    return folder


@pytest.fixture(scope="module")
def trained(work: Path) -> dict[str, Any]:
    """A trained MMoE's summary."""
    summary, err = run("train", *SETTINGS, cwd=work)
    assert "epoch 1: validation AUC" in err
    return summary


def test_train_prints_the_figures(trained: dict[str, Any]) -> None:
    assert set(trained) >= {"model", "run_id", "bundle", "test", "train"}
    assert set(trained["test"]) == set(TASKS)
    for metrics in trained["test"].values():
        assert set(metrics) >= {"auc", "gauc", "logloss", "ne", "calibration", "ece", "rows"}
    assert set(trained["train"]) >= {"samples_per_s", "rows", "epochs", "seconds", "peak_anon_mb"}
    assert trained["train"]["rows"] == 6400


def test_mlflow_holds_the_run(trained: dict[str, Any], work: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{work}/runs/mlflow.db")
    run = client.get_run(trained["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.num_experts"] == "8"
    assert run.data.params["train.seed"] == "0"
    history = client.get_metric_history(run.info.run_id, "validation.like.auc")
    assert [m.step for m in history] == [25, 50]
    assert client.get_metric_history(run.info.run_id, "train.samples_per_s")
    dataset = run.inputs.dataset_inputs[0].dataset
    assert dataset.name == "tiny"
    manifest = json.loads(next((work / "runs" / "prepared").glob("tiny-*/manifest.json")).read_text())
    assert manifest["digest"].startswith(dataset.digest)
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"config.json", "environment.json"} <= artifacts
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert model.status == "READY"
    assert {m.key for m in model.metrics} >= {"test.like.auc"}
    assert client.get_model_version_by_alias("tiny", "candidate").run_id == run.info.run_id


def test_the_bundle_is_safetensors_and_json(trained: dict[str, Any]) -> None:
    files = {p.name for p in Path(trained["bundle"]).iterdir()}
    assert files == {"config.json", "schema.json", "statistics.json", "model.safetensors", "metrics.json"}


def test_preparation_is_reused(trained: dict[str, Any], work: Path) -> None:
    folder = next((work / "runs" / "prepared").glob("tiny-*"))
    before = (folder / "manifest.json").stat().st_mtime_ns
    summary, _ = run("data", "prepare", *SETTINGS[:3], cwd=work)
    assert summary["folder"] == str(folder)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    assert len(list((work / "runs" / "prepared").iterdir())) == 1


def test_evaluation_equals_training_time(trained: dict[str, Any], work: Path) -> None:
    # From raw rows through the registry, against the metrics computed on prepared shards in the training worker.
    summary, _ = run("evaluate", "models:/tiny@candidate", cwd=work)
    for task, metrics in trained["test"].items():
        for name, value in metrics.items():
            assert summary["test"][task][name] == pytest.approx(value, abs=1e-6), (task, name)


def test_evaluation_tells_when_the_data_has_changed(trained: dict[str, Any], work: Path, feed: pa.Table) -> None:
    same, err = run("evaluate", trained["bundle"], cwd=work)
    assert same["same_data"] is True
    assert "warning" not in err
    more = work / "runs" / "feed_synth" / "logs" / "part-00001.parquet"
    pq.write_table(feed.slice(0, 1000), more)
    try:
        changed, err = run("evaluate", trained["bundle"], cwd=work)
    finally:
        more.unlink()
    assert changed["same_data"] is False
    assert "has changed since the bundle was trained: these test rows are not the run's" in err
    split, err = run("evaluate", trained["bundle"], *SETTINGS[:3], "data.split.test=0.05", cwd=work)
    assert split["same_data"] is False
    assert "has changed" in err
    other, err = run("evaluate", trained["bundle"], "--file", "runs/feed_synth/logs/part-00000.parquet", cwd=work)
    assert other["same_data"] is None
    assert "warning" not in err


@pytest.fixture(scope="module")
def feed(work: Path) -> pa.Table:
    return pq.read_table(work / "runs" / "feed_synth" / "logs")


def test_score_writes_every_row_in_order(trained: dict[str, Any], work: Path, feed: pa.Table) -> None:
    summary, _ = run("score", trained["bundle"], "runs/feed_synth/logs/part-00000.parquet", "scores.parquet", cwd=work)
    assert summary["rows"] == len(feed)
    scores = pq.read_table(work / "scores.parquet")
    assert scores.column_names == list(TASKS)
    expected = Predictor(Path(trained["bundle"])).score(feed)
    np.testing.assert_allclose(np.stack([scores[t].to_numpy() for t in TASKS]), expected, atol=1e-6)


def test_an_unwritable_output_leaves_nothing(trained: dict[str, Any], work: Path) -> None:
    source = "runs/feed_synth/logs/part-00000.parquet"
    result, _ = run("score", trained["bundle"], source, "no/such/folder/out.parquet", cwd=work, code=2)
    assert "can't be written" in result["error"]
    (work / "file").write_text("in the way")
    result, _ = run("train", *SETTINGS, "runs_dir=file/runs", f"data.source={work}/runs/feed_synth", cwd=work, code=2)
    assert "runs_dir 'file/runs' can't be written" in result["error"]


@pytest.fixture(scope="module")
def served(trained: dict[str, Any], work: Path) -> Iterator[str]:
    """The URL of a served model; afterwards no process of it is left."""
    marker = "RECSYS_MOE_TEST_SERVE=1"
    settings = ("serve.port=0", "serve.max_rows=1000")
    process = start("serve", "models:/tiny@candidate", *settings, cwd=work, RECSYS_MOE_TEST_SERVE="1")
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    url = json.loads(line)["url"]
    assert url.startswith("http://127.0.0.1:")
    yield url
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    deadline = time.monotonic() + 20
    while processes_of(marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(marker)


def post(url: str, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{url}/v1/score", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def json_rows(feed: pa.Table, rows: int) -> list[dict[str, Any]]:
    keep = [name for name in feed.column_names if name not in TASKS]
    return feed.select(keep).slice(0, rows).to_pylist()


def test_online_equals_offline(served: str, trained: dict[str, Any], feed: pa.Table) -> None:
    status, answer = post(served, json.dumps({"rows": json_rows(feed, 700)}).encode())
    assert status == 200
    expected = Predictor(Path(trained["bundle"])).score(feed.slice(0, 700))
    np.testing.assert_allclose([answer["scores"][t] for t in TASKS], expected, atol=1e-6)


def test_a_bad_request_gets_one_sentence(served: str, feed: pa.Table) -> None:
    (row,) = json_rows(feed, 1)
    cases = {
        "has no feature 'hour'": {k: v for k, v in row.items() if k != "hour"},
        "'position' = 'third', which is not a number": row | {"position": "third"},
        "rows": None,
    }
    for sentence, bad in cases.items():
        status, answer = post(served, json.dumps({"rows": [bad]}).encode())
        assert status == 422
        assert sentence in answer["error"]
    status, answer = post(served, json.dumps({"rows": [row] * 1001}).encode())
    assert status == 422
    assert "serve.max_rows = 1,000" in answer["error"]
    status, answer = post(served, b"0" * (9 * 2**20))
    assert status == 413
    assert "larger than" in answer["error"]
    status, answer = post(served, b"{not json")
    assert status == 422


def test_an_unknown_category_is_scored(served: str, feed: pa.Table) -> None:
    (row,) = json_rows(feed, 1)
    status, answer = post(served, json.dumps({"rows": [row | {"user_id": "nobody", "tab": None}]}).encode())
    assert status == 200
    assert all(0 < answer["scores"][t][0] < 1 for t in TASKS)


def test_the_service_documents_itself(served: str) -> None:
    with urllib.request.urlopen(f"{served}/openapi.json", timeout=30) as response:
        assert "/v1/score" in json.load(response)["paths"]


@pytest.mark.parametrize("uri", ["sqlite:///own/rel.db", "sqlite:///{}/own/abs.db"])
def test_a_database_of_ones_own_keeps_the_run(uri: str, work: Path) -> None:
    setting = f"tracking.uri={uri.format(work)}"
    summary, _ = run("train", *SETTINGS, "train.epochs=1", setting, cwd=work)
    evaluated, _ = run("evaluate", "models:/tiny@candidate", setting, cwd=work)
    assert Path(evaluated["bundle"]).is_relative_to(work / "own" / "artifacts")
    for task in TASKS:
        assert evaluated["test"][task]["logloss"] == pytest.approx(summary["test"][task]["logloss"], abs=1e-6)


def test_another_cluster_is_left_alone(work: Path) -> None:
    summary, _ = run("data", "prepare", *SETTINGS[:3], "--force", cwd=work, RAY_ADDRESS="127.0.0.1:1")
    assert summary["rows"]["train"] == 6400


def test_workers_do_not_find_the_checkout_under_bare_names(work: Path) -> None:
    program = """
import ray, sys, threading
from recsys_moe.pipelines.cluster import local_ray
with local_ray():
    print([p for p in ray.get(ray.remote(lambda: sys.path).remote())])
"""
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=True)
    assert str(work) not in done.stdout
    assert "site-packages" in done.stdout


def test_a_lost_mlflow_leaves_the_bundle(work: Path) -> None:
    # Nothing listens on the discard port.
    result, err = run("train", *SETTINGS, "train.epochs=1", "tracking.uri=http://127.0.0.1:9", cwd=work, code=2)
    assert "does not answer" in result["error"]
    bundle = Path(result["error"].split("kept in ")[1].strip("'"))
    assert Predictor(bundle).score_names == TASKS
    assert "Training goes on without it" in " ".join(err.split())


def runs(work: Path) -> dict[str, str]:
    """Every run's status by its id."""
    with sqlite3.connect(work / "runs" / "mlflow.db") as connection:
        return dict(connection.execute("select run_uuid, status from runs").fetchall())


def test_a_killed_run_is_marked_failed(work: Path, trained: dict[str, Any]) -> None:
    before = runs(work)
    settings = [*SETTINGS, "train.epochs=100000", "train.patience=0"]
    process = start("train", *settings, cwd=work, RECSYS_MOE_TEST_KILL="1")
    deadline = time.monotonic() + 120
    while len(runs(work)) == len(before) and time.monotonic() < deadline:
        time.sleep(0.2)
    (new,) = set(runs(work)) - set(before)
    assert runs(work)[new] == "RUNNING"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while (runs(work)[new] == "RUNNING" or processes_of("RECSYS_MOE_TEST_KILL=1")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert runs(work)[new] == "FAILED"
    assert not processes_of("RECSYS_MOE_TEST_KILL=1")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let commands be interrupted, also where this process is in a shell's background, which has interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible", "trained")
@pytest.mark.parametrize("whom", ["the group", "the driver"])
def test_an_interrupted_run_is_marked_killed(whom: str, work: Path) -> None:
    before = runs(work)
    settings = [*SETTINGS, "train.epochs=100000", "train.patience=0"]
    process = start("train", *settings, cwd=work, RECSYS_MOE_TEST_INTERRUPT="1")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 1:"):
            break
    if whom == "the group":  # a terminal's Ctrl-C
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)  # impatience must not cut the tidying up off
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "interrupted"
    assert json.loads(out.splitlines()[-1]) == {"error": "interrupted"}
    (new,) = set(runs(work)) - set(before)
    assert runs(work)[new] == "KILLED"
    deadline = time.monotonic() + 10
    while processes_of("RECSYS_MOE_TEST_INTERRUPT=1") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of("RECSYS_MOE_TEST_INTERRUPT=1")


@pytest.mark.usefixtures("interruptible", "trained")
def test_a_run_that_is_interrupted_early_leaves_no_folder(work: Path) -> None:
    before = set((work / "runs" / "train").iterdir())
    process = start("train", *SETTINGS, cwd=work)
    deadline = time.monotonic() + 60
    while set((work / "runs" / "train").iterdir()) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted"
    assert set((work / "runs" / "train").iterdir()) == before


def test_a_run_that_fails_early_leaves_no_folder(work: Path) -> None:
    run("train", *SETTINGS, "data.source=nowhere", "runs_dir=failed", cwd=work, code=2)
    assert not (work / "failed" / "train").exists()


def test_a_loss_that_explodes_late_leaves_the_bundle(work: Path) -> None:
    # The weight decay is harmless while the learning rate rises and multiplies the weights once it is high.
    settings = ["train.epochs=20", "train.patience=0", "train.weight_decay=5000"]
    result, _ = run("train", *SETTINGS, *settings, cwd=work, code=2)
    assert "the loss became" in result["error"]
    bundle = Path(result["error"].split("kept in ")[1].strip("'"))
    assert Predictor(bundle).score_names == TASKS
    assert sorted(p.name for p in bundle.parent.iterdir()) == ["bundle", "events.jsonl", "ray"]


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A real tracking server that stores artifacts itself, and its process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "kept")]
    server = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            break
        except OSError:
            time.sleep(0.2)
    yield url, server
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.mark.long
def test_a_tracking_server_takes_the_run(work: Path, mlflow_server: tuple[str, subprocess.Popen[bytes]]) -> None:
    url, _ = mlflow_server
    summary, _ = run("train", *SETTINGS, "train.epochs=1", f"tracking.uri={url}", cwd=work)
    assert summary["version"] == "models:/tiny/1"
    evaluated, _ = run("evaluate", "models:/tiny@candidate", f"tracking.uri={url}", cwd=work)
    assert evaluated["bundle"] != summary["bundle"]  # it came over HTTP
    for task in TASKS:
        assert evaluated["test"][task]["logloss"] == pytest.approx(summary["test"][task]["logloss"], abs=1e-6)


@pytest.mark.long
def test_a_tracking_server_lost_mid_run_leaves_the_bundle(
    work: Path, mlflow_server: tuple[str, subprocess.Popen[bytes]]
) -> None:
    url, server = mlflow_server
    process = start("train", *SETTINGS, "train.epochs=60", "train.patience=0", f"tracking.uri={url}", cwd=work)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("epoch 2:"):
            break
    os.killpg(server.pid, signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "Traceback" not in err
    bundle = Path(json.loads(out.splitlines()[-1])["error"].split("kept in ")[1].strip("'"))
    assert Predictor(bundle).score_names == TASKS
    # Every epoch's metrics are still there.
    events = [json.loads(line) for line in (bundle.parent / "events.jsonl").read_text().splitlines()]
    assert len([e for e in events if e["kind"] == "epoch"]) == 60
