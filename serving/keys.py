"""Who may ask, and how often: API keys, of which only digests are kept, and a rate for each.

The file is YAML; `printf %s KEY | sha256sum` makes a digest:

    ranking-backend: {sha256: 2bb80d53…, per_second: 500}

A request names its key as `Authorization: Bearer KEY`. Rates are token buckets of one second: `per_second` requests at once.
"""

import hashlib
import hmac
import math
import time
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field
from starlette.types import ASGIApp, Receive, Scope, Send

from recsys_moe.errors import UserError
from recsys_moe.serving.limits import refuse
from recsys_moe.typed import parse, typed

OPEN = {"/healthz", "/v2/health/live", "/v2/health/ready", "/", "/page.js"}
"""What needs no key: whoever watches over the process has none, nor has a browser that opens the page where it is typed in."""


@typed
class KeyConfig:
    """A key's digest, and how many requests a second it may make."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    per_second: Annotated[float, Field(gt=0)]


class Bucket:
    """Tokens that come back at a rate; `take` says how long to wait for one (0: it is yours)."""

    def __init__(self, per_second: float) -> None:
        self._rate, self._most = per_second, max(1.0, per_second)
        self._tokens, self._seen = self._most, time.monotonic()

    def take(self) -> float:
        now = time.monotonic()
        self._tokens = min(self._most, self._tokens + (now - self._seen) * self._rate)
        self._seen = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0


def read_keys(path: Path) -> dict[str, KeyConfig]:
    """The keys in a file, by the names of who has them.

    Raises:
        UserError: no such file, or not of the form.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = type(error).__name__  # no more: a message may quote what is in the file
        raise UserError(f"serve.keys_file {str(path)!r} can't be read ({reason}); write YAML there") from None
    if not data or not isinstance(data, dict):
        raise UserError(f"serve.keys_file {str(path)!r} names no key, so that nobody could ask; add one")
    return {str(name): parse(KeyConfig, each, f"{path}: {name}") for name, each in data.items()}


class Keys:
    """ASGI middleware: a request without a known key is answered 401, one too many 429."""

    def __init__(self, app: ASGIApp, keys: dict[str, KeyConfig]) -> None:
        self.app = app
        self._digests = {name: bytes.fromhex(key.sha256) for name, key in keys.items()}
        self._buckets = {name: Bucket(key.per_second) for name, key in keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return
        name = self._whose(dict(scope["headers"]).get(b"authorization", b""))
        if name is None:
            told = "the request has no key that is known here; send Authorization: Bearer KEY"
            await refuse(401, told, {"www-authenticate": "Bearer"})(scope, receive, send)
            return
        scope["told"]["key"] = name
        wait = self._buckets[name].take()
        if wait:
            told = f"key {name!r} has used up its requests of this second; try again later or have its per_second raised"
            await refuse(429, told, {"retry-after": str(math.ceil(wait))})(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _whose(self, header: bytes) -> str | None:
        kind, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # All are compared, whole: the time tells nothing.
        same = [name for name, known in self._digests.items() if hmac.compare_digest(known, digest)]
        return same[0] if same and kind.lower() == b"bearer" else None
