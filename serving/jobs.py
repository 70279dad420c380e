"""What becomes of a request between the route that reads it and the answer (see `recsys_moe.serving.batching`)."""

import logging
import secrets
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recsys_moe.errors import UserError
from recsys_moe.predictor import Predictor
from recsys_moe.serving import ranking
from recsys_moe.serving.models import Model
from recsys_moe.serving.requests import Items, RankHead
from recsys_moe.serving.service import Service
from recsys_moe.serving.traffic import route, shadow_of
from recsys_moe.transforms import Inputs

log = logging.getLogger(__name__)


class Rows:
    """Plain rows for one model; `write` makes the answer of the scores `[S, N]`, `told` stands in the log's line."""

    scores_sn: npt.NDArray[np.float32] | None = None

    def __init__(
        self,
        service: Service,
        model: Model,
        rows: int,
        table: Callable[[], pa.Table],
        write: Callable[[npt.NDArray[np.float32]], Any],
        told: dict[str, Any],
    ) -> None:
        self.service, self.model, self.rows, self._table, self._write = service, model, rows, table, write
        self.request_id = told["request_id"]
        told.update(model=model.name, version=model.version, rows=rows)

    def prepare(self) -> tuple[Predictor, Inputs]:
        self.table, predictor = self._table(), self.model.predictor
        return predictor, predictor.bundle.transform(self.table)

    def answer(self, scores_sn: npt.NDArray[np.float32], ms: float) -> Any:
        answer = self._write(scores_sn)
        self.scores_sn = scores_sn
        return answer

    def afterwards(self) -> None:
        if self.scores_sn is None:  # refused
            return
        self.service.metrics.scored(self.model, self.scores_sn)
        self.service.log_features(self.request_id, self.model, lambda: self.table, self.scores_sn)


class Rank:
    """A ranking request; `write` makes the answer of what `requests.RankResponse` has."""

    scores_sn: npt.NDArray[np.float32] | None = None

    def __init__(
        self, service: Service, head: RankHead, items: Items, timer: ranking.Timer, write: Callable[[dict[str, Any]], Any]
    ) -> None:
        self.service, self.head, self.items, self.timer, self._write = service, head, items, timer, write
        self.rows = len(items.ids)
        self.request_id = head.request_id or secrets.token_hex(8)
        self.key = str(self.request_id if head.user_id is None else head.user_id)
        if self.rows > service.config.max_candidates:
            raise UserError(
                f"candidates.ids has {self.rows:,} candidates, more than serve.max_candidates = "
                f"{service.config.max_candidates:,}; send fewer"
            )

    def prepare(self) -> tuple[Predictor, Inputs]:
        self.timer.ended("wait")
        service = self.service
        self.model = service.models.find(route(self.head.model, self.key, service.config.canary))
        self.formula = ranking.formula_of(self.head, self.model, service.formula, service.config)
        self.gathered = ranking.gather(self.head, self.items, self.model, service.config, service.stores)
        inputs = ranking.inputs_of(self.gathered, self.model)
        self.timer.ended("features")
        return self.model.predictor, inputs

    def answer(self, scores_sn: npt.NDArray[np.float32], ms: float) -> Any:
        self.timer.ended("score")
        result = ranking.answer(self.head, self.items, self.model, scores_sn, self.formula(scores_sn))
        self.timer.ended("rank")
        told = {
            "candidates": self.rows,
            "ignored": self.gathered.ignored,
            "unknown_ids": self.gathered.unknown,
            "timings_ms": self.timer.ms,
        }
        answer = self._write({"request_id": self.request_id, **result, **told})
        self.scores_sn = scores_sn
        return answer

    def afterwards(self) -> None:
        if self.scores_sn is None:  # refused
            return
        service = self.service
        service.metrics.scored(self.model, self.scores_sn)
        service.metrics.ranked(self.rows, self.timer.ms, self.gathered.unknown)
        shadow = shadow_of(self.key, service.config.shadow)
        if shadow is not None:
            self._score_unseen(service.models.find(shadow))
        service.log_features(self.request_id, self.model, self.gathered.table, self.scores_sn)

    def _score_unseen(self, model: Model) -> None:
        """Score the request with the shadow model as well, whose scores are logged, in the request's order."""
        try:
            gathered = ranking.gather(self.head, self.items, model, self.service.config, self.service.stores)
            scores = model.predictor.score_inputs(ranking.inputs_of(gathered, model))
        except UserError as error:
            log.warning("shadow %s can't score request %s: %s", model.name, self.request_id, error)
            return
        names = model.predictor.score_names
        rounded = {name: [float(f"{x:.6g}") for x in s.tolist()] for name, s in zip(names, scores, strict=True)}
        log.info("shadow", extra={"told": {"shadow": model.described, "request_id": self.request_id, "scores": rounded}})
