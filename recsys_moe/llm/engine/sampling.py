"""The next token of each sequence from its logits: a function of its own row, its own seed and how many tokens it has, alone.

A draw is not taken from a stream that others draw from: its place in the random sequence is the token's own number, so that it
is the same alone and in a batch, and again after a sequence was put back and computed anew.
"""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from recsys_moe.typed import typed


@typed
class Sampling:
    """How a token is drawn: p = softmax(logits / temperature), restricted in turn to

    - the `top_k` most probable tokens (0: all),
    - the fewest most probable ones that have `top_p` of what is left,
    - those with at least `min_p` of the most probable one's p,

    of equals those with the lowest id. Temperature 0 is greedy: the largest logit, of equals the lowest id, nothing drawn.
    """

    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0


class TokenLogprob(NamedTuple):
    """Of the model's own distribution (temperature 1, nothing left out): this token's log-probability, and the most probable
    tokens with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def sample(logits_kv: Tensor, how: Sequence[Sampling], number: Sequence[int]) -> list[int | None]:
    """A token for each row of finite fp32 logits `[K, V]`; `number[k]` is how many tokens row k's sequence has generated.

    None for a row that is not finite.

    >>> sample(torch.tensor([[0.0, 3.0, 3.0]]), [Sampling(temperature=0.0)], [0])
    [1]
    """
    high, best = logits_kv.max(-1)  # of equals the first; faster than argmax
    ends = zip(high.tolist(), logits_kv.amin(-1).tolist(), strict=True)  # both hand NaN on
    tokens: list[int | None] = []
    for row, (sampling, (top, bottom), token) in enumerate(zip(how, ends, best.tolist(), strict=True)):
        if not (math.isfinite(top) and math.isfinite(bottom)):
            tokens.append(None)
        elif sampling.temperature == 0:
            tokens.append(token)
        else:
            tokens.append(draw(logits_kv[row].numpy(), sampling, number[row]))
    return tokens


def draw(logits_v: npt.NDArray[np.float32], sampling: Sampling, number: int) -> int:
    """A token from one row, by inverting the cumulative distribution at a uniform number."""
    ids, p = distribution(logits_v, sampling)
    random = np.random.Generator(np.random.Philox(key=sampling.seed, counter=number)).random()
    cumulative = np.cumsum(p)
    return int(ids[min(np.searchsorted(cumulative, random * cumulative[-1], side="right"), len(ids) - 1)])


def distribution(
    logits_v: npt.NDArray[np.float32], sampling: Sampling
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that may be drawn and their probabilities, not normalised.

    >>> logits = np.log(np.array([0.1, 0.4, 0.4, 0.1], np.float32))
    >>> distribution(logits, Sampling(top_p=0.5))[0].tolist(), distribution(logits, Sampling(top_k=1))[0].tolist()
    ([1, 2], [1])
    """
    z = logits_v.astype(np.float64)
    with np.errstate(over="ignore"):  # at a temperature of nearly 0 all but the largest become exp(−∞)
        p = np.exp((z - z.max()) / sampling.temperature)
    ids = np.arange(len(p))
    if 0 < sampling.top_k < len(p):
        least = np.partition(p, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(p >= least)
    if sampling.top_k or sampling.top_p < 1:
        ids = ids[np.argsort(-p[ids], kind="stable")]
        ids = ids[: sampling.top_k or None]
        if sampling.top_p < 1:
            cumulative = np.cumsum(p[ids])
            ids = ids[: np.searchsorted(cumulative, sampling.top_p * cumulative[-1]) + 1]
    ids = ids[p[ids] >= sampling.min_p]  # the largest p is 1
    return ids, p[ids]


def logprobs(logits_kv: Tensor) -> Tensor:
    """The model's own log-probabilities, fp32 `[K, V]`, row by row: log_softmax."""
    return torch.log_softmax(logits_kv, -1)


def describe(logprobs_v: Tensor, token: int, top: int) -> TokenLogprob:
    """A token's log-probability beside the `top` most probable ones."""
    values, ids = logprobs_v.topk(min(top, len(logprobs_v)))
    return TokenLogprob(token, float(logprobs_v[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
