"""The scoring service: FastAPI on Ray Serve around the plain predictor."""

import hashlib
import logging
import math
import reprlib
import signal
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import ray
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recsys_moe import __version__
from recsys_moe.columns import category_text
from recsys_moe.errors import UserError
from recsys_moe.process import keep_freed_memory, local_ray_options, neutral_directory, use_all_cores
from recsys_moe.schema import Cross, Embedding, Multi, Schema, Sequence
from recsys_moe.typed import typed

log = logging.getLogger(__name__)


@typed
class ServeConfig:
    """Where the service listens and how much it takes: rows of a request, MiB of a body."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    max_rows: Annotated[int, Field(ge=1)] = 2000
    max_body_mb: Annotated[float, Field(gt=0)] = 8


Value = str | float | int | bool | None


class ScoreRequest(BaseModel):
    """Rows to score. Each row names every feature of the model; null stands for a missing value.

    A feature of many values and a vector are lists.
    """

    model_config = ConfigDict(extra="forbid")
    rows: Annotated[list[dict[str, Value | list[Value]]], Field(min_length=1)]


class ScoreResponse(BaseModel):
    """One score per row, in the rows' order: of a task its probability, value or expected level; of each class of a
    multiclass task, as `task.class`, its probability. `model` is its family and a digest of its weights."""

    model: str
    scores: dict[str, list[float]]


class ErrorResponse(BaseModel):
    """Why there is no other answer, in one sentence."""

    error: str


def rows_to_table(rows: list[dict[str, Any]], schema: Schema) -> pa.Table:
    """The feature columns of JSON rows as a table.

    Raises:
        UserError: a row without a feature, or a value of the wrong kind; names the row, the field and the value.
    """
    columns: dict[str, pa.Array] = {}
    for feature in schema.features:
        if isinstance(feature, Cross):  # of columns that others read
            continue
        read, kind = _JSON[feature.kind]
        values = []
        for number, row in enumerate(rows):
            if feature.name not in row:
                raise UserError(f"row {number} has no feature {feature.name!r}; add it, or null if it is not known")
            try:
                values.append(read(row[feature.name], feature))
            except UserError as error:
                raise UserError(f"row {number} has {feature.name!r} = {reprlib.repr(row[feature.name])}, {error}") from None
        columns[feature.name] = pa.array(values, kind)
    return pa.table(columns)


def as_float(value: Any, feature: Any = None) -> float | None:
    """A number as preparation reads it: whole numbers beyond 2^53 are rounded.

    Raises:
        UserError: no number, or one that float64 does not reach.
    """
    if value is None:
        return None
    if isinstance(value, list):
        raise UserError("which is not one value; send a number or null")
    if isinstance(value, str | bool):
        raise UserError("which is not a number; send a number or null")
    try:
        return float(value)
    except OverflowError:
        raise UserError("which is too large a number; send one below 1e308 or null") from None


def as_text(value: Any, feature: Any = None) -> str | None:
    """A category in the form that the vocabulary has it in.

    Raises:
        UserError: an infinite number, or a text that UTF-8 can't hold.
    """
    if value is None:
        return None
    if isinstance(value, list):
        raise UserError("which is not one value; send a string, a number, true, false or null")
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            raise UserError("which is no category; send a string, a number or null")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair
            raise UserError("which is not Unicode text; send whole characters or null") from None
    return category_text(str(value))


def as_texts(value: Any, feature: Multi | Sequence) -> list[str | None] | None:
    """A list of categories, or the text that the feature's separator takes apart.

    Raises:
        UserError: anything else.
    """
    if isinstance(value, str) and feature.separator is not None:
        value = value.split(feature.separator) if value else None
    if value is None:
        return None
    if not isinstance(value, list):
        raise UserError("which is not a list; send a list of values or null")
    return [as_text(v) for v in value]


def as_vector(value: Any, feature: Embedding) -> list[float | None] | None:
    """A list of the feature's `dim` numbers.

    Raises:
        UserError: anything else.
    """
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != feature.dim:
        raise UserError(f"which is not a list of {feature.dim} numbers; send all of them or null")
    return [as_float(v) for v in value]


_JSON: dict[str, tuple[Callable[[Any, Any], Any], pa.DataType]] = {
    "categorical": (as_text, pa.string()),
    "hashed": (as_text, pa.string()),
    "numeric": (as_float, pa.float64()),
    "multi": (as_texts, pa.list_(pa.string())),
    "sequence": (as_texts, pa.list_(pa.string())),
    "embedding": (as_vector, pa.list_(pa.float64())),
}


class LimitBody:
    """ASGI middleware: a body larger than `max_bytes` is answered 413, however it is sent."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_bytes:
                text = f"the body is larger than {self.max_bytes:,} bytes; send fewer rows or raise serve.max_body_mb"
                await _refuse(413, text)(scope, receive, send)
                return

        async def replay() -> Message:
            nonlocal body
            sent, body = body, b""
            return {"type": "http.request", "body": sent, "more_body": False}

        await self.app(scope, replay, send)


class AnswerFailures:
    """ASGI middleware: whatever goes wrong inside is logged, and answered without a word of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:
            if started or scope["type"] != "http":
                raise
            log.exception("%s %s failed", scope["method"], scope["path"])
            await _refuse(500, "the service failed on this request through an error of its own; its log tells more")(
                scope, receive, send
            )


def _refuse(status: int, sentence: str, headers: Any = None) -> Response:
    return JSONResponse({"error": sentence}, status, headers)


def _sentence(error: RequestValidationError) -> str:
    first = error.errors()[0]
    loc = first["loc"]
    if loc[:2] == ("body", "rows") and len(loc) > 3:
        value = reprlib.repr(first["input"])
        return f"row {loc[2]} has {loc[3]!r} = {value}, which is not one value or a list of values; send those or null"
    return f"{'.'.join(str(part) for part in loc)}: {first['msg']}; see /docs for the request's form"


def build_api(folder: Path, config: ServeConfig) -> FastAPI:
    """The HTTP interface over a bundle, independent of Ray."""
    from recsys_moe.predictor import Predictor

    predictor = Predictor(folder)
    with (folder / "model.safetensors").open("rb") as file:
        name = f"{predictor.bundle.config.model.name}:{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"
    api = FastAPI(title="recsys-moe", version=__version__, description="Scores rows with a trained multi-task model.")
    api.add_middleware(LimitBody, max_bytes=int(config.max_body_mb * 2**20))
    api.add_middleware(AnswerFailures)  # the last one added is the outermost

    @api.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return _refuse(422, str(error))

    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _refuse(422, _sentence(error))

    @api.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            text = f"{request.method} {reprlib.repr(request.url.path)} is not part of this service; see /docs"
        else:  # the only other one that is raised: for a body that the JSON parser gives up on
            text = "the body can't be read as JSON (UTF-8, no deep nesting, numbers below 4,300 digits); see /docs"
        return _refuse(error.status_code, text, error.headers)

    errors: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in (400, 413, 422, 500)}

    # A plain function: FastAPI runs it in a thread, so that scoring does not block the event loop.
    @api.post("/v1/score", summary="Score rows", responses=errors)
    def score(request: ScoreRequest) -> ScoreResponse:
        if len(request.rows) > config.max_rows:
            raise UserError(f"{len(request.rows):,} rows are more than serve.max_rows = {config.max_rows:,}; send fewer")
        scores = predictor.score(rows_to_table(request.rows, predictor.bundle.schema))
        return ScoreResponse(model=name, scores={t: s.tolist() for t, s in zip(predictor.score_names, scores, strict=True)})

    @api.get("/v1/model", summary="What is served: tasks, features, metrics")
    def model() -> dict[str, Any]:
        schema = predictor.bundle.schema
        return {
            "model": name,
            "tasks": list(schema.task_names),
            "scores": list(predictor.score_names),
            "features": {f.name: f.kind for f in schema.features},
            "metrics": predictor.bundle.metrics,
        }

    @api.get("/healthz", summary="Liveness")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return api


def build_app(folder: Path, config: ServeConfig) -> serve.Application:
    """The Ray Serve application of a bundle."""

    def api() -> FastAPI:
        use_all_cores()
        keep_freed_memory()
        return build_api(folder, config)

    @serve.ingress(api)
    class Score:
        pass

    deployment = serve.deployment(Score, name="score", max_ongoing_requests=100, ray_actor_options={"num_cpus": 1})
    application: serve.Application = deployment.bind()
    return application


def serve_forever(folder: Path, config: ServeConfig, ready: Callable[[str], None]) -> None:
    """Serve a bundle until SIGINT or SIGTERM, then stop Serve and Ray and leave no process behind.

    Raises:
        UserError: the bundle does not load, or the port is taken.
    """
    import socket

    from recsys_moe.bundle import Bundle

    Bundle(folder)  # a mistake in it is told here, not by a replica that keeps on dying
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise UserError(
                f"serve.host:port {config.host}:{config.port} can't be listened on ({error.strerror}); choose another port"
            ) from None
        port = probe.getsockname()[1]
    bundle = folder.absolute()
    with neutral_directory() as neutral:
        with chdir(neutral):
            ray.init(**local_ray_options(object_store_mb=100))
        try:
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            serve.start(http_options=serve.HTTPOptions(host=config.host, port=port))
            serve.run(build_app(bundle, config), name="recsys_moe", logging_config={"log_level": "WARNING"})
            # After Ray, which sets a handler of its own that prints a stack.
            stopping: list[int] = []
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, frame: stopping.append(number))
            ready(f"http://{config.host}:{port}")
            while not stopping:
                time.sleep(0.2)
        finally:
            serve.shutdown()
            ray.shutdown()
