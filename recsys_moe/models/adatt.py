"""AdaTT-sp, adaptive task-to-task fusion with task-specific experts (Li et al., KDD 2023).

    level j, task t:   z_t^j = Sum(G_t^j(z_t^{j-1}), {E_1^j(z_1^{j-1}), …, E_T^j(z_T^{j-1})}) + Sum(v_t^j, E_t^j(z_t^{j-1}))
    ŷ_t = Tower_t(z_t^J),   z_t^0 = x,   Sum(w, {e_i}) = Σ_i w_i·e_i,   G(z) = softmax(W·z + b)

Every task's gate sees all tasks' experts; the residual, learned weights v of a task's own experts, is the same for every row. v
starts at 1/n of n experts, and its distance from there is what is learned (so that weight decay leads back to it, not to 0).
Written from memory of the paper and its public code.

Shapes: B rows, D inputs, T tasks, n experts a task, E = T·n, H expert units.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys_moe.experts import MLPExperts, Norm, Towers
from recsys_moe.front import FrontConfig
from recsys_moe.models.family import Family
from recsys_moe.routing import PlanNames, RoutingPlan, SoftPlan, SoftRouter
from recsys_moe.typed import typed

Width = Annotated[int, Field(ge=1)]


@typed
class AdaTTConfig:
    """Levels, experts of each task in every level and their widths; hidden widths of the towers, width of each feature's
    embedding. `dropout` is of the embeddings and of the experts' units.
    """

    name: Literal["adatt"] = "adatt"
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    front: FrontConfig = FrontConfig()
    levels: Annotated[int, Field(ge=1)] = 2
    task_experts: Annotated[int, Field(ge=1)] = 2
    expert_dims: Annotated[tuple[Width, ...], Field(min_length=1)] = (64, 32)
    tower_dims: tuple[Width, ...] = (32,)
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class AdaTT(Family):
    """x `[B, D]` → outputs `[B, Σ widths]` and the plan of each level, "level 1", "level 2" … `tasks` has the width of each
    task's tower by its name, `dtype` is the experts' precision; gates and towers are fp32.

    >>> model = AdaTT(AdaTTConfig(), in_dim=12, tasks={"click": 1, "like": 1, "ending": 3}, dtype=torch.float32).eval()
    >>> outputs, plans = model(torch.zeros(5, 12))
    >>> outputs.shape, plans["level 2"].weights.shape
    (torch.Size([5, 5]), torch.Size([5, 3, 6]))
    """

    def __init__(self, config: AdaTTConfig, in_dim: int, tasks: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        width = config.expert_dims[-1]
        self.levels = nn.ModuleList(
            Level(config, width if level else in_dim, len(tasks), dtype) for level in range(config.levels)
        )
        self.towers = Towers(width, config.tower_dims, config.norm, tuple(tasks.values()))
        experts = tuple(f"{task} {e}" for task in tasks for e in range(config.task_experts))
        self.plan_names = {f"level {level + 1}": PlanNames(tuple(tasks), experts) for level in range(config.levels)}

    def forward(self, x_bd: Tensor) -> tuple[Tensor, dict[str, RoutingPlan]]:
        plans: dict[str, RoutingPlan] = {}
        z = x_bd
        for name, level in zip(self.plan_names, self.levels, strict=True):
            z, plans[name] = level(z)
        return self.towers(z), plans


class Level(nn.Module):
    """x `[B, D]`, one for all tasks, or `[B, T, D]` → `[B, T, H]` and the plan, the residual in it."""

    def __init__(self, config: AdaTTConfig, in_dim: int, num_tasks: int, dtype: torch.dtype) -> None:
        super().__init__()
        n = config.task_experts
        self.router = SoftRouter(in_dim, num_tasks, num_tasks * n)
        self.experts = MLPExperts(num_tasks * n, in_dim, config.expert_dims, config.norm, config.dropout, dtype=dtype)
        self.source = tuple(range(num_tasks))
        self.residual_tn = nn.Parameter(torch.zeros(num_tasks, n))

    def forward(self, x: Tensor) -> tuple[Tensor, SoftPlan]:
        tasks, n = self.residual_tn.shape
        own_ttn = torch.diag_embed((self.residual_tn + 1 / n).t()).permute(1, 2, 0)  # task, whose experts, which
        residual_bte = own_ttn.reshape(1, tasks, tasks * n).expand(x.shape[0], -1, -1).contiguous()
        sources = () if x.dim() == 2 else (self.source,)
        plan = self.router(x, *sources, residual_bte=residual_bte)
        return plan.mix(self.experts(x, *sources)), plan
