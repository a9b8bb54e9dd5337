"""Modules in evaluation mode, without a change to those that they are made from."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cmaclip_fast.errors import InputError

Module = TypeVar("Module", bound=nn.Module)


def evaluation_copy(
    module: Module, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Module:
    """The same module in evaluation mode, on the same parameters and buffers.

    `module` keeps its mode, so other threads may train or run it meanwhile. In-place changes of its weights are seen by
    the copy. Hooks are shared.

    Args:
        device: None keeps each tensor's. Tensors that are elsewhere are copied, and their later changes not seen.
        dtype: the same for floating-point tensors.

    Raises:
        InputError: a part in training mode was given a `forward` that is bound to it and cannot be copied.
    """
    for name, part in module.named_modules():
        _check_forward(name, part)
    # deepcopy takes what is in `memo` as it is instead of copying it
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor) or name == "tokenizer":
                memo[id(value)] = value
        for hook in [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]:
            memo[id(hook)] = hook
    # parameters come last and are held: peft's attention registers new ones whenever its modules are listed
    for buffer in module.buffers():
        memo[id(buffer)] = _moved(buffer, device, dtype)
    parameters = list(module.parameters())
    for parameter in parameters:
        moved = _moved(parameter, device, dtype)
        memo[id(parameter)] = parameter if moved is parameter else nn.Parameter(moved.detach(), requires_grad=False)
    return copy.deepcopy(module, memo).eval()


def _check_forward(name: str, part: nn.Module) -> None:
    forward = vars(part).get("forward")
    if part.training and forward is not None and getattr(forward, "__self__", None) is not part:
        raise InputError(
            f"the forward of '{name or type(part).__name__}' was replaced, and would run in training mode: "
            "call eval() on the model, or unwrap it (in accelerate: unwrap_model)"
        )


def _moved(tensor: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    with torch.no_grad():
        return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
