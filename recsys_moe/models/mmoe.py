"""Multi-gate Mixture-of-Experts (Ma et al., KDD 2018).

    ŷ_t = h_t(f^t(x)),   f^t(x) = Σ_e g^t(x)_e · f_e(x),   g^t(x) = softmax(W_gt·x + b_gt)

OMoE, the same paper's one-gate baseline, has one g, and so one f, for all tasks.

Shapes: B rows, D inputs, E experts, H expert units, T tasks.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from recsys_moe.experts import MLPExperts, Norm, Towers
from recsys_moe.front import FrontConfig
from recsys_moe.models.family import Family
from recsys_moe.routing import PlanNames, RoutingPlan, SoftPlan, SoftRouter, TopKRouter
from recsys_moe.typed import typed

Width = Annotated[int, Field(ge=1)]


@typed
class MMoEConfig:
    """Number and widths of the experts, hidden widths of the towers, width of each feature's embedding.

    `dropout` is of the embeddings and of the experts' units.
    `gate="topk"`: each task uses only the `top_k` experts of its largest gate weights, divided by their sum (Shazeer et al.
    2017), and only those are computed.
    """

    name: Literal["mmoe", "omoe"] = "mmoe"
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    front: FrontConfig = FrontConfig()
    num_experts: Annotated[int, Field(ge=1)] = 8
    expert_dims: Annotated[tuple[Width, ...], Field(min_length=1)] = (64, 32)
    tower_dims: tuple[Width, ...] = (32,)
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    gate: Literal["softmax", "topk"] = "softmax"
    top_k: Annotated[int, Field(ge=1)] = 2

    @model_validator(mode="after")
    def _check_top_k(self) -> Self:
        if self.gate == "topk" and self.top_k > self.num_experts:
            raise ValueError(f"model.top_k is {self.top_k}, but there are {self.num_experts} experts: choose at most that many")
        return self


class MMoE(Family):
    """x `[B, D]` → outputs `[B, Σ widths]` and the gates' plan, "experts". `tasks` has the width of each task's tower by its
    name, `dtype` is the experts' precision; gates and towers are fp32.

    >>> model = MMoE(MMoEConfig(), in_dim=12, tasks={"click": 1, "like": 1, "ending": 3}, dtype=torch.float32).eval()
    >>> outputs, plans = model(torch.zeros(5, 12))
    >>> outputs.shape, plans["experts"].weights.shape
    (torch.Size([5, 5]), torch.Size([5, 3, 8]))
    """

    def __init__(self, config: MMoEConfig, in_dim: int, tasks: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        experts, dropout = config.num_experts, config.dropout
        gates = tuple(tasks) if config.name == "mmoe" else ("all tasks",)
        self.num_gates = len(gates)
        self.plan_names = {"experts": PlanNames(gates, tuple(f"expert {e}" for e in range(experts)))}
        self.router = (
            SoftRouter(in_dim, self.num_gates, experts)
            if config.gate == "softmax"
            else TopKRouter(in_dim, experts, config.top_k, num_tasks=self.num_gates, renormalize=True, bias=True)
        )
        self.experts = MLPExperts(experts, in_dim, config.expert_dims, config.norm, dropout, dtype=dtype)
        self.towers = Towers(self.experts.out_dim, config.tower_dims, config.norm, tuple(tasks.values()))

    def forward(self, x_bd: Tensor) -> tuple[Tensor, dict[str, RoutingPlan]]:
        plan = self.router(x_bd)
        if isinstance(plan, SoftPlan):
            mixed_bgh = plan.mix(self.experts(x_bd))
        else:
            mixed_bgh = self.experts.combine(x_bd, plan).view(x_bd.shape[0], self.num_gates, self.experts.out_dim)
        return self.towers(mixed_bgh.squeeze(1) if self.num_gates == 1 else mixed_bgh), {"experts": plan}
