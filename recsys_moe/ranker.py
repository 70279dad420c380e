"""A whole model: torchrec embeddings in front, a family's network behind."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recsys_moe.embeddings import FusedEmbeddings, one_id_each
from recsys_moe.experts import MLPExperts
from recsys_moe.models import MODELS
from recsys_moe.routing import RoutingPlan

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Ranker(nn.Module):
    """ids int32 `[B, F]` and dense inputs `[B, D]` → logits `[B, T]`.

    Embeddings are updated inside the backward pass (see `FusedEmbeddings`): `dense_parameters` are what is left for an
    optimizer of one's own, `set_embedding_lr` sets the embeddings' rate. `prior_rates` are the tasks' positive rates, in
    (0, 1), that a fresh model starts at (None: the weights are loaded). With `sharded` the tables are shared out among the
    workers of this process group.
    """

    def __init__(
        self,
        config: Any,
        sparse_names: list[str],
        cardinalities: list[int],
        num_dense: int,
        num_tasks: int,
        precision: str = "fp32",
        prior_rates: Sequence[float] | None = None,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        self.sparse_names = sparse_names
        width = config.embedding_dim
        self.embeddings = _tables(sharded)(sparse_names, cardinalities, width) if sparse_names else None
        self.network = MODELS[type(config)](config, len(sparse_names) * width + num_dense, num_tasks, PRECISIONS[precision])
        if prior_rates is not None:
            self._start_at(prior_rates)

    def _start_at(self, rates: Sequence[float]) -> None:
        """Set the towers' last biases to the tasks' rates.

        A bias moves by a learning rate a step at most: from its usual 0 (a half) it would not come down to a rate of 0.3 %
        within a short training, nor ever where few rows observe the task. Scores would stay too high, most of all in rows
        like those that no label ever pulled down.
        """
        towers = self.network.towers
        assert isinstance(towers, MLPExperts)
        with torch.no_grad():
            towers.biases[-1].copy_(torch.logit(torch.tensor(rates)).unsqueeze(1))

    def forward(self, ids_bf: Tensor, dense_bd: Tensor) -> tuple[Tensor, RoutingPlan | None]:
        """Logits and, where the family has gates, their plan."""
        inputs = [dense_bd] if dense_bd.shape[1] else []
        if self.embeddings is not None:
            inputs.insert(0, self.embeddings(one_id_each(self.sparse_names, ids_bf)).values())
        logits: Tensor
        logits, plan = self.network(torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0])
        return logits, plan

    def dense_parameters(self) -> list[nn.Parameter]:
        """Everything but the embedding tables."""
        return list(self.network.parameters())

    def adagrad(self) -> dict[str, Tensor]:
        """The state of the tables' optimizer, by the names that the tables have in `state_dict`."""
        if self.embeddings is None:
            return {}
        return {f"embeddings.{name}": sums for name, sums in self.embeddings.adagrad().items()}

    def set_embedding_lr(self, rate: float) -> None:
        """The learning rate of the fused embedding optimizer, from the next backward pass on."""
        if self.embeddings is not None:
            self.embeddings.set_lr(rate)


def _tables(sharded: bool) -> type[Any]:
    if not sharded:
        return FusedEmbeddings
    from recsys_moe.sharding import ShardedEmbeddings  # imports a second's worth of torchrec

    return ShardedEmbeddings
