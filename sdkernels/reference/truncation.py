"""Truncated distributions in plain PyTorch: S by a sort, q by a log-sum-exp over S."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdkernels.reductions import over_tokens
from sdkernels.truncation import Support


def temperature_column(
    temperature: float | Tensor, logits: Tensor, cu_seqlens: Tensor | None = None, keep: Tensor | None = None
) -> float | Tensor:
    """A temperature to divide logits (..., V) by: a number or (..., 1), 1 where masked."""
    if not isinstance(temperature, Tensor):
        return temperature
    temperature = temperature.detach().to(logits.dtype)
    if temperature.dim():
        temperature = over_tokens(temperature, logits.shape[:-1], cu_seqlens)
    temperature = temperature.expand(logits.shape[:-1]).unsqueeze(-1)
    return temperature if keep is None else torch.where(keep.unsqueeze(-1), temperature, 1)


def truncate(
    logits: Tensor,  # (..., V)
    temperature: float | Tensor,  # a number or (..., 1)
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """S = {v : z_v >= threshold} as a bool (..., V), of logits before temperature; masses are summed in float64."""
    z = logits.detach().double()
    ordered = z.sort(dim=-1, descending=True).values
    threshold = ordered[..., -1:]
    if top_k:
        threshold = ordered[..., min(top_k, z.shape[-1]) - 1].unsqueeze(-1)
    if top_p is not None and top_p < 1:
        mass = (ordered / temperature).softmax(-1).where(ordered >= threshold, 0)
        above = mass.cumsum(-1) - mass
        kept = above < top_p * mass.sum(-1, keepdim=True)
        threshold = ordered.where(kept, torch.inf).amin(-1, keepdim=True)  # that of the first of its ties
    if min_p:
        threshold = threshold.maximum(ordered[..., :1] + temperature * math.log(min_p))
    return (z >= threshold) & (z > -torch.inf)


def log_softmax_on(support: Tensor, logits: Tensor, temperature: float | Tensor) -> Tensor:
    """log q on S and -inf elsewhere; NaN in rows that hold NaN or +inf, or where S is empty."""
    y = logits / temperature
    bad = ~y.detach().amax(-1, keepdim=True).isfinite() | ~support.any(-1, keepdim=True)
    y = y + torch.where(bad, torch.nan, 0.0).to(y.dtype)
    inside = support | bad
    return (y - y.where(inside, -torch.inf).logsumexp(-1, keepdim=True)).where(inside, -torch.inf)


def truncated_log_softmax(
    logits: Tensor,  # (..., V)
    temperature: float | Tensor = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """See `sdkernels.truncated_log_softmax`."""
    z = logits.double() if dtype == torch.float64 else logits.to(torch.promote_types(logits.dtype, torch.float32))
    temperature = temperature_column(temperature, z)
    log_q = log_softmax_on(truncate(z, temperature, top_k, top_p, min_p), z, temperature)
    return log_q.to(logits.dtype if dtype is None else dtype)


def truncated_support(
    logits: Tensor,  # (..., V)
    temperature: float | Tensor = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    max_size: int,
    mask: Tensor | None = None,
) -> Support:
    """See `sdkernels.truncated_support`."""
    keep = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask != 0
    z = torch.where(keep.unsqueeze(-1), logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), 0)
    t = temperature_column(temperature, z, keep=keep)
    log_q = log_softmax_on(truncate(z, t, top_k, top_p, min_p), z, t)
    inside = keep.unsqueeze(-1) & (log_q > -torch.inf)  # nothing of a NaN row
    size = inside.sum(-1)
    places = min(max_size, z.shape[-1])
    token_ids = z.where(inside, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :places]
    listed = inside.gather(-1, token_ids)
    log_probs = log_q.gather(-1, token_ids).where(listed, -torch.inf)
    cut = (size > max_size).unsqueeze(-1)
    log_probs = torch.where(cut, log_probs - log_probs.logsumexp(-1, keepdim=True), log_probs)
    unused = (0, max_size - places)
    token_ids = torch.nn.functional.pad(token_ids.where(listed, -1), unused, value=-1)
    log_probs = torch.nn.functional.pad(log_probs, unused, value=-torch.inf)
    return Support(token_ids, log_probs, size, temperature)
