"""STEM, shared and task-specific embeddings (Su et al., AAAI 2024).

    v_s, v_1, …, v_T:  the inputs in shared tables and in each task's own
    z_t = Sum(G_t(v_t + v_s), {E_s(v_s), E_t(v_t), sg(E_u(v_u)) of the other tasks u}),   ŷ_t = Tower_t(z_t)
    Sum(w, {e_i}) = Σ_i w_i·e_i,   G(x) = softmax(W·x + b)

All forward, task-specific backward: every task's gate sees all experts, while sg, the stopped gradient, keeps a task's loss
from moving another task's experts and embeddings; it moves its own and the shared ones. So embeddings of a user that two tasks
see differently can differ. Written from memory of the paper and its public code, of which this is the model of one layer.

Shapes: B rows, D inputs, T tasks, S = 1 + T embedding sets (the shared one first), E experts, H expert units.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from recsys_moe.experts import MLPExperts, Norm, Towers
from recsys_moe.front import FrontConfig
from recsys_moe.kernels import gate_mix
from recsys_moe.models.family import Family
from recsys_moe.routing import PlanNames, RoutingPlan, SoftRouter
from recsys_moe.typed import typed

Width = Annotated[int, Field(ge=1)]


@typed
class STEMConfig:
    """Shared experts and experts of each task, and their widths; hidden widths of the towers, width of each feature's embedding
    in each of its 1 + T tables. `dropout` is of the embeddings and of the experts' units.
    """

    name: Literal["stem"] = "stem"
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    front: FrontConfig = FrontConfig()
    shared_experts: Annotated[int, Field(ge=1)] = 2
    task_experts: Annotated[int, Field(ge=1)] = 2
    expert_dims: Annotated[tuple[Width, ...], Field(min_length=1)] = (64, 32)
    tower_dims: tuple[Width, ...] = (32,)
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class STEM(Family):
    """x `[B, 1 + T, D]`, the inputs in the shared tables and in each task's → outputs `[B, Σ widths]` and the gates' plan,
    "experts". `dtype` is the experts' precision; gates and towers are fp32.

    >>> tasks = {"click": 1, "ending": 3}
    >>> model = STEM(STEMConfig(), in_dim=12, tasks=tasks, dtype=torch.float32).eval()
    >>> outputs, plans = model(torch.zeros(5, 3, 12))
    >>> outputs.shape, plans["experts"].weights.shape, model.embedding_sets(tasks)
    (torch.Size([5, 4]), torch.Size([5, 2, 6]), ('', 'click', 'ending'))
    """

    def __init__(self, config: STEMConfig, in_dim: int, tasks: Mapping[str, int], dtype: torch.dtype) -> None:
        super().__init__()
        counts = {"shared": config.shared_experts, **dict.fromkeys(tasks, config.task_experts)}
        names = tuple(f"{name} {e}" for name, count in counts.items() for e in range(count))
        self.plan_names = {"experts": PlanNames(tuple(tasks), names)}
        set_e = torch.tensor([s for s, count in enumerate(counts.values()) for _ in range(count)])
        # Groups of one size, each of experts that read one set.
        self.source = tuple(set_e[:: math.gcd(*counts.values())].tolist())
        self.router = SoftRouter(in_dim, len(tasks), len(set_e))
        self.experts = MLPExperts(len(set_e), in_dim, config.expert_dims, config.norm, config.dropout, dtype=dtype)
        self.towers = Towers(self.experts.out_dim, config.tower_dims, config.norm, tuple(tasks.values()))
        # Every expert stands there twice, the second time with its gradient stopped; a gate sees it in one place.
        moves_te = (set_e == 0) | (set_e == torch.arange(1, 1 + len(tasks)).unsqueeze(1))
        self.moves_t2e: Tensor
        self.register_buffer("moves_t2e", torch.cat([moves_te, ~moves_te], 1), persistent=False)

    @staticmethod
    def embedding_sets(tasks: Mapping[str, int]) -> tuple[str, ...]:
        return ("", *tasks)

    def forward(self, x_bsd: Tensor) -> tuple[Tensor, dict[str, RoutingPlan]]:
        plan = self.router(x_bsd[:, 1:] + x_bsd[:, :1], tuple(range(x_bsd.shape[1] - 1)))
        y_beh = self.experts(x_bsd, self.source)
        twice_b2eh = torch.cat([y_beh, y_beh.detach()], 1)
        z_bth = gate_mix(plan.logits.repeat(1, 1, 2), twice_b2eh, mask_te=self.moves_t2e)
        return self.towers(z_bth), {"experts": plan}
