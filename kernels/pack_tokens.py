"""pack_tokens in Triton: where rows end, one copy of all tokens, and the type embedding's gradient in two steps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Slots of a row whose sum is one partial sum of the type embedding's gradient.
CHUNK = 64


def forward(
    text: Tensor,
    image: Tensor,
    text_lengths: Tensor,
    present: Tensor,
    type_embedding: Tensor | None,
    capacity: int | None,
) -> tuple[Tensor, Tensor]:
    """`text [B, L, D]`, `image [B, P, D]` -> packed `[T, D]`, cu_seqlens `[B + 1]`; waits only without a capacity."""
    (rows, length, width), patches = text.shape, image.shape[1]
    cu_seqlens = text_lengths.new_empty(rows + 1)
    cu_seqlens_kernel[(1,)](text_lengths, present, cu_seqlens, rows, length, patches, BLOCK_B=1024)
    tokens = int(cu_seqlens[-1]) if capacity is None else capacity
    packed = text.new_empty(tokens, width)
    if packed.numel() > 0:
        blocks = _blocks(width)
        # One row more than there are clears what follows the last.
        grid = (
            rows + 1,
            max(triton.cdiv(length + patches, blocks["BLOCK_S"]), 1),
            triton.cdiv(width, blocks["BLOCK_D"]),
        )
        pack_kernel[grid](
            *(text, image, text_lengths, present, type_embedding, cu_seqlens, packed),
            *(rows, length, patches, tokens, width),
            **blocks,
        )
    return packed, cu_seqlens


def backward(
    grad_packed: Tensor, text_lengths: Tensor, present: Tensor, cu_seqlens: Tensor, length: int, patches: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `[B, L, D]`, `[B, P, D]` and `[2, D]` of the type embedding, whose sum has a fixed order."""
    (tokens, width), rows = grad_packed.shape, len(present)
    grad_text = grad_packed.new_empty(rows, length, width)
    grad_image = grad_packed.new_empty(rows, patches, width)
    grad_type = grad_packed.new_empty(2, width)
    chunks = triton.cdiv(length + patches, CHUNK)
    partial = grad_packed.new_empty(rows * chunks, 2, width, dtype=torch.float32)
    blocks = _blocks(width)
    if partial.numel() > 0:
        unpack_kernel[(rows, chunks, triton.cdiv(width, blocks["BLOCK_D"]))](
            *(grad_packed, text_lengths, present, cu_seqlens, grad_text, grad_image, partial),
            *(length, patches, tokens, width),
            **(blocks | {"CHUNK": CHUNK}),
        )
    if width > 0:
        type_kernel[(triton.cdiv(width, 64), 2)](partial, grad_type, len(partial), width, BLOCK_R=32, BLOCK_D=64)
    return grad_text, grad_image, grad_type


def _blocks(width: int) -> dict[str, int]:
    # A program holds 4,096 elements.
    block_d = min(max(triton.next_power_of_2(width), 64), 512)
    return {"BLOCK_S": 4096 // block_d, "BLOCK_D": block_d}


@triton.jit
def _text_tokens(text_lengths, present, row, inside, length):
    exists = tl.load(present + row * 2, mask=inside, other=0) != 0
    tokens = tl.load(text_lengths + row, mask=inside, other=0)
    return tl.where(exists, tl.minimum(tl.maximum(tokens, 0), length), 0)


@triton.jit
def _image_tokens(present, row, inside, patches):
    return tl.where(tl.load(present + row * 2 + 1, mask=inside, other=0) != 0, patches, 0)


@triton.jit
def cu_seqlens_kernel(text_lengths, present, cu_seqlens, rows, length, patches, BLOCK_B: tl.constexpr):
    end = tl.full([1], 0, tl.int32)
    tl.store(cu_seqlens + tl.arange(0, 1), end)
    for start in range(0, rows, BLOCK_B):
        row = start + tl.arange(0, BLOCK_B)
        inside = row < rows
        tokens = _text_tokens(text_lengths, present, row, inside, length) + _image_tokens(present, row, inside, patches)
        tokens = tl.where(inside, tokens, 0)
        tl.store(cu_seqlens + row + 1, end + tl.cumsum(tokens, axis=0), mask=inside)
        end += tl.sum(tokens, axis=0)


@triton.jit
def pack_kernel(
    text,
    image,
    text_lengths,
    present,
    type_embedding,
    cu_seqlens,
    packed,
    rows,
    length,
    patches,
    tokens,
    width,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_in = d[None, :] < width
    first = tl.load(cu_seqlens + row)
    if row == rows:
        for start in range(first, tokens, tl.num_programs(1) * BLOCK_S):
            to = (start + slot).to(tl.int64)
            at = packed + to[:, None] * width + d[None, :]
            tl.store(at, tl.full([BLOCK_S, BLOCK_D], 0, packed.dtype.element_ty), mask=(to < tokens)[:, None] & d_in)
        return
    texts = _text_tokens(text_lengths, present, row, row < rows, length)
    images = _image_tokens(present, row, row < rows, patches)

    # A slot is a token of the packed row: first the text, then the image.
    patch = slot - texts
    is_text, is_image = slot < texts, (patch >= 0) & (patch < images)
    text_at = text + (row.to(tl.int64) * length + slot)[:, None] * width + d[None, :]
    image_at = image + (row.to(tl.int64) * patches + patch)[:, None] * width + d[None, :]
    from_text = tl.load(text_at, mask=is_text[:, None] & d_in, other=0)
    from_image = tl.load(image_at, mask=is_image[:, None] & d_in, other=0)
    token = tl.where(is_text[:, None], from_text, from_image)
    if type_embedding is not None:
        text_type = tl.load(type_embedding + d[None, :], mask=d_in, other=0)
        image_type = tl.load(type_embedding + width + d[None, :], mask=d_in, other=0)
        added = tl.where(is_text[:, None], text_type, image_type)
        token = (token.to(tl.float32) + added.to(tl.float32)).to(packed.dtype.element_ty)
    to = first.to(tl.int64) + slot
    inside = (is_text | is_image) & (to < tokens)
    tl.store(packed + to[:, None] * width + d[None, :], token, mask=inside[:, None] & d_in)


@triton.jit
def unpack_kernel(
    grad_packed,
    text_lengths,
    present,
    cu_seqlens,
    grad_text,
    grad_image,
    partial,
    length,
    patches,
    tokens,
    width,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    d_in = d[None, :] < width
    first = tl.load(cu_seqlens + row).to(tl.int64)
    texts = _text_tokens(text_lengths, present, row, row >= 0, length)
    images = _image_tokens(present, row, row >= 0, patches)

    text_sum = tl.full([BLOCK_S, BLOCK_D], 0.0, tl.float32)
    image_sum = tl.full([BLOCK_S, BLOCK_D], 0.0, tl.float32)
    for start in range(chunk * CHUNK, (chunk + 1) * CHUNK, BLOCK_S):
        # A slot is a place of the padded row: `length` places of text, then the image.
        slot = start + tl.arange(0, BLOCK_S)
        patch = slot - length
        is_text, is_image = slot < length, (patch >= 0) & (patch < patches)
        source = first + tl.where(is_text, slot, texts + patch)
        kept = tl.where(is_text, slot < texts, is_image & (patch < images)) & (source < tokens)
        grad = tl.load(grad_packed + source[:, None] * width + d[None, :], mask=kept[:, None] & d_in, other=0)
        text_at = grad_text + (row * length + slot)[:, None] * width + d[None, :]
        image_at = grad_image + (row * patches + patch)[:, None] * width + d[None, :]
        tl.store(text_at, grad, mask=is_text[:, None] & d_in)
        tl.store(image_at, grad, mask=is_image[:, None] & d_in)
        text_sum += tl.where(is_text[:, None], grad.to(tl.float32), 0.0)
        image_sum += tl.where(is_image[:, None], grad.to(tl.float32), 0.0)

    at = partial + (row * tl.num_programs(1) + chunk) * 2 * width + d
    tl.store(at, tl.sum(text_sum, axis=0), mask=d < width)
    tl.store(at + width, tl.sum(image_sum, axis=0), mask=d < width)


@triton.jit
def type_kernel(partial, grad_type, partials, width, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    modality = tl.program_id(1)
    total = tl.full([BLOCK_R, BLOCK_D], 0.0, tl.float32)
    for start in range(0, partials, BLOCK_R):
        r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        at = partial + (r * 2 + modality)[:, None] * width + d[None, :]
        total += tl.load(at, mask=(r < partials)[:, None] & (d < width)[None, :], other=0)
    at = grad_type + modality * width + d
    tl.store(at, tl.sum(total, axis=0).to(grad_type.dtype.element_ty), mask=d < width)
