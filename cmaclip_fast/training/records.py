"""The records of finished runs in the folder of a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmaclip_fast.errors import InputError

RECORDS = "records"


def read_record(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished run, or None.

    Raises:
        InputError: it is damaged, or was made with other settings.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        before = record.pop("settings")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError):
        raise InputError(f"{path}: damaged: remove it, and its run is repeated") from None
    now = json.loads(json.dumps(settings))
    changed = [key for key in now if before.get(key) != now[key]]
    if changed:
        raise InputError(f"{path}: was made with other settings ({', '.join(changed)}): name another --output")
    return dict(record)


def is_ours(numbers: Path) -> bool:
    """Whether a file holds the numbers of a comparison, whose records may have been left out of a copy."""
    try:
        return {"command", "data", "records"} <= json.loads(numbers.read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
