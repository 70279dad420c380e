"""Everything behind the routes, without HTTP: the models, the formula, and what becomes of a request."""

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from recsys_moe import typed
from recsys_moe.errors import UserError
from recsys_moe.serving.config import FormulaConfig, ServeConfig
from recsys_moe.serving.features import FeatureTable
from recsys_moe.serving.fuse import Formula
from recsys_moe.serving.metrics import Metrics
from recsys_moe.serving.models import Model, Models
from recsys_moe.serving.ranking import Stores, Timer, answer, formula_of, gather, inputs_of
from recsys_moe.serving.requests import Items, RankHead, ScoreRequest, rows_to_table
from recsys_moe.serving.traffic import route, shadow_of
from recsys_moe.serving.watch import Watched

log = logging.getLogger(__name__)


class Service:
    """What a replica holds. Methods may be called from several threads.

    Raises:
        UserError: a model, the formula or a model that traffic is sent to is not to be had.
    """

    def __init__(self, served: Path, config: ServeConfig) -> None:
        self.config, self.metrics = config, Metrics()
        self._file = Watched(Path(config.formula_file), self._read_formula) if config.formula_file else None
        self._items = _feature_file(config.item_features, config.item_key)
        self._users = _feature_file(config.user_features, config.user_key)
        self.models = Models(served, lambda model: Formula(self.formula, model.predictor.score_names))
        for diverted in (config.canary, config.shadow):
            if diverted is not None:
                self.models.find(diverted.model)

    @property
    def formula(self) -> FormulaConfig:
        return self._file.value if self._file else self.config.formula

    @property
    def refreshed(self) -> list[Callable[[], None]]:
        """What looks for changes."""
        return [self.models.refresh, *(file.refresh for file in self._files)]

    @property
    def _files(self) -> list[Watched[Any]]:
        return [file for file in (self._file, self._items, self._users) if file]

    @property
    def _stores(self) -> Stores:
        return Stores(self._items.value if self._items else None, self._users.value if self._users else None)

    def _read_formula(self, path: Path) -> FormulaConfig:
        try:
            data = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"serve.formula_file {str(path)!r} can't be read ({reason}); write YAML there") from None
        formula: FormulaConfig = typed.parse(FormulaConfig, data or {}, str(path))
        for model in self.models.all() if hasattr(self, "models") else ():
            Formula(formula, model.predictor.score_names)
        return formula

    def score(self, request: ScoreRequest) -> dict[str, Any]:
        """Scores of plain rows, by the first model."""
        if len(request.rows) > self.config.max_rows:
            raise UserError(f"{len(request.rows):,} rows are more than serve.max_rows = {self.config.max_rows:,}; send fewer")
        model = self.models.find(None)
        predictor = model.predictor
        scores = predictor.score(rows_to_table(request.rows, predictor.bundle.schema))
        return {"model": model.digest, "scores": {t: s.tolist() for t, s in zip(predictor.score_names, scores, strict=True)}}

    def rank(self, body: bytes, parse: Callable[[bytes], tuple[RankHead, Items]]) -> dict[str, Any]:
        """The answer to a ranking request, which `parse` reads, as `requests.RankResponse` has it.

        Raises:
            UserError: the request can't be answered; says why.
        """
        timer = Timer()
        request, items = parse(body)
        timer.ended("parse")
        request_id = request.request_id or secrets.token_hex(8)
        key = str(request_id if request.user_id is None else request.user_id)
        model, stores = self.models.find(route(request.model, key, self.config.canary)), self._stores
        formula = formula_of(request, model, self.formula, self.config)
        gathered = gather(request, items, model, self.config, stores)
        timer.ended("features")
        scores = model.predictor.score_inputs(inputs_of(gathered, model))
        timer.ended("score")
        result = answer(request, items, model, scores, formula(scores))
        timer.ended("rank")
        shadow = shadow_of(key, self.config.shadow)
        if shadow is not None:
            self._score_unseen(request, items, request_id, self.models.find(shadow))
        self.metrics.ranked(model, scores, timer.ms, gathered.unknown)
        told = {
            "candidates": gathered.rows,
            "ignored": gathered.ignored,
            "unknown_ids": gathered.unknown,
            "timings_ms": timer.ms,
        }
        return {"request_id": request_id, **result, **told}

    def _score_unseen(self, request: RankHead, items: Items, request_id: str, model: Model) -> None:
        """Score a request with the shadow model as well, whose scores are logged, in the request's order."""
        try:
            inputs = inputs_of(gather(request, items, model, self.config, self._stores), model)
            scores = model.predictor.score_inputs(inputs)
        except UserError as error:
            log.warning("shadow %s can't score request %s: %s", model.name, request_id, error)
            return
        rounded = {n: [float(f"{x:.6g}") for x in s.tolist()] for n, s in zip(model.predictor.score_names, scores, strict=True)}
        log.info("shadow", extra={"told": {"shadow": model.described, "request_id": request_id, "scores": rounded}})

    def describe(self, name: str | None = None) -> dict[str, Any]:
        """What a model is: tasks, features, metrics."""
        model = self.models.find(name)
        bundle = model.predictor.bundle
        return {
            "model": model.digest,
            "name": model.name,
            "version": model.version,
            "tasks": list(bundle.schema.task_names),
            "scores": list(model.predictor.score_names),
            "features": {f.name: f.kind for f in bundle.schema.features},
            "metrics": bundle.metrics,
        }

    def metrics_page(self) -> bytes:
        """What Prometheus scrapes."""
        refused = sum(map(len, self.models.refused.values())) + sum(file.refused is not None for file in self._files)
        return self.metrics.page(self.models.all(), refused)

    def status(self) -> dict[str, Any]:
        """Which versions are served, and what was refused and why."""
        return {
            "models": [model.described | {"refused": self.models.refused.get(model.name, {})} for model in self.models.all()],
            "refused": [file.refused for file in self._files if file.refused],
        }


def _feature_file(path: str | None, key: str | None) -> Watched[FeatureTable] | None:
    return Watched(Path(path), lambda file: FeatureTable(file, key or "")) if path else None
