"""Batches of training, and how many processes load them."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches

from cmaclip_fast import signals
from cmaclip_fast.data.examples import Examples, make_loader
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.log import log
from cmaclip_fast.types import Batch

MEASURED = 8
"""Batches that are loaded in the main process, and timed, before `workers="auto"` is decided."""

WORTH_WAITING = 0.05
"""Share of a step's time that loading a batch may take without a process of its own."""


class Loading:
    """The batches of each epoch, the same ones whatever the number of loader processes.

    Attributes:
        workers: the number of loader processes; None until it has been chosen.
        waited: seconds of the current epoch in which no batch was ready.
    """

    def __init__(
        self,
        examples: Examples,
        config: TrainingConfig,
        accelerator: Accelerator,
        row_weights: np.ndarray | None = None,
    ) -> None:
        self._examples = examples
        self._row_weights = row_weights
        self._config = config
        self._accelerator = accelerator
        self.workers = None if config.workers == "auto" else config.workers
        self.waited = 0.0
        self._loader: Any = self._make(self.workers or 0)

    def __len__(self) -> int:
        """Batches of an epoch, on each device."""
        return len(self._loader)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, on the device."""
        self.waited = 0.0
        self._loader.set_epoch(epoch)
        if self.workers is None and len(self) > MEASURED:
            yield from self._measured()
            if self.workers:
                self._loader = self._make(self.workers)
                self._loader.set_epoch(epoch)
            yield from self._timed(skip_first_batches(self._loader, MEASURED))
        else:
            yield from self._timed(self._loader)

    def _make(self, workers: int) -> Any:
        config = self._config
        loader = make_loader(
            self._examples,
            config.batch_size,
            shuffle=True,
            seed=config.seed,
            workers=workers,
            drop_last=True,
            pin_memory=self._accelerator.device.type == "cuda",
            row_weights=self._row_weights,
        )
        return self._accelerator.prepare_data_loader(loader)

    def _measured(self) -> Iterator[Batch]:
        """The first batches, timed; then the number of processes is chosen."""
        loader: Any = self._loader
        loading: list[float] = []
        steps: list[float] = []
        asked = time.perf_counter()
        for batch in _until_stopped(itertools.islice(loader, MEASURED)):
            given = time.perf_counter()
            loading.append(given - asked)
            yield batch
            if self._accelerator.device.type == "cuda":
                torch.cuda.synchronize(self._accelerator.device)
            asked = time.perf_counter()
            steps.append(asked - given)
        loader.end()  # accelerate keeps a list of the loaders that are in use
        self.waited += sum(loading)
        half = MEASURED // 2  # what comes first also starts caches and kernels
        load, step = sum(loading[half:]) / half, sum(steps[half:]) / half
        self.workers = choose_workers(load, step, _cores())
        log.info("loader processes: %d (loading a batch %.0f ms, a step %.0f ms)", self.workers, 1e3 * load, 1e3 * step)

    def _timed(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        asked = time.perf_counter()
        for batch in _until_stopped(loader):
            self.waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()


def choose_workers(load: float, step: float, cores: int) -> int:
    """The number of loader processes that keeps up with training.

    Args:
        load: seconds to load a batch in one process.
        step: seconds of a training step.
        cores: that the process may use; one is left for training.
    """
    if load <= WORTH_WAITING * step:
        return 0
    return min(max(1, math.ceil(1.25 * load / max(step, 1e-9))), max(0, cores - 1))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _until_stopped(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader; a signal that has ended its processes too ends the run as it would have without them."""
    try:
        yield from loader
    except RuntimeError:
        signals.check()
        raise
