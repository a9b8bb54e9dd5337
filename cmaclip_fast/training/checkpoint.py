"""What an interrupted training resumes from: one safetensors file, written after each epoch."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cmaclip_fast.errors import InputError
from cmaclip_fast.files import write_tensors


@dataclass
class Progression:
    """Where a run stands; what a checkpoint holds beside tensors."""

    epoch: int = 0
    step: int = 0
    best_score: float = -math.inf
    best_epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def save_checkpoint(
    path: Path,
    model: nn.Module,
    average: nn.Module | None,
    optimizer: Any,
    best: dict[str, Tensor],
    progression: Progression,
) -> None:
    """Writes all of a run's state as one safetensors file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    averaged = {} if average is None else average.state_dict()
    for part, state in (("model", model.state_dict()), ("average", averaged), ("best", best)):
        tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in entry.items()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    said = json.dumps(asdict(progression))
    write_tensors(path, tensors, {"progression": said, "checksum": _checksum(said, tensors)})


def load_checkpoint(
    path: Path, model: nn.Module, average: nn.Module | None, optimizer: Any, best: dict[str, Tensor]
) -> Progression:
    """Puts back what `save_checkpoint` wrote.

    Raises:
        InputError: the file is damaged or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata()["progression"]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            if file.metadata()["checksum"] != _checksum(said, tensors):
                raise ValueError("its checksum is wrong")
        progression = Progression(**json.loads(said))
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            parts.setdefault(part, {})[name] = tensor
        model.load_state_dict(parts["model"])
        if average is not None:
            average.load_state_dict(parts["average"])
        best.update(parts["best"])
        state = optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in parts.get("optimizer", {}).items():
            index, name = key.split(".", 1)
            entries.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
    except Exception as error:
        # safetensors, JSON and torch each raise their own kind for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be resumed from ({reason}): pass --overwrite in place of --resume to start again"
        ) from error
    return progression


def _checksum(said: str, tensors: dict[str, Tensor]) -> str:
    """Of all that a checkpoint holds: safetensors itself sees only that a file is truncated."""
    found = zlib.crc32(said.encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
