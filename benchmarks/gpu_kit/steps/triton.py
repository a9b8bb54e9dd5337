"""Which configuration Triton's autotuner chose for each class of shapes, in this step and in earlier ones."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import InterpreterError

from benchmarks.gpu_kit.result import Result, main
from tests.ops.support import packed_attention_case

KERNELS = ("forward_kernel", "grad_q_kernel", "grad_kv_kernel")
LENGTHS = ((127, 127), (2, 127))
"""The longest row's queries and keys."""


def run(result: Result, dry_run: bool) -> None:
    device, dtype, rows, heads = ("cpu", torch.float32, 1, 1) if dry_run else ("cuda", torch.bfloat16, 64, 8)
    for queries, keys in LENGTHS[1:] if dry_run else LENGTHS:
        case = packed_attention_case([queries] * rows, [keys] * rows, heads=heads, size=64)
        try:
            case.run("triton", dtype, device)
        except InterpreterError as error:  # that of Triton 3.6 does not run on NumPy 2.4
            result.say(f"Triton's interpreter does not run here: {error}")
            return
        # the interpreter keeps nothing on disk
        result.data["chosen"] = in_this_process() if dry_run else on_disk(Path(os.environ["TRITON_CACHE_DIR"]))
        result.keep()
    for row in result.data["chosen"]:
        result.say(f"{row['kernel']} [{row['key']}]: {row['configuration']}")
    if not result.data["chosen"]:
        result.fail("no configuration was found")


def on_disk(cache: Path) -> list[dict[str, str]]:
    """What every process that shares this cache has tuned: head size, causal, longest queries and keys, dtypes."""
    rows = []
    for path in sorted(cache.rglob("*.autotune.json")):
        name = path.name.removesuffix(".autotune.json")
        if name in KERNELS:
            tuned = json.loads(path.read_text())
            best = min(tuned["configs_timings"], key=lambda pair: pair[1])[0]
            options = best["kwargs"] | {key: best[key] for key in ("num_warps", "num_stages")}
            rows.append(_row(name, tuned["key"], ", ".join(f"{key} {value}" for key, value in options.items())))
    return sorted(rows, key=lambda row: (KERNELS.index(row["kernel"]), row["key"]))


def in_this_process() -> list[dict[str, str]]:
    kernels = importlib.import_module("cmaclip_fast.kernels.packed_attention")
    return [_row(name, key, str(best)) for name in KERNELS for key, best in getattr(kernels, name).cache.items()]


def _row(kernel: str, key: Any, configuration: str) -> dict[str, str]:
    # four values, then the dtype of every tensor: q is the first, or the second after the gradient of the output
    return {"kernel": kernel, "key": ", ".join(map(str, key[:5])), "configuration": configuration}


if __name__ == "__main__":
    main(run, "triton")
