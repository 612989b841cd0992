"""Operators on truncated rows: log q written out, log q of one token, and the gradient of both."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import rows as reference
from sdkernels.rows import layout
from sdkernels.rows.implementations import runs_csrc, runs_triton
from sdkernels.rows.layout import RowSupport
from sdkernels.rows.statistics import check_values


@torch.library.custom_op("sdkernels::truncated_log_softmax", mutates_args=())
def truncated_log_softmax(
    logits: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    threshold: Tensor,
    size: Tensor,
    max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    token_ids: Tensor,
    log_probs: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """log q on S and -inf elsewhere, (..., V) in `dtype`; the seven tensors are `RowSupport`'s of these logits."""
    support = RowSupport(threshold, size, max, log_sum, entropy, token_ids, log_probs)
    if not runs_csrc(logits):
        return reference.truncated_log_softmax(logits, temperature, temperatures, support, dtype)
    result = layout.empty_gradient(logits, dtype)
    temperatures = None if temperatures is None else temperatures.double()
    if size.numel() > 0:
        torch.ops.sdkernels_cpu.truncated_log_softmax(logits, temperature, temperatures, *support, result)
    return result


@truncated_log_softmax.register_fake
def _(logits, *arguments):
    return layout.empty_gradient(logits, arguments[-1])


def _setup_log_softmax(ctx, inputs, output) -> None:
    logits, ctx.temperature, temperatures, *support, _ = inputs
    ctx.save_for_backward(logits, temperatures, *support)


def _log_softmax_backward(ctx, upstream):
    logits, temperatures, *support = ctx.saved_tensors
    upstream = layout.as_rows(upstream)
    grad = truncated_gradient(logits, upstream, None, None, None, ctx.temperature, temperatures, *support)
    return grad, *(None,) * 10


truncated_log_softmax.register_autograd(_log_softmax_backward, setup_context=_setup_log_softmax)


@torch.library.custom_op("sdkernels::truncated_token_log_prob", mutates_args=())
def truncated_token_log_prob(
    logits: Tensor,
    label_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    threshold: Tensor,
    size: Tensor,
    max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    token_ids: Tensor,
    log_probs: Tensor,
) -> tuple[Tensor, Tensor]:
    """log q of a label per row, float64, and the entropy of q, each (...); nothing but the labels' logits is read."""
    check_values(logits, label_ids, mask, temperatures)
    ids = label_ids.long()
    valid = (ids >= 0) & (ids < logits.shape[-1])
    label = logits.gather(-1, ids.where(valid, 0).unsqueeze(-1)).squeeze(-1).double()
    t = temperature if temperatures is None else layout.at_tokens(temperatures, size.shape)
    log_prob = ((label - max) / t - log_sum).where(label >= threshold, -torch.inf)
    log_prob = log_prob.where(valid & ~log_sum.isnan(), torch.nan)
    keep = layout.kept_tokens(label_ids, mask)
    return torch.where(keep, log_prob, 0), torch.where(keep, entropy, 0)


@truncated_token_log_prob.register_fake
def _(logits, label_ids, mask, temperature, temperatures, *support):
    return torch.empty_like(support[3]), torch.empty_like(support[4])


def _setup_token_log_prob(ctx, inputs, output) -> None:
    logits, label_ids, _, ctx.temperature, temperatures, *support = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, label_ids, output[0], temperatures, *support)


def _token_log_prob_backward(ctx, on_log_prob, on_entropy):
    logits, label_ids, log_prob, temperatures, *support = ctx.saved_tensors
    dtype = support[0].dtype
    on_label = torch.zeros_like(support[0]) if on_log_prob is None else on_log_prob.to(dtype)
    on_label = on_label.masked_fill((log_prob == -torch.inf) | (support[1] == 0), 0)
    if on_entropy is not None:
        on_entropy = on_entropy.to(dtype).masked_fill(support[1] == 0, 0)
    grad = truncated_gradient(logits, None, label_ids, on_label, on_entropy, ctx.temperature, temperatures, *support)
    return grad, *(None,) * 11


truncated_token_log_prob.register_autograd(_token_log_prob_backward, setup_context=_setup_token_log_prob)


@torch.library.custom_op("sdkernels::truncated_gradient", mutates_args=())
def truncated_gradient(
    logits: Tensor,
    upstream: Tensor | None,
    label_ids: Tensor | None,
    on_label: Tensor | None,
    on_entropy: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    threshold: Tensor,
    size: Tensor,
    max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    token_ids: Tensor,
    log_probs: Tensor,
) -> Tensor:
    """The logits' gradient, (..., V) in their dtype, of sum_v u_v log q_v + a log q_label + b H(q).

    On S each row is (u - q sum_S(u) + a (onehot - q) - b q (log q + H)) / T, formed in float32 and rounded once;
    elsewhere it is 0 and u is not read. u = ``upstream`` (..., V); a = ``on_label`` and b = ``on_entropy`` (...).
    """
    support = RowSupport(threshold, size, max, log_sum, entropy, token_ids, log_probs)
    label_ids = None if label_ids is None else label_ids.long()
    arguments = (logits, upstream, label_ids, on_label, on_entropy, temperature, temperatures)
    if not runs_csrc(logits):
        return reference.truncated_gradient(*arguments, support)
    grad = layout.empty_gradient(logits)
    if size.numel() > 0:
        torch.ops.sdkernels_cpu.truncated_gradient(*arguments, *support, grad)
    return grad


@truncated_gradient.register_fake
def _(logits, *arguments):
    return layout.empty_gradient(logits)
