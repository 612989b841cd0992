"""Per-token losses to one number: the only place that divides."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The sequence that each packed token belongs to, (N,), empty sequences skipped."""
    positions = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def over_tokens(values: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Per-sequence values at each of their tokens; per-token values as they are. A shape that is both is per token."""
    if values.shape == shape:
        return values
    if cu_seqlens is not None:
        return values[sequence_of_token(cu_seqlens, shape[0])]
    return values.unsqueeze(-1).expand(shape)


def reduce(
    values: Tensor,  # (...), 0 at masked tokens
    keep: Tensor,  # (...) bool
    reduction: str,
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Sum of the per-token values over the denominator that the reduction names; 0 / 0 is 0."""
    if reduction == "none":
        return values
    if reduction == "seq-mean-token-mean":
        values = values / _tokens_in_sequence(keep, cu_seqlens).clamp(min=1)
    return divided(values.sum(), keep, reduction, normalizer, cu_seqlens)


def token_factors(keep: Tensor, reduction: str, cu_seqlens: Tensor | None) -> Tensor:
    """What multiplies each token's value in the sum that `divided` then divides, (...) float64."""
    factors = keep.double()
    if reduction == "seq-mean-token-mean":
        factors = factors / _tokens_in_sequence(keep, cu_seqlens).clamp(min=1)
    return factors


def divided(
    total: Tensor, keep: Tensor, reduction: str, normalizer: float | Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """A sum over tokens over the denominator that the reduction names; 0 / 0 is 0."""
    denominator: float | int | Tensor = 1
    if normalizer is not None:
        denominator = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
    elif reduction == "token-mean":
        denominator = keep.sum()
    elif reduction.startswith("seq-mean"):
        denominator = cu_seqlens.numel() - 1 if cu_seqlens is not None else keep.shape[:-1].numel()
    if isinstance(denominator, Tensor):
        return total / torch.where((denominator == 0) & (total.detach() == 0), 1, denominator)
    return total / max(denominator, 1) if isinstance(denominator, int) else total / denominator


def _tokens_in_sequence(keep: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return keep.sum(-1, keepdim=True)
    before = torch.nn.functional.pad(keep.cumsum(0), (1, 0))[cu_seqlens.long()]  # integers: exact in any order
    return before.diff()[sequence_of_token(cu_seqlens, keep.numel())]
