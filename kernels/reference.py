"""The operations in plain, differentiable PyTorch: what every faster backend is held against.

Shapes: B rows, D inputs, E experts, H units, T tasks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_mlp(x: Tensor, weight_ehd: Tensor, bias_eh: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """One linear layer of all experts at once: y[b, e] = W[e]·x[b] + bias[e], or W[e]·x[b, e] for an input per expert.

    Args:
        x: `[B, D]` shared by the experts, or `[B, E, D]` with one input for each.
        weight_ehd: `[E, H, D]`.
        bias_eh: `[E, H]`.
        dtype: precision of the matrix product (fp32 or bf16); it accumulates in fp32.

    Returns:
        fp32 `[B, E, H]`.

    >>> y = expert_mlp(torch.ones(2, 3), torch.ones(4, 5, 3), torch.zeros(4, 5))
    >>> y.shape, y[0, 0, 0].item()
    (torch.Size([2, 4, 5]), 3.0)
    """
    e, h, d = weight_ehd.shape
    x, weight = x.to(dtype), weight_ehd.to(dtype)
    if x.dim() == 2:
        # One product [B, D] × [D, E·H] for all experts.
        y = F.linear(x, weight.reshape(e * h, d)).view(-1, e, h)
    else:
        y = torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    return y.float() + bias_eh


def gate_mix(weights_bte: Tensor, experts_beh: Tensor) -> Tensor:
    """Each task's mixture of the experts' outputs: z[b, t] = Σ_e w[b, t, e]·y[b, e]; fp32 `[B, T, H]`."""
    return torch.bmm(weights_bte, experts_beh)
