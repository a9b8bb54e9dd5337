"""Keyless attention over modalities for many tasks at once (paper, figure 1, modality-wise attention)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from cmaclip_fast.ops import autocast, checks, derivatives, dispatch, reference

MAX_MODALITIES = 8
MAX_TASKS = 1024


def modality_pool(
    embeddings: Tensor, weight: Tensor, present: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Pool the modality embeddings of each row once per task, by a softmax over learned scores.

    The score of modality m for task k is the dot product of its embedding with `weight[k, m]`. An absent modality gets
    weight 0 and its embedding is never used; where all are absent, weights and pooled embedding are 0.

    Args:
        embeddings: `[B, M, D]` float, M at most 8.
        weight: `[K, M, D]`, or `[K, 1, D]` for a vector shared by all modalities; K at most 1,024. Same dtype.
        present: `[B, M]` bool.
        backend: overrides `use_backend` and `CMACLIP_BACKEND`.

    Returns:
        pooled `[B, K, D]` in the dtype of `embeddings`, and weights `[B, K, M]` in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device.
        RuntimeError: the backend asked for cannot run.
    """
    embeddings, weight = autocast.to_widest(embeddings, weight)
    arguments = checks.Arguments("embeddings", embeddings.device)
    arguments.check("embeddings", embeddings, "B, M, D", checks.FLOATS)
    modalities = "1" if weight.dim() == 3 and weight.shape[1] == 1 else "M"
    arguments.check("weight", weight, f"K, {modalities}, D", (embeddings.dtype,), like="embeddings")
    arguments.check("present", present, "B, M", (torch.bool,))
    if not 1 <= embeddings.shape[1] <= MAX_MODALITIES:
        raise ValueError(f"embeddings must have 1 to {MAX_MODALITIES} modalities, but has {embeddings.shape[1]}")
    if weight.shape[0] > MAX_TASKS:
        raise ValueError(f"weight must have at most {MAX_TASKS} tasks, but has {weight.shape[0]}")
    call, backend = derivatives.entry("modality_pool", _forward, backend, embeddings, weight)
    return call(embeddings, weight, present, backend)


library.define(
    "cmaclip::modality_pool",
    "(Tensor embeddings, Tensor weight, Tensor present, str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    "cmaclip::modality_pool_backward",
    "(Tensor grad_pooled, Tensor? grad_weights, Tensor embeddings, Tensor weight, Tensor present, Tensor weights,"
    " str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(embeddings: Tensor, weight: Tensor, present: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    checks.not_nan(weight=weight)
    run = dispatch.implementation("modality_pool", "forward", backend, embeddings)
    return run(embeddings.contiguous(), weight.contiguous(), present.contiguous())


library.impl("cmaclip::modality_pool", "default", _forward)


@library.impl("cmaclip::modality_pool_backward", "default")
def _backward(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    embeddings: Tensor,
    weight: Tensor,
    present: Tensor,
    weights: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    run = dispatch.implementation("modality_pool", "backward", backend, embeddings)
    return run(
        grad_pooled.contiguous(),
        None if grad_weights is None else grad_weights.contiguous(),
        embeddings.contiguous(),
        weight.contiguous(),
        present.contiguous(),
        weights.contiguous(),
    )


@library.register_fake("cmaclip::modality_pool")
def _(embeddings: Tensor, weight: Tensor, present: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    rows, modalities, width = embeddings.shape
    weights = embeddings.new_empty(rows, len(weight), modalities, dtype=reference.wide(embeddings.dtype))
    return embeddings.new_empty(rows, len(weight), width), weights


@library.register_fake("cmaclip::modality_pool_backward")
def _(
    grad_pooled: Tensor,
    grad_weights: Tensor | None,
    embeddings: Tensor,
    weight: Tensor,
    present: Tensor,
    weights: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return embeddings.new_empty(embeddings.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    embeddings, weight, present, ctx.backend = inputs
    ctx.save_for_backward(embeddings, weight, present, output[1])
    ctx.set_materialize_grads(False)


def _autograd(
    ctx: Any, grad_pooled: Tensor | None, grad_weights: Tensor | None
) -> tuple[Tensor | None, Tensor | None, None, None]:
    embeddings, weight, present, weights = ctx.saved_tensors
    if grad_pooled is None:
        if grad_weights is None:
            return None, None, None, None
        grad_pooled = embeddings.new_zeros(*weights.shape[:2], embeddings.shape[2])
    grad_embeddings, grad_weight = torch.ops.cmaclip.modality_pool_backward(
        grad_pooled, grad_weights, embeddings, weight, present, weights, ctx.backend
    )
    return grad_embeddings, grad_weight, None, None


library.register_autograd("cmaclip::modality_pool", _autograd, setup_context=_setup_context)
derivatives.register_second("modality_pool", reference.modality_pool_backward)
