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


def _log_softmax(
    logits: Tensor, temperature: float, temperatures: Tensor | None, normaliser: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """log softmax(logits / T), NaN without a distribution; the rows' maxima and centred log sums, (..., 1).

    A normaliser is these two, (...), of rows of which the logits may be a part. The log sum of only -inf is -inf.
    """
    z, t = scaled(logits.double(), temperature, temperatures)
    if normaliser is not None:
        m, log_sum = (x.double().unsqueeze(-1) for x in normaliser)
        return (z - m) / t - log_sum, m, log_sum
    m = z.amax(-1, keepdim=True)
    y = (z - m) / t
    log_sum = row_sum(y.exp()).log().masked_fill(m == -torch.inf, -torch.inf)
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
    normalisers: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """See ``sdkernels.rows.divergence.row_divergence``; the normalisers are its last four arguments."""
    of_student, of_teacher = (None, None) if normalisers is None else _by_side(*normalisers)
    log_p, m, log_sum = _log_softmax(student, temperature, temperatures, of_student)
    log_q, teacher_m, teacher_log_sum = _log_softmax(teacher, temperature, temperatures, of_teacher)
    value, slope = entries(log_p, log_q, divergence, beta)
    clipped = value > token_clip
    slope = slope.masked_fill(slope.isinf(), torch.nan).masked_fill(clipped, 0)
    fields = (value.masked_fill(clipped, token_clip), slope)
    invalid = 0 * (log_sum + teacher_log_sum)
    columns = (*(row_sum(x) + invalid for x in fields), log_sum, teacher_log_sum, m, teacher_m)
    keep = torch.ones((), dtype=torch.bool, device=student.device) if mask is None else mask
    results = [torch.where(keep, x.squeeze(-1), 0) for x in columns]  # copies, if given
    dtype, teacher_dtype = (torch.promote_types(x.dtype, torch.float32) for x in (student, teacher))
    return (*results[:4], results[4].to(dtype), results[5].to(teacher_dtype))


def _by_side(
    log_sum: Tensor, teacher_log_sum: Tensor, max: Tensor, teacher_max: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The student's normaliser and the teacher's."""
    return (max, log_sum), (teacher_max, teacher_log_sum)


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
    teacher_log_sum: Tensor,
    max: Tensor,
    teacher_max: Tensor,
    upstream: Tensor,
) -> Tensor:
    """See ``sdkernels.rows.divergence_gradient.divergence_gradient``."""
    sides = _by_side(log_sum, teacher_log_sum, max, teacher_max)
    log_p, log_q = (
        _log_softmax(x, temperature, temperatures, side)[0] for x, side in zip((student, teacher), sides, strict=True)
    )
    value, on_log_p = entries(log_p, log_q, divergence, beta)
    grad = on_log_p.masked_fill(value > token_clip, 0) - log_p.exp() * slope.unsqueeze(-1)
    grad = grad + torch.where(slope.isfinite(), 0.0, torch.nan).unsqueeze(-1)
    flows = (upstream != 0) | ~(log_sum + teacher_log_sum).isfinite()
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
) -> tuple[Tensor, ...]:
    """See ``sdkernels.rows.reduced.reduced_rows``."""
    places, missing = _places(token_ids, student.shape[-1])
    rows, tails = [], []
    for logits in (student, teacher):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        lowest = torch.finfo(dtype).min  # the maximum of nothing
        z, t = scaled(logits.double(), temperature, temperatures)
        z = z + torch.where(z.amax(-1, keepdim=True) < torch.inf, 0.0, torch.nan)
        padded = torch.nn.functional.pad(z, (0, 1), value=-torch.inf)
        listed, rest = padded.gather(-1, places), padded.scatter(-1, places, -torch.inf)[..., :-1]
        m = (z if tail else listed).amax(-1, keepdim=True).clamp(min=lowest)
        tail_m = rest.amax(-1, keepdim=True).clamp(min=lowest)
        tail_log_sum = row_sum(((rest - tail_m) / t).exp()).log()
        listed = listed.masked_fill(missing, torch.nan)
        fields = [torch.cat([(listed - m) / t, (tail_m - m) / t + tail_log_sum], -1), tail_m, tail_log_sum]
        row, tail_m, tail_log_sum = fields if mask is None else (torch.where(mask.unsqueeze(-1), x, 0) for x in fields)
        rows.append(row.to(dtype))
        tails += [tail_m.squeeze(-1).to(dtype), tail_log_sum.squeeze(-1)]
    return *rows, *tails


def _places(token_ids: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Listed ids, one more than all for what is not listed; and where that is."""
    missing = token_ids < 0
    return token_ids.long().masked_fill(missing, vocab), missing


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
    places, _ = _places(token_ids, grad.shape[-1])
    grad = torch.nn.functional.pad(grad, (0, 1)).scatter(-1, places, upstream[..., :-1].double())[..., :-1]
    return (grad / t).masked_fill(grad == 0, 0).to(student.dtype)  # T may be 0 where masked


def row_information(
    student: Tensor,
    teachers: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    log_sums: Tensor | None = None,
    maxima: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sdkernels.rows.information.row_information``."""
    logs, sums = [], []
    for i, logits in enumerate((student, *teachers)):
        normaliser = None if log_sums is None or maxima is None else (maxima[i], log_sums[i])
        log_softmax, _, log_sum = _log_softmax(logits, temperature, temperatures, normaliser)
        logs.append(log_softmax)
        sums.append(log_sum)
    log_p, log_q = logs[0], torch.stack(logs[1:])
    log_mean = log_q.logsumexp(0) - math.log(len(log_q))
    q, mean = log_q.exp(), log_mean.exp()
    total, information = (
        sum(row_sum(relative(q[r], log_q[r], other)) for r in range(len(q))) / len(q) for other in (log_p, log_mean)
    )
    terms = (total, row_sum(relative(mean, log_mean, log_p)), information)
    bad = ~torch.stack(sums).isfinite().all(0)
    results = (torch.where(bad, torch.nan, x).squeeze(-1) for x in terms)
    return tuple(x if mask is None else torch.where(mask, x, 0) for x in results)
