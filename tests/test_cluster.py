"""The service on a cluster: what `serve deploy` and KubeRay are told has their form, fits the code, and serves."""

import importlib
import json
import socket
from collections.abc import Iterator
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from recsys_moe.config import conf_dir
from recsys_moe.errors import UserError
from recsys_moe.serving.app import deployed
from tests.conftest import ROOT
from tests.test_serving import ROW, save

FILE = conf_dir() / "serve" / "cluster.yaml"
KEY = "a key of the test's own"


def of_cluster() -> Any:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture
def args(tmp_path: Path) -> dict[str, Any]:
    """What the application is told, with a bundle and keys that are there."""
    (tmp_path / "keys.yaml").write_text(f"backend: {{sha256: {sha256(KEY.encode()).hexdigest()}, per_second: 100}}")
    (application,) = of_cluster()["applications"]
    settings = application["args"]["serve"] | {"keys_file": str(tmp_path / "keys.yaml")}
    return {"served": str(save(tmp_path / "shop")), "serve": settings}


def test_the_cluster_file_is_ray_serves_and_fits_the_code(args: dict[str, Any]) -> None:
    config = ServeDeploySchema.model_validate(of_cluster())
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is deployed
    (deployment,) = application.deployments
    assert deployed(args)._bound_deployment.name == deployment.name
    assert deployment.autoscaling_config is not None
    assert deployment.autoscaling_config["max_replicas"] > deployment.autoscaling_config["min_replicas"] >= 1
    assert application.args["serve"]["keys_file"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"serve": {}}, "can be reached from elsewhere; set serve.keys_file"),
        ({"serve": {"dedline_ms": 1}}, "dedline_ms'; did you mean 'deadline_ms'"),
        ({"model": "shop"}, "unknown key 'args.model'|args: unknown key 'model'"),
    ],
)
def test_a_mistake_in_args_is_told(args: dict[str, Any], change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        deployed(args | change)


# The form of a RayService, as far as the manifest goes: of its custom resource definition, spec, group specs and pods.
TEXT, COUNT, OBJECT = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "object"}


def closed(required: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**required, **more}, "required": list(required), "additionalProperties": False}


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


CONTAINER = closed(
    {"name": TEXT, "image": TEXT, "resources": closed({"limits": OBJECT, "requests": OBJECT})},
    command=listed(TEXT),
    ports=listed(closed({"name": TEXT, "containerPort": {"type": "integer", "minimum": 1, "maximum": 65535}})),
    volumeMounts=listed(closed({"name": TEXT, "mountPath": TEXT}, readOnly={"type": "boolean"})),
)
POD = closed({"metadata": OBJECT, "spec": closed({"containers": listed(CONTAINER)}, volumes=listed(OBJECT))})
PARAMETERS = {"type": "object", "additionalProperties": TEXT}
GROUP = closed(
    {"groupName": TEXT, "minReplicas": COUNT, "maxReplicas": COUNT, "rayStartParams": PARAMETERS, "template": POD},
    replicas=COUNT,
)
CLUSTER = closed(
    {"headGroupSpec": closed({"rayStartParams": PARAMETERS, "template": POD}), "workerGroupSpecs": listed(GROUP)},
    rayVersion=TEXT,
    enableInTreeAutoscaling={"type": "boolean"},
)
RAY_SERVICE = closed(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": closed({"name": TEXT}),
        "spec": closed({"serveConfigV2": TEXT, "rayClusterConfig": CLUSTER}),
    }
)


def test_the_kuberay_manifest_has_its_form_and_says_what_the_cluster_file_says() -> None:
    service, policy = yaml.safe_load_all((ROOT / "docs" / "kuberay.yaml").read_text())
    jsonschema.validate(service, RAY_SERVICE)
    told = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert told == of_cluster()
    ServeDeploySchema.model_validate(told)
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == version("ray")
    pods = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for pod in pods:
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        mounts = [mount for container in pod["spec"]["containers"] for mount in container["volumeMounts"]]
        assert {mount["name"] for mount in mounts} == volumes
        assert {"/runs", "/keys"} <= {mount["mountPath"] for mount in mounts}
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    # From anywhere, only the service's port is reached; Ray's own listen on all interfaces.
    anywhere = [rule["ports"] for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert anywhere == [[{"port": told["http_options"]["port"]}]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def on_ray(args: dict[str, Any]) -> Iterator[str]:
    """The cluster's file, deployed as the dashboard does for `serve deploy`, on a Ray of this machine; the service's URL."""
    import ray
    from ray import serve
    from ray.serve.context import _get_global_client

    from recsys_moe.process import local_ray_options

    told = of_cluster()
    port = free_port()
    told["http_options"] |= {"host": "127.0.0.1", "port": port}
    told["applications"][0]["args"] = args
    told["applications"][0]["deployments"][0]["ray_actor_options"] = {"num_cpus": 1}
    config = ServeDeploySchema.model_validate(told)
    ray.init(**local_ray_options(object_store_mb=100))
    try:
        serve.start(proxy_location=config.proxy_location, http_options=config.http_options.model_dump())
        _get_global_client().deploy_apps(config, _blocking=True)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.long
def test_a_deployed_cluster_file_serves_whoever_has_a_key(on_ray: str) -> None:
    body = json.dumps({"rows": [ROW]})
    headers = {"Content-Type": "application/json"}
    assert httpx.post(f"{on_ray}/v1/score", content=body, headers=headers).status_code == 401
    answer = httpx.post(f"{on_ray}/v1/score", content=body, headers=headers | {"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200
    assert set(answer.json()["scores"]) == {"click", "buy"}
