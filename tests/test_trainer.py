"""The plain trainer on tiny prepared data."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from torch import Tensor

from recsys_moe import trainer as trainer_module
from recsys_moe.errors import UserError
from recsys_moe.heads import Heads, mean_quality
from recsys_moe.metrics import BinaryMetrics, RegressionMetrics
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.models.shared_bottom import SharedBottomConfig
from recsys_moe.shards import PreparedData
from recsys_moe.trainer import TrainConfig, Trainer, evaluate, has_bf16, schedule
from recsys_moe.transforms import Statistics, TargetStatistics
from recsys_moe.typed import dump, parse

MMOE = MMoEConfig(embedding_dim=4, num_experts=3, expert_dims=(8,), tower_dims=(4,), dropout=0.1)
BOTTOM = SharedBottomConfig(embedding_dim=4, bottom_dims=(16, 8), tower_dims=(4,), dropout=0.1)


def quick(**keys: Any) -> TrainConfig:
    return TrainConfig(**({"epochs": 2, "batch_size": 128} | keys))


def trained(data: PreparedData, model: Any = MMOE, **keys: Any) -> Trainer:
    trainer = Trainer(data, model, quick(**keys))
    trainer.fit()
    return trainer


def same_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return copy.deepcopy(dict(trainer.model.state_dict()))


def test_a_seed_gives_the_same_weights_bit_for_bit(prepared_clicks: PreparedData) -> None:
    first, again, other = (weights_of(trained(prepared_clicks, seed=seed)) for seed in (5, 5, 6))
    assert same_weights(first, again)
    assert not same_weights(first, other)


@pytest.mark.parametrize(
    ("model", "precision"), [(MMOE, "fp32"), (BOTTOM, "fp32"), (MMOE, "bf16")], ids=["mmoe", "bottom", "mmoe bf16"]
)
def test_learns_what_can_be_learnt(prepared_clicks: PreparedData, clicks: Any, model: Any, precision: str) -> None:
    trainer = trained(prepared_clicks, model, epochs=15, precision=precision)
    metrics = evaluate(trainer.model, prepared_clicks, "test")
    raw = clicks(300, 4).to_pandas()
    # The columns that the labels were drawn from, as scores: nobody can do much better.
    best_click = sklearn.metrics.roc_auc_score(raw["click"], raw["colour"] == "red")
    clicked = raw[raw["click"] == 1]
    best_buy = sklearn.metrics.roc_auc_score(clicked["buy"], clicked["price"].fillna(0) < 0)
    assert metrics["click"].auc > best_click - 0.03
    assert metrics["buy"].auc > best_buy - 0.05
    # The epoch is chosen by AUC, early in so short a training: well below 1 is enough.
    assert metrics["click"].ne < 0.95


def with_counts(data: PreparedData, **observed_positive: tuple[int, int]) -> PreparedData:
    """The same data, whose statistics say that the training part has so many rows of each task."""
    targets = [
        TargetStatistics(task, rows, 0.0, 1.0, (rows - positive, positive))
        for task, (rows, positive) in observed_positive.items()
    ]
    data.transform.statistics = replace(data.transform.statistics, targets=tuple(targets))
    return data


@pytest.mark.parametrize("model", [MMOE, BOTTOM], ids=["mmoe", "bottom"])
def test_a_fresh_model_scores_each_task_near_its_training_rate(prepared_clicks: PreparedData, model: Any) -> None:
    data = with_counts(prepared_clicks, click=(100_000, 300), buy=(1000, 0))
    ranker = Trainer(data, model, quick()).model.eval()
    with torch.no_grad():
        logits, _ = ranker(torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, len(data.transform.dense_names)))
    click, buy = torch.sigmoid(logits[0]).tolist()
    # The last layer's random weights add what they add.
    assert 0.0005 < click < 0.02
    assert 0 < buy < 0.005


def test_metrics_are_over_the_rows_that_a_task_observes(prepared_clicks: PreparedData, clicks: Any) -> None:
    metrics = evaluate(trained(prepared_clicks).model, prepared_clicks, "validation")
    raw = clicks(400, 3).to_pandas()
    assert (metrics["click"].rows, metrics["buy"].rows) == (400, raw["click"].sum())


def test_metrics_join_pieces_and_drop_what_is_unobserved(clicks_schema: Any) -> None:
    random = np.random.default_rng(0)
    scores, labels = random.random((2, 90)), (random.random((2, 90)) < 0.5).astype(float)
    weights, groups = np.ones((2, 90)), random.integers(0, 5, 90)
    weights[1, ::3] = 0
    cuts = [slice(0, 40), slice(40, 41), slice(41, 90)]
    pieces: Any = [(scores[:, c], labels[:, c], weights[:, c], groups[c]) for c in cuts]
    metrics: Any = Heads(clicks_schema, Statistics((), ())).metrics(pieces)
    seen = weights[1] > 0
    assert metrics["click"].auc == pytest.approx(sklearn.metrics.roc_auc_score(labels[0], scores[0]))
    assert metrics["buy"].auc == pytest.approx(sklearn.metrics.roc_auc_score(labels[1][seen], scores[1][seen]))
    assert metrics["buy"].rows == 60
    assert not math.isnan(metrics["buy"].gauc)


def test_the_mean_quality_is_over_the_tasks_that_have_one() -> None:
    def task(auc: float) -> BinaryMetrics:
        return BinaryMetrics(auc, math.nan, 0, 0.0, 0.0, 0.0, 0.0, 1)

    values = RegressionMetrics(0.4, 9.0, 9.0, 1)
    assert mean_quality({"a": task(0.6), "b": task(math.nan), "c": task(0.8)}) == pytest.approx(0.7)
    assert mean_quality({"a": task(0.6), "b": values}) == pytest.approx(0.5)
    assert math.isnan(mean_quality({"a": task(math.nan)}))


@pytest.mark.parametrize(
    ("patience", "epochs_run", "best_epoch"),
    [(1, 2, 1), (2, 5, 3), (3, 6, 3), (0, 7, 7)],
    ids=lambda n: str(n),
)
def test_stops_when_the_mean_quality_has_not_risen_and_keeps_the_best_epochs_weights(
    prepared_clicks: PreparedData, monkeypatch: pytest.MonkeyPatch, patience: int, epochs_run: int, best_epoch: int
) -> None:
    aucs = [0.6, 0.5, 0.7, 0.65, 0.7, 0.6, 0.9]  # equal is not better
    seen: list[dict[str, Tensor]] = []
    events: list[dict[str, Any]] = []

    def fake(model: Any, data: Any, part: str) -> dict[str, BinaryMetrics]:
        assert part == "validation"
        seen.append(copy.deepcopy(dict(model.state_dict())))
        auc = aucs[len(seen) - 1]
        return {"click": BinaryMetrics(auc, math.nan, 0, 0.1, 0.5, 1.0, 0.0, 10)}

    monkeypatch.setattr(trainer_module, "evaluate", fake)
    trainer = Trainer(prepared_clicks, MMOE, quick(epochs=7, patience=patience), events.append)
    result = trainer.fit()
    assert (result.epochs, result.best_epoch, result.best_quality) == (epochs_run, best_epoch, aucs[best_epoch - 1])
    assert same_weights(trainer.model.state_dict(), seen[best_epoch - 1])
    told = [event for event in events if event["kind"] == "epoch"]
    assert [event["validation.mean_quality"] for event in told] == aucs[:epochs_run]
    assert [event["best"] for event in told] == [auc > max(aucs[:i], default=0) for i, auc in enumerate(aucs[:epochs_run])]


def test_events_count_steps(prepared_clicks: PreparedData) -> None:
    events: list[dict[str, Any]] = []
    Trainer(prepared_clicks, MMOE, quick(), events.append).fit()
    told = [event for event in events if event["kind"] == "epoch"]
    # 1033 rows in batches of 128 are 9 steps.
    assert [(e["epoch"], e["step"], e["total_steps"]) for e in told] == [(1, 9, 18), (2, 18, 18)]
    assert set(told[0]["validation"]) == {"click", "buy"}
    assert told[1]["train.loss"] < told[0]["train.loss"]


def test_all_parameters_are_trained_once(prepared_clicks: PreparedData) -> None:
    # Tables by their fused optimizer, everything else by the dense one: nothing by both, nothing by neither.
    trainer = Trainer(prepared_clicks, MMOE, quick())
    before = weights_of(trainer)
    dense = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in dense) == (not name.startswith("embeddings.")), name
    trainer.fit()
    for name, tensor in trainer.model.state_dict().items():
        # A bias in front of a batch norm changes nothing: its gradient is 0.
        assert name.endswith("biases.0") or not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("model", [MMOE, BOTTOM], ids=["mmoe", "bottom"])
def test_weight_decay_spares_biases_and_norms(prepared_clicks: PreparedData, model: Any) -> None:
    trainer = Trainer(prepared_clicks, model, quick(weight_decay=0.5))
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.network.named_parameters():
        is_product = name == "router.linear.weight" or ".weights." in name
        assert decay[id(parameter)] == (0.5 if is_product else 0), name


def test_the_gradient_is_clipped(prepared_clicks: PreparedData) -> None:
    def norm(clip: float) -> float:
        trainer = trained(prepared_clicks, clip_norm=clip, epochs=1)
        return torch.stack([p.grad.norm() for p in trainer.dense if p.grad is not None]).norm().item()

    assert norm(0.001) == pytest.approx(0.001, rel=1e-2)
    assert norm(0) > 0.01


def test_rates_follow_the_schedule(prepared_clicks: PreparedData) -> None:
    trainer = trained(prepared_clicks, lr=0.01, embedding_lr=0.2)
    factor = schedule("one_cycle", 17 / 18)  # the last of 18 steps
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * factor)
    assert trainer.model.embeddings is not None
    fused = trainer.model.embeddings.fused_optimizer()
    assert fused.param_groups[0]["lr"] == pytest.approx(0.2 * factor)


def test_one_cycle_is_pytorchs() -> None:
    steps, warm = 1000, 300
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=steps, pct_start=0.3, div_factor=25, final_div_factor=1e12
    )
    for step in range(steps):
        # PyTorch counts the peak at step 299 and the end at step 999; here both lie at a share of the way.
        rising = step <= warm - 1
        progress = 0.3 * step / (warm - 1) if rising else 0.3 + 0.7 * (step - warm + 1) / (steps - warm)
        assert schedule("one_cycle", progress) == pytest.approx(reference.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        if step < steps - 1:
            reference.step()


def test_schedule_ends() -> None:
    assert schedule("one_cycle", 0.0) == pytest.approx(0.04)
    assert schedule("one_cycle", 1.0) == pytest.approx(0)
    assert {schedule("constant", p) for p in (0.0, 0.5, 1.0)} == {1.0}


@pytest.mark.parametrize(
    ("precision", "capabilities", "warned"),
    [
        ("bf16", {"avx512_f": True, "avx512_bf16": False}, True),
        ("bf16", {"avx512_bf16": True}, False),
        ("bf16", {"amx_bf16": True}, False),
        ("bf16", {"architecture": "aarch64", "bf16": True}, False),
        ("fp32", {}, False),
    ],
    ids=str,
)
def test_warns_once_of_bf16_on_a_cpu_without_it(
    prepared_clicks: PreparedData,
    monkeypatch: pytest.MonkeyPatch,
    precision: Any,
    capabilities: dict[str, Any],
    warned: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    events: list[dict[str, Any]] = []
    Trainer(prepared_clicks, MMOE, quick(precision=precision), events.append).fit()
    told = [event["message"] for event in events if event["kind"] == "warning"]
    assert told == (["this CPU has no bf16 instructions: train.precision=bf16 will be slower here than fp32"] if warned else [])


def test_bf16_is_known_by_its_name_in_cpuinfo() -> None:
    with open("/proc/cpuinfo") as file:
        flags = set(file.read().split())
    assert has_bf16() == bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def test_loss_weights_of_the_schema_weigh_the_tasks(
    tmp_path: Any, write_prepared: Any, clicks: Any, clicks_schema: Any
) -> None:
    plain = dump(clicks_schema)
    plain["tasks"][1]["loss_weight"] = 0.25
    schema = parse(type(clicks_schema), plain, "schema")
    data = write_prepared(tmp_path / "p", schema, {"train": [clicks(100)], "validation": [clicks(100, 1)]})
    assert Trainer(data, MMOE, quick()).task_weights_t.tolist() == [1.0, 0.25]


def test_a_loss_that_is_not_finite_stops_with_advice(prepared_clicks: PreparedData) -> None:
    with pytest.raises(UserError, match=r"the loss became (inf|nan) at step \d+; lower train.lr or train.embedding_lr"):
        trained(prepared_clicks, BOTTOM, lr=1e30, schedule="constant", epochs=4)


def test_weights_that_the_last_step_has_spoilt_are_measured_by_nobody(prepared_clicks: PreparedData) -> None:
    # The loss of that step was still finite: it was taken before.
    trainer = Trainer(prepared_clicks, BOTTOM, TrainConfig(epochs=1))
    for parameter in trainer.dense:
        parameter.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"outputs on the validation part are not finite; lower train\.lr"):
        evaluate(trainer.model, prepared_clicks, "validation")


def test_a_router_without_finite_logits_stops_with_advice(prepared_clicks: PreparedData) -> None:
    trainer = Trainer(prepared_clicks, MMOE, TrainConfig(epochs=1))
    for parameter in trainer.dense:
        parameter.data.fill_(math.nan)
    told = r"the router's logits of row 0 are not finite .*, or lower train\.lr or train\.embedding_lr"
    with pytest.raises(UserError, match="on the validation part, " + told):
        evaluate(trainer.model, prepared_clicks, "validation")
    with pytest.raises(UserError, match="at step 0, " + told):
        trainer.fit()


def test_a_validation_part_of_one_class(tmp_path: Any, write_prepared: Any, clicks: Any, clicks_schema: Any) -> None:
    table = clicks(200, 1)
    rows = table.filter(table["click"].combine_chunks().cast("bool"))
    rows = rows.filter(rows["buy"].combine_chunks().cast("bool"))
    data = write_prepared(tmp_path / "p", clicks_schema, {"train": [table], "validation": [rows]})
    with pytest.raises(UserError, match="no task has both classes, or labels that differ, in the validation part"):
        trained(data)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(prepared_clicks: PreparedData) -> None:
    with pytest.raises(UserError, match=r"train\.device is 'cuda', but PyTorch finds no GPU"):
        Trainer(prepared_clicks, MMoEConfig(), TrainConfig(device="cuda"))
