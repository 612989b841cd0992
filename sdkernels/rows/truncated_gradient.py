"""`sdkernels::truncated_gradient`: the gradient of logits through log q and the entropy of q."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdkernels.reference import rows as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl, triton
from sdkernels.rows.implementations import runs_csrc, runs_triton
from sdkernels.rows.layout import RowSupport


@jit
def _fold_upstream(state, z, upstream, columns, threshold):
    return state + tl.sum(tl.where(z >= threshold, upstream, 0.0).to(tl.float64), 0)


@jit(**layout.unspecialised("", "upstream_"))
def _upstream_sum_kernel(
    logits_ptr,  # (N, V) through sizes and strides
    upstream_ptr,  # (N, V) through sizes and upstream_strides
    sum_ptr,  # (N,) float64
    support,  # the fields of RowSupport
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    upstream_stride0: tl.int64,
    upstream_stride1: tl.int64,
    upstream_stride2: tl.int64,
    vocab,
    capacity,
    PLACES: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    threshold_ptr, size_ptr, _, _, _, ids_ptr, _ = support
    row = tl.program_id(0).to(tl.int64)
    size = tl.load(size_ptr + row)
    upstream_row = upstream_ptr + device.row_offset(
        row, size1, size2, upstream_stride0, upstream_stride1, upstream_stride2, ALIGN
    )
    if size > capacity:
        row_ptr = logits_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
        lanes = tl.zeros((LANES,), tl.float64)
        threshold = tl.load(threshold_ptr + row)
        lanes = device.walk(row_ptr, upstream_row, vocab, lanes, threshold, _fold_upstream, DEPTH, LANES)
        tl.store(sum_ptr + row, tl.sum(lanes, 0))
    else:
        places = tl.arange(0, PLACES)
        ids = tl.load(ids_ptr + row * capacity + places, mask=places < size, other=0)
        values = tl.load(upstream_row + ids, mask=places < size, other=0.0)
        tl.store(sum_ptr + row, tl.sum(values.to(tl.float64), 0))


@jit
def _coefficients(row, slopes, label_ids_ptr, inverse):
    """What a row's gradient is made of."""
    slope_ptr, entropy_slope_ptr, label_slope_ptr = slopes
    slope = tl.load(slope_ptr + row)
    entropy_slope = 0.0
    if entropy_slope_ptr is not None:
        entropy_slope = tl.load(entropy_slope_ptr + row)
    label_id = -1
    label_slope = 0.0
    if label_ids_ptr is not None:
        label_id = tl.load(label_ids_ptr + row).to(tl.int32)
        label_slope = tl.load(label_slope_ptr + row)
    return slope, entropy_slope, label_id, label_slope, inverse


@jit
def _gradient_on_support(log2_q, columns, coefficients):
    """The gradient at tokens of S from log2 q, but for what an upstream gradient adds to each."""
    slope, entropy_slope, label_id, label_slope, _ = coefficients
    g = tl.exp2(log2_q) * (slope + entropy_slope * tl.maximum(log2_q, device.FLOOR))
    return g + tl.where(columns == label_id, label_slope, 0.0)


@jit
def _write_block(row_ptr, upstream_row, grad_row, columns, vocab, dense, coefficients, WHOLE: tl.constexpr):
    """The gradient of a block of a row that is not listed."""
    threshold, m, scale, log2_sum = dense
    z = device.load_block(row_ptr, columns, vocab, WHOLE)
    g = _gradient_on_support((z - m) * scale - log2_sum, columns, coefficients)
    if upstream_row is not None:
        g += device.load_block(upstream_row, columns, vocab, WHOLE) * coefficients[4]
    device.store_block(grad_row, columns, vocab, tl.where(z >= threshold, g, 0.0), WHOLE)


@jit(**layout.unspecialised("", "upstream_", "result_"))
def _truncated_gradient_kernel(
    logits_ptr,  # (N, V) through sizes and strides
    upstream_ptr,  # (N, V) through sizes and upstream_strides, or None
    grad_ptr,  # (N, V) through sizes and result_strides
    label_ids_ptr,  # (N,) or None
    slopes,  # on q, on q log2 q (or None), on the label (or None), each (N,)
    temperatures_ptr,  # (N / span,) or None
    support,  # the fields of RowSupport
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    upstream_stride0: tl.int64,
    upstream_stride1: tl.int64,
    upstream_stride2: tl.int64,
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
    size = tl.load(size_ptr + row)
    row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
    row_ptr = logits_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    grad_row = grad_ptr + device.row_offset(row, size1, size2, result_stride0, result_stride1, result_stride2, ALIGN)
    upstream_row = None
    if upstream_ptr is not None:
        upstream_row = upstream_ptr + device.row_offset(
            row, size1, size2, upstream_stride0, upstream_stride1, upstream_stride2, ALIGN
        )
    coefficients = _coefficients(row, slopes, label_ids_ptr, device.inverse(row_temperature))
    if size > capacity:
        m = tl.load(max_ptr + row)
        threshold = tl.load(threshold_ptr + row)
        log2_sum = (tl.load(log_sum_ptr + row) * device.LOG2E).to(tl.float32)
        dense = (threshold, m, device.row_scale(row_temperature), log2_sum)
        if start + BLOCK <= vocab:
            _write_block(row_ptr, upstream_row, grad_row, columns, vocab, dense, coefficients, True)
        else:
            _write_block(row_ptr, upstream_row, grad_row, columns, vocab, dense, coefficients, False)
    else:
        nothing = 0.0 * tl.load(log_sum_ptr + row).to(tl.float32)  # NaN where the row has no distribution
        device.fill_block(grad_row, start, columns, vocab, nothing)
        places = tl.arange(0, PLACES)
        place = row.to(tl.int64) * capacity + places
        ids = tl.load(ids_ptr + place, mask=places < size, other=-1)
        log_q = tl.load(log_probs_ptr + place, mask=places < size, other=0.0)
        g = _gradient_on_support(log_q * device.LOG2E, ids, coefficients)
        if upstream_row is not None:
            g += tl.load(upstream_row + ids, mask=places < size, other=0.0).to(tl.float32) * coefficients[4]
        device.scatter(g, ids, grad_row, start, BLOCK)


def _upstream_sum(logits: Tensor, upstream: Tensor, support: RowSupport) -> Tensor:
    """sum_S of an upstream gradient (..., V) of log q, (...) float64."""
    total = torch.empty_like(support.log_sum)
    depth, lanes = layout.tile(logits)
    align = layout.alignment(logits, upstream)
    with layout.on_device(logits):
        _upstream_sum_kernel[(total.numel(),)](
            logits,
            upstream,
            total,
            support,
            *layout.kernel_sizes(logits),
            *layout.kernel_strides(logits, align),
            *layout.kernel_strides(upstream, align),
            logits.shape[-1],
            support.token_ids.shape[-1],
            PLACES=triton.next_power_of_2(max(support.token_ids.shape[-1], 1)),
            DEPTH=depth,
            LANES=lanes,
            ALIGN=align,
            **layout.sweep_options(),
        )
    return total


def _launch(logits, upstream, label_ids, on_label, on_entropy, temperature, temperatures, support, grad) -> None:
    rows, vocab = support.size.numel(), logits.shape[-1]
    t = temperature if temperatures is None else layout.at_tokens(temperatures, support.size.shape)
    slope = 0.0 * support.log_sum  # NaN where the row has no distribution
    if upstream is not None:
        slope = slope - _upstream_sum(logits, upstream, support)
    if on_label is not None:
        slope = slope - on_label
    if on_entropy is not None:
        slope = slope - torch.where(on_entropy == 0, 0, on_entropy * support.entropy)
    on_log2_q = None if on_entropy is None else -on_entropy / math.log2(math.e)
    slopes = tuple(None if x is None else (x.double() / t).float() for x in (slope, on_log2_q, on_label))
    align = layout.alignment(logits, grad) if upstream is None else layout.alignment(logits, grad, upstream)
    options = layout.block_options(logits)
    with layout.on_device(logits):
        _truncated_gradient_kernel[(rows * -(-vocab // options["BLOCK"]),)](
            logits,
            upstream,
            grad,
            label_ids,
            slopes,
            temperatures,
            support,
            *layout.kernel_sizes(logits),
            *layout.kernel_strides(logits, align),
            *((0, 0, 0) if upstream is None else layout.kernel_strides(upstream, align)),
            *layout.kernel_strides(grad, align),
            vocab,
            1 if temperatures is None else layout.span(temperatures, rows),
            temperature,
            support.token_ids.shape[-1],
            PLACES=triton.next_power_of_2(max(support.token_ids.shape[-1], 1)),
            ALIGN=align,
            **options,
        )


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
    if not (runs_triton(logits) or runs_csrc(logits)):
        return reference.truncated_gradient(*arguments, support)
    grad = layout.empty_rows(logits)
    if size.numel() == 0:
        return grad
    if runs_triton(logits):
        _launch(*arguments, support, grad)
    else:
        torch.ops.sdkernels_cpu.truncated_gradient(*arguments, *support, grad)
    return grad


@truncated_gradient.register_fake
def _(logits, *arguments):
    return layout.empty_rows(logits)
