"""The log of a training: `train.log`, and the same lines on the console."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmaclip_fast.errors import one_line
from cmaclip_fast.progress import Console

log = logging.getLogger("cmaclip_fast")


@contextmanager
def log_file(path: Path, console: Console) -> Iterator[None]:
    """Sends this package's log to `path`, and its lines to the console."""
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_OneLine("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    echo = _ConsoleHandler(console)
    level, propagates = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False  # some library may have given the root logger a handler, which would repeat each line
    log.addHandler(handler)
    log.addHandler(echo)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.removeHandler(echo)
        log.setLevel(level)
        log.propagate = propagates
        handler.close()


class _LogFile(logging.FileHandler):
    """A log whose disk may be full: the run continues without it, or ends at the next file that matters."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.print(one_line(record.getMessage()), highlight=False, markup=False)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))
