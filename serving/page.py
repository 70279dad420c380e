"""The page at `/`: what is served, and a form that scores a row and draws the weights of its gates.

HTML and a script, from this folder; the script asks the routes below and writes what it gets as text. They need no key, being
the same for everybody; what the script asks does, and the page has a field for it.
"""

from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_json

from recsys_moe.selftest import read_selftest
from recsys_moe.serving.batching import Batcher
from recsys_moe.serving.bodies import ERRORS, JSON, form_of, parsed, takes
from recsys_moe.serving.jobs import Rows
from recsys_moe.serving.models import Model
from recsys_moe.serving.requests import ServedModel, as_json, parse_json, rows_to_table
from recsys_moe.serving.service import Service
from recsys_moe.webpage import STYLE

FOLDER = Path(__file__).parent
PAGE = (FOLDER / "page.html").read_text().replace("/* STYLE */", STYLE)
SCRIPT = (FOLDER / "page.js").read_text()
ALONE = {
    "content-security-policy": "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:; "
    "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
}
"""The page takes nothing from elsewhere, and stands in nobody's frame."""


class SampleResponse(BaseModel):
    """A row that the model can score, and the kinds of its features."""

    model: ServedModel
    kinds: dict[str, str]
    row: dict[str, Any]


class GatesRequest(BaseModel):
    """A row, as those of `/v1/score`, and which model is to score it."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    row: dict[str, Any]


class Gates(BaseModel):
    """The weights of a plan's gates on its experts, `[gates, experts]`; 0 for those that a gate does not use."""

    gates: tuple[str, ...]
    experts: tuple[str, ...]
    weights: Annotated[list[list[float]], Field(description="a list for each gate")]


class GatesResponse(BaseModel):
    """The row's scores, and the gates of each of the model's plans: none, if its family has no gates."""

    model: ServedModel
    scores: dict[str, float]
    plans: dict[str, Gates]


def page_routes(service: Service, batcher: Batcher) -> APIRouter:
    """The page, its script, and what that asks besides the other routes."""
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(PAGE, media_type="text/html", headers=ALONE)

    @router.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return Response(SCRIPT, media_type="text/javascript")

    @router.get("/v1/sample", summary="A row to try", responses={**ERRORS, 200: {"model": SampleResponse}})
    async def sample(model: str | None = None) -> Response:
        return Response(to_json(_sample(service.models.find(model)), inf_nan_mode="null"), media_type=JSON)

    @router.post(
        "/v1/gates",
        summary="Score a row and tell the weights of its gates",
        responses={**ERRORS, 200: {"model": GatesResponse}},
        openapi_extra=takes((JSON, GatesRequest.model_json_schema())),
    )
    async def gates(request: Request) -> Response:
        form_of(request, JSON)
        asked = await parsed(request, lambda body: parse_json(GatesRequest, body))
        model = service.models.find(asked.model)

        def table() -> pa.Table:
            return rows_to_table([asked.row], model.predictor.bundle.schema)

        def write(scores_sn: Any) -> bytes:
            scores = dict(zip(model.predictor.score_names, scores_sn[:, 0].tolist(), strict=True))
            plans = _gates(model, table())
            return to_json(GatesResponse(model=ServedModel(**model.described), scores=scores, plans=plans))

        answer = await batcher.run(Rows(service, model, 1, table, write, request.scope["told"]))
        return Response(answer, media_type=JSON)

    return router


def _gates(model: Model, row: pa.Table) -> dict[str, Gates]:
    weights = model.predictor.gates(row)
    names = model.predictor.bundle.model.network.plan_names
    return {
        plan: Gates(gates=names[plan].gates, experts=names[plan].experts, weights=w_nte[0].tolist())
        for plan, w_nte in weights.items()
    }


def _sample(model: Model) -> SampleResponse:
    """The first row of the bundle's self-test; one without any value, if it has none."""
    features = {f.name: f for f in model.predictor.bundle.schema.features}
    columns = model.predictor.bundle.schema.feature_columns
    found = read_selftest(model.predictor)
    row = found[0].slice(0, 1).to_pylist()[0] if found else dict.fromkeys(columns)
    return SampleResponse(
        model=ServedModel(**model.described),
        kinds={name: features[name].kind for name in columns},
        row={name: as_json(row[name], features[name]) for name in columns},
    )
