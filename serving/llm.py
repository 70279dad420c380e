"""An OpenAI-compatible HTTP interface over the LLM engine, independent of Ray."""

import asyncio
import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recsys_moe import __version__
from recsys_moe.errors import UserError
from recsys_moe.llm.batch import LanguageModel
from recsys_moe.llm.engine import engine as llm
from recsys_moe.llm.engine.scheduler import Limits, QueueFull, TooLong
from recsys_moe.serving.limits import AnswerFailures, LimitBody, refuse
from recsys_moe.serving.llm_metrics import LLMMetrics
from recsys_moe.serving.llm_wire import (
    ApiError,
    ChatForm,
    ChatRequest,
    CompletionForm,
    CompletionRequest,
    Form,
    GenerationRequest,
    Prompt,
    error_body,
    invalid,
    usage,
)
from recsys_moe.serving.observe import Observe
from recsys_moe.typed import typed

log = logging.getLogger(__name__)

T = TypeVar("T")

COMPLETION_TOKENS = 16
"""What OpenAI generates for a completion that does not say how much; a chat goes on to the end of the context."""


class Tokenizer(Protocol):
    @property
    def eos_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def chat(self, messages: list[dict[str, str]]) -> list[int]: ...


@typed
class LLMServeConfig:
    """Where the service listens and how much it takes: sequences at once and waiting, tokens of a step, MiB of the KV cache and
    of a body, seconds that a body may take to arrive, choices of one request (its prompts times `n`).
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    limits: Limits = Limits()
    kv_cache_mb: Annotated[float, Field(gt=0)] = 512
    max_body_mb: Annotated[float, Field(gt=0)] = 4
    body_seconds: Annotated[float, Field(gt=0)] = 10
    max_choices: Annotated[int, Field(ge=1)] = 16
    log_file: str | None = None


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Generation:
    """The choices of one HTTP request (`copies` of each prompt), as the engine brings them: iterate over (choice, update).

    `close` frees what is left.

    Raises:
        UserError: what `Engine.submit` refuses one of them for; then none of them runs.
    """

    def __init__(self, engine: llm.Engine, metrics: LLMMetrics, requests: list[llm.Request], copies: int) -> None:
        self._engine, self._metrics, self._copies = engine, metrics, copies
        self._updates: asyncio.Queue[tuple[int, llm.Update]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._open: dict[int, llm.Ticket] = {}
        self.tickets: list[llm.Ticket] = []
        self._generated = [0] * len(requests)
        self._last = [time.monotonic()] * len(requests)
        try:
            for choice, request in enumerate(requests):
                ticket = engine.submit(request, partial(self._hear, choice))
                self.tickets.append(ticket)
                self._open[choice] = ticket
        except UserError:
            self.close()
            raise

    async def __aiter__(self) -> AsyncIterator[tuple[int, llm.Update]]:
        while self._open:
            choice, update = await self._updates.get()
            self._note(choice, update)
            if update.finish == "error":
                raise ApiError(
                    500, "the model failed on this request through an error of its own; the service's log tells more"
                )
            yield choice, update

    def close(self) -> None:
        for choice, ticket in self._open.items():
            self._engine.cancel(ticket)
            self._tell(choice, ticket, "abort")
        self._open.clear()

    def usage(self) -> dict[str, Any]:
        prompts = self.tickets[:: self._copies]
        tokens, cached = (len(t.request.prompt) for t in prompts), (t.sequence.cached for t in prompts)
        return usage(sum(tokens), sum(self._generated), sum(cached))

    def _hear(self, choice: int, update: llm.Update) -> None:
        # From the engine's thread, which must not wait.
        self._loop.call_soon_threadsafe(self._updates.put_nowait, (choice, update))

    def _note(self, choice: int, update: llm.Update) -> None:
        now = time.monotonic()
        if update.tokens:
            tell = self._metrics.next_token if self._generated[choice] else self._metrics.first_token
            tell(now - self._last[choice])
            self._generated[choice] += len(update.tokens)
            self._last[choice] = now
        if update.finish:
            self._tell(choice, self._open.pop(choice), update.finish)

    def _tell(self, choice: int, ticket: llm.Ticket, reason: str) -> None:
        now = time.monotonic()
        queued = (ticket.started or now) - ticket.submitted
        generated = self._generated[choice]
        self._metrics.finished(reason, len(ticket.request.prompt), generated, queued, now - ticket.submitted)


def build_llm_api(model: LanguageModel, tokenizer: Tokenizer, name: str, config: LLMServeConfig) -> FastAPI:
    """The HTTP interface over a model, which an engine of its own runs as long as the application lives.

    Raises:
        UserError: a router that looks at the whole batch, or no memory for one block.
    """
    blocks = llm.blocks_that_fit(model, config.kv_cache_mb)
    engine = llm.Engine(model, tokenizer.decode, tokenizer.eos_ids, blocks, config.limits)
    metrics = LLMMetrics(engine, name)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(api: FastAPI) -> AsyncIterator[None]:
        thread = threading.Thread(target=_run, args=(engine,), name="engine")
        thread.start()
        yield
        engine.stop()
        await asyncio.to_thread(thread.join)

    api = FastAPI(title="recsys-moe llm", version=__version__, description="Completions and chats.", lifespan=lifespan)
    api.state.engine = engine
    api.add_middleware(LimitPrompt, max_bytes=int(config.max_body_mb * 2**20), seconds=config.body_seconds)
    api.add_middleware(AnswerFailures)
    api.add_middleware(InOpenAIForm)
    api.add_middleware(Observe, answered=metrics.answered)  # the last one added is the outermost

    @api.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status)

    @api.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        if isinstance(error, QueueFull):
            return JSONResponse(error_body(429, str(error), code="queue_full"), 429, {"Retry-After": "1"})
        code = "context_length_exceeded" if isinstance(error, TooLong) else None
        return JSONResponse(error_body(400, str(error), code=code), 400)

    @api.exception_handler(RequestValidationError)
    async def no_request(request: Request, error: RequestValidationError) -> Response:
        chat = request.url.path.endswith("/chat/completions")
        return JSONResponse(invalid(error, ChatRequest if chat else CompletionRequest).body(), 400)

    @api.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        if error.status_code in (404, 405):
            return refuse(
                error.status_code, f"{request.method} {request.url.path[:80]!r} is not part of this service; see /docs"
            )
        return refuse(error.status_code, "the body can't be read as JSON (UTF-8, no deep nesting, numbers below 4,300 digits)")

    def check_choices(body: GenerationRequest, prompts: int) -> None:
        choices = prompts * (body.n or 1)
        if choices > config.max_choices:
            raise ApiError(400, f"{choices} choices are asked for, more than {config.max_choices}; send fewer at a time", "n")

    def check_model(asked: str) -> None:
        if asked != name:
            raise ApiError(404, f"the model {asked[:80]!r} is not served here; ask for {name!r}", "model", "model_not_found")

    def plan(
        body: GenerationRequest,
        prompts: list[list[int]],
        request: Request,
        max_tokens: int | None,
        logprobs: int | None,
        score_prompt: bool = False,
    ) -> list[llm.Request]:
        """A request to the engine for each choice; without `max_tokens`, to the end of the context."""
        seed = secrets.randbits(62) if body.seed is None else body.seed
        # A tenant is whoever sends the same key.
        key = hashlib.sha256(request.headers.get("authorization", "").encode()).digest()
        salt = key + (body.cache_salt or "").encode()
        requests = [
            llm.Request(
                tuple(prompt),
                sampling=body.sampling(seed + place * (body.n or 1) + copy),
                stop=body.stops,
                ignore_eos=bool(body.ignore_eos),
                salt=salt,
                max_tokens=max(engine.room(len(prompt)), 1) if max_tokens is None else max_tokens,
                logprobs=logprobs,
                score_prompt=score_prompt,
            )
            for place, prompt in enumerate(prompts)
            for copy in range(body.n or 1)
        ]
        for each in requests:
            engine.check(each)
        return requests

    async def answer(request: Request, body: GenerationRequest, requests: list[llm.Request], form: Form) -> Response:
        """Everything at once, or piece by piece; either way nothing runs on for a client that has gone."""
        generation = Generation(engine, metrics, requests, body.n or 1)
        told = request.scope["told"]
        told.update(model=name, choices=len(requests))
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStream(stream(generation, form, with_usage), partial(finish, generation, told))
        try:
            return JSONResponse(await unless_gone(request.receive, whole(generation, form)))
        except ClientGone:
            return Response(status_code=499)
        finally:
            finish(generation, told)

    @api.post("/v1/completions", summary="Go on with a text")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model)
        if not body.prompts:
            raise ApiError(400, "'prompt' is empty; send a text, or tokens", "prompt")
        check_choices(body, len(body.prompts))
        prompts = [await tokens_of(tokenizer, prompt) for prompt in body.prompts]
        most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        scored = bool(body.echo) and body.logprobs is not None
        requests = plan(body, prompts, request, max_tokens=most, logprobs=body.logprobs, score_prompt=scored)
        texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in body.prompts for _ in range(body.n or 1)]
        form = CompletionForm(name, tokenizer.decode, requests, texts if body.echo else None)
        return await answer(request, body, requests, form)

    @api.post("/v1/chat/completions", summary="Go on with a conversation")
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_model(body.model)
        check_choices(body, 1)
        if body.top_logprobs and not body.logprobs:
            sentence = f"'top_logprobs' is {body.top_logprobs}, but 'logprobs' is not true; set it, or leave both out"
            raise ApiError(400, sentence, "top_logprobs")
        messages = [message.told() for message in body.messages]
        prompt = await asyncio.to_thread(tokenizer.chat, messages)
        top = (body.top_logprobs or 0) if body.logprobs else None
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        requests = plan(body, [prompt], request, max_tokens=most, logprobs=top)
        return await answer(request, body, requests, ChatForm(name, tokenizer.decode, requests))

    @api.get("/v1/models", summary="What is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @api.get("/v1/models/{model}", summary="What is served under a name")
    async def one_model(model: str) -> dict[str, Any]:
        check_model(model)
        return card()

    def card() -> dict[str, Any]:
        context = engine.room(0)
        return {"id": name, "object": "model", "created": created, "owned_by": "recsys_moe", "max_model_len": context}

    @api.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def metrics_page() -> Response:
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @api.get("/healthz", summary="Liveness")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"}) if engine.alive else refuse(503, "the engine has stopped; its log tells why")

    return api


def _run(engine: llm.Engine) -> None:
    try:
        engine.run()
    except Exception:
        log.exception("the engine failed")
    finally:
        engine.stop()  # whoever waits is told


async def tokens_of(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    # Beside the event loop: a long text takes a while.
    return await asyncio.to_thread(tokenizer.encode, prompt) if isinstance(prompt, str) else prompt


def finish(generation: Generation, told: dict[str, object]) -> None:
    generation.close()
    spent = generation.usage()
    told.update(prompt_tokens=spent["prompt_tokens"], completion_tokens=spent["completion_tokens"])


# -- the two ways of an answer


async def whole(generation: Generation, form: Form) -> dict[str, Any]:
    """Wait for all choices to end."""
    completions = [llm.Completion() for _ in generation.tickets]
    async for choice, update in generation:
        completions[choice].add(update)
    choices = [form.whole(choice, completion) for choice, completion in enumerate(completions)]
    return form.wrap(choices) | {"usage": generation.usage()}


async def stream(generation: Generation, form: Form, with_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events: a part of a choice each, at last `[DONE]`."""
    for part in form.opening():
        yield _event(form.wrap_part([part]))
    try:
        async for choice, update in generation:
            if update.text or update.finish or update.logprobs:  # else it is held back: nothing to tell
                yield _event(form.wrap_part([form.part(choice, update)]))
        if with_usage:
            yield _event(form.wrap_part([]) | {"usage": generation.usage()})
    except ApiError as error:
        yield _event(error.body())
    yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Sends events until they end or the client goes, and then calls `close`, whichever it was."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.stream_response(send))
        except (ClientGone, OSError):
            log.info("a client went before its stream ended")
        finally:
            self._close()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, and give it up when the client goes.

    Raises:
        ClientGone: it went.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


# -- what stands before the routes


class LimitPrompt(LimitBody):
    def _too_large(self, what: str) -> Response:
        return refuse(413, f"the {what} is larger than {self.max_bytes:,} bytes; send shorter prompts or raise --max-body-mb")


class InOpenAIForm:
    """ASGI middleware: errors that are one sentence, as what is shared with other services tells them, in OpenAI's form."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started: Message | None = None

        async def watch(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start" and message["status"] >= 400:
                started = message
                return
            if started is not None:
                begun, started = started, None
                body = json.loads(message["body"]) if message["body"] else {}
                if isinstance(body.get("error"), str):
                    content = json.dumps(error_body(begun["status"], body["error"])).encode()
                    kept = [(k, v) for k, v in begun["headers"] if k != b"content-length"]
                    begun = {**begun, "headers": [*kept, (b"content-length", str(len(content)).encode())]}
                    message = {**message, "body": content}
                await send(begun)
            await send(message)

        await self.app(scope, receive, watch)
