"""Shuffled training batches from memory-mapped shards, in bounded memory.

Blocks of rows are drawn in random order, gathered into pools, and shuffled within a pool: data up to a pool's size is
shuffled whole. The order depends on the seed and the epoch alone: of several workers, each takes its piece of every batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recsys_moe.distributed import piece
from recsys_moe.embeddings import JaggedTensor, concatenate_rows, jagged_tensors, take_rows
from recsys_moe.shards import PreparedData, Rows

BLOCK_ROWS = 32_768
POOL_ROWS = 8 * BLOCK_ROWS

Block = tuple[int, int]
"""The number of its first row, and how many there are, all in one shard."""


@dataclass
class Batch:
    """B rows, row-major: ids int32 `[B, F + H]`, dense fp32 `[B, D]`, labels and weights fp32 `[B, T]`; `numbers_b` int64 `[B]`
    says which rows of the part they are. `lists` has, for each feature of many ids a row, its int32 ids and where each row's
    begin."""

    ids_bf: Tensor
    dense_bd: Tensor
    labels_bt: Tensor
    weights_bt: Tensor
    numbers_b: Tensor
    lists: tuple[JaggedTensor, ...] = ()

    @classmethod
    def of(cls, rows: Rows, first: int = 0) -> "Batch":
        """The rows number `first`, `first + 1`, … of their part."""
        columns = (rows.inputs.ids, rows.inputs.dense, rows.labels, rows.weights)
        ids, dense, labels, weights = (torch.from_numpy(c).t().contiguous() for c in columns)
        numbers = torch.arange(first, first + len(rows))
        return cls(ids, dense, labels, weights, numbers, jagged_tensors(rows.inputs))

    @classmethod
    def concatenate(cls, batches: list["Batch"]) -> "Batch":
        ids, dense, labels, weights, numbers = (torch.cat(parts) for parts in zip(*map(_tensors, batches), strict=True))
        lists = zip(*(batch.lists for batch in batches), strict=True)
        return cls(ids, dense, labels, weights, numbers, tuple(map(concatenate_rows, lists)))

    def take(self, index: Tensor) -> "Batch":
        # Whole rows lie together: gathering them is ten times faster than picking from every column.
        ids, dense, labels, weights, numbers = (tensor.index_select(0, index) for tensor in _tensors(self))
        return Batch(ids, dense, labels, weights, numbers, tuple(take_rows(rows, index) for rows in self.lists))

    def to(self, device: torch.device) -> "Batch":
        if self.labels_bt.device == device:
            return self
        lists = tuple(rows.to(device) for rows in self.lists)
        ids, dense, labels, weights, numbers = (tensor.to(device) for tensor in _tensors(self))
        return Batch(ids, dense, labels, weights, numbers, lists)

    def __len__(self) -> int:
        return self.labels_bt.shape[0]


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return batch.ids_bf, batch.dense_bd, batch.labels_bt, batch.weights_bt, batch.numbers_b


class ShuffledBatches:
    """Training batches of a part: `epoch(n)` yields every row once, in batches of `batch_size`; the last may be smaller.

    Worker `rank` of `world` gets its `piece` of each batch. A part that fits into one pool is gathered once and kept:
    gathering it anew took a tenth of an epoch of a small model.
    """

    def __init__(self, data: PreparedData, part: str, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self._shards = data.shards(part)
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self._kept = self._read_all(list(self._blocks())) if self._starts[-1] <= POOL_ROWS else None

    def epoch(self, number: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number`, without reading those before batch `skip`."""
        random = np.random.default_rng((self.seed, number))
        rest, rest_numbers = None, np.empty(0, np.int64)  # what filled no batch of the pool before
        for blocks in [list(self._blocks())] if self._kept is not None else self._pools(random):
            numbers = np.concatenate([rest_numbers, *(np.arange(first, first + rows) for first, rows in blocks)])
            order = random.permutation(len(numbers))
            whole = len(numbers) - len(numbers) % self.batch_size
            start = min(skip * self.batch_size, whole)
            skip -= start // self.batch_size
            if skip == 0:
                before = [rest or self._read_rows(rest_numbers)] if len(rest_numbers) else []
                pool = self._kept or self._read_all(blocks, before)
                for low in range(start, whole, self.batch_size):
                    yield self._mine(pool, order[low : low + self.batch_size])
                rest = pool.take(torch.from_numpy(order[whole:]))
            rest_numbers = numbers[order[whole:]]
        if len(rest_numbers) and skip == 0:
            yield self._mine(rest or self._read_rows(rest_numbers), np.arange(len(rest_numbers)))

    def _mine(self, pool: Batch, order: npt.NDArray[np.int64]) -> Batch:
        return pool.take(torch.from_numpy(order[piece(len(order), self.rank, self.world)]))

    def _pools(self, random: np.random.Generator) -> Iterator[list[Block]]:
        """The blocks in random order, pool by pool."""
        blocks = list(self._blocks())
        chosen: list[Block] = []
        for number in random.permutation(len(blocks)):
            chosen.append(blocks[number])
            if sum(rows for _, rows in chosen) >= POOL_ROWS:
                yield chosen
                chosen = []
        if chosen:
            yield chosen

    def _blocks(self) -> Iterator[Block]:
        for start, shard in zip(self._starts, self._shards, strict=False):
            for low in range(0, len(shard), BLOCK_ROWS):
                yield int(start) + low, min(BLOCK_ROWS, len(shard) - low)

    def _read_all(self, blocks: list[Block], before: Sequence[Batch] = ()) -> Batch:
        batches = [*before, *(self._read(first, rows) for first, rows in blocks)]
        return batches[0] if len(batches) == 1 else Batch.concatenate(batches)

    def _read_rows(self, numbers: npt.NDArray[np.int64]) -> Batch:
        return self._read_all([(number, 1) for number in numbers.tolist()])

    def _read(self, first: int, rows: int) -> Batch:
        shard = int(np.searchsorted(self._starts, first, side="right")) - 1
        low = first - int(self._starts[shard])
        return Batch.of(self._shards[shard].rows(low, low + rows), first)


def ordered_rows(data: PreparedData, part: str, block: int = BLOCK_ROWS) -> Iterator[Rows]:
    """Every row of the part, in the shards' order."""
    for shard in data.shards(part):
        for low in range(0, len(shard), block):
            yield shard.rows(low, low + block)
