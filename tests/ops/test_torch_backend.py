"""The backend `torch`, with FlashAttention played by the reference, and how `auto` chooses on a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from support import check, packed_attention_case, spread

from cmaclip_fast import env
from cmaclip_fast.ops import dispatch, packed_attention, preferences, reference, varlen

CASES = {
    "rows": lambda: packed_attention_case([127, 1, 0, 60, 93], heads=2, size=64),
    "two queries": lambda: packed_attention_case([2] * 4, [127, 60, 3, 2], heads=2, size=80),
    "more queries than keys, causal": lambda: packed_attention_case([9, 4, 3], [5, 0, 8], size=32, causal=True),
    "keys missing": lambda: packed_attention_case([2, 3, 0], [5, 0, 4], size=32),
    "tokens after the last row": lambda: packed_attention_case([3, 5], [4, 2], size=32, spare=3),
    "no rows": lambda: packed_attention_case([], size=32, spare=3),
    "empty rows": lambda: packed_attention_case([0, 0], [0, 0], size=32, spare=3),
    "no keys": lambda: packed_attention_case([2, 1], [0, 0], size=32),
}


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict]]:
    """The options of each call; what FlashAttention does not write is NaN, and its log-sum-exp of no key infinity."""
    calls: list[dict] = []

    def causal_of(window: tuple[int, int], longest: int) -> bool:
        # FlashAttention's own rule: a window of the longest row or more is none
        assert window == (-1, 0) or min(window) >= longest
        return window == (-1, 0)

    def unwritten(tensor: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        tensor[int(ends[-1]) :] = torch.nan
        return tensor

    def forward(q, k, v, ends_q, ends_k, longest_q, longest_k, *, return_aux, scale, window_size):
        assert longest_q > 0 and longest_k > 0 and return_aux.lse
        assert all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in (q, k, v))
        causal = causal_of(window_size, longest_k)
        calls.append({"causal": causal, "scale": scale})
        out, lse = reference.packed_attention_forward(q, k, v, ends_q, ends_k, longest_q, longest_k, scale, causal)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        return unwritten(out, ends_q), unwritten(lse.T.contiguous(), ends_q).T.contiguous()

    def backward(grad, q, k, v, out, lse, ends_q, ends_k, longest_q, longest_k, dropout, causal, *_, scale, **window):
        assert dropout == 0 and window == {"window_size_left": -1, "window_size_right": 0 if causal else -1}
        assert not (lse == -torch.inf).any()
        lse = lse.masked_fill(lse == torch.inf, -torch.inf)
        arguments = (grad, None, q, k, v, out, lse, ends_q, ends_k, longest_q, longest_k, scale, causal)
        grads = reference.packed_attention_backward(*arguments)
        return tuple(unwritten(x, ends) for x, ends in zip(grads, (ends_q, ends_k, ends_k), strict=True))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    monkeypatch.setattr(dispatch, "_why_not_torch", lambda operator, device_type: None)
    dispatch._implementation.cache_clear()
    yield calls
    dispatch._implementation.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(played, name, dtype):
    case = CASES[name]()
    case.without_gradient = (1,)
    check(case, "torch", dtype)
    check(case, "torch", dtype, transform=spread)
    assert all(call == {"causal": case.arguments["causal"], "scale": call["scale"]} for call in played)


def test_misaligned_heads_are_copied(played):
    q = torch.randn(4, 2, 33, dtype=torch.bfloat16)[..., 1:]
    ends = torch.tensor([0, 4], dtype=torch.int32)
    out, _ = packed_attention(q, q, q, ends, ends, 4, 4, backend="torch")
    torch.testing.assert_close(out, packed_attention(q, q, q, ends, ends, 4, 4, backend="reference")[0])


def test_a_gradient_of_the_log_sum_exp_goes_elsewhere_or_is_refused(played, monkeypatch):
    monkeypatch.setattr(dispatch, "_ON_CPU", ("torch", "reference"))
    arguments = packed_attention_case([3, 2], size=32).tensors(torch.bfloat16)
    arguments["q"].requires_grad_()
    packed_attention(**arguments)[1].sum().backward()
    assert played and arguments["q"].grad.isfinite().all()
    with pytest.raises(RuntimeError, match="'torch': its backward takes no gradient of the log-sum-exp"):
        packed_attention(**arguments, backend="torch")[1].sum().backward()


@pytest.mark.parametrize("size", [36, 264])
def test_head_sizes_that_it_lacks(played, size):
    arguments = packed_attention_case([2], size=size).tensors(torch.bfloat16)
    with pytest.raises(RuntimeError, match=f"'torch': it takes head sizes that are multiples of 8, .* not {size}"):
        packed_attention(**arguments, backend="torch")


def test_dtypes_and_operators_that_it_lacks(played, monkeypatch):
    arguments = packed_attention_case([2], size=32).tensors(torch.float32)
    with pytest.raises(RuntimeError, match="'torch': it takes float16, bfloat16, not float32"):
        packed_attention(**arguments, backend="torch")
    monkeypatch.undo()
    assert dispatch.why_not("modality_pool", "torch", "cuda", torch.bfloat16) == "it has no modality_pool"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Writes a table of measurements and makes it the one that `auto` goes by."""

    def write(rows: list[dict]) -> None:
        path = tmp_path / "measured.json"
        path.write_text(json.dumps({"sm_90": {"measured": "a GPU, today", "rows": rows}}))
        monkeypatch.setattr(preferences, "TABLE", path)
        preferences.table.cache_clear(), preferences.orders.cache_clear()

    yield write
    preferences.table.cache_clear(), preferences.orders.cache_clear()


def test_auto_goes_by_measurements(measured):
    shape = preferences.shape_class(64, 2, 127)
    assert shape == (64, 256, 16)
    key = ("packed_attention", "forward", torch.bfloat16, "sm_90", shape)
    measured([])
    assert preferences.order(*key) == ("torch", "triton", "cuda", "reference")
    assert "nothing has been measured on sm_90" in preferences.explanation("sm_90")
    row = {"operator": "packed_attention", "direction": "forward", "dtype": "bfloat16", "shape": list(shape)}
    measured([row | {"backends": ["cuda", "torch"]}])
    expected = ("cuda", "torch", "triton", "reference")
    assert preferences.order(*key) == expected
    assert preferences.order(*key[:2], torch.float16, *key[3:]) == expected
    others = (torch.float32, "sm_90", shape), (torch.bfloat16, "sm_80", shape), (torch.bfloat16, "sm_90", (64, 64, 64))
    assert {preferences.order(*key[:2], *other)[0] for other in others} == {"torch"}
    assert "the fastest for 1 kinds of calls measured on a GPU, today" in preferences.explanation("sm_90")


def test_the_table_in_the_package_is_well_formed():
    for name, found in preferences.table().items():
        assert name.startswith("sm_") and found["measured"]
        for backends in preferences.orders(name).values():
            assert set(backends) <= set(dispatch.BACKENDS)


def test_env_says_how_auto_chooses():
    assert env.as_dict()["auto_on_gpu"] == preferences.explanation(
        preferences.architecture(torch.device("cuda")) if torch.cuda.is_available() else ""
    )
    assert "auto on a GPU" in env.as_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_reason_without_a_gpu():
    assert varlen.why_not() == "PyTorch finds no NVIDIA GPU"
