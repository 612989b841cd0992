"""The log-probability of chosen tokens and the entropy of their distributions, straight from the logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sdkernels import _check
from sdkernels.reductions import over_tokens
from sdkernels.rows.layout import as_rows
from sdkernels.rows.statistics import row_statistics


class TokenLogProb(NamedTuple):
    """Results of `token_log_prob`, each (...)."""

    log_prob: Tensor
    entropy: Tensor


def token_log_prob(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    temperature: float | Tensor = 1.0,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> TokenLogProb:
    """log softmax(logits / temperature) at the chosen tokens, and the entropy of the softmax.

    Both are differentiable: the logits' gradient for upstream a and b is (a (onehot - p) - b p (log p + H)) / T.

    The forward pass reads each row once and writes nothing of size V; backward reads it again and writes the gradient:
    in bfloat16 2 bytes per logit forward, 4 backward. Rows are read through their strides, so views cost nothing here.
    (Autograd of a slice like ``logits[:, :-1]`` still fills a zero gradient of its own: to save it, pass all logits
    with shifted ids, the last position masked.)

    Args:
        logits: (..., V) float64, float32, bfloat16 or float16.
        token_ids: (...) int32 or int64 in [0, V); -100 masks a token.
        temperature: divides the logits; a number > 0, or a tensor (...), or (...) without time, or (S,) with
            `cu_seqlens`.
        mask: (...), kept where non-zero. A masked token's logits are not read, its results and gradient are 0.
        cu_seqlens: (S + 1,) int32, where packed sequences start and end.

    Returns:
        TokenLogProb(log_prob, entropy), each (...), in nats, float32 (float64 for float64 logits). A token whose logit
        is -inf has log-prob -inf and gives no gradient; a row that holds NaN or +inf, or only -inf, gives NaN.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        IndexError: an id outside [0, V), on the CPU, and on a GPU where SDKERNELS_VALIDATE=1; otherwise NaN there.
    """
    _check.logits("logits", logits)
    shape = logits.shape[:-1]
    _check.token_ids("token_ids", token_ids, shape, logits)
    cu_seqlens = _check.cu_seqlens(cu_seqlens, shape, logits)
    mask = _check.mask("mask", mask, shape, logits)
    temperature = _check.temperature(temperature, shape, cu_seqlens, logits)
    log_prob, entropy = rows_log_prob(logits, token_ids, temperature, mask, cu_seqlens)
    return TokenLogProb(log_prob.to(entropy.dtype), entropy)


def rows_log_prob(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    inplace: bool = False,
) -> TokenLogProb:
    """`token_log_prob` of checked arguments, log-prob in float64; with `inplace` backward overwrites the logits."""
    rows = as_rows(logits)
    leading = rows.shape[:-1]
    number, temperatures = kernel_temperature(temperature, token_ids.shape, cu_seqlens)
    log_prob, entropy, _, _ = row_statistics(
        rows,
        token_ids.reshape(leading).contiguous(),
        None if mask is None else mask.reshape(leading).contiguous(),
        number,
        temperatures,
        inplace,
    )
    return TokenLogProb(log_prob.reshape(token_ids.shape), entropy.reshape(token_ids.shape))


def kernel_temperature(
    temperature: float | Tensor, shape: torch.Size, cu_seqlens: Tensor | None
) -> tuple[float, Tensor | None]:
    """A checked temperature as the row operations take it: a number, or float values for runs of consecutive tokens."""
    if not isinstance(temperature, Tensor):
        return temperature, None
    values = temperature.detach().double()
    return 1.0, values.reshape(1) if values.dim() == 0 else kernel_values(values, shape, cu_seqlens)


def kernel_values(values: Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> Tensor:
    """Per-token or per-sequence values, contiguous: one for each run of consecutive tokens."""
    return (values if cu_seqlens is None else over_tokens(values, shape, cu_seqlens)).contiguous()
