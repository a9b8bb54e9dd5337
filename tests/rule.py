"""The rule by which an operator's results are judged.

The error against float64 is at most twice that of plain PyTorch in the same dtype, plus what rounding may do to the
same numbers in another order: a small floor, or, where that is more, what the conditioning of the problem makes of it.

Scores that stand in an exponent set the conditioning. A score of size r, the sum of n products, is known up to about
(sqrt(n) + 2) u r in float32 (the sum by Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019; one rounding each for the
scale and the log-sum-exp), and the probability changes by as much relative to itself. Two correct programs that add in
different orders differ by that, and neither need be near the other's error. The functions below carry this to results
and gradients, to first order. Up to `ORDINARY` they are 0, and the rule is the floor alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmaclip_fast.ops import reference

# In units of the dtype's epsilon, times the largest true value: what the order of a sum may cost.
FLOOR = {torch.float32: 8.0, torch.float16: 1.0, torch.bfloat16: 1.0}
# Scores up to this size are well-conditioned.
ORDINARY = 8.0
# Every backend takes scores, exponentials and sums in float32.
UNIT = torch.finfo(torch.float32).eps / 2


def allowed(plain: Tensor, truth: Tensor, dtype: torch.dtype, conditioning: Tensor | None = None) -> Tensor:
    """The largest error that a result may have, for all elements or for each, given that of plain PyTorch."""
    largest = truth.abs().max()
    floor = FLOOR[dtype] * torch.finfo(dtype).eps * largest.clamp(min=1e-3)
    if conditioning is not None:
        floor = torch.maximum(floor, conditioning)
    return 2 * (plain.double() - truth).abs().max() + floor


def judge(
    name: str, got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, conditioning: Tensor | None = None
) -> None:
    """Raise AssertionError unless `got` keeps the rule; infinities and NaN must stand where `truth` has them."""
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)}, not {list(truth.shape)}"
    assert torch.equal(got.isinf(), truth.isinf()), f"{name}: infinities differ"
    assert torch.equal(got.isnan(), truth.isnan()), f"{name}: {int(got.isnan().sum())} NaN"
    assert torch.equal(plain.isfinite(), truth.isfinite()), f"{name}: plain PyTorch overflows, and cannot judge"
    if truth.numel() == 0:
        return
    got, plain, truth = (x.double().masked_fill(~truth.isfinite(), 0) for x in (got, plain, truth))
    error, most = (got - truth).abs(), allowed(plain, truth, dtype, conditioning)
    worst = int((error - most).argmax())
    found, bound = float(error.flatten()[worst]), float(most.expand_as(error).flatten()[worst])
    assert found <= bound, f"{name}: error {found:.3g}, allowed {bound:.3g}"


def attention(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, ...]:
    """The conditioning of `packed_attention`'s out, lse, and gradients of q, k and v."""
    queries, keys, values, grads = (x.double().transpose(0, 1) for x in (q, k, v, grad_out))  # [H, T, E]
    of_lse = torch.zeros(queries.shape[:2]).double() if grad_lse is None else grad_lse.double()
    out, grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (queries, queries, keys, values))
    lse = torch.zeros_like(of_lse)
    for q_row, k_row in reference._rows(cu_seqlens_q, cu_seqlens_k):
        query, key, value, grad = queries[:, q_row], keys[:, k_row], values[:, k_row], grads[:, q_row]
        scores = reference._scores(query, key, scale, causal)  # [H, n, m]
        terms = (query.square() @ key.square().mT).sqrt() * abs(scale)
        change, inexact = _change(scores, terms, query.shape[-1])  # [H, n, 1]
        shares = torch.softmax(scores, dim=-1).nan_to_num()
        weighted = shares @ value.abs()
        out[:, q_row] = 2 * change * weighted
        lse[:, q_row] = change[..., 0]
        # gradients compute the scores anew, and subtract a log-sum-exp that is off as well
        of_shares = 2 * change * shares
        slopes = grad @ value.mT
        mean = (shares * slopes).sum(-1, keepdim=True) - of_lse[:, q_row, None]
        of_mean = (grad.abs() * weighted).sum(-1, keepdim=True)
        cancelled = inexact * (grad.abs() @ value.abs().mT + of_mean)
        of_scores = (of_shares * (slopes - mean).abs() + shares * (2 * change * of_mean + cancelled)) * abs(scale)
        grad_q[:, q_row] = of_scores @ key.abs()
        grad_k[:, k_row] = of_scores.mT @ query.abs()
        grad_v[:, k_row] = of_shares.mT @ grad.abs()
    return out.transpose(0, 1), lse, *(x.transpose(0, 1) for x in (grad_q, grad_k, grad_v))


def pool(
    grad_pooled: Tensor, grad_weights: Tensor, embeddings: Tensor, weight: Tensor, present: Tensor
) -> tuple[Tensor, ...]:
    """The conditioning of `modality_pool`'s pooled, weights, and gradients of embeddings and weight."""
    values = torch.where(present[:, :, None], embeddings.double(), 0)  # [B, M, D]
    vectors = weight.double().expand(-1, values.shape[1], -1)  # [K, M, D]
    scores = torch.einsum("bmd,kmd->bkm", values, vectors).masked_fill(~present[:, None, :], -torch.inf)
    terms = torch.einsum("bmd,kmd->bkm", values.square(), vectors.square()).sqrt()
    change, inexact = _change(scores, terms, values.shape[-1])  # [B, K, 1]
    shares = torch.softmax(scores, dim=-1).nan_to_num()  # [B, K, M]
    of_shares = 2 * change * shares
    grad = grad_pooled.double()
    slopes = grad @ values.mT + grad_weights.double()
    sizes = grad.abs() @ values.abs().mT + grad_weights.double().abs()
    mean, of_mean = ((shares * x).sum(-1, keepdim=True) for x in (slopes, sizes))
    of_scores = of_shares * (slopes - mean).abs() + shares * (2 * change * of_mean + inexact * (sizes + of_mean))
    grad_embeddings = of_shares.mT @ grad.abs() + torch.einsum("bkm,kmd->bmd", of_scores, vectors.abs())
    grad_weight = torch.einsum("bkm,bmd->kmd", of_scores, values.abs())
    if weight.shape[1] == 1:
        grad_weight = grad_weight.sum(1, keepdim=True)
    return of_shares @ values.abs(), of_shares, grad_embeddings, grad_weight


def cross_entropy(
    grad_loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """The conditioning of `multitask_cross_entropy`'s loss and gradient of the logits."""
    losses, grad_logits = [], torch.zeros(logits.shape).double()
    for task, (start, end) in enumerate(reference._tasks(offsets)):
        x = logits[:, start:end].double()
        weight = torch.ones(end - start).double() if class_weight is None else class_weight[start:end].double()
        label, kept = reference._labelled(labels[:, task], end - start)
        change = _change(x, torch.zeros_like(x), 0)[0]  # [B, 1]
        of_row = (1 - label_smoothing) * weight[label] + label_smoothing * weight.mean()  # [B]
        of_row = kept * of_row * reference._inverse((kept * weight[label]).sum())
        losses.append((of_row * change[:, 0]).sum())
        grad_logits[:, start:end] = (of_row * grad_loss[task].abs())[:, None] * change * torch.softmax(x, dim=-1)
    return torch.stack(losses), grad_logits


def _change(scores: Tensor, terms: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """By how much a softmax's scores `[..., n, m]` may be off, and sums of `count` terms beside them, relatively.

    `terms` are the root sums of squares of the products that a score is the sum of: what it may be where they cancel.
    Both are one number a row, 0 in rows of ordinary scores. A score of minus infinity is not there.
    """
    sizes = torch.maximum(terms, scores.abs()).masked_fill(scores == -torch.inf, 0)
    size = sizes.amax(-1, keepdim=True) if sizes.shape[-1] > 0 else sizes.sum(-1, keepdim=True)
    change = (count**0.5 + 2) * UNIT * (size - ORDINARY).clamp(min=0)
    return change, count**0.5 * UNIT * (size > ORDINARY)


def by_name(operator: str, grads: Sequence[Tensor], arguments: dict) -> dict[str, Tensor]:
    """The conditioning of an operator's outputs and gradients, named as `Case.run` names them; grads of its outputs."""
    if operator == "packed_attention":
        a = arguments
        scale = a["q"].shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]
        ends = (a["cu_seqlens_q"], a["cu_seqlens_k"])
        found = attention(*grads, a["q"], a["k"], a["v"], *ends, scale, a.get("causal", False))
        names = ("output 0", "output 1", *(f"gradient of {name}" for name in "qkv"))
    elif operator == "modality_pool":
        found = pool(*grads, **arguments)
        names = ("output 0", "output 1", "gradient of embeddings", "gradient of weight")
    elif operator == "multitask_cross_entropy":
        found = cross_entropy(*grads, **arguments)
        names = ("output 0", "gradient of logits")
    else:
        return {}
    return dict(zip(names, found, strict=True))
