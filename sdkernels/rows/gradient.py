"""`sdkernels::row_gradient`: one sweep over each row turns per-token coefficients into the gradient of its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import rows as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl
from sdkernels.rows.implementations import runs_csrc, runs_triton
from sdkernels.rows.inplace import gradient_operators


@jit
def _gradient(z, is_label, coefficients, entropy_slope):
    m, scale, log2_sum, slope, label_slope = coefficients
    y = (z - m) * scale - log2_sum  # log2 p
    if entropy_slope is not None:
        slope += entropy_slope * tl.maximum(y, device.FLOOR)
    return tl.exp2(y) * slope + tl.where(is_label, label_slope, 0.0)


@jit
def _write_block(row_ptr, grad_row, columns, vocab, is_label, needs_row, coefficients, entropy_slope,
                 WHOLE: tl.constexpr):  # fmt: skip
    """The gradient of a block; the row is read only where it is needed."""
    g = tl.zeros((columns.shape[0],), tl.float32)
    if needs_row:
        z = device.load_block(row_ptr, columns, vocab, WHOLE)
        g = _gradient(z, is_label, coefficients, entropy_slope)
    device.store_block(grad_row, columns, vocab, g, WHOLE)


@jit(**layout.unspecialised("", "grad_"))
def _gradient_kernel(
    logits_ptr,  # (N, V) through sizes and strides
    grad_ptr,  # (N, V) through sizes and grad_strides; may be logits_ptr
    token_ids_ptr,  # (N,)
    mask_ptr,  # (N,) or None
    temperatures_ptr,  # (N / span,) or None
    statistics,  # the row's log-prob (N,) float64, entropy, maximum and log sum (N,)
    upstream,  # of log-prob (N,), and of entropy (N,) or None
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    grad_stride0: tl.int64,
    grad_stride1: tl.int64,
    grad_stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    log_prob_ptr, entropy_ptr, max_ptr, log_sum_ptr = statistics
    grad_log_prob_ptr, grad_entropy_ptr = upstream
    row, start, columns = device.program_block(vocab, BLOCK)
    row_ptr = logits_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    grad_row = grad_ptr + device.row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2, ALIGN)
    token_id = tl.load(token_ids_ptr + row).to(tl.int64)
    is_label = tl.arange(0, BLOCK) == (token_id - start).to(tl.int32)
    log_sum = tl.load(log_sum_ptr + row)
    on_log_prob = 0.0
    on_entropy = 0.0
    if device.is_kept(row, token_id, mask_ptr):
        # A label of probability 0 has no gradient: its log-prob is the constant -inf.
        possible = tl.load(log_prob_ptr + row) != float("-inf")
        on_log_prob = tl.where(possible, tl.load(grad_log_prob_ptr + row), 0.0)
        if grad_entropy_ptr is not None:
            on_entropy = tl.load(grad_entropy_ptr + row)
    bad = device.invalid_unless_finite(log_sum)  # which makes the row NaN
    needs_row = (on_log_prob != 0) | (on_entropy != 0) | (bad != bad)
    row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
    inverse = device.inverse(row_temperature)
    slope = -on_log_prob * inverse
    entropy_slope = None
    if grad_entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + row)
        slope -= tl.where(on_entropy == 0, 0.0, on_entropy * entropy) * inverse
        entropy_slope = -on_entropy * inverse / device.LOG2E
    label_slope = on_log_prob * inverse
    log2_sum = log_sum * device.LOG2E
    scale = device.row_scale(row_temperature)
    coefficients = (tl.load(max_ptr + row), scale, log2_sum, slope, label_slope)
    if start + BLOCK <= vocab:
        _write_block(row_ptr, grad_row, columns, vocab, is_label, needs_row, coefficients, entropy_slope, True)
    else:
        _write_block(row_ptr, grad_row, columns, vocab, is_label, needs_row, coefficients, entropy_slope, False)


def _launch(logits: Tensor, grad: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float,
            temperatures: Tensor | None, per_token: tuple[Tensor | None, ...]) -> None:  # fmt: skip
    vocab = logits.shape[-1]
    options = layout.block_options(logits)
    align = layout.alignment(logits, grad)
    with layout.on_device(logits):
        _gradient_kernel[(token_ids.numel() * -(-vocab // options["BLOCK"]),)](
            logits,
            grad,
            token_ids,
            mask,
            temperatures,
            per_token[:4],
            per_token[4:],
            *layout.kernel_sizes(logits),
            *layout.kernel_strides(logits, align),
            *layout.kernel_strides(grad, align),
            vocab,
            1 if temperatures is None else layout.span(temperatures, token_ids.numel()),
            temperature,
            ALIGN=align,
            **options,
        )


@gradient_operators
def row_gradient(
    grad: Tensor,
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
) -> None:
    """The logits' gradient, (..., V) in their dtype, of sum_t a_t log P(token_t) + b_t H_t.

    a = ``grad_log_prob`` and b = ``grad_entropy`` are the upstream gradients (...); the four statistics are
    ``row_statistics``', or those of whole rows of which these are a part. Each row's gradient is
    (a (onehot - p) - b p (log p + H)) / T, formed in float32 and rounded once; onehot is 0 where the id is outside
    [0, V). It is NaN where the log sum is not finite. Masked rows and those of id -100 are 0 and not read; a row whose
    coefficients are 0 is not read either.
    """
    per_token = (log_prob, entropy, max, log_sum, grad_log_prob, grad_entropy)
    if runs_triton(logits):
        _launch(logits, grad, token_ids, mask, temperature, temperatures, per_token)
    elif runs_csrc(logits):
        torch.ops.sdkernels_cpu.row_gradient(
            logits, token_ids.long(), mask, temperature, temperatures, *per_token, grad
        )
    else:
        grad.copy_(reference.row_gradient(logits, token_ids, mask, temperature, temperatures, *per_token))
