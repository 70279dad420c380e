"""What Prometheus scrapes: latencies, candidates, models, and how far served scores have drifted from training's.

The drift of a score is its population stability index against the self-test's rows (see `recsys_moe.selftest`): with p_i and
q_i the shares of training's and of the latest served scores in the i-th of ten bins between training's deciles,

    PSI = Σ_i (q_i − p_i) · ln(q_i / p_i),

each share counted from half a row upwards. Below 0.1 is little, above 0.25 much. Old scores fade: counts are halved at every
100,000 rows.
"""

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from recsys_moe.selftest import read_selftest
from recsys_moe.serving.models import Model

LATENCIES = (
    *(0.0001, 0.00025, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075),
    *(0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
)
REQUESTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SIZES = (1, 10, 25, 50, 100, 150, 200, 300, 500, 1000, 2000, 5000)

_BINS, _FADE = 10, 100_000


class Drift:
    """The latest scores of one model beside training's; `add` is called by one thread at a time."""

    def __init__(self, trained_sn: npt.NDArray[np.float32]) -> None:
        self._edges = np.quantile(trained_sn, np.linspace(0, 1, _BINS + 1)[1:-1], axis=1).T
        self._trained = self._count(trained_sn)
        self._served = np.zeros_like(self._trained)

    def add(self, scores_sn: npt.NDArray[np.float32]) -> None:
        if self._served[0].sum() > _FADE:
            self._served /= 2
        self._served += self._count(scores_sn)

    def psi(self) -> npt.NDArray[np.float64]:
        """The index of each score `[S]`; 0 before anything was served."""
        if not self._served.any():
            return np.zeros(len(self._served))
        p, q = (np.maximum(c, 0.5) / c.sum(1, keepdims=True) for c in (self._trained, self._served))
        index: npt.NDArray[np.float64] = ((q - p) * np.log(q / p)).sum(1)
        return index

    def _count(self, scores_sn: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        rows = [
            np.bincount(np.searchsorted(edges, scores, side="right"), minlength=_BINS)
            for edges, scores in zip(self._edges, scores_sn, strict=True)
        ]
        return np.array(rows, np.float64)


class Metrics:
    """A service's own registry: a process may hold several services."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        named: Any = {"namespace": "recsys_moe", "registry": self._registry}
        self._requests = Counter("requests", "Answered requests", ["route", "status"], **named)
        self._seconds = Histogram(
            "request_seconds", "From the body's last byte to the answer", ["route"], buckets=LATENCIES, **named
        )
        self._steps = Histogram("rank_step_seconds", "Steps of a ranking request", ["step"], buckets=LATENCIES, **named)
        self._sizes = Histogram("candidates_per_request", "Candidates of a ranking request", buckets=SIZES, **named)
        self._batch_requests = Histogram("batch_requests", "Requests scored in one call", buckets=REQUESTS, **named)
        self._batch_rows = Histogram("batch_rows", "Rows scored in one call", buckets=SIZES, **named)
        self._candidates = Counter("candidates", "Candidates and plain rows scored", ["model", "version"], **named)
        self._unknown = Counter("unknown_ids", "Ids that the feature files lack", **named)
        self._info = Gauge("model_info", "1 for each version that is served", ["model", "version", "digest"], **named)
        self._refused = Gauge("refused", "Versions and files that could not be used", **named)
        self._drift = Gauge("score_drift_psi", "Served scores against training's", ["model", "score"], **named)
        self._drifts = weakref.WeakKeyDictionary[Model, Drift | None]()

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def called(self, requests: int, rows: int) -> None:
        """Count a call of a predictor, for requests that waited together."""
        self._batch_requests.observe(requests)
        self._batch_rows.observe(rows)

    def ranked(self, candidates: int, steps_ms: Mapping[str, float], unknown: int) -> None:
        """Count a ranking request."""
        for step, ms in steps_ms.items():
            self._steps.labels(step).observe(ms / 1000)
        self._sizes.observe(candidates)
        self._unknown.inc(unknown)

    def scored(self, model: Model, scores_sn: npt.NDArray[np.float32]) -> None:
        """Count rows of any request; called by one thread at a time."""
        self._candidates.labels(model.name, model.version).inc(scores_sn.shape[1])
        drift = self._drift_of(model)
        if drift is not None:
            drift.add(scores_sn)

    def page(self, models: list[Model], refused: int) -> bytes:
        """The metrics in Prometheus' text form, of the models that are served now."""
        self._info.clear()
        self._drift.clear()
        self._refused.set(refused)
        for model in models:
            self._info.labels(model.name, model.version, model.digest).set(1)
            drift = self._drifts.get(model)
            if drift is not None:
                for name, value in zip(model.predictor.score_names, drift.psi(), strict=True):
                    self._drift.labels(model.name, name).set(value)
        text: bytes = generate_latest(self._registry)
        return text

    def _drift_of(self, model: Model) -> Drift | None:
        if model not in self._drifts:
            found = read_selftest(model.predictor)
            self._drifts[model] = Drift(found[1]) if found else None
        return self._drifts[model]
