"""A whole model: torchrec embeddings in front, a family's network behind."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.embeddings import (
    FusedEmbeddings,
    JaggedTensor,
    KeyedJaggedTensor,
    one_id_each,
    pooled_ids,
    table_name,
    table_pooling,
)
from recsys_moe.first_order import FirstOrder
from recsys_moe.front import Front, check_attention
from recsys_moe.models import MODELS
from recsys_moe.own_rows import OwnRows
from recsys_moe.routing import RoutingPlan
from recsys_moe.transforms import ListInput

CPU = torch.device("cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Ranker(nn.Module):
    """ids int32 `[B, F + H]`, dense inputs `[B, D]` and lists of ids → outputs `[B, Σ widths]`: `tasks` has each tower's width.

    Embeddings are updated inside the backward pass (see `FusedEmbeddings`): `dense_parameters` are what is left for an
    optimizer of one's own, `set_embedding_lr` sets the embeddings' rate. `config.dropout` is of their values too, in
    training: nothing else regularises them. `start` has the outputs that a fresh model starts at, task by task (None: the
    weights are loaded). The last H of `sparse_names`, `own_rows`, are features whose ids have rows of their own: they arrive
    as two int32 each, the halves of a hash, and training gives them rows. `config.front` may put attention and crosses before
    the network and a linear model beside it, and a family of several embedding sets has a table for each feature in each of
    them. With `sharded` the tables are shared out among the workers of this process group. Inputs are expected on `device`.
    """

    def __init__(
        self,
        config: Any,
        sparse_names: list[str],
        cardinalities: list[int],
        num_dense: int,
        tasks: Mapping[str, int],
        precision: str = "fp32",
        lists: Sequence[ListInput] = (),
        start: Sequence[Sequence[float]] | None = None,
        sharded: bool = False,
        device: torch.device = CPU,
        own_rows: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.device = device
        self.sparse_names, self.lists = sparse_names, lists
        width = config.embedding_dim
        self.dropout, tables = config.dropout, _tables(sharded, device)
        family = MODELS[type(config)]
        self.sets = family.embedding_sets(tasks)
        self.embeddings = tables(self._in_sets(sparse_names), cardinalities * len(self.sets), width) if sparse_names else None
        rows = dict(zip(sparse_names, cardinalities, strict=True))
        self.own_names = own_rows
        self.own_rows = nn.ModuleDict({table_name(name): OwnRows(rows[name] - 2, device) for name in own_rows})
        check_attention(config.front, [f.name for f in lists], sparse_names)
        self.attention = config.front.attention
        self.attended = nn.ModuleDict(
            {
                table_name(f.name): tables(self._in_sets([f.name]), [f.cardinality] * len(self.sets), width)
                for f in lists
                if f.name in self.attention
            }
        )
        self.pooled = nn.ModuleDict(
            {
                pooling: tables(
                    self._in_sets([f.name for f in of]), [f.cardinality for f in of] * len(self.sets), width, pooling
                )
                for pooling in ("sum", "mean")
                if (of := [f for f in lists if f.name not in self.attention and table_pooling(f) == pooling])
            }
        )
        in_dim, dtype = (len(sparse_names) + len(lists)) * width + num_dense, PRECISIONS[precision]
        self.front = Front(config.front, self.attended.keys(), len(self.sets), width, in_dim, dtype)
        self.network = family(config, in_dim, tasks, dtype)
        if start is not None:
            # A bias moves by a learning rate a step at most: from its usual 0 (a half) it would not come down to a rate of
            # 0.3 % within a short training, nor ever where few rows observe the task. Scores would stay too high, most of
            # all in rows like those that no label ever pulled down.
            self.network.towers.start_at(start)
        # Last: the network is drawn from the same random numbers with it and without.
        self.first_order = None
        if config.front.first_order:
            outputs = sum(tasks.values())
            self.first_order = FirstOrder(tables, sparse_names, cardinalities, lists, num_dense, outputs).to(device)
        self.front.to(device)
        self.network.to(device)

    def forward(
        self, ids_bf: Tensor, dense_bd: Tensor, lists: Sequence[JaggedTensor] = ()
    ) -> tuple[Tensor, dict[str, RoutingPlan]]:
        """Outputs, and the plans of the family's gates by name; `network.plan_names` says what is in them."""
        outputs: Tensor
        outputs, plans = self.network(self.represent(ids_bf, dense_bd, lists))
        first_bo = self.first_order_outputs(ids_bf, dense_bd, lists)
        return outputs if first_bo is None else outputs + first_bo, plans

    def represent(self, ids_bf: Tensor, dense_bd: Tensor, lists: Sequence[JaggedTensor] = ()) -> Tensor:
        """What all tasks share, and the network reads: `[B, D]`, or `[B, S, D]` for a family of S embedding sets."""
        inputs = []
        if self.embeddings is not None:
            if self.own_names:
                if self.training:
                    self._give_rows(ids_bf)
                ids_bf = self._rows_of(ids_bf)
            ids_bf = ids_bf.repeat(1, len(self.sets)) if len(self.sets) > 1 else ids_bf
            inputs.append(self.embeddings(one_id_each(self._in_sets(self.sparse_names), ids_bf)).values())
        for pooling, tables in self.pooled.items():
            own = {name: ids for name, ids in pooled_ids(self.lists, lists, pooling).items() if name not in self.attention}
            rows = {in_set(name, of): ids for of in self.sets for name, ids in own.items()}
            inputs.append(tables(KeyedJaggedTensor.from_jt_dict(rows)).values())
        for f, ids in zip(self.lists, lists, strict=True):
            if f.name in self.attention:
                inputs.append(self._attend(f.name, ids, inputs[0]))
        inputs = [F.dropout(embedded, self.dropout, self.training) for embedded in inputs]
        if len(self.sets) > 1:
            inputs = [embedded.unflatten(1, (len(self.sets), -1)) for embedded in inputs]
            dense_bd = dense_bd.unsqueeze(1).expand(-1, len(self.sets), -1)
        if dense_bd.shape[-1]:
            inputs.append(dense_bd)
        x: Tensor = torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0]
        return x if self.front.crosses is None else self.front.crosses(x)

    def first_order_outputs(self, ids_bf: Tensor, dense_bd: Tensor, lists: Sequence[JaggedTensor] = ()) -> Tensor | None:
        """What is added to the network's outputs, `[B, Σ widths]`; None without `front.first_order`. After `represent`, which
        gives new ids their rows in training."""
        if self.first_order is None:
            return None
        outputs_bo: Tensor = self.first_order(self._rows_of(ids_bf) if self.own_names else ids_bf, dense_bd, lists)
        return outputs_bo

    def _attend(self, name: str, ids: JaggedTensor, embedded: Tensor) -> Tensor:
        """A sequence's embeddings, weighed for its target, which is among the features of one id a row: `[B, S·d]`."""
        sets = len(self.sets)
        items = one_id_each(self._in_sets([name]), ids.values().unsqueeze(1).repeat(1, sets))
        items_nsd = self.attended[table_name(name)](items).values().unflatten(1, (sets, -1))
        place = self.sparse_names.index(self.attention[name])
        target_bsd = embedded.unflatten(1, (sets, len(self.sparse_names), -1))[:, :, place]
        attended: Tensor = self.front.attention[table_name(name)](target_bsd, items_nsd, ids.lengths())
        return attended.flatten(1)

    def _in_sets(self, names: list[str]) -> list[str]:
        """The tables of these features, set by set."""
        return [in_set(name, of) for of in self.sets for name in names]

    def _give_rows(self, ids_bf: Tensor) -> None:
        """New ids get rows of their own; rows that change hands start anew."""
        assert self.embeddings is not None
        for name, own, hashes_b in self._hashes(ids_bf):
            evicted = own.admit(hashes_b)
            if len(evicted):
                for of in self.sets:
                    self.embeddings.renew(in_set(name, of), evicted)
                if self.first_order is not None:
                    self.first_order.embeddings.renew(name, evicted)

    def _rows_of(self, ids_bf: Tensor) -> Tensor:
        """The ids with rows in place of hashes."""
        fixed = ids_bf[:, : ids_bf.shape[1] - 2 * len(self.own_names)]
        return torch.cat([fixed, *(own(hashes_b).unsqueeze(1) for _, own, hashes_b in self._hashes(ids_bf))], 1)

    def _hashes(self, ids_bf: Tensor) -> Iterator[tuple[str, OwnRows, Tensor]]:
        """The features whose ids have rows of their own, these rows, and the ids' hashes."""
        fixed = ids_bf.shape[1] - 2 * len(self.own_names)
        hashes_bh = ids_bf[:, fixed:].clone(memory_format=torch.contiguous_format).view(torch.int64)
        for name, hashes_b in zip(self.own_names, hashes_bh.unbind(1), strict=True):
            own = self.own_rows[table_name(name)]
            assert isinstance(own, OwnRows)
            yield name, own, hashes_b

    def dense_parameters(self) -> list[nn.Parameter]:
        """Everything but the embedding tables."""
        return [parameter for _, parameter in self.named_dense_parameters()]

    def named_dense_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Everything but the embedding tables: the network's parameters by their names in it, the front's, and the weights
        of the numbers beside it."""
        numbers = None if self.first_order is None else self.first_order.numbers
        beside = [] if numbers is None else numbers.named_parameters("first_order.numbers")
        return [*self.network.named_parameters(), *self.front.named_parameters("front"), *beside]

    def adagrad(self) -> dict[str, Tensor]:
        """The state of the tables' optimizer, by the names that the tables have in `state_dict`."""
        batches = [*self._tables(), *self._first_order_tables()]
        return {prefix + name: sums for prefix, tables in batches for name, sums in tables.adagrad().items()}

    def set_embedding_lr(self, rate: float) -> None:
        """The learning rate of the network's tables, from the next backward pass on."""
        for _, tables in self._tables():
            tables.set_lr(rate)

    def set_first_order_lr(self, rate: float) -> None:
        """That of the tables beside the network."""
        for _, tables in self._first_order_tables():
            tables.set_lr(rate)

    def _tables(self) -> list[tuple[str, Any]]:
        """The network's table batches and the prefixes of their names in `state_dict`."""
        batches = [("embeddings.", self.embeddings)] if self.embeddings is not None else []
        batches += [(f"pooled.{pooling}.", tables) for pooling, tables in self.pooled.items()]
        return [*batches, *((f"attended.{name}.", tables) for name, tables in self.attended.items())]

    def _first_order_tables(self) -> list[tuple[str, Any]]:
        first = self.first_order
        if first is None:
            return []
        batches = [("first_order.embeddings.", first.embeddings)] if first.embeddings is not None else []
        return [*batches, *((f"first_order.pooled.{pooling}.", tables) for pooling, tables in first.pooled.items())]


def in_set(name: str, of: str) -> str:
    """What a feature's table in an embedding set is called.

    >>> in_set("colour", ""), in_set("colour", "click")
    ('colour', 'colour of click')
    """
    return f"{name} of {of}" if of else name


def _tables(sharded: bool, device: torch.device) -> Callable[..., Any]:
    if not sharded:
        return partial(FusedEmbeddings, device=device)
    from recsys_moe.sharding import ShardedEmbeddings  # imports a second's worth of torchrec

    return ShardedEmbeddings
