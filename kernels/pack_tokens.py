"""pack_tokens in Triton: where rows end, one copy of all tokens, and the gradients of the sources and the types."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Source tokens whose sum is one partial sum of the type embedding's gradient.
CHUNK = 64
# Rows that are looked at together.
BLOCK_B = 1024


def forward(
    text: Tensor, image: Tensor, starts: Tensor, counts: Tensor, type_embedding: Tensor | None, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """`text [Tt, D]`, `image [Ti, D]` -> packed `[T, D]`, cu_seqlens `[B + 1]`; waits only without a capacity."""
    rows, width = len(starts), text.shape[1]
    cu_seqlens = starts.new_empty(rows + 1)
    cu_seqlens_kernel[(1,)](starts, counts, cu_seqlens, rows, len(text), len(image), BLOCK_B=BLOCK_B)
    tokens = int(cu_seqlens[-1]) if capacity is None else capacity
    packed = text.new_empty(tokens, width)
    if packed.numel() > 0:
        blocks = _blocks(width)
        grid = (triton.cdiv(tokens, blocks["BLOCK_S"]), triton.cdiv(width, blocks["BLOCK_D"]))
        pack_kernel[grid](
            *(text, image, starts, counts, type_embedding, cu_seqlens, packed),
            *(rows, len(text), len(image), tokens, width),
            **(blocks | {"STEPS": max(rows, 1).bit_length()}),
        )
    return packed, cu_seqlens


def backward(
    grad_packed: Tensor, starts: Tensor, counts: Tensor, cu_seqlens: Tensor, texts: int, images: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `[Tt, D]`, `[Ti, D]` and `[2, D]` of the type embedding; all sums have a fixed order."""
    (tokens, width), rows = grad_packed.shape, len(starts)
    grad_text, grad_image = grad_packed.new_empty(texts, width), grad_packed.new_empty(images, width)
    grad_type = grad_packed.new_empty(2, width)
    if width == 0:
        return grad_text, grad_image, grad_type
    blocks = _blocks(width)
    for modality, grad in enumerate((grad_text, grad_image)):
        chunks = triton.cdiv(len(grad), CHUNK)
        partial = grad_packed.new_empty(chunks, width, dtype=torch.float32)
        if chunks > 0:
            unpack_kernel[(chunks, triton.cdiv(width, blocks["BLOCK_D"]))](
                *(grad_packed, starts, counts, cu_seqlens, grad, partial),
                *(modality, rows, texts, len(grad), tokens, width),
                **(blocks | {"CHUNK": CHUNK, "BLOCK_B": BLOCK_B}),
            )
        type_kernel[(triton.cdiv(width, 64),)](partial, grad_type[modality], chunks, width, BLOCK_R=32, BLOCK_D=64)
    return grad_text, grad_image, grad_type


def _blocks(width: int) -> dict[str, int]:
    # A program holds 4,096 elements.
    block_d = min(max(triton.next_power_of_2(width), 64), 512)
    return {"BLOCK_S": 4096 // block_d, "BLOCK_D": block_d}


@triton.jit
def _spans(starts, counts, row, inside, modality, size):
    """The first token of each row in a source and how many it takes, kept within the source."""
    first = tl.load(starts + row * 2 + modality, mask=inside, other=0)
    first = tl.minimum(tl.maximum(first, 0), size)
    count = tl.load(counts + row * 2 + modality, mask=inside, other=0)
    return first, tl.minimum(tl.maximum(count, 0), size - first)


@triton.jit
def cu_seqlens_kernel(starts, counts, cu_seqlens, rows, texts, images, BLOCK_B: tl.constexpr):
    end = tl.full([1], 0, tl.int32)
    tl.store(cu_seqlens + tl.arange(0, 1), end)
    for start in range(0, rows, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        inside = row < rows
        _, text_count = _spans(starts, counts, row, inside, 0, texts)
        _, image_count = _spans(starts, counts, row, inside, 1, images)
        tokens = tl.where(inside, text_count + image_count, 0)
        tl.store(cu_seqlens + row + 1, end + tl.cumsum(tokens, axis=0), mask=inside)
        end += tl.sum(tokens, axis=0)


@triton.jit
def pack_kernel(
    text,
    image,
    starts,
    counts,
    type_embedding,
    cu_seqlens,
    packed,
    rows,
    texts,
    images,
    tokens,
    width,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_in = d[None, :] < width

    # The row of each token is the number of rows that end at or before it.
    row = tl.full([BLOCK_S], 0, tl.int32)
    above = tl.full([BLOCK_S], 0, tl.int32) + rows
    for _ in tl.static_range(STEPS):
        middle = (row + above) // 2
        searched = row < above
        ends_before = tl.load(cu_seqlens + middle + 1, mask=searched, other=0) <= token
        row = tl.where(searched & ends_before, middle + 1, row)
        above = tl.where(searched & ~ends_before, middle, above)
    inside = row < rows

    text_first, text_count = _spans(starts, counts, row, inside, 0, texts)
    image_first, _ = _spans(starts, counts, row, inside, 1, images)
    place = token - tl.load(cu_seqlens + row, mask=inside, other=0)
    is_text, is_image = inside & (place < text_count), inside & (place >= text_count)
    text_at = text + (text_first + place).to(tl.int64)[:, None] * width + d[None, :]
    image_at = image + (image_first + place - text_count).to(tl.int64)[:, None] * width + d[None, :]
    from_text = tl.load(text_at, mask=is_text[:, None] & d_in, other=0)
    from_image = tl.load(image_at, mask=is_image[:, None] & d_in, other=0)
    value = tl.where(is_text[:, None], from_text, from_image)
    if type_embedding is not None:
        text_type = tl.load(type_embedding + d[None, :], mask=d_in, other=0)
        image_type = tl.load(type_embedding + width + d[None, :], mask=d_in, other=0)
        added = tl.where(is_text[:, None], text_type, image_type)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(packed.dtype.element_ty)
    # What follows the last row is 0.
    value = tl.where(inside[:, None], value, 0.0).to(packed.dtype.element_ty)
    at = packed + token.to(tl.int64)[:, None] * width + d[None, :]
    tl.store(at, value, mask=(token < tokens)[:, None] & d_in)


@triton.jit
def unpack_kernel(
    grad_packed,
    starts,
    counts,
    cu_seqlens,
    grad_source,
    partial,
    modality,
    rows,
    texts,
    sources,
    tokens,
    width,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    chunk = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_in = d[None, :] < width

    # The first and the last row that hold a token of this chunk; all others are passed over.
    first_row = tl.full([], 0, tl.int32) + rows
    last_row = tl.full([], -1, tl.int32)
    for start in range(0, rows, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        first, count = _spans(starts, counts, row, row < rows, modality, sources)
        holds = (count > 0) & (first < (chunk + 1) * CHUNK) & (first + count > chunk * CHUNK)
        first_row = tl.minimum(first_row, tl.min(tl.where(holds, row, rows), axis=0))
        last_row = tl.maximum(last_row, tl.max(tl.where(holds, row, -1), axis=0))

    total = tl.full([BLOCK_S, BLOCK_D], 0.0, tl.float32)
    for start in range(chunk * CHUNK, (chunk + 1) * CHUNK, BLOCK_S):
        source = start + tl.arange(0, BLOCK_S)
        grad = tl.full([BLOCK_S, BLOCK_D], 0.0, tl.float32)
        for row in range(first_row, last_row + 1):
            first, count = _spans(starts, counts, row, row < rows, modality, sources)
            if (count > 0) & (first < start + BLOCK_S) & (first + count > start):
                _, text_count = _spans(starts, counts, row, row < rows, 0, texts)
                before = tl.load(cu_seqlens + row) + tl.where(modality == 0, 0, text_count)
                token = before.to(tl.int64) + source - first
                held = (source >= first) & (source < first + count) & (token < tokens)
                at = grad_packed + token[:, None] * width + d[None, :]
                grad += tl.load(at, mask=held[:, None] & d_in, other=0).to(tl.float32)
        at = grad_source + source.to(tl.int64)[:, None] * width + d[None, :]
        tl.store(at, grad.to(grad_source.dtype.element_ty), mask=(source < sources)[:, None] & d_in)
        total += grad

    tl.store(partial + chunk.to(tl.int64) * width + d, tl.sum(total, axis=0), mask=d < width)


@triton.jit
def type_kernel(partial, grad_type, partials, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.full([BLOCK_R, BLOCK_D], 0.0, tl.float32)
    for start in range(0, partials, BLOCK_R):
        r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        at = partial + r[:, None] * width + d[None, :]
        total += tl.load(at, mask=(r < partials)[:, None] & (d < width)[None, :], other=0)
    tl.store(grad_type + d, tl.sum(total, axis=0).to(grad_type.dtype.element_ty), mask=d < width)
