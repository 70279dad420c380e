"""A whole model: torchrec embeddings in front, a family's network behind."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

# torchrec's import touches a renamed torch function, which would warn on every start.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from recsys_moe.models import MODELS
from recsys_moe.routing import RoutingPlan

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Ranker(nn.Module):
    """ids `[B, F]` and dense inputs `[B, D]` → logits `[B, T]`.

    The tables live in one fused table batch (fbgemm through torchrec): the backward pass applies Adagrad to the
    rows it meets, so embeddings have no gradients and no place in the dense optimizer. Set their rate with
    `set_embedding_lr`.
    """

    def __init__(
        self,
        config: Any,
        sparse_names: list[str],
        cardinalities: list[int],
        num_dense: int,
        num_tasks: int,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        self.sparse_names = sparse_names
        width = config.embedding_dim
        self.embeddings: FusedEmbeddingBagCollection | None = None
        if sparse_names:
            tables = [
                EmbeddingBagConfig(
                    # Module names take no dots; features keep theirs.
                    name=name.replace(".", "__"),
                    embedding_dim=width,
                    num_embeddings=rows,
                    feature_names=[name],
                    init_fn=_init_table,
                )
                for name, rows in zip(sparse_names, cardinalities, strict=True)
            ]
            self.embeddings = FusedEmbeddingBagCollection(
                tables, torch.optim.Adagrad, {"lr": 0.05, "eps": 1e-8}, device=torch.device("cpu")
            )
        self.network = MODELS[type(config)](config, len(sparse_names) * width + num_dense, num_tasks, PRECISIONS[precision])

    def forward(self, ids_bf: Tensor, dense_bd: Tensor) -> tuple[Tensor, RoutingPlan | None]:
        """Logits and, where the family has gates, their plan."""
        inputs = [dense_bd] if dense_bd.shape[1] else []
        if self.embeddings is not None:
            rows, features = ids_bf.shape
            jagged = KeyedJaggedTensor(
                keys=self.sparse_names,
                values=ids_bf.t().reshape(-1).long(),  # feature-major, as the table batch reads them
                # One id per row and feature: every bag has length 1.
                lengths=torch.ones(features * rows, dtype=torch.int64),
                offsets=torch.arange(features * rows + 1),
                stride=rows,
            )
            inputs.insert(0, self.embeddings(jagged).values())
        logits: Tensor
        logits, plan = self.network(torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0])
        return logits, plan

    def set_embedding_lr(self, rate: float) -> None:
        """The learning rate of the fused embedding optimizer, from the next backward pass on."""
        if self.embeddings is not None:
            optimizer = self.embeddings.fused_optimizer()
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()


def _init_table(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=0.05)
