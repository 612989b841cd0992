"""`sdkernels::row_information`: what R teacher rows tell a student row, on average, as one, and about each other."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import divergences as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl
from sdkernels.rows.implementations import runs_csrc, runs_triton, serves_both


@jit
def _normaliser(row_ptr, vocab, scale, normalisers, place, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """A row's maximum and centred log sum, in one pass over it unless they are known."""
    if normalisers[0] is not None:
        log_sum, m = tl.load(normalisers[0] + place), tl.load(normalisers[1] + place)
    else:
        m, s, _ = device.sweep(row_ptr, vocab, scale, DEPTH, LANES)
        log_sum = tl.log(s)
    return m, log_sum


@jit
def _log2_q(teacher_rows, sums_ptr, r, columns, vocab, arguments, WHOLE: tl.constexpr):
    """log2 of the probabilities that the teacher with sample r gives a block's tokens."""
    _, sample_stride, scale = arguments
    normaliser = (tl.load(sums_ptr + 2 * r), tl.load(sums_ptr + 2 * r + 1))
    z = device.load_block(teacher_rows + r * sample_stride, columns, vocab, WHOLE)
    return device.log2_softmax(z, normaliser, scale)


@jit
def _fold_block(state, student_row, teacher_rows, sums_ptr, columns, vocab, student, arguments, WHOLE: tl.constexpr):
    """A block of all rows into lanes of the three sums; the teachers are read twice, the second time from a cache."""
    samples, _, scale = arguments
    log2_p = device.log2_softmax(device.load_block(student_row, columns, vocab, WHOLE), student, scale)
    zeros = tl.zeros(columns.shape, tl.float32)
    total, mean, information, largest = zeros, zeros, zeros, zeros + float("-inf")
    for r in range(samples):
        log2_q = _log2_q(teacher_rows, sums_ptr, r, columns, vocab, arguments, WHOLE)
        total += device.relative(log2_q, log2_p)
        mean += tl.exp2(log2_q)
        largest = tl.maximum(largest, log2_q)
    mean /= samples
    # Where the mean underflows its logarithm counts nothing, but whether it is 0 does: the largest tells.
    log2_mean = tl.where(mean == 0, largest, tl.log2(mean))
    for r in range(samples):
        log2_q = _log2_q(teacher_rows, sums_ptr, r, columns, vocab, arguments, WHOLE)
        information += device.relative(log2_q, log2_mean)
    sums, lost = state
    total, lost_total = device.add_exactly(sums[0], lost[0], total)
    marginal, lost_marginal = device.add_exactly(sums[1], lost[1], device.relative(log2_mean, log2_p))
    information, lost_information = device.add_exactly(sums[2], lost[2], information)
    return (total, marginal, information), (lost_total, lost_marginal, lost_information)


@jit(**layout.unspecialised("", "teacher_"))
def _information_kernel(
    student_ptr,  # (N, V) through sizes and strides
    teachers_ptr,  # (samples, N, V) through sample_stride, sizes and teacher_strides
    mask_ptr,  # (N,) or None
    temperatures_ptr,  # (N / span,) or None
    normalisers,  # log sums float64 and maxima, (samples + 1, N), the student's first; or None each
    sums_ptr,  # (N, samples, 2) float32
    results,  # those of row_information, (N,), 0 at first
    samples,
    sample_stride: tl.int64,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    teacher_stride0: tl.int64,
    teacher_stride1: tl.int64,
    teacher_stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            return
    scale = device.row_scale(device.row_temperature(row, temperature, temperatures_ptr, span))
    student_row = student_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    teacher_rows = teachers_ptr + device.row_offset(
        row, size1, size2, teacher_stride0, teacher_stride1, teacher_stride2, ALIGN
    )
    row_sums = sums_ptr + row * samples * 2
    sample_stride = sample_stride * ALIGN
    m, log_sum = _normaliser(student_row, vocab, scale, normalisers, row, DEPTH, LANES)
    invalid = device.invalid_unless_finite(log_sum)
    for r in range(samples):
        place = (r + 1) * tl.num_programs(0).to(tl.int64) + row
        teacher_row = teacher_rows + r * sample_stride
        teacher_m, teacher_log_sum = _normaliser(teacher_row, vocab, scale, normalisers, place, DEPTH, LANES)
        invalid += device.invalid_unless_finite(teacher_log_sum)
        tl.store(row_sums + 2 * r, teacher_m)
        tl.store(row_sums + 2 * r + 1, (teacher_log_sum * device.LOG2E).to(tl.float32))
    tl.debug_barrier()  # each thread reads what one has written
    student = (m, (log_sum * device.LOG2E).to(tl.float32))
    arguments = (samples, sample_stride, scale)
    lanes = tl.arange(0, LANES)
    zeros = tl.zeros((LANES,), tl.float32)
    state = ((zeros, zeros, zeros), (zeros, zeros, zeros))
    whole = vocab // LANES * LANES
    for start in range(0, whole, LANES):
        state = _fold_block(state, student_row, teacher_rows, row_sums, start + lanes, vocab, student, arguments, True)
    if whole < vocab:
        state = _fold_block(state, student_row, teacher_rows, row_sums, whole + lanes, vocab, student, arguments, False)
    sums, lost = state
    tl.store(results[0] + row, device.add_parts(sums[0], lost[0]) / samples + invalid)
    tl.store(results[1] + row, device.add_parts(sums[1], lost[1]) + invalid)
    tl.store(results[2] + row, device.add_parts(sums[2], lost[2]) / samples + invalid)


def _launch(student, teachers, mask, temperature, temperatures, normalisers, results) -> None:
    rows, samples = results[0].numel(), teachers.shape[0]
    align = layout.alignment(student, teachers)
    depth, lanes = layout.pair_tile(teachers)
    with layout.on_device(student):
        _information_kernel[(rows,)](
            student,
            teachers,
            mask,
            temperatures,
            normalisers,
            torch.empty((rows, samples, 2), dtype=torch.float32, device=student.device),
            results,
            samples,
            teachers.stride(0) // align,
            *layout.kernel_sizes(student),
            *layout.kernel_strides(student, align),
            *layout.kernel_strides(teachers[0], align),
            student.shape[-1],
            1 if temperatures is None else layout.span(temperatures, rows),
            temperature,
            DEPTH=depth,
            LANES=lanes,
            ALIGN=align,
            **layout.sweep_options(),
        )


@torch.library.custom_op("sdkernels::row_information", mutates_args=())
def row_information(
    student: Tensor,
    teachers: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    log_sums: Tensor | None = None,
    maxima: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """mean_r KL(q_r || p), KL(q || p) and mean_r KL(q_r || q), q the mean of the R distributions q_r, (...) float64.

    ``student`` (..., V) and ``teachers`` (R, ..., V) are what ``layout.as_rows`` returns. A row that, or one of whose
    teachers, holds NaN or +inf, or only -inf, is NaN; masked rows hold zeros.

    ``log_sums`` float64 and ``maxima`` in the arithmetic's dtype, both or none, contiguous, (R + 1, ...), the student's
    first, are the centred log sums and maxima of whole rows of which student and teachers are the same part: the
    results are then the part's sums, without the sweep for these two. A log sum that is not finite makes its row NaN.
    """
    layout.check_temperatures(temperatures, mask, student)
    if (log_sums is None) != (maxima is None):
        raise ValueError("log_sums and maxima are given both or none")
    arguments = (student, teachers, mask, temperature, temperatures)
    normalisers = (log_sums, maxima)
    by_triton = serves_both(runs_triton, student, teachers)
    if not (by_triton or serves_both(runs_csrc, student, teachers)):
        return reference.row_information(*arguments, *normalisers)
    outputs = _empty_results(student)
    if student.shape[:-1].numel() == 0:
        return outputs
    if by_triton:
        for each in outputs:
            each.zero_()  # masked rows are left as they are
        _launch(*arguments, normalisers, outputs)
    else:
        torch.ops.sdkernels_cpu.row_information(*arguments, *normalisers, *outputs)
    return outputs


def _empty_results(student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (torch.empty(student.shape[:-1], dtype=torch.float64, device=student.device) for _ in "123")
    return first, second, third


@row_information.register_fake
def _(student, *arguments):
    return _empty_results(student)
