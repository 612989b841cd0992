"""`grpo_loss` in plain PyTorch, as its formula reads."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.grpo import GRPOOutput
from sdkernels.reductions import over_tokens, reduce
from sdkernels.reference.token_log_prob import token_log_prob
from sdkernels.rows.layout import kept_tokens


def grpo_loss(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...) or (...) without time
    old_log_prob: Tensor | None = None,  # (...)
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    reference_log_prob: Tensor | None = None,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> GRPOOutput:
    """See `sdkernels.grpo_loss`."""
    log_prob, entropy = token_log_prob(logits, token_ids, temperature, mask=mask, cu_seqlens=cu_seqlens)
    keep = kept_tokens(token_ids, mask)
    advantage = over_tokens(advantages.to(log_prob.dtype), token_ids.shape, cu_seqlens)
    ratio = (log_prob - (log_prob.detach() if old_log_prob is None else old_log_prob)).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * advantage)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, loss.minimum(-dual_clip * advantage), loss)
    if token_weight is not None:
        loss = loss * token_weight
    if beta > 0 and reference_log_prob is not None:
        d = reference_log_prob - log_prob
        loss = loss + beta * (d.exp() - d - 1)
    loss = reduce(torch.where(keep, loss, 0), keep, reduction, normalizer, cu_seqlens)
    return GRPOOutput(loss, log_prob, entropy, torch.where(keep, ratio.detach(), 0))
