"""Our own model: in inference laid out once, in training as it is."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from cmaclip_fast.bench.peers.system import Setting, System
from cmaclip_fast.classifier.classifier import Classifier
from cmaclip_fast.nn.losses import task_offsets
from cmaclip_fast.ops import multitask_cross_entropy
from cmaclip_fast.types import Batch, Output


class Ours(System):
    title = "cmaclip_fast"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.module = setting.model
        self._offsets = task_offsets(map(len, setting.model.tasks.values())).to(setting.device)
        precision = str(setting.dtype).removeprefix("torch.")
        self._run = setting.model if setting.training else Classifier(setting.model, precision=precision).engine

    def _output(self, batch: Batch) -> Output:
        return cast(Output, self._run(batch))

    def logits(self, batch: Batch) -> list[Tensor]:
        return list(self._output(batch).logits.values())

    def loss(self, batch: Batch) -> Tensor:
        logits = cast(Tensor, self._output(batch).packed)
        labels = torch.stack(list(batch.labels.values()), dim=1)
        return multitask_cross_entropy(logits, labels, self._offsets).sum()
