"""At inference a row's result is the same bits whatever else is in the batch, whatever its size, order and thread count.

The negative controls (capacity, expert choice) must fail the same test.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from recsys_moe.kernels import (
    BatchNorm,
    FeatureGate,
    Layer,
    expert_mlp,
    gate_mix,
    quantise,
    route_topk,
    sort_by_expert,
    sparse_expert_mlp,
)

E, D, F, K = 8, 70, 50, 2
DTYPES = (torch.float32, torch.bfloat16)
Run = Callable[[Tensor], Tensor]


def tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse_layer(dtype: torch.dtype) -> Run:
    """A top-2 SwiGLU layer, router and all."""
    router = Layer(tensor(1, E, D, seed=1), tensor(1, E, seed=2))
    experts = (
        Layer((tensor(E, 2 * F, D, seed=3) / 8).to(dtype), activation="swiglu"),
        Layer((tensor(E, D, F, seed=4) / 8).to(dtype)),
    )

    def run(x: Tensor) -> Tensor:
        logits = expert_mlp(x, router, invariant=True).squeeze(1)
        ids, weights = route_topk(logits, K, renormalize=True)
        return sparse_expert_mlp(x, experts, ids, weights, *sort_by_expert(ids, E), invariant=True)

    return run


def dense_layer(dtype: torch.dtype) -> Run:
    """Gated groups of normalised experts under masked gates, as in HoME."""
    norm = BatchNorm(
        tensor(E, F, seed=5), tensor(E, F, seed=6), tensor(E, F, seed=7), tensor(E, F, seed=8) ** 2, training=False
    )
    experts = Layer((tensor(E, F, D, seed=9) / 8).to(dtype), tensor(E, F, seed=10), norm, "silu")
    weigh = Layer(tensor(2, 2, D, seed=11) / 8)
    down = tensor(2 * D, D, seed=13).view(4, D // 2, D).to(dtype) / 8
    up = tensor(2 * D, D, seed=14).view(4, D, D // 2).to(dtype) / 8
    router = Layer(tensor(3, E, D, seed=12))
    mask = torch.arange(E) % 3 != torch.arange(3).unsqueeze(1)

    def run(x: Tensor) -> Tensor:
        gate = FeatureGate(expert_mlp(x, weigh, invariant=True), down, up)
        y = expert_mlp(x, experts, feature_gate=gate, source=(0, 0), invariant=True)
        return gate_mix(expert_mlp(x, router, invariant=True), y, mask_te=mask).flatten(1)

    return run


def int8_layer(dtype: torch.dtype) -> Run:
    """The experts of the sparse layer, rounded to int8."""
    router = Layer(tensor(1, E, D, seed=1), tensor(1, E, seed=2))
    (up, up_scale), (down, down_scale) = quantise(tensor(E, 2 * F, D, seed=3) / 8), quantise(tensor(E, D, F, seed=4) / 8)
    experts = (Layer(up, activation="swiglu", weight_scale=up_scale), Layer(down, weight_scale=down_scale))

    def run(x: Tensor) -> Tensor:
        ids, weights = route_topk(expert_mlp(x, router, invariant=True).squeeze(1), K, renormalize=True)
        return sparse_expert_mlp(x.to(dtype), experts, ids, weights, *sort_by_expert(ids, E), invariant=True)

    return run


LAYERS = {"sparse": sparse_layer, "dense": dense_layer, "int8": int8_layer}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_row_is_the_same_bits_in_any_batch(kind: str, dtype: torch.dtype, threads: None) -> None:
    run = LAYERS[kind](dtype)
    victim = tensor(1, D, seed=20)
    alone = run(victim)
    generator = torch.Generator().manual_seed(21)
    for size in (2, 3, 15, 16, 17, 33, 64, 200, 513):
        x = torch.randn(size, D, generator=generator)
        at = int(torch.randint(size, (1,), generator=generator))
        x[at] = victim
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(run(x)[at : at + 1], alone), (size, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_attackers_do_not_reach_a_victim(kind: str, dtype: torch.dtype) -> None:
    run = LAYERS[kind](dtype)
    x = tensor(40, D, seed=22)
    alone = torch.cat([run(row) for row in x.split(1)])
    assert torch.equal(run(x), alone)
    # The victim's own tokens over and over: all on its experts.
    assert torch.equal(run(x[:1].expand(100, D).contiguous()), alone[:1].expand(100, -1))
    assert torch.equal(run((x[:1] + 1e-3 * x).contiguous())[:1], run((x[:1] + 1e-3 * x[:1]).contiguous()))
    # Another order, and in chunks of any size.
    order = torch.randperm(40, generator=torch.Generator().manual_seed(23))
    assert torch.equal(run(x[order]), alone[order])
    for sizes in ([1, 39], [7, 13, 20], [32, 8]):
        assert torch.equal(torch.cat([run(part) for part in x.split(sizes)]), alone)


def test_the_invariant_mode_computes_the_same_function() -> None:
    x = tensor(300, D, seed=24)
    experts = (Layer(tensor(E, F, D, seed=3), tensor(E, F, seed=4), activation="gelu"), Layer(tensor(E, D, F, seed=5)))
    ids, weights = route_topk(tensor(300, E, seed=6), K)
    plan = (ids, weights, *sort_by_expert(ids, E))
    with torch.no_grad():
        torch.testing.assert_close(
            sparse_expert_mlp(x, experts, *plan, invariant=True), sparse_expert_mlp(x, experts, *plan), rtol=1e-4, atol=1e-3
        )
        torch.testing.assert_close(expert_mlp(x, experts[0], invariant=True), expert_mlp(x, experts[0]), rtol=1e-4, atol=1e-4)


def test_negative_control_capacity_lets_an_attacker_push_the_victim_out() -> None:
    run_layer, victim = sparse_layer(torch.float32), tensor(1, D, seed=25)
    router = Layer(tensor(1, E, D, seed=1), tensor(1, E, seed=2))

    def run(x: Tensor, capacity: int) -> Tensor:
        ids, weights = route_topk(expert_mlp(x, router, invariant=True).squeeze(1), K, renormalize=True)
        order, offsets = sort_by_expert(ids, E)
        for e in range(E):  # what comes too late is dropped
            ids.view(-1)[order[offsets[e] : offsets[e + 1]][capacity:].long()] = -1
        experts = (Layer(tensor(E, 2 * F, D, seed=3) / 8, activation="swiglu"), Layer(tensor(E, D, F, seed=4) / 8))
        return sparse_expert_mlp(x, experts, ids, weights, *sort_by_expert(ids, E), invariant=True)

    crowd = torch.cat([victim.expand(9, D), victim])
    assert torch.equal(run(victim, 4), run_layer(victim))
    assert not torch.equal(run(crowd, 4)[-1:], run(victim, 4))


def test_negative_control_expert_choice_depends_on_the_batch() -> None:
    router = Layer(tensor(1, E, D, seed=1), tensor(1, E, seed=2))
    experts = (Layer(tensor(E, D, D, seed=3) / 8),)

    def run(x: Tensor) -> Tensor:
        scores = torch.softmax(expert_mlp(x, router, invariant=True).squeeze(1), -1)
        chosen = scores.topk(1, dim=0).indices  # each expert takes its best row
        ids = torch.full((x.shape[0], E), -1, dtype=torch.int32).scatter_(0, chosen, torch.arange(E, dtype=torch.int32)[None])
        return sparse_expert_mlp(x, experts, ids, scores, *sort_by_expert(ids, E), invariant=True)

    x = tensor(30, D, seed=26)
    assert not torch.equal(run(x)[:1], run(x[:1]))
