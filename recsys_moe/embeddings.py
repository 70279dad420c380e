"""Embedding tables, torchrec's collection on fbgemm's fused table batch, and the jagged tensors of ids that they take."""

import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

# torchrec's import touches a renamed torch function, which would warn on every start.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor, KeyedTensor

from recsys_moe.kernels import embedding_bags
from recsys_moe.tensorfiles import CHUNK_BYTES
from recsys_moe.transforms import Inputs, ListInput

ADAGRAD = {"lr": 0.02, "eps": 1e-8}
"""What the tables' optimizer starts with; `set_lr` is called before every step."""


Pooling = Literal["sum", "mean"]


def table_configs(names: list[str], cardinalities: list[int], width: int, pooling: Pooling) -> list[EmbeddingBagConfig]:
    """One table per feature."""
    kind = PoolingType(pooling.upper())
    return [
        EmbeddingBagConfig(name=table_name(name), embedding_dim=width, num_embeddings=rows, feature_names=[name], pooling=kind)
        for name, rows in zip(names, cardinalities, strict=True)
    ]


class FusedEmbeddings(FusedEmbeddingBagCollection):
    """One table per feature, all of one width and pooling, in one table batch whose backward pass applies row-wise Adagrad.

    A `FusedEmbeddingBagCollection` that hands a `KeyedJaggedTensor` whose keys are the tables in order to the kernel as it
    is; the parent takes every input apart by feature and puts it together again. On the CPU the kernel is
    `recsys_moe.kernels.embedding_bags`, on a GPU fbgemm's. Ids come from `recsys_moe.transforms`, which guarantees their
    range, so nothing checks it again.

    Args:
        names: the features, one table each.
        cardinalities: rows of each table.
        width: dimensions of an embedding, a multiple of 4.
        pooling: what a row's ids become where they are not just one: their embeddings' sum or mean, zero if there is none.
        zeros: start at zero, not at random.
    """

    def __init__(
        self,
        names: list[str],
        cardinalities: list[int],
        width: int,
        pooling: Pooling = "sum",
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
        zeros: bool = False,
    ) -> None:
        tables = table_configs(names, cardinalities, width, pooling)
        super().__init__(tables, RowWiseAdagrad, ADAGRAD, device=device)
        self._lookup._emb_module.bounds_check_mode_int = BoundsCheckMode.NONE.value
        self._names, self._width, self._mean, self._rate = names, width, pooling == "mean", ADAGRAD["lr"]
        self._bounds = [0.0 if zeros else config.get_weight_init_max() for config in tables]
        # torchrec draws the tables from ±1/√rows and heeds no init_fn here. Missing and unknown start at zero: where training
        # has no such row, scoring one adds nothing. (In a table of buckets, row 1 is the first bucket, which training has.)
        with torch.no_grad():
            for weight in self._lookup.split_embedding_weights():
                weight[: None if zeros else 2] = 0

    @property
    def _lookup(self) -> Any:
        (lookup,) = self._emb_modules  # one: the tables share width, precision and pooling
        return lookup

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        if features.keys() != self._names:
            raise ValueError(f"features {features.keys()} are not the tables' {self._names}")
        fused = self._lookup._emb_module
        if fused.weights_host.numel():
            values = embedding_bags(
                fused.weights_host,
                fused.momentum1_host,
                fused.weights_offsets,
                features.values(),
                features.offsets(),
                width=self._width,
                mean=self._mean,
                rate=self._rate,
                eps=ADAGRAD["eps"],
            )
        else:
            values = self._lookup(features.values(), features.offsets(), None)
        return KeyedTensor(keys=self._embedding_names, length_per_key=self._length_per_key, values=values)

    def set_lr(self, rate: float) -> None:
        """The learning rate from the next backward pass on."""
        self._rate = rate
        optimizer = self._lookup.fused_optimizer()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()  # applies nothing but the rate

    @torch.no_grad()
    def renew(self, name: str, rows: Tensor) -> None:
        """Draw rows of a feature's table anew and forget their Adagrad sums: they are another id's from now on."""
        table = self._names.index(name)
        weight_rd = self._lookup.split_embedding_weights()[table]
        (sums_r,) = self._lookup._emb_module.split_optimizer_states()[table]
        bound = self._bounds[table]
        # Drawn on the CPU, whose random numbers a checkpoint holds.
        weight_rd[rows] = torch.empty(len(rows), self._width).uniform_(-bound, bound).to(weight_rd.device)
        sums_r[rows] = 0

    def adagrad(self) -> dict[str, Tensor]:
        """Adagrad's sum of squares of each row, `[rows]` for each table, by the table's name in `state_dict`."""
        states = self._lookup._emb_module.split_optimizer_states()
        return {name: state for name, (state,) in zip(self.state_dict(), states, strict=True)}


def drawn_rows(config: EmbeddingBagConfig) -> Iterator[tuple[int, Tensor]]:
    """What `FusedEmbeddings` fills a table with, from first rows on, and where they start; never all of it at once."""
    step = max(2, CHUNK_BYTES // (4 * config.embedding_dim))
    for low in range(0, config.num_embeddings, step):
        weight_rd = torch.empty(min(step, config.num_embeddings - low), config.embedding_dim)
        weight_rd.uniform_(config.get_weight_init_min(), config.get_weight_init_max())
        if not low:
            weight_rd[:2] = 0
        yield low, weight_rd


def one_id_each(names: list[str], ids_bf: Tensor) -> KeyedJaggedTensor:
    """One id per row and feature as torchrec's jagged tensor: every bag has length 1. ids int32 `[B, F]`."""
    rows = ids_bf.shape[0]
    return KeyedJaggedTensor(
        keys=names,
        values=ids_bf.t().reshape(-1),  # feature-major, as the table batch reads them
        offsets=_unit_offsets(len(names) * rows, ids_bf.device),
        stride=rows,
    )


def jagged_tensors(inputs: Inputs) -> tuple[JaggedTensor, ...]:
    """The lists of some rows, one jagged tensor for each feature."""
    return tuple(JaggedTensor(torch.from_numpy(r.values), offsets=torch.from_numpy(r.offsets)) for r in inputs.lists)


def take_rows(rows: JaggedTensor, index: Tensor) -> JaggedTensor:
    """The rows that `index` `[B]` names, in its order.

    >>> rows = JaggedTensor(torch.tensor([5, 6, 7]), offsets=torch.tensor([0, 2, 2, 3]))
    >>> take_rows(rows, torch.tensor([2, 0])).values()
    tensor([7, 5, 6])
    """
    starts = rows.offsets()[index]
    lengths = rows.offsets()[index + 1] - starts
    offsets = torch.zeros(len(index) + 1, dtype=lengths.dtype)
    torch.cumsum(lengths, 0, out=offsets[1:])
    place = torch.arange(int(offsets[-1])) + torch.repeat_interleave(starts - offsets[:-1], lengths)
    return JaggedTensor(rows.values()[place], lengths=lengths, offsets=offsets)


def concatenate_rows(pieces: Sequence[JaggedTensor]) -> JaggedTensor:
    """The rows of all pieces, one piece after the other."""
    return JaggedTensor(torch.cat([p.values() for p in pieces]), lengths=torch.cat([p.lengths() for p in pieces]))


def padded(rows: JaggedTensor, length: int) -> tuple[Tensor, Tensor]:
    """The rows as a block: ids `[B, L]`, 0 behind a row's end, and how many of them are its own, int32 `[B]`.

    >>> padded(JaggedTensor(torch.tensor([5, 6, 7]), offsets=torch.tensor([0, 2, 2, 3])), 3)[0].tolist()
    [[5, 6, 0], [0, 0, 0], [7, 0, 0]]
    """
    return rows.to_padded_dense(length, padding_value=0), rows.lengths()


def last_ids(rows: JaggedTensor, length: int) -> JaggedTensor:
    """The last id of each row; a row without any stays so. No row has more than `length`."""
    ids_bl, lengths_b = padded(rows, length)
    some_b = lengths_b > 0
    last = ids_bl[some_b].gather(1, lengths_b[some_b].long().unsqueeze(1) - 1).squeeze(1)
    return JaggedTensor(last, lengths=some_b.to(lengths_b.dtype))


def table_pooling(feature: ListInput) -> Pooling:
    """How a table pools a list: the last id alone is the sum of one."""
    return "mean" if feature.pooling == "mean" else "sum"


def pooled_ids(features: Sequence[ListInput], lists: Sequence[JaggedTensor], pooling: str) -> dict[str, JaggedTensor]:
    """By name, the ids that tables of this pooling look up; of a feature that is pooled to its last id, that one."""
    return {
        f.name: last_ids(ids, f.max_length) if f.pooling == "last" and f.max_length else ids
        for f, ids in zip(features, lists, strict=True)
        if table_pooling(f) == pooling
    }


@lru_cache(maxsize=8)
def _unit_offsets(bags: int, device: torch.device) -> Tensor:
    return torch.arange(bags + 1, dtype=torch.int32, device=device)


def table_name(feature: str) -> str:
    # Tables are modules in a ModuleDict, whose names take no dots and no attribute of its own, such as `keys` or `type`.
    name = feature.replace(".", "__")
    return f"{name}__" if hasattr(nn.ModuleDict(), name) else name
