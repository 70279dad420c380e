"""Which tokens of which sequences run in the next step. Plain Python, no tensors: what it decides can be simulated.

Every sequence that is not finished stands in one line, by arrival: the first part of it runs, the rest waits.

- A step has at most `step_tokens` tokens: one of each sequence that is decoding, and what is left of them for prompts, in
  chunks, the oldest first. So a long prompt never holds up those that are decoding.
- Blocks are taken as they are written. If none is free, the youngest that runs is put back to the head of those that wait; its
  blocks are released, and it is computed again later (from whatever prefix is still cached).
- Nobody overtakes. The oldest sequence always runs and nothing is ever taken from it, so each becomes the oldest, or finishes
  before: nobody starves. What could never fit is refused at the door.
"""

from collections import deque
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field

from recsys_moe.errors import UserError
from recsys_moe.llm.batch import BLOCK
from recsys_moe.llm.engine.blocks import BlockPool, block_key, salted
from recsys_moe.typed import typed


@typed
class Limits:
    """Sequences that run at once and that wait beside them, and tokens of one step."""

    max_running: Annotated[int, Field(ge=1)] = 64
    max_waiting: Annotated[int, Field(ge=1)] = 256
    step_tokens: Annotated[int, Field(ge=2)] = 512

    def __post_init__(self) -> None:
        if self.step_tokens <= self.max_running:
            raise ValueError(
                f"step_tokens {self.step_tokens} leaves prompts no place beside max_running {self.max_running} sequences; "
                "raise the one or lower the other"
            )


class QueueFull(UserError):
    """Too many wait already: come back later."""


class TooLong(UserError):
    """More tokens than there are places for."""


class Sequence:
    """One sequence's tokens and what the cache holds of them.

    Args:
        tokens: the prompt.
        max_tokens: how many may be generated.
        salt: sequences of one salt share cached prefixes.
        score_prompt: logits of the prompt's tokens are wanted, too.
    """

    def __init__(self, tokens: Iterable[int], max_tokens: int, salt: bytes = b"", score_prompt: bool = False) -> None:
        self.tokens = list(tokens)
        self.prompt_tokens, self.max_tokens = len(self.tokens), max_tokens
        self.computed = 0
        """Tokens whose keys and values lie in the cache."""
        self.scored = 0 if score_prompt else self.prompt_tokens - 1
        """Prompt tokens whose logits are not wanted, or have been given."""
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.root = salted(salt)
        self.cached = 0
        """Tokens that were found in the cache at the first start."""
        self.preempted = 0

    @property
    def remaining(self) -> int:
        """Tokens that are known and not computed; 1 while decoding."""
        return len(self.tokens) - self.computed

    @property
    def wanted(self) -> int:
        """The first place whose logits are wanted and not given: of the prompt, or else of the last token."""
        return self.scored if self.scored < self.prompt_tokens - 1 else len(self.tokens) - 1

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    def key(self, block: int) -> bytes:
        """The key of a full block of its tokens."""
        while len(self.keys) <= block:
            at = len(self.keys)
            parent = self.keys[-1] if self.keys else self.root
            self.keys.append(block_key(parent, self.tokens[at * BLOCK : (at + 1) * BLOCK]))
        return self.keys[block]


class Work:
    """Run `sequence.tokens[first:last]`; logits are wanted from place `outputs` on (none if that is `last`)."""

    def __init__(self, sequence: Sequence, count: int) -> None:
        self.sequence, self.first = sequence, sequence.computed
        self.last = self.first + count
        self.outputs = min(max(self.first, sequence.wanted), self.last)
        self.samples = self.last == len(sequence.tokens)
        """Whether the last of them says what comes next."""


class Scheduler:
    """See above.

    Args:
        window: tokens that attention looks back, itself included (None: all). Blocks that leave the window are released.

    >>> scheduler = Scheduler(Limits(max_running=2, step_tokens=8), num_blocks=4)
    >>> scheduler.add(Sequence(range(10), max_tokens=1))
    >>> [(work.first, work.last, work.samples) for work in scheduler.schedule()]
    [(0, 8, False)]
    """

    def __init__(self, limits: Limits, num_blocks: int, window: int | None = None) -> None:
        self.limits, self.window = limits, window
        self.pool = BlockPool(num_blocks)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the line.

        Raises:
            QueueFull: too many wait.
            TooLong: it can't be held even alone.
        """
        longest = sequence.prompt_tokens + sequence.max_tokens
        if (most := self.peak(longest)) > self.pool.num_blocks:
            raise TooLong(
                f"prompt and max_tokens are {longest:,} tokens, {most:,} blocks of the KV cache, which has "
                f"{self.pool.num_blocks:,}; ask for fewer tokens, or give the cache more memory"
            )
        if len(self.waiting) >= self.limits.max_waiting:
            raise QueueFull(f"{len(self.waiting):,} requests wait already, which is the limit; try again later")
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """The next step's work, blocks taken; empty if there is none."""
        prompts = self.limits.step_tokens - sum(s.remaining == 1 for s in self.running)
        work: list[Work] = []
        preemptions = self.preemptions
        for sequence in tuple(self.running):
            count = 1 if sequence.remaining == 1 else min(sequence.remaining, prompts)
            if count == 0 or sequence not in self.running:  # an older one may have put it out
                continue
            if not self._hold(sequence, sequence.computed + count):
                break
            work.append(Work(sequence, count))
            prompts -= count if sequence.remaining > 1 else 0
        while self._admits(prompts, preemptions):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            count = min(sequence.remaining, prompts)
            held = self._hold(sequence, sequence.computed + count)
            assert held, "a sequence was admitted that does not fit"
            work.append(Work(sequence, count))
            prompts -= count
        return work

    def ran(self, work: Work) -> None:
        """The work's keys and values lie in the cache now: others may use its full blocks."""
        sequence = work.sequence
        for block in range(sequence.computed // BLOCK, work.last // BLOCK):
            self.pool.publish(sequence.blocks[block], sequence.key(block))
        sequence.computed = work.last
        sequence.scored = max(sequence.scored, min(work.last, sequence.prompt_tokens - 1))
        self._leave_behind(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take it out of the line, wherever it stands, and release its blocks at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def peak(self, tokens: int) -> int:
        """The most blocks that a sequence of so many tokens uses at once."""
        whole = -(-tokens // BLOCK)
        if self.window is None:
            return whole
        span = self.window + self.limits.step_tokens - 1  # the window of a chunk's first token, and the rest of the chunk
        return min(whole, (span - 2) // BLOCK + 2)

    def _admits(self, prompts: int, preemptions: int) -> bool:
        """Whether the first that waits can start, with all that is known of it; if so, it has its cached prefix."""
        if not self.waiting or not prompts or len(self.running) == self.limits.max_running or preemptions != self.preemptions:
            return False
        sequence = self.waiting[0]
        self._find_prefix(sequence)
        held = sum(block >= 0 for block in sequence.blocks)
        if self.pool.free >= self.peak(len(sequence.tokens)) - held:
            if not sequence.preempted:
                sequence.cached = sequence.computed
            return True
        self._release(sequence)
        return False

    def _find_prefix(self, sequence: Sequence) -> None:
        # Whose logits are wanted must be computed.
        for block in range(sequence.wanted // BLOCK):
            found = self.pool.reuse(sequence.key(block))
            if found is None:
                break
            sequence.blocks.append(found)
        sequence.computed = len(sequence.blocks) * BLOCK
        self._leave_behind(sequence)

    def _hold(self, sequence: Sequence, tokens: int) -> bool:
        """Have blocks for so many tokens; False if it was put out itself."""
        for _ in range(-(-tokens // BLOCK) - len(sequence.blocks)):
            while not self.pool.free:
                youngest = self.running.pop()
                self._release(youngest)
                youngest.preempted += 1
                self.preemptions += 1
                self.waiting.appendleft(youngest)
                if youngest is sequence:
                    return False
            sequence.blocks.append(self.pool.take())
        return True

    def _leave_behind(self, sequence: Sequence) -> None:
        """Release the blocks that the next token does not see."""
        if self.window is None:
            return
        for block in range(min((sequence.computed - self.window + 1) // BLOCK, len(sequence.blocks)) - 1, -1, -1):
            if sequence.blocks[block] < 0:
                break
            self.pool.release(sequence.blocks[block])
            sequence.blocks[block] = -1

    def _release(self, sequence: Sequence) -> None:
        for block in reversed(sequence.blocks):  # a prefix outlives what follows it
            if block >= 0:
                self.pool.release(block)
        sequence.blocks, sequence.computed = [], 0
