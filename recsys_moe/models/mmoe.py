"""Multi-gate Mixture-of-Experts (Ma et al., KDD 2018).

    ŷ_t = h_t(f^t(x)),   f^t(x) = Σ_e g^t(x)_e · f_e(x),   g^t(x) = softmax(W_gt·x)

Shapes: B rows, D inputs, E experts, H expert units, T tasks.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys_moe.experts import MLPExperts, Norm
from recsys_moe.kernels import gate_mix
from recsys_moe.routing import RoutingPlan, SoftRouter
from recsys_moe.typed import typed

Width = Annotated[int, Field(ge=1)]


@typed
class MMoEConfig:
    """Number and widths of the experts, hidden widths of the towers, width of each feature's embedding."""

    name: Literal["mmoe"] = "mmoe"
    embedding_dim: Annotated[int, Field(ge=4, multiple_of=4)] = 8
    num_experts: Annotated[int, Field(ge=1)] = 8
    expert_dims: Annotated[tuple[Width, ...], Field(min_length=1)] = (64, 32)
    tower_dims: tuple[Width, ...] = (32,)
    norm: Norm = "batch"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2


class MMoE(nn.Module):
    """x `[B, D]` → logits `[B, T]` and the gates' plan. `dtype` is the experts' precision; gates and towers are fp32.

    >>> model = MMoE(MMoEConfig(), in_dim=12, num_tasks=3, dtype=torch.float32).eval()
    >>> logits, plan = model(torch.zeros(5, 12))
    >>> logits.shape, plan.weights.shape
    (torch.Size([5, 3]), torch.Size([5, 3, 8]))
    """

    def __init__(self, config: MMoEConfig, in_dim: int, num_tasks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = SoftRouter(in_dim, num_tasks, config.num_experts)
        self.experts = MLPExperts(config.num_experts, in_dim, config.expert_dims, config.norm, config.dropout, dtype=dtype)
        self.towers = MLPExperts(num_tasks, self.experts.out_dim, config.tower_dims, config.norm, linear_out=1)

    def forward(self, x_bd: Tensor) -> tuple[Tensor, RoutingPlan | None]:
        plan = self.router(x_bd)
        mixed_bth = gate_mix(plan.weights, self.experts(x_bd))
        return self.towers(mixed_bth).squeeze(2), plan
