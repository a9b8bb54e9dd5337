"""What stands between the matrix products of a layer, on the CPU in one pass each: biases, GELU and residual sums.

These are no operators of the contract: where they do not run (`takes`), PyTorch's own functions do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from cmaclip_fast.ops import derivatives, dispatch


def takes(*tensors: Tensor | None) -> bool:
    """Whether these functions run on such tensors: float32 on the CPU, eager, no autocast, with the extension."""
    return (
        not torch.compiler.is_compiling()
        and all(x is not None and x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and dispatch.uses_cpp()
        and not derivatives.looked_into(*tensors)
    )


def is_quick(activation: Callable[[Tensor], Tensor]) -> bool | None:
    """For QuickGELU true, for exact GELU false, for any other activation None."""
    if type(activation) is QuickGELU:
        return True
    exact = type(activation) is nn.GELU and activation.approximate == "none"
    return False if exact or activation is F.gelu else None


def bias_gelu_(x: Tensor, bias: Tensor, quick: bool) -> Tensor:
    """GELU of `x + bias`, in place: `x [T, D]`, `bias [D]`. Without gradients."""
    torch.ops.cmaclip._bias_gelu_forward_cpp(x, bias, quick, x)
    return x


def bias_gelu_linear(x: Tensor, bias: Tensor, weight: Tensor, output_bias: Tensor | None, quick: bool) -> Tensor:
    """`F.linear(gelu(x + bias), weight, output_bias)` with gradients; the backward pass computes the GELU again.

    Args:
        x: `[T, D]`.
        bias: `[D]`.
        weight: `[E, D]`.
        output_bias: `[E]` or None.
    """
    return _BiasGeluLinear.apply(x, bias, weight, output_bias, quick)  # type: ignore[no-any-return]


def add_branch(x: Tensor, branch: Tensor, bias: Tensor) -> Tensor:
    """`x + branch + bias`, in place of `branch`, which nothing else may need: `x, branch [T, D]`, `bias [D]`."""
    if torch.is_grad_enabled():
        return _AddBranch.apply(x, branch, bias)  # type: ignore[no-any-return]
    torch.ops.cmaclip._add_branch_cpp(branch, x.contiguous(), bias)
    return branch


class _BiasGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, weight: Tensor, output_bias: Tensor | None, quick: bool) -> Tensor:
        ctx.save_for_backward(x, bias, weight)
        ctx.quick = quick
        activated = torch.empty_like(x)
        torch.ops.cmaclip._bias_gelu_forward_cpp(x, bias, quick, activated)
        return F.linear(activated, weight, output_bias)

    @staticmethod
    @derivatives.once("bias_gelu_linear")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, weight = ctx.saved_tensors
        need_x, need_bias, need_weight, need_output_bias, _ = ctx.needs_input_grad
        grad_x = grad @ weight
        activated = torch.ops.cmaclip._bias_gelu_backward_cpp(grad_x, x, bias, ctx.quick)
        return (
            grad_x if need_x else None,
            grad_x.sum(0) if need_bias else None,
            grad.t() @ activated if need_weight else None,
            grad.sum(0) if need_output_bias else None,
            None,
        )


class _AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, bias: Tensor) -> Tensor:
        ctx.mark_dirty(branch)
        torch.ops.cmaclip._add_branch_cpp(branch, x.contiguous(), bias)
        return branch

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, grad, grad.sum(0) if ctx.needs_input_grad[2] else None
