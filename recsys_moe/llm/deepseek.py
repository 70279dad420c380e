"""DeepSeekMoE (2401.06066), shared experts beside routed ones; V2 (2405.04434) and V3 (2412.19437): latent attention, routing
limited to groups of experts.

Shapes: N tokens, H heads; a head's query and key have n values without position and r with it (rotary), its value has v; the
latent has c values (`kv_lora_rank`).
"""

from dataclasses import KW_ONLY
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.kernels import Layer, expert_mlp
from recsys_moe.llm.layers import (
    Decoder,
    DecoderConfig,
    GroupedAttention,
    Heads,
    Joined,
    Linear,
    Mlp,
    RMSNorm,
    Rotary,
    Step,
    Tensors,
    expert_tensors,
    head_dim,
    inference,
    swiglu_experts,
    under,
    yarn_mscale,
)
from recsys_moe.routing import TopKRouter, sparse_plan
from recsys_moe.typed import typed


@typed
class DeepseekMoeConfig(DecoderConfig):
    """v1, whose attention is Llama's."""

    _: KW_ONLY
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    num_key_value_heads: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: Literal[1] = 1
    norm_topk_prob: bool = False
    scoring_func: Literal["softmax"] = "softmax"
    attention_bias: Literal[False] = False


@typed
class DeepseekConfig(DecoderConfig):
    """What V2 and V3 share."""

    _: KW_ONLY
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: Literal[1] = 1
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    attention_bias: Literal[False] = False
    num_nextn_predict_layers: int = 0

    @property
    def softmax_scale(self) -> float:
        """1/√(n + r), times YaRN's mscale², which makes up for the flatter softmax over a longer context."""
        rope = self.rope_parameters
        mscale = yarn_mscale(rope.factor, rope.mscale_all_dim) if rope.rope_type != "default" and rope.mscale_all_dim else 1.0
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * mscale**2


@typed
class DeepseekV2Config(DeepseekConfig):
    _: KW_ONLY
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"
    mlp_bias: Literal[False] = False


@typed
class DeepseekV3Config(DeepseekConfig):
    _: KW_ONLY
    norm_topk_prob: bool = True
    rope_interleave: bool = True
    n_group: int | None = 8
    topk_group: int | None = 4


class LatentAttention(nn.Module):
    """Multi-head latent attention; the cache holds c + r values a token, for all heads together.

    Keys are W_UK·latent and values W_UV·latent for each head. Neither is made: q·(W_UK·l) = (W_UKᵀ·q)·l and
    Σ p·(W_UV·l) = W_UV·Σ p·l, so the heads attend to the latents themselves, all to the same (absorbed form).
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.latent, self.rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        self.nope, self.value, self.q_rank = config.qk_nope_head_dim, config.v_head_dim, config.q_lora_rank
        self.cached = Heads(kv_heads=1, value_at=0, value_dim=self.latent, scale=config.softmax_scale)
        queries = self.heads * (self.nope + self.rope)
        # What reads x is one product: the queries (or their own latent), and the latent with its rotary part.
        self.down = Linear(width, (self.q_rank or queries) + self.latent + self.rope, bias=False)
        self.q_norm = RMSNorm(self.q_rank, 1e-6) if self.q_rank else None
        self.q_up = Linear(self.q_rank, queries, bias=False) if self.q_rank else None
        self.latent_norm = RMSNorm(self.latent, 1e-6)
        self.w_uk = nn.Parameter(torch.empty(self.heads, self.latent, self.nope).normal_(std=0.02))
        self.w_uv = nn.Parameter(torch.empty(self.heads, self.value, self.latent).normal_(std=0.02))
        self.out = Linear(self.heads * self.value, width, bias=False)

    @property
    def cache_width(self) -> int:
        return self.latent + self.rope

    @property
    def products_per_key(self) -> int:
        """Multiply-adds of a token's heads with one place of the cache."""
        return self.heads * (2 * self.latent + self.rope)

    def forward(self, x_nd: Tensor, step: Step, layer: int) -> Tensor:
        q, latent, key_rope = self.down(x_nd).split((self.down.out_features - self.cache_width, self.latent, self.rope), 1)
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        q_nope, q_rope = q.unflatten(1, (self.heads, -1)).split((self.nope, self.rope), 2)
        absorbed = expert_mlp(q_nope, Layer(self.w_uk.to(x_nd.dtype)), invariant=inference(self))
        queries = torch.cat([absorbed, q_rope], 2)
        y = step.attend(layer, queries, torch.cat([self.latent_norm(latent), key_rope], 1), self.cached)
        out: Tensor = self.out(expert_mlp(y, Layer(self.w_uv.to(x_nd.dtype)), invariant=inference(self)).flatten(1))
        return out

    def bind(self, fused: Any, norm: RMSNorm, cache: Tensor) -> None:
        """Add x + attention(norm(x)) to the layers that run in one call: the same operations, the same bits."""
        own = (None, None) if self.q_norm is None or self.q_up is None else (self.q_norm.weight, self.q_up.weight)
        fused.latent_attention(
            *(cache, norm.weight, norm.eps, self.down.weight, *own, self.latent_norm.weight, self.latent_norm.eps),
            *(self.w_uk, self.w_uv, self.out.weight, self.cached.scale),
        )

    def tensors(self) -> Tensors:
        shape = (self.heads * (self.nope + self.value), self.latent)
        found: Tensors = {
            "kv_a_layernorm.weight": self.latent_norm.weight,
            "kv_b_proj.weight": Joined(shape, (self.w_uk.transpose(1, 2), self.w_uv)),
        }
        found |= self.out.tensors(o_proj=self.out.out_features)
        if self.q_norm is None or self.q_up is None:
            return found | self.down.tensors(q_proj=self.heads * (self.nope + self.rope), kv_a_proj_with_mqa=self.cache_width)
        found |= self.down.tensors(q_a_proj=self.down.out_features - self.cache_width, kv_a_proj_with_mqa=self.cache_width)
        return found | {"q_a_layernorm.weight": self.q_norm.weight} | self.q_up.tensors(q_b_proj=self.q_up.out_features)


class DeepseekMoe(nn.Module):
    """Σ_k w_k·expert_k(x) + Σ_s shared_s(x): the n shared experts are experts that every token chooses, with weight 1.

    Checkpoints keep them as one that is n times as wide, which is the same.
    """

    def __init__(self, config: DeepseekMoeConfig | DeepseekConfig, dtype: torch.dtype, **routing: Any) -> None:
        super().__init__()
        width, experts, hidden = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        self.router = TopKRouter(width, experts, config.num_experts_per_tok, **routing)
        self.experts = swiglu_experts(experts + config.n_shared_experts, width, hidden, dtype)
        self.routed, self.num_shared = experts, config.n_shared_experts
        self.shared: Tensor
        ids = torch.arange(experts, experts + self.num_shared, dtype=torch.int32, device="cpu")
        self.register_buffer("shared", ids.unsqueeze(0), persistent=False)

    def forward(self, x_nd: Tensor) -> Tensor:
        plan = self.router(x_nd)
        ids = torch.cat([plan.expert_ids, self.shared.expand(len(x_nd), -1)], 1)
        weights = F.pad(plan.weights, (0, self.num_shared), value=1.0)
        return self.experts.combine(x_nd, sparse_plan(ids, weights, self.routed + self.num_shared))

    def tensors(self) -> Tensors:
        found: Tensors = {"gate.weight": self.router.linear.weight}
        if self.router.correction_bias is not None:
            found["gate.e_score_correction_bias"] = self.router.correction_bias
        (gate_up, down), routed = self.experts.weights, self.routed
        hidden = down.shape[2]
        wide = (self.num_shared * hidden, down.shape[1])
        found |= {
            "shared_experts.gate_proj.weight": Joined(wide, (gate_up[routed:, :hidden],)),
            "shared_experts.up_proj.weight": Joined(wide, (gate_up[routed:, hidden:],)),
            "shared_experts.down_proj.weight": Joined(wide[::-1], tuple(w.unsqueeze(1) for w in down[routed:])),
        }
        return found | under("experts", expert_tensors(self.experts, routed))


def routing(config: DeepseekMoeConfig | DeepseekV2Config | DeepseekV3Config) -> dict[str, Any]:
    """How each version's router chooses and weighs.

    v1: softmax(W·x) of the k best. V2: times a factor, and only experts of the groups whose best expert is best are open. V3:
    sigmoids divided by their sum, chosen with a bias that is not in the weights, in the groups whose two best are best.
    """
    if isinstance(config, DeepseekMoeConfig):
        return {"renormalize": config.norm_topk_prob}
    groups = {"num_groups": config.n_group or 1, "topk_groups": config.topk_group or 1}
    if isinstance(config, DeepseekV2Config):
        limited = config.topk_method == "group_limited_greedy"
        return {"scale": config.routed_scaling_factor, **(groups if limited else {})}
    return {
        "scoring": "sigmoid",
        "correction_bias": True,
        "renormalize": config.norm_topk_prob,
        "group_score": "top2_sum",
        "scale": config.routed_scaling_factor,
        **groups,
    }


def build(config: DeepseekV2Config | DeepseekV3Config, dtype: torch.dtype) -> Decoder:
    """The model of V2 or V3, its weights not read yet."""
    interleaved = not isinstance(config, DeepseekV3Config) or config.rope_interleave
    rotary = Rotary(config.rope_parameters, config.qk_rope_head_dim, config.max_position_embeddings, interleaved)
    return Decoder(config, dtype, rotary, attention=lambda i: LatentAttention(config), ffn=lambda i: _ffn(config, dtype, i))


def build_v1(config: DeepseekMoeConfig, dtype: torch.dtype) -> Decoder:
    """The model of v1, its weights not read yet."""
    dim, kv_heads = head_dim(config), config.num_key_value_heads or config.num_attention_heads
    rotary = Rotary(config.rope_parameters, dim, config.max_position_embeddings)
    return Decoder(
        config,
        dtype,
        rotary,
        attention=lambda i: GroupedAttention(config.hidden_size, config.num_attention_heads, kv_heads, dim),
        ffn=lambda i: _ffn(config, dtype, i),
    )


def _ffn(config: DeepseekMoeConfig | DeepseekV2Config | DeepseekV3Config, dtype: torch.dtype, i: int) -> nn.Module:
    if i < config.first_k_dense_replace:
        return Mlp(config.hidden_size, config.intermediate_size, dtype)
    return DeepseekMoe(config, dtype, **routing(config))
