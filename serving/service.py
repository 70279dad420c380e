"""Everything behind the routes, without HTTP: the models, the formula, and what becomes of a request."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import yaml

from recsys_moe import typed
from recsys_moe.errors import UserError
from recsys_moe.serving.config import FormulaConfig, ServeConfig
from recsys_moe.serving.featurelog import FeatureLog
from recsys_moe.serving.features import FeatureTable
from recsys_moe.serving.fuse import Formula
from recsys_moe.serving.metrics import Metrics
from recsys_moe.serving.models import Model, Models
from recsys_moe.serving.ranking import Stores
from recsys_moe.serving.traffic import chosen
from recsys_moe.serving.watch import Watched


class Service:
    """What a replica holds. Methods may be called from several threads.

    Raises:
        UserError: a model, the formula or a model that traffic is sent to is not to be had.
    """

    def __init__(self, served: Path, config: ServeConfig) -> None:
        self.config, self.metrics = config, Metrics()
        self._file = Watched(Path(config.formula_file), self._read_formula) if config.formula_file else None
        self._items = self._feature_file(config.item_features, config.item_key)
        self._users = self._feature_file(config.user_features, config.user_key)
        self.models = Models(served, self._check_fit)
        self.features = FeatureLog(Path(config.feature_log)) if config.feature_log else None
        for diverted in (config.canary, config.shadow):
            if diverted is not None:
                self.models.find(diverted.model)

    def _check_fit(self, model: Model) -> None:
        Formula(self.formula, model.predictor.score_names)
        for table in (self.stores.items, self.stores.user):
            if table is not None:
                table.encoded(model.predictor.bundle.transform)  # so that no request has to wait for it

    def check_rows(self, rows: int) -> None:
        """Refuse a request of more plain rows than may be.

        Raises:
            UserError: more than `max_rows`.
        """
        if rows > self.config.max_rows:
            raise UserError(f"{rows:,} rows are more than serve.max_rows = {self.config.max_rows:,}; send fewer")

    def log_features(
        self, request_id: str, model: Model, rows: Callable[[], pa.Table], scores_sn: npt.NDArray[np.float32]
    ) -> None:
        """Keep a request's rows and scores in the feature log, if it is of the share."""
        if self.features and chosen(self.config.feature_log_share, "feature log", request_id):
            self.features.add(request_id, model, rows(), scores_sn)

    @property
    def formula(self) -> FormulaConfig:
        return self._file.value if self._file else self.config.formula

    @property
    def refreshed(self) -> list[Callable[[], None]]:
        """What looks for changes."""
        log_of_features = [self.features.refresh] if self.features else []
        return [self.models.refresh, *(file.refresh for file in self._files), *log_of_features]

    @property
    def _files(self) -> list[Watched[Any]]:
        return [file for file in (self._file, self._items, self._users) if file]

    @property
    def stores(self) -> Stores:
        return Stores(self._items.value if self._items else None, self._users.value if self._users else None)

    def _feature_file(self, path: str | None, key: str | None) -> Watched[FeatureTable] | None:
        def read(file: Path) -> FeatureTable:
            table = FeatureTable(file, key or "")
            for model in self.models.all() if hasattr(self, "models") else ():
                table.encoded(model.predictor.bundle.transform)
            return table

        return Watched(Path(path), read) if path else None

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
