"""The whole road through its real parts: log rows → Ray → MLflow → bundle → Ray Serve, by the commands that a user types."""

import contextlib
import ipaddress
import json
import os
import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_moe.batches import ShuffledBatches
from recsys_moe.bundle import SELFTEST_FILE
from recsys_moe.predictor import Predictor
from recsys_moe.shards import PreparedData
from recsys_moe.sources import read_part
from recsys_moe.trainer import fingerprint

TASKS = ("effective_view", "long_view", "like")
SETTINGS = [
    "data=feed_synth",
    f"data.tasks=[{','.join(TASKS)}]",
    "data.name=tiny",
    "train.epochs=2",
    "train.batch_size=256",
]


# In the environment of what a test starts, so that it is found again: other test sessions may run on this machine.
HERE = str(os.getpid())


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


@pytest.fixture(scope="session")
def run_here(cli: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., tuple[dict[str, Any], str]]:
    """`run` in this process, for commands that start no other."""

    def run(*arguments: str, cwd: Path, code: int = 0) -> tuple[dict[str, Any], str]:
        done = cli(*arguments, "--json", cwd=cwd)
        assert done.returncode == code, done.stderr
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result, done.stderr

    return run


def processes_of(marker: str) -> list[int]:
    """Processes whose environment holds `marker`: everything that a command started, however deep."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{marker}\0".encode() in (folder / "environ").read_bytes():
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
    assert {"config.json", "environment.json", "health"} <= artifacts
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert model.status == "READY"
    assert {m.key for m in model.metrics} >= {"test.like.auc"}
    assert client.get_model_version_by_alias("tiny", "candidate").run_id == run.info.run_id


def test_mlflow_holds_the_experts_health(trained: dict[str, Any], work: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{work}/runs/mlflow.db")
    files = {a.path for a in client.list_artifacts(trained["run_id"], "health")}
    names = ("experts_experts.png", "training_experts.png", "gradient_cosines.png", "experts.csv", "warnings.txt")
    assert files == {f"health/{name}" for name in names}
    metrics = client.get_run(trained["run_id"]).data.metrics
    weights = [metrics[f"health.experts.expert_{e}.weight.like"] for e in range(8)]
    assert sum(weights) == pytest.approx(1)
    assert {"health.experts.expert_0.dead", "health.experts.entropy.like", "health.cosine.long_view.like"} <= set(metrics)
    # At the end of the run, and before; what is there is what the run's folder has.
    history = client.get_metric_history(trained["run_id"], "health.experts.expert_0.zero")
    assert history[-1].step == 50
    assert history[0].step < 50
    table = (Path(trained["bundle"]).parent / "health" / "experts.csv").read_text().splitlines()
    assert table[0].startswith("plan,expert,zero,dead,mean,variance,held,held by,gradient.effective_view,")
    assert len(table) == 9
    assert trained["anomalies"] == []
    assert trained["train"]["health_seconds"] > 0


def test_the_bundle_is_safetensors_and_json(trained: dict[str, Any]) -> None:
    files = {p.name for p in Path(trained["bundle"]).iterdir()}
    assert files == {
        "config.json",
        "schema.json",
        "statistics.json",
        "model.safetensors",
        "metrics.json",
        "adagrad.safetensors",
        "selftest.arrow",
    }


def test_preparation_is_reused(trained: dict[str, Any], work: Path) -> None:
    folder = next((work / "runs" / "prepared").glob("tiny-*"))
    before = (folder / "manifest.json").stat().st_mtime_ns
    summary, _ = run("data", "prepare", *SETTINGS[:3], cwd=work)
    assert summary["folder"] == str(folder)
    assert (folder / "manifest.json").stat().st_mtime_ns == before
    assert len(list((work / "runs" / "prepared").iterdir())) == 1


def test_evaluation_equals_training_time(trained: dict[str, Any], work: Path, run_here: Any) -> None:
    # From raw rows through the registry, against the metrics computed on prepared shards in the training worker.
    summary, _ = run_here("evaluate", "models:/tiny@candidate", cwd=work)
    for task, metrics in trained["test"].items():
        for name, value in metrics.items():
            assert summary["test"][task][name] == pytest.approx(value, abs=1e-6), (task, name)


@pytest.mark.long
def test_a_registered_model_goes_on_with_new_rows(trained: dict[str, Any], work: Path, feed: pa.Table, run_here: Any) -> None:
    from mlflow.tracking import MlflowClient

    day = feed.slice(0, 3000)
    place = day.schema.get_field_index("item_id")
    items = [10**9 + n % 7 if n % 3 else old for n, old in enumerate(day["item_id"].to_pylist())]
    (work / "tuesday" / "logs").mkdir(parents=True)
    pq.write_table(day.set_column(place, "item_id", pa.array(items)), work / "tuesday" / "logs" / "rows.parquet")
    settings = [*SETTINGS[:2], "data.source=tuesday", "train.batch_size=256", "train.epochs=1", "start=models:/tiny@candidate"]
    more, err = run("train", *settings, "data.name=tuesday", cwd=work)
    assert "before: validation AUC" in err
    old, new = (json.loads(Path(folder, "statistics.json").read_text()) for folder in (trained["bundle"], more["bundle"]))
    vocabularies = [{c["name"]: c["vocabulary"] for c in s["categorical"]} for s in (old, new)]
    known = vocabularies[0]["item_id"]
    assert vocabularies[1]["item_id"][: len(known)] == known
    assert {str(10**9 + n) for n in range(7)} <= set(vocabularies[1]["item_id"][len(known) :])
    assert old["numeric"] == new["numeric"]
    client = MlflowClient(tracking_uri=f"sqlite:///{work}/runs/mlflow.db")
    kept = client.get_run(more["run_id"]).data
    assert kept.params["start"] == "models:/tiny/1"
    assert {"before.mean_quality", "before.like.auc", "validation.like.auc"} <= set(kept.metrics)
    # The baseline is what the model that it started from makes of these rows, two thirds of whose items it has never met.
    grown, start = Predictor(Path(more["bundle"])), Predictor(Path(trained["bundle"]))
    rows = read_part(grown.bundle.config.data, grown.bundle.schema, "validation")
    for task, measured in start.evaluate(rows).items():
        assert kept.metrics[f"before.{task}.logloss"] == pytest.approx(measured.logloss), task
    evaluated, err = run_here("evaluate", "models:/tuesday@candidate", cwd=work)
    assert (evaluated["same_data"], "warning" in err) == (True, False)


def test_evaluation_tells_when_the_data_has_changed(trained: dict[str, Any], work: Path, feed: pa.Table, run_here: Any) -> None:
    same, err = run_here("evaluate", trained["bundle"], cwd=work)
    assert same["same_data"] is True
    assert "warning" not in err
    more = work / "runs" / "feed_synth" / "logs" / "part-00001.parquet"
    pq.write_table(feed.slice(0, 1000), more)
    try:
        changed, err = run_here("evaluate", trained["bundle"], cwd=work)
    finally:
        more.unlink()
    assert changed["same_data"] is False
    assert "has changed since the bundle was trained: these test rows are not the run's" in err
    split, err = run_here("evaluate", trained["bundle"], *SETTINGS[:3], "data.split.test=0.05", cwd=work)
    assert split["same_data"] is False
    assert "has changed" in err
    other, err = run_here("evaluate", trained["bundle"], "--file", "runs/feed_synth/logs/part-00000.parquet", cwd=work)
    assert other["same_data"] is None
    assert "warning" not in err


@pytest.fixture(scope="module")
def feed(work: Path) -> pa.Table:
    return pq.read_table(work / "runs" / "feed_synth" / "logs")


def test_score_writes_every_row_in_order(trained: dict[str, Any], work: Path, feed: pa.Table, run_here: Any) -> None:
    summary, _ = run_here("score", trained["bundle"], "runs/feed_synth/logs/part-00000.parquet", "scores.parquet", cwd=work)
    assert summary["rows"] == len(feed)
    scores = pq.read_table(work / "scores.parquet")
    assert scores.column_names == list(TASKS)
    expected = Predictor(Path(trained["bundle"])).score(feed)
    np.testing.assert_allclose(np.stack([scores[t].to_numpy() for t in TASKS]), expected, atol=1e-6)


@pytest.mark.long
def test_an_unwritable_output_leaves_nothing(trained: dict[str, Any], work: Path, run_here: Any) -> None:
    source = "runs/feed_synth/logs/part-00000.parquet"
    result, _ = run_here("score", trained["bundle"], source, "no/such/folder/out.parquet", cwd=work, code=2)
    assert "can't be written" in result["error"]
    (work / "file").write_text("in the way")
    result, _ = run("train", *SETTINGS, "runs_dir=file/runs", f"data.source={work}/runs/feed_synth", cwd=work, code=2)
    assert "file/runs' can't be written" in result["error"]


@pytest.fixture(scope="module")
def served(trained: dict[str, Any], work: Path) -> Iterator[str]:
    """The URL of a served model; afterwards no process of it is left."""
    marker = f"RECSYS_MOE_TEST_SERVE={HERE}"
    settings = ("serve.port=0", "serve.max_rows=1000", "serve.poll_seconds=0.5")
    process = start("serve", "models:/tiny@candidate", *settings, cwd=work, RECSYS_MOE_TEST_SERVE=HERE)
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
    deadline = time.monotonic() + 60
    while processes_of(marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(marker)


def post(url: str, body: bytes, path: str = "/v1/score") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
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


def test_an_alias_that_moves_is_followed_with_no_failed_request(
    served: str, trained: dict[str, Any], work: Path, feed: pa.Table, run_here: Any
) -> None:
    from mlflow.tracking import MlflowClient

    rows = feed.slice(0, 200)
    user = {name: rows[name][0].as_py() for name in rows.column_names if name.startswith("user")}
    items = {name: rows[name].to_pylist() for name in rows.column_names if name not in (*TASKS, *user)}
    request = {"user": user, "candidates": {"ids": list(range(200)), "features": items}}
    columns = {name: pa.array([value] * 200) for name, value in user.items()}
    expected = Predictor(Path(trained["bundle"])).score(pa.table({**{n: rows[n] for n in items}, **columns}))
    client = MlflowClient(tracking_uri=f"sqlite:///{work}/runs/mlflow.db")
    old = client.get_model_version_by_alias("tiny", "candidate")
    new = client.create_model_version("tiny", source=old.source, run_id=old.run_id)
    assert (Path(trained["bundle"]) / SELFTEST_FILE).is_file()
    seen: list[str] = []
    for version, seconds in ((new.version, 10), (old.version, 10)):
        run_here("promote", f"models:/tiny/{version}", "--alias", "candidate", cwd=work)
        deadline = time.monotonic() + seconds
        while not seen or seen[-1] != str(version):
            status, answer = post(served, json.dumps(request).encode(), "/v1/rank")
            assert status == 200, answer
            assert answer["scores"]["like"] == expected[2][answer["positions"]].astype(float).tolist()
            seen.append(answer["model"]["version"])
            assert time.monotonic() < deadline, "the alias is not followed within 10 s"
    assert set(seen) == {str(old.version), str(new.version)}
    client.delete_model_version("tiny", new.version)


RAYS_OWN = (
    *("gcs_server", "raylet", "ray/dashboard/", "ray/autoscaler/", "ray::", "runtime_env", "default_worker.py"),
    "recsys_moe serve",
)
"""Whose ports may be on all interfaces (docs/decisions.md): Ray's daemons and workers, and its part within our command."""


def test_what_listens_is_on_loopback_or_rays_own(served: str) -> None:
    elsewhere = []
    for pid in processes_of(f"RECSYS_MOE_TEST_SERVE={HERE}"):
        process = psutil.Process(pid)
        command = " ".join(process.cmdline())
        for each in process.net_connections("inet"):
            if each.status == psutil.CONN_LISTEN and not ipaddress.ip_address(each.laddr.ip).is_loopback:
                elsewhere.append((command, each.laddr.port))
    assert elsewhere  # Ray's: nothing was found, if not
    assert not [command for command, _ in elsewhere if not any(own in command for own in RAYS_OWN)]
    for command, port in elsewhere:  # who has no token learns nothing there but Ray's own counters
        for path in ("/v1/models", "/healthz", "/api/serve/applications/"):
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5)
            except httpx.HTTPError:  # gRPC
                continue
            counters = "version=" in answer.headers.get("content-type", "") and "# TYPE " in answer.text  # Prometheus' form
            assert answer.status_code in (401, 403, 404) or counters, (command, path, answer.text[:200])


def test_the_service_documents_itself(served: str) -> None:
    with urllib.request.urlopen(f"{served}/openapi.json", timeout=30) as response:
        assert "/v1/score" in json.load(response)["paths"]


@pytest.mark.long
def test_a_database_of_ones_own_keeps_the_run(work: Path, run_here: Any) -> None:
    setting = "tracking.uri=sqlite:///own/rel.db"
    summary, _ = run("train", *SETTINGS, "train.epochs=1", setting, cwd=work)
    evaluated, _ = run_here("evaluate", "models:/tiny@candidate", setting, cwd=work)
    assert Path(evaluated["bundle"]).is_relative_to(work / "own" / "artifacts")
    for task in TASKS:
        assert evaluated["test"][task]["logloss"] == pytest.approx(summary["test"][task]["logloss"], abs=1e-6)


@pytest.mark.long
def test_another_cluster_is_left_alone(work: Path) -> None:
    summary, _ = run("data", "prepare", *SETTINGS[:3], "--force", cwd=work, RAY_ADDRESS="127.0.0.1:1")
    assert summary["rows"]["train"] == 6400


def runs(work: Path) -> dict[str, str]:
    """Every run's status by its id."""
    with sqlite3.connect(work / "runs" / "mlflow.db") as connection:
        return dict(connection.execute("select run_uuid, status from runs").fetchall())


def test_a_killed_run_is_marked_failed(work: Path, trained: dict[str, Any]) -> None:
    before = runs(work)
    settings = [*SETTINGS, "train.epochs=100000", "train.patience=0"]
    process = start("train", *settings, cwd=work, RECSYS_MOE_TEST_KILL=HERE)
    deadline = time.monotonic() + 120
    while len(runs(work)) == len(before) and time.monotonic() < deadline:
        time.sleep(0.2)
    (new,) = set(runs(work)) - set(before)
    assert runs(work)[new] == "RUNNING"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    while (runs(work)[new] == "RUNNING" or processes_of(f"RECSYS_MOE_TEST_KILL={HERE}")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert runs(work)[new] == "FAILED"
    assert not processes_of(f"RECSYS_MOE_TEST_KILL={HERE}")


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let commands be interrupted, also where this process is in a shell's background, which has interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.long
@pytest.mark.usefixtures("interruptible", "trained")
@pytest.mark.parametrize("whom", ["the group", pytest.param("the driver", marks=pytest.mark.long)])
def test_an_interrupted_run_is_marked_killed(whom: str, work: Path) -> None:
    before = runs(work)
    settings = [*SETTINGS, "train.epochs=100000", "train.patience=0"]
    process = start("train", *settings, cwd=work, RECSYS_MOE_TEST_INTERRUPT=HERE)
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
    while processes_of(f"RECSYS_MOE_TEST_INTERRUPT={HERE}") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(f"RECSYS_MOE_TEST_INTERRUPT={HERE}")


@pytest.mark.long
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


def free_ports(count: int) -> list[int]:
    """Ports of loopback on which nobody listens now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def answers(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Held:
    """A training that waits at a step, whose checkpoint it has half written, until it is killed or let go on.

    Its JSON is a pipe that nobody reads: so no fault comes too late, however fast the machine is and whatever else it does.
    """

    def __init__(self, command: subprocess.Popen[str], runs_dir: Path, before: set[Path], step: int) -> None:
        self._command = command
        (self.folder,) = self._wait(lambda: set((runs_dir / "train").glob("*")) - before)
        self._pipe = self.folder / "state" / f"step-{step:010d}.json.tmp"
        self._pipe.parent.mkdir(exist_ok=True)
        os.mkfifo(self._pipe)
        self._wait(lambda: list(self._pipe.parent.glob(f"step-{step:010d}-0of*.safetensors")))

    def _wait(self, found: Callable[[], Any]) -> Any:
        while not (value := found()):
            assert self._command.poll() is None, self._command.communicate()
            time.sleep(0.05)
        return value

    def remove(self) -> None:
        """Hold nobody any longer who comes here."""
        self._pipe.unlink()

    def let_go(self) -> None:
        """Let the training go on, which finds that a pipe is no file on a disk, and keeps the checkpoint before."""
        handle = os.open(self._pipe, os.O_RDWR)
        self._wait(lambda: not self._pipe.exists())
        os.close(handle)


def serve_mlflow(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """A real tracking server that stores artifacts itself, once it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "kept")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # a dozen processes
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **quiet)
    deadline = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return server
        except OSError:
            assert time.monotonic() < deadline, "the tracking server does not come up"
            time.sleep(0.2)


@pytest.fixture
def mlflow_servers(tmp_path: Path) -> Iterator[tuple[str, Callable[[], subprocess.Popen[bytes]]]]:
    """A URL, and what starts a server there that knows what the one before it knew."""
    (port,) = free_ports(1)
    servers: list[subprocess.Popen[bytes]] = []

    def serve() -> subprocess.Popen[bytes]:
        servers.append(serve_mlflow(tmp_path, port))
        return servers[-1]

    yield f"http://127.0.0.1:{port}", serve
    for server in servers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture
def mlflow_server(mlflow_servers: Any) -> tuple[str, subprocess.Popen[bytes]]:
    url, serve = mlflow_servers
    return url, serve()


def lose_the_server(work: Path, url: str, server: subprocess.Popen[bytes]) -> subprocess.Popen[str]:
    """A training of four epochs whose tracking server is killed after the second."""
    before = set((work / "runs" / "train").glob("*"))
    settings = ["train.epochs=4", "train.patience=0", "train.checkpoint_steps=25", f"tracking.uri={url}"]
    process = start("train", *SETTINGS, *settings, cwd=work)
    held = Held(process, work / "runs", before, 75)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    held.let_go()
    return process


@pytest.mark.long
def test_a_tracking_server_takes_the_run(work: Path, mlflow_server: tuple[str, subprocess.Popen[bytes]], run_here: Any) -> None:
    url, _ = mlflow_server
    summary, _ = run("train", *SETTINGS, "train.epochs=1", f"tracking.uri={url}", cwd=work)
    assert summary["version"] == "models:/tiny/1"
    evaluated, _ = run_here("evaluate", "models:/tiny@candidate", f"tracking.uri={url}", cwd=work)
    assert evaluated["bundle"] != summary["bundle"]  # it came over HTTP
    for task in TASKS:
        assert evaluated["test"][task]["logloss"] == pytest.approx(summary["test"][task]["logloss"], abs=1e-6)


@pytest.mark.long
def test_a_tracking_server_lost_mid_run_leaves_the_bundle(
    work: Path, mlflow_server: tuple[str, subprocess.Popen[bytes]]
) -> None:
    url, server = mlflow_server
    process = lose_the_server(work, url, server)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "Traceback" not in err
    bundle = Path(json.loads(out.splitlines()[-1])["error"].split("kept in ")[1].strip("'"))
    assert Predictor(bundle).score_names == TASKS
    # Every epoch's metrics are still there.
    events = [json.loads(line) for line in (bundle.parent / "events.jsonl").read_text().splitlines()]
    assert len([e for e in events if e["kind"] == "epoch"]) == 4


STRANGERS = {
    # folder, file, labels, a label's AUC in the test part at least (what a first tree reaches is a little more)
    "census": ("census", "full42.parquet", ["income"], 0.93),
    "kuairand": ("kuairand", "interactions.parquet", ["is_click", "long_view", "label"], 0.6),
    "users": ("kuairand", "user_features.parquet", ["is_video_author"], 0.75),
}


@pytest.mark.long
@pytest.mark.parametrize("name", STRANGERS)
def test_a_strangers_file_is_described_prepared_trained_and_served(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, file, labels, auc = STRANGERS[name]
    source: Path = request.getfixturevalue(folder).resolve() / file
    named = [part for label in labels for part in ("--label", label)]
    described, _ = run("data", "describe", str(source), *named, "--output", "schema.yaml", cwd=tmp_path)
    command = shlex.split(described["next"])
    assert command[:2] == ["recsys-moe", "train"]
    prepared, _ = run("data", "prepare", *command[2:], cwd=tmp_path)
    assert sum(prepared["rows"].values()) == described["rows"]
    trained, _ = run(*command[1:], "train.epochs=3", cwd=tmp_path)
    for task, metrics in trained["test"].items():
        assert metrics["auc"] > auc, task
    rows = pq.read_table(source).slice(0, 50).to_pylist()
    asked = {c["name"] for c in described["columns"] if c["use"] == "feature"}
    body = json.dumps({"rows": [{key: value for key, value in row.items() if key in asked} for row in rows]})
    process = start("serve", trained["bundle"], "serve.port=0", cwd=tmp_path)
    assert process.stdout is not None
    try:
        status, answer = post(json.loads(process.stdout.readline())["url"], body.encode())
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert status == 200, answer
    expected = Predictor(Path(trained["bundle"])).score(pq.read_table(source).slice(0, 50))
    np.testing.assert_allclose(list(answer["scores"].values()), expected, atol=1e-6)


# ---- faults ------------------------------------------------------------------------------------------------------------

# Two epochs of 200 steps, with a checkpoint every 25.
LONG = [*SETTINGS, "train.batch_size=32", "train.checkpoint_steps=25"]


def events_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "events.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if file.exists()
        else []
    )


def workers_of(marker: str) -> list[int]:
    """The training workers among the processes that a command started."""
    return sorted(pid for pid in processes_of(marker) if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes())


def weights(bundle: str | Path) -> bytes:
    return (Path(bundle) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> dict[str, Any]:
    return run("train", *LONG, cwd=work)[0]


@pytest.mark.long
def test_a_killed_worker_is_replaced_and_the_end_is_the_same_bit_for_bit(work: Path, undisturbed: dict[str, Any]) -> None:
    before = set((work / "runs" / "train").glob("*"))
    process = start("train", *LONG, cwd=work, RECSYS_MOE_TEST_WORKER=HERE)
    held = Held(process, work / "runs", before, 250)  # in the second epoch
    folder = held.folder
    (worker,) = workers_of(f"RECSYS_MOE_TEST_WORKER={HERE}")
    os.kill(worker, signal.SIGKILL)
    held.remove()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "going on from step" in err
    summary = json.loads(out.splitlines()[-1])
    (resumed,) = [e for e in events_of(folder) if e["kind"] == "resume"]
    assert resumed["step"] == 225
    assert weights(summary["bundle"]) == weights(undisturbed["bundle"])
    assert summary["test"] == undisturbed["test"]
    assert not (folder / "state").exists()


@pytest.mark.long
def test_a_killed_driver_is_resumed_bit_for_bit(work: Path, undisturbed: dict[str, Any]) -> None:
    before = set((work / "runs" / "train").glob("*"))
    process = start("train", *LONG, cwd=work, RECSYS_MOE_TEST_DRIVER=HERE)
    held = Held(process, work / "runs", before, 250)
    folder = held.folder
    process.kill()
    process.communicate()
    while processes_of(f"RECSYS_MOE_TEST_DRIVER={HERE}"):
        time.sleep(0.2)
    held.remove()
    result, _ = run("train", "--resume", folder.name, "train.lr=1", cwd=work, code=2)
    assert "'train.lr=1' can't change when a run goes on" in result["error"]
    summary, err = run("train", "--resume", folder.name, cwd=work)
    assert "going on from step" in err
    assert weights(summary["bundle"]) == weights(undisturbed["bundle"])
    assert Path(summary["bundle"]).parent == folder
    # One run in MLflow, too.
    assert runs(work)[summary["run_id"]] == "FINISHED"
    result, _ = run("train", "--resume", str(folder), cwd=work, code=2)
    assert "has finished, its bundle is" in result["error"]


@pytest.mark.long
def test_two_workers_of_which_one_is_killed_train_every_row_once(work: Path) -> None:
    before = set((work / "runs" / "train").glob("*"))
    process = start("train", *LONG, "train.workers=[1,2]", cwd=work, RECSYS_MOE_TEST_TWO=HERE)
    held = Held(process, work / "runs", before, 250)
    folder = held.folder
    _, second = workers_of(f"RECSYS_MOE_TEST_TWO={HERE}")
    os.kill(second, signal.SIGKILL)
    held.remove()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    events = events_of(folder)
    assert next(e["workers"] for e in events if e["kind"] == "start") == 2
    (resumed,) = [e for e in events if e["kind"] == "resume"]
    assert resumed["step"] == 225
    # Every state says which rows of its epoch were trained: those of the order's first batches, whoever trained them.
    data = PreparedData(next((work / "runs" / "prepared").glob("tiny-*")))
    order = ShuffledBatches(data, "train", 32, 0)
    states = {e["step"]: e for e in events if e["kind"] == "checkpoint"}
    assert len(states) == 16
    for epoch in range(2):
        count, seen = 0, 0
        for step, batch in enumerate(order.epoch(epoch), epoch * 200 + 1):
            count, seen = count + len(batch), (seen + fingerprint(batch.numbers_b)) % 2**63
            if step in states:
                assert (states[step]["epoch"], states[step]["rows"], states[step]["fingerprint"]) == (epoch, count, seen)
        assert count == 6400
    assert Predictor(Path(json.loads(out.splitlines()[-1])["bundle"])).score_names == TASKS


@pytest.mark.long
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_workers_goes_on_with_a_run(first: int, then: int, work: Path, undisturbed: dict[str, Any]) -> None:
    before = set((work / "runs" / "train").glob("*"))
    process = start("train", *LONG, f"train.workers={first}", cwd=work, RECSYS_MOE_TEST_OTHER=HERE)
    held = Held(process, work / "runs", before, 250)
    process.kill()
    process.communicate()
    while processes_of(f"RECSYS_MOE_TEST_OTHER={HERE}"):
        time.sleep(0.2)
    held.remove()
    summary, _ = run("train", "--resume", held.folder.name, f"train.workers={then}", cwd=work)
    events = events_of(held.folder)
    assert [e["workers"] for e in events if e["kind"] == "start"] == [first, then]
    (resumed,) = [e for e in events if e["kind"] == "resume"]
    assert (resumed["step"], resumed["workers_before"]) == (225, first)
    # That each row of the second epoch was trained once, the trainer checks itself; dropout differs with the workers.
    assert summary["train"]["steps"] == undisturbed["train"]["steps"] == 400
    (ours,), (alone,) = (
        [e["validation"] for e in events_of(folder) if e["kind"] == "epoch" and e["epoch"] == 2]
        for folder in (held.folder, Path(undisturbed["bundle"]).parent)
    )
    assert ours != alone
    for task in TASKS:
        assert ours[task]["logloss"] == pytest.approx(alone[task]["logloss"], rel=0.05)
    assert Predictor(Path(summary["bundle"])).score_names == TASKS


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small file system can be mounted here (mount -t tmpfs)")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.long
def test_a_run_whose_disk_is_full_goes_on_once_there_is_room(work: Path, undisturbed: dict[str, Any], small_disk: Path) -> None:
    process = start("train", *LONG, f"runs_dir={small_disk}", f"data.source={work}/runs/feed_synth", cwd=work)
    held = Held(process, small_disk, set(), 250)
    others = small_disk / "others"
    with others.open("wb", buffering=0) as file:

        def fill() -> None:
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(2**12))

        fill()
        held.let_go()
        while process.poll() is None:  # what a checkpoint that failed gives back, others take
            fill()
            time.sleep(0.02)
    out, err = process.communicate()
    assert process.returncode == 2, err
    assert "Traceback" not in err
    error = json.loads(out.splitlines()[-1])["error"]
    assert "No space left on device" in error
    assert f"go on with `recsys-moe train --resume {held.folder}`" in error
    others.unlink()
    summary, err = run("train", "--resume", str(held.folder), f"runs_dir={small_disk}", cwd=work)
    assert "going on from step 225" in err
    assert weights(summary["bundle"]) == weights(undisturbed["bundle"])
    assert runs(small_disk.parent) == {summary["run_id"]: "FINISHED"}


@pytest.mark.long
def test_a_cluster_trains_with_the_package_from_a_wheel(work: Path, tmp_path: Path) -> None:
    checkout = Path(__file__).resolve().parents[1]
    source = tmp_path / "source"  # built from a copy: a build leaves folders behind
    shutil.copytree(checkout, source, ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    subprocess.run([*pip, str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    port, client_port = free_ports(2)
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--port={port}", "--num-cpus=3", "--include-dashboard=false", "--object-store-memory=200000000"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={client_port}"]
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    log = tmp_path / "cluster.log"
    with log.open("w") as out:
        cluster = subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=out, start_new_session=True)
    try:
        while not answers(port):
            assert cluster.poll() is None, log.read_text()
            time.sleep(0.5)
        settings = [f"ray.address=127.0.0.1:{port}", f"ray.wheel={wheel}", "train.workers=2", "train.epochs=1"]
        summary, _ = run("train", *SETTINGS, *settings, cwd=work, **environment)
    finally:
        cluster.terminate()
        cluster.wait(timeout=60)
    assert Predictor(Path(summary["bundle"])).score_names == TASKS
    result, _ = run("train", *SETTINGS, *settings, cwd=work, code=2, **environment)
    assert f"ray.address '127.0.0.1:{port}' does not answer" in result["error"]


@pytest.mark.long
def test_metrics_that_a_server_missed_are_sent_later(
    work: Path, mlflow_servers: tuple[str, Callable[[], subprocess.Popen[bytes]]], run_here: Any
) -> None:
    from mlflow.tracking import MlflowClient

    url, serve = mlflow_servers
    process = lose_the_server(work, url, serve())
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 2
    error = json.loads(out.splitlines()[-1])["error"]
    assert "`recsys-moe runs sync` tells it all" in error
    folder = Path(error.split("kept in ")[1].strip("'")).parent
    result, _ = run("runs", "sync", str(folder), cwd=work, code=2)  # still gone
    assert "does not answer" in result["error"]
    serve()
    told, _ = run("runs", "sync", str(folder), cwd=work)
    (row,) = told["runs"]
    assert (row["status"], row["version"]) == ("FINISHED", "models:/tiny/1")
    client = MlflowClient(tracking_uri=url)
    assert client.get_run(row["run_id"]).info.status == "FINISHED"
    history = client.get_metric_history(row["run_id"], "validation.like.auc")
    assert [m.step for m in history] == [25 * epoch for epoch in range(1, 5)]  # each epoch's once, early ones too
    epochs = [e for e in events_of(folder) if e["kind"] == "epoch"]
    assert [m.value for m in history] == [e["validation"]["like"]["auc"] for e in epochs]
    assert [m.timestamp for m in history] == [int(e["time"] * 1000) for e in epochs]
    evaluated, _ = run_here("evaluate", "models:/tiny@candidate", f"tracking.uri={url}", cwd=work)
    assert set(evaluated["test"]) == set(TASKS)
    again, _ = run("runs", "sync", str(folder), cwd=work)
    assert again["runs"] == []


@pytest.mark.long
def test_a_preparation_killed_at_any_point_is_finished_by_the_next(tmp_path: Path) -> None:
    run("data", "synth", "runs/feed_synth", "--rows", "600000", cwd=tmp_path)
    command = ("data", "prepare", "data=feed_synth")
    undisturbed, _ = run(*command, "runs_dir=other", "data.source=runs/feed_synth", cwd=tmp_path)
    manifest = json.loads((Path(undisturbed["folder"]) / "manifest.json").read_text())
    random = np.random.default_rng(0)
    prepared = tmp_path / "runs" / "prepared"
    found, half = None, 0
    for attempt in range(6):
        process = start(*command, cwd=tmp_path, RECSYS_MOE_TEST_PREPARE=HERE)
        while not list(prepared.glob(".feed_synth-*")) and process.poll() is None:
            time.sleep(0.01)
        if attempt % 2:  # while shards are written; before, statistics are gathered
            while not list(prepared.glob(".feed_synth-*/*.arrow")) and process.poll() is None:
                time.sleep(0.01)
        time.sleep(random.uniform(0, 2))
        process.kill()
        process.communicate()
        half += bool(list(prepared.glob(".feed_synth-*/*.arrow")))
        for folder in prepared.glob("feed_synth-*"):  # what has the name is whole
            found = PreparedData(folder)
        assert len(list(prepared.glob(".feed_synth-*"))) <= 1  # what one left, the next has removed
    assert half or found  # it was hit in the middle, or it was done before the blow
    summary, _ = run(*command, cwd=tmp_path)
    assert [path.name for path in prepared.iterdir()] == [Path(summary["folder"]).name]
    again = json.loads((Path(summary["folder"]) / "manifest.json").read_text())
    assert again["shards"] == manifest["shards"]
    assert again["counts"] == manifest["counts"]
