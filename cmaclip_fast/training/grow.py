"""Training that starts from an artefact: more rows, new classes, new tasks, or fewer tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cmaclip_fast.classifier.artifact import WEIGHTS, ArtifactConfig, load_config, load_model
from cmaclip_fast.data.fingerprint import file_digest
from cmaclip_fast.nn.heads import TaskLinear
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.build import build_system

Tasks = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Start:
    """The artefact that a training starts from.

    Attributes:
        directory: its folder.
        config: its configuration.
        system: its model.
        digest: of its weights.
    """

    directory: Path
    config: ArtifactConfig
    system: System
    digest: str

    @classmethod
    def read(cls, directory: Path) -> Start:
        """
        Raises:
            InputError: the folder is missing, incomplete or damaged.
        """
        config = load_config(directory)
        return cls(directory, config, load_model(directory), file_digest(directory / WEIGHTS))


@torch.no_grad()
def grow(old: System, tasks: Tasks) -> System:
    """A system with other tasks or classes that starts with the weights of `old`: towers, fusion, and what belongs to
    the tasks and classes that both have. New classes and tasks start at random.

    Args:
        tasks: for each task its classes, first those of `old` in their order.
    """
    new = build_system(type(old), old.config, tasks, tokenizer=old.tokenizer)
    new.preprocessing = old.preprocessing
    moved = [(place, list(tasks).index(task)) for place, task in enumerate(old.tasks) if task in tasks]
    state, before = new.state_dict(), old.state_dict()
    heads = {name: module for name, module in old.named_modules() if isinstance(module, TaskLinear)}
    for name, module in heads.items():
        other = new.get_submodule(name)
        assert isinstance(other, TaskLinear)
        for source, target in moved:
            rows = module.rows[source]
            start = other.rows[target].start
            for part in ("weight", "bias"):
                values = before[f"{name}.{part}"][rows]
                state[f"{name}.{part}"][start : start + len(values)] = values
    done = {f"{name}.{part}" for name in heads for part in ("weight", "bias")}
    for name, values in before.items():
        if name in old.per_task:
            for source, target in moved:
                state[name][target] = values[source]
        elif name not in done:
            state[name].copy_(values)
    return new


def described(old: Tasks, new: Tasks) -> list[str]:
    """What is carried over and what starts at random, one line for each task."""
    lines = []
    for task, names in new.items():
        added = [name for name in names if name not in set(old.get(task, ()))]
        if task not in old:
            lines.append(f"{task}: new task with {len(names)} classes, starts at random")
        elif added:
            shown = ", ".join(added[:5]) + (", ..." if len(added) > 5 else "")
            lines.append(f"{task}: {len(old[task])} classes carried over, {len(added)} new: {shown}")
        else:
            lines.append(f"{task}: {len(names)} classes carried over")
    return lines + [f"{task}: removed" for task in old if task not in new]
