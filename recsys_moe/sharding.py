"""Embedding tables shared out among workers, each table whole on one of them: torchrec's DistributedModelParallel."""

import heapq
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torch import Tensor, nn
from torchrec.distributed import comm_ops
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from recsys_moe.distributed import rank, world_size
from recsys_moe.embeddings import ADAGRAD, Pooling, draw_table, table_configs

_SEND_BYTES = 2**28


class ShardedEmbeddings(nn.Module):
    """`FusedEmbeddings` over several workers: the same tables from the same random numbers, updated by the same Adagrad.

    Ids travel to the worker that holds their table, vectors travel back, and so do gradients, which are summed over the
    workers: a loss has to be divided by the sums over the whole batch. `state_dict` and `adagrad` hold this worker's tables
    only; `load_state_dict` takes what it needs from a state of any tables. Every worker must call `forward` as often as the
    others do; a batch of no rows is fine.
    """

    def __init__(self, names: list[str], cardinalities: list[int], width: int, pooling: Pooling = "sum") -> None:
        super().__init__()
        self._names = names
        configs = table_configs(names, cardinalities, width, pooling)
        self._shapes = {f"embedding_bags.{c.name}.weight": (c.num_embeddings, width) for c in configs}
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
        self.owners = _share_out(self._shapes)
        fused_kernel = EmbeddingComputeKernel.FUSED.value
        tables = {
            c.name: table_wise(self.owners[f"embedding_bags.{c.name}.weight"], compute_kernel=fused_kernel) for c in configs
        }
        plan = construct_module_sharding_plan(
            collection, tables, sharder, local_size=world_size(), world_size=world_size(), device_type="cpu"
        )
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
        self._weights = {k: _local(v) for k, v in model.module.state_dict().items() if self.owners[k] == rank()}
        for config in configs:  # one table at a time: all of them may not fit into one worker
            table = torch.empty(config.num_embeddings, width)
            draw_table(table, config)
            mine = self._weights.get(f"embedding_bags.{config.name}.weight")
            if mine is not None:
                mine.copy_(table)

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        rows = features.stride()
        # torchrec asks for these counts, and can't tell how many features an empty batch has.
        counted = KeyedJaggedTensor(
            features.keys(),
            features.values(),
            features.weights_or_none(),
            features.lengths(),
            features.offsets(),
            stride=rows,
            length_per_key=None if rows else [0] * len(features.keys()),
        )
        vectors = self._parallel[0](counted).to_dict()  # table by table as the workers have them
        return KeyedTensor.from_tensor_list(self._names, [vectors[name] for name in self._names])

    def set_lr(self, rate: float) -> None:
        """The learning rate from the next backward pass on."""
        optimizer = self._parallel[0].module.fused_optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()  # applies nothing but the rate

    def adagrad(self) -> dict[str, Tensor]:
        """Adagrad's sums of squares for each table of this worker, by the table's name in `state_dict`."""
        states = self._parallel[0].module.fused_optimizer.state_dict()["state"]
        return {name: _local(next(iter(states[name].values()))) for name in self._weights}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: weight for name, weight in self._weights.items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name, weight in self._weights.items():
            weight.copy_(state_dict[prefix + name])


def _share_out(shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Which worker holds each table: the largest first, each to the one that holds the fewest rows (then tables) so far."""
    held = [(0, 0, worker) for worker in range(world_size())]
    owners = {}
    for name, (rows, _) in sorted(shapes.items(), key=lambda item: -item[1][0]):
        has_rows, has_tables, worker = heapq.heappop(held)
        owners[name] = worker
        heapq.heappush(held, (has_rows + rows, has_tables + 1, worker))
    return owners


def _local(sharded: Any) -> Tensor:
    """This worker's piece of a sharded tensor: with whole tables, all of it."""
    (shard,) = sharded.local_shards()
    tensor: Tensor = shard.tensor
    return tensor


def gather_tables(model: nn.Module, tensors: Mapping[str, Tensor], per_row: bool = False) -> dict[str, Tensor]:
    """`tensors` with those of all tables, on worker 0; the others send theirs and get what they have. All must call it.

    `tensors` has this worker's tables, by their names in the model's state, or (`per_row`) one number a row of each.
    """
    state = dict(tensors)
    for prefix, module in model.named_modules():
        if not isinstance(module, ShardedEmbeddings):
            continue
        for name, owner in module.owners.items():
            key = f"{prefix}.{name}"
            if owner == 0 or rank() not in (0, owner):
                continue
            shape = module._shapes[name][:1] if per_row else module._shapes[name]
            table = state[key] if rank() == owner else torch.empty(shape)
            for chunk in table.split(max(1, _SEND_BYTES // max(1, table[:1].nbytes))):
                dist.recv(chunk, owner) if rank() == 0 else dist.send(chunk, 0)
            state[key] = table
    return state
