"""The kernels timed beside what people would run instead, in the same minutes on the same threads.

    layer     a whole sparse layer beside transformers' (eager and grouped_mm), weights rotated through memory
    loop      8 dense experts under 4 gates beside modules in a Python list, eager and compiled
    home      HoME beside the same equations module by module, eager and compiled
    scaling   cost against tokens and experts (no peer), and the overhead of a small call
    price     of the invariant mode: the same call with and without it

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.errors import UserError
from recsys_moe.experts import MLPExperts, freeze
from recsys_moe.kernels import Layer, expert_mlp, gate_mix, route_topk, sort_by_expert, sparse_expert_mlp
from recsys_moe.models.home import HoME, HoMEConfig
from recsys_moe.process import keep_freed_memory

CASES = ("layer", "loop", "home", "scaling", "price")
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
    without_peers: dict[str, Callable[[], Iterator[Row]]] = {"scaling": bench_scaling, "price": bench_price}
    if set(cases) - set(without_peers) and not (folder / "hf_moe_layer.py").exists():
        raise UserError(f"{str(folder)!r} holds no peers' scripts (hf_moe_layer.py …); set RECSYS_MOE_PEERS to their folder")
    torch.manual_seed(0)
    keep_freed_memory()  # as training and serving do; the peers run in this process and gain as well
    with_peers = {"layer": bench_layer, "loop": bench_loop, "home": bench_home}
    for case in cases:
        yield from without_peers[case]() if case in without_peers else with_peers[case](folder)


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


def home_of(peer: Any, dtype: torch.dtype) -> HoME:
    """The family's HoME with the sizes and weights of the peer's."""
    inputs, units = peer.meta_shared_gate.in_features, peer.tower[0][0].in_features
    tasks = {f"task {t}": 1 for t in range(len(peer.task))}
    categories = {task: f"category {c}" for task, c in zip(tasks, peer.category, strict=True)}
    n, hidden = len(peer.meta_shared.experts), peer.tower[0][0].out_features
    config = HoMEConfig(
        categories=categories, experts_per_group=n, expert_dims=(units,), tower_dims=(hidden,), norm="none", dropout=0.0
    )
    model = HoME(config, inputs, tasks, dtype)
    assert model.meta_self is not None
    assert model.task_self is not None
    assert isinstance(model.towers.hidden, MLPExperts)
    model.towers.hidden.activation = "silu"
    meta, task = [peer.meta_shared, *peer.meta], [peer.shared, *peer.group, *peer.task]
    # Self gates that nothing reads (the task layer's shared and category groups') are the peer's alone.
    copy_rows(model.meta_gates.linear, [peer.meta_shared_gate, *peer.meta_gate])
    copy_rows(model.task_gates.linear, peer.task_gate)
    copy_rows(model.meta_self.router.linear, [group.self_gate for group in meta])
    copy_rows(model.task_self.router.linear, [group.self_gate for group in peer.task])
    for ours, groups in ((model.meta_experts, meta), (model.task_experts, task)):
        assert ours.feature_gate is not None
        copy_experts(ours.feature_gate.down, [[down] for group in groups for down in group.gate.down])
        copy_experts(ours.feature_gate.up, [[up] for group in groups for up in group.gate.up])
        copy_experts(ours.feature_gate.weigh, [[group.gate.mix] for group in groups])
        copy_experts(ours.experts, [[e.linear, e.norm] for group in groups for e in group.experts])
    copy_experts(model.towers.hidden, [[tower[0]] for tower in peer.tower])
    copy_experts(model.towers.last[0], [[tower[2]] for tower in peer.tower])
    return model


@torch.no_grad()
def copy_rows(gate: nn.Linear, singles: Sequence[nn.Linear]) -> None:
    """The weights of gates one after the other."""
    gate.weight.copy_(torch.cat([single.weight for single in singles]))
    gate.bias.copy_(torch.cat([single.bias for single in singles]))


@torch.no_grad()
def copy_experts(stack: Any, experts: Sequence[Sequence[nn.Module]]) -> None:
    """The weights and norms of experts, each a sequence of modules, into their stack."""
    for e, modules in enumerate(experts):
        for index, linear in enumerate(m for m in modules if isinstance(m, nn.Linear)):
            stack.weights[index][e] = linear.weight
            if linear.bias is not None:
                stack.biases[index][e] = linear.bias
        for index, norm in enumerate(m for m in modules if isinstance(m, nn.BatchNorm1d)):
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(stack.norms[index], name)[e] = getattr(norm, name)


def _stacked(parts: list[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([p.detach() for p in parts]))


def bench_loop(folder: Path) -> Iterator[Row]:
    """Dense experts beside the peer's `loop`."""
    peer = load_peer(folder, "experts_peers")
    yield from _bench_dense(peer, "loop", peer.Loop(), DenseLoop, torch.randn(4096, 256))


def _home(peer: Any, dtype: torch.dtype) -> nn.Module:
    return Outputs(home_of(peer, dtype))


class Outputs(nn.Module):
    """A family's network without its plans."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.network(x)[0]
        return outputs


def bench_home(folder: Path) -> Iterator[Row]:
    """HoME beside the peer's `home`."""
    peer = load_peer(folder, "experts_peers")
    yield from _bench_dense(peer, "home", peer.HoME(), _home, torch.randn(2048, 512))


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
            for parameter in [getattr(module, name) for name in getattr(module, "in_precision", ())]:
                parameter.data = parameter.data.to(dtype)
        freeze(served)
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
    plan = _top2(len(x), experts)
    return alternate({"cpu": lambda: sparse_expert_mlp(x, layers, *plan)}, repeats)["cpu"]


def _top2(rows: int, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    ids, weights = route_topk(torch.randn(rows, experts), 2, renormalize=True)
    return ids, weights, *sort_by_expert(ids, experts)


@torch.no_grad()
def bench_price(experts: int = 16, width: int = 512, hidden: int = 256) -> Iterator[Row]:
    """One dense layer of all experts, and a top-2 SwiGLU layer: `ratio` below 1 is what the invariant mode costs."""
    for dtype in (torch.float32, torch.bfloat16):
        w1 = torch.randn(experts, 2 * hidden, width, dtype=dtype) / 16
        w2 = torch.randn(experts, width, hidden, dtype=dtype) / 16
        for rows in (1, 16, 200, 512):
            x = torch.randn(rows, width, dtype=dtype)
            plan = _top2(rows, experts)
            layers = (Layer(w1, activation="swiglu"), Layer(w2))
            for name, run in {
                "dense": partial(expert_mlp, x, Layer(w1, activation="silu")),
                "sparse": partial(sparse_expert_mlp, x, layers, *plan),
            }.items():
                calls: dict[str, Call] = {mode: partial(run, invariant=mode == "invariant") for mode in ("invariant", "free")}
                ms = alternate(calls, max(9, 4000 // rows), warmup=3)
                case = f"price of invariance, {name} {str(dtype)[6:]} {rows} rows"
                yield Row(case, "cpu", ms["invariant"], "invariant=False", ms["free"], ms["free"] / ms["invariant"])


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
