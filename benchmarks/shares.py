"""Where the time of one forward pass goes, in the plain implementation and in ours, by PyTorch's profiler.

    python benchmarks/shares.py --batch 8 --threads 1

On one thread the shares of operators add up to the whole.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.profiler import ProfilerActivity, profile

from cmaclip_fast.bench.peers import SYSTEMS, Setting
from cmaclip_fast.bench.workloads import Texts, Workload, make_batches, make_model

KINDS = {
    "products of matrices": r"::(addmm|mm|_addmm_activation|_mkl_linear|_panel_linear_cpp)$",
    "attention": r"attention|softmax|rescale_qkv|::bmm$",
    "copies, the bias of products among them": r"::copy_$",
    "activation, with the bias before it": r"gelu",
    "norms": r"layer_norm",
    "sums": r"::(add_?|_add_branch_cpp)$",
    "patch embedding": r"convolution",
}
"""What the names of a kind's operators match; the first kind that fits has an operator."""


def main(
    tower: Annotated[str, typer.Option(help="An open_clip model.")] = "ViT-B-32",
    batch: Annotated[int, typer.Option(help="Pairs.")] = 8,
    threads: Annotated[int, typer.Option(help="Of PyTorch.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    model = make_model(tower).eval()
    pairs = make_batches(model, Workload(tower, Texts.product, batch, False))[0]
    print(f"{tower}, inference at batch {batch}, product titles, {threads} thread(s)")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        setting = Setting(model, batch, False, threads, "cpu", torch.float32, Path(folder))
        for name in ("plain", "ours"):
            system = SYSTEMS[name](setting)
            for _ in range(2):
                system.logits(pairs)
            with profile(activities=[ProfilerActivity.CPU]) as found:
                system.logits(pairs)
            print(f"\n{system.title}\n\n| | ms | share |\n|---|--:|--:|")
            for kind, milliseconds, share in shares(found):
                print(f"| {kind} | {milliseconds:.1f} | {share:.1%} |")


def shares(found: profile) -> list[tuple[str, float, float]]:
    """Kind, milliseconds and share of the whole, the rest last."""
    times = {event.key: event.self_cpu_time_total / 1e3 for event in found.key_averages()}
    whole = sum(times.values())
    rows = []
    for kind, pattern in KINDS.items():
        rows.append((kind, sum(times.pop(key) for key in list(times) if re.search(pattern, key))))
    rows.append(("all else", sum(times.values())))
    return [(kind, taken, taken / whole) for kind, taken in rows]


if __name__ == "__main__":
    typer.run(main)
