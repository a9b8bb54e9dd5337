"""The text and image tokens of a batch as one packed sequence without padding (paper, figure 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from cmaclip_fast.ops import autocast, checks, derivatives, dispatch, reference


def pack_tokens(
    text: Tensor,
    image: Tensor,
    text_lengths: Tensor,
    present: Tensor,
    type_embedding: Tensor | None = None,
    *,
    capacity: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pack the tokens of each row, its text first, then its image, and add the embedding of their modality.

    An absent modality contributes no tokens, so a row with neither is empty.

    Args:
        text: `[B, L, D]` float, padded on the right.
        image: `[B, P, D]`, same dtype.
        text_lengths: `[B]` int32 or int64, the text tokens of each row, at most L; ignored where the text is absent.
        present: `[B, 2]` bool, whether text and image exist.
        type_embedding: `[2, D]`, added to each text and each image token; same dtype.
        capacity: the number of rows of the result, at least the number of tokens (`B * (L + P)` always suffices); the
            rest is 0. If None, exactly the number of tokens, for which the host waits for the device. CUDA graphs and
            `torch.compile` need it.
        backend: overrides `use_backend` and `CMACLIP_BACKEND`.

    Returns:
        packed `[T, D]` and cu_seqlens `[B + 1]` int32: row b is `packed[cu_seqlens[b]:cu_seqlens[b + 1]]`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, a text length out of range or a capacity
            too small (checked on the CPU; on a GPU if CMACLIP_DEBUG=1).
        RuntimeError: the backend asked for cannot run.
    """
    if type_embedding is None:
        text, image = autocast.to_widest(text, image)
    else:
        text, image, type_embedding = autocast.to_widest(text, image, type_embedding)
    arguments = checks.Arguments("text", text.device)
    arguments.check("text", text, "B, L, D", checks.FLOATS)
    arguments.check("image", image, "B, P, D", (text.dtype,), like="text")
    arguments.check("text_lengths", text_lengths, "B", checks.INTEGERS)
    arguments.check("present", present, "B, 2", (torch.bool,))
    if type_embedding is not None:
        arguments.check("type_embedding", type_embedding, "2, D", (text.dtype,), like="text")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be at least 0, but is {capacity}")
    call, backend = derivatives.entry("pack_tokens", _forward, backend, text, image, type_embedding)
    return call(text, image, text_lengths.to(torch.int32), present, type_embedding, capacity, backend)


library.define(
    "cmaclip::pack_tokens",
    "(Tensor text, Tensor image, Tensor text_lengths, Tensor present, Tensor? type_embedding, SymInt? capacity,"
    " str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    "cmaclip::pack_tokens_backward",
    "(Tensor grad_packed, Tensor text_lengths, Tensor present, Tensor cu_seqlens, SymInt length, SymInt patches,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(
    text: Tensor,
    image: Tensor,
    text_lengths: Tensor,
    present: Tensor,
    type_embedding: Tensor | None,
    capacity: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_values(text, image, text_lengths, present, capacity)
    run = dispatch.implementation("pack_tokens", "forward", backend, text)
    return run(
        text.contiguous(),
        image.contiguous(),
        text_lengths.contiguous(),
        present.contiguous(),
        None if type_embedding is None else type_embedding.contiguous(),
        capacity,
    )


library.impl("cmaclip::pack_tokens", "default", _forward)


@library.impl("cmaclip::pack_tokens_backward", "default")
def _backward(
    grad_packed: Tensor,
    text_lengths: Tensor,
    present: Tensor,
    cu_seqlens: Tensor,
    length: int,
    patches: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = dispatch.implementation("pack_tokens", "backward", backend, grad_packed)
    return run(
        grad_packed.contiguous(),
        text_lengths.contiguous(),
        present.contiguous(),
        cu_seqlens.contiguous(),
        length,
        patches,
    )


def _check_values(text: Tensor, image: Tensor, text_lengths: Tensor, present: Tensor, capacity: int | None) -> None:
    if not checks.values_are_checked(text):
        return
    wrong = present[:, 0] & ((text_lengths < 0) | (text_lengths > text.shape[1]))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        longest, found = text.shape[1], int(text_lengths[row])
        raise ValueError(f"text_lengths must be 0 to the length of text, {longest}, but is {found} in row {row}")
    if capacity is not None:
        tokens = int((text_lengths * present[:, 0]).sum() + image.shape[1] * present[:, 1].sum())
        if tokens > capacity:
            raise ValueError(f"capacity must be at least the number of tokens, {tokens}, but is {capacity}")
    checks.not_nan(text=text, image=image)


@library.register_fake("cmaclip::pack_tokens")
def _(
    text: Tensor,
    image: Tensor,
    text_lengths: Tensor,
    present: Tensor,
    type_embedding: Tensor | None,
    capacity: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tokens = library.get_ctx().new_dynamic_size() if capacity is None else capacity
    return text.new_empty(tokens, text.shape[2]), text_lengths.new_empty(text.shape[0] + 1)


@library.register_fake("cmaclip::pack_tokens_backward")
def _(
    grad_packed: Tensor,
    text_lengths: Tensor,
    present: Tensor,
    cu_seqlens: Tensor,
    length: int,
    patches: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = present.shape[0], grad_packed.shape[1]
    return (
        grad_packed.new_empty(rows, length, width),
        grad_packed.new_empty(rows, patches, width),
        grad_packed.new_empty(2, width),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    text, image, text_lengths, present, type_embedding, _, ctx.backend = inputs
    ctx.save_for_backward(text_lengths, present, output[1])
    ctx.length, ctx.patches, ctx.typed = text.shape[1], image.shape[1], type_embedding is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_packed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_packed is None:
        return (None,) * 7
    text_lengths, present, cu_seqlens = ctx.saved_tensors
    grad_text, grad_image, grad_type = torch.ops.cmaclip.pack_tokens_backward(
        grad_packed, text_lengths, present, cu_seqlens, ctx.length, ctx.patches, ctx.backend
    )
    return grad_text, grad_image, None, None, grad_type if ctx.typed else None, None, None


library.register_autograd("cmaclip::pack_tokens", _autograd, setup_context=_setup_context)
derivatives.register_second("pack_tokens", reference.pack_tokens_backward)
