"""What a service is run with, and the limits that it holds its clients to."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from cmaclip_fast.errors import InputError
from cmaclip_fast.untrusted import UnfitFile, open_regular

LOOPBACK = ("127.0.0.1", "localhost", "::1")

MIN_TOKEN = 16
"""The fewest characters of a token: shorter ones can be guessed."""

_MAX_TOKEN_FILE = 4096


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may ask for.

    Attributes:
        rows: of one request.
        explained_rows: of one request for explanations, which are large.
        table_rows: of one uploaded table.
        body_bytes: of one request.
        held_bytes: of the bodies of all requests at a time.
        pixels: of one picture, width x height.
        text_characters: of one text.
        queue_rows: that wait for the model; more are refused with status 429.
        requests: that are in progress at a time; more are refused with status 429.
        seconds: that a request may wait for its answer, after which it is given up with status 504.
        body_seconds: within which a request has to arrive in full, its headers too.
        drain_seconds: that requests in progress have to end when the service is stopped.
    """

    rows: int = 64
    explained_rows: int = 8
    table_rows: int = 10_000
    body_bytes: int = 32 * 2**20
    held_bytes: int = 256 * 2**20
    pixels: int = 25_000_000
    text_characters: int = 10_000
    queue_rows: int = 512
    requests: int = 256
    seconds: float = 30.0
    body_seconds: float = 30.0
    drain_seconds: float = 30.0


@dataclass(frozen=True)
class Settings:
    """How a service is run.

    Attributes:
        host, port: that it listens at; port 0 is any free one.
        token: that clients have to send as `Authorization: Bearer TOKEN`; None asks for none.
        hosts: names, beside its own, that clients may call it by; one `*` allows any.
        batch_rows: that the model runs at a time, at most.
        examples: rows of the training data that the page offers.
        min_precision: of the answers that are accepted; None is what the model was trained for.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ()
    batch_rows: int = 32
    examples: int = 6
    min_precision: float | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def known_hosts(self) -> frozenset[str] | None:
        """The names that a request may call the service by; None where any will do.

        On loopback a name of somebody else's in a request means that a page of theirs, in a browser on this machine,
        resolves to it: DNS rebinding. Elsewhere the names are not known unless they are given.
        """
        if "*" in self.hosts or not (self.is_loopback or self.hosts):
            return None
        return frozenset(name.lower() for name in (*LOOPBACK, self.host, *self.hosts))


def read_token(path: Path) -> str:
    """The token in a file, blanks around it left out.

    Raises:
        InputError: the file cannot be read, or holds no token.
    """
    try:
        with open_regular(path, _MAX_TOKEN_FILE) as file:
            content = file.read(_MAX_TOKEN_FILE)
    except UnfitFile as error:
        raise InputError(f"{path}: {error}: name a text file that holds the token alone") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): name a file that holds the token") from None
    try:
        token = content.decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if len(token) < MIN_TOKEN or not token.isprintable() or " " in token:
        raise InputError(
            f"{path}: holds no token of {MIN_TOKEN} or more letters, digits and marks: write one into it, such as that "
            "of `openssl rand -hex 32`"
        )
    return token


def is_private(path: Path) -> bool:
    """Whether only its owner can read a file; True where the system has no such modes."""
    return os.name != "posix" or not path.stat().st_mode & 0o077
