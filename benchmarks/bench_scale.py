"""Whether size matters: memory and rate at 2 and at 20 million rows, a preparation of 40 columns, a table of 50 million ids.

    python benchmarks/bench_scale.py rows       # the synthetic feed, prepared and trained for one epoch, small and large
    python benchmarks/bench_scale.py columns    # preparation: 13 numbers, 26 categories and a label, as in Criteo's logs
    python benchmarks/bench_scale.py ids        # one hashed feature of 50 million buckets at dimension 16

Each part works through the commands that a user types, in --work, whose data it keeps for the next time. Anonymous memory is
RssAnon in /proc/PID/status, sampled ten times a second for every process of a command: what is mapped from files is not
counted, tmpfs and shared memory are listed beside it.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
FILE_ROWS = 500_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["rows", "columns", "ids"])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "scale", help="where data and runs go")
    parser.add_argument("--small", type=int, default=2_000_000)
    parser.add_argument("--large", type=int, default=20_000_000)
    parser.add_argument("--buckets", type=int, default=50_000_000)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(json.dumps({"rows": rows, "columns": columns, "ids": ids}[options.part](options)))


def rows(options: argparse.Namespace) -> dict[str, Any]:
    """The feed at two sizes."""
    found = {}
    for size in (options.small, options.large):
        feed = options.work / f"feed-{size}"
        if not feed.exists():
            command("data", "synth", str(feed), "--rows", str(size), cwd=options.work)
        settings = ["data=feed_synth", f"data.source={feed}"]
        _, seconds, memory = command("data", "prepare", *settings, cwd=options.work, fresh=True)
        trained, _, training = command("train", *settings, "train.epochs=1", "train.batch_size=4096", cwd=options.work)
        found[size] = {
            "prepared_rows_per_s": size / seconds,
            "preparing_mb": largest(memory),
            "trained_rows": trained["train"]["rows"],
            "samples_per_s": trained["train"]["samples_per_s"],
            "worker_mb": largest(training, "RayTrainWorker"),
        }
        tell(f"{size:,} rows", found[size])
    small, large = found.values()
    ratios = {
        "worker memory": large["worker_mb"]["anon"] / small["worker_mb"]["anon"],
        "samples/s": large["samples_per_s"] / small["samples_per_s"],
    }
    tell("large / small", ratios)
    return {"sizes": found, "ratios": ratios}


def columns(options: argparse.Namespace) -> dict[str, Any]:
    """Preparation of 40 columns at two sizes."""
    found = {}
    for size in (options.small, 4 * options.small):
        logs = options.work / f"columns-{size}"
        if not logs.exists():
            write_files(logs, size, forty_columns)
        schema = options.work / "columns.yaml"
        schema.write_text(json.dumps(FORTY))
        settings = ["data=custom", "data.name=columns", f"data.schema={schema}", f"data.source={logs}"]
        _, seconds, memory = command("data", "prepare", *settings, cwd=options.work, fresh=True)
        found[size] = {"rows_per_s": size / seconds, "seconds": seconds, "largest_mb": largest(memory)}
        tell(f"{size:,} rows", found[size])
    return {"sizes": found}


def ids(options: argparse.Namespace) -> dict[str, Any]:
    """A table whose every page is used: ids are drawn evenly, far more of them than a page has rows."""
    logs, schema = options.work / f"ids-{options.small}", options.work / "ids.yaml"
    if not logs.exists():
        write_files(logs, options.small, many_ids)
    feature = {"name": "item", "kind": "hashed", "buckets": options.buckets}
    schema.write_text(json.dumps({"features": [feature], "tasks": [{"name": "click", "label": "click == 1"}]}))
    settings = ["data=custom", "data.name=ids", f"data.schema={schema}", f"data.source={logs}", "model.embedding_dim=16"]
    done, _, memory = command("train", *settings, "train.epochs=2", "train.batch_size=4096", cwd=options.work)
    found = {"samples_per_s": done["train"]["samples_per_s"], "worker_mb": largest(memory, "RayTrainWorker")}
    found["of_6_gb"] = (found["worker_mb"]["anon"] + found["worker_mb"]["shared"]) * 2**20 / 6e9
    tell(f"{options.buckets:,} ids", found)
    return found


Memory = dict[int, tuple[str, dict[str, float]]]
"""Each process's command line and the most that it had, in MiB."""


def command(*arguments: str, cwd: Path, fresh: bool = False) -> tuple[dict[str, Any], float, Memory]:
    """Run `recsys-moe`; its JSON, the seconds that it took (Ray's start of some ten included), and its processes' memory."""
    line = [sys.executable, "-m", "recsys_moe", *arguments, *(["--force"] if fresh else []), "--json"]
    memory: Memory = {}
    start = time.perf_counter()
    with (cwd / "stderr.txt").open("w") as errors:
        process = subprocess.Popen(line, cwd=cwd, stdout=subprocess.PIPE, stderr=errors, text=True)
        while process.poll() is None:
            for pid, name, sizes in sample(process.pid):
                _, most = memory.setdefault(pid, (name, sizes))
                memory[pid] = name, {key: max(value, most[key]) for key, value in sizes.items()}
            time.sleep(0.1)
    seconds = time.perf_counter() - start
    assert process.stdout is not None
    if process.returncode:
        sys.exit((cwd / "stderr.txt").read_text()[-2000:])
    return json.loads(process.stdout.read().splitlines()[-1]), seconds, memory


def sample(parent: int) -> Iterator[tuple[int, str, dict[str, float]]]:
    """Every process of a command, with its anonymous and shared memory now."""
    try:
        family = [psutil.Process(parent), *psutil.Process(parent).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            name = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            kinds = {"anon": "RssAnon", "shared": "RssShmem", "file": "RssFile"}
            yield process.pid, name, {key: int(status[line].split()[0]) / 1024 for key, line in kinds.items()}
        except (OSError, KeyError):  # it has ended
            continue


def largest(memory: Memory, name: str = "ray::") -> dict[str, float]:
    """The process of that name with the most anonymous memory."""
    found = [sizes for command, sizes in memory.values() if name in command]
    return max(found, key=lambda sizes: sizes["anon"])


def tell(what: str, found: dict[str, Any]) -> None:
    def text(value: Any) -> str:
        return " ".join(f"{k} {v:,.0f}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,.2f}"

    print(what, "  ".join(f"{key}: {text(value)}" for key, value in found.items()), file=sys.stderr, flush=True)


# 13 numbers, 26 categories of 4 to 10 million values, rare ones rare, and a label.
CARDINALITIES = np.geomspace(4, 10_000_000, 26).astype(int).tolist()
FORTY: dict[str, Any] = {
    "features": [
        *({"name": f"i{n}", "kind": "numeric", "log1p": True, "buckets": 32, "missing_indicator": True} for n in range(13)),
        *(
            {"name": f"c{n}", "kind": "categorical"}
            if size < 100_000
            else {"name": f"c{n}", "kind": "hashed", "buckets": 10**6}
            for n, size in enumerate(CARDINALITIES)
        ),
    ],
    "tasks": [{"name": "click", "label": "click == 1"}],
}


def forty_columns(random: np.random.Generator, rows: int) -> dict[str, Any]:
    table: dict[str, Any] = {"click": (random.random(rows) < 0.25).astype(np.int8)}
    for n in range(13):
        table[f"i{n}"] = pa.array(random.lognormal(3, 2, rows).astype(np.int64), mask=random.random(rows) < 0.1 * (n % 4))
    for n, size in enumerate(CARDINALITIES):
        ids = np.minimum(size ** random.random(rows), size - 1).astype(np.int64)
        distinct, place = np.unique(ids, return_inverse=True)
        texts = pa.array([f"{value * 2654435761 % 2**32:08x}" for value in distinct.tolist()])
        table[f"c{n}"] = texts.take(pa.array(place))
    return table


def many_ids(random: np.random.Generator, rows: int) -> dict[str, Any]:
    items = random.integers(0, 2**40, rows)
    return {"item": items, "click": ((items % 7 < 2) ^ (random.random(rows) < 0.1)).astype(np.int8)}


def write_files(folder: Path, rows: int, draw: Any) -> None:
    """Parquet files of FILE_ROWS rows, whole or not at all."""
    temporary = folder.with_suffix(".tmp")
    temporary.mkdir(exist_ok=True)
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        table = pa.table(draw(np.random.default_rng((0, number)), min(FILE_ROWS, rows - start)))
        pq.write_table(table, temporary / f"part-{number:05d}.parquet", row_group_size=131_072)
    temporary.rename(folder)


if __name__ == "__main__":
    main()
