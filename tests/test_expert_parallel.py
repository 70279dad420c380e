"""Experts dealt to workers do what one worker does with all of them: real processes over gloo, which run this file."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe import distributed
from recsys_moe.expert_parallel import ExpertParallel, deal_experts, expert_mesh, sum_gradients
from recsys_moe.experts import MLPExperts
from recsys_moe.routing import SparsePlan, TopKRouter, sparse_plan
from recsys_moe.tensorfiles import TensorFiles, save_tensors

D, H = 6, 10
# Each with the number of experts, the rows of each worker, and the experts of a row's slots.
CASES: dict[str, tuple[int, list[int], Any]] = {
    "even loads": (4, [6, 6], lambda r: [r % 4, (r + 1) % 4]),
    "uneven loads": (4, [3, 8], lambda r: [0, 1 + r % 3 if r % 2 else 3]),
    "an empty expert": (4, [5, 4], lambda r: [0, 3]),
    "a worker without rows": (4, [0, 7], lambda r: [r % 4, (r + 2) % 4]),
    "nobody has rows": (4, [0, 0], lambda r: [0, 0]),
    "all on one worker's experts": (4, [4, 5], lambda r: [2, 3]),
    "slots without an expert": (3, [5, 4], lambda r: [-1, r % 3] if r % 2 else [r % 3, -1]),
    "experts that two don't divide": (5, [6, 5], lambda r: [r % 5, (r * r + 1) % 5]),
    "outputs of length one": (4, [6, 5], lambda r: [r % 4, (r + 1) % 4]),
    "two gates a row": (4, [3, 4], lambda r: [r % 4, (r + 3) % 4]),
}


def drawn(name: str) -> tuple[MLPExperts, Tensor, SparsePlan, int]:
    """All experts, all rows, their plan, and how many gates a row has."""
    experts, rows, choose = CASES[name]
    torch.manual_seed(len(name))
    biased = name == "slots without an expert"
    kind: Any = {"activation": "relu", "bias": True} if biased else {"activation": "swiglu", "bias": False}
    module, gates = MLPExperts(experts, D, (H,), linear_out=D, **kind), 1 + (name == "two gates a row")
    x, ids = torch.randn(sum(rows), D), torch.tensor([choose(r) for r in range(sum(rows) * gates)], dtype=torch.int32)
    weights = torch.where(ids.view(-1, 2) < 0, 0.0, torch.rand(len(ids), 2))
    return module, x, sparse_plan(ids.view(-1, 2), weights, experts, unit_norm=name == "outputs of length one"), gates


def part_of(plan: SparsePlan, rows: slice) -> SparsePlan:
    return sparse_plan(plan.expert_ids[rows], plan.weights[rows].requires_grad_(), plan.num_experts, unit_norm=plan.unit_norm)


def outcomes(y: Tensor, x: Tensor, weights: Tensor, experts: nn.Module) -> dict[str, Tensor]:
    """An output and the gradients of a loss that weighs its elements differently."""
    loss = ((y - 1).square() * torch.linspace(-1, 2, D)).sum()
    parameters = dict(experts.named_parameters())
    gradients = torch.autograd.grad(loss, [x, weights, *parameters.values()])
    return {"y": y.detach(), **dict(zip(["x", "weights", *parameters], gradients, strict=True))}


def layers(mesh: Any) -> dict[str, Tensor]:
    found = {}
    for name, (_, rows, _) in CASES.items():
        whole, x, plan, gates = drawn(name)
        layer, rank = ExpertParallel(whole, mesh), distributed.rank()
        mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        x_here, plan_here = x[mine].requires_grad_(), part_of(plan, slice(mine.start * gates, mine.stop * gates))
        parts = outcomes(layer.combine(x_here, plan_here), x_here, plan_here.weights, layer.experts)
        found |= {f"{name}/{key}": value for key, value in parts.items()}
    return found


def naive(experts: MLPExperts, x: Tensor, plan: SparsePlan, gates: int) -> Tensor:
    """Row by row and slot by slot."""
    rows = []
    for r, (ids, weights) in enumerate(zip(plan.expert_ids.tolist(), plan.weights, strict=True)):
        y = torch.zeros(D)
        for e, weight in zip(ids, weights, strict=True):
            if e < 0:
                continue
            z = experts.weights[0][e] @ x[r // gates]
            if experts.biases is None:
                out = experts.weights[1][e] @ (F.silu(z[:H]) * z[H:])
            else:
                out = experts.weights[1][e] @ F.relu(z + experts.biases[0][e]) + experts.biases[1][e]
            y = y + weight * (out / out.norm() if plan.unit_norm else out)
        rows.append(y)
    nothing = sum(t.sum() for t in (x, plan.weights, *experts.parameters())) * x.new_zeros(0, D)
    return torch.stack(rows) if rows else nothing


class Sparse(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = TopKRouter(width, experts, 2, renormalize=True)
        self.experts = MLPExperts(experts, width, (H,), linear_out=width, activation="swiglu", bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.experts.combine(x, self.router(x))
        return out


class Net(nn.Module):
    """A stack as a language model has it: shared parameters before, between and behind two sparse layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, D), nn.Linear(D, 20)
        self.body = nn.Sequential(Sparse(D, 4), nn.Linear(D, D), Sparse(D, 6))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(tokens)))
        return logits


def trained(cuts: list[int], sharing: int | None) -> dict[str, Tensor]:
    """Losses of six steps and the parameters behind them. Worker w has the tokens from cuts[w] to cuts[w + 1] of each batch."""
    torch.manual_seed(3)
    net, rank, losses = Net(), distributed.rank(), []
    if sharing is not None:
        deal_experts(net, expert_mesh(sharing))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)  # Adam would blow up what rounding leaves of a 0
    for _ in range(6):
        tokens, after = torch.randint(20, (2, cuts[-1]))
        mine = slice(cuts[rank], cuts[rank + 1]) if sharing else slice(None)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(tokens[mine]), after[mine], reduction="sum") / len(tokens)
        loss.backward()
        losses.append(sum_gradients(net, loss))
        optimizer.step()
    names = {name.replace("experts.experts", "experts"): p.detach() for name, p in net.named_parameters()}
    return {"losses": torch.stack(losses), **names}


UNEVEN, NOBODY, FOUR = [0, 5, 16], [0, 0, 9], [0, 5, 5, 12, 20]


def work(rank: int, world: int, port: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(minutes=2)
    )
    torch.set_num_threads(1)
    if world == 2:
        found = layers(expert_mesh(2))
        for name, cuts in {"uneven": UNEVEN, "nobody": NOBODY}.items():
            found |= {f"{name}/{key}": value for key, value in trained(cuts, 2).items()}
    else:
        found = {f"four/{key}": value for key, value in trained(FOUR, 2).items()}
    save_tensors(folder / f"{world}-{rank}.safetensors", {key: value.contiguous() for key, value in found.items()})
    dist.destroy_process_group()


def run(world: int, folder: Path) -> list[TensorFiles]:
    """What each of the workers found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    commands = [[sys.executable, __file__, *map(str, (rank, world, port)), str(folder)] for rank in range(world)]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(timeout=300) for process in processes] == [0] * world
    return [TensorFiles([folder / f"{world}-{rank}.safetensors"]) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[TensorFiles]:
    return run(2, tmp_path_factory.mktemp("two"))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_layer_is_the_naive_sum_with_all_gradients(name: str, two: list[TensorFiles]) -> None:
    whole, x, plan, gates = drawn(name)
    plan.weights.requires_grad_()
    want = outcomes(naive(whole, x.requires_grad_(), plan, gates), x, plan.weights, whole)
    # Rows lie worker by worker, and so do the experts.
    for key, value in want.items():
        close(torch.cat([worker[f"{name}/{key}"] for worker in two]), value)


@pytest.mark.parametrize(("name", "cuts"), [("uneven", UNEVEN), ("nobody", NOBODY)])
def test_two_workers_train_as_one(name: str, cuts: list[int], two: list[TensorFiles]) -> None:
    for key, value in trained(cuts, None).items():
        parts = [worker[f"{name}/{key}"] for worker in two]
        if ".experts." in key:
            assert parts[0].shape[0] < value.shape[0]
            close(torch.cat(parts), value)
        else:
            assert torch.equal(*parts)
            close(parts[0], value)


@pytest.mark.long
def test_two_by_two_workers_train_as_one(tmp_path: Path) -> None:
    """Two replicas of two workers that share the experts; each of the four has tokens of its own."""
    four = run(4, tmp_path)
    for key, value in trained(FOUR, None).items():
        parts = [worker[f"four/{key}"] for worker in four]
        if ".experts." in key:
            assert torch.equal(torch.cat(parts[:2]), torch.cat(parts[2:]))
            close(torch.cat(parts[:2]), value)
        else:
            assert all(torch.equal(part, parts[0]) for part in parts)
            close(parts[0], value)


@contextmanager
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_worker_holds_all() -> None:
    whole, x, plan, gates = drawn("even loads")
    want = naive(whole, x, plan, gates)
    with alone():
        close(ExpertParallel(whole, expert_mesh(1)).combine(x, plan).detach(), want.detach())


def test_what_cannot_be_dealt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with alone():
        with pytest.raises(ValueError, match="1 workers don't fall into groups of 2"):
            expert_mesh(2)
        mesh = expert_mesh(1)
        with pytest.raises(ValueError, match="experts with norm='batch' can't be dealt"):
            ExpertParallel(MLPExperts(3, D, (H,), norm="batch"), mesh)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: 3)
        with pytest.raises(ValueError, match="2 experts can't be dealt to 3 workers"):
            ExpertParallel(MLPExperts(2, D, (H,)), mesh)
        monkeypatch.undo()


if __name__ == "__main__":
    work(*map(int, sys.argv[1:4]), Path(sys.argv[4]))
