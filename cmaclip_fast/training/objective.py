"""The loss of a step, with what training does to a batch before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from cmaclip_fast.nn.losses import contrastive_loss, task_offsets
from cmaclip_fast.ops import multitask_binary_cross_entropy, multitask_cross_entropy
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
    class_owners: Tensor
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
        numbers = torch.arange(len(classes))
        self.register_buffer("class_owners", numbers.repeat_interleave(torch.tensor(classes)), persistent=False)
        weight = adjustment = None
        if config.class_weights is not None:
            weight = class_weights(config.class_weights, counts or {}, model.tasks).repeat(_MOST_HEADS)
        if config.logit_adjustment:
            adjustment = (config.logit_adjustment * log_priors(counts or {}, model.multi_label)).repeat(_MOST_HEADS)
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
        given = self._given(batch)
        packed = output.packed
        if packed is None:
            packed = torch.cat([output.logits[task] for task in self.model.tasks], dim=1)
        logits = [packed]
        owners = (None, self.class_owners)
        labels = [[self._labels(part, text_rows, hidden, output, owners[n])] for n, part in enumerate(given)]
        if self.model.has_auxiliary_heads and self.config.auxiliary_weight:
            logits.append(self.model.auxiliary_logits(output, TEXT))
            for of_heads, part in zip(labels, given, strict=True):
                of_heads.append(part[text_rows].where(mixed.present[:, TEXT, None], -1))
            if not self.is_text_alone:
                logits.append(self.model.auxiliary_logits(output, IMAGE))
                for of_heads, part in zip(labels, given, strict=True):
                    of_heads.append(part.where(batch.present[:, IMAGE, None], -1))
        losses = self._losses(logits, labels)
        loss = losses[0]
        report = loss.detach()
        for extra in self.model.extra_losses(hidden, output).values():
            loss = loss + extra
        if len(losses) > 1:
            loss = loss + self.config.auxiliary_weight * losses[1:].sum()
        return loss, report

    def _given(self, batch: Batch) -> list[Tensor]:
        """The labels of a batch: `[B, K]` int64 with a column for each task, and `[B, C]` int8 with one for each class.

        Each is -1 in the columns of tasks of the other kind; the second is left out if no task is multi-label.
        """
        rows, device = len(batch), batch.present.device
        several = self.model.multi_label
        none = torch.full((rows,), -1, device=device)
        labels = [none if task in several else batch.labels[task] for task in self.model.tasks]
        given = [torch.stack(labels, dim=1)]
        if several:
            targets = [
                batch.labels[task]
                if task in several
                else torch.full((rows, len(classes)), -1, dtype=torch.int8, device=device)
                for task, classes in self.model.tasks.items()
            ]
            given.append(torch.cat(targets, dim=1))
        return given

    def _losses(self, logits: list[Tensor], labels: list[list[Tensor]]) -> Tensor:
        """The mean over tasks of the loss of each `logits [B, C]`; one call for them all and each kind of label.

        Args:
            labels: of each kind that `_given` gives, for each of `logits`.
        """
        heads, tasks, config = len(logits), len(self.model.tasks), self.config
        joined = torch.cat(logits, dim=1)
        offsets = self.offsets[: heads * tasks + 1]
        weight = None if self.class_weight is None else self.class_weight[: joined.shape[1]].to(joined.dtype)
        plain = joined
        if self.adjustment is not None:
            joined = joined + self.adjustment[: joined.shape[1]].to(joined.dtype)
        losses = multitask_cross_entropy(
            joined, torch.cat(labels[0], dim=1), offsets, weight, label_smoothing=config.label_smoothing
        )
        if len(labels) > 1:  # a task that has no label of a kind has no loss of it
            losses = losses + multitask_binary_cross_entropy(
                plain,
                torch.cat(labels[1], dim=1),
                offsets,
                class_weight=weight,
                gamma_positive=config.gamma_positive,
                gamma_negative=config.gamma_negative,
                margin=config.margin,
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

    def _labels(
        self, labels: Tensor, text_rows: Tensor, hidden: Batch, output: Output, owners: Tensor | None = None
    ) -> Tensor:
        """What each task learns after `_mismatch` and `_hide`: -1 where it would follow a text of another row.

        Args:
            labels: `[B, n]`, as given.
            owners: `[n]`, the number of the task that each column is of; None for one column a task.
        """
        both = hidden.present.all(1)
        moved = both & (text_rows != torch.arange(len(labels), device=text_rows.device))
        # a text whose picture is hidden keeps what it says
        labels = labels.where(hidden.present[:, IMAGE, None], labels[text_rows])
        if output.modality_weights is not None:
            weights = torch.stack(list(output.modality_weights.values()), dim=1).detach()  # [B, K, 2]
            # `where` rather than a choice of rows, whose number the host would wait for
            text, image = weights.where(both[:, None, None], 0).sum(0).unbind(1)
            follows = text > image
            labels = labels.masked_fill(moved[:, None] & (follows if owners is None else follows[owners]), -1)
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
