"""`recsys-moe inspect`: what is counted and measured, against naive mathematics, and the page that shows it."""

import itertools
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from recsys_moe.bundle import FORMAT, BundleConfig, save_bundle
from recsys_moe.cli import app
from recsys_moe.errors import UserError
from recsys_moe.heads import BinaryHead, MulticlassHead, OrdinalHead, RegressionHead
from recsys_moe.models.mmoe import MMoEConfig
from recsys_moe.models.ple import PLEConfig
from recsys_moe.models.shared_bottom import SharedBottomConfig
from recsys_moe.pictures import draw_reliability, draw_scores, drawing, render
from recsys_moe.predictor import Predictor
from recsys_moe.report import Sample, Spectrum, TaskCurve, inspect, page_of, permutation_importance, write_report
from recsys_moe.schema import Schema
from recsys_moe.sources import DataConfig
from recsys_moe.trainer import TrainConfig, Trainer
from recsys_moe.typed import parse

MMOE = MMoEConfig(embedding_dim=4, num_experts=3, expert_dims=(8,), tower_dims=(4,), dropout=0.1)


def make_bundle(folder: Path, data: Any, model: Any, epochs: int = 1) -> Path:
    """Train a little and leave a bundle."""
    trainer = Trainer(data, model, TrainConfig(epochs=epochs, batch_size=128))
    trainer.fit()
    described = BundleConfig(FORMAT, model, "fp32", DataConfig(name="x", source="nowhere", schema="-"), "0" * 64)
    save_bundle(folder, trainer.whole_weights(), described, data.transform, {})
    return folder


@pytest.fixture(scope="module")
def clicks_bundle(tmp_path_factory: pytest.TempPathFactory, write_prepared: Any, clicks_schema: Any, clicks: Any) -> Path:
    """An MMoE that has learnt what `clicks` draws."""
    folder = tmp_path_factory.mktemp("inspect")
    parts = {"train": [clicks(1500, 1)], "validation": [clicks(400, 3)]}
    return make_bundle(folder / "bundle", write_prepared(folder / "prepared", clicks_schema, parts), MMOE, epochs=8)


# ---- what is counted -----------------------------------------------------------------------------------------------------

numbers = st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=50)


@given(numbers, st.integers(1, 8))
def test_a_spectrum_keeps_order_and_value(values: list[float], parts: int) -> None:
    x = np.array(values)
    spectrum = Spectrum(1)
    spectrum.add(x[:20], x[None, :20])
    spectrum.add(x[20:], x[None, 20:])
    runs = spectrum.quantiles(parts)
    assert len(runs) <= parts
    assert sum(count for _, count, _ in runs) == len(x)
    rising, low = np.sort(x), 0
    for run, count, (total,) in runs:
        mine = rising[low : low + count]
        assert total == pytest.approx(mine.sum(), rel=1e-9, abs=1e-25)
        filled = spectrum.values[run][spectrum.counts[run] > 0]
        for end, value in ((filled[0], mine[0]), (filled[-1], mine[-1])):
            assert end == pytest.approx(value, rel=0.005, abs=1e-37)
        low += count
    assert spectrum.quantile(1.0) == pytest.approx(rising[-1], rel=0.005, abs=1e-37)


def test_a_histogram_is_numpys() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=5000)
    spectrum = Spectrum()
    for piece in np.array_split(x, 7):
        spectrum.add(piece)
    edges = np.linspace(-1, 1, 9)
    expected = np.histogram(np.clip(x, -1, 1 - 1e-9), edges)[0] / len(x)
    np.testing.assert_allclose(spectrum.histogram(edges), expected, atol=0.004)  # a bin of the spectrum may lie astride an edge
    assert spectrum.histogram(edges).sum() == pytest.approx(1)


def naive_points(scores: np.ndarray, labels: np.ndarray, parts: int) -> list[tuple[int, float, float, float, float]]:
    order = np.argsort(scores, kind="stable")
    found = []
    for rows in np.array_split(order, parts):
        y = labels[rows]
        if set(np.unique(labels)) <= {0, 1}:
            interval = scipy.stats.binomtest(int(y.sum()), len(y)).proportion_ci(method="wilson")
            low, high = interval.low, interval.high
        else:
            half = 1.96 * y.std() / np.sqrt(len(y))
            low, high = y.mean() - half, y.mean() + half
        found.append((len(rows), scores[rows].mean(), y.mean(), low, high))
    return found


@pytest.mark.parametrize("kind", ["binary", "multiclass", "ordinal", "regression"])
def test_a_reliability_curve_is_a_loops(kind: str) -> None:
    random = np.random.default_rng(1)
    # Scores that lie in bins of their own, so that equal shares are cut at the same places.
    score = ((np.arange(0x3E00, 0x3E00 + 300, dtype=np.uint32) << 16) + 9).view(np.float32)
    score = score[random.permutation(300)]
    head: Any
    if kind == "binary":
        head, scores, labels = BinaryHead(), score[None], (random.random(300) < score / score.max()).astype(float)
        x, y = score, labels
    elif kind == "multiclass":
        head, labels = MulticlassHead(("a", "b", "c")), random.integers(0, 3, 300).astype(float)
        best = random.integers(0, 3, 300)
        scores = np.full((3, 300), 0.1, np.float32)
        scores[best, np.arange(300)] = score
        x, y = score, (best == labels).astype(float)
    elif kind == "ordinal":
        head, labels = OrdinalHead((1.0, 2.0, 5.0)), random.integers(0, 3, 300).astype(float)
        scores, x, y = score[None], score, np.array([1.0, 2.0, 5.0])[labels.astype(int)]
    else:
        head, labels = RegressionHead(False, None, 0.0, 1.0), random.normal(size=300)
        scores, x, y = score[None], score, labels
    curve = TaskCurve("task", head)
    for piece in np.array_split(np.arange(300), 4):
        curve.add(scores[:, piece], labels[piece])
    points = [(p.rows, p.score, p.label, p.low, p.high) for p in curve.points(10)]
    np.testing.assert_allclose(points, naive_points(x.astype(float), y, 10), rtol=1e-3, atol=1e-3)


def test_small_scores_are_written_apart() -> None:
    curve = TaskCurve("follow", BinaryHead())
    random = np.random.default_rng(0)
    scores = random.uniform(0.0055, 0.0069, 2000)
    curve.add(scores[None].astype(np.float32), (random.random(2000) < 0.01).astype(float))
    with drawing():
        for figure in (draw_scores([curve] * 3), draw_reliability([curve] * 3)):
            render(figure)
            for axis in figure.axes:
                low, high = axis.get_xlim()
                boxes = [x.get_window_extent() for x in axis.get_xticklabels() if low <= x.get_position()[0] <= high]
                assert len(boxes) > 1
                assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))


def test_a_curve_of_no_rows_has_no_points() -> None:
    assert TaskCurve("task", BinaryHead()).points() == []


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any), st.integers(1, 30), st.integers(0, 3))
def test_a_sample_depends_on_rows_and_seed_alone(cuts: list[int], rows: int, seed: int) -> None:
    whole = pa.table({"n": np.arange(sum(cuts))})
    pieces, one = Sample(rows, seed), Sample(rows, seed)
    one.add(whole)
    low = 0
    for cut in cuts:
        pieces.add(whole.slice(low, cut))
        low += cut
    chosen = pieces.table()["n"].to_pylist()
    assert chosen == one.table()["n"].to_pylist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(rows, sum(cuts))


def test_every_row_is_as_likely_to_be_in_a_sample() -> None:
    counts = np.zeros(100)
    for seed in range(400):
        sample = Sample(10, seed)
        for low in range(0, 100, 25):
            sample.add(pa.table({"n": np.arange(low, low + 25)}))
        counts[sample.table()["n"].to_numpy()] += 1
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


# ---- what is measured ----------------------------------------------------------------------------------------------------


def test_permutation_importance_is_a_loops(clicks_bundle: Path, clicks: Callable[..., pa.Table]) -> None:
    predictor, rows = Predictor(clicks_bundle), clicks(800, 9)
    found = permutation_importance(predictor, rows, seed=3)
    assert found.features == ("colour", "price")
    frame = rows.to_pandas()
    clicked = frame["click"] == 1

    def aucs(table: pa.Table) -> list[float]:
        click, buy = predictor.score(table)
        return [
            sklearn.metrics.roc_auc_score(frame["click"], click),
            sklearn.metrics.roc_auc_score(frame["buy"][clicked], buy[clicked]),  # observed where a click happened
        ]

    for number, feature in enumerate(found.features):
        random, losses = np.random.default_rng((3, number)), []
        for _ in range(3):
            values = rows[feature].to_pylist()
            shuffled = pa.array([values[i] for i in random.permutation(800)], rows[feature].type)
            table = rows.set_column(rows.column_names.index(feature), feature, shuffled)
            losses.append(np.subtract(aucs(rows), aucs(table)))
        np.testing.assert_allclose(found.mean[number], np.mean(losses, 0), atol=1e-6)
        np.testing.assert_allclose(found.deviation[number], np.std(losses, 0), atol=1e-6)
    # Red things are clicked, cheap ones bought.
    (colour_click, colour_buy), (price_click, price_buy) = found.mean
    assert colour_click > 0.1 > abs(price_click)
    assert price_buy > 0.1 > abs(colour_buy)


def test_what_is_inspected_is_what_is_evaluated(clicks_bundle: Path, clicks: Callable[..., pa.Table]) -> None:
    predictor, rows, told = Predictor(clicks_bundle), clicks(900, 5), list[tuple[str, int, int | None]]()
    pieces = [rows.slice(0, 500), rows.slice(500)]
    found = inspect(predictor, pieces, "m", "d", 5000, 0, lambda phase, done, total: told.append((phase, done, total)))
    expected = predictor.evaluate(pieces)
    for task, values in found.metrics.items():
        assert values["auc"] == pytest.approx(expected[task].auc, abs=1e-6)
        assert values["gauc"] == pytest.approx(expected[task].gauc, abs=1e-6)  # type: ignore[union-attr]
    assert [int(curve.scores.counts.sum()) for curve in found.curves] == [900, int(rows.to_pandas()["click"].sum())]
    assert told == [
        ("score", 500, None),
        ("score", 900, None),
        ("score", 900, 900),
        ("permute features", 1, 2),
        ("permute features", 2, 2),
    ]
    again = inspect(predictor, pieces, "m", "d", 300, 7)
    assert again.sampled == 300
    assert again.to_json() == inspect(predictor, [rows], "m", "d", 300, 7).to_json()
    assert again.to_json() != inspect(predictor, [rows], "m", "d", 300, 8).to_json()


# ---- the page ------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What is on a page: tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data + " "


EVIL = '<img src=x onerror="alert(1)"> $\\frac{1}{$ & 名'
KINDS: dict[str, Any] = {
    "features": [{"name": EVIL, "kind": "categorical"}, {"name": "size", "kind": "numeric"}],
    "tasks": [
        {"name": "click", "label": "click == 1"},
        {"name": "minutes", "kind": "regression", "label": "minutes", "log1p": True},
        {"name": "ending", "kind": "multiclass", "label": "ending", "classes": [EVIL, "back"]},
        {"name": "stars", "kind": "ordinal", "label": "stars", "levels": [1, 2, 5]},
        {"name": "never", "label": "click == 1", "mask": "click > 1"},
    ],
}


def every_kind(rows: int, seed: int) -> pa.Table:
    random = np.random.default_rng(seed)
    return pa.table(
        {
            EVIL: random.choice(["a", "b", "<script>"], rows),
            "size": random.normal(size=rows),
            "click": random.integers(0, 2, rows),
            "minutes": random.exponential(5, rows),
            "ending": random.choice([EVIL, "back"], rows),
            "stars": random.choice([1, 2, 5], rows),
        }
    )


@pytest.mark.parametrize("family", ["ple", "shared_bottom"])
def test_the_page_needs_nothing_else_and_takes_names_as_text(family: str, tmp_path: Path, write_prepared: Any) -> None:
    schema: Schema = parse(Schema, KINDS, "schema")
    parts = {"train": [every_kind(300, 1)], "validation": [every_kind(200, 2)]}
    data = write_prepared(tmp_path / "prepared", schema, parts)
    model: Any = PLEConfig(embedding_dim=4, expert_dims=(8,), tower_dims=(4,))
    if family == "shared_bottom":
        model = SharedBottomConfig(embedding_dim=4, bottom_dims=(8,), tower_dims=(4,))
    predictor = Predictor(make_bundle(tmp_path / "bundle", data, model))
    found = inspect(predictor, [every_kind(300, 3)], EVIL, "</title><script>alert(1)</script>", 200, 0)
    source = page_of(found)
    page = Page(source)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "form"}
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == (6 if family == "ple" else 4)
    for attributes in images:
        assert set(attributes) == {"src", "alt"}
        assert (attributes["src"] or "").startswith("data:image/png;base64,")
        assert attributes["alt"]
    assert "http" not in source.replace("http-equiv", "")
    assert "default-src 'none'" in source
    assert page.words.count(EVIL) >= 3  # the title, the heading, the table of features
    assert "</title><script>alert(1)</script>" in page.words
    assert "no gates and no experts" in page.words if family == "shared_bottom" else "no expert has collapsed" in page.words
    assert {"r2", "accuracy", "qwk", "auc"} <= set(page.words.split())
    assert found.metrics["never"]["rows"] == 0
    assert found.to_json()["importance"]["size"]["never"] == {"mean": None, "std": None}


def test_anomalies_are_on_the_page(clicks_bundle: Path, clicks: Callable[..., pa.Table]) -> None:
    predictor = Predictor(clicks_bundle)
    bias: Any = predictor.bundle.model.network.experts.norms[0].bias  # type: ignore[union-attr,index]
    bias.data[1] = -1000
    found = inspect(predictor, [clicks(200, 5)], "m", "d", 100, 0)
    assert [finding.experts for finding in found.findings if finding.anomaly == "collapse"] == [("expert 1",)]
    words = Page(page_of(found)).words
    assert "expert 'expert 1' of 'experts' has collapsed: 100% of its activations are zero" in words
    assert "No anomaly" not in words


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output '.*' can't be written \(.*\); name another file"):
        write_report("page", tmp_path / "missing" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="can't be written"):
        write_report("page", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    write_report("page", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "page"


# ---- the command ---------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *arguments])


def test_the_command_writes_a_report_and_says_what_is_in_it(
    clicks_bundle: Path, clicks: Callable[..., pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(clicks(700, 6), "rows.parquet")
    done = command(str(clicks_bundle), "rows.parquet", "--rows", "400", "--output", "page.html", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["rows"], told["sampled"], told["report"]) == (700, 400, "page.html")
    assert told["importance"]["colour"]["click"]["mean"] > 0.1
    assert Path("page.html").read_text().startswith("<!doctype html>")
    again = command(str(clicks_bundle), "rows.parquet", "--output", "page.html")
    assert str(again.exception) == "--output 'page.html' exists already; name a new file or delete it"


MISTAKES = {
    "no file": (["nowhere.parquet"], "does not exist"),
    "no labels": (["no_labels.parquet"], "click"),
    "no rows": (["empty.parquet"], "empty.parquet"),
    "no label in any row": (["unlabelled.parquet"], "no row of 'unlabelled.parquet' has a label that counts for a task"),
    "no folder": (["rows.parquet", "--output", "no/page.html"], "--output 'no/page.html' lies in no folder"),
    "a bad label": (["bad.parquet"], "gives 6; a binary label is 0 or 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(
    name: str, clicks_bundle: Path, clicks: Callable[..., pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = clicks(50, 6)
    pq.write_table(rows, "rows.parquet")
    pq.write_table(rows.drop_columns(["click"]), "no_labels.parquet")
    pq.write_table(rows.slice(0, 0), "empty.parquet")
    nulls = pa.nulls(len(rows), rows["click"].type)
    pq.write_table(rows.set_column(rows.column_names.index("click"), "click", nulls), "unlabelled.parquet")
    bundle = clicks_bundle
    if name == "a bad label":
        # The schema's label is a comparison, which is always 0 or 1: this one is not.
        bundle = tmp_path / "bundle"
        bundle.mkdir()
        for file in clicks_bundle.iterdir():
            (bundle / file.name).write_bytes(file.read_bytes().replace(b'"click == 1"', b'"click + 6"', 1))
        pq.write_table(rows, "bad.parquet")
    arguments, sentence = MISTAKES[name]
    done = command(str(bundle), *arguments)
    assert isinstance(done.exception, UserError), done.output
    assert sentence in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not list(tmp_path.glob("**/*.html"))


def test_a_part_of_the_bundles_own_data_is_found(
    clicks_bundle: Path, clicks: Callable[..., pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recsys_moe.pipelines import prepare

    asked: list[Any] = []
    rows = clicks(80, 6)
    monkeypatch.setattr("recsys_moe.sources.read_part", lambda data, schema, part: asked.append((data.name, part)) or [rows])
    monkeypatch.setattr(prepare, "digest_data", lambda *arguments: "0" * 64)
    done = command(str(clicks_bundle), "validation", "--output", str(tmp_path / "page.html"))
    assert done.exit_code == 0, done.output
    assert asked == [("x", "validation")]
    assert "80 rows scored" in done.stdout
