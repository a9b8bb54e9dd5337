"""The training loop: epochs, schedule, averaged weights, early stopping, checkpoints. It knows no file formats."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from cmaclip_fast import signals
from cmaclip_fast.data.examples import Examples
from cmaclip_fast.errors import InputError
from cmaclip_fast.evaluation.evaluate import classify
from cmaclip_fast.nn.tiny import STRIDE
from cmaclip_fast.progress import rate_bar
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.presets import TINY, preset
from cmaclip_fast.training.checkpoint import Progression, load_checkpoint, save_checkpoint
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.imbalance import class_counts, row_weights
from cmaclip_fast.training.loading import Loading
from cmaclip_fast.training.log import log
from cmaclip_fast.training.lora import add_adapters, merge_adapters
from cmaclip_fast.training.memory import Meter
from cmaclip_fast.training.objective import Objective
from cmaclip_fast.training.schedule import parameter_groups, schedule


def fit(
    model: System,
    training: Examples,
    validation: Examples,
    config: TrainingConfig,
    checkpoint: Path,
    console: Console,
    target_precision: float = 0.9,
    device: torch.device | None = None,
) -> Progression:
    """Trains `model` in place and leaves it with the weights of its best epoch.

    Args:
        checkpoint: file written after every epoch; if it exists, training continues from it to the same result.
        console: for the progress bar.
        device: a GPU or the CPU; None is the CPU. Products of float32 run as TF32 on a GPU.

    Raises:
        InputError: the checkpoint is damaged or of another model; with `lora_rank` peft is missing, or there is nothing
            to adapt.
    """
    device = device or torch.device("cpu")
    with _fast_products(device), torch.cuda.device(device if device.type == "cuda" else -1):
        return _fit(model, training, validation, config, checkpoint, console, target_precision, device)


def _fit(
    model: System,
    training: Examples,
    validation: Examples,
    config: TrainingConfig,
    checkpoint: Path,
    console: Console,
    target_precision: float,
    device: torch.device,
) -> Progression:
    adapted = add_adapters(model, config.lora_rank) if config.lora_rank else []
    accelerator = _accelerator(config, device)
    counts = class_counts(training.labels, model.tasks)
    objective = Objective(model, config, training.has_images, counts)
    if config.small_epochs and (not preset(model.config.name).is_ours or model.config.image_tower is not None):
        name = model.config.name if model.config.image_tower is None else model.config.image_tower.model
        raise InputError(f"small_epochs: '{name}' reads pictures of one size: leave it 0, or train '{TINY}'")
    # one kernel for a tensor, where the default runs ten small ones
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.98), fused=True)
    drawn = row_weights(training.labels, counts) if config.balanced_sampling else None
    loading = Loading(training, config, accelerator, drawn)
    if len(loading) == 0:
        raise InputError(
            f"{len(training)} training rows are fewer than one batch of {config.batch_size}: lower --batch-size"
        )
    model.set_checkpointing(config.checkpointing)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    step = torch.compile(objective) if config.compile else objective
    meter = Meter(accelerator.device)
    held = meter.reset()
    average = AveragedModel(model, multi_avg_fn=_warm_average(config.ema_decay)) if config.ema_decay else None
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    progress_state = Progression()
    if checkpoint.exists():
        progress_state = load_checkpoint(checkpoint, model, average, optimizer, best)
        log.info("resumed after epoch %d", progress_state.epoch)

    steps = math.ceil(len(loading) / config.accumulate)
    stages = config.contrastive_epochs + config.epochs
    share = schedule(config, steps)
    kept = model if average is None else cast(System, average.module)
    with signals.steps(), rate_bar(console, "steps", accelerator.is_local_main_process) as bar:
        task = bar.add_task("training", total=stages * len(loading), completed=progress_state.epoch * len(loading))
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
            objective.train()
            total = torch.zeros((), device=accelerator.device)
            for batch in loading.epoch(epoch):
                with accelerator.accumulate(objective):
                    loss, report = step(batch, contrastive)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(objective.parameters(), config.clip_norm)
                        for group in optimizer.param_groups:
                            group["lr"] = group["peak"] * share(progress_state.step, group["kind"])
                        progress_state.step += 1
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients and average is not None:
                    average.update_parameters(model)
                total += report
                bar.advance(task)
                signals.check()
            train_loss = float(accelerator.reduce(total, "mean")) / len(loading)
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
                "learning_rate": config.learning_rate * share(progress_state.step - 1, "heads"),
                "rows_per_second": len(loading) * config.batch_size * accelerator.num_processes / train_seconds,
                "waiting_for_data": loading.waited / train_seconds,
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


def mixed_precision(config: TrainingConfig, device: torch.device) -> Literal["no", "bf16", "fp16"]:
    """What `auto` stands for on a device.

    Raises:
        InputError: fp16 on a CPU.
    """
    if config.mixed_precision == "auto":
        has = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has else "no"
    if config.mixed_precision == "fp16" and device.type != "cuda":
        raise InputError("mixed precision fp16 needs a GPU: use auto, no or bf16")
    return config.mixed_precision


@contextlib.contextmanager
def _fast_products(device: torch.device) -> Iterator[None]:
    """Products of float32 as TF32 on a GPU that has it; on a CPU nothing changes."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = convolutions


def _accelerator(config: TrainingConfig, device: torch.device) -> Accelerator:
    AcceleratorState._reset_state(reset_partial_state=True)  # a process may train several times, on other devices
    return Accelerator(
        cpu=device.type != "cuda",
        mixed_precision=mixed_precision(config, device),
        gradient_accumulation_steps=config.accumulate,
        dataloader_config=DataLoaderConfiguration(non_blocking=device.type == "cuda"),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def validate(
    model: System, examples: Examples, config: TrainingConfig, device: torch.device, target_precision: float
) -> dict[str, float]:
    """Loss, score and each task's accuracy on the validation rows.

    The score is the mean over tasks of the accuracy, or of a multi-label task the mean average precision.
    """
    result = classify(model, examples, config.batch_size, device)
    record: dict[str, float] = {"validation_loss": result.loss()}
    scores = []
    for task, headline in result.headlines(target_precision).items():
        record[f"accuracy/{task}"] = headline["accuracy"]
        if "mean_average_precision" in headline:
            record[f"mean_average_precision/{task}"] = headline["mean_average_precision"]
        if headline["rows"]:
            scores.append(headline.get("mean_average_precision", headline["accuracy"]))
    record["score"] = sum(scores) / max(len(scores), 1)
    return record


def describe_epoch(record: dict[str, float], stages: int) -> str:
    """One line for the log."""
    parts = [f"epoch {int(record['epoch'])}/{stages}", f"loss {record['train_loss']:.3f}"]
    if record["contrastive"]:
        parts.insert(1, "contrastive")
    if "validation_loss" in record:
        parts.append(f"validation {record['validation_loss']:.3f}")
    for name, value in record.items():
        kind, _, task = name.partition("/")
        if kind == "mean_average_precision" or (kind == "accuracy" and f"mean_average_precision/{task}" not in record):
            parts.append(f"{task} {value:.3f}")
    parts.append(f"{record['rows_per_second']:.0f} rows/s, {record['waiting_for_data']:.0%} waiting for data")
    if "memory_per_row" in record:
        parts.append(f"{record['memory_per_row'] / 2**20:.1f} MiB a row")
    return "  ".join(parts)


def _side(model: System, config: TrainingConfig, epoch: int) -> int | None:
    """Pixels a side of this epoch's training pictures; None is the model's own."""
    epochs = config.contrastive_epochs + config.epochs
    if epoch >= min(int(config.small_epochs * epochs), epochs - 1):
        return None
    return max(1, round(model.preprocessing.size / STRIDE * 2 / 3)) * STRIDE


def _warm_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Exponential moving average whose decay rises to `decay`, so that the first weights are soon forgotten."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        weight = 1 - min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averaged, current, weight)

    return update
