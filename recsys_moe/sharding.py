"""Embedding tables shared out among workers, by torchrec's DistributedModelParallel: each whole on one of them, or, if that
would be too much for one, so many rows on each."""

import heapq
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec.distributed import comm_ops
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_moe.distributed import rank, world_size
from recsys_moe.embeddings import ADAGRAD, Pooling, drawn_rows, table_configs
from recsys_moe.tensorfiles import CHUNK_BYTES, Rows

# torchrec's own calls, at every step of a split table.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)

SPLIT_BYTES = 2**26
"""A table up to this size is never split, however small the others are: its rows would travel further for no memory's sake."""


class ShardedEmbeddings(nn.Module):
    """`FusedEmbeddings` over several workers: the same tables from the same random numbers, updated by the same Adagrad.

    Ids travel to the worker that holds their rows, vectors travel back, and so do gradients, which are summed over the
    workers: a loss has to be divided by the sums over the whole batch. `state_dict` and `adagrad` hold this worker's rows
    only, under the names that `tensorfiles.Rows` gives them. Every worker must call `forward` as often as the others do; a
    batch of no rows is fine.
    """

    def __init__(
        self, names: list[str], cardinalities: list[int], width: int, pooling: Pooling = "sum", zeros: bool = False
    ) -> None:
        super().__init__()
        self._names, self.width, self._mean = names, width, pooling == "mean"
        # Always sums: torchrec's mean over a split table adds a millionth to every length.
        configs = table_configs(names, cardinalities, width, "sum")
        # Losses are sums over the workers' pieces here, not means over the workers.
        comm_ops.set_gradient_division(False)
        collection = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
        fused = {
            "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            "learning_rate": ADAGRAD["lr"],
            "eps": ADAGRAD["eps"],
            "bounds_check_mode": BoundsCheckMode.NONE,
        }
        sharder = EmbeddingBagCollectionSharder(fused_params=fused)
        owners = _share_out({c.name: (c.num_embeddings, width) for c in configs})
        self._split = None in owners.values()
        kernel = EmbeddingComputeKernel.FUSED.value
        tables = {
            name: row_wise(compute_kernel=kernel) if owner is None else table_wise(owner, compute_kernel=kernel)
            for name, owner in owners.items()
        }
        plan = construct_module_sharding_plan(
            collection, tables, sharder, local_size=world_size(), world_size=world_size(), device_type="cpu"
        )
        self.pieces = {_weight_name(c.name): _pieces(plan[c.name], _weight_name(c.name), c.num_embeddings) for c in configs}
        assert dist.group.WORLD is not None
        with torch.random.fork_rng(devices=[]):  # torchrec draws tables, which are drawn below as one worker does
            model = DistributedModelParallel(
                collection,
                env=ShardingEnv.from_process_group(dist.group.WORLD),
                device=torch.device("cpu"),
                plan=ShardingPlan({"": plan}),
                sharders=[sharder],
                init_data_parallel=False,
            )
        # Not as a submodule: its state would be torchrec's sharded tensors, in every worker's state.
        self._parallel = (model,)
        sharded = model.module.state_dict()
        self._mine = {name: rows for name, pieces in self.pieces.items() if (rows := pieces.get(rank())) is not None}
        self._weights = {rows.key: _local(sharded[name]) for name, rows in self._mine.items()}
        if zeros:
            for weight in self._weights.values():
                weight.zero_()
            return
        for config in configs:
            mine = self._mine.get(_weight_name(config.name))
            for low, drawn_rd in drawn_rows(config):  # all of it: the random numbers have to be one worker's
                if mine is not None and (first := max(low, mine.low)) < (end := min(low + len(drawn_rd), mine.high)):
                    self._weights[mine.key][first - mine.low : end - mine.low] = drawn_rd[first - low : end - low]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        rows, keys = features.stride(), len(features.keys())
        lengths, offsets, stride = features.lengths(), features.offsets(), rows
        if self._split:
            # Gradients to a split table are gathered, which gloo does with equal pieces only: some rows without ids fill up.
            most = torch.tensor(rows)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            stride = int(most)
            lengths = F.pad(lengths.view(keys, rows), (0, stride - rows)).flatten()
            offsets = F.pad(lengths.cumsum(0), (1, 0)).to(offsets.dtype)
        # torchrec asks for these counts, and can't tell how many features an empty batch has.
        counted = KeyedJaggedTensor(
            features.keys(),
            features.values(),
            features.weights_or_none(),
            lengths,
            offsets,
            stride=stride,
            length_per_key=None if stride else [0] * keys,
        )
        vectors = self._parallel[0](counted).to_dict()  # table by table as the workers have them
        pooled = [vectors[name][:rows] for name in self._names]
        if self._mean:
            counts = dict(zip(features.keys(), features.lengths().view(keys, rows, 1).clamp_min(1), strict=True))
            pooled = [vector / counts[name] for name, vector in zip(self._names, pooled, strict=True)]
        return KeyedTensor.from_tensor_list(self._names, pooled)

    def set_lr(self, rate: float) -> None:
        """The learning rate from the next backward pass on."""
        optimizer = self._parallel[0].module.fused_optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()  # applies nothing but the rate

    def adagrad(self) -> dict[str, Tensor]:
        """Adagrad's sums of squares for each row of this worker, by the names that the rows have in `state_dict`."""
        states = self._parallel[0].module.fused_optimizer.state_dict()["state"]
        return {rows.key: _local(next(iter(states[name].values()))) for name, rows in self._mine.items()}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: weight for name, weight in self._weights.items()})


def _weight_name(table: str) -> str:
    return f"embedding_bags.{table}.weight"


def _share_out(shapes: dict[str, tuple[int, int]]) -> dict[str, int | None]:
    """Which worker holds each table: the largest first, each to the one that holds the fewest rows (then tables) so far.

    None: all of them, so many rows each, since it is more than a worker's share of all tables.
    """
    share = sum(rows for rows, _ in shapes.values()) / world_size()
    held = [(0, 0, worker) for worker in range(world_size())]
    owners: dict[str, int | None] = {}
    for name, (rows, width) in sorted(shapes.items(), key=lambda item: -item[1][0]):
        if rows > share and rows * width * torch.float32.itemsize > SPLIT_BYTES:
            owners[name] = None
            continue
        has_rows, has_tables, worker = heapq.heappop(held)
        owners[name] = worker
        heapq.heappush(held, (has_rows + rows, has_tables + 1, worker))
    return owners


def _pieces(planned: Any, name: str, total: int) -> dict[int, Rows]:
    """The rows of a table that each worker has."""
    shards = planned.sharding_spec.shards
    return {
        shard.placement.rank(): Rows(name, shard.shard_offsets[0], shard.shard_offsets[0] + shard.shard_sizes[0], total)
        for shard in shards
    }


def _local(sharded: Any) -> Tensor:
    """This worker's piece of a sharded tensor."""
    (shard,) = sharded.local_shards()
    tensor: Tensor = shard.tensor
    return tensor


@dataclass(frozen=True)
class SharedTable:
    """A table, or one number for each of its rows, that lies with several workers: worker 0 gets it chunk by chunk.

    Whoever goes through the chunks, all workers have to; those that are not the first send what they have, and see none.
    """

    shape: tuple[int, ...]
    pieces: Mapping[int, Rows]
    mine: Tensor | None
    dtype: torch.dtype = torch.float32

    def chunks(self) -> Iterator[Tensor]:
        row = torch.Size(self.shape[1:]).numel() * self.dtype.itemsize
        step = max(1, CHUNK_BYTES // row)
        for worker, rows in sorted(self.pieces.items(), key=lambda item: item[1].low):
            if rank() not in (0, worker):
                continue
            buffer = torch.empty(0 if rank() == worker else min(step, rows.high - rows.low), *self.shape[1:], dtype=self.dtype)
            for low in range(rows.low, rows.high, step):
                high = min(low + step, rows.high)
                if rank() == worker:
                    assert self.mine is not None
                    chunk = self.mine[low - rows.low : high - rows.low]
                    if worker:
                        dist.send(chunk, 0)
                        continue
                else:
                    chunk = buffer[: high - low]  # the same memory each time: whoever takes a chunk is done with the one before
                    dist.recv(chunk, worker)
                yield chunk


def whole_tables(model: nn.Module, tensors: Mapping[str, Tensor], per_row: bool = False) -> dict[str, SharedTable]:
    """All tables of a model. `tensors` has this worker's rows, by their names in its state; with `per_row`, a number a row."""
    found = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, ShardedEmbeddings):
            continue
        for name, pieces in module.pieces.items():
            mine = pieces.get(rank())
            total = next(iter(pieces.values())).total
            shape = (total,) if per_row else (total, module.width)
            held = None if mine is None else tensors[f"{prefix}.{mine.key}"]
            found[f"{prefix}.{name}"] = SharedTable(shape, pieces, held)
    return found
