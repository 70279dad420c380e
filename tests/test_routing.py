"""Routers against loops over rows and experts, against transformers' gates with copied weights, and against themselves in
other batches; plans against what they promise."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from recsys_moe.balance import apply_capacity, expert_load
from recsys_moe.kernels import Backend, Layer, sparse_expert_mlp
from recsys_moe.routing import (
    ExpertChoiceRouter,
    Gate,
    GShardRouter,
    HashRouter,
    NoisyTopKRouter,
    NormRouter,
    RandomRouter,
    SoftRouter,
    SparsePlan,
    SwitchRouter,
    TaskRouter,
    TopKRouter,
    TopPRouter,
    require_invariant,
    sparse_plan,
)

D, E = 10, 6
Rows = list[list[float]]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# -- naive mathematics, in Python's own floats


def naive_logits(gate: nn.Linear, x: Tensor) -> Rows:
    """W·x + b, one number at a time; a row's tasks one after the other."""
    experts = gate.num_experts
    weight = gate.weight.tolist()
    bias = [0.0] * len(weight) if gate.bias is None else gate.bias.tolist()
    flat = [
        [sum(w * v for w, v in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)] for row in x.tolist()
    ]
    return [row[i : i + experts] for row in flat for i in range(0, len(row), experts)]


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


def sigmoid(row: list[float]) -> list[float]:
    return [1 / (1 + math.exp(-v)) for v in row]


def best(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def same(plan: SparsePlan, ids: list[list[int]], weights: Rows) -> None:
    assert plan.expert_ids.tolist() == ids
    assert plan.expert_ids.dtype == torch.int32
    assert plan.weights.dtype == torch.float32
    torch.testing.assert_close(plan.weights.detach(), torch.tensor(weights))


# -- the k best


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_after"])
@pytest.mark.parametrize("k", [1, 2, E])
def test_top_k(k: int, scoring: Any, renormalize: bool, bias: bool, num_tasks: int) -> None:
    router = TopKRouter(D, E, k, num_tasks=num_tasks, scoring=scoring, renormalize=renormalize, bias=bias, scale=2.5)
    x = torch.randn(7, D)
    ids, weights = [], []
    for logits in naive_logits(router.linear, x):
        scores = {"softmax": softmax, "sigmoid": sigmoid, "softmax_after": list}[scoring](logits)
        chosen = best(scores, k)
        row = [scores[e] for e in chosen]
        if scoring == "softmax_after":
            row = softmax(row)
        elif renormalize:
            row = [w / sum(row) for w in row]
        ids.append(chosen)
        weights.append([2.5 * w for w in row])
    assert len(ids) == 7 * num_tasks
    same(router(x), ids, weights)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("biased", [False, True])
def test_group_limited(scoring: Any, group_score: Any, biased: bool) -> None:
    router = TopKRouter(
        D, 12, 3, scoring=scoring, correction_bias=biased, num_groups=4, topk_groups=2, group_score=group_score, scale=1.5
    )
    if biased:
        router.correction_bias.copy_(torch.randn(12))
    x = torch.randn(50, D)
    ids, weights = [], []
    for logits in naive_logits(router.linear, x):
        scores = softmax(logits) if scoring == "softmax" else sigmoid(logits)
        choice = [s + b for s, b in zip(scores, router.correction_bias.tolist(), strict=True)] if biased else scores
        groups = [sorted(choice[3 * g : 3 * g + 3], reverse=True)[: 1 if group_score == "max" else 2] for g in range(4)]
        open_groups = best([sum(group) for group in groups], 2)
        chosen = best([c if e // 3 in open_groups else -math.inf for e, c in enumerate(choice)], 3)
        ids.append(chosen)
        weights.append([1.5 * scores[e] for e in chosen])
    same(router(x), ids, weights)


def test_a_masked_group_stays_closed_when_its_biased_scores_beat_the_others() -> None:
    # All scores of the open group are below 0 after the bias: groups masked with 0 instead of −∞ would win here.
    router = TopKRouter(4, 4, 2, scoring="sigmoid", correction_bias=True, num_groups=2, topk_groups=1)
    nn.init.eye_(router.linear.weight)
    router.correction_bias.fill_(-3.0)
    assert router(torch.tensor([[0.0, 0.0, 1.0, -9.0]])).expert_ids.tolist() == [[2, 3]]


def test_ties_go_to_the_lowest_expert_and_the_lowest_group() -> None:
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0] * 4])
    for router, expected in [
        (TopKRouter(4, 4, 2), [[0, 2], [0, 1]]),
        (TopKRouter(4, 4, 2, scoring="sigmoid"), [[0, 2], [0, 1]]),
        (TopKRouter(4, 4, 1, num_groups=2, topk_groups=1), [[0], [0]]),
        (NormRouter(4, 4, 2), [[0, 2], [0, 1]]),
        (TopPRouter(4, 4, p=0.5), [[0, 2, -1, -1], [0, 1, -1, -1]]),
        (NoisyTopKRouter(4, 4, 2).eval(), [[0, 2], [0, 1]]),
        (GShardRouter(4, 4, second="sample").eval(), [[0, 2], [0, 1]]),
        (SwitchRouter(4, 4), [[0], [0]]),
    ]:
        nn.init.eye_(router.linear.weight)
        assert router(x).expert_ids.tolist() == expected, router


def test_the_correction_bias_moves_the_choice_and_not_the_weights() -> None:
    router = TopKRouter(3, 3, 1, scoring="sigmoid", correction_bias=True)
    nn.init.eye_(router.linear.weight)
    x = torch.tensor([[0.0, 1.0, 0.0]])
    router.correction_bias.copy_(torch.tensor([0.0, 0.0, 5.0]))
    same(router(x), [[2]], [[0.5]])
    assert "correction_bias" in router.state_dict()
    assert "correction_bias" not in dict(router.named_parameters())


def test_the_correction_bias_stays_fp32_when_the_model_is_cast() -> None:
    model = nn.Sequential(TopKRouter(3, 3, 1, scoring="sigmoid", correction_bias=True))
    value = torch.tensor([1 + 2**-20, 0.0, 0.0])  # bf16 would round it to 1
    model[0].correction_bias.copy_(value)
    model.to(torch.bfloat16)
    assert model[0].linear.weight.dtype == torch.bfloat16
    assert torch.equal(model[0].correction_bias, value)
    assert model(torch.randn(2, 3, dtype=torch.bfloat16)).weights.dtype == torch.float32
    empty = TopKRouter(3, 3, 1, correction_bias=True).to("meta").to_empty(device="cpu")
    assert empty.correction_bias.dtype == torch.float32


def test_updating_the_bias_evens_out_the_load() -> None:
    router = TopKRouter(8, 8, 2, scoring="sigmoid", correction_bias=True)
    x = 0.3 * torch.randn(512, 8) + torch.randn(8)

    def cv(plan: SparsePlan) -> float:
        load = plan.offsets.diff().float()
        return float(load.std(correction=0) / load.mean())

    before = cv(router(x))
    for rate in [0.01] * 100 + [0.001] * 50:
        router.update_bias(expert_load(router(x)), rate)
    assert before > 0.5
    assert cv(router(x)) < 0.1
    with pytest.raises(ValueError, match="no correction bias"):
        TopKRouter(8, 8, 2).update_bias(torch.zeros(8), rate=0.1)


def test_noisy_top_k_in_training() -> None:
    router = NoisyTopKRouter(D, E, 2)
    assert router(torch.randn(3, D)).logits.abs().max() == 0  # no signal at the start
    for gate in (router.linear, router.noise):
        nn.init.normal_(gate.weight)
    x = torch.randn(9, D)
    torch.manual_seed(1)
    plan = router(x)
    torch.manual_seed(1)
    draws = torch.randn(9, E).tolist()
    ids, weights, chances = [], [], []
    for clean, width, draw in zip(naive_logits(router.linear, x), naive_logits(router.noise, x), draws, strict=True):
        std = [math.log1p(math.exp(w)) for w in width]
        noisy = [c + n * s for c, n, s in zip(clean, draw, std, strict=True)]
        chosen = best(noisy, 2)
        ids.append(chosen)
        weights.append(softmax([noisy[e] for e in chosen]))
        row = []
        for e in range(E):
            threshold = sorted((noisy[o] for o in range(E) if o != e), reverse=True)[1]
            row.append(0.5 * (1 + math.erf((clean[e] - threshold) / std[e] / math.sqrt(2))))
        chances.append(row)
    same(plan, ids, weights)
    torch.testing.assert_close(plan.chance.detach(), torch.tensor(chances), rtol=1e-4, atol=1e-6)
    quiet = router.eval()(x)
    assert quiet.chance is None
    assert quiet.expert_ids.tolist() == [best(row, 2) for row in naive_logits(router.linear, x)]


def test_gshard_samples_the_second_expert_in_proportion_to_its_weight() -> None:
    router = GShardRouter(4, 4, second="sample")
    nn.init.eye_(router.linear.weight)
    row = [2.0, 1.0, 0.0, 0.5]
    plan = router(torch.tensor([row]).expand(20_000, 4))
    p = softmax(row)
    assert (plan.expert_ids[:, 0] == 0).all()
    share = torch.bincount(plan.expert_ids[:, 1].long(), minlength=4) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.0, *(v / sum(p[1:]) for v in p[1:])]), atol=0.015, rtol=0)
    for second in (1, 2, 3):
        weights = plan.weights[plan.expert_ids[:, 1] == second][0].tolist()
        assert weights == pytest.approx([p[0] / (p[0] + p[second]), p[second] / (p[0] + p[second])])


def test_gshard_drops_the_second_expert_by_its_weight() -> None:
    router = GShardRouter(4, 4, second="drop")
    nn.init.eye_(router.linear.weight)
    row = [2.0, 1.0, 0.0, 0.5]
    plan = router(torch.tensor([row]).expand(20_000, 4))
    first, second = softmax([2.0, 1.0])
    kept = plan.expert_ids[:, 1] == 1
    assert (plan.expert_ids[:, 0] == 0).all()
    assert (plan.expert_ids[~kept, 1] == -1).all()
    assert float(kept.float().mean()) == pytest.approx(2 * second, abs=0.015)
    torch.testing.assert_close(plan.weights[:, 0], torch.full((20_000,), first))
    torch.testing.assert_close(plan.weights[:, 1], torch.where(kept, second, 0.0))
    assert not plan.dropped.any()  # the router left it out, capacity did not
    same(router.eval()(torch.tensor([row])), [[0, 1]], [[first, second]])


def test_switch_jitters_its_input_in_training_only() -> None:
    router = SwitchRouter(D, E, jitter=0.3)
    x = torch.randn(40, D)
    torch.manual_seed(2)
    plan = router(x)
    torch.manual_seed(2)
    jittered = x * torch.empty(40, D).uniform_(0.7, 1.3)
    for got, inputs in ((plan, jittered), (router.eval()(x), x)):
        probabilities = [softmax(row) for row in naive_logits(router.linear, inputs)]
        same(got, [best(p, 1) for p in probabilities], [[max(p)] for p in probabilities])


@pytest.mark.parametrize("p", [0.05, 0.4, 0.9, 1.0])
def test_top_p_adds_experts_until_they_reach_p(p: float) -> None:
    router = TopPRouter(D, E, p)
    nn.init.normal_(router.linear.weight, std=0.3)
    x = torch.randn(30, D)
    ids, weights = [], []
    for row in naive_logits(router.linear, x):
        probabilities, chosen = softmax(row), []
        for e in best(probabilities, E):
            chosen.append(e)
            if sum(probabilities[c] for c in chosen) >= p:
                break
        ids.append(chosen + [-1] * (E - len(chosen)))
        weights.append([probabilities[e] for e in chosen] + [0.0] * (E - len(chosen)))
    if p < 1:  # at 1 rounding decides whether the last, vanishing expert is needed
        same(router(x), ids, weights)
        assert len({tuple(i >= 0 for i in row) for row in ids}) > 1 or p == 0.05
    else:
        torch.testing.assert_close(router(x).weights.sum(1), torch.ones(30))


def test_norm_based() -> None:
    router = NormRouter(D, E, 2)
    x = torch.randn(9, D)
    lengths = [[math.log1p(math.exp(v)) for v in row] for row in naive_logits(router.linear, x)]
    plan = router(x)
    ids = [best(row, 2) for row in lengths]
    same(plan, ids, [[row[e] for e in chosen] for row, chosen in zip(lengths, ids, strict=True)])
    torch.testing.assert_close(plan.probabilities.sum(1), torch.ones(9))
    weight = torch.randn(E, 3, D)
    y = sparse_expert_mlp(
        x,
        (Layer(weight),),
        plan.expert_ids,
        plan.weights,
        plan.order,
        plan.offsets,
        unit_norm=plan.unit_norm,
        backend="reference",
    )
    for r in range(9):
        outputs = [weight[e] @ x[r] for e in ids[r]]
        naive = sum(lengths[r][e] * v / v.norm() for e, v in zip(ids[r], outputs, strict=True))
        torch.testing.assert_close(y[r].detach(), naive)


def test_norm_based_lengths_neither_overflow_nor_die() -> None:
    router = NormRouter(2, 2, 2)
    nn.init.eye_(router.linear.weight)
    x = torch.tensor([[200.0, -50.0]], requires_grad=True)
    plan = router(x)
    assert plan.weights[0, 0] == 200
    plan.weights.sum().backward()
    assert torch.isfinite(x.grad).all()


# -- the rest


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 99.0])
def test_expert_choice(factor: float) -> None:
    router = ExpertChoiceRouter(D, E, factor)
    x = torch.randn(20, D)
    probabilities = [softmax(row) for row in naive_logits(router.linear, x)]
    capacity = min(20, math.ceil(20 * factor / E))
    taken = [set(best([row[e] for row in probabilities], capacity)) for e in range(E)]
    plan = router(x)
    same(
        plan,
        [[e if r in taken[e] else -1 for e in range(E)] for r in range(20)],
        [[probabilities[r][e] if r in taken[e] else 0.0 for e in range(E)] for r in range(20)],
    )
    assert plan.offsets.diff().tolist() == [capacity] * E
    assert plan.dropped_rows.tolist() == [all(r not in rows for rows in taken) for r in range(20)]


def test_the_hash_never_changes_and_spreads_evenly() -> None:
    def naive(number: int, experts: int) -> int:
        mask = (1 << 64) - 1
        z = (number + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return ((z ^ (z >> 31)) >> 1) % experts

    ids = [0, 1, 2, 50_256, 2**31, -1, -(2**63), 2**63 - 1]
    plan = HashRouter(7)(torch.tensor(ids))
    same(plan, [[naive(i, 7)] for i in ids], [[1.0]] * len(ids))
    assert HashRouter(1000)(torch.tensor([0])).expert_ids.item() == 0xE220A8397B1DCDAF // 2 % 1000  # SplitMix64's first number
    counts = HashRouter(10)(torch.arange(100_000)).offsets.diff()
    assert (counts - 10_000).abs().max() < 500


def test_random_experts_are_different_ones_and_all_take_part() -> None:
    plan = RandomRouter(5, 3)(torch.zeros(3000, 2))
    assert all(len(set(row)) == 3 for row in plan.expert_ids.tolist())
    assert (plan.offsets.diff() / 3000 - 3 / 5).abs().max() < 0.05
    same(plan, plan.expert_ids.tolist(), [[1 / 3] * 3] * 3000)


def test_task_level() -> None:
    router = TaskRouter(3, E, 2)
    tasks = [2, 0, 0, 1, 2]
    probabilities = [softmax(row) for row in router.logits.weight.tolist()]
    chosen = [best(row, 2) for row in probabilities]
    weights = [[p[e] / sum(p[o] for o in c) for e in c] for p, c in zip(probabilities, chosen, strict=True)]
    same(router(torch.tensor(tasks)), [chosen[t] for t in tasks], [weights[t] for t in tasks])


@pytest.mark.parametrize("masked", [False, True])
def test_soft(masked: bool) -> None:
    mask = torch.tensor([[True, True, False, False], [True, False, True, False]]) if masked else None
    router = SoftRouter(D, 2, 4, mask)
    x = torch.randn(5, D)
    expected = []
    for row in naive_logits(router.linear, x):
        logits = iter(row)  # of what is allowed, and of nothing else
        for allowed in [[True] * 4] * 2 if mask is None else mask.tolist():
            own = [math.exp(next(logits)) if a else 0.0 for a in allowed]
            expected.append([v / sum(own) for v in own])
    plan = router(x)
    torch.testing.assert_close(plan.weights.detach(), torch.tensor(expected).view(5, 2, 4))
    assert set(router.state_dict()) == {"linear.weight", "linear.bias"}
    plan.weights[..., 0].sum().backward()
    assert torch.isfinite(router.linear.weight.grad).all()


@pytest.mark.parametrize("sources", [((2, 0, 1),), ((2, 0, 1), (1, 1, 1))], ids=["one", "two"])
def test_soft_gates_of_inputs_of_their_own(sources: tuple[tuple[int, ...], ...]) -> None:
    mask = torch.tensor([[True, True, False, False], [True, False, True, False], [True, True, True, True]])
    router = SoftRouter(D * len(sources), 3, 4, mask)
    x = torch.randn(5, 3, D)
    first = 0
    plan = router(x, *sources)
    for t, allowed in enumerate(mask):
        own = torch.cat([x[:, source[t]] for source in sources], 1)
        pairs = slice(first, first + int(allowed.sum()))
        logits = own @ router.linear.weight[pairs].t() + router.linear.bias[pairs]
        torch.testing.assert_close(plan.weights[:, t, allowed], torch.softmax(logits, 1))
        assert (plan.weights[:, t, ~allowed] == 0).all()
        first = pairs.stop
    assert first == len(router.linear.weight)


# -- published implementations, with copied weights


def hugging_face() -> dict[str, Callable[[], tuple[nn.Module, TopKRouter]]]:
    from transformers.models import deepseek_v2, deepseek_v3, gpt_oss, mixtral, olmoe, qwen2_moe

    def mixtral_() -> tuple[nn.Module, TopKRouter]:
        config = mixtral.MixtralConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=2)
        return mixtral.modeling_mixtral.MixtralTopKRouter(config), TopKRouter(32, 8, 2, renormalize=True)

    def qwen2(norm: bool) -> tuple[nn.Module, TopKRouter]:
        config = qwen2_moe.Qwen2MoeConfig(hidden_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=norm)
        return qwen2_moe.modeling_qwen2_moe.Qwen2MoeTopKRouter(config), TopKRouter(32, 8, 3, renormalize=norm)

    def olmoe_() -> tuple[nn.Module, TopKRouter]:
        config = olmoe.OlmoeConfig(hidden_size=32, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False)
        return olmoe.modeling_olmoe.OlmoeTopKRouter(config), TopKRouter(32, 8, 3)

    def v2(method: str) -> tuple[nn.Module, TopKRouter]:
        config = deepseek_v2.DeepseekV2Config(
            hidden_size=32,
            n_routed_experts=8,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
            topk_method=method,
            routed_scaling_factor=16.0,
        )
        groups: dict[str, Any] = {} if method == "greedy" else {"num_groups": 4, "topk_groups": 2}
        return deepseek_v2.modeling_deepseek_v2.DeepseekV2TopkRouter(config), TopKRouter(32, 8, 3, scale=16.0, **groups)

    def v3() -> tuple[nn.Module, TopKRouter]:
        config = deepseek_v3.DeepseekV3Config(
            hidden_size=32, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5
        )
        theirs = deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter(config)
        mine = TopKRouter(
            32,
            16,
            4,
            scoring="sigmoid",
            renormalize=True,
            correction_bias=True,
            num_groups=4,
            topk_groups=2,
            group_score="top2_sum",
            scale=2.5,
        )
        nn.init.normal_(theirs.e_score_correction_bias)
        mine.correction_bias.copy_(theirs.e_score_correction_bias)
        return theirs, mine

    def gpt() -> tuple[nn.Module, TopKRouter]:
        config = gpt_oss.GptOssConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=4)
        return gpt_oss.modeling_gpt_oss.GptOssTopKRouter(config), TopKRouter(32, 8, 4, scoring="softmax_after", bias=True)

    return {
        "mixtral": mixtral_,
        "qwen2_moe": lambda: qwen2(False),
        "qwen2_moe, renormalised": lambda: qwen2(True),
        "olmoe": olmoe_,
        "deepseek_v2": lambda: v2("greedy"),
        "deepseek_v2, groups": lambda: v2("group_limited_greedy"),
        "deepseek_v3": v3,
        "gpt_oss": gpt,
    }


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "qwen2_moe",
        "qwen2_moe, renormalised",
        "olmoe",
        "deepseek_v2",
        "deepseek_v2, groups",
        "deepseek_v3",
        "gpt_oss",
    ],
)
def test_routes_as_transformers_does(name: str) -> None:
    theirs, mine = hugging_face()[name]()
    nn.init.normal_(theirs.weight)
    mine.linear.weight.data.copy_(theirs.weight)
    if mine.linear.bias is not None:
        nn.init.normal_(theirs.bias)
        mine.linear.bias.data.copy_(theirs.bias)
    x = torch.randn(64, 32)
    _, weights, ids = theirs(x)
    plan = mine(x)
    experts = mine.linear.num_experts
    dense = torch.zeros(64, experts).scatter(1, ids, weights.detach())  # theirs are not always sorted
    torch.testing.assert_close(plan.dense_weights.detach(), dense)
    assert torch.equal(plan.dense_weights > 0, dense > 0)


def test_routes_as_transformers_switch_does() -> None:
    from transformers.models.switch_transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    config = SwitchTransformersConfig(hidden_size=32, num_experts=8, expert_capacity=64, router_jitter_noise=0.1)
    theirs, mine = SwitchTransformersTop1Router(config), SwitchRouter(32, 8, jitter=0.1)
    mine.linear.weight.data.copy_(theirs.classifier.weight)
    x = torch.randn(1, 64, 32)
    for mode in (False, True):
        torch.manual_seed(3)
        chosen, probability, _ = theirs.train(mode)(x.clone())
        torch.manual_seed(3)
        plan = mine.train(mode)(x[0])
        assert torch.equal(plan.expert_ids[:, 0].long(), chosen[0].argmax(-1))
        torch.testing.assert_close(plan.weights, probability[0])


# -- every plan


def routers(d: int = D, e: int = E) -> dict[str, nn.Module]:
    built: dict[str, nn.Module] = {
        "soft": SoftRouter(d, 2, e),
        "masked soft": SoftRouter(d, 2, e, torch.arange(e).expand(2, e) % 2 == torch.tensor([[0], [1]])),
        "top-k": TopKRouter(d, e, 2, renormalize=True),
        "top-k of three tasks": TopKRouter(d, e, 2, num_tasks=3, bias=True),
        "softmax after": TopKRouter(d, e, 2, scoring="softmax_after"),
        "sigmoid": TopKRouter(d, e, 3, scoring="sigmoid", renormalize=True, correction_bias=True),
        "groups": TopKRouter(d, e, 3, scoring="sigmoid", num_groups=3, topk_groups=2, group_score="top2_sum", scale=2.0),
        "softmax groups": TopKRouter(d, e, 3, num_groups=3, topk_groups=2),
        "noisy": NoisyTopKRouter(d, e, 2),
        "gshard sample": GShardRouter(d, e, second="sample"),
        "gshard drop": GShardRouter(d, e, second="drop"),
        "switch": SwitchRouter(d, e, jitter=0.1),
        "top-p": TopPRouter(d, e, 0.7),
        "norm": NormRouter(d, e, 2),
        "expert choice": ExpertChoiceRouter(d, e, 2.0),
        "hash": HashRouter(e),
        "random": RandomRouter(e, 2),
        "task": TaskRouter(9, e, 2),
    }
    nn.init.normal_(built["noisy"].linear.weight, std=0.3)  # type: ignore[arg-type, union-attr]
    return built


NAMES = list(routers())
VARIANT = {"expert choice", "random"}
WITHOUT_GATE = {"hash", "random"}


def inputs(name: str, rows: int, d: int = D) -> Tensor:
    return torch.randint(9, (rows,)) if name in ("hash", "task") else torch.randn(rows, d)


def tensors(plan: Any) -> dict[str, Tensor]:
    return {f.name: value for f in fields(plan) if isinstance(value := getattr(plan, f.name), Tensor)}


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 17])
@pytest.mark.parametrize("name", [name for name in NAMES if "soft" not in name or "after" in name])
def test_what_every_sparse_plan_promises(name: str, rows: int, train: bool) -> None:
    plan = routers()[name].train(train)(inputs(name, rows))
    r, k = plan.expert_ids.shape
    assert r == rows * (3 if "three tasks" in name else 1)
    assert plan.num_experts == E
    assert plan.weights.shape == (r, k)
    ids, order, offsets = plan.expert_ids.flatten().tolist(), plan.order.tolist(), plan.offsets.tolist()
    assert sorted(order) == list(range(r * k))
    assert offsets[0] == 0
    assert offsets[-1] == sum(i >= 0 for i in ids)
    for e in range(E):
        assert order[offsets[e] : offsets[e + 1]] == [slot for slot, i in enumerate(ids) if i == e]
    assert (plan.weights[plan.expert_ids < 0] == 0).all()
    for row in plan.expert_ids.tolist():
        assert len({i for i in row if i >= 0}) == sum(i >= 0 for i in row), "an expert twice in a row"
    assert not plan.dropped.any()


@given(data=st.data())
def test_any_ids_make_a_plan(data: st.DataObject) -> None:
    e, k, r = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4)), data.draw(st.integers(0, 12))
    ids = data.draw(st.lists(st.integers(-1, e - 1), min_size=r * k, max_size=r * k))
    plan = sparse_plan(torch.tensor(ids, dtype=torch.int32).view(r, k), torch.ones(r, k), e)
    order, offsets = plan.order.tolist(), plan.offsets.tolist()
    assert sorted(order) == list(range(r * k))
    assert offsets == [sum(0 <= i < expert for i in ids) for expert in range(e + 1)]
    assert order == [slot for expert in [*range(e), -1] for slot, i in enumerate(ids) if i == expert]
    assert plan.dropped_rows.tolist() == [all(i < 0 for i in ids[row * k : row * k + k]) for row in range(r)]


@given(
    logits=st.lists(st.lists(st.integers(-3, 3), min_size=5, max_size=5), min_size=1, max_size=12),
    k=st.integers(1, 5),
    scoring=st.sampled_from(["softmax", "sigmoid", "softmax_after"]),
)
def test_whole_logits_tie_often_and_the_lowest_index_wins(logits: list[list[int]], k: int, scoring: Any) -> None:
    router = TopKRouter(5, 5, k, scoring=scoring)
    nn.init.eye_(router.linear.weight)
    plan = router(torch.tensor(logits, dtype=torch.float32))
    assert plan.expert_ids.tolist() == [best([float(v) for v in row], k) for row in logits]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", ["top-k", "softmax after", "sigmoid", "gshard sample", "task", "random", "hash"])
def test_combining_what_identity_experts_return_gives_the_input_back(name: str, backend: Backend) -> None:
    # Weights that sum to 1: dispatch and combine must be each other's inverse.
    plan = routers()[name](inputs(name, 23))
    x = torch.randn(23, 4)
    identity = Layer(torch.eye(4).expand(E, 4, 4))
    y = sparse_expert_mlp(x, (identity,), plan.expert_ids, plan.weights, plan.order, plan.offsets, backend=backend)
    torch.testing.assert_close(y.detach(), x)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_GATE])
def test_gradients_reach_the_router(name: str) -> None:
    router = routers()[name]
    plan = router(inputs(name, 12))
    direction = torch.randn_like(plan.weights)
    (plan.weights * direction).sum().backward()
    for parameter in router.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize(
    "build",
    [lambda: TopKRouter(4, 5, 2, renormalize=True), lambda: TopPRouter(4, 5, 0.6), lambda: NormRouter(4, 5, 2)],
    ids=["top-k", "top-p", "norm"],
)
def test_gradients_are_those_of_the_formula(build: Callable[[], nn.Module]) -> None:
    router = build()
    x = torch.randn(6, 4)
    direction = torch.randn(6, 5)
    (router(x).dense_weights * direction).sum().backward()
    weight = router.linear.weight.detach().clone().requires_grad_()
    logits = x @ weight.t()
    chosen = (router(x).dense_weights > 0).detach()
    if isinstance(router, NormRouter):
        dense = torch.nn.functional.softplus(logits) * chosen
    else:
        dense = torch.softmax(logits, 1) * chosen
    if isinstance(router, TopKRouter):
        dense = dense / dense.sum(1, keepdim=True)
    (dense * direction).sum().backward()
    torch.testing.assert_close(router.linear.weight.grad, weight.grad)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"hash", "task"}])
def test_arithmetic_is_fp32_under_autocast_and_for_half_inputs(name: str) -> None:
    router = routers()[name].eval()
    x = torch.randn(8, D).bfloat16()
    torch.manual_seed(5)
    expected = tensors(router(x.float()))
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        got = tensors(router(x))
    assert got.keys() == expected.keys()
    for field, value in got.items():
        assert torch.equal(value, expected[field]), field
        assert value.dtype != torch.bfloat16


# -- a row and its batch


def depends_on_its_batch(route: Callable[[Tensor], Any], victim: Tensor, others: Tensor) -> bool:
    """Whether the victim's part of the plan changes its bits with its place, its company and the number of threads."""
    per_row = ("expert_ids", "weights", "logits")
    threads, reference = torch.get_num_threads(), None
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for rows in (1, 2, 5, 16, 17, 33, 130):
                for crowd in (others[:rows], victim.expand(rows, *victim.shape[1:]), others.flip(0)[:rows]):
                    place = int(torch.randint(rows, (1,)))
                    batch = crowd.clone()
                    batch[place] = victim[0]
                    plan = route(batch)
                    mine = [v.unflatten(0, (rows, -1))[place] for f in per_row if (v := getattr(plan, f, None)) is not None]
                    if reference is None:
                        reference = mine
                    if not all(torch.equal(a, b) for a, b in zip(mine, reference, strict=True)):
                        return True
    finally:
        torch.set_num_threads(threads)
    return False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [7, 1100], ids=["narrow", "wide enough for BLAS to split"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_rows_plan_is_the_same_bits_in_every_batch(name: str, d: int, dtype: torch.dtype) -> None:
    router = routers(d)[name].eval()
    batch = inputs(name, 131, d)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    assert depends_on_its_batch(router, batch[:1], batch[1:]) == (not router.batch_invariant)
    assert router.batch_invariant == (name not in VARIANT)


@torch.no_grad()
def test_capacity_makes_a_row_depend_on_its_batch() -> None:
    # The negative control: if this passed unnoticed, the test above would see nothing.
    router = TopKRouter(D, E, 2).eval()
    batch = torch.randn(131, D)
    assert depends_on_its_batch(lambda x: apply_capacity(router(x), 1.0), batch[:1], batch[1:])
    assert not depends_on_its_batch(router, batch[:1], batch[1:])


def test_serving_refuses_what_depends_on_the_batch() -> None:
    for name, router in routers().items():
        if name in VARIANT:
            with pytest.raises(ValueError, match=rf"a\.b \({type(router).__name__}\).*batch_invariant"):
                require_invariant(nn.ModuleDict({"a": nn.ModuleDict({"b": router})}).eval())
        else:
            require_invariant(router.eval())
            with pytest.raises(ValueError, match=r"the model .* training mode.*\.eval\(\)"):
                require_invariant(router.train())

    class Capped(nn.Module):
        capacity_factor = 1.25

    with pytest.raises(ValueError, match=r"capacity_factor 1\.25.*None"):
        require_invariant(Capped().eval())
    Capped.capacity_factor = None  # type: ignore[assignment]
    require_invariant(Capped().eval())


# -- compiled and exported


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_break(name: str, train: bool) -> None:
    router = routers()[name].train(train)
    x = inputs(name, 12)
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    with torch.set_grad_enabled(train):  # at inference the gate goes another way
        torch.manual_seed(4)
        expected = router(x)
        torch.manual_seed(4)
        got = compiled(x)
    torch.compiler.reset()
    assert type(got) is type(expected)
    assert tensors(got).keys() == tensors(expected).keys()
    for field, value in tensors(got).items():
        assert torch.equal(value, tensors(expected)[field]), field


def test_capacity_compiles_without_a_break() -> None:
    router = TopKRouter(D, E, 2)

    def route(x: Tensor) -> SparsePlan:
        return apply_capacity(router(x), 1.0, "weight")

    x = torch.randn(12, D)
    got, expected = torch.compile(route, fullgraph=True, backend="eager")(x), route(x)
    torch.compiler.reset()
    assert got.dropped.any()
    assert torch.equal(got.expert_ids, expected.expert_ids)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in VARIANT])
@torch.no_grad()
def test_exports_with_any_number_of_rows(name: str) -> None:
    router = routers()[name].eval()
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(router, (inputs(name, 12),), dynamic_shapes=({0: rows},))
    for number in (5, 40):
        x = inputs(name, number)
        got, expected = program.module()(x), router(x)
        assert type(got) is type(expected)
        for field, value in tensors(got).items():
            torch.testing.assert_close(value, tensors(expected)[field], msg=field)


# -- bad input


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: TopKRouter(4, 3, 4), r"k is 4, but there are 3 experts.*1 ≤ k ≤ 3"),
        (lambda: TopKRouter(4, 3, 0), r"k is 0"),
        (lambda: NoisyTopKRouter(4, 3, 4), r"k is 4"),
        (lambda: NormRouter(4, 3, 4), r"k is 4"),
        (lambda: RandomRouter(3, 4), r"k is 4"),
        (lambda: TaskRouter(2, 3, 4), r"k is 4"),
        (lambda: GShardRouter(4, 1, second="drop"), r"k is 2, but there are 1 experts"),
        (lambda: GShardRouter(4, 2, second="maybe"), r"'maybe'.*'sample', 'drop'"),  # type: ignore[arg-type]
        (lambda: TopKRouter(4, 6, 1, num_groups=4), r"num_groups is 4.*6 experts"),
        (lambda: TopKRouter(4, 6, 1, num_groups=3, topk_groups=4), r"topk_groups is 4, not 1 … 3"),
        (lambda: TopKRouter(4, 6, 3, num_groups=3, topk_groups=1), r"k is 3, but 1 groups of 2 experts hold 2"),
        (lambda: TopKRouter(4, 3, 1, num_groups=3, group_score="top2_sum"), r"top2_sum.*groups have 1"),
        (lambda: TopKRouter(4, 6, 1, group_score="mean"), r"group_score is 'mean'; valid: 'max', 'top2_sum'"),  # type: ignore[arg-type]
        (lambda: TopKRouter(4, 6, 1, scoring="tanh"), r"scoring is 'tanh'; valid: softmax"),  # type: ignore[arg-type]
        (lambda: HashRouter(0), r"there are 0 experts"),
        (lambda: SwitchRouter(4, 0), r"4 inputs, 0 experts and 1 tasks: each must be at least 1"),
        (lambda: SwitchRouter(4, 3, jitter=1.0), r"jitter is 1\.0, not in \[0, 1\)"),
        (lambda: TopPRouter(4, 3, 0.0), r"p is 0\.0, not in \(0, 1\]"),
        (lambda: TopPRouter(4, 3, 1.5), r"p is 1\.5"),
        (lambda: TopPRouter(4, 3, math.nan), r"p is nan"),
        (lambda: ExpertChoiceRouter(4, 3, 0.0), r"capacity_factor is 0\.0.*> 0"),
        (lambda: SoftRouter(4, 2, 3, torch.ones(2, 4, dtype=torch.bool)), r"\[2, 4\], not bool \[T, E\] = \[2, 3\]"),
        (lambda: SoftRouter(4, 2, 3, torch.ones(2, 3)), r"torch\.float32.*not bool"),
        (lambda: SoftRouter(4, 2, 3, torch.tensor([[True] * 3, [False] * 3])), r"task 1 no expert"),
    ],
)
def test_a_router_that_cannot_be_is_refused(build: Callable[[], nn.Module], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"hash", "random", "task"}])
def test_logits_that_are_not_finite_are_refused_and_the_row_is_named(name: str, value: float) -> None:
    x = torch.randn(5, D)
    x[3, 2] = value
    row = 9 if "three tasks" in name else 3
    with pytest.raises(ValueError, match=f"row {row}"):
        routers()[name](x)


@pytest.mark.parametrize("x", [torch.zeros(2, 5), torch.zeros(2, 1, 4), torch.zeros(2, 4, dtype=torch.int64)])
def test_an_input_of_the_wrong_shape_or_dtype_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"not floating-point \[B, D\] with D = 4"):
        Gate(4, 3)(x)


@pytest.mark.parametrize(
    ("x", "sources"),
    [
        (torch.zeros(2, 3, 2), ()),
        (torch.zeros(2, 3, 2), ((0, 1),)),  # 2 wide, not 4
        (torch.zeros(2, 3, 2), ((0, 1, 2), (0, 1, 2))),  # three gates of two
        (torch.zeros(2, 3, 2, dtype=torch.int64), ((0, 1), (2, 2))),
        (torch.zeros(2, 4), ((0, 0),)),
    ],
)
def test_an_input_that_does_not_fit_its_sources_is_refused(x: Tensor, sources: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"with sources of .* gates: it must be .* sources of 2 gates, 4 wide together"):
        SoftRouter(4, 2, 3)(x, *sources)


def test_inputs_of_several_sources_are_fp32_under_autocast() -> None:
    router, x, sources = SoftRouter(4, 2, 3), torch.randn(8, 3, 2).bfloat16(), ((0, 1), (2, 2))
    expected = router(x.float(), *sources).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = router(x, *sources).logits
    assert torch.equal(got, expected)


def test_ids_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float32 \[2\], not int32 or int64 \[R\]"):
        HashRouter(3)(torch.zeros(2))
    for bad in (-1, 2):
        with pytest.raises(ValueError, match=rf"task id {bad} is not in 0 … 1"):
            TaskRouter(2, 3, 1)(torch.tensor([0, bad]))
    with pytest.raises(ValueError, match="no logits"):
        _ = HashRouter(3)(torch.zeros(2, dtype=torch.int64)).probabilities
