"""What OpenAPI says of the service holds for requests that are drawn from it: schemathesis, against a real server."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from recsys_moe.selftest import write_selftest
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from tests.test_serving import TRAINING, listening, save

ROUTES = {
    "/v1/score": "POST",
    "/v1/rank": "POST",
    "/v1/gates": "POST",
    "/v1/sample": "GET",
    "/v1/model": "GET",
    "/v1/models": "GET",
    "/metrics": "GET",
    "/healthz": "GET",
    "/v2": "GET",
    "/v2/health/live": "GET",
    "/v2/health/ready": "GET",
    "/v2/models/{name}": "GET",
    "/v2/models/{name}/ready": "GET",
    "/v2/models/{name}/infer": "POST",
    "/v2/models/{name}/versions/{version}": "GET",
    "/v2/models/{name}/versions/{version}/ready": "GET",
    "/v2/models/{name}/versions/{version}/infer": "POST",
}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    folder = save(tmp_path_factory.mktemp("openapi") / "bundle")
    write_selftest(folder, [TRAINING])
    with listening(build_api(folder, ServeConfig(max_body_mb=1))) as port:
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")


def test_every_route_is_documented(schema: schemathesis.BaseSchema) -> None:
    found = {each.ok().path: each.ok().method.upper() for each in schema.get_all_operations()}
    assert found == ROUTES


@pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.parametrize("path", ROUTES)
def test_no_request_is_a_5xx_or_answered_otherwise_than_told(schema: schemathesis.BaseSchema, path: str, examples: int) -> None:
    operation = schema[path][ROUTES[path]]
    cases = operation.as_strategy()
    if ROUTES[path] == "POST":
        cases |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

    @settings(max_examples=examples, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def holds(case: schemathesis.Case) -> None:
        # A row in the schema's form may still lack a feature, which only the model knows.
        case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=30)

    holds()
