"""Expert health: against loops over experts and tasks, and where the anomalies are made on purpose."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.config import conf_dir
from recsys_moe.heads import Heads
from recsys_moe.health import Finding, Health, HealthConfig, Monitor, WatchedPlan, find_anomalies, measure, probe_rows
from recsys_moe.models import MODELS
from recsys_moe.models.adatt import AdaTTConfig
from recsys_moe.models.aitm import AITMConfig
from recsys_moe.models.esmm import ESMMConfig
from recsys_moe.models.home import HoMEConfig
from recsys_moe.models.mmoe import MMoE, MMoEConfig
from recsys_moe.models.ple import PLE, PLEConfig
from recsys_moe.models.shared_bottom import SharedBottomConfig
from recsys_moe.models.single_task import SingleTaskConfig
from recsys_moe.models.stem import STEMConfig
from recsys_moe.pictures import draw_plan, drawing, render
from recsys_moe.routing import NormRouter
from recsys_moe.schema import BinaryTask, Categorical, Schema, load_schema
from recsys_moe.shards import PreparedData
from recsys_moe.synth import synthesise
from recsys_moe.trainer import TrainConfig, Trainer
from recsys_moe.transforms import Statistics

TASKS = ("click", "like", "share")
LIMITS = HealthConfig()
MMOE = MMoEConfig(embedding_dim=4, num_experts=4, expert_dims=(6, 5), tower_dims=(16,), dropout=0.1)
FAMILIES: dict[str, Any] = {
    "mmoe": MMOE,
    "topk": replace(MMOE, gate="topk", top_k=2),
    "omoe": replace(MMOE, name="omoe"),
    "ple": PLEConfig(embedding_dim=4, expert_dims=(8,), tower_dims=(16,)),
    "adatt": AdaTTConfig(embedding_dim=4, expert_dims=(8,), tower_dims=(16,)),
    "home": HoMEConfig(embedding_dim=4, expert_dims=(8,), tower_dims=(16,)),
    "shared_bottom": SharedBottomConfig(embedding_dim=4, bottom_dims=(8,), tower_dims=(16,)),
    "single_task": SingleTaskConfig(embedding_dim=4, bottom_dims=(8,), tower_dims=(16,)),
    "esmm": ESMMConfig(embedding_dim=4, conversions={"like": "click"}, bottom_dims=(8,), tower_dims=(16,)),
    "aitm": AITMConfig(embedding_dim=4, chain=("click", "like"), bottom_dims=(8,), tower_dims=(16,)),
    "stem": STEMConfig(embedding_dim=4, expert_dims=(8,), tower_dims=(16,)),
}
# What names tasks, for those of `prepared_clicks`.
OF_CLICKS: dict[str, Any] = {
    "home": {"categories": {"click": "a", "buy": "b"}},
    "esmm": {"conversions": {"buy": "click"}},
    "aitm": {"chain": ("click", "buy")},
}


def heads(tasks: tuple[str, ...] = TASKS) -> Heads:
    schema = Schema((Categorical("c", "categorical"),), tuple(BinaryTask(task, f"y{i}") for i, task in enumerate(tasks)))
    return Heads(schema, Statistics((), ()))


def network(config: Any, tasks: tuple[str, ...] = TASKS, width: int = 7) -> Any:
    torch.manual_seed(0)
    return MODELS[type(config)](config, width, dict.fromkeys(tasks, 1), torch.float32).eval()


def rows(tasks: int = len(TASKS), count: int = 50, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(count, width, generator=random)
    labels = (torch.rand(count, tasks, generator=random) < 0.4).float()
    return x, labels, (torch.rand(count, tasks, generator=random) < 0.8).float()


def inputs_of(net: Any, x: Tensor, tasks: tuple[str, ...] = TASKS) -> Tensor:
    """The rows as the family reads them: once for each of its embedding sets."""
    sets = len(net.embedding_sets(dict.fromkeys(tasks, 1)))
    return x if sets == 1 else x.unsqueeze(1).repeat(1, sets, 1)


def looked_at(net: Any, tasks: tuple[str, ...] = TASKS) -> Health:
    x, labels, observed = rows(len(tasks))
    return measure(net, heads(tasks), inputs_of(net, x, tasks), labels, observed)


# ---- against naive mathematics -------------------------------------------------------------------------------------------


def naive_mmoe(net: MMoE, x: Tensor, top_k: int | None) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Each expert's outputs, the gates' weights and each task's logits, by a loop over rows' experts and tasks."""
    experts, norms = net.experts, net.experts.norms
    assert experts.biases is not None
    assert norms is not None
    outputs = []
    for e in range(MMOE.num_experts):
        h = x
        for layer in range(2):
            norm: Any = norms[layer]
            z = h @ experts.weights[layer][e].t() + experts.biases[layer][e]
            z = (z - norm.running_mean[e]) / torch.sqrt(norm.running_var[e] + norm.eps) * norm.weight[e] + norm.bias[e]
            h = torch.where(z > 0, z, 0.0)
        outputs.append(h)
    logits = F.linear(x, net.router.linear.weight, net.router.linear.bias).view(len(x), len(TASKS), MMOE.num_experts)
    if top_k is not None:
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(2, logits.topk(top_k, 2).indices, True)
        logits = logits.masked_fill(~kept, -math.inf)
    weights = logits.softmax(2)
    mixed = [sum(weights[:, t, e, None] * outputs[e] for e in range(MMOE.num_experts)) for t in range(len(TASKS))]
    return outputs, weights, list(net.towers(torch.stack(mixed, 1)).unbind(1))


@pytest.mark.parametrize("gate", ["softmax", "topk"])
def test_every_figure_is_a_loops(gate: Any) -> None:
    net = network(FAMILIES["mmoe" if gate == "softmax" else "topk"])
    for norm in net.experts.norms:  # moments as training leaves them
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x, labels, observed = rows()
    plan = measure(net, heads(), x, labels, observed).plans["experts"]
    cosine = measure(net, heads(), x, labels, observed).cosine
    x = x.clone().requires_grad_()
    outputs, weights, logits = naive_mmoe(net, x, None if gate == "softmax" else 2)
    at_x, lengths = [], np.zeros((len(TASKS), MMOE.num_experts))
    for t in range(len(TASKS)):
        losses = F.binary_cross_entropy_with_logits(logits[t], labels[:, t], reduction="none")
        mean = losses[observed[:, t] > 0].mean()
        *at_experts, of_x = torch.autograd.grad(mean, [*outputs, x], retain_graph=True)
        at_x.append(of_x.flatten())
        lengths[t] = [g.norm().item() for g in at_experts]
    np.testing.assert_allclose(plan.gradient, lengths, rtol=1e-4, atol=1e-7)
    for a in range(len(TASKS)):
        for b in range(len(TASKS)):
            expected = (at_x[a] @ at_x[b] / at_x[a].norm() / at_x[b].norm()).item()
            assert cosine[a, b] == pytest.approx(expected, abs=1e-5)
    for e, y in enumerate(outputs):
        values = y.detach().numpy().astype(float)
        assert plan.zero[e] == pytest.approx((values == 0).mean())
        assert plan.dead[e] == pytest.approx((values == 0).all(0).mean())
        assert plan.mean[e] == pytest.approx(values.mean(), rel=1e-4)
        assert plan.variance[e] == pytest.approx(values.var(0).mean(), rel=1e-4)
    w = weights.detach().numpy().astype(float)
    np.testing.assert_allclose(plan.weight, w.mean(0), atol=1e-6)
    np.testing.assert_allclose(plan.deviation, w.std(0), atol=1e-5)
    entropy = -(w * np.log(np.where(w > 0, w, 1))).sum(2).mean(0)
    np.testing.assert_allclose(plan.entropy, entropy, atol=1e-5)
    np.testing.assert_allclose(plan.holding, w.mean(0) / w.mean(0).sum(0), atol=1e-6)
    assert np.isnan(plan.own_weight).all()  # MMoE's experts are everybody's


def test_no_family_is_left_out() -> None:
    assert {type(config) for config in FAMILIES.values()} == set(MODELS)


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_changes_no_output_of_any_family(family: str) -> None:
    net = network(FAMILIES[family])
    x, labels, observed = rows()
    x = inputs_of(net, x)
    with torch.no_grad():
        expected = net(x)[0]
    seen: list[Tensor] = []
    handle = net.towers.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    health = measure(net, heads(), x, labels, observed)
    handle.remove()
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    assert set(health.plans) == set(net.plan_names)
    assert not any(module._forward_hooks for module in net.modules())
    with torch.no_grad():
        assert torch.equal(net(x)[0], expected)
    np.testing.assert_allclose(np.diag(health.cosine), 1, atol=1e-6)
    for name, plan in health.plans.items():
        gates, experts = len(net.plan_names[name].gates), len(net.plan_names[name].experts)
        assert plan.weight.shape == plan.sees.shape == (gates, experts)
        assert plan.gradient.shape == (len(TASKS), experts)
        np.testing.assert_allclose(plan.weight.sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(plan.share.sum(1), 1, atol=1e-5)
        assert not plan.weight[~plan.sees].any()
    again = Health.from_json(health.to_json())
    assert again.metrics() == health.metrics()


def test_own_experts_are_told_by_their_names() -> None:
    plans = looked_at(network(FAMILIES["ple"])).plans
    first, last = plans["level 1"], plans["level 2"]
    assert first.gates == ("shared", *TASKS)
    assert first.owners == [None, None, 1, 1, 2, 2, 3, 3]
    assert last.owners == [None, None, 0, 0, 1, 1, 2, 2]
    np.testing.assert_allclose(first.even_own_weight, [0, 0.5, 0.5, 0.5])
    assert np.isnan(first.own_weight[0])
    np.testing.assert_allclose(last.own_weight, [last.weight[t, 2 + 2 * t : 4 + 2 * t].sum() for t in range(3)], atol=1e-6)
    # Shared experts are held by tasks: the shared stream's own gate is none.
    assert np.isnan(first.holding[0]).all()
    np.testing.assert_allclose(first.holding[1:, :2].sum(0), 1)
    assert np.isnan(first.holding[:, 2:]).all()


def test_residual_weights_count_for_a_tasks_own_experts() -> None:
    # AdaTT's residual starts at 1/n of its n own experts: half of all weight, beside what the gate gives.
    plan = looked_at(network(FAMILIES["adatt"])).plans["level 1"]
    for t in range(3):
        assert plan.own_weight[t] == pytest.approx((1 + plan.weight[t, 2 * t : 2 * t + 2].sum()) / 2, abs=1e-5)


def test_a_norm_routers_experts_are_scaled_as_it_asks() -> None:
    router, outputs = NormRouter(4, num_experts=3, k=2), torch.randn(6, 3, 5)
    plan = router(torch.randn(6, 4))
    mixed = WatchedPlan.watch(plan, 6).mix(outputs)
    for b in range(6):
        expected = sum(
            w * outputs[b, e] / outputs[b, e].norm() for e, w in zip(plan.expert_ids[b].tolist(), plan.weights[b], strict=True)
        )
        torch.testing.assert_close(mixed[b, 0], expected)


def test_metrics_have_names_of_their_own() -> None:
    metrics = looked_at(network(FAMILIES["home"])).metrics()
    assert {"health.meta.shared_0.dead", "health.task.like_1.gradient.share", "health.task.entropy.click"} <= set(metrics)
    assert {"health.task.own_weight.like", "health.cosine.click.share", "health.task.shared_0.held"} <= set(metrics)
    assert "health.task.like_0.weight.share" not in metrics  # the gate of `share` does not see it
    assert all(math.isfinite(value) for value in metrics.values())


class OwnMeans(MMoE):
    """An MMoE that mixes by a product of its own."""

    def forward(self, x: Tensor) -> Any:
        plan = self.router(x)
        return self.towers(torch.bmm(plan.weights, self.experts(x))), {"experts": plan}


def test_experts_that_are_mixed_by_other_means_are_found() -> None:
    torch.manual_seed(0)
    net = OwnMeans(MMOE, 7, dict.fromkeys(TASKS, 1), torch.float32).eval()
    assert looked_at(net).metrics() == pytest.approx(looked_at(network(MMOE)).metrics(), rel=1e-4, abs=1e-6)


def test_what_can_not_be_told_is_not_judged() -> None:
    class Twice(OwnMeans):
        """Two stacks of as many experts, of which nobody says which one the plan mixes."""

        def forward(self, x: Tensor) -> Any:
            self.experts(x)
            return super().forward(x)

    torch.manual_seed(0)
    health = looked_at(Twice(MMOE, 7, dict.fromkeys(TASKS, 1), torch.float32).eval())
    plan, known = health.plans["experts"], looked_at(network(MMOE)).plans["experts"]
    for figures in (plan.zero, plan.dead, plan.mean, plan.variance, plan.gradient):
        assert np.isnan(figures).all()
    np.testing.assert_allclose(plan.weight, known.weight)
    assert not np.isnan(health.cosine).any()
    assert not find_anomalies(health, LIMITS)
    assert "health.experts.expert_0.weight.click" in health.metrics()
    with drawing():
        assert render(draw_plan("experts", plan, TASKS)).startswith(b"\x89PNG")


# ---- anomalies where they are made ---------------------------------------------------------------------------------------


def anomalies(net: Any, limits: HealthConfig = LIMITS) -> dict[str, Finding]:
    """The findings by the experts that they name."""
    return {f"{f.anomaly} {' '.join(f.experts)}": f for f in find_anomalies(looked_at(net), limits)}


def plain_mmoe(**keys: Any) -> Any:
    """ReLU experts without a norm, gates that weigh them all alike."""
    net = network(replace(MMOE, norm="none", expert_dims=(16,), **keys))
    nn.init.zeros_(net.router.linear.weight)
    nn.init.zeros_(net.router.linear.bias)
    return net


@torch.no_grad()
def prefer(net: Any, gate: int, expert: int, by: float = 20.0) -> None:
    """Let a gate of an MMoE choose one expert, whatever the row."""
    net.router.linear.bias.view(len(TASKS), MMOE.num_experts)[gate, expert] += by


def test_a_sound_model_is_not_warned_of() -> None:
    assert not anomalies(plain_mmoe())
    for family, config in FAMILIES.items():
        assert not anomalies(network(config)), family


@pytest.mark.parametrize("gate", ["softmax", "topk"])
def test_a_dead_relu_expert_has_collapsed(gate: Any) -> None:
    net = plain_mmoe(gate=gate)
    with torch.no_grad():
        net.experts.biases[0][2] = -100
    plan = looked_at(net).plans["experts"]
    assert (plan.zero[2], plan.dead[2], plan.mean[2], plan.variance[2]) == (1, 1, 0, 0)
    assert (plan.zero[[0, 1, 3]] < 0.9).all()
    finding = anomalies(net)["collapse expert 2"]
    assert "expert 'expert 2' of 'experts' has collapsed: 100% of its activations are zero" in finding.message
    assert "model.norm=batch" in finding.message
    assert [f for f in anomalies(net) if f.startswith("collapse")] == ["collapse expert 2"]


def test_an_expert_that_no_row_moves_has_collapsed() -> None:
    net = plain_mmoe()
    with torch.no_grad():
        net.experts.weights[0][1] *= 0.01
        net.experts.biases[0][1] = 3.0
    plan = looked_at(net).plans["experts"]
    assert plan.zero[1] == 0
    assert "hardly with the row" in anomalies(net)["collapse expert 1"].message


def test_an_expert_held_by_one_task_is_degraded() -> None:
    net = plain_mmoe()
    prefer(net, gate=1, expert=3)  # `like` takes expert 3 …
    for gate in (0, 2):
        prefer(net, gate, expert=3, by=-20)  # … and the others leave it
    plan = looked_at(net).plans["experts"]
    assert plan.holding[1, 3] > 0.99
    assert plan.entropy[1] == pytest.approx(0, abs=1e-5)
    assert plan.entropy[0] == pytest.approx(math.log(3), abs=1e-5)
    finding = anomalies(net)["degradation expert 3"]
    assert "expert 'expert 3' of 'experts' is held by 'like' alone: it gives 100% of the expert's" in finding.message
    assert not [f for f in anomalies(net, replace(LIMITS, held=1.0)) if f.startswith("degradation")]


def test_an_expert_that_nobody_uses_is_not_held_but_learns_nothing() -> None:
    net = plain_mmoe()
    for gate in range(3):
        prefer(net, gate, expert=0, by=-20 - gate)  # `click` uses it least little
    found = anomalies(net)
    assert set(found) == {"underfitting expert 0"}
    assert "learns nothing" in found["underfitting expert 0"].message


def test_a_task_that_leaves_its_own_experts_aside_is_underfitted() -> None:
    net = network(PLEConfig(expert_dims=(8,), levels=1, name="cgc"))
    gates = net.levels[0].router.linear.bias.view(3, 4)  # of each task: shared 0, shared 1, its own 0, its own 1
    with torch.no_grad():
        net.levels[0].router.linear.weight.zero_()
        gates[1] = torch.tensor([0.0, 0.0, -20.0, -20.0])
    plan = looked_at(net).plans["level 1"]
    assert plan.own_weight[1] < 1e-6
    finding = anomalies(net)["underfitting like 0 like 1"]
    assert "'like' leaves its own experts 'like 0' and 'like 1' of 'level 1' aside" in finding.message
    assert "it gives them 0.0% of its weight (even: 50%, limit 10.0%)" in finding.message
    assert "loss_weight" in finding.message


def test_a_gradient_that_does_not_reach_a_tasks_own_experts_is_underfitting() -> None:
    net = network(PLEConfig(expert_dims=(8,), tower_dims=(16,), levels=1, name="cgc"))
    with torch.no_grad():
        net.levels[0].router.linear.bias.view(3, 4)[1, 2:] = -6.0
    plan = looked_at(net).plans["level 1"]
    own = np.sqrt((plan.gradient_share[1, 4:6] ** 2).sum())
    assert own < 0.01 < np.sqrt((plan.gradient_share[0, 2:4] ** 2).sum())
    finding = anomalies(net, replace(LIMITS, own_weight=0.0))["underfitting like 0 like 1"]
    assert f"sends them {own:.2%} of the length of its gradient (limit 1%)" in finding.message


def test_a_gradient_that_exploded_has_no_shares() -> None:
    plan = looked_at(plain_mmoe()).plans["experts"]
    exploded = replace(plan, gradient=np.where(np.arange(len(TASKS))[:, None] == 1, np.inf, plan.gradient))
    share = exploded.gradient_share
    assert np.isnan(share[1]).all()
    np.testing.assert_allclose((share[[0, 2]] ** 2).sum(1), 1, rtol=1e-5)


def test_a_task_that_no_row_observes_is_not_judged() -> None:
    net = network(FAMILIES["ple"])
    x, labels, observed = rows()
    observed[:, 1] = 0
    health = measure(net, heads(), x, labels, observed)
    assert np.isnan(health.plans["level 2"].gradient[1]).all()
    assert not np.isnan(health.plans["level 2"].gradient[[0, 2]]).any()
    assert not find_anomalies(health, LIMITS)
    assert Health.from_json(health.to_json()).metrics() == health.metrics()


def test_a_task_that_learns_nothing_has_no_gradient_anywhere() -> None:
    class Detached(PLE):
        def forward(self, x: Tensor) -> Any:
            level: Any = self.levels[0]
            plan = level.router(x)
            click, like, share = plan.mix(level.experts(x)).unbind(1)
            return self.towers(torch.stack([click, like.detach(), share], 1)), {"level 1": plan}

    torch.manual_seed(0)
    net = Detached(PLEConfig(expert_dims=(8,), tower_dims=(16,), levels=1), 7, dict.fromkeys(TASKS, 1), torch.float32).eval()
    health = looked_at(net)
    assert not health.plans["level 1"].gradient[1].any()
    assert np.isnan(health.cosine[1]).all()
    assert "sends them 0.00% of the length of its gradient" in anomalies(net)["underfitting like 0 like 1"].message


# ---- in training ---------------------------------------------------------------------------------------------------------


def train(data: PreparedData, model: Any, **health: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    # More looks than any run needs, so that whatever they might change is changed often.
    settings = {"rows": 64, "probes": 18, "budget": 1e9} | health
    trainer = Trainer(data, model, TrainConfig(epochs=2, batch_size=128, health=HealthConfig(**settings)), events.append)
    trainer.fit()
    return trainer, events


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """All that training goes on from."""
    return trainer._tensors() | trainer.model.adagrad()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_same_bit_for_bit_whoever_looks(family: str, prepared_clicks: PreparedData) -> None:
    model = replace(FAMILIES[family], dropout=0.3)
    model = replace(model, **OF_CLICKS.get(family, {}))
    watched, events = train(prepared_clicks, model)
    alone, quiet = train(prepared_clicks, model, rows=0)
    looks = [e for e in events if e["kind"] == "health"]
    assert len(looks) > 5
    assert not [e for e in quiet if e["kind"] == "health"]
    expected = everything(alone)
    for name, value in everything(watched).items():
        assert torch.equal(value, expected[name]), name
    losses = [[e["train.loss"] for e in told if e["kind"] == "epoch"] for told in (events, quiet)]
    assert losses[0] == losses[1]


def test_looks_are_spread_over_the_run_and_the_last_is_of_the_weights_that_are_kept(prepared_clicks: PreparedData) -> None:
    trainer, events = train(prepared_clicks, MMOE, probes=6)
    looks = [e for e in events if e["kind"] == "health"]
    assert [e["step"] for e in looks] == [3, 6, 9, 12, 15, 18]  # 18 steps in all
    batch = probe_rows(prepared_clicks, "validation", 64)
    with torch.no_grad():
        x = trainer.model.represent(batch.ids_bf, batch.dense_bd, batch.lists)
    expected = measure(trainer.model.eval().network, trainer.heads, x, batch.labels_bt, batch.weights_bt)
    assert Health.from_json(looks[-1]["health"]).metrics() == pytest.approx(expected.metrics(), rel=1e-5)


def test_looks_keep_to_their_share_of_the_time(prepared_clicks: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = [0.0], []
    trainer = Trainer(prepared_clicks, MMOE, TrainConfig())
    monitor = Monitor(prepared_clicks, trainer.heads, HealthConfig(probes=100, budget=0.01), 1, lambda event: None)
    monkeypatch.setattr("recsys_moe.health.time.perf_counter", lambda: clock[0])

    def slow(model: Any) -> None:
        clock[0] += 1.0  # a look takes a second, a step of training two

    monkeypatch.setattr(monitor, "_measure", slow)
    for step in range(1, 1000):
        if monitor.look(trainer.model, step, 1000, 2.0 * step):
            looks.append(step)
    assert monitor.look(trainer.model, 1000, 1000, 2000.0, final=True) == 1.0
    assert (looks[0], len(looks)) == (10, 20)  # 1 % of 1998 s
    assert all(len([s for s in looks if s <= step]) <= 1 + 0.01 * 2 * step for step in looks)


def test_a_warning_comes_once_a_run_and_expert(prepared_clicks: PreparedData) -> None:
    model = replace(MMOE, norm="none", expert_dims=(8,), dropout=0.0)
    events: list[dict[str, Any]] = []
    trainer = Trainer(prepared_clicks, model, TrainConfig(health=HealthConfig(probes=1000, budget=1e9)), events.append)
    with torch.no_grad():
        trainer.model.network.experts.biases[0][1] = -1000  # type: ignore[union-attr,index]
    for step in range(1, 4):
        trainer.health.look(trainer.model, step, 4, 1e9)
    told = [e for e in events if e["kind"] == "warning"]
    collapsed = [e for e in told if e["anomaly"] == "collapse"]
    assert [(e["plan"], e["experts"]) for e in collapsed] == [("experts", ["expert 1"])]
    assert collapsed[0]["message"].startswith("step 1: expert 'expert 1' of 'experts' has collapsed: 100%")
    assert len([e for e in events if e["kind"] == "health"]) == 3


def test_all_three_anomalies_are_told_in_training_on_the_feed(tmp_path: Any, write_prepared: Any) -> None:
    synthesise(tmp_path / "feed", 3000, 0)
    logs = pq.read_table(tmp_path / "feed" / "logs")
    schema = load_schema(conf_dir() / "schema" / "short_video.yaml").select_tasks(("effective_view", "like", "follow"))
    data = write_prepared(tmp_path / "prepared", schema, {"train": [logs.slice(0, 2000)], "validation": [logs.slice(2000)]})
    model = PLEConfig(embedding_dim=4, levels=1, task_experts=1, expert_dims=(16,), norm="none", dropout=0.0)
    events: list[dict[str, Any]] = []
    # A learning rate at which what is made here lasts.
    trainer = Trainer(data, model, TrainConfig(epochs=1, batch_size=500, lr=1e-4), events.append)
    level: Any = trainer.model.network.levels[0]  # type: ignore[union-attr,index]
    with torch.no_grad():
        level.experts.biases[0][2] = -100  # the expert of `effective_view` is dead
        # Of each task: shared 0, shared 1, its own. `effective_view` has shared 1 to itself, `follow` leaves its own aside.
        level.router.linear.bias.copy_(torch.tensor([[0, 2, 2], [0, -5, 0], [0, -5, -8]]).flatten())
    trainer.fit()
    told = [(e["anomaly"], tuple(e["experts"])) for e in events if "anomaly" in e]
    assert told == [
        ("collapse", ("effective_view 0",)),
        ("degradation", ("shared 1",)),
        ("underfitting", ("follow 0",)),
    ]


def test_probe_rows_are_spread_over_the_shards(
    tmp_path: Any, write_prepared: Any, clicks_schema: Any, clicks: Callable[..., Any]
) -> None:
    parts = {"train": [clicks(10)], "validation": [clicks(500, 1), clicks(300, 2), clicks(200, 3)]}
    data = write_prepared(tmp_path / "prepared", clicks_schema, parts)
    numbers = probe_rows(data, "validation", 100, runs=10).numbers_b.tolist()
    assert numbers == [start + i for start in range(0, 1000, 100) for i in range(10)]
    assert probe_rows(data, "validation", 5000).numbers_b.tolist() == list(range(1000))
    several = probe_rows(data, "validation", 333, runs=7)
    assert len(set(several.numbers_b.tolist())) == len(several) == 333


def test_a_familys_own_objective_is_what_its_gradients_are_of() -> None:
    """ESMM trains a conversion through the product with its click: on rows without a click, too."""
    net = network(FAMILIES["esmm"])
    x, labels, observed = rows()
    observed[:, 1] = observed[:, 0] * labels[:, 0]  # a conversion is observed after a click
    found = measure(net, heads(), x, labels, observed).cosine
    x = x.requires_grad_()
    outputs = net(x)[0]
    losses, weights = net.objective(outputs, heads().losses(outputs, labels), labels, observed)
    assert weights[:, 1].sum() > observed[:, 1].sum()
    at_x = [torch.autograd.grad((losses * weights)[:, t].sum() / weights[:, t].sum(), x, retain_graph=True)[0] for t in (0, 1)]
    assert found[0, 1] == pytest.approx(F.cosine_similarity(*(g.flatten() for g in at_x), dim=0).item(), abs=1e-5)
