"""Crosses and target attention against loops on the same parameters, alone and before a family in a ranker."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys_moe.bundle import FORMAT, BundleConfig, save_bundle
from recsys_moe.embeddings import JaggedTensor, take_rows
from recsys_moe.errors import UserError
from recsys_moe.front import Crosses, FrontConfig, TargetAttention
from recsys_moe.models import settle
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.models.stem import STEMConfig
from recsys_moe.predictor import Predictor
from recsys_moe.ranker import Ranker
from recsys_moe.schema import Schema
from recsys_moe.sources import DataConfig
from recsys_moe.trainer import TrainConfig, Trainer
from recsys_moe.transforms import ListInput
from recsys_moe.typed import dump, parse
from recsys_moe.warm_start import StartBundle

IN_DIM = 6
CLOSE: dict[str, float] = {"rtol": 1e-4, "atol": 1e-5}
CROSSES = {
    "full": FrontConfig(cross_layers=3),
    "low-rank": FrontConfig(cross_layers=2, cross_rank=4),
    "mixture": FrontConfig(cross_layers=2, cross_rank=3, cross_experts=4),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def mlp(stack: Any, e: int, x: Tensor, activation: Callable[[Tensor], Tensor] = swish) -> Tensor:
    for i, weight in enumerate(stack.weights):
        x = F.linear(x, weight[e], None if stack.biases is None else stack.biases[i][e])
        x = activation(x) if i < len(stack.weights) - 1 else x
    return x


def naive_crosses(crosses: Crosses, config: FrontConfig, x: Tensor) -> Tensor:
    """Each set by itself, `[B, S, D]`."""
    outputs = []
    for s in range(x.shape[1]):
        first = crossed = x[:, s]
        for layer in crosses.layers:
            own: Any = layer
            if not config.cross_rank:
                c = mlp(own.linear, s, crossed)
            elif config.cross_experts == 1:
                c = mlp(own.up, s, mlp(own.down, s, crossed))
            else:
                k = config.cross_experts
                rows = slice(s * k, s * k + k)
                gates = torch.softmax(crossed @ own.router.linear.weight[rows].t() + own.router.linear.bias[rows], 1)
                c = torch.zeros_like(first)
                for e in range(k):
                    c = c + gates[:, e : e + 1] * mlp(own.experts, s * k + e, crossed)
            crossed = first * c + crossed
        outputs.append(crossed)
    return torch.stack(outputs, 1)


def same(got: Tensor, expected: Tensor, leaves: dict[str, Tensor]) -> None:
    torch.testing.assert_close(got, expected, **CLOSE)
    direction = torch.randn_like(got)
    found = torch.autograd.grad(got, list(leaves.values()), direction)
    wanted = torch.autograd.grad(expected, list(leaves.values()), direction)
    for name, a, b in zip(leaves, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("sets", [1, 3])
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("name", CROSSES)
def test_crosses_are_their_equations(name: str, rows: int, sets: int) -> None:
    crosses = Crosses(CROSSES[name], sets, IN_DIM, torch.float32)
    x = torch.randn(rows, sets, IN_DIM, requires_grad=True)
    got = crosses(x if sets > 1 else x.squeeze(1)).view(x.shape)
    same(got, naive_crosses(crosses, CROSSES[name], x), {"x": x, **dict(crosses.named_parameters())})


def items(lengths: list[int], sets: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    n = sum(lengths)
    target, own = torch.randn(len(lengths), sets, width), torch.randn(n, sets, width)
    return target.requires_grad_(), own.requires_grad_(), torch.tensor(lengths, dtype=torch.int32)


def naive_attention(attention: TargetAttention, target: Tensor, own: Tensor, lengths: Tensor) -> Tensor:
    rows, at = [], 0
    for b, length in enumerate(lengths.tolist()):
        pooled = []
        for s in range(target.shape[1]):
            v, z = target[b, s], torch.zeros(target.shape[2])
            for e in own[at : at + length, s]:
                z = z + mlp(attention.weigh, s, torch.cat([v, e, v - e, v * e])) * e
            pooled.append(z)
        rows.append(torch.stack(pooled))
        at += length
    return torch.stack(rows)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("lengths", [[3, 0, 1, 5], [2]], ids=str)
def test_target_attention_is_its_equation(lengths: list[int], sets: int) -> None:
    attention = TargetAttention(sets, 4, (5, 3), torch.float32)
    target, own, lengths_b = items(lengths, sets, 4)
    got, expected = attention(target, own, lengths_b), naive_attention(attention, target, own, lengths_b)
    same(got, expected, {"target": target, "items": own, **dict(attention.named_parameters())})


def test_target_attention_over_no_items_at_all() -> None:
    attention = TargetAttention(1, 4, (5,), torch.float32)
    target, own, lengths = items([0, 0], 1, 4)
    assert attention(target, own, lengths).tolist() == torch.zeros(2, 1, 4).tolist()
    assert attention(target[:0], own, lengths[:0]).shape == (0, 1, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CROSSES)
def test_at_inference_a_crossed_row_has_the_same_bits_in_every_batch(name: str, dtype: torch.dtype) -> None:
    crosses, x = Crosses(CROSSES[name], 1, IN_DIM, dtype).eval(), torch.randn(40, IN_DIM)
    with torch.no_grad():
        assert torch.equal(torch.cat([crosses(row[None]) for row in x]), crosses(x))


def test_at_inference_an_attended_row_has_the_same_bits_in_every_batch() -> None:
    attention, lengths = TargetAttention(1, 8, (5,), torch.float32).eval(), [int(n) for n in torch.randint(0, 40, (30,))]
    target, own, lengths_b = items(lengths, 1, 8)
    with torch.no_grad():
        alone = [attention(target[b : b + 1], part, lengths_b[b : b + 1]) for b, part in enumerate(own.split(lengths))]
        assert torch.equal(torch.cat(alone), attention(target, own, lengths_b))


@pytest.mark.parametrize("name", CROSSES)
def test_crosses_are_one_graph(name: str) -> None:
    crosses, x = Crosses(CROSSES[name], 1, IN_DIM, torch.float32), torch.randn(20, IN_DIM)
    torch.testing.assert_close(torch.compile(crosses, fullgraph=True, backend="aot_eager")(x), crosses(x))
    rows = torch.export.Dim("rows", min=2, max=4096)
    with torch.no_grad():
        exported = torch.export.export(crosses.eval(), (x,), dynamic_shapes=({0: rows},)).module()
        torch.testing.assert_close(exported(x[:7]), crosses(x[:7]))


def test_target_attention_is_one_graph() -> None:
    attention = TargetAttention(1, 4, (5,), torch.float32)
    parts = items([3, 0, 1, 5], 1, 4)
    torch.testing.assert_close(torch.compile(attention, fullgraph=True, backend="aot_eager")(*parts), attention(*parts))
    n, rows = torch.export.Dim("items", min=2, max=9999), torch.export.Dim("rows", min=2, max=4096)
    with torch.no_grad():
        exported = torch.export.export(attention.eval(), parts, dynamic_shapes=({0: rows}, {0: n}, {0: rows})).module()
        parts = items([2, 7], 1, 4)
        torch.testing.assert_close(exported(*parts), attention(*parts))


@pytest.mark.parametrize("name", CROSSES)
def test_units_of_a_cross_differ_after_initialisation(name: str) -> None:
    for key, parameter in Crosses(CROSSES[name], 2, IN_DIM, torch.float32).named_parameters():
        if "weight" in key and parameter.dim() == 3:
            units = parameter.detach().flatten(0, 1)
            assert len(torch.unique(units, dim=0)) == len(units), key


# -- in a ranker


class Capture(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return x, {}


FRONT = FrontConfig(cross_layers=1, attention={"seen.items": "item"}, attention_dims=(5,))
NAMES, CARDINALITIES = ["user", "item"], [5, 7]
LISTS = [ListInput("tags", 6, "mean", None), ListInput("seen.items", 9, "last", 4)]


def inputs(rows: int) -> tuple[Tensor, Tensor, list[JaggedTensor]]:
    ids = torch.stack([torch.randint(0, c, (rows,)) for c in CARDINALITIES], 1).int()
    lists = []
    for feature in LISTS:
        lengths = torch.randint(0, 5, (rows,), dtype=torch.int32)
        lists.append(
            JaggedTensor(torch.randint(0, feature.cardinality, (int(lengths.sum()),), dtype=torch.int32), lengths=lengths)
        )
    return ids, torch.randn(rows, 2), lists


@pytest.mark.parametrize("sets", [1, 3])
def test_a_ranker_attends_and_crosses_before_its_network(sets: int) -> None:
    kind: Any = MMoEConfig if sets == 1 else STEMConfig
    config = kind(embedding_dim=4, dropout=0.0, front=FRONT)
    model = Ranker(config, NAMES, CARDINALITIES, 2, {"click": 1, "buy": 1}, lists=LISTS)
    assert model.network is not None
    model.network = Capture()  # type: ignore[assignment]
    ids, dense, lists = inputs(12)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = []
    for of in model.sets:
        suffix = f" of {of}.weight" if of else ".weight"
        user, item = (state[f"embeddings.embedding_bags.{name}{suffix}"][ids[:, f].long()] for f, name in enumerate(NAMES))
        tags = [state["pooled.mean.embedding_bags.tags" + suffix][row.long()] for row in lists[0].to_dense()]
        tags_bd = torch.stack([row.mean(0) if len(row) else torch.zeros(4) for row in tags])
        seen = state["attended.seen__items.embedding_bags.seen__items" + suffix][lists[1].values().long()]
        x.append((user, item, tags_bd, seen))
    unit: Any = model.front.attention["seen__items"]
    target, own = (torch.stack([part[n] for part in x], 1) for n in (1, 3))
    attended = naive_attention(unit, target, own, lists[1].lengths())
    whole = torch.stack([torch.cat([*part[:3], attended[:, s], dense], 1) for s, part in enumerate(x)], 1)  # [B, S, D]
    assert model.front.crosses is not None
    expected = naive_crosses(model.front.crosses, FRONT, whole)
    got = model(ids, dense, lists)[0]
    torch.testing.assert_close(got, expected if sets > 1 else expected.squeeze(1), **CLOSE)
    # All that there is learns.
    model.set_embedding_lr(0.1)
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for _, p in model.named_dense_parameters())
    for name, tensor in model.state_dict().items():
        if "embedding_bags" in name:
            assert not torch.equal(tensor, state[name]), name


def test_a_front_that_is_off_has_no_parameters() -> None:
    model = Ranker(MMoEConfig(embedding_dim=4), NAMES, CARDINALITIES, 0, {"click": 1})
    assert not list(model.front.parameters())
    assert not len(model.attended)


def test_a_bundle_with_a_front_scores_a_row_as_it_does_in_a_batch(
    tmp_path: Path, write_prepared: Any, clicks: Any, clicks_schema: Any
) -> None:
    def rows(count: int, seed: int) -> pa.Table:
        random = np.random.default_rng(seed)
        seen = [random.choice(["red", "green", "blue"], n).tolist() for n in random.integers(0, 6, count)]
        return clicks(count, seed).append_column("seen", pa.array(seen))

    plain = dump(clicks_schema)
    plain["features"].append({"name": "seen", "kind": "sequence", "max_length": 4})
    parts = {"train": [rows(600, 1)], "validation": [rows(200, 2)]}
    data = write_prepared(tmp_path / "prepared", parse(Schema, plain, "schema"), parts)
    front = FrontConfig(cross_layers=1, attention={"seen": "colour"})
    model = MMoEConfig(embedding_dim=4, num_experts=2, expert_dims=(8,), front=front)
    trainer = Trainer(data, model, TrainConfig(epochs=2, batch_size=128))
    trainer.fit()
    config = BundleConfig(FORMAT, model, "fp32", DataConfig(name="seen", source="nowhere", schema="-"), "0" * 64)
    save_bundle(tmp_path / "bundle", trainer.whole_weights(), config, data.transform, {}, trainer.whole_adagrad())
    predictor, table = Predictor(tmp_path / "bundle"), rows(40, 3)
    scores = predictor.score(table)
    assert np.array_equal(np.concatenate([predictor.score(table.slice(n, 1)) for n in range(40)], 1), scores)
    # What was seen counts, and whoever goes on from the bundle goes on with its tables.
    assert (predictor.score(table.set_column(5, "seen", pa.array([["red"] * 4] * 40))) != scores).any()
    started = Trainer(data, model, TrainConfig(), start=StartBundle(tmp_path / "bundle"))
    kept = trainer.model.state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in started.model.state_dict().items())
    assert all(torch.equal(sums, trainer.model.adagrad()[name]) for name, sums in started.model.adagrad().items())


SCHEMA: Any = {
    "features": [
        {"name": "item", "kind": "hashed", "buckets": 9},
        {"name": "seen", "kind": "sequence", "max_length": 5},
        {"name": "tags", "kind": "multi"},
    ],
    "tasks": [{"name": "click", "label": "y == 1"}],
}


@pytest.mark.parametrize(
    ("attention", "told"),
    [
        ({"sen": "item"}, "attention is over 'sen', which is no sequence of the schema; did you mean 'seen'?"),
        ({"tags": "item"}, "attention is over 'tags', which is no sequence"),
        (
            {"seen": "items"},
            "attention is for 'items', which is no categorical, hashed or cross feature .* did you mean 'item'?",
        ),
    ],
)
def test_attention_over_or_for_what_is_not_there(attention: dict[str, str], told: str) -> None:
    schema = parse(Schema, SCHEMA, "schema")
    with pytest.raises(UserError, match=told):
        settle(MMoEConfig(front=FrontConfig(attention=attention)), schema)
    settle(MMoEConfig(front=FrontConfig(attention={"seen": "item"})), schema)


@pytest.mark.parametrize(
    ("front", "told"),
    [
        ({"cross_layer": 2}, r"model: unknown key 'front.cross_layer'; did you mean 'cross_layers'\?"),
        (
            {"cross_experts": 2},
            "model.front.cross_experts is 2, but mixtures are of low-rank crosses; set model.front.cross_rank",
        ),
    ],
    ids=["unknown", "no rank"],
)
def test_mistakes_in_the_front_are_named(front: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse(MMoEConfig, {"front": front}, "model")


# ---- beside the network


BESIDE = FrontConfig(attention={"seen.items": "item"}, first_order=True)


def first_order_of(model: Ranker, ids: Tensor, dense: Tensor, lists: list[JaggedTensor]) -> Tensor:
    """Σ_f w_f[id_f] + V·numbers, row by row."""
    state = {name.removeprefix("first_order."): t for name, t in model.state_dict().items() if name.startswith("first_order.")}
    outputs = sum(WIDTHS)
    rows = []
    for b in range(len(ids)):
        o = state["numbers.weights.0"][0] @ dense[b]
        for f, name in enumerate(NAMES):
            o = o + state[f"embeddings.embedding_bags.{name}.weight"][ids[b, f], :outputs]
        tags, seen = (rows.to_dense()[b].long() for rows in lists)
        if len(tags):
            o = o + state["pooled.mean.embedding_bags.tags.weight"][tags, :outputs].mean(0)
        if len(seen):
            o = o + state["pooled.sum.embedding_bags.seen__items.weight"][seen[-1], :outputs]
        rows.append(o)
    return torch.stack(rows)


WIDTHS = (1, 3, 1)


def beside(config: Any) -> Ranker:
    torch.manual_seed(5)
    return Ranker(config, NAMES, CARDINALITIES, 2, dict(zip(("click", "ending", "buy"), WIDTHS, strict=True)), lists=LISTS)


@pytest.mark.parametrize("kind", [MMoEConfig, STEMConfig])
def test_a_linear_model_of_all_inputs_stands_beside_the_network(kind: Any) -> None:
    config = kind(embedding_dim=4, dropout=0.0, front=BESIDE)
    model, plain = beside(config), beside(replace(config, front=replace(BESIDE, first_order=False)))
    ids, dense, lists = inputs(12)
    # A fresh one is the network alone, drawn from the same random numbers.
    assert torch.equal(model(ids, dense, lists)[0], plain(ids, dense, lists)[0])
    for name, tensor in model.state_dict().items():
        if name.startswith("first_order."):
            tensor.normal_()
    with torch.no_grad():
        added = model(ids, dense, lists)[0] - plain(ids, dense, lists)[0]
    torch.testing.assert_close(added, first_order_of(model, ids, dense, lists), **CLOSE)
    model.eval()
    whole = model.first_order_outputs(ids, dense, lists)
    assert whole is not None
    for b in range(12):  # bit for bit
        one = model.first_order_outputs(
            ids[b : b + 1], dense[b : b + 1], [take_rows(rows, torch.tensor([b])) for rows in lists]
        )
        assert one is not None
        assert torch.equal(one[0], whole[b])


def test_the_linear_model_takes_adagrads_steps_at_its_own_rate() -> None:
    model = beside(MMoEConfig(embedding_dim=4, dropout=0.0, front=BESIDE))
    ids, dense, lists = inputs(12)
    direction = torch.randn(12, sum(WIDTHS))
    model.set_embedding_lr(0.0)
    model.set_first_order_lr(0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = model(ids, dense, lists)[0]
    (outputs * direction).sum().backward()
    table = model.state_dict()["first_order.embeddings.embedding_bags.item.weight"]
    for item in range(CARDINALITIES[1]):
        g = torch.zeros(8)  # five outputs, filled up to eight
        g[: sum(WIDTHS)] = direction[ids[:, 1] == item].sum(0)
        torch.testing.assert_close(table[item], -0.3 * g / (g.square().mean().sqrt() + 1e-8), rtol=1e-4, atol=1e-6)
    (numbers,) = [p for name, p in model.named_dense_parameters() if name.startswith("first_order.")]
    torch.testing.assert_close(numbers.grad, (direction.T @ dense).unsqueeze(0), **CLOSE)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items() if name.startswith("embeddings."))
