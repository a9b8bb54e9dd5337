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
