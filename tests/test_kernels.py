"""One table of cases for every backend of the expert kernels: outputs and all gradients against naive loops in float64.

The loops share no code with any backend. They get the very numbers that the kernel gets (already rounded to its precision),
and the error is relative, in the Frobenius norm.

The GPU kernels take part where there is a GPU, and, interpreted, in a process with TRITON_INTERPRET=1 from its start on:
`tests/test_triton.py` runs this file in one.
"""

import importlib.util
import math
import os
import typing
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recsys_moe import kernels
from recsys_moe.kernels import Activation, Backend, BatchNorm, FeatureGate, Layer, Scoring

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_CPU = pytest.mark.skipif(importlib.util.find_spec("recsys_moe.kernels.cpu") is None, reason="no C++ backend yet")
TRITON = ["triton"] if DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else []
BACKENDS = ["reference", pytest.param("cpu", marks=NO_CPU), *TRITON]

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
ACTIVATIONS = typing.get_args(Activation)

Tensors = dict[str, Tensor]
Norm = Literal["none", "training", "inference"]


def device(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖/‖want‖, and never more than ten times the absolute error: a gradient of exactly 0 is computed as 1e-9."""
    assert got.shape == want.shape
    return float((got.double().cpu() - want).norm() / want.norm().clamp_min(0.1))


def check(
    kernel: Callable[[Tensors], Tensor],
    naive: Callable[[Tensors], Tensor],
    inputs: Tensors,
    limit: float,
    on: str = "cpu",
    vanishing: tuple[str, ...] = (),
    kinked: bool = False,
    inference: bool = True,
) -> None:
    """Output, in training and at `inference`, and the gradient of every input, of a kernel and of the naive loops in float64.

    A gradient that is 0 in exact arithmetic (`vanishing`) is measured against the weight's. `kinked`: a pre-activation that
    was rounded may lie on the other side of ReLU's kink, and the gradients differ by whole rows of weights.
    """
    leaves = {name: value.to(on).detach().requires_grad_() for name, value in inputs.items()}
    exact = {name: value.double().requires_grad_() for name, value in inputs.items()}
    got, want = kernel(leaves), naive(exact)
    assert relative(got.detach(), want.detach()) < limit, "output"
    if inference:
        with torch.no_grad():
            assert relative(kernel(leaves), want.detach()) < limit, "output at inference"

    limit = 0.1 if kinked else limit
    # A fixed mixture of the outputs, so that no gradient cancels; rounded as the output is.
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(got.dtype)
    grads = torch.autograd.grad(got, list(leaves.values()), cotangent.to(on), allow_unused=True)
    wants: Sequence[Tensor] = [torch.zeros_like(value) for value in exact.values()]
    if want.requires_grad:  # no rows, no graph
        wants = torch.autograd.grad(want, list(exact.values()), cotangent.double(), allow_unused=True, materialize_grads=True)
    expected = dict(zip(exact, wants, strict=True))
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad is not None, f"{name} has no gradient"
        assert grad.dtype == leaf.dtype, name
        if name in vanishing:
            assert float(grad.norm()) < limit * float(expected["weight"].norm()), f"gradient of {name}"
        else:
            assert relative(grad, expected[name]) < limit, f"gradient of {name}"


# ---------------------------------------------------------------------------------------------- naive mathematics


def naive_activation(z: Tensor, activation: Activation) -> Tensor:
    if activation == "relu":
        return torch.where(z > 0, z, 0.0)
    if activation == "silu":
        return z / (1 + torch.exp(-z))
    if activation == "gelu":
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2
    if activation == "double_sigmoid":
        return 2 / (1 + torch.exp(-z))
    if activation == "swiglu":
        half = len(z) // 2
        return z[:half] / (1 + torch.exp(-z[:half])) * z[half:]
    return z


def naive_layer(rows: list[Tensor], p: Tensors, e: int, activation: Activation, norm: Norm, layer: str = "") -> list[Tensor]:
    """One expert's layer over the rows that it sees, row by row. Moves the running moments in `p` in training."""
    weight = p[f"weight{layer}"][e]
    z = [weight @ row for row in rows]
    if f"bias{layer}" in p:
        bias = p[f"bias{layer}"][e]
        z = [row + bias for row in z]
    if norm != "none":
        mean, var, scale, shift = (p[name][e] for name in ("running_mean", "running_var", "scale", "shift"))
        if norm == "training" and len(z) > 1:
            mean = sum(z[1:], z[0]) / len(z)
            var = sum(((row - mean) ** 2 for row in z), torch.zeros(())) / len(z)
            with torch.no_grad():
                p["running_mean"][e] = 0.9 * p["running_mean"][e] + 0.1 * mean
                p["running_var"][e] = 0.9 * p["running_var"][e] + 0.1 * var * len(z) / (len(z) - 1)
        z = [(row - mean) / torch.sqrt(var + 1e-5) * scale + shift for row in z]
    return [naive_activation(row, activation) for row in z]


def naive_softmax(logits: Tensor) -> Tensor:
    powers = torch.exp(logits - logits.detach().max())
    return powers / powers.sum()


def naive_feature_gate(row: Tensor, p: Tensors, b: int, g: int) -> Tensor:
    """A row's gate of one group."""
    logits = p["logits"][b, g]
    gate = torch.zeros_like(row)
    for i, weight in enumerate(naive_softmax(logits)):
        head = g * len(logits) + i
        gate = gate + weight * naive_activation(p["up"][head] @ (p["down"][head] @ row), "double_sigmoid")
    return gate


# ------------------------------------------------------------------------------------------------------ expert_mlp


@dataclass(frozen=True)
class Dense:
    """A case of `expert_mlp`. `inputs` 0: x is `[B, D]`."""

    why: str
    rows: int = 37
    inputs: int = 0
    source: tuple[int, ...] | None = None
    experts: int = 4
    width: int = 21
    units: int = 18
    activation: Activation = "relu"
    norm: Norm = "none"
    bias: bool = True
    gate: bool = False
    heads: int = 0
    rank: int = 7
    wide_x: bool = False
    strided: bool = False


DENSE = [
    Dense("one input for all, sizes that no tile divides"),
    Dense("one row", rows=1),
    Dense("no rows", rows=0),
    Dense("one expert, one unit, one input", rows=5, experts=1, width=1, units=1, activation="none"),
    Dense("more than one tile each way", rows=131, width=66, units=131, experts=1),
    Dense("an input for each expert", inputs=4, activation="none"),
    Dense("a gated input for each of two groups", gate=True, source=(0, 0), activation="silu"),
    Dense("a gated input for each expert", gate=True, source=(0, 0, 0, 0), activation="silu"),
    Dense("groups that share and swap inputs, gated", inputs=3, source=(2, 0, 2), experts=6, gate=True),
    Dense("groups that share inputs, not gated; one input is not read", inputs=3, source=(2, 0, 2, 0), experts=4),
    Dense("many gates of few inputs", inputs=3, source=(2, 0, 2, 2, 0, 2) * 3, experts=36, units=1, activation="none"),
    Dense("no bias", bias=False, activation="silu"),
    Dense("gelu", activation="gelu"),
    Dense("swiglu", activation="swiglu"),
    Dense("HoME's feature gate", activation="double_sigmoid"),
    Dense("HoME's expert in training", norm="training", activation="silu", gate=True, source=(0, 0)),
    Dense("HoME's expert at inference", norm="inference", activation="silu", gate=True, source=(0, 0)),
    Dense("norm in training over several tiles of rows", rows=150, norm="training", experts=2, bias=False),
    Dense("norm and swiglu in training", norm="training", activation="swiglu"),
    Dense("norm and swiglu at inference", norm="inference", activation="swiglu"),
    Dense("norm in training of one row: the running moments", rows=1, norm="training", activation="gelu"),
    Dense("norm in training of no rows", rows=0, norm="training"),
    Dense("non-contiguous input and weight", strided=True),
    Dense("a wide input of rounded experts", wide_x=True, gate=True, source=(0, 0)),
    Dense(
        "feature gates in training, over several blocks of rows",
        rows=450,
        source=(0, 0),
        norm="training",
        activation="silu",
        heads=2,
    ),
    Dense("feature gates at inference", source=(0, 0), norm="inference", activation="silu", heads=2, wide_x=True),
    Dense("feature gates of groups that swap inputs", inputs=3, source=(2, 0, 2), experts=6, activation="silu", heads=3),
    Dense(
        "feature gates of more than one tile each way",
        rows=131,
        source=(0,),
        width=66,
        units=34,
        rank=65,
        heads=1,
        experts=2,
        activation="silu",  # a gated input is rounded, and has no exact side of ReLU's kink
    ),
    Dense(
        "feature gates of an odd rank over more rows than pass at once",
        rows=301,
        inputs=3,
        source=(2, 0, 2),
        experts=6,
        norm="inference",
        activation="silu",
        heads=2,
        rank=5,
    ),
    Dense("a feature gate of rank 1", rows=9, source=(0, 0), rank=1, heads=2, activation="swiglu", strided=True),
    Dense("feature gates without rows", rows=0, source=(0, 0), heads=2, activation="gelu"),
]


def rounded(*shape: int, dtype: torch.dtype, scale: float = 1.0, strided: bool = False) -> Tensor:
    """Random numbers of a dtype; `strided`: every other column of a wider tensor."""
    wide = torch.randn(*shape[:-1], 2 * shape[-1]).mul(scale).to(dtype)
    return wide[..., ::2] if strided else wide[..., : shape[-1]].contiguous()


def parameters(
    experts: int, units: int, width: int, dtype: torch.dtype, bias: bool, norm: Norm, strided: bool = False, layer: str = ""
) -> Tensors:
    """Weight, bias, and the norm's scale and shift, those that there are; the last three in fp32, as models keep them."""
    p = {f"weight{layer}": rounded(experts, units, width, dtype=dtype, scale=width**-0.5, strided=strided)}
    if bias:
        p[f"bias{layer}"] = rounded(experts, units, dtype=torch.float32)
    if norm != "none":
        p["scale"], p["shift"] = 0.5 + torch.rand(experts, units), torch.randn(experts, units)
    return p


def running(experts: int, units: int, norm: Norm) -> Tensors:
    if norm == "none":
        return {}
    return {"running_mean": torch.randn(experts, units), "running_var": 0.5 + torch.rand(experts, units)}


def kinked(backend: str, case: Any, dtype: torch.dtype) -> bool:
    """The reference and the CPU backend take PyTorch's product, which rounds to bf16 before the bias; GPU kernels do not."""
    return backend != "triton" and dtype == torch.bfloat16 and case.activation == "relu"


def layer_of(p: Tensors, moments: Tensors, activation: Activation, norm: Norm, layer: str = "") -> Layer:
    state = None
    if norm != "none":
        state = BatchNorm(p["scale"], p["shift"], moments["running_mean"], moments["running_var"], norm == "training")
    return Layer(p[f"weight{layer}"], p.get(f"bias{layer}"), state, activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.why)
@pytest.mark.parametrize("backend", BACKENDS)
def test_expert_mlp(backend: Backend, case: Dense, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    units = 2 * case.units if case.activation == "swiglu" else case.units
    shape = (case.rows, case.inputs, case.width) if case.inputs else (case.rows, case.width)
    inputs = {"x": rounded(*shape, dtype=dtype, strided=case.strided)}
    inputs |= parameters(case.experts, units, case.width, dtype, case.bias, case.norm, case.strided)
    source = case.source or tuple(range(case.inputs or 1))
    if case.gate:
        # Powers of two, so that x⊙gate is exact in bf16 too and ReLU's kink is where the loops have it.
        inputs["gate"] = torch.exp2(torch.randint(-2, 2, (case.rows, len(source), case.width))).to(dtype)
    if case.heads:
        stacks = {"down": (case.rank, case.width), "up": (case.width, case.rank)}
        for name, size in stacks.items():
            heads = len(source) * case.heads
            inputs[name] = rounded(heads, *size, dtype=dtype, scale=2 * size[-1] ** -0.5, strided=case.strided)
        inputs["logits"] = torch.randn(case.rows, len(source), case.heads)
    if case.wide_x:
        inputs["x"] = inputs["x"].float()
    on, moments = device(backend), running(case.experts, units, case.norm)
    moved = {name: value.to(on, copy=True) for name, value in moments.items()}
    exact = {name: value.double() for name, value in moments.items()}

    def kernel(p: Tensors) -> Tensor:
        layer = layer_of(p, moved, case.activation, case.norm)
        feature_gate = FeatureGate(p["logits"], p["down"], p["up"]) if case.heads else None
        given: Any = {"gate_bgd": p.get("gate"), "feature_gate": feature_gate, "source": case.source}
        y = kernels.expert_mlp(p["x"], layer, **given, backend=backend)
        assert y.dtype == dtype
        return y

    def naive(p: Tensors) -> Tensor:
        outputs = []
        for e in range(case.experts):
            g = e * len(source) // case.experts
            rows = list(p["x"][:, source[g]] if case.inputs else p["x"])
            if "gate" in p:
                rows = [row * gate for row, gate in zip(rows, p["gate"][:, g], strict=True)]
            if case.heads:
                rows = [row * naive_feature_gate(row, p, b, g) for b, row in enumerate(rows)]
            y = naive_layer(rows, p | exact, e, case.activation, case.norm)
            outputs.append(torch.stack(y) if y else p["x"].new_zeros(0, case.units))
        return torch.stack(outputs, 1)

    batch_moments = case.norm == "training" and case.rows > 1
    vanishing = ("bias",) if batch_moments and case.bias else ()
    check(kernel, naive, inputs, LIMIT[dtype], on, vanishing, kinked(backend, case, dtype), case.norm != "training")
    for name, value in moved.items():
        assert relative(value, exact[name]) < LIMIT[dtype], name


# -------------------------------------------------------------------------------------------------------- gate_mix


@dataclass(frozen=True)
class Mix:
    """A case of `gate_mix`."""

    why: str
    rows: int = 13
    tasks: int = 3
    experts: int = 5
    units: int = 19
    masked: bool = False
    residual: bool = False
    scale: float = 1.0


MIX = [
    Mix("sizes that no block divides"),
    Mix("one row", rows=1),
    Mix("no rows", rows=0),
    Mix("one task, one expert", tasks=1, experts=1),
    Mix("masked: HoME's gates", masked=True),
    Mix("with residual weights: HoME's self gates", masked=True, residual=True),
    Mix("residual weights without a mask", residual=True),
    Mix("more units than one block", rows=3, units=1100),
    Mix("many experts", rows=3, experts=70, units=8),
    Mix("large logits", scale=40.0),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MIX, ids=lambda case: case.why)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gate_mix(backend: Backend, case: Mix, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = {
        "logits": case.scale * torch.randn(case.rows, case.tasks, case.experts),
        "experts": rounded(case.rows, case.experts, case.units, dtype=dtype),
    }
    if case.residual:
        inputs["residual"] = torch.randn(case.rows, case.tasks, case.experts)
    mask = None
    if case.masked:
        mask = torch.rand(case.tasks, case.experts) < 0.5
        mask[:, 1] = True
        mask[0] = torch.arange(case.experts) == 1

    def kernel(p: Tensors) -> Tensor:
        on_device = None if mask is None else mask.to(p["logits"].device)
        z = kernels.gate_mix(p["logits"], p["experts"], mask_te=on_device, residual_bte=p.get("residual"), backend=backend)
        assert z.dtype == torch.float32
        return z

    def naive(p: Tensors) -> Tensor:
        z = []
        for b in range(case.rows):
            for t in range(case.tasks):
                allowed = [e for e in range(case.experts) if mask is None or mask[t, e]]
                weights = naive_softmax(torch.stack([p["logits"][b, t, e] for e in allowed]))
                if "residual" in p:
                    weights = weights + torch.stack([p["residual"][b, t, e] for e in allowed])
                parts = [weights[i] * p["experts"][b, e] for i, e in enumerate(allowed)]
                z.append(sum(parts[1:], parts[0]))
        shape = (case.rows, case.tasks, case.units)
        return torch.stack(z).view(shape) if z else p["experts"].new_zeros(shape)

    check(kernel, naive, inputs, LIMIT[dtype], device(backend))


# ------------------------------------------------------------------------------------------------------ route_topk


@dataclass(frozen=True)
class Route:
    """A case of `route_topk`, for each scoring."""

    why: str
    rows: int = 9
    experts: int = 11
    k: int = 3
    renormalize: bool = True
    bias: bool = False
    allowed: bool = False
    ties: bool = False


ROUTE = [
    Route("renormalised"),
    Route("as the scores are", renormalize=False),
    Route("the bias counts for the choice only", bias=True),
    Route("groups that are not allowed", allowed=True, bias=True),
    Route("ties go to the lowest index", ties=True),
    Route("K = E", experts=5, k=5),
    Route("one expert", experts=1, k=1),
    Route("one row, many experts", rows=1, experts=130, k=8),
    Route("no rows", rows=0),
]


def naive_route(
    logits: Tensor, k: int, scoring: Scoring, renormalize: bool, bias: Tensor | None, allowed: Tensor | None
) -> tuple[list[int], Tensor]:
    """One row: the ids by falling score and the weights."""
    scores = logits
    if scoring == "softmax":
        scores = naive_softmax(logits)
    elif scoring == "sigmoid":
        scores = 1 / (1 + torch.exp(-logits))
    choice = [float(s.detach()) + (float(bias[e]) if bias is not None else 0.0) for e, s in enumerate(scores)]
    candidates = [e for e in range(len(choice)) if allowed is None or allowed[e]]
    ids = sorted(candidates, key=lambda e: (-choice[e], e))[:k]
    weights = torch.stack([scores[e] for e in ids])
    if scoring == "softmax_after":
        weights = naive_softmax(weights)
    elif renormalize:
        weights = weights / weights.sum()
    return ids, weights


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_after"])
@pytest.mark.parametrize("case", ROUTE, ids=lambda case: case.why)
@pytest.mark.parametrize("backend", BACKENDS)
def test_route_topk(backend: Backend, case: Route, scoring: Scoring) -> None:
    torch.manual_seed(0)
    on = device(backend)
    logits = torch.randn(case.rows, case.experts)
    if case.ties:
        logits = torch.randint(0, 2, logits.shape).float()
    bias = torch.randn(case.experts) if case.bias else None
    allowed = None
    if case.allowed:
        allowed = torch.rand(case.rows, case.experts).argsort(1) < case.k + 1
    chosen: list[list[int]] = []

    def kernel(p: Tensors) -> Tensor:
        ids, weights = kernels.route_topk(
            p["logits"],
            case.k,
            scoring=scoring,
            renormalize=case.renormalize,
            bias_e=None if bias is None else bias.to(on),
            allowed_be=None if allowed is None else allowed.to(on),
            backend=backend,
        )
        assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
        chosen.extend(ids.tolist())
        return weights

    def naive(p: Tensors) -> Tensor:
        weights = []
        for b, row in enumerate(p["logits"]):
            ids, w = naive_route(row, case.k, scoring, case.renormalize, bias, None if allowed is None else allowed[b])
            assert chosen[b] == ids
            weights.append(w)
        return torch.stack(weights) if weights else p["logits"].new_zeros(0, case.k)

    # With every expert chosen, or one, renormalised weights have gradients that cancel to nothing; ours must too.
    check(kernel, naive, {"logits": logits}, LIMIT[torch.float32], on)


# -------------------------------------------------------------------------------------------------- sort_by_expert


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(
    experts=st.integers(1, 9),
    ids=st.lists(st.integers(-1, 8), max_size=60),
    k=st.integers(1, 3),
)
def test_sort_by_expert(backend: Backend, experts: int, ids: list[int], k: int) -> None:
    ids = [min(i, experts - 1) for i in ids[: len(ids) // k * k]]
    table = torch.tensor(ids, dtype=torch.int32).view(-1, k)
    order, offsets = kernels.sort_by_expert(table.to(device(backend)), experts, backend=backend)
    assert (order.dtype, offsets.dtype) == (torch.int32, torch.int32)
    expected = [[slot for slot, i in enumerate(ids) if i == e] for e in range(experts)]
    unused = [slot for slot, i in enumerate(ids) if i < 0]
    assert order.tolist() == [slot for slots in [*expected, unused] for slot in slots]
    assert offsets.tolist() == [sum(len(slots) for slots in expected[:e]) for e in range(experts + 1)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sort_by_expert_over_several_blocks(backend: Backend) -> None:
    ids = torch.randint(-1, 100, (700, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    want = kernels.sort_by_expert(ids, 100, backend="reference")
    got = kernels.sort_by_expert(ids.to(device(backend)), 100, backend=backend)
    assert all(torch.equal(g.cpu(), w) for g, w in zip(got, want, strict=True))


# ----------------------------------------------------------------------------------------------- sparse_expert_mlp

Choice = Literal["random", "one", "lonely", "empty", "some_unused", "none"]


@dataclass(frozen=True)
class Sparse:
    """A case of `sparse_expert_mlp`. `choice`: how the rows' experts are drawn."""

    why: str
    rows: int = 29
    tasks: int = 1
    experts: int = 5
    k: int = 2
    width: int = 21
    units: int = 18
    activation: Activation = "swiglu"
    norm: Norm = "none"
    bias: bool = False
    second: bool = True
    choice: Choice = "random"
    unit_norm: bool = False
    wide_x: bool = False
    strided: bool = False


SPARSE = [
    Sparse("Mixtral's layer, sizes that no tile divides"),
    Sparse("one token", rows=1),
    Sparse("zero tokens", rows=0),
    Sparse("K = E", experts=3, k=3),
    Sparse("all tokens on one expert", choice="one", k=1),
    Sparse("an empty expert", choice="empty"),
    Sparse("slots without an expert", choice="some_unused", bias=True),
    Sparse("no slot has an expert", choice="none"),
    Sparse("several tiles of rows", rows=150, experts=2, k=1, width=66, units=70),
    Sparse("many experts, few tokens", rows=3, experts=40, k=4),
    Sparse("an MLP of two layers", activation="relu", bias=True),
    Sparse("one linear layer", activation="none", second=False, bias=True),
    Sparse("one layer, silu", activation="silu", second=False),
    Sparse("gelu and bias", activation="gelu", bias=True),
    Sparse("gates", activation="double_sigmoid", second=False),
    Sparse("two routings a row", tasks=2, activation="relu", bias=True),
    Sparse("HoME's expert in training, two tasks", tasks=2, activation="silu", second=False, norm="training"),
    Sparse("HoME's expert at inference", activation="silu", second=False, norm="inference", bias=True),
    Sparse(
        "norm in training, experts of one row and of none",
        choice="lonely",
        k=1,
        norm="training",
        activation="silu",
        second=False,
    ),
    Sparse("norm in training, then a second layer", norm="training", activation="swiglu", tasks=2, choice="some_unused"),
    Sparse("norm-based routing", unit_norm=True, choice="some_unused"),
    Sparse("non-contiguous input and weight", strided=True),
    Sparse("a wide input of rounded experts", wide_x=True),
]


def draw_ids(case: Sparse) -> Tensor:
    """int32 `[R, K]`: K different experts a row."""
    r = case.rows * case.tasks
    ids = torch.rand(r, case.experts).argsort(1)[:, : case.k]
    if case.choice == "one":
        ids = torch.full_like(ids, case.experts - 2)
    elif case.choice == "lonely":
        ids = (torch.arange(r) == 3).long().view(r, 1) * 2
    elif case.choice == "empty":
        ids = ids[:, : case.k] % (case.experts - 1)
        ids[:, 1] = (ids[:, 0] + 1) % (case.experts - 1)
    elif case.choice == "some_unused":
        ids = torch.where(torch.rand(ids.shape) < 0.3, -1, ids)
    elif case.choice == "none":
        ids = torch.full_like(ids, -1)
    return ids.int()


def naive_sparse(case: Sparse, ids: Tensor, p: Tensors, moments: Tensors) -> Tensor:
    r = case.rows * case.tasks
    y = [torch.zeros(case.width if case.second else case.units, dtype=torch.float64) for _ in range(r)]
    for e in range(case.experts):
        places = [(i, k) for i in range(r) for k in range(case.k) if ids[i, k] == e]
        rows = naive_layer([p["x"][i // case.tasks] for i, _ in places], p | moments, e, case.activation, case.norm)
        if case.second:
            rows = naive_layer(rows, p, e, "none", "none", "2")
        for (i, k), row in zip(places, rows, strict=True):
            y[i] = y[i] + p["weights"][i, k] * (row / row.square().sum().sqrt() if case.unit_norm else row)
    return torch.stack(y) if y else p["x"].new_zeros(0, case.width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SPARSE, ids=lambda case: case.why)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_expert_mlp(backend: Backend, case: Sparse, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    units = 2 * case.units if case.activation == "swiglu" else case.units
    ids = draw_ids(case)
    inputs = {"x": rounded(case.rows, case.width, dtype=dtype, strided=case.strided), "weights": torch.rand(ids.shape)}
    inputs |= parameters(case.experts, units, case.width, dtype, case.bias, case.norm, case.strided)
    if case.second:
        inputs |= parameters(case.experts, case.width, case.units, dtype, case.bias, "none", case.strided, layer="2")
    if case.wide_x:
        inputs["x"] = inputs["x"].float()
    on, moments = device(backend), running(case.experts, units, case.norm)
    moved = {name: value.to(on, copy=True) for name, value in moments.items()}
    exact = {name: value.double() for name, value in moments.items()}

    def kernel(p: Tensors) -> Tensor:
        layers: tuple[Layer, ...] = (layer_of(p, moved, case.activation, case.norm),)
        if case.second:
            layers += (layer_of(p, {}, "none", "none", "2"),)
        order, offsets = kernels.sort_by_expert(ids.to(on), case.experts, backend=backend)
        y = kernels.sparse_expert_mlp(
            p["x"], layers, ids.to(on), p["weights"], order, offsets, unit_norm=case.unit_norm, backend=backend
        )
        assert y.dtype == p["x"].dtype
        return y

    def naive(p: Tensors) -> Tensor:
        return naive_sparse(case, ids, p, exact)

    if case.choice == "none":
        assert not kernel({name: value.to(on) for name, value in inputs.items()}).any()
        return
    vanishing = ("bias",) if case.norm == "training" and case.bias else ()
    check(kernel, naive, inputs, LIMIT[dtype], on, vanishing, kinked(backend, case, dtype), case.norm != "training")
    for name, value in moved.items():
        assert relative(value, exact[name]) < LIMIT[dtype], name


INT8 = [case for case in SPARSE if case.norm != "training"]
INT8 += [Sparse("int8: blocks of outputs, and a rest", rows=70, k=1, experts=2, width=150, units=75)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", INT8, ids=lambda case: case.why)
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=NO_CPU)])
def test_sparse_expert_mlp_with_int8_weights(backend: Backend, case: Sparse, dtype: torch.dtype) -> None:
    """Against the naive loops over the dequantised weights, which are those that were given to half a step."""
    torch.manual_seed(0)
    units = 2 * case.units if case.activation == "swiglu" else case.units
    ids = draw_ids(case)
    inputs = {"x": rounded(case.rows, case.width, dtype=dtype, strided=case.strided), "weights": torch.rand(ids.shape)}
    inputs |= parameters(case.experts, units, case.width, dtype, case.bias, case.norm, case.strided)
    inputs |= parameters(case.experts, case.width, case.units, dtype, case.bias, "none", case.strided, layer="2")
    moments = running(case.experts, units, case.norm)
    layers: tuple[Layer, ...] = ()
    exact = {name: value.double() for name, value in (inputs | moments).items()}
    for suffix in ("", "2")[: 1 + case.second]:
        layer = layer_of(inputs, moments, *((case.activation, case.norm) if not suffix else ("none", "none")), suffix)
        q, scale = kernels.quantise(layer.weight)
        dequantised = q.double() * scale.double().unsqueeze(2)
        assert bool(((dequantised - exact[f"weight{suffix}"]).abs() <= scale.unsqueeze(2) * 0.5001).all())
        exact[f"weight{suffix}"] = dequantised
        layers += (layer._replace(weight=q, weight_scale=scale),)
    plan = (ids, inputs["weights"], *kernels.sort_by_expert(ids, case.experts, backend=backend))
    y = kernels.sparse_expert_mlp(inputs["x"], layers, *plan, unit_norm=case.unit_norm, invariant=True, backend=backend)
    assert y.dtype == inputs["x"].dtype
    assert relative(y, naive_sparse(case, ids, exact, exact)) < LIMIT[dtype]


@pytest.fixture
def operators() -> Any:
    """The cpu backend's operators, its library loaded."""
    from recsys_moe.kernels import cpu

    assert cpu.why_not("cpu") is None
    return torch.ops.recsys_moe


@NO_CPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "units"), [(21, 18), (320, 300)], ids=["small", "large"])
def test_weight_gradients_over_more_rows_than_one_part(width: int, units: int, dtype: torch.dtype, operators: Any) -> None:
    """Dense, and of experts with 1300, 0, 3 and 700 rows; small matrices go another way than large ones, in the same order."""
    x, grad = torch.randn(2003, 1, width).to(dtype), torch.randn(2003, 1, units).to(dtype)
    w, offsets = torch.randn(1, units, width).to(dtype), torch.tensor([0, 1300, 1300, 1303, 2003], dtype=torch.int32)

    def gradients() -> tuple[Tensor, Tensor]:
        dense = operators.expert_linear_backward(grad, x, None, w, [0], False)[2]
        grouped = operators.grouped_linear_backward(grad[:, 0], x[:, 0], w.expand(4, -1, -1), offsets)[1]
        return dense, grouped

    dense, grouped = gradients()
    want = [grad[a:b, 0].double().T @ x[a:b, 0].double() for a, b in pairwise(offsets.tolist())]
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative(dense[0], torch.stack(want).sum(0)) < limit
    for got, exact in zip(grouped, want, strict=True):
        assert relative(got, exact) < limit
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(gradients(), (dense, grouped), strict=True))
    finally:
        torch.set_num_threads(threads)


@NO_CPU
def test_an_activation_whose_output_does_not_tell_its_slope_has_no_gradient_there(operators: Any) -> None:
    from recsys_moe.kernels.cpu import ACTIVATIONS as NUMBERS
    from recsys_moe.kernels.cpu import FROM_OUTPUT

    for activation in set(NUMBERS.values()) - {NUMBERS["swiglu"]}:
        w = torch.randn(2, 3, 5, requires_grad=True)
        y = operators.expert_linear(torch.randn(4, 1, 5), None, w, [0, 0], torch.randn(2, 3), activation)
        with nullcontext() if activation in FROM_OUTPUT else pytest.raises(NotImplementedError, match="tell its slope"):
            y.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_route_is_a_product_a_choice_and_a_sort(backend: Backend) -> None:
    on = device(backend)
    x, weight, bias = (t.to(on) for t in (torch.randn(9, 8).bfloat16(), torch.randn(10, 8), torch.randn(10)))
    correction = torch.randn(5, device=on)
    with torch.no_grad():
        found = kernels.route(
            *(x, weight, bias, 5, 2), scoring="sigmoid", renormalize=True, bias_e=correction, scale=3.0, backend=backend
        )
        logits = kernels.linear(x.float(), weight, bias, invariant=True, backend=backend).view(18, 5)
        choice = {"scoring": "sigmoid", "renormalize": True, "bias_e": correction}
        ids, weights = kernels.route_topk(logits, 2, **choice, backend=backend)  # type: ignore[arg-type]
        wanted = (ids, weights * 3, *kernels.sort_by_expert(ids, 5, backend=backend), logits)
    assert all(torch.equal(mine, its) for mine, its in zip(found, wanted, strict=True))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_is_one_expert(backend: Backend, dtype: torch.dtype, invariant: bool) -> None:
    on, given = device(backend), [rounded(*shape, dtype=dtype) for shape in ((20, 9), (7, 9))]
    given.append(torch.randn(7))
    results = []
    for one_expert in (False, True):
        x, weight, bias = (t.clone().to(on).requires_grad_(not invariant) for t in given)
        if one_expert:
            layer = Layer(weight.unsqueeze(0), bias.unsqueeze(0))
            y = kernels.expert_mlp(x, layer, invariant=invariant, backend=backend).squeeze(1)
        else:
            y = kernels.linear(x, weight, bias, invariant=invariant, backend=backend)
        if not invariant:
            y.float().sin().sum().backward()
        results.append([y, x.grad, weight.grad, bias.grad])
    for mine, its in zip(*results, strict=True):
        assert mine is None if its is None else torch.equal(mine, its)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_keeps_half_and_doubles_it(backend: Backend) -> None:
    torch.manual_seed(0)
    on = device(backend)
    x, weight = torch.randn(64, 8, device=on), torch.randn(2, 16, 8, device=on)
    ids = torch.arange(64, device=on, dtype=torch.int32).view(64, 1) % 2
    order, offsets = kernels.sort_by_expert(ids, 2, backend=backend)
    ones = torch.ones(64, 1, device=on)

    def dense(dropout: float) -> Tensor:
        return kernels.expert_mlp(x, Layer(weight, dropout=dropout), backend=backend)

    def routed(dropout: float) -> Tensor:
        return kernels.sparse_expert_mlp(x, (Layer(weight, dropout=dropout),), ids, ones, order, offsets, backend=backend)

    for run in (dense, routed):
        dropped = run(0.5)
        kept = dropped != 0
        assert 0.4 < float(kept.float().mean()) < 0.6
        torch.testing.assert_close(dropped[kept], 2 * run(0.0)[kept])


# ------------------------------------------------------------------------------------------------ batch invariance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rows_bits_do_not_depend_on_its_company(
    backend: Backend, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton" and DEVICE == "cpu":
        # Interpreted, a tile's product is numpy's, whose BLAS sums a row by its place in the tile.
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a, b, dtype=dtype))
    torch.manual_seed(0)
    experts, k, width, units = 6, 2, 40, 24
    up, down = rounded(experts, 2 * units, width, dtype=dtype), rounded(experts, width, units, dtype=dtype)
    layers = (Layer(up.to(device(backend)), activation="swiglu"), Layer(down.to(device(backend))))
    victim, victim_ids, victim_weights = rounded(1, width, dtype=dtype), torch.tensor([[4, 1]]), torch.rand(1, k)

    def among(rows: int, place: int, ids: Tensor) -> Tensor:
        """What a sparse and a dense layer and a mixture make of the victim among `rows` rows with experts `ids`."""
        x = rounded(rows, width, dtype=dtype)
        x[place], ids[place] = victim[0], victim_ids[0]
        weights = torch.rand(rows, k)
        weights[place] = victim_weights[0]
        x, ids, weights = (t.to(device(backend)) for t in (x, ids.int(), weights))
        order, offsets = kernels.sort_by_expert(ids, experts, backend=backend)
        with torch.no_grad():
            y = kernels.sparse_expert_mlp(x, layers, ids, weights, order, offsets, invariant=True, backend=backend)
            outputs = kernels.expert_mlp(x, layers[0], invariant=True, backend=backend)
            z = kernels.gate_mix(outputs[:, None, :, 0].float(), outputs, backend=backend)
        return torch.cat([y[place].flatten(), outputs[place].flatten(), z[place].flatten()])

    want = among(1, 0, victim_ids.clone())
    for rows in (2, 17, 70):
        ids = torch.rand(rows, experts).argsort(1)[:, :k]
        attacked = victim_ids.expand(rows, k).clone()
        for company in (ids, attacked):
            place = int(torch.randint(rows, ()))
            assert torch.equal(among(rows, place, company), want), f"row {place} of {rows}"


# -------------------------------------------------------------------------------------------------- the oracle, fp64


def in_float64(case: Dense | Sparse, units: int, extra: Tensors) -> Tensors:
    norm = parameters(case.experts, units, case.width, torch.float64, case.bias, case.norm)
    return {name: value.double().requires_grad_() for name, value in (norm | extra).items()}


def gradcheck(function: Callable[..., Any], p: Tensors) -> None:
    def positional(*values: Tensor) -> Any:
        return function(dict(zip(p, values, strict=True)))

    assert torch.autograd.gradcheck(positional, tuple(p.values()))


@pytest.mark.parametrize("norm", ["none", "training", "inference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_the_reference_expert_mlp(activation: Activation, norm: Norm) -> None:
    torch.manual_seed(0)
    case = Dense("", rows=4, experts=2, width=3, units=2, activation=activation, norm=norm)
    units = 2 * case.units if activation == "swiglu" else case.units
    p = in_float64(case, units, {"x": torch.randn(4, 2, 3), "gate": torch.rand(4, 2, 3)})
    moments = {name: value.double() for name, value in running(2, units, norm).items()}

    def run(q: Tensors) -> Tensor:
        layer = layer_of(q, moments, activation, norm)
        return kernels.expert_mlp(q["x"], layer, gate_bgd=q["gate"], source=(1, 0), backend="reference")

    gradcheck(run, p)


@pytest.mark.parametrize("unit_norm", [False, True])
def test_gradients_of_the_reference_sparse_expert_mlp(unit_norm: bool) -> None:
    torch.manual_seed(0)
    case = Sparse(
        "", rows=3, experts=3, width=3, units=2, bias=True, choice="some_unused", norm="training", unit_norm=unit_norm
    )
    second = parameters(3, 3, 2, torch.float64, True, "none", layer="2")
    p = in_float64(case, 4, second | {"x": torch.randn(3, 3), "weights": torch.rand(3, 2)})
    moments, ids = {name: value.double() for name, value in running(3, 4, "training").items()}, draw_ids(case)
    order, offsets = kernels.sort_by_expert(ids, 3, backend="reference")

    def run(q: Tensors) -> Tensor:
        layers = (layer_of(q, moments, "swiglu", "training"), layer_of(q, {}, "none", "none", "2"))
        return kernels.sparse_expert_mlp(
            q["x"], layers, ids, q["weights"], order, offsets, unit_norm=unit_norm, backend="reference"
        )

    gradcheck(run, p)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_after"])
def test_gradients_of_the_reference_gates(scoring: Scoring) -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    logits, experts = torch.randn(2, 2, 3).double().requires_grad_(), torch.randn(2, 3, 2).double().requires_grad_()
    gradcheck(
        lambda q: kernels.gate_mix(q["logits"], q["experts"], mask_te=mask, backend="reference"),
        {"logits": logits, "experts": experts},
    )
    gradcheck(
        lambda q: kernels.route_topk(q["logits"], 2, scoring=scoring, renormalize=True, backend="reference")[1],
        {"logits": torch.randn(3, 4).double().requires_grad_()},
    )


# ------------------------------------------------------------------------------------------------------- bad input


def layer(experts: int = 2, units: int = 3, width: int = 4, **more: Any) -> Layer:
    return Layer(torch.ones(experts, units, width), **more)


def sparse(x: Tensor, layers: Sequence[Layer], **changed: Tensor) -> Tensor:
    ids = torch.zeros(2, 1, dtype=torch.int32)
    given = {"ids": ids, "weights": torch.ones(2, 1), "order": torch.arange(2).int(), "offsets": torch.tensor([0, 2, 2])}
    given |= changed
    return kernels.sparse_expert_mlp(
        x, tuple(layers), given["ids"], given["weights"], given["order"], given["offsets"], backend="reference"
    )


def gated(gate: FeatureGate, **given: Any) -> Tensor:
    return kernels.expert_mlp(ONES, layer(), feature_gate=gate, source=(0,), **given)


ONES = torch.ones(2, 4)
ONE, DOWN, UP = torch.ones(2, 1, 1), torch.ones(1, 3, 4), torch.ones(1, 4, 3)
BAD: list[tuple[str, Callable[[], Any], str]] = [
    ("k > E", lambda: kernels.route_topk(torch.ones(1, 3), 4), "k is 4, but there are 3 experts"),
    ("k = 0", lambda: kernels.route_topk(torch.ones(1, 3), 0), "1 ≤ k ≤ 3"),
    ("NaN logits", lambda: kernels.route_topk(torch.tensor([[0.0, 1.0], [0.0, math.nan]]), 1), "row 1 are not finite"),
    ("infinite logits", lambda: kernels.route_topk(torch.tensor([[0.0, math.inf]]), 1), "row 0 are not finite"),
    ("integer logits", lambda: kernels.route_topk(torch.ones(1, 3, dtype=torch.int64), 1), r"torch.int64 \[1, 3\]"),
    (
        "bias of another length",
        lambda: kernels.route_topk(torch.ones(1, 3), 2, bias_e=torch.ones(1)),
        r"bias_e is \[1\], not \[E\] = \[3\]",
    ),
    (
        "a router's bias too long",
        lambda: kernels.route(ONES, torch.ones(3, 4), None, 3, 1, bias_e=torch.ones(4)),
        r"\[4\], not \[E\]",
    ),
    ("k > E of a router", lambda: kernels.route(ONES, torch.ones(3, 4), None, 3, 4), "k is 4, but there are 3 experts"),
    (
        "allowed for one row only",
        lambda: kernels.route_topk(torch.ones(2, 3), 2, allowed_be=torch.ones(1, 3) > 0),
        r"allowed_be is torch.bool \[1, 3\], not bool \[B, E\] = \[2, 3\]",
    ),
    (
        "too few allowed",
        lambda: kernels.route_topk(torch.ones(2, 3), 2, allowed_be=torch.tensor([[True] * 3, [False, True, False]])),
        "k is 2, but allowed_be allows row 1 1 experts",
    ),
    (
        "an unknown scoring",
        lambda: kernels.route_topk(torch.ones(1, 3), 1, scoring="tanh"),  # type: ignore[arg-type]
        "scoring is 'tanh'; valid: softmax, sigmoid",
    ),
    (
        "a router's unknown scoring",
        lambda: kernels.route(ONES, torch.ones(3, 4), None, 3, 1, scoring="tanh"),  # type: ignore[arg-type]
        "'tanh'; valid: softmax",
    ),
    ("an unknown activation", lambda: kernels.expert_mlp(ONES, layer(activation="tanh")), "'tanh'; valid: none, relu, silu"),
    (
        "no axes",
        lambda: kernels.expert_mlp(torch.tensor(1.0), layer()),
        r"x is torch.float32 \[\], not floating-point \[B, D\]",
    ),
    ("an axis too many", lambda: kernels.expert_mlp(torch.ones(2, 1, 1, 4), layer()), r"\[2, 1, 1, 4\], not floating"),
    ("whole numbers", lambda: kernels.expert_mlp(ONES.int(), layer()), "torch.int32"),
    ("a weight without experts", lambda: kernels.expert_mlp(ONES, Layer(torch.ones(3, 4))), r"\[3, 4\], not \[E, H, D\]"),
    ("no source", lambda: kernels.expert_mlp(ONES, layer(), source=()), r"source \(\) does not fit"),
    ("weight of another width", lambda: kernels.expert_mlp(torch.ones(2, 5), layer()), r"\[2, 3, 4\].* D = 5"),
    ("weight in fp16", lambda: kernels.expert_mlp(ONES, Layer(torch.ones(2, 3, 4).half())), "torch.float16; .*bfloat16"),
    ("bias of another size", lambda: kernels.expert_mlp(ONES, layer(bias=torch.ones(2, 2))), r"\[2, 2\].*\[2, 3\]"),
    ("odd swiglu", lambda: kernels.expert_mlp(ONES, layer(activation="swiglu")), "3 units: it needs an even number"),
    ("weight with experts", lambda: kernels.linear(ONES, torch.ones(2, 3, 4)), r"weight_hd \[2, 3, 4\] are not"),
    ("input of another width", lambda: kernels.linear(ONES, torch.ones(3, 5)), r"x_bd \[2, 4\] and weight_hd \[3, 5\]"),
    ("a bias too long", lambda: kernels.linear(ONES, torch.ones(3, 4), torch.ones(4)), r"bias_h is \[4\], not \[H\] = \[3\]"),
    ("source beyond the inputs", lambda: kernels.expert_mlp(ONES, layer(), source=(0, 1)), r"source \(0, 1\).*0 … 0"),
    ("groups that do not divide", lambda: kernels.expert_mlp(ONES, layer(), source=(0, 0, 0)), "divides 2"),
    (
        "feature gate of another shape",
        lambda: gated(FeatureGate(torch.ones(2, 1, 1), torch.ones(1, 2, 3), UP)),
        r"\(1, 2, 3\).*D = 4",
    ),
    (
        "feature gate in bf16",
        lambda: gated(FeatureGate(ONE, DOWN.bfloat16(), UP)),
        "bfloat16.*not of the weight",
    ),
    ("two gates", lambda: gated(FeatureGate(ONE, DOWN, UP), gate_bgd=torch.ones(2, 1, 4)), "both given"),
    ("gate of another shape", lambda: kernels.expert_mlp(ONES, layer(), gate_bgd=torch.ones(2, 2, 3)), r"\[2, 2, 3\], not"),
    (
        "mask of another shape",
        lambda: kernels.gate_mix(torch.ones(2, 1, 3), torch.ones(2, 3, 4), mask_te=ONES > 0),
        r"\[1, 3\]",
    ),
    ("experts that do not fit", lambda: kernels.gate_mix(torch.ones(2, 1, 3), torch.ones(2, 4, 4)), "E = 3"),
    ("layers that do not fit", lambda: sparse(ONES, [layer(), layer()]), r"layer 1 is \[2, 3, 4\].* D = 3"),
    ("weights that do not fit", lambda: sparse(ONES, [layer()], weights=torch.ones(2, 2)), r"weights_rk \[2, 2\]"),
    (
        "offsets that do not fit",
        lambda: sparse(ONES, [layer()], offsets=torch.tensor([0, 2])),
        r"\[2\], not \[E \+ 1\] = \[3\]",
    ),
    (
        "an unknown backend",
        lambda: kernels.gate_mix(torch.ones(1, 1, 1), torch.ones(1, 1, 1), backend="gpu"),
        "'gpu' is unknown",
    ),
]


@pytest.mark.parametrize(("call", "says"), [pytest.param(call, says, id=why) for why, call, says in BAD])
def test_bad_input_is_told_with_its_value_and_the_limit(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        call()


def test_the_table_reaches_every_activation_and_norm() -> None:
    """A case that is lost from the table must be seen."""
    assert {case.activation for case in DENSE} == {case.activation for case in SPARSE} == set(ACTIVATIONS)
    assert {case.norm for case in DENSE} == {case.norm for case in SPARSE} == {"none", "training", "inference"}
    assert replace(DENSE[0], why="").rows > 1


@pytest.mark.parametrize("change", ["dropout", "norm"])
def test_the_invariant_mode_refuses_training(change: str) -> None:
    moments = torch.zeros(2, 3), torch.ones(2, 3)
    norm = BatchNorm(torch.ones(2, 3), torch.zeros(2, 3), *moments, training=True) if change == "norm" else None
    layer = Layer(torch.ones(2, 3, 4), norm=norm, dropout=0.5 if change == "dropout" else 0.0)
    with pytest.raises(ValueError, match=r"layer 0 is in training .* under invariant=True"):
        kernels.expert_mlp(torch.ones(5, 4), layer, invariant=True)
    ids = torch.zeros(5, 1, dtype=torch.int32)
    plan = (ids, torch.ones(5, 1), *kernels.sort_by_expert(ids, 2))
    with pytest.raises(ValueError, match=r"layer 0 is in training .* under invariant=True"):
        kernels.sparse_expert_mlp(torch.ones(5, 4), (layer,), *plan, invariant=True)


def test_each_layer_has_its_own_eps() -> None:
    torch.manual_seed(0)

    def layer(eps: float) -> Layer:
        norm = BatchNorm(torch.ones(1, 4), torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1, 4), False, eps=eps)
        return Layer(torch.eye(4).unsqueeze(0), norm=norm)

    x, ids = torch.randn(3, 4), torch.zeros(3, 1, dtype=torch.int32)
    plan = (ids, torch.ones(3, 1), *kernels.sort_by_expert(ids, 1))
    y = kernels.sparse_expert_mlp(x, (layer(0.0), layer(3.0)), *plan)
    torch.testing.assert_close(y, x / 2)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_is_not_taken_for_nothing(backend: Backend) -> None:
    """A diverged training must be seen, whatever the activation."""
    for activation in ("none", "relu", "silu", "gelu"):
        layer = Layer(torch.ones(1, 3, 4), torch.zeros(1, 3), activation=activation)
        for invariant in (False, True):
            y = kernels.expert_mlp(torch.full((2, 4), torch.nan), layer, invariant=invariant, backend=backend)
            assert y.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "double_sigmoid"])
def test_activations_are_right_for_every_value_of_bf16(activation: Activation, dtype: torch.dtype) -> None:
    """The vectors' own exponentials and sigmoids, from one end of the numbers to the other."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).unsqueeze(1)
    layer = Layer(torch.ones(1, 1, 1, dtype=dtype), activation=activation)
    y = kernels.expert_mlp(x.to(dtype), layer, backend="cpu").flatten().double()
    z = x.flatten().double()
    naive = naive_activation(z, activation)
    finite = z.isfinite()
    rtol = 1e-6 if dtype == torch.float32 else 2**-8 + 3e-4
    # gelu's 1 + erf cancels where its value is next to nothing.
    torch.testing.assert_close(y[finite], naive[finite], rtol=rtol, atol=1e-6 if activation == "gelu" else 1e-30)
    assert y[z.isnan()].isnan().all()
    ends = y[z == torch.inf].item(), y[z == -torch.inf].item()
    assert ends[0] == (2 if activation == "double_sigmoid" else torch.inf)
    assert math.isnan(ends[1]) if activation in ("silu", "gelu") else ends[1] == 0  # −∞ · 0
