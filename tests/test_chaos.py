"""The service as it is started, under load, while parts of it die: no wrong answer, and soon all is well again."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pytest

from recsys_moe.pipelines.tracking import open_client
from recsys_moe.predictor import Predictor
from recsys_moe.selftest import write_selftest
from tests.test_registry import REQUEST
from tests.test_road import free_ports, processes_of, serve_mlflow, start
from tests.test_serving import TRAINING, save

pytestmark = pytest.mark.long

CLIENTS = 4
MARKER = "RECSYS_MOE_TEST_CHAOS"
ROWS = pa.table({"colour": ["red"] * 3, "price": [1.0, 2.0, 3.0]})


@dataclass
class Running:
    """A service in a process of its own, and what its models answer, version by version."""

    url: str
    expected: dict[str, Any]
    told: dict[str, Any]
    marker: str

    def pids(self, title: str) -> list[int]:
        """The processes whose name begins so."""
        found = []
        for pid in processes_of(f"{MARKER}={self.marker}"):
            try:
                if " ".join(psutil.Process(pid).cmdline()).startswith(title):
                    found.append(pid)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self, title: str) -> None:
        pids = self.pids(title)
        assert pids, f"no process {title}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


@dataclass
class Load:
    """What clients saw that ask all the time, and ask again where a connection breaks."""

    service: Running
    answered: list[tuple[float, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    broken: int = 0

    @property
    def versions(self) -> set[str]:
        return {version for _, version in self.answered}

    @property
    def longest_gap(self) -> float:
        """Seconds in which nobody was answered."""
        return float(np.diff(sorted(when for when, _ in self.answered)).max())

    def answered_since(self, when: float) -> bool:
        return any(each > when for each, _ in self.answered[-100:])

    def ask(self, ended: threading.Event) -> None:
        with httpx.Client(timeout=30) as client:
            while not ended.is_set():
                try:
                    answer = client.post(f"{self.service.url}/v1/rank", json=REQUEST)
                except httpx.TransportError:
                    self.broken += 1
                    time.sleep(0.05)
                    continue
                if answer.status_code != 200:
                    self.wrong.append(f"{answer.status_code}: {answer.text[:200]}")
                    continue
                found = answer.json()
                version = found["model"]["version"]
                for row, task in enumerate(("click", "buy")):
                    scores = self.service.expected[version][row][found["positions"]].astype(float).tolist()
                    if found["scores"][task] != scores:
                        self.wrong.append(f"version {version}: {found['scores'][task]} for {task}, not {scores}")
                self.answered.append((time.monotonic(), version))


@contextmanager
def load(service: Running) -> Iterator[Load]:
    """Clients that ask while the block runs; none may have got a wrong answer or a refusal."""
    seen, ended = Load(service), threading.Event()
    clients = [threading.Thread(target=seen.ask, args=(ended,)) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        yield seen
    finally:
        ended.set()
        for client in clients:
            client.join()
    assert not seen.wrong, seen.wrong[:3]
    assert seen.answered


def wait_for(what: str, holds: Any, seconds: float) -> float:
    """How long it took; not longer than so many seconds."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() < began + seconds, f"{what} within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began


@contextmanager
def serving(work: Path, uri: str, expected: dict[str, Any], marker: str) -> Iterator[Running]:
    settings = (f"tracking.uri={uri}", f"runs_dir={work}/runs", "serve.port=0", "serve.poll_seconds=0.5")
    process = start("serve", "models:/shop@champion", *settings, cwd=work, **{MARKER: marker})
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    told = json.loads(line)
    try:
        yield Running(told["url"], expected, told, marker)
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    wait_for("no process is left", lambda: not processes_of(f"{MARKER}={marker}"), 60)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, Any, dict[str, Any]]]:
    """A folder, the URL of a tracking server whose model `shop` has versions 1 and 2, that server, and what they answer."""
    work = tmp_path_factory.mktemp("chaos")
    (port,) = free_ports(1)
    server = serve_mlflow(work, port)
    url = f"http://127.0.0.1:{port}"
    try:
        client, expected = open_client(url), {}
        client.create_registered_model("shop")
        for seed in range(2):
            bundle = save(work / f"bundle {seed}", seed)
            write_selftest(bundle, [TRAINING])
            run = client.create_run("0")
            client.log_artifacts(run.info.run_id, str(bundle), "bundle")
            source = f"{run.info.artifact_uri}/bundle"
            version = client.create_model_version("shop", source=source, run_id=run.info.run_id).version
            expected[str(version)] = Predictor(bundle).score(ROWS)
        client.set_registered_model_alias("shop", "champion", "1")
        yield work, url, server, expected
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture(scope="module")
def service(shop: tuple[Path, str, Any, dict[str, Any]]) -> Iterator[Running]:
    work, url, _, expected = shop
    with serving(work, url, expected, f"{os.getpid()}-first") as running:
        yield running


def test_an_alias_that_moves_back_and_forth_under_load(service: Running, shop: tuple[Path, str, Any, dict[str, Any]]) -> None:
    client = open_client(shop[1])
    with load(service) as seen:
        for turn in range(6):
            version = str(2 - turn % 2)
            client.set_registered_model_alias("shop", "champion", version)
            wait_for(f"version {version} answers", lambda v=version: seen.answered and seen.answered[-1][1] == v, 10)
    assert seen.versions == {"1", "2"}
    assert not seen.broken


@pytest.mark.parametrize("whom", ["ray::ServeController", "ray::ProxyActor"])
def test_a_controller_or_proxy_that_dies_is_back_within_ten_seconds(service: Running, whom: str) -> None:
    with load(service) as seen:
        wait_for("answers", lambda: len(seen.answered) > 100, 30)
        before = service.pids(whom)
        service.kill(whom)
        killed = time.monotonic()
        wait_for("answers again", lambda: seen.answered_since(killed + 0.5), 10)
        wait_for("another one has its place", lambda: set(service.pids(whom)) - set(before), 60)
        time.sleep(3)
    assert seen.longest_gap < 10


def test_a_replica_that_dies_costs_connections_and_no_answer(service: Running) -> None:
    with load(service) as seen:
        wait_for("answers", lambda: len(seen.answered) > 100, 30)
        service.kill("ray::ServeReplica")
        killed = time.monotonic()
        wait_for("another replica answers", lambda: seen.answered_since(killed + 0.5), 90)
        time.sleep(2)
    assert seen.broken


def test_without_mlflow_it_goes_on_and_starts_from_the_disk(
    service: Running, shop: tuple[Path, str, Any, dict[str, Any]]
) -> None:
    work, url, server, expected = shop
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    with load(service) as seen:
        time.sleep(5)
    assert not seen.broken
    (version,) = seen.versions
    with serving(work, url, expected, f"{os.getpid()}-second") as again, load(again) as seen_again:
        assert again.told["models"]["shop@champion"]["version"] == version
        time.sleep(3)
    assert seen_again.versions == {version}
