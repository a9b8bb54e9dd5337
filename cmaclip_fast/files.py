"""Writing files so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cmaclip_fast.errors import InputError


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def note_settings(path: Path, now: dict[str, Any]) -> None:
    """Writes what a run is made with into its working folder; on resuming, refuses to go on with anything else.

    Raises:
        InputError: it was begun with other settings.
    """
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key, value in now.items() if before.get(key) != value]
        if changed:
            raise InputError(
                f"{path.parent}: was begun with other settings ({', '.join(changed)}): "
                "resume with the same ones, or pass --overwrite to start anew"
            )
    path.parent.mkdir(exist_ok=True)
    write_json(path, now)


def check_output_file(path: Path, overwrite: bool) -> None:
    """Before work is begun: whether the file can be written at its end.

    Raises:
        InputError: it cannot, or it is there already.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder: name a file")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder: make it, or name another file")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already: name another file, or pass --overwrite to replace it")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        InputError: the file cannot be written, for want of space say.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except SafetensorError as error:
        # safetensors wraps what the system says of a full disk
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be written ({reason}): free some space, then go on with --resume") from error
    finally:
        temporary.unlink(missing_ok=True)
