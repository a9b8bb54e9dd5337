"""A small set of operator calls, for tools that watch a whole process: `python -m benchmarks.gpu_kit.launches`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cmaclip_fast.ops import dispatch
from tests.ops.support import (
    Case,
    modality_pool_case,
    multitask_binary_cross_entropy_case,
    multitask_cross_entropy_case,
    pack_tokens_case,
    packed_attention_case,
)


@dataclass(frozen=True)
class Counted:
    """A call of `packed_attention` whose launches are counted on a GPU and in the emulator."""

    name: str
    queries: Sequence[int]
    keys: Sequence[int]
    heads: int = 2
    size: int = 64
    causal: bool = False
    dtype: torch.dtype = torch.float16

    def case(self) -> Case:
        case = packed_attention_case(self.queries, self.keys, self.heads, self.size, self.causal)
        case.without_gradient = (1,)
        return case


COUNTED = (
    Counted("fusion, rows of 5 to 127 tokens", (127, 70, 33, 5), (127, 70, 33, 5)),
    Counted("fusion's last layer, 2 queries", (2, 2, 2, 2), (127, 70, 33, 5)),
    Counted("text, causal", (77, 20), (77, 20), causal=True),
)
KERNELS = ("plan", "forward", "backward_delta", "plan", "backward_q", "plan", "backward_kv")
"""The launches of a forward and a backward, in order."""

CASES: dict[str, Callable[[], Case]] = {
    "attention": lambda: packed_attention_case([70, 0, 5, 127], heads=2, size=64),
    "attention, two queries": lambda: packed_attention_case([2, 2, 2], [127, 60, 3], heads=2, size=80),
    "attention, causal": lambda: packed_attention_case([20, 77], heads=2, size=64, causal=True, spare=3),
    "pool": lambda: modality_pool_case(65, 2, 512, 3),
    "pack": lambda: pack_tokens_case(8, 77, 50, 512, spare=9),
    "loss": lambda: multitask_cross_entropy_case(32, [19, 61, 12], True, 0.1),
    "loss, many classes": lambda: multitask_cross_entropy_case(3, [5001], True, 0.1),
    "binary loss": lambda: multitask_binary_cross_entropy_case(32, [19, 61, 12], True, 1.0, 4.0, 0.05),
}
DTYPES = (torch.float16, torch.float32)


def run(device: str, backend: str, only: str) -> int:
    """Run forward and backward of each call once; the number of calls."""
    torch.manual_seed(0)
    if only == "counted":
        calls = [(counted.case(), counted.dtype) for counted in COUNTED]
    else:
        calls = [(CASES[name](), dtype) for name in CASES if only in name for dtype in DTYPES]
    done = 0
    for case, dtype in calls:
        if dispatch.why_not(case.operator, backend, device, dtype) is None:
            case.run(backend, dtype, device)
            done += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--only", default="", help="calls with this in their name, or `counted`")
    options = parser.parse_args()
    print(f"{run(options.device, options.backend, options.only)} calls ran")


if __name__ == "__main__":
    main()
