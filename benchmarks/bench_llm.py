"""The LLM engine beside transformers' generate on the same checkpoints, in the same minutes.

    python benchmarks/bench_llm.py CHECKPOINT…      # Hugging Face folders

Greedy, prompts of 128 random tokens, 64 new ones each: one request at a time, 16 together (transformers: one static batch),
and 48 requests of mixed lengths that arrive spread out, also over the rate of one at a time. Then the time to the first token
of a 1,024-token prompt, the weights that a decode step reads over the read ceiling, and what the cache holds of a token, beside
keys and values of every head. A JSON line each; rates in generated tokens a second.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

from recsys_moe.experts import MLPExperts
from recsys_moe.llm import checkpoints
from recsys_moe.llm.batch import KVCache
from recsys_moe.llm.deepseek import LatentAttention
from recsys_moe.llm.engine.engine import Engine, Request, complete
from recsys_moe.llm.engine.sampling import Sampling
from recsys_moe.llm.engine.scheduler import Limits
from recsys_moe.llm.layers import Decoder

PROMPT, NEW = 128, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    parser.add_argument("--int8", action="store_true", help="sparse experts as int8")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ceiling = read_ceiling()
    print(json.dumps({"read_ceiling_gb_s": round(ceiling, 1), "threads": torch.get_num_threads()}), flush=True)
    for folder in options.checkpoints:
        ours = engine_figures(checkpoints.load(folder, int8_experts=options.int8), ceiling)
        theirs = {} if options.alone else transformers_figures(folder)
        ratios = {f"{name}_ratio": ours[name] / theirs[name] for name in theirs}
        figures = {"ours": ours, "transformers": theirs, "ratios": ratios}
        rounded = {k: {n: round(v, 3) for n, v in part.items()} for k, part in figures.items()}
        print(json.dumps({"checkpoint": folder.name} | rounded), flush=True)


def prompts(vocabulary: int, count: int, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    drawn: list[list[int]] = torch.randint(3, vocabulary, (count, tokens), generator=generator).tolist()
    return drawn


def engine_figures(model: Decoder, ceiling: float) -> dict[str, float]:
    vocabulary = model.config.vocab_size

    def engine() -> Engine:
        return Engine(model, lambda ids: "", (), 1000, Limits())

    def request(prompt: list[int], new: int) -> Request:
        return Request(tuple(prompt), new, Sampling(temperature=0.0), ignore_eos=True)

    def timed(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    drawn = prompts(vocabulary, 16, PROMPT)
    complete(engine(), [request(drawn[0], 4)])
    one = engine()
    each = [timed(lambda p=prompt: complete(one, [request(p, NEW)])) for prompt in drawn[:4]]
    together = timed(lambda: complete(engine(), [request(prompt, NEW) for prompt in drawn]))
    # One sequence alone, its prompt behind it.
    alone = engine()
    alone.submit(request(drawn[0], NEW), lambda update: None)
    alone.step()
    step = statistics.median(timed(alone.step) for _ in range(NEW - 1))
    long = prompts(vocabulary, 1, 1024)[0]
    first = statistics.median(timed(lambda: complete(engine(), [request(long, 1)])) for _ in range(3))
    mixed = [request(p[: 16 + 29 * n % 112], 16 + 37 * n % 80) for n, p in enumerate(prompts(vocabulary, 48, PROMPT))]
    spread = timed(lambda: arrive(engine(), mixed))
    one_rate, spread_rate = 4 * NEW / sum(each), sum(r.max_tokens for r in mixed) / spread
    cached = KVCache.allocate(model, 1).bytes_per_token
    return {
        "one_at_a_time": one_rate,
        "sixteen": 16 * NEW / together,
        "spread": spread_rate,
        "spread_over_one_at_a_time": spread_rate / one_rate,
        "first_token_s": first,
        "decode_step_ms": step * 1e3,
        "decode_of_read_ceiling": weights_read(model) / step / 1e9 / ceiling,
        "cache_bytes_a_token": cached,
        "expanded_over_cached": expanded_bytes(model) / cached,
    }


def weights_read(model: Decoder) -> int:
    """Bytes of the weights that a step of one token reads: all but the table of embeddings and the experts left aside."""
    read = sum(parameter.nbytes for parameter in model.parameters())
    if not model.checkpoint.tie_word_embeddings:
        read -= model.embedding.nbytes
    for module in model.modules():
        if isinstance(experts := getattr(module, "experts", None), MLPExperts):
            aside = module.router.linear.num_experts - module.router.k
            read -= aside * sum(parameter[0].nbytes for parameter in experts.parameters())
    return read


def expanded_bytes(model: Decoder) -> int:
    """Bytes a token that keys and values take where every layer keeps them as its heads read them."""
    width = 0
    for block in model.blocks:
        attention: Any = block.attention
        latent = isinstance(attention, LatentAttention)
        width += attention.heads * (attention.nope + attention.rope + attention.value) if latent else attention.cache_width
    return width * model.config.dtype.itemsize


def arrive(engine: Engine, requests: list[Request]) -> None:
    """One more every second step, so that prompts come while others decode."""
    for request in requests:
        engine.submit(request, lambda update: None)
        engine.step()
        engine.step()
    while engine.step():
        pass


def transformers_figures(folder: Path) -> dict[str, float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    drawn = torch.tensor(prompts(model.config.vocab_size, 16, PROMPT))

    def seconds(rows: torch.Tensor, new: int) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            mask = torch.ones_like(rows)
            model.generate(rows, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - start

    seconds(drawn[:1], 4)
    long = torch.tensor(prompts(model.config.vocab_size, 1, 1024))
    return {
        "one_at_a_time": 4 * NEW / sum(seconds(drawn[n : n + 1], NEW) for n in range(4)),
        "sixteen": 16 * NEW / seconds(drawn, NEW),
        "first_token_s": statistics.median(seconds(long, 1) for _ in range(3)),
    }


def read_ceiling() -> float:
    """GB/s: the best of a sum and a bf16 matrix-vector product over 1 GB."""

    def best(work: Callable[[], Any], size: int, rounds: int) -> float:
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return size / statistics.median(times) / 1e9

    big = torch.randn(128 * 2**20)
    rates = [best(big.sum, 4 * big.numel(), 5)]
    weight, x = torch.randn(65536, 4096).bfloat16(), torch.randn(1, 4096).bfloat16()
    rates.append(best(lambda: F.linear(x, weight), 2 * weight.numel(), 5))
    return max(rates)


if __name__ == "__main__":
    main()
