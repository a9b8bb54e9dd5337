"""Text and image tokens of a batch as one packed sequence without padding (paper, figure 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from cmaclip_fast.ops import autocast, checks, derivatives, dispatch, reference


def pack_tokens(
    text: Tensor,
    image: Tensor,
    starts: Tensor,
    counts: Tensor,
    type_embedding: Tensor | None = None,
    *,
    capacity: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Pack the tokens of each row, its text first, then its image, and add the embedding of their modality.

    Both sources are packed themselves. Row b takes `counts[b, 0]` tokens of `text` from `starts[b, 0]` on, then
    `counts[b, 1]` tokens of `image` from `starts[b, 1]` on. Rows may share tokens; tokens may belong to no row.

    The gradient of a shared token is the sum over its rows in their order, the same at each run.

    Args:
        text: `[Tt, D]` float.
        image: `[Ti, D]`, same dtype.
        starts: `[B, 2]` int32 or int64, the first token of each row in `text` and in `image`; ignored where the count
            is 0.
        counts: `[B, 2]` int32 or int64, how many tokens; 0 for an absent modality.
        type_embedding: `[2, D]`, added to each text and each image token; same dtype.
        capacity: the number of rows of the result, at least the number of tokens; the rest is 0. If None, exactly the
            number of tokens, for which the host waits for the device. CUDA graphs and `torch.compile` need it.
        backend: overrides `use_backend` and `CMACLIP_BACKEND`.

    Returns:
        packed `[T, D]` and cu_seqlens `[B + 1]` int32: row b is `packed[cu_seqlens[b]:cu_seqlens[b + 1]]`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, tokens outside of their source or a
            capacity too small (checked on the CPU; on a GPU if CMACLIP_DEBUG=1).
        RuntimeError: the backend asked for cannot run.
    """
    if type_embedding is None:
        text, image = autocast.to_widest(text, image)
    else:
        text, image, type_embedding = autocast.to_widest(text, image, type_embedding)
    arguments = checks.Arguments("text", text.device)
    arguments.check("text", text, "Tt, D", checks.FLOATS)
    arguments.check("image", image, "Ti, D", (text.dtype,), like="text")
    arguments.check("starts", starts, "B, 2", checks.INTEGERS)
    arguments.check("counts", counts, "B, 2", checks.INTEGERS)
    if type_embedding is not None:
        arguments.check("type_embedding", type_embedding, "2, D", (text.dtype,), like="text")
    if capacity is not None and capacity < 0:
        raise ValueError(f"capacity must be at least 0, but is {capacity}")
    call, backend = derivatives.entry("pack_tokens", _forward, backend, text, image, type_embedding)
    return call(text, image, starts.to(torch.int32), counts.to(torch.int32), type_embedding, capacity, backend)


def pack_padded(
    text: Tensor,
    image: Tensor,
    counts: Tensor,
    type_embedding: Tensor | None = None,
    *,
    capacity: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`pack_tokens` of the first `counts [B, 2]` tokens of each row of `text [B, L, D]` and `image [B, P, D]`.

    Returns:
        packed `[T, D]` and cu_seqlens `[B + 1]` int32.
    """
    row = torch.arange(len(counts), dtype=torch.int32, device=counts.device)
    starts = torch.stack([row * text.shape[1], row * image.shape[1]], dim=1)
    text, image = text.flatten(0, 1), image.flatten(0, 1)
    return pack_tokens(text, image, starts, counts, type_embedding, capacity=capacity, backend=backend)


def unpad(
    padded: Tensor, counts: Tensor, *, capacity: int | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`pack_tokens` of the first `counts [B]` tokens of each row of `padded [B, L, D]`.

    Returns:
        packed `[T, D]` and cu_seqlens `[B + 1]` int32.
    """
    counts = torch.stack([counts, torch.zeros_like(counts)], dim=1)
    return pack_padded(padded, padded[:, :0], counts, capacity=capacity, backend=backend)


library.define(
    "cmaclip::pack_tokens",
    "(Tensor text, Tensor image, Tensor starts, Tensor counts, Tensor? type_embedding, SymInt? capacity,"
    " str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
library.define(
    "cmaclip::pack_tokens_backward",
    "(Tensor grad_packed, Tensor starts, Tensor counts, Tensor cu_seqlens, SymInt texts, SymInt images,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(
    text: Tensor,
    image: Tensor,
    starts: Tensor,
    counts: Tensor,
    type_embedding: Tensor | None,
    capacity: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    _check_values(text, image, starts, counts, capacity)
    run = dispatch.implementation("pack_tokens", "forward", backend, text)
    return run(
        *(text.contiguous(), image.contiguous(), starts.contiguous(), counts.contiguous()),
        *(None if type_embedding is None else type_embedding.contiguous(), capacity),
    )


library.impl("cmaclip::pack_tokens", "default", _forward)


@library.impl("cmaclip::pack_tokens_backward", "default")
def _backward(
    grad_packed: Tensor, starts: Tensor, counts: Tensor, cu_seqlens: Tensor, texts: int, images: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    run = dispatch.implementation("pack_tokens", "backward", backend, grad_packed)
    return run(
        *(grad_packed.contiguous(), starts.contiguous(), counts.contiguous(), cu_seqlens.contiguous()),
        *(texts, images),
    )


def _check_values(text: Tensor, image: Tensor, starts: Tensor, counts: Tensor, capacity: int | None) -> None:
    if not checks.values_are_checked(text):
        return
    sizes = torch.tensor([len(text), len(image)], device=starts.device)
    wrong = (counts < 0) | ((counts > 0) & ((starts < 0) | (starts.long() + counts > sizes)))
    if bool(wrong.any()):
        row, modality = wrong.nonzero()[0].tolist()
        first, count = int(starts[row, modality]), int(counts[row, modality])
        raise ValueError(
            f"row {row} takes {count} tokens of {('text', 'image')[modality]} from {first} on, "
            f"but starts and counts must lie within its {int(sizes[modality])} tokens"
        )
    if capacity is not None and (tokens := int(counts.sum())) > capacity:
        raise ValueError(f"capacity must be at least the number of tokens, {tokens}, but is {capacity}")
    checks.not_nan(text=text, image=image)


@library.register_fake("cmaclip::pack_tokens")
def _(
    text: Tensor,
    image: Tensor,
    starts: Tensor,
    counts: Tensor,
    type_embedding: Tensor | None,
    capacity: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tokens = library.get_ctx().new_dynamic_size() if capacity is None else capacity
    return text.new_empty(tokens, text.shape[1]), starts.new_empty(starts.shape[0] + 1)


@library.register_fake("cmaclip::pack_tokens_backward")
def _(
    grad_packed: Tensor, starts: Tensor, counts: Tensor, cu_seqlens: Tensor, texts: int, images: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    width = grad_packed.shape[1]
    return grad_packed.new_empty(texts, width), grad_packed.new_empty(images, width), grad_packed.new_empty(2, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    text, image, starts, counts, type_embedding, _, ctx.backend = inputs
    ctx.save_for_backward(starts, counts, output[1])
    ctx.texts, ctx.images, ctx.typed = text.shape[0], image.shape[0], type_embedding is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _autograd(ctx: Any, grad_packed: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_packed is None:
        return (None,) * 7
    starts, counts, cu_seqlens = ctx.saved_tensors
    grad_text, grad_image, grad_type = torch.ops.cmaclip.pack_tokens_backward(
        grad_packed, starts, counts, cu_seqlens, ctx.texts, ctx.images, ctx.backend
    )
    return grad_text, grad_image, None, None, grad_type if ctx.typed else None, None, None


library.register_autograd("cmaclip::pack_tokens", _autograd, setup_context=_setup_context)
derivatives.register_second("pack_tokens", reference.pack_tokens_backward)
