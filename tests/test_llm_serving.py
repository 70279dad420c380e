"""The LLM service over HTTP, through the official client: what it answers, streams, refuses, frees and counts."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from recsys_moe.llm.engine.engine import Completion, Engine, Request, Update, complete
from recsys_moe.llm.engine.sampling import Sampling, TokenLogprob
from recsys_moe.llm.engine.scheduler import Limits
from recsys_moe.serving.llm import LLMServeConfig, build_llm_api
from recsys_moe.serving.llm_wire import ChatForm, CompletionForm
from tests.tiny_lm import ByteTokenizer, TinyLM

TOKENIZER = ByteTokenizer()
CONFIG = LLMServeConfig(limits=Limits(max_running=4, max_waiting=4, step_tokens=64), kv_cache_mb=1, max_body_mb=0.1)
PROMPT = "The quick brown fox jumps over the lazy dog. "


class Slow(TinyLM):
    """Slow enough to be left in the middle; fails on a control character."""

    def forward(self, batch: Any, cache: Any) -> torch.Tensor:
        time.sleep(0.002)
        if 1 in batch.tokens[batch.positions == 0]:
            raise RuntimeError("out of order")
        return super().forward(batch, cache)


class Running:
    """The service on a port of its own."""

    def __init__(self, model: TinyLM, config: LLMServeConfig = CONFIG) -> None:
        self.api = build_llm_api(model, TOKENIZER, "tiny", config)
        self.engine: Engine = self.api.state.engine
        self.server = uvicorn.Server(uvicorn.Config(self.api, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0, timeout=30)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()

    def post(self, content: bytes | dict[str, Any], route: str = "completions") -> httpx.Response:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return httpx.post(f"{self.url}/v1/{route}", content=body, headers={"Content-Type": "application/json"})

    def samples(self) -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        return {(s.name, *(v for _, v in sorted(s.labels.items()))): s.value for family in families for s in family.samples}

    def idle(self) -> None:
        """Wait for everything to be freed."""
        deadline = time.monotonic() + 10
        pool = self.engine.scheduler.pool
        while pool.free < pool.num_blocks or self.engine.scheduler.waiting:
            assert time.monotonic() < deadline, "blocks are still in use"
            time.sleep(0.005)


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    running = Running(Slow())
    yield running
    running.close()
    torch.set_num_threads(before)


@pytest.fixture
def client(service: Running) -> openai.OpenAI:
    return service.client


def expected(prompt: str, max_tokens: int, **more: Any) -> Any:
    limits = Limits(max_running=4, step_tokens=64)
    engine = Engine(TinyLM(), TOKENIZER.decode, TOKENIZER.eos_ids, 200, limits)
    (found,) = complete(engine, [Request(tuple(TOKENIZER.encode(prompt)), max_tokens, **more)])
    return found


# -- what it answers


def test_a_completion_is_the_engines(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    found = expected(PROMPT, 12, sampling=Sampling(temperature=0.0), ignore_eos=True)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (found.text, "length", 0, None)
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "tiny", "cmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (45, 12, 57)


def test_a_stream_has_the_same_text_and_ends(service: Running, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "seed": 5, "top_p": 0.9}
    whole = client.completions.create(**asked)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.text for part in parts for c in part.choices) == whole.choices[0].text
    assert [c.finish_reason for part in parts for c in part.choices][-1] == whole.choices[0].finish_reason
    assert len(parts) > 5
    assert (parts[-1].choices, parts[-1].usage and parts[-1].usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert {part.id for part in parts} == {parts[0].id}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=asked | {"stream": True}) as raw:
        assert raw.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in raw.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") for line in lines[:-1])


def test_a_chat_goes_through_the_template(client: openai.OpenAI) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
    ]
    asked: dict[str, Any] = {"model": "tiny", "messages": messages, "max_completion_tokens": 20, "temperature": 0}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    prompt = "system: be brief\nuser: hello\nassistant: "
    found = expected(prompt, 20, sampling=Sampling(temperature=0.0), logprobs=2)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", found.text, found.finish)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    told = choice.logprobs.content
    assert [t.logprob for t in told] == [t.logprob for t in found.logprobs]
    assert [[(t.token, t.logprob) for t in entry.top_logprobs] for entry in told] == [
        [(TOKENIZER.decode([token]), logprob) for token, logprob in entry.top] for entry in found.logprobs
    ]
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == found.text
    assert parts[-1].choices[0].finish_reason == found.finish


def test_a_chat_goes_on_to_the_end_of_the_context(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x" * 370}], extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.total_tokens) == ("length", 400)


def test_prompts_and_copies_are_choices(client: openai.OpenAI) -> None:
    tokens = TOKENIZER.encode(PROMPT)
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "seed": 3, "extra_body": {"ignore_eos": True}}
    two = client.completions.create(**asked, prompt=[PROMPT, "b"], n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.usage is not None
    assert (two.usage.prompt_tokens, two.usage.completion_tokens) == (46, 32)
    texts = [choice.text for choice in two.choices]
    assert texts == [
        expected(prompt, 8, sampling=Sampling(seed=seed), ignore_eos=True).text
        for prompt, seed in ((PROMPT, 3), (PROMPT, 4), ("b", 5), ("b", 6))
    ]
    assert texts[:1] == [c.text for c in client.completions.create(**asked, prompt=tokens).choices]
    assert [*texts[:1], *texts[1:2]] == [c.text for c in client.completions.create(**asked, prompt=[tokens, tokens]).choices]
    streamed = ["", "", "", ""]
    for part in client.completions.create(**asked, prompt=[PROMPT, "b"], n=2, stream=True):
        for choice in part.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_without_a_seed_every_answer_is_another(client: openai.OpenAI) -> None:
    answers = {client.completions.create(model="tiny", prompt="a", max_tokens=20).choices[0].text for _ in range(3)}
    assert len(answers) == 3


def test_a_prompt_is_scored(client: openai.OpenAI) -> None:
    """What evaluation suites ask for: the prompt's own log-probabilities, and nothing generated."""
    found = expected("hello", 0, logprobs=2, score_prompt=True)
    for max_tokens in (0, 3):
        answer = client.completions.create(model="tiny", prompt="hello", max_tokens=max_tokens, echo=True, logprobs=2, seed=1)
        scores = answer.choices[0].logprobs
        assert scores is not None
        assert answer.choices[0].text.startswith("hello")
        assert scores.tokens is not None
        assert scores.tokens[:5] == list("hello")
        assert scores.token_logprobs is not None
        assert [*scores.token_logprobs[:5]] == [None, *(t.logprob for t in found.prompt_logprobs)]
        assert scores.text_offset is not None
        assert scores.text_offset[:5] == [0, 1, 2, 3, 4]
        assert scores.top_logprobs is not None
        assert scores.top_logprobs[0] is None
        assert len(scores.tokens) == 5 + max_tokens


def test_scored_tokens_have_the_blanks_that_they_have_in_the_text() -> None:
    """Some tokenizers drop a text's leading blank: a token by itself would lose its own, and shift all that follows."""
    words = ["", " Once", " upon", " a", "\u00e9"]

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).removeprefix(" ")

    request = Request((0, 1, 2), 2, logprobs=1, score_prompt=True)
    told = Completion(
        "", [3, 4], [TokenLogprob(t, -1.0, ((3, -1.0),)) for t in (3, 4)], [TokenLogprob(t, -1.0, ()) for t in (1, 2)]
    )
    scores = CompletionForm("tiny", decode, [request], ["Once upon"]).whole(0, told)["logprobs"]
    assert scores["tokens"] == ["", "Once", " upon", " a", "\u00e9"]
    assert scores["text_offset"] == [0, 0, 4, 9, 11]
    assert scores["top_logprobs"][3:] == [{" a": -1.0}, {" a": -1.0, "\u00e9": -1.0}]
    # In parts, and in a chat.
    form, chat = (kind("tiny", decode, [request], *more) for kind, more in ((CompletionForm, [["Once upon"]]), (ChatForm, [])))
    form.part(0, Update("Once upon", prompt_logprobs=tuple(told.prompt_logprobs)))
    for n, token in enumerate([" a", "\u00e9"]):
        update = Update(token, (told.tokens[n],), (told.logprobs[n],))
        assert form.part(0, update)["logprobs"]["tokens"] == [token]
        assert chat.part(0, update)["logprobs"]["content"][0]["token"] == token


def test_stop_strings(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=60, seed=2, extra_body={"ignore_eos": True})
    text = plain.choices[0].text
    stop = text[15:18]
    asked: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60, "seed": 2, "extra_body": {"ignore_eos": True}}
    (choice,) = client.completions.create(**asked, stop=[stop, "never so"]).choices
    assert (choice.text, choice.finish_reason) == (text[: text.find(stop)], "stop")
    parts = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(part.choices[0].text for part in parts) == choice.text


def test_what_is_served_is_told(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, client.models.retrieve("tiny").id) == ("tiny", "model", "tiny")


# -- what it refuses


def test_errors_are_the_clients(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="huge", prompt="a")
    assert unknown.value.body == {
        "message": "the model 'huge' is not served here; ask for 'tiny'",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")
    with pytest.raises(openai.BadRequestError, match="the model's context is 400 tokens, but the prompt has 390 and") as long:
        client.completions.create(model="tiny", prompt="x" * 390, max_tokens=11)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="17 choices are asked for, more than 16"):
        client.completions.create(model="tiny", prompt="x", n=17)
    with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
        client.completions.create(model="tiny", prompt="\x01")
    with pytest.raises(openai.APIError, match="the model failed on this request"):
        list(client.completions.create(model="tiny", prompt="\x01", stream=True))


OK = {"model": "tiny", "prompt": "a"}


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (OK | {"max_tokens": "5"}, 400, "'max_tokens' is '5'; input should be a valid integer"),
        (OK | {"max_tokens": -1}, 400, "'max_tokens' is -1; input should be greater than or equal to 0"),
        (OK | {"temperature": "hot"}, 400, "'temperature' is 'hot'; input should be a valid number"),
        (OK | {"temperature": -0.5}, 400, "'temperature' is -0.5"),
        (OK | {"top_p": 0}, 400, "'top_p' is 0; input should be greater than 0"),
        (OK | {"stop": ""}, 400, "'stop' is ''; string should have at least 1 character"),
        (OK | {"stop": [""]}, 400, "'stop.0' is ''; string should have at least 1 character"),
        (OK | {"stop": ["a"] * 17}, 400, "list should have at most 16 items after validation, not 17"),
        (OK | {"stop": "a" * 300}, 400, "string should have at most 256 characters"),
        (OK | {"stop": 5}, 400, "'stop' is 5; send a text, or a list of texts"),
        (OK | {"x\n" * 30_000: 1}, 400, "is not known"),
        (OK | {"stream_options": {"usage": True}}, 400, "'stream_options.usage' is not known; did you mean 'include_usage'?"),
        (OK | {"logit_bias": {"5": 1}}, 400, "'logit_bias' is {'5': 1}; it is not built; leave it out"),
        (OK | {"best_of": 2}, 400, "'best_of' is 2; input should be less than or equal to 1"),
        (OK | {"suffix": "x"}, 400, "'suffix' is 'x'; it is not built; leave it out"),
        (OK | {"temprature": 1}, 400, "'temprature' is not known; did you mean 'temperature'?"),
        (OK | {"frequency_penalty": 0.5}, 400, "'frequency_penalty' is 0.5; it is not built; leave it out"),
        (OK | {"seed": 2**64}, 400, "'seed' is 18446744073709551616"),
        (OK | {"logprobs": 21}, 400, "'logprobs' is 21; input should be less than or equal to 20"),
        ({"model": "tiny"}, 400, "'prompt' is missing; add it"),
        (OK | {"prompt": 5}, 400, "'prompt' is 5"),
        (OK | {"prompt": [1, "a"]}, 400, "'prompt' is [1, 'a']; send a text, tokens, or a list of either"),
        (OK | {"prompt": None}, 400, "'prompt' is None; send a text, tokens, or a list of either"),
        (OK | {"prompt": []}, 400, "'prompt' is empty"),
        (OK | {"prompt": [[]]}, 400, "the prompt has no tokens"),
        (OK | {"prompt": ""}, 400, "the prompt has no tokens"),
        (OK | {"prompt": [3, 999]}, 400, "the prompt has token 999, but the model knows 0 … 256; use its tokenizer"),
        (OK | {"prompt": [-1]}, 400, "the prompt has token -1"),
        (OK | {"prompt": [2**70]}, 400, "the prompt has token"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "half of a surrogate pair, which is no character; send whole"),
        (b'{"model": "tiny", "prompt": ["\\ud800"]}', 400, "'prompt.0' is '\\ud800'; it has half of a surrogate pair"),
        (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "'temperature' is nan"),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, "the body can't be read as JSON (UTF-8"),
        (b"{", 400, "the body is no JSON"),
        (b"[]", 400, "the body is not a JSON object"),
        (b"[" * 50_000, 400, "the body can't be read as JSON"),
        (b'{"model": "tiny", "prompt": "' + b"a" * 200_000 + b'"}', 413, "the body is larger than 104,857 bytes; send shorter"),
    ],
    ids=lambda v: repr(v)[:60],
)
def test_bad_input_gets_one_sentence_in_openais_form(service: Running, body: Any, status: int, sentence: str) -> None:
    answer = service.post(body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert sentence in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 300
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "'messages' is []; list should have at least 1 item"),
        ([{"role": "wizard", "content": "a"}], "'messages.0.role' is 'wizard'; input should be 'system'"),
        ([{"role": "tool", "content": "a", "tool_call_id": "1"}], "'messages.0.role' is 'tool'; input should be 'system'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "'messages.0.content.0.type' is 'image'; input should be 'text'"),
        ([{"role": "user", "content": None}], "'messages.0.content' is None; send a text, or a list of its parts"),
        ([{"role": "user", "content": "a", "foo": 1}], "'messages.0.foo' is not known; valid: role, content, name"),
        ([{"role": "user"}], "'messages.0.content' is missing; add it"),
        ([5], "'messages.0' is 5; input should be a valid dictionary"),
        ("hello", "'messages' is 'hello'"),
    ],
)
def test_bad_conversations(service: Running, messages: Any, sentence: str) -> None:
    answer = service.post({"model": "tiny", "messages": messages}, "chat/completions")
    assert (answer.status_code, sentence in answer.json()["error"]["message"]) == (400, True), answer.text


def test_what_would_change_nothing_is_taken(service: Running) -> None:
    same = {"logit_bias": {}, "best_of": 1, "suffix": None, "frequency_penalty": 0, "presence_penalty": 0.0, "echo": None}
    for more in ({}, same, {"ignore_eos": None, "stop": [], "top_k": -1}):
        answer = service.post(OK | {"seed": 1, "max_tokens": 5} | more)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected("a", 5, sampling=Sampling(seed=1)).text


def test_a_chats_parts_are_heard_or_refused(service: Running) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "a", "name": "Ann"}], "max_tokens": 1}
    assert service.post(body, "chat/completions").json()["usage"]["prompt_tokens"] == len("userAnn: a\nassistant: ")
    answer = service.post(body | {"top_logprobs": 2}, "chat/completions")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_logprobs")
    assert answer.json()["error"]["message"] == "'top_logprobs' is 2, but 'logprobs' is not true; set it, or leave both out"
    for more in ({"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}):
        answer = service.post(body | more, "chat/completions")
        assert (answer.status_code, "it is not built; leave it out" in answer.text) == (400, True), answer.text


def test_other_paths_and_methods(service: Running) -> None:
    for answer in (httpx.get(f"{service.url}/v1/engines"), httpx.get(f"{service.url}/v1/completions")):
        assert answer.status_code in (404, 405)
        assert re.match(r"GET '/v1/\w+' is not part of this service", answer.json()["error"]["message"])
    assert httpx.get(f"{service.url}/healthz").json() == {"status": "ok"}


# -- who comes and goes


def test_too_many_are_told_to_come_again(service: Running) -> None:
    async def flood() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="key", max_retries=0) as client:
            asked: dict[str, Any] = {"model": "tiny", "max_tokens": 40, "extra_body": {"ignore_eos": True}}
            return await asyncio.gather(
                *(client.completions.create(prompt=f"{n}", **asked) for n in range(20)), return_exceptions=True
            )

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if isinstance(answer, openai.RateLimitError)]
    served = [answer for answer in answers if not isinstance(answer, Exception)]
    assert len(refused) + len(served) == 20
    assert len(served) >= 4
    assert refused
    assert refused[0].response.headers["retry-after"] == "1"
    assert "requests wait already" in str(refused[0])
    service.idle()


def test_choices_that_do_not_all_fit_leave_nothing_behind(service: Running) -> None:
    with pytest.raises(openai.RateLimitError):
        service.client.completions.create(model="tiny", prompt="a", n=16, max_tokens=300)
    service.idle()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_request(service: Running, stream: bool) -> None:
    aborted = ("vllm:request_success_total", "abort", "tiny")
    before = service.samples().get(aborted, 0)

    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 340, "ignore_eos": True, "stream": stream}
            sent = client.send(client.build_request("POST", f"{service.url}/v1/completions", json=body), stream=True)
            if stream:
                answer = await sent
                async for _ in answer.aiter_lines():
                    break
                await answer.aclose()
            else:
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(sent, 0.15)

    start = service.engine.counts.generated_tokens
    asyncio.run(leave())
    service.idle()
    assert service.engine.counts.generated_tokens - start < 300
    assert service.samples()[aborted] == before + 1


def test_a_service_that_stops_ends_its_streams() -> None:
    running = Running(Slow())
    stream = running.client.completions.create(
        model="tiny", prompt="a", max_tokens=390, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    running.engine.stop()
    with pytest.raises(openai.APIError, match="the model failed on this request"):
        list(stream)
    assert httpx.get(f"{running.url}/healthz").status_code == 503
    running.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "engine" and not thread.is_alive()]


# -- what it counts, and who shares what


def test_metrics_have_vllms_names(service: Running) -> None:
    before = service.samples()
    for _ in range(2):
        service.client.completions.create(model="tiny", prompt="metrics" * 9, max_tokens=7, extra_body={"ignore_eos": True})
    after = service.samples()

    def more(*sample: str) -> float:
        return after[sample] - before.get(sample, 0)

    assert more("vllm:prompt_tokens_total", "tiny") == 126
    assert more("vllm:generation_tokens_total", "tiny") == 14
    assert more("vllm:prefix_cache_hits_total", "tiny") == 48
    assert more("vllm:prefix_cache_queries_total", "tiny") == 126
    assert more("vllm:request_success_total", "length", "tiny") == 2
    for name, count in {
        "time_to_first_token_seconds": 2,
        "inter_token_latency_seconds": 12,
        "e2e_request_latency_seconds": 2,
        "request_queue_time_seconds": 2,
        "request_prompt_tokens": 2,
        "request_generation_tokens": 2,
    }.items():
        assert more(f"vllm:{name}_count", "tiny") == count
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"vllm:{gauge}", "tiny"] == 0
    assert "vllm:num_preemptions_total" in {name for name, *_ in after}
    assert more("recsys_moe_llm_requests_total", "/v1/completions", "200") == 2


def test_keys_and_salts_share_no_prefix(service: Running) -> None:
    def cached(prompt: str, key: str = "key", **more: Any) -> int:
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key=key) as client:
            answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=1, extra_body=more)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert [cached("s" * 50), cached("s" * 50)] == [0, 48]
    assert [cached("s" * 50, "other"), cached("s" * 50, "other")] == [0, 48]
    assert [cached("s" * 50, cache_salt="mine"), cached("s" * 50, cache_salt="mine")] == [0, 48]


def test_no_routes_and_no_texts_are_told(service: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Which experts a token chose tells its text: neither an answer nor the log has it, nor the text itself."""
    caplog.set_level("INFO", "recsys_moe")
    answer = service.post(OK | {"prompt": "a secret", "max_tokens": 3, "logprobs": 1})
    assert not re.search("expert|route|layer", answer.text)
    service.idle()
    (line,) = [record.__dict__["told"] for record in caplog.records if record.name == "recsys_moe.requests"]
    assert {key: line[key] for key in ("model", "choices", "prompt_tokens", "completion_tokens", "status")} == {
        "model": "tiny",
        "choices": 1,
        "prompt_tokens": 8,
        "completion_tokens": line["completion_tokens"],
        "status": 200,
    }
    assert "secret" not in caplog.text
