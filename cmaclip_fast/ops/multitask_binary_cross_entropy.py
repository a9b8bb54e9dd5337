"""The losses of many tasks that may each have several of their classes, over logits that stand side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from cmaclip_fast.ops import autocast, checks, derivatives, dispatch, reference
from cmaclip_fast.ops.multitask_cross_entropy import _check_offsets


def multitask_binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    *,
    class_weight: Tensor | None = None,
    gamma_positive: float = 0.0,
    gamma_negative: float = 0.0,
    margin: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The mean binary cross-entropy of each task over the classes and rows whose target is known; 0 where none is.

    The exponents and the margin are those of the asymmetric loss (Ridnik et al., ICCV 2021, arXiv 2009.14119). With
    `p` the sigmoid of a logit, a class that the row has costs `-(1 - p) ** gamma_positive * log(p)`, and one that it
    has not `-q ** gamma_negative * log(1 - q)`, where `q = max(p - margin, 0)`. Equal exponents and no margin are the
    focal loss. The gradient is that of the whole expression.

    Args:
        logits: `[B, C]` float, the classes of all tasks side by side.
        targets: `[B, C]` int8: 1 where the row has the class, 0 where it has not, negative where that is unknown. A
            target above 1 is an error on the CPU and if CMACLIP_DEBUG=1; on a GPU it makes the task's loss NaN.
        offsets: `[K + 1]` int32 or int64: the classes of task k are columns `offsets[k]:offsets[k + 1]`; from 0 to C,
            each task with at least one class.
        class_weight: `[C]`, not negative; same dtype as logits. The mean is weighted by it.
        gamma_positive, gamma_negative: not negative.
        margin: at least 0 and less than 1.
        backend: overrides `use_backend` and `CMACLIP_BACKEND`.

    Returns:
        loss `[K]` in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or value.
        RuntimeError: the backend asked for cannot run.
    """
    if class_weight is None:
        (logits,) = autocast.to_float32(logits)
    else:
        logits, class_weight = autocast.to_float32(logits, class_weight)
    arguments = checks.Arguments("logits", logits.device)
    arguments.check("logits", logits, "B, C", checks.FLOATS)
    arguments.check("targets", targets, "B, C", (torch.int8,))
    arguments.check("offsets", offsets, "K+1", checks.INTEGERS)
    if class_weight is not None:
        arguments.check("class_weight", class_weight, "C", (logits.dtype,), like="logits")
    for name, gamma in (("gamma_positive", gamma_positive), ("gamma_negative", gamma_negative)):
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, but is {gamma}")
    if not 0 <= margin < 1:
        raise ValueError(f"margin must be at least 0 and less than 1, but is {margin}")
    call, backend = derivatives.entry("multitask_binary_cross_entropy", _forward, backend, logits, class_weight)
    given = (logits, targets, offsets.to(torch.int32), class_weight)
    return call(*given, float(gamma_positive), float(gamma_negative), float(margin), backend)[0]


library.define(
    "cmaclip::multitask_binary_cross_entropy",
    "(Tensor logits, Tensor targets, Tensor offsets, Tensor? class_weight, float gamma_positive, float gamma_negative,"
    " float margin, str backend) -> (Tensor loss, Tensor weight_sum)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    "cmaclip::multitask_binary_cross_entropy_backward",
    "(Tensor grad_loss, Tensor logits, Tensor targets, Tensor offsets, Tensor? class_weight, float gamma_positive,"
    " float gamma_negative, float margin, Tensor weight_sum, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(
    logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    checked = checks.values_are_checked(logits)
    if checked:
        _check_offsets(logits, offsets)
        checks.not_nan(logits=logits)
    run = dispatch.implementation("multitask_binary_cross_entropy", "forward", backend, logits)
    found: tuple[Tensor, Tensor] = run(
        logits.contiguous(),
        targets.contiguous(),
        offsets.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        gamma_positive,
        gamma_negative,
        margin,
    )
    # a target above 1 makes a NaN, so targets need no look before
    if checked and bool(found[0].isnan().any()):
        _check_targets(targets)
    return found


library.impl("cmaclip::multitask_binary_cross_entropy", "default", _forward)


@library.impl("cmaclip::multitask_binary_cross_entropy_backward", "default")
def _backward(
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
    weight_sum: Tensor,
    backend: str,
) -> Tensor:
    run = dispatch.implementation("multitask_binary_cross_entropy", "backward", backend, logits)
    return run(
        grad_loss.contiguous(),
        logits.contiguous(),
        targets.contiguous(),
        offsets.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        gamma_positive,
        gamma_negative,
        margin,
        weight_sum.contiguous(),
    )


def _check_targets(targets: Tensor) -> None:
    wrong = (targets > 1).nonzero()
    if len(wrong) > 0:
        row, column = wrong[0].tolist()
        raise ValueError(
            f"targets must be 1, 0 or negative, but is {int(targets[row, column])} in row {row}, column {column}"
        )


@library.register_fake("cmaclip::multitask_binary_cross_entropy")
def _(
    logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    like = logits.new_empty(0, dtype=reference.wide(logits.dtype))
    return like.new_empty(len(offsets) - 1), like.new_empty(len(offsets) - 1)


@library.register_fake("cmaclip::multitask_binary_cross_entropy_backward")
def _(
    grad_loss: Tensor,
    logits: Tensor,
    targets: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
    weight_sum: Tensor,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, offsets, class_weight, *ctx.options, ctx.backend = inputs
    ctx.save_for_backward(logits, targets, offsets, class_weight, output[1])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 8
    *given, weight_sum = ctx.saved_tensors
    grad_logits = torch.ops.cmaclip.multitask_binary_cross_entropy_backward(
        grad_loss, *given, *ctx.options, weight_sum, ctx.backend
    )
    return grad_logits, *(None,) * 7


library.register_autograd("cmaclip::multitask_binary_cross_entropy", _autograd, setup_context=_setup_context)
derivatives.register_second("multitask_binary_cross_entropy", reference.multitask_binary_cross_entropy_backward)
