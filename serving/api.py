"""The HTTP interface: what stands before the routes and how mistakes are told; independent of Ray."""

import reprlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from recsys_moe import __version__
from recsys_moe.errors import UserError
from recsys_moe.serving.batching import Batcher, Overloaded
from recsys_moe.serving.bodies import UnknownForm
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.keys import Keys, read_keys
from recsys_moe.serving.limits import AnswerFailures, LimitBody, refuse
from recsys_moe.serving.observe import Observe
from recsys_moe.serving.oip_routes import oip_routes
from recsys_moe.serving.page import page_routes
from recsys_moe.serving.requests import sentence
from recsys_moe.serving.routes import routes
from recsys_moe.serving.service import Service
from recsys_moe.serving.watch import refreshing

LOOK_SECONDS = 1.0
"""How often a replica looks whether the files that it serves from have changed."""


def build_api(served: Path, config: ServeConfig) -> FastAPI:
    """The HTTP interface over the models that a file names (see `recsys_moe.serving.models`), or over one bundle's folder.

    Raises:
        UserError: what `Service` raises.
    """
    keys = read_keys(Path(config.keys_file)) if config.keys_file else None
    service = Service(served, config)
    batcher = Batcher(config.batch_rows, config.deadline_ms / 1000, service.metrics.called)

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
        redirect_slashes=False,  # a path with a slash more is answered as any other that is not there
    )
    api.state.service, api.state.batcher = service, batcher
    api.add_middleware(LimitBody, max_bytes=int(config.max_body_mb * 2**20), seconds=config.body_seconds)
    if keys:
        api.add_middleware(Keys, keys=keys)
    api.add_middleware(AnswerFailures)
    api.add_middleware(Observe, answered=service.metrics.answered)  # the last one added is the outermost
    _tell_mistakes(api, config)
    for router in (routes(service, batcher), oip_routes(service, batcher), page_routes(service, batcher)):
        api.include_router(router)
    return api


def _tell_mistakes(api: FastAPI, config: ServeConfig) -> None:
    """One form for every refusal: a status and a sentence."""

    @api.exception_handler(Overloaded)
    async def overloaded(request: Request, error: Overloaded) -> Response:
        told = f"more is asked than can be answered within {config.deadline_ms:g} ms; try again in {error.retry_after} s"
        return refuse(429, told, {"retry-after": str(error.retry_after)})

    @api.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return refuse(422, str(error))

    @api.exception_handler(UnknownForm)
    async def unknown_form(request: Request, error: UnknownForm) -> Response:
        return refuse(415, str(error))

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
