"""The engine: requests in, tokens out. One thread calls `step` again and again; anybody may submit and cancel at any time."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from recsys_moe.errors import UserError
from recsys_moe.llm.batch import BLOCK, KVCache, LanguageModel, TokenBatch
from recsys_moe.llm.engine.load import ExpertLoad
from recsys_moe.llm.engine.sampling import Sampling, TokenLogprob, describe, logprobs, sample
from recsys_moe.llm.engine.scheduler import Limits, Scheduler, Sequence, TooLong, Work
from recsys_moe.llm.engine.stopping import Decode, TextStream
from recsys_moe.routing import require_invariant

log = logging.getLogger(__name__)

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    Fields:
        prompt: at least one token.
        stop: strings that end the text; they are not shown.
        ignore_eos: go on behind the end-of-text token.
        logprobs: of each token, and of so many most probable ones beside it; None: none.
        score_prompt: log-probabilities of the prompt's tokens, too (with as many beside them as `logprobs` says).
        salt: requests of one salt share cached prefixes, and no others.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    score_prompt: bool = False
    salt: bytes = b""


@dataclass(frozen=True)
class Update:
    """What a step has brought: text that can be shown, tokens, and in the last update why it is the last.

    "stop": an end-of-text token or a stop string; "length": `max_tokens`; "error": the model failed, `text` is empty.
    `prompt_logprobs` comes once, with the first update: of the prompt's tokens after the first.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


class Ticket:
    """A request that was submitted, until it is finished. Times are `time.monotonic`'s."""

    def __init__(self, request: Request, listener: Callable[[Update], None], decode: Decode) -> None:
        self.request, self.listener = request, listener
        self.sequence = Sequence(request.prompt, request.max_tokens, request.salt, request.score_prompt)
        self.text = TextStream(decode, request.prompt, request.stop)
        self.prompt_logprobs: list[TokenLogprob] = []
        self.submitted = time.monotonic()
        self.started: float | None = None


@dataclass
class Counts:
    """What the engine has done so far."""

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts' tokens, those that were found in the cache."""


class Outcome(NamedTuple):
    """What a sequence's part of a step came to; `token` is None where the logits are not finite."""

    token: int | None
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


class Engine:
    """Serves a model, batch-invariantly: a request's tokens and log-probabilities are the same bits whatever else is served.

    Args:
        decode: tokens to text.
        eos_ids: tokens that end a text.
        num_blocks: of the KV cache (see `blocks_that_fit`).

    Raises:
        UserError: a router that looks at the whole batch.
    """

    def __init__(self, model: LanguageModel, decode: Decode, eos_ids: Iterable[int], num_blocks: int, limits: Limits) -> None:
        assert isinstance(model, nn.Module)
        try:
            require_invariant(model)
        except ValueError as error:
            raise UserError(str(error)) from None
        self.model, self._decode, self._eos = model, decode, frozenset(eos_ids)
        self.cache = KVCache.allocate(model, num_blocks)
        self.scheduler = Scheduler(limits, num_blocks, model.config.window)
        self.counts, self.load = Counts(), ExpertLoad(model)
        self._tickets: dict[Sequence, Ticket] = {}
        self._changed = threading.Condition()  # and the lock of all that is shared; a listener may submit and cancel
        self._stopped = False

    # -- from any thread

    @property
    def alive(self) -> bool:
        return not self._stopped

    def room(self, prompt_tokens: int) -> int:
        """The most tokens that can follow a prompt of so many; 0 or less: none."""
        places = self.model.config.max_positions
        if self.scheduler.peak(places) > self.scheduler.pool.num_blocks:
            places = min(places, self.scheduler.pool.num_blocks * BLOCK)
        return places - prompt_tokens

    def check(self, request: Request) -> None:
        """Whether the model can take it.

        Raises:
            TooLong: more tokens than the model has places for.
            UserError: no prompt, or tokens that the model does not know.
        """
        vocabulary, places = self.model.config.vocab_size, self.model.config.max_positions
        if not request.prompt:
            raise UserError("the prompt has no tokens; give it at least one")
        if strange := [token for token in request.prompt if not 0 <= token < vocabulary]:
            raise UserError(f"the prompt has token {strange[0]}, but the model knows 0 … {vocabulary - 1}; use its tokenizer")
        if len(request.prompt) + request.max_tokens > places:
            raise TooLong(
                f"the model's context is {places:,} tokens, but the prompt has {len(request.prompt):,} and max_tokens is "
                f"{request.max_tokens:,}; shorten the one or lower the other"
            )

    def submit(self, request: Request, listener: Callable[[Update], None]) -> Ticket:
        """Let a request join. `listener` is called by the engine's thread, and must not wait for anything.

        Raises:
            QueueFull: too many wait.
            TooLong: more tokens than the cache has places for.
            UserError: what `check` says.
        """
        self.check(request)
        ticket = Ticket(request, listener, self._decode)
        with self._changed:
            if self._stopped:
                raise RuntimeError("the engine was stopped")
            self.scheduler.add(ticket.sequence)
            self._tickets[ticket.sequence] = ticket
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Forget a request; its blocks are free at once. Nothing happens if it is finished."""
        with self._changed:
            if self._tickets.pop(ticket.sequence, None):
                self.scheduler.finish(ticket.sequence)

    def stop(self) -> None:
        """Let `run` return; requests that are not finished end with "error"."""
        with self._changed:
            self._stopped = True
            for ticket in tuple(self._tickets.values()):
                self._fail(ticket)
            self._changed.notify()

    # -- the engine's thread

    def run(self) -> None:
        """Step until `stop`."""
        while not self._stopped:
            if not self.step():
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._tickets)

    def step(self) -> bool:
        """Schedule → run → sample → emit. False if there was nothing to do."""
        with self._changed:
            work = self.scheduler.schedule()
            if not work:
                return False
            tickets = [self._tickets[w.sequence] for w in work]
            self._count(tickets)
            batch = pack(work)
        try:
            logits = self.model.forward(batch, self.cache)
            outcomes = self._sample(work, tickets, logits)
        except Exception:
            log.exception("a step of %d requests failed", len(work))
            outcomes = None
        with self._changed:
            for i, (w, ticket) in enumerate(zip(work, tickets, strict=True)):
                if w.sequence not in self._tickets:  # cancelled meanwhile
                    continue
                if outcomes is None:
                    self._fail(ticket)
                else:
                    self._emit(w, ticket, outcomes[i])
        self.load.ran(len(batch.tokens))
        return True

    def _sample(self, work: list[Work], tickets: list[Ticket], logits_kv: Tensor) -> list[Outcome]:
        ends = [*accumulate(w.last - w.outputs for w in work)]
        drawing = [i for i, w in enumerate(work) if w.samples]
        how = [tickets[i].request.sampling for i in drawing]
        drawn = sample(logits_kv[[ends[i] - 1 for i in drawing]], how, [work[i].sequence.generated for i in drawing])
        tokens = dict(zip(drawing, drawn, strict=True))
        rows = [logits_kv[end - w.last + w.outputs : end] for w, end in zip(work, ends, strict=True)]
        return [outcome(w, tickets[i].request, rows[i], tokens.get(i)) for i, w in enumerate(work)]

    def _emit(self, work: Work, ticket: Ticket, outcome: Outcome) -> None:
        request, sequence = ticket.request, work.sequence
        self.scheduler.ran(work)
        ticket.prompt_logprobs += outcome.prompt_logprobs
        if not work.samples:
            return
        if outcome.token is None:
            log.error("the logits of a request are not finite")
            self._fail(ticket)
            return
        prompt_logprobs = tuple(ticket.prompt_logprobs) if sequence.generated == 0 else ()
        if request.max_tokens == 0:
            self._end(ticket, Update(prompt_logprobs=prompt_logprobs, finish="length"))
            return
        sequence.tokens.append(outcome.token)
        self.counts.generated_tokens += 1
        ended = outcome.token in self._eos and not request.ignore_eos
        text, stopped = ("", False) if ended else ticket.text.add(outcome.token)
        finish: Finish | None = "stop" if ended or stopped else "length" if sequence.generated == request.max_tokens else None
        if finish and not stopped:
            text += ticket.text.finish()
        scores = () if outcome.logprob is None else (outcome.logprob,)
        update = Update(text, (outcome.token,), scores, prompt_logprobs, finish)
        if finish:
            self._end(ticket, update)
        else:
            ticket.listener(update)

    def _fail(self, ticket: Ticket) -> None:
        self._end(ticket, Update(finish="error"))

    def _end(self, ticket: Ticket, update: Update) -> None:
        self.cancel(ticket)
        ticket.listener(update)

    def _count(self, tickets: list[Ticket]) -> None:
        self.counts.steps += 1
        for ticket in tickets:
            if ticket.started is None:
                ticket.started = time.monotonic()
                self.counts.prompt_tokens += len(ticket.request.prompt)
                self.counts.cached_tokens += ticket.sequence.cached


def pack(work: list[Work]) -> TokenBatch:
    """The step as the model takes it."""
    tokens: list[int] = []
    positions: list[int] = []
    outputs: list[int] = []
    starts = [0]
    for w in work:
        tokens += w.sequence.tokens[w.first : w.last]
        positions += range(w.first, w.last)
        outputs += range(len(tokens) - w.last + w.outputs, len(tokens))
        starts.append(len(tokens))
    widest = max(len(w.sequence.blocks) for w in work)
    return TokenBatch(
        tokens=torch.tensor(tokens),
        positions=torch.tensor(positions),
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor([w.last for w in work], dtype=torch.int32),
        blocks=torch.tensor([w.sequence.blocks + [-1] * (widest - len(w.sequence.blocks)) for w in work], dtype=torch.int32),
        outputs=torch.tensor(outputs, dtype=torch.int64),
    )


def outcome(work: Work, request: Request, logits_kv: Tensor, token: int | None) -> Outcome:
    """What comes of a sequence's rows: those of its prompt score the tokens that follow, the last one the token drawn."""
    if request.logprobs is None and not request.score_prompt:
        return Outcome(token)
    table, top = logprobs(logits_kv), request.logprobs or 0
    following = work.sequence.tokens[work.outputs + 1 : min(work.last + 1, work.sequence.prompt_tokens)]
    scored = tuple(describe(row, known, top) for row, known in zip(table, following, strict=False))
    if token is None or request.logprobs is None:
        return Outcome(token, None, scored)
    return Outcome(token, describe(table[-1], token, top), scored)


def blocks_that_fit(model: LanguageModel, mib: float) -> int:
    """How many blocks of the KV cache so much memory holds.

    Raises:
        UserError: not one.
    """
    size = sum(model.cache_widths()) * BLOCK * model.config.dtype.itemsize
    blocks = int(mib * 2**20) // size
    if blocks < 1:
        raise UserError(f"a KV cache of {mib:g} MiB holds not one block of {size / 2**20:.3g} MiB; give it more")
    return blocks


@dataclass
class Completion:
    """All updates of a request together."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, update: Update) -> None:
        self.text += update.text
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.finish = update.finish


def complete(engine: Engine, requests: Iterable[Request]) -> list[Completion]:
    """Run the requests together in this thread, to their end, on an engine that nobody else steps."""
    completions = []
    for request in requests:
        completions.append(Completion())
        engine.submit(request, completions[-1].add)
    while engine.step():
        pass
    return completions
