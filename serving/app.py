"""The scoring service on Ray Serve.

On one machine a client talks to the replica itself: Serve's direct ingress, on the port that is configured, without a hop
between. Serve's own proxy runs beside it, on loopback and a port of the system's choice, and nobody calls it. On a cluster
(`serve deploy`, see conf/serve/cluster.yaml) clients talk to the proxies, which know all replicas.
"""

import os
import time
from collections.abc import Callable
from dataclasses import field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve

from recsys_moe.process import keep_freed_memory, use_all_cores
from recsys_moe.serving.api import build_api
from recsys_moe.serving.config import ServeConfig
from recsys_moe.serving.observe import log_as_json
from recsys_moe.serving.running import free_port, running
from recsys_moe.serving.watch import refreshing
from recsys_moe.typed import parse, typed


@typed
class Deployed:
    """The `args` of the application on a cluster."""

    served: str
    serve: dict[str, Any] = field(default_factory=dict)


def build_app(served: Path, config: ServeConfig, alone: bool = True) -> serve.Application:
    """The Ray Serve application of the models that a file names (see `recsys_moe.serving.models`), or of one bundle.

    A replica that is `alone` on its machine uses all of its cores; others have as many threads as the CPUs they reserve.
    """

    def api() -> FastAPI:
        if alone:
            use_all_cores()
        keep_freed_memory()
        log_as_json(config.log_file)
        return build_api(served, config)

    @serve.ingress(api)
    class Score:
        pass

    # What is too much, the replica says itself, at once (see batching.py).
    deployment = serve.deployment(Score, name="score", max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 1})
    application: serve.Application = deployment.bind()
    return application


def deployed(args: dict[str, Any]) -> serve.Application:
    """What `serve deploy` builds of an application's `args`: `served`, the file that says which models there are (`recsys-moe
    follow` keeps it) or a bundle's folder, and `serve`, keys of `ServeConfig`. All nodes must see these paths.

    Clients come from elsewhere: `serve.keys_file` is needed, unless `serve.host` says that the proxies are on loopback.

    Raises:
        UserError: another key, or no keys.
    """
    found = parse(Deployed, args, "args")
    config = parse(ServeConfig, {"host": "0.0.0.0", **found.serve}, "args.serve")
    return build_app(Path(found.served), config, alone=False)


def serve_forever(
    served: Path, config: ServeConfig, ready: Callable[[str], None], refresh: Callable[[], None] = lambda: None
) -> None:
    """Serve until SIGINT or SIGTERM, then stop Serve and Ray and leave no process behind.

    Args:
        served: the file that names the models, or a bundle's folder.
        ready: called with the URL once the service answers.
        refresh: called every `poll_seconds`, in the background; brings the file up to date.

    Raises:
        UserError: a model that can't be served, or the port is taken.
    """
    config = _with_whole_paths(config)  # replicas stand elsewhere
    build_api(served, config).state.batcher.close()  # a mistake is told here, not by a replica that keeps on dying
    port = free_port(config.host, config.port)
    _replica_listens_on(port)
    application = build_app(served.absolute(), config)
    with running(application, "recsys_moe", config.host, free_port("127.0.0.1", 0)) as stopping:
        ready(f"http://{config.host}:{port}")
        with refreshing([refresh], config.poll_seconds):
            while not stopping.is_set():
                time.sleep(0.2)


def _with_whole_paths(config: ServeConfig) -> ServeConfig:
    names = ("formula_file", "log_file", "keys_file", "feature_log", "item_features", "user_features")
    given = {name: getattr(config, name) for name in names}
    whole: dict[str, Any] = {name: str(Path(path).absolute()) for name, path in given.items() if path}
    return replace(config, **whole)


def _replica_listens_on(port: int) -> None:
    """Serve's direct ingress takes a replica's port from a range, which is this one. Its actors inherit these settings."""
    settings = {
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # A dead replica's port, the only one there is, else stays closed for as long as a load balancer might still know it.
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
    }
    os.environ.update(settings)
