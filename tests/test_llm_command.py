"""`recsys-moe llm serve` as a user starts it: a checkpoint, its tokenizer, Ray Serve, the official client; and a long soak."""

import asyncio
import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from recsys_moe.llm import checkpoints, tokenizer
from recsys_moe.llm.engine.engine import Engine, Request, complete
from recsys_moe.llm.engine.sampling import Sampling
from recsys_moe.llm.engine.scheduler import Limits
from tests.test_road import HERE, processes_of, start

WORDS = "The quick brown fox jumps over the lazy dog, naïve übergröße 中文字 🙂🙃 and on it goes. "
CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
MARKER = f"RECSYS_MOE_TEST_LLM={HERE}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: a random Mixtral, a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("llm") / "small-mixtral"
    model = checkpoints.build(CONFIG, torch.bfloat16, Path("config.json"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    checkpoints.save(model, CONFIG, folder)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([WORDS], trainer)
    inner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """The service's URL; afterwards no process of it is left."""
    name, value = MARKER.split("=")
    process = start("llm", "serve", str(folder), "--port", "0", *options, cwd=folder.parent, **{name: value})
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    told = json.loads(line)
    assert told["url"].startswith("http://127.0.0.1:")
    try:
        yield told["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (0, False), err
    deadline = time.monotonic() + 60
    while processes_of(MARKER) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(MARKER)


def expected(folder: Path, requests: list[Request]) -> list[Any]:
    model, text = checkpoints.load(folder), tokenizer.load(folder)
    engine = Engine(model, text.decode, text.eos_ids, 400, Limits())
    return [complete(engine, [request])[0] for request in requests]


def samples(url: str) -> dict[str, float]:
    """The metrics that have no labels but the model's name."""
    found = re.findall(r'^([\w:]+)\{model_name="[^"]+"\} ([\d.e+-]+)$', httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def idle(url: str) -> dict[str, float]:
    deadline = time.monotonic() + 20
    while (found := samples(url))["vllm:kv_cache_usage_perc"] or found["vllm:num_requests_waiting"]:
        assert time.monotonic() < deadline, "blocks are still in use"
        time.sleep(0.1)
    return found


@pytest.mark.long
def test_a_checkpoint_is_served(folder: Path) -> None:
    text = tokenizer.load(folder)
    prompt, chat = text.encode("The quick"), text.chat([{"role": "user", "content": "the lazy dog"}])
    greedy, sampled = Sampling(temperature=0.0), Sampling(seed=4)
    plain, said = expected(folder, [Request(tuple(prompt), 30, sampled), Request(tuple(chat), 20, greedy)])
    with serving(folder) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
        assert [model.id for model in client.models.list().data] == ["small-mixtral"]
        asked: dict[str, Any] = {"model": "small-mixtral", "prompt": "The quick", "max_tokens": 30, "seed": 4}
        answer = client.completions.create(**asked)
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (plain.text, plain.finish)
        assert "".join(part.choices[0].text for part in client.completions.create(**asked, stream=True)) == plain.text
        messages: list[Any] = [{"role": "user", "content": "the lazy dog"}]
        reply = client.chat.completions.create(model="small-mixtral", messages=messages, max_tokens=20, temperature=0)
        assert reply.choices[0].message.content == said.text
        # A client that goes, with and without a stream.
        endless: dict[str, Any] = asked | {"max_tokens": 480, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**endless, stream=True)
        next(iter(stream))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.1).completions.create(**endless)
        assert idle(url)["vllm:generation_tokens_total"] < 900
        assert (
            'vllm:request_success_total{finished_reason="abort",model_name="small-mixtral"} 2.0'
            in httpx.get(f"{url}/metrics").text
        )


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [("truncated", "is not a whole safetensors file"), ("pickle", "is a pickle"), ("nowhere", "is not a folder")],
)
def test_a_broken_checkpoint_is_told_in_one_sentence(
    folder: Path, tmp_path: Path, cli: Any, broken: str, sentence: str
) -> None:
    copy = tmp_path / broken
    if broken != "nowhere":
        copy.mkdir()
        (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        (copy / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
        weights = (folder / "model.safetensors").read_bytes()
        (copy / {"truncated": "model.safetensors", "pickle": "model.bin"}[broken]).write_bytes(weights[: len(weights) // 2])
    done = cli("llm", "serve", str(copy), "--port", "0")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert sentence in done.stderr


def test_settings_that_do_not_go_together(folder: Path, cli: Any) -> None:
    for options, sentence in (
        (("--max-running", "64", "--step-tokens", "64"), "step_tokens 64 leaves prompts no place"),
        (("--kv-cache-mb", "0.001"), "holds not one block"),
        (("--port", "99999"), "should be less than or equal to 65535"),
    ):
        done = cli("llm", "serve", str(folder), *options)
        assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr


# -- the soak

SECONDS = float(os.environ.get("RECSYS_MOE_SOAK_SECONDS", "600"))


@pytest.mark.long
def test_32_clients_for_ten_minutes(folder: Path) -> None:
    """Every stream is exactly what its request gets alone, whoever comes, goes and waits beside it; nothing is left behind."""
    draw = random.Random(0)
    text = tokenizer.load(folder)
    asked: list[dict[str, Any]] = []
    for seed in range(60):
        opening = draw.choice(["", WORDS, WORDS * 2])  # shared by some: the prefix cache is used
        body: dict[str, Any] = {"prompt": opening + WORDS[: draw.randrange(1, 60)], "max_tokens": draw.randrange(1, 120)}
        body |= {"seed": seed, "temperature": draw.choice([0, 0.7, 1.2]), "stop": draw.choice([None, ["e", "中"], "the"])}
        asked.append(body)
    requests = [
        Request(
            tuple(text.encode(body["prompt"])),
            body["max_tokens"],
            Sampling(temperature=float(body["temperature"]), seed=body["seed"]),
            tuple(body["stop"] or ()) if not isinstance(body["stop"], str) else (body["stop"],),
        )
        for body in asked
    ]
    alone = expected(folder, requests)
    counted = {"whole": 0, "left": 0, "refused": 0}
    memory: list[float] = []

    async def visit(client: openai.AsyncOpenAI, end: float, number: int) -> None:
        own = random.Random(number)
        while time.monotonic() < end:
            n = own.randrange(len(asked))
            leaves = own.random() < 0.3
            patience = own.uniform(0, 0.5)
            try:
                if own.random() < 0.3:
                    work = client.completions.create(model="small-mixtral", **asked[n])
                    answer = await asyncio.wait_for(work, patience if leaves else 300)
                    found, finish = answer.choices[0].text, answer.choices[0].finish_reason
                else:
                    found, finish, begun = "", None, time.monotonic()
                    stream = await client.completions.create(model="small-mixtral", stream=True, **asked[n])
                    async for part in stream:
                        found += part.choices[0].text
                        finish = part.choices[0].finish_reason or finish
                        assert alone[n].text.startswith(found), "a wrong stream"
                        if leaves and time.monotonic() - begun > patience:
                            await stream.close()
                            raise TimeoutError
            except TimeoutError:
                counted["left"] += 1
            except openai.RateLimitError:
                counted["refused"] += 1
                await asyncio.sleep(0.05)
            else:
                assert (found, finish) == (alone[n].text, alone[n].finish), "a wrong answer"
                counted["whole"] += 1

    async def watch(end: float) -> None:
        for _ in count():
            await asyncio.sleep(min(15.0, SECONDS / 12))
            memory.append(replica_mb())
            if time.monotonic() > end:
                return

    async def soak(url: str) -> None:
        end = time.monotonic() + SECONDS
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=300) as client:
            await asyncio.gather(watch(end), *(visit(client, end, number) for number in range(32)))

    # A cache that is too small for those that run, and a queue too short for those that come.
    limits = ("--max-running", "12", "--max-waiting", "16", "--step-tokens", "96", "--kv-cache-mb", "0.2")
    with serving(folder, *limits) as url:
        asyncio.run(soak(url))
        last = idle(url)
    print(counted, {name: last[f"vllm:{name}"] for name in ("num_preemptions_total", "prefix_cache_hits_total")}, memory)
    assert counted["whole"] > SECONDS
    assert (
        min(counted["left"], counted["refused"], last["vllm:num_preemptions_total"], last["vllm:prefix_cache_hits_total"]) > 0
    )
    settled, after = memory[len(memory) // 3], memory[-1]
    assert after - settled < 20, f"memory grew from {settled:.0f} to {after:.0f} MiB: {memory}"


def replica_mb() -> float:
    """Anonymous memory of the process that holds the model."""
    for process in processes_of(MARKER):
        path = Path("/proc") / str(process)
        if b"ServeReplica" in (path / "cmdline").read_bytes():
            return int(re.findall(r"RssAnon:\s+(\d+)", (path / "status").read_text())[0]) / 1024
    raise AssertionError("there is no replica")
