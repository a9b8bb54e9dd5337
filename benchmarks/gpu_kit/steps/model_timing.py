"""Pairs a second, latency and memory of the whole model, with and without CUDA graphs, against the plain padded one."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_kit.result import Result, main
from benchmarks.gpu_kit.timing import Roofs, roofs
from cmaclip_fast.bench import flops
from cmaclip_fast.bench.comparison import Machine, make_optimizer, to_device, training_step
from cmaclip_fast.bench.peers import Setting, System
from cmaclip_fast.bench.peers.ours import Ours
from cmaclip_fast.bench.peers.plain import PlainLongest
from cmaclip_fast.bench.timing import Spread, alternate
from cmaclip_fast.bench.workloads import FUSION_DEPTH, SMALL, Texts, Workload, make_batches, make_model
from cmaclip_fast.classifier.engine import Engine
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch

SECONDS = 0.5
"""Measured time of each system at each batch size."""


class WithoutGraphs(Ours):
    title = "cmaclip_fast, without CUDA graphs"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._run = Engine(setting.model, precision=str(setting.dtype).removeprefix("torch."), graphs=False)


class WholeCompiled(PlainLongest):
    """The whole plain model under `torch.compile`, for one size of batch at a time."""

    title = "plain, torch.compile(mode='max-autotune')"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        torch.compiler.reset()
        self._forward = torch.compile(self._forward, mode="max-autotune", dynamic=False)

    def logits(self, batch: Batch) -> list[Tensor]:
        # its CUDA graphs overwrite their outputs at the next call
        torch.compiler.cudagraph_mark_step_begin()
        return super().logits(batch)


def run(result: Result, dry_run: bool) -> None:
    machine = Machine("cpu", torch.float32, 2) if dry_run else Machine("cuda", torch.bfloat16, torch.get_num_threads())
    towers, batches, trained = ((SMALL,), (1, 2), 2) if dry_run else (("ViT-B-32", "ViT-B-16"), (256, 32, 1, 1024), 256)
    limits = roofs(machine.device)
    result.data |= {"matrix_rate": limits.operations, "inference": [], "training": []}
    seconds, depth = (0.0, 1) if dry_run else (SECONDS, FUSION_DEPTH)
    for tower in towers:
        model = make_model(tower, depth=depth).to(machine.device, machine.dtype).eval()
        for batch in batches:
            workload = Workload(tower, Texts.product, batch)
            given = [to_device(one, machine, False) for one in make_batches(model, workload)]
            for kind in (Ours, WithoutGraphs, PlainLongest):
                with result.part(f"{workload.name}, {kind.title}"):
                    inference(result, kind, model, workload, given, machine, limits, seconds)
        workload = Workload(tower, Texts.product, trained, True)
        model = model.float().train()
        given = [to_device(one, machine, True) for one in make_batches(model, workload)]
        for kind in (Ours, PlainLongest):
            with result.part(f"{workload.name}, {kind.title}"):
                training(result, kind, model, workload, given, machine, limits, seconds)
        del model, given
    if dry_run:
        return
    # last, because its compilation takes longer than all else; what is not reached is not in the tables
    model = make_model(towers[0]).to(machine.device, machine.dtype).eval()
    for batch in batches:
        workload = Workload(towers[0], Texts.product, batch)
        with result.part(f"{workload.name}, {WholeCompiled.title}"):
            # each length of the longest text is compiled anew
            given = [to_device(one, machine, False) for one in make_batches(model, workload)[:1]]
            inference(result, WholeCompiled, model, workload, given, machine, limits, seconds)


def inference(
    result: Result,
    kind: type[System],
    model: CMACLIP,
    workload: Workload,
    batches: list[Batch],
    machine: Machine,
    limits: Roofs,
    seconds: float,
) -> None:
    with system_of(kind, model, workload, machine) as system:
        call = torch.inference_mode()(system.logits)
        row = measure(call, batches, machine, seconds)
    row |= about(kind, workload, batches, row["milliseconds"], flops.useful, model, limits)
    result.data["inference"].append(row)
    result.say(
        f"{workload.name}: {kind.title}: {row['pairs_per_second']:.0f} pairs/s, {row['milliseconds']:.2f} ms, "
        f"{row['useful_share']:.1%} of the matrix rate, {row['peak_mib'] or 0:.0f} MiB"
    )
    result.keep()


def training(
    result: Result,
    kind: type[System],
    model: CMACLIP,
    workload: Workload,
    batches: list[Batch],
    machine: Machine,
    limits: Roofs,
    seconds: float,
) -> None:
    with system_of(kind, model, workload, machine) as system:
        row = measure(training_step(system, make_optimizer(system), machine), batches, machine, seconds)

    def needed(shape: flops.Shape, lengths: list[int]) -> float:
        return flops.training(shape, len(lengths), flops.useful(shape, lengths))

    row |= about(kind, workload, batches, row["milliseconds"], needed, model, limits)
    result.data["training"].append(row)
    result.say(f"{workload.name}: {kind.title}: {row['milliseconds']:.1f} ms a step, {row['peak_mib'] or 0:.0f} MiB")
    result.keep()


@contextlib.contextmanager
def system_of(kind: type[System], model: CMACLIP, workload: Workload, machine: Machine) -> Iterator[System]:
    """A system for one measurement; what it holds on the GPU is given back."""
    with tempfile.TemporaryDirectory() as folder:
        options = workload.batch, workload.training, machine.threads, machine.device, machine.dtype
        system = kind(Setting(model, *options, Path(folder)))
        try:
            yield system
        finally:
            system.close()


def measure(call: Callable[[Batch], Any], batches: list[Batch], machine: Machine, seconds: float) -> dict[str, Any]:
    """Wall time of a call, from its start until the GPU is done; every batch is run before, so graphs are recorded."""
    on_gpu = machine.device == "cuda"
    gc.collect()  # what the last measurement held
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    for batch in (*batches, batches[0]) if on_gpu else batches[:1]:
        call(batch)
    times = alternate(
        {"it": lambda number: call(batches[number % len(batches)])},
        seconds,
        least=5 if on_gpu else 1,
        device=machine.device,
    )["it"]
    spread = Spread.of([time * 1e3 for time in times])
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else None
    return {"milliseconds": spread.median, "p20": spread.p20, "p80": spread.p80, "peak_mib": peak, "runs": len(times)}


def about(
    kind: type[System],
    workload: Workload,
    batches: list[Batch],
    milliseconds: float,
    needed: Callable[[flops.Shape, list[int]], float],
    model: CMACLIP,
    limits: Roofs,
) -> dict[str, Any]:
    shape = flops.Shape.of(model)
    operations = sum(needed(shape, batch.text_lengths.tolist()) for batch in batches) / len(batches)
    rate = operations / milliseconds * 1e3
    return {
        "system": kind.title,
        "tower": workload.tower,
        "batch": workload.batch,
        "pairs_per_second": workload.batch / milliseconds * 1e3,
        "useful_rate": rate,
        "useful_share": rate / limits.operations,
    }


if __name__ == "__main__":
    main(run, "model-timing")
