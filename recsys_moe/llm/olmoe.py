"""OLMoE (2409.02060): normalised queries and keys, a top-k router over SwiGLU experts in every layer."""

from dataclasses import KW_ONLY
from typing import Literal

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
class OlmoeConfig(DecoderConfig):
    _: KW_ONLY
    intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_key_value_heads: int | None = None
    norm_topk_prob: bool = False
    clip_qkv: float | None = None
    attention_bias: Literal[False] = False
    rms_norm_eps: float = 1e-5


class OlmoeMoe(nn.Module):
    """Σ_k softmax(W·x)_k·expert_k(x); the k weights are divided by their sum with `norm_topk_prob` only."""

    def __init__(self, config: OlmoeConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width, k = config.hidden_size, config.num_experts_per_tok
        self.router = TopKRouter(width, config.num_experts, k, renormalize=config.norm_topk_prob)
        self.experts = swiglu_experts(config.num_experts, width, config.intermediate_size, dtype)
        self.num_shared = 0

    def forward(self, x_nd: Tensor) -> Tensor:
        return self.experts.combine(x_nd, self.router(x_nd))

    def tensors(self) -> Tensors:
        return {"gate.weight": self.router.linear.weight} | under(
            "experts", expert_tensors(self.experts, self.router.linear.num_experts)
        )


def build(config: OlmoeConfig, dtype: torch.dtype) -> Decoder:
    """The model, its weights not read yet."""
    width, dim = config.hidden_size, head_dim(config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    rotary = Rotary(config.rope_parameters, dim, config.max_position_embeddings)
    return Decoder(
        config,
        dtype,
        rotary,
        attention=lambda i: GroupedAttention(width, heads, kv_heads, dim, qk_norm=config.rms_norm_eps, clip=config.clip_qkv),
        ffn=lambda i: OlmoeMoe(config, dtype),
    )
