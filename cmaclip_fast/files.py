"""Writing files so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cmaclip_fast.errors import InputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cannot(what: str, path: Path, error: OSError | SafetensorError) -> InputError:
    """What the system said of a file or folder, in one line with the remedy."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
    code = getattr(error, "errno", None)
    full = code in _FULL or "No space left" in reason or "File too large" in reason  # safetensors gives text alone
    remedy = "free some space, then run the command again" if full else "choose another path, or change its permissions"
    return InputError(f"{path}: cannot be {what} ({reason}): {remedy}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes that name when the block ends without an error, and else is removed.

    Its mode follows the umask, whatever mode the library that writes it prefers.

    Raises:
        InputError: the file cannot be written.
    """
    # a name of its own, so that two commands do not share it, and short, so that every name of a file has room
    temporary = path.with_name(f".cmaclip-{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise cannot("written", path, error) from error
    finally:
        with suppress(OSError):  # what is wrong with the folder is told already
            temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether a file is one that `replacing` made, left by a process that was killed."""
    return path.name.startswith(".cmaclip-") and path.name.endswith(".tmp")


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8; half of a surrogate pair, which has no place in it, is written as its escape."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON; NaN and infinity, which JSON does not have, become null."""
    write_text(path, json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        InputError: the file cannot be written, for want of space for example.
    """
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def check_output_file(path: Path, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Before work is begun: whether the file can be written at its end.

    Args:
        overwrite: whether a regular file may be replaced; nothing else ever is.
        inputs: files that the command reads.

    Raises:
        InputError: it cannot, it is there already, or it is one of `inputs`.
    """
    status = status_of(path)
    if status is not None:
        if stat.S_ISDIR(status.st_mode):
            raise InputError(f"{path}: is a folder: name a file")
        if stat.S_ISLNK(status.st_mode):
            raise InputError(f"{path}: is a symbolic link: name the file itself")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is not a regular file: name another file")
    check_parent(path)
    if status is None:
        return
    if not overwrite:
        raise InputError(f"{path}: exists already: name another file, or pass --overwrite to replace it")
    for read in inputs:
        if read.exists() and read.samefile(path):
            raise InputError(f"{path}: is read by this command: name another file")


def check_parent(path: Path) -> None:
    """Whether something can be made in the folder of `path`.

    Raises:
        InputError: the folder is missing, or may not be written.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder: create it, or choose another path")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f"{path.parent}: may not be written: change its permissions, or choose another path")


def status_of(path: Path) -> os.stat_result | None:
    """What is under a name, links not followed; None where nothing is.

    Raises:
        InputError: the name is one that nothing can have, or may not be looked up.
    """
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{os.fspath(path)!a}: the name is not UTF-8: choose another") from None
    if path.name in ("", ".."):
        raise InputError(f"{path}: has no name of its own: choose a path that ends in a name")
    try:
        return path.lstat()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError):  # a null character
            raise InputError(f"{os.fspath(path)!a}: is not a path: choose another") from None
        raise cannot("written", path, error) from None
