"""The classification losses of many tasks, over logits that stand side by side."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, library

from cmaclip_fast.ops import autocast, checks, derivatives, dispatch, reference


def multitask_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """The mean cross-entropy of each task over the rows that have a label for it; 0 where there are none.

    Class weights and label smoothing mean what they mean in `torch.nn.functional.cross_entropy`: with weights the mean
    is weighted, with the sum of the weights of the labels as its denominator.

    Args:
        logits: `[B, C]` float, the classes of all tasks side by side.
        labels: `[B, K]` int64, the class within the task; negative where the row has no label. A label past the task's
            last class is an error on the CPU and if CMACLIP_DEBUG=1; on a GPU it makes the task's loss NaN.
        offsets: `[K + 1]` int32 or int64: the classes of task k are columns `offsets[k]:offsets[k + 1]`; from 0 to C,
            each task with at least one class.
        class_weight: `[C]`, not negative; same dtype as logits.
        label_smoothing: 0 to 1.
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
    arguments.check("labels", labels, "B, K", (torch.int64,))
    arguments.check("offsets", offsets, "K+1", checks.INTEGERS)
    if class_weight is not None:
        arguments.check("class_weight", class_weight, "C", (logits.dtype,), like="logits")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be 0 to 1, but is {label_smoothing}")
    call, backend = derivatives.entry("multitask_cross_entropy", _forward, backend, logits, class_weight)
    return call(logits, labels, offsets.to(torch.int32), class_weight, label_smoothing, backend)[0]


library.define(
    "cmaclip::multitask_cross_entropy",
    "(Tensor logits, Tensor labels, Tensor offsets, Tensor? class_weight, float label_smoothing, str backend)"
    " -> (Tensor loss, Tensor lse, Tensor weight_sum)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    "cmaclip::multitask_cross_entropy_backward",
    "(Tensor grad_loss, Tensor logits, Tensor labels, Tensor offsets, Tensor? class_weight, float label_smoothing,"
    " Tensor lse, Tensor weight_sum, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    checked = checks.values_are_checked(logits)
    if checked:
        _check_offsets(logits, offsets)
        checks.not_nan(logits=logits)
    run = dispatch.implementation("multitask_cross_entropy", "forward", backend, logits)
    found: tuple[Tensor, Tensor, Tensor] = run(
        logits.contiguous(),
        labels.contiguous(),
        offsets.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        label_smoothing,
    )
    # a label past the last class makes a NaN, so labels need no look before
    if checked and bool(found[0].isnan().any()):
        _check_labels(labels, offsets)
    return found


library.impl("cmaclip::multitask_cross_entropy", "default", _forward)


@library.impl("cmaclip::multitask_cross_entropy_backward", "default")
def _backward(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    lse: Tensor,
    weight_sum: Tensor,
    backend: str,
) -> Tensor:
    run = dispatch.implementation("multitask_cross_entropy", "backward", backend, logits)
    return run(
        grad_loss.contiguous(),
        logits.contiguous(),
        labels.contiguous(),
        offsets.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        label_smoothing,
        lse.contiguous(),
        weight_sum.contiguous(),
    )


def _check_offsets(logits: Tensor, offsets: Tensor) -> None:
    ends = offsets.tolist()
    if ends[0] != 0 or ends[-1] != logits.shape[1] or not all(map(operator.lt, ends, ends[1:])):
        raise ValueError(f"offsets must increase from 0 to the width of logits, {logits.shape[1]}, but is {ends}")


def _check_labels(labels: Tensor, offsets: Tensor) -> None:
    classes = offsets.diff()
    wrong = (labels >= classes).nonzero()
    if len(wrong) > 0:
        row, task = wrong[0].tolist()
        raise ValueError(
            f"labels must be less than the task's number of classes, {int(classes[task])}, "
            f"but is {int(labels[row, task])} in row {row}, task {task}"
        )


@library.register_fake("cmaclip::multitask_cross_entropy")
def _(
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, tasks = labels.shape
    like = logits.new_empty(0, dtype=reference.wide(logits.dtype))
    return like.new_empty(tasks), like.new_empty(rows, tasks), like.new_empty(tasks)


@library.register_fake("cmaclip::multitask_cross_entropy_backward")
def _(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    lse: Tensor,
    weight_sum: Tensor,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, offsets, class_weight, ctx.label_smoothing, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, offsets, class_weight, *output[1:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _autograd(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 6
    logits, labels, offsets, class_weight, lse, weight_sum = ctx.saved_tensors
    grad_logits = torch.ops.cmaclip.multitask_cross_entropy_backward(
        grad_loss, logits, labels, offsets, class_weight, ctx.label_smoothing, lse, weight_sum, ctx.backend
    )
    return grad_logits, None, None, None, None, None


library.register_autograd("cmaclip::multitask_cross_entropy", _autograd, setup_context=_setup_context)


def _plain_backward(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    lse: Tensor,
    weight_sum: Tensor,
) -> Tensor:
    # the log-sum-exp is no output that has a gradient, but it depends on the logits
    given = (logits, labels, offsets, class_weight, label_smoothing)
    _, lse, weight_sum = reference.multitask_cross_entropy_forward(*given)
    return reference.multitask_cross_entropy_backward(grad_loss, *given, lse, weight_sum)


derivatives.register_second("multitask_cross_entropy", _plain_backward)
