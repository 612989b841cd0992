"""RLSD in plain PyTorch, as its equations read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdkernels.evidence import EvidenceAdvantage
from sdkernels.reductions import over_tokens
from sdkernels.reference.grpo import grpo_loss
from sdkernels.reference.token_log_prob import token_log_prob
from sdkernels.rlsd import RLSDAdvantage, RLSDOutput
from sdkernels.rows.layout import kept_tokens


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
    """See `sdkernels.evidence_weighted_advantage`."""
    below, above = clip_range if isinstance(clip_range, tuple) else (clip_range, clip_range)
    gain = (teacher_log_prob - student_log_prob).detach()  # Eq. 13
    a = over_tokens(advantages.to(gain.dtype), gain.shape, cu_seqlens)
    weight = torch.where(a == 0, 1, (a.sign() * gain).exp())  # Eq. 14
    clipped = weight.clamp(1 - below, 1 + above)
    weighted = torch.minimum(weight * a, clipped * a) if pessimistic else clipped * a  # Eq. 16, Eq. 15
    mixed = (1 - lam) * a + lam * weighted
    credited = {"all": a != 0, "negative": a < 0, "positive": a > 0}[apply_to] & (lam > 0)
    if credit_mask is not None:
        credited = credited & (credit_mask != 0)
    keep = torch.ones_like(a, dtype=torch.bool) if mask is None else mask != 0
    return EvidenceAdvantage(*(torch.where(keep, x, 0) for x in (torch.where(credited, mixed, a), weight, gain)))


def rlsd_token_advantage(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor,  # (..., V) logits or (...) log-probs
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...) or (...) without time
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **weighing: Any,
) -> RLSDAdvantage:
    """See `sdkernels.rlsd_token_advantage`; `weighing` are the options of `evidence_weighted_advantage`."""
    keep = kept_tokens(token_ids, mask)
    options = {"mask": keep, "cu_seqlens": cu_seqlens}
    student, student_entropy = token_log_prob(student_logits.detach(), token_ids, temperature, **options)
    if teacher.dim() == student_logits.dim():
        teacher_log_prob, teacher_entropy = token_log_prob(teacher, token_ids, temperature, **options)
    else:
        teacher_log_prob, teacher_entropy = torch.where(keep, teacher, 0), torch.zeros_like(student)
    evidence = evidence_weighted_advantage(student, teacher_log_prob, advantages, **options, **weighing)
    return RLSDAdvantage(*evidence, student, teacher_log_prob, student_entropy, teacher_entropy)


def rlsd_loss(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor,  # (..., V) logits or (...) log-probs
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...) or (...) without time
    old_log_prob: Tensor | None = None,  # (...)
    *,
    clip_range: float | tuple[float, float] = 0.2,
    lam: float = 1.0,
    apply_to: str = "all",
    pessimistic: bool = False,
    credit_mask: Tensor | None = None,
    evidence_from: str = "current",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **surrogate: Any,
) -> RLSDOutput:
    """See `sdkernels.rlsd_loss`; `surrogate` are the remaining options of `grpo_loss`."""
    keep = kept_tokens(token_ids, mask)
    rows = {"temperature": temperature, "mask": keep, "cu_seqlens": cu_seqlens}
    weighing = {"clip_range": clip_range, "lam": lam, "apply_to": apply_to, "pessimistic": pessimistic,
                "credit_mask": credit_mask}  # fmt: skip
    evidence = rlsd_token_advantage(student_logits, teacher, token_ids, advantages, **rows, **weighing)
    if evidence_from == "old" and old_log_prob is not None:
        from_old = evidence_weighted_advantage(
            old_log_prob, evidence.teacher_log_prob, advantages, mask=keep, cu_seqlens=cu_seqlens, **weighing
        )
        evidence = evidence._replace(**from_old._asdict())
    loss, log_prob, entropy, ratio = grpo_loss(
        student_logits, token_ids, evidence.advantage, old_log_prob, **rows, **surrogate
    )
    evidence = evidence._replace(student_log_prob=log_prob, student_entropy=entropy)
    return RLSDOutput(loss, *evidence, ratio)
