"""Several workers train as one: what they sum over their pieces of a batch.

Every worker holds the dense part of the model and takes its piece of each batch; embedding tables are shared out
(`recsys_moe.sharding`). Sums over rows — loss weights, gradients, the moments of a norm — are taken over all pieces, so that N
workers take the step that one worker would take with the whole batch, up to rounding. With one worker (or without a process
group) every function here hands its argument back as it is.

Shapes: B rows, E experts, H units, T tasks, N routed slots.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.kernels import BatchNorm, Layer, expert_mlp, sparse_expert_mlp
from recsys_moe.kernels.reference import activate
from recsys_moe.routing import SparsePlan


def rank() -> int:
    """Which of the workers this is, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many workers train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def total(values: Tensor) -> Tensor:
    """The sum of all workers' `values`."""
    if world_size() == 1:
        return values
    values = values.contiguous().clone()
    dist.all_reduce(values)
    return values


def agreed(decision: bool) -> bool:
    """Worker 0's decision, for all: clocks and disks differ."""
    if world_size() == 1:
        return decision
    value = torch.tensor([decision], dtype=torch.int32)
    dist.broadcast(value, 0)
    return bool(value)


def sum_gradients(parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
    """Replace the gradients by their sums over the workers, in one all-reduce; returns the loss, summed likewise."""
    if world_size() == 1:
        return loss.detach()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([loss.detach().view(1), *(g.reshape(-1) for g in gradients)])
    dist.all_reduce(flat)
    sums = flat[1:].split([g.numel() for g in gradients])
    for parameter, summed in zip(parameters, sums, strict=True):
        parameter.grad = summed.view_as(parameter)
    return flat[0]


def piece(rows: int, rank: int, world: int) -> slice:
    """The rows of a batch that worker `rank` of `world` takes: in order, as even as can be, perhaps none.

    >>> [piece(5, rank, 2) for rank in range(2)]
    [slice(0, 2, None), slice(2, 5, None)]
    """
    return slice(rank * rows // world, (rank + 1) * rows // world)


def gather_pieces(mine: Tensor, rows: int, group: Any = None) -> Tensor:
    """All rows `[rows, …]` from each worker's `piece` of them, on every worker (of a process group)."""
    world = world_size() if group is None else dist.get_world_size(group)
    if world == 1:
        return mine
    pieces = [piece(rows, r, world) for r in range(world)]
    longest = max(p.stop - p.start for p in pieces)
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: len(mine)] = mine
    gathered = [torch.empty_like(padded) for _ in pieces]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([g[: p.stop - p.start] for g, p in zip(gathered, pieces, strict=True)])


# ---- batch norm over all workers' rows -----------------------------------------------------------------------------------


def synced(layers: Sequence[Layer]) -> bool:
    """Whether a norm among the layers has to take its moments over more rows than this worker's."""
    return world_size() > 1 and any(layer.norm is not None and layer.norm.training for layer in layers)


def synced_expert_mlp(x: Tensor, layer: Layer, **inputs: Any) -> Tensor:
    """`kernels.expert_mlp` of a layer in training, its norm over all workers' rows. `inputs`: `feature_gate`, `source`."""
    z_beh = expert_mlp(x, Layer(layer.weight, layer.bias), **inputs)
    return _finish(z_beh, layer, None)


def synced_sparse_expert_mlp(x_bd: Tensor, layers: Sequence[Layer], plan: SparsePlan) -> Tensor:
    """`kernels.sparse_expert_mlp` of layers in training, norms over all workers' rows: fp32 `[R, H]`."""
    slots, k = plan.expert_ids.reshape(-1, 1), plan.expert_ids.shape[1]
    ones = torch.ones_like(slots, dtype=torch.float32)
    h = x_bd
    for layer in layers:
        # Every slot by itself, with weight 1: what the kernel then gives back is the slots' own outputs.
        plain = (Layer(layer.weight, layer.bias),)
        h = _finish(sparse_expert_mlp(h, plain, slots, ones, plan.order, plan.offsets), layer, slots.view(-1))
    h_rkh = h.float().view(-1, k, h.shape[-1])
    if plan.unit_norm:
        h_rkh = F.normalize(h_rkh, dim=-1)
    return (h_rkh * plan.weights.unsqueeze(2)).sum(1)


def _finish(z: Tensor, layer: Layer, expert_n: Tensor | None) -> Tensor:
    """Norm, activation and dropout, in the dtype of the products."""
    y = z.float()
    if layer.norm is not None:
        y = synced_batch_norm(y, layer.norm, expert_n)
    return F.dropout(activate(y, layer.activation), layer.dropout).to(z.dtype)


def synced_batch_norm(z: Tensor, norm: BatchNorm, expert_n: Tensor | None = None) -> Tensor:
    """Batch normalisation in training, its moments over the rows of all workers.

    Args:
        z: fp32 `[B, E, H]`, or `[N, H]` with the expert of each slot in `expert_n` (−1: none, and the result is 0).
        norm: its running moments move, on every worker alike.
    """
    index_n = None if expert_n is None else expert_n.long() + 1  # 0: no expert
    with torch.no_grad():
        count_e1, mean_eh, var_eh = _moments(z, norm.scale.shape[0], index_n)
        enough_e1 = count_e1 >= 2
        weight_e1 = torch.where(enough_e1, norm.momentum, 0.0)
        norm.running_mean.lerp_(mean_eh, weight_e1)
        norm.running_var.lerp_(var_eh * count_e1 / (count_e1 - 1).clamp_min(1), weight_e1)
        # Fewer than two rows have no variance: their norm is by the running moments, as constants.
        mean_eh = torch.where(enough_e1, mean_eh, norm.running_mean)
        inverse_eh = torch.rsqrt(torch.where(enough_e1, var_eh, norm.running_var) + norm.eps)
        share_e1 = torch.where(enough_e1, 1 / count_e1.clamp_min(1), 0.0)
    y: Tensor = _Normalise.apply(z, norm.scale, norm.shift, mean_eh, inverse_eh, share_e1, index_n)
    return y


def _moments(z: Tensor, experts: int, index_n: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count `[E, 1]`, mean and variance `[E, H]` over all workers: each one's own, merged in their order (Chan et al. 1979)."""
    if index_n is None:
        count_e1 = z.new_full((experts, 1), z.shape[0])
    else:
        count_e1 = torch.bincount(index_n, minlength=experts + 1)[1:, None].float()
    mean_eh = _sum_rows(z, experts, index_n) / count_e1.clamp_min(1)
    squares_eh = _sum_rows((z - _spread(mean_eh, index_n)).square(), experts, index_n)
    mine = torch.cat([count_e1, mean_eh, squares_eh], 1)
    everyones = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyones, mine)
    count_we1, mean_weh, squares_weh = torch.stack(everyones).split([1, *[z.shape[-1]] * 2], 2)
    count_e1 = count_we1.sum(0)
    mean_eh = (count_we1 * mean_weh).sum(0) / count_e1.clamp_min(1)
    squares_eh = (squares_weh + count_we1 * (mean_weh - mean_eh).square()).sum(0)
    return count_e1, mean_eh, squares_eh / count_e1.clamp_min(1)


def _sum_rows(z: Tensor, experts: int, index_n: Tensor | None) -> Tensor:
    """`[E, H]`: over the rows, or over each expert's slots."""
    return z.sum(0) if index_n is None else z.new_zeros(experts + 1, z.shape[1]).index_add(0, index_n, z)[1:]


def _spread(values_eh: Tensor, index_n: Tensor | None) -> Tensor:
    """Each expert's values to its rows; 0 to a slot without an expert."""
    return values_eh if index_n is None else F.pad(values_eh, (0, 0, 1, 0))[index_n]


class _Normalise(torch.autograd.Function):
    """y = scale·x̂ + shift with x̂ = (z − mean)·inverse; `share` is 1/count, or 0 where the moments are constants.

    ∂z = scale·inverse·(∂y − share·(Σ∂y + x̂·Σ(∂y·x̂))), the sums over all workers' rows (Ioffe & Szegedy 2015, §3). The
    gradients of scale and shift are this worker's: `sum_gradients` adds them up with all others.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        scale_eh: Tensor,
        shift_eh: Tensor,
        mean_eh: Tensor,
        inverse_eh: Tensor,
        share_e1: Tensor,
        index_n: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(z, scale_eh, mean_eh, inverse_eh, share_e1, index_n)
        factor_eh = scale_eh * inverse_eh
        return z * _spread(factor_eh, index_n) + _spread(shift_eh - mean_eh * factor_eh, index_n)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        z, scale_eh, mean_eh, inverse_eh, share_e1, index_n = ctx.saved_tensors
        experts, units = scale_eh.shape
        normed = (z - _spread(mean_eh, index_n)) * _spread(inverse_eh, index_n)
        shift_grad, scale_grad = _sum_rows(dy, experts, index_n), _sum_rows(dy * normed, experts, index_n)
        dy_eh, dy_normed_eh = (share_e1 * total(torch.cat([shift_grad, scale_grad], 1))).split(units, 1)
        pull = _spread(dy_eh, index_n) + normed * _spread(dy_normed_eh, index_n)
        return _spread(scale_eh * inverse_eh, index_n) * (dy - pull), scale_grad, shift_grad, None, None, None, None
