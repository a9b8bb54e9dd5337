"""Every operator on a GPU, on each backend, judged like on the CPU; CUDA graphs, streams, and the second device."""

from __future__ import annotations

import pytest
import torch
import triton
from support import (
    Case,
    check,
    modality_pool_case,
    multitask_binary_cross_entropy_case,
    multitask_cross_entropy_case,
    pack_tokens_case,
    packed_attention_case,
    spread,
)

from cmaclip_fast import ops
from cmaclip_fast.ops import dispatch

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
    "packed_attention, size 80": lambda: packed_attention_case([70, 5, 20], heads=2, size=80),
    "packed_attention, unlike lengths, causal": lambda: packed_attention_case([9, 40], [70, 3], size=64, causal=True),
    "packed_attention, keys missing, tokens after the last row": lambda: packed_attention_case(
        [2, 3, 0], [5, 0, 4], size=64, spare=5
    ),
    "multitask_cross_entropy": lambda: multitask_cross_entropy_case(64, [19, 61, 12], True, 0.1),
    "multitask_cross_entropy, many classes": lambda: multitask_cross_entropy_case(9, [100_000]),
    "multitask_cross_entropy, odd": lambda: multitask_cross_entropy_case(9, [5001, 2], True, 0.1),
    "multitask_cross_entropy, many tasks": lambda: multitask_cross_entropy_case(3, [40] * 600, True),
    "multitask_binary_cross_entropy": lambda: multitask_binary_cross_entropy_case(64, [19, 61, 12]),
    "multitask_binary_cross_entropy, asymmetric": lambda: multitask_binary_cross_entropy_case(
        50, [19, 400, 12], True, 1.0, 4.0, 0.05
    ),
    "multitask_binary_cross_entropy, many classes": lambda: multitask_binary_cross_entropy_case(9, [100_000]),
    "multitask_binary_cross_entropy, many tasks": lambda: multitask_binary_cross_entropy_case(3, [40] * 600, True, 2.0),
}


BACKENDS = ("triton", "cuda", "torch")
OF_EACH = (
    "modality_pool, small",
    "pack_tokens, odd",
    "packed_attention",
    "multitask_cross_entropy",
    "multitask_binary_cross_entropy, asymmetric",
)


def case_of(name: str, backend: str, dtype: torch.dtype) -> Case:
    case = CASES[name]()
    reason = dispatch.why_not(case.operator, backend, "cuda", dtype)
    if reason is not None:
        pytest.skip(f"{backend} cannot run {case.operator} in {dtype}: {reason}")
    if backend == "torch":
        case.without_gradient = (1,)  # its backward takes none of the log-sum-exp
    if backend == "triton" and triton.knobs.runtime.interpret:
        pytest.skip("Triton is in its interpreter; set TRITON_INTERPRET=0")
    return case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, dtype, backend):
    check(case_of(name, backend, dtype), backend, dtype, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_strided_inputs(name, backend):
    dtype = dispatch.usual_dtype(backend)
    check(case_of(name, backend, dtype), backend, dtype, "cuda", transform=spread)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OF_EACH)
def test_cuda_graph(name, backend):
    """Captured once, then run twice on changed inputs."""
    dtype = dispatch.usual_dtype(backend)
    case = case_of(name, backend, dtype)
    arguments = case.tensors(dtype, "cuda")
    operator = getattr(ops, case.operator)

    def run():
        output = operator(**arguments, backend=backend)
        return output if isinstance(output, torch.Tensor) else output[0]

    run()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    before = run().clone()
    for factor in (2, 0.5):
        changed = case.tensors(dtype, "cuda")
        for key, value in arguments.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.copy_(changed[key] * factor)
        captured.fill_(torch.nan)
        graph.replay()
        after = run()
        assert not torch.equal(after, before)
        torch.testing.assert_close(captured, after)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*OF_EACH, "packed_attention, causal", "multitask_cross_entropy, many classes"])
def test_twice_the_same_bits(name, dtype, backend):
    case = case_of(name, backend, dtype)
    # FlashAttention adds to gradients in any order unless PyTorch is told to be deterministic, and then says so
    torch.use_deterministic_algorithms(True)
    first, second = (case.run(backend, dtype, "cuda") for _ in range(2))
    for key in first:
        assert torch.equal(first[key].nan_to_num(), second[key].nan_to_num()), key


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OF_EACH)
def test_second_device(name, backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one GPU")
    dtype = dispatch.usual_dtype(backend)
    check(case_of(name, backend, dtype), backend, dtype, "cuda:1")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_label_past_the_last_class(backend):
    """No error without waiting for the device, and no read past the row: the task's loss is NaN."""
    arguments = case_of("multitask_cross_entropy", backend, torch.float32).tensors(torch.float32, "cuda")
    arguments["labels"][5, 1] = 61
    loss = ops.multitask_cross_entropy(**arguments, backend=backend)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_target_above_1(backend):
    """No error without waiting for the device: the task's loss is NaN."""
    arguments = case_of("multitask_binary_cross_entropy", backend, torch.float32).tensors(torch.float32, "cuda")
    arguments["targets"][5, 20] = 2
    loss = ops.multitask_binary_cross_entropy(**arguments, backend=backend)
    assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_takes_a_backend_that_can(dtype):
    """Whatever `auto` chooses, its results and gradients, that of the log-sum-exp too, are right."""
    check(CASES["packed_attention"](), "auto", dtype, "cuda")
    check(packed_attention_case([9, 4], heads=2, size=36), "auto", dtype, "cuda")
