"""Our own model: in inference laid out once, in training as it is."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from cmaclip_fast.bench.peers.system import Setting, System
from cmaclip_fast.classifier.classifier import Classifier
from cmaclip_fast.nn.losses import multitask_loss
from cmaclip_fast.types import Batch, Output


class Ours(System):
    title = "cmaclip_fast"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.module = setting.model
        precision = str(setting.dtype).removeprefix("torch.")
        self._run = setting.model if setting.training else Classifier(setting.model, precision=precision).engine

    def _output(self, batch: Batch) -> Output:
        return cast(Output, self._run(batch))

    def logits(self, batch: Batch) -> list[Tensor]:
        return list(self._output(batch).logits.values())

    def loss(self, batch: Batch) -> Tensor:
        losses = multitask_loss(self._output(batch).logits, batch.labels)
        total = losses.pop(next(iter(losses)))
        for loss in losses.values():
            total = total + loss
        return total
