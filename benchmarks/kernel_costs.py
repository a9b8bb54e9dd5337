"""What the CUDA kernels cost at the model's shapes, counted in the emulator."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.emulator import attention, emulate
from tests.emulator.arrays import ends
from tests.emulator.attention import Attention
from tests.emulator.binary_loss import BinaryLoss
from tests.emulator.loss import Loss
from tests.emulator.packing import Packing
from tests.emulator.pool import Pool

ROOT = Path(__file__).parents[1]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

BATCH, WIDTH = 32, 512

ORDER = emulate.ORDERS[:1]

SECTOR = 32


@dataclass(frozen=True)
class GPU:
    """Bytes and operations a second as NVIDIA's data sheets state them, without sparsity."""

    name: str
    bandwidth: float
    rates: dict[str, float]


GPUS = (
    GPU("A100", 2039e9, {"fp16": 312e12, "tf32": 156e12, "vector": 19.5e12}),
    GPU("H100", 3350e9, {"fp16": 989.4e12, "tf32": 494.7e12, "vector": 66.9e12}),
)


@dataclass(frozen=True)
class Cost:
    """One launch in the emulator. `times` such launches are the shape's: a launch of one row and one head of many."""

    operator: str
    shape: str
    dtype: str
    kernel: str
    report: emulate.Report
    operations: float = 0
    unit: str = "vector"
    times: int = 1
    fewest: tuple[float, int] | None = None

    @property
    def tensor_core(self) -> int:
        return sum(n for name, n in self.report.instructions.items() if name.startswith("mma_"))

    @property
    def bytes(self) -> int:
        counts = self.report.instructions
        return SECTOR * self.times * (counts["distinct_sectors_read"] + counts["distinct_sectors_written"])

    def seconds(self, gpu: GPU) -> float:
        return max(self.bytes / gpu.bandwidth, self.operations * self.times / gpu.rates[self.unit])

    def bound_by_memory(self, gpu: GPU) -> bool:
        return self.seconds(gpu) == self.bytes / gpu.bandwidth


@functools.cache
def kernels(name: str, *flags: str) -> emulate.Kernels:
    return emulate.Kernels(ROOT / "tests" / "emulator" / "kernels" / f"{name}.cpp", flags=flags)


@dataclass(frozen=True)
class Row:
    """The lengths of one row of a packed batch, as the model has them."""

    name: str
    queries: int
    keys: int
    heads: int
    causal: bool = False
    dtype: str = "fp16"


ROWS = (
    Row("ViT-B/16, 197 tokens", 197, 197, 12),
    Row("ViT-B/16, 197 tokens", 197, 197, 12, dtype="fp32"),
    Row("ViT-B/32, 50 tokens", 50, 50, 12),
    Row("text, 77 tokens, causal", 77, 77, 12, causal=True),
    Row("fusion, 50 patches and 77 tokens", 127, 127, 8),
    Row("fusion, 50 patches and 20 tokens", 70, 70, 8),
    Row("fusion's last layer, 2 queries", 2, 127, 8),
)


def attention_costs(row: Row) -> Iterator[Cost]:
    """One row and one head: others do the same, on other memory. Only `plan` takes the whole batch."""
    dtype, size = DTYPES[row.dtype], 64
    q, k, v, grad = (torch.randn(n, 1, size).to(dtype) for n in (row.queries, row.keys, row.keys, row.queries))
    lengths = [row.queries], [row.keys]
    call = Attention(kernels, q, k, v, *lengths, row.causal, orders=ORDER)
    call.backward(grad, None, *call.forward())
    pairs = sum(attention.seen("forward", row.queries, row.keys, row.causal))
    for kernel, report in call.reports.items():
        if kernel == "plan":
            continue
        cost = functools.partial(Cost, "packed_attention", row.name, row.dtype, kernel, report)
        times = BATCH * row.heads
        if kernel == "backward_delta":
            yield cost(operations=2 * row.queries * size, times=times)
            continue
        fewest = attention.fewest_instructions(
            kernel, dtype, queries=row.queries, keys=row.keys, size=size, causal=row.causal
        )
        unit = "tf32" if dtype == torch.float32 else "fp16"
        # A tensor-core instruction multiplies and adds [16, depth] and [depth, 8].
        operations = fewest[0] * 2 * 16 * 8 * attention.depth_of(dtype)
        assert unit == "tf32" or operations == 2 * size * pairs * sum(attention.PRODUCTS[kernel])
        yield cost(operations=operations, unit=unit, times=times, fewest=fewest)


def plan_costs(row: Row) -> Iterator[Cost]:
    q, k = (torch.zeros(BATCH * n, 1, 32, dtype=torch.float16) for n in (row.queries, row.keys))
    call = Attention(kernels, q, k, k, [row.queries] * BATCH, [row.keys] * BATCH, orders=ORDER)
    call.plan(len(q), attention.MOST_WARPS, call.ends_q, call.ends_k)
    yield Cost("packed_attention", f"{BATCH} rows of {row.queries} tokens", "int32", "plan", call.reports["plan"])


def pool_costs(tasks: int, dtype: str = "fp16") -> Iterator[Cost]:
    modalities = 2
    kind = DTYPES[dtype]
    embeddings, weight = torch.randn(BATCH, modalities, WIDTH).to(kind), torch.randn(tasks, modalities, WIDTH).to(kind)
    pool = Pool(
        kernels("modality_pool"), embeddings, weight, torch.ones(BATCH, modalities, dtype=torch.bool), orders=ORDER
    )
    pooled, weights = pool.forward()
    pool.backward(torch.randn(pooled.shape).to(kind), None, weights)
    # Products over the width: scores and sum; scores; two sums; one sum.
    products = {"forward": 2, "backward_scores": 1, "backward_embeddings": 2, "backward_weight": 1}
    for kernel, report in pool.reports.items():
        operations = 2 * BATCH * modalities * tasks * WIDTH * products[kernel]
        yield Cost("modality_pool", f"{tasks} tasks", dtype, kernel, report, operations)


def pack_costs(length: int, patches: int, dtype: str = "fp16") -> Iterator[Cost]:
    kind = DTYPES[dtype]
    text, image = (torch.randn(BATCH * n, WIDTH).to(kind) for n in (length, patches))
    counts = torch.tensor([[length, patches]] * BATCH, dtype=torch.int32)
    starts = counts.cumsum(0, dtype=torch.int32) - counts
    packing = Packing(kernels("pack_tokens"), text, image, starts, counts, orders=ORDER)
    packed, ends = packing.forward(torch.randn(2, WIDTH).to(kind), None)
    packing.backward(torch.randn(packed.shape).to(kind), ends)
    for kernel, report in packing.reports.items():
        yield Cost("pack_tokens", f"{patches} patches and {length} tokens", dtype, kernel, report)


def loss_costs(name: str, classes: list[int], dtype: str = "fp16") -> Iterator[Cost]:
    logits = torch.randn(BATCH, sum(classes)).to(DTYPES[dtype])
    labels = torch.zeros(BATCH, len(classes), dtype=torch.int64)
    loss = Loss(kernels("multitask_cross_entropy"), logits, labels, ends(classes), smoothing=0.1, orders=ORDER)
    _, lse, weight_sum = loss.forward()
    loss.backward(torch.ones(len(classes)), lse, weight_sum)
    for kernel, report in loss.reports.items():
        shown = kernel if kernel.startswith("add_") else f"{kernel}_{loss.plan}"
        yield Cost("multitask_cross_entropy", name, dtype, shown, report)


def binary_loss_costs(name: str, classes: list[int], dtype: str = "fp16") -> Iterator[Cost]:
    logits = torch.randn(BATCH, sum(classes)).to(DTYPES[dtype])
    targets = torch.ones(logits.shape, dtype=torch.int8)
    operator = "multitask_binary_cross_entropy"
    loss = BinaryLoss(kernels(operator), logits, targets, ends(classes), options=(1.0, 4.0, 0.05), orders=ORDER)
    _, weight_sum = loss.forward()
    loss.backward(torch.ones(len(classes)), weight_sum)
    for kernel, report in loss.reports.items():
        yield Cost(operator, name, dtype, kernel, report)
