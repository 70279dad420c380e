"""Which model a request gets: its own choice, a canary for some users, a shadow beside it."""

import hashlib

from recsys_moe.serving.config import CanaryConfig


def chosen(share: float, salt: str, key: str) -> bool:
    """Whether `key` is of the share that a salted hash chooses: the same keys every time, more of them as the share grows.

    >>> chosen(0.0, "canary", "user 7"), chosen(1.0, "canary", "user 7")
    (False, True)
    """
    digest = hashlib.blake2b(f"{salt}\0{key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def route(named: str | None, key: str, canary: CanaryConfig | None) -> str | None:
    """The name of the model for a request: the one that it names, the canary's if its user (`key`) is of the share, or None."""
    if named is None and canary is not None and chosen(canary.share, f"canary {canary.model}", key):
        return canary.model
    return named


def shadow_of(key: str, shadow: CanaryConfig | None) -> str | None:
    """The model that scores the request as well, unseen."""
    if shadow is not None and chosen(shadow.share, f"shadow {shadow.model}", key):
        return shadow.model
    return None
