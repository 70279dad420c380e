"""Metrics against scikit-learn, torchmetrics and naive loops."""

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import BinaryCalibrationError
from torchmetrics.functional import classification as functional

from recsys_moe import metrics
from recsys_moe.metrics import (
    binary_metrics,
    expected_calibration_error,
    grouped_auc,
    log_loss,
    multiclass_metrics,
    ordinal_metrics,
    quality,
    quality_name,
    regression_metrics,
)

# Eighths: ties between scores are the rule.
tied_scores = st.integers(1, 7).map(lambda n: n / 8)
rows = st.lists(st.tuples(tied_scores, st.integers(0, 1), st.integers(-2, 3)), min_size=1, max_size=60)
Row = tuple[float, int, int]


def columns(drawn: list[Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, labels, groups = zip(*drawn, strict=True)
    return np.array(scores), np.array(labels, float), np.array(groups)


def random_rows(n: int, seed: int = 0, rate: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = (random.random(n) < rate).astype(float)
    return 1 / (1 + np.exp(-(labels + random.normal(size=n)))), labels


@settings(max_examples=50)
@given(rows)
def test_auc_and_logloss_are_scikit_learns(drawn: list[Row]) -> None:
    scores, labels, _ = columns(drawn)
    m = binary_metrics(scores, labels)
    assert m.logloss == pytest.approx(sklearn.metrics.log_loss(labels, scores, labels=[0, 1]))
    if 0 < labels.sum() < len(labels):
        assert m.auc == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))
    else:
        assert math.isnan(m.auc)


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    scores, labels = random_rows(80)
    scores = scores.round(1)
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert binary_metrics(scores, labels).auc == pytest.approx(np.mean(pairs), abs=1e-12)


def test_auc_of_float32_scores_keeps_their_order() -> None:
    scores, labels = random_rows(10_000)
    expected = sklearn.metrics.roc_auc_score(labels, scores.astype(np.float32))
    assert binary_metrics(scores.astype(np.float32), labels.astype(np.float32)).auc == pytest.approx(expected)


def naive_gauc(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> tuple[float, int]:
    total, size, left_out = 0.0, 0, 0
    for group in np.unique(groups):
        inside = groups == group
        if labels[inside].min() == labels[inside].max():
            left_out += 1
            continue
        total += inside.sum() * sklearn.metrics.roc_auc_score(labels[inside], scores[inside])
        size += inside.sum()
    return (total / size if size else math.nan), left_out


@settings(max_examples=50)  # scikit-learn takes a millisecond for each group
@given(rows)
def test_gauc_is_the_share_weighted_mean_over_groups_with_both_classes(drawn: list[Row]) -> None:
    scores, labels, groups = columns(drawn)
    gauc, left_out = grouped_auc(scores, labels, groups)
    expected, expected_left_out = naive_gauc(scores, labels, groups)
    assert gauc == pytest.approx(expected, nan_ok=True)
    assert left_out == expected_left_out


def test_gauc_with_many_groups_of_hashed_ids() -> None:
    random = np.random.default_rng(0)
    scores, labels = random_rows(3000)
    groups = random.integers(-(2**63), 2**63 - 1, 200)[random.integers(0, 200, 3000)]
    m = binary_metrics(scores, labels, groups)
    assert (m.gauc, m.gauc_left_out) == pytest.approx(naive_gauc(scores, labels, groups))


def test_gauc_ignores_what_all_rows_of_a_group_share() -> None:
    # The point of GAUC: a user's general level says nothing about which of the items the user likes.
    scores, labels = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0.0, 1.0, 0.0, 1.0])
    m = binary_metrics(scores, labels, np.array([1, 1, 2, 2]))
    assert (m.gauc, m.auc) == (1.0, 0.75)


def test_single_class_groups_are_left_out_and_counted() -> None:
    scores, labels = np.array([0.1, 0.2, 0.8, 0.9, 0.5]), np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    m = binary_metrics(scores, labels, np.array([1, 1, 2, 2, 3]))
    assert (m.gauc, m.gauc_left_out) == (1.0, 2)


def test_no_group_column_no_gauc() -> None:
    m = binary_metrics(*random_rows(50))
    assert math.isnan(m.gauc)
    assert m.gauc_left_out == 0


@pytest.mark.parametrize("seed", range(5))
def test_ece_is_torchmetrics(seed: int) -> None:
    scores, labels = random_rows(2000, seed)
    reference = BinaryCalibrationError(n_bins=15, norm="l1")
    # double: in float32 torchmetrics' sums carry errors of their own.
    expected = reference(torch.tensor(scores, dtype=torch.float64), torch.tensor(labels, dtype=torch.int64)).item()
    assert binary_metrics(scores, labels).ece == pytest.approx(expected, abs=1e-6)


def test_ece_by_hand_and_at_the_edges() -> None:
    # Two bins are used: scores 0 with rate 1/2, scores 1 (the last bin's upper edge) with rate 1.
    scores, labels = np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.0, 1.0])
    assert expected_calibration_error(scores, labels) == pytest.approx(0.25)


def test_ece_of_a_calibrated_score_is_small_and_of_a_shifted_one_is_the_shift() -> None:
    random = np.random.default_rng(0)
    truth = random.uniform(0.2, 0.7, 200_000)
    labels = (random.random(200_000) < truth).astype(float)
    assert expected_calibration_error(truth, labels) < 0.005
    assert expected_calibration_error(truth + 0.2, labels) == pytest.approx(0.2, abs=0.005)


def test_normalized_entropy_is_logloss_over_that_of_the_mean() -> None:
    scores, labels = random_rows(500)
    constant = np.full(500, labels.mean())
    assert binary_metrics(constant, labels).ne == pytest.approx(1.0)
    expected = sklearn.metrics.log_loss(labels, scores) / sklearn.metrics.log_loss(labels, constant)
    assert binary_metrics(scores, labels).ne == pytest.approx(expected)


def test_calibration_is_mean_score_over_positive_rate() -> None:
    m = binary_metrics(np.array([0.5, 0.7, 0.3, 0.9]), np.array([0.0, 1.0, 0.0, 0.0]))
    assert m.calibration == pytest.approx(0.6 / 0.25)


def test_certain_scores_have_a_finite_logloss() -> None:
    scores, labels = np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0])
    assert 0 < log_loss(scores, labels) < 100
    assert log_loss(scores[:2], labels[:2]) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_single_class_has_no_auc_and_no_normalized_entropy(label: float) -> None:
    m = binary_metrics(np.array([0.2, 0.4]), np.array([label, label]), np.array([1, 1]))
    assert all(map(math.isnan, (m.auc, m.gauc, m.ne)))
    assert (m.gauc_left_out, m.rows) == (1, 2)
    assert math.isfinite(m.logloss)
    assert math.isnan(m.calibration) == (label == 0)


def test_no_rows_no_metrics() -> None:
    m = binary_metrics(np.empty(0), np.empty(0), np.empty(0, np.int64))
    assert (m.rows, m.gauc_left_out) == (0, 0)
    assert all(map(math.isnan, (m.auc, m.gauc, m.logloss, m.ne, m.calibration, m.ece)))


@given(rows, st.randoms())
def test_the_order_of_the_rows_does_not_matter(drawn: list[Row], random: Any) -> None:
    mixed = list(drawn)
    random.shuffle(mixed)
    a, b = (binary_metrics(*columns(d)) for d in (drawn, mixed))
    for name in ("auc", "gauc", "gauc_left_out", "logloss", "ne", "calibration", "ece", "rows"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), nan_ok=True), name


# -- numbers, classes, levels

numbers = st.lists(st.tuples(st.integers(-40, 40), st.integers(-40, 40)), min_size=1, max_size=40)


@given(numbers, st.booleans())
def test_regression_metrics_are_scikit_learns(drawn: list[tuple[int, int]], log1p: bool) -> None:
    predictions, labels = (np.array(c) / 4 for c in zip(*drawn, strict=True))
    m = regression_metrics(predictions, labels, log1p)
    assert m.rmse == pytest.approx(sklearn.metrics.root_mean_squared_error(labels, predictions))
    assert m.mae == pytest.approx(sklearn.metrics.mean_absolute_error(labels, predictions))
    scale = [np.sign(x) * np.log1p(np.abs(x)) if log1p else x for x in (labels, predictions)]
    if np.ptp(labels):
        assert m.r2 == pytest.approx(sklearn.metrics.r2_score(*scale))
    else:
        assert math.isnan(m.r2)
    assert m.rows == len(drawn)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 8)), min_size=1, max_size=40))
def test_multiclass_metrics_are_scikit_learns(drawn: list[tuple[int, int, int]]) -> None:
    labels, favourites, weight = (np.array(c) for c in zip(*drawn, strict=True))
    p = np.full((len(labels), 4), 1.0)
    p[np.arange(len(labels)), favourites] += weight
    p /= p.sum(1, keepdims=True)
    m = multiclass_metrics(p, labels.astype(np.float32))
    assert m.accuracy == pytest.approx(sklearn.metrics.accuracy_score(labels, favourites))
    assert m.macro_f1 == pytest.approx(sklearn.metrics.f1_score(labels, favourites, average="macro"))
    assert m.logloss == pytest.approx(sklearn.metrics.log_loss(labels, p, labels=range(4)))
    assert m.rows == len(drawn)


LEVELS = np.array([1.0, 2.0, 3.0, 5.0])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(8, 40).map(lambda n: n / 8)), min_size=1, max_size=40))
def test_ordinal_metrics_are_scikit_learns_and_the_share_of_pairs(drawn: list[tuple[int, float]]) -> None:
    labels, scores = (np.array(c) for c in zip(*drawn, strict=True))
    m = ordinal_metrics(scores, labels.astype(np.float32), LEVELS)
    pairs = [
        (s > r) + 0.5 * (s == r)
        for (y, s) in zip(labels, scores, strict=True)
        for (x, r) in zip(labels, scores, strict=True)
        if y > x
    ]
    assert m.auc == pytest.approx(np.mean(pairs)) if pairs else math.isnan(m.auc)
    nearest = np.abs(LEVELS - scores[:, None]).argmin(1)  # of two equally near ones the lower
    if len({*labels, *nearest}) > 1:
        expected = sklearn.metrics.cohen_kappa_score(labels, nearest, weights="quadratic", labels=range(4))
        assert m.qwk == pytest.approx(expected)
    else:
        assert math.isnan(m.qwk)
    assert m.mae == pytest.approx(np.abs(LEVELS[labels] - scores).mean())
    assert m.rows == len(drawn)


def test_the_concordance_of_two_levels_is_the_auc() -> None:
    scores, labels = random_rows(300)
    m = ordinal_metrics(scores, labels, np.array([0.0, 1.0]))
    assert m.auc == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))


def test_metrics_of_other_kinds_are_torchmetrics() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 500)
    p = random.dirichlet(np.ones(4), 500)
    scores = LEVELS[labels] + random.normal(size=500)
    t_labels, t_p = torch.from_numpy(labels), torch.from_numpy(p)
    m = multiclass_metrics(p, labels)
    assert m.accuracy == pytest.approx(functional.multiclass_accuracy(t_p, t_labels, 4, average="micro").item(), abs=1e-6)
    assert m.macro_f1 == pytest.approx(functional.multiclass_f1_score(t_p, t_labels, 4, average="macro").item(), abs=1e-6)
    o = ordinal_metrics(scores, labels, LEVELS)
    nearest = torch.from_numpy(np.abs(LEVELS - scores[:, None]).argmin(1))
    kappa = functional.multiclass_cohen_kappa(nearest, t_labels, 4, weights="quadratic")
    assert o.qwk == pytest.approx(kappa.item(), abs=1e-6)


def test_no_rows_no_metrics_of_any_kind() -> None:
    none = np.empty(0)
    for m in (regression_metrics(none, none), multiclass_metrics(np.empty((0, 3)), none), ordinal_metrics(none, none, LEVELS)):
        assert m.rows == 0
        assert math.isnan(quality(m))
        assert all(math.isnan(value) for name, value in asdict(m).items() if name != "rows")


def test_the_quality_is_the_first_metric_and_has_a_name() -> None:
    found: list[Any] = [
        binary_metrics(*random_rows(50)),
        regression_metrics(np.array([0.0, 1.0]), np.array([0.0, 2.0])),
        multiclass_metrics(np.array([[0.3, 0.7]]), np.array([1])),
        ordinal_metrics(np.array([1.0, 2.0]), np.array([0, 1]), LEVELS),
    ]
    assert [quality_name(m) for m in found] == ["AUC", "R²", "accuracy", "AUC"]
    assert [quality(m) for m in found] == [found[0].auc, found[1].r2, found[2].accuracy, found[3].auc]


def test_groups_taken_some_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(4)
    scores, labels = random.random(900).round(2), random.integers(0, 2, 900).astype(float)
    groups = random.integers(0, 300, 900)
    whole = grouped_auc(scores, labels, groups)
    monkeypatch.setattr(metrics, "_SOME_ROWS", 100)
    assert grouped_auc(scores, labels, groups) == pytest.approx(whole)
