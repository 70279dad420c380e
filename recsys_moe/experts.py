"""Experts with stacked weights `[E, …]`: one call computes them all."""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.kernels import expert_mlp

Norm = Literal["batch", "none"]


class MLPExperts(nn.Module):
    """E multi-layer perceptrons of one shape: per layer h ← ReLU(norm(W_e·h + b_e)).

    `norm="batch"` normalises each unit of each expert over the batch (Ioffe & Szegedy 2015): batch statistics in
    training, running ones at inference. `linear_out` adds a last plain linear layer of that width.

    The input is `[B, D]` (shared by all) or `[B, E, D]` (one for each, as towers need); the output `[B, E, H]`, fp32.
    `dtype` is the precision of the matrix products; parameters stay fp32.

    >>> MLPExperts(2, 8, (16, 4)).eval()(torch.zeros(5, 8)).shape
    torch.Size([5, 2, 4])
    """

    def __init__(
        self,
        num_experts: int,
        in_dim: int,
        dims: Sequence[int],
        norm: Norm = "none",
        dropout: float = 0.0,
        linear_out: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        widths = [in_dim, *dims, *([linear_out] if linear_out else [])]
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_experts, o, i)) for i, o in _pairs(widths))
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_experts, o)) for o in widths[1:])
        self.norms = nn.ModuleList(StackedBatchNorm(num_experts, o) for o in dims) if norm == "batch" else None
        self.hidden_layers = len(dims)
        self.dropout = dropout
        self.dtype = dtype
        self.out_dim = widths[-1]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            # nn.Linear's own initialisation, drawn for each expert apart.
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, D]` or `[B, E, D]` → `[B, E, H]`."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = expert_mlp(x, weight, bias, self.dtype)
            if layer < self.hidden_layers:
                if self.norms is not None:
                    x = self.norms[layer](x)
                x = F.relu(x)
                if self.dropout:
                    x = F.dropout(x, self.dropout, self.training)
        return x


class StackedBatchNorm(nn.Module):
    """Batch normalisation of each unit of each expert, `[B, E, H]` → `[B, E, H]`.

    A training batch of one row has no variance: it is normalised with the running statistics, which it leaves as they are.
    """

    def __init__(self, num_experts: int, units: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(num_experts, units))
        self.bias = nn.Parameter(torch.zeros(num_experts, units))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(num_experts, units))
        self.register_buffer("running_var", torch.ones(num_experts, units))

    def forward(self, x_beh: Tensor) -> Tensor:
        y = F.batch_norm(
            x_beh.flatten(1),
            self.running_mean.view(-1),
            self.running_var.view(-1),
            self.weight.view(-1),
            self.bias.view(-1),
            training=self.training and x_beh.shape[0] > 1,
            momentum=self.momentum,
            eps=self.eps,
        )
        return y.view_as(x_beh)


def _pairs(widths: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(widths))
