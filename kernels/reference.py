"""The operations in plain, differentiable PyTorch: what every faster backend is held against.

Shapes: B rows, S inputs a row, G groups of experts, E experts, D inputs and H outputs of a layer, T tasks (gates) a row,
R = B·T routed rows, K experts a routed row. Tensors of fp64 are computed in fp64 throughout.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_moe.kernels.types import Activation, BatchNorm, Layer, Scoring


def expert_mlp(x: Tensor, layer: Layer, gate_bgd: Tensor | None, source: tuple[int, ...], invariant: bool) -> Tensor:
    if invariant:  # row by row: nothing else is there that could matter
        alone = [
            expert_mlp(x[i : i + 1], layer, None if gate_bgd is None else gate_bgd[i : i + 1], source, False)
            for i in range(x.shape[0])
        ]
        return torch.cat(alone) if alone else expert_mlp(x, layer, gate_bgd, source, False)
    e = layer.weight.shape[0]
    dtype = layer.weight.dtype
    x_bsd = x.unsqueeze(1) if x.dim() == 2 else x
    x_bgd = x_bsd[:, list(source)]
    if gate_bgd is not None:
        x_bgd = x_bgd * gate_bgd
    x_ebd = x_bgd.to(dtype).transpose(0, 1).repeat_interleave(e // len(source), 0)
    z_ebh = _wide(torch.bmm(x_ebd, layer.weight.transpose(1, 2)))
    outputs = [_finish(z_ebh[i], layer, i) for i in range(e)]
    return torch.stack(outputs, 1).to(dtype)


def linear(x_bd: Tensor, weight_hd: Tensor, bias_h: Tensor | None, invariant: bool) -> Tensor:
    one = Layer(weight_hd.unsqueeze(0), None if bias_h is None else bias_h.unsqueeze(0))
    return expert_mlp(x_bd, one, None, (0,), invariant).squeeze(1)


def gate_mix(logits_bte: Tensor, experts_beh: Tensor, mask_te: Tensor | None, residual_bte: Tensor | None) -> Tensor:
    weights_bte = masked_softmax(logits_bte, mask_te)
    if residual_bte is not None:
        residual_bte = _wide(residual_bte)
        weights_bte = weights_bte + (residual_bte if mask_te is None else residual_bte.masked_fill(~mask_te, 0.0))
    return torch.bmm(weights_bte, _wide(experts_beh))


def masked_softmax(logits_bte: Tensor, mask_te: Tensor | None) -> Tensor:
    """Softmax over the experts that the mask allows; the others get 0."""
    logits_bte = _wide(logits_bte)
    if mask_te is not None:
        logits_bte = logits_bte.masked_fill(~mask_te, -torch.inf)
    return torch.softmax(logits_bte, -1)


def route_topk(
    logits_be: Tensor, k: int, scoring: Scoring, renormalize: bool, bias_e: Tensor | None, allowed_be: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_finite(logits_be)
    check_allowed(allowed_be, k)
    logits_be = _wide(logits_be)
    scores = logits_be
    if scoring == "softmax":
        scores = torch.softmax(logits_be, -1)
    elif scoring == "sigmoid":
        # As a softmax against 0: torch.sigmoid rounds a tensor's last few elements in another way than the rest, so that a
        # row's bits would depend on where it lies.
        scores = torch.softmax(F.pad(logits_be.unsqueeze(-1), (0, 1)), -1)[..., 0]
    choice = scores.detach()
    if bias_e is not None:
        choice = choice + bias_e
    if allowed_be is not None:
        choice = choice.masked_fill(~allowed_be, -torch.inf)
    # A stable sort takes the lowest index among equals; topk does not promise that.
    ids_bk = torch.sort(choice, stable=True, dim=-1, descending=True).indices[:, :k]
    weights_bk = scores.gather(1, ids_bk)
    if scoring == "softmax_after":
        weights_bk = torch.softmax(weights_bk, -1)
    elif renormalize:
        # The small number is DeepSeek-V3's: sigmoids may all be 0.
        weights_bk = weights_bk / (weights_bk.sum(-1, keepdim=True) + 1e-20)
    return ids_bk.int(), weights_bk


def check_finite(logits_be: Tensor) -> None:
    """Raises ValueError for a router's logits that are not; nothing is looked at while a graph is compiled."""
    if torch.compiler.is_compiling() or math.isfinite(logits_be.sum().item()):  # one operation where all is well
        return
    finite = torch.isfinite(logits_be)
    if not finite.all():
        row = int((~finite).any(1).nonzero()[0])
        raise ValueError(
            f"the router's logits of row {row} are not finite ({logits_be[row].tolist()[:8]} …); look at its input"
        )


def check_allowed(allowed_be: Tensor | None, k: int) -> None:
    """Raises ValueError for a row that may choose fewer than k experts; nothing is looked at while a graph is compiled."""
    if allowed_be is None or torch.compiler.is_compiling():
        return
    allowed_b = allowed_be.sum(1)
    if (few := allowed_b < k).any():
        row = int(few.nonzero()[0])
        raise ValueError(f"k is {k}, but allowed_be allows row {row} {int(allowed_b[row])} experts: allow each row at least k")


def sort_by_expert(expert_ids_rk: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    flat = expert_ids_rk.reshape(-1).long()
    flat = torch.where(flat < 0, num_experts, flat)
    order = torch.sort(flat, stable=True, dim=0).indices
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=flat.device).scatter_add(0, flat, torch.ones_like(flat))
    offsets = F.pad(counts[:num_experts].cumsum(0), (1, 0))
    return order.int(), offsets.int()


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
    if invariant and x_bd.shape[0] > 1:
        alone = []
        for i in range(x_bd.shape[0]):
            ids, weights = (t[i * tasks : (i + 1) * tasks] for t in (expert_ids_rk, weights_rk))
            own = sort_by_expert(ids, offsets.shape[0] - 1)
            alone.append(sparse_expert_mlp(x_bd[i : i + 1], layers, ids, weights, *own, unit_norm, False))
        return torch.cat(alone)
    bounds = offsets.tolist()
    slots, outputs = [], []
    for e in range(len(bounds) - 1):
        mine = order[bounds[e] : bounds[e + 1]].long()
        h = x_bd[mine // (k * tasks)]
        for layer in layers:
            h = _finish(_sparse_product(h, layer, e, x_bd.dtype), layer, e)
        slots.append(mine)
        outputs.append(h)
    y = torch.cat(outputs)
    if unit_norm:
        y = y / y.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    scattered = y.new_zeros(r * k, y.shape[-1]).index_put((torch.cat(slots),), y)
    weights = torch.where(expert_ids_rk >= 0, _wide(weights_rk), 0)
    return (scattered.view(r, k, y.shape[-1]) * weights.unsqueeze(-1)).sum(1).to(x_bd.dtype)


def paged_attention(
    q_nhd: Tensor,
    kv_nw: Tensor,
    turn_nd: Tensor,
    interleaved: bool,
    cache: Tensor,
    starts: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    kv_heads: int,
    value_at: int,
    value_dim: int,
    scale: float,
    window: int | None,
) -> Tensor:
    n, heads, dim = q_nhd.shape
    size = cache.shape[1]
    keys, values = kv_nw.split([kv_heads * dim, kv_nw.shape[1] - kv_heads * dim], 1)
    keys = rotary(keys.unflatten(1, (kv_heads, dim)), turn_nd, interleaved).flatten(1)
    q_nhd = rotary(q_nhd, turn_nd, interleaved)
    sequence = torch.repeat_interleave(starts.diff())
    place_n = (lengths - starts[1:])[sequence] + torch.arange(n, device=starts.device)
    cache[blocks[sequence, place_n // size].long(), place_n % size] = torch.cat([keys, values], 1)
    y_nhv = q_nhd.new_zeros(n, heads, value_dim)
    bounds = starts.tolist()
    for r, length in enumerate(lengths.tolist()):
        for i in range(bounds[r], bounds[r + 1]):  # token by token: nothing else is there that could matter
            place = length - bounds[r + 1] + i
            seen = torch.arange(max(0, place + 1 - window) if window else 0, place + 1, device=cache.device)
            rows = _wide(cache[blocks[r].long()[seen // size], seen % size])
            keys = rows[:, : kv_heads * dim].view(-1, kv_heads, dim)
            values = rows[:, value_at : value_at + kv_heads * value_dim].view(-1, kv_heads, value_dim)
            q_ghd = _wide(q_nhd[i]).view(kv_heads, heads // kv_heads, dim)
            weights = torch.softmax(torch.einsum("ghd,pgd->ghp", q_ghd, keys) * scale, -1)
            y_nhv[i] = torch.einsum("ghp,pgv->ghv", weights, values).flatten(0, 1).to(y_nhv.dtype)
    return y_nhv


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary(x_nhd: Tensor, turn_nd: Tensor, interleaved: bool) -> Tensor:
    plain, x = x_nhd.split([x_nhd.shape[2] - turn_nd.shape[1], turn_nd.shape[1]], 2)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    cos, sin = turn_nd.unsqueeze(1).chunk(2, -1)
    return torch.cat([plain, (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)], -1)


def embedding_bags(weights: Tensor, starts: Tensor, ids: Tensor, offsets: Tensor, width: int, mean: bool) -> Tensor:
    features = starts.shape[0]
    rows, bags = _bag_rows(starts, ids, offsets, width)
    summed = weights.new_zeros(offsets.shape[0] - 1, width).index_add(0, bags, weights.view(-1, width)[rows])
    if mean:
        summed = summed / offsets.diff().clamp_min(1).unsqueeze(1)
    return summed.view(features, -1, width).transpose(0, 1).flatten(1)


def embedding_adagrad(
    weights: Tensor,
    squares: Tensor,
    starts: Tensor,
    ids: Tensor,
    offsets: Tensor,
    grad: Tensor,
    width: int,
    mean: bool,
    rate: float,
    eps: float,
) -> None:
    rows, bags = _bag_rows(starts, ids, offsets, width)
    of_bags = grad.view(-1, starts.shape[0], width).transpose(0, 1).reshape(-1, width)
    if mean:
        of_bags = of_bags / offsets.diff().clamp_min(1).unsqueeze(1)
    touched, place = rows.unique(return_inverse=True)
    sums = grad.new_zeros(len(touched), width).index_add(0, place, of_bags[bags])
    squares[touched] += sums.square().mean(1)
    weights.view(-1, width)[touched] -= rate * sums / (squares[touched].sqrt() + eps).unsqueeze(1)


def _bag_rows(starts: Tensor, ids: Tensor, offsets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """For each id its row among those of all tables, and its bag."""
    bags = torch.repeat_interleave(torch.arange(offsets.shape[0] - 1, device=ids.device), offsets.diff())
    rows = (offsets.shape[0] - 1) // starts.shape[0]
    return ids + starts[bags // max(rows, 1)] // width, bags


def _sparse_product(h_nd: Tensor, layer: Layer, e: int, dtype: torch.dtype) -> Tensor:
    """W_e·h for each row, in the precision of the weights; of int8 ones, in `dtype`."""
    weight = layer.weight[e]
    if layer.weight_scale is None:
        return _wide(h_nd.to(weight.dtype) @ weight.t())
    return _wide(h_nd.to(dtype) @ weight.to(dtype).t()) * layer.weight_scale[e]


def _finish(z_nh: Tensor, layer: Layer, e: int) -> Tensor:
    """Bias, norm, activation and dropout of expert `e`."""
    if layer.bias is not None:
        z_nh = z_nh + layer.bias[e]
    if layer.norm is not None:
        z_nh = _batch_norm(z_nh, layer.norm, e)
    return F.dropout(activate(z_nh, layer.activation), layer.dropout)


def _batch_norm(z_nh: Tensor, norm: BatchNorm, e: int) -> Tensor:
    mean, var = norm.running_mean[e], norm.running_var[e]
    rows = z_nh.shape[0]
    if norm.training and rows > 1:
        mean, var = z_nh.mean(0), z_nh.var(0, correction=0)
        with torch.no_grad():
            norm.running_mean[e].lerp_(mean.detach().to(norm.running_mean.dtype), norm.momentum)
            unbiased = var.detach() * rows / (rows - 1)
            norm.running_var[e].lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    return (z_nh - mean) * torch.rsqrt(var + norm.eps) * norm.scale[e] + norm.shift[e]


def activate(z: Tensor, activation: Activation) -> Tensor:
    """The activation of a pre-activation, in its own precision (`gelu` is the exact one)."""
    if activation == "swiglu":
        u, v = z.chunk(2, -1)
        return F.silu(u) * v
    if activation == "double_sigmoid":
        return 2 * torch.sigmoid(z)
    return {"none": lambda t: t, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}[activation](z)


def _wide(t: Tensor) -> Tensor:
    """At least fp32: half precisions are raised, fp64 stays."""
    return t if t.dtype == torch.float64 else t.float()
