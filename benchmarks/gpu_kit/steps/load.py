"""Versions, driver and GPU, and whether the extension, built against another PyTorch, loads under this one."""

from __future__ import annotations

import torch

from benchmarks.gpu_kit import tools
from benchmarks.gpu_kit.result import Result, main
from cmaclip_fast import env
from cmaclip_fast.ops import dispatch


def run(result: Result, dry_run: bool) -> None:
    report = env.as_dict()
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm", "--format=csv"]
    result.data |= {
        "env": report,
        "nvidia_smi": tools.output_of(query),
        "tools": {name: tools.find(name) for name in ("nvcc", "ncu", "compute-sanitizer")},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    for line in env.as_text().splitlines():
        result.say(line)
    result.say(result.data["nvidia_smi"].replace("\n", "; ") or "nvidia-smi: not found")
    result.keep()
    built = report["extension"]
    if built["missing"] is not None:
        result.fail(f"the extension does not load: {built['missing']}")
        return
    result.data["abi"] = {"built": built["torch"], "loaded": str(torch.__version__)}
    result.say(f"the extension built against PyTorch {built['torch']} loads under {torch.__version__}")
    for operator in dispatch.OPERATORS:
        for backend in ("cpp",) if dry_run else ("cpp", "cuda"):
            reason = dispatch.why_not(operator, backend, "cpu" if backend == "cpp" else "cuda", torch.float32)
            if reason is not None:
                result.fail(f"{operator} has no {backend}: {reason}")


if __name__ == "__main__":
    main(run, "load")
