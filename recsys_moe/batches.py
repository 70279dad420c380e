"""Shuffled training batches from memory-mapped shards, in bounded memory.

Blocks of rows are drawn in random order, gathered into pools, and shuffled within a pool: data up to a pool's size is
shuffled whole. The order depends on the seed and the epoch alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys_moe.shards import MappedShard, PreparedData, Rows
from recsys_moe.transforms import Inputs

BLOCK_ROWS = 32_768
POOL_ROWS = 8 * BLOCK_ROWS


@dataclass
class Batch:
    """B rows as tensors: ids int32 `[F, B]`, dense fp32 `[B, D]`, labels and weights fp32 `[B, T]`."""

    ids_fb: Tensor
    dense_bd: Tensor
    labels_bt: Tensor
    weights_bt: Tensor

    @classmethod
    def of(cls, rows: Rows) -> "Batch":
        return cls(
            torch.from_numpy(rows.inputs.ids),
            torch.from_numpy(rows.inputs.dense).t().contiguous(),
            torch.from_numpy(rows.labels).t().contiguous(),
            torch.from_numpy(rows.weights).t().contiguous(),
        )

    def __len__(self) -> int:
        return self.labels_bt.shape[0]


def shuffled_batches(data: PreparedData, part: str, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Every row of the part once, in batches of `batch_size`; the last one may be smaller."""
    random = np.random.default_rng((seed, epoch))
    rest: Rows | None = None
    for pool in _pools(data.shards(part), random):
        pool = pool if rest is None else _concatenate([rest, pool])
        order = random.permutation(len(pool))
        whole = len(pool) - len(pool) % batch_size
        for low in range(0, whole, batch_size):
            yield Batch.of(_take(pool, order[low : low + batch_size]))
        rest = _take(pool, order[whole:])
    if rest is not None and len(rest):
        yield Batch.of(rest)


def ordered_rows(data: PreparedData, part: str, block: int = BLOCK_ROWS) -> Iterator[Rows]:
    """Every row of the part, in the shards' order."""
    for shard in data.shards(part):
        for low in range(0, len(shard), block):
            yield shard.rows(low, low + block)


def _pools(shards: list[MappedShard], random: np.random.Generator) -> Iterator[Rows]:
    blocks = [(shard, low) for shard in shards for low in range(0, len(shard), BLOCK_ROWS)]
    chosen: list[Rows] = []
    for number in random.permutation(len(blocks)):
        shard, low = blocks[number]
        chosen.append(shard.rows(low, low + BLOCK_ROWS))
        if sum(map(len, chosen)) >= POOL_ROWS:
            yield _concatenate(chosen)
            chosen = []
    if chosen:
        yield _concatenate(chosen)


def _concatenate(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return Rows(
        Inputs(
            np.concatenate([p.inputs.ids for p in parts], axis=1),
            np.concatenate([p.inputs.dense for p in parts], axis=1),
        ),
        np.concatenate([p.labels for p in parts], axis=1),
        np.concatenate([p.weights for p in parts], axis=1),
        None,  # groups are for evaluation, which does not shuffle
    )


def _take(rows: Rows, index: np.ndarray) -> Rows:
    return Rows(
        Inputs(rows.inputs.ids[:, index], rows.inputs.dense[:, index]),
        rows.labels[:, index],
        rows.weights[:, index],
        None,
    )
