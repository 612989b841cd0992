"""`sdkernels::divergence_gradient`: the student's gradient of a divergence, in one sweep over both rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdkernels.reference import divergences as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl
from sdkernels.rows.implementations import runs_csrc, runs_triton, serves_both
from sdkernels.rows.inplace import gradient_operators


@jit
def _write_block(student_row, teacher_row, grad_row, columns, vocab, flows, row, DIVERGENCE: tl.constexpr,
                 CLIPPED: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """on (g - G P_S) of a block."""
    g = tl.zeros((columns.shape[0],), tl.float32)
    if flows:
        student, teacher, scale, beta, clip, slope, on = row
        z = device.load_block(student_row, columns, vocab, WHOLE)
        other = device.load_block(teacher_row, columns, vocab, WHOLE)
        value, on_log_p, p = device.divergence_entry(z, other, student, teacher, scale, beta, DIVERGENCE)
        if CLIPPED:
            on_log_p = tl.where(value > clip, 0.0, on_log_p)
        g = on * (on_log_p - slope * p)
    device.store_block(grad_row, columns, vocab, g, WHOLE)


@jit(**layout.unspecialised("", "teacher_", "grad_"))
def _divergence_gradient_kernel(
    student_ptr,  # (N, V) through sizes and strides
    teacher_ptr,  # (N, V) through sizes and teacher_strides
    grad_ptr,  # (N, V) through sizes and grad_strides; may be student_ptr
    temperatures_ptr,  # (N / span,) or None
    statistics,  # results of row_divergence but the first, (N,)
    upstream_ptr,  # (N,) float64
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    teacher_stride0: tl.int64,
    teacher_stride1: tl.int64,
    teacher_stride2: tl.int64,
    grad_stride0: tl.int64,
    grad_stride1: tl.int64,
    grad_stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    beta: tl.float64,
    clip,
    DIVERGENCE: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row, start, columns = device.program_block(vocab, BLOCK)
    student_row = student_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    teacher_row = teacher_ptr + device.row_offset(
        row, size1, size2, teacher_stride0, teacher_stride1, teacher_stride2, ALIGN
    )
    grad_row = grad_ptr + device.row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2, ALIGN)
    row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
    upstream = tl.load(upstream_ptr + row)
    log_sum, teacher_log_sum = tl.load(statistics[1] + row), tl.load(statistics[2] + row)
    coefficients = (
        (tl.load(statistics[3] + row), (log_sum * device.LOG2E).to(tl.float32)),
        (tl.load(statistics[4] + row), (teacher_log_sum * device.LOG2E).to(tl.float32)),
        device.row_scale(row_temperature),
        device.shares(beta),
        clip,
        tl.load(statistics[0] + row).to(tl.float32),
        (upstream / row_temperature).to(tl.float32),
    )
    bad = device.invalid_unless_finite(log_sum + teacher_log_sum)  # a row without a distribution is NaN
    flows = (upstream != 0) | (bad != bad)
    if start + BLOCK <= vocab:
        _write_block(student_row, teacher_row, grad_row, columns, vocab, flows, coefficients, DIVERGENCE, CLIPPED, True)
    else:
        _write_block(
            student_row, teacher_row, grad_row, columns, vocab, flows, coefficients, DIVERGENCE, CLIPPED, False
        )


def _launch(student, teacher, temperature, temperatures, options, statistics, upstream, grad) -> None:
    rows, vocab = upstream.numel(), student.shape[-1]
    align = layout.alignment(student, teacher, grad)
    divergence, beta, token_clip = options
    launch = layout.block_options(student, 16)  # with 32 the clipped JSD spills where rows are not aligned
    with layout.on_device(student):
        _divergence_gradient_kernel[(rows * -(-vocab // launch["BLOCK"]),)](
            student,
            teacher,
            grad,
            temperatures,
            statistics,
            upstream,
            *layout.kernel_sizes(student),
            *layout.kernel_strides(student, align),
            *layout.kernel_strides(teacher, align),
            *layout.kernel_strides(grad, align),
            vocab,
            1 if temperatures is None else layout.span(temperatures, rows),
            temperature,
            beta,
            token_clip,
            DIVERGENCE=divergence,
            CLIPPED=not math.isinf(token_clip),
            ALIGN=align,
            **launch,
        )


@gradient_operators
def divergence_gradient(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    divergence: str,
    beta: float,
    token_clip: float,
    slope: Tensor,
    log_sum: Tensor,
    teacher_log_sum: Tensor,
    max: Tensor,
    teacher_max: Tensor,
    upstream: Tensor,
) -> None:
    """upstream (g - slope P_S) / T, (..., V) in the student's dtype; the arguments are ``row_divergence``'s.

    Then come its results but the first, or those of whole rows of which these are a part, and the first one's upstream
    gradient, float64. Each row is formed in float32 and rounded once; a row whose upstream gradient is 0 is not read. A
    row whose slope is NaN, as where one of its log sums is not finite, is NaN.
    """
    options = (divergence, beta, token_clip)
    statistics = (slope, log_sum, teacher_log_sum, max, teacher_max)
    arguments = (student, teacher, temperature, temperatures)
    if serves_both(runs_triton, student, teacher):
        _launch(*arguments, options, statistics, upstream, grad)
    elif serves_both(runs_csrc, student, teacher):
        torch.ops.sdkernels_cpu.divergence_gradient(*arguments, *options, *statistics, upstream, grad)
    else:
        grad.copy_(reference.divergence_gradient(*arguments, *options, *statistics, upstream))
