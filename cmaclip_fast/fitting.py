"""The training loop: epochs, schedule, averaged weights, early stopping, checkpoints. It knows no file formats."""

from __future__ import annotations

import json
import logging
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from cmaclip_fast import signals
from cmaclip_fast.data.augment import Augmentation
from cmaclip_fast.data.examples import Examples, make_loader
from cmaclip_fast.errors import InputError
from cmaclip_fast.evaluation import classify
from cmaclip_fast.files import write_tensors
from cmaclip_fast.lora import add_adapters, merge_adapters
from cmaclip_fast.losses import contrastive_loss, multitask_loss
from cmaclip_fast.memory import Meter
from cmaclip_fast.model import CMACLIP
from cmaclip_fast.pretrained import TimmImage
from cmaclip_fast.progress import rate_bar
from cmaclip_fast.systems.base import System
from cmaclip_fast.tiny import STRIDE
from cmaclip_fast.types import IMAGE, TEXT, Batch, Output

log = logging.getLogger("cmaclip_fast")


class TrainingConfig(BaseModel):
    """How a model is trained. The defaults fit fine-tuning a pretrained CLIP; `TINY_TRAINING` fits `tiny`.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows of a step (on each device).
        learning_rate: peak, for projections, attention and heads.
        tower_learning_rate: peak, for the two towers.
        weight_decay: AdamW's, not on norms, biases and embeddings of position, type or class.
        warmup: share of all steps with a rising rate; a cosine follows, down to 1 % of the peak.
        clip_norm: largest norm of the gradient.
        label_smoothing: share of the probability spread over all classes.
        text_dropout, image_dropout: how often a row's text, or its picture, is hidden in training, where it has both.
        mismatch: share of the rows that are given another row's text, so that the training texts are not learnt by
            heart. Such a pair teaches only the tasks that the model's modality weights say it judges by the picture;
            a system without such weights is given none.
        augmentation: random changes of pictures and texts in training; None for none.
        auxiliary_weight: of the loss of the model's auxiliary heads.
        small_epochs: share of the epochs, the first ones and never all, that see pictures of two thirds the side, at
            half the cost; only for `tiny`.
        pretrained_learning_rate: peak, for a Hugging Face text tower and for a timm image tower with weights of a file.
        contrastive_epochs: passes over the training pairs with CLIP's own loss before the tasks.
        ema_decay: of the running average of the weights, which is what is evaluated and kept; 0 for none.
        patience: epochs without a better validation score before training stops; 0 for never. The score counts from
            the first epoch with pictures of full size.
        mixed_precision: of the devices that can.
        accumulate: batches whose gradients are added up before a step.
        checkpointing: keep only what goes into each transformer layer and compute the layer again for its gradient:
            less memory, about a third more work.
        compile: run through `torch.compile`; the first steps take minutes.
        lora_rank: of the low-rank adapters (LoRA) that are trained in place of the towers' own weights, at
            `learning_rate`, and are added to those weights at the end; 0 trains the towers themselves. Needs peft.
        workers: processes that load data.
        seed: of weights, order and augmentation; a run on CPU repeats bit for bit on the same machine.
    """

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(10, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    tower_learning_rate: float = Field(1e-5, ge=0)
    pretrained_learning_rate: float = Field(5e-5, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    text_dropout: float = Field(0.1, ge=0, le=1)
    image_dropout: float = Field(0.1, ge=0, le=1)
    mismatch: float = Field(0.0, ge=0, lt=1)
    augmentation: Augmentation | None = Field(default_factory=Augmentation)
    auxiliary_weight: float = Field(0.5, ge=0)
    small_epochs: float = Field(0.0, ge=0, lt=1)
    contrastive_epochs: int = Field(0, ge=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)
    patience: int = Field(0, ge=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    accumulate: int = Field(1, ge=1)
    checkpointing: bool = False
    compile: bool = False
    lora_rank: int = Field(0, ge=0)
    workers: int = Field(0, ge=0)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_side_is_left(self) -> TrainingConfig:
        if self.text_dropout + self.image_dropout > 1:
            raise ValueError("text_dropout and image_dropout together are over 1, which leaves rows with neither")
        return self


TINY_TRAINING = TrainingConfig(
    epochs=25,
    batch_size=64,
    learning_rate=2e-3,
    tower_learning_rate=2e-3,
    clip_norm=2.0,
    label_smoothing=0.1,
    augmentation=Augmentation(
        scale=(0.6, 1.6),
        ratio=(0.75, 1.33),
        rotation=15,
        brightness=0,
        contrast=0,
        erasing=0.25,
        word_dropout=0.3,
    ),
    mismatch=0.25,
    small_epochs=0.8,
    ema_decay=0.99,
)


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


@dataclass
class Progression:
    """Where a run stands; what a checkpoint holds beside tensors."""

    epoch: int = 0
    step: int = 0
    best_score: float = -math.inf
    best_epoch: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: System,
    training: Examples,
    validation: Examples,
    config: TrainingConfig,
    checkpoint: Path,
    console: Console,
    target_precision: float = 0.9,
) -> Progression:
    """Trains `model` in place and leaves it with the weights of its best epoch.

    Args:
        checkpoint: file written after every epoch; where it exists, training goes on from it to the same result.
        console: for the progress bar.

    Raises:
        InputError: the checkpoint is damaged or of another model; with `lora_rank` peft is missing, or there is nothing
            to adapt.
    """
    adapted = add_adapters(model, config.lora_rank) if config.lora_rank else []
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulate,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    objective = Objective(model, config, training.has_images)
    if config.small_epochs and (model.config.name != "tiny" or model.config.image_tower is not None):
        name = model.config.name if model.config.image_tower is None else model.config.image_tower.model
        raise InputError(f"small_epochs: '{name}' reads pictures of one size: leave it 0, or train 'tiny'")
    # one kernel for a tensor, where the default runs ten small ones
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.98), fused=True)
    loader = make_loader(
        training, config.batch_size, shuffle=True, seed=config.seed, workers=config.workers, drop_last=True
    )
    if len(loader) == 0:
        raise InputError(
            f"{len(training)} training rows are fewer than one batch of {config.batch_size}: lower --batch-size"
        )
    model.set_checkpointing(config.checkpointing)
    objective, optimizer, loader = accelerator.prepare(objective, optimizer, loader)
    step = torch.compile(objective) if config.compile else objective
    meter = Meter(accelerator.device)
    held = meter.reset()
    average = AveragedModel(model, multi_avg_fn=_warm_average(config.ema_decay)) if config.ema_decay else None
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    progress_state = Progression()
    if checkpoint.exists():
        progress_state = load_checkpoint(checkpoint, model, average, optimizer, best)
        log.info("resumed after epoch %d", progress_state.epoch)

    steps = math.ceil(len(loader) / config.accumulate)
    stages = config.contrastive_epochs + config.epochs
    schedule = _schedule(config, steps)
    kept = model if average is None else cast(System, average.module)
    with signals.steps(), rate_bar(console, "steps", accelerator.is_local_main_process) as bar:
        task = bar.add_task("training", total=stages * len(loader), completed=progress_state.epoch * len(loader))
        while progress_state.epoch < stages:
            epoch = progress_state.epoch
            if config.patience and epoch - progress_state.best_epoch >= config.patience and progress_state.best_epoch:
                log.info("stopped: no better validation score for %d epochs", config.patience)
                break
            warm_start = epoch < config.contrastive_epochs
            contrastive = warm_start or not model.uses_labels
            started = time.perf_counter()
            # all randomness of an epoch follows from (seed, epoch), so a resumed run repeats it
            torch.manual_seed(config.seed * 1_000_003 + epoch)
            training.side = _side(model, config, epoch)
            meter.reset()
            loader.set_epoch(epoch)
            objective.train()
            total = torch.zeros((), device=accelerator.device)
            waited, asked = 0.0, time.perf_counter()
            for batch in _until_stopped(loader):
                waited += time.perf_counter() - asked
                with accelerator.accumulate(objective):
                    loss, report = step(batch, contrastive)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(objective.parameters(), config.clip_norm)
                        for group in optimizer.param_groups:
                            group["lr"] = group["peak"] * schedule(progress_state.step)
                        progress_state.step += 1
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients and average is not None:
                    average.update_parameters(model)
                total += report
                bar.advance(task)
                signals.check()
                asked = time.perf_counter()
            train_loss = float(accelerator.reduce(total, "mean")) / len(loader)
            train_seconds = time.perf_counter() - started
            if not math.isfinite(train_loss):
                raise InputError(
                    f"training diverged in epoch {epoch + 1} (loss {train_loss}): lower the learning rates "
                    "and start anew with --overwrite"
                )
            record = {
                "epoch": epoch + 1,
                "contrastive": float(contrastive),
                "train_loss": train_loss,
                "learning_rate": config.learning_rate * schedule(progress_state.step - 1),
                "rows_per_second": len(loader) * config.batch_size * accelerator.num_processes / train_seconds,
                "waiting_for_data": waited / train_seconds,
            }
            if held is not None and (peak := meter.peak()) is not None:
                # with gradients, the optimizer's state and what the first batches leave behind
                record["memory_per_row"] = max(0, peak - held) / config.batch_size
            progress_state.epoch += 1
            if not warm_start:
                record |= validate(kept, validation, config, accelerator.device, target_precision)
                score = record["score"]
                # weights that have only seen small pictures are not yet what they are for
                if training.side is None and score > progress_state.best_score:
                    progress_state.best_score, progress_state.best_epoch = score, progress_state.epoch
                    best = {name: tensor.clone() for name, tensor in kept.state_dict().items()}
            progress_state.seconds += time.perf_counter() - started
            progress_state.history.append(record)
            log.info("%s", describe_epoch(record, stages))
            if accelerator.is_main_process:
                save_checkpoint(checkpoint, model, average, optimizer, best, progress_state)
            signals.check()
    model.load_state_dict(best)
    merge_adapters(adapted)
    return progress_state


def _until_stopped(loader: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of a loader; a signal that has ended its processes too ends the run as it would have without them."""
    try:
        yield from loader
    except RuntimeError:
        signals.check()
        raise


def validate(
    model: System, examples: Examples, config: TrainingConfig, device: torch.device, target_precision: float
) -> dict[str, float]:
    """Loss, score (the mean accuracy of the tasks) and each task's accuracy on the validation rows."""
    result = classify(model, examples, config.batch_size, device)
    record: dict[str, float] = {"validation_loss": result.loss()}
    accuracies = []
    for task, headline in result.headlines(target_precision).items():
        record[f"accuracy/{task}"] = headline["accuracy"]
        if headline["rows"]:
            accuracies.append(headline["accuracy"])
    record["score"] = sum(accuracies) / max(len(accuracies), 1)
    return record


def describe_epoch(record: dict[str, float], stages: int) -> str:
    """One line for the log."""
    parts = [f"epoch {int(record['epoch'])}/{stages}", f"loss {record['train_loss']:.3f}"]
    if record["contrastive"]:
        parts.insert(1, "contrastive")
    if "validation_loss" in record:
        parts.append(f"validation {record['validation_loss']:.3f}")
    parts += [f"{k.removeprefix('accuracy/')} {v:.3f}" for k, v in record.items() if k.startswith("accuracy/")]
    parts.append(f"{record['rows_per_second']:.0f} rows/s, {record['waiting_for_data']:.0%} waiting for data")
    if "memory_per_row" in record:
        parts.append(f"{record['memory_per_row'] / 2**20:.1f} MiB a row")
    return "  ".join(parts)


def parameter_groups(model: System, config: TrainingConfig) -> list[dict[str, Any]]:
    """AdamW's groups: towers, other towers with weights of their own, and new layers, with and without weight decay.

    `peak` is the rate after warm-up.
    """
    towers = {name for name, _ in model.tower_parameters()}
    rates = {"new": config.learning_rate, "tower": config.tower_learning_rate, "read": config.pretrained_learning_rate}
    text, image = model.config.text_tower, model.config.image_tower
    read: tuple[str, ...] = () if text is None else ("text_tower.text.transformer.",)
    if isinstance(image, TimmImage) and image.read:
        read += ("image_tower.visual.trunk.",)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(
                ("positional_embedding", "class_embedding", "type_embedding", "cls_emb")
            )
            adapter = ".lora_" in name
            kind = "tower" if name in towers and not adapter else "new"
            if name.startswith(read) and not adapter:
                kind = "read"
            groups.setdefault((kind, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "peak": rates[kind],
            "lr": 0.0,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (kind, decays), parameters in groups.items()
    ]


def _side(model: System, config: TrainingConfig, epoch: int) -> int | None:
    """Pixels a side of this epoch's training pictures; None is the model's own."""
    epochs = config.contrastive_epochs + config.epochs
    if epoch >= min(int(config.small_epochs * epochs), epochs - 1):
        return None
    return max(1, round(model.preprocessing.size / STRIDE * 2 / 3)) * STRIDE


def _schedule(config: TrainingConfig, steps: int) -> Callable[[int], float]:
    """Share of the peak rate at each step: linear warm-up, then a cosine; anew for the tasks after a warm start."""

    def share(step: int) -> float:
        first = config.contrastive_epochs * steps
        length, position = (first, step) if step < first else (config.epochs * steps, step - first)
        warm = max(1, int(config.warmup * length))
        if position < warm:
            return (position + 1) / warm
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (position - warm) / max(1, length - warm)))

    return share


def _warm_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving average whose decay rises to `decay`, so that the first weights are soon forgotten."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        weight = 1 - min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averaged, current, weight)

    return update


def save_checkpoint(
    path: Path,
    model: nn.Module,
    average: nn.Module | None,
    optimizer: Any,
    best: dict[str, Tensor],
    progression: Progression,
) -> None:
    """Writes all of a run's state as one safetensors file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    averaged = {} if average is None else average.state_dict()
    for part, state in (("model", model.state_dict()), ("average", averaged), ("best", best)):
        tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
    for index, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in entry.items()}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    said = json.dumps(asdict(progression))
    write_tensors(path, tensors, {"progression": said, "checksum": _checksum(said, tensors)})


def _checksum(said: str, tensors: dict[str, Tensor]) -> str:
    """Of all that a checkpoint holds: safetensors itself sees only that a file is truncated."""
    found = zlib.crc32(said.encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def load_checkpoint(
    path: Path, model: nn.Module, average: nn.Module | None, optimizer: Any, best: dict[str, Tensor]
) -> Progression:
    """Puts back what `save_checkpoint` wrote.

    Raises:
        InputError: the file is damaged or of another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata()["progression"]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is no mapping
            if file.metadata()["checksum"] != _checksum(said, tensors):
                raise ValueError("its checksum is wrong")
        progression = Progression(**json.loads(said))
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, name = key.split(".", 1)
            parts.setdefault(part, {})[name] = tensor
        model.load_state_dict(parts["model"])
        if average is not None:
            average.load_state_dict(parts["average"])
        best.update(parts["best"])
        state = optimizer.state_dict()
        entries: dict[int, dict[str, Tensor]] = {}
        for key, tensor in parts.get("optimizer", {}).items():
            index, name = key.split(".", 1)
            entries.setdefault(int(index), {})[name] = tensor
        optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
    except Exception as error:
        # safetensors, JSON and torch each raise their own kind for a damaged file
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: cannot be resumed from ({reason}): pass --overwrite in place of --resume to start anew"
        ) from error
    return progression
