"""The scoring service beside its peers, in the same minutes: `python benchmarks/bench_serve.py FOLDER`.

HoME with 6 tasks, 40 features whose inputs are 512 numbers (a table of a million rows of dimension 32 among them), bf16; 200
candidates by id. The predictor in process, from ids to scores, takes turns of ten calls with the peer's network alone
(experts_peers.py, eager and compiled, fp32 and bf16). The service runs as `recsys-moe serve` does, on one core with all of
Ray's processes, by direct ingress (one hop); the client on the other: closed loops of 1, 8 and 32, then an open loop of four
times what was the most. What surrounds the predictor is a request's time at the client less the two steps that the answer says
the predictor took. `mlflow models serve` takes its turns on the same core: with the same bundle, whose 200 rows bring their
features since it looks nothing up by id, and with the peer's network in plain modules (modules_by_mlflow.py).

Parts by themselves: FOLDER make, predictor, serve PORT, client URL, mlflow PORT bundle|modules, mlflow-client URL
bundle|modules. Seconds of each closed loop and of the overload: SECONDS_CLOSED (6), SECONDS_OVERLOAD (60).
"""

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from recsys_moe.bench import load_peer
from recsys_moe.bundle import FORMAT, BundleConfig, save_bundle
from recsys_moe.models.home import HoMEConfig
from recsys_moe.process import keep_freed_memory
from recsys_moe.ranker import Ranker
from recsys_moe.schema import Schema
from recsys_moe.selftest import write_selftest
from recsys_moe.serving.app import serve_forever
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.jobs import Rank
from recsys_moe.serving.ranking import Timer
from recsys_moe.serving.requests import parse_rank
from recsys_moe.serving.service import Service
from recsys_moe.sources import DataConfig
from recsys_moe.transforms import PartialStatistics, Transform
from recsys_moe.typed import parse

ITEMS, CANDIDATES = 100_000, 200
USER = [f"user_{i}" for i in range(7)], [f"user_x{i}" for i in range(8)]
ITEM = [f"item_{i}" for i in range(7)], [f"item_x{i}" for i in range(16)]
TASKS = [f"task_{t}" for t in range(6)]


def schema() -> Schema:
    """40 features whose inputs are 15 · 32 + 24 + 8 = 512 numbers."""
    features = [{"name": "item_id", "kind": "hashed", "buckets": 1_000_000}]
    features += [{"name": n, "kind": "categorical"} for n in (*USER[0], *ITEM[0])]
    features += [{"name": n, "kind": "numeric"} for n in (*USER[1], *ITEM[1])]
    features += [{"name": "item_vector", "kind": "embedding", "dim": 8}]
    tasks = [{"name": name, "label": f"{name} == 1", "category": f"c{t % 2}"} for t, name in enumerate(TASKS)]
    found: Schema = parse(Schema, {"features": features, "tasks": tasks}, "schema")
    return found


def rows(count: int, seed: int) -> pa.Table:
    g = np.random.default_rng(seed)
    columns = {"item_id": pa.array(np.arange(count))}
    columns |= {n: pa.array([f"v{v}" for v in g.integers(0, 1000, count)]) for n in (*USER[0], *ITEM[0])}
    columns |= {n: pa.array(g.normal(size=count)) for n in (*USER[1], *ITEM[1])}
    columns["item_vector"] = pa.FixedSizeListArray.from_arrays(pa.array(g.normal(size=8 * count), pa.float32()), 8)
    return pa.table(columns)


def make_bundle(folder: Path, precision: str) -> Path:
    wanted, table = schema(), rows(20_000, 0)
    transform = Transform(wanted, PartialStatistics.of(table, wanted).finish(wanted))
    config = HoMEConfig(
        embedding_dim=32,
        experts_per_group=2,
        expert_dims=(256,),
        tower_dims=(64,),
        norm="none",
        categories={name: f"c{t % 2}" for t, name in enumerate(TASKS)},
    )
    described = BundleConfig(FORMAT, config, precision, DataConfig(name="bench", source="nowhere", schema="-"), "0" * 64)
    torch.manual_seed(0)
    model = Ranker(
        config, transform.sparse_names, transform.cardinalities, len(transform.dense_names), dict.fromkeys(TASKS, 1), precision
    )
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    save_bundle(folder, model.state_dict(), described, transform, {})
    write_selftest(folder, [table])
    return folder


def make_items(path: Path) -> None:
    table = rows(ITEMS, 1).select(["item_id", *ITEM[0], *ITEM[1], "item_vector"]).combine_chunks()
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


async def stages(url: str, bodies: list[str], overload: bool) -> dict[str, dict[str, float]]:
    """Closed loops, and the open one: what each was like."""
    import aiohttp

    form = {"Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def ask(number: int, since: float | None = None) -> tuple[int, float, float, bytes]:
            """Status, seconds, for how many more the server wants to be left alone, and what it said."""
            started = time.perf_counter() if since is None else since
            async with session.post(url, data=bodies[number % len(bodies)], headers=form) as answer:
                said = await answer.read()
                return answer.status, time.perf_counter() - started, float(answer.headers.get("Retry-After", 0)), said

        async def closed(clients: int, seconds: float) -> dict[str, float]:
            taken: list[float] = []
            around: list[float] = []
            end = time.perf_counter() + seconds

            async def one(offset: int) -> None:
                while time.perf_counter() < end:
                    status, each, pause, said = await ask(offset + len(taken))
                    if status == 200:
                        taken.append(each)
                        if ms := json.loads(said).get("timings_ms"):
                            around.append(each - (ms["features"] + ms["score"]) / 1000)
                    await asyncio.sleep(pause)

            started = time.perf_counter()
            await asyncio.gather(*(one(37 * c) for c in range(clients)))
            rate = len(taken) * CANDIDATES / (time.perf_counter() - started)
            told = {"clients": clients, **_told(taken), "candidates_per_s": round(rate)}
            return told | ({"around_predictor_p50_ms": _told(around)["p50_ms"]} if around else {})

        async def opened(rate: float, seconds: float) -> dict[str, float]:
            """`rate` requests a second, whether the answers come or not; times count from when a request was due."""
            tasks, started = [], time.perf_counter()
            for number in range(int(rate * seconds)):
                due = started + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(ask(number, due)))
            done = await asyncio.gather(*tasks)
            good, refused = ([each for status, each, *_ in done if status == wanted] for wanted in (200, 429))
            told = {"rate": rate, "accepted": len(good), "refused": len(refused), "other": len(done) - len(good) - len(refused)}
            return told | _told(good) | {"refused_p99_ms": _told(refused)["p99_ms"]}

        await closed(1, 2)
        found = {}
        for clients in (1, 8, 32):
            found[f"closed {clients}"] = await closed(clients, float(os.environ.get("SECONDS_CLOSED", "6")))
        if not overload:
            return found
        saturation = max(each["candidates_per_s"] for each in found.values()) / CANDIDATES
        found["4x saturation"] = await opened(4 * saturation, float(os.environ.get("SECONDS_OVERLOAD", "60")))
        await asyncio.sleep(5)
        found["5 s later"] = await closed(1, 3)
        return found


def _told(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {"p50_ms": float("nan"), "p99_ms": float("nan")}
    p50, p99 = np.quantile(seconds, (0.5, 0.99)) * 1000
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}


def request(seed: int) -> str:
    g = np.random.default_rng(seed)
    user = {n: f"v{v}" for n, v in zip(USER[0], g.integers(0, 1000, 7), strict=True)}
    user |= {n: float(v) for n, v in zip(USER[1], g.normal(size=8), strict=True)}
    return json.dumps({"user": user, "candidates": {"ids": g.integers(0, ITEMS, CANDIDATES).tolist()}})


def plain_request(seed: int, kind: str) -> str:
    """The rows of a request, whole, as MLflow's scoring server takes them: a bundle's, or a network's of plain modules."""
    if kind == "bundle":
        table = rows(CANDIDATES, seed)
        columns = {name: table[name].to_pylist() for name in table.column_names}
    else:
        g = np.random.default_rng(seed)
        columns = {f"id_{i}": g.integers(0, 1000, CANDIDATES).tolist() for i in range(15)}
        columns |= {f"x_{i}": g.normal(size=CANDIDATES).tolist() for i in range(32)}
    return json.dumps({"dataframe_split": {"columns": list(columns), "data": list(zip(*columns.values(), strict=True))}})


def in_process(folder: Path, peers: Path, seconds: float) -> dict[str, float]:
    """p50 ms of the predictor from ids to scores, and of the peer's network alone on 200 rows, taking turns."""
    torch.set_num_threads(1)
    keep_freed_memory()
    peer = load_peer(peers, "experts_peers").HoME().eval()
    compiled, x = torch.compile(peer), torch.randn(CANDIDATES, 512)

    def of(module: Any, bf16: bool) -> Any:
        def run() -> None:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                module(x)

        return run

    service = Service(folder / "bf16", ServeConfig(item_key="item_id", item_features=str(folder / "items.arrow")))
    asked = itertools.cycle([parse_rank(request(seed).encode()) for seed in range(200)])

    def predict() -> None:
        job = Rank(service, *next(asked), Timer(), lambda result: result)
        predictor, inputs = job.prepare()
        predictor.score_inputs(inputs)

    calls = {"predictor": predict}
    for kind, module in (("eager", peer), ("compiled", compiled)):
        calls |= {f"{kind} fp32": of(module, False), f"{kind} bf16": of(module, True)}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    times: dict[str, list[float]] = {name: [] for name in calls}
    while time.perf_counter() < end:
        for name, call in calls.items():
            for turn in range(12):  # the first two find what others have left in the caches
                started = time.perf_counter()
                call()
                if turn > 1:
                    times[name].append(time.perf_counter() - started)
    return {name: round(float(np.median(of)) * 1000, 2) for name, of in times.items()}


def served(folder: Path, port: int) -> None:
    """The service as `recsys-moe serve` runs it, in this process's core."""
    config = ServeConfig(port=port, item_key="item_id", item_features=str(folder / "items.arrow"), deadline_ms=200)
    serve_forever(folder / "bf16", config, lambda url: print(url, flush=True))


def served_by_mlflow(folder: Path, port: int, kind: str) -> None:
    """MLflow's scoring server with the same bundle or with plain modules, in this process's core; does not return."""
    import mlflow

    model = folder / f"mlflow-{kind}"
    if not model.exists():
        code = Path(__file__).with_name(f"{kind}_by_mlflow.py")
        artifacts = {"bundle": str(folder / "bf16")} if kind == "bundle" else {"peers": str(peers())}
        mlflow.pyfunc.save_model(model, python_model=str(code), artifacts=artifacts, pip_requirements=[])
    command = ["mlflow", "models", "serve", "--model-uri", str(model), "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow looks for uvicorn there
    os.execve(sys.executable, [sys.executable, "-m", *command], os.environ | {"PATH": path})


def main(folder: Path, part: str) -> None:
    if part == "make":
        for precision in ("fp32", "bf16"):
            make_bundle(folder / precision, precision)
        make_items(folder / "items.arrow")
    elif part == "predictor":
        print(json.dumps(in_process(folder, peers(), 10)))
    elif part == "client":
        print(json.dumps(asyncio.run(stages(sys.argv[3], [request(seed) for seed in range(200)], overload=True))))
    elif part == "mlflow":
        served_by_mlflow(folder, int(sys.argv[3]), sys.argv[4])
    elif part == "mlflow-client":
        bodies = [plain_request(seed, sys.argv[4]) for seed in range(20)]
        print(json.dumps(asyncio.run(stages(sys.argv[3], bodies, overload=False))))
    elif part == "serve":
        served(folder, int(sys.argv[3]))
    else:
        run_all(folder)


def run_all(folder: Path) -> None:
    """Each part in a process of its own: the server on the first core, client and what is beside it on the second."""
    me = [sys.executable, __file__]
    if not (folder / "items.arrow").exists():
        subprocess.run([*me, str(folder), "make"], check=True)

    def told(core: int, *arguments: str) -> str:
        command = ["taskset", "-c", str(core), *me, str(folder), *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    @contextlib.contextmanager
    def server(*arguments: str) -> Iterator[subprocess.Popen[str]]:
        command = ["taskset", "-c", "0", *me, str(folder), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()

    print("in process:", told(0, "predictor"))
    with server("serve", "18700") as ours:
        assert ours.stdout is not None
        url = ours.stdout.readline().strip()
        before = replica_mb()
        print("served:", told(1, "client", f"{url}/v1/rank"))
        print(f"replica's resident memory, MB: {before} before, {replica_mb()} after")
    for kind, port in (("bundle", "18701"), ("modules", "18702")):  # the first may hold its port a little longer
        with server("mlflow", port, kind):
            wait_for(f"http://127.0.0.1:{port}/ping")
            print(f"mlflow models serve, {kind}:", told(1, "mlflow-client", f"http://127.0.0.1:{port}/invocations", kind))


def peers() -> Path:
    return Path(os.environ.get("RECSYS_MOE_PEERS", "../shared/bench"))


def wait_for(url: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def replica_mb() -> dict[str, int]:
    """Resident and anonymous memory of the process that scores."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if "ServeReplica" in (status.parent / "cmdline").read_text():
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
                return {name: int(lines[name].split()[0]) // 1024 for name in ("VmRSS", "RssAnon")}
    return {}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "all")
