"""What is told of every request: its time and status to the metrics, a line of JSON to the log, its trace to the client."""

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("recsys_moe.requests")

_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
"""W3C Trace Context, https://www.w3.org/TR/trace-context/: version, trace, parent, flags; the first three have values that
are none."""

_REQUEST_ID = re.compile(rb"[!-~]{1,200}")


class JsonLines(logging.Formatter):
    """A line of JSON for each record; `extra={"told": …}` has the fields of one that is more than a sentence."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
        }
        line |= {"message": record.getMessage(), **getattr(record, "told", {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_as_json(path: str | None) -> None:
    """Send this package's log, from INFO on, to a file, or to standard error (under Ray Serve: the replica's own log file).

    Raises:
        OSError: the file can't be written.
    """
    handler = logging.FileHandler(Path(path)) if path else logging.StreamHandler()
    handler.setFormatter(JsonLines())
    package = logging.getLogger("recsys_moe")
    package.handlers, package.propagate = [handler], False
    package.setLevel(logging.INFO)


class Observe:
    """ASGI middleware: `answered(route, status, seconds)` for each request, from its first byte to the answer's last.

    A `traceparent` header is logged and sent back, with its `tracestate`, so that client and log can be joined by the trace.
    What the route has put into `scope["told"]` (the model) stands in the log's line, too. There is a `request_id` from the
    first: the `X-Request-Id` header or one of our own, until a route finds the request's.
    """

    def __init__(self, app: ASGIApp, answered: Callable[[str, int, float], None]) -> None:
        self.app, self._answered = app, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, unanswered = time.perf_counter(), 0, 500
        headers = dict(scope["headers"])
        known = headers.get(b"x-request-id", b"")
        told: dict[str, object] = {"request_id": known.decode() if _REQUEST_ID.fullmatch(known) else secrets.token_hex(8)}
        scope["told"] = told
        trace = _TRACEPARENT.fullmatch(headers.get(b"traceparent", b""))
        sent_back = [(name, headers[name]) for name in (b"traceparent", b"tracestate") if trace and name in headers]

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *sent_back]}
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except asyncio.CancelledError:  # the client has gone: so Ray Serve tells it
            unanswered = 499
            raise
        finally:
            status = status or unanswered
            seconds = time.perf_counter() - started
            # The route's pattern, not the path: a stranger's paths must not become time series.
            route = getattr(scope.get("route"), "path", "other")
            self._answered(route, status, seconds)
            if log.isEnabledFor(logging.INFO):
                line = {"method": scope["method"], "route": route, "status": status, "ms": round(seconds * 1000, 3), **told}
                log.info("answered", extra={"told": line | ({"trace": trace[1].decode()} if trace else {})})
