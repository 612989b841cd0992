"""`token_log_prob` in plain PyTorch: autograd through log_softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference.truncation import log_softmax_on, temperature_column, truncate
from sdkernels.rows.layout import kept_tokens
from sdkernels.token_log_prob import TokenLogProb
from sdkernels.truncation import Support


def token_log_prob(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    temperature: float | Tensor = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    support: Support | Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> TokenLogProb:
    """See `sdkernels.token_log_prob`."""
    keep = kept_tokens(token_ids, mask)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = torch.where(keep.unsqueeze(-1), z, 0)
    temperature = temperature_column(temperature, z, cu_seqlens, keep)
    label = token_ids.long().where(keep, 0).unsqueeze(-1)
    if support is None:
        inside = truncate(z, temperature, top_k, top_p, min_p)
    else:
        ids = support.token_ids if isinstance(support, Support) else support
        inside = _places(torch.cat((ids.where(keep.unsqueeze(-1), -1), label), -1), z)
    log_p = log_softmax_on(inside, z, temperature)
    log_prob = log_p.gather(-1, label).squeeze(-1)
    log_prob = log_prob.masked_fill(log_prob == -torch.inf, -torch.inf)  # a constant: no gradient
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0)).sum(-1)
    return TokenLogProb(torch.where(keep, log_prob, 0), torch.where(keep, entropy, 0))


def _places(ids: Tensor, logits: Tensor) -> Tensor:
    """The places (..., V) that ids (..., K) name, -1 naming none, of finite logits."""
    vocab = logits.shape[-1]
    named = torch.zeros(*logits.shape[:-1], vocab + 1, dtype=torch.bool, device=logits.device)
    named.scatter_(-1, ids.long().where(ids >= 0, vocab), True)
    return named[..., :vocab] & (logits > -torch.inf)
