"""Keeps a service under mixed load, some of it hostile, and says what went wrong.

    python -m benchmarks.soak runs/openclipart-0 --seconds 600

Clients send rows to all endpoints and compare every answer with those of the first round. One request in twenty is
hostile: a broken or huge picture, a wrong type, a large, cut off or slow body, a path, a header that is none. Nothing
may be lost: an honest request is answered, or refused with status 429, after which it is sent again.
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from benchmarks.serving import BOUNDARY, as_form, read_pairs, service

FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
JSON = {"Content-Type": "application/json"}
PATHS = ("/predict", "/embed", "/explain")
HEAD = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
MOST_WRONG = 1e-4


def main(
    folder: Annotated[Path, typer.Argument(help="The model.")],
    seconds: Annotated[float, typer.Option(help="How long.")] = 600.0,
    clients: Annotated[int, typer.Option(help="At a time.")] = 16,
    hostile: Annotated[float, typer.Option(min=0, max=1, help="Share of hostile requests.")] = 0.05,
    growth: Annotated[
        float, typer.Option(help="Growth of memory, after a tenth of the time, that is no failure.")
    ] = 0.02,
) -> None:
    """Keep a service under mixed load; exits with 1 if an answer was wrong or lost, or if memory grew."""
    bodies = [as_form(pair) for pair in read_pairs(folder, 64)]
    with service(folder) as port:
        (process,) = [one for one in psutil.Process().children() if "serve" in one.cmdline()]
        wanted = [[ask(port, path, body) for body in bodies] for path in PATHS]
        seen: list[Counter[str]] = [Counter() for _ in range(clients)]
        end = time.monotonic() + seconds
        threads = [
            threading.Thread(target=work, args=(port, bodies, wanted, counts, hostile, end, seed))
            for seed, counts in enumerate(seen)
        ]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 10)
        early = process.memory_info().rss
        for thread in threads:
            thread.join()
        late = process.memory_info().rss
    counts = sum(seen, Counter())
    grown = late / early - 1
    names = ("answered", "wrong", "lost", "hostile", "hostile accepted")
    print(", ".join(f"{name} {counts[name]}" for name in names), end="; ")
    print(f"memory {early / 2**20:.0f} to {late / 2**20:.0f} MiB ({grown:+.1%})")
    if counts["wrong"] or counts["lost"] or counts["hostile accepted"] or grown > growth:
        sys.exit(1)


def ask(port: int, path: str, body: bytes, headers: dict[str, str] = FORM) -> Any:
    """The answer to a request, sent again while the service is busy; None where it is lost."""
    for _ in range(100):
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            line.request("POST", path, body, headers)
            answer = line.getresponse()
            content = answer.read()
        finally:
            line.close()
        if answer.status == 200:
            return json.loads(content)
        if answer.status != 429:
            return None
        time.sleep(0.1)
    return None


def work(
    port: int, bodies: list[bytes], wanted: list[list[Any]], counts: Counter[str], share: float, end: float, seed: int
) -> None:
    chance = random.Random(seed)
    attacks = itertools.cycle(ATTACKS)
    while time.monotonic() < end:
        if chance.random() < share:
            said = next(attacks)(port, chance)
            counts["hostile"] += 1
            counts["hostile accepted"] += said.startswith(b"HTTP/1.1 200")
            continue
        path, row = chance.randrange(len(PATHS)), chance.randrange(len(bodies))
        try:
            found = ask(port, PATHS[path], bodies[row])
        except (OSError, http.client.HTTPException):
            found = None
        counts["answered"] += found is not None
        counts["lost"] += found is None
        counts["wrong"] += found is not None and not near(found, wanted[path][row])


def near(found: Any, wanted: Any) -> bool:
    """Whether two answers are the same up to rounding, which differs with the size of a batch."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(near(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(near, found, wanted))
    return abs(found - wanted) < MOST_WRONG if isinstance(wanted, float) else bool(found == wanted)


def talk(port: int, content: bytes, seconds: float = 2.0) -> bytes:
    """The beginning of what the service says to these bytes."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=seconds) as line:
        line.sendall(content)
        return line.recv(4096)
    return b""


def broken_picture(port: int, chance: random.Random) -> bytes:
    form = as_form((b"\x89PNG\r\n\x1a\n" + chance.randbytes(200), "a"))
    return talk(port, posted(form, FORM))


def bomb(port: int, chance: random.Random) -> bytes:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0" + bytes(4)
    return talk(port, posted(as_form((header, None)), FORM))


def wrong_type(port: int, chance: random.Random) -> bytes:
    return talk(port, posted(b'{"rows": [{"text": 3, "url": "http://127.0.0.1/"}]}', JSON))


def large_body(port: int, chance: random.Random) -> bytes:
    return talk(port, f"{HEAD}Content-Length: {2**33}\r\n\r\n".encode() + bytes(100_000))


def cut_off(port: int, chance: random.Random) -> bytes:
    form = as_form((chance.randbytes(100), "a"))
    return talk(port, posted(form[: len(form) // 2], FORM))


def slow(port: int, chance: random.Random) -> bytes:
    return talk(port, f"{HEAD}Content-Length: 1000\r\n\r\n{{".encode(), 1.0)


def path(port: int, chance: random.Random) -> bytes:
    return talk(port, b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n")


def header(port: int, chance: random.Random) -> bytes:
    return talk(port, b"POST /predict HTTP/1.1\r\nHost: localhost\r\nX: " + chance.randbytes(200) + b"\r\n\r\n")


def posted(body: bytes, headers: dict[str, str]) -> bytes:
    said = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /predict HTTP/1.1\r\nHost: localhost\r\n{said}Content-Length: {len(body)}\r\n\r\n".encode() + body


ATTACKS = (broken_picture, bomb, wrong_type, large_body, cut_off, slow, path, header)


if __name__ == "__main__":
    typer.run(main)
