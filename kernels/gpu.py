"""The operations on a GPU: NVIDIA or AMD, through Triton. `triton_ops.py` has the operators, `triton_kernels.py` the kernels.

A layer of dense experts and one of sparse experts are the same operator; every sum has a fixed order, so results repeat to
the bit. With TRITON_INTERPRET=1 in the environment when Python starts, the kernels are interpreted on the CPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from triton import knobs

from recsys_moe.kernels import triton_ops
from recsys_moe.kernels.reference import check_allowed, check_finite
from recsys_moe.kernels.types import BatchNorm, Layer, Scoring

_INTERPRETED = knobs.runtime.interpret  # as the kernels were made


def why_not(device: str) -> str | None:
    """Why it can't run on a device; None if it can."""
    if device == "cuda" or (device == "cpu" and _INTERPRETED):  # an AMD GPU calls itself cuda too
        return None
    return f"its kernels run on a GPU and the tensors are on {device!r} (TRITON_INTERPRET=1 interprets them on the CPU, slowly)"


def expert_mlp(x: Tensor, layer: Layer, gate_bgd: Tensor | None, source: tuple[int, ...], invariant: bool) -> Tensor:
    x_bsd = x.unsqueeze(1) if x.dim() == 2 else x
    return _layer(x_bsd, gate_bgd, layer, None, None, source, 1, invariant)


def linear(x_bd: Tensor, weight_hd: Tensor, bias_h: Tensor | None, invariant: bool) -> Tensor:
    one = Layer(weight_hd.unsqueeze(0), None if bias_h is None else bias_h.unsqueeze(0))
    return expert_mlp(x_bd, one, None, (0,), invariant).squeeze(1)


def gate_mix(logits_bte: Tensor, experts_beh: Tensor, mask_te: Tensor | None, residual_bte: Tensor | None) -> Tensor:
    mask = None if mask_te is None else mask_te.to(torch.uint8)
    residual = None if residual_bte is None else residual_bte.float()
    return triton_ops.gate_mix(logits_bte.float(), experts_beh, mask, residual)


def route_topk(
    logits_be: Tensor, k: int, scoring: Scoring, renormalize: bool, bias_e: Tensor | None, allowed_be: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_finite(logits_be)
    check_allowed(allowed_be, k)
    bias = None if bias_e is None else bias_e.detach().float()
    allowed = None if allowed_be is None else allowed_be.to(torch.uint8)
    return triton_ops.route_topk(logits_be.float(), k, scoring, renormalize, bias, allowed)


def sort_by_expert(expert_ids_rk: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return triton_ops.sort_by_expert(expert_ids_rk.int(), num_experts)


def sparse_expert_mlp(
    x_bd: Tensor,
    layers: tuple[Layer, ...],
    expert_ids_rk: Tensor,
    weights_rk: Tensor,
    order: Tensor,
    offsets: Tensor,
    unit_norm: bool,
    invariant: bool,
) -> Tensor:
    r, k = expert_ids_rk.shape
    tasks = r // x_bd.shape[0] if x_bd.shape[0] else 1
    order, offsets = order.int(), offsets.int()
    h = x_bd
    for number, layer in enumerate(layers):
        # The first layer gathers its rows from x; what it computes lies sorted by expert from there on.
        h = _layer(h, None, layer, None if number else order, offsets, (0,), k * tasks, invariant)
    y, _ = triton_ops.combine(h, weights_rk.float(), order, offsets, unit_norm, x_bd.dtype)
    return y


def _layer(
    x: Tensor,
    gate: Tensor | None,
    layer: Layer,
    order: Tensor | None,
    offsets: Tensor | None,
    source: tuple[int, ...],
    slots: int,
    invariant: bool,
) -> Tensor:
    """One layer; moves the running moments of a norm in training."""
    weight, bias, norm, activation, dropout, _ = layer
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"backend 'triton' takes weights in float32 and bfloat16, and the weight is {weight.dtype}")
    scale = shift = mean = var = None
    training, eps = False, 0.0
    if norm is not None:
        scale, shift, mean, var, training, _, eps = norm
    learned = (x, gate, weight, bias, scale, shift)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned)
    y, _, batch_mean, batch_var = triton_ops.layer(
        *(x, gate, weight, bias, scale, shift, mean, var, order, offsets),
        *(source, slots, activation, training, eps, keep, invariant),
    )
    if norm is not None and training:
        rows = x.shape[0] if offsets is None else offsets.diff().unsqueeze(1)
        _move(norm, batch_mean.detach(), batch_var.detach(), rows)
    return F.dropout(y, dropout) if dropout else y


def _move(norm: BatchNorm, mean: Tensor, var: Tensor, rows: Tensor | int) -> None:
    """Running moments towards those that were used, which are themselves for experts with fewer than two rows."""
    if isinstance(rows, int):
        if rows < 2:
            return
        unbiased = var * (rows / (rows - 1))
    else:
        unbiased = torch.where(rows > 1, var * (rows / (rows - 1).clamp_min(1)), var)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(unbiased, norm.momentum)
