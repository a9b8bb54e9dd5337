"""Runs a service: socket, signals, logs."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cmaclip_fast.errors import InputError
from cmaclip_fast.serving.app import create_app
from cmaclip_fast.serving.examples import read_examples
from cmaclip_fast.serving.schemas import Example
from cmaclip_fast.serving.service import Service, load
from cmaclip_fast.serving.settings import Settings

_KEEP_ALIVE_SECONDS = 5
_HEADER_BYTES = 32 * 2**10

log = logging.getLogger(__name__)


def serve(
    directory: Path,
    settings: Settings,
    device: str = "auto",
    precision: str = "auto",
    tell: Callable[[str], None] = print,
) -> None:
    """Serves a model until SIGTERM or SIGINT; SIGHUP loads the artefact anew.

    Args:
        device, precision: as for `Classifier.load`.
        tell: is given the address once it is open.

    Raises:
        InputError: the artefact cannot be loaded, or the address cannot be used.
    """
    with listen(settings.host, settings.port) as listening:
        read = partial(load, directory, device, precision, settings.min_precision)
        service = Service(read(), settings, read)
        examples = read_examples(directory, settings.examples)
        _log_as_json()
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        server = make_server(service, examples, lambda: tell(f"serving {service.model.name} at http://{shown}:{port}/"))
        asyncio.run(server.serve([listening]))


def make_server(service: Service, examples: list[Example], opened: Callable[[], None] = lambda: None) -> Server:
    """A server of a service; its `serve` takes the sockets to listen at.

    Args:
        opened: is called once requests are answered.
    """
    limits = service.settings.limits
    config = uvicorn.Config(
        create_app(service, examples),
        http=_protocol(limits.body_seconds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,  # anybody on this machine can write them
        server_header=False,
        # so many clients may be slow without keeping a probe from being answered
        limit_concurrency=4 * limits.requests,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(limits.drain_seconds),
    )
    return Server(config, service, opened)


def listen(host: str, port: int) -> socket.socket:
    """
    Raises:
        InputError: the address is not one of this machine, is in use, or may not be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host}: {getattr(error, 'strerror', None) or error}: name an address") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise InputError(f"{host}:{port}: {error.strerror}: choose another --port, or another --host") from None
    return listening


class Server(uvicorn.Server):
    """Uvicorn's, whose signals end it without an error: being stopped is how a service ends."""

    def __init__(self, config: uvicorn.Config, service: Service, opened: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._opened = service, opened
        self._reloads: set[asyncio.Task[bool]] = set()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._opened()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        handlers = {signal.SIGTERM: self._stop, signal.SIGINT: self._stop}
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = self._reload
        before = {number: signal.getsignal(number) for number in handlers}
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number, known in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, known)

    def _stop(self) -> None:
        """A second signal does not wait for what is in progress."""
        if self.should_exit:
            self.force_exit = True
        log.info("stopping", extra={"fields": {"at_once": self.should_exit}})
        self.should_exit = True

    def _reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._service.reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)


def _protocol(header_seconds: float) -> type[H11Protocol]:
    """Uvicorn's, which by itself waits without end for the headers of a request."""

    class Bounded(H11Protocol):
        waiting: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.wait()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.waiting is not None:
                self.waiting.cancel()

        def wait(self) -> None:
            """Begins to wait for headers, or stops once they are there."""
            if self.conn.their_state is not h11.IDLE:
                if self.waiting is not None:
                    self.waiting.cancel()
                self.waiting = None
            elif self.waiting is None:
                self.waiting = self.loop.call_later(header_seconds, self.give_up)

        def give_up(self) -> None:
            self.waiting = None
            if self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
                self.transport.close()

    return Bounded


class _Json(logging.Formatter):
    """One JSON object a line; fields come as `extra={"fields": {...}}`, and none of a client's headers or body."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{moment}.{round(record.msecs) % 1000:03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def _log_as_json() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Json())
    for name, level in (("cmaclip_fast.serving", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
