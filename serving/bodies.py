"""What routes do with bodies: which forms they take, how they read them, and how OpenAPI tells of it."""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import Request

from recsys_moe.serving.requests import ErrorResponse

JSON, OCTETS = "application/json", "application/octet-stream"

SHORT = 2**16
"""Bytes of a body that is read at once."""

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse} for status in (400, 401, 408, 413, 415, 422, 429, 500)
}
"""What a route may refuse with, for OpenAPI."""

T = TypeVar("T")


class UnknownForm(Exception):
    """A Content-Type that the route does not take, as a sentence."""


def form_of(request: Request, *known: str) -> str:
    """Which of the forms a body has; JSON if nothing is said.

    Raises:
        UnknownForm: none of them.
    """
    sent = request.headers.get("content-type", JSON)
    form = sent.partition(";")[0].strip().lower()
    if form not in known:
        raise UnknownForm(f"the body's Content-Type {sent[:60]!r} is unknown; send {' or '.join(known)}")
    return form


async def parsed(request: Request, parse: Callable[[bytes], T]) -> T:
    """What `parse` makes of the body: a long one outside of the event loop, which it would hold up."""
    body = await request.body()
    return parse(body) if len(body) < SHORT else await asyncio.to_thread(parse, body)


def takes(*forms: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """OpenAPI's words for a body in one of these forms, each with its schema: bodies are read by pydantic's own parser."""
    return {"requestBody": {"required": True, "content": {kind: {"schema": inlined(schema)} for kind, schema in forms}}}


def inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references into itself, which would point nowhere within OpenAPI.

    >>> inlined({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}})
    {'type': 'string'}
    """
    definitions = schema.get("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            reference = value.get("$ref", "").removeprefix("#/$defs/") if isinstance(value.get("$ref"), str) else ""
            if reference:
                return resolved(definitions[reference] | {k: v for k, v in value.items() if k != "$ref"})
            return {key: resolved(each) for key, each in value.items()}
        return [resolved(each) for each in value] if isinstance(value, list) else value

    result: dict[str, Any] = resolved({key: value for key, value in schema.items() if key != "$defs"})
    return result
