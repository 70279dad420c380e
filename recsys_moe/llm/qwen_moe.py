"""Qwen2-MoE (Qwen1.5-MoE-A2.7B; 2407.10671): a top-k router over small experts, and a gated shared expert beside them."""

from dataclasses import KW_ONLY

import torch
from torch import Tensor, nn

from recsys_moe.llm.layers import (
    Decoder,
    DecoderConfig,
    GroupedAttention,
    Mlp,
    Rotary,
    Tensors,
    expert_tensors,
    head_dim,
    swiglu_experts,
    under,
)
from recsys_moe.routing import Gate, TopKRouter, sigmoid
from recsys_moe.typed import typed


@typed
class Qwen2MoeConfig(DecoderConfig):
    _: KW_ONLY
    intermediate_size: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    num_experts: int
    num_experts_per_tok: int
    num_key_value_heads: int | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] | None = None
    qkv_bias: bool = True
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None

    def sparse(self, i: int) -> bool:
        """Whether layer i has experts."""
        return i not in (self.mlp_only_layers or ()) and self.num_experts > 0 and (i + 1) % self.decoder_sparse_step == 0

    def window(self, i: int) -> int | None:
        """The sliding window of layer i."""
        kinds = self.layer_types or tuple(
            "sliding_attention" if i % 2 == 0 and i < self.max_window_layers else "full_attention"
            for i in range(self.num_hidden_layers)
        )
        return self.sliding_window if self.use_sliding_window and kinds[i] == "sliding_attention" else None


class Qwen2Moe(nn.Module):
    """Σ_k softmax(W·x)_k·expert_k(x) + σ(w·x)·shared(x); the k weights are divided by their sum with `norm_topk_prob` only."""

    def __init__(self, config: Qwen2MoeConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width, k = config.hidden_size, config.num_experts_per_tok
        self.router = TopKRouter(width, config.num_experts, k, renormalize=config.norm_topk_prob)
        self.experts = swiglu_experts(config.num_experts, width, config.moe_intermediate_size, dtype)
        self.shared = Mlp(width, config.shared_expert_intermediate_size, dtype)
        self.shared_gate = Gate(width, 1)

    def forward(self, x_nd: Tensor) -> Tensor:
        shared = sigmoid(self.shared_gate(x_nd)).to(x_nd.dtype) * self.shared(x_nd)
        return self.experts.combine(x_nd, self.router(x_nd)) + shared

    def tensors(self) -> Tensors:
        return (
            {"gate.weight": self.router.linear.weight, "shared_expert_gate.weight": self.shared_gate.weight}
            | under("experts", expert_tensors(self.experts, self.router.linear.num_experts))
            | under("shared_expert", self.shared.tensors())
        )


def build(config: Qwen2MoeConfig, dtype: torch.dtype) -> Decoder:
    """The model, its weights not read yet."""
    width, dim = config.hidden_size, head_dim(config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    rotary = Rotary(config.rope_parameters, dim, config.max_position_embeddings)
    windows = {config.window(i) for i in range(config.num_hidden_layers)}
    return Decoder(
        config,
        dtype,
        rotary,
        attention=lambda i: GroupedAttention(width, heads, kv_heads, dim, window=config.window(i), qkv_bias=config.qkv_bias),
        ffn=lambda i: Qwen2Moe(config, dtype) if config.sparse(i) else Mlp(width, config.intermediate_size, dtype),
        window=windows.pop() if len(windows) == 1 else None,
    )
