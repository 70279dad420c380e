"""What Prometheus scrapes of the LLM service, by vLLM's names, and how many tokens each expert was given.

https://docs.vllm.ai/en/stable/usage/metrics/ tells what the names mean: dashboards made for vLLM
show this service, too.
"""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from recsys_moe.llm.engine.engine import Engine

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class LLMMetrics:
    """The service's own registry."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._registry, self._engine, self._model = CollectorRegistry(), engine, model
        self._registry.register(self)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, ["model_name"], buckets=buckets, registry=self._registry).labels(model)

        self._first = histogram("time_to_first_token_seconds", "From the request to its first token", SECONDS)
        self._between = histogram("inter_token_latency_seconds", "From a token to the next", SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "From the request to its last token", SECONDS)
        self._queued = histogram("request_queue_time_seconds", "From the request to its first step", SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens generated for a request", TOKENS)
        named: Any = {"registry": self._registry}
        self._finished = Counter("vllm:request_success", "Finished requests", ["model_name", "finished_reason"], **named)
        self._answers = Counter("recsys_moe_llm_requests", "Answered HTTP requests", ["route", "status"], **named)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._answers.labels(route, status).inc()

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._between.observe(seconds)

    def finished(self, reason: str, prompt_tokens: int, generated: int, queued: float, seconds: float) -> None:
        """`reason`: stop, length, error, or abort for a request that was given up."""
        self._finished.labels(self._model, reason).inc()
        self._prompt.observe(prompt_tokens)
        self._generated.observe(generated)
        self._queued.observe(queued)
        self._whole.observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """What the engine counts itself, as it is now."""
        engine, scheduler = self._engine, self._engine.scheduler
        pool, counts = scheduler.pool, engine.counts
        gauges = {
            "num_requests_running": ("Sequences that run", len(scheduler.running)),
            "num_requests_waiting": ("Sequences that wait", len(scheduler.waiting)),
            "kv_cache_usage_perc": ("Share of the KV cache in use, 1 is all", 1 - pool.free / pool.num_blocks),
        }
        for name, (text, value) in gauges.items():
            yield _family(GaugeMetricFamily, f"vllm:{name}", text, self._model, value)
        totals = {
            "num_preemptions": ("Sequences that were put back", scheduler.preemptions),
            "prompt_tokens": ("Prompts' tokens", counts.prompt_tokens),
            "generation_tokens": ("Generated tokens", counts.generated_tokens),
            "prefix_cache_queries": ("Tokens that were looked for in the prefix cache", counts.prompt_tokens),
            "prefix_cache_hits": ("Tokens that were found there", counts.cached_tokens),
        }
        for name, (text, value) in totals.items():
            yield _family(CounterMetricFamily, f"vllm:{name}", text, self._model, value)
        load = CounterMetricFamily(
            "recsys_moe_llm_expert_tokens", "Tokens for each expert, told of thousands at a time", labels=["layer", "expert"]
        )
        for layer, loads in engine.load.counts.items():
            for expert, tokens in enumerate(loads.tolist()):
                load.add_metric([layer, str(expert)], tokens)
        yield load

    def page(self) -> bytes:
        """The metrics in Prometheus' text form."""
        text: bytes = generate_latest(self._registry)
        return text


def _family(kind: Any, name: str, text: str, model: str, value: float) -> Metric:
    family: Metric = kind(name, text, labels=["model_name"])
    family.add_metric([model], value)  # type: ignore[attr-defined]
    return family
