"""Operators on truncated rows: log q written out, and log q of one token."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import rows as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl, triton
from sdkernels.rows.implementations import runs_csrc, runs_triton
from sdkernels.rows.layout import RowSupport
from sdkernels.rows.statistics import check_values
from sdkernels.rows.truncated_gradient import truncated_gradient


@jit
def _write_log_q(row_ptr, result_row, columns, vocab, dense, WHOLE: tl.constexpr):
    """log q of a block of a row that is not listed."""
    threshold, m, inverse, log_sum = dense
    z = device.load_block(row_ptr, columns, vocab, WHOLE)
    log_q = tl.where(z >= threshold, (z - m) * inverse - log_sum, float("-inf"))
    device.store_block(result_row, columns, vocab, log_q, WHOLE)


@jit(**layout.unspecialised("", "result_"))
def _log_softmax_kernel(
    logits_ptr,  # (N, V) through sizes and strides
    result_ptr,  # (N, V) through sizes and result_strides
    temperatures_ptr,  # (N / span,) or None
    support,  # the fields of RowSupport
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    result_stride0: tl.int64,
    result_stride1: tl.int64,
    result_stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    capacity,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    threshold_ptr, size_ptr, max_ptr, log_sum_ptr, _, ids_ptr, log_probs_ptr = support
    row, start, columns = device.program_block(vocab, BLOCK)
    row_ptr = logits_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    result_row = result_ptr + device.row_offset(
        row, size1, size2, result_stride0, result_stride1, result_stride2, ALIGN
    )
    log_sum = tl.load(log_sum_ptr + row).to(tl.float32)
    size = tl.load(size_ptr + row)
    if size > capacity:
        inverse = device.inverse(device.row_temperature(row, temperature, temperatures_ptr, span))
        dense = (tl.load(threshold_ptr + row), tl.load(max_ptr + row), inverse, log_sum)
        if start + BLOCK <= vocab:
            _write_log_q(row_ptr, result_row, columns, vocab, dense, True)
        else:
            _write_log_q(row_ptr, result_row, columns, vocab, dense, False)
    else:
        nothing = tl.where(log_sum == log_sum, float("-inf"), float("nan"))
        device.fill_block(result_row, start, columns, vocab, nothing)
        places = tl.arange(0, PLACES)
        place = row.to(tl.int64) * capacity + places
        ids = tl.load(ids_ptr + place, mask=places < size, other=-1)
        device.scatter(tl.load(log_probs_ptr + place, mask=places < size, other=0.0), ids, result_row, start, BLOCK)


def _launch(logits, temperature, temperatures, support, result) -> None:
    rows, vocab = support.size.numel(), logits.shape[-1]
    align = layout.alignment(logits, result)
    options = layout.block_options(logits)
    with layout.on_device(logits):
        _log_softmax_kernel[(rows * -(-vocab // options["BLOCK"]),)](
            logits,
            result,
            temperatures,
            support,
            *layout.kernel_sizes(logits),
            *layout.kernel_strides(logits, align),
            *layout.kernel_strides(result, align),
            vocab,
            1 if temperatures is None else layout.span(temperatures, rows),
            temperature,
            support.token_ids.shape[-1],
            PLACES=triton.next_power_of_2(max(support.token_ids.shape[-1], 1)),
            ALIGN=align,
            **options,
        )


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
    if not (runs_triton(logits) or runs_csrc(logits)):
        return reference.truncated_log_softmax(logits, temperature, temperatures, support, dtype)
    result = layout.empty_rows(logits, dtype)
    if size.numel() == 0:
        return result
    if runs_triton(logits):
        _launch(logits, temperature, temperatures, support, result)
    else:
        torch.ops.sdkernels_cpu.truncated_log_softmax(logits, temperature, temperatures, *support, result)
    return result


@truncated_log_softmax.register_fake
def _(logits, *arguments):
    return layout.empty_rows(logits, arguments[-1])


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
    return torch.where(keep, log_prob, 0), torch.where(keep, entropy + torch.where(valid, 0.0, torch.nan), 0)


@truncated_token_log_prob.register_fake
def _(logits, label_ids, mask, temperature, temperatures, *support):
    return torch.empty_like(support[3]), torch.empty_like(support[4])


def _setup_token_log_prob(ctx, inputs, output) -> None:
    logits, label_ids, _, ctx.temperature, temperatures, *support = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, label_ids, output[0], temperatures, *support)


def token_gradient(
    logits: Tensor,
    label_ids: Tensor,
    log_prob: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    support: RowSupport,
    on_log_prob: Tensor | None,
    on_entropy: Tensor | None,
) -> Tensor:
    """The logits' gradient of on_log_prob log q(label) + on_entropy H(q); labels outside [0, V) are another shard's."""
    invalid = log_prob.isnan()  # as of a label outside the vocabulary: the row's gradient is NaN, and nothing is read
    support = support._replace(
        size=support.size.masked_fill(invalid, 0), log_sum=support.log_sum.masked_fill(invalid, torch.nan)
    )
    dtype = support.threshold.dtype
    on_label = torch.zeros_like(support.threshold) if on_log_prob is None else on_log_prob.to(dtype)
    on_label = on_label.masked_fill((log_prob == -torch.inf) | (support.size == 0), 0)
    if on_entropy is not None:
        on_entropy = on_entropy.to(dtype).masked_fill(support.size == 0, 0)
    return truncated_gradient(logits, None, label_ids, on_label, on_entropy, temperature, temperatures, *support)


def _token_log_prob_backward(ctx, on_log_prob, on_entropy):
    logits, label_ids, log_prob, temperatures, *support = ctx.saved_tensors
    scaling = (ctx.temperature, temperatures)
    grad = token_gradient(logits, label_ids, log_prob, *scaling, RowSupport(*support), on_log_prob, on_entropy)
    return grad, *(None,) * 11


truncated_token_log_prob.register_autograd(_token_log_prob_backward, setup_context=_setup_token_log_prob)
