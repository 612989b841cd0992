"""`sdkernels::row_divergence`: a KL of two rows in one sweep over both; the JSD, or with clipped entries, in two.

Of rows that are parts of others whose normalisers are known, any divergence takes one sweep.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdkernels.reference import divergences as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl
from sdkernels.rows.divergence_gradient import divergence_gradient
from sdkernels.rows.implementations import runs_csrc, runs_triton, serves_both


@jit
def _fold(state, z, other, columns, scale):
    """Tiles of logits of a row and of another one into lanes of running sums.

    The lanes: the row's maximum m, the sums of e = 2^y and of e (x' - x), x the centred logit, y the same scaled and x'
    the other row's; the other row's maximum and the sum of 2^y'; the row's largest logit where the other's is -inf.
    """
    m, s, cross, other_m, other_s, excluded = state
    new_m = tl.maximum(m, tl.max(z, 0))
    new_other_m = tl.maximum(other_m, tl.max(other, 0))
    x, other_x = z - new_m[None, :], other - new_other_m[None, :]
    e = tl.exp2(x * scale)
    gap = tl.maximum(other_x, device.LOWEST) - tl.maximum(x, device.LOWEST)  # finite, so that e = 0 takes it out
    m, s, cross, other_m, other_s = _centred((m, s, cross, other_m, other_s), new_m, new_other_m, scale)
    excluded = tl.maximum(excluded, tl.max(tl.where(other == float("-inf"), z, float("-inf")), 0))
    other_s += tl.sum(tl.exp2(other_x * scale), 0)
    return m, s + tl.sum(e, 0), cross + tl.sum(e * gap, 0), other_m, other_s, excluded


@jit
def _centred(state, new_m, new_other_m, scale):
    """The sums relative to new maxima."""
    m, s, cross, other_m, other_s = state
    shift, other_shift = m - new_m, other_m - new_other_m
    factor = tl.exp2(tl.maximum(shift * scale, device.FLOOR))
    cross = device.moved(cross, s, other_shift - shift, factor)
    return new_m, s * factor, cross, new_other_m, other_s * tl.exp2(tl.maximum(other_shift * scale, device.FLOOR))


@jit
def _sweep_kl(row_ptr, other_row, vocab, temperature, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """One pass over both rows: their maxima m and sums s, and the KL of the first from the other."""
    scale = device.row_scale(temperature)
    lowest = tl.full((LANES,), device.LOWEST, tl.float32)
    zeros = tl.zeros((LANES,), tl.float32)
    state = (lowest, zeros, zeros, lowest, zeros, zeros + float("-inf"))
    m, s, cross, other_m, other_s, excluded = device.walk(row_ptr, other_row, vocab, state, scale, _fold, DEPTH, LANES)
    row_m, row_other_m = tl.max(m, 0), tl.max(other_m, 0)
    m, s, cross, other_m, other_s = _centred((m, s, cross, other_m, other_s), row_m, row_other_m, scale)
    s, other_s = device.add_lanes(s), device.add_lanes(other_s)
    kl = tl.log(other_s) - tl.log(s) - tl.sum(cross.to(tl.float64), 0) / (s * temperature)
    return m, s, other_m, other_s, tl.where(tl.max(excluded, 0) > float("-inf"), float("inf"), kl)


@jit
def _fold_entries(state, z, other, arguments, DIVERGENCE: tl.constexpr):
    """Tiles of student and teacher logits into lanes of the sums of clipped entries and of their slopes."""
    values, lost_values, slopes, lost_slopes = state
    student, teacher, scale, beta, clip = arguments
    value, slope, _ = device.divergence_entry(z, other, student, teacher, scale, beta, DIVERGENCE)
    clipped = value > clip
    values, lost_values = device.add_exactly(values, lost_values, tl.sum(tl.where(clipped, clip, value), 0))
    slopes, lost_slopes = device.add_exactly(slopes, lost_slopes, tl.sum(tl.where(clipped, 0.0, slope), 0))
    return values, lost_values, slopes, lost_slopes


@jit
def _fold_forward_kl(state, z, other, columns, arguments):
    return _fold_entries(state, z, other, arguments, "forward_kl")


@jit
def _fold_reverse_kl(state, z, other, columns, arguments):
    return _fold_entries(state, z, other, arguments, "reverse_kl")


@jit
def _fold_jsd(state, z, other, columns, arguments):
    return _fold_entries(state, z, other, arguments, "jsd")


@jit
def _sweep_entries(student_row, teacher_row, vocab, arguments, DIVERGENCE: tl.constexpr, DEPTH: tl.constexpr,
                   LANES: tl.constexpr):  # fmt: skip
    """One pass over both rows, whose maxima and log sums are known: sum l and sum dl / dlog P_S."""
    zeros = tl.zeros((LANES,), tl.float32)
    state = (zeros, zeros, zeros, zeros)
    if DIVERGENCE == "forward_kl":
        state = device.walk(student_row, teacher_row, vocab, state, arguments, _fold_forward_kl, DEPTH, LANES)
    elif DIVERGENCE == "reverse_kl":
        state = device.walk(student_row, teacher_row, vocab, state, arguments, _fold_reverse_kl, DEPTH, LANES)
    else:
        state = device.walk(student_row, teacher_row, vocab, state, arguments, _fold_jsd, DEPTH, LANES)
    return device.add_parts(state[0], state[1]), device.add_parts(state[2], state[3])


@jit(**layout.unspecialised("", "teacher_"))
def _divergence_kernel(
    student_ptr,  # (N, V) through sizes and strides
    teacher_ptr,  # (N, V) through sizes and teacher_strides
    mask_ptr,  # (N,) or None
    temperatures_ptr,  # (N / span,) or None
    normalisers,  # log sums of student and teacher (N,) float64, and their maxima (N,); or None each
    results,  # those of row_divergence, (N,), 0 at first
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
    beta: tl.float64,
    clip,
    DIVERGENCE: tl.constexpr,
    CLIPPED: tl.constexpr,
    DEPTH: tl.constexpr,
    ENTRY_DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            return
    row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
    scale = device.row_scale(row_temperature)
    student_row = student_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    teacher_row = teacher_ptr + device.row_offset(
        row, size1, size2, teacher_stride0, teacher_stride1, teacher_stride2, ALIGN
    )
    KNOWN: tl.constexpr = normalisers[0] is not None
    if KNOWN:
        log_sum, teacher_log_sum = tl.load(normalisers[0] + row), tl.load(normalisers[1] + row)
        m, teacher_m = tl.load(normalisers[2] + row), tl.load(normalisers[3] + row)
    elif CLIPPED or DIVERGENCE == "jsd":
        state = (device.no_statistics(LANES), device.no_statistics(LANES))
        state = device.walk(student_row, teacher_row, vocab, state, scale, device.fold_both, DEPTH, LANES)
        m, s, teacher_m, teacher_s = device.add_both(state, scale)
        log_sum, teacher_log_sum = tl.log(s), tl.log(teacher_s)
    elif DIVERGENCE == "forward_kl":
        teacher_m, teacher_s, m, s, value = _sweep_kl(teacher_row, student_row, vocab, row_temperature, DEPTH, LANES)
        log_sum, teacher_log_sum = tl.log(s), tl.log(teacher_s)
        slope = tl.zeros((), tl.float64) - 1
    else:
        m, s, teacher_m, teacher_s, value = _sweep_kl(student_row, teacher_row, vocab, row_temperature, DEPTH, LANES)
        log_sum, teacher_log_sum = tl.log(s), tl.log(teacher_s)
        slope = value + 1
    if KNOWN or CLIPPED or DIVERGENCE == "jsd":
        student = (m, (log_sum * device.LOG2E).to(tl.float32))
        teacher = (teacher_m, (teacher_log_sum * device.LOG2E).to(tl.float32))
        arguments = (student, teacher, scale, device.shares(beta), clip)
        value, slope = _sweep_entries(student_row, teacher_row, vocab, arguments, DIVERGENCE, ENTRY_DEPTH, LANES)
    slope = tl.where(slope == float("inf"), float("nan"), slope)
    invalid = device.invalid_unless_finite(log_sum + teacher_log_sum)
    tl.store(results[0] + row, value + invalid)
    tl.store(results[1] + row, slope + invalid)
    tl.store(results[2] + row, log_sum)
    tl.store(results[3] + row, teacher_log_sum)
    tl.store(results[4] + row, m)
    tl.store(results[5] + row, teacher_m)


def _launch(student, teacher, mask, temperature, temperatures, divergence, beta, token_clip, normalisers,
            results) -> None:  # fmt: skip
    rows = results[0].numel()
    align = layout.alignment(student, teacher)
    clipped = not math.isinf(token_clip)
    depth, lanes = layout.pair_tile(student)
    with layout.on_device(student):
        _divergence_kernel[(rows,)](
            student,
            teacher,
            mask,
            temperatures,
            normalisers,
            results,
            *layout.kernel_sizes(student),
            *layout.kernel_strides(student, align),
            *layout.kernel_strides(teacher, align),
            student.shape[-1],
            1 if temperatures is None else layout.span(temperatures, rows),
            temperature,
            beta,
            token_clip,
            DIVERGENCE=divergence,
            CLIPPED=clipped,
            DEPTH=depth,
            # conditions take two scalar registers each on AMD
            ENTRY_DEPTH=min(depth, 2 if divergence == "jsd" and not clipped else 1),
            LANES=lanes,
            ALIGN=align,
            **layout.sweep_options(),
        )


@torch.library.custom_op("sdkernels::row_divergence", mutates_args=())
def row_divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    divergence: str,
    beta: float,
    token_clip: float,
    log_sum: Tensor | None = None,
    teacher_log_sum: Tensor | None = None,
    max: Tensor | None = None,
    teacher_max: Tensor | None = None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """D = sum_v min(l_v, token_clip) of the rows' softmax at T, each (...), and what its gradient needs.

    That is the slope G = sum_v g_v with g_v = dl_v / dlog P_S, 0 where l_v is clipped: the logits' gradient is then
    (g - G P_S) / T. G is NaN where the reverse KL is +inf. And the centred log sums of student and teacher, all float64
    so far, and their maxima. A log sum is -inf where all logits of its row are -inf, where the maximum is at most the
    lowest float, and NaN where one is NaN or +inf; D and G are NaN where either log sum is not finite.

    The last four results may be given, all or none, contiguous: those of whole rows of which ``student`` and
    ``teacher`` are the same part. Then D and G are the part's sums, in one sweep, and the four are returned, and are
    constants to D's gradient: that of the whole row's D is ``divergence_gradient``'s, with the sum of the parts' G.

    ``student`` and ``teacher`` (..., V) are what ``layout.as_rows`` returns; ``token_clip`` is inf for none.
    Masked rows hold zeros. ``inplace`` is for backward: it lets the gradient take the student's memory.
    """
    layout.check_temperatures(temperatures, mask, student)
    arguments = (student, teacher, mask, temperature, temperatures, divergence, beta, token_clip)
    given = (log_sum, teacher_log_sum, max, teacher_max)
    if len({x is None for x in given}) > 1:
        raise ValueError("log_sum, teacher_log_sum, max and teacher_max are given all or none")
    by_triton = serves_both(runs_triton, student, teacher)
    if not (by_triton or serves_both(runs_csrc, student, teacher)):
        return reference.row_divergence(*arguments, None if log_sum is None else given)
    outputs = _empty_results(student, teacher)
    if student.shape[:-1].numel() == 0:
        return outputs
    if by_triton:
        for each in outputs:
            each.zero_()  # masked rows are left as they are
        _launch(*arguments, given, outputs)
    else:
        torch.ops.sdkernels_cpu.row_divergence(*arguments, *given, *outputs)
    return outputs


def _empty_results(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    dtypes = (*(torch.float64,) * 4, *(torch.promote_types(x.dtype, torch.float32) for x in (student, teacher)))
    return tuple(torch.empty(student.shape[:-1], dtype=each, device=student.device) for each in dtypes)


@row_divergence.register_fake
def _(student, teacher, *arguments):
    return _empty_results(student, teacher)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, mask, ctx.temperature, temperatures, *options, ctx.inplace = inputs
    ctx.options, ctx.known = options[:3], options[3] is not None
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(student, teacher, mask, temperatures, *output[1:])


def _backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 13
    student, teacher, mask, temperatures, slope, *statistics = ctx.saved_tensors
    if ctx.known:
        slope = 0 * slope  # the normalisers are constants; NaN stays
    upstream = upstream.double().contiguous()
    if mask is not None:
        upstream = torch.where(mask, upstream, 0)
    arguments = (student, teacher, ctx.temperature, temperatures, *ctx.options)
    grad = divergence_gradient(*arguments, slope, *statistics, upstream, inplace=ctx.inplace)
    return grad, *(None,) * 12


row_divergence.register_autograd(_backward, setup_context=_setup_context)
