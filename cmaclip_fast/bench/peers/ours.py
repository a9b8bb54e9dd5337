"""Our own model: in inference laid out once, in training as it is."""

from __future__ import annotations

import importlib
from typing import cast

from torch import Tensor, nn

from cmaclip_fast.bench.peers.system import Setting, System
from cmaclip_fast.losses import multitask_loss
from cmaclip_fast.model import CMACLIP
from cmaclip_fast.types import Batch, Output


class Ours(System):
    title = "cmaclip_fast"
    padding = "none"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.module = setting.model
        self._run = setting.model if setting.training else inference_model(setting.model)

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


def inference_model(model: CMACLIP) -> nn.Module:
    """`InferenceModel(model)`, or the model itself in a version that has none."""
    try:
        inference = importlib.import_module("cmaclip_fast.inference")
    except ModuleNotFoundError:
        return model
    return cast(nn.Module, inference.InferenceModel(model))
