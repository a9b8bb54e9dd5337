"""The operators of many tasks against the loops of modules that they replace."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cmaclip_fast.bench.loops import KeylessAttention, cross_entropy_loop
from cmaclip_fast.bench.results import BenchmarkError, Part
from cmaclip_fast.bench.timing import Run, Spread, alternate
from cmaclip_fast.bench.workloads import FUSION_WIDTH
from cmaclip_fast.ops import modality_pool, multitask_cross_entropy

ROWS, TASKS, CLASSES = 32, 64, 20


def pool(device: str) -> tuple[list[Tensor], list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    """Modality-wise attention of all tasks; both modalities present, which the modules need not even look at."""
    embeddings = torch.randn(ROWS, 2, FUSION_WIDTH, device=device, requires_grad=True)
    weight = torch.randn(TASKS, 1, FUSION_WIDTH, device=device).mul_(0.02).requires_grad_()
    present = torch.ones(ROWS, 2, dtype=torch.bool, device=device)
    modules = nn.ModuleList(KeylessAttention(vector) for vector in weight[:, 0])
    return (
        [embeddings, weight],
        [embeddings, *modules.parameters()],
        lambda: modality_pool(embeddings, weight, present)[0],
        lambda: torch.stack([module(embeddings) for module in modules], 1),
    )


def loss(device: str) -> tuple[list[Tensor], list[Tensor], Callable[[], Tensor], Callable[[], Tensor]]:
    """Cross-entropy of all tasks."""
    bounds = [0, *itertools.accumulate([CLASSES] * TASKS)]
    offsets = torch.tensor(bounds, dtype=torch.int32, device=device)
    logits = torch.randn(ROWS, bounds[-1], device=device, requires_grad=True)
    labels = torch.randint(CLASSES, (ROWS, TASKS), device=device)
    return (
        [logits],
        [logits],
        lambda: multitask_cross_entropy(logits, labels, offsets),
        lambda: cross_entropy_loop(logits, labels, bounds),
    )


def measure_parts(device: str, seconds: float) -> list[Part]:
    """Forward, and forward with all gradients, of each.

    Raises:
        BenchmarkError: an operator and its loop disagree.
    """
    found = []
    for name, make in (("modality_pool", pool), ("multitask_cross_entropy", loss)):
        torch.manual_seed(0)
        leaves, loop_leaves, ours, loop = make(device)
        if not torch.allclose(ours(), loop(), atol=1e-4, rtol=1e-4):
            raise BenchmarkError(f"{name}: the loop over {TASKS} tasks gives other numbers: nothing was timed")
        upstream = torch.ones_like(ours())

        def gradients(run: Callable[[], Tensor], leaves: list[Tensor], upstream: Tensor = upstream) -> Run:
            return lambda number: torch.autograd.grad(run(), leaves, upstream)

        forward: dict[str, Run] = {
            "ours": torch.no_grad()(lambda number, run=ours: run()),
            "loop": torch.no_grad()(lambda number, run=loop: run()),
        }
        both = {"ours": gradients(ours, leaves), "loop": gradients(loop, loop_leaves)}
        for what, runs in (("forward", forward), ("forward and backward", both)):
            alternate(runs, 0, least=5, most=5, device=device)
            times = alternate(runs, seconds, least=20, most=5000, device=device)
            ratio = statistics.median(b / a for a, b in zip(times["ours"], times["loop"], strict=True))
            spreads = {key: Spread.of([second * 1e3 for second in taken]) for key, taken in times.items()}
            what = f"{what}, {ROWS} pairs, {TASKS} tasks"
            found.append(Part(name, what, spreads["ours"], spreads["loop"], ratio))
    return found
