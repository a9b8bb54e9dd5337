"""Installs the kit's wheels into a temporary folder and runs its steps. Imports nothing but the standard library.

`run.sh` starts it. Each step is a process of its own under a time limit, so that one that fails, hangs or crashes does
not keep the next from running; its result file is written while it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_kit.result import FAILED, MOST_BYTES, NOT_RUN, RUNNING, TIMED_OUT, Result, read, write

KIT = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 475.0
LEAST_SECONDS = 3.0
INSTALL_SECONDS = 30
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Step:
    """A module to run, and the most seconds that it may take."""

    name: str
    seconds: int
    what: str
    module: str = ""

    @property
    def runs(self) -> str:
        return self.module or f"benchmarks.gpu_kit.steps.{self.name.replace('-', '_')}"


STEPS = (
    Step("load", 20, "versions, the GPU, and whether the extension loads under this PyTorch"),
    Step("operators", 90, "every operator on every GPU backend against float64 on the CPU"),
    Step("model", 50, "the whole model on the GPU against the CPU, and twenty training steps"),
    Step("operator-timing", 85, "packed_attention and the other operators against what PyTorch offers"),
    Step("model-timing", 115, "pairs a second, latency and memory against the plain padded model"),
    Step("sanitizer", 45, "compute-sanitizer over a small set of operator calls"),
    Step("counters", 25, "hardware counters of the attention kernels beside the emulator's"),
    Step("triton", 15, "which configuration the autotuner chose for each class of shapes"),
)
"""The most valuable first; with the installation their limits add up to less than eight minutes."""


def run_steps(steps: Sequence[Step], output: Path, environment: dict[str, str], dry_run: bool, until: float) -> bool:
    """Run the steps in turn until `time.monotonic()` is `until`; True if all passed.

    What a step leaves of its time goes to the later ones.
    """
    passed, saved = True, 0.0
    paths = {step: output / f"{step.name}.json" for step in steps}
    for path in paths.values():  # what an earlier run left would pass for this one's
        path.unlink(missing_ok=True)
    for step, path in paths.items():
        left = until - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"{step.name}: not run: no time is left", flush=True)
            Result(path, step.name, dry_run).keep(NOT_RUN)
            passed = False
            continue
        begin = time.monotonic()
        limit = min(step.seconds + saved, left)
        print(f"{step.name} (at most {limit:.0f} s): {step.what}", flush=True)
        passed &= _run(step, path, environment, dry_run, limit)
        saved = max(0.0, saved + step.seconds - (time.monotonic() - begin))
    return passed


def _run(step: Step, path: Path, environment: dict[str, str], dry_run: bool, limit: float) -> bool:
    command = [sys.executable, "-m", step.runs, str(path), *(["--dry-run"] if dry_run else [])]
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        # a session of its own, so that what it has started ends with it
        process = subprocess.Popen(command, env=environment, cwd=KIT, stderr=said, start_new_session=True)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        said.seek(0)
        tail = said.read()[-4000:]
    record = read(path) if path.exists() else Result(path, step.name, dry_run).record
    if record["status"] == RUNNING:  # it has not come to its own end
        timed_out = status is None
        reason = f"stopped after {limit:.0f} s" if timed_out else f"ended with exit status {status}"
        record |= {"status": TIMED_OUT if timed_out else FAILED, "seconds": round(time.monotonic() - begin, 1)}
        record["failures"].append(f"{reason}: {tail[-1500:].strip()}")
        write(path, record)
    if record["failures"]:
        print("\n".join(f"    {line}" for line in tail.splitlines()[-12:]))
    print(f"{step.name}: {record['status']} after {record['seconds']:.0f} s", flush=True)
    if path.stat().st_size > MOST_BYTES:
        print(f"{path}: more than {MOST_BYTES >> 20} MiB", flush=True)
    return bool(record["status"] == "passed")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and all that it has started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            break
        # what the driver holds may not end even then; the next step runs all the same
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def fitting_wheels() -> tuple[list[Path], list[Path]]:
    """The kit's wheels that this Python takes, and those that it does not."""
    from pip._vendor.packaging import tags, utils

    here = set(tags.sys_tags())
    wheels = sorted((KIT / "wheels").glob("*.whl"))
    fit = [wheel for wheel in wheels if here & utils.parse_wheel_filename(wheel.name)[3]]
    return fit, [wheel for wheel in wheels if wheel not in fit]


def install(target: Path) -> None:
    fit, left_out = fitting_wheels()
    for wheel in left_out:
        print(f"left out: {wheel.name} is for another Python; the installed package is used")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--root-user-action=ignore", "--target", str(target)]
    subprocess.run([*command, *map(str, fit)], check=True, timeout=INSTALL_SECONDS * 4)


def environment_of(site: Path, work: Path, dry_run: bool) -> dict[str, str]:
    """The steps share Triton's and Inductor's caches, so that nothing is compiled or tuned twice."""
    caches = {
        "TRITON_CACHE_DIR": "triton",
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "HF_HOME": "hf",
        "MPLCONFIGDIR": "mpl",
    }
    return {
        **os.environ,
        **{name: str(work / folder) for name, folder in caches.items()},
        "PYTHONPATH": os.pathsep.join([str(site), str(KIT)]),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRITON_INTERPRET": "1" if dry_run else "0",
    }


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(prog="run.sh", description="Proves and times cmaclip_fast on this machine's GPU.")
    names = [step.name for step in STEPS]
    parser.add_argument("output", nargs="?", type=Path, default=Path("gpu-results"), help="folder of the result files")
    parser.add_argument("--list", action="store_true", help="list the steps and their limits")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help="run this step (may be repeated)"
    )
    parser.add_argument("--dry-run", action="store_true", help="go through every step on the CPU, with tiny sizes")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{step.name:<16} {step.seconds:>4} s  {step.what}" for step in STEPS))
        return
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(f"{sys.executable} has no PyTorch: set PYTHON to one that has")
    if not options.dry_run and not has_gpu():
        print("not run: no GPU")
        return
    steps = [step for step in STEPS if not options.only or step.name in options.only]
    options.output.mkdir(parents=True, exist_ok=True)
    # so that a run that is asked to stop ends its step too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gpu-kit-", ignore_cleanup_errors=True) as folder:
        site, work = Path(folder, "site"), Path(folder, "work")
        work.mkdir()
        install(site)
        environment = environment_of(site, work, options.dry_run)
        passed = run_steps(steps, options.output.resolve(), environment, options.dry_run, until=begin + TOTAL_SECONDS)
    print(f"results are in {options.output}")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
