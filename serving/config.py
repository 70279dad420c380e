"""What the service is told: where it listens, what it takes, whom it serves."""

import ipaddress
from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field

from recsys_moe.typed import typed


def on_loopback(host: str) -> bool:
    """Whether only this machine reaches it.

    >>> on_loopback("127.0.0.1"), on_loopback("localhost"), on_loopback("0.0.0.0"), on_loopback("rank.example.org")
    (True, True, False, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Share = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@typed
class FormulaConfig:
    """How a candidate's scores p become one number (see `recsys_moe.serving.fuse`).

    Scores that `weights` does not name are left out; without any weights all scores count, with weight 1. A power is 1
    unless `powers` names the score.
    """

    form: Literal["sum", "product"] = "sum"
    weights: dict[str, Finite] = field(default_factory=dict)
    powers: dict[str, Annotated[float, Field(ge=-10, le=10)]] = field(default_factory=dict)


@typed
class CanaryConfig:
    """The model that a share of the users gets whose requests name none."""

    model: str
    share: Share


@typed
class ServeConfig:
    """Where the service listens and how much it takes: rows or candidates of a request, MiB of a body (unpacked).

    `poll_seconds` is how often MLflow is asked where the aliases point. `formula` fuses scores; `formula_file`, YAML of the
    same keys, is used instead and read again when it changes, and a request may bring its own if `request_formula`. `canary`
    diverts some users to another model, `shadow` scores a share of the requests with one whose scores are only logged.

    A request is answered within `deadline_ms` of its coming, or refused at once; requests that wait together are scored in
    calls of at most `batch_rows` rows. A body must arrive within `body_seconds`.

    `keys_file` names who may ask, and how often (see `recsys_moe.serving.keys`); without it the service listens on loopback
    only. `feature_log` is a folder for a `feature_log_share` of the requests, with the very features and scores.

    `log_file` takes the log, a line of JSON for each request; without it, standard error does.

    `item_key` and `user_key` are the features that a candidate's id and a request's `user_id` stand for, and the key
    columns of `item_features` and `user_features`: Arrow IPC files (uncompressed ones are mapped, not read) that requests
    need not repeat, read again when they are replaced.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    max_rows: Annotated[int, Field(ge=1)] = 2000
    max_candidates: Annotated[int, Field(ge=1)] = 2000
    max_body_mb: Annotated[float, Field(gt=0)] = 8
    body_seconds: Annotated[float, Field(gt=0)] = 10
    deadline_ms: Annotated[float, Field(gt=0)] = 500
    batch_rows: Annotated[int, Field(ge=1)] = 800
    poll_seconds: Annotated[float, Field(gt=0)] = 3
    keys_file: str | None = None
    feature_log: str | None = None
    feature_log_share: Share = 0.01
    formula: FormulaConfig = FormulaConfig()
    formula_file: str | None = None
    request_formula: bool = False
    canary: CanaryConfig | None = None
    shadow: CanaryConfig | None = None
    log_file: str | None = None
    item_key: str | None = None
    user_key: str | None = None
    item_features: str | None = None
    user_features: str | None = None

    def __post_init__(self) -> None:
        if self.keys_file is None and not on_loopback(self.host):
            raise ValueError(f"host {self.host!r} can be reached from elsewhere; set serve.keys_file, or host: 127.0.0.1")
        for key, file in ((self.item_key, self.item_features), (self.user_key, self.user_features)):
            if file is not None and key is None:
                raise ValueError(f"{file!r} needs a key column; set serve.item_key for items, serve.user_key for users")
