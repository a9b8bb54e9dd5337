"""The loss of a step, with what training does to a batch before it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cmaclip_fast.nn.losses import contrastive_loss, multitask_loss
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.types import IMAGE, TEXT, Batch, Output


class Objective(nn.Module):
    """A model and its loss as one module, so that a distributed wrapper sees all that has gradients."""

    def __init__(self, model: System, config: TrainingConfig, has_images: bool = True) -> None:
        """
        Args:
            has_images: whether any row has one. If not, a CMA-CLIP runs no image tower, nor the heads on it.
        """
        super().__init__()
        self.model = model
        self.config = config
        self.is_text_alone = not has_images and isinstance(model, CMACLIP)

    def forward(self, batch: Batch, contrastive: bool = False) -> tuple[Tensor, Tensor]:
        """Two scalars: the loss to minimise, and the part of it to report, the mean over tasks without auxiliary terms.

        With `contrastive` both are CLIP's loss over the complete pairs.
        """
        if contrastive:
            image, text = self.model.contrastive_features(batch)
            complete = batch.present.all(1)
            if complete.sum() < 2:
                loss = 0 * (image.sum() + text.sum())  # one pair has nothing to be told from
                return loss, loss.detach()
            loss = contrastive_loss(image[complete], text[complete], self.model.logit_scale)
            return loss, loss.detach()
        mixed, text_rows = self._mismatch(batch)
        hidden = self._hide(mixed)
        if self.is_text_alone:
            hidden = replace(hidden, images=hidden.images[:, :, :0, :0])
        output = self.model(hidden)
        loss = self._loss(output.logits, self._labels(batch, text_rows, hidden, output))
        report = loss.detach()
        for extra in self.model.extra_losses(hidden, output).values():
            loss = loss + extra
        if self.model.has_auxiliary_heads and self.config.auxiliary_weight:
            of_text = {task: label[text_rows].where(mixed.present[:, TEXT], -1) for task, label in batch.labels.items()}
            auxiliary = self._loss(self.model.auxiliary_logits(output, TEXT), of_text)
            if not self.is_text_alone:
                of_image = {task: label.where(batch.present[:, IMAGE], -1) for task, label in batch.labels.items()}
                auxiliary = auxiliary + self._loss(self.model.auxiliary_logits(output, IMAGE), of_image)
            loss = loss + self.config.auxiliary_weight * auxiliary
        return loss, report

    def _loss(self, logits: dict[str, Tensor], labels: dict[str, Tensor]) -> Tensor:
        return torch.stack(list(multitask_loss(logits, labels, self.config.label_smoothing).values())).mean()

    def _mismatch(self, batch: Batch) -> tuple[Batch, Tensor]:
        """Gives some rows the text of another row; `[B]`, whose text each row now has."""
        rows = torch.arange(len(batch), device=batch.present.device)
        if not self.config.mismatch or not self.model.weighs_modalities:
            return batch, rows
        other = torch.randperm(len(batch), device=rows.device)
        has_text = batch.present[:, TEXT]
        chosen = (torch.rand(len(batch), device=rows.device) < self.config.mismatch) & has_text & has_text[other]
        rows = torch.where(chosen, other, rows)
        return replace(batch, tokens=batch.tokens[rows], text_lengths=batch.text_lengths[rows]), rows

    def _labels(self, batch: Batch, text_rows: Tensor, hidden: Batch, output: Output) -> dict[str, Tensor]:
        """What each task learns after `_mismatch` and `_hide`: -1 where it would follow a text of another row."""
        labels = {}
        both = hidden.present.all(1)
        moved = both & (text_rows != torch.arange(len(batch), device=text_rows.device))
        for task, label in batch.labels.items():
            # a text whose picture is hidden keeps what it says
            labels[task] = label.where(hidden.present[:, IMAGE], label[text_rows])
            if output.modality_weights is not None:
                text, image = output.modality_weights[task].detach()[both].sum(0)
                labels[task] = labels[task].masked_fill(moved & (text > image), -1)
        return labels

    def _hide(self, batch: Batch) -> Batch:
        """Modality dropout: hides the text of some complete pairs and the picture of some others.

        A system of one modality keeps it.
        """
        if not all(self.model.modalities):
            return batch
        draw = torch.rand(len(batch), device=batch.present.device)
        both = batch.present.all(1)
        present = batch.present.clone()
        present[:, TEXT] &= ~(both & (draw < self.config.text_dropout))
        present[:, IMAGE] &= ~(both & (draw > 1 - self.config.image_dropout))
        return replace(batch, present=present)
