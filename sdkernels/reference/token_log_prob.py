"""`token_log_prob` in plain PyTorch: autograd through log_softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reductions import over_tokens
from sdkernels.rows.layout import kept_tokens
from sdkernels.token_log_prob import TokenLogProb


def token_log_prob(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    temperature: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> TokenLogProb:
    """See `sdkernels.token_log_prob`."""
    keep = kept_tokens(token_ids, mask)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = torch.where(keep.unsqueeze(-1), z, 0)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype)
        if temperature.dim():
            temperature = over_tokens(temperature, token_ids.shape, cu_seqlens).unsqueeze(-1)
            temperature = torch.where(keep.unsqueeze(-1), temperature, 1)
    log_p = (z / temperature).log_softmax(-1)
    log_prob = log_p.gather(-1, token_ids.long().where(keep, 0).unsqueeze(-1)).squeeze(-1)
    log_prob = log_prob.masked_fill(log_prob == -torch.inf, -torch.inf)  # a constant: no gradient
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    return TokenLogProb(torch.where(keep, log_prob, 0), torch.where(keep, entropy, 0))
