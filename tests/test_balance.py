"""Capacity, balance losses and statistics against loops, transformers' losses, and the imbalance they are there to see."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recsys_moe.balance import (
    apply_capacity,
    auxiliary_loss,
    entropy_loss,
    expert_load,
    importance_loss,
    load_loss,
    plan_statistics,
    sum_over_layers,
    z_loss,
)
from recsys_moe.kernels import route_topk
from recsys_moe.routing import (
    HashRouter,
    NoisyTopKRouter,
    NormRouter,
    SoftPlan,
    SparsePlan,
    TopKRouter,
    TopPRouter,
    sparse_plan,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def plan_of(ids: list[list[int]], experts: int, weights: list[list[float]] | None = None, **fields: Any) -> SparsePlan:
    ids_rk = torch.tensor(ids, dtype=torch.int32)
    weights_rk = torch.ones(ids_rk.shape) if weights is None else torch.tensor(weights)
    return sparse_plan(ids_rk, weights_rk, experts, **fields)


def top_k(logits: Tensor, k: int) -> SparsePlan:
    return sparse_plan(*route_topk(logits, k, backend="reference"), logits.shape[1], logits=logits)


# -- capacity


def naive_capacity(ids: list[list[int]], queue: list[tuple[int, int]], capacity: int) -> list[list[int]]:
    """Serve the slots (row, place) of the queue one after the other, until an expert is full."""
    left, taken = [[-1] * len(row) for row in ids], dict.fromkeys({i for row in ids for i in row}, 0)
    for row, place in queue:
        expert = ids[row][place]
        if expert >= 0 and taken[expert] < capacity:
            taken[expert] += 1
            left[row][place] = expert
    return left


@given(data=st.data())
def test_capacity_serves_the_queue_until_an_expert_is_full(data: st.DataObject) -> None:
    experts, k, rows = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 10))
    ids = [data.draw(st.lists(st.integers(-1, experts - 1), min_size=k, max_size=k)) for _ in range(rows)]
    weights = [[float(w) for w in data.draw(st.lists(st.integers(0, 3), min_size=k, max_size=k))] for _ in range(rows)]
    factor = data.draw(st.sampled_from([0.25, 0.5, 1.0, 1.25, 4.0]))
    capacity = math.ceil(factor * sum(i >= 0 for row in ids for i in row) / experts)
    slots = [(row, place) for row in range(rows) for place in range(k)]
    queues = {
        "position": sorted(slots, key=lambda slot: (slot[1], slot[0])),
        "weight": sorted(slots, key=lambda slot: -weights[slot[0]][slot[1]]),
    }
    plan = plan_of(ids, experts, weights)
    for policy, queue in queues.items():
        expected = naive_capacity(ids, queue, capacity)
        capped = apply_capacity(plan, factor, policy)  # type: ignore[arg-type]
        assert capped.expert_ids.tolist() == expected
        assert capped.chosen_ids.tolist() == ids
        assert capped.dropped.tolist() == [
            [a != b for a, b in zip(*both, strict=True)] for both in zip(ids, expected, strict=True)
        ]
        assert capped.dropped_rows.tolist() == [all(i < 0 for i in row) for row in expected]
        assert torch.equal(capped.weights, torch.where(capped.expert_ids < 0, 0, plan.weights))
        assert sorted(capped.order.tolist()) == list(range(rows * k))
        assert capped.offsets.diff().tolist() == [sum(i == e for row in expected for i in row) for e in range(experts)]


def test_random_drops_fill_every_expert_and_are_fair() -> None:
    plan = plan_of([[0], [0], [0], [0], [1]], 2)
    kept = torch.zeros(5)
    for _ in range(400):
        capped = apply_capacity(plan, 0.8, "random")  # two slots an expert
        assert capped.offsets.diff().tolist() == [2, 1]
        kept += capped.expert_ids[:, 0] >= 0
    assert kept[4] == 400
    assert (kept[:4] / 400 - 0.5).abs().max() < 0.1


def test_enough_capacity_drops_nothing() -> None:
    plan = top_k(torch.randn(40, 8), 2)
    capped = apply_capacity(plan, 8.0)
    assert torch.equal(capped.expert_ids, plan.expert_ids)
    assert torch.equal(capped.order, plan.order)


def test_gradients_pass_through_what_capacity_keeps() -> None:
    router = TopKRouter(4, 3, 2)
    plan = apply_capacity(router(torch.randn(9, 4)), 0.5)
    plan.weights.sum().backward()
    assert router.linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan])
def test_a_capacity_that_holds_nothing_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=rf"capacity_factor is {factor}; it must be > 0"):
        apply_capacity(plan_of([[0]], 1), factor)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'fifo'; valid: 'position', 'weight', 'random'"):
        apply_capacity(plan_of([[0]], 1), 1.0, "fifo")  # type: ignore[arg-type]


# -- losses


def test_auxiliary_loss_is_its_formula() -> None:
    logits = torch.randn(30, 5)
    plan = top_k(logits, 2)
    probabilities = torch.softmax(logits, 1).tolist()
    total = 0.0
    for e in range(5):
        share = sum(i == e for row in plan.expert_ids.tolist() for i in row) / 60
        total += 5 * share * sum(row[e] for row in probabilities) / 30
    assert auxiliary_loss(plan).item() == pytest.approx(total)


def test_auxiliary_loss_is_transformers_over_k() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral
    from transformers.models.switch_transformers.modeling_switch_transformers import load_balancing_loss_func as switch

    logits = torch.randn(64, 8)
    torch.testing.assert_close(auxiliary_loss(top_k(logits, 3)) * 3, mixtral((logits,), 8, 3))
    one = top_k(logits, 1)
    torch.testing.assert_close(auxiliary_loss(one), switch(torch.softmax(logits, 1)[None], one.expert_ids.long()[None, :, 0]))


def test_imbalance_that_cancels_between_layers_is_still_penalised() -> None:
    # One layer sends all rows to expert 0, the other all to expert 1. Pooled, their load is even.
    layers = [top_k(torch.tensor([[4.0, 0.0]]).expand(8, 2), 1), top_k(torch.tensor([[0.0, 4.0]]).expand(8, 2), 1)]
    pooled = top_k(torch.cat([plan.logits for plan in layers]), 1)  # type: ignore[misc]
    assert auxiliary_loss(pooled).item() == pytest.approx(1)
    assert sum_over_layers(auxiliary_loss, layers).item() == pytest.approx(4 * torch.sigmoid(torch.tensor(4.0)).item())
    assert importance_loss(pooled).item() == pytest.approx(0, abs=1e-9)
    assert sum_over_layers(importance_loss, layers).item() == pytest.approx(2)


def test_balance_sees_what_was_chosen_and_not_what_capacity_left() -> None:
    plan = top_k(torch.tensor([[4.0, 0.0]]).expand(8, 2), 1)
    capped = apply_capacity(plan, 0.25)
    assert expert_load(capped).tolist() == [8, 0]
    assert auxiliary_loss(capped) == auxiliary_loss(plan)


def test_a_step_against_the_auxiliary_loss_evens_out_the_load() -> None:
    router = TopKRouter(8, 8, 2)
    x = torch.randn(256, 8) + 2 * torch.randn(8)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.02)
    before = auxiliary_loss(router(x)).item()
    for _ in range(200):
        optimizer.zero_grad()
        auxiliary_loss(router(x)).backward()
        optimizer.step()
    assert before > 1.3
    assert auxiliary_loss(router(x)).item() < 1.05


def test_importance_loss_is_the_squared_coefficient_of_variation() -> None:
    plan = plan_of([[0, 1], [0, -1], [2, 0]], 3, [[0.5, 0.5], [1.0, 0.0], [0.75, 0.25]])
    importance = [1.75, 0.5, 0.75]
    mean = sum(importance) / 3
    variance = sum((i - mean) ** 2 for i in importance) / 3
    assert importance_loss(plan).item() == pytest.approx(variance / mean**2)


def test_load_loss_is_the_squared_coefficient_of_variation_of_the_chances() -> None:
    router = NoisyTopKRouter(4, 5, 2)
    torch.nn.init.normal_(router.linear.weight)
    plan = router(torch.randn(20, 4))
    load = plan.chance.sum(0).tolist()  # type: ignore[union-attr]
    mean = sum(load) / 5
    assert load_loss(plan).item() == pytest.approx(sum((v - mean) ** 2 for v in load) / 5 / mean**2)
    load_loss(plan).backward()
    assert router.linear.weight.grad.abs().max() > 0
    assert router.noise.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="NoisyTopKRouter in training mode"):
        load_loss(router.eval()(torch.randn(20, 4)))


def test_z_loss_is_transformers() -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

    logits = torch.randn(12, 6) * 3
    torch.testing.assert_close(z_loss(top_k(logits, 2)), router_z_loss_func(logits[None]))  # type: ignore[arg-type]
    torch.testing.assert_close(z_loss(SoftPlan(logits.view(6, 2, 6))), router_z_loss_func(logits[None]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no z-loss"):
        z_loss(plan_of([[0]], 1))


def test_z_loss_leaves_masked_experts_out() -> None:
    plan = SoftPlan(torch.tensor([[[3.0, 100.0]]], requires_grad=True), torch.tensor([[True, False]]))
    assert z_loss(plan).item() == pytest.approx(9)
    z_loss(plan).backward()
    assert plan.logits.grad.tolist() == [[[6.0, 0.0]]]  # type: ignore[union-attr]


def test_entropy_loss_narrows_a_top_p_router() -> None:
    logits = torch.randn(12, 6)
    naive = -sum(p * math.log(p) for row in torch.softmax(logits, 1).tolist() for p in row) / 12
    assert entropy_loss(top_k(logits, 2)).item() == pytest.approx(naive)
    router = TopPRouter(8, 6, p=0.8)
    x = torch.randn(64, 8)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    before = int(router(x).offsets[-1])
    for _ in range(60):
        optimizer.zero_grad()
        entropy_loss(router(x)).backward()
        optimizer.step()
    assert int(router(x).offsets[-1]) < 0.6 * before


def test_losses_of_an_empty_batch_are_zero() -> None:
    for router in (TopKRouter(4, 3, 2), NormRouter(4, 3, 2), NoisyTopKRouter(4, 3, 2)):
        plan = router(torch.zeros(0, 4))
        for loss in (auxiliary_loss, importance_loss, z_loss, entropy_loss):
            assert loss(plan).item() == 0, loss
    assert load_loss(plan).item() == 0


# -- statistics


def test_statistics_of_a_sparse_plan() -> None:
    logits = torch.randn(10, 4) - torch.tensor([0.0, 0.0, 0.0, 50.0])
    plan = apply_capacity(top_k(logits, 2), 0.75)
    statistics = plan_statistics(plan)
    chosen = [i for row in plan.chosen_ids.tolist() for i in row]
    assert statistics.load.tolist() == pytest.approx([chosen.count(e) / 20 for e in range(4)])
    importance = [
        sum(w for i, w in zip(plan.expert_ids.flatten(), plan.weights.flatten(), strict=True) if i == e) / 10 for e in range(4)
    ]
    assert statistics.importance.tolist() == pytest.approx([float(v) for v in importance])
    entropies = [-sum(p * math.log(p) for p in row if p > 0) for row in torch.softmax(logits, 1).tolist()]
    assert statistics.entropy == pytest.approx(sum(entropies) / 10)
    assert statistics.dropped_share == pytest.approx(sum(i < 0 for i in plan.expert_ids.flatten().tolist()) / 20)
    assert statistics.dropped_share > 0
    assert statistics.dead_experts == (3,)


def test_statistics_of_a_soft_plan() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    statistics = plan_statistics(SoftPlan(torch.zeros(5, 2, 3), mask))
    assert statistics.load.tolist() == [0.75, 0.25, 0.0]
    assert torch.equal(statistics.load, statistics.importance)
    assert statistics.entropy == pytest.approx(math.log(2) / 2)
    assert statistics.dropped_share == 0
    assert statistics.dead_experts == (2,)


def test_statistics_without_logits_and_without_rows() -> None:
    statistics = plan_statistics(HashRouter(4)(torch.arange(1000)))
    assert statistics.entropy == 0
    assert statistics.dead_experts == ()
    nothing = plan_statistics(TopKRouter(4, 3, 2)(torch.zeros(0, 4)))
    assert nothing.load.tolist() == [0, 0, 0]
    assert nothing.entropy == nothing.dropped_share == 0
    assert nothing.dead_experts == (0, 1, 2)
