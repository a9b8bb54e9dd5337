"""packed_attention against padded SDPA, varlen_attn and FlexAttention; the other operators against PyTorch's own."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks import operators
from benchmarks.gpu_kit.competitors import OTHERS, OURS, Competitor, Shape, ours, shapes, slow_to_start
from benchmarks.gpu_kit.result import Result, main
from benchmarks.gpu_kit.timing import Call, Roofs, microseconds, roofs, sets_needed
from cmaclip_fast.ops import dispatch

DTYPE = torch.bfloat16
POOL_SHAPES = {"cpu": [(2, 3)], "cuda": operators.POOL_SHAPES[-1:]}
PACK_SHAPES = {"cpu": [(2, 20)], "cuda": operators.PACK_SHAPES[-1:]}
PAIRS: dict[str, Callable[[operators.Target], Iterable[operators.Pair]]] = {
    "modality_pool": lambda target: operators.pool(target, POOL_SHAPES[target.device]),
    "pack_tokens": lambda target: operators.pack(target, PACK_SHAPES[target.device]),
    "multitask_cross_entropy": lambda target: operators.loss(target, operators.LOSS_SHAPES[:1]),
    "multitask_binary_cross_entropy": lambda target: operators.binary_loss(target, operators.LOSS_SHAPES[:1]),
}


def run(result: Result, dry_run: bool) -> None:
    device = "cpu" if dry_run else "cuda"
    if not dry_run:
        forget_tuning(Path(os.environ["TRITON_CACHE_DIR"]))
    limits = roofs(device)
    result.data |= {"roofs": {"bytes": limits.bytes, "operations": limits.operations}, "attention": [], "others": []}
    result.say(
        f"a large copy moves {limits.bytes / 1e12:.2f} TB/s, a matrix product {limits.operations / 1e12:.0f} TFLOP/s"
    )
    chosen = [Shape(2, 20, 64), Shape(2, 20, 64, 2)] if dry_run else list(shapes())
    groups = ((ours("reference"),),) if dry_run else (OURS, OTHERS)
    for group in groups:
        for shape in chosen:
            attention(result, shape, group, device, limits)
    other_operators(result, device, dry_run)
    if not dry_run:
        few = [shape for shape in chosen if shape.size == 64 and shape.batch != 1024]
        for shape in few:
            attention(result, shape, slow_to_start(), device, limits)


def forget_tuning(cache: Path) -> None:
    """What the tests tuned, several processes at once on tiny inputs, is tuned anew; compiled kernels stay."""
    for path in cache.rglob("*.autotune.json"):
        path.unlink()


def attention(result: Result, shape: Shape, group: tuple[Competitor, ...], device: str, limits: Roofs) -> None:
    """Forward, and forward with backward, of each competitor at one shape."""
    element = DTYPE.itemsize
    for competitor in group:
        count = sets_needed(shape.bytes(element, False), device)
        sets: list[Any] = []
        calls: list[Call] = []
        try:
            sets = [competitor.inputs(shape, DTYPE, device) for _ in range(count)]
            for backward in (False, True):
                calls = [_call(competitor, inputs, backward) for inputs in sets]
                spread = microseconds(calls, device, competitor.graph)
                row: dict[str, Any] = {
                    **{"shape": str(shape), "batch": shape.batch, "mean": shape.mean, "size": shape.size},
                    **{"queries": shape.queries, "longest": max(shape.key_lengths), "dtype": "bfloat16"},
                    **{"competitor": competitor.name, "note": competitor.note, "graph": competitor.graph},
                    **{"what": "forward+backward" if backward else "forward", "sets": count},
                    **{"p20": spread.p20, "us": spread.median, "p80": spread.p80},
                }
                for name, amount, roof in (
                    ("bytes", shape.bytes(element, backward), limits.bytes),
                    ("operations", shape.operations(backward), limits.operations),
                ):
                    row |= {name: amount / spread.median * 1e6, f"{name}_share": amount / spread.median * 1e6 / roof}
                result.data["attention"].append(row)
        except Exception as error:  # a competitor that a shape or this GPU rules out is an entry, not a failure
            reason = f"{type(error).__name__}: {str(error)[:300]}"
            result.data["attention"].append({"shape": str(shape), "competitor": competitor.name, "error": reason})
            if competitor in OURS:
                result.fail(f"{competitor.name}, {shape}: {reason}")
        sets, calls = [], []
    rows = [row for row in result.data["attention"] if row["shape"] == str(shape) and "us" in row]
    times = [f"{row['competitor']} {row['us']:.1f}" for row in rows if row["what"] == "forward"]
    result.say(f"{shape}: forward, µs: {', '.join(times[-len(group) :])}")
    result.keep()
    gc.collect()


def _call(competitor: Competitor, inputs: Any, backward: bool) -> Call:
    if not backward:
        return lambda: torch.no_grad()(competitor.make)(inputs)
    return lambda: torch.autograd.grad(competitor.make(inputs), inputs.leaves, inputs.grad)


def other_operators(result: Result, device: str, dry_run: bool) -> None:
    """With launches in the times, because the loops that they replace are mostly launches; ours as a graph too."""
    for operator, pairs in PAIRS.items():
        for backend in ("reference",) if dry_run else ("cuda", "triton"):
            if dispatch.why_not(operator, backend, device, DTYPE) is not None:
                continue
            # what it is compared with need be compiled once
            kinds = ("eager", "compiled") if backend == "cuda" else ("eager",)
            for kind in kinds:
                with result.part(f"{operator}, {backend}, {kind}"):
                    target = operators.Target(device, backend, "bfloat16", compiled=kind == "compiled")
                    for pair in pairs(target):
                        row: dict[str, Any] = {
                            "operator": operator,
                            "name": pair.name,
                            "backend": backend,
                            "dtype": "bfloat16",
                        }
                        row |= {"what": pair.what, "theirs": kind}
                        row["us"] = microseconds([pair.ours], device, graph=False).median
                        # without a capacity, pack_tokens waits for the number of tokens
                        captured = operator != "pack_tokens"
                        row["graph_us"] = microseconds([pair.ours] * 20, device).median if captured else None
                        row["their_us"] = microseconds([pair.theirs], device, graph=False).median
                        result.data["others"].append(row)
                        result.say(
                            f"{operator}, {pair.name}, {pair.what}: {backend} {row['us']:.1f} µs "
                            f"({row['graph_us'] or 0:.1f} in a graph), PyTorch {kind} {row['their_us']:.1f} µs"
                        )


if __name__ == "__main__":
    main(run, "operator-timing")
