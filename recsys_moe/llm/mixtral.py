"""Mixtral (2401.04088): Llama's attention, and in place of its dense layer a top-k router over SwiGLU experts.

The same router and experts as in a multi-task model with sparse gates: `TopKRouter` and `MLPExperts`.
"""

from dataclasses import KW_ONLY

import torch
from torch import Tensor, nn

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
from recsys_moe.routing import TopKRouter
from recsys_moe.typed import typed


@typed
class MixtralConfig(DecoderConfig):
    _: KW_ONLY
    intermediate_size: int
    num_local_experts: int
    num_experts_per_tok: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    sliding_window: int | None = None
    rms_norm_eps: float = 1e-5


class MixtralMoe(nn.Module):
    """Softmax over all experts in fp32, the k largest divided by their sum, those experts' weighted sum."""

    def __init__(self, config: MixtralConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width, experts = config.hidden_size, config.num_local_experts
        self.router = TopKRouter(width, experts, config.num_experts_per_tok, renormalize=True)
        self.experts = swiglu_experts(experts, width, config.intermediate_size, dtype)
        self.num_shared = 0

    def forward(self, x_nd: Tensor) -> Tensor:
        return self.experts.combine(x_nd, self.router(x_nd))

    def tensors(self) -> Tensors:
        experts = expert_tensors(self.experts, self.router.linear.num_experts, "w1", "w3", "w2")
        return {"gate.weight": self.router.linear.weight} | under("experts", experts)


def build(config: MixtralConfig, dtype: torch.dtype) -> Decoder:
    """The model, its weights not read yet."""
    dim, kv_heads = head_dim(config), config.num_key_value_heads or config.num_attention_heads
    rotary, window = Rotary(config.rope_parameters, dim, config.max_position_embeddings), config.sliding_window
    return Decoder(
        config,
        dtype,
        rotary,
        attention=lambda i: GroupedAttention(config.hidden_size, config.num_attention_heads, kv_heads, dim, window=window),
        ffn=lambda i: MixtralMoe(config, dtype),
        ffn_name="block_sparse_moe",
        window=window,
    )
