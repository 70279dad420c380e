"""The models of a comparison on the synthetic feed, measured on rows of the same feed that came later.

    python benchmarks/results.py feed                                         trains the models, then calls
    python benchmarks/further.py COMPARISON docs/results/feed-further.json    on that comparison's folder

A tenth of the feed has too few positives of its sparse tasks to tell apart what differs by .001. The generator goes on where
the feed ended, at no cost in training. Writes what `compare` says of those rows; scores are kept beside the cells.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys_moe.bundle import Bundle
from recsys_moe.comparison import FoldRows, Result, compare_results
from recsys_moe.labels import group_ids, task_labels
from recsys_moe.predictor import Predictor
from recsys_moe.shards import write_json
from recsys_moe.synth import BLOCK_ROWS, World, draw_block, load_synth_config, logs_table, read_summary
from recsys_moe.typed import plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="a folder that `recsys-moe compare` made: runs/compare/NAME-DIGEST")
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=31, help=f"of {BLOCK_ROWS:,} rows each")
    parser.add_argument("--draws", type=int, default=500, help="of the bootstrap")
    options = parser.parse_args()
    job = json.loads((options.comparison / "comparison.json").read_text())["job"]
    tables = later_rows(read_summary(Path(job["data"]["source"])), options.blocks)
    cells = [(file.parent, json.loads(file.read_text())) for file in sorted(options.comparison.glob("cells/*/cell.json"))]
    results = [Result(cell["label"], cell["seed"], scores(folder, Path(cell["bundle"]), tables)) for folder, cell in cells]
    bundle = Bundle(Path(cells[0][1]["bundle"]))
    compared = compare_results(
        job["data"]["name"],
        [bundle.heads],
        [rows_of(tables, bundle)],
        results,
        dict.fromkeys(job["compare"]["models"]),
        job["compare"]["baseline"],
        options.draws,
        on_draw=lambda done, total: print(f"\rdraw {done} of {total}", end="", file=sys.stderr, flush=True),
    )
    write_json(options.out, plain(compared.to_json()))


def later_rows(feed: dict[str, Any], blocks: int) -> list[pa.Table]:
    """Whole blocks of the feed's rows behind its end."""
    world, first = World(load_synth_config(), feed["seed"]), -(-feed["rows"] // BLOCK_ROWS)
    return [logs_table(world, draw_block(world, feed["seed"], first + i, BLOCK_ROWS)) for i in range(blocks)]


def scores(cell: Path, bundle: Path, tables: list[pa.Table]) -> Any:
    """A model's scores `[S, N]`: those that are kept, or new ones."""
    kept = cell / f"further-{len(tables)}.npy"
    if not kept.exists():
        predictor = Predictor(bundle)
        found = np.concatenate([predictor.score(table) for table in tables], 1)
        temporary = cell / "further.tmp.npy"
        np.save(temporary, found)
        temporary.replace(kept)
        print(f"scored by {cell.name}", file=sys.stderr)
    return np.load(kept, mmap_mode="r")


def rows_of(tables: list[pa.Table], bundle: Bundle) -> FoldRows:
    told = [(*task_labels(table, bundle.schema), group_ids(table, bundle.schema)) for table in tables]
    labels, weights = (np.concatenate([t[i] for t in told], 1) for i in (0, 1))
    return FoldRows(labels, weights, np.concatenate([t[2] for t in told if t[2] is not None]))


if __name__ == "__main__":
    main()
