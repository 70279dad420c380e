"""Fused expert operations: one public function per operation, importable as `recsys_moe.kernels` only.

Shapes: B rows, S inputs a row, G groups of experts, E experts, D inputs and H outputs of a layer, T tasks (gates) a row,
R = B·T routed rows, K experts a routed row.

Each function takes `backend=`: "reference" (obvious PyTorch, the oracle, differentiable), "cpu" (C++), "triton" (GPU), or
"auto", which picks by device and says once why. A backend that was asked for and can't run raises.
"""

if __name__ == "kernels":
    # Two names would be two modules: operators would register twice, and `transformers` would take this folder for the
    # Hugging Face package called `kernels`.
    raise ImportError("this folder is recsys_moe.kernels: import it under that name")

import math
from typing import Any, get_args

import torch
from torch import Tensor

from recsys_moe.kernels.backends import Backend, implementation
from recsys_moe.kernels.reference import check_finite
from recsys_moe.kernels.types import Activation, BatchNorm, FeatureGate, Layer, Scoring

__all__ = [
    "Activation",
    "Backend",
    "BatchNorm",
    "FeatureGate",
    "Layer",
    "Scoring",
    "check_choice",
    "check_finite",
    "embedding_bags",
    "expert_mlp",
    "feature_gate_values",
    "fused_layers",
    "gate_mix",
    "linear",
    "paged_attention",
    "quantise",
    "rms_norm",
    "rotary",
    "route",
    "route_topk",
    "sort_by_expert",
    "sparse_expert_mlp",
]


def expert_mlp(
    x: Tensor,
    layer: Layer,
    *,
    gate_bgd: Tensor | None = None,
    feature_gate: FeatureGate | None = None,
    source: tuple[int, ...] | None = None,
    invariant: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """One layer of all experts at once: y[b, e] = act(norm(W_e·(x[b, source_g] ⊙ gate[b, g]) + bias_e)), g the expert's group.

    The E experts lie in G groups of E/G, one after the other. Group g reads input `source[g]`, times its gate if given, as a
    tensor or by its parts; the gated input is never stored for all groups at once.

    Args:
        x: `[B, D]`, one input for all, or `[B, S, D]`.
        layer: weight `[E, H, D]`, bias, norm, activation.
        gate_bgd: `[B, G, D]`, multiplied into the groups' inputs; None: nothing is.
        feature_gate: the same, to be computed from the inputs on the way.
        source: for each group, which of the S inputs it reads. Default: all read the one input, or group g reads input g.
        invariant: a row's result is the same bits whatever rows come with it. Inference only.

    Returns:
        `[B, E, H]` in the weight's dtype.

    >>> y = expert_mlp(torch.ones(2, 3), Layer(torch.ones(4, 5, 3), torch.zeros(4, 5)), backend="reference")
    >>> y.shape, y[0, 0, 0].item()
    (torch.Size([2, 4, 5]), 3.0)
    """
    if x.dim() not in (2, 3) or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, not floating-point [B, D] or [B, S, D]")
    inputs = 1 if x.dim() == 2 else x.shape[1]
    if source is None:
        gates = gate_bgd if feature_gate is None else feature_gate.logits
        groups = inputs if gates is None else gates.shape[1]
        source = (0,) * groups if inputs == 1 else tuple(range(inputs))
    _check_layers((layer,), x.shape[-1], invariant)
    experts, _, width = layer.weight.shape
    if not source or experts % len(source) or max(source) >= inputs or min(source) < 0:
        raise ValueError(
            f"source {source} does not fit {inputs} inputs and {experts} experts: name an input 0 … {inputs - 1} for each "
            f"group, in a number of groups that divides {experts}"
        )
    if gate_bgd is not None and gate_bgd.shape != (x.shape[0], len(source), width):
        raise ValueError(f"gate_bgd is {list(gate_bgd.shape)}, not [B, G, D] = {[x.shape[0], len(source), width]}")
    run = implementation(backend, x.device)
    out: Tensor
    if feature_gate is None:
        out = run.expert_mlp(x, layer, gate_bgd, source, invariant)
        return out
    if gate_bgd is not None:
        raise ValueError("gate_bgd and feature_gate are both given: a group's input has one gate")
    _check_feature_gate(feature_gate, x.shape[0], len(source), layer.weight)
    if hasattr(run, "feature_gated_mlp"):
        out = run.feature_gated_mlp(x, layer, feature_gate, source, invariant)
    else:
        out = run.expert_mlp(x, layer, feature_gate_values(x, feature_gate, source, invariant, backend), source, invariant)
    return out


def linear(
    x_bd: Tensor, weight_hd: Tensor, bias_h: Tensor | None = None, *, invariant: bool = False, backend: Backend = "auto"
) -> Tensor:
    """y = W·x + b in the weight's dtype, `[B, H]`: `expert_mlp` with one expert that has no activation.

    Args:
        x_bd: `[B, D]`.
        weight_hd, bias_h: `[H, D]`, fp32 or bf16, and `[H]`.
        invariant: a row's result is the same bits whatever rows come with it. Inference only.

    >>> linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([4.0]), backend="reference").tolist()
    [[7.0]]
    """
    if weight_hd.dim() != 2 or x_bd.dim() != 2 or x_bd.shape[1] != weight_hd.shape[1]:
        raise ValueError(f"x_bd {list(x_bd.shape)} and weight_hd {list(weight_hd.shape)} are not [B, D] and [H, D]")
    if bias_h is not None and bias_h.shape != weight_hd.shape[:1]:
        raise ValueError(f"bias_h is {list(bias_h.shape)}, not [H] = {[weight_hd.shape[0]]}")
    out: Tensor = implementation(backend, x_bd.device).linear(x_bd, weight_hd, bias_h, invariant)
    return out


def feature_gate_values(
    x: Tensor, gate: FeatureGate, source: tuple[int, ...], invariant: bool = False, backend: Backend = "auto"
) -> Tensor:
    """The gates themselves, fp32 `[B, G, D]`: x `[B, D]` or `[B, S, D]`, of which group g reads input `source[g]`.

    >>> gate = FeatureGate(torch.zeros(2, 1, 3), torch.ones(3, 4, 5), torch.zeros(3, 5, 4))
    >>> feature_gate_values(torch.ones(2, 5), gate, (0,), backend="reference").unique().item()  # `up` starts at 0
    1.0
    """
    b, groups, heads = gate.logits.shape
    of_heads = tuple(s for s in source for _ in range(heads))
    low = expert_mlp(x, Layer(gate.down), source=of_heads, invariant=invariant, backend=backend)
    high = expert_mlp(low, Layer(gate.up, activation="double_sigmoid"), invariant=invariant, backend=backend)
    # A group's heads are its own: B·G rows of one gate each.
    pairs = high.view(b * groups, heads, x.shape[-1])
    return gate_mix(gate.logits.reshape(-1, 1, heads), pairs, backend=backend).view(b, groups, x.shape[-1])


def gate_mix(
    logits_bte: Tensor,
    experts_beh: Tensor,
    *,
    mask_te: Tensor | None = None,
    residual_bte: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Each task's mixture of the experts that its mask allows: z[b, t] = Σ_e (softmax_e(logits) + residual)[b, t, e]·y[b, e].

    Args:
        logits_bte: fp32 `[B, T, E]`.
        experts_beh: `[B, E, H]`, fp32 or bf16.
        mask_te: bool `[T, E]`, at least one expert a task.
        residual_bte: fp32 `[B, T, E]`, weights beside the softmax's (HoME's self gate); what the mask forbids is not read.

    Returns:
        fp32 `[B, T, H]`. No `[B, T, E, H]` exists on the way.

    >>> gate_mix(torch.zeros(1, 1, 2), torch.tensor([[[1.0], [3.0]]]), backend="reference").item()
    2.0
    """
    b, t, e = logits_bte.shape
    if experts_beh.shape[:2] != (b, e):
        raise ValueError(f"experts_beh is {list(experts_beh.shape)}, not [B, E, H] with B = {b} and E = {e}")
    if mask_te is not None and (mask_te.shape != (t, e) or mask_te.dtype != torch.bool):
        raise ValueError(f"mask_te is {mask_te.dtype} {list(mask_te.shape)}, not bool [T, E] = {[t, e]}")
    if residual_bte is not None and residual_bte.shape != logits_bte.shape:
        raise ValueError(f"residual_bte is {list(residual_bte.shape)}, not [B, T, E] = {[b, t, e]}")
    out: Tensor = implementation(backend, logits_bte.device).gate_mix(logits_bte, experts_beh, mask_te, residual_bte)
    return out


def route_topk(
    logits_be: Tensor,
    k: int,
    *,
    scoring: Scoring = "softmax",
    renormalize: bool = False,
    bias_e: Tensor | None = None,
    allowed_be: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The k best experts of each row and their weights, ties to the lowest index; all in fp32.

    Scores are made from the logits by `scoring`; the k largest `score + bias_e` among the experts that `allowed_be` allows
    are chosen; the weights are the scores themselves, without the bias (DeepSeek-V3), divided by their sum + 1e-20 if
    `renormalize`.

    Args:
        logits_be: fp32 `[B, E]`, finite.
        bias_e: fp32 `[E]`, for the choice only.
        allowed_be: bool `[B, E]`, at least k experts a row.

    Returns:
        expert ids int32 `[B, k]`, by falling score, and weights fp32 `[B, k]`.

    Raises:
        ValueError: k > E; an unknown scoring; logits that are not finite, or fewer than k allowed experts (it says which row).

    >>> ids, weights = route_topk(torch.tensor([[0.0, 2.0, 2.0]]), 2, renormalize=True, backend="reference")
    >>> ids.tolist(), weights.tolist()
    ([[1, 2]], [[0.5, 0.5]])
    """
    if logits_be.dim() != 2 or not logits_be.is_floating_point():
        raise ValueError(f"logits_be is {logits_be.dtype} {list(logits_be.shape)}, not floating-point [B, E]")
    check_choice(k, logits_be.shape[1], bias_e, scoring)
    if allowed_be is not None and (allowed_be.dtype != torch.bool or allowed_be.shape != logits_be.shape):
        raise ValueError(
            f"allowed_be is {allowed_be.dtype} {list(allowed_be.shape)}, not bool [B, E] = {list(logits_be.shape)}"
        )
    out: tuple[Tensor, Tensor] = implementation(backend, logits_be.device).route_topk(
        logits_be, k, scoring, renormalize, bias_e, allowed_be
    )
    return out


def check_choice(k: int, experts: int, bias_e: Tensor | None = None, scoring: str = "softmax") -> None:
    """Raises ValueError for a choice of `k` among `experts` that can't be made.

    >>> check_choice(3, 2)
    Traceback (most recent call last):
    ValueError: k is 3, but there are 2 experts: choose 1 ≤ k ≤ 2
    """
    if not 1 <= k <= experts:
        raise ValueError(f"k is {k}, but there are {experts} experts: choose 1 ≤ k ≤ {experts}")
    if scoring not in get_args(Scoring):
        raise ValueError(f"scoring is {scoring!r}; valid: {', '.join(get_args(Scoring))}")
    if bias_e is not None and bias_e.shape != (experts,):
        raise ValueError(f"bias_e is {list(bias_e.shape)}, not [E] = [{experts}]")


def route(
    x_bd: Tensor,
    weight_gd: Tensor,
    bias_g: Tensor | None,
    num_experts: int,
    k: int,
    *,
    scoring: Scoring = "softmax",
    renormalize: bool = False,
    bias_e: Tensor | None = None,
    scale: float = 1.0,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What a router does with a row at inference, in one call: `linear` in fp32, `route_topk`, `sort_by_expert`.

    Args:
        x_bd: `[B, D]`.
        weight_gd, bias_g: of the gates, `[T·E, D]` and `[T·E]`: T routings a row, one after the other.
        scale: multiplies the weights.

    Returns:
        ids int32 `[R, K]`, weights fp32 `[R, K]`, order, offsets, and logits fp32 `[R, E]`, R = B·T.

    Raises:
        ValueError: what the three raise.

    >>> ids, weights, order, offsets, logits = route(torch.ones(1, 1), torch.tensor([[1.0], [3.0]]), None, 2, 1)
    >>> ids.tolist(), offsets.tolist(), logits.tolist()
    ([[1]], [0, 0, 1], [[1.0, 3.0]])
    """
    if x_bd.dim() != 2 or x_bd.shape[1] != weight_gd.shape[1] or not x_bd.is_floating_point():
        raise ValueError(f"x_bd is {x_bd.dtype} {list(x_bd.shape)}, not floating-point [B, D] with D = {weight_gd.shape[1]}")
    check_choice(k, num_experts, bias_e, scoring)
    run = implementation(backend, x_bd.device)
    if hasattr(run, "route"):
        fused: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = run.route(
            x_bd, weight_gd, bias_g, num_experts, k, scoring, renormalize, bias_e, scale
        )
        return fused
    with torch.autocast(x_bd.device.type, enabled=False):
        logits = run.linear(x_bd.float(), weight_gd.float(), None if bias_g is None else bias_g.float(), True)
        logits = logits.view(-1, num_experts)
        ids, weights = run.route_topk(logits, k, scoring, renormalize, bias_e, None)
        order, offsets = run.sort_by_expert(ids, num_experts)
        return ids, weights if scale == 1 else weights * scale, order, offsets, logits


def sort_by_expert(expert_ids_rk: Tensor, num_experts: int, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Slots (row·K + place) grouped by expert, in rising order within one; slots without an expert (id −1) come last.

    Returns:
        `order` int32 `[R·K]`, a permutation of the slots, and `offsets` int32 `[E + 1]`: expert e has the slots
        `order[offsets[e]:offsets[e + 1]]`.

    >>> [t.tolist() for t in sort_by_expert(torch.tensor([[1, 0], [-1, 1]], dtype=torch.int32), 2, backend="reference")]
    [[1, 0, 3, 2], [0, 1, 3]]
    """
    out: tuple[Tensor, Tensor] = implementation(backend, expert_ids_rk.device).sort_by_expert(expert_ids_rk, num_experts)
    return out


def sparse_expert_mlp(
    x_bd: Tensor,
    layers: tuple[Layer, ...],
    expert_ids_rk: Tensor,
    weights_rk: Tensor,
    order: Tensor,
    offsets: Tensor,
    *,
    unit_norm: bool = False,
    invariant: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """The chosen experts of each row, and their weighted sum: y[r] = Σ_k weights[r, k]·f_{ids[r, k]}(x[r div T]).

    Gather, grouped matrix product with bias, norm and activation per layer, weighted scatter in the order of k.

    Args:
        x_bd: `[B, D]`.
        layers: one or more; SwiGLU is `(Layer(W1, activation="swiglu"), Layer(W2))`. The norm of a layer in training takes
            its moments over the rows that its expert sees.
        expert_ids_rk: int32 `[R, K]`, R = B·T (T routings a row, one after the other); −1: no expert.
        weights_rk: fp32 `[R, K]`.
        order, offsets: as `sort_by_expert` makes them from the ids.
        unit_norm: experts' outputs are scaled to length 1 before they are summed (norm-based routing, kexue.fm 10699).
        invariant: a row's result is the same bits whatever rows come with it. Inference only.

    Returns:
        `[R, H]` in the dtype of `x_bd`.

    >>> ids = torch.tensor([[1], [0]], dtype=torch.int32)
    >>> double = Layer(torch.tensor([[[2.0]], [[3.0]]]))
    >>> order, offsets = sort_by_expert(ids, 2, backend="reference")
    >>> x, ones = torch.ones(2, 1), torch.ones(2, 1)
    >>> sparse_expert_mlp(x, (double,), ids, ones, order, offsets, backend="reference").tolist()
    [[3.0], [2.0]]
    """
    _check_layers(layers, x_bd.shape[-1], invariant, sparse=True)
    r, k = expert_ids_rk.shape
    if weights_rk.shape != (r, k) or (x_bd.shape[0] and r % x_bd.shape[0]) or order.shape != (r * k,):
        raise ValueError(
            f"x_bd {list(x_bd.shape)}, expert_ids_rk {[r, k]}, weights_rk {list(weights_rk.shape)} and order "
            f"{list(order.shape)} do not go together: R must be a multiple of B, order must have R·K slots"
        )
    if offsets.shape != (layers[0].weight.shape[0] + 1,):
        raise ValueError(f"offsets is {list(offsets.shape)}, not [E + 1] = [{layers[0].weight.shape[0] + 1}]")
    run = implementation(backend, x_bd.device)
    out: Tensor = run.sparse_expert_mlp(x_bd, layers, expert_ids_rk, weights_rk, order, offsets, unit_norm, invariant)
    return out


def quantise(weight_ehd: Tensor) -> tuple[Tensor, Tensor]:
    """Weights as int8 with a symmetric scale for each output: scale = max_d |W_d| / 127, q = round(W / scale).

    Args:
        weight_ehd: `[E, H, D]`, fp32 or bf16, finite.

    Returns:
        q, int8 `[E, H, D]`, and scale, fp32 `[E, H]`, for a `Layer`'s `weight` and `weight_scale`.

    >>> q, scale = quantise(torch.tensor([[[0.5, -1.27, 0.004]]]))
    >>> q.tolist(), round(scale.item(), 4)
    ([[[50, -127, 0]]], 0.01)
    """
    q, scale = torch.empty_like(weight_ehd, dtype=torch.int8), weight_ehd.new_empty(weight_ehd.shape[:2], dtype=torch.float32)
    for e, weight in enumerate(weight_ehd):  # one at a time: what is between takes fp32
        wide = weight.float()
        scale[e] = torch.linalg.vector_norm(wide, math.inf, dim=1) / 127
        q[e] = (wide / scale[e].clamp_min(1e-38).unsqueeze(1)).round_()
    return q, scale


def embedding_bags(
    weights: Tensor,
    squares: Tensor,
    starts: Tensor,
    ids: Tensor,
    offsets: Tensor,
    *,
    width: int,
    mean: bool = False,
    rate: float = 0.0,
    eps: float = 1e-8,
    backend: Backend = "auto",
) -> Tensor:
    """Bags of embeddings, y[b, f] = Σ_i W_f[i] over the ids i of the bag (f, b), or their mean; zeros for an empty bag.

    Where `weights` requires grad, the backward pass gives it none but applies row-wise Adagrad (Duchi et al. 2011, with one
    sum a row) in place, to the rows r that the batch has, G_r `[width]` being the sum of their gradients:
    S_r ← S_r + mean(G_r²), W_r ← W_r − rate·G_r / (√S_r + eps).

    Args:
        weights: fp32, all tables one after the other, each `[rows, width]`.
        squares: S, fp32, of all rows one after the other.
        starts: int64 `[F]`, where each table starts in `weights`; rising.
        ids: int32 or int64, the bags' ids, feature by feature. They must lie in their tables: nothing checks them here.
        offsets: int32 `[F·B + 1]`, bag (f, b) has the ids from offsets[f·B + b] on.

    Returns:
        fp32 `[B, F·width]`.

    Raises:
        ValueError: weights that are not fp32, or the Triton backend: on a GPU, fbgemm's table batch does this.

    >>> tables = torch.tensor([[1.0], [2.0], [5.0]])  # two tables, of two rows and one
    >>> ids, offsets = torch.tensor([1, 0, 1, 0]), torch.tensor([0, 1, 3, 4, 4], dtype=torch.int32)
    >>> state, starts = torch.zeros(3), torch.tensor([0, 2])
    >>> embedding_bags(tables.flatten(), state, starts, ids, offsets, width=1, backend="reference").tolist()
    [[2.0, 5.0], [3.0, 0.0]]
    """
    run = implementation(backend, weights.device)
    if not hasattr(run, "embedding_bags"):
        raise ValueError("embedding_bags has no Triton form: on a GPU, fbgemm's table batch does it; use backend='reference'")
    tables, bags = starts.shape[0], offsets.shape[0] - 1
    if weights.dtype != torch.float32 or squares.numel() * width != weights.numel() or bags % tables:
        raise ValueError(
            f"weights {weights.dtype} {list(weights.shape)}, squares {list(squares.shape)}, starts {list(starts.shape)} and "
            f"offsets {list(offsets.shape)} do not go together: weights are fp32, {width} to each of squares, offsets [F·B + 1]"
        )
    out: Tensor
    if torch.is_grad_enabled():
        out = _EmbeddingBags.apply(weights, squares, starts, ids, offsets.int(), width, mean, rate, eps, run)
    else:
        out = run.embedding_bags(weights, starts, ids, offsets.int(), width, mean)
    return out


def paged_attention(
    q_nhd: Tensor,
    kv_nw: Tensor,
    turn_nd: Tensor,
    cache: Tensor,
    starts: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    *,
    kv_heads: int,
    value_at: int,
    value_dim: int,
    scale: float,
    window: int | None = None,
    interleaved: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention of new tokens to their own sequence, whose keys and values lie in blocks of a cache.

    First the tokens' queries and keys are rotated (`rotary`), and their keys and values written into the cache. Then

    y[n, h] = Σ_p softmax_p(scale · q[n, h]·key_p)·value_p over the places p of the sequence up to the token's own, the last
    `window` of them if there is one. A token's result is the same bits whatever other tokens and sequences are in the call,
    and however its sequence was cut into calls. Inference only.

    Args:
        q_nhd: `[N, H, D]`, fp32 or bf16: the queries of R sequences, one sequence after the other.
        kv_nw: `[N, width]`, what the cache is to hold of each token. Key head g is the D values from g·D on, value head g the
            `value_dim` from value_at + g·value_dim on: they may overlap (latent attention).
        turn_nd, interleaved: how queries and keys are rotated; a `turn_nd` `[N, 0]` leaves them as they are.
        cache: `[blocks, places a block, width]`, contiguous, of the same dtype.
        starts: int32 `[R + 1]`, sequence r has the queries from starts[r] on: its last places.
        lengths: int32 `[R]`, places of each sequence in the cache, with the new ones.
        blocks: int32 `[R, M]`, the cache's block of each run of places; −1 where no query needs it.
        kv_heads: G, a divisor of H; query head h reads head h // (H/G).

    Returns:
        `[N, H, value_dim]` in the dtype of `q_nhd`.

    >>> kv = torch.tensor([[0.0, 1.0], [0.0, 3.0]])  # two tokens: key 0 and value 1, key 0 and value 3
    >>> cache, q, turn = torch.zeros(1, 2, 2), torch.ones(2, 1, 1), torch.empty(2, 0)
    >>> starts, lengths = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    >>> blocks, heads = torch.tensor([[0]], dtype=torch.int32), {"kv_heads": 1, "value_at": 1, "value_dim": 1}
    >>> paged_attention(q, kv, turn, cache, starts, lengths, blocks, **heads, scale=1.0, backend="reference").flatten().tolist()
    [1.0, 2.0]
    """
    n, heads, dim = q_nhd.shape
    sequences = lengths.shape[0]
    _check_turn(q_nhd, turn_nd)
    if heads % kv_heads or max(kv_heads * dim, value_at + kv_heads * value_dim) > cache.shape[-1]:
        raise ValueError(
            f"{heads} query heads of {dim}, {kv_heads} key and value heads and values of {value_dim} from {value_at} on do not "
            f"fit each other or a cache of width {cache.shape[-1]}"
        )
    if not q_nhd.dtype == kv_nw.dtype == cache.dtype or kv_nw.shape != (n, cache.shape[2]):
        raise ValueError(
            f"q_nhd {q_nhd.dtype} {list(q_nhd.shape)}, kv_nw {kv_nw.dtype} {list(kv_nw.shape)} and cache {cache.dtype} "
            f"{list(cache.shape)} do not go together: one dtype, N rows of the cache's width"
        )
    if starts.shape != (sequences + 1,) or blocks.dim() != 2 or blocks.shape[0] != sequences:
        raise ValueError(
            f"starts {list(starts.shape)}, lengths {list(lengths.shape)} and blocks {list(blocks.shape)} do not go together: "
            "they are of R + 1, R and R × M"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 token, or None")
    run = implementation(backend, q_nhd.device)
    if not hasattr(run, "paged_attention"):
        raise ValueError("paged_attention has no Triton form; use backend='reference'")
    out: Tensor = run.paged_attention(
        q_nhd, kv_nw, turn_nd, interleaved, cache, starts, lengths, blocks, kv_heads, value_at, value_dim, scale, window
    )
    return out


def fused_layers(device: torch.device) -> Any:
    """An empty chain of halves of a decoder's layers (recsys_moe.llm.layers says what they compute) that run in one call.

    None where the backend that `auto` chooses has none.
    """
    run = implementation("auto", device)
    return run.FusedLayers() if hasattr(run, "FusedLayers") else None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor:
    """y = w · x / √(mean(x²) + eps) over the last axis (1910.07467), in fp32 up to the weight; a row's bits are its own.

    Args:
        x: `[…, D]`, fp32 or bf16.
        weight: `[D]`.

    >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 12.5, backend="reference").tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    out: Tensor = implementation(backend, x.device).rms_norm(x, weight, eps)
    return out


def rotary(x_nhd: Tensor, turn_nd: Tensor, *, interleaved: bool = False, backend: Backend = "auto") -> Tensor:
    """Rotary position embedding (2104.09864): each pair (a, b) of a head becomes (a·cos − b·sin, b·cos + a·sin), in fp32.

    Args:
        x_nhd: `[N, H, D]`. Its last d values are rotated; the pairs are (x_i, x_{i + d/2}), or neighbours with `interleaved`,
            whose results come out with the first of each pair in front: a query and a key that went through alike have the
            product they should.
        turn_nd: fp32 `[N, d]`, each token's d/2 cosines, then its sines.

    >>> quarter = torch.tensor([[0.0, 1.0]])  # cos 0, sin 1
    >>> rotary(torch.tensor([[[2.0, 5.0]]]), quarter, backend="reference").tolist()
    [[[-5.0, 2.0]]]
    """
    _check_turn(x_nhd, turn_nd)
    out: Tensor = implementation(backend, x_nhd.device).rotary(x_nhd, turn_nd, interleaved)
    return out


def _check_turn(x_nhd: Tensor, turn_nd: Tensor) -> None:
    rows, turned = turn_nd.shape
    if rows != x_nhd.shape[0] or turned > x_nhd.shape[2] or turned % 2 or turn_nd.dtype != torch.float32:
        raise ValueError(f"x_nhd {list(x_nhd.shape)} and turn_nd {turn_nd.dtype} {list(turn_nd.shape)} do not go together")


class _EmbeddingBags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, squares: Tensor, starts: Tensor, ids: Tensor, offsets: Tensor, *rest: Any) -> Tensor:
        width, mean, ctx.rate, ctx.eps, ctx.run = rest
        # Not saved for backward: the tables change in place, by design.
        ctx.state = (weights, squares, starts, ids, offsets)
        ctx.width, ctx.mean = width, mean
        out: Tensor = ctx.run.embedding_bags(weights, starts, ids, offsets, width, mean)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        with torch.no_grad():
            ctx.run.embedding_adagrad(*ctx.state, grad, ctx.width, ctx.mean, ctx.rate, ctx.eps)
        return (None,) * 10


def _check_feature_gate(gate: FeatureGate, rows: int, groups: int, weight: Tensor) -> None:
    heads, rank, width = gate.logits.shape[-1], gate.down.shape[1], weight.shape[2]
    shapes = [tuple(t.shape) for t in gate]
    if shapes != [(rows, groups, heads), (groups * heads, rank, width), (groups * heads, width, rank)]:
        raise ValueError(
            f"feature_gate has logits, down and up of {shapes}, not [B, G, L], [G·L, R, D] and [G·L, D, R] with B = {rows}, "
            f"G = {groups} and D = {width}"
        )
    if not gate.down.dtype == gate.up.dtype == weight.dtype:
        raise ValueError(f"feature_gate is of {gate.down.dtype} and {gate.up.dtype}, not of the weight's {weight.dtype}")


def _check_layers(layers: tuple[Layer, ...], width: int, invariant: bool, sparse: bool = False) -> None:
    """Shapes and dtypes that fit each other, from an input of `width` on; nothing of training in the invariant mode."""
    for number, layer in enumerate(layers):
        if layer.weight.dim() != 3:
            raise ValueError(f"the weight of layer {number} is {list(layer.weight.shape)}, not [E, H, D]")
        experts = layers[0].weight.shape[0]
        if invariant and (layer.dropout or (layer.norm is not None and layer.norm.training)):
            raise ValueError(
                f"layer {number} is in training (norm by the batch's moments, or dropout) under invariant=True: its result "
                "would depend on the whole batch; use eval()"
            )
        if layer.weight.shape[0] != experts or layer.weight.shape[2] != width:
            raise ValueError(
                f"the weight of layer {number} is {list(layer.weight.shape)}, not [E, H, D] with E = {experts} and D = {width}"
            )
        if layer.activation not in get_args(Activation):
            raise ValueError(
                f"the activation of layer {number} is {layer.activation!r}; valid: {', '.join(get_args(Activation))}"
            )
        units = layer.weight.shape[1]
        if layer.weight_scale is not None:
            if layer.weight.dtype != torch.int8 or layer.weight_scale.shape != (experts, units) or not sparse:
                raise ValueError(
                    f"layer {number} has a weight_scale {list(layer.weight_scale.shape)} and a weight in {layer.weight.dtype}: "
                    f"scales [E, H] = {[experts, units]} are for int8 weights of sparse experts"
                )
        elif layer.weight.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"the weight of layer {number} is {layer.weight.dtype}; experts run in float32 or bfloat16")
        if layer.bias is not None and layer.bias.shape != (experts, units):
            raise ValueError(f"the bias of layer {number} is {list(layer.bias.shape)}, not [E, H] = {[experts, units]}")
        if layer.activation == "swiglu" and units % 2:
            raise ValueError(f"layer {number} is swiglu with {units} units: it needs an even number, gate rows first")
        width = units // 2 if layer.activation == "swiglu" else units
