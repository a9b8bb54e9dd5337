"""The rule of judgement itself: unchanged for ordinary inputs, and a bound, neither crossed nor idle, for others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import (
    Case,
    cotangents,
    modality_pool_case,
    multitask_cross_entropy_case,
    pack_tokens_case,
    packed_attention_case,
)
from torch import Tensor

from cmaclip_fast import ops
from cmaclip_fast.ops import reference
from tests import rule

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDINARY: dict[str, Callable[[], Case]] = {
    "attention": lambda: packed_attention_case([45, 1, 0, 70], size=64),
    "attention, causal": lambda: packed_attention_case([2, 2, 0, 2], [45, 1, 3, 0], size=64, causal=True),
    "attention, large heads": lambda: packed_attention_case([129], [300], size=128),
    "pool": lambda: modality_pool_case(5, 3, 33, 9),
    "pool, wide": lambda: modality_pool_case(2, 8, 768, 3, shared=True),
    "cross-entropy": lambda: multitask_cross_entropy_case(6, [2, 200, 7], True, 0.1),
    "pack": lambda: pack_tokens_case(4, 5, 3, 20),
}


def grown(case: Case, name: str, factor: float) -> Case:
    case.arguments[name] = case.arguments[name] * factor
    return case


def shifted(case: Case, shift: float) -> Case:
    case.arguments["logits"] = case.arguments["logits"] + shift
    return case


ILL_CONDITIONED: dict[str, Callable[[], Case]] = {
    "attention": lambda: grown(packed_attention_case([40, 7]), "q", 300),
    "attention, causal": lambda: grown(packed_attention_case([5, 30], [3, 60], size=128, causal=True), "k", 50),
    "pool": lambda: grown(modality_pool_case(9, 4, 64, 5), "embeddings", 300),
    "pool, shared": lambda: grown(modality_pool_case(9, 4, 7, 5, shared=True), "weight", 300),
    "cross-entropy": lambda: shifted(multitask_cross_entropy_case(6, [2, 200, 7], True, 0.1), 3e4),
}


def judged(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A case's true results, plain PyTorch's, and their conditioning."""
    rounded = Case(case.operator, case.tensors(dtype), case.fixed)
    truth, plain = rounded.run("reference", torch.float64), rounded.run("reference", dtype)
    outputs = [value for name, value in truth.items() if name.startswith("output")]
    return truth, plain, rule.by_name(case.operator, cotangents(outputs), rounded.tensors(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_inputs_are_allowed_twice_the_plain_error_and_a_floor(name, dtype):
    truth, plain, conditioning = judged(ORDINARY[name](), dtype)
    for result, exact in truth.items():
        finite = exact.isfinite()
        exact, same = exact[finite], plain[result][finite]
        floor = {torch.float32: 2.0**-20, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
        expected = 2 * (same - exact).abs().max() + floor * exact.abs().max().clamp(min=1e-3)
        bound = conditioning.get(result)
        found = rule.allowed(same, exact, dtype, None if bound is None else bound[finite])
        assert torch.equal(found, expected.expand_as(found)), result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["ordinary", "ill-conditioned"])
def test_a_result_past_the_bound_fails(kind, dtype):
    """One element of each result, off by a little less or more than it may be."""
    cases = ORDINARY if kind == "ordinary" else ILL_CONDITIONED
    for case in cases.values():
        truth, plain, conditioning = judged(case(), dtype)
        for name, exact in truth.items():
            finite = exact.masked_fill(~exact.isfinite(), 0)
            most = rule.allowed(plain[name].masked_fill(~exact.isfinite(), 0), finite, dtype, conditioning.get(name))
            for place in (0, exact.numel() // 2, int(most.expand_as(exact).argmax())):
                off = torch.zeros(exact.numel()).double()
                off[place] = most.expand_as(exact).flatten()[place]
                arguments = (plain[name], exact, dtype, conditioning.get(name))
                rule.judge(name, exact + 0.99 * off.view(exact.shape), *arguments)
                if exact.flatten()[place].isfinite():
                    with pytest.raises(AssertionError, match=f"{name}: error .*, allowed"):
                        rule.judge(name, exact - 1.01 * off.view(exact.shape), *arguments)


SUMMED = {"packed_attention": ("q", "k"), "modality_pool": ("embeddings", "weight")}


@pytest.mark.parametrize("name", ["attention", "attention, causal", "pool", "pool, shared"])
def test_another_order_of_a_score_keeps_the_rule(name):
    """Plain PyTorch that sums each score's products in ten other orders, beside plain PyTorch."""
    case = ILL_CONDITIONED[name]()
    truth, plain, conditioning = judged(case, torch.float32)
    nearest = 0.0
    for seed in range(10):
        order = torch.randperm(
            case.arguments[SUMMED[case.operator][0]].shape[-1], generator=torch.Generator().manual_seed(seed)
        )
        changed = {key: case.arguments[key][..., order] for key in SUMMED[case.operator]}
        outputs = cotangents([value for result, value in truth.items() if result.startswith("output")])
        if case.operator == "modality_pool":
            outputs[0] = outputs[0][..., order]
        found = run(Case(case.operator, case.arguments | changed), outputs)
        back = order.argsort()
        for result, value in found.items():
            summed = result in {f"gradient of {key}" for key in changed} or (name[:4], result) == ("pool", "output 0")
            value = value[..., back] if summed else value
            rule.judge(result, value, plain[result], truth[result], torch.float32, conditioning[result])
            seen = truth[result].isfinite() & (conditioning[result] > 0)
            error = (value - truth[result]).abs()[seen] / conditioning[result][seen]
            nearest = max(nearest, float(error.max()))
    assert nearest > 0.02


def run(case: Case, grads: list[Tensor]) -> dict[str, Tensor]:
    """`Case.run` on plain PyTorch in float32, with these gradients of the outputs."""
    arguments = case.tensors(torch.float32)
    names = [name for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
    leaves = [arguments[name].requires_grad_() for name in names]
    outputs = getattr(ops, case.operator)(**arguments, backend="reference")
    torch.autograd.backward([x.masked_fill(x == -torch.inf, 0) for x in outputs], [x.float() for x in grads])
    results = {f"output {index}": output for index, output in enumerate(outputs)}
    results |= {f"gradient of {name}": leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    return {name: result.detach().double() for name, result in results.items()}


@pytest.mark.parametrize("name", ["attention", "attention, causal"])
def test_the_conditioning_is_what_inexact_scores_do(name, monkeypatch):
    """Scores that are off, anew in each pass, by as much as they may be: within the bounds, and no tenth of them."""
    case = ILL_CONDITIONED[name]()
    truth, _, conditioning = judged(case, torch.float64)
    scores_of = reference._scores
    generator = torch.Generator().manual_seed(0)

    def inexact(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
        scores = scores_of(q, k, scale, causal)
        terms = (q.square() @ k.square().mT).sqrt() * abs(scale)
        signs = torch.randint(0, 2, scores.shape, generator=generator) * 2 - 1
        return scores + rule._change(scores, terms, q.shape[-1])[0] * signs

    monkeypatch.setattr(reference, "_scores", inexact)
    found = case.run("reference", torch.float64)
    for result, exact in truth.items():
        seen = exact.isfinite() & (conditioning[result] > 0)
        share = (found[result] - exact).abs()[seen] / conditioning[result][seen]
        assert share.max() <= 1.01, result
        assert share.max() > 0.1, result


@pytest.mark.parametrize(("steps", "right"), [(1, True), (-1, True), (8, False), (-8, False)])
def test_a_neighbouring_log_sum_exp_keeps_the_rule(steps, right):
    """Far from zero the log-sum-exp of logits is known to its last place: one float beside is right, eight are not."""
    case = ILL_CONDITIONED["cross-entropy"]()
    truth, plain, conditioning = judged(case, torch.float32)
    a = case.tensors(torch.float32)
    loss, lse, weight_sum = reference.multitask_cross_entropy_forward(**a)
    for _ in range(abs(steps)):
        lse = torch.nextafter(lse, torch.full_like(lse, steps * torch.inf))
    given = (a["logits"], a["labels"], a["offsets"], a["class_weight"], a["label_smoothing"], lse, weight_sum)
    found = reference.multitask_cross_entropy_backward(cotangents([loss])[0].float(), *given).double()
    name = "gradient of logits"
    arguments = (name, found, plain[name], truth[name], torch.float32, conditioning[name])
    if right:
        rule.judge(*arguments)
    else:
        with pytest.raises(AssertionError, match="gradient of logits: error"):
            rule.judge(*arguments)


def test_what_is_not_finite_stands_where_it_should():
    truth = torch.tensor([0.0, -torch.inf, torch.nan]).double()
    rule.judge("same", truth, truth, truth, torch.float32)
    for place, value, message in [(0, torch.nan, "1|2 NaN"), (0, torch.inf, "infinities"), (1, 0.0, "infinities")]:
        wrong = truth.clone()
        wrong[place] = value
        with pytest.raises(AssertionError, match=message):
            rule.judge("wrong", wrong, truth, truth, torch.float32)
    with pytest.raises(AssertionError, match="plain PyTorch overflows"):
        rule.judge("no judge", truth, truth.new_full((3,), torch.inf), truth, torch.float32)
