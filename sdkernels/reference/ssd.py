"""SSD in plain PyTorch: its four terms as they are defined."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reductions import reduce
from sdkernels.reference.truncation import log_softmax_on, temperature_column, truncate
from sdkernels.ssd import SSDOutput, SSDTerms
from sdkernels.truncation import Support


def ssd_decomposition(
    student_logits: Tensor,  # (..., V)
    base: Tensor | Support,  # (..., V) logits or a Support
    temperature: float | Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> SSDTerms:
    """See `sdkernels.ssd_decomposition`; `cu_seqlens` is for `ssd_loss`."""
    keep = torch.ones(student_logits.shape[:-1], dtype=torch.bool, device=student_logits.device)
    keep = keep if mask is None else mask != 0
    kept_rows = keep.unsqueeze(-1)
    z = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    z = torch.where(kept_rows, z, 0)
    t = temperature_column(temperature, z, cu_seqlens, keep)
    if isinstance(base, Support):
        log_q = _dense(base, z)
    else:
        b = torch.where(kept_rows, base.detach().to(z.dtype), 0)
        log_q = log_softmax_on(truncate(b, t, top_k, top_p, min_p), b, t)
    log_q = log_q.where(kept_rows, 0)
    inside = log_q != -torch.inf
    bad = ~z.detach().amax(-1, keepdim=True).isfinite() | log_q.isnan().any(-1, keepdim=True)
    bad = bad | ~inside.any(-1, keepdim=True)
    z, log_q = (x + torch.where(bad, torch.nan, 0.0).to(z.dtype) for x in (z, log_q))
    q = log_q.exp()

    log_p = z.log_softmax(-1)
    z_on_support = z.where(inside, -torch.inf)
    lse_s = z_on_support.logsumexp(-1, keepdim=True)
    tempered_lse_s = (z_on_support / t).logsumexp(-1, keepdim=True)  # p_ST = softmax(z / T) on S
    terms = (
        z.logsumexp(-1, keepdim=True) - lse_s,  # -log of the kept mass
        lse_s - t * tempered_lse_s,  # (1 - T) H_{1/T}(p_S), which at T = 1 is 0
        t * _expectation(q, log_q - (z / t - tempered_lse_s)),  # T KL(q || p_ST)
        -t * _expectation(q, log_q),  # T H(q)
        -_expectation(q, log_p),
        log_p.exp().where(inside, 0).sum(-1, keepdim=True),
        inside.sum(-1, keepdim=True),
    )
    return SSDTerms(*(torch.where(keep, x.squeeze(-1), 0) for x in terms))


def _expectation(q: Tensor, x: Tensor) -> Tensor:
    """sum_v q_v x_v, where q_v = 0 counting nothing."""
    return (q * x).where(q != 0, 0).sum(-1, keepdim=True)


def _dense(support: Support, like: Tensor) -> Tensor:
    """log q (..., V) of a Support, -inf at the ids that it does not hold."""
    vocab = like.shape[-1]
    log_q = like.new_full((*like.shape[:-1], vocab + 1), -torch.inf)
    ids = support.token_ids.long().where(support.token_ids >= 0, vocab)
    return log_q.scatter_(-1, ids, support.log_probs.to(like.dtype))[..., :vocab]


def ssd_loss(
    student_logits: Tensor,  # (..., V)
    base: Tensor | Support,  # (..., V) logits or a Support
    temperature: float | Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> SSDOutput:
    """See `sdkernels.ssd_loss`."""
    terms = ssd_decomposition(student_logits, base, temperature, top_k=top_k, top_p=top_p, min_p=min_p, mask=mask,
                              cu_seqlens=cu_seqlens)  # fmt: skip
    keep = torch.ones_like(terms.constant, dtype=torch.bool) if mask is None else mask != 0
    loss = terms.constant + sum(w * term for w, term in zip(weights, terms[:3], strict=True) if w != 0)
    if token_weight is not None:
        loss = torch.where(keep, loss * token_weight, 0)
    return SSDOutput(reduce(loss, keep, reduction, normalizer, cu_seqlens).to(terms.constant.dtype), terms)
