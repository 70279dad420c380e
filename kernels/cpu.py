"""The CPU backend: C++ operators, built once on the machine they run on.

Training runs layer by layer (each step differentiable); inference runs a layer, or a whole chain of sparse layers, in one
operator, whose results do not depend on the batch: `invariant=True` costs nothing here.
"""

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recsys_moe.kernels import reference
from recsys_moe.kernels.types import BatchNorm, FeatureGate, Layer, Scoring

log = logging.getLogger("recsys_moe.kernels")

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADERS = sorted(SOURCE.parent.glob("cpu_*.h"))
ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2, "gelu": 3, "swiglu": 4, "double_sigmoid": 5}
# Activations whose slope their output tells.
FROM_OUTPUT = {ACTIVATIONS[name] for name in ("none", "relu", "double_sigmoid")}
SCORINGS = {"softmax": 0, "sigmoid": 1, "softmax_after": 2}


# ---- the library ----------------------------------------------------------------------------------------------------


@cache
def why_not(device: str) -> str | None:
    """Why this backend can't run on a device; None if it can (the library is then loaded)."""
    if device != "cpu":
        return f"the tensors are on {device!r}, not on the CPU"
    try:
        torch.ops.load_library(build())
    except (OSError, subprocess.CalledProcessError) as error:
        told = getattr(error, "stderr", "") or str(error)
        return f"its C++ operators can't be built ({' '.join(told.split())[-300:]})"
    _register()
    return None


def build() -> Path:
    """The shared library, compiled for this machine's processor on first use and kept in the user's cache.

    Raises:
        OSError, CalledProcessError: no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler is installed: install g++ or set CXX")
    include = Path(torch.__file__).parent / "include"
    flags = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++20", "-fPIC", "-shared"]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-Wno-psabi"]
    flags += ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    sources = [path.read_text() for path in (SOURCE, *HEADERS)]
    identity = "\0".join([*sources, torch.__version__, compiler, *flags, _processor()])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recsys_moe"
    library = folder / f"cpu-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    log.warning("building the CPU kernels, once (about a minute)")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / "cpu.so"
        # OpenMP without its library: PyTorch has one in the process, and two would fight for the cores.
        libraries = ["-L", str(Path(torch.__file__).parent / "lib"), "-ltorch_cpu", "-lc10"]
        command = [*shlex.split(compiler), *flags, str(SOURCE), "-o", str(made), *libraries, "-nodefaultlibs"]
        command += ["-lstdc++", "-lm", "-lc", "-lgcc_s", "-lgcc"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(library)
    return library


def bf16_products() -> str:
    """The instructions that bf16 products run on here: AMX, AVX512-BF16, or fp32 ones. The library must be loaded."""
    return torch.ops.recsys_moe.bf16_products()


def _processor() -> str:
    """What decides the instructions that `-march=native` allows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


# ---- the operations -------------------------------------------------------------------------------------------------


def expert_mlp(x: Tensor, layer: Layer, gate_bgd: Tensor | None, source: tuple[int, ...], invariant: bool) -> Tensor:
    ops = torch.ops.recsys_moe
    norm, activation = layer.norm, ACTIVATIONS[layer.activation]
    if invariant or not (_in_training((layer,)) or _needs_grad((layer,), x, gate_bgd)):
        n = norm or _NO_NORM
        return ops.dense_forward(
            x, gate_bgd, layer.weight, source, layer.bias, n.scale, n.shift, n.running_mean, n.running_var, n.eps, activation
        )
    x_bsd = x.unsqueeze(1) if x.dim() == 2 else x
    if norm is None and activation in FROM_OUTPUT:
        bias = None if layer.bias is None else layer.bias.float()
        y = ops.expert_linear(x_bsd, gate_bgd, layer.weight, source, bias, activation)
        return F.dropout(y, layer.dropout) if layer.dropout else y
    z = ops.expert_linear(x_bsd, gate_bgd, layer.weight, source, None, ACTIVATIONS["none"])
    return _finish(z, layer, None)


def linear(x_bd: Tensor, weight_hd: Tensor, bias_h: Tensor | None, invariant: bool) -> Tensor:
    if invariant or not _needs_grad((Layer(weight_hd, bias_h),), x_bd):
        return torch.ops.recsys_moe.linear(x_bd, weight_hd, bias_h)
    return torch.ops.recsys_moe.expert_linear(
        x_bd.unsqueeze(1), None, weight_hd.unsqueeze(0), (0,), None if bias_h is None else bias_h.float(), ACTIVATIONS["none"]
    ).squeeze(1)


def feature_gated_mlp(x: Tensor, layer: Layer, gate: FeatureGate, source: tuple[int, ...], invariant: bool) -> Tensor:
    ops = torch.ops.recsys_moe
    n = layer.norm or _NO_NORM
    x_bsd = x.unsqueeze(1) if x.dim() == 2 else x
    given = (x_bsd, *gate, layer.weight, source)
    if invariant or not (_in_training((layer,)) or _needs_grad((layer,), x, *gate)):
        norm = (n.scale, n.shift, n.running_mean, n.running_var)
        return ops.gated_forward(*given, layer.bias, *norm, n.eps, ACTIVATIONS[layer.activation])
    bias = None if layer.bias is None else layer.bias.float()
    training = layer.norm is not None and layer.norm.training
    norm = (n.scale, n.shift, n.running_mean, n.running_var)
    y, _, mean, var, _, _ = ops.gated_norm_act(*given, bias, *norm, training, n.eps, ACTIVATIONS[layer.activation])
    if training:
        _move_running(n, mean, var, bias, y.shape[0], None)
    return F.dropout(y, layer.dropout) if layer.dropout else y


def gate_mix(logits_bte: Tensor, experts_beh: Tensor, mask_te: Tensor | None, residual_bte: Tensor | None) -> Tensor:
    mixed, _ = torch.ops.recsys_moe.gate_mix(logits_bte, experts_beh, mask_te, residual_bte)
    return mixed


def route_topk(
    logits_be: Tensor, k: int, scoring: Scoring, renormalize: bool, bias_e: Tensor | None, allowed_be: Tensor | None
) -> tuple[Tensor, Tensor]:
    ids, weights, _ = torch.ops.recsys_moe.route_topk(logits_be, k, SCORINGS[scoring], renormalize, bias_e, allowed_be)
    return ids, weights


def route(
    x_bd: Tensor,
    weight_gd: Tensor,
    bias_g: Tensor | None,
    num_experts: int,
    k: int,
    scoring: Scoring,
    renormalize: bool,
    bias_e: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return torch.ops.recsys_moe.route(x_bd, weight_gd, bias_g, num_experts, k, SCORINGS[scoring], renormalize, bias_e, scale)


def sort_by_expert(expert_ids_rk: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return torch.ops.recsys_moe.sort_by_expert(expert_ids_rk, num_experts)


def sparse_expert_mlp(
    x_bd: Tensor,
    layers: tuple[Layer, ...],
    expert_ids_rk: Tensor,
    weights_rk: Tensor,
    order: Tensor,
    offsets: Tensor,
    unit_norm: bool,
    invariant: bool,
) -> Tensor:
    ops = torch.ops.recsys_moe
    if invariant or not (_in_training(layers) or _needs_grad(layers, x_bd, weights_rk)):
        norms = [layer.norm or _NO_NORM for layer in layers]
        return ops.sparse_forward(
            x_bd,
            [layer.weight for layer in layers],
            [layer.weight_scale for layer in layers],
            [layer.bias for layer in layers],
            [n.scale for n in norms],
            [n.shift for n in norms],
            [n.running_mean for n in norms],
            [n.running_var for n in norms],
            [n.eps for n in norms],
            [ACTIVATIONS[layer.activation] for layer in layers],
            weights_rk,
            order,
            offsets,
            unit_norm,
        )
    if any(layer.weight_scale is not None for layer in layers):
        raise ValueError("int8 weights have no gradients here: call under torch.no_grad(), or use backend='reference'")
    h = ops.gather_rows(x_bd, order, offsets)
    for layer in layers:
        h = _finish(ops.grouped_linear(h.to(layer.weight.dtype), layer.weight, offsets), layer, offsets)
    if unit_norm:
        h = F.normalize(h.float(), dim=-1)
    return ops.combine(h, weights_rk, order, offsets).to(x_bd.dtype)


def paged_attention(
    q_nhd: Tensor,
    kv_nw: Tensor,
    turn_nd: Tensor,
    interleaved: bool,
    cache: Tensor,
    starts: Tensor,
    lengths: Tensor,
    blocks: Tensor,
    kv_heads: int,
    value_at: int,
    value_dim: int,
    scale: float,
    window: int | None,
) -> Tensor:
    attend = torch.ops.recsys_moe.paged_attention
    return attend(
        q_nhd, kv_nw, turn_nd, interleaved, cache, starts, lengths, blocks, kv_heads, value_at, value_dim, scale, window or 0
    )


# A decoder's layers in one call, which this backend alone has; the modules of recsys_moe.llm are their reference.


class FusedLayers:
    """Halves of a decoder's layers, bound to their weights and caches: those that were added run in turn, in one call."""

    def __init__(self) -> None:
        self._halves = torch.classes.recsys_moe.FusedLayers()
        self.grouped_attention = self._halves.grouped_attention
        self.latent_attention = self._halves.latent_attention
        self.dense_expert = self._halves.dense_expert
        self.run = self._halves.run

    def routed_experts(self, norm: Tensor, eps: float, gate: tuple[Any, ...], layers: tuple[Layer, ...], shared: int) -> None:
        weight, bias, k, scoring, *rest = gate
        weights, scales = [layer.weight for layer in layers], [layer.weight_scale for layer in layers]
        self._halves.routed_experts(norm, eps, weight, bias, k, SCORINGS[scoring], *rest, weights, scales, shared)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return reference.rms_norm(x, weight, eps)
    return torch.ops.recsys_moe.rms_norm(x, weight, eps)


def rotary(x_nhd: Tensor, turn_nd: Tensor, interleaved: bool) -> Tensor:
    if torch.is_grad_enabled() and x_nhd.requires_grad:
        return reference.rotary(x_nhd, turn_nd, interleaved)
    return torch.ops.recsys_moe.rotary(x_nhd, turn_nd, interleaved)


def embedding_bags(weights: Tensor, starts: Tensor, ids: Tensor, offsets: Tensor, width: int, mean: bool) -> Tensor:
    return torch.ops.recsys_moe.embedding_bags(weights, starts, ids, offsets, width, mean)


def embedding_adagrad(
    weights: Tensor,
    squares: Tensor,
    starts: Tensor,
    ids: Tensor,
    offsets: Tensor,
    grad: Tensor,
    width: int,
    mean: bool,
    rate: float,
    eps: float,
) -> None:
    torch.ops.recsys_moe.embedding_adagrad(weights, squares, starts, ids, offsets, grad, width, mean, rate, eps)


def _in_training(layers: tuple[Layer, ...]) -> bool:
    return any(layer.dropout or (layer.norm is not None and layer.norm.training) for layer in layers)


def _needs_grad(layers: tuple[Layer, ...], *inputs: Tensor | None) -> bool:
    if not torch.is_grad_enabled():
        return False
    norms = [t for layer in layers if layer.norm is not None for t in (layer.norm.scale, layer.norm.shift)]
    parameters = [t for layer in layers for t in (layer.weight, layer.bias)]
    return any(t is not None and t.requires_grad for t in (*inputs, *parameters, *norms))


class _Nothing:
    """The absence of a norm, field by field."""

    scale = shift = running_mean = running_var = None
    eps = 0.0


_NO_NORM: Any = _Nothing


def _finish(z: Tensor, layer: Layer, offsets: Tensor | None) -> Tensor:
    """What follows the product: `z` is `[B, E, H]`, or `[N, H]` in segments by expert. The running moments move."""
    y = z
    if layer.bias is not None or layer.norm is not None or layer.activation != "none":
        y = _bias_norm_act(z, layer, offsets)
    return F.dropout(y, layer.dropout) if layer.dropout else y


def _bias_norm_act(z: Tensor, layer: Layer, offsets: Tensor | None) -> Tensor:
    norm = layer.norm or _NO_NORM
    bias = None if layer.bias is None else layer.bias.float()
    training = layer.norm is not None and layer.norm.training
    blocks = layer.weight.shape[0] if offsets is None else 1
    y, mean, var = torch.ops.recsys_moe.norm_act(
        z, blocks, offsets, bias, norm.scale, norm.shift, norm.running_mean, norm.running_var, training, norm.eps,
        ACTIVATIONS[layer.activation],
    )  # fmt: skip
    if training:
        _move_running(norm, mean, var, bias, z.shape[0], offsets)
    return y


@torch.no_grad()
def _move_running(norm: BatchNorm, mean: Tensor, var: Tensor, bias: Tensor | None, rows: int, offsets: Tensor | None) -> None:
    # An expert with fewer than two rows was normalised with the running moments themselves: nothing moves.
    mean = mean.view_as(norm.running_mean)
    norm.running_mean.lerp_(mean if bias is None else mean + bias, norm.momentum)
    if offsets is None:
        unbias: float | Tensor = rows / (rows - 1) if rows > 1 else 1.0
    else:
        count = offsets.diff().unsqueeze(1)
        unbias = count / (count - 1).clamp_min(1)
        unbias = torch.where(count < 2, 1.0, unbias)
    norm.running_var.lerp_(var.view_as(norm.running_var) * unbias, norm.momentum)


# ---- shapes and gradients, for torch.compile, torch.export and autograd -------------------------------------------------


def _register() -> None:
    """Tell PyTorch the operators' shapes and gradients, once it is loaded; the most called gradients are in cpu_autograd.h."""
    ops, fake, gradient = torch.ops.recsys_moe, torch.library.register_fake, torch.library.register_autograd

    @fake("recsys_moe::norm_act")
    def _(z: Tensor, blocks, offsets, bias, scale, shift, running_mean, running_var, training, eps, activation):  # type: ignore[no-untyped-def]
        width = z.shape[-1] // 2 if activation == ACTIVATIONS["swiglu"] else z.shape[-1]
        moment = z.new_empty(0 if scale is None else scale.numel(), dtype=torch.float32)
        return z.new_empty(*z.shape[:-1], width), moment, torch.empty_like(moment)

    @fake("recsys_moe::norm_act_backward")
    def _(grad_y, z, blocks, offsets, bias, scale, shift, mean, var, training, eps, activation):  # type: ignore[no-untyped-def]
        sizes = [0 if t is None else t.numel() for t in (bias, scale, scale)]
        return torch.empty_like(z), *(z.new_empty(n, dtype=torch.float32) for n in sizes)

    @fake("recsys_moe::expert_linear")
    def _(x_bsd, gate_bgd, weight_ehd, source, bias, activation):  # type: ignore[no-untyped-def]
        return weight_ehd.new_empty(x_bsd.shape[0], *weight_ehd.shape[:2])

    @fake("recsys_moe::expert_linear_backward")
    def _(grad_z, x_bsd, gate_bgd, weight_ehd, source, need_x):  # type: ignore[no-untyped-def]
        none = x_bsd.new_empty(0)
        grad_x = torch.empty_like(x_bsd) if need_x else none
        return grad_x, none if gate_bgd is None else torch.empty_like(gate_bgd), torch.empty_like(weight_ehd)

    @fake("recsys_moe::gated_forward")
    def _(x_bsd, logits, down, up, weight, source, bias, scale, shift, mean, var, eps, activation):  # type: ignore[no-untyped-def]
        width = weight.shape[1] // 2 if activation == ACTIVATIONS["swiglu"] else weight.shape[1]
        return weight.new_empty(x_bsd.shape[0], weight.shape[0], width)

    @fake("recsys_moe::gated_norm_act")
    def _(x, logits, down, up, weight, source, bias, scale, shift, running_mean, running_var, training, eps, activation):  # type: ignore[no-untyped-def]
        width = weight.shape[1] // 2 if activation == ACTIVATIONS["swiglu"] else weight.shape[1]
        y, z = (weight.new_empty(x.shape[0], weight.shape[0], size) for size in (width, weight.shape[1]))
        moment = weight.new_empty(0 if scale is None else scale.numel(), dtype=torch.float32)
        (b, _, width), (_, groups, heads) = x.shape, logits.shape
        rank = down.shape[1]
        h = weight.new_empty(groups, b, heads * rank + rank % (4 // down.itemsize))
        s = weight.new_empty(groups, b, heads, width)
        return y, z, moment, torch.empty_like(moment), h, s

    @fake("recsys_moe::gated_norm_act_backward")
    def _(grad_y, z, h, s, x, logits, down, up, weight, source, bias, scale, shift, mean, var, training, eps, kind, need_x):  # type: ignore[no-untyped-def]
        grad_x = torch.empty_like(x) if need_x else x.new_empty(0)
        sizes = [0 if t is None else t.numel() for t in (bias, scale, scale)]
        small = (z.new_empty(n, dtype=torch.float32) for n in sizes)
        return grad_x, *(torch.empty_like(t) for t in (logits, down, up, weight)), *small

    def save_gated(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.source, bias, scale, shift, _, _, ctx.training, ctx.eps, ctx.activation = inputs
        _, z, mean, var, h, s = output
        ctx.mark_non_differentiable(z, mean, var, h, s)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, h, s, *tensors, bias, scale, shift, mean, var)

    def gated_gradient(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
        *tensors, bias, scale, shift, mean, var = ctx.saved_tensors
        need, norm = ctx.needs_input_grad[0], (bias, scale, shift)
        grad_x, *others = ops.gated_norm_act_backward(
            grad_y, *tensors, ctx.source, *norm, mean, var, ctx.training, ctx.eps, ctx.activation, need
        )
        shaped = [None if t is None else g.view_as(t) for t, g in zip(norm, others[4:], strict=True)]
        return grad_x if need else None, *others[:4], None, *shaped, *[None] * 5

    gradient("recsys_moe::gated_norm_act", gated_gradient, setup_context=save_gated)

    @fake("recsys_moe::dense_forward")
    def _(x, gate, weight, source, bias, scale, shift, mean, var, eps, activation):  # type: ignore[no-untyped-def]
        width = weight.shape[1] // 2 if activation == ACTIVATIONS["swiglu"] else weight.shape[1]
        return weight.new_empty(x.shape[0], weight.shape[0], width)

    @fake("recsys_moe::linear")
    def _(x, weight, bias):  # type: ignore[no-untyped-def]
        return weight.new_empty(x.shape[0], weight.shape[0])

    @fake("recsys_moe::sparse_forward")
    def _(x, weights, weight_scales, biases, scales, shifts, means, vars, eps, activations, gates, order, offsets, unit):  # type: ignore[no-untyped-def]
        width = weights[-1].shape[1] // 2 if activations[-1] == ACTIVATIONS["swiglu"] else weights[-1].shape[1]
        return x.new_empty(gates.shape[0], width)

    @fake("recsys_moe::grouped_linear")
    def _(h, weight, offsets):  # type: ignore[no-untyped-def]
        return weight.new_empty(h.shape[0], weight.shape[1])

    @fake("recsys_moe::grouped_linear_backward")
    def _(grad_z, h, weight, offsets):  # type: ignore[no-untyped-def]
        return torch.empty_like(h), torch.empty_like(weight)

    gradient(
        "recsys_moe::grouped_linear",
        lambda ctx, grad: (*ops.grouped_linear_backward(grad, *ctx.saved_tensors), None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )

    @fake("recsys_moe::gather_rows")
    def _(x, order, offsets):  # type: ignore[no-untyped-def]
        return x.new_empty(order.shape[0], x.shape[1])

    @fake("recsys_moe::gather_backward")
    def _(grad, order, offsets, rows):  # type: ignore[no-untyped-def]
        return grad.new_empty(rows, grad.shape[1])

    def save_gather(ctx: Any, inputs: Any, output: Any) -> None:
        x, order, offsets = inputs
        ctx.rows = x.shape[0]
        ctx.save_for_backward(order, offsets)

    gradient(
        "recsys_moe::gather_rows",
        lambda ctx, grad: (ops.gather_backward(grad, *ctx.saved_tensors, ctx.rows), None, None),
        setup_context=save_gather,
    )

    @fake("recsys_moe::combine")
    def _(h, weights, order, offsets):  # type: ignore[no-untyped-def]
        return h.new_empty(weights.shape[0], h.shape[1], dtype=torch.float32)

    @fake("recsys_moe::combine_backward")
    def _(grad, h, weights, order, offsets):  # type: ignore[no-untyped-def]
        return torch.empty_like(h), torch.empty_like(weights)

    gradient(
        "recsys_moe::combine",
        lambda ctx, grad: (*ops.combine_backward(grad, *ctx.saved_tensors), None, None),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )

    @fake("recsys_moe::paged_attention")
    def _(q, kv, turn, interleaved, cache, starts, lengths, blocks, kv_heads, value_at, value_dim, scale, window):  # type: ignore[no-untyped-def]
        return q.new_empty(*q.shape[:2], value_dim)

    @fake("recsys_moe::route")
    def _(x, weight, bias, experts, k, scoring, renormalize, correction, scale):  # type: ignore[no-untyped-def]
        rows = x.shape[0] * (weight.shape[0] // experts)
        integers = {"dtype": torch.int32}
        return (
            x.new_empty(rows, k, **integers),
            x.new_empty(rows, k, dtype=torch.float32),
            x.new_empty(rows * k, **integers),
            x.new_empty(experts + 1, **integers),
            x.new_empty(rows, experts, dtype=torch.float32),
        )

    @fake("recsys_moe::rms_norm")
    def _(x, weight, eps):  # type: ignore[no-untyped-def]
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @fake("recsys_moe::rotary")
    def _(x, turn, interleaved):  # type: ignore[no-untyped-def]
        return x.new_empty(x.shape)

    @fake("recsys_moe::embedding_bags")
    def _(weights, starts, ids, offsets, width, mean):  # type: ignore[no-untyped-def]
        return weights.new_empty((offsets.shape[0] - 1) // starts.shape[0], starts.shape[0] * width)

    @fake("recsys_moe::embedding_adagrad")
    def _(weights, squares, starts, ids, offsets, grad, width, mean, rate, eps):  # type: ignore[no-untyped-def]
        return None

    @fake("recsys_moe::gate_mix")
    def _(logits, experts, mask, residual):  # type: ignore[no-untyped-def]
        mixed = logits.new_empty(*logits.shape[:2], experts.shape[2], dtype=torch.float32)
        return mixed, torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)

    @fake("recsys_moe::gate_mix_backward")
    def _(grad, softmax, experts, mask, residual):  # type: ignore[no-untyped-def]
        on_residual = softmax.new_empty(0 if residual is None else softmax.shape)
        return torch.empty_like(softmax), on_residual, torch.empty_like(experts, memory_format=torch.contiguous_format)

    @fake("recsys_moe::route_topk")
    def _(logits, k, scoring, renormalize, bias, allowed):  # type: ignore[no-untyped-def]
        rows = logits.shape[0]
        fp32 = torch.float32
        return (
            logits.new_empty(rows, k, dtype=torch.int32),
            logits.new_empty(rows, k, dtype=fp32),
            torch.empty_like(logits, dtype=fp32),
        )

    def save_topk(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, ctx.scoring, ctx.renormalize, _, _ = inputs
        ids, weights, scores = output
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(ids, weights, scores)

    def topk_gradient(ctx: Any, _ids: Any, grad: Tensor, grad_scores: Tensor | None) -> tuple[Any, ...]:
        ids, weights, scores = ctx.saved_tensors
        if ctx.scoring == SCORINGS["softmax_after"]:
            grad = weights * (grad - (weights * grad).sum(1, keepdim=True))
        elif ctx.renormalize:
            total = scores.gather(1, ids.long()).sum(1, keepdim=True) + 1e-20
            grad = (grad - (weights * grad).sum(1, keepdim=True)) / total
        on_scores = torch.zeros_like(scores).scatter(1, ids.long(), grad)
        if ctx.scoring == SCORINGS["softmax"]:
            on_scores = scores * (on_scores - (scores * on_scores).sum(1, keepdim=True))
        elif ctx.scoring == SCORINGS["sigmoid"]:
            on_scores = on_scores * scores * (1 - scores)
        return on_scores, None, None, None, None, None

    gradient("recsys_moe::route_topk", topk_gradient, setup_context=save_topk)

    @fake("recsys_moe::sort_by_expert")
    def _(ids, experts):  # type: ignore[no-untyped-def]
        return ids.new_empty(ids.numel(), dtype=torch.int32), ids.new_empty(experts + 1, dtype=torch.int32)


if __name__ == "__main__":
    # Set-up builds ahead of first use. Without a compiler the reference backend remains: not an error here.
    print(f"CPU kernels: {why_not('cpu') or f'ready (bf16 products by {bf16_products()})'}")
