"""What every system of the benchmark is: built from our model's weights, a batch in, each task's logits out."""

from __future__ import annotations

import copy
import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """What all systems of one table have in common.

    Attributes:
        model: ours, on the device, in eval mode or in training mode; the others take its weights.
        batch: pairs at a time.
        threads: of the CPU.
        folder: for exported files, which may be there already.
    """

    model: CMACLIP
    batch: int
    training: bool
    threads: int
    device: str
    dtype: torch.dtype
    folder: Path


class System(ABC):
    """One way to compute CMA-CLIP.

    Attributes:
        title: its name in tables.
        packages: what it needs beyond ours, as they are imported.
        trains: whether it can train.
        devices: what it runs on here.
        module: what trains, for the optimizer; None where nothing can.
        prepared: what was done before the first batch, such as an export, and the seconds it took.
    """

    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    trains: ClassVar[bool] = True
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.module: nn.Module | None = None
        self.prepared: dict[str, float] = {}

    @classmethod
    def why_not(cls, device: str, training: bool) -> str | None:
        """None where it can run, else the reason."""
        missing = [name for name in cls.packages if importlib.util.find_spec(name) is None]
        if missing:
            return f"not run: {', '.join(missing)} is missing: pip install 'cmaclip_fast[bench]'"
        if device.split(":")[0] not in cls.devices:
            return "not run: its package from the extra `bench` runs on a CPU alone"
        return "not run: it does not train" if training and not cls.trains else None

    @abstractmethod
    def logits(self, batch: Batch) -> list[Tensor]:
        """For each task `[B, C_task]`, in the order of the model's tasks."""

    def loss(self, batch: Batch) -> Tensor:
        """The sum of the tasks' mean cross-entropies; every row is labelled."""
        logits = self.logits(batch)
        return torch.stack(
            [F.cross_entropy(one, labels) for one, labels in zip(logits, batch.labels.values(), strict=True)]
        ).sum()

    def warm(self, batch: Batch) -> None:
        """What it does only at its first batch of a kind; called before each table, counted in `prepared`."""
        return

    def close(self) -> None:
        """Gives back what it holds outside of PyTorch."""
        return


def twin(module: Module) -> Module:
    """A copy of the module whose parameters and buffers are the module's own, not copies."""
    kept = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, kept)  # type: ignore[arg-type]
