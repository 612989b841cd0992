"""RLSD's evidence ratio: how much a privileged teacher changes the size, never the sign, of a token's advantage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdkernels import _check
from sdkernels.reductions import over_tokens

SIGNS = {"all": 0, "negative": -1, "positive": 1}


class EvidenceAdvantage(NamedTuple):
    """Per-token results of `evidence_weighted_advantage`, each (...), without gradient."""

    advantage: Tensor
    weight: Tensor
    information_gain: Tensor


class Weighing(NamedTuple):
    """How the weight w enters the advantage: lam, w's bounds, the advantages it applies to, and Eq. 16 or not."""

    lam: float
    low: float
    high: float
    apply_to: str
    pessimistic: bool


def evidence_advantage(
    student_log_prob: Tensor,  # (...), as all tensors here
    teacher_log_prob: Tensor,
    advantages: Tensor,
    keep: Tensor,
    credit_mask: Tensor | None,
    weighing: Weighing,
) -> EvidenceAdvantage:
    """Eq. 13-16 as token math; the Triton kernel's twin is ``rows.device.evidence_advantage``."""
    lam, low, high, apply_to, pessimistic = weighing
    gain = teacher_log_prob - student_log_prob
    weight = torch.where(advantages > 0, gain, -gain).exp().masked_fill(advantages == 0, 1.0)
    target = advantages * weight.clamp(low, high)
    if pessimistic:
        target = torch.minimum(weight * advantages, target)
    weighted = advantages * (1 - lam) + lam * target
    keeps_own = advantages == 0
    if lam == 0:
        keeps_own = torch.ones_like(keeps_own)
    if apply_to != "all":
        keeps_own = keeps_own | ~(advantages * SIGNS[apply_to] > 0)
    if credit_mask is not None:
        keeps_own = keeps_own | ~credit_mask
    weighted = torch.where(keeps_own, advantages, weighted)
    return EvidenceAdvantage(*(torch.where(keep, x, 0) for x in (weighted, weight, gain)))


def evidence_weighted_advantage(
    student_log_prob: Tensor,  # (...)
    teacher_log_prob: Tensor,  # (...)
    advantages: Tensor,  # (...) or (...) without time
    *,
    clip_range: float | tuple[float, float] = 0.2,
    lam: float = 1.0,
    mask: Tensor | None = None,
    credit_mask: Tensor | None = None,
    apply_to: str = "all",
    pessimistic: bool = False,
    cu_seqlens: Tensor | None = None,
) -> EvidenceAdvantage:
    """Weigh advantages by the evidence that a privileged teacher gives for each token (RLSD, arXiv 2604.03128).

    ::

        Delta_t = log P_T(y_t) - log P_S(y_t)                           (Eq. 13, information_gain)
        w_t     = exp(sign(A) Delta_t)                                  (Eq. 14, weight)
        A_t     = A ((1 - lam) + lam clip(w_t, 1 - below, 1 + above))   (Eq. 15, advantage)

    For trainers that hold log-probs already; from logits, `rlsd_token_advantage` does all of it in one launch.

    Args:
        student_log_prob, teacher_log_prob: (...) log-probs of the sampled tokens at the same temperature, of the policy
            on the prompt and of the teacher on prompt and privileged information.
        advantages: (...) per token, or (...) without its last dimension, time: one value per sequence; (S,) with
            `cu_seqlens`. Where it is 0, w = 1 and A_t = 0.
        clip_range: eps_w, or a pair (below, above); inf means no clip on that side.
        lam: share of the weighted advantage, in [0, 1]; 0 gives A_t = A.
        mask: (...), kept where non-zero; a masked token's results are 0.
        credit_mask: (...); tokens where it is 0 keep A_t = A.
        apply_to: "all", or only tokens whose advantage is "negative" or "positive", by each token's own sign; the
            others keep A_t = A.
        pessimistic: min(w A, clip(w) A) in place of clip(w) A (Eq. 16).
        cu_seqlens: (S + 1,) int32, where packed sequences start and end.

    Returns:
        EvidenceAdvantage(advantage, weight, information_gain), each (...), float32 (float64 for float64 log-probs),
        without gradient. A NaN log-prob, or both -inf, gives a NaN weight.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    student = _check.is_tensor("student_log_prob", student_log_prob).detach()
    _check.floats("student_log_prob", student, student)
    shape = student.shape
    _check.same_shape("teacher_log_prob", _check.floats("teacher_log_prob", teacher_log_prob, student), shape)
    cu_seqlens = _check.cu_seqlens(cu_seqlens, shape, student)
    _check.per_sequence("advantages", advantages, shape, cu_seqlens, student)
    mask = _check.mask("mask", mask, shape, student)
    credit_mask = _check.mask("credit_mask", credit_mask, shape, student)
    weighing = checked_weighing(clip_range, lam, apply_to, pessimistic)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher_log_prob.dtype), torch.float32)
    keep = torch.ones_like(student, dtype=torch.bool) if mask is None else mask
    tokens = over_tokens(advantages.detach().to(dtype), shape, cu_seqlens)
    teacher = teacher_log_prob.detach().to(dtype)
    return evidence_advantage(student.to(dtype), teacher, tokens, keep, credit_mask, weighing)


def checked_weighing(clip_range: float | tuple[float, float], lam: float, apply_to: str, pessimistic: bool) -> Weighing:
    """Check the options of the evidence weight."""
    below, above = _check.clip_range(clip_range)
    return Weighing(
        _check.unit_interval("lam", lam),
        1 - below,
        1 + above,
        _check.one_of("apply_to", apply_to, tuple(SIGNS)),
        _check.flag("pessimistic", pessimistic),
    )
