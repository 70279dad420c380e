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

BLOCK_ROWS = 32_768
POOL_ROWS = 8 * BLOCK_ROWS


@dataclass
class Batch:
    """B rows, row-major: ids int32 `[B, F]`, dense fp32 `[B, D]`, labels and weights fp32 `[B, T]`."""

    ids_bf: Tensor
    dense_bd: Tensor
    labels_bt: Tensor
    weights_bt: Tensor

    @classmethod
    def of(cls, rows: Rows) -> "Batch":
        columns = (rows.inputs.ids, rows.inputs.dense, rows.labels, rows.weights)
        return cls(*(torch.from_numpy(c).t().contiguous() for c in columns))

    @classmethod
    def concatenate(cls, batches: list["Batch"]) -> "Batch":
        return cls(*(torch.cat(parts) for parts in zip(*map(_tensors, batches), strict=True)))

    def take(self, index: Tensor) -> "Batch":
        # Whole rows lie together: gathering them is ten times faster than picking from every column.
        return Batch(*(tensor.index_select(0, index) for tensor in _tensors(self)))

    def __len__(self) -> int:
        return self.labels_bt.shape[0]


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return batch.ids_bf, batch.dense_bd, batch.labels_bt, batch.weights_bt


def shuffled_batches(data: PreparedData, part: str, batch_size: int, seed: int, epoch: int) -> Iterator[Batch]:
    """Every row of the part once, in batches of `batch_size`; the last one may be smaller."""
    random = np.random.default_rng((seed, epoch))
    rest: list[Batch] = []
    for blocks in _pools(data.shards(part), random):
        pool = Batch.concatenate(rest + blocks)
        order = torch.from_numpy(random.permutation(len(pool)))
        whole = len(pool) - len(pool) % batch_size
        for low in range(0, whole, batch_size):
            yield pool.take(order[low : low + batch_size])
        rest = [pool.take(order[whole:])]
    if rest and len(rest[0]):
        yield rest[0]


def ordered_rows(data: PreparedData, part: str, block: int = BLOCK_ROWS) -> Iterator[Rows]:
    """Every row of the part, in the shards' order."""
    for shard in data.shards(part):
        for low in range(0, len(shard), block):
            yield shard.rows(low, low + block)


def _pools(shards: list[MappedShard], random: np.random.Generator) -> Iterator[list[Batch]]:
    blocks = [(shard, low) for shard in shards for low in range(0, len(shard), BLOCK_ROWS)]
    chosen: list[Batch] = []
    for number in random.permutation(len(blocks)):
        shard, low = blocks[number]
        chosen.append(Batch.of(shard.rows(low, low + BLOCK_ROWS)))
        if sum(map(len, chosen)) >= POOL_ROWS:
            yield chosen
            chosen = []
    if chosen:
        yield chosen
