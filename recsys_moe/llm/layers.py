"""What the decoders share: RMS norm, rotary embedding, linear layer, grouped-query attention over the paged cache, the stack.

Shapes: N tokens, D the model's width, H query heads, G key/value heads, d a head's width, E experts, F an expert's width.

Each module says by `tensors()` what its parameters are called in a Hugging Face checkpoint: name → the view of a parameter that
holds that tensor. Reading a checkpoint fills the views, writing one saves them.
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.errors import UserError
from recsys_moe.experts import MLPExperts
from recsys_moe.kernels import fused_layers, linear, paged_attention, rms_norm, rotary
from recsys_moe.llm.batch import KVCache, ModelConfig, TokenBatch
from recsys_moe.routing import PlanWatcher, SparsePlan, TopKRouter
from recsys_moe.typed import typed


class Joined(NamedTuple):
    """A checkpoint's matrix that is kept in parts: with a third axis, it is `parts` one after the other along the second."""

    shape: tuple[int, int]
    parts: tuple[Tensor, ...]

    def whole(self) -> Tensor:
        return torch.cat(self.parts, 1).view(self.shape)

    def copy_(self, matrix: Tensor) -> None:
        first, *_, last = self.parts[0].shape
        sizes = [part.shape[1] for part in self.parts]
        for part, piece in zip(self.parts, matrix.view(first, -1, last).split(sizes, 1), strict=True):
            part.copy_(piece)


Tensors = dict[str, Tensor | Joined]


# -- configuration

MOST_LAYERS = 10_000
"""More than any model has: beyond, making the layers' objects alone would take the memory."""


@typed
class Rope:
    """Rotary position embedding (2104.09864) and how it is stretched, by transformers' names (`rope_parameters`).

    `linear` divides the frequencies by `factor`; `llama3` the low ones only; `yarn` (2309.00071) those below a ramp, and
    multiplies sine and cosine by an attention factor.
    """

    _: KW_ONLY
    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type in ("llama3", "yarn") and self.original_max_position_embeddings is None:
            raise ValueError(f"rope_type {self.rope_type!r} needs original_max_position_embeddings; add it")
        if self.partial_rotary_factor != 1:
            raise ValueError(f"partial_rotary_factor is {self.partial_rotary_factor}; only whole heads are rotated: 1.0")
        if self.rope_theta <= 0 or self.factor <= 0:
            raise ValueError(f"rope_theta is {self.rope_theta} and factor {self.factor}; both must be > 0")

    def frequencies(self, dim: int) -> Tensor:
        """fp32 `[dim / 2]`: radians a position.

        >>> Rope(rope_theta=100.0).frequencies(4)
        tensor([1.0000, 0.1000])
        """
        steps = self.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        plain = 1.0 / steps
        if self.rope_type == "default":
            return plain
        if self.rope_type == "linear":
            return plain / self.factor
        assert self.original_max_position_embeddings is not None
        before = self.original_max_position_embeddings
        if self.rope_type == "llama3":
            turns = before * plain / (2 * math.pi)
            smooth = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
            return (1 - smooth) * plain / self.factor + smooth * plain
        low, high = (
            dim * math.log(before / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))
            for turns in (self.beta_fast or 32, self.beta_slow or 1)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low
        ramp = (ramp / (high - low if high != low else 0.001)).clamp(0, 1)
        return 1.0 / (self.factor * steps) * ramp + plain * (1 - ramp)

    @property
    def amplitude(self) -> float:
        """What sine and cosine are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1·mscale·ln(factor) + 1, YaRN's temperature."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


@typed
class DecoderConfig:
    """What every decoder's `config.json` says, by transformers' names."""

    _: KW_ONLY
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: Literal["silu"] = "silu"
    quantization_config: None = None
    rope_parameters: Rope = Rope()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}; at most {MOST_LAYERS} are built")


# -- modules


def inference(module: nn.Module) -> bool:
    """Whether a row's result must not depend on the rows beside it."""
    return not (module.training or torch.is_grad_enabled())


class Linear(nn.Linear):
    """y = W·x + b for `[N, D]`, each row the same bits in any batch at inference; the rows of W may be several layers'."""

    def forward(self, x_nd: Tensor) -> Tensor:
        # In training the weights stay fp32, whatever the precision of the products.
        return linear(x_nd, self.weight.to(x_nd.dtype), self.bias, invariant=inference(self))

    def tensors(self, **rows: int) -> Tensors:
        """The rows of W (and b) in turn, by name."""
        parts = self.weight.split(list(rows.values()))
        found: Tensors = {f"{name}.weight": part for name, part in zip(rows, parts, strict=True)}
        if self.bias is not None:
            biases = self.bias.split(list(rows.values()))
            found |= {f"{name}.bias": part for name, part in zip(rows, biases, strict=True)}
        return found


def under(prefix: str, tensors: Tensors) -> Tensors:
    """The same tensors with their names behind a prefix."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


class RMSNorm(nn.Module):
    """y = w · x / √(mean(x²) + eps), row by row (1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class Rotary(nn.Module):
    """Rotates pairs of a head's values by position · frequency; neighbours with `interleaved` (DeepSeek).

    Sine and cosine lie in a table: computed afresh, their bits would depend on where in a batch a position lies.
    """

    def __init__(self, rope: Rope, dim: int, positions: int, interleaved: bool = False) -> None:
        super().__init__()
        self.interleaved = interleaved
        if dim < 2 or dim % 2:
            raise ValueError(f"the rotary part of a head has {dim} values; it must be an even number of them")
        angles = torch.arange(positions, dtype=torch.float32, device="cpu").unsqueeze(1) * rope.frequencies(dim)
        self.table: Tensor
        self.register_buffer("table", torch.cat([angles.cos(), angles.sin()], 1) * rope.amplitude, persistent=False)

    def forward(self, positions: Tensor) -> "Turn":
        return Turn(self.table[positions], self.interleaved)


class Turn(NamedTuple):
    """How each token's queries and keys are rotated: cosines, then sines, fp32 `[N, d]`, for the last d values of a head."""

    turn_nd: Tensor
    interleaved: bool


class CachedStep(NamedTuple):
    """What the layers share in one step of inference: the batch, its rotation, the cache."""

    batch: TokenBatch
    turn: Turn
    layers: list[Tensor]

    @property
    def tokens(self) -> Tensor:
        return self.batch.tokens

    def attend(self, layer: int, q_nhd: Tensor, kv_nw: Tensor, heads: "Heads") -> Tensor:
        """Rotate, put the new tokens' keys and values into the cache, attend to all that is there: `[N, H, value_dim]`."""
        b, (turn_nd, interleaved) = self.batch, self.turn
        return paged_attention(
            q_nhd,
            kv_nw,
            turn_nd,
            self.layers[layer],
            b.starts,
            b.lengths,
            b.blocks,
            kv_heads=heads.kv_heads,
            value_at=heads.value_at,
            value_dim=heads.value_dim,
            scale=heads.scale,
            window=heads.window,
            interleaved=interleaved,
        )


class WholeStep(NamedTuple):
    """The same for B whole sequences of T tokens, one after the other, with gradients: no cache."""

    sequences: int
    tokens: Tensor
    turn: Turn

    def attend(self, layer: int, q_nhd: Tensor, kv_nw: Tensor, heads: "Heads") -> Tensor:
        """Rotation, and causal attention within each sequence: `[N, H, value_dim]`."""

        def split(x_nhd: Tensor) -> Tensor:
            return x_nhd.unflatten(0, (self.sequences, -1)).transpose(1, 2)

        turn_nd, interleaved = self.turn
        k_ngd = kv_nw[:, : heads.kv_heads * q_nhd.shape[2]].unflatten(1, (heads.kv_heads, -1))
        v_ngd = kv_nw[:, heads.value_at : heads.value_at + heads.kv_heads * heads.value_dim].unflatten(1, (heads.kv_heads, -1))
        q, k = (split(rotary(t, turn_nd, interleaved=interleaved)) for t in (q_nhd, k_ngd))
        v = split(v_ngd)
        mask = None
        if heads.window is not None:
            place = torch.arange(q.shape[2], device=q.device)
            back = place.unsqueeze(1) - place
            mask = (back >= 0) & (back < heads.window)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=heads.scale, enable_gqa=True)
        return y.transpose(1, 2).flatten(0, 1)


Step = CachedStep | WholeStep


class Heads(NamedTuple):
    """How a token's values in the cache are read: G keys of the queries' width first, G values from `value_at` on."""

    kv_heads: int
    value_at: int
    value_dim: int
    scale: float
    window: int | None = None


class GroupedAttention(nn.Module):
    """Grouped-query attention (2305.13245): H query heads over G key/value heads, a causal window where there is one.

    The cache holds a token's G keys, then its G values. With `qk_norm`, queries and keys are normalised before the heads are
    split, and `clip` bounds all three (OLMoE).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        window: int | None = None,
        qkv_bias: bool = False,
        out_bias: bool = False,
        qk_norm: float | None = None,
        clip: float | None = None,
    ) -> None:
        super().__init__()
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"num_key_value_heads is {kv_heads}, which does not divide num_attention_heads {heads}")
        self.heads, self.head_dim, self.clip = heads, head_dim, clip
        self.cached = Heads(kv_heads, kv_heads * head_dim, head_dim, head_dim**-0.5, window)
        self.sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
        self.qkv = Linear(width, sum(self.sizes), bias=qkv_bias)
        self.out = Linear(heads * head_dim, width, bias=out_bias)
        self.q_norm = None if qk_norm is None else RMSNorm(self.sizes[0], qk_norm)
        self.k_norm = None if qk_norm is None else RMSNorm(self.sizes[1], qk_norm)

    @property
    def cache_width(self) -> int:
        return 2 * self.sizes[1]

    @property
    def products_per_key(self) -> int:
        """Multiply-adds of a token's heads with one place of the cache."""
        return 2 * self.heads * self.head_dim

    def forward(self, x_nd: Tensor, step: Step, layer: int) -> Tensor:
        qkv = self.qkv(x_nd)
        if self.q_norm is not None and self.k_norm is not None:
            q, k, v = qkv.split(self.sizes, 1)
            qkv = torch.cat([self.q_norm(q), self.k_norm(k), v], 1)
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, kv = qkv.split((self.sizes[0], self.cache_width), 1)
        y = step.attend(layer, q.unflatten(1, (self.heads, self.head_dim)), kv, self.cached)
        out: Tensor = self.out(y.flatten(1))
        return out

    def bind(self, fused: Any, norm: RMSNorm, cache: Tensor) -> None:
        """Add x + attention(norm(x)) to the layers that run in one call: the same operations, the same bits."""
        q_norm, k_norm, qkv, out, h = self.q_norm, self.k_norm, self.qkv, self.out, self.cached
        normed = (None, None, 0.0) if q_norm is None or k_norm is None else (q_norm.weight, k_norm.weight, q_norm.eps)
        fused.grouped_attention(
            *(cache, norm.weight, norm.eps, qkv.weight, qkv.bias, *normed, self.clip, out.weight, out.bias),
            *(self.heads, h.kv_heads, h.scale, h.window or 0),
        )

    def tensors(self) -> Tensors:
        q, k, v = self.sizes
        found = self.qkv.tensors(q_proj=q, k_proj=k, v_proj=v) | self.out.tensors(o_proj=self.out.out_features)
        if self.q_norm is not None and self.k_norm is not None:
            found |= {"q_norm.weight": self.q_norm.weight, "k_norm.weight": self.k_norm.weight}
        return found


class Mlp(nn.Module):
    """A dense SwiGLU layer (2002.05202), W₂·(silu(W₁·x) ⊙ W₃·x): one expert that every token uses."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        self.expert = MLPExperts(1, width, (hidden,), linear_out=width, activation="swiglu", bias=bias, dtype=dtype)

    def forward(self, x_nd: Tensor) -> Tensor:
        out: Tensor = self.expert(x_nd).squeeze(1)
        return out

    def tensors(self) -> Tensors:
        (gate_up, down), biases = self.expert.weights, self.expert.biases
        hidden = down.shape[2]
        found: Tensors = {
            "gate_proj.weight": gate_up[0, :hidden],
            "up_proj.weight": gate_up[0, hidden:],
            "down_proj.weight": down[0],
        }
        if biases is not None:
            both, last = biases
            found |= {"gate_proj.bias": both[0, :hidden], "up_proj.bias": both[0, hidden:], "down_proj.bias": last[0]}
        return found


def swiglu_experts(num_experts: int, width: int, hidden: int, dtype: torch.dtype) -> MLPExperts:
    """E SwiGLU experts with stacked weights: `[E, 2·F, D]` (gate rows first) and `[E, D, F]`."""
    return MLPExperts(num_experts, width, (hidden,), linear_out=width, activation="swiglu", bias=False, dtype=dtype)


def expert_tensors(
    experts: MLPExperts, count: int, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Tensors:
    """The three matrices of each of the first `count` experts, named as checkpoints name them."""
    (gate_up, last), hidden = experts.weights, experts.weights[1].shape[2]
    found: Tensors = {}
    for e in range(count):
        found[f"{e}.{gate}.weight"] = gate_up[e, :hidden]
        found[f"{e}.{up}.weight"] = gate_up[e, hidden:]
        found[f"{e}.{down}.weight"] = last[e]
    return found


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)).

    A feed-forward part that is `by_token` is told the tokens too. One that has `num_shared` is a router and SwiGLU experts, of
    which the last `num_shared` are every row's with weight 1, and nothing else.
    """

    def __init__(self, config: DecoderConfig, attention: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention: Any = attention
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn: Any = ffn
        self.by_token = getattr(ffn, "by_token", False)

    def forward(self, x_nd: Tensor, step: Step, layer: int) -> Tensor:
        return self.feed(x_nd + self.attention(self.attention_norm(x_nd), step, layer), step)

    def feed(self, x_nd: Tensor, step: Step) -> Tensor:
        """The second half."""
        normed_nd = self.ffn_norm(x_nd)
        out: Tensor = x_nd + (self.ffn(normed_nd, step.tokens) if self.by_token else self.ffn(normed_nd))
        return out

    def bind(self, chain: "Chain", cache: Tensor) -> bool:
        """Add this layer to those that run in one call: the same operations, the same bits. False: without its second half."""
        self.attention.bind(chain.fused, self.attention_norm, cache)
        norm, ffn = self.ffn_norm, self.ffn
        if isinstance(ffn, Mlp):
            up, down = ffn.expert.layers()
            chain.fused.dense_expert(norm.weight, norm.eps, up.weight, up.bias, down.weight, down.bias)
            return True
        if not (hasattr(ffn, "num_shared") and type(r := ffn.router) is TopKRouter and r.num_groups == 1):
            return False
        gate = (r.linear.weight, r.linear.bias, r.k, r.scoring, r.renormalize, r.correction_bias, r.scale)
        chain.fused.routed_experts(norm.weight, norm.eps, gate, ffn.experts.layers(), ffn.num_shared)
        chain.routers.append(r)
        return True


class Chain:
    """Layers, or halves of them, that the backend runs in one call; and the routers among them, whose watchers are told."""

    def __init__(self, fused: Any) -> None:
        self.fused, self.routers = fused, list[TopKRouter]()

    def __call__(self, x_nd: Tensor, step: CachedStep) -> Tensor:
        b = step.batch
        out: Tensor
        out, plans = self.fused.run(x_nd, *step.turn, b.starts, b.lengths, b.blocks)
        for router, at in zip(self.routers, range(0, len(plans), 5), strict=True):
            ids, weights, order, offsets, logits = plans[at : at + 5]
            watchers: Any = router._forward_hooks.values()
            for watcher in watchers:
                watcher.tell(SparsePlan(ids, ids, weights, order, offsets, logits, router.plan_scoring))
        return out


class Bound:
    """A decoder's layers bound to a cache, as they run in turn: in one call as many as the backend can.

    `runs` is empty where it has no such call.

    Raises:
        ValueError: a cache of another shape or precision than this model's.
    """

    def __init__(self, decoder: "Decoder", cache: KVCache) -> None:
        kept, wanted = [layer.shape[2] for layer in cache.layers], decoder.cache_widths()
        if kept != wanted:
            raise ValueError(f"the cache keeps {kept} values a token in its layers, the model {wanted}; allocate one for it")
        if strange := {layer.dtype for layer in cache.layers} - {decoder.config.dtype}:
            raise ValueError(f"the cache is {strange.pop()}, the model {decoder.config.dtype}; allocate one for it")
        device = decoder.embedding.device
        fused = fused_layers(device)
        self.runs: list[Any] = []
        # What is trained keeps fp32 weights beside bf16 products.
        if fused is not None and decoder.embedding.dtype == decoder.config.dtype:
            self.runs.append(Chain(fused))
            block: Any
            for block, layer in zip(decoder.blocks, cache.layers, strict=True):
                if not block.bind(self.runs[-1], layer):
                    self.runs += [block.feed, Chain(fused_layers(device))]
        modules = [*decoder.blocks.modules()]
        self._hooks: list[Any] = [module._forward_pre_hooks for module in modules]
        self._hooks += [module._forward_hooks for module in modules]

    @property
    def watched(self) -> bool:
        """Whether somebody's hooks ask for more than plans: they see, and may change, what modules are given and give."""
        return any(not isinstance(hook, PlanWatcher) for hooks in self._hooks if hooks for hook in hooks.values())


class Decoder(nn.Module):
    """A decoder-only language model: embedding, blocks, norm, output layer.

    Args:
        config: the checkpoint's own.
        dtype: precision of weights, products and cache.
        rotary: of all layers.
        attention, ffn: make those of layer i.
        ffn_name: what layers' feed-forward part is called in checkpoints.
        window: of every layer, if every one has it.
    """

    def __init__(
        self,
        config: DecoderConfig,
        dtype: torch.dtype,
        rotary: Rotary,
        attention: Callable[[int], Any],
        ffn: Callable[[int], Any],
        ffn_name: str = "mlp",
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.checkpoint, self.ffn_name = config, ffn_name
        self.config = ModelConfig(config.vocab_size, config.max_position_embeddings, window, dtype)
        self.rotary = rotary
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size).normal_(std=0.02))
        self.blocks = nn.ModuleList(Block(config, attention(i), ffn(i)) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.embedding

    def cache_widths(self) -> list[int]:
        """Values a token that each layer keeps."""
        return [block.attention.cache_width for block in self.blocks]  # type: ignore[misc, union-attr]

    @torch.inference_mode()  # not no_grad alone: an operator's gradient then costs nothing either
    def forward(self, batch: TokenBatch, cache: KVCache) -> Tensor:
        """Logits of `batch.outputs`, fp32 `[K, vocabulary]`; the new tokens' keys and values go into the cache."""
        step = CachedStep(batch, self.rotary(batch.positions), cache.layers)
        x_nd = self._embed(batch.tokens)
        for run in self._runs(cache):
            x_nd = run(x_nd, step)
        return self._logits(x_nd[batch.outputs])

    def _runs(self, cache: KVCache) -> list[Callable[[Tensor, CachedStep], Tensor]]:
        """The layers as they run in turn: in one call as many as the backend can, or each module by itself."""
        # In training modules have dropout and noise of their own, and a trace must see them.
        if not (self.training or torch.compiler.is_compiling()):
            bound: Bound | None = cache.bound.get(self)
            if bound is None:
                bound = cache.bound[self] = Bound(self, cache)
            if bound.runs and not bound.watched:
                return bound.runs
        return [partial(block, layer=number) for number, block in enumerate(self.blocks)]

    def score(self, tokens_bt: Tensor) -> Tensor:
        """Logits of whole sequences of one length, fp32 `[B, T, vocabulary]`, with gradients and without a cache: training."""
        rows, length = tokens_bt.shape
        step = WholeStep(rows, tokens_bt.flatten(), self.rotary(torch.arange(length).repeat(rows)))
        x_nd = self._embed(step.tokens)
        for number, block in enumerate(self.blocks):
            x_nd = block(x_nd, step, number)
        return self._logits(x_nd).view(rows, length, -1)

    def _embed(self, tokens_n: Tensor) -> Tensor:
        return F.embedding(tokens_n, self.embedding).to(self.config.dtype)

    def _logits(self, x_nd: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(x_nd))
        return logits.float()

    def tensors(self) -> Tensors:
        """Every tensor of the checkpoint by its name, as views of the parameters."""
        found = self.tensors_around()
        for i in range(len(self.blocks)):
            found |= self.tensors_of_block(i)
        return found

    def tensors_around(self) -> Tensors:
        """Those that belong to no block."""
        found: Tensors = {"model.embed_tokens.weight": self.embedding, "model.norm.weight": self.norm.weight}
        if not self.checkpoint.tie_word_embeddings:
            found["lm_head.weight"] = self.head.weight
        return found

    def tensors_of_block(self, i: int) -> Tensors:
        block: Any = self.blocks[i]
        found: Tensors = {
            "input_layernorm.weight": block.attention_norm.weight,
            "post_attention_layernorm.weight": block.ffn_norm.weight,
        }
        found |= under("self_attn", block.attention.tensors()) | under(self.ffn_name, block.ffn.tensors())
        return under(f"model.layers.{i}", found)


def head_dim(config: Any) -> int:
    """A head's width: the configuration's own, else hidden_size / heads.

    Raises:
        UserError: the heads don't divide it.
    """
    if getattr(config, "head_dim", None) is not None:
        return int(config.head_dim)
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"config.json: hidden_size is {config.hidden_size}, which num_attention_heads {config.num_attention_heads} does "
            "not divide; give head_dim"
        )
    return int(config.hidden_size // config.num_attention_heads)
