"""Shuffled training batches from memory-mapped shards, in bounded memory.

Blocks of rows are drawn in random order, gathered into pools, and shuffled within a pool: data up to a pool's size is
shuffled whole. The order depends on the seed and the epoch alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recsys_moe.embeddings import JaggedTensor, concatenate_rows, jagged_tensors, take_rows
from recsys_moe.shards import PreparedData, Rows

BLOCK_ROWS = 32_768
POOL_ROWS = 8 * BLOCK_ROWS


@dataclass
class Batch:
    """B rows, row-major: ids int32 `[B, F]`, dense fp32 `[B, D]`, labels and weights fp32 `[B, T]`, and `lists`, for each
    feature of many ids a row its int32 ids and where each row's begin."""

    ids_bf: Tensor
    dense_bd: Tensor
    labels_bt: Tensor
    weights_bt: Tensor
    lists: tuple[JaggedTensor, ...] = ()

    @classmethod
    def of(cls, rows: Rows) -> "Batch":
        columns = (rows.inputs.ids, rows.inputs.dense, rows.labels, rows.weights)
        ids, dense, labels, weights = (torch.from_numpy(c).t().contiguous() for c in columns)
        return cls(ids, dense, labels, weights, jagged_tensors(rows.inputs))

    @classmethod
    def concatenate(cls, batches: list["Batch"]) -> "Batch":
        ids, dense, labels, weights = (torch.cat(parts) for parts in zip(*map(_tensors, batches), strict=True))
        lists = zip(*(batch.lists for batch in batches), strict=True)
        return cls(ids, dense, labels, weights, tuple(map(concatenate_rows, lists)))

    def take(self, index: Tensor) -> "Batch":
        # Whole rows lie together: gathering them is ten times faster than picking from every column.
        ids, dense, labels, weights = (tensor.index_select(0, index) for tensor in _tensors(self))
        return Batch(ids, dense, labels, weights, tuple(take_rows(rows, index) for rows in self.lists))

    def __len__(self) -> int:
        return self.labels_bt.shape[0]


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return batch.ids_bf, batch.dense_bd, batch.labels_bt, batch.weights_bt


class ShuffledBatches:
    """Training batches of a part: `epoch(n)` yields every row once, in batches of `batch_size`; the last may be smaller.

    A part that fits into one pool is gathered once and kept: gathering it anew took a tenth of an epoch of a small model.
    """

    def __init__(self, data: PreparedData, part: str, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed = batch_size, seed
        self._shards = data.shards(part)
        whole = data.manifest.rows(part) <= POOL_ROWS
        self._pool = Batch.concatenate([b for pool in self._pools(None) for b in pool]) if whole else None

    def epoch(self, number: int) -> Iterator[Batch]:
        random = np.random.default_rng((self.seed, number))
        rest: list[Batch] = []
        for blocks in [[self._pool]] if self._pool else self._pools(random):
            parts = rest + blocks
            pool = parts[0] if len(parts) == 1 else Batch.concatenate(parts)
            order = torch.from_numpy(random.permutation(len(pool)))
            whole = len(pool) - len(pool) % self.batch_size
            for low in range(0, whole, self.batch_size):
                yield pool.take(order[low : low + self.batch_size])
            rest = [pool.take(order[whole:])]
        if rest and len(rest[0]):
            yield rest[0]

    def _pools(self, random: np.random.Generator | None) -> Iterator[list[Batch]]:
        """The blocks in random order (None: in the shards'), pool by pool."""
        blocks = [(shard, low) for shard in self._shards for low in range(0, len(shard), BLOCK_ROWS)]
        chosen: list[Batch] = []
        for number in range(len(blocks)) if random is None else random.permutation(len(blocks)):
            shard, low = blocks[number]
            chosen.append(Batch.of(shard.rows(low, low + BLOCK_ROWS)))
            if sum(map(len, chosen)) >= POOL_ROWS:
                yield chosen
                chosen = []
        if chosen:
            yield chosen


def ordered_rows(data: PreparedData, part: str, block: int = BLOCK_ROWS) -> Iterator[Rows]:
    """Every row of the part, in the shards' order."""
    for shard in data.shards(part):
        for low in range(0, len(shard), block):
            yield shard.rows(low, low + block)
