"""What may stand between the embeddings and any family: DCN-v2's crosses and DIN's target attention. (Beside it:
`recsys_moe.first_order`.)

    crosses (Wang et al., WWW 2021):    x_{l+1} = x_0 ⊙ c_l(x_l) + x_l
        full                            c(x) = W·x + b
        low-rank, of rank r             c(x) = U·V·x + b,   V: D → r, U: r → D
        mixture of K low-rank experts   c(x) = Σ_i G(x)_i · (U_i·g(C_i·g(V_i·x)) + b_i),   G(x) = softmax(W·x + b)
    target attention (Zhou et al., KDD 2018), of a sequence's embeddings e_1, e_2, … for a target's embedding v:
        z = Σ_i a(e_i, v)·e_i,   a(e, v) = MLP(v ⊕ e ⊕ (v − e) ⊕ (v ⊙ e)), not normalised, as in the paper

The paper leaves g open: here it is Swish, as in a's hidden layers. A mixture has biases inside of g too, and one b an expert.

Shapes: B rows, S embedding sets, D inputs of each, N items of all rows' sequences, d width of an embedding.
"""

from collections.abc import Collection
from dataclasses import field
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys_moe.errors import UserError, nearest
from recsys_moe.experts import MLPExperts
from recsys_moe.routing import SoftRouter
from recsys_moe.typed import typed

Width = Annotated[int, Field(ge=1)]


@typed
class FrontConfig:
    """Number of cross layers (0: none), their rank (0: full) and experts; which sequence attention pools for which target;
    whether each task's outputs have a linear model of all inputs beside the network (`first_order`).

    `attention={last_viewed: video_id}` takes the place of the sequence's own pooling; the target is a categorical, hashed or
    cross feature. `attention_dims` are the hidden widths of the attention's network.
    """

    cross_layers: Annotated[int, Field(ge=0)] = 0
    cross_rank: Annotated[int, Field(ge=0)] = 0
    cross_experts: Annotated[int, Field(ge=1)] = 1
    attention: dict[str, str] = field(default_factory=dict)
    attention_dims: tuple[Width, ...] = (32,)
    first_order: bool = False

    @model_validator(mode="after")
    def _check_rank(self) -> Self:
        if self.cross_experts > 1 and not self.cross_rank:
            raise ValueError(
                f"model.front.cross_experts is {self.cross_experts}, but mixtures are of low-rank crosses; set "
                "model.front.cross_rank too"
            )
        return self


def check_attention(config: FrontConfig, sequences: Collection[str], targets: Collection[str]) -> None:
    """Raises UserError: the attention is over a feature that is none of `sequences`, or for one that is none of `targets`."""
    for sequence, target in config.attention.items():
        if sequence not in sequences:
            raise UserError(
                f"model.front.attention is over {sequence!r}, which is no sequence of the schema; "
                f"{nearest(sequence, sequences)}"
            )
        if target not in targets:
            raise UserError(
                f"model.front.attention is for {target!r}, which is no categorical, hashed or cross feature of the schema; "
                f"{nearest(target, targets)}"
            )


class Front(nn.Module):
    """The crosses, if there are any, and the attention over each of `sequences`, by these names."""

    def __init__(
        self, config: FrontConfig, sequences: Collection[str], sets: int, width: int, in_dim: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        dims = config.attention_dims
        self.attention = nn.ModuleDict({name: TargetAttention(sets, width, dims, dtype) for name in sequences})
        self.crosses = Crosses(config, sets, in_dim, dtype) if config.cross_layers else None


class Crosses(nn.Module):
    """x fp32 `[B, D]` or `[B, S, D]` → the same shape; each embedding set has crosses of its own. Products are in `dtype`.

    >>> Crosses(FrontConfig(cross_layers=2, cross_rank=4), sets=1, in_dim=12, dtype=torch.float32)(torch.zeros(5, 12)).shape
    torch.Size([5, 12])
    """

    def __init__(self, config: FrontConfig, sets: int, in_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        kind = FullCross if not config.cross_rank else LowRankCross if config.cross_experts == 1 else MixedCross
        self.layers = nn.ModuleList(kind(config, sets, in_dim, dtype) for _ in range(config.cross_layers))

    def forward(self, x: Tensor) -> Tensor:
        first = x if x.dim() == 3 else x.unsqueeze(1)
        crossed = first
        for layer in self.layers:
            crossed = first * layer(crossed) + crossed
        return crossed.view(x.shape)


class FullCross(nn.Module):
    """`[B, S, D]` → c `[B, S, D]`."""

    def __init__(self, config: FrontConfig, sets: int, in_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = MLPExperts(sets, in_dim, (), linear_out=in_dim, dtype=dtype)

    def forward(self, x_bsd: Tensor) -> Tensor:
        c_bsd: Tensor = self.linear(x_bsd)
        return c_bsd.float()


class LowRankCross(nn.Module):
    """`[B, S, D]` → c `[B, S, D]`."""

    def __init__(self, config: FrontConfig, sets: int, in_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = MLPExperts(sets, in_dim, (), linear_out=config.cross_rank, bias=False, dtype=dtype)
        self.up = MLPExperts(sets, config.cross_rank, (), linear_out=in_dim, dtype=dtype)

    def forward(self, x_bsd: Tensor) -> Tensor:
        c_bsd: Tensor = self.up(self.down(x_bsd))
        return c_bsd.float()


class MixedCross(nn.Module):
    """`[B, S, D]` → c `[B, S, D]`: each set's gate mixes its own experts."""

    def __init__(self, config: FrontConfig, sets: int, in_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        k, r = config.cross_experts, config.cross_rank
        self.source = tuple(range(sets))
        self.router = SoftRouter(in_dim, sets, sets * k, torch.eye(sets, dtype=torch.bool).repeat_interleave(k, 1))
        self.experts = MLPExperts(sets * k, in_dim, (r, r), linear_out=in_dim, activation="silu", dtype=dtype)

    def forward(self, x_bsd: Tensor) -> Tensor:
        return self.router(x_bsd, self.source).mix(self.experts(x_bsd, self.source))


class TargetAttention(nn.Module):
    """Each row's items, weighed for its target: target `[B, S, d]`, items `[N, S, d]`, row by row, and how many of them are
    each row's, `[B]` → `[B, S, d]`, zeros for a row without any. fp32; the network's products are in `dtype`.

    >>> attention = TargetAttention(sets=1, width=4, dims=(8,), dtype=torch.float32)
    >>> attention(torch.ones(2, 1, 4), torch.ones(3, 1, 4), torch.tensor([3, 0]))[1].tolist()
    [[0.0, 0.0, 0.0, 0.0]]
    """

    def __init__(self, sets: int, width: int, dims: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weigh = MLPExperts(sets, 4 * width, dims, linear_out=1, activation="silu", dtype=dtype)

    def forward(self, target_bsd: Tensor, items_nsd: Tensor, lengths_b: Tensor) -> Tensor:
        rows = torch.arange(target_bsd.shape[0], device=lengths_b.device)
        row_n = rows.repeat_interleave(lengths_b, output_size=items_nsd.shape[0])
        v_nsd = target_bsd[row_n]
        weights_ns1 = self.weigh(torch.cat([v_nsd, items_nsd, v_nsd - items_nsd, v_nsd * items_nsd], 2)).float()
        return torch.zeros_like(target_bsd).index_add(0, row_n, weights_ns1 * items_nsd)
