"""Intervals: statistics of weighted rows against scikit-learn's, and the bootstrap against what it must do."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import r2_score, roc_auc_score

from recsys_moe.intervals import (
    Interval,
    auc_of,
    bootstrap,
    concordance_of,
    difference,
    drawn_seeds,
    gauc_of,
    mean_of,
    r2_of,
    seed_interval,
    widening,
)
from recsys_moe.metrics import concordance, grouped_auc


def repeated(weights: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """The rows as often as their weights say: what a weight of n means."""
    return [np.repeat(array, weights.astype(int)) for array in arrays]


@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 30))
def test_weighted_statistics_are_those_of_repeated_rows(seed: int, rows: int, values: int) -> None:
    random = np.random.default_rng(seed)
    scores = random.integers(values, size=rows) / values
    labels, levels = (random.random(rows) < 0.4).astype(float), random.integers(4, size=rows)
    groups = random.integers(5, size=rows)
    weights = random.integers(3, size=rows).astype(float)
    s, y, k = repeated(weights, scores, labels, levels)
    if len(set(y)) == 2:
        assert auc_of(scores, labels)(weights) == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights))
        assert auc_of(scores, labels)(weights) == pytest.approx(roc_auc_score(y, s))
    else:
        assert math.isnan(auc_of(scores, labels)(weights))
    assert concordance_of(scores, levels)(weights) == pytest.approx(concordance(s, k), nan_ok=True)
    of_group = random.integers(3, size=5).astype(float)[groups]
    s, y, g = repeated(of_group, scores, labels, groups)
    assert gauc_of(scores, labels, groups)(of_group) == pytest.approx(grouped_auc(s, y, g)[0], nan_ok=True)
    if weights.sum() > 1 and np.ptp(repeated(weights, labels)[0]):
        assert r2_of(scores, labels)(weights) == pytest.approx(r2_score(labels, scores, sample_weight=weights))
        assert mean_of(scores)(weights) == pytest.approx(np.average(scores, weights=weights))


def test_seed_interval_is_students() -> None:
    values = [0.71, 0.74, 0.70, 0.73]
    found = seed_interval(values)
    expected = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)


def test_bootstrap_of_a_mean_has_its_standard_error_and_pairs_rows() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(size=500)  # what makes a row hard for both models
    statistics = {
        "a": [{"m": mean_of(hard)}],
        "b": [{"m": mean_of(hard + 0.1 + 0.01 * random.normal(size=500))}],
    }
    drawn = bootstrap(statistics, None, 500, 400)
    assert np.std(drawn["a"]["m"]) == pytest.approx(hard.std() / math.sqrt(500), rel=0.15)
    gap = difference(drawn["b"]["m"], drawn["a"]["m"], np.array([[0.1]]), np.zeros((1, 1)))
    assert gap.clear
    assert gap.high - gap.low < 0.004 < 0.1 * np.std(drawn["a"]["m"]) * 4


def test_seeds_that_differ_widen_the_interval() -> None:
    values = np.random.default_rng(0).normal(size=200)
    near, far = ([{"m": mean_of(values + shift)} for shift in shifts] for shifts in ((0.0, 0.0, 0.0), (-1.0, 0.0, 1.0)))
    drawn = bootstrap({"near": near, "far": far, "one": near[:1]}, None, 200, 300)
    for model in ("near", "far"):
        assert drawn[model]["m"] == pytest.approx(drawn["one"]["m"])  # the rows are the same for all
    random = np.random.default_rng(0)
    assert np.std(drawn_seeds(np.array([[-1.0, 0.0, 1.0]]), 3000, random)) == pytest.approx(1 / math.sqrt(3), rel=0.1)
    assert np.std(drawn_seeds(np.array([[1.0, 2.0], [1.0, 2.0]]), 3000, random)) == pytest.approx(1 / math.sqrt(8), rel=0.1)
    for of_one in (np.array([[0.7]]), np.array([[0.7, 0.7]])):
        assert np.abs(drawn_seeds(of_one, 300, random)).max() < 1e-12


@pytest.mark.parametrize(("folds", "seeds", "of_rows"), [(1, 2, 0.0), (1, 3, 2.0), (5, 2, 0.0)])
def test_an_interval_of_few_seeds_holds_the_truth_as_often_as_it_says(folds: int, seeds: int, of_rows: float) -> None:
    """Two models that are equally good, whose seeds differ by 1 and whose rows' differences by `of_rows`."""
    hits, trials = 0, 200
    for trial in range(trials):
        random = np.random.default_rng(trial)
        rows = of_rows * random.normal(size=20)
        a, b = random.normal(size=(2, folds, seeds))
        drawn = bootstrap({"a": [{"m": mean_of(np.zeros(20))}], "b": [{"m": mean_of(rows)}]}, None, 20, 200, trial)
        hits += not difference(b.mean() + drawn["b"]["m"], a.mean() + drawn["a"]["m"], b + rows.mean(), a).clear
    assert 0.9 <= hits / trials <= 0.99  # plain draws of seeds, of all folds at once: 0.69, 0.80, 0.59


def test_seeds_that_agree_or_stand_alone_widen_nothing() -> None:
    assert widening(np.array([[0.5], [0.6]]), np.array([[0.5], [0.7]])) == 1
    assert widening(np.full((2, 3), 0.5), np.full((2, 3), 0.75)) == 1
    three = np.array([[0.5, 0.6, 0.7]])  # the other model's only seed has no spread that is known
    assert widening(three, np.array([[0.5]])) == pytest.approx(stats.t.ppf(0.975, 2) / stats.norm.ppf(0.975))


def test_groups_are_drawn_whole() -> None:
    values = np.repeat(np.random.default_rng(0).normal(size=40), 25)  # a user's rows are alike: 40 facts, not 1,000
    units = np.repeat(np.arange(40), 25)
    by_group = bootstrap({"a": [{"m": mean_of(values)}]}, units, 1000, 300)["a"]["m"]
    by_row = bootstrap({"a": [{"m": mean_of(values)}]}, None, 1000, 300)["a"]["m"]
    assert np.std(by_group) == pytest.approx(values.std() / math.sqrt(40), rel=0.15)
    assert np.std(by_row) < np.std(by_group) / 3


def test_no_draws_no_interval() -> None:
    gap = difference(np.empty(0), np.empty(0), np.array([[0.2, 0.4]]), np.array([[0.1]]))
    assert gap.value == pytest.approx(0.2)
    assert math.isnan(gap.low)
    assert not gap.clear
    assert not Interval(0.1, -0.1, 0.3).clear
