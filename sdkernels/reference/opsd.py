"""OPSD in plain PyTorch: the divergences and Theorem 1 as they are defined."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdkernels.opsd import OPSDOutput, OPSDTerms
from sdkernels.reductions import reduce
from sdkernels.reference.divergences import entries, relative
from sdkernels.reference.truncation import temperature_column


def opsd_loss(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_k_from: str = "student",
    tail: bool = True,
    token_clip: float | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> OPSDOutput:
    """See `sdkernels.opsd_loss`."""
    shape = student_logits.shape[:-1]
    keep = torch.ones(shape, dtype=torch.bool, device=student_logits.device) if mask is None else mask != 0
    student, teacher = (_scaled(x, keep, temperature, cu_seqlens) for x in (student_logits, teacher_logits.detach()))
    if top_k and top_k < student.shape[-1]:
        chooser = teacher if top_k_from == "teacher" else student.detach()
        ids = chooser.argsort(dim=-1, descending=True, stable=True)[..., :top_k]
        student, teacher = (reduced(x, ids, tail) for x in (student, teacher))
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    clip = math.inf if token_clip is None else token_clip
    values = Entries.apply(log_p, log_q, divergence, beta, clip).sum(-1)
    values = torch.where(keep, values, 0)
    loss = values if token_weight is None else torch.where(keep, values * token_weight, 0)
    return OPSDOutput(reduce(loss, keep, reduction, normalizer, cu_seqlens).to(values.dtype), values)


def opsd_decomposition(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (R, ..., V)
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> OPSDTerms:
    """See `sdkernels.opsd_decomposition`."""
    shape = student_logits.shape[:-1]
    keep = torch.ones(shape, dtype=torch.bool, device=student_logits.device) if mask is None else mask != 0
    log_p = _scaled(student_logits.detach(), keep, temperature).log_softmax(-1)
    log_q = torch.stack([_scaled(x, keep, temperature).log_softmax(-1) for x in teacher_logits.detach()])
    log_mean = log_q.logsumexp(0) - math.log(len(log_q))
    kl = lambda log_a, log_b: relative(log_a.exp(), log_a, log_b)  # noqa: E731
    terms = (kl(log_q, log_p).mean(0), kl(log_mean, log_p), kl(log_q, log_mean).mean(0))
    return OPSDTerms(*(torch.where(keep, x.sum(-1), 0) for x in terms))


class Entries(torch.autograd.Function):
    """min(l_v, token_clip) of each token or tail, whose gradient autograd would make NaN where 0 meets infinity."""

    @staticmethod
    def forward(ctx, log_p, log_q, divergence, beta, token_clip):
        """D is their sum."""
        value, slope = entries(log_p, log_q, divergence, beta)
        clipped = value > token_clip
        slope = slope.masked_fill(clipped, 0)
        ctx.save_for_backward(slope.masked_fill(slope.isinf().any(-1, keepdim=True), torch.nan))
        return value.masked_fill(clipped, token_clip)

    @staticmethod
    def backward(ctx, upstream):
        """By log P_S."""
        return upstream * ctx.saved_tensors[0], None, None, None, None


def reduced(y: Tensor, ids: Tensor, tail: bool) -> Tensor:
    """Logits of the listed tokens (..., k), and of all others together, (..., k + 1)."""
    listed = y.gather(-1, ids)
    if not tail:
        return listed
    others = y.scatter(-1, ids, -torch.inf)
    some = (others > -torch.inf).any(-1, keepdim=True)
    mass = others.where(some, 0).logsumexp(-1, keepdim=True).where(some, -torch.inf)
    return torch.cat([listed, mass], -1)


def _scaled(logits: Tensor, keep: Tensor, temperature: float | Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """logits / T in the arithmetic's dtype, 0 where masked."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = torch.where(keep.unsqueeze(-1), z, 0)
    return z / temperature_column(temperature, z, cu_seqlens, keep)
