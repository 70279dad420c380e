"""Shared-Bottom (Caruana 1997): one network below, one tower per task: ŷ_t = h_t(f(x)).

Shapes: B rows, D inputs, H bottom units, T tasks.
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
class SharedBottomConfig:
    """Widths of the shared network and of the towers' hidden layers, and of each feature's embedding.

    `dropout` is of the embeddings and of the shared network's units.
    """

    name: Literal["shared_bottom"] = "shared_bottom"
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    front: FrontConfig = FrontConfig()
    bottom_dims: Annotated[tuple[Width, ...], Field(min_length=1)] = (256, 32)
    tower_dims: tuple[Width, ...] = (32,)
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class SharedBottom(Family):
    """x `[B, D]` → outputs `[B, Σ widths]`, of which each task's tower has its own; it has no gates, so no plans.

    >>> model = SharedBottom(SharedBottomConfig(), in_dim=12, tasks={"click": 1, "ending": 3}, dtype=torch.float32).eval()
    >>> model(torch.zeros(5, 12))[0].shape
    torch.Size([5, 4])
    """

    def __init__(self, config: SharedBottomConfig, in_dim: int, tasks: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.plan_names = {}
        self.bottom = MLPExperts(1, in_dim, config.bottom_dims, config.norm, config.dropout, dtype=dtype)
        self.towers = Towers(self.bottom.out_dim, config.tower_dims, config.norm, tuple(tasks.values()))

    def forward(self, x_bd: Tensor) -> tuple[Tensor, dict[str, RoutingPlan]]:
        shared_bh = self.bottom(x_bd).squeeze(1).float()
        return self.towers(shared_bh), {}
