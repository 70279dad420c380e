"""One sequence at a time, in a plain loop: what the engine does for many, and what its output is held against."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from recsys_moe.errors import UserError
from recsys_moe.llm.batch import BLOCK, KVCache, TokenBatch
from recsys_moe.llm.layers import Decoder

CHUNK = 512
"""Tokens of a prompt that run at a time."""

Pick = Callable[[Tensor], int]


def greedy(logits_v: Tensor) -> int:
    """The token of the largest logit, the lowest one among equals.

    >>> greedy(torch.tensor([0.0, 2.0, 2.0]))
    1
    """
    return int((logits_v == logits_v.max()).nonzero()[0])


def sampler(temperature: float, seed: int) -> Pick:
    """Draws a token by softmax(logits / temperature); at 0, the largest."""
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; it must be at least 0")
    if temperature == 0:
        return greedy
    generator = torch.Generator().manual_seed(seed)

    def pick(logits_v: Tensor) -> int:
        # The largest is 0 before the division: at a temperature of nearly 0 all others become −∞, and none NaN.
        z = (logits_v.double() - logits_v.max()) / temperature
        return int(torch.multinomial(torch.softmax(z, -1), 1, generator=generator))

    return pick


class OneSequence:
    """One sequence and its cache, which has room for all of it."""

    def __init__(self, model: Decoder, room: int) -> None:
        if room > model.config.max_positions:
            raise UserError(
                f"{room} tokens are more than the model's {model.config.max_positions} positions; shorten the prompt or the "
                "answer"
            )
        self._model, self._done = model, 0
        count = -(-room // BLOCK)
        self._cache = KVCache.allocate(model, count)
        self._blocks = torch.arange(count, dtype=torch.int32).unsqueeze(0)

    def feed(self, ids: Sequence[int], all_logits: bool = False) -> Tensor:
        """The next tokens; fp32 logits of all of them, or of the last: `[K, vocabulary]`."""
        n = len(ids)
        batch = TokenBatch(
            torch.tensor(ids),
            torch.arange(self._done, self._done + n),
            torch.tensor([0, n], dtype=torch.int32),
            torch.tensor([self._done + n], dtype=torch.int32),
            self._blocks,
            torch.arange(n) if all_logits else torch.tensor([n - 1]),
        )
        self._done += n
        logits: Tensor = self._model(batch, self._cache)
        return logits


def generate(
    model: Decoder, prompt: Sequence[int], max_new: int, eos_ids: Sequence[int] = (), pick: Pick = greedy
) -> Iterator[int]:
    """The tokens after a prompt, one by one, until `max_new` or one that ends the text (which is not given).

    Raises:
        UserError: an empty prompt, a token that isn't in the vocabulary, more tokens than the model has positions.
    """
    check_tokens(model, prompt)
    if max_new < 1:
        raise UserError(f"{max_new} new tokens were asked for; ask for at least 1")
    sequence = OneSequence(model, len(prompt) + max_new - 1)
    for at in range(0, len(prompt), CHUNK):
        logits = sequence.feed(prompt[at : at + CHUNK])
    for made in range(max_new):
        token = pick(logits[-1])
        if token in eos_ids:
            return
        yield token
        if made + 1 < max_new:
            logits = sequence.feed([token])


def logprobs(model: Decoder, ids: Sequence[int]) -> list[float]:
    """The natural log-probability of each token after the first, given those before it.

    Raises:
        UserError: fewer than two tokens, one that isn't in the vocabulary, more than the model has positions.
    """
    check_tokens(model, ids)
    if len(ids) < 2:
        raise UserError(f"{len(ids)} token has none after it to tell the probability of; give at least 2")
    sequence = OneSequence(model, len(ids) - 1)
    found: list[float] = []
    for at in range(0, len(ids) - 1, CHUNK):
        part = ids[at : min(at + CHUNK, len(ids) - 1)]
        logits = sequence.feed(part, all_logits=True)
        following = torch.tensor(ids[at + 1 : at + 1 + len(part)]).unsqueeze(1)
        found += torch.log_softmax(logits.double(), -1).gather(1, following).flatten().tolist()
    return found


def check_tokens(model: Decoder, ids: Sequence[int]) -> None:
    """Raises UserError for no tokens, or one that isn't in the vocabulary."""
    if not ids:
        raise UserError("there are no tokens; give at least one")
    if strange := [i for i in ids if not 0 <= i < model.config.vocab_size]:
        raise UserError(f"token {strange[0]} is not in 0 … {model.config.vocab_size - 1}, the model's vocabulary")
