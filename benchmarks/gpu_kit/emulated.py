"""What the emulator counts for the launches that the step `counters` reads on a GPU: part of building the kit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_kit.launches import COUNTED, KERNELS, Counted
from tests.emulator import emulate
from tests.emulator.attention import Attention

SOURCES = Path(__file__).parents[2] / "tests" / "emulator" / "kernels"


def counts() -> dict[str, list[dict[str, Any]]]:
    """For each counted call, its launches in order."""
    return {counted.name: _launches(counted) for counted in COUNTED}


@functools.cache
def _kernels(name: str, *flags: str) -> emulate.Kernels:
    return emulate.Kernels(SOURCES / f"{name}.cpp", flags=flags)


class _InOrder(Attention):
    """Keeps every launch; `plan` runs three times."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.launches: list[tuple[str, emulate.Report]] = []

    def _launch(self, kernel: str, *arguments: Any, **options: Any) -> None:
        super()._launch(kernel, *arguments, **options)
        self.launches.append((kernel, self.reports[kernel]))


def _launches(counted: Counted) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    tensors = counted.case().tensors(counted.dtype)
    lengths = list(counted.queries), list(counted.keys)
    call = _InOrder(_kernels, *(tensors[name] for name in "qkv"), *lengths, counted.causal, orders=emulate.ORDERS[:1])
    out, lse = call.forward()
    call.backward(torch.randn(out.shape).to(out.dtype), None, out, lse)
    assert tuple(name for name, _ in call.launches) == KERNELS
    return [
        {
            "kernel": name,
            "l1_sectors": report.counts.sectors,
            "least_dram_bytes": 32
            * (report.instructions["distinct_sectors_read"] + report.instructions["distinct_sectors_written"]),
            "bank_conflicts": report.counts.bank_conflicts,
            "tensor_core": sum(n for key, n in report.instructions.items() if key.startswith("mma_")),
        }
        for name, report in call.launches
    ]


if __name__ == "__main__":
    print(json.dumps(counts()))
