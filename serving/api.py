"""The routes: HTTP around `Service`, independent of Ray."""

import asyncio
import reprlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from recsys_moe import __version__
from recsys_moe.errors import UserError
from recsys_moe.serving import arrow
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.limits import AnswerFailures, LimitBody, refuse
from recsys_moe.serving.observe import Observe
from recsys_moe.serving.requests import (
    ErrorResponse,
    RankRequest,
    RankResponse,
    ScoreRequest,
    ScoreResponse,
    parse_rank,
    sentence,
)
from recsys_moe.serving.service import Service
from recsys_moe.serving.watch import refreshing

LOOK_SECONDS = 1.0
"""How often a replica looks whether the files that it serves from have changed."""

JSON = "application/json"
PARSERS = {JSON: parse_rank, arrow.MEDIA_TYPE: arrow.parse_rank}

T = TypeVar("T")


def build_api(served: Path, config: ServeConfig) -> FastAPI:
    """The HTTP interface over the models that a file names (see `recsys_moe.serving.models`), or over one bundle's folder.

    Raises:
        UserError: what `Service` raises.
    """
    service = Service(served, config)
    # One request at a time: scoring uses every core, and two at once would only wait for each other. The event loop stays
    # free for health checks and for whoever sends or reads slowly.
    scoring = ThreadPoolExecutor(1, "score")

    async def in_turn(work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(scoring, work)

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        with refreshing(service.refreshed, LOOK_SECONDS):
            yield

    api = FastAPI(
        title="recsys-moe",
        version=__version__,
        description="Scores and ranks with trained multi-task models.",
        lifespan=lifespan,
    )
    api.state.service = service
    api.add_middleware(LimitBody, max_bytes=int(config.max_body_mb * 2**20))
    api.add_middleware(AnswerFailures)
    api.add_middleware(Observe, answered=service.metrics.answered)  # the last one added is the outermost

    @api.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return refuse(422, str(error))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refuse(422, _sentence(error))

    @api.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            text = f"{request.method} {reprlib.repr(request.url.path)} is not part of this service; see /docs"
        else:  # the only other one that is raised: for a body that the JSON parser gives up on
            text = "the body can't be read as JSON (UTF-8, no deep nesting, numbers below 4,300 digits); see /docs"
        return refuse(error.status_code, text, error.headers)

    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in (400, 413, 415, 422, 500)}

    @api.post("/v1/score", summary="Score rows", responses=errors)
    async def score(request: ScoreRequest) -> ScoreResponse:
        return ScoreResponse(**await in_turn(lambda: service.score(request)))

    # Read by pydantic's own parser, outside the event loop: thousands of candidates would hold it up.
    stream = {"type": "string", "format": "binary", "description": arrow.__doc__}
    forms = {JSON: {"schema": _inline(RankRequest.model_json_schema())}, arrow.MEDIA_TYPE: {"schema": stream}}
    body = {"required": True, "content": forms}

    @api.post(
        "/v1/rank",
        summary="Rank candidates",
        responses={**errors, 200: {"model": RankResponse}},
        openapi_extra={"requestBody": body},
    )
    async def rank(request: Request) -> Response:
        sent = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if sent not in PARSERS:
            return refuse(415, f"the body's Content-Type {sent[:60]!r} is unknown; send {' or '.join(PARSERS)}")
        content, as_arrow = await request.body(), arrow.MEDIA_TYPE in request.headers.get("accept", "")

        def work() -> bytes:
            result = service.rank(content, PARSERS[sent])
            told = {"request_id": result["request_id"], "model": result["model"]["name"], "version": result["model"]["version"]}
            request.scope["told"].update(told, candidates=result["candidates"])
            return arrow.answer(result) if as_arrow else to_json(result)

        return Response(await in_turn(work), media_type=arrow.MEDIA_TYPE if as_arrow else JSON)

    @api.get("/v1/model", summary="What is served: tasks, features, metrics")
    async def model(name: str | None = None) -> dict[str, Any]:
        return service.describe(name)

    @api.get("/v1/models", summary="All models with their versions, and what was refused")
    async def models() -> dict[str, Any]:
        return service.status()

    @api.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def metrics() -> Response:
        return Response(service.metrics_page(), media_type=CONTENT_TYPE_LATEST)

    @api.get("/healthz", summary="Liveness")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return api


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references into itself, which would point nowhere within OpenAPI."""
    definitions = schema.pop("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            reference = value.get("$ref", "").removeprefix("#/$defs/") if isinstance(value.get("$ref"), str) else ""
            if reference:
                return resolved(definitions[reference] | {k: v for k, v in value.items() if k != "$ref"})
            return {key: resolved(each) for key, each in value.items()}
        return [resolved(each) for each in value] if isinstance(value, list) else value

    result: dict[str, Any] = resolved(schema)
    return result


def _sentence(error: RequestValidationError) -> str:
    first = error.errors()[0]
    loc = first["loc"]
    if loc[:2] == ("body", "rows") and len(loc) > 3:
        value = reprlib.repr(first["input"])
        return f"row {loc[2]} has {loc[3]!r} = {value}, which is not one value or a list of values; send those or null"
    return sentence(first)
