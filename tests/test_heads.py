"""Kinds of tasks: losses, scores and starts against their formulas, alone and side by side."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recsys_moe.heads import BinaryHead, Head, Heads, MulticlassHead, OrdinalHead, RegressionHead
from recsys_moe.schema import Schema
from recsys_moe.transforms import Statistics, TargetStatistics
from recsys_moe.typed import parse

LEVELS = (1.0, 2.0, 5.0, 9.0)
HEADS: dict[str, tuple[Head, Any]] = {
    "binary": (BinaryHead(), [0, 1]),
    "mse": (RegressionHead(False, None, 3.0, 2.0), [-8.0, 0.0, 3.5, 40.0]),
    "huber": (RegressionHead(False, 0.7, 3.0, 2.0), [-8.0, 0.0, 3.5, 40.0]),
    "log1p": (RegressionHead(True, None, 0.5, 2.0), [-8.0, 0.0, 3.5, 4e4]),
    "multiclass": (MulticlassHead(("x", "y", "z")), [0, 1, 2]),
    "ordinal": (OrdinalHead(LEVELS), [0, 1, 2, 3]),
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def above(outputs: list[float]) -> list[float]:
    """P(y above level k) of an ordinal task."""
    logits = [outputs[0]]
    for o in outputs[1:]:
        logits.append(logits[-1] - math.log1p(math.exp(o)))
    return [sigmoid(z) for z in logits]


def naive_loss(kind: str, o: list[float], y: float) -> float:
    match kind:
        case "binary":
            return -math.log(sigmoid(o[0]) if y else 1 - sigmoid(o[0]))
        case "mse":
            return ((y - 3) / 2 - o[0]) ** 2
        case "huber":
            d = abs((y - 3) / 2 - o[0])
            return d * d / 2 if d < 0.7 else 0.7 * (d - 0.35)
        case "log1p":
            return ((math.copysign(math.log1p(abs(y)), y) - 0.5) / 2 - o[0]) ** 2
        case "multiclass":
            return -math.log(math.exp(o[int(y)]) / sum(map(math.exp, o)))
        case "ordinal":
            return float(np.mean([-math.log(p if y > k else 1 - p) for k, p in enumerate(above(o))]))
    raise AssertionError


def naive_scores(kind: str, o: list[float]) -> list[float]:
    match kind:
        case "binary":
            return [sigmoid(o[0])]
        case "mse" | "huber":
            return [o[0] * 2 + 3]
        case "log1p":
            z = o[0] * 2 + 0.5
            return [math.copysign(math.expm1(abs(z)), z)]
        case "multiclass":
            return [math.exp(x) / sum(map(math.exp, o)) for x in o]
        case "ordinal":
            p = [1, *above(o), 0]
            return [sum((p[k] - p[k + 1]) * level for k, level in enumerate(LEVELS))]
    raise AssertionError


def draw(kind: str, rows: int = 40, tasks: int = 2) -> tuple[Head, Tensor, Tensor]:
    head, labels = HEADS[kind]
    torch.manual_seed(0)
    return (
        head,
        2 * torch.randn(rows, tasks, head.outputs),
        torch.tensor(labels)[torch.randint(len(labels), (rows, tasks))].float(),
    )


@pytest.mark.parametrize("kind", HEADS)
def test_losses_and_scores_are_their_formulas(kind: str) -> None:
    head, outputs, labels = draw(kind)
    losses, scores = head.losses(outputs, labels), head.scores(outputs)
    for b, n in np.ndindex(*labels.shape):
        o, y = outputs[b, n].tolist(), labels[b, n].item()
        assert losses[b, n].item() == pytest.approx(naive_loss(kind, o, y), rel=1e-4, abs=1e-6)
        assert scores[b, n].tolist() == pytest.approx(naive_scores(kind, o), rel=1e-4, abs=1e-5)
    assert len(head.score_names("t")) == scores.shape[2]


@pytest.mark.parametrize("kind", HEADS)
def test_scores_are_the_same_bits_in_every_batch(kind: str) -> None:
    head, outputs, _ = draw(kind, 70, 3)
    whole = head.scores(outputs)
    assert whole.dtype == torch.float32
    for low, high in ((0, 1), (1, 3), (3, 20), (20, 70)):
        assert torch.equal(head.scores(outputs[low:high]), whole[low:high])
    for n in range(3):
        assert torch.equal(head.scores(outputs[:, n : n + 1]), whole[:, n : n + 1])


@pytest.mark.parametrize("kind", HEADS)
def test_training_on_one_row_again_and_again_finds_its_label(kind: str) -> None:
    head, labels = HEADS[kind]
    for label in labels:
        outputs = torch.zeros(1, 1, head.outputs, requires_grad=True)
        optimizer = torch.optim.Adam([outputs], lr=0.3)
        for _ in range(300):
            optimizer.zero_grad()
            head.losses(outputs, torch.tensor([[float(label)]])).sum().backward()
            optimizer.step()
        scores = head.scores(outputs.detach())[0, 0]
        if kind == "multiclass":
            assert scores.argmax().item() == label
        else:
            expected = LEVELS[label] if kind == "ordinal" else label
            assert scores.item() == pytest.approx(expected, rel=0.02, abs=0.05)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_extreme_outputs_have_finite_losses_gradients_and_scores(kind: str, size: float) -> None:
    head, labels = HEADS[kind]
    signs = torch.cartesian_prod(*[torch.tensor([-size, size])] * head.outputs).view(-1, 1, head.outputs)
    for label in labels:
        outputs = signs.clone().requires_grad_()
        losses = head.losses(outputs, torch.full((len(signs), 1), float(label)))
        losses.sum().backward()
        assert losses.isfinite().all()
        assert outputs.grad is not None
        assert outputs.grad.isfinite().all()
    assert head.scores(signs).isfinite().all()


@given(st.lists(st.floats(-30, 30), min_size=3, max_size=3))
def test_a_higher_level_is_never_more_probable_to_be_exceeded(outputs: list[float]) -> None:
    head = OrdinalHead(LEVELS)
    logits = torch.stack(head._logits(torch.tensor([[outputs]]), torch.nn.functional.softplus))
    assert (logits.diff(dim=0) <= 0).all()
    assert LEVELS[0] <= head.scores(torch.tensor([[outputs]])).item() <= LEVELS[-1]


# -- where a model starts


def shares(counts: list[int]) -> list[float]:
    smoothed = [count + 0.5 for count in counts]
    return [count / sum(smoothed) for count in smoothed]


@pytest.mark.parametrize("counts", [[5, 0, 20, 75], [1, 1, 1, 1], [0, 0, 0, 9], [10**6, 3, 1, 0]])
def test_a_model_starts_at_the_training_parts_shares(counts: list[int]) -> None:
    target = TargetStatistics("t", sum(counts), 0.0, 1.0, tuple(counts))
    multiclass, ordinal = MulticlassHead(tuple("abcd")), OrdinalHead(LEVELS)
    outputs = torch.tensor([[multiclass.start(target)]])
    assert multiclass.scores(outputs).flatten().tolist() == pytest.approx(shares(counts), rel=1e-4)
    expected = sum(share * level for share, level in zip(shares(counts), LEVELS, strict=True))
    assert ordinal.scores(torch.tensor([[ordinal.start(target)]])).item() == pytest.approx(expected, rel=1e-4)


def test_a_binary_task_starts_at_its_rate_and_never_at_0_or_1() -> None:
    def rate(*counts: int) -> float:
        (logit,) = BinaryHead().start(TargetStatistics("t", sum(counts), 0.0, 1.0, counts))
        return sigmoid(logit)

    assert rate(9970, 29) == pytest.approx(0.00295)
    assert rate(500, 499) == pytest.approx(0.4995)
    assert 0 < rate(1000, 0) < 0.001 < 0.999 < rate(0, 1000) < 1
    # Nothing observed, or nothing counted: nothing is known.
    assert rate(0, 0) == rate() == 0.5


@pytest.mark.parametrize("log1p", [False, True])
@pytest.mark.parametrize("standardise", [False, True])
def test_a_regression_starts_at_the_mean(log1p: bool, standardise: bool) -> None:
    task = {"name": "r", "label": "r", "kind": "regression", "log1p": log1p, "standardise": standardise}
    schema = schema_of(task)
    heads = Heads(schema, Statistics((), (), (TargetStatistics("r", 9, 3.0, 2.0),)))
    expected = math.expm1(3.0) if log1p else 3.0
    assert heads.scores(torch.tensor(heads.start())).item() == pytest.approx(expected, rel=1e-5)


def test_nothing_observed_starts_somewhere() -> None:
    for kind in HEADS:
        head, _ = HEADS[kind]
        start = head.start(TargetStatistics("t", 0, 0.0, 0.0))
        assert len(start) == head.outputs
        assert np.isfinite(start).all()


# -- side by side


def schema_of(*tasks: dict[str, Any]) -> Schema:
    parsed: Schema = parse(Schema, {"features": [{"name": "f", "kind": "categorical"}], "tasks": tasks}, "schema")
    return parsed


TASKS: list[dict[str, Any]] = [
    {"name": "a", "label": "a"},
    {"name": "b", "label": "b", "kind": "binary"},
    {"name": "m", "label": "m", "kind": "multiclass", "classes": ["x", "y", "z"]},
    {"name": "c", "label": "c"},
    {"name": "r", "label": "r", "kind": "regression"},
    {"name": "n", "label": "m", "kind": "multiclass", "classes": ["x", "y", "z"]},
    {"name": "k", "label": "m", "kind": "multiclass", "classes": ["x", "y", "z"]},
    {"name": "o", "label": "o", "kind": "ordinal", "levels": [1, 2, 3]},
]


@pytest.mark.parametrize("names", ["ab", "abmcrnko", "o", "mnk", "abc", "rrr"])
def test_tasks_side_by_side_are_each_as_alone(names: str) -> None:
    tasks = [next(t for t in TASKS if t["name"] == name) | {"name": f"{name}{i}"} for i, name in enumerate(names)]
    heads = Heads(schema_of(*tasks), Statistics((), ()))
    torch.manual_seed(0)
    outputs, labels = torch.randn(9, sum(heads.widths.values())), torch.randint(2, (9, len(tasks))).float()
    losses, scores = heads.losses(outputs, labels), torch.from_numpy(heads.scores(outputs)).t()
    assert losses.shape == labels.shape
    names_found, at = [], 0
    for t, task in enumerate(tasks):
        alone = Heads(schema_of(task), Statistics((), ()))
        (width,) = alone.widths.values()
        own = outputs[:, at : at + width]
        at += width
        torch.testing.assert_close(alone.losses(own, labels[:, t : t + 1]), losses[:, t : t + 1])
        mine = [heads.score_names.index(name) for name in alone.score_names]
        assert torch.equal(torch.from_numpy(alone.scores(own)).t(), scores[:, mine])
        names_found += alone.score_names
    assert heads.score_names == tuple(names_found)


def test_metrics_read_each_tasks_own_scores() -> None:
    schema = schema_of(*TASKS)
    heads = Heads(schema, Statistics((), ()))
    random = np.random.default_rng(0)
    n, kinds = 200, {t.name: t.kind for t in schema.tasks}
    labels = np.stack([random.integers(0, 2 if kinds[t] == "binary" else 3, n) for t in heads.tasks]).astype(np.float32)
    weights = (random.random(labels.shape) < 0.8).astype(np.float32)
    perfect = {}
    for task, y in zip(heads.tasks, labels, strict=True):
        if kinds[task] == "multiclass":
            perfect |= {f"{task}.{name}": np.where(y == k, 0.9, 0.05) for k, name in enumerate("xyz")}
        else:
            perfect[task] = y * 0.8 + 0.1 if kinds[task] == "binary" else y + (kinds[task] == "ordinal")
    scores = np.stack([perfect[name] for name in heads.score_names])
    pieces: Any = [(scores[:, c], labels[:, c], weights[:, c], None) for c in (slice(0, 50), slice(50, n))]
    found: Any = heads.metrics(pieces)
    assert [found[t].rows for t in heads.tasks] == (weights > 0).sum(1).tolist()
    assert found["a"].auc == found["c"].auc == found["r"].r2 == found["o"].auc == found["o"].qwk == 1
    assert found["m"].accuracy == found["k"].macro_f1 == 1
    assert found["r"].rmse == found["o"].mae == 0
