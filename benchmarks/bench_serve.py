"""The scoring service beside its peers, in the same minutes."""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from recsys_moe.bundle import FORMAT, BundleConfig, save_bundle
from recsys_moe.models.home import HoMEConfig
from recsys_moe.ranker import Ranker
from recsys_moe.schema import Schema
from recsys_moe.selftest import write_selftest
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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    make_bundle(folder / "fp32", "fp32")
    make_bundle(folder / "bf16", "bf16")
    make_items(folder / "items.arrow")
