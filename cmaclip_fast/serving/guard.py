"""What every request passes before the application sees it: who calls, how much, how fast. Counts and logs it too."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from cmaclip_fast.serving.errors import Refused, full
from cmaclip_fast.serving.metrics import Metrics
from cmaclip_fast.serving.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/", "/health", "/ready", "/openapi.json"})
"""What is answered without a token: none of it tells of the model."""

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]

log = logging.getLogger(__name__)


class _Left(Exception):
    """The client is gone."""


class Guard:
    """An ASGI middleware. Nothing of a body is read before the caller may send it; what is read is bounded."""

    def __init__(self, app: App, settings: Settings, metrics: Metrics, routes: frozenset[str]) -> None:
        """
        Args:
            routes: the paths there are; others are counted together.
        """
        self._app, self._settings, self._metrics, self._routes = app, settings, metrics, routes
        self._token = None if settings.token is None else _digest(settings.token.encode())
        self._requests = 0
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await _Exchange(scope, receive, send, self._metrics, self._routes).run(self._handle)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        self._check_origin(scope, headers)
        self._check_token(scope, headers)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        limits = self._settings.limits
        if self._requests >= limits.requests:
            raise full(f"{self._requests} requests are in progress", 1)
        self._requests += 1
        body = bytearray()
        try:
            await self._read(headers, receive, body)
            await self._app(scope, _replayed(bytes(body), receive), send)
        finally:
            self._requests -= 1
            self._held -= len(body)

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        known = self._settings.known_hosts
        if known is not None and _name(host) not in known:
            raise Refused(403, "host", "the service is not known by this name: add it by --allow-host")
        origin = headers.get("origin")
        if origin is None or scope["method"] in ("GET", "HEAD"):
            return
        caller = origin.partition("://")[2]
        # behind a proxy the service may be called by another name than the page was
        if caller != host and not (known is not None and _name(caller) in known.intersection(self._settings.hosts)):
            raise Refused(403, "origin", "a page of another site may not call this service")

    def _check_token(self, scope: Scope, headers: dict[str, str]) -> None:
        if self._token is None or scope["path"] in OPEN:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # digests, so that neither length nor content of the token shows in the time taken
        right = hmac.compare_digest(_digest(given.strip().encode("latin-1")), self._token)
        if scheme.lower() != "bearer" or not right:
            raise Refused(401, "token", "the token is missing or wrong: send the header `Authorization: Bearer TOKEN`")

    async def _read(self, headers: dict[str, str], receive: Receive, body: bytearray) -> None:
        """The body; what of it is held is added to the sum of all requests."""
        limits = self._settings.limits
        large = Refused(413, "large_body", f"the body has over {limits.body_bytes:,} bytes: send fewer rows at a time")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise Refused(400, "bad_request", "two lengths of one body: send one, as proxies may take either")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > limits.body_bytes:
            raise large
        until = time.monotonic() + limits.body_seconds
        more = True
        while more:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except asyncio.TimeoutError:
                said = f"the body did not arrive within {limits.body_seconds:g} s: send fewer rows at a time"
                raise Refused(408, "slow_body", said) from None
            if message["type"] == "http.disconnect":
                raise _Left
            part = message.get("body", b"")
            if len(body) + len(part) > limits.body_bytes:
                raise large
            if self._held + len(part) > limits.held_bytes:
                raise full("the bodies of other requests fill the memory set aside for them", 1)
            body += part
            self._held += len(part)
            more = message.get("more_body", False)


class _Exchange:
    """One request and its answer, counted and logged."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, metrics: Metrics, routes: frozenset[str]) -> None:
        self._scope, self._receive, self._send, self._metrics = scope, receive, send, metrics
        self._route = scope["path"] if scope["path"] in routes else "other"
        self._id = secrets.token_hex(8)
        self._status = 0

    async def run(self, handle: App) -> None:
        began = time.perf_counter()
        self._metrics.in_progress.inc()
        try:
            await handle(self._scope, self._receive, self._answer)
        except _Left:
            self._status = 499
        except Refused as refused:
            await self._refuse(refused)
        except Exception:
            log.exception("a request failed", extra={"fields": {"id": self._id, "route": self._route}})
            if not self._status:
                await self._refuse(Refused(500, "internal", f"the service failed: its log says why, at {self._id}"))
        except asyncio.CancelledError:  # the time to stop is over
            if not self._status:
                await self._refuse(Refused(503, "stopping", "the service is being stopped", retry_after=1))
            raise
        finally:
            self._metrics.in_progress.dec()
            self._note(time.perf_counter() - began)

    async def _answer(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            added = [*_HEADERS, (b"x-request-id", self._id.encode())]
            there = {name for name, _ in message["headers"]}
            if b"cache-control" not in there:
                added.append((b"cache-control", b"no-store"))
            message["headers"] = [*message["headers"], *added]
        await self._send(message)

    async def _refuse(self, refused: Refused) -> None:
        """The body may not have been read: the connection is closed, so that nobody waits for the rest of it."""
        self._metrics.refused.labels(refused.code).inc()
        content = json.dumps(refused.content()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(content)),
            "connection": "close",
            **refused.headers,
        }
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self._answer({"type": "http.response.start", "status": refused.status, "headers": raw})
        await self._send({"type": "http.response.body", "body": content})

    def _note(self, seconds: float) -> None:
        status = str(self._status or 499)
        self._metrics.requests.labels(self._route, status).inc()
        self._metrics.seconds.labels(self._route).observe(seconds)
        fields = {
            "id": self._id,
            "method": self._scope["method"][:16],
            "route": self._route,
            "status": int(status),
            "seconds": round(seconds, 6),
            "client": (self._scope.get("client") or ("",))[0],
        }
        # probes and scrapes come every few seconds
        level = logging.DEBUG if self._route in ("/health", "/ready", "/metrics") else logging.INFO
        log.log(level, "request", extra={"fields": fields})


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _name(host: str) -> str:
    """The name in a Host header, without the port and the brackets of IPv6."""
    name = host.partition("]")[0][1:] if host.startswith("[") else host.partition(":")[0]
    return name.lower()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body that was read, and from then on what the client does."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
