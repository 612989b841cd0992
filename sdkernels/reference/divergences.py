"""The row operations of OPSD in plain PyTorch, in float64: what serves float64 and CPUs without csrc."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdkernels.reference.rows import row_sum, scaled


def entries(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """Each token's part of D(P_T, P_S) = sum_v l_v, and dl/dlog P_S, from log P_S and log P_T; 0 log 0 is 0."""
    p, q = log_p.exp(), log_q.exp()
    if divergence == "jsd":
        log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
        slope = (1 - beta) * relative(p, log_p, log_m)
        return beta * relative(q, log_q, log_m) + slope, slope
    if divergence == "forward_kl":
        return relative(q, log_q, log_p), -q
    value = relative(p, log_p, log_q)
    return value, value + p


def relative(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q): 0 where p is 0, +inf where only q is; p may underflow, log p tells."""
    value = (p * (log_p - log_q)).masked_fill(p == 0, 0)
    return value.masked_fill((log_q == -torch.inf) & (log_p > -torch.inf), torch.inf)


def _log_softmax(logits: Tensor, temperature: float, temperatures: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax(logits / T), NaN without a distribution; the rows' maxima and centred log sums, (..., 1)."""
    z, t = scaled(logits.double(), temperature, temperatures)
    m = z.amax(-1, keepdim=True)
    y = (z - m) / t
    log_sum = row_sum(y.exp()).log()
    return y - log_sum, m, log_sum


def row_divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    divergence: str,
    beta: float,
    token_clip: float,
) -> tuple[Tensor, ...]:
    """See ``sdkernels.rows.divergence.row_divergence``."""
    log_p, m, log_sum = _log_softmax(student, temperature, temperatures)
    log_q, teacher_m, teacher_log_sum = _log_softmax(teacher, temperature, temperatures)
    value, slope = entries(log_p, log_q, divergence, beta)
    clipped = value > token_clip
    fields = (value.masked_fill(clipped, token_clip), slope.masked_fill(clipped, 0))
    invalid = 0 * (log_sum + teacher_log_sum)
    columns = (*map(row_sum, fields), log_sum + invalid, teacher_log_sum + invalid, m, teacher_m)
    results = [x.squeeze(-1) if mask is None else torch.where(mask, x.squeeze(-1), 0) for x in columns]
    dtype = torch.promote_types(student.dtype, torch.float32)
    return (*results[:4], *(x.to(dtype) for x in results[4:]))


def divergence_gradient(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    divergence: str,
    beta: float,
    token_clip: float,
    slope: Tensor,
    log_sum: Tensor,
    upstream: Tensor,
) -> Tensor:
    """See ``sdkernels.rows.divergence_gradient.divergence_gradient``."""
    log_p, log_q = (_log_softmax(x, temperature, temperatures)[0] for x in (student, teacher))
    value, on_log_p = entries(log_p, log_q, divergence, beta)
    grad = on_log_p.masked_fill(value > token_clip, 0) - log_p.exp() * slope.unsqueeze(-1)
    grad = grad + torch.where(slope.isfinite(), 0.0, torch.nan).unsqueeze(-1)
    flows = (upstream != 0) | log_sum.isnan()
    grad = grad * upstream.unsqueeze(-1) / scaled(grad, temperature, temperatures)[1]
    return torch.where(flows.unsqueeze(-1), grad, 0).to(student.dtype)


def reduced_rows(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    tail: bool,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``sdkernels.rows.reduced.reduced_rows``."""
    missing = token_ids < 0
    ids = token_ids.long().masked_fill(missing, 0)
    results = []
    for logits in (student, teacher):
        z, t = scaled(logits.double(), temperature, temperatures)
        z = z + torch.where(z.amax(-1, keepdim=True) < torch.inf, 0.0, torch.nan)
        rest = z.scatter(-1, ids, -torch.inf)
        listed = z.gather(-1, ids).masked_fill(missing, torch.nan)
        m = (z if tail else listed).amax(-1, keepdim=True)
        tail_m = rest.amax(-1, keepdim=True)
        tail_m = tail_m.masked_fill(tail_m == -torch.inf, 0)
        tail_log_sum = row_sum(((rest - tail_m) / t).exp()).log()
        reduced = torch.cat([(listed - m) / t, (tail_m - m) / t + tail_log_sum], -1)
        results.append([reduced, tail_m.squeeze(-1), tail_log_sum.squeeze(-1)])
    (student_row, tail_m, tail_log_sum), (teacher_row, _, _) = results
    if mask is not None:
        student_row, teacher_row = (torch.where(mask.unsqueeze(-1), x, 0) for x in (student_row, teacher_row))
        tail_m, tail_log_sum = (torch.where(mask, x, 0) for x in (tail_m, tail_log_sum))
    dtype, teacher_dtype = (torch.promote_types(x.dtype, torch.float32) for x in (student, teacher))
    return student_row.to(dtype), teacher_row.to(teacher_dtype), tail_m.to(dtype), tail_log_sum


def reduced_gradient(
    student: Tensor,
    token_ids: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    tail_max: Tensor,
    tail_log_sum: Tensor,
    upstream: Tensor,
) -> Tensor:
    """See ``sdkernels.rows.reduced_gradient.reduced_gradient``."""
    z, t = scaled(student.double(), temperature, temperatures)
    on_tail = upstream[..., -1:].double() + (upstream[..., :1] - upstream[..., :1])
    log_share = (z - tail_max.unsqueeze(-1)) / t - tail_log_sum.unsqueeze(-1)
    nothing = (on_tail == 0) | ((tail_log_sum.unsqueeze(-1) == -torch.inf) & ~on_tail.isnan())
    grad = torch.where(nothing, 0, on_tail * log_share.exp())
    missing = token_ids < 0
    ids = token_ids.long().masked_fill(missing, 0)
    listed = torch.where(missing, grad.gather(-1, ids), upstream[..., :-1].double())
    grad = grad.scatter(-1, ids, listed)
    return (grad / t).masked_fill(grad == 0, 0).to(student.dtype)  # T may be 0 where masked


def row_information(
    student: Tensor,
    teachers: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sdkernels.rows.information.row_information``."""
    log_p = _log_softmax(student, temperature, temperatures)[0]
    log_q = torch.stack([_log_softmax(teacher, temperature, temperatures)[0] for teacher in teachers])
    log_mean = log_q.logsumexp(0) - math.log(len(log_q))
    q, mean = log_q.exp(), log_mean.exp()
    total, information = (
        sum(row_sum(relative(q[r], log_q[r], other)) for r in range(len(q))) / len(q) for other in (log_p, log_mean)
    )
    terms = (total, row_sum(relative(mean, log_mean, log_p)), information)
    bad = (log_p.isnan().any(-1) | log_q.isnan().any(-1).any(0)).unsqueeze(-1)
    results = (torch.where(bad, torch.nan, x).squeeze(-1) for x in terms)
    return tuple(x if mask is None else torch.where(mask, x, 0) for x in results)
