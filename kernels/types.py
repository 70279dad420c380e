"""What the operations are told beside their tensors."""

from typing import Literal, NamedTuple

from torch import Tensor

Activation = Literal["none", "relu", "silu", "gelu", "swiglu", "double_sigmoid"]
"""After the linear part and the norm: y = act(z). `swiglu` halves the width: z = [u, v] → silu(u)·v.
`double_sigmoid` is 2·σ(z), a gate that is 1 where z is 0 (LHUC; HoME's feature gate)."""

Scoring = Literal["softmax", "sigmoid", "softmax_after"]
"""How logits become weights: softmax over all experts, a sigmoid each, or a softmax over the chosen ones only."""


class BatchNorm(NamedTuple):
    """Batch normalisation of each unit of each expert: y = scale·(z − mean)/√(var + eps) + shift (Ioffe & Szegedy 2015).

    All tensors are fp32 `[E, H]`. With `training` the moments are the batch's own, over the rows that the expert sees, and
    the running ones move by `momentum` in place (the running variance by the unbiased one); an expert that sees fewer than
    two rows has no variance and keeps to the running moments. Without, the running moments are constants, folded with the
    bias into one multiply-add.
    """

    scale: Tensor
    shift: Tensor
    running_mean: Tensor
    running_var: Tensor
    training: bool
    momentum: float = 0.1
    eps: float = 1e-5


class Layer(NamedTuple):
    """One layer of all experts: z = W_e·x + b_e, batch norm where there is one, activation, dropout (in training only: set
    0 at inference).

    `weight` is `[E, H, D]` (`swiglu`: `[E, 2·H, D]`, gate rows first), `bias` `[E, H]`. The weight's dtype is the precision
    of the product (fp32 or bf16; the reference takes fp64 too), which accumulates in fp32; norm and activation are fp32.

    For inference, the weights of sparse experts may be int8 with a scale for each output, fp32 `[E, H]`: W = scale·weight
    (`quantise`). The product then has the precision of its input.
    """

    weight: Tensor
    bias: Tensor | None = None
    norm: BatchNorm | None = None
    activation: Activation = "none"
    dropout: float = 0.0
    weight_scale: Tensor | None = None


class FeatureGate(NamedTuple):
    """HoME's feature gates of G groups, by their parts (Kuaishou, arXiv 2408.05430). Of a group that reads x:

        gate = Σ_l softmax(logits)_l · 2σ(up_l · down_l · x)

    `logits` is fp32 `[B, G, L]`; `down` `[G·L, R, D]` and `up` `[G·L, D, R]` have the L heads of a group side by side, in the
    dtype of the experts' weight.
    """

    logits: Tensor
    down: Tensor
    up: Tensor
