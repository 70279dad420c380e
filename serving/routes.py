"""The service's own routes: scores, rankings, and what it tells of itself."""

from typing import Any

import pyarrow as pa
from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json

from recsys_moe.serving import arrow
from recsys_moe.serving.batching import Batcher
from recsys_moe.serving.bodies import ERRORS, JSON, form_of, parsed, takes
from recsys_moe.serving.jobs import Rank, Rows
from recsys_moe.serving.ranking import Timer
from recsys_moe.serving.requests import (
    RankRequest,
    RankResponse,
    ScoreRequest,
    ScoreResponse,
    parse_json,
    parse_rank,
    rows_to_table,
)
from recsys_moe.serving.service import Service

PARSERS = {JSON: parse_rank, arrow.MEDIA_TYPE: arrow.parse_rank}
STREAM = {"type": "string", "format": "binary", "description": arrow.__doc__}


def routes(service: Service, batcher: Batcher) -> APIRouter:
    """Everything below /v1, /metrics and /healthz."""
    router = APIRouter()

    @router.post(
        "/v1/score",
        summary="Score rows",
        responses={**ERRORS, 200: {"model": ScoreResponse}},
        openapi_extra=takes((JSON, ScoreRequest.model_json_schema())),
    )
    async def score(request: Request) -> Response:
        form_of(request, JSON)
        asked = await parsed(request, lambda body: parse_json(ScoreRequest, body))
        service.check_rows(len(asked.rows))
        model = service.models.find(asked.model)

        def table() -> pa.Table:
            return rows_to_table(asked.rows, model.predictor.bundle.schema)

        def write(scores_sn: Any) -> bytes:
            names = model.predictor.score_names
            return to_json({"model": model.digest, "scores": {n: s.tolist() for n, s in zip(names, scores_sn, strict=True)}})

        answer = await batcher.run(Rows(service, model, len(asked.rows), table, write, request.scope["told"]))
        return Response(answer, media_type=JSON)

    @router.post(
        "/v1/rank",
        summary="Rank candidates",
        responses={**ERRORS, 200: {"model": RankResponse, "content": {arrow.MEDIA_TYPE: {"schema": STREAM}}}},
        openapi_extra=takes((JSON, RankRequest.model_json_schema()), (arrow.MEDIA_TYPE, STREAM)),
    )
    async def rank(request: Request) -> Response:
        form = form_of(request, *PARSERS)
        as_arrow = arrow.MEDIA_TYPE in request.headers.get("accept", "")
        timer = Timer()
        head, items = await parsed(request, PARSERS[form])
        timer.ended("parse")

        told = request.scope["told"]
        head.request_id = told["request_id"] = head.request_id or told["request_id"]

        def write(result: dict[str, Any]) -> bytes:
            model = result["model"]
            told.update(model=model["name"], version=model["version"], candidates=result["candidates"])
            return arrow.answer(result) if as_arrow else to_json(result)

        answer = await batcher.run(Rank(service, head, items, timer, write))
        return Response(answer, media_type=arrow.MEDIA_TYPE if as_arrow else JSON)

    @router.get("/v1/model", summary="What is served: tasks, features, metrics", responses=ERRORS)
    async def model(name: str | None = None) -> dict[str, Any]:
        return service.describe(name)

    @router.get("/v1/models", summary="All models with their versions, and what was refused", responses=ERRORS)
    async def models() -> dict[str, Any]:
        return service.status()

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=Response, responses=ERRORS)
    async def metrics() -> Response:
        return Response(service.metrics_page(), media_type=CONTENT_TYPE_LATEST)

    @router.get("/healthz", summary="Liveness")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return router
