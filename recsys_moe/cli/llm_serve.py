"""`recsys-moe llm serve`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recsys_moe.cli.settings import Json

EXAMPLES = """Examples:

    recsys-moe llm serve checkpoints/mixtral-tiny --port 8000

    recsys-moe llm serve checkpoints/mixtral-tiny --kv-cache-mb 4096 --max-running 32"""


def serve(
    model: Annotated[Path, typer.Argument(help="A Hugging Face folder: config.json, *.safetensors, the tokenizer.")],
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What the model is called; its folder's name without it.")] = None,
    experts: Annotated[Literal["int8"] | None, typer.Option(help="Keep sparse experts rounded to int8.")] = None,
    kv_cache_mb: Annotated[float, typer.Option(min=0.0, help="Memory for keys and values, in MiB.")] = 512,
    max_running: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 64,
    max_waiting: Annotated[int, typer.Option(min=1, help="Sequences that wait beside them; more are answered 429.")] = 256,
    step_tokens: Annotated[int, typer.Option(min=2, help="Tokens of one step: a long prompt is cut to it.")] = 512,
    max_body_mb: Annotated[float, typer.Option(min=0.0, help="MiB of a request.")] = 4,
    log_file: Annotated[str | None, typer.Option(help="Takes the log, a line of JSON for each request.")] = None,
    json: Json = False,
) -> None:
    """Serve a language model over HTTP on loopback, as OpenAI's API: /v1/completions, /v1/chat/completions. Ctrl-C stops it.

    A request's answer is the same bits whatever else is served.
    """
    from recsys_moe.console import print_json, stderr
    from recsys_moe.serving.llm import LLMServeConfig
    from recsys_moe.serving.llm_app import serve_llm_forever
    from recsys_moe.typed import parse

    limits = {"max_running": max_running, "max_waiting": max_waiting, "step_tokens": step_tokens}
    settings = {"host": host, "port": port, "kv_cache_mb": kv_cache_mb, "max_body_mb": max_body_mb, "log_file": log_file}
    config: LLMServeConfig = parse(LLMServeConfig, settings | {"limits": limits}, "llm serve")
    folder = model.absolute()
    called = name or folder.name

    def ready(url: str) -> None:
        stderr.print(f"serving {called} at {url}/v1 (docs: {url}/docs); Ctrl-C stops it", soft_wrap=True)
        if json:
            print_json({"url": url, "model": called})

    serve_llm_forever(partial(_load, folder, experts == "int8"), called, config, ready)


def _load(folder: Path, int8_experts: bool) -> tuple[Any, Any]:
    from recsys_moe.llm import checkpoints, tokenizer

    return checkpoints.load(folder, int8_experts=int8_experts), tokenizer.load(folder)
