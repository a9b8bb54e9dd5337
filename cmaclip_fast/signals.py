"""SIGINT, SIGTERM and SIGHUP: a run ends after the step that it is in, keeps what is done, and exits with 128 + N."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

_ONE_SECONDS = 0.25
"""Signals that come so soon after the first are taken for the same: `timeout` and a closing terminal send two."""


class Interrupted(SystemExit):
    """A signal asked this process to end; where nobody catches it, the process ends quietly with 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class _State:
    """What this process was asked for.

    Attributes:
        in_steps: whether a signal waits for the end of a step.
        waiting: the signal that waits.
        came: when it came.
    """

    in_steps = False
    waiting: int | None = None
    came = 0.0


def _handle(number: int, frame: FrameType | None) -> None:
    if not _State.in_steps:
        raise Interrupted(number)
    if _State.waiting is None:
        _State.waiting, _State.came = number, time.monotonic()
    elif time.monotonic() - _State.came > _ONE_SECONDS:
        signal.signal(number, signal.SIG_DFL)  # whatever holds up the step does not hold this up
        signal.raise_signal(number)


def install() -> dict[int, object]:
    """Has the signals end this process by `Interrupted`; those that it was started to ignore stay ignored.

    Returns:
        The handlers that there were.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in SIGNALS}
    before: dict[int, object] = {
        number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)
    }
    for number in before:
        signal.signal(number, _handle)
    return before


@contextmanager
def handled() -> Iterator[None]:
    """As `install`, until the block ends."""
    before = install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


@contextmanager
def steps() -> Iterator[None]:
    """Work in steps: a signal waits until `check` is called between two of them; a second one ends the process."""
    _State.in_steps, _State.waiting = True, None
    try:
        yield
        check()
    finally:
        _State.in_steps, _State.waiting = False, None


def check() -> None:
    """
    Raises:
        Interrupted: a signal has come since `steps` was entered.
    """
    if _State.waiting is not None:
        raise Interrupted(_State.waiting)


def exit_code(stop: KeyboardInterrupt | Interrupted) -> int:
    """128 plus the number of the signal."""
    return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
