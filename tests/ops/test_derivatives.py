"""Second derivatives, `torch.func` and forward mode: right, or an error that names the operator and the way out."""

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
)
from torch import Tensor, nn
from torch.autograd import forward_ad

from cmaclip_fast import ops
from cmaclip_fast.nn.layers import Rows, layer_of, recomputing_linear, run_layers
from cmaclip_fast.ops import available_backends, dispatch, epilogue, use_backend

CASES: dict[str, Callable[[], Case]] = {
    "modality_pool": lambda: modality_pool_case(3, 2, 3, 2),
    "modality_pool, shared": lambda: modality_pool_case(3, 2, 3, 2, shared=True),
    "packed_attention": lambda: packed_attention_case([2, 0, 3], [3, 1, 2], heads=2, size=3, causal=True, spare=1),
    "pack_tokens": lambda: pack_tokens_case(3, 2, 2, 3, spare=2),
    "multitask_cross_entropy": lambda: multitask_cross_entropy_case(3, [2, 3], True, 0.1),
    "multitask_binary_cross_entropy": lambda: multitask_binary_cross_entropy_case(3, [2, 3], True, 1.5, 4.0, 0.05),
    "multitask_binary_cross_entropy, plain": lambda: multitask_binary_cross_entropy_case(3, [2, 3]),
}
BACKENDS = [name for name in ("reference", "cpp") if available_backends()[name] is None]
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")
tried = pytest.mark.tried("operator", ends="right, or an error that names the operator")


def function_of(case: Case, dtype: torch.dtype, **options: Any) -> tuple[Callable[..., Any], list[Tensor]]:
    """The operator as a function of what it has gradients for, and these tensors."""
    arguments = case.tensors(dtype) | options
    names = [name for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
    names = [name for name in names if name not in case.fixed]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = getattr(ops, case.operator)(**(arguments | dict(zip(names, tensors, strict=True))))
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        return tuple(x.masked_fill(x == -torch.inf, 0) for x in outputs if x.is_floating_point())

    return run, [arguments[name] for name in names]


def penalty(run: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> list[Tensor]:
    """Gradients of the squared gradients."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    loss = sum(output.square().sum() for output in run(*leaves))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    return list(torch.autograd.grad(sum(x.square().sum() for x in first), leaves))


@tried
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name):
    run, tensors = function_of(CASES[name](), torch.float64, backend="reference")
    assert torch.autograd.gradgradcheck(run, [x.requires_grad_() for x in tensors])


@tried
@needs_cpp
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_on_a_fast_backend(name):
    case = CASES[name]()
    found = penalty(*function_of(case, torch.float32, backend="cpp"))
    expected = penalty(*function_of(case, torch.float64, backend="reference"))
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact.float(), rtol=1e-4, atol=1e-4)


@tried
def test_third_derivatives():
    run, (x, *others) = function_of(CASES["packed_attention"](), torch.float64)
    x.requires_grad_()

    def slope(x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(run(x, *others)[0].sum(), x, create_graph=True)
        return grad

    assert torch.autograd.gradgradcheck(slope, x)


def derivative(how: str, run: Callable[..., tuple[Tensor, ...]], x: Tensor, others: list[Tensor]) -> Tensor:
    """The derivative, by one of several ways, of a number that depends on `x`, along ones."""

    def number(x: Tensor) -> Tensor:
        return torch.stack([(output.cos() * 3).sum() for output in run(x, *others)]).sum()

    if how == "backward":
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(number(leaf), leaf)[0].sum()
    if how == "dual":
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(number(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    if how == "grad":
        return torch.func.grad(number)(x).sum()
    if how == "vjp":
        return torch.func.vjp(number, x)[1](torch.ones((), dtype=x.dtype))[0].sum()
    return torch.func.jvp(number, (x,), (torch.ones_like(x),))[1]


@tried
@pytest.mark.parametrize("how", ["grad", "vjp", "jvp", "dual"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("no_grad", [False, True])
def test_transforms(name, how, no_grad):
    """What they look into runs on the reference, and gives what a backward pass does; also in float32, under auto."""
    case = CASES[name]()
    run, (x, *others) = function_of(case, torch.float32)
    expected = derivative("backward", *function_of(case, torch.float32)[:1], x, others)
    with torch.set_grad_enabled(not (no_grad and how in ("jvp", "dual"))):
        found = derivative(how, run, x, others)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@tried
@needs_cpp
@pytest.mark.parametrize("how", ["grad", "vjp", "jvp", "dual"])
@pytest.mark.parametrize("name", CASES)
def test_a_backend_that_cannot_be_looked_into_is_refused(name, how):
    case = CASES[name]()
    run, (x, *others) = function_of(case, torch.float32, backend="cpp")
    with pytest.raises(RuntimeError, match=f"{case.operator} cannot run on the backend 'cpp': .*'reference'"):
        derivative(how, run, x, others)


@tried
@pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_vmap(name, backend):
    run, (x, *others) = function_of(CASES[name](), torch.float32, backend=backend)
    many = torch.stack([x, 2 * x, -x])
    found = torch.func.vmap(lambda x: run(x, *others))(many)
    for one, value in enumerate(many):
        torch.testing.assert_close(tuple(output[one] for output in found), run(value, *others))


@tried
@pytest.mark.parametrize("name", ["modality_pool", "multitask_cross_entropy", "multitask_binary_cross_entropy"])
def test_gradients_of_single_examples(name):
    run, (x, *others) = function_of(CASES[name](), torch.float32)
    many = torch.stack([x, 2 * x, -x])

    def number(x: Tensor) -> Tensor:
        return run(x, *others)[0].square().sum()

    found = torch.func.vmap(torch.func.grad(number))(many)
    torch.testing.assert_close(found, torch.stack([torch.func.grad(number)(value) for value in many]))


# Fused functions of a layer, each as a function of [4, 3], with weights beside it.
def fused(name: str) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 3, generator=generator), torch.randn(3, generator=generator)
    return {
        "bias_gelu_linear": lambda x: epilogue.bias_gelu_linear(x, bias, weight, None, False),
        "recomputing_linear": lambda x: recomputing_linear(nn.GELU(), x, weight, None),
    }[name]


@tried
@needs_cpp
@pytest.mark.parametrize("name", ["bias_gelu_linear", "recomputing_linear"])
@pytest.mark.parametrize("constant", [True, False])
def test_fused_functions_say_that_they_have_no_second_derivative(name, constant):
    x = torch.randn(4, 3, requires_grad=True)
    output = fused(name)(x)
    loss = output.sum() if constant else output.square().sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=rf"{name} does not support second derivatives; .*use_backend\('reference'\)"
    ):
        first.square().sum().backward()


def layer_and_input() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    layer = layer_of(block)
    assert layer is not None
    rows = Rows.equal(2, 3, torch.device("cpu"))
    return lambda x: layer(x, rows), torch.randn(6, 8, generator=generator)


@tried
def test_a_layer_has_second_derivatives_on_the_reference():
    layer, x = layer_and_input()
    with use_backend("reference"):
        (found,) = penalty(lambda x: (layer(x),), [x])
        gradients = torch.func.grad(lambda x: torch.func.grad(lambda y: layer(y).square().sum())(x).square().sum())(x)
    torch.testing.assert_close(found, gradients, rtol=1e-4, atol=1e-4)


@tried
@needs_cpp
def test_a_layer_without_it_ends_in_an_error():
    layer, x = layer_and_input()
    with pytest.raises(RuntimeError, match=r"does not support second derivatives; .*use_backend\('reference'\)"):
        penalty(lambda x: (layer(x),), [x])


@tried
def test_transforms_of_a_layer():
    layer, x = layer_and_input()
    run = lambda x: (layer(x),)  # noqa: E731
    expected = derivative("backward", run, x, [])
    for how in ("grad", "vjp", "jvp", "dual"):
        torch.testing.assert_close(derivative(how, run, x, []), expected, rtol=1e-4, atol=1e-5)


def test_a_checkpointed_layer_is_computed_again_on_its_backend(monkeypatch):
    """The backward pass comes after the block, or on another thread."""
    block = nn.TransformerEncoderLayer(8, 2, 12, 0.0, "gelu", batch_first=True, norm_first=True)
    layer = layer_of(block)
    assert layer is not None
    ran = []
    choose = dispatch._implementation
    monkeypatch.setattr(dispatch, "_implementation", lambda *given: ran.append(given[2]) or choose(*given))
    x = torch.randn(6, 8, requires_grad=True)
    with use_backend("reference"):
        output = run_layers([layer], x, Rows.equal(2, 3, torch.device("cpu")), checkpointing=True)
    output.sum().backward()
    assert ran == ["reference"] * 3
