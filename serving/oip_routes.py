"""The Open Inference Protocol's routes (see `recsys_moe.serving.oip`)."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from recsys_moe import __version__
from recsys_moe.errors import UserError
from recsys_moe.serving import oip
from recsys_moe.serving.batching import Batcher
from recsys_moe.serving.bodies import ERRORS, JSON, OCTETS, form_of, parsed, takes
from recsys_moe.serving.jobs import Rows
from recsys_moe.serving.models import Model
from recsys_moe.serving.service import Service

BINARY = {"type": "string", "format": "binary", "description": oip.__doc__}


def oip_routes(service: Service, batcher: Batcher) -> APIRouter:
    """Everything below /v2."""
    router = APIRouter(prefix="/v2")

    @router.get("", summary="The Open Inference Protocol's name for this server", responses=ERRORS)
    async def server() -> dict[str, Any]:
        return {"name": "recsys-moe", "version": __version__, "extensions": ["binary_tensor_data"]}

    @router.get("/health/live", summary="Liveness")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/health/ready", summary="Readiness")
    async def ready() -> dict[str, bool]:
        return {"ready": True}  # a replica that has no model does not start

    def served_as(name: str, version: str | None) -> Model:
        model = service.models.find(name)
        if version not in (None, model.version):
            raise UserError(f"version {version!r} of model {name!r} is not served here; {model.version!r} is")
        return model

    for path in ("/models/{name}/versions/{version}", "/models/{name}"):

        @router.get(f"{path}/ready", summary="Whether the model is served", responses=ERRORS)
        async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
            return {"name": served_as(name, version).name, "ready": True}

        @router.post(
            f"{path}/infer",
            summary="Score tensors",
            responses=ERRORS,
            openapi_extra=takes((JSON, oip.InferRequest.model_json_schema()), (OCTETS, BINARY)),
        )
        async def infer(request: Request, name: str, version: str | None = None) -> Response:
            form_of(request, JSON, OCTETS)
            length = request.headers.get(oip.HEADER_LENGTH)
            asked = await parsed(request, lambda body: oip.parse_infer(body, length))
            service.check_rows(asked.rows)
            model, told = served_as(name, version), request.scope["told"]
            told["request_id"] = asked.request.id or told["request_id"]

            def write(scores_sn: Any) -> tuple[bytes, int | None]:
                return asked.write(model, scores_sn)

            body, end = await batcher.run(Rows(service, model, asked.rows, lambda: asked.table(model), write, told))
            if end is None:
                return Response(body, media_type=JSON)
            return Response(body, headers={oip.HEADER_LENGTH: str(end)}, media_type=OCTETS)

        @router.get(path, summary="What the model reads and answers", responses=ERRORS)
        async def model_metadata(name: str, version: str | None = None) -> dict[str, Any]:
            return oip.metadata(served_as(name, version))

    return router
