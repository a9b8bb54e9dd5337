"""Every operator on a GPU, on each backend, judged like on the CPU; CUDA graphs, streams, and the second device."""

from __future__ import annotations

import pytest
import torch
import triton
from support import (
    Case,
    check,
    modality_pool_case,
    multitask_cross_entropy_case,
    pack_tokens_case,
    packed_attention_case,
    spread,
)

from cmaclip_fast import ops
from cmaclip_fast.ops import available_backends

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nan_filled")]

CASES = {
    "modality_pool, small": lambda: modality_pool_case(3, 2, 7, 5),
    "modality_pool, shared": lambda: modality_pool_case(65, 2, 512, 3, shared=True),
    "modality_pool, many tasks": lambda: modality_pool_case(9, 8, 768, 1024),
    "modality_pool, wide": lambda: modality_pool_case(2, 8, 20_001, 3),
    "pack_tokens": lambda: pack_tokens_case(64, 77, 50, 512),
    "pack_tokens, odd": lambda: pack_tokens_case(5, 7, 3, 33, typed=False, spare=4),
    "pack_tokens, long rows": lambda: pack_tokens_case(2, 300, 50, 40),
    "pack_tokens, spare capacity": lambda: pack_tokens_case(2, 5, 4, 64, spare=99),
    "pack_tokens, shared tokens": lambda: pack_tokens_case(300, 77, 50, 64, shared=True),
    "packed_attention": lambda: packed_attention_case([127, 1, 0, 60, 93], heads=8, size=64),
    "packed_attention, two queries": lambda: packed_attention_case([2] * 4, [127, 60, 3, 2], heads=8, size=64),
    "packed_attention, causal": lambda: packed_attention_case([33, 300], heads=3, size=96, causal=True),
    "multitask_cross_entropy": lambda: multitask_cross_entropy_case(64, [19, 61, 12], True, 0.1),
    "multitask_cross_entropy, many classes": lambda: multitask_cross_entropy_case(9, [100_000]),
    "multitask_cross_entropy, odd": lambda: multitask_cross_entropy_case(9, [5001, 2], True, 0.1),
    "multitask_cross_entropy, many tasks": lambda: multitask_cross_entropy_case(3, [40] * 600, True),
}


def case_of(name: str, backend: str) -> Case:
    case = CASES[name]()
    reason = available_backends("cuda", case.operator)[backend]
    if reason is not None:
        pytest.skip(f"{backend} cannot run {case.operator}: {reason}")
    if backend == "triton" and triton.knobs.runtime.interpret:
        pytest.skip("Triton is in its interpreter; set TRITON_INTERPRET=0")
    return case


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, dtype, backend):
    check(case_of(name, backend), backend, dtype, "cuda")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", CASES)
def test_strided_inputs(name, backend):
    check(case_of(name, backend), backend, torch.float32, "cuda", transform=spread)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize(
    "name", ["modality_pool, small", "pack_tokens, odd", "packed_attention", "multitask_cross_entropy"]
)
def test_cuda_graph(name, backend):
    case = case_of(name, backend)
    arguments = case.tensors(torch.float32, "cuda")
    operator = getattr(ops, case.operator)

    def run():
        output = operator(**arguments, backend=backend)
        return output if isinstance(output, torch.Tensor) else output[0]

    run()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    changed = case.tensors(torch.float32, "cuda")
    for key, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.copy_(changed[key] * 2)
    graph.replay()
    torch.testing.assert_close(captured, run())


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", ["modality_pool, small", "pack_tokens", "packed_attention", "multitask_cross_entropy"])
def test_second_device(name, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    check(case_of(name, backend), backend, torch.float32, "cuda:1")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_label_past_the_last_class(backend):
    """No error without waiting for the device, and no read past the row: the task's loss is NaN."""
    arguments = case_of("multitask_cross_entropy", backend).tensors(torch.float32, "cuda")
    arguments["labels"][5, 1] = 61
    loss = ops.multitask_cross_entropy(**arguments, backend=backend)
    assert loss.isnan().tolist() == [False, True, False]
