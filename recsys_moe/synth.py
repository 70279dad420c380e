"""Synthetic short-video feed logs with known truth: how good could a model be at best?

A seed draws a world of users and items with latent tastes; rows then stream by in time order, any number of them. For row
(user u, item i, context c) and task t the true logit is

    z_t = bias_t + shared_t·uᵀW_{category(t)}i + own_t·uᵀV_t·i + quality_t·q_i + user_{u,t} + duration_t·log(d_i/20s)
          + hour_t(c)

and the label is 1 with probability sigmoid(z_t). What a recommender logs goes to `logs/`, the probabilities to `truth/`, row
for row. Labels are missing as in real logs: playback reports get lost offline, a follow of somebody already followed can't
be seen, purchases exist on shop items only.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from recsys_moe.config import conf_dir
from recsys_moe.errors import UserError
from recsys_moe.shards import write_json
from recsys_moe.typed import parse, typed

BLOCK_ROWS = 65_536
FILE_ROWS = 16 * BLOCK_ROWS
NETWORKS = ("wifi", "5g", "4g", "offline")
TABS = ("feed", "follow", "search", "nearby")
GENDERS = ("f", "m", "unknown")
AGE_BANDS = ("<18", "18-23", "24-30", "31-40", "41-50", "51+")
_AUC_BINS = 1 << 15

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@typed
class SynthTask:
    """One task of the feed; see the file in `conf/synth` for what the numbers do."""

    name: str
    category: str
    bias: float
    shared: float
    own: float
    quality: float
    duration: float


@typed
class SynthConfig:
    """A frozen generator."""

    version: str
    users: int
    items: int
    authors: int
    categories: int
    tags: int
    latent_dim: int
    seconds_per_row: float
    tasks: tuple[SynthTask, ...]


def load_synth_config(name: str = "short_video") -> SynthConfig:
    """A generator's configuration from `conf/synth`."""
    path = conf_dir() / "synth" / f"{name}.yaml"
    config: SynthConfig = parse(SynthConfig, yaml.safe_load(path.read_text()), str(path))
    return config


class World:
    """The users and items of a seed."""

    def __init__(self, config: SynthConfig, seed: int) -> None:
        self.config = config
        r = np.random.default_rng((seed, 0))
        d, n_users, n_items, n_tasks = config.latent_dim, config.users, config.items, len(config.tasks)
        categories = sorted({t.category for t in config.tasks})

        self.user = r.normal(size=(n_users, d))
        # What is logged about a user tells something of the tastes, not all.
        self.gender = np.where(r.random(n_users) < 0.1, 2, (self.user[:, 0] + r.normal(size=n_users) > 0).astype(int))
        self.age_band = np.digitize(self.user[:, 1] + 0.7 * r.normal(size=n_users), [-1.5, -0.6, 0.1, 0.8, 1.6])
        self.city_level = r.integers(1, 6, n_users)
        self.active_days = np.minimum(r.geometric(0.03, n_users), 365)
        self.user_weight = np.cumsum(r.lognormal(0, 1, n_users))

        self.item_category = r.integers(0, config.categories, n_items)
        centre = r.normal(size=(config.categories, d))
        self.item = 0.8 * centre[self.item_category] + 0.6 * r.normal(size=(n_items, d))
        self.author = r.integers(0, config.authors, n_items)
        self.duration_ms = (1000 * np.clip(r.lognormal(3.0, 0.9, n_items), 3, 600)).astype(np.int64)
        self.quality = r.normal(size=n_items)
        self.is_shop = r.random(n_items) < 0.3
        self.plays = (r.lognormal(6, 2, n_items) * np.exp(0.4 * self.quality)).astype(np.int64)
        self.item_weight = np.cumsum(r.zipf(1.6, n_items).clip(max=2000) * np.exp(0.3 * self.quality))
        # An old item has a click-through rate on record; a new one has none yet.
        self.ctr = np.round(1 / (1 + np.exp(-(0.5 * self.quality + 0.2 * r.normal(size=n_items)))), 4)
        self.is_new = r.random(n_items) < 0.15
        favourite = r.integers(0, config.tags, (config.categories, 12))
        self.item_tags = [
            np.unique(favourite[c, r.integers(0, 12, k)])
            for c, k in zip(self.item_category, r.integers(1, 6, n_items), strict=True)
        ]

        scale = 1 / d  # affinities of unit variance
        self.shared = {c: scale * r.normal(size=(d, d)) for c in categories}
        self.own = scale * r.normal(size=(n_tasks, d, d))
        self.user_bias = 0.4 * r.normal(size=(n_users, n_tasks))
        self.hour_phase = r.uniform(0, 2 * np.pi, n_tasks)


@dataclass
class Block:
    """Rows of the feed: what is logged (column → values), labels and observed flags `[T, N]`, true probabilities `[T, N]`."""

    columns: dict[str, npt.NDArray[Any]]
    items: Ints
    labels: npt.NDArray[np.bool_]
    observed: npt.NDArray[np.bool_]
    truth: Floats


def draw_block(world: World, seed: int, number: int, rows: int) -> Block:
    """Rows number·BLOCK_ROWS …; the same whatever else is drawn, and a shorter block is the beginning of a longer one."""
    config = world.config
    r = np.random.default_rng((seed, 1, number))
    n = BLOCK_ROWS  # always a whole block of randomness: a prefix of the feed does not depend on its length
    users = np.searchsorted(world.user_weight, r.random(n) * world.user_weight[-1])
    # Four candidates by popularity, of which the feed shows the one that seems to fit best.
    candidates = np.searchsorted(world.item_weight, r.random((n, 4)) * world.item_weight[-1])
    fit = np.einsum("nd,nkd->nk", world.user[users], world.item[candidates])
    items = candidates[np.arange(n), (0.5 * fit + r.gumbel(size=(n, 4))).argmax(1)]
    seconds = (number * BLOCK_ROWS + np.arange(n)) * config.seconds_per_row
    hour = (seconds // 3600 % 24).astype(np.int64)
    network = r.choice(4, n, p=[0.55, 0.25, 0.16, 0.04])
    tab = r.choice(4, n, p=[0.8, 0.1, 0.05, 0.05])
    position = r.integers(1, 21, n)

    u, i = world.user[users], world.item[items]
    affinity = {category: np.einsum("nd,de,ne->n", u, w, i, optimize=True) for category, w in world.shared.items()}
    length = np.log(world.duration_ms[items] / 20_000)
    logits = np.empty((len(config.tasks), n))
    for t, task in enumerate(config.tasks):
        own = np.einsum("nd,de,ne->n", u, world.own[t], i, optimize=True)
        logits[t] = (
            task.bias
            + task.shared * affinity[task.category]
            + task.own * own
            + task.quality * world.quality[items]
            + world.user_bias[users, t]
            + task.duration * length
            + 0.2 * np.cos(2 * np.pi * hour / 24 + world.hour_phase[t])
            - 0.02 * position
        )
    truth = 1 / (1 + np.exp(-logits))
    labels = r.random(truth.shape) < truth
    observed = np.ones_like(labels)
    already_followed = r.random(n) < 0.1
    for t, task in enumerate(config.tasks):
        if task.name in ("long_view", "finish", "replay"):
            observed[t] = network != NETWORKS.index("offline")
        elif task.name == "follow":
            observed[t] = ~already_followed
        elif task.name == "purchase":
            observed[t] = world.is_shop[items]
    columns = {
        "time_s": seconds.astype(np.int64),
        "user_id": users,
        "gender": world.gender[users],
        "age_band": world.age_band[users],
        "city_level": world.city_level[users],
        "active_days": world.active_days[users],
        "item_id": items,
        "author_id": world.author[items],
        "item_category": world.item_category[items],
        "duration_ms": world.duration_ms[items],
        "item_plays": world.plays[items],
        "item_ctr": np.where(world.is_new[items], np.nan, world.ctr[items]),
        "is_shop": world.is_shop[items],
        "hour": hour,
        "weekday": (seconds // 86400 % 7).astype(np.int64),
        "network": network,
        "tab": tab,
        "position": position,
    }
    return Block(
        {name: values[:rows] for name, values in columns.items()},
        items[:rows],
        labels[:, :rows],
        observed[:, :rows],
        truth[:, :rows],
    )


def synthesise(folder: Path, rows: int, seed: int, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Write `rows` rows to `folder` (logs/, truth/, synth.json) and return what synth.json says.

    Memory does not grow with `rows`. The folder appears whole or not at all.

    Raises:
        UserError: the folder is there already, or can't be written.
    """
    config = load_synth_config()
    with new_folder(folder) as temporary:
        summary = _write(config, temporary, rows, seed, progress)
        write_json(temporary / "synth.json", summary)
    return summary


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder with logs/ and truth/ that gets its name when everything is written."""
    if folder.exists():
        raise UserError(f"{str(folder)!r} exists already; name a new folder or delete it")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        (temporary / "logs").mkdir(parents=True)
        (temporary / "truth").mkdir()
    except OSError as error:
        raise UserError(f"{str(folder)!r} can't be written ({error.strerror}); choose another folder") from None
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(config: SynthConfig, folder: Path, rows: int, seed: int, progress: Callable[[int], None]) -> dict[str, Any]:
    world = World(config, seed)
    digest = hashlib.sha256()
    histogram = np.zeros((len(config.tasks), 2, _AUC_BINS), np.int64)
    for file_number, file_start in enumerate(range(0, rows, FILE_ROWS)):
        logs, truth = (folder / kind / f"part-{file_number:05d}.parquet" for kind in ("logs", "truth"))
        writers: dict[Path, pq.ParquetWriter] = {}
        for start in range(file_start, min(file_start + FILE_ROWS, rows), BLOCK_ROWS):
            block = draw_block(world, seed, start // BLOCK_ROWS, min(BLOCK_ROWS, rows - start))
            digest_block(digest, block)
            histogram += _histogram(block)
            for path, table in ((logs, logs_table(world, block)), (truth, _truth_table(config, block))):
                if path not in writers:
                    writers[path] = pq.ParquetWriter(path, table.schema)
                writers[path].write_table(table)
            progress(start + len(block.items))
        for writer in writers.values():
            writer.close()
    tasks = {}
    for t, task in enumerate(config.tasks):
        negative, positive = histogram[t]
        tasks[task.name] = {
            "category": task.category,
            "observed": int(histogram[t].sum()),
            "rate": float(positive.sum() / max(histogram[t].sum(), 1)),
            "best_auc": _auc(negative, positive),
        }
    return {"version": config.version, "seed": seed, "rows": rows, "digest": digest.hexdigest(), "tasks": tasks}


def digest_block(digest: Any, block: Block) -> None:
    """Feed a block's logged values, labels and observed flags to a hash."""
    for name, values in block.columns.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(values, np.float64 if values.dtype.kind == "f" else np.int64).tobytes())
    digest.update(np.packbits(block.labels & block.observed).tobytes())
    digest.update(np.packbits(block.observed).tobytes())


def logs_table(world: World, block: Block) -> pa.Table:
    """What a recommender would have logged."""
    named = {"gender": GENDERS, "age_band": AGE_BANDS, "network": NETWORKS, "tab": TABS}
    columns = {}
    for name, values in block.columns.items():
        if name in named:
            columns[name] = pa.DictionaryArray.from_arrays(values.astype(np.int32), pa.array(named[name])).cast(pa.string())
        else:
            columns[name] = pa.array(values, from_pandas=True)  # NaN: not on record, null
        if name == "item_id":
            chosen = [world.item_tags[item] for item in block.items]
            offsets = np.cumsum([0, *map(len, chosen)], dtype=np.int32)
            columns["tags"] = pa.ListArray.from_arrays(offsets, np.concatenate(chosen).astype(np.int32))
    for t, task in enumerate(world.config.tasks):
        columns[task.name] = pa.array(block.labels[t].astype(np.int8), mask=~block.observed[t])
    return pa.table(columns)


def _truth_table(config: SynthConfig, block: Block) -> pa.Table:
    return pa.table({task.name: block.truth[t].astype(np.float32) for t, task in enumerate(config.tasks)})


def _histogram(block: Block) -> npt.NDArray[np.int64]:
    """Counts `[T, 2, bins]` of observed negatives and positives by true logit, fine enough for an AUC to four digits."""
    logit = np.log(block.truth / (1 - block.truth))
    bins = ((logit + 16) / 32 * _AUC_BINS).clip(0, _AUC_BINS - 1).astype(np.int64)
    out = np.zeros((len(logit), 2, _AUC_BINS), np.int64)
    for t in range(len(logit)):
        for label in (0, 1):
            chosen = bins[t][block.observed[t] & (block.labels[t] == bool(label))]
            out[t, label] = np.bincount(chosen, minlength=_AUC_BINS)
    return out


def _auc(negative: Ints, positive: Ints) -> float | None:
    if not negative.sum() or not positive.sum():
        return None
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def read_truth(folder: Path) -> pa.Table:
    """The true probabilities of a synthetic feed, row for row with its logs."""
    return pa.concat_tables([pq.read_table(path) for path in sorted((folder / "truth").glob("*.parquet"))])


def read_summary(folder: Path) -> dict[str, Any]:
    """What synth.json says."""
    summary: dict[str, Any] = json.loads((folder / "synth.json").read_text())
    return summary
