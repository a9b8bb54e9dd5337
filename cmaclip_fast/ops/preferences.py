"""The order in which `auto` tries the backends on a GPU: measured where a run is kept, else a cautious one.

`measured.json` holds for each GPU architecture where and when it was measured, and rows of operator, direction, dtype,
shape class (`[head size, longest row, queries a row]`, or nothing) and backends, fastest first.
`python -m benchmarks.gpu_report OUT --prefer` writes it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("measured.json")
UNMEASURED = ("torch", "triton", "cuda")
"""What other people's GPUs have run comes first."""
LENGTHS = (16, 64, 256, 1024)
"""Upper ends of the classes of row lengths; the last class has no end."""
_TWIN = {"float16": "bfloat16", "bfloat16": "float16"}

Shape = tuple[int, ...]


def shape_class(head_size: int, longest_q: int, longest_k: int) -> Shape:
    """The class of one call of `packed_attention`: head size, longest row, queries a row."""
    return head_size, _bound(longest_k), _bound(longest_q)


@functools.cache
def architecture(device: torch.device) -> str:
    """`sm_90`, or "" for a device that is no GPU."""
    if device.type != "cuda":
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def order(operator: str, direction: str, dtype: torch.dtype, architecture: str, shape: Shape) -> tuple[str, ...]:
    """Backends on a GPU, the one to take first; a 16-bit dtype without measurements takes those of the other."""
    name = str(dtype).removeprefix("torch.")
    measured = orders(architecture)
    found = next(
        (measured[key] for kind in (name, _TWIN.get(name)) if (key := (operator, direction, kind, shape)) in measured),
        (),
    )
    return (*found, *(backend for backend in UNMEASURED if backend not in found), "reference")


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """`measured.json`."""
    found: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return found


@functools.cache
def orders(architecture: str) -> dict[tuple[str, str, str | None, Shape], tuple[str, ...]]:
    """The measured orders of one architecture, by operator, direction, dtype and shape class."""
    rows = table().get(architecture, {}).get("rows", [])
    return {
        (row["operator"], row["direction"], row["dtype"], tuple(row["shape"])): tuple(row["backends"]) for row in rows
    }


def explanation(architecture: str) -> str:
    """One line: how `auto` chooses on a GPU of this architecture."""
    cautious = f"{UNMEASURED[0]} where it covers the call, then {', then '.join(UNMEASURED[1:])}"
    if not orders(architecture):
        return f"{cautious}: nothing has been measured on {architecture or 'a GPU'}"
    about = table()[architecture]["measured"]
    return f"the fastest for {len(orders(architecture))} kinds of calls measured on {about}; for others {cautious}"


def _bound(length: int) -> int:
    return next(bound for bound in LENGTHS if length <= bound or bound == LENGTHS[-1])
