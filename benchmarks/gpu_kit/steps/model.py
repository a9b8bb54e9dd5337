"""The whole CMA-CLIP on real rows: the GPU against the CPU, CUDA graphs against none, and twenty training steps."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu_kit.result import Result, main
from cmaclip_fast.bench.workloads import FUSION_DEPTH, SMALL, make_model
from cmaclip_fast.classifier.engine import Engine
from cmaclip_fast.data import read_table
from cmaclip_fast.nn.losses import task_offsets
from cmaclip_fast.ops import multitask_cross_entropy
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch

TASKS = ("category", "color")
LEARNING_RATE = 1e-4
EQUAL = {torch.float32: 2e-4, torch.bfloat16: 2e-2}
"""Of the largest logit: how far results that should be equal may be apart."""
AGREE = 0.95
"""Share of rows whose class bfloat16 must not change."""


def run(result: Result, dry_run: bool) -> None:
    # float32 on the GPU is to be float32, in the towers' convolution too
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    tower, device, rows, trained_rows, steps = (SMALL, "cpu", 6, 3, 2) if dry_run else ("ViT-B-32", "cuda", 64, 8, 20)
    table = read_table("openclipart", split="test")
    table = table.select(range(0, rows * (len(table) // rows), len(table) // rows))
    labels = {task: table.labels(task) for task in TASKS}
    classes = {task: sorted({label for label in values if label is not None}) for task, values in labels.items()}
    model = make_model(
        tower, {task: len(names) for task, names in classes.items()}, depth=1 if dry_run else FUSION_DEPTH, dropout=0.0
    )
    model.eval()
    ids = {
        task: torch.tensor([-1 if label is None else classes[task].index(label) for label in values])
        for task, values in labels.items()
    }
    found = [table.image(row) for row in range(rows)]
    pictures = torch.stack([model.preprocessing(image) for image in found if image is not None])
    tokens, lengths, _ = model.tokenizer.encode([table.text(row) for row in range(rows)])
    batch = Batch(pictures, tokens, lengths, torch.ones(rows, 2, dtype=torch.bool), ids)
    few = _rows(batch, slice(0, trained_rows))
    with result.part("float32 against the CPU"):
        with torch.inference_mode():
            expected = model(few).logits
            found = copy.deepcopy(model).to(device)(few.to(device)).logits
        _equal(result, "float32 on the GPU and on the CPU", found, expected, torch.float32)
    trained = copy.deepcopy(model).to(device)
    losses: dict[str, list[float]] = {}
    with result.part("training"):
        losses["gpu"] = train(trained, few.to(device), torch.bfloat16, steps)
        result.data["losses"] = losses
    trained.eval()
    dtype = torch.float32 if dry_run else torch.bfloat16
    with result.part("bfloat16 and CUDA graphs"):
        classify(result, trained, batch.to(device), dtype)
    with result.part("training on the CPU"):
        losses["cpu"] = train(model, few, torch.float32, steps)
        ends = {where: (values[0], values[-1]) for where, values in losses.items()}
        result.say(f"loss of {steps} training steps, first and last: {ends}")
        if not all(last < first for first, last in ends.values()):
            result.fail("the loss did not fall")
        elif abs(ends["gpu"][1] - ends["cpu"][1]) > 0.25 * ends["cpu"][0]:
            result.fail("the losses on the GPU and on the CPU end far apart")


def classify(result: Result, model: CMACLIP, batch: Batch, dtype: torch.dtype) -> None:
    """bfloat16 against float32 by classes, and with CUDA graphs against without on two different batches."""
    with torch.inference_mode():
        wide = model(batch).logits
    precision = str(dtype).removeprefix("torch.")
    plain, recorded = (Engine(model, precision=precision, graphs=graphs) for graphs in (False, True))
    narrow = plain(batch).logits
    agree = {task: float((narrow[task].argmax(1) == wide[task].argmax(1)).float().mean()) for task in wide}
    result.data["argmax_agreement"] = agree
    result.say(f"rows on which {dtype} and float32 name the same class: {agree}")
    if min(agree.values()) < AGREE:
        result.fail(f"{dtype} changes the class of more than {1 - AGREE:.0%} of the rows")
    # the same texts take the same graph
    changed = replace(batch, images=batch.images.flip(0))
    for name, some in (("recorded", batch), ("changed", changed)):
        _equal(result, f"with and without CUDA graphs, {name} batch", recorded(some).logits, plain(some).logits, dtype)


def train(model: CMACLIP, batch: Batch, dtype: torch.dtype, steps: int) -> list[float]:
    """The losses of steps on one batch."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    labels = torch.stack(list(batch.labels.values()), dim=1)
    offsets = task_offsets(map(len, model.tasks.values())).to(labels.device)
    for _ in range(steps):
        with torch.autocast(batch.tokens.device.type, dtype, enabled=dtype is not torch.float32):
            loss = multitask_cross_entropy(model(batch).packed, labels, offsets).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [round(float(one), 4) for one in losses]


def _rows(batch: Batch, part: slice) -> Batch:
    tensors = {name: getattr(batch, name)[part] for name in ("images", "tokens", "text_lengths", "present")}
    return replace(batch, **tensors, labels={task: values[part] for task, values in batch.labels.items()})


def _equal(
    result: Result, name: str, found: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype
) -> None:
    error = max(
        float((found[task].double().cpu() - expected[task].double().cpu()).abs().max())
        / float(expected[task].double().abs().max())
        for task in expected
    )
    result.data.setdefault("errors", {})[name] = error
    result.say(f"{name}: logits differ by {error:.1e} of the largest; {EQUAL[dtype]:.0e} is allowed")
    if not error <= EQUAL[dtype]:
        result.fail(f"{name}: logits differ by {error:.1e} of the largest")


if __name__ == "__main__":
    main(run, "model")
