"""The loss of a step, with what training does to a batch before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from cmaclip_fast.nn.losses import contrastive_loss, task_offsets
from cmaclip_fast.ops import multitask_cross_entropy
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.imbalance import class_weights, log_priors
from cmaclip_fast.types import IMAGE, TEXT, Batch, Output

_MOST_HEADS = 3
"""What may classify in a step: the model's heads, and the auxiliary heads of its two towers."""


class Objective(nn.Module):
    """A model and its loss as one module, so that a distributed wrapper sees all that has gradients.

    Attributes:
        offsets: where each task's logits begin and end, for the model's heads, then for its auxiliary heads.
    """

    offsets: Tensor
    class_weight: Tensor | None
    adjustment: Tensor | None

    def __init__(
        self,
        model: System,
        config: TrainingConfig,
        has_images: bool = True,
        counts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """
        Args:
            has_images: whether any row has one. If not, a CMA-CLIP runs no image tower, nor the heads on it.
            counts: for each task `[C_task]`, the training rows of each class; needed for class weights that follow from
                them and for logit adjustment.
        """
        super().__init__()
        self.model = model
        self.config = config
        self.is_text_alone = not has_images and isinstance(model, CMACLIP)
        classes = [len(names) for names in model.tasks.values()]
        self.register_buffer("offsets", task_offsets(classes * _MOST_HEADS), persistent=False)
        weight = adjustment = None
        if config.class_weights is not None:
            weight = class_weights(config.class_weights, counts or {}, model.tasks).repeat(_MOST_HEADS)
        if config.logit_adjustment:
            adjustment = (config.logit_adjustment * log_priors(counts or {})).repeat(_MOST_HEADS)
        self.register_buffer("class_weight", weight, persistent=False)
        self.register_buffer("adjustment", adjustment, persistent=False)

    def forward(self, batch: Batch, contrastive: bool = False) -> tuple[Tensor, Tensor]:
        """Two scalars: the loss to minimise, and the loss to report, the mean over tasks without auxiliary terms.

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
        given = torch.stack([batch.labels[task] for task in self.model.tasks], dim=1)  # [B, K]
        packed = output.packed
        if packed is None:
            packed = torch.cat([output.logits[task] for task in self.model.tasks], dim=1)
        logits, labels = [packed], [self._labels(given, text_rows, hidden, output)]
        if self.model.has_auxiliary_heads and self.config.auxiliary_weight:
            logits.append(self.model.auxiliary_logits(output, TEXT))
            labels.append(given[text_rows].where(mixed.present[:, TEXT, None], -1))
            if not self.is_text_alone:
                logits.append(self.model.auxiliary_logits(output, IMAGE))
                labels.append(given.where(batch.present[:, IMAGE, None], -1))
        of_heads = self._losses(logits, labels)
        loss = of_heads[0]
        report = loss.detach()
        for extra in self.model.extra_losses(hidden, output).values():
            loss = loss + extra
        if len(of_heads) > 1:
            loss = loss + self.config.auxiliary_weight * of_heads[1:].sum()
        return loss, report

    def _losses(self, logits: list[Tensor], labels: list[Tensor]) -> Tensor:
        """The mean over tasks of the loss of each `logits [B, C]` with its `labels [B, K]`; one call for them all."""
        heads, tasks = len(logits), labels[0].shape[1]
        joined = torch.cat(logits, dim=1)
        if self.adjustment is not None:
            joined = joined + self.adjustment[: joined.shape[1]].to(joined.dtype)
        weight = self.class_weight
        losses = multitask_cross_entropy(
            joined,
            torch.cat(labels, dim=1),
            self.offsets[: heads * tasks + 1],
            None if weight is None else weight[: joined.shape[1]].to(joined.dtype),
            label_smoothing=self.config.label_smoothing,
        )
        return losses.view(heads, tasks).mean(1)

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

    def _labels(self, labels: Tensor, text_rows: Tensor, hidden: Batch, output: Output) -> Tensor:
        """What each task learns after `_mismatch` and `_hide`: -1 where it would follow a text of another row.

        Args:
            labels: `[B, K]`, as given.
        """
        both = hidden.present.all(1)
        moved = both & (text_rows != torch.arange(len(labels), device=text_rows.device))
        # a text whose picture is hidden keeps what it says
        labels = labels.where(hidden.present[:, IMAGE, None], labels[text_rows])
        if output.modality_weights is not None:
            weights = torch.stack(list(output.modality_weights.values()), dim=1).detach()  # [B, K, 2]
            # `where` rather than a choice of rows, whose number the host would wait for
            text, image = weights.where(both[:, None, None], 0).sum(0).unbind(1)
            labels = labels.masked_fill(moved[:, None] & (text > image), -1)
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
