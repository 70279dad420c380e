"""What models cost, against counting by hand; models made equally large."""

from typing import Any

import pytest

from recsys_moe.costs import cost_of, scaled, to_budget
from recsys_moe.errors import UserError
from recsys_moe.models.home import HoMEConfig
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.models.shared_bottom import SharedBottomConfig


def test_mmoe_costs_what_its_layers_say(prepared_clicks: Any) -> None:
    t = prepared_clicks.transform
    config = MMoEConfig(num_experts=3, expert_dims=(10, 6), tower_dims=(5,), norm="none", embedding_dim=4)
    d = len(t.sparse_names) * 4 + len(t.dense_names)
    found = cost_of(config, t, {"click": 1, "buy": 1})
    experts = 3 * (d * 10 + 10 * 6)
    gates, towers = 2 * d * 3, 2 * (6 * 5 + 5 * 1)
    assert found.flops == 2 * (experts + gates + towers + 2 * 3 * 6)  # and mixing
    assert found.params == experts + gates + towers + 3 * (10 + 6) + 2 * 3 + 2 * (5 + 1)


def test_sparse_gates_cost_their_chosen_experts_only(prepared_clicks: Any) -> None:
    t, widths = prepared_clicks.transform, {"click": 1, "buy": 1}
    of = [cost_of(MMoEConfig(num_experts=n, gate="topk", top_k=1), t, widths) for n in (8, 32)]
    dense = cost_of(MMoEConfig(num_experts=32), t, widths)
    assert of[1].params > 3 * of[0].params
    assert of[1].flops < 1.2 * of[0].flops < dense.flops


@pytest.mark.parametrize("budget", ["params", "flops"])
def test_models_are_made_equally_large(budget: Any, prepared_clicks: Any) -> None:
    t, widths = prepared_clicks.transform, {"click": 1, "buy": 1}
    configs = {"home": HoMEConfig(), "mmoe": MMoEConfig(), "bottom": SharedBottomConfig()}
    equal = to_budget(configs, budget, "mmoe", lambda config: cost_of(config, t, widths))
    assert equal["mmoe"] == configs["mmoe"]
    assert equal["home"] != configs["home"]
    costs = [getattr(cost_of(config, t, widths), budget) for config in equal.values()]
    assert max(costs) / min(costs) < 1.06
    assert to_budget(configs, "none", "mmoe", lambda config: cost_of(config, t, widths)) == configs


def test_what_no_width_brings_there_is_said(prepared_clicks: Any) -> None:
    t, widths = prepared_clicks.transform, {"click": 1, "buy": 1}
    configs = {"mmoe": MMoEConfig(num_experts=1, expert_dims=(1,)), "huge": MMoEConfig(tower_dims=(4096, 4096))}
    with pytest.raises(UserError, match="'huge' can't be made to cost"):
        to_budget(configs, "params", "mmoe", lambda config: cost_of(config, t, widths))
    assert scaled(MMoEConfig(expert_dims=(64, 32)), 0.5).expert_dims == (32, 16)
