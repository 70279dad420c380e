"""Llama (2302.13971), dense: grouped-query attention and SwiGLU layers."""

from dataclasses import KW_ONLY

import torch

from recsys_moe.llm.layers import Decoder, DecoderConfig, GroupedAttention, Mlp, Rotary, head_dim
from recsys_moe.typed import typed


@typed
class LlamaConfig(DecoderConfig):
    _: KW_ONLY
    intermediate_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None


def build(config: LlamaConfig, dtype: torch.dtype) -> Decoder:
    """The model, its weights not read yet."""
    width, dim, window = config.hidden_size, head_dim(config), config.sliding_window
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    rotary = Rotary(config.rope_parameters, dim, config.max_position_embeddings)
    bias = config.attention_bias
    return Decoder(
        config,
        dtype,
        rotary,
        attention=lambda i: GroupedAttention(width, heads, kv_heads, dim, window=window, qkv_bias=bias, out_bias=bias),
        ffn=lambda i: Mlp(width, config.intermediate_size, dtype, config.mlp_bias),
        window=window,
    )
