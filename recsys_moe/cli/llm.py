"""`recsys-moe llm …`: language models on the command line. Like every command it imports when it runs."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from recsys_moe.cli.settings import Json
from recsys_moe.errors import UserError

llm_app = typer.Typer(
    no_args_is_help=True,
    help="Language models from Hugging Face folders: convert, estimate, generate, score.",
    epilog="""Examples:

    recsys-moe llm estimate Mixtral-8x7B/config.json

    recsys-moe llm convert stories260K.bin stories260K --tokenizer tok512.bin

    recsys-moe llm generate stories260K "Once upon a time" --max-tokens 200

    recsys-moe llm logprobs stories260K --tokens 1,403,407 --json""",
)

Folder = Annotated[Path, typer.Argument(help="A Hugging Face folder: config.json and *.safetensors.", show_default=False)]
MOST_SEED = 2**63 - 1
Precision = Literal["float32", "bfloat16"]
Dtype = Annotated[Precision | None, typer.Option(help="Precision of the weights. Default: the checkpoint's.")]
Experts = Annotated[Literal["int8"] | None, typer.Option(help="Keep sparse experts rounded to int8: half the memory of bf16.")]


@llm_app.command(
    epilog="""Examples:

    recsys-moe llm convert stories260K.bin stories260K --tokenizer tok512.bin

    recsys-moe llm convert Mixtral-8x7B-fp32 Mixtral-8x7B-bf16 --dtype bfloat16

    recsys-moe llm convert stories260K again.bin

    recsys-moe llm convert stories260K stories-8x260K --upcycle 8 --top-k 2

    recsys-moe llm convert Llama-3.2-1B llama-moe-1B --split 8 --top-k 4"""
)
def convert(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder, or a llama2.c file.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="What to write: a folder, or a llama2.c file (*.bin).", show_default=False)],
    tokenizer: Annotated[Path | None, typer.Option(help="llama2.c's tokenizer, for a folder from its model.")] = None,
    dtype: Dtype = None,
    upcycle: Annotated[int | None, typer.Option(min=2, help="Make a Mixtral: this many copies of each dense layer.")] = None,
    split: Annotated[int | None, typer.Option(min=2, help="Make a Mixtral: each dense layer cut into this many.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="The mixture's experts a token.")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the mixture's routers, and of the cut.")] = 0,
    json: Json = False,
) -> None:
    """Write a model in another layout or precision, or a mixture made of it; the source stays as it is.

    An upcycled mixture computes what the dense model does (2212.05055); one that is split (LLaMA-MoE, 2406.16554) does so only
    with all its experts. `llm train start=…` goes on from there.
    """
    from functools import partial

    from recsys_moe.console import print_json, stderr
    from recsys_moe.llm import upcycle as mixtures
    from recsys_moe.llm.convert import convert as run

    if upcycle is not None and split is not None:
        raise UserError("--upcycle copies the dense layers and --split cuts them; give one of the two")
    mixture = None
    if upcycle is not None:
        mixture = partial(mixtures.upcycled, experts=upcycle, k=top_k, seed=seed)
    elif split is not None:
        mixture = partial(mixtures.split, experts=split, k=top_k, seed=seed)
    model = run(source, target, tokenizer, _dtype(dtype), mixture)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stderr.print(f"wrote {target}: {parameters:,} parameters in {str(model.config.dtype).removeprefix('torch.')}")
    if json:
        print_json({"target": str(target), "parameters": parameters})


@llm_app.command(
    epilog="""Examples:

    recsys-moe llm estimate Mixtral-8x7B/config.json

    recsys-moe llm estimate DeepSeek-V2-Lite --context 8192 --json"""
)
def estimate(
    config: Annotated[Path, typer.Argument(help="A config.json, or the folder that has it.", show_default=False)],
    context: Annotated[int | None, typer.Option(min=1, help="Tokens in the cache. Default: as many as it allows.")] = None,
    json: Json = False,
) -> None:
    """Tell what a model takes: parameters in all and for a token, operations a token, memory. No weights are needed."""
    from dataclasses import asdict

    from recsys_moe.console import print_json, stdout
    from recsys_moe.llm import checkpoints
    from recsys_moe.llm.estimate import estimate as run

    folder = config if config.is_dir() else config.parent
    found = run(checkpoints.read_config(folder, config.name if folder != config else "config.json"), config, context)
    if json:
        return print_json(asdict(found))
    stdout.print(f"{found.family}: {found.parameters / 1e9:.1f} B parameters, {found.active / 1e9:.1f} B active a token")
    stdout.print(f"{found.flops / 1e9:.2f} GFLOP a token with {found.context:,} tokens before it")
    for name, size in found.weight_bytes.items():
        token, cache = found.kv_bytes_per_token[name], found.kv_bytes[name]
        stdout.print(
            f"{name:>8}: weights {size / 2**30:,.1f} GiB, cache {token / 2**10:,.1f} KiB a token, "
            f"{cache / 2**30:,.2f} GiB for {found.context:,}"
        )
    return None


@llm_app.command(
    epilog="""Examples:

    recsys-moe llm generate stories260K "Once upon a time" --max-tokens 200

    recsys-moe llm generate mixtral-tiny --tokens 5,17,900 --max-tokens 8 --json"""
)
def generate(
    model: Folder,
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from.", show_default=False)] = None,
    tokens: Annotated[str | None, typer.Option(help="The prompt as token numbers, with commas between.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to make, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Of the draws at a temperature above 0.")] = 0,
    dtype: Dtype = None,
    experts: Experts = None,
    json: Json = False,
) -> None:
    """Go on from a prompt; the text appears as it is made."""
    import sys

    from recsys_moe.console import print_json
    from recsys_moe.llm import checkpoints, tokenizer
    from recsys_moe.llm.generate import generate as run
    from recsys_moe.llm.generate import sampler

    if (prompt is None) == (tokens is None):
        raise UserError("give the prompt as a text or as --tokens, one of them")
    words = None if tokens is not None else tokenizer.load(model)
    ids = _numbers(tokens) if words is None else words.encode(prompt or "")
    ends = tokenizer.eos_ids(model)
    language_model, shown, made = checkpoints.load(model, _dtype(dtype), experts == "int8"), "", []
    for token in run(language_model, ids, max_tokens, ends, sampler(temperature, seed)):
        made.append(token)
        if json:
            continue
        if words is None:
            print(token, end=" ", flush=True)
            continue
        # A character's bytes may come in several tokens: what is whole is shown.
        text = words.decode(ids + made)
        if not text.endswith("\ufffd"):
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    if json:
        return print_json({"prompt_tokens": ids, "tokens": made, "text": None if words is None else words.decode(ids + made)})
    print()
    return None


@llm_app.command(
    epilog="""Examples:

    recsys-moe llm logprobs stories260K --tokens 1,403,407 --json

    recsys-moe llm logprobs stories260K --file story.txt"""
)
def logprobs(
    model: Folder,
    tokens: Annotated[str | None, typer.Option(help="Token numbers, with commas between.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file: its perplexity is told.")] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens of a text at a time; at most 2048 by default.")] = None,
    dtype: Dtype = None,
    experts: Experts = None,
    json: Json = False,
) -> None:
    """Score tokens: the log-probability of each after the first, given those before it; or the perplexity of a text.

    A text is cut into windows; the first token of each has none before it and isn't scored.
    """
    import math

    from recsys_moe.console import print_json, stdout
    from recsys_moe.llm import checkpoints, tokenizer
    from recsys_moe.llm.generate import logprobs as run

    if (tokens is None) == (file is None):
        raise UserError("give --tokens or --file, one of them")
    ids = _numbers(tokens) if file is None else tokenizer.load(model).encode(_text(file))
    language_model = checkpoints.load(model, _dtype(dtype), experts == "int8")
    if file is None:
        found = run(language_model, ids)
        if json:
            return print_json({"logprobs": found})
        for token, value in zip(ids[1:], found, strict=True):
            stdout.print(f"{token:>8} {value:10.5f}")
        return None
    size = window or min(2048, language_model.config.max_positions)
    windows = (ids[at : at + size] for at in range(0, len(ids) - 1, size))
    scored = [value for part in windows if len(part) > 1 for value in run(language_model, part)]
    if not scored:
        raise UserError(f"{file} is {len(ids)} token, and the first of a text isn't scored; give a longer text")
    loss = -math.fsum(scored) / len(scored)
    if json:
        return print_json({"tokens": len(scored), "nll": loss, "perplexity": math.exp(loss)})
    stdout.print(f"{len(scored):,} tokens, {loss:.4f} nats a token, perplexity {math.exp(loss):.3f}")
    return None


def _dtype(name: Precision | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in (text or "").split(",")]
    except ValueError:
        raise UserError(f"--tokens is {text!r}; give whole numbers with commas between: 1,2,3") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from None
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror})") from None
