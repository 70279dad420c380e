"""The LLM service on Ray Serve."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastapi import FastAPI
from ray import serve

from recsys_moe.llm.batch import LanguageModel
from recsys_moe.process import use_all_cores
from recsys_moe.serving.llm import LLMServeConfig, Tokenizer, build_llm_api
from recsys_moe.serving.observe import log_as_json
from recsys_moe.serving.running import free_port, running

Load = Callable[[], tuple[LanguageModel, Tokenizer]]
"""Reads the model; called by the replica, which stands in another folder."""


def build_llm_app(load: Load, name: str, config: LLMServeConfig) -> serve.Application:
    """The Ray Serve application of one language model."""

    def api() -> FastAPI:
        use_all_cores()
        log_as_json(config.log_file)
        return build_llm_api(*load(), name, config)

    @serve.ingress(api)
    class LLM:
        pass

    # More than the engine takes: it is the engine that says no, and in OpenAI's form.
    at_once = 2 * (config.limits.max_running + config.limits.max_waiting) + 100
    deployment = serve.deployment(LLM, name="llm", max_ongoing_requests=at_once, ray_actor_options={"num_cpus": 1})
    application: serve.Application = deployment.bind()
    return application


def serve_llm_forever(load: Load, name: str, config: LLMServeConfig, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then stop Serve and Ray and leave no process behind.

    Args:
        ready: called with the URL once the service answers.

    Raises:
        UserError: a model that can't be served, or the port is taken.
    """
    config = replace(config, log_file=str(Path(config.log_file).absolute()) if config.log_file else None)
    build_llm_api(*load(), name, config)  # a mistake is told here, not by a replica that keeps on dying
    gc.collect()  # the model is read again where it runs
    port = free_port(config.host, config.port)
    with running(build_llm_app(load, name, config), "recsys_moe_llm", config.host, port) as stopping:
        ready(f"http://{config.host}:{port}")
        while not stopping.is_set():
            time.sleep(0.2)
