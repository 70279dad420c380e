"""A decoder with Switch layers (2101.03961): Llama's attention, and a top-1 router over ReLU experts in every n-th layer.

Switch itself is an encoder-decoder; its layer is what is kept here. The configuration is this project's own.
"""

from dataclasses import KW_ONLY

import torch
from torch import Tensor, nn

from recsys_moe.experts import MLPExperts
from recsys_moe.llm.layers import Decoder, DecoderConfig, GroupedAttention, Rotary, Tensors, head_dim
from recsys_moe.routing import SwitchRouter
from recsys_moe.typed import typed


@typed
class SwitchConfig(DecoderConfig):
    """Layer i has experts where (i + 1) % `decoder_sparse_step` is 0; the router's jitter is for training."""

    _: KW_ONLY
    intermediate_size: int
    num_experts: int
    num_key_value_heads: int | None = None
    decoder_sparse_step: int = 2
    router_jitter_noise: float = 0.01


def relu_experts(num_experts: int, width: int, hidden: int, dtype: torch.dtype) -> MLPExperts:
    """E experts W_o·relu(W_i·x), without biases."""
    return MLPExperts(num_experts, width, (hidden,), linear_out=width, bias=False, dtype=dtype)


class ReluMlp(nn.Module):
    """The dense layer: one such expert that every token uses."""

    def __init__(self, config: SwitchConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.expert = relu_experts(1, config.hidden_size, config.intermediate_size, dtype)

    def forward(self, x_nd: Tensor) -> Tensor:
        out: Tensor = self.expert(x_nd).squeeze(1)
        return out

    def tensors(self) -> Tensors:
        wi, wo = self.expert.weights
        return {"wi.weight": wi[0], "wo.weight": wo[0]}


class SwitchMoe(nn.Module):
    """p_e·expert_e(x) for the one expert e of the largest p = softmax(W·x); without capacity, so that nothing is dropped."""

    def __init__(self, config: SwitchConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.router = SwitchRouter(config.hidden_size, config.num_experts, config.router_jitter_noise)
        self.experts = relu_experts(config.num_experts, config.hidden_size, config.intermediate_size, dtype)

    def forward(self, x_nd: Tensor) -> Tensor:
        return self.experts.combine(x_nd, self.router(x_nd))

    def tensors(self) -> Tensors:
        found: Tensors = {"router.classifier.weight": self.router.linear.weight}
        wi, wo = self.experts.weights
        for e in range(wi.shape[0]):
            found[f"experts.expert_{e}.wi.weight"], found[f"experts.expert_{e}.wo.weight"] = wi[e], wo[e]
        return found


def build(config: SwitchConfig, dtype: torch.dtype) -> Decoder:
    """The model, its weights not read yet."""
    dim, kv_heads = head_dim(config), config.num_key_value_heads or config.num_attention_heads
    rotary, step = Rotary(config.rope_parameters, dim, config.max_position_embeddings), config.decoder_sparse_step
    return Decoder(
        config,
        dtype,
        rotary,
        attention=lambda i: GroupedAttention(config.hidden_size, config.num_attention_heads, kv_heads, dim),
        ffn=lambda i: ReluMlp(config, dtype) if (i + 1) % step else SwitchMoe(config, dtype),
    )
