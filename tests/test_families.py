"""Every model family against loops over its experts, gates and tasks, on the very same parameters; and what all must stand:
one row, bf16, one graph, every kind of task, any number of workers."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from recsys_moe import kernels
from recsys_moe.errors import UserError
from recsys_moe.experts import MLPExperts, Towers, freeze
from recsys_moe.kernels import feature_gate_values, reference
from recsys_moe.models import MODELS, settle
from recsys_moe.models.adatt import AdaTTConfig
from recsys_moe.models.aitm import AITMConfig
from recsys_moe.models.esmm import ESMMConfig
from recsys_moe.models.home import FeatureGates, HoME, HoMEConfig
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.models.ple import PLEConfig
from recsys_moe.models.shared_bottom import SharedBottomConfig
from recsys_moe.models.single_task import SingleTaskConfig
from recsys_moe.models.stem import STEMConfig
from recsys_moe.routing import stack_units, unit_products
from recsys_moe.schema import Schema
from recsys_moe.typed import parse

IN_DIM = 7
TASKS = {"like": 1, "finish": 3, "share": 1, "stars": 2}
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
Stream = Callable[[int], Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- the equations, one expert, gate and task at a time


def mlp(stack: MLPExperts, e: int, x: Tensor, activation: Callable[[Tensor], Tensor] = F.relu) -> Tensor:
    """Expert `e` of a stack."""
    for i, weight in enumerate(stack.weights):
        x = F.linear(x, weight[e], None if stack.biases is None else stack.biases[i][e])
        if i < stack.hidden_layers:
            if stack.norms is not None:
                norm: Any = stack.norms[i]
                mean, var = norm.running_mean[e], norm.running_var[e]
                if stack.training and len(x) > 1:
                    mean, var = x.mean(0), x.var(0, correction=0)
                x = (x - mean) / torch.sqrt(var + 1e-5) * norm.weight[e] + norm.bias[e]
            x = activation(x)
    return x


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def towers(stack: Towers, inputs: list[Tensor], tasks: dict[str, int] = TASKS) -> Tensor:
    outputs, widths = [], list(tasks.values())
    for t, width in enumerate(widths):
        h = inputs[t] if stack.hidden is None else mlp(stack.hidden, t, inputs[t])
        last: Any = stack.last[list(dict.fromkeys(widths)).index(width)]
        outputs.append(mlp(last, widths[:t].count(width), h))
    return torch.cat(outputs, 1)


class Rows:
    """The rows of a gate's weights, handed out gate by gate."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.next = linear, 0

    def logits(self, x: Tensor, count: int) -> Tensor:
        rows = slice(self.next, self.next + count)
        self.next += count
        return x @ self.linear.weight[rows].t() + self.linear.bias[rows]

    def weighted(self, x: Tensor, outputs: list[Tensor]) -> Tensor:
        return weighted(torch.softmax(self.logits(x, len(outputs)), 1), outputs)

    def end(self) -> None:
        assert self.next == len(self.linear.weight)  # no weight is left over


def weighted(weights: Tensor, outputs: list[Tensor]) -> Tensor:
    total = torch.zeros_like(outputs[0])
    for e, output in enumerate(outputs):
        total = total + weights[:, e : e + 1] * output
    return total


def naive_single_task(model: Any, config: SingleTaskConfig, x: Tensor) -> Tensor:
    return towers(model.towers, [mlp(model.bottoms, t, x[:, t]) for t in range(len(TASKS))])


def naive_esmm(model: Any, config: ESMMConfig, x: Tensor) -> Tensor:
    return towers(model.towers, [mlp(model.bottoms, t, x) for t in range(len(TASKS))])


def naive_aitm(model: Any, config: AITMConfig, x: Tensor) -> Tensor:
    z = {task: mlp(model.bottoms, t, x) for t, task in enumerate(TASKS)}
    chain = config.chain or ()
    for transfer, before, task in zip(model.transfers, chain, chain[1:], strict=False):
        parts = [z[task], mlp(transfer.hand_on, 0, z[before])]
        q, k, v = ([part @ transfer.attention.weights[0][n].t() for part in parts] for n in range(3))
        logits = [(a * b).sum(1) / z[task].shape[1] ** 0.5 for a, b in zip(q, k, strict=True)]
        z[task] = weighted(torch.softmax(torch.stack(logits, 1), 1), v)
    return towers(model.towers, list(z.values()))


def naive_stem(model: Any, config: STEMConfig, x: Tensor) -> Tensor:
    experts = iter(range(len(model.experts.weights[0])))
    counts = [config.shared_experts] + [config.task_experts] * len(TASKS)
    outputs = [[mlp(model.experts, next(experts), x[:, s]) for _ in range(count)] for s, count in enumerate(counts)]
    gates, mixed = Rows(model.router.linear), []
    for t in range(1, 1 + len(TASKS)):
        seen = [output if s in (0, t) else output.detach() for s, own in enumerate(outputs) for output in own]
        mixed.append(gates.weighted(x[:, t] + x[:, 0], seen))
    gates.end()
    return towers(model.towers, mixed)


def naive_shared_bottom(model: Any, config: SharedBottomConfig, x: Tensor) -> Tensor:
    return towers(model.towers, [mlp(model.bottom, 0, x)] * len(TASKS))


def naive_mmoe(model: Any, config: MMoEConfig, x: Tensor) -> Tensor:
    outputs = [mlp(model.experts, e, x) for e in range(config.num_experts)]
    gates = Rows(model.router.linear)
    mixed = [gates.weighted(x, outputs) for _ in TASKS]
    gates.end()
    return towers(model.towers, mixed)


def naive_omoe(model: Any, config: MMoEConfig, x: Tensor) -> Tensor:
    mixed = Rows(model.router.linear).weighted(x, [mlp(model.experts, e, x) for e in range(config.num_experts)])
    return towers(model.towers, [mixed] * len(TASKS))


def naive_ple(model: Any, config: PLEConfig, x: Tensor) -> Tensor:
    streams = [x] * (1 + len(TASKS))
    for number, level in enumerate(model.levels):
        experts = iter(range(len(level.experts.weights[0])))
        counts = [config.shared_experts] + [config.task_experts] * len(TASKS)
        outputs = [
            [mlp(level.experts, next(experts), stream) for _ in range(count)]
            for stream, count in zip(streams, counts, strict=True)
        ]
        gates, mixed = Rows(level.router.linear), []
        if number < config.levels - 1:
            mixed = [gates.weighted(streams[0], [output for own in outputs for output in own])]
        mixed += [gates.weighted(z, outputs[0] + own) for z, own in zip(streams[1:], outputs[1:], strict=True)]
        gates.end()
        streams = mixed
    return towers(model.towers, streams)


def naive_adatt(model: Any, config: AdaTTConfig, x: Tensor) -> Tensor:
    n, streams = config.task_experts, [x] * len(TASKS)
    for level in model.levels:
        outputs = [[mlp(level.experts, n * t + e, z) for e in range(n)] for t, z in enumerate(streams)]
        gates, mixed = Rows(level.router.linear), []
        for t, z in enumerate(streams):
            fused = gates.weighted(z, [output for own in outputs for output in own])
            for e in range(n):
                fused = fused + (1 / n + level.residual_tn[t, e]) * outputs[t][e]
            mixed.append(fused)
        gates.end()
        streams = mixed
    return towers(model.towers, streams)


def feature_gate(gates: FeatureGates, group: int, x: Tensor, heads: int) -> Tensor:
    outputs = []
    for head in range(group * heads, (group + 1) * heads):
        down, up = gates.down.weights[0][head], gates.up.weights[0][head]
        assert down.shape == (x.shape[1] // heads, x.shape[1])
        outputs.append(2 * torch.sigmoid(x @ down.t() @ up.t()))
    return weighted(torch.softmax(mlp(gates.weigh, group, x), 1), outputs)


def naive_home(model: Any, config: HoMEConfig, v: Tensor) -> Tensor:
    n, chosen = config.experts_per_group, config.categories or dict.fromkeys(TASKS, "all")
    categories = list(dict.fromkeys(chosen[task] for task in TASKS))

    def group(layer: Any, number: int, x: Tensor) -> list[Tensor]:
        gated = x
        if config.feature_gates:
            gated = x * feature_gate(layer.feature_gate, number, x, config.feature_gates)
        return [mlp(layer.experts, n * number + e, gated, swish if config.expert_norm else torch.relu) for e in range(n)]

    def self_gated(rows: Rows, x: Tensor, own: list[Tensor]) -> Tensor:
        logits = rows.logits(x, n)
        return weighted(torch.sigmoid(logits) if n == 1 else torch.softmax(logits, 1), own)

    # meta layer
    shared = group(model.meta_experts, 0, v)
    of_category = [group(model.meta_experts, 1 + c, v) for c in range(len(categories))]
    everything = shared + [output for outputs in of_category for output in outputs]
    gates = Rows(model.meta_gates.linear)
    z_shared = gates.weighted(v, everything)
    z = [gates.weighted(v, shared + own if config.hierarchy_mask else everything) for own in of_category]
    gates.end()
    if config.self_gates:
        gates = Rows(model.meta_self.router.linear)
        z_shared = z_shared + self_gated(gates, v, shared)
        z = [z_c + self_gated(gates, v, own) for z_c, own in zip(z, of_category, strict=True)]
        gates.end()
    # task layer
    shared = group(model.task_experts, 0, z_shared)
    of_category = [group(model.task_experts, 1 + c, z_c) for c, z_c in enumerate(z)]
    place = [categories.index(chosen[task]) for task in TASKS]
    of_task: list[list[Tensor]] = [[] for _ in TASKS]
    if config.task_experts:
        of_task = [group(model.task_experts, 1 + len(categories) + t, z[c]) for t, c in enumerate(place)]
    everything = shared + [output for outputs in of_category + of_task for output in outputs]
    gates, mixed = Rows(model.task_gates.linear), []
    for c, own in zip(place, of_task, strict=True):
        seen = shared + of_category[c] + own if config.hierarchy_mask else everything
        mixed.append(gates.weighted(torch.cat([z[c], z_shared], 1), seen))
    gates.end()
    if config.self_gates and config.task_experts:
        gates = Rows(model.task_self.router.linear)
        mixed = [m + self_gated(gates, z[c], own) for m, c, own in zip(mixed, place, of_task, strict=True)]
        gates.end()
    return towers(model.towers, mixed)


# -- the families


MMOE = MMoEConfig(num_experts=3, expert_dims=(6, 5), tower_dims=(4,), dropout=0.0)
HOME = HoMEConfig(
    categories={"like": "interaction", "finish": "watch", "share": "interaction", "stars": "opinion"},
    expert_dims=(6,),
    tower_dims=(4,),
    dropout=0.0,
)


PLE = PLEConfig(expert_dims=(6,), tower_dims=(4,), dropout=0.0)
ESMM = ESMMConfig(conversions={"share": "like"}, bottom_dims=(9, 5), tower_dims=(4,), dropout=0.0)
AITM = AITMConfig(chain=("like", "share"), bottom_dims=(9, 5), tower_dims=(4,), dropout=0.0)
STEM = STEMConfig(expert_dims=(6,), tower_dims=(4,), dropout=0.0)
ADATT = AdaTTConfig(expert_dims=(6,), tower_dims=(4,), dropout=0.0)


@dataclass(frozen=True)
class Case:
    config: Any
    naive: Callable[[Any, Any, Tensor], Tensor]


FAMILIES = {
    "single_task": Case(SingleTaskConfig(bottom_dims=(9, 5), tower_dims=(4,), dropout=0.0), naive_single_task),
    "shared_bottom": Case(SharedBottomConfig(bottom_dims=(9, 5), tower_dims=(4,), dropout=0.0), naive_shared_bottom),
    "mmoe": Case(MMOE, naive_mmoe),
    "omoe": Case(replace(MMOE, name="omoe"), naive_omoe),
    "ple": Case(PLE, naive_ple),
    "esmm": Case(ESMM, naive_esmm),
    "aitm": Case(AITM, naive_aitm),
    "adatt": Case(ADATT, naive_adatt),
    "stem": Case(STEM, naive_stem),
    "home": Case(HOME, naive_home),
}
VARIANTS = FAMILIES | {
    "home without expert norm": Case(replace(HOME, expert_norm=False), naive_home),
    "home without mask": Case(replace(HOME, hierarchy_mask=False), naive_home),
    "home without feature gates": Case(replace(HOME, feature_gates=0), naive_home),
    "home without self gates": Case(replace(HOME, self_gates=False), naive_home),
    "home without task experts": Case(replace(HOME, task_experts=False), naive_home),
    "home of single experts": Case(replace(HOME, experts_per_group=1), naive_home),
    "home of one category": Case(replace(HOME, categories=None, feature_gates=3), naive_home),
    "home of two layers": Case(replace(HOME, expert_dims=(6, 4), norm="none"), naive_home),
    "cgc": Case(replace(PLE, name="cgc", levels=1), naive_ple),
    "ple of three levels": Case(replace(PLE, levels=3, shared_experts=3, expert_dims=(6, 4), norm="none"), naive_ple),
    "ple of many shared experts": Case(replace(PLE, shared_experts=4, task_experts=1), naive_ple),
    "aitm backwards without norm": Case(replace(AITM, chain=("share", "like"), norm="none"), naive_aitm),
    "stem of single experts": Case(replace(STEM, shared_experts=3, task_experts=1, norm="none"), naive_stem),
    "adatt of single experts": Case(replace(ADATT, levels=3, task_experts=1, norm="none"), naive_adatt),
    "mmoe without norm": Case(replace(MMOE, norm="none", tower_dims=()), naive_mmoe),
}
# Sparse gates have their own operators, and tests against softmax gates in test_models.py.
SPARSE = {"mmoe top-k": Case(replace(MMOE, gate="topk"), naive_mmoe)}


def build(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0, in_dim: int = IN_DIM) -> Any:
    """A model somewhere in its training: feature gates have left 1, norms have moments."""
    torch.manual_seed(seed)
    model = MODELS[type(config)](config, in_dim, TASKS, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() or "norms." in name:
                parameter.add_(torch.randn_like(parameter) / 2)
        for name, moments in model.named_buffers():
            if "running" in name:
                moments.add_(torch.rand_like(moments))
    return model


def draw(config: Any, rows: int) -> Tensor:
    """Inputs of a family: one, or one for each of its embedding sets."""
    sets = len(MODELS[type(config)].embedding_sets(TASKS))
    return torch.randn(rows, IN_DIM) if sets == 1 else torch.randn(rows, sets, IN_DIM)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_family_is_its_equations(name: str, training: bool) -> None:
    case = VARIANTS[name]
    model = build(case.config).train(training)
    x = draw(case.config, 11).requires_grad_()
    expected = case.naive(model, case.config, x)
    got = model(x)[0]
    assert got.shape == (11, sum(TASKS.values()))
    torch.testing.assert_close(got, expected, **CLOSE)
    names, leaves = zip(*model.named_parameters(), strict=True)
    direction = torch.randn_like(expected)
    # A parameter that nothing reads would raise here.
    found = torch.autograd.grad(got, [x, *leaves], direction)
    wanted = torch.autograd.grad(expected, [x, *leaves], direction)
    for leaf, a, b in zip(("x", *names), found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, leaf=leaf: f"{leaf}: {m}")


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_of_one_row(name: str, training: bool) -> None:
    case = VARIANTS[name]
    model, x = build(case.config).train(training), draw(case.config, 1)
    got = model(x)[0]
    torch.testing.assert_close(got, case.naive(model, case.config, x), **CLOSE)
    got.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_at_inference_a_row_has_the_same_bits_in_every_batch(name: str, dtype: torch.dtype) -> None:
    config = VARIANTS[name].config
    model, x = build(config, dtype).eval(), draw(config, 40)
    with torch.no_grad():
        assert torch.equal(torch.cat([model(row[None])[0] for row in x]), model(x)[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_units_of_an_expert_and_experts_differ_after_initialisation(name: str) -> None:
    config = FAMILIES[name].config
    model = MODELS[type(config)](config, IN_DIM, TASKS, torch.float32)
    stacks = [m for path, m in model.named_modules() if isinstance(m, MLPExperts) and not path.endswith("feature_gate.up")]
    assert stacks
    for weight in [weight for stack in stacks for weight in stack.weights]:
        units = weight.flatten(0, 1)
        assert len(torch.unique(units, dim=0)) == len(units)


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_is_close_and_keeps_gates_and_parameters_in_fp32(name: str) -> None:
    config = FAMILIES[name].config
    fp32, bf16 = build(config), build(config, torch.bfloat16)
    assert {p.dtype for p in bf16.parameters()} == {torch.float32}
    x = draw(config, 64)
    (low, low_plans), (high, high_plans) = bf16(x), fp32(x)
    assert low.dtype == torch.float32
    assert not torch.equal(low, high)
    assert (low - high).norm() < 0.03 * high.norm()
    assert low_plans.keys() == high_plans.keys()
    assert all(plan.logits.dtype == torch.float32 for plan in low_plans.values())
    low.square().sum().backward()
    high.square().sum().backward()
    one, other = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (bf16, fp32))
    assert F.cosine_similarity(one, other, dim=0) > 0.98


@pytest.mark.parametrize("name", VARIANTS)
def test_plans_are_named_and_say_what_the_gates_do(name: str) -> None:
    model = build(VARIANTS[name].config).eval()
    plans = model(draw(VARIANTS[name].config, 5))[1]
    assert plans.keys() == model.plan_names.keys()
    for key, plan in plans.items():
        names = model.plan_names[key]
        assert plan.weights.shape == (5, len(names.gates), len(names.experts))
        assert len(set(names.experts)) == len(names.experts)
        torch.testing.assert_close(plan.weights.sum(2), torch.ones(5, len(names.gates)))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_backend_takes_the_same_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES[name].config
    fused, plain = build(config), build(config, seed=1)
    plain.load_state_dict(fused.state_dict())
    x, direction = draw(config, 20), torch.randn(20, sum(TASKS.values()))
    got = fused(x)[0]
    got.backward(direction)
    monkeypatch.setattr(kernels, "implementation", lambda backend, device: reference)
    expected = plain(x)[0]
    expected.backward(direction)
    torch.testing.assert_close(got, expected, **CLOSE)
    for p, q in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    for (key, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, key=key: f"{key}: {m}")


class Operators(TorchDispatchMode):
    """Collects the names of all operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", VARIANTS | SPARSE)
def test_every_product_is_a_kernels(name: str, dtype: torch.dtype) -> None:
    config = (VARIANTS | SPARSE)[name].config
    model, x = build(config, dtype), draw(config, 20)
    with Operators() as found:
        model(x)[0].sum().backward()
        with torch.no_grad():
            model.eval()(x)
    assert {"recsys_moe::expert_linear", "recsys_moe::expert_linear_backward"} <= found.names
    products = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot")}
    assert not products & found.names


GRAPHS: list[Any] = [(name, torch.float32) for name in FAMILIES | SPARSE]
# What differs in bf16 are casts, of which three families have all; the others are long.
GRAPHS += [(name, torch.bfloat16) for name in ("home", "stem", "mmoe top-k")]
GRAPHS += [
    pytest.param(name, torch.bfloat16, marks=pytest.mark.long)
    for name in FAMILIES | SPARSE
    if (name, torch.bfloat16) not in GRAPHS
]


@pytest.mark.parametrize(("name", "dtype"), GRAPHS)
def test_a_family_is_one_graph(name: str, dtype: torch.dtype) -> None:
    config = (FAMILIES | SPARSE)[name].config
    eager, model = build(config, dtype), build(config, dtype)
    x, direction = draw(config, 20), torch.randn(20, sum(TASKS.values()))
    expected, plans = eager(x)
    expected.backward(direction)
    got, found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    got.backward(direction)
    torch.testing.assert_close(got, expected)
    for key, plan in plans.items():
        torch.testing.assert_close(found[key].weights, plan.weights)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    rows = torch.export.Dim("rows", min=2, max=4096)
    model.eval()
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},)).module()
        for n in (2, 33):
            x = draw(config, n)
            torch.testing.assert_close(exported(x)[0], model(x)[0])


# -- torch-rechub's modules, with copied weights


def copy_mlps(stack: MLPExperts, modules: list[Any]) -> None:
    with torch.no_grad():
        for e, module in enumerate(modules):
            for i, linear in enumerate(m for m in module.mlp if isinstance(m, nn.Linear)):
                stack.weights[i][e] = linear.weight
                stack.biases[i][e] = linear.bias  # type: ignore[index]
            for i, norm in enumerate(m for m in module.mlp if isinstance(m, nn.BatchNorm1d)):
                for name in ("weight", "bias", "running_mean", "running_var"):
                    getattr(stack.norms[i], name)[e] = getattr(norm, name)  # type: ignore[index]


def copy_towers(mine: Towers, theirs: Any) -> None:
    assert mine.hidden is not None
    copy_mlps(mine.hidden, [SimpleNamespace(mlp=tower.mlp[:-1]) for tower in theirs])
    copy_mlps(mine.last[0], [SimpleNamespace(mlp=tower.mlp[-1:]) for tower in theirs])  # type: ignore[arg-type]


def copy_gates(linear: nn.Linear, gates: list[tuple[Any, list[int]]]) -> None:
    """Gates whose experts stand in another order: ours is theirs at `order`."""
    with torch.no_grad():
        linear.weight.copy_(torch.cat([gate.mlp[0].weight[order] for gate, order in gates]))
        linear.bias.copy_(torch.cat([gate.mlp[0].bias[order] for gate, order in gates]))
    for gate, _ in gates:
        gate.mlp[1] = nn.Identity()  # torch-rechub normalises its gates' logits; the papers do not


def same_as_rechub(model: Any, theirs: Any, scores: Callable[[Tensor], Tensor] | None = None) -> None:
    for training in (True, False):
        model.train(training)
        theirs.train(training)
        x = torch.randn(15, IN_DIM, requires_grad=True)
        got, expected = scores(x) if scores else torch.sigmoid(model(x)[0]), theirs({"x": x})
        torch.testing.assert_close(got, expected, **CLOSE)
        direction = torch.randn_like(got)
        found, wanted = (torch.autograd.grad(y, x, direction)[0] for y in (got, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_mmoe_is_torch_rechubs() -> None:
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models.multi_task import MMOE as Theirs

    theirs: Any = Theirs(
        [DenseFeature("x", IN_DIM)], ["classification"] * 3, 4, {"dims": [6, 5]}, [{"dims": [4]} for _ in range(3)]
    )
    config = MMoEConfig(num_experts=4, expert_dims=(6, 5), tower_dims=(4,), dropout=0.0)
    model: Any = MODELS[MMoEConfig](config, IN_DIM, dict.fromkeys("abc", 1), torch.float32)
    copy_mlps(model.experts, list(theirs.experts))
    copy_gates(model.router.linear, [(gate, list(range(4))) for gate in theirs.gates])
    copy_towers(model.towers, theirs.towers)
    same_as_rechub(model, theirs)


def test_ple_is_torch_rechubs() -> None:
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models.multi_task import PLE as Theirs

    own, shared, tasks = 2, 3, 3
    theirs: Any = Theirs(
        [DenseFeature("x", IN_DIM)], ["classification"] * tasks, 2, own, shared, {"dims": [6]}, [{"dims": [4]}] * tasks
    )
    config = PLEConfig(levels=2, shared_experts=shared, task_experts=own, expert_dims=(6,), tower_dims=(4,), dropout=0.0)
    model: Any = MODELS[PLEConfig](config, IN_DIM, dict.fromkeys("abc", 1), torch.float32)
    for mine, level in zip(model.levels, theirs.cgc_layers, strict=True):
        copy_mlps(mine.experts, [*level.experts_shared, *level.experts_specific])
        # Theirs has a task's own experts first, ours the shared ones.
        gates = [(gate, [own, own + 1, own + 2, 0, 1]) for gate in level.gates_specific]
        if level.cur_level < level.n_level:
            everything = own * tasks
            gates = [(level.gate_shared, [*range(everything, everything + shared), *range(everything)]), *gates]
        copy_gates(mine.router.linear, gates)
    copy_towers(model.towers, theirs.towers)
    same_as_rechub(model, theirs)


def test_esmm_is_torch_rechubs() -> None:
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models.multi_task import ESMM as Theirs

    tower = {"dims": [6, 4], "dropout": 0.0}
    theirs: Any = Theirs([DenseFeature("user", 3)], [DenseFeature("item", IN_DIM - 3)], tower, tower)
    # Their embeddings take categories only; ours of the test are the inputs themselves.
    parts = {"user": slice(0, 3), "item": slice(3, IN_DIM)}
    del theirs.embedding
    theirs.embedding = lambda x, features, squeeze_dim: x["x"][:, parts[features[0].name]]
    config = replace(ESMM, conversions={"buy": "click"}, bottom_dims=(6,))
    model: Any = MODELS[ESMMConfig](config, IN_DIM, {"click": 1, "buy": 1}, torch.float32)
    halves = [theirs.tower_ctr.mlp, theirs.tower_cvr.mlp]
    copy_mlps(model.bottoms, [SimpleNamespace(mlp=both[:4]) for both in halves])
    copy_towers(model.towers, [SimpleNamespace(mlp=both[4:]) for both in halves])

    def scores(x: Tensor) -> Tensor:
        click, buy = torch.sigmoid(model(x)[0]).unbind(1)
        return torch.stack([buy, click, click * buy], 1)

    same_as_rechub(model, theirs, scores)


def test_aitm_is_torch_rechubs() -> None:
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models.multi_task import AITM as Theirs

    theirs: Any = Theirs([DenseFeature("x", IN_DIM)], 3, {"dims": [6, 5]}, [{"dims": [4]} for _ in range(3)])
    config = replace(AITM, chain=("a", "b", "c"), bottom_dims=(6, 5))
    model: Any = MODELS[AITMConfig](config, IN_DIM, dict.fromkeys("abc", 1), torch.float32)
    copy_mlps(model.bottoms, list(theirs.bottoms))
    copy_towers(model.towers, theirs.towers)
    for mine, gate, attention in zip(model.transfers, theirs.info_gates, theirs.aits, strict=True):
        copy_mlps(mine.hand_on, [gate])
        with torch.no_grad():
            for n, linear in enumerate((attention.q_layer, attention.k_layer, attention.v_layer)):
                mine.attention.weights[0][n] = linear.weight
    same_as_rechub(model, theirs)


# -- families with an objective or embeddings of their own


def observed(rows: int) -> tuple[Tensor, Tensor]:
    """Labels and weights of TASKS; a task is observed in two rows of three."""
    labels = torch.randint(0, 2, (rows, len(TASKS))).float()
    return labels, torch.rand(rows, len(TASKS)) * (torch.rand(rows, len(TASKS)) < 2 / 3)


@pytest.mark.parametrize("name", sorted({"single_task", "stem", "mmoe"}))
def test_most_families_are_trained_on_the_tasks_losses(name: str) -> None:
    model, losses, weights = build(FAMILIES[name].config), torch.rand(5, 4), torch.rand(5, 4)
    assert model.objective(torch.randn(5, 7), losses, losses, weights) == (losses, weights)


def test_esmm_is_trained_on_clicks_and_on_click_and_conversion_in_the_entire_space() -> None:
    model, outputs = build(ESMM), (3 * torch.randn(60, 7)).requires_grad_()
    losses, (labels, weights) = torch.rand(60, 4), observed(60)
    got, got_weights = model.objective(outputs, losses, labels, weights)
    expected, expected_weights = losses.clone(), weights.clone()
    for b in range(60):
        clicked, bought = bool(labels[b, 0]), bool(labels[b, 2])  # of the tasks; of the outputs they are 0 and 4
        p, q = torch.sigmoid(outputs[b, 0].double()), torch.sigmoid(outputs[b, 4].double())
        expected[b, 2] = -torch.log(p * q if clicked and bought else 1 - p * q)
        if not clicked:
            expected_weights[b, 2] = weights[b, 0]
        elif weights[b, 0] == 0:
            expected_weights[b, 2] = 0
    torch.testing.assert_close(got, expected, **CLOSE)
    assert torch.equal(got_weights, expected_weights)
    found, wanted = (torch.autograd.grad(loss[:, 2].sum(), outputs)[0] for loss in (got, expected))
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert found[:, 0].all()  # what one learns of conversions, one learns of clicks


@pytest.mark.parametrize("size", [40.0, 200.0])
def test_esmms_loss_is_finite_however_sure_it_is(size: float) -> None:
    outputs = torch.zeros(8, 7)
    outputs[:, 0] = size * torch.tensor([1, 1, 1, 1, -1, -1, -1, -1])
    outputs[:, 4] = size * torch.tensor([1, 1, -1, -1, 1, 1, -1, -1])
    labels = torch.tensor([[0.0, 0, 0, 0], [1, 0, 1, 0]] * 4)
    outputs.requires_grad_()
    loss = build(ESMM).objective(outputs, torch.zeros(8, 4), labels, torch.ones(8, 4))[0]
    loss.sum().backward()
    assert loss.isfinite().all()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()
    torch.testing.assert_close(loss[0, 2].item(), size - torch.tensor(2.0).log().item(), rtol=1e-3, atol=0)


def test_aitms_calibrator_holds_a_later_event_below_the_one_before() -> None:
    config = replace(AITM, chain=("share", "like"), strength=0.5)
    outputs, losses = torch.randn(40, 7, requires_grad=True), torch.rand(40, 4)
    labels, weights = observed(40)
    got, got_weights = build(config).objective(outputs, losses, labels, weights)
    expected = losses.clone()
    for b in range(40):
        share, like = torch.sigmoid(outputs[b, 4]), torch.sigmoid(outputs[b, 0])
        expected[b, 0] = losses[b, 0] + 0.5 * torch.relu(like - share)
    torch.testing.assert_close(got, expected)
    assert got_weights is weights
    found, wanted = (torch.autograd.grad(loss.sum(), outputs)[0] for loss in (got, expected))
    torch.testing.assert_close(found, wanted)
    assert build(replace(config, strength=0.0)).objective(outputs, losses, labels, weights)[0] is losses


def test_stem_sees_all_and_moves_its_own() -> None:
    model, x = build(STEM), draw(STEM, 20).requires_grad_()
    outputs = model(x)[0]
    at = torch.tensor(list(TASKS.values())).cumsum(0) - 1
    for t, output in enumerate(at.tolist()):
        moved = torch.autograd.grad(outputs[:, output].sum(), x, retain_graph=True)[0]
        assert [bool(moved[:, s].any()) for s in range(5)] == [s in (0, t + 1) for s in range(5)]
    # The other tasks' embeddings count all the same.
    changed = x.detach().clone()
    changed[:, 2] += 1
    assert (model.eval()(changed)[0] != model(x)[0]).any(0).all()


TWO = [{"name": "click", "label": "click == 1"}, {"name": "buy", "label": "buy == 1", "mask": "click  == 1"}]


def schema_of(*tasks: dict[str, Any]) -> Schema:
    found: Schema = parse(Schema, {"features": [{"name": "x", "kind": "numeric"}], "tasks": tasks}, "schema")
    return found


def test_esmms_conversions_are_what_the_masks_say() -> None:
    assert settle(ESMMConfig(), schema_of(*TWO)).conversions == {"buy": "click"}
    own = {"buy": "view"}
    assert settle(ESMMConfig(conversions=own), schema_of(*TWO)).conversions == own


MANY = [
    {"name": "click", "label": "click == 1"},
    {"name": "buy", "label": "buy == 1", "mask": "click > 0"},
    {"name": "cart", "label": "cart == 1", "mask": "click == 1"},
    {"name": "like", "label": "like == 1"},
    {"name": "stay", "label": "s", "kind": "regression"},
]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ESMMConfig(conversions={}), r"which task is a conversion given which click; add 'model.conversions=\{CONVERSION: CL"),
        (ESMMConfig(conversions={"stay": "click"}), "conversions names the task 'stay', which is of kind regression; name bin"),
        (ESMMConfig(conversions={"bye": "click"}), "conversions names the task 'bye', which .* does not have; did you mean 'b"),
        (ESMMConfig(conversions={"buy": "clik"}), "conversions names the task 'clik', which .* does not have; did you mean 'c"),
        (ESMMConfig(conversions={"buy": "click", "cart": "buy"}), "has 'buy' as a click and as a conversion; ESMM knows one"),
        (
            ESMMConfig(conversions={"like": "click"}),
            "'like' has no mask, .* give the task mask: 'click == 1', or use model=aitm",
        ),
        (AITMConfig(), r"needs the tasks whose events follow on one another, .*; add 'model.chain=\[FIRST, SECOND\]'"),
        (AITMConfig(chain=("click",)), "at least two"),
        (AITMConfig(chain=("click", "like", "click")), "named twice; name each once"),
        (AITMConfig(chain=("click", "bye")), "model.chain names the task 'bye', which the schema does not have; did you mean"),
        (AITMConfig(chain=("click", "stay")), "model.chain names the task 'stay', which is of kind regression"),
        (AITMConfig(chain=("click", "cart")), "'cart' has the mask 'click == 1', the label of 'click', but AITM is for labels"),
    ],
    ids=str,
)
def test_tasks_that_are_no_chain_of_events(config: Any, told: str) -> None:
    schema = schema_of(*MANY)
    with pytest.raises(UserError, match=told):
        MODELS[type(config)](settle(config, schema), 1, {task.name: 1 for task in schema.tasks}, torch.float32)


def test_esmm_takes_a_mask_of_other_words_if_it_is_told() -> None:
    assert settle(ESMMConfig(conversions={"buy": "click"}), schema_of(*MANY)).conversions == {"buy": "click"}
    assert settle(ESMMConfig(), schema_of(*MANY)).conversions == {"cart": "click"}
    with pytest.raises(UserError, match="no task's mask is another task's label"):
        settle(ESMMConfig(), schema_of(*MANY[:2]))


def test_a_chain_of_tasks_with_several_outputs() -> None:
    for config in (replace(ESMM, conversions={"finish": "like"}), replace(AITM, chain=("like", "finish"))):
        with pytest.raises(UserError, match="names the task 'finish', which has 3 outputs; name binary tasks only"):
            MODELS[type(config)](config, IN_DIM, TASKS, torch.float32)


# -- HoME's own


def test_home_starts_with_feature_gates_of_one() -> None:
    model: Any = MODELS[HoMEConfig](HOME, IN_DIM, TASKS, torch.float32)
    x = torch.randn(9, IN_DIM)
    source = (0,) * 4
    feature_gate = model.meta_experts.feature_gate
    logits = unit_products(x, stack_units([feature_gate.units(source)]), invariant=False)
    gates = feature_gate_values(x, feature_gate(*logits), source)
    torch.testing.assert_close(gates, torch.ones(9, 4, IN_DIM))


def test_homes_self_gates_bring_gradient_to_experts_that_no_gate_wants() -> None:
    # Gates that have turned away from the tasks' own experts: without the residual these would learn nothing.
    grads = {}
    for self_gates in (True, False):
        model = build(replace(HOME, self_gates=self_gates))
        with torch.no_grad():
            bias = model.task_gates.linear.bias.view(len(TASKS), 6)  # shared, category's, own
            bias[:, 4:] = -60
        model(torch.randn(30, IN_DIM))[0].square().sum().backward()
        grads[self_gates] = model.task_experts.experts.weights[0].grad[-2 * len(TASKS) :].abs().amax((1, 2))
    assert (grads[True] > 1e-3).all()
    assert (grads[False] < 1e-12).all()


def test_homes_gates_see_their_group_and_nothing_else() -> None:
    model = build(HOME)
    plans = model(torch.randn(5, IN_DIM))[1]
    for key in plans:
        names = model.plan_names[key]
        for t, gate in enumerate(names.gates):
            seen = {name.rsplit(" ", 1)[0] for name, w in zip(names.experts, plans[key].weights[0, t], strict=True) if w > 0}
            if key == "meta":
                expected = {"shared", gate} if gate != "shared" else {"shared", "interaction", "watch", "opinion"}
            else:
                expected = {"shared", (HOME.categories or {})[gate], gate}
            assert seen == expected


@pytest.mark.parametrize(
    ("categories", "told"),
    [
        ({"like": "a", "finish": "a", "share": "a"}, "no category for the task 'stars'; add stars: CATEGORY"),
        ({"like": "a", "finish": "a", "shares": "a", "stars": "a"}, "names the task 'shares', .*; did you mean 'share'?"),
        (dict.fromkeys(TASKS, "shared"), "calls a category 'shared'"),
        (dict.fromkeys(TASKS, "like"), "calls a category 'like'"),
    ],
    ids=["missing", "unknown", "shared", "task"],
)
def test_categories_that_do_not_fit_the_tasks(categories: dict[str, str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        MODELS[HoMEConfig](replace(HOME, categories=categories), IN_DIM, TASKS, torch.float32)


def test_a_frozen_home_gives_the_same_bits_and_gradients_may_be_on() -> None:
    torch.manual_seed(0)
    config = HoMEConfig(categories={"like": "interaction", "finish": "watch_time"})
    model = HoME(config, in_dim=12, tasks={"like": 1, "finish": 1}, dtype=torch.float32).eval()
    x = torch.randn(7, 12)
    with torch.no_grad():
        expected = model(x)[0]
        freeze(model)
        assert torch.equal(model(x)[0], expected)
    for _ in range(2):
        model(x.clone().requires_grad_())[0].sum().backward()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x)[0], expected)
