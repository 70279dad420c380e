"""The MMoE paper's generator against its formulas, computed naively and by quadrature."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_moe import correlated
from recsys_moe.config import compose, conf_dir
from recsys_moe.correlated import Tasks, draw, load_correlated_config, synthesise_correlated
from recsys_moe.errors import UserError
from recsys_moe.labels import task_labels
from recsys_moe.sources import DataConfig, read_part
from recsys_moe.transforms import PartialStatistics, Transform
from recsys_moe.typed import parse


def written(folder: Path, kind: str = "logs") -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted((folder / kind).glob("*.parquet"))])


@pytest.mark.parametrize("p", [-0.7, 0.0, 0.5, 1.0])
def test_weights_have_the_length_c_and_the_cosine_p(p: float) -> None:
    w1, w2 = Tasks(load_correlated_config([f"p={p}", "c=0.4"]), seed=3).weights
    assert np.linalg.norm(w1) == pytest.approx(0.4)
    assert np.linalg.norm(w2) == pytest.approx(0.4)
    assert w1 @ w2 / 0.16 == pytest.approx(p, abs=1e-12)


def test_labels_are_the_papers_formula(tmp_path: Path) -> None:
    config = load_correlated_config(["dim=7", "m=3", "noise=0.04"])
    synthesise_correlated(config, tmp_path / "pair", 2000, seed=4)
    tasks = Tasks(config, seed=4)
    alpha, beta = np.random.default_rng(0).normal(size=3), np.random.default_rng(1).normal(size=3)
    logs, truth = written(tmp_path / "pair"), written(tmp_path / "pair", "truth")
    assert logs.column_names == [f"x{n:03d}" for n in range(7)] + ["y1", "y2"]
    for row in range(0, 2000, 97):
        x = [float(logs[f"x{n:03d}"][row].as_py()) for n in range(7)]
        for task, w in enumerate(tasks.weights):
            z = sum(a * b for a, b in zip(w, x, strict=True))
            y = z + sum(math.sin(alpha[i] * z + beta[i]) for i in range(3))
            assert truth[f"y{task + 1}"][row].as_py() == pytest.approx(y, abs=1e-6)
    noise = np.stack([logs[y].to_numpy() - truth[y].to_numpy() for y in ("y1", "y2")])
    assert noise.var(axis=1) == pytest.approx(0.04, rel=0.15)
    assert abs(np.corrcoef(noise)[0, 1]) < 0.07
    x = np.stack([logs[f"x{n:03d}"].to_numpy() for n in range(7)])
    assert np.cov(x) == pytest.approx(np.eye(7), abs=0.12)


def expected_correlation(tasks: Tasks, noise: float) -> float:
    """By Gauss-Hermite quadrature: w1ᵀx and w2ᵀx are jointly normal with variance c² and correlation p."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    p, c = tasks.config.p, tasks.config.c

    def f(z: float) -> float:
        return z + sum(math.sin(a * z + b) for a, b in zip(tasks.alpha, tasks.beta, strict=True))

    first, second, both, squares = 0.0, 0.0, 0.0, 0.0
    for (s, ws), (t, wt) in product(zip(nodes, weights, strict=True), repeat=2):
        y1, y2 = f(c * s), f(c * (p * s + math.sqrt(1 - p * p) * t))
        first, second, both = first + ws * wt * y1, second + ws * wt * y2, both + ws * wt * y1 * y2
        squares += ws * wt * y1 * y1
    return (both - first * second) / (squares - first**2 + noise)


@pytest.mark.parametrize("p", [-0.5, 0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("c", [0.3, 1.5])
def test_correlation_is_that_of_the_formula(tmp_path: Path, p: float, c: float) -> None:
    config = load_correlated_config([f"p={p}", f"c={c}", "dim=10"])
    summary = synthesise_correlated(config, tmp_path / "pair", 40_000, seed=0)
    logs = written(tmp_path / "pair")
    assert summary["correlation"] == pytest.approx(np.corrcoef(logs["y1"], logs["y2"])[0, 1], abs=1e-5)
    assert summary["correlation"] == pytest.approx(expected_correlation(Tasks(config, 0), config.noise), abs=0.02)
    assert json.loads((tmp_path / "pair" / "synth.json").read_text()) == summary
    assert summary["std"] == pytest.approx([np.std(logs[y].to_numpy()) for y in ("y1", "y2")], rel=1e-4)


def test_a_seed_gives_the_same_rows_and_fewer_are_the_beginning_of_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correlated, "BLOCK_ROWS", 100)
    monkeypatch.setattr(correlated, "FILE_ROWS", 300)
    config = load_correlated_config(["dim=4"])
    told: list[int] = []
    synthesise_correlated(config, tmp_path / "a", 750, 0, told.append)
    assert told == [100, 200, 300, 400, 500, 600, 700, 750]
    assert [pq.read_metadata(path).num_rows for path in sorted((tmp_path / "a" / "logs").iterdir())] == [300, 300, 150]
    synthesise_correlated(config, tmp_path / "b", 750, 0)
    synthesise_correlated(config, tmp_path / "c", 450, 0)
    synthesise_correlated(config, tmp_path / "d", 750, 1)
    assert written(tmp_path / "a").equals(written(tmp_path / "b"))
    assert written(tmp_path / "a").slice(0, 450).equals(written(tmp_path / "c"))
    assert not written(tmp_path / "a").equals(written(tmp_path / "d"))


def test_numbers_change_what_they_say_only() -> None:
    base, other = (Tasks(load_correlated_config(changes), 0) for changes in ([], ["alpha_seed=7"]))
    assert np.array_equal(base.weights, other.weights)
    assert np.array_equal(base.beta, other.beta)
    assert not np.array_equal(base.alpha, other.alpha)
    x, y, expected = draw(Tasks(load_correlated_config(["noise=0", "m=0"]), 0), 0, 0, 50)
    assert np.array_equal(y, expected)
    np.testing.assert_allclose(y, base.weights @ x.T, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("p=2", "'p' is 2; input should be less than or equal to 1"),
        ("p=much", "'p' is 'much'; input should be a valid number"),
        ("q=1", "unknown key 'q'"),
        ("p", "'p' changes nothing; write a generator's number, such as p=0.9"),
        ("version=x", "'version=x' changes nothing"),
    ],
)
def test_a_wrong_number_is_one_sentence(change: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        load_correlated_config([change])


def test_what_is_written_is_what_its_configuration_reads(tmp_path: Path) -> None:
    synthesise_correlated(load_correlated_config(), tmp_path / "task_correlation", 1000, seed=0)
    data = parse(DataConfig, compose(["data=task_correlation", f"runs_dir={tmp_path}"])["data"], "data")
    schema = data.load_schema(conf_dir() / "schema")
    logs = written(tmp_path / "task_correlation")
    assert (schema.feature_names, schema.task_names) == (tuple(logs.column_names[:-2]), ("y1", "y2"))
    train = pa.concat_tables(list(read_part(data, schema, "train")))
    statistics = PartialStatistics.of(train, schema)
    statistics.merge(PartialStatistics.of_labels(*task_labels(train, schema), schema))
    transform = Transform(schema, statistics.finish(schema))
    assert transform(train).dense.shape == (100, 800)
    assert [target.rows for target in transform.statistics.targets] == [800, 800]
