"""One thread scores; requests that wait together are one call, and what could not be answered in time is refused at once.

A request costs its rows, and as much as `FIXED` rows more for what it takes by itself. The time that a row takes is measured
as requests go. A lone request does not wait for others. What stands in front of a request may take `AHEAD` of the deadline: as
much may come beside it into its own call, and the rest is for what the clock does not see. What has waited longer than the
whole is refused as well. A request that finds nothing before it is never refused, however long it takes.
"""

import asyncio
import logging
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from recsys_moe.predictor import Predictor
from recsys_moe.transforms import Inputs, concatenate

log = logging.getLogger(__name__)

FIXED = 50
AHEAD = 0.4
_CALLS = 15
"""The latest calls, whose median says how long a row takes."""


class Overloaded(Exception):
    """More is waiting than can be answered in time; try again after so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.retry_after = max(1, math.ceil(seconds))


class Job(Protocol):
    """A request on its way; all but `rows` is called by the thread that scores."""

    @property
    def rows(self) -> int:
        """How many rows it has scored."""

    def prepare(self) -> tuple[Predictor, Inputs]:
        """By which predictor, and what it reads."""

    def answer(self, scores_sn: npt.NDArray[np.float32], ms: float) -> Any:
        """What the client gets, from the scores `[S, N]` of a call that took so long."""

    def afterwards(self) -> None:
        """What nobody waits for."""


@dataclass(eq=False)
class _Waiting:
    job: Job
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    behind: bool  # others were there first
    since: float = field(default_factory=time.perf_counter)

    @property
    def cost(self) -> int:
        return self.job.rows + FIXED

    def tell(self, result: Any) -> None:
        def deliver() -> None:
            if self.future.done():  # the client has gone
                return
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)

        self.loop.call_soon_threadsafe(deliver)


class Batcher:
    """Scores jobs, at most `rows` rows in a call (a single job may have more), each within `deadline_s` of its coming.

    `called(requests, rows)` is told of every call that succeeds.
    """

    def __init__(self, rows: int, deadline_s: float, called: Callable[[int, int], None]) -> None:
        self._rows, self._deadline_s, self._called = rows, deadline_s, called
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._paces = deque[float](maxlen=_CALLS)
        self._cost, self._seconds_each, self._busy, self._ended = 0, 0.0, False, False
        self._thread = threading.Thread(target=self._run, name="score", daemon=True)
        self._thread.start()

    async def run(self, job: Job) -> Any:
        """The job's answer.

        Raises:
            Overloaded: it would come too late.
        """
        loop = asyncio.get_running_loop()
        with self._changed:
            waiting = _Waiting(job, loop.create_future(), loop, behind=self._cost > 0)
            before = self._cost * self._seconds_each
            if before > self._deadline_s * AHEAD:
                raise Overloaded(before)
            self._queue.append(waiting)
            self._cost += waiting.cost
            self._changed.notify()
        return await waiting.future

    def settle(self) -> None:
        """Wait until nothing is under way, what follows answers included."""
        with self._changed:
            self._changed.wait_for(lambda: not self._busy and not self._queue)

    def close(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._take():
            started = time.perf_counter()
            self._score(batch)
            seconds = time.perf_counter() - started
            cost = sum(each.cost for each in batch)
            self._paces.append(seconds / cost)
            self._seconds_each = statistics.median(self._paces)  # one call that was held up is no slow machine
            for each in batch:
                try:
                    each.job.afterwards()
                except Exception:
                    log.exception("what follows an answer failed")
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _take(self) -> list[_Waiting]:
        """What waits, as much as one call may have; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ended)
            batch = list[_Waiting]()
            rows, self._busy = 0, True
            while self._queue and (not batch or rows + self._queue[0].job.rows <= self._rows):
                batch.append(self._queue.popleft())
                rows += batch[-1].job.rows
            return batch

    def _score(self, batch: list[_Waiting]) -> None:
        ready: dict[Predictor, list[tuple[_Waiting, Inputs]]] = {}
        for each in batch:
            late = time.perf_counter() - each.since
            if each.behind and late > self._deadline_s:
                self._tell(each, Overloaded(late))
                continue
            try:
                predictor, inputs = each.job.prepare()
            except Exception as error:
                self._tell(each, error)
                continue
            ready.setdefault(predictor, []).append((each, inputs))
        for predictor, members in ready.items():
            self._answer(predictor, members)

    def _answer(self, predictor: Predictor, members: list[tuple[_Waiting, Inputs]]) -> None:
        """Score them in one call; where that fails, half of them at a time: nobody's rows may fail another's."""
        started = time.perf_counter()
        try:
            scores = predictor.score_inputs(concatenate([inputs for _, inputs in members]))
        except Exception as error:
            if len(members) == 1:
                self._tell(members[0][0], error)
                return
            log.warning("a call of %d requests failed and is scored by halves: %s", len(members), error)
            self._answer(predictor, members[: len(members) // 2])
            self._answer(predictor, members[len(members) // 2 :])
            return
        ms = (time.perf_counter() - started) * 1000
        ends = np.cumsum([inputs.dense.shape[1] for _, inputs in members])
        for (each, inputs), end in zip(members, ends, strict=True):
            try:
                answer = each.job.answer(scores[:, end - inputs.dense.shape[1] : end], ms)
            except Exception as error:
                answer = error
            self._tell(each, answer)
        self._called(len(members), scores.shape[1])

    def _tell(self, each: _Waiting, answer: Any) -> None:
        with self._changed:  # before the client can ask again
            self._cost -= each.cost
        each.tell(answer)
