"""The routes: HTTP around `Service`, independent of Ray."""

import asyncio
import reprlib
from collections.abc import AsyncIterator, Callable
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
from recsys_moe.serving import arrow, oip
from recsys_moe.serving.batching import Batcher, Overloaded
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.jobs import Rank, Rows
from recsys_moe.serving.keys import Keys, read_keys
from recsys_moe.serving.limits import AnswerFailures, LimitBody, refuse
from recsys_moe.serving.models import Model
from recsys_moe.serving.observe import Observe
from recsys_moe.serving.ranking import Timer
from recsys_moe.serving.requests import (
    ErrorResponse,
    RankRequest,
    RankResponse,
    ScoreRequest,
    ScoreResponse,
    parse_json,
    parse_rank,
    rows_to_table,
    sentence,
)
from recsys_moe.serving.service import Service
from recsys_moe.serving.watch import refreshing

LOOK_SECONDS = 1.0
"""How often a replica looks whether the files that it serves from have changed."""

SHORT = 2**16
"""Bytes of a body that is read at once."""

JSON, OCTETS = "application/json", "application/octet-stream"
PARSERS = {JSON: parse_rank, arrow.MEDIA_TYPE: arrow.parse_rank}

T = TypeVar("T")


def build_api(served: Path, config: ServeConfig) -> FastAPI:
    """The HTTP interface over the models that a file names (see `recsys_moe.serving.models`), or over one bundle's folder.

    Raises:
        UserError: what `Service` raises.
    """
    keys = read_keys(Path(config.keys_file)) if config.keys_file else None
    service = Service(served, config)
    batcher = Batcher(config.batch_rows, config.deadline_ms / 1000)

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        with refreshing(service.refreshed, LOOK_SECONDS):
            yield
        batcher.close()
        if service.features:
            service.features.flush()

    api = FastAPI(
        title="recsys-moe",
        version=__version__,
        description="Scores and ranks with trained multi-task models.",
        lifespan=lifespan,
    )
    api.state.service, api.state.batcher = service, batcher
    api.add_middleware(LimitBody, max_bytes=int(config.max_body_mb * 2**20), seconds=config.body_seconds)
    if keys:
        api.add_middleware(Keys, keys=keys)
    api.add_middleware(AnswerFailures)
    api.add_middleware(Observe, answered=service.metrics.answered)  # the last one added is the outermost

    @api.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        told = f"more is asked than can be answered within {config.deadline_ms:g} ms; try again in {error.retry_after} s"
        return refuse(429, told, {"retry-after": str(error.retry_after)})

    @api.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return refuse(422, str(error))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return refuse(422, sentence(error.errors()[0]))

    @api.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            text = f"{request.method} {reprlib.repr(request.url.path)} is not part of this service; see /docs"
        else:  # the only other one that is raised: for a body that the JSON parser gives up on
            text = "the body can't be read as JSON (UTF-8, no deep nesting, numbers below 4,300 digits); see /docs"
        return refuse(error.status_code, text, error.headers)

    statuses = (400, 408, 413, 415, 422, 429, 500)
    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in statuses}

    def takes(*forms: tuple[str, dict[str, Any]]) -> dict[str, Any]:
        return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind, schema in forms}}}

    def form_of(request: Request, *known: str) -> str | None:
        sent = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        return sent if sent in known else None

    def unknown_form(request: Request, *known: str) -> Response:
        sent = request.headers["content-type"][:60]
        return refuse(415, f"the body's Content-Type {sent!r} is unknown; send {' or '.join(known)}")

    # Bodies are read by pydantic's own parser, and long ones outside the event loop, which they would hold up.
    json_rows = (JSON, _inline(ScoreRequest.model_json_schema()))

    @api.post(
        "/v1/score", summary="Score rows", responses={**errors, 200: {"model": ScoreResponse}}, openapi_extra=takes(json_rows)
    )
    async def score(request: Request) -> Response:
        if form_of(request, JSON) is None:
            return unknown_form(request, JSON)
        asked = await _parsed(await request.body(), lambda body: parse_json(ScoreRequest, body))
        rows = len(asked.rows)
        if rows > config.max_rows:
            raise UserError(f"{rows:,} rows are more than serve.max_rows = {config.max_rows:,}; send fewer")
        model = service.models.find(None)

        def write(model: Model, scores_sn: Any) -> bytes:
            names = model.predictor.score_names
            return to_json({"model": model.digest, "scores": {n: s.tolist() for n, s in zip(names, scores_sn, strict=True)}})

        schema = model.predictor.bundle.schema
        answer = await batcher.run(Rows(model, rows, lambda: rows_to_table(asked.rows, schema), write))
        return Response(answer, media_type=JSON)

    stream = {"type": "string", "format": "binary", "description": arrow.__doc__}

    @api.post(
        "/v1/rank",
        summary="Rank candidates",
        responses={**errors, 200: {"model": RankResponse}},
        openapi_extra=takes((JSON, _inline(RankRequest.model_json_schema())), (arrow.MEDIA_TYPE, stream)),
    )
    async def rank(request: Request) -> Response:
        sent = form_of(request, *PARSERS)
        if sent is None:
            return unknown_form(request, *PARSERS)
        as_arrow = arrow.MEDIA_TYPE in request.headers.get("accept", "")
        timer = Timer()
        head, items = await _parsed(await request.body(), PARSERS[sent])
        timer.ended("parse")

        def write(result: dict[str, Any]) -> bytes:
            told = {"request_id": result["request_id"], "model": result["model"]["name"], "version": result["model"]["version"]}
            request.scope["told"].update(told, candidates=result["candidates"])
            return arrow.answer(result) if as_arrow else to_json(result)

        answer = await batcher.run(Rank(service, head, items, timer, write))
        return Response(answer, media_type=arrow.MEDIA_TYPE if as_arrow else JSON)

    @api.get("/v2", summary="The Open Inference Protocol's name for this server")
    async def server() -> dict[str, Any]:
        return {"name": "recsys-moe", "version": __version__, "extensions": ["binary_tensor_data"]}

    @api.get("/v2/health/live", summary="Liveness")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @api.get("/v2/health/ready", summary="Readiness")
    async def ready() -> dict[str, bool]:
        return {"ready": True}  # a replica that has no model does not start

    def served_as(name: str, version: str | None) -> Model:
        model = service.models.find(name)
        if version not in (None, model.version):
            raise UserError(f"version {version!r} of model {name!r} is not served here; {model.version!r} is")
        return model

    tensors = (JSON, _inline(oip.InferRequest.model_json_schema()))
    octets = (OCTETS, {"type": "string", "format": "binary", "description": oip.__doc__})

    for versioned in ("/versions/{version}", ""):

        @api.get(f"/v2/models/{{name}}{versioned}/ready", summary="Whether the model is served", responses=errors)
        async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
            return {"name": served_as(name, version).name, "ready": True}

        @api.post(
            f"/v2/models/{{name}}{versioned}/infer",
            summary="Score tensors",
            responses=errors,
            openapi_extra=takes(tensors, octets),
        )
        async def infer(request: Request, name: str, version: str | None = None) -> Response:
            if form_of(request, JSON, OCTETS) is None:
                return unknown_form(request, JSON, OCTETS)
            length = request.headers.get(oip.HEADER_LENGTH)
            asked = await _parsed(await request.body(), lambda body: oip.parse_infer(body, length))
            if asked.rows > config.max_rows:
                raise UserError(f"{asked.rows:,} rows are more than serve.max_rows = {config.max_rows:,}; send fewer")
            model = served_as(name, version)
            body, end = await batcher.run(Rows(model, asked.rows, lambda: asked.table(model), asked.write))
            if end is None:
                return Response(body, media_type=JSON)
            return Response(body, headers={oip.HEADER_LENGTH: str(end)}, media_type=OCTETS)

        @api.get(f"/v2/models/{{name}}{versioned}", summary="What the model reads and answers", responses=errors)
        async def model_metadata(name: str, version: str | None = None) -> dict[str, Any]:
            return oip.metadata(served_as(name, version))

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


async def _parsed(body: bytes, parse: Callable[[bytes], T]) -> T:
    return parse(body) if len(body) < SHORT else await asyncio.to_thread(parse, body)


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
