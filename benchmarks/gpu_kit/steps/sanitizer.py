"""compute-sanitizer's memcheck and racecheck over a small set of operator calls."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_kit import tools
from benchmarks.gpu_kit.result import Result, main

TOOLS = ("memcheck", "racecheck")
OURS = ("--kernel-name", "kns=cmaclip")
"""Kernels with this in their mangled name; others are not ours to check, and slow to."""


def run(result: Result, dry_run: bool) -> None:
    calls = [sys.executable, "-m", "benchmarks.gpu_kit.launches"]
    if dry_run:
        done = subprocess.run([*calls, "--device", "cpu", "--backend", "reference"], capture_output=True, text=True)
        result.say(f"without the sanitizer, on the CPU: {done.stdout.strip() or done.stderr[-500:]}")
        if done.returncode != 0:
            result.fail("the calls do not run")
        return
    sanitizer = tools.find("compute-sanitizer")
    if sanitizer is None:
        result.fail("compute-sanitizer is not on this machine")
        return
    # allocations of their own, so that an access past the end of a tensor is one past the end of its memory
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUDA_MODULE_LOADING": "LAZY"}
    with tempfile.TemporaryDirectory() as folder:
        logs = {tool: Path(folder, tool) for tool in TOOLS}
        started = {}
        for tool in TOOLS:
            command = [sanitizer, "--tool", tool, *OURS, "--print-limit", "20", *calls]
            with logs[tool].open("w") as log:
                started[tool] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        for tool, process in started.items():
            process.wait()
            text = logs[tool].read_text(errors="replace")
            errors = tools.sanitizer_errors(text)
            result.data[tool] = {"errors": errors, "ran": "calls ran" in text, "log": text[-20000:]}
            if errors is None or "calls ran" not in text:
                result.fail(f"{tool} has not come to its end: {text[-400:].strip()}")
            elif errors:
                result.fail(f"{tool}: {errors} errors")
            else:
                result.say(f"{tool}: no errors")
            result.keep()


if __name__ == "__main__":
    main(run, "sanitizer")
