"""Reading files that a stranger may have written: regular files of bounded size, and JSON without surprises."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import ValidationError

from cmaclip_fast.errors import InputError

MAX_JSON_VALUES = 4_000_000
"""Values are counted by their commas: each takes some 60 bytes of memory, however few of the file."""


class UnfitFile(OSError):
    """A file that is not to be read; the message says what it is instead."""


def open_regular(path: str | Path, max_bytes: int, follow_links: bool = True) -> BinaryIO:
    """Opens a regular file for reading; never waits, as the opening of a pipe would.

    Raises:
        UnfitFile: it is a folder, pipe, device or socket, a link where these are not followed, or over `max_bytes`.
        OSError: it is missing or may not be read.
    """
    _check(os.stat(path, follow_symlinks=follow_links), max_bytes)  # opening a device may do something already
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    file = os.fdopen(os.open(path, flags | (0 if follow_links else getattr(os, "O_NOFOLLOW", 0))), "rb")
    try:
        _check(os.fstat(file.fileno()), max_bytes)  # another file may have taken its place
    except UnfitFile:
        file.close()
        raise
    return file


def _check(status: os.stat_result, max_bytes: int) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise UnfitFile("is a symbolic link")
    if not stat.S_ISREG(status.st_mode):
        raise UnfitFile("is not a regular file")
    if status.st_size > max_bytes:
        raise UnfitFile(f"has {status.st_size:,} bytes, over the limit of {max_bytes:,}")


def read_json(
    path: Path, max_bytes: int, remedy: str = "restore it, or train again", follow_links: bool = False
) -> dict[str, Any]:
    """The JSON object in a file, by default one of an artefact: UTF-8, no key twice, no NaN.

    Raises:
        InputError: the file is missing, may not be read, is a link or no regular file, is too large, or holds no such
            object.
    """
    try:
        with open_regular(path, max_bytes, follow_links=follow_links) as file:
            content = file.read(max_bytes + 1)
    except UnfitFile as error:
        raise InputError(f"{path}: {error}: put the file itself there") from None
    except FileNotFoundError:
        raise InputError(f"{path}: missing: {remedy}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): change its permissions or restore it") from None
    try:
        if content.count(b",") > MAX_JSON_VALUES:
            raise ValueError(f"more than {MAX_JSON_VALUES:,} values")
        found = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
        if b"\\u" in content:
            json.dumps(found, ensure_ascii=False).encode()  # raises at half of a surrogate pair
    except RecursionError:
        raise InputError(f"{path}: is nested too deep: {remedy}") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error}): {remedy}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds a {type(found).__name__}, not an object: {remedy}")
    return found


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def first_problem(error: ValidationError) -> str:
    """The first of what pydantic found wrong, as `field 'model.depth': Input should be ...`."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part)[:80] for part in problem["loc"])
    said = " ".join(problem["msg"].split())[:200]
    return f"field '{place}': {said}" if place else said
