"""The plain PyTorch truth of every operator: a forward and the backward that belongs to it, on any device.

Sums and exponentials are taken in float32 for float16 and bfloat16 inputs, and in the input's own type otherwise;
what comes back as weights, log-sum-exp or loss stays in that wider type.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which an operator sums values of `dtype`."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def pack_tokens_forward(
    text: Tensor,  # [Tt, D]
    image: Tensor,  # [Ti, D]
    starts: Tensor,  # [B, 2] int32
    counts: Tensor,  # [B, 2] int32
    type_embedding: Tensor | None,  # [2, D]
    capacity: int | None,
) -> tuple[Tensor, Tensor]:  # [T, D], [B + 1] int32
    cu_seqlens = F.pad(counts.sum(1).cumsum(0, dtype=torch.int32), (1, 0))
    if type_embedding is not None:
        text, image = text + type_embedding[0], image + type_embedding[1]
    packed = torch.cat([text, image])[_packed_sources(starts, counts, len(text))]  # [T, D]
    if capacity is None:
        return packed, cu_seqlens
    if len(packed) > capacity:
        raise ValueError(f"capacity must be at least the number of tokens, {len(packed)}, but is {capacity}")
    return F.pad(packed, (0, 0, 0, capacity - len(packed))), cu_seqlens


def pack_tokens_backward(
    grad_packed: Tensor,  # [T, D]
    starts: Tensor,  # [B, 2] int32
    counts: Tensor,  # [B, 2] int32
    cu_seqlens: Tensor,  # [B + 1] int32
    texts: int,
    images: int,
) -> tuple[Tensor, Tensor, Tensor]:  # [Tt, D], [Ti, D], [2, D]
    total = wide(grad_packed.dtype)
    used = grad_packed[: int(cu_seqlens[-1])].to(total)
    sources = _packed_sources(starts, counts, texts)
    grad = used.new_zeros(texts + images, used.shape[1]).index_add_(0, sources, used)  # [Tt + Ti, D]
    grad_type = torch.stack([grad[:texts].sum(0), grad[texts:].sum(0)])
    grad = grad.to(grad_packed.dtype)
    return grad[:texts].clone(), grad[texts:].clone(), grad_type.to(grad_packed.dtype)


def _packed_sources(starts: Tensor, counts: Tensor, texts: int) -> Tensor:  # [T] int64
    """For each packed token its place among the text tokens followed by the image tokens."""
    first = starts.long() + torch.tensor([0, texts], device=starts.device)  # [B, 2]
    ends = counts.flatten().long().cumsum(0)
    # a part is one modality of one row; its tokens are consecutive in both
    part = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts.flatten())
    place = torch.arange(len(part), device=counts.device) - (ends - counts.flatten())[part]
    return first.flatten()[part] + place


def packed_attention_forward(
    q: Tensor,  # [Tq, H, E]
    k: Tensor,  # [Tk, H, E]
    v: Tensor,  # [Tk, H, E]
    cu_seqlens_q: Tensor,  # [B + 1] int32
    cu_seqlens_k: Tensor,  # [B + 1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # [Tq, H, E], [H, Tq]
    total = wide(q.dtype)
    queries, keys, values = (x.to(total).transpose(0, 1) for x in (q, k, v))  # [H, T, E]
    out = torch.zeros(queries.shape, dtype=total, device=q.device)  # [H, Tq, E]
    lse = torch.full(queries.shape[:2], -torch.inf, dtype=total, device=q.device)  # [H, Tq]
    for q_row, k_row in _rows(cu_seqlens_q, cu_seqlens_k):
        scores = _scores(queries[:, q_row], keys[:, k_row], scale, causal)  # [H, n, m]
        lse[:, q_row] = torch.logsumexp(scores, dim=-1)
        out[:, q_row] = _probabilities(scores, lse[:, q_row]) @ values[:, k_row]
    return out.transpose(0, 1).to(q.dtype).contiguous(), lse


def packed_attention_backward(
    grad_out: Tensor,  # [Tq, H, E]
    grad_lse: Tensor | None,  # [H, Tq]
    q: Tensor,  # [Tq, H, E]
    k: Tensor,  # [Tk, H, E]
    v: Tensor,  # [Tk, H, E]
    out: Tensor,  # [Tq, H, E]
    lse: Tensor,  # [H, Tq]
    cu_seqlens_q: Tensor,  # [B + 1] int32
    cu_seqlens_k: Tensor,  # [B + 1] int32
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [Tq, H, E], [Tk, H, E], [Tk, H, E]
    total = wide(q.dtype)
    queries, keys, values, grad, result = (x.to(total).transpose(0, 1) for x in (q, k, v, grad_out, out))
    delta = (grad * result).sum(-1)  # [H, Tq]
    if grad_lse is not None:
        delta = delta - grad_lse
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (queries, keys, values))  # [H, T, E]
    for q_row, k_row in _rows(cu_seqlens_q, cu_seqlens_k):
        scores = _scores(queries[:, q_row], keys[:, k_row], scale, causal)  # [H, n, m]
        probabilities = _probabilities(scores, lse[:, q_row])
        grad_v[:, k_row] = probabilities.mT @ grad[:, q_row]
        grad_scores = grad[:, q_row] @ values[:, k_row].mT - delta[:, q_row, None]
        grad_scores = probabilities * grad_scores * scale  # [H, n, m]
        grad_q[:, q_row] = grad_scores @ keys[:, k_row]
        grad_k[:, k_row] = grad_scores.mT @ queries[:, q_row]
    return tuple(x.transpose(0, 1).to(q.dtype).contiguous() for x in (grad_q, grad_k, grad_v))  # type: ignore[return-value]


def _rows(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    q_rows, k_rows = (itertools.pairwise(ends.tolist()) for ends in (cu_seqlens_q, cu_seqlens_k))
    for q_row, k_row in zip(q_rows, k_rows, strict=True):
        if q_row[1] > q_row[0] and k_row[1] > k_row[0]:
            yield slice(*q_row), slice(*k_row)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = (q @ k.mT) * scale  # [H, n, m]
    if causal:
        n, m = scores.shape[-2:]
        hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    # A query that sees no key has a log-sum-exp of minus infinity, and a probability of 0 for every key.
    return torch.exp(scores - torch.where(lse == -torch.inf, 0, lse)[..., None])


def modality_pool_forward(
    embeddings: Tensor,  # [B, M, D]
    weight: Tensor,  # [K, M, D] or [K, 1, D]
    present: Tensor,  # [B, M] bool
) -> tuple[Tensor, Tensor]:  # [B, K, D], [B, K, M]
    total = wide(embeddings.dtype)
    values = torch.where(present[:, :, None], embeddings.to(total), 0)  # [B, M, D]
    per_modality = weight.to(total).expand(-1, values.shape[1], -1)  # [K, M, D]
    scores = torch.einsum("bmd,kmd->bkm", values, per_modality)
    scores = scores.masked_fill(~present[:, None, :], -torch.inf)
    weights = torch.softmax(scores, dim=-1).masked_fill(~present[:, None, :], 0)  # [B, K, M]
    return (weights @ values).to(embeddings.dtype), weights


def modality_pool_backward(
    grad_pooled: Tensor,  # [B, K, D]
    grad_weights: Tensor | None,  # [B, K, M]
    embeddings: Tensor,  # [B, M, D]
    weight: Tensor,  # [K, M, D] or [K, 1, D]
    present: Tensor,  # [B, M] bool
    weights: Tensor,  # [B, K, M]
) -> tuple[Tensor, Tensor]:  # [B, M, D], [K, M, D] or [K, 1, D]
    total = wide(embeddings.dtype)
    values = torch.where(present[:, :, None], embeddings.to(total), 0)  # [B, M, D]
    per_modality = weight.to(total).expand(-1, values.shape[1], -1)  # [K, M, D]
    grad = grad_pooled.to(total)
    grad_weights_total = grad @ values.mT  # [B, K, M]
    if grad_weights is not None:
        grad_weights_total = grad_weights_total + grad_weights
    mean = (weights * grad_weights_total).sum(-1, keepdim=True)
    grad_scores = weights * (grad_weights_total - mean)  # [B, K, M]
    grad_embeddings = weights.mT @ grad + torch.einsum("bkm,kmd->bmd", grad_scores, per_modality)
    grad_weight = torch.einsum("bkm,bmd->kmd", grad_scores, values)
    if weight.shape[1] == 1:
        grad_weight = grad_weight.sum(1, keepdim=True)
    return grad_embeddings.to(embeddings.dtype).contiguous(), grad_weight.to(weight.dtype).contiguous()


def multitask_cross_entropy_forward(
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B, K] int64
    offsets: Tensor,  # [K + 1] int32
    class_weight: Tensor | None,  # [C]
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # [K], [B, K], [K]
    total = wide(logits.dtype)
    loss, lse, weight_sum = [], [], []
    for task, (start, end) in enumerate(_tasks(offsets)):
        x = logits[:, start:end].to(total)  # [B, C_k]
        weight = x.new_ones(end - start) if class_weight is None else class_weight[start:end].to(total)
        label, kept = _labelled(labels[:, task], end - start)  # [B]
        row_lse = torch.logsumexp(x, dim=1)  # [B]
        label_weight = torch.where(kept, weight[label], 0)
        row_loss = (1 - label_smoothing) * label_weight * (row_lse - x.gather(1, label[:, None])[:, 0])
        if label_smoothing > 0:
            smoothing = ((row_lse[:, None] - x) * weight).mean(1)
            row_loss = row_loss + torch.where(kept, label_smoothing * smoothing, 0)
        row_loss = torch.where(labels[:, task] >= end - start, torch.nan, row_loss)
        lse.append(row_lse)
        weight_sum.append(label_weight.sum())
        loss.append(torch.where(kept, row_loss, 0).sum() * _inverse(weight_sum[-1]))
    return torch.stack(loss), torch.stack(lse, dim=1), torch.stack(weight_sum)


def multitask_cross_entropy_backward(
    grad_loss: Tensor,  # [K]
    logits: Tensor,  # [B, C]
    labels: Tensor,  # [B, K] int64
    offsets: Tensor,  # [K + 1] int32
    class_weight: Tensor | None,  # [C]
    label_smoothing: float,
    lse: Tensor,  # [B, K]
    weight_sum: Tensor,  # [K]
) -> Tensor:  # [B, C]
    total = wide(logits.dtype)
    grad_logits = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for task, (start, end) in enumerate(_tasks(offsets)):
        x = logits[:, start:end].to(total)  # [B, C_k]
        weight = x.new_ones(end - start) if class_weight is None else class_weight[start:end].to(total)
        label, kept = _labelled(labels[:, task], end - start)  # [B]
        probabilities = torch.exp(x - lse[:, task, None])
        label_weight = (1 - label_smoothing) * weight[label]  # [B]
        spread = label_smoothing * weight / (end - start)  # [C_k]
        grad = (label_weight + spread.sum())[:, None] * probabilities - spread
        grad.scatter_add_(1, label[:, None], -label_weight[:, None])
        grad = torch.where(labels[:, task, None] >= end - start, torch.nan, grad)
        grad = torch.where(kept[:, None], grad, 0) * (grad_loss[task] * _inverse(weight_sum[task]))
        grad_logits[:, start:end] = grad
    return grad_logits


def _tasks(offsets: Tensor) -> Iterator[tuple[int, int]]:
    yield from itertools.pairwise(offsets.tolist())


def _labelled(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    # A label past the last class must show as a NaN loss, not read past the row.
    return labels.clamp(0, classes - 1), labels >= 0


def _inverse(weight_sum: Tensor) -> Tensor:
    return torch.where(weight_sum > 0, 1 / weight_sum, 0)


def multitask_binary_cross_entropy_forward(
    logits: Tensor,  # [B, C]
    targets: Tensor,  # [B, C] int8
    offsets: Tensor,  # [K + 1] int32
    class_weight: Tensor | None,  # [C]
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
) -> tuple[Tensor, Tensor]:  # [K], [K]
    losses, _ = _binary_losses(logits, targets, gamma_positive, gamma_negative, margin)
    weight = _weight_of_known(losses, targets, class_weight)
    losses = torch.where(targets >= 0, weight * losses, 0)
    weight_sum = torch.stack([weight[:, start:end].sum() for start, end in _tasks(offsets)])
    loss = torch.stack([losses[:, start:end].sum() for start, end in _tasks(offsets)])
    return loss * _inverse(weight_sum), weight_sum


def multitask_binary_cross_entropy_backward(
    grad_loss: Tensor,  # [K]
    logits: Tensor,  # [B, C]
    targets: Tensor,  # [B, C] int8
    offsets: Tensor,  # [K + 1] int32
    class_weight: Tensor | None,  # [C]
    gamma_positive: float,
    gamma_negative: float,
    margin: float,
    weight_sum: Tensor,  # [K]
) -> Tensor:  # [B, C]
    _, slopes = _binary_losses(logits, targets, gamma_positive, gamma_negative, margin)
    weight = _weight_of_known(slopes, targets, class_weight)
    scale = grad_loss * _inverse(weight_sum)
    scale = torch.cat([scale[task].expand(end - start) for task, (start, end) in enumerate(_tasks(offsets))])  # [C]
    return (torch.where(targets >= 0, weight * slopes, 0) * scale).to(logits.dtype)


def _binary_losses(
    logits: Tensor, targets: Tensor, gamma_positive: float, gamma_negative: float, margin: float
) -> tuple[Tensor, Tensor]:
    """The loss of each element and its slope, `[B, C]`; undefined where the target is unknown."""
    x = logits.to(wide(logits.dtype))
    positive = targets > 0
    # Having a class is what not having it is at the opposite logit.
    x = torch.where(positive, -x, x)
    p, other = torch.sigmoid(x), torch.sigmoid(-x)
    loss, opposite = -F.logsigmoid(-x), -F.logsigmoid(x)  # -log(1 - p), -log(p)
    gamma = torch.where(positive, x.new_tensor(gamma_positive), x.new_tensor(gamma_negative))
    # An exponent of 0 counts for nothing at infinite logits too.
    focus = torch.exp(-torch.where(gamma > 0, gamma * opposite, 0))
    slope = focus * (p + torch.where(gamma > 0, gamma * other * loss, 0))
    loss = focus * loss
    if margin > 0:
        counts = ~(p <= margin)
        q = torch.where(counts, p - margin, 0.25)
        rest = other + margin  # 1 - q
        log_rest = -torch.where(q < 0.5, torch.log1p(-q), torch.log(rest))
        focus = q**gamma_negative
        shifted_slope = p * other * focus * (gamma_negative * log_rest / q + 1 / rest)
        loss = torch.where(positive, loss, torch.where(counts, focus * log_rest, 0))
        slope = torch.where(positive, slope, torch.where(counts, shifted_slope, 0))
    slope = torch.where(positive, -slope, slope)
    # A target above 1 must show.
    return torch.where(targets > 1, torch.nan, loss), torch.where(targets > 1, torch.nan, slope)


def _weight_of_known(like: Tensor, targets: Tensor, class_weight: Tensor | None) -> Tensor:
    """`[B, C]`, 0 where the target is unknown."""
    known = (targets >= 0).to(like.dtype)
    return known if class_weight is None else known * class_weight.to(like.dtype)
