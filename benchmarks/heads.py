"""Times the heads of many tasks: a few batched products, against a loop over the tasks.

    python -m benchmarks.heads --write docs/tables/heads.md

Both compute an MLP and the mean cross-entropy for each task, from the same weights; the two alternate in one run. The
loop calls `nn.Linear`, `nn.GELU` and `F.cross_entropy` for each task. Gradients are those of features and weights.
"""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.page import as_table
from cmaclip_fast import env
from cmaclip_fast.bench.loops import cross_entropy_loop, heads_apart
from cmaclip_fast.bench.timing import alternate
from cmaclip_fast.nn.heads import TaskHeads
from cmaclip_fast.nn.losses import task_offsets
from cmaclip_fast.ops import multitask_cross_entropy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES: dict[str, Callable[[int], int]] = {"10": lambda task: 10, "2 to 40": lambda task: 2 + 7 * task % 39}
"""Of each task, in numbers that are equal or far apart."""
HEADINGS = ["rows", "tasks", "classes of each", "", "batched, ms (p20-p80)", "loop, ms (p20-p80)", "loop / batched"]


def main(
    tasks: Annotated[list[int], typer.Option(help="Number of tasks; repeatable.")] = [1, 16, 64, 1024],  # noqa: B006
    rows: Annotated[list[int], typer.Option(help="Rows of a batch; repeatable. One row is not trained.")] = [1, 32],  # noqa: B006
    width: Annotated[int, typer.Option(help="Width of the features and of the hidden layers.")] = 512,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help=f"Of the products: {', '.join(DTYPES)}; autocast below float32.")] = "",
    seconds: Annotated[float, typer.Option(help="Measured time of each row of the table.")] = 4.0,
    write: Annotated[Path | None, typer.Option(help="The page to write.")] = None,
) -> None:
    """Time the heads of many tasks, batched and in a loop."""
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    load = os.getloadavg()[0]
    lines = []
    ratios: dict[str, list[float]] = {"forward": [], "forward+backward": []}
    for size, count, name in itertools.product(rows, tasks, CLASSES):
        if count == 1 and name != "10":
            continue
        classes = [CLASSES[name](task) for task in range(count)]
        for what, (batched, loop) in pairs(classes, size, width, device, DTYPES[dtype]).items():
            times = measure(batched, loop, seconds, device)
            ratio = float(np.median(times["loop"]) / np.median(times["batched"]))
            ratios[what].append(ratio)
            lines.append([size, count, name, what, said(times["batched"]), said(times["loop"]), ratio])
            print(as_table(HEADINGS, lines[-1:]).splitlines()[-1], flush=True)
    if write is None:
        return
    machine = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else "CPU, {instruction_set}, {threads} threads".format(**env.processor())
    )
    verdict = " and ".join(
        f"{min(found):.1f} to {max(found):.1f} times as fast as the loop ({what})"
        for what, found in ratios.items()
        if found
    )
    about = (
        f"{machine}, {dtype}, torch {torch.__version__}, {datetime.date.today()}; load before the run {load:.2f}, "
        f"after it {os.getloadavg()[0]:.2f}."
    )
    text = f"""# The heads of many tasks

Written by `make heads`.

The heads of all tasks together are {verdict}.

Features and hidden layers are {width} wide, with the loss; each task reads features of its own. Median and 20th to
80th percentile of alternating runs. {about}

{as_table(HEADINGS, lines)}
"""
    write.parent.mkdir(parents=True, exist_ok=True)
    write.write_text(text, encoding="utf-8")
    print(f"wrote {write}")


def pairs(
    classes: list[int], rows: int, width: int, device: str, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """The loss, and the loss with its gradients: batched and in a loop."""
    torch.manual_seed(0)
    with torch.device(device):
        heads = TaskHeads(width, width, classes)
        features = torch.randn(rows, len(classes), width, requires_grad=True)
        labels = torch.stack([torch.randint(-1, count, (rows,)) for count in classes], dim=1)
    labels[0] = 0  # every task has a label, without which a mean is 0 here and NaN there
    modules = heads_apart(heads)
    bounds = [0, *itertools.accumulate(classes)]
    offsets = task_offsets(classes).to(device)

    def batched() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return multitask_cross_entropy(heads(features), labels, offsets).mean()

    def loop() -> Tensor:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            parts = [head(part) for head, part in zip(modules, features.unbind(1), strict=True)]
            return cross_entropy_loop(torch.cat(parts, dim=1), labels, bounds).mean()

    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(batched().float(), loop().float(), atol=tolerance, rtol=tolerance)

    def forward(run: Callable[[], Tensor]) -> Callable[[], Any]:
        return torch.no_grad()(run)

    def backward(run: Callable[[], Tensor], module: torch.nn.Module) -> Callable[[], Any]:
        leaves = [features, *module.parameters()]
        return lambda: torch.autograd.grad(run(), leaves)

    ways = {"forward": (forward(batched), forward(loop))}
    if rows > 1:
        ways["forward+backward"] = (backward(batched, heads), backward(loop, modules))
    return ways


def measure(
    batched: Callable[[], Any], loop: Callable[[], Any], seconds: float, device: str
) -> dict[str, np.ndarray[Any, Any]]:
    """Milliseconds of each run of both."""
    for _ in range(2):
        batched(), loop()
    runs = {"batched": lambda number: batched(), "loop": lambda number: loop()}
    return {name: np.array(times) * 1e3 for name, times in alternate(runs, seconds, 5, 100, device).items()}


def said(times: np.ndarray[Any, Any]) -> str:
    low, middle, high = np.percentile(times, (20, 50, 80))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


if __name__ == "__main__":
    typer.run(main)
