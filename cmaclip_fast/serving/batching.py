"""Rows of many requests that come together, run as one batch."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cmaclip_fast.serving.errors import Refused, full

Run = Callable[[Any, list[Any]], Sequence[Any]]


@dataclass
class _Waiting:
    """The rows of one request, which stay together."""

    kind: Hashable
    rows: list[Any]
    answer: asyncio.Future[list[Any]]


class Batcher:
    """A bounded queue of rows and one thread that runs them, those of one kind as one batch.

    Nothing waits for a batch to fill: what comes while the model computes is its next batch. So one client gets the
    latency of one row, and many clients the throughput of full batches. To be used within one event loop.

    Attributes:
        waiting: rows in the queue, without those that run.
    """

    def __init__(self, run: Run, batch_rows: int, queue_rows: int, note: Callable[[int], None] | None = None) -> None:
        """
        Args:
            run: gives the answers to rows of one kind, in order; called in a thread.
            batch_rows: rows of a batch, at most; a request with more is a batch of its own.
            queue_rows: rows that may wait.
            note: is told the number of rows of each batch.
        """
        self._run, self._batch_rows, self._queue_rows, self._note = run, batch_rows, queue_rows, note
        self._queue: deque[_Waiting] = deque()
        self._filled = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cmaclip-model")
        self._task: asyncio.Task[None] | None = None
        self._rows_a_second = float(batch_rows)
        self._closed = False
        self.waiting = 0

    def start(self) -> None:
        """Starts to take rows from the queue."""
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Takes no more rows, and returns when those in the queue are answered."""
        self._closed = True
        self._filled.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    def check_room(self, rows: int) -> None:
        """
        Raises:
            Refused: with status 429, where so many rows find no room in the queue.
        """
        if self.waiting and self.waiting + rows > self._queue_rows:
            raise full(f"{self.waiting} rows wait already", self.waiting / self._rows_a_second)

    async def submit(self, kind: Hashable, rows: list[Any], seconds: float) -> list[Any]:
        """The answers to the rows of a request.

        Args:
            kind: rows of equal kinds may share a batch.
            seconds: to wait, at most.

        Raises:
            Refused: the queue is full (429), the time is over (504), or the service is being stopped (503).
            Exception: what `run` raised for these rows.
        """
        if self._closed:
            raise Refused(503, "stopping", "the service is being stopped: try another", retry_after=1)
        self.check_room(len(rows))
        item = _Waiting(kind, rows, asyncio.get_running_loop().create_future())
        self._queue.append(item)
        self.waiting += len(rows)
        self._filled.set()
        try:
            return await asyncio.wait_for(item.answer, seconds)
        except asyncio.TimeoutError:
            raise Refused(504, "too_slow", f"no answer within {seconds:g} s: send fewer rows, or try later") from None

    def _next(self) -> list[_Waiting]:
        """The requests of the next batch: the one that waits longest, and those of its kind that fit beside it."""
        chosen: list[_Waiting] = []
        kept: deque[_Waiting] = deque()
        rows = 0
        while self._queue:
            item = self._queue.popleft()
            if item.answer.done():  # its client waits no more
                self.waiting -= len(item.rows)
            elif not chosen or (item.kind == chosen[0].kind and rows + len(item.rows) <= self._batch_rows):
                chosen.append(item)
                rows += len(item.rows)
                self.waiting -= len(item.rows)
            else:
                kept.append(item)
            if rows >= self._batch_rows:
                break
        self._queue.extendleft(reversed(kept))
        return chosen

    async def _work(self) -> None:
        while True:
            chosen = self._next()
            if chosen:
                await self._answer(chosen)
            elif self._closed:
                return
            else:
                self._filled.clear()
                await self._filled.wait()

    async def _answer(self, chosen: list[_Waiting]) -> None:
        rows = [row for item in chosen for row in item.rows]
        if self._note is not None:
            self._note(len(rows))
        began = time.perf_counter()
        try:
            answers = await self._in_thread(chosen[0].kind, rows)
        except Exception as error:
            if len(chosen) == 1:
                _settle(chosen[0], error)
                return
            for item in chosen:  # only the request that cannot be answered fails
                await self._answer([item])
            return
        taken = max(time.perf_counter() - began, 1e-6)
        self._rows_a_second += 0.2 * (len(rows) / taken - self._rows_a_second)
        start = 0
        for item in chosen:
            _settle(item, answers[start : start + len(item.rows)])
            start += len(item.rows)

    async def _in_thread(self, kind: Any, rows: list[Any]) -> list[Any]:
        answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._run, kind, rows)
        if len(answers) != len(rows):
            raise RuntimeError(f"{len(rows)} rows got {len(answers)} answers")
        return list(answers)


def _settle(item: _Waiting, outcome: list[Any] | Exception) -> None:
    if item.answer.done():
        return
    if isinstance(outcome, Exception):
        item.answer.set_exception(outcome)
    else:
        item.answer.set_result(outcome)
