"""The row operations in plain PyTorch: what serves float64, and the CPU where csrc was not built."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.rows.layout import at_tokens, kept_tokens


def _scaled(logits: Tensor, temperature: float, temperatures: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """Logits in the arithmetic's dtype, and the temperature as a column."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperatures is None:
        return z, temperature
    return z, at_tokens(temperatures.to(z.dtype), z.shape[:-1]).unsqueeze(-1)


def _row_sum(x: Tensor) -> Tensor:
    """Sums over V, (..., 1), in an order that neither threads nor the number of rows change."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % 512))
    return x.unflatten(-1, (-1, 512)).sum(-1).sum(-1, keepdim=True)


def row_statistics(
    logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``sdkernels.rows.statistics.row_statistics``."""
    z, t = _scaled(logits, temperature, temperatures)
    keep, valid = kept_tokens(token_ids, mask), (token_ids >= 0) & (token_ids < z.shape[-1])
    m = z.amax(-1, keepdim=True)
    y = (z - m) / t
    log_sum = _row_sum(y.exp()).log()
    log_p = y - log_sum
    log_prob = log_p.gather(-1, token_ids.long().where(valid, 0).unsqueeze(-1))
    entropy = -_row_sum((log_p.exp() * log_p).masked_fill(log_p == -torch.inf, 0))[..., 0]
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
    z, t = _scaled(logits, temperature, temperatures)
    log_p = (z - max.unsqueeze(-1)) / t - log_sum.unsqueeze(-1)
    p = log_p.exp()
    onehot = torch.zeros_like(z).scatter_(-1, token_ids.long().clamp(0, z.shape[-1] - 1).unsqueeze(-1), 1)
    grad = grad_log_prob.masked_fill(log_prob == -torch.inf, 0).unsqueeze(-1) * (onehot - p)
    if grad_entropy is not None:
        surprise = (p * (log_p + entropy.unsqueeze(-1))).masked_fill(log_p == -torch.inf, 0)
        grad = grad - grad_entropy.unsqueeze(-1) * surprise
    return torch.where(kept_tokens(token_ids, mask).unsqueeze(-1), grad / t, 0).to(logits.dtype)
