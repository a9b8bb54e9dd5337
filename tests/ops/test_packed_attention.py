"""packed_attention on the CPU: every backend against float64, odd sizes, empty rows, strided views, bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import check, ends, packed_attention_case, spread
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from cmaclip_fast.ops import available_backends, dispatch, packed_attention

pytestmark = pytest.mark.usefixtures("nan_filled")
BACKENDS = [name for name in ("reference", "cpp") if available_backends(operator="packed_attention")[name] is None]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [32, 64, 80, 96, 128])
def test_head_sizes(backend, dtype, causal, size):
    check(packed_attention_case([45, 1, 0, 70, 33], heads=3, size=size, causal=causal), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"),
    [
        ([1], [1]),
        ([2, 2, 0, 2], [45, 1, 3, 0]),
        ([129, 300], [300, 129]),
        ([0, 0], [0, 0]),
        ([], []),
        ([1000], [1000]),
    ],
)
def test_query_and_key_lengths(backend, dtype, causal, q_lengths, k_lengths):
    check(packed_attention_case(q_lengths, k_lengths, size=64, causal=causal, spare=3), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [20, 64])
def test_few_queries(backend, dtype, causal, size):
    case = packed_attention_case([1, 2, 3, 4, 5, 2, 2], [50, 127, 17, 64, 33, 1, 0], heads=3, size=size, causal=causal)
    check(case, backend, dtype)
    check(case, backend, dtype, transform=spread)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_longest_row(backend):
    check(packed_attention_case([4096], heads=1, size=32), backend, torch.float32)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5),
    st.integers(1, 4),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from(DTYPES),
)
def test_any_shape(lengths, heads, size, causal, dtype):
    q_lengths, k_lengths = [q for q, _ in lengths], [k for _, k in lengths]
    check(packed_attention_case(q_lengths, k_lengths, heads, size, causal), BACKENDS[-1], dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views(backend, dtype):
    case = packed_attention_case([5, 9], heads=3, size=20)
    check(case, backend, dtype, transform=spread)
    check(case, backend, dtype, transform=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_fused_projection(backend):
    qkv = torch.randn(14, 3, 2, 32, requires_grad=True)
    cu_seqlens = ends([5, 9])
    out, _ = packed_attention(*qkv.unbind(1), cu_seqlens, cu_seqlens, 9, 9, backend=backend)
    out.square().sum().backward()
    (grad,) = (qkv.grad.clone(),)
    plain = qkv.detach().clone().requires_grad_()
    rows = []
    for row in (plain[:5], plain[5:]):
        q, k, v = row.permute(1, 2, 0, 3)
        rows.append(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    torch.cat(rows).square().sum().backward()
    torch.testing.assert_close(grad, plain.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(backend, dtype):
    case = packed_attention_case([40, 7])
    case.arguments["q"] *= 300
    check(case, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0.0, -0.5, 2.0])
def test_scale(backend, dtype, causal, scale):
    case = packed_attention_case([6, 20], causal=causal)
    case.arguments["scale"] = scale
    check(case, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [4, 7])
def test_nan_stays_in_its_row(backend, dtype, length):
    case = packed_attention_case([length, length]).tensors(dtype)
    case["q"][1] = torch.nan
    out, lse = packed_attention(**case, backend=backend)
    others = [row for row in range(len(out)) if row != 1]
    assert out[1].isnan().all()
    assert lse[:, 1].isnan().all()
    assert out[others].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(causal):
    case = packed_attention_case([3, 0, 2], [4, 2, 1], size=3, causal=causal).tensors(torch.float64)
    leaves = [case.pop(name).requires_grad_() for name in ("q", "k", "v")]

    def run(q, k, v):
        out, lse = packed_attention(q, k, v, **case, backend="reference")
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "heads"), [([45, 200, 1, 70] * 4, 4), ([1300], 1)])
def test_same_gradient_for_any_number_of_threads(backend, dtype, lengths, heads):
    case = packed_attention_case(lengths, heads=heads, size=64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.run(backend, dtype)
        torch.set_num_threads(2)
        two = case.run(backend, dtype)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(5, 32)}, ValueError, r"q must have the shape \[Tq, H, E\]"),
        ({"q": torch.zeros(5, 2, 4).int()}, TypeError, "q must be of dtype"),
        ({"k": torch.zeros(5, 3, 4)}, ValueError, r"k must have .* 2 \(from q\) at dimension 1"),
        ({"v": torch.zeros(4, 2, 4)}, ValueError, r"v must have .* 5 \(from k\) at dimension 0"),
        ({"v": torch.zeros(5, 2, 4).double()}, TypeError, "v must have the dtype of q"),
        ({"q": torch.zeros(5, 4, 2).mT}, ValueError, r"q must be contiguous in its last dimension.*q.contiguous\(\)"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, TypeError, "cu_seqlens_q must be of dtype int32"),
        ({"cu_seqlens_k": ends([2, 1, 2])}, ValueError, r"cu_seqlens_k must have the shape \[B\+1\] with 3"),
        ({"cu_seqlens_q": ends([2, 4])}, ValueError, "cu_seqlens_q must end at most at the number of tokens, 5"),
        ({"cu_seqlens_q": ends([3, -1])}, ValueError, "cu_seqlens_q must not decrease, but does at index 2"),
        ({"cu_seqlens_q": ends([1, 1]) + 1}, ValueError, "cu_seqlens_q must begin with 0, but begins with 1"),
        ({"max_seqlen_k": 2}, ValueError, "max_seqlen_k must be at least the longest row of cu_seqlens_k, 3"),
        ({"cu_seqlens_q": ends([])[:0], "cu_seqlens_k": ends([])[:0]}, ValueError, "at least one element"),
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_bad_input(change, error, message, gradients):
    good = {
        **{name: torch.zeros(5, 2, 4) for name in "qkv"},
        **{"cu_seqlens_q": ends([2, 3]), "cu_seqlens_k": ends([2, 3]), "max_seqlen_q": 4, "max_seqlen_k": 3},
    }
    with pytest.raises(error, match=message), torch.set_grad_enabled(gradients):
        packed_attention(**(good | change))


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension was not built")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_short_way_to_compiled_code_gives_the_same(dtype, monkeypatch):
    case = packed_attention_case([5, 0, 9], [7, 3, 40], heads=3, size=20, spare=2).tensors(dtype)
    expected = packed_attention(**case)
    seen = []
    monkeypatch.setattr(dispatch, "implementation", lambda *_: seen.append(1))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(packed_attention(**case), expected, strict=True))
    assert not seen, "the dispatcher was asked"


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension was not built")
def test_the_short_way_is_left_where_something_wants_to_see_the_operator(monkeypatch):
    x = torch.zeros(2)
    assert not dispatch.straight_to_cpp(None, x)
    with torch.inference_mode():
        assert dispatch.straight_to_cpp("cpp", x)
        assert not dispatch.straight_to_cpp("reference", x)
        assert not dispatch.straight_to_cpp(None, x, torch.nn.Parameter(x, requires_grad=False))
        with dispatch.use_backend("reference"):
            assert not dispatch.straight_to_cpp(None, x)
        with torch.autocast("cpu"):
            assert not dispatch.straight_to_cpp(None, x)
        with FakeTensorMode():
            assert not dispatch.straight_to_cpp(None, x)
        monkeypatch.setenv("CMACLIP_DEBUG", "1")
        assert not dispatch.straight_to_cpp(None, x)
    with torch.no_grad(), forward_ad.dual_level():
        assert not dispatch.straight_to_cpp("cpp", x)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension was not built")
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, torch.zeros(5, 2)),
        (0, torch.zeros(5, 2, 0)),
        (0, torch.zeros(5, 2, 4).double()),
        (1, torch.zeros(5, 3, 4)),
        (1, torch.zeros(5, 4, 2).mT),
        (2, torch.zeros(4, 2, 4)),
        (3, ends([2, 4])),
        (3, ends([3, -1])),
        (3, ends([2, 3]) + 1),
        (3, ends([2, 3]).long()),
        (4, ends([5])),
        (4, ends([])[:0]),
        (5, 2),
        (6, 2),
    ],
)
def test_compiled_code_refuses_what_it_cannot_read(place, value):
    arguments = [*(torch.zeros(5, 2, 4) for _ in range(3)), ends([2, 3]), ends([2, 3]), 3, 3, 0.5, False]
    run = torch.ops.cmaclip._packed_attention_forward_cpp
    run(*arguments)
    arguments[place] = value
    with pytest.raises(RuntimeError):
        run(*arguments)
