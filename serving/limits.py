"""What stands before the routes: a body's size, packed and unpacked, and one form for every failure."""

import asyncio
import logging
from typing import Any

import pyarrow as pa
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

PACKINGS = ("gzip", "zstd")

LONGEST = 500
"""Characters of a sentence; what a stranger sent stands in its middle."""


def refuse(status: int, sentence: str, headers: Any = None) -> Response:
    """An answer that is no more than a sentence."""
    if len(sentence) > LONGEST:
        sentence = f"{sentence[: LONGEST - 202]} … {sentence[-199:]}"
    return JSONResponse({"error": sentence}, status, headers)


class LimitBody:
    """ASGI middleware: a body larger than `max_bytes` is answered 413, however it is sent, and one that takes longer than
    `seconds` 408; what is packed with gzip or zstd is unpacked, up to the same limit."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.seconds):
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.max_bytes:
                        break
        except TimeoutError:
            late = f"the body did not arrive within {self.seconds:g} s; send it again"
            await refuse(408, late, {"connection": "close"})(scope, receive, send)
            return
        if len(body) > self.max_bytes:
            await self._too_large("body")(scope, receive, send)
            return
        whole = bytes(body)
        packing = dict(scope["headers"]).get(b"content-encoding", b"identity").decode("latin-1").strip().lower()
        if packing != "identity":
            unpacked = self._unpack(whole, packing)
            if isinstance(unpacked, Response):
                await unpacked(scope, receive, send)
                return
            whole = unpacked
            kept = [(k, v) for k, v in scope["headers"] if k not in (b"content-encoding", b"content-length")]
            scope["headers"] = [*kept, (b"content-length", str(len(whole)).encode())]
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:  # whoever listens on waits for the client to go
                return await receive()
            sent = True
            return {"type": "http.request", "body": whole, "more_body": False}

        await self.app(scope, replay, send)

    def _unpack(self, body: bytes, packing: str) -> bytes | Response:
        if packing not in PACKINGS:
            return refuse(415, f"the body's Content-Encoding {packing[:40]!r} is unknown; send gzip, zstd or none")
        try:
            with pa.CompressedInputStream(pa.BufferReader(body), packing) as stream:
                whole: bytes = stream.read(self.max_bytes + 1)
        except OSError:
            return refuse(400, f"the body is no whole {packing} stream, which its Content-Encoding says; send it again")
        return self._too_large("unpacked body") if len(whole) > self.max_bytes else whole

    def _too_large(self, what: str) -> Response:
        return refuse(413, f"the {what} is larger than {self.max_bytes:,} bytes; send fewer rows or raise serve.max_body_mb")


class AnswerFailures:
    """ASGI middleware: whatever goes wrong inside is logged, and answered without a word of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception:
            if started or scope["type"] != "http":
                raise
            told = {"request_id": scope["told"]["request_id"]}
            log.exception("%s %s failed", scope["method"], scope["path"], extra={"told": told})
            await refuse(500, "the service failed on this request through an error of its own; its log tells more")(
                scope, receive, send
            )
