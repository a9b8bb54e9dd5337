"""Biases with GELU and with residual sums, in one pass: against float64 and PyTorch, odd sizes, where they run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from cmaclip_fast.nn.layers import Rows, layer_of
from cmaclip_fast.ops import dispatch, epilogue, use_backend
from tests.rule import judge

pytestmark = pytest.mark.skipif(dispatch.extension_missing() is not None, reason="the extension is not built")
ACTIVATIONS = {"gelu": nn.GELU(), "quick_gelu": QuickGELU()}
SHAPES = [(1, 1), (3, 5), (7, 16), (33, 77), (64, 512)]


def inputs(rows: int, width: int, scale: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * width)
    shapes = [(rows, width), (width,), (6, width), (6,)]
    x, bias, weight, output_bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x * scale, bias, weight / width**0.5, output_bias]


@pytest.mark.parametrize("scale", [1.0, 5.0, 40.0])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_product_cpp(name: str, shape: tuple[int, int], scale: float) -> None:
    activation = ACTIVATIONS[name]
    quick = epilogue.is_quick(activation)
    assert quick is (name == "quick_gelu")
    given = inputs(*shape, scale)
    dtypes = (torch.float32, torch.float32, torch.float64)
    ours, plain, exact = ([x.to(dtype, copy=True).requires_grad_() for x in given] for dtype in dtypes)
    upstream = torch.randn(shape[0], 6, generator=torch.Generator().manual_seed(1))
    results = []
    for leaves, run in (
        (ours, lambda x, b, w, o: epilogue.bias_gelu_linear(x, b, w, o, quick)),
        (plain, lambda x, b, w, o: F.linear(activation(x + b), w, o)),
        (exact, lambda x, b, w, o: F.linear(activation(x + b), w, o)),
    ):
        output = run(*leaves)
        output.backward(upstream.to(output.dtype))
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for found, same_dtype, truth in zip(*results, strict=True):
        judge(name, found, same_dtype, truth, torch.float32)
    x, bias = given[0].clone(), given[1]
    with torch.no_grad():
        assert epilogue.bias_gelu_(x, bias, quick) is x
        judge(name, x, activation(given[0] + bias), activation(given[0].double() + bias.double()), torch.float32)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_what_is_not_finite(name: str) -> None:
    x = torch.tensor([[float("inf"), float("nan"), -1e30, 1e30, 0.0]])
    found = epilogue.bias_gelu_(x.clone(), torch.zeros(5), name == "quick_gelu")
    torch.testing.assert_close(found, ACTIVATIONS[name](x.double()).float(), equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_sum_cpp(shape: tuple[int, int]) -> None:
    x, bias, *_ = inputs(*shape, 1.0)
    branch = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    exact = x.double() + branch.double() + bias.double()
    with torch.no_grad():
        taken = branch.clone()
        assert epilogue.add_branch(x, taken, bias) is taken
        judge("sum", taken, x + branch + bias, exact, torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, branch, bias)]
    # a branch is what a product gives, not a leaf
    output = epilogue.add_branch(leaves[0], leaves[1] * 1, leaves[2])
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    output.backward(upstream)
    assert torch.equal(leaves[0].grad, upstream) and torch.equal(leaves[1].grad, upstream)
    torch.testing.assert_close(leaves[2].grad, upstream.sum(0))


def test_number_of_threads_changes_nothing() -> None:
    x, bias, *_ = inputs(300, 513, 1.0)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(epilogue.bias_gelu_(x.clone(), bias, False))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_where_they_run() -> None:
    x = torch.ones(2, 4)
    assert epilogue.takes(x, x)
    assert not epilogue.takes(x, None) and not epilogue.takes(x.double()) and not epilogue.takes(x.bfloat16())
    with use_backend("reference"):
        assert not epilogue.takes(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not epilogue.takes(x)
    assert epilogue.is_quick(nn.GELU("tanh")) is None and epilogue.is_quick(F.relu) is None


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_uses_them_and_computes_the_same_without(training: bool) -> None:
    block = nn.TransformerEncoderLayer(32, 4, 48, 0.0, "gelu", batch_first=True, norm_first=True).train(training)
    nn.init.normal_(block.self_attn.out_proj.bias)
    rows = Rows.equal(3, 7, torch.device("cpu"))
    layer = layer_of(block)
    assert layer is not None
    results = []
    for backend, used in (("cpp", True), ("reference", False)):
        x = torch.randn(21, 32, generator=torch.Generator().manual_seed(0), requires_grad=training)
        block.zero_grad()
        with use_backend(backend), torch.profiler.profile() as profile, torch.set_grad_enabled(training):
            output = layer(x, rows)
            if training:
                output.square().sum().backward()
        ran = {event.key for event in profile.key_averages()}
        assert ({"cmaclip::_bias_gelu_forward_cpp", "cmaclip::_add_branch_cpp"} <= ran) == used
        assert ("aten::gelu" in ran) == (not used)
        gradients = [x.grad, *(parameter.grad for parameter in block.parameters())] if training else []
        results.append([output.detach(), *gradients])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
