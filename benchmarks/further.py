"""The GAUC of a comparison's models on the synthetic feed, measured on rows of the same feed that came later.

    python benchmarks/results.py feed                                         trains the models, then calls
    python benchmarks/further.py COMPARISON docs/results/feed-further.json    on that comparison's folder

A tenth of the feed has too few positives of its sparse tasks to tell apart what differs by .001. The generator goes on where
the feed ended, at no cost in training. Intervals are those of `compare`: users are drawn, and seeds. Scores are kept beside the
cells.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_moe.bundle import Bundle
from recsys_moe.comparison import MEAN, Line
from recsys_moe.intervals import difference, seed_interval
from recsys_moe.labels import group_ids, task_labels
from recsys_moe.metrics import group_aucs
from recsys_moe.predictor import Predictor
from recsys_moe.shards import write_json
from recsys_moe.synth import BLOCK_ROWS, World, draw_block, load_synth_config, logs_table, read_summary
from recsys_moe.typed import plain

Floats = npt.NDArray[np.float64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="a folder that `recsys-moe compare` made: runs/compare/NAME-DIGEST")
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=31, help=f"of {BLOCK_ROWS:,} rows each")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    options = parser.parse_args()
    job = json.loads((options.comparison / "comparison.json").read_text())["job"]
    tables = later_rows(read_summary(Path(job["data"]["source"])), options.blocks)
    cells = [(file.parent, json.loads(file.read_text())) for file in sorted(options.comparison.glob("cells/*/cell.json"))]
    bundle = Bundle(Path(cells[0][1]["bundle"]))
    told = [(*task_labels(table, bundle.schema), group_ids(table, bundle.schema)) for table in tables]
    labels, observed = (np.concatenate([t[i] for t in told], 1) for i in (0, 1))
    users = np.unique(np.concatenate([t[2] for t in told if t[2] is not None]), return_inverse=True)[1]
    number = int(users.max()) + 1
    drawn_du = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), options.draws)
    weights_du = np.r_[np.ones((1, number)), drawn_du]
    # By model: of each seed, the figures [1 + draws, tasks and their mean] on all users and on drawn ones.
    found: dict[str, list[Floats]] = {label: [] for label in job["compare"]["models"]}
    for folder, cell in cells:
        of_seed = scores(folder, Path(cell["bundle"]), tables)
        by_task = [gaucs(*part, users, weights_du) for part in zip(of_seed, labels, observed, strict=True)]
        found[cell["label"]].append(np.stack([*by_task, np.mean(by_task, 0)], 1))
    baseline, lines = job["compare"]["baseline"], []
    for t, task in enumerate((*bundle.heads.tasks, MEAN)):
        all_users = {label: np.array([[seed[0, t] for seed in seeds]]) for label, seeds in found.items()}
        drawn = {label: np.mean([seed[1:, t] for seed in seeds], 0) for label, seeds in found.items()}
        for label, figures in all_users.items():
            gap = None if label == baseline else difference(drawn[label], drawn[baseline], figures, all_users[baseline])
            lines.append(Line(label, task, "gauc", figures.shape[1], seed_interval(figures[0]), gap))
    told_lines = [asdict(line) | {"verdict": line.verdict} for line in lines]
    write_json(options.out, plain({"rows": labels.shape[1], "users": number, "lines": told_lines}))


def gaucs(scores_n: Any, labels_n: Any, observed_n: Any, users_n: Any, weights_du: Floats) -> Floats:
    """GAUC of a task, `[D]`, where users have the weights `[D, U]`: Σ w·rows·AUC / Σ w·rows over users of both classes."""
    seen = np.flatnonzero(observed_n > 0)
    areas, rows, place = group_aucs(np.asarray(scores_n)[seen], labels_n[seen], users_n[seen])
    user = np.empty(len(areas), np.int64)
    user[place] = users_n[seen]
    both = np.isfinite(areas)
    of_user = weights_du[:, user[both]] * rows[both]
    gauc: Floats = of_user @ areas[both] / of_user.sum(1)
    return gauc


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


if __name__ == "__main__":
    main()
