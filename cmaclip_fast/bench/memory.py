"""Peak memory of a training step, each system in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from cmaclip_fast.bench.comparison import Machine, make_optimizer, mode, to_device
from cmaclip_fast.bench.peers import SYSTEMS, Setting
from cmaclip_fast.bench.results import BenchmarkError, Memory
from cmaclip_fast.bench.workloads import Texts, Workload, make_batches, make_model
from cmaclip_fast.training.memory import Meter

MODULE = "cmaclip_fast.bench.memory"


def measure(system: str, workload: Workload, machine: Machine) -> Memory:
    """The second of two training steps, in this process; the first makes the optimizer's state."""
    torch.set_num_threads(machine.threads)
    meter = Meter(machine.device)
    model = make_model(workload.tower).to(machine.device).train()
    batch = to_device(make_batches(model, workload)[0], machine, True)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(model, workload.batch, True, machine.threads, machine.device, machine.dtype, Path(folder))
        found = SYSTEMS[system](setting)
        found.warm(batch)
        optimizer = make_optimizer(found)
        gradients = 0
        for _ in range(2):
            state = meter.reset()
            with mode(machine, True):
                loss = found.loss(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            backward = meter.peak()
            gradients = sum(
                p.grad.nbytes for group in optimizer.param_groups for p in group["params"] if p.grad is not None
            )
            optimizer.step()
            step = meter.peak()
            optimizer.zero_grad()
    return Memory(
        workload.name,
        system,
        SYSTEMS[system].title,
        workload.batch,
        state,
        _above(backward, state),
        _above(step, state),
        gradients,
    )


def _above(peak: int | None, state: int | None) -> int | None:
    return None if peak is None or state is None else peak - state


def measure_apart(system: str, workload: Workload, machine: Machine) -> Memory:
    """`measure` in a process of its own.

    Raises:
        BenchmarkError: the process failed, for want of memory say.
    """
    options = {"system": system, "device": machine.device, "threads": machine.threads}
    options |= {"dtype": str(machine.dtype).removeprefix("torch."), "workload": asdict(workload)}
    # else freed blocks stay in the heap, and the resident size tells of their past
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["OMP_NUM_THREADS"] = str(machine.threads)
    command = [sys.executable, "-m", MODULE, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BenchmarkError(f"memory of '{SYSTEMS[system].title}', {workload.name}: {reason[:300]}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    options = json.loads(sys.argv[1])
    about = options["workload"]
    workload = Workload(about["tower"], Texts(about["texts"]), about["batch"], about["training"])
    machine = Machine(options["device"], getattr(torch, options["dtype"]), options["threads"])
    print(json.dumps(asdict(measure(options["system"], workload, machine))))


if __name__ == "__main__":
    main()
