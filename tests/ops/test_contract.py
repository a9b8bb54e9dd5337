"""What every operator promises on every backend: opcheck, torch.compile, torch.export, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    Case,
    modality_pool_case,
    multitask_binary_cross_entropy_case,
    multitask_cross_entropy_case,
    pack_tokens_case,
    packed_attention_case,
    spread,
)
from torch import Tensor, library

from cmaclip_fast import ops
from cmaclip_fast.ops import available_backends
from cmaclip_fast.ops.dispatch import OPERATORS

CASES: dict[str, Callable[[], Case]] = {
    "modality_pool": lambda: modality_pool_case(5, 3, 20, 4),
    "modality_pool, shared": lambda: modality_pool_case(3, 2, 7, 2, shared=True),
    "pack_tokens": lambda: pack_tokens_case(4, 5, 3, 20),
    "pack_tokens, capacity": lambda: pack_tokens_case(4, 5, 3, 7, typed=False, spare=3),
    "pack_tokens, shared": lambda: pack_tokens_case(6, 5, 3, 20, shared=True),
    "packed_attention": lambda: packed_attention_case([5, 0, 9], [7, 2, 3], size=20),
    "packed_attention, causal": lambda: packed_attention_case([5, 3], heads=1, size=33, causal=True),
    "multitask_cross_entropy": lambda: multitask_cross_entropy_case(6, [3, 9], weighted=True, label_smoothing=0.1),
    "multitask_cross_entropy, plain": lambda: multitask_cross_entropy_case(5, [4]),
    "multitask_binary_cross_entropy": lambda: multitask_binary_cross_entropy_case(6, [3, 9], True, 1.0, 4.0, 0.05),
    "multitask_binary_cross_entropy, plain": lambda: multitask_binary_cross_entropy_case(5, [4]),
}
BACKENDS = ("reference", "cpp")


def case_of(name: str, backend: str) -> Case:
    case = CASES[name]()
    reason = available_backends(operator=case.operator)[backend]
    if reason is not None:
        pytest.skip(f"{backend} cannot run {case.operator}: {reason}")
    return case


def schema_arguments(case: Case, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], backend: str) -> list[Any]:
    """What the public function hands to the registered operator."""
    arguments = case.tensors(dtype)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            arguments[name] = layout(value.requires_grad_(name not in case.fixed))
    arguments = {"capacity": None, "scale": 0.3, "label_smoothing": 0.0, "class_weight": None} | arguments
    names = [argument.name for argument in getattr(torch.ops.cmaclip, case.operator).default._schema.arguments]
    return [*(arguments[name] for name in names[:-1]), backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [lambda x: x, spread], ids=["contiguous", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, dtype, layout, backend):
    case = case_of(name, backend)
    tolerance = {} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 3e-2}
    operator = getattr(torch.ops.cmaclip, case.operator).default
    library.opcheck(operator, schema_arguments(case, dtype, layout, backend), **tolerance)


@pytest.mark.parametrize("name", OPERATORS)
def test_compile(name):
    case = CASES[name]()
    if case.operator == "pack_tokens" and "capacity" not in case.arguments:
        case.arguments["capacity"] = 100
    operator = getattr(ops, case.operator)
    arguments = case.tensors(torch.float32)
    leaves = [v.requires_grad_() for k, v in arguments.items() if is_float(v) and k not in case.fixed]

    def run(arguments: dict[str, Any]) -> Tensor:
        outputs = operator(**arguments)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        floats = [output for output in outputs if output.is_floating_point()]
        return sum(output.masked_fill(output == -torch.inf, 0).square().sum() for output in floats)

    torch.compiler.reset()
    expected = torch.autograd.grad(run(arguments), leaves, allow_unused=True)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(arguments), leaves, allow_unused=True)
    torch.testing.assert_close(got, expected)


@pytest.mark.slow
def test_compile_with_code_generation():
    case, pool = packed_attention_case([5, 9]).tensors(torch.float32), modality_pool_case(2, 2, 32, 3)
    leaf = case.pop("q").requires_grad_()
    pooling = pool.tensors(torch.float32)

    def run(q: Tensor) -> Tensor:
        attended, _ = ops.packed_attention(q.sin(), **case)
        pooled, _ = ops.modality_pool(attended[:4].reshape(2, 2, -1)[..., :32], pooling["weight"], pooling["present"])
        return pooled.cos().sum()

    expected = torch.autograd.grad(run(leaf), leaf)
    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf), expected)


class Called(torch.nn.Module):
    def __init__(self, operator: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.operator, self.options = operator, options

    def forward(self, *tensors: Tensor) -> Any:
        names = [name for name in self.options if self.options[name] is Tensor]
        options = {name: value for name, value in self.options.items() if value is not Tensor}
        return getattr(ops, self.operator)(**dict(zip(names, tensors, strict=True)), **options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_export_with_a_dynamic_batch(operator):
    make = {
        "modality_pool": lambda rows: modality_pool_case(rows, 2, 8, 3),
        "pack_tokens": lambda rows: pack_tokens_case(rows, 4, 3, 8),
        "packed_attention": lambda rows: packed_attention_case([3] * rows, size=8),
        "multitask_cross_entropy": lambda rows: multitask_cross_entropy_case(rows, [3, 4]),
        "multitask_binary_cross_entropy": lambda rows: multitask_binary_cross_entropy_case(rows, [3, 4]),
    }[operator]
    batched = {"modality_pool": 3, "pack_tokens": 4, "packed_attention": 5}.get(operator, 2)
    fixed = {"weight", "type_embedding", "offsets", "class_weight"}
    case = make(5).arguments
    options = {name: Tensor if isinstance(value, Tensor) else value for name, value in case.items()}
    module = Called(operator, options)
    tensors = {name: value for name, value in case.items() if isinstance(value, Tensor)}
    shapes = tuple({} if name in fixed else {0: torch.export.Dim.AUTO} for name in tensors)
    assert sum(bool(shape) for shape in shapes) >= batched - 1
    program = torch.export.export(module, tuple(tensors.values()), dynamic_shapes=(shapes,))
    other = tuple(value for value in make(9).arguments.values() if isinstance(value, Tensor))
    torch.testing.assert_close(program.module()(*other), module(*other))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("packed_attention", torch.bfloat16),
        ("modality_pool", torch.float32),
        ("pack_tokens", torch.float32),
        ("multitask_cross_entropy", torch.float32),
        ("multitask_binary_cross_entropy", torch.float32),
    ],
)
def test_autocast(name, expected, backend):
    case = case_of(name, backend)
    arguments = case.tensors(torch.float32)
    mixed = {"packed_attention": "k", "modality_pool": "embeddings", "pack_tokens": "text"}.get(name, "logits")
    leaf = arguments[mixed] = arguments[mixed].bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = getattr(ops, case.operator)(**arguments, backend=backend)
    first = output if isinstance(output, Tensor) else output[0]
    assert first.dtype == expected
    first.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
