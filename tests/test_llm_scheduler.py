"""Blocks and the scheduler without a model: simulated loads, and what must hold after every step."""

import contextlib
import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_moe.errors import UserError
from recsys_moe.llm.batch import BLOCK
from recsys_moe.llm.engine.blocks import BlockPool, block_key, salted
from recsys_moe.llm.engine.scheduler import Limits, QueueFull, Scheduler, Sequence, Work


class Simulation:
    """A scheduler and a model that writes down what its cache would hold; every step is checked."""

    def __init__(self, limits: Limits, num_blocks: int, window: int | None = None) -> None:
        self.scheduler = Scheduler(limits, num_blocks, window)
        self.window = window
        self.content: dict[int, list[int]] = {block: [0] * BLOCK for block in range(num_blocks)}
        # A number for each prefix that there was: the tenant's root, or a shorter prefix and a token.
        self.numbers: dict[object, int] = {}
        self.prefixes: dict[Sequence, list[int]] = {}
        self.alive: list[Sequence] = []
        self.done: list[Sequence] = []
        self.steps = 0

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)
        self.alive.append(sequence)

    def step(self, next_token: Callable[[Sequence], int] = lambda s: s.generated) -> list[Work]:
        work = self.scheduler.schedule()
        self.steps += 1
        assert sum(w.last - w.first for w in work) <= self.scheduler.limits.step_tokens
        assert len(self.scheduler.running) <= self.scheduler.limits.max_running
        if self.alive:
            assert work, "somebody is there, and nothing runs"
            assert work[0].sequence is self.alive[0], "the oldest does not run"
        for w in work:
            for place in range(w.first, w.last):
                block, offset = self._slot(w.sequence, place)
                self.content[block][offset] = self._prefixes(w.sequence)[place]
        for w in work:  # what each token attends to is what its sequence has written, or somebody with the same prefix
            first = 0 if self.window is None else max(0, w.first - self.window + 1)
            for place in range(first, w.last):
                block, offset = self._slot(w.sequence, place)
                assert self.content[block][offset] == self._prefixes(w.sequence)[place]
        for w in work:
            self.scheduler.ran(w)
            if w.samples:
                w.sequence.tokens.append(next_token(w.sequence))
                if w.sequence.generated == w.sequence.max_tokens:
                    self.finish(w.sequence)
        self.check()
        return work

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        self.alive.remove(sequence)
        self.done.append(sequence)

    def drain(self) -> None:
        # Each step computes something of the oldest; what it must compute is bounded.
        bound = sum(s.prompt_tokens + s.max_tokens for s in self.alive) + 1
        while self.alive:
            self.step()
            assert (bound := bound - 1), "somebody starves"
        assert self.scheduler.pool.free == self.scheduler.pool.num_blocks

    def check(self) -> None:
        """No block is leaked, none is used by more or fewer than hold it, and the line is in order of arrival."""
        pool = self.scheduler.pool
        held = Counter(block for s in self.alive for block in s.blocks if block >= 0)
        assert all(pool.users(block) == held[block] for block in range(pool.num_blocks))
        assert pool.free == pool.num_blocks - len(held)
        assert [*self.scheduler.running, *self.scheduler.waiting] == self.alive
        assert not any(s.blocks for s in self.scheduler.waiting)
        for s in self.alive:
            assert sum(block >= 0 for block in s.blocks) <= self.scheduler.peak(len(s.tokens))

    def _prefixes(self, sequence: Sequence) -> list[int]:
        known = self.prefixes.setdefault(sequence, [])
        for token in sequence.tokens[len(known) :]:
            before = known[-1] if known else sequence.root
            known.append(self.numbers.setdefault((before, token), len(self.numbers) + 1))
        return known

    @staticmethod
    def _slot(sequence: Sequence, place: int) -> tuple[int, int]:
        block = sequence.blocks[place // BLOCK]
        assert block >= 0, "a block is gone that is still looked at"
        return block, place % BLOCK


LIMITS = Limits(max_running=4, max_waiting=8, step_tokens=20)

action = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 70), st.integers(1, 40), st.integers(0, 2), st.booleans()),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("step"), st.integers(1, 8)),
)


@given(st.lists(action, max_size=40), st.integers(4, 12), st.sampled_from([None, 1, 16, 21, 40]))
def test_whatever_comes_no_block_is_leaked_and_nobody_starves(
    actions: list[tuple[object, ...]], num_blocks: int, window: int | None
) -> None:
    simulation = Simulation(LIMITS, num_blocks, window)
    for kind, *rest in actions:
        if kind == "add":
            prompt, most, salt, scored = rest
            # Few tokens and tenants, so that prefixes are shared.
            sequence = Sequence([7] * int(str(prompt)), int(str(most)), bytes([int(str(salt))]), bool(scored))
            if simulation.scheduler.peak(len(sequence.tokens) + sequence.max_tokens) > num_blocks:
                with pytest.raises(UserError, match="of the KV cache"):
                    simulation.add(sequence)
            else:
                with contextlib.suppress(QueueFull):
                    simulation.add(sequence)
        elif kind == "cancel" and simulation.alive:
            simulation.finish(simulation.alive[int(str(rest[0])) % len(simulation.alive)])
            simulation.check()
        elif kind == "step":
            for _ in range(int(str(rest[0]))):
                simulation.step()
    simulation.drain()


@pytest.mark.parametrize("window", [None, 50])
def test_a_long_random_load_is_served_in_order_and_to_the_end(window: int | None) -> None:
    draw = random.Random(0)
    simulation = Simulation(Limits(max_running=8, max_waiting=300, step_tokens=64), 30, window)
    openings = [[draw.randrange(9) for _ in range(50)] for _ in range(3)]
    for n in range(200):
        prompt = draw.choice(openings)[: draw.randrange(1, 50)] + [n] * draw.randrange(1, 60)
        simulation.add(Sequence(prompt, draw.randrange(1, 60), salt=bytes([n % 2])))
        if n % 3 == 0:
            simulation.step()
        if n % 10 == 9:
            simulation.finish(draw.choice(simulation.alive))
    simulation.drain()
    assert len(simulation.done) == 200
    assert simulation.scheduler.preemptions > 10 or window
    assert sum(s.cached > 0 for s in simulation.done) > 20


def test_prompts_are_chunked_beside_those_that_decode() -> None:
    simulation = Simulation(Limits(max_running=4, step_tokens=8), 20)
    first, second = Sequence(range(3), 30), Sequence(range(100, 130), 5)
    simulation.add(first)
    simulation.step()
    simulation.add(second)
    for _ in range(4):
        decode, chunk = simulation.step()
        assert (decode.sequence, decode.last - decode.first, decode.samples) == (first, 1, True)
        assert (chunk.sequence, chunk.last - chunk.first, chunk.samples) == (second, 7, False)
    assert [(w.last - w.first, w.samples) for w in simulation.step()] == [(1, True), (2, True)]


def test_the_youngest_gives_way_and_comes_back() -> None:
    simulation = Simulation(Limits(max_running=4, step_tokens=40), 4)
    old, young = Sequence([1] * 30, 34), Sequence([2] * 30, 30)
    simulation.add(old)
    simulation.add(young)
    simulation.drain()
    assert simulation.done == [old, young]
    assert (old.preempted, young.preempted) == (0, 1)
    assert simulation.scheduler.preemptions == 1


def test_a_prefix_is_found_again_by_the_same_tenant_only() -> None:
    simulation = Simulation(Limits(max_running=4, step_tokens=100), 20)
    prompt = list(range(50))
    cached = []
    for tokens, salt in ((prompt, b""), (prompt, b""), (prompt, b"other"), (prompt[:40] + [9] * 10, b""), (prompt[:32], b"")):
        simulation.add(sequence := Sequence(tokens, 1, salt))
        simulation.drain()
        cached.append(sequence.cached)
    # Whole blocks, and never all of the prompt: the last token's logits are wanted.
    assert cached == [0, 48, 0, 32, 16]


def test_what_was_generated_is_found_again_too() -> None:
    simulation = Simulation(Limits(max_running=4, step_tokens=100), 20)
    simulation.add(first := Sequence(range(10), 40))
    simulation.drain()
    simulation.add(second := Sequence([*first.tokens, 5, 6], 1))
    simulation.drain()
    assert second.cached == 48


def test_a_prompt_that_is_scored_is_computed() -> None:
    simulation = Simulation(Limits(max_running=4, step_tokens=20), 20)
    for _ in range(2):
        simulation.add(sequence := Sequence(range(50), 3, score_prompt=True))
        work = [simulation.step()[0] for _ in range(3)]
        assert [(w.first, w.outputs, w.last) for w in work] == [(0, 0, 20), (20, 20, 40), (40, 40, 50)]
        assert simulation.step()[0].outputs == 50
        assert sequence.cached == 0
        simulation.drain()


def test_the_window_lets_a_sequence_be_longer_than_the_cache() -> None:
    limits = Limits(max_running=2, step_tokens=8)
    simulation = Simulation(limits, 6, window=20)
    simulation.add(sequence := Sequence(range(300), 50))
    simulation.drain()
    assert sequence.generated == 50
    with pytest.raises(UserError, match="prompt and max_tokens are 350 tokens, 22 blocks of the KV cache, which has 6"):
        Scheduler(limits, 6).add(Sequence(range(300), 50))


def test_the_line_has_an_end() -> None:
    scheduler = Scheduler(Limits(max_running=1, max_waiting=2, step_tokens=8), 4)
    for _ in range(2):
        scheduler.add(Sequence([1], 1))
    with pytest.raises(QueueFull, match="2 requests wait already"):
        scheduler.add(Sequence([1], 1))
    scheduler.schedule()
    scheduler.add(Sequence([1], 1))


def test_limits_that_would_starve_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="step_tokens 8 leaves prompts no place beside max_running 8"):
        Limits(max_running=8, step_tokens=8)


# -- blocks


def test_the_block_that_is_idle_longest_goes_first() -> None:
    pool = BlockPool(3)
    keys = [block_key(salted(b""), [n]) for n in range(3)]
    blocks = [pool.take() for _ in keys]
    for block, key in zip(blocks, keys, strict=True):
        pool.publish(block, key)
    for n in (1, 0, 2):
        pool.release(blocks[n])
    assert pool.reuse(keys[1]) == blocks[1]  # used again: no longer the oldest
    pool.release(blocks[1])
    assert (pool.take(), pool.take()) == (blocks[0], blocks[2])
    assert (pool.reuse(keys[0]), pool.reuse(keys[2]), pool.free) == (None, None, 1)


def test_a_shared_block_is_free_when_its_last_user_goes() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.publish(block, b"key")
    assert pool.reuse(b"key") == block
    pool.release(block)
    assert pool.free == 0
    pool.release(block)
    assert pool.free == 1
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(block)


def test_keys_know_all_that_came_before() -> None:
    root = salted(b"a")
    assert block_key(block_key(root, [1]), [2]) != block_key(block_key(root, [3]), [2])
    assert block_key(root, [1, 2]) != block_key(root, [2, 1])
    assert block_key(root, [2**40]) != block_key(root, [2**41])
