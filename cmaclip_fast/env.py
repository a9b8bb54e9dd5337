"""What this machine can run, and why not: the report of `cmaclip env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from typing import Any

import torch

from cmaclip_fast.ops import dispatch, preferences

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "amx")
_PACKAGES = ("cmaclip_fast", "torch", "torchvision", "triton", "open_clip_torch")


def as_dict() -> dict[str, Any]:
    """Everything that `cmaclip env` says, ready for JSON.

    `backends` maps each backend to None where it is usable on this machine, else to the reason why it is not;
    `operators` to the operators that it has here.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "processor": processor(),
        "gpus": gpus(),
        "compiler": compiler(),
        "cuda_toolkit": cuda_toolkit(),
        "extension": extension(),
        "backends": backends(),
        "operators": operators(),
        "auto_on_gpu": auto_on_gpu(),
    }


def as_text() -> str:
    """The same as aligned lines for a terminal."""
    report = as_dict()
    processor_, extension_ = report["processor"], report["extension"]
    lines = [
        ("Python", f"{report['python']} on {report['platform']}"),
        *((name, version or "not installed") for name, version in report["packages"].items()),
        (
            "processor",
            f"{processor_['name']}, {processor_['cores']} cores, {processor_['threads']} threads used,"
            f" instruction set {processor_['instruction_set'] or 'unknown (no extension)'}",
        ),
        ("GPUs", "; ".join(f"{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['capability']}" for gpu in report["gpus"])),
        ("C++ compiler", report["compiler"] or "none found"),
        ("CUDA toolkit", report["cuda_toolkit"] or "none found"),
        ("extension", _extension_line(extension_)),
        *(
            ("backend " + name, reason or f"usable for {', '.join(report['operators'][name])}")
            for name, reason in report["backends"].items()
        ),
        ("auto on a GPU", report["auto_on_gpu"]),
    ]
    return "\n".join(f"{label:<20} {value or 'none'}" for label, value in lines)


def backends() -> dict[str, str | None]:
    """For each backend None if it is usable on this machine's best device, else the reason why it is not.

    `reference` and `cpp` are asked about tensors on the CPU, the others about tensors on a GPU; each about an operator
    that it has.
    """
    return {name: _why_not(_operator_of(name), name) for name in dispatch.BACKENDS}


def operators() -> dict[str, list[str]]:
    """For each backend the operators that it can run on this machine."""
    return {
        name: [operator for operator in dispatch.OPERATORS if _why_not(operator, name) is None]
        for name in dispatch.BACKENDS
    }


def auto_on_gpu() -> str:
    """How `auto` chooses among the backends on this machine's first GPU, or on any GPU where there is none."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return preferences.explanation(preferences.architecture(device))


def _operator_of(backend: str) -> str:
    return "packed_attention" if backend == "torch" else "modality_pool"


def _why_not(operator: str, backend: str) -> str | None:
    device = "cpu" if backend in ("reference", "cpp") else "cuda"
    reason = dispatch.why_not(operator, backend, device, dispatch.usual_dtype(backend))
    if reason is None and backend == "triton" and not torch.cuda.is_available():
        return dispatch.why_not(operator, backend, "cpu", torch.float32)
    return reason


def processor() -> dict[str, Any]:
    """Name, cores, threads that PyTorch uses, and the instruction set of the `cpp` backend (None without it)."""
    found = None
    if dispatch.extension_missing() is None:
        found = INSTRUCTION_SETS[torch.ops.cmaclip._isa()]
    return {
        "name": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": found,
    }


def gpus() -> list[dict[str, Any]]:
    """Name, memory in GiB and compute capability of each NVIDIA GPU that PyTorch sees."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1), "capability": f"sm_{gpu.major}{gpu.minor}"}
        for gpu in found
    ]


def compiler() -> str | None:
    """The first line of the C++ compiler's version (`CXX`, else `c++`), or None."""
    return _first_line([*shlex.split(os.environ.get("CXX") or "c++"), "--version"])


def cuda_toolkit() -> str | None:
    """The release line of the CUDA compiler (`CUDA_HOME`, else `nvcc` on PATH), or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    output = _output([nvcc, "--version"])
    return next((line.strip() for line in output.splitlines() if "release" in line), None)


def extension() -> dict[str, Any]:
    """How the installed extension was built, and whether it loads: `missing` is None or the reason."""
    record: dict[str, Any] = {"missing": dispatch.extension_missing()}
    try:
        from cmaclip_fast import _build
    except ImportError:
        return record
    return record | {name.lower(): value for name, value in vars(_build).items() if name.isupper()}


def _extension_line(record: dict[str, Any]) -> str:
    if record["missing"] is not None:
        return f"missing: {record['missing']}"
    if not record["cuda"]:
        return f"loaded; no CUDA: {record['cuda_reason']}"
    return f"loaded; CUDA for {record['architectures']}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _first_line(command: list[str]) -> str | None:
    return _output(command).partition("\n")[0] or None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
