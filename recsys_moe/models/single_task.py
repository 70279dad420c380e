"""Single-task (the baseline of Ma et al., KDD 2018): a model for each task, ŷ_t = h_t(f_t(x_t)), side by side.

Nothing is shared, the embeddings neither: x_t are the inputs in task t's own tables. That is what one gets by training T models
apart, and what sharing has to be measured against; only clipping and early stopping look at all tasks at once. Tables and
lookups are T times as many.

Shapes: B rows, D inputs, T tasks, H units of the last bottom layer.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from recsys_moe.experts import MLPExperts, Norm, Towers
from recsys_moe.front import FrontConfig
from recsys_moe.models.family import Family
from recsys_moe.routing import RoutingPlan
from recsys_moe.typed import typed

Width = Annotated[int, Field(ge=1)]


@typed
class SingleTaskConfig:
    """Widths of each task's network and of its tower's hidden layers, and of each feature's embedding.

    `dropout` is of the embeddings and of the networks' units.
    """

    name: Literal["single_task"] = "single_task"
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    front: FrontConfig = FrontConfig()
    bottom_dims: Annotated[tuple[Width, ...], Field(min_length=1)] = (256, 32)
    tower_dims: tuple[Width, ...] = (32,)
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class SingleTask(Family):
    """x `[B, T, D]`, of one task `[B, D]` → outputs `[B, Σ widths]`, each task's from its own inputs; there are no gates.

    >>> tasks = {"click": 1, "ending": 3}
    >>> model = SingleTask(SingleTaskConfig(), in_dim=12, tasks=tasks, dtype=torch.float32).eval()
    >>> model(torch.zeros(5, 2, 12))[0].shape, model.embedding_sets(tasks)
    (torch.Size([5, 4]), ('click', 'ending'))
    """

    def __init__(self, config: SingleTaskConfig, in_dim: int, tasks: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.plan_names = {}
        self.bottoms = MLPExperts(len(tasks), in_dim, config.bottom_dims, config.norm, config.dropout, dtype=dtype)
        self.towers = Towers(self.bottoms.out_dim, config.tower_dims, config.norm, tuple(tasks.values()))

    @staticmethod
    def embedding_sets(tasks: Mapping[str, int]) -> tuple[str, ...]:
        return tuple(tasks)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, RoutingPlan]]:
        return self.towers(self.bottoms(x).float()), {}
