"""What a sample costs to train as rows, features, tasks, experts and embeddings grow, and what a billion rows a day would take.

    make scaling        writes docs/scaling.md and its five plots; some three minutes

Random categories (10,000 values a feature) and labels, prepared as always, then the plain trainer: batches of 4,096, MMoE
with experts of 64 and 32 units and towers of 32. One axis at a time leaves the middle of the others: 200,000 rows, 40
features, 4 tasks, 8 experts, embeddings of 8.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from recsys_moe.health import HealthConfig
from recsys_moe.labels import task_labels
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.process import keep_freed_memory, use_all_cores
from recsys_moe.schema import BinaryTask, Categorical, Schema
from recsys_moe.shards import FORMAT, Manifest, PreparedData, Rows, write_json, write_shard
from recsys_moe.trainer import TrainConfig, Trainer
from recsys_moe.transforms import PartialStatistics, Transform
from recsys_moe.typed import dump

DOCS = Path(__file__).resolve().parent.parent / "docs"
VALUES, BATCH, BLOCK = 10_000, 4096, 100_000
WIDTH = 16  # of the embeddings of a billion rows a day
SETTINGS = TrainConfig(epochs=2, batch_size=BATCH, health=HealthConfig(rows=0))
MIDDLE = {"rows": 200_000, "features": 40, "tasks": 4, "experts": 8, "embedding": 8}
AXES = {
    "rows": (50_000, 200_000, 800_000, 3_200_000),
    "features": (5, 10, 20, 40, 80, 160),
    "tasks": (1, 2, 4, 8, 16),
    "experts": (2, 4, 8, 16, 32, 64),
    "embedding": (4, 8, 16, 32, 64),
}
TITLES = {
    "rows": "rows of an epoch",
    "features": "categorical features",
    "tasks": "tasks",
    "experts": "experts",
    "embedding": "dimensions of an embedding",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="where scaling.md and scaling/*.png go")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    options = parser.parse_args()
    use_all_cores()
    keep_freed_memory()
    found: dict[str, dict[int, float]] = {}
    for axis in options.axes:
        found[axis] = {}
        for value in AXES[axis]:
            found[axis][value] = microseconds(**(MIDDLE | {axis: value}))
            print(f"{axis} {value:,}: {found[axis][value]:.2f} µs a sample", file=sys.stderr, flush=True)
    print(json.dumps(found))
    if set(found) == set(AXES):
        (options.docs / "scaling").mkdir(parents=True, exist_ok=True)
        for axis, costs in found.items():
            draw(axis, costs, options.docs / "scaling" / f"{axis}.png")
        (options.docs / "scaling.md").write_text(report(found))


def microseconds(rows: int, features: int, tasks: int, experts: int, embedding: int) -> float:
    """Training's cost of a sample, reading and optimizer included, in its second epoch: the first warms up."""
    config = MMoEConfig(embedding_dim=embedding, num_experts=experts, expert_dims=(64, 32), tower_dims=(32,))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(prepared(Path(folder), rows, features, tasks), config, SETTINGS)
        before = 0.0
        for _ in range(2):
            before = trainer.progress.seconds
            trainer._train_epoch()
            trainer.progress.epoch += 1
            trainer.progress.batch, trainer.progress.rows, trainer.progress.fingerprint = 0, 0, 0
        return (trainer.progress.seconds - before) / rows * 1e6


def prepared(folder: Path, rows: int, features: int, tasks: int) -> PreparedData:
    """Random rows in the prepared format, without Ray."""
    schema = Schema(
        tuple(Categorical(f"c{n}", "categorical") for n in range(features)),
        tuple(BinaryTask(f"t{n}", f"y{n} == 1") for n in range(tasks)),
    )
    random = np.random.default_rng(0)
    shards, transform = [], None
    for number, low in enumerate(range(0, rows, BLOCK)):
        size = min(BLOCK, rows - low)
        table = pa.table(
            {f"c{n}": random.integers(0, VALUES, size) for n in range(features)}
            | {f"y{n}": (random.random(size) < 0.1).astype(np.int8) for n in range(tasks)}
        )
        labels, weights = task_labels(table, schema)
        if transform is None:
            fitted = PartialStatistics.of(table, schema)
            fitted.merge(PartialStatistics.of_labels(labels, weights, schema))
            transform = Transform(schema, fitted.finish(schema))
        rows_here = Rows(transform(table), labels, weights, None)
        shards.append(write_shard(folder / f"train-{number:05d}.arrow", "train", rows_here, transform))
    assert transform is not None
    write_json(folder / "schema.json", dump(schema))
    write_json(folder / "statistics.json", dump(transform.statistics))
    write_json(folder / "manifest.json", dump(Manifest(FORMAT, "scaling", "0" * 64, "nowhere", tuple(shards), ())))
    return PreparedData(folder, verify=False)


def draw(axis: str, costs: dict[int, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(list(costs), list(costs.values()), marker="o", color="#1f6f8b")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(costs), [f"{value:,}" for value in costs])
    axes.minorticks_off()
    axes.set(xlabel=TITLES[axis], ylabel="µs a sample", ylim=(0, 1.15 * max(costs.values())))
    for value, cost in costs.items():
        axes.annotate(f"{cost:.1f}", (value, cost), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(found: dict[str, dict[int, float]]) -> str:
    cores = len(os.sched_getaffinity(0))
    text = f"""# What a sample costs, and what a billion rows a day would take

Made by `make scaling` (benchmarks/bench_scaling.py); do not edit. {cores} cores of {processor()}, the plain trainer, fp32,
batches of {BATCH:,}, second epoch, reading and optimizer included. What is not on an axis is in the middle:
{MIDDLE["rows"]:,} rows, {MIDDLE["features"]} categorical features of {VALUES:,} values, {MIDDLE["tasks"]} tasks,
{MIDDLE["experts"]} experts (64 and 32 units), embeddings of {MIDDLE["embedding"]}.
"""
    for axis, costs in found.items():
        low, high = min(costs), max(costs)
        text += f"""
## {TITLES[axis].capitalize()}

![µs a sample against {TITLES[axis]}](scaling/{axis}.png)

From {low:,} to {high:,}, {high / low:,.0f} times as many, a sample goes from {costs[low]:.1f} to {costs[high]:.1f} µs,
{costs[high] / costs[low]:.1f} times as much.
"""
    return text + a_billion(found["embedding"][WIDTH], cores)


def a_billion(cost_us: float, cores: int) -> str:
    """Machines, memory and network of a billion rows a day, by arithmetic from the measured cost at `WIDTH` dimensions."""
    hours, width, features = 4, WIDTH, MIDDLE["features"]
    machine_hours = 1e9 * cost_us / 3.6e9
    machines = int(np.ceil(machine_hours / hours))
    workers = 2 * machines
    rate = 1e9 / (hours * 3600)
    tables_gb = 1e9 * (4 * width + 4) / 1e9
    row_bytes = features * (4 + 2 * 4 * width)
    dense_mb = 4 * (features * width * 64 + 64 * 32) * MIDDLE["experts"] / 1e6
    steps = 1e9 / (workers * BATCH)
    return f"""
## A billion rows a day

Arithmetic from the cost above, for embeddings of {width}; one worker a machine. More than two workers, and more than one
machine, were not measured.

Workers. At {cost_us:.1f} µs a sample on {cores} cores a billion rows are {machine_hours:.1f} hours of this machine. To be done
in {hours} hours, so that the model of the morning knows yesterday, takes {machines} if nothing is lost between them; plan twice
as many, {workers}. The tables here have {VALUES:,} rows each and mostly stay in the caches: with tables that do not, a lookup
costs more. What preparation costs is in docs/decisions.md; files are independent of each other.

Memory. Tables are what grows: a billion ids of {width} dimensions are {tables_gb:.0f} GB with the optimizer's one number a row
(with `collisions: none` 16 bytes a row more). Workers share the tables out, split by rows where one would be more than a share,
and write the bundle piece by piece: a worker needs its share and 64 MiB. Whoever serves the bundle needs all of it. Log rows
are mapped from disk and take none.

Network. With tables shared out, a row's ids go to the workers that hold them, vectors come back and gradients follow:
{row_bytes / 1e3:.1f} kB a row for {features} features of {width} dimensions, {row_bytes * rate / 1e6:.0f} MB/s over all workers
at {rate:,.0f} rows a second. The dense gradients ({dense_mb:.1f} MB) are summed once a step of {BATCH:,} rows a worker,
{steps:,.0f} steps: {2 * dense_mb * steps / (hours * 3600):.0f} MB/s for each worker. Both fit a 10 Gbit/s network; what larger
batches have to hide is the latency of a step's three exchanges.
"""


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"an {names[0]}" if names else platform.machine()


if __name__ == "__main__":
    main()
