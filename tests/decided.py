"""Decisions for a model that was not trained."""

from __future__ import annotations

from pathlib import Path

import torch

from cmaclip_fast.classifier.decisions import Decisions
from cmaclip_fast.systems.base import System


def decided(system: System, rows: int = 40, per_class: bool = False) -> Decisions:
    """As training makes them, from made-up logits that are right more often than not."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = {}, {}
    for task, classes in system.tasks.items():
        labels[task] = torch.randint(len(classes), (rows,), generator=generator)
        logits[task] = torch.randn(rows, len(classes), generator=generator)
        logits[task].scatter_add_(1, labels[task][:, None], torch.full((rows, 1), 3.0))
    return Decisions.fit(system, logits, labels, per_class=per_class)


def save_decided(folder: Path, system: System) -> None:
    """Writes them into the folder of an artefact."""
    decided(system).save(folder)
