"""The unfinished work of a run that can be resumed: a folder, held by one process, that becomes the output at the end.

A run towards NAME keeps its work in the folder `NAME.partial` and holds the lock `NAME.lock`. What becomes the output
is a file in that folder, or the folder itself. In a moment of its choice a kill can leave behind:

- `NAME.partial`, whose `run.json` says what run it is: the run can be resumed;
- `NAME` with a `run.json` in it: the folder took the name, and what it replaced is still to be removed;
- `NAME.replaced` without `NAME`, only where the system cannot swap two folders in one step: it is put back.

The next run towards NAME, whichever it is, cleans up first.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cmaclip_fast.errors import InputError
from cmaclip_fast.files import cannot, check_parent, is_temporary, status_of, write_json
from cmaclip_fast.signals import Interrupted

RUN = "run.json"


def partial_directory(target: Path) -> Path:
    """Where a run towards `target` keeps its unfinished work."""
    return target.with_name(target.name + ".partial")


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Holds a lock file, which is removed at the end; the lock itself ends with the process, however that ends.

    Args:
        busy: what the error says where another process holds it.

    Raises:
        InputError: another process holds it, it cannot be made, or the name is that of a file of another kind.
    """
    status = status_of(path)
    if status is not None and (not stat.S_ISREG(status.st_mode) or status.st_size):
        raise InputError(f"{path}: is in the place of our lock file: move it away, or name another --output")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.2, poll_interval=0.05)  # the time that a process takes to remove it at its end
    except Timeout:
        raise InputError(busy) from None
    except OSError as error:
        raise cannot("written", path, error) from None
    try:
        yield
    finally:
        # removed while held: who opened it before sees that it has no name any more, and makes another
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


class WorkingFolder:
    """The folder `NAME.partial` of a run towards NAME.

    Attributes:
        path: the folder.
        output: NAME.
    """

    def __init__(self, output: Path, command: str, names: str, kept: str, result: str | None = None) -> None:
        """
        Args:
            command: what makes `output`.
            names: a pattern of the names of all files that this command writes into the folder.
            kept: of those, what is worth resuming from.
            result: the file in the folder that becomes `output`; None where the folder itself does.
        """
        self.output = output
        self.path = partial_directory(output)
        self._replaced = output.with_name(output.name + ".replaced")
        self._command = command
        self._names = re.compile(names)
        self._kept = re.compile(kept)
        self._result = result
        self._note: dict[str, Any] = {"command": command}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds the output for this process, and cleans up what a process that was killed has left.

        Raises:
            InputError: another process holds it, or the folder of the output is missing or may not be written.
        """
        if self.output.name in ("", ".."):
            raise InputError(f"{self.output}: has no name of its own: choose a path that ends in a name")
        for suffix in (".replaced", ".partial", ".lock"):
            status_of(self.output.with_name(self.output.name + suffix))  # whether the name leaves room for these
        check_parent(self.output)
        lock = self.output.with_name(self.output.name + ".lock")
        with locked(lock, f"{self.output}: another run writes it: wait for it to end, or name another --output"):
            self._clean_up()
            yield

    @contextmanager
    def opened(self, resume: bool, overwrite: bool) -> Iterator[None]:
        """Makes the folder anew, or leaves it as it is with `resume`; only while `held`.

        After an error it stays only if there is something in it to resume from, or if the run was interrupted.

        Raises:
            InputError: it is not a folder of ours; there is nothing to resume; or an unfinished run is there, and
                neither `resume` nor `overwrite` was asked for.
        """
        self._begin(resume, overwrite)
        try:
            yield
        except BaseException as error:
            interrupted = isinstance(error, KeyboardInterrupt | Interrupted) and "settings" in self._note
            if self.path.is_dir() and not self.is_worth_keeping() and not interrupted:
                with contextlib.suppress(InputError):
                    self._remove(self.path)
            raise

    def is_worth_keeping(self) -> bool:
        """Whether there is work in the folder that a resumed run does not do again."""
        return self.finished is not None or any(self._kept.fullmatch(path.name) for path in self.path.iterdir())

    @property
    def finished(self) -> Any:
        """What `finish` was given, where all work is done and the run ended before the output took its name."""
        return self._note.get("finished")

    def same_run(self, settings: dict[str, Any]) -> None:
        """Notes what a run is made with; on resuming, refuses anything else.

        Raises:
            InputError: it was begun with other settings.
        """
        now = json.loads(json.dumps(settings))
        before = self._note.get("settings")
        if before is not None:
            absent = object()
            changed = [key for key in {**now, **before} if now.get(key, absent) != before.get(key, absent)]
            if changed:
                raise InputError(
                    f"{self.path}: was begun with other settings ({', '.join(changed)}): "
                    "resume with the same ones, or pass --overwrite to start again"
                )
        self._write_note(settings=now)

    def finish(self, result: Any) -> None:
        """Gives the output its name, in one step, and removes what is left. Goes on where an earlier call was killed.

        Args:
            result: what `finished` gives where this is killed.
        """
        self._write_note(finished=result)
        for path in self.path.iterdir():
            if is_temporary(path) or (self._result is None and self._kept.fullmatch(path.name)):
                path.unlink()
        try:
            if self._result is not None:
                os.replace(self.path / self._result, self.output)
            elif self.output.exists():
                self._swap()
            else:
                os.rename(self.path, self.output)
        except OSError as error:
            raise cannot("written", self.output, error) from error
        self._clean_up()

    def _swap(self) -> None:
        try:
            exchange(self.path, self.output)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
            # not on this system, or not on this file system
            os.rename(self.output, self._replaced)
            os.rename(self.path, self.output)

    def _begin(self, resume: bool, overwrite: bool) -> None:
        if self._result is None and overwrite and os.path.lexists(self._replaced):
            raise InputError(f"{self._replaced}: is in the way: move it, or name another --output")
        there = status_of(self.path) is not None
        ours = there and self._check_ours()
        if resume:
            if not ours:
                raise InputError(f"{self.path}: no unfinished run to resume: leave out --resume")
            self._note = self._read_note(self.path)
        elif there:
            with contextlib.suppress(InputError):  # a damaged note is no reason to keep what is to be dropped
                self._note = self._read_note(self.path)
            if self.is_worth_keeping() and not overwrite:
                raise InputError(
                    f"{self.path}: an unfinished run is there: resume it with --resume, or pass --overwrite to drop it"
                )
            self._remove(self.path)
            self._note = {"command": self._command}
        try:
            if not resume:
                self.path.mkdir()
                self._write_note()
            for path in self.path.iterdir():
                if is_temporary(path):
                    path.unlink()
        except OSError as error:
            raise cannot("written", self.path, error) from error

    def _check_ours(self) -> bool:
        """Whether the folder is of an unfinished run; False where it is empty.

        Raises:
            InputError: it holds something else, so that it must not be removed.
        """
        remedy = "move it away, or name another --output"
        if self.path.is_symlink() or not self.path.is_dir():
            raise InputError(f"{self.path}: is not a folder of ours: {remedy}")
        foreign = self._foreign(self.path)
        if foreign is not None:
            raise InputError(f"{self.path}: holds '{foreign.name}', which is not of an unfinished run: {remedy}")
        noted = (self.path / RUN).exists()
        if not noted and not all(map(is_temporary, self.path.iterdir())):
            raise InputError(f"{self.path}: is not an unfinished run of ours: {remedy}")
        return noted

    def _foreign(self, folder: Path) -> Path | None:
        """The first entry of a folder that the command does not write, or None."""
        for path in sorted(folder.iterdir()):
            ours = is_temporary(path) or path.name == RUN or self._names.fullmatch(path.name)
            if not ours or path.is_symlink() or not path.is_file():
                return path
        return None

    def _read_note(self, folder: Path) -> dict[str, Any]:
        path = folder / RUN
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
            if note.pop("checksum") != _checksum(note):
                raise ValueError("is not what was written")
        except OSError as error:
            raise cannot("read", path, error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path}: is damaged: pass --overwrite in place of --resume to start again") from None
        if note["command"] != self._command:
            raise InputError(f"{folder}: is an unfinished run of `{note['command'][:40]}`: name another --output")
        return dict(note)

    def _write_note(self, **changed: Any) -> None:
        self._note |= changed
        write_json(self.path / RUN, {**self._note, "checksum": _checksum(self._note)})

    def _clean_up(self) -> None:
        """Ends what a finished run, or one that was killed while it finished, has left to do."""
        if self._result is None:
            if not os.path.lexists(self.output) and self._is_ours(self._replaced) and self._is_finished(self.path):
                os.rename(self._replaced, self.output)
            if self._is_finished(self.output):
                for left in (self.path, self._replaced):
                    if self._is_ours(left) and not (left / RUN).exists():
                        self._remove(left)
                (self.output / RUN).unlink()
        elif self._is_finished(self.path) and not (self.path / self._result).exists():
            self._remove(self.path)

    def _is_ours(self, folder: Path) -> bool:
        """Whether a folder has nothing in it but what the command writes."""
        return not folder.is_symlink() and folder.is_dir() and self._foreign(folder) is None

    def _is_finished(self, folder: Path) -> bool:
        """Whether a folder of ours says that its run was finished."""
        if not self._is_ours(folder) or not (folder / RUN).exists():
            return False
        try:
            return "finished" in self._read_note(folder)
        except InputError:
            return False

    def _remove(self, folder: Path) -> None:
        """Removes a folder of ours; the note goes last, so that one that is half removed is still known for ours."""
        try:
            for path in sorted(folder.iterdir(), key=lambda path: path.name == RUN):
                path.unlink()
            folder.rmdir()
        except OSError as error:
            raise cannot("removed", folder, error) from error


def _checksum(note: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(note, sort_keys=True).encode())


def exchange(one: Path, other: Path) -> None:
    """Swaps two names of one file system in a single step.

    Raises:
        OSError: they could not be swapped; ENOSYS, EINVAL or ENOTSUP where that cannot be done here at all.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    at_cwd, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), swap):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))
