"""What may stand beside any family: a linear model of every value of every feature, as in Wide & Deep (Cheng et al., DLRS 2016)
and DeepFM's first-order part (Guo et al., IJCAI 2017).

    o_t ← o_t + Σ_f w_tf[id_f] + v_t·numbers

It starts at zero. Logistic regression is the case in which the network adds a constant: what an id alone says need not pass
through experts that many ids share.

Shapes: B rows, F features, D dense inputs, O = Σ widths of the tasks' outputs.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from recsys_moe.embeddings import JaggedTensor, KeyedJaggedTensor, one_id_each, pooled_ids, table_pooling
from recsys_moe.experts import MLPExperts
from recsys_moe.transforms import ListInput


class FirstOrder(nn.Module):
    """ids int32 `[B, F]`, dense inputs `[B, D]` and lists of ids → fp32 `[B, O]`, whose bits depend on their row alone.

    Args:
        tables: makes a table batch, as `FusedEmbeddings`. Its rows have O numbers, filled up to a multiple of 4.
        lists: a list counts as its ids' sum, mean or last, as its feature says, also where attention pools it for the network.

    >>> from recsys_moe.embeddings import FusedEmbeddings
    >>> first = FirstOrder(FusedEmbeddings, ["user"], [5], [], num_dense=2, outputs=3)
    >>> first(torch.ones(4, 1, dtype=torch.int32), torch.ones(4, 2)).shape
    torch.Size([4, 3])
    """

    def __init__(
        self,
        tables: Callable[..., Any],
        names: list[str],
        cardinalities: list[int],
        lists: Sequence[ListInput],
        num_dense: int,
        outputs: int,
    ) -> None:
        super().__init__()
        self.names, self.lists, self.outputs = names, lists, outputs
        self.width = -(-outputs // 4) * 4
        self.embeddings: Any = tables(names, cardinalities, self.width, zeros=True) if names else None
        self.pooled = nn.ModuleDict()
        for pooling in ("sum", "mean"):
            if of := [f for f in lists if table_pooling(f) == pooling]:
                rows = [f.cardinality for f in of]
                self.pooled[pooling] = tables([f.name for f in of], rows, self.width, pooling, zeros=True)
        self.numbers = MLPExperts(1, num_dense, (), linear_out=outputs, bias=False) if num_dense else None
        if self.numbers is not None:
            nn.init.zeros_(self.numbers.weights[0])

    def forward(self, ids_bf: Tensor, dense_bd: Tensor, lists: Sequence[JaggedTensor] = ()) -> Tensor:
        looked_up = [] if self.embeddings is None else [self.embeddings(one_id_each(self.names, ids_bf)).values()]
        for pooling, tables in self.pooled.items():
            bags = pooled_ids(self.lists, lists, pooling)
            looked_up.append(tables(KeyedJaggedTensor.from_jt_dict(bags)).values())
        terms_bo = [w for values in looked_up for w in values.unflatten(1, (-1, self.width))[..., : self.outputs].unbind(1)]
        if self.numbers is not None:
            terms_bo.append(self.numbers(dense_bd).squeeze(1))
        return reduce(torch.add, terms_bo)  # one after the other: a sum over a dimension may depend on how many rows there are
