"""What is differentiated in other ways than one backward pass: second derivatives, `torch.func`, forward mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, library
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad

from cmaclip_fast.ops import dispatch

Entry = Callable[..., Any]


def entry(operator: str, plain: Entry, backend: str | None, *tensors: Tensor | None) -> tuple[Entry, str]:
    """What a call runs, and the backend to hand to it: the registered operator, or `plain` where a transform needs it.

    `torch.func.grad`, `jvp` and forward mode look into what they differentiate, so they need plain PyTorch: they get
    the reference, as the ordinary code that it is.

    Raises:
        RuntimeError: they are asked for on another backend.
    """
    asked = dispatch.requested(backend)
    if torch.compiler.is_compiling() or not looked_into(*tensors):
        return getattr(torch.ops.cmaclip, operator), asked
    decided = dispatch.decided(asked)
    if decided not in ("auto", "reference"):
        raise RuntimeError(
            f"{operator} cannot run on the backend '{decided}': under torch.func.grad, torch.func.jvp and forward-mode "
            "differentiation only the backend 'reference' runs"
        )
    return plain, "reference"


def looked_into(*tensors: Tensor | None) -> bool:
    """Whether `torch.func.grad`, `torch.func.jvp` or forward mode differentiates what is computed of these tensors."""
    keys = (TransformType.Grad, TransformType.Jvp)
    if any(level.key() in keys for level in get_interpreter_stack() or ()):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def register_second(operator: str, backward: Entry) -> None:
    """Let plain PyTorch differentiate the operator's backward pass, on every backend.

    Args:
        backward: the reference's, as a function of everything that its results depend on.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.places = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*(inputs[place] for place in ctx.places))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs: list[Any] = list(ctx.others)
        with torch.enable_grad():
            for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
                # under another name, so that what one input owes to another is not counted here
                inputs[place] = tensor.view_as(tensor)
            outputs = backward(*inputs[:-1])
        wanted = [place for place in ctx.places if inputs[place].requires_grad]
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        found: list[Tensor | None] = [None] * len(inputs)
        if wanted and used:
            given = torch.autograd.grad(
                [output for output, _ in used],
                [inputs[place] for place in wanted],
                [grad for _, grad in used],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            for place, grad in zip(wanted, given, strict=True):
                found[place] = grad
        return tuple(found)

    library.register_autograd(f"cmaclip::{operator}_backward", differentiate, setup_context=setup_context)


def once(name: str) -> Callable[[Entry], Entry]:
    """For the `backward` of a fused function: gradients whose own differentiation ends in an error with its name."""
    message = (
        f"{name} does not support second derivatives; run the model inside "
        "`with cmaclip_fast.ops.use_backend('reference'):`, where plain PyTorch takes its place"
    )

    def decorate(backward: Entry) -> Entry:
        @wraps(backward)
        def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                found = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return found
            # what the gradients depend on goes along, so that every way to it meets the error
            results = [x for x in found if x is not None]
            given = iter(_Last.apply(message, len(results), *results, *ctx.saved_tensors, *grads))
            return tuple(None if x is None else next(given) for x in found)

        return run

    return decorate


class _Last(torch.autograd.Function):
    """The first `count` of the tensors, as they are: functions of all of them that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.message)
