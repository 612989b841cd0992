"""The row operations in plain PyTorch: what serves float64, and the CPU where csrc was not built."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdkernels.rows.layout import RowSupport, at_tokens, kept_tokens


def scaled(logits: Tensor, temperature: float, temperatures: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Logits in the arithmetic's dtype, and the temperature as a column."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperatures is None:
        return z, temperature
    return z, at_tokens(temperatures.to(z.dtype), z.shape[:-1]).unsqueeze(-1)


def row_sum(x: Tensor) -> Tensor:
    """Sums over V, (..., 1), in an order that neither threads nor the number of rows change."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % 512))
    return x.unflatten(-1, (-1, 512)).sum(-1).sum(-1, keepdim=True)


def row_statistics(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``sdkernels.rows.statistics.row_statistics``."""
    z, t = scaled(logits, temperature, temperatures)
    keep, valid = kept_tokens(token_ids, mask), (token_ids >= 0) & (token_ids < z.shape[-1])
    m = z.amax(-1, keepdim=True)
    y = (z - m) / t
    log_sum = row_sum(y.exp()).log().masked_fill(m == -torch.inf, -torch.inf)
    log_p = y - log_sum
    log_prob = log_p.gather(-1, token_ids.long().where(valid, 0).unsqueeze(-1))
    entropy = -row_sum((log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0))[..., 0]
    nan = torch.where(valid, 0.0, torch.nan)
    results = (log_prob[..., 0] + nan, entropy + nan, m[..., 0], log_sum[..., 0] + nan)
    log_prob, *others = (torch.where(keep, x, 0).to(z.dtype) for x in results)
    return log_prob.double(), *others


def row_gradient(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    log_prob: Tensor,
    entropy: Tensor,
    max: Tensor,
    log_sum: Tensor,
    grad_log_prob: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """See ``sdkernels.rows.gradient.row_gradient``."""
    z, t = scaled(logits, temperature, temperatures)
    log_p = (z - max.unsqueeze(-1)) / t - log_sum.unsqueeze(-1)
    p = log_p.exp()
    ids = token_ids.long().unsqueeze(-1)
    onehot = torch.arange(z.shape[-1], device=z.device) == ids  # of an id outside the vocabulary, nowhere
    grad = grad_log_prob.masked_fill(log_prob == -torch.inf, 0).unsqueeze(-1) * (onehot.to(p.dtype) - p)
    if grad_entropy is not None:
        surprise = (p * (log_p + entropy.unsqueeze(-1))).masked_fill(log_p == -torch.inf, 0)
        grad = grad - grad_entropy.unsqueeze(-1) * surprise
    return torch.where(kept_tokens(token_ids, mask).unsqueeze(-1), grad / t, 0).to(logits.dtype)


def row_support(
    logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    top_k: int,
    top_p: float,
    min_p: float,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``sdkernels.rows.support.row_support``: by a sort, and sums in float64."""
    z, t = scaled(logits.double(), temperature, temperatures)
    keep = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if mask is None else mask
    ordered, ids = z.sort(dim=-1, descending=True, stable=True)
    m = ordered[..., :1]
    mass = ((ordered - m) / t).exp()
    threshold = torch.full_like(m, torch.finfo(torch.float64).min)
    if top_k:
        threshold = ordered[..., top_k - 1 : top_k].maximum(threshold)
    if top_p < 1.0:
        mass = mass.where(ordered >= threshold, 0)
        reached = mass.cumsum(-1)
        threshold = ordered.where(reached - mass < top_p * reached[..., -1:], torch.inf).amin(-1, keepdim=True)
    if min_p > 0.0:
        threshold = threshold.maximum(m + t * math.log(min_p))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    threshold = rounded_up(threshold.where(m.isfinite(), torch.nan), dtype)
    support = ordered >= threshold
    y = ((ordered - m) / t).where(support, -torch.inf)
    log_sum = row_sum(y.exp()).log().where(m.isfinite(), torch.nan)
    log_q = y - log_sum
    entropy = -row_sum((log_q.exp() * log_q).masked_fill(log_q == -torch.inf, 0))
    fields = (threshold[..., 0], support.sum(-1), m[..., 0], log_sum[..., 0], entropy[..., 0])
    listed = support & keep.unsqueeze(-1)
    token_ids, log_q = (
        torch.nn.functional.pad(x.where(listed, nothing), (0, max(capacity - x.shape[-1], 0)), value=nothing)
        for x, nothing in ((ids, -1), (log_q, -torch.inf))
    )
    threshold, size, m, log_sum, entropy = (torch.where(keep, x, 0) for x in fields)
    return (
        threshold.to(dtype),
        size,
        m.to(dtype),
        log_sum,
        entropy.to(dtype),
        token_ids[..., :capacity].int().contiguous(),
        log_q[..., :capacity].to(dtype).contiguous(),
    )


def row_masses(
    logits: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None, max: Tensor, pivots: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sdkernels.rows.masses.row_masses``: a pivot at a time, for G (..., V) would not fit."""
    z, t = scaled(logits.double(), temperature, temperatures)
    y = (z - max.unsqueeze(-1)) / t
    mass = y.exp()
    moment = (mass * y).masked_fill(mass == 0, 0)
    results = torch.empty((3, *pivots.shape), dtype=torch.float64, device=logits.device)
    for i in range(pivots.shape[-1]):
        above = z >= pivots[..., i : i + 1]
        results[0, ..., i] = above.sum(-1)
        for result, x in zip(results[1:], (mass, moment), strict=True):
            result[..., i] = row_sum(x.where(above, 0))[..., 0]
    results[1:] += (max - max).unsqueeze(-1)  # 0, or NaN
    if mask is not None:
        results = results.where(mask.unsqueeze(-1), 0)
    return results[0].long(), results[1].clone(), results[2].clone()


def rounded_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The least value of `dtype` that is not below x, as x's dtype."""
    rounded = x.to(dtype)
    return torch.where(rounded < x, rounded.nextafter(torch.full_like(rounded, torch.inf)), rounded).to(x.dtype)


def _log_q(logits: Tensor, temperature: float, temperatures: Tensor | None, support: RowSupport) -> Tensor:
    """log q (..., V), -inf outside S, NaN in rows without a distribution; of the lists where rows are listed."""
    z, t = scaled(logits, temperature, temperatures)
    threshold, size, m, log_sum = (x.unsqueeze(-1) for x in support[:4])
    log_q = ((z - m) / t - log_sum).to(z.dtype).where(z >= threshold, -torch.inf)
    listed = size <= support.token_ids.shape[-1]
    log_q = torch.where(listed, _scattered(support.token_ids, support.log_probs, z), log_q)
    return log_q.masked_fill(log_sum.isnan(), torch.nan)


def _scattered(token_ids: Tensor, log_probs: Tensor, like: Tensor) -> Tensor:
    """Listed log-probs at their ids, -inf elsewhere, (..., V)."""
    vocab = like.shape[-1]
    log_q = torch.full((*like.shape[:-1], vocab + 1), -torch.inf, dtype=like.dtype, device=like.device)
    return log_q.scatter_(-1, token_ids.long().where(token_ids >= 0, vocab), log_probs.to(like.dtype))[..., :-1]


def truncated_log_softmax(
    logits: Tensor, temperature: float, temperatures: Tensor | None, support: RowSupport, dtype: torch.dtype
) -> Tensor:
    """See ``sdkernels.rows.truncated.truncated_log_softmax``."""
    return _log_q(logits, temperature, temperatures, support).to(dtype)


def truncated_gradient(
    logits: Tensor,
    upstream: Tensor | None,
    label_ids: Tensor | None,
    on_label: Tensor | None,
    on_entropy: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    support: RowSupport,
) -> Tensor:
    """See ``sdkernels.rows.truncated.truncated_gradient``."""
    log_q = _log_q(logits, temperature, temperatures, support)
    inside = log_q != -torch.inf
    grad = torch.zeros_like(log_q) if upstream is None else upstream.to(log_q.dtype).where(inside, 0)
    total = row_sum(grad)
    if label_ids is not None and on_label is not None:
        here = (label_ids >= 0) & (label_ids < log_q.shape[-1])  # else it is in another shard of the vocabulary
        label = label_ids.long().where(here, 0).unsqueeze(-1)
        grad = grad.scatter_add(-1, label, on_label.where(here, 0).unsqueeze(-1)).where(inside, 0)
        total = total + on_label.unsqueeze(-1)
    grad = grad - log_q.exp() * total
    if on_entropy is not None:
        surprise = log_q.exp() * (log_q + support.entropy.unsqueeze(-1))
        grad = grad - on_entropy.unsqueeze(-1) * surprise.where(inside, 0)
    t = scaled(logits, temperature, temperatures)[1]
    exists = (support.size > 0) | support.log_sum.isnan()
    return torch.where(exists.unsqueeze(-1), grad / t, 0).to(logits.dtype)


def pair_statistics(
    student: Tensor,
    base: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    threshold: Tensor | None,
    size: Tensor | None,
    token_ids: Tensor | None,
    log_probs: Tensor | None,
) -> tuple[Tensor, ...]:
    """See ``sdkernels.rows.pair.pair_statistics``."""
    z, t = scaled(student.double(), temperature, temperatures)
    keep = torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device) if mask is None else mask
    log_q, base_max, base_log_sum = _base_log_q(z, base, t, threshold, token_ids, log_probs)
    inside = log_q != -torch.inf
    m, support_m = z.amax(-1, keepdim=True), z.where(inside, -torch.inf).amax(-1, keepdim=True)
    support_m = support_m.clamp(min=torch.finfo(torch.float64).min)
    log_sum = row_sum((z - m).exp()).log()
    y = (z - support_m).where(inside, -torch.inf)
    support_lse = row_sum(y.exp()).log()
    tempered_lse = row_sum((y / t).exp()).log() * t
    q = log_q.exp()
    cross, negentropy = (row_sum((q * x).where(q != 0, 0)) for x in (y, log_q))
    valid = inside.any(-1, keepdim=True) & m.isfinite() & ~log_q.isnan().any(-1, keepdim=True)
    lse = m - support_m + log_sum
    sums = [x.where(valid, torch.nan) for x in (lse, support_lse, tempered_lse, cross, negentropy, log_sum)]
    size = inside.sum(-1, keepdim=True)
    results = (*sums[:5], size, sums[5], base_log_sum, m, support_m, base_max)
    kept = [torch.where(keep, x[..., 0], 0) for x in results]
    dtype = torch.promote_types(student.dtype, torch.float32)
    base_dtype = dtype if base is None else torch.promote_types(base.dtype, torch.float32)
    return (*kept[:8], kept[8].to(dtype), kept[9].to(dtype), kept[10].to(base_dtype))


def pair_gradient(
    student: Tensor,
    base: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    threshold: Tensor | None,
    size: Tensor | None,
    token_ids: Tensor | None,
    log_probs: Tensor | None,
    statistics: tuple[Tensor, ...],
    upstream: tuple[Tensor, ...],
) -> Tensor:
    """See ``sdkernels.rows.pair.pair_gradient``."""
    z, t = scaled(student.double(), temperature, temperatures)
    normaliser = (statistics[10].unsqueeze(-1), statistics[7].unsqueeze(-1))
    log_q = _base_log_q(z, base, t, threshold, token_ids, log_probs, normaliser)[0]
    support_lse, tempered_lse, log_sum, m, support_m = (statistics[i].unsqueeze(-1) for i in (1, 2, 6, 8, 9))
    y = (z - support_m).where(log_q != -torch.inf, -torch.inf)
    grad = torch.zeros_like(z)
    for on, log_p in zip(upstream, (z - m - log_sum, y - support_lse, (y - tempered_lse) / t, log_q), strict=True):
        grad = grad + torch.where(on.unsqueeze(-1) == 0, 0, on.unsqueeze(-1) * log_p.exp())
    return grad.masked_fill(log_sum.isnan(), torch.nan).to(student.dtype)


def _base_log_q(
    like: Tensor,
    base: Tensor | None,
    t: Tensor | float,
    threshold: Tensor | None,
    token_ids: Tensor | None,
    log_probs: Tensor | None,
    normaliser: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """log q (..., V) of the base's logits or lists, -inf outside S; the logits' maximum and log sum over S.

    A normaliser is these two, known, of rows of which the base's may be a part.
    """
    if base is None:
        nothing = torch.zeros_like(like[..., :1])
        return _scattered(token_ids, log_probs, like), nothing, nothing
    b = base.to(like.dtype)
    m = b.amax(-1, keepdim=True) if normaliser is None else normaliser[0]
    inside = b > -torch.inf if threshold is None else b >= threshold.unsqueeze(-1)
    y = ((b - m) / t).where(inside, -torch.inf)
    log_sum = row_sum(y.exp()).log() if normaliser is None else normaliser[1]
    nothing = (y == -torch.inf) & ~log_sum.isnan()  # S may be empty in a part of a row
    return (y - log_sum).masked_fill(nothing, -torch.inf), m, log_sum
