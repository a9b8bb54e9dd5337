"""Hardware counters of the attention kernels, by ncu, beside what the emulator counts for the same launches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_kit import tools
from benchmarks.gpu_kit.launches import COUNTED, KERNELS
from benchmarks.gpu_kit.result import Result, main

L1 = "l1tex__t_sectors_pipe_lsu_mem_global_op_"
METRICS: dict[str, tuple[str, ...]] = {
    "dram_bytes": ("dram__bytes_read.sum", "dram__bytes_write.sum"),
    "l2_sectors": ("lts__t_sectors.sum",),
    "l1_sectors": (f"{L1}ld.sum", f"{L1}st.sum", f"{L1}ldgsts.sum"),
    "bank_conflicts": ("l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",),
    "tensor_core": ("sm__inst_executed_pipe_tensor_op_hmma.sum",),
}
"""Counts, and the metrics whose sum each is."""
EVERYWHERE = ("dram_bytes", "l2_sectors", "bank_conflicts")
NAMES = "regex:^(plan|forward|backward|backward_delta)$"
EMULATED = Path(__file__).resolve().parents[3] / "emulated.json"


def run(result: Result, dry_run: bool) -> None:
    emulated = json.loads(EMULATED.read_text(encoding="utf-8")) if EMULATED.exists() else {}
    result.data["emulated"] = emulated
    calls = [sys.executable, "-m", "benchmarks.gpu_kit.launches", "--only", "counted"]
    if dry_run:
        done = subprocess.run([*calls, "--device", "cpu", "--backend", "reference"], capture_output=True, text=True)
        result.say(f"without ncu, on the CPU: {done.stdout.strip() or done.stderr[-500:]}")
        result.data["launches"] = compare([{"kernel": kernel} for _ in COUNTED for kernel in KERNELS], emulated)
        if done.returncode != 0:
            result.fail("the calls do not run")
        return
    ncu = tools.find("ncu")
    if ncu is None:
        result.fail("ncu is not on this machine")
        return
    launches: list[dict[str, str]] = []
    # a metric that this chip lacks can make ncu refuse all: then those that every chip has
    for chosen in (METRICS, EVERYWHERE):
        launches = launches or profile(ncu, calls, [metric for name in chosen for metric in METRICS[name]], result)
    if len(launches) != len(COUNTED) * len(KERNELS):
        result.fail(f"ncu saw {len(launches)} launches, not {len(COUNTED) * len(KERNELS)}")
        return
    result.data["launches"] = compare(launches, emulated)
    for row in result.data["launches"]:
        pairs = [f"{name} {row[name]} / {row['emulator'].get(name)}" for name in METRICS if name in row["emulator"]]
        result.say(f"{row['call']}: {row['kernel']}: GPU / emulator: {', '.join(pairs)}")


def profile(ncu: str, calls: list[str], metrics: list[str], result: Result) -> list[dict[str, str]]:
    command = [ncu, "--clock-control", "none", "--kernel-name", NAMES, "--metrics", ",".join(metrics), "--csv"]
    command += ["--page", "raw", "--print-units", "base", *calls]
    done = subprocess.run(command, capture_output=True, text=True)
    found = tools.ncu_launches(done.stdout)
    if not found:
        result.say(f"ncu gave nothing for {', '.join(metrics)}: {(done.stdout + done.stderr)[-300:].strip()}")
    return found


def compare(launches: list[dict[str, str]], emulated: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each launch, in order: the GPU's counts, and the emulator's."""
    rows = []
    for index, launch in enumerate(launches):
        call, kernel = COUNTED[index // len(KERNELS)].name, KERNELS[index % len(KERNELS)]
        row: dict[str, Any] = {"call": call, "kernel": kernel, "name": launch.get("kernel", "")}
        for name, metrics in METRICS.items():
            values = [value for metric in metrics if (value := tools.number(launch.get(metric))) is not None]
            row[name] = sum(values) if values else None
        row["emulator"] = emulated[call][index % len(KERNELS)] if call in emulated else {}
        rows.append(row)
    return rows


if __name__ == "__main__":
    main(run, "counters")
