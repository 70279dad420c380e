"""A decoder with any router of the core: Llama's attention, and in every layer SwiGLU experts that this router chooses.

The configuration is this project's own. What transformers has a family for is in that family's file.
"""

from dataclasses import KW_ONLY
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from recsys_moe.kernels import Scoring
from recsys_moe.llm.layers import (
    Decoder,
    DecoderConfig,
    GroupedAttention,
    Rotary,
    Tensors,
    expert_tensors,
    head_dim,
    swiglu_experts,
    under,
)
from recsys_moe.routing import (
    ExpertChoiceRouter,
    GShardRouter,
    HashRouter,
    NoisyTopKRouter,
    NormRouter,
    RandomRouter,
    SwitchRouter,
    TopKRouter,
    TopPRouter,
)
from recsys_moe.typed import typed


@typed
class TopK:
    name: Literal["top_k"]
    k: int
    scoring: Scoring = "softmax"
    renormalize: bool = False
    correction_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    scale: float = 1.0


@typed
class NoisyTopK:
    name: Literal["noisy_top_k"]
    k: int


@typed
class GShard:
    name: Literal["gshard"]
    second: Literal["sample", "drop"] = "sample"


@typed
class Switch:
    name: Literal["switch"]
    jitter: float = 0.01


@typed
class TopP:
    name: Literal["top_p"]
    p: float


@typed
class Norm:
    name: Literal["norm"]
    k: int


@typed
class ExpertChoice:
    name: Literal["expert_choice"]
    capacity_factor: float


@typed
class Hash:
    name: Literal["hash"]


@typed
class Random:
    name: Literal["random"]
    k: int


Router = Annotated[TopK | NoisyTopK | GShard | Switch | TopP | Norm | ExpertChoice | Hash | Random, Field(discriminator="name")]


def make_router(config: Any, width: int, experts: int) -> nn.Module:
    """The router that a configuration describes.

    >>> make_router(TopP("top_p", p=0.5), 8, 4)(torch.zeros(2, 8)).expert_ids.shape
    torch.Size([2, 4])
    """
    options = {name: getattr(config, name) for name in type(config).__dataclass_fields__ if name != "name"}
    match config:
        case Hash():
            return HashRouter(experts)
        case Random():
            return RandomRouter(experts, **options)
        case _:
            return _LEARNED[type(config)](width, experts, **options)


_LEARNED: dict[type, Any] = {
    TopK: TopKRouter,
    NoisyTopK: NoisyTopKRouter,
    GShard: GShardRouter,
    Switch: SwitchRouter,
    TopP: TopPRouter,
    Norm: NormRouter,
    ExpertChoice: ExpertChoiceRouter,
}


@typed
class RoutedConfig(DecoderConfig):
    _: KW_ONLY
    intermediate_size: int
    num_experts: int
    router: Router
    num_key_value_heads: int | None = None
    head_dim: int | None = None


class RoutedMoe(nn.Module):
    """Σ_k w_k·expert_k(x) by the router's plan; a hash router chooses by the token itself."""

    def __init__(self, config: RoutedConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = make_router(config.router, config.hidden_size, config.num_experts)
        self.experts = swiglu_experts(config.num_experts, config.hidden_size, config.intermediate_size, dtype)
        self.num_shared = 0
        self.by_token = isinstance(config.router, Hash)

    def forward(self, x_nd: Tensor, tokens_n: Tensor | None = None) -> Tensor:
        return self.experts.combine(x_nd, self.router(x_nd if tokens_n is None else tokens_n))

    def tensors(self) -> Tensors:
        found: Tensors = {f"router.{name}": tensor for name, tensor in self.router.state_dict(keep_vars=True).items()}
        return found | under("experts", expert_tensors(self.experts, self.experts.weights[0].shape[0]))


def build(config: RoutedConfig, dtype: torch.dtype) -> Decoder:
    """The model, its weights not read yet."""
    dim, kv_heads = head_dim(config), config.num_key_value_heads or config.num_attention_heads
    rotary = Rotary(config.rope_parameters, dim, config.max_position_embeddings)
    return Decoder(
        config,
        dtype,
        rotary,
        attention=lambda i: GroupedAttention(config.hidden_size, config.num_attention_heads, kv_heads, dim),
        ffn=lambda i: RoutedMoe(config, dtype),
    )
