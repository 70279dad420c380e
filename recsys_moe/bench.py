"""The kernels timed beside what people would run instead, in the same minutes on the same threads.

    layer     a whole sparse layer beside transformers' (eager and grouped_mm), weights rotated through memory
    loop      8 dense experts under 4 gates beside modules in a Python list, eager and compiled
    home      HoME beside the same equations module by module, eager and compiled
    scaling   cost against tokens and experts (no peer), and the overhead of a small call

The peers are scripts outside the project; RECSYS_MOE_PEERS names their folder. Every case checks first that both compute
the same numbers. Ceilings (reading memory, matrix products) are measured in the same run.
"""

import copy
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
from recsys_moe.process import keep_freed_memory

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
    keep_freed_memory()  # as training and serving do; the peers run in this process and gain as well
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

    def __init__(self, peer: nn.Module, shape: dict[str, Any]) -> None:
        p = {name: tensor.detach() for name, tensor in peer.named_parameters()}
        self.k, self.renormalize = shape["k"], shape["kind"] == "mixtral"
        self.router = Layer(p["gate.weight"].float().unsqueeze(0))
        self.experts = (Layer(p["experts.gate_up_proj"], activation="swiglu"), Layer(p["experts.down_proj"]))
        self.shared: tuple[Layer, ...] = ()
        if shape["shared"]:
            gate_up = torch.cat([p["shared_experts.gate_proj.weight"], p["shared_experts.up_proj.weight"]])
            down = p["shared_experts.down_proj.weight"]
            self.shared = (Layer(gate_up.unsqueeze(0), activation="swiglu"), Layer(down.unsqueeze(0)))

    def __call__(self, x_btd: Tensor) -> Tensor:
        x = x_btd.flatten(0, 1)
        logits = expert_mlp(x.float(), self.router, invariant=True).squeeze(1)
        ids, weights = route_topk(logits, self.k, renormalize=self.renormalize)
        plan = (ids, weights, *sort_by_expert(ids, logits.shape[1]))
        y = sparse_expert_mlp(x, self.experts, *plan, invariant=True)
        if self.shared:
            h = expert_mlp(x, self.shared[0], invariant=True)
            y = y + expert_mlp(h, self.shared[1], source=(0,), invariant=True).squeeze(1)
        return y.view_as(x_btd)


@torch.no_grad()
def bench_layer(folder: Path) -> Iterator[Row]:
    """transformers' own benchmark, with our layer (invariant, as it is served) on the very same weights and inputs."""
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
            ours = [SparseLayer(a, shape) for a in eager]
            for tokens in (1, 16, 512):
                inputs = [torch.randn(1, tokens, shape["hidden"], dtype=dtype) for _ in eager]
                for layer in (grouped[0], ours[0]):
                    _same(layer(inputs[0]), eager[0](inputs[0]), 1e-4 if dtype == torch.float32 else 0.1)  # near ties
                # Each starts with another layer: what one has just read must not lie in the cache for the next.
                kinds = {"eager": eager, "grouped_mm": grouped, "cpu": ours}
                calls = {kind: _in_turn(layers, inputs, start) for start, (kind, layers) in enumerate(kinds.items())}
                ms = alternate(calls, 7 if tokens > 16 else 24, warmup=len(eager) if tokens <= 16 else 2)
                touched = statistics.mean(peer.touched_bytes(a, x, shape) for a, x in zip(eager, inputs, strict=True))
                flops = tokens * (shape["k"] + shape["shared"]) * 6 * shape["hidden"] * shape["ffn"]
                best = min(("eager", "grouped_mm"), key=lambda kind: ms[kind])
                yield Row(
                    f"layer {name} {str(dtype)[6:]} {tokens} tokens",
                    "cpu",
                    ms["cpu"],
                    f"transformers {best}",
                    ms[best],
                    ms[best] / ms["cpu"],
                    touched / ms["cpu"] / 1e6 / read,
                    flops / ms["cpu"] / 1e9 / matrix[dtype],
                )


def _in_turn(layers: list[Any], inputs: list[Tensor], start: int) -> Call:
    pairs = itertools.islice(itertools.cycle(zip(layers, inputs, strict=True)), start, None)

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

    in_precision = ("first", "second")

    def __init__(self, peer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.first, self.second = (_stacked([expert[index].weight for expert in peer.experts]) for index in (0, 2))
        self.first_bias, self.second_bias = (_stacked([expert[index].bias for expert in peer.experts]) for index in (0, 2))
        gates = [gate[0] for gate in peer.gates]
        self.gate_weight = nn.Parameter(torch.cat([g.weight.detach() for g in gates]))
        self.gate_bias = nn.Parameter(torch.cat([g.bias.detach() for g in gates]))
        self.tasks = len(gates)

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.gate_weight, self.gate_bias).view(len(x), self.tasks, -1)
        for weight, bias in ((self.first, self.first_bias), (self.second, self.second_bias)):
            x = expert_mlp(x, Layer(weight.to(self.dtype), bias, None, "relu"))
        return gate_mix(logits, x).flatten(1)


class DenseHoME(nn.Module):
    """The peer's HoME on its weights: each level is a handful of calls for all its groups at once."""

    in_precision = ("tower",)

    def __init__(self, peer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.tasks, self.categories, self.dtype = len(peer.task), len(peer.meta), dtype
        n, groups = len(peer.meta_shared.experts), 1 + self.categories
        self.meta = Groups([peer.meta_shared, *peer.meta], dtype)
        self.level2 = Groups([peer.shared, *peer.group, *peer.task], dtype)

        def experts(group: int) -> list[int]:
            return list(range(n * group, n * (group + 1)))

        # Level 1: a gate over all experts for the shared group, over shared + own for each category.
        meta_gates = [peer.meta_shared_gate, *peer.meta_gate]
        self.meta_gate = _stacked([torch.cat([gate.weight for gate in meta_gates])])
        self.meta_gate_bias = _stacked([torch.cat([gate.bias for gate in meta_gates])])
        seen = [list(range(n * groups)), *(experts(0) + experts(1 + c) for c in range(self.categories))]
        self.meta.place_gates(seen, [experts(g) for g in range(groups)])
        # Level 2: a gate over shared + category's + own for each task, on its category's and the shared representation.
        width = peer.task_gate[0].weight.shape[1] // 2
        self.own_gate, self.shared_gate = (
            _stacked([gate.weight[:, half] for gate in peer.task_gate]) for half in (slice(width), slice(width, None))
        )
        self.task_gate_bias = _stacked([gate.bias for gate in peer.task_gate])
        own = [experts(groups + t) for t in range(self.tasks)]
        self.level2.place_gates([experts(0) + experts(1 + c) + own[t] for t, c in enumerate(peer.category)], own)
        self.source = (*range(groups), *(1 + c for c in peer.category))
        self.tower, self.tower_out = (_stacked([t[index].weight for t in peer.tower]) for index in (0, 2))
        self.tower_bias, self.tower_out_bias = (_stacked([t[index].bias for t in peer.tower]) for index in (0, 2))

    def forward(self, v: Tensor) -> Tensor:
        logits = expert_mlp(v, Layer(self.meta_gate, self.meta_gate_bias)).flatten(1)
        z = self.meta(v, (0,) * (1 + self.categories), logits)
        # W·[z_category; z_shared] without the pair: its halves are at hand.
        own = expert_mlp(z, Layer(self.own_gate, self.task_gate_bias), source=self.source[1 + self.categories :])
        logits = (own + expert_mlp(z, Layer(self.shared_gate), source=(0,) * self.tasks)).flatten(1)
        mixed = self.level2(z, self.source, logits)
        tower = Layer(self.tower.to(self.dtype), self.tower_bias, None, "silu")
        hidden = expert_mlp(mixed, tower).float()
        return expert_mlp(hidden, Layer(self.tower_out, self.tower_out_bias)).flatten(1)


class Groups(nn.Module):
    """Groups of HoME experts of one level: feature gates, Linear → BatchNorm → SiLU, and gates and self gates over them."""

    in_precision = ("down", "up", "weight")
    place: Tensor
    mask: Tensor
    own_place: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, groups: list[Any], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.groups, self.experts, self.heads = dtype, len(groups), len(groups[0].experts), len(groups[0].gate.down)
        self.down = _stacked([d.weight for g in groups for d in g.gate.down])
        self.up = _stacked([u.weight for g in groups for u in g.gate.up])
        self.head, self.head_bias = _stacked([g.gate.mix.weight for g in groups]), _stacked([g.gate.mix.bias for g in groups])
        self.weight = _stacked([e.linear.weight for g in groups for e in g.experts])
        self.bias = _stacked([e.linear.bias for g in groups for e in g.experts])
        self.scale = _stacked([e.norm.weight for g in groups for e in g.experts])
        self.shift = _stacked([e.norm.bias for g in groups for e in g.experts])
        self.self_weight = _stacked([g.self_gate.weight for g in groups])
        self.self_bias = _stacked([g.self_gate.bias for g in groups])
        self.register_buffer("mean", torch.zeros_like(self.scale.data))
        self.register_buffer("var", torch.ones_like(self.scale.data))

    def place_gates(self, seen: list[list[int]], own: list[list[int]]) -> None:
        """Which experts each gate sees, in the order of its logits, and which its self gate weighs."""
        total = self.groups * self.experts
        mask = torch.zeros(len(seen), total, dtype=torch.bool)
        for t, experts in enumerate(seen):
            mask[t, experts] = True
        self.register_buffer("mask", mask)
        self.register_buffer("place", torch.tensor([t * total + e for t, experts in enumerate(seen) for e in experts]))
        self.register_buffer("own_place", torch.tensor([t * total + e for t, experts in enumerate(own) for e in experts]))

    def forward(self, x: Tensor, source: tuple[int, ...], logits: Tensor) -> Tensor:
        """x `[B, D]` or `[B, S, D]`, the gates' logits `[B, n]` → each gate's mixture `[B, T, H]`, its self gate's added."""
        by_head = tuple(s for s in source for _ in range(self.heads))
        low = expert_mlp(x, Layer(self.down.to(self.dtype)), source=by_head)
        heads = expert_mlp(low, Layer(self.up.to(self.dtype), activation="double_sigmoid"))
        mix = expert_mlp(x, Layer(self.head, self.head_bias), source=source)
        pairs = heads.view(-1, self.heads, heads.shape[2])  # a group's heads are its own: B·G rows of one gate each
        gate = gate_mix(mix.view(-1, 1, self.heads), pairs).view(len(x), self.groups, -1)
        norm = BatchNorm(self.scale, self.shift, self.mean, self.var, self.training)
        layer = Layer(self.weight.to(self.dtype), self.bias, norm, "silu")
        y = expert_mlp(x, layer, gate_bgd=gate, source=source)
        gates = len(self.own_place) // self.experts  # self gates belong to the last groups: at level 2, the tasks'
        own = Layer(self.self_weight[-gates:], self.self_bias[-gates:])
        weights = expert_mlp(x, own, source=source[-gates:]).softmax(-1).flatten(1)
        residual = _spread(weights, self.own_place, self.mask)
        return gate_mix(_spread(logits, self.place, self.mask), y, mask_te=self.mask, residual_bte=residual)


def _stacked(parts: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([p.detach() for p in parts]))


def _spread(values: Tensor, place: Tensor, mask: Tensor) -> Tensor:
    """Values of some (gate, expert) pairs, `[B, n]` → `[B, T, E]`, zeros elsewhere."""
    return values.new_zeros(len(values), mask.numel()).index_copy(1, place, values).view(-1, *mask.shape)


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

        # A served model holds its experts' weights in their precision; a trained one casts fp32 weights in every step.
        served = copy.deepcopy(model).eval()
        for module in served.modules():
            for cast in getattr(module, "in_precision", ()):
                parameter = getattr(module, cast)
                parameter.data = parameter.data.to(dtype)
        for what, make, repeats in (("forward + backward", train, 9), ("forward of 200 rows", serve, 25)):
            theirs.train(make is train)
            calls = {
                "cpu": make(model if make is train else served, False),
                "eager": make(theirs, half),
                "compiled": make(compiled, half),
            }
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
