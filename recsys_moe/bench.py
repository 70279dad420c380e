"""The kernels timed beside what people would run instead, in the same minutes on the same threads.

    layer     a whole sparse layer beside transformers' (eager and grouped_mm), weights rotated through memory
    loop      8 dense experts under 4 gates beside modules in a Python list, eager and compiled
    home      HoME beside the same equations module by module, eager and compiled
    scaling   cost against tokens and experts (no peer), and the overhead of a small call

The peers are scripts outside the project; RECSYS_MOE_PEERS names their folder. Every case checks first that both compute
the same numbers. Ceilings (reading memory, matrix products) are measured in the same run.
"""

import importlib.util
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.errors import UserError
from recsys_moe.kernels import BatchNorm, Layer, expert_mlp, gate_mix, route_topk, sort_by_expert, sparse_expert_mlp

CASES = ("layer", "loop", "home", "scaling")
Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One measurement. `ratio` is the peer's time over ours; `of_read` and `of_matrix` are shares of the ceilings."""

    case: str
    backend: str
    ms: float
    peer: str = ""
    peer_ms: float | None = None
    ratio: float | None = None
    of_read: float | None = None
    of_matrix: float | None = None


def bench(cases: tuple[str, ...], peers: Path | None = None) -> Iterator[Row]:
    """Time the cases; rows come as they are measured.

    Raises:
        UserError: an unknown case, or no peers' scripts at `peers` (default: RECSYS_MOE_PEERS or ../shared/bench).
    """
    for case in cases:
        if case not in CASES:
            raise UserError(f"case {case!r} is unknown; valid: {', '.join(CASES)}")
    folder = peers or Path(os.environ.get("RECSYS_MOE_PEERS", "../shared/bench"))
    if set(cases) - {"scaling"} and not (folder / "hf_moe_layer.py").exists():
        raise UserError(f"{str(folder)!r} holds no peers' scripts (hf_moe_layer.py …); set RECSYS_MOE_PEERS to their folder")
    torch.manual_seed(0)
    measures = {"layer": bench_layer, "loop": bench_loop, "home": bench_home, "scaling": lambda folder: bench_scaling()}
    for case in cases:
        yield from measures[case](folder)


def load_peer(folder: Path, name: str) -> ModuleType:
    """A peer's script as a module."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def alternate(calls: dict[str, Call], repeats: int, warmup: int = 2) -> dict[str, float]:
    """Median milliseconds of each call, one after the other in turn: the machine's speed drifts."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


# ---- a sparse layer, as a language model has it ----------------------------------------------------------------------


class SparseLayer:
    """transformers' MoE layer of either kind, on its own weights, through the kernels."""

    def __init__(self, peer: nn.Module, shape: dict[str, Any], invariant: bool) -> None:
        p = {name: tensor.detach() for name, tensor in peer.named_parameters()}
        self.k, self.invariant, self.renormalize = shape["k"], invariant, shape["kind"] == "mixtral"
        self.router = Layer(p["gate.weight"].float().unsqueeze(0))
        self.experts = (Layer(p["experts.gate_up_proj"], activation="swiglu"), Layer(p["experts.down_proj"]))
        self.shared: tuple[Layer, ...] = ()
        if shape["shared"]:
            gate_up = torch.cat([p["shared_experts.gate_proj.weight"], p["shared_experts.up_proj.weight"]])
            down = p["shared_experts.down_proj.weight"]
            self.shared = (Layer(gate_up.unsqueeze(0), activation="swiglu"), Layer(down.unsqueeze(0)))

    def __call__(self, x_btd: Tensor) -> Tensor:
        x = x_btd.flatten(0, 1)
        logits = expert_mlp(x.float(), self.router, invariant=self.invariant).squeeze(1)
        ids, weights = route_topk(logits, self.k, renormalize=self.renormalize)
        plan = (ids, weights, *sort_by_expert(ids, logits.shape[1]))
        y = sparse_expert_mlp(x, self.experts, *plan, invariant=self.invariant)
        if self.shared:
            h = expert_mlp(x, self.shared[0], invariant=self.invariant)
            y = y + expert_mlp(h, self.shared[1], source=(0,), invariant=self.invariant).squeeze(1)
        return y.view_as(x_btd)


@torch.no_grad()
def bench_layer(folder: Path) -> Iterator[Row]:
    """transformers' own benchmark, with our layer on the very same weights and inputs."""
    peer = load_peer(folder, "hf_moe_layer")
    read, matrix = peer.ceilings()
    for name, shape in peer.SHAPES.items():
        for dtype in (torch.float32, torch.bfloat16):
            width = torch.finfo(dtype).bits // 8
            size = (shape["experts"] + shape["shared"]) * 3 * shape["hidden"] * shape["ffn"] * width
            eager = [peer.build(shape, dtype, "eager") for _ in range(max(2, round(peer.CACHE_BYTES / size)))]
            grouped = [peer.build({**shape}, dtype, "grouped_mm") for _ in eager]
            for a, b in zip(eager, grouped, strict=True):
                b.load_state_dict(a.state_dict(), assign=True)  # one set of weights for all
            free, fixed = ([SparseLayer(a, shape, invariant) for a in eager] for invariant in (False, True))
            for tokens in (1, 16, 512):
                inputs = [torch.randn(1, tokens, shape["hidden"], dtype=dtype) for _ in eager]
                for layer in (grouped[0], free[0], fixed[0]):
                    _same(layer(inputs[0]), eager[0](inputs[0]), 1e-4 if dtype == torch.float32 else 0.1)  # near ties
                calls = {
                    kind: _in_turn(layers, inputs)
                    for kind, layers in (("eager", eager), ("grouped_mm", grouped), ("cpu", free), ("cpu invariant", fixed))
                }
                ms = alternate(calls, 7 if tokens > 16 else 24, warmup=len(eager) if tokens <= 16 else 2)
                touched = statistics.mean(peer.touched_bytes(a, x, shape) for a, x in zip(eager, inputs, strict=True))
                flops = tokens * (shape["k"] + shape["shared"]) * 6 * shape["hidden"] * shape["ffn"]
                best = min(("eager", "grouped_mm"), key=lambda kind: ms[kind])
                for kind in ("cpu", "cpu invariant"):
                    yield Row(
                        f"layer {name} {str(dtype)[6:]} {tokens} tokens",
                        kind,
                        ms[kind],
                        f"transformers {best}",
                        ms[best],
                        ms[best] / ms[kind],
                        touched / ms[kind] / 1e6 / read,
                        flops / ms[kind] / 1e9 / matrix[dtype],
                    )


def _in_turn(layers: list[Any], inputs: list[Tensor]) -> Call:
    pairs = itertools.cycle(zip(layers, inputs, strict=True))

    def call() -> None:
        layer, x = next(pairs)
        layer(x)

    return call


def _same(ours: Tensor, peers: Tensor, tolerance: float) -> None:
    error = ((ours.float() - peers.float()).norm() / peers.float().norm()).item()
    if not error < tolerance:
        raise AssertionError(f"the peer computes something else: relative error {error:.2e}")


# ---- dense experts -------------------------------------------------------------------------------------------------------


class DenseLoop(nn.Module):
    """The peer's 8 experts of two layers under 4 gates, on its weights."""

    def __init__(self, peer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for index in (0, 2):
            linears = [expert[index] for expert in peer.experts]
            self.weights.append(torch.stack([m.weight.detach() for m in linears]))
            self.biases.append(torch.stack([m.bias.detach() for m in linears]))
        gates = [gate[0] for gate in peer.gates]
        self.gate_weight = nn.Parameter(torch.cat([g.weight.detach() for g in gates]))
        self.gate_bias = nn.Parameter(torch.cat([g.bias.detach() for g in gates]))
        self.tasks = len(gates)

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.gate_weight, self.gate_bias).view(len(x), self.tasks, -1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = expert_mlp(x, Layer(weight.to(self.dtype), bias, None, "relu"))
        return gate_mix(logits, x).flatten(1)


class DenseHoME(nn.Module):
    """The peer's HoME on its weights: each level is four calls for all its groups at once."""

    def __init__(self, peer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.tasks, self.categories = len(peer.task), len(peer.meta)
        self.category = peer.category
        self.meta = Groups([peer.meta_shared, *peer.meta], dtype)
        self.level2 = Groups([peer.shared, *peer.group, *peer.task], dtype)
        n = self.meta.experts
        # Level 1: a gate over all experts for the shared group, over shared + own for each category.
        self.meta_gate = nn.ModuleList([peer.meta_shared_gate, *peer.meta_gate])
        own = [range(n * (1 + c), n * (2 + c)) for c in range(self.categories)]
        meta_experts = [range(n * (1 + self.categories)), *([*range(n), *o] for o in own)]
        self.meta.place_gates([*meta_experts, *self.meta.own_experts()])
        # Level 2: a gate over shared + category's + own for each task, and each task's self gate.
        self.task_gate = peer.task_gate
        c0 = 1 + self.categories
        task_experts = [
            [*range(n), *range(n * (1 + c), n * (2 + c)), *range(n * (c0 + t), n * (c0 + t + 1))]
            for t, c in enumerate(self.category)
        ]
        self.level2.place_gates([*task_experts, *self.level2.own_experts()[c0:]])
        self.source = (*range(c0), *(1 + c for c in self.category))
        self.tower = nn.ParameterList()
        for index in (0, 2):
            self.tower.append(torch.stack([t[index].weight.detach() for t in peer.tower]))
            self.tower.append(torch.stack([t[index].bias.detach() for t in peer.tower]))

    def forward(self, v: Tensor) -> Tensor:
        gates = torch.cat([gate(v) for gate in self.meta_gate], 1)
        y = self.meta(v, (0,) * (1 + self.categories))
        mixed = self.meta.mix(torch.cat([gates, self.meta.self_logits(v)], 1), y)
        z = mixed[:, : 1 + self.categories] + mixed[:, 1 + self.categories :]
        both = [torch.cat([z[:, 1 + c], z[:, 0]], 1) for c in range(self.categories)]
        gates = torch.cat([gate(both[c]) for gate, c in zip(self.task_gate, self.category, strict=True)], 1)
        own = self.level2.self_logits(z, self.source[1 + self.categories :])
        mixed = self.level2.mix(torch.cat([gates, own], 1), self.level2(z, self.source))
        towers = mixed[:, : self.tasks] + mixed[:, self.tasks :]
        hidden = expert_mlp(towers, Layer(self.tower[0], self.tower[1], None, "silu"))
        return expert_mlp(hidden, Layer(self.tower[2], self.tower[3])).flatten(1)


class Groups(nn.Module):
    """Groups of HoME experts of one level: feature gates, Linear → BatchNorm → SiLU, gates over chosen experts."""

    place: Tensor
    mask: Tensor
    head_place: Tensor
    head_mask: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, groups: list[Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.groups, self.experts, self.heads = dtype, len(groups), len(groups[0].experts), len(groups[0].gate.down)

        def stack(parts: list[Tensor]) -> nn.Parameter:
            return nn.Parameter(torch.stack([p.detach() for p in parts]))

        self.down = stack([d.weight for g in groups for d in g.gate.down])
        self.up = stack([u.weight for g in groups for u in g.gate.up])
        self.head = stack([g.gate.mix.weight for g in groups])
        self.head_bias = stack([g.gate.mix.bias for g in groups])
        self.weight = stack([e.linear.weight for g in groups for e in g.experts])
        self.bias = stack([e.linear.bias for g in groups for e in g.experts])
        self.scale = stack([e.norm.weight for g in groups for e in g.experts])
        self.shift = stack([e.norm.bias for g in groups for e in g.experts])
        self.self_weight = stack([g.self_gate.weight for g in groups])
        self.self_bias = stack([g.self_gate.bias for g in groups])
        self.register_buffer("mean", torch.zeros_like(self.scale.data))
        self.register_buffer("var", torch.ones_like(self.scale.data))
        heads = torch.eye(self.groups, dtype=torch.bool).repeat_interleave(self.heads, 1)
        self.register_buffer("head_mask", heads)
        self.register_buffer("head_place", heads.flatten().nonzero().squeeze(1))

    def own_experts(self) -> list[list[int]]:
        return [list(range(self.experts * g, self.experts * (g + 1))) for g in range(self.groups)]

    def place_gates(self, experts: list[Any]) -> None:
        """Which experts each gate sees; gates' logits come one after the other."""
        total = self.groups * self.experts
        mask = torch.zeros(len(experts), total, dtype=torch.bool)
        for t, seen in enumerate(experts):
            mask[t, list(seen)] = True
        self.register_buffer("mask", mask)
        self.register_buffer("place", torch.tensor([t * total + e for t, seen in enumerate(experts) for e in seen]))

    def forward(self, x: Tensor, source: tuple[int, ...]) -> Tensor:
        """x `[B, D]` or `[B, S, D]` → `[B, G·E, H]`."""
        by_head = tuple(s for s in source for _ in range(self.heads))
        low = expert_mlp(x, Layer(self.down.to(self.dtype)), source=by_head)
        heads = expert_mlp(low, Layer(self.up.to(self.dtype), activation="double_sigmoid"))
        mix = expert_mlp(x, Layer(self.head, self.head_bias), source=source)
        gate = gate_mix(_spread(mix.flatten(1), self.head_place, self.head_mask), heads, mask_te=self.head_mask)
        norm = BatchNorm(self.scale, self.shift, self.mean, self.var, self.training)
        return expert_mlp(x, Layer(self.weight.to(self.dtype), self.bias, norm, "silu"), gate_bgd=gate, source=source)

    def self_logits(self, x: Tensor, source: tuple[int, ...] | None = None) -> Tensor:
        """The self gates' logits, of the last groups where `source` names fewer inputs than there are groups."""
        source = source or (0,) * self.groups
        n = len(source)
        return expert_mlp(x, Layer(self.self_weight[-n:], self.self_bias[-n:]), source=source).flatten(1)

    def mix(self, logits: Tensor, y: Tensor) -> Tensor:
        return gate_mix(_spread(logits, self.place, self.mask), y, mask_te=self.mask)


def _spread(logits: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """Logits of the allowed (gate, expert) pairs, `[B, n]` → `[B, T, E]`."""
    return logits.new_zeros(len(logits), mask.numel()).index_copy(1, place, logits).view(-1, *mask.shape)


def bench_loop(folder: Path) -> Iterator[Row]:
    """Dense experts beside the peer's `loop`."""
    peer = load_peer(folder, "experts_peers")
    yield from _bench_dense(peer, "loop", peer.Loop(), DenseLoop, torch.randn(4096, 256))


def bench_home(folder: Path) -> Iterator[Row]:
    """HoME beside the peer's `home`."""
    peer = load_peer(folder, "experts_peers")
    yield from _bench_dense(peer, "home", peer.HoME(), DenseHoME, torch.randn(2048, 512))


def _bench_dense(peer: ModuleType, name: str, theirs: nn.Module, ours: Callable[..., nn.Module], x: Tensor) -> Iterator[Row]:
    compiled = torch.compile(theirs)
    for dtype in (torch.float32, torch.bfloat16):
        half = dtype == torch.bfloat16
        model = ours(theirs, dtype)
        _same(model.train()(x[:512]), theirs.train()(x[:512]), 3e-2 if half else 1e-4)
        kept = peer.saved_bytes(model.train(), x) / 2**20
        kept_peer = peer.saved_bytes(theirs.train(), x) / 2**20
        yield Row(f"{name} {str(dtype)[6:]} kept for backward, MiB", "cpu", kept, "eager fp32", kept_peer, kept_peer / kept)

        def train(m: Any, autocast: bool) -> Call:
            def call() -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = m(x).float().square().mean()
                loss.backward()

            return call

        def serve(m: Any, autocast: bool) -> Call:
            def call() -> None:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    m(x[:200])

            return call

        for what, make, repeats in (("forward + backward", train, 9), ("forward of 200 rows", serve, 25)):
            for m in (model, theirs):
                m.train(make is train)
            calls = {"cpu": make(model, False), "eager": make(theirs, half), "compiled": make(compiled, half)}
            ms = alternate(calls, repeats, warmup=3)
            best = min(("eager", "compiled"), key=lambda kind: ms[kind])
            yield Row(f"{name} {str(dtype)[6:]} {what}", "cpu", ms["cpu"], f"modules {best}", ms[best], ms[best] / ms["cpu"])


# ---- scaling ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bench_scaling(width: int = 256, hidden: int = 128) -> Iterator[Row]:
    """A top-2 SwiGLU layer: cost against tokens and experts, and a call so small that only overhead is left."""
    tiny = (Layer(torch.randn(4, 16, 8), activation="swiglu"), Layer(torch.randn(4, 8, 8)))
    yield Row("small call, 1 token", "cpu", _sparse_ms(tiny, torch.randn(1, 8), 2000))
    for experts in (4, 16, 64, 256):
        w1, w2 = torch.randn(experts, 2 * hidden, width) / 16, torch.randn(experts, width, hidden) / 16
        layers = (Layer(w1, activation="swiglu"), Layer(w2))
        for tokens in (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536):
            repeats = max(3, min(200, 20000 // tokens))
            yield Row(
                f"scaling {experts} experts {tokens} tokens", "cpu", _sparse_ms(layers, torch.randn(tokens, width), repeats)
            )


def _sparse_ms(layers: tuple[Layer, ...], x: Tensor, repeats: int) -> float:
    experts = layers[0].weight.shape[0]
    ids, weights = route_topk(torch.randn(len(x), experts), 2, renormalize=True)
    plan = (ids, weights, *sort_by_expert(ids, experts))
    return alternate({"cpu": lambda: sparse_expert_mlp(x, layers, *plan)}, repeats)["cpu"]


def plot_scaling(rows: list[Row], path: Path) -> None:
    """Microseconds a token against tokens, a line for each number of experts."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.case.startswith("scaling "):
            _, experts, _, tokens, _ = row.case.split()
            lines.setdefault(experts, []).append((int(tokens), row.ms * 1e3 / int(tokens)))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for experts, points in lines.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=f"{experts} experts")
    axes.set(xlabel="tokens", ylabel="µs a token", title="Top-2 SwiGLU layer, 256 → 128 → 256, fp32")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def as_dicts(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows for JSON."""
    return [asdict(row) for row in rows]
