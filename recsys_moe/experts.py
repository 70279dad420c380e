"""Experts with stacked weights `[E, …]`: one call computes them all."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from recsys_moe.distributed import synced, synced_expert_mlp, synced_sparse_expert_mlp
from recsys_moe.kernels import Activation, BatchNorm, FeatureGate, Layer, expert_mlp, quantise, sparse_expert_mlp
from recsys_moe.routing import SparsePlan

Norm = Literal["batch", "none"]


def freeze(model: nn.Module) -> None:
    """Each part of a model keeps for inference what it can make once of its weights, which must not change any more."""
    for module in model.modules():
        if callable(keep := getattr(module, "freeze", None)):
            keep()


class MLPExperts(nn.Module):
    """E multi-layer perceptrons of one shape: per layer h ← act(norm(W_e·h + b_e)), act is ReLU unless said.

    `norm="batch"` normalises each unit of each expert over the batch (Ioffe & Szegedy 2015): batch statistics in
    training, running ones at inference. `linear_out` adds a last plain linear layer of that width. With `activation="swiglu"` a
    hidden layer has two matrices, one above the other: h ← silu(W_e·h) ⊙ (V_e·h).

    The input is `[B, D]` (shared by all) or `[B, E, D]` (one for each, as towers need); or the experts lie in G groups of
    E/G, one after the other, of which group g reads input `source[g]` of `[B, S, D]`, times its feature gate, if there is
    one. The output is `[B, E, H]` in `dtype`, the precision of the matrix products; parameters stay
    fp32.

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
        activation: Activation = "relu",
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        widths = [in_dim, *dims, *([linear_out] if linear_out else [])]
        rows = [2 * width if activation == "swiglu" else width for width in dims] + widths[len(dims) + 1 :]
        shapes = zip(rows, widths[:-1], strict=True)
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(num_experts, *shape)) for shape in shapes)
        self.biases = nn.ParameterList(nn.Parameter(torch.empty(num_experts, o)) for o in rows) if bias else None
        self.norms = nn.ModuleList(StackedBatchNorm(num_experts, o) for o in rows[: len(dims)]) if norm == "batch" else None
        self.weight_scales: nn.ParameterList | None = None
        self.hidden_layers = len(dims)
        self.dropout, self.activation = dropout, activation
        self.dtype = dtype
        self.out_dim = widths[-1]
        self._frozen: tuple[Layer, ...] = ()
        for index, weight in enumerate(self.weights):
            # nn.Linear's own initialisation, drawn for each expert apart.
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if self.biases is not None:
                nn.init.uniform_(self.biases[index], -bound, bound)

    def forward(self, x: Tensor, source: tuple[int, ...] | None = None, feature_gate: FeatureGate | None = None) -> Tensor:
        """x `[B, D]` or `[B, S, D]` → `[B, E, H]`."""
        first: dict[str, Any] = {"source": source, "feature_gate": feature_gate}
        for layer in self.layers():
            if synced((layer,)):
                x = synced_expert_mlp(x, layer, **first)
            else:
                x = expert_mlp(x, layer, **first, invariant=self._invariant())
            first = {}  # what follows is each expert's own
        return x

    def combine(self, x_bd: Tensor, plan: SparsePlan) -> Tensor:
        """The weighted sum of the experts that a sparse plan names: x `[B, D]` → `[R, H]`, fp32. Nothing else is computed."""
        layers = self.layers()
        if synced(layers):
            return synced_sparse_expert_mlp(x_bd, layers, plan)
        return sparse_expert_mlp(
            x_bd,
            layers,
            plan.expert_ids,
            plan.weights,
            plan.order,
            plan.offsets,
            unit_norm=plan.unit_norm,
            invariant=self._invariant(),
        )

    def freeze(self) -> None:
        """Keep the weights in the products' precision alone, for inference from now on: they must not change any more."""
        for weight in self.weights:
            weight.requires_grad_(False)
            weight.data = weight.data.to(self.dtype)
        self._frozen = self.layers()

    def quantise(self) -> None:
        """Keep the weights as int8 with a scale for each output (`kernels.quantise`), for `combine` at inference."""
        scales = []
        for index, weight in enumerate(self.weights):
            q, scale = quantise(weight.detach())
            self.weights[index] = nn.Parameter(q, requires_grad=False)
            scales.append(nn.Parameter(scale, requires_grad=False))
        self.weight_scales = nn.ParameterList(scales)
        self._frozen = ()
        self._frozen = self.layers()

    def _invariant(self) -> bool:
        """At inference a row's result must not depend on the rows that come with it."""
        return not (self.training or torch.is_grad_enabled())

    def layers(self) -> tuple[Layer, ...]:
        """What the kernels are given, weights in the products' precision."""
        return self._frozen or tuple(self._layer(index) for index in range(len(self.weights)))

    def _layer(self, index: int) -> Layer:
        bias, scale = (None if stack is None else stack[index] for stack in (self.biases, self.weight_scales))
        weight = self.weights[index] if scale is not None else self.weights[index].to(self.dtype)
        if index >= self.hidden_layers:
            return Layer(weight, bias, weight_scale=scale)
        norm = None
        if self.norms is not None:
            module = self.norms[index]
            assert isinstance(module, StackedBatchNorm)
            norm = module.state(self.training)
        return Layer(weight, bias, norm, self.activation, self.dropout if self.training else 0.0, scale)


class Towers(nn.Module):
    """One tower a task: perceptrons of one shape, and behind them a linear layer of the task's own width.

    The input is `[B, D]` (shared by all) or `[B, T, D]`, the output `[B, Σ widths]`: the first task's numbers, the second's …

    >>> Towers(8, (4,), "none", [1, 3]).eval()(torch.zeros(5, 2, 8)).shape
    torch.Size([5, 4])
    """

    def __init__(self, in_dim: int, dims: Sequence[int], norm: Norm, widths: Sequence[int]) -> None:
        super().__init__()
        self.hidden = MLPExperts(len(widths), in_dim, dims, norm) if dims else None
        # The last layers of tasks of one width are one stack.
        self._stacks = [[t for t, w in enumerate(widths) if w == width] for width in dict.fromkeys(widths)]
        self.last = nn.ModuleList(
            MLPExperts(len(tasks), dims[-1] if dims else in_dim, (), linear_out=widths[tasks[0]]) for tasks in self._stacks
        )
        order = [t for tasks in self._stacks for t in tasks]
        self._widths, self._place = [widths[t] for t in order], [order.index(t) for t in range(len(widths))]

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.hidden is None else self.hidden(x)
        if len(self._stacks) == 1:
            out: Tensor = self.last[0](x).flatten(1)
            return out
        outs = [
            last(x if x.dim() == 2 else x[:, tasks]).flatten(1) for last, tasks in zip(self.last, self._stacks, strict=True)
        ]
        pieces = torch.cat(outs, 1).split(self._widths, 1)
        return torch.cat([pieces[place] for place in self._place], 1)

    def start_at(self, outputs: Sequence[Sequence[float]]) -> None:
        """Set the last biases: each task's outputs where nothing else adds to them."""
        with torch.no_grad():
            for last, tasks in zip(self.last, self._stacks, strict=True):
                assert isinstance(last, MLPExperts)
                assert last.biases is not None
                last.biases[-1].copy_(torch.tensor([outputs[t] for t in tasks]))


class StackedBatchNorm(nn.Module):
    """The parameters and running moments of each unit of each expert's batch normalisation, `[E, H]`; the kernels apply it.

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

    def state(self, training: bool) -> BatchNorm:
        """What the kernels need to know."""
        return BatchNorm(self.weight, self.bias, self.running_mean, self.running_var, training, self.momentum, self.eps)
