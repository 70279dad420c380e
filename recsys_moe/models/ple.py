"""CGC and PLE, progressive layered extraction (Tang et al., RecSys 2020).

    level j, task k:   z_k^j = Sum(G_k^j(z_k^{j-1}), {E_shared^j(z_shared^{j-1}), E_k^j(z_k^{j-1})})
    its shared part:   z_shared^j = Sum(G_shared^j(z_shared^{j-1}), {E_shared^j(…), E_1^j(…), …}), but for the last level
    ŷ_k = Tower_k(z_k^J),   z_k^0 = z_shared^0 = x,   Sum(w, {e_i}) = Σ_i w_i·e_i,   G(z) = softmax(W·z + b)

A level is customized gate control, CGC: a task's gate sees the shared experts and its own. CGC, the model, is one level.

Shapes: B rows, D inputs, T tasks, S = 1 + T streams (the shared one, then the tasks'), E experts of a level, H expert units.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys_moe.experts import MLPExperts, Norm, Towers
from recsys_moe.front import FrontConfig
from recsys_moe.models.family import Family
from recsys_moe.routing import PlanNames, RoutingPlan, SoftPlan, SoftRouter
from recsys_moe.typed import typed

Width = Annotated[int, Field(ge=1)]


@typed
class PLEConfig:
    """Levels, shared experts and experts of each task in every level, and their widths; hidden widths of the towers, width of
    each feature's embedding. `dropout` is of the embeddings and of the experts' units.
    """

    name: Literal["ple", "cgc"] = "ple"
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    front: FrontConfig = FrontConfig()
    levels: Annotated[int, Field(ge=1)] = 2
    shared_experts: Annotated[int, Field(ge=1)] = 2
    task_experts: Annotated[int, Field(ge=1)] = 2
    expert_dims: Annotated[tuple[Width, ...], Field(min_length=1)] = (64, 32)
    tower_dims: tuple[Width, ...] = (32,)
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if self.name == "cgc" and self.levels != 1:
            raise ValueError(f"model.levels is {self.levels}, but CGC has one level: use model=ple for more")
        return self


class PLE(Family):
    """x `[B, D]` → outputs `[B, Σ widths]` and the plan of each level, "level 1", "level 2" … `tasks` has the width of each
    task's tower by its name, `dtype` is the experts' precision; gates and towers are fp32.

    >>> model = PLE(PLEConfig(), in_dim=12, tasks={"click": 1, "like": 1, "ending": 3}, dtype=torch.float32).eval()
    >>> outputs, plans = model(torch.zeros(5, 12))
    >>> outputs.shape, plans["level 1"].weights.shape, plans["level 2"].weights.shape
    (torch.Size([5, 5]), torch.Size([5, 4, 8]), torch.Size([5, 3, 8]))
    """

    def __init__(self, config: PLEConfig, in_dim: int, tasks: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        width, last = config.expert_dims[-1], config.levels - 1
        self.levels = nn.ModuleList(
            Level(config, width if level else in_dim, len(tasks), shared_gate=level < last, dtype=dtype)
            for level in range(config.levels)
        )
        self.towers = Towers(width, config.tower_dims, config.norm, tuple(tasks.values()))
        counts = {"shared": config.shared_experts, **dict.fromkeys(tasks, config.task_experts)}
        experts = tuple(f"{name} {e}" for name, count in counts.items() for e in range(count))
        self.plan_names = {
            f"level {level + 1}": PlanNames(("shared", *tasks) if level < last else tuple(tasks), experts)
            for level in range(config.levels)
        }

    def forward(self, x_bd: Tensor) -> tuple[Tensor, dict[str, RoutingPlan]]:
        plans: dict[str, RoutingPlan] = {}
        z = x_bd
        for name, level in zip(self.plan_names, self.levels, strict=True):
            z, plans[name] = level(z)
        return self.towers(z), plans


class Level(nn.Module):
    """CGC: x `[B, D]`, one for all streams, or `[B, S, D]` → `[B, S, H]` (without the shared gate `[B, T, H]`) and the plan."""

    def __init__(self, config: PLEConfig, in_dim: int, num_tasks: int, shared_gate: bool, dtype: torch.dtype) -> None:
        super().__init__()
        counts = [config.shared_experts, *[config.task_experts] * num_tasks]
        stream_e = torch.tensor([stream for stream, count in enumerate(counts) for _ in range(count)])
        masks = [(stream_e == 0) | (stream_e == stream) for stream in range(1, 1 + num_tasks)]
        if shared_gate:
            masks = [torch.ones_like(masks[0]), *masks]
        self.router = SoftRouter(in_dim, len(masks), len(stream_e), torch.stack(masks))
        self.experts = MLPExperts(len(stream_e), in_dim, config.expert_dims, config.norm, config.dropout, dtype=dtype)
        self.gate_source = tuple(range(0 if shared_gate else 1, 1 + num_tasks))
        # Groups of one size, each of experts that read one stream.
        self.expert_source = tuple(stream_e[:: math.gcd(*counts)].tolist())

    def forward(self, x: Tensor) -> tuple[Tensor, SoftPlan]:
        if x.dim() == 2:
            plan, outputs_beh = self.router(x), self.experts(x)
        else:
            plan, outputs_beh = self.router(x, self.gate_source), self.experts(x, self.expert_source)
        return plan.mix(outputs_beh), plan
