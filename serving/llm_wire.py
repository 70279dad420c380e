"""OpenAI's forms: what a completion or chat request may say, and how answers and errors look.

Names and meanings are those of the OpenAI API; `top_k`, `min_p`, `ignore_eos` and `cache_salt` are vLLM's additions to it. What
would change the answer and is not built is refused, never ignored.
"""

import reprlib
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from recsys_moe.errors import nearest
from recsys_moe.llm.engine.engine import Completion, Request, Update
from recsys_moe.llm.engine.sampling import Sampling, TokenLogprob
from recsys_moe.llm.engine.stopping import Decode


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no character; send whole ones") from None
    return text


def _neutral(value: Any) -> Any:
    if value and value not in ("none", {"type": "text"}):  # what OpenAI's API takes where nothing is said
        raise ValueError("it is not built; leave it out")
    return value


Text = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_whole)]
NotBuilt = Annotated[Any, AfterValidator(_neutral)]
"""What would change the answer. Null, 0 and nothing in it would not: clients send them."""
Prompt = str | list[int]
Told = Update | Completion


class ApiError(Exception):
    """An answer that is none: a status, one sentence, and OpenAI's words for what is wrong with which parameter."""

    def __init__(self, status: int, sentence: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(sentence)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        return error_body(self.status, str(self), self.param, self.code)


def error_body(status: int, sentence: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kinds = {429: "rate_limit_error", 404: "not_found_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": sentence, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both kinds of requests may say."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    cache_salt: Annotated[Text, Field(max_length=256)] | None = None
    user: str | None = None
    frequency_penalty: NotBuilt = None
    presence_penalty: NotBuilt = None
    logit_bias: NotBuilt = None

    def sampling(self, seed: int) -> Sampling:
        """How choice after choice is drawn; `seed` where the request has none."""
        return Sampling(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            min_p=float(self.min_p or 0.0),
            seed=seed,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(GenerationRequest):
    """A text, or several, to go on with; each as text or as tokens. `logprobs` says how many of the most probable tokens."""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: NotBuilt = None

    @property
    def prompts(self) -> Sequence[Prompt]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    def told(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatRequest(GenerationRequest):
    """A conversation to go on with, through the tokenizer's chat template."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: NotBuilt = None
    tool_choice: NotBuilt = None
    response_format: NotBuilt = None


# Where a body's models are nested, by the key that leads there; and what a union's members are in words.
_NESTED: dict[str, type[BaseModel]] = {"messages": Message, "content": TextPart, "stream_options": StreamOptions}
_FORMS = {
    "prompt": "send a text, tokens, or a list of either",
    "stop": "send a text, or a list of texts",
    "content": "send a text, or a list of its parts",
}


def invalid(error: Any, kind: type[BaseModel]) -> ApiError:
    """What a validation error says, in one sentence: of several, what tells most.

    Of a union's members the one whose type fits has more to say than the others; an unknown key explains a missing one better
    than the other way, and a wrong choice an unknown key.
    """

    def tells_less(found: dict[str, Any]) -> int:
        ranks = {"literal_error": 0, "extra_forbidden": 1}
        return 3 if found["type"].endswith("_type") else ranks.get(found["type"], 2)

    first = min(error.errors(), key=tells_less)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}")
    # The path names a union's members, too, which are nobody's own words.
    known = {*kind.model_fields, *(field for model in _NESTED.values() for field in model.model_fields)}
    *path, last = [str(part)[:80] for part in first["loc"][1:]] or [""]
    path = [part for part in path if part.isdigit() or part in known]
    if first["type"] == "extra_forbidden":
        model = [kind, *(_NESTED[part] for part in path if part in _NESTED)][-1]
        name = ".".join([*path, last])
        return ApiError(400, f"{name!r} is not known; {nearest(last, model.model_fields)}", (path or [last])[0])
    path += [last] if last.isdigit() or last in known else []
    if not path:
        return ApiError(400, "the body is not a JSON object with Content-Type application/json; send one")
    name = ".".join(path)
    if first["type"] == "missing":
        return ApiError(400, f"{name!r} is missing; add it", path[0])
    said = first["ctx"]["error"] if first["type"] == "value_error" else first["msg"][0].lower() + first["msg"][1:]
    if first["type"].endswith("_type"):
        said = _FORMS.get(path[-1], said)
    return ApiError(400, f"{name!r} is {reprlib.repr(first['input'])}; {said}", path[0])


# -- answers


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Form(Protocol):
    """How choices are written: `whole` ones, or `part` by part behind an `opening`."""

    def opening(self) -> list[dict[str, Any]]: ...

    def part(self, choice: int, told: Told) -> dict[str, Any]: ...

    def whole(self, choice: int, told: Told) -> dict[str, Any]: ...

    def wrap_part(self, choices: list[dict[str, Any]]) -> dict[str, Any]: ...

    def wrap(self, choices: list[dict[str, Any]]) -> dict[str, Any]: ...


class CompletionForm:
    """`echo` has each choice's prompt as text, to stand before what follows it."""

    def __init__(self, model: str, decode: Decode, requests: list[Request], echo: list[str] | None) -> None:
        self._requests, self._echo = requests, echo
        self._head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._begun: set[int] = set()
        self._offsets = [0] * len(requests)
        self._scores = [Scores(decode, request.prompt[-1]) for request in requests]

    def opening(self) -> list[dict[str, Any]]:
        return []

    def part(self, choice: int, told: Told) -> dict[str, Any]:
        request, first = self._requests[choice], choice not in self._begun
        self._begun.add(choice)
        text = self._echo[choice] + told.text if self._echo and first else told.text
        scores = None
        if request.logprobs is not None:
            unscored = request.prompt[0] if first and request.score_prompt else None
            scored = (*told.prompt_logprobs, *told.logprobs)
            scores = self._scores[choice].completion(scored, self._offsets[choice], unscored)
            self._offsets[choice] += sum(map(len, scores["tokens"]))
        return {"index": choice, "text": text, "logprobs": scores, "finish_reason": told.finish}

    whole = part

    def wrap(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "text_completion", "choices": choices}

    wrap_part = wrap


class ChatForm:
    def __init__(self, model: str, decode: Decode, requests: list[Request]) -> None:
        self._requests, self._scores = requests, [Scores(decode, request.prompt[-1]) for request in requests]
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def opening(self) -> list[dict[str, Any]]:
        said = {"role": "assistant", "content": ""}
        return [
            {"index": choice, "delta": said, "logprobs": None, "finish_reason": None} for choice in range(len(self._requests))
        ]

    def part(self, choice: int, told: Told) -> dict[str, Any]:
        return {"index": choice, "delta": {"content": told.text}, **self._rest(choice, told)}

    def whole(self, choice: int, told: Told) -> dict[str, Any]:
        message = {"role": "assistant", "content": told.text, "refusal": None}
        return {"index": choice, "message": message, **self._rest(choice, told)}

    def wrap(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion", "choices": choices}

    def wrap_part(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk", "choices": choices}

    def _rest(self, choice: int, told: Told) -> dict[str, Any]:
        scored = self._requests[choice].logprobs is not None
        scores = self._scores[choice].chat(told.logprobs) if scored else None
        return {"logprobs": scores, "finish_reason": told.finish}


class Scores:
    """One choice's log-probabilities in OpenAI's forms, part by part. `before` is the token that the next one follows: by
    themselves, some tokens lose their leading blank."""

    def __init__(self, decode: Decode, before: int | None) -> None:
        self._decode, self._before = decode, before

    def completion(self, scored: Iterable[TokenLogprob], offset: int, first: int | None = None) -> dict[str, list[Any]]:
        """The older form: lists of tokens, of their log-probabilities, of maps of the most probable, and where each begins.

        `first` is a prompt's first token, which nothing comes before: it has no probability.
        """
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

        def tell(text: str, logprob: float | None, top: dict[str, float] | None) -> None:
            at = told["text_offset"][-1] + len(told["tokens"][-1]) if told["tokens"] else offset
            for name, value in zip(told, (text, logprob, top, at), strict=True):
                told[name].append(value)

        if first is not None:
            self._before = None
            tell(self._text(first), None, None)
            self._before = first
        for s in scored:
            pairs = reversed((*s.top, (s.token, s.logprob)))  # of tokens that read alike, the most probable
            tell(self._text(s.token), s.logprob, {self._text(token): logprob for token, logprob in pairs})
            self._before = s.token
        return told

    def chat(self, scored: Iterable[TokenLogprob]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self._text(token)
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        content = []
        for s in scored:
            content.append(entry(s.token, s.logprob) | {"top_logprobs": [entry(*pair) for pair in s.top]})
            self._before = s.token
        return {"content": content, "refusal": None}

    def _text(self, token: int) -> str:
        alone = self._decode([token])
        if self._before is None or "\N{REPLACEMENT CHARACTER}" in alone:  # half a character stays one
            return alone
        known, both = self._decode([self._before]), self._decode([self._before, token])
        return both[len(known) :] if both.startswith(known) else alone
