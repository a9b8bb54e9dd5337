"""The CUDA kernels of packed_attention in the emulator: values, gradients, faults, traffic and tensor-core counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cmaclip_fast.ops import reference

from .. import rule
from .arrays import DTYPES, Load, ceil_div, ends
from .attention import PRODUCTS, Attention, fewest_instructions
from .emulate import ORDERS

FORWARD = ORDERS[:1]


def inputs(q_lengths, k_lengths, heads: int, size: int, dtype: torch.dtype, spare: int = 0) -> list[Tensor]:
    tokens_q, tokens_k = sum(q_lengths) + spare, sum(k_lengths) + spare
    return [torch.randn(tokens, heads, size).to(dtype) for tokens in (tokens_q, tokens_k, tokens_k)]


def run(
    kernels: Load,
    q_lengths,
    k_lengths,
    heads: int = 1,
    size: int = 64,
    dtype: torch.dtype = torch.float16,
    causal: bool = False,
    spare: int = 0,
    scale: float | None = None,
    grow: float = 1.0,
    orders=FORWARD,
    fused: bool = False,
) -> Attention:
    """Forward and backward on the emulator, each held against float64."""
    q, k, v = inputs(q_lengths, k_lengths, heads, size, dtype, spare)
    if fused:
        q, k, v = torch.stack([q, k, v], dim=1).unbind(1)
    else:
        q *= grow
    call = Attention(kernels, q, k, v, q_lengths, k_lengths, causal, scale, orders)
    rest = (ends(q_lengths), ends(k_lengths), call.longest_q, call.longest_k, call.scale, causal)
    plain = reference.packed_attention_forward(q, k, v, *rest)
    exact = reference.packed_attention_forward(q.double(), k.double(), v.double(), *rest)
    out, lse = call.forward()
    grad_out, grad_lse = torch.randn(q.shape).to(dtype), None if fused else torch.randn(lse.shape)
    wide = None if grad_lse is None else grad_lse.double()
    results = call.backward(grad_out, grad_lse, out, lse)
    plain_grads = reference.packed_attention_backward(grad_out, grad_lse, q, k, v, *plain, *rest)
    doubles = (grad_out.double(), wide, q.double(), k.double(), v.double(), *exact)
    exact_grads = reference.packed_attention_backward(*doubles, *rest)
    conditioning = rule.attention(grad_out, grad_lse, q, k, v, *rest[:2], call.scale, causal)
    for name, *judged, kind, bound in zip(
        ("out", "lse", *(f"gradient of {name}" for name in "qkv")),
        (out, lse, *results),
        (*plain, *plain_grads),
        (*exact, *exact_grads),
        (dtype, torch.float32, dtype, dtype, dtype),
        conditioning,
        strict=True,
    ):
        rule.judge(name, *judged, kind, bound)
    return call


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [32, 64, 80, 96, 128])
def test_head_sizes(kernels: Load, size: int, causal: bool) -> None:
    run(kernels, [35, 0, 1], [35, 3, 1], size=size, causal=causal, heads=2 if size == 32 else 1)


@pytest.mark.parametrize("size", [32, 80, 128])
def test_float32(kernels: Load, size: int) -> None:
    run(kernels, [37, 2], [37, 18], size=size, dtype=torch.float32, causal=size == 80)


def test_bfloat16(kernels: Load) -> None:
    run(kernels, [20, 3], [70, 3], dtype=torch.bfloat16, spare=2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths", "causal"),
    [
        ([2, 2, 0, 2], [45, 1, 3, 0], False),
        ([70], [130], True),
        ([130], [70], True),
        ([65, 1], [9, 129], False),
        ([0, 0], [0, 0], False),
        ([], [], False),
    ],
)
def test_query_and_key_lengths(kernels: Load, q_lengths, k_lengths, causal: bool, dtype: torch.dtype) -> None:
    run(kernels, q_lengths, k_lengths, causal=causal, dtype=dtype, spare=3)


def test_head_size_between_instances(kernels: Load) -> None:
    run(kernels, [19, 5], [19, 5], size=40, heads=2)


def test_every_order_gives_the_same_bits(kernels: Load) -> None:
    run(kernels, [18, 66, 1], [18, 66, 1], size=32, orders=ORDERS, heads=2)


def test_one_fused_projection(kernels: Load) -> None:
    run(kernels, [5, 40], [5, 40], heads=2, size=32, fused=True)


@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scale(kernels: Load, scale: float) -> None:
    run(kernels, [6, 70], [6, 70], scale=scale, dtype=torch.float32)


def test_large_scores_do_not_overflow(kernels: Load) -> None:
    run(kernels, [40, 7], [140, 7], size=32, grow=100, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("cancelling", [False, True])
def test_delta_is_exact_beside_what_it_is_the_sum_of(kernels: Load, cancelling: bool, dtype: torch.dtype) -> None:
    """Its terms may cancel, so that no bound beside the sum itself can hold: a rounding each, beside their sizes."""
    lengths = [2, 2, 0, 2], [45, 1, 3, 0]
    q, k, v = inputs(*lengths, 2, 64, dtype)
    call = Attention(kernels, q, k, v, *lengths, causal=True, orders=FORWARD)
    out, grad_out = call.forward()[0], torch.randn(q.shape).to(dtype)
    terms = (grad_out.double() * out.double()).permute(1, 0, 2)
    grad_lse = terms.sum(-1).float() if cancelling else torch.randn(2, len(q))
    error = (call.delta(grad_out, grad_lse, out).double() - (terms.sum(-1) - grad_lse.double())).abs()
    # a lane's elements one after another, the lanes in a tree, and the gradient of the log-sum-exp
    per_lane = 16 // dtype.itemsize
    depth = per_lane + (128 // per_lane).bit_length()
    assert (error <= depth * rule.UNIT * (terms.abs().sum(-1) + grad_lse.abs())).all()
    if cancelling:
        assert (error[:, 0] > 100 * rule.UNIT * (terms.sum(-1) - grad_lse.double())[:, 0].abs()).any()


@pytest.mark.parametrize("lengths", [[127], [197], [70, 2]], ids=str)
def test_float32_keeps_the_rule_where_tensor_cores_truncate(kernels: Load, lengths: list[int], monkeypatch) -> None:
    monkeypatch.setenv("CMACLIP_EMULATOR_MMA", "truncate")
    run(kernels, lengths, lengths, size=64, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_keep_the_rule_where_tensor_cores_truncate(kernels: Load, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setenv("CMACLIP_EMULATOR_MMA", "truncate")
    run(kernels, [130, 2], [70, 18], dtype=dtype)


def test_nan_stays_in_its_query(kernels: Load) -> None:
    q, k, v = inputs([4, 4], [4, 4], 1, 32, torch.float16)
    q[1] = torch.nan
    out, lse = Attention(kernels, q, k, v, [4, 4], [4, 4], orders=FORWARD).forward()
    assert out[1].isnan().all() and lse[:, 1].isnan().all()
    others = [0, 2, 3, 4, 5, 6, 7]
    assert out[others].isfinite().all() and lse[:, others].isfinite().all()


@pytest.mark.parametrize("rows", [5, 31, 70])
def test_rows_with_most_keys_come_first(kernels: Load, rows: int) -> None:
    """In the order of whole 64 keys, as they come where these are equal; more rows than a warp's lanes in turns."""
    lengths = [3, 300, 70, 0, 129, *torch.randint(0, 300, (rows - 5,)).tolist()]
    q, k, v = inputs(lengths, lengths, 1, 32, torch.float16)
    call = Attention(kernels, q, k, v, lengths, lengths)
    items = call.plan(len(q), 4, call.ends_q, call.ends_k).view("int32").reshape(-1, 2)
    first = [0, *itertools.accumulate(lengths)]
    order = sorted(range(rows), key=lambda row: -ceil_div(lengths[row], 64))
    expected = [(row, first[row] + at) for row in order for at in range(0, lengths[row], 64)]
    assert [tuple(item) for item in items[: len(expected)]] == expected
    assert (items[len(expected) :, 0] == -1).all()


# Lengths as in ViT-B/16's tower and in the fusion of ViT-B/32's 50 patches with 77 text tokens.
@pytest.mark.parametrize("lengths", [[197], [127]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_traffic_and_instructions(kernels: Load, lengths: list[int], dtype: torch.dtype) -> None:
    """As few sectors as can be, no bank conflicts, and tensor-core instructions near the arithmetic's minimum."""
    call = run(kernels, lengths, lengths, size=64, dtype=dtype)
    name = {torch.float16: "mma_f16", torch.bfloat16: "mma_bf16", torch.float32: "mma_tf32"}[dtype]
    for kernel in PRODUCTS:
        report = call.reports[kernel]
        assert report.counts.sectors <= 1.05 * report.counts.fewest_sectors, kernel
        assert report.counts.bank_conflicts == 0, kernel
        fewest = sum(fewest_instructions(kernel, dtype, n, n)[0] for n in lengths)
        assert report.instructions[name] <= 1.15 * fewest, kernel


def test_fewest_instructions() -> None:
    """By hand, 17 queries and 20 keys of size 64: two tiles of 16 rows; causal queries see from 4 to 20 keys."""
    half, single = torch.float16, torch.float32
    assert fewest_instructions("forward", half, 17, 20) == (2 * 17 * 20 * 64 / 2048, 2 * (3 * 4 + 2 * 8))
    assert fewest_instructions("backward_q", half, 17, 20)[1] == 2 * (2 * 3 * 4 + 2 * 8)
    assert fewest_instructions("backward_kv", half, 17, 20)[1] == 2 * (2 * 3 * 4 + 2 * 2 * 8)
    assert fewest_instructions("forward", single, 17, 20) == ((6 + 3) * 17 * 20 * 64 / 1024, 2 * (6 + 3) * 3 * 8)
    # The first 16 queries see up to 19 keys. The first four keys are seen by all queries, key 16 by four.
    pairs = sum(range(4, 21))
    assert fewest_instructions("forward", half, 17, 20, causal=True) == (2 * pairs * 64 / 2048, 2 * (3 * 4 + 2 * 8))
    assert fewest_instructions("backward_kv", half, 17, 20, causal=True) == (
        4 * pairs * 64 / 2048,
        (2 * 3 * 4 + 2 * 2 * 8) + (2 * 1 * 4 + 2 * 1 * 8),
    )
