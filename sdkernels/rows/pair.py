"""`sdkernels::pair_statistics`: the student's sums over V and, with q of the base, over the base's support S."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import rows as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl, triton
from sdkernels.rows.implementations import runs_csrc, runs_triton, serves_both
from sdkernels.rows.pair_gradient import LIST_LANES, pair_gradient


@jit
def _fold_support(state, z, base, scales):
    """Tiles of logits on S, of the student and, -inf outside S, of the base, into lanes of running sums.

    The lanes: the student's maximum m on S, the sums of 2^((z - m) scale) and of the same at T; the base's maximum and
    the sums of e = 2^y, of e y and of e (z - m), y the base's centred and scaled logit; the number of tokens.
    """
    m, s, tempered, base_m, base_s, base_t, cross, size = state
    scale, tempered_scale, base_scale = scales
    inside = base != float("-inf")
    on_support = tl.where(inside, z, float("-inf"))
    new_m = tl.maximum(m, tl.max(on_support, 0))
    centred = on_support - new_m[None, :]
    new_base_m = tl.maximum(base_m, tl.max(base, 0))
    y = (base - new_base_m[None, :]) * base_scale
    e = tl.exp2(y)
    shift = tl.maximum((base_m - new_base_m) * base_scale, device.FLOOR)
    factor = tl.exp2(shift)
    impossible = inside & (z == float("-inf"))  # the student excludes a token of S
    crossed = tl.where(impossible, float("-inf"), tl.where(e == 0, 0.0, e * centred))
    return (
        new_m,
        s * tl.exp2((m - new_m) * scale) + tl.sum(tl.exp2(centred * scale), 0),
        tempered * tl.exp2((m - new_m) * tempered_scale) + tl.sum(tl.exp2(centred * tempered_scale), 0),
        new_base_m,
        base_s * factor + tl.sum(e, 0),
        (base_t + shift * base_s) * factor + tl.sum(e * tl.maximum(y, device.FLOOR), 0),
        device.moved(cross, base_s, m - new_m, factor) + tl.sum(crossed, 0),
        size + tl.sum(inside.to(tl.int32), 0),
    )


@jit
def _no_support(LANES: tl.constexpr):
    lowest = tl.full((LANES,), device.LOWEST, tl.float32)
    zeros = tl.zeros((LANES,), tl.float32)
    return lowest, zeros, zeros, lowest, zeros, zeros, zeros, tl.zeros((LANES,), tl.int32)


@jit
def _add_support(state, scales):
    """The row's sums from its lanes'."""
    m, s, tempered, base_m, base_s, base_t, cross, size = state
    scale, tempered_scale, base_scale = scales
    row_m = tl.max(m, 0)
    row_base_m = tl.max(base_m, 0)
    shift = tl.maximum((base_m - row_base_m) * base_scale, device.FLOOR)
    factor = tl.exp2(shift)
    moved = device.moved(cross, base_s, m - row_m, factor)
    return (
        row_m,
        device.add_lanes(s * tl.exp2((m - row_m) * scale)),
        device.add_lanes(tempered * tl.exp2((m - row_m) * tempered_scale)),
        row_base_m,
        device.add_lanes(base_s * factor),
        device.add_lanes((base_t + shift * base_s) * factor),
        tl.sum(moved.to(tl.float64), 0),
        tl.sum(size, 0),
    )


@jit
def _fold_pair(state, z, base, columns, arguments):
    row, support = state
    threshold, scales = arguments
    row = device.fold_statistics(row, z, z, columns, scales[0])
    return row, _fold_support(support, z, tl.where(base < threshold, float("-inf"), base), scales)


@jit
def _sweep_pair(row_ptr, base_row, vocab, threshold, scales, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """One pass over both rows: the student's maximum and sum over V, and the sums on S = {b >= threshold}."""
    state = (device.no_statistics(LANES), _no_support(LANES))
    row, support = device.walk(row_ptr, base_row, vocab, state, (threshold, scales), _fold_pair, DEPTH, LANES)
    m, s, _ = device.add_statistics(row, scales[0])
    return m, s, _add_support(support, scales)


@jit
def _sweep_list(row_ptr, vocab, ids_ptr, log_probs_ptr, capacity, scales, LANES: tl.constexpr):
    """The sums on a listed S; of the student's row only the listed logits are read."""
    state = _no_support(LANES)
    lanes = tl.arange(0, LANES)[None, :]
    for start in range(0, capacity, LANES):
        ids = tl.load(ids_ptr + start + lanes, mask=start + lanes < capacity, other=-1)
        listed = ids >= 0
        log_q = tl.load(log_probs_ptr + start + lanes, mask=listed, other=float("-inf"))
        # An id outside the vocabulary is never read: it makes the row NaN.
        z = tl.load(row_ptr + ids, mask=listed & (ids < vocab), other=float("nan")).to(tl.float32)
        state = _fold_support(state, z, log_q, scales)
    return _add_support(state, scales)


@jit
def _store_statistics(row, m, s, sums, temperature, results):
    support_m, support_s, tempered, base_m, base_s, base_t, cross, size = sums
    lse_ptr, support_lse_ptr, tempered_lse_ptr, cross_ptr, negentropy_ptr = results[:5]
    size_ptr, log_sum_ptr, base_log_sum_ptr, max_ptr, support_max_ptr, base_max_ptr = results[5:]
    valid = (s > 0) & (size > 0) & (base_s == base_s) & (support_s == support_s)
    invalid = tl.where(valid, 0.0, float("nan"))
    log_sum = tl.log(s) + invalid
    base_log_sum = tl.log(base_s)
    tl.store(lse_ptr + row, (m.to(tl.float64) - support_m) + log_sum)
    tl.store(support_lse_ptr + row, tl.log(support_s) + invalid)
    tl.store(tempered_lse_ptr + row, temperature * tl.log(tempered) + invalid)
    tl.store(cross_ptr + row, cross / base_s + invalid)
    tl.store(negentropy_ptr + row, base_t / (base_s * device.LOG2E) - base_log_sum + invalid)
    tl.store(size_ptr + row, size.to(tl.int64))
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(base_log_sum_ptr + row, base_log_sum)
    tl.store(max_ptr + row, m)
    tl.store(support_max_ptr + row, support_m)
    tl.store(base_max_ptr + row, base_m)


@jit(**layout.unspecialised("", "base_"))
def _pair_statistics_kernel(
    student_ptr,  # (N, V) through sizes and strides
    base_ptr,  # (N, V) through sizes and base_strides, or None
    mask_ptr,  # (N,) or None
    temperatures_ptr,  # (N / span,) or None
    support,  # threshold and size (N,), token ids and log-probs (N, capacity); None for what is absent
    results,  # those of pair_statistics, (N,), 0 at first
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    base_stride0: tl.int64,
    base_stride1: tl.int64,
    base_stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    capacity,
    LIST_LANES: tl.constexpr,
    ROW_TILE: tl.constexpr,
    PAIR_TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    threshold_ptr, size_ptr, ids_ptr, log_probs_ptr = support
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            return
    row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
    scale = device.row_scale(tl.zeros((), tl.float64) + 1.0)
    tempered = device.row_scale(row_temperature)
    row_ptr = student_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    listed = ids_ptr is not None
    if size_ptr is not None:
        listed = tl.load(size_ptr + row) <= capacity
    if ids_ptr is not None:
        if listed:
            m, s, _ = device.sweep(row_ptr, vocab, scale, ROW_TILE[0], ROW_TILE[1])
            place = row * capacity
            sums = _sweep_list(
                row_ptr, vocab, ids_ptr + place, log_probs_ptr + place, capacity, (scale, tempered, scale), LIST_LANES
            )
            _store_statistics(row, m, s, sums, row_temperature, results)
    if base_ptr is not None:
        if listed == 0:
            threshold = tl.zeros((), tl.float32) + device.LOWEST
            if threshold_ptr is not None:
                threshold = tl.load(threshold_ptr + row)
            base_row = base_ptr + device.row_offset(row, size1, size2, base_stride0, base_stride1, base_stride2, ALIGN)
            scales = (scale, tempered, tempered)
            m, s, sums = _sweep_pair(row_ptr, base_row, vocab, threshold, scales, PAIR_TILE[0], PAIR_TILE[1])
            _store_statistics(row, m, s, sums, row_temperature, results)


def _launch(student, base, mask, temperature, temperatures, support, results) -> None:
    rows, vocab = results[0].numel(), student.shape[-1]
    align = layout.alignment(student) if base is None else layout.alignment(student, base)
    capacity = 0 if support[2] is None else support[2].shape[-1]
    depth, lanes = layout.tile(student)
    with layout.on_device(student):
        _pair_statistics_kernel[(rows,)](
            student,
            base,
            mask,
            temperatures,
            support,
            results,
            *layout.kernel_sizes(student),
            *layout.kernel_strides(student, align),
            *((0, 0, 0) if base is None else layout.kernel_strides(base, align)),
            vocab,
            1 if temperatures is None else layout.span(temperatures, rows),
            temperature,
            capacity,
            LIST_LANES=min(triton.next_power_of_2(max(capacity, 1)), LIST_LANES),
            ROW_TILE=(depth, lanes),
            PAIR_TILE=(1, lanes // 2),
            ALIGN=align,
            **layout.sweep_options(),
        )


@torch.library.custom_op("sdkernels::pair_statistics", mutates_args=())
def pair_statistics(
    student: Tensor,
    base: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    threshold: Tensor | None,
    size: Tensor | None,
    token_ids: Tensor | None,
    log_probs: Tensor | None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What SSD asks of the student's logits z and of q = softmax(b / T) on S, each (...).

    The differentiable four in float64: log sum_V exp z, log sum_S exp z, T log sum_S exp(z / T), sum_S q z, all less
    the maximum of z on S, which their differences do not see. Then sum_S q log q, float64; |S|, int64; and for the
    gradient the log sums of z over V and of b, centred, float64, and the maxima of z over V and S and of b.

    ``student`` and ``base`` (..., V) are what ``layout.as_rows`` returns. S and q come from ``token_ids`` and
    ``log_probs`` (..., C), -1 for none, in rows whose ``size`` is at most C; there the base is not read and may be
    None. In other rows S is {b >= threshold}; without lists and thresholds it is {b > -inf}.
    ``inplace`` is for backward: it lets the gradient take the student's memory.
    """
    layout.check_temperatures(temperatures, mask, student)
    arguments = (student, base, mask, temperature, temperatures, threshold, size, token_ids, log_probs)
    by_triton = serves_both(runs_triton, student, base)
    if not (by_triton or serves_both(runs_csrc, student, base)):
        return reference.pair_statistics(*arguments)
    outputs = _empty_statistics(student, base)
    if student.shape[:-1].numel() == 0:
        return outputs
    if by_triton:
        outputs = tuple(x.zero_() for x in outputs)  # masked rows are left as they are
        support = (threshold, size, token_ids, log_probs)
        _launch(student, base, mask, temperature, temperatures, support, outputs)
    else:
        torch.ops.sdkernels_cpu.pair_statistics(*arguments, *outputs)
    return outputs


def _empty_statistics(student: Tensor, base: Tensor | None) -> tuple[Tensor, ...]:
    sides = (student, student if base is None else base)
    dtype, base_dtype = (torch.promote_types(x.dtype, torch.float32) for x in sides)
    dtypes = (*(torch.float64,) * 5, torch.int64, *(torch.float64,) * 2, dtype, dtype, base_dtype)
    return tuple(torch.empty(student.shape[:-1], dtype=each, device=student.device) for each in dtypes)


@pair_statistics.register_fake
def _(student, base, *arguments):
    return _empty_statistics(student, base)


def _setup_context(ctx, inputs, output) -> None:
    student, base, mask, ctx.temperature, *tensors, ctx.inplace = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(mask, student, base, *tensors, *output)


def _backward(ctx, *upstream):
    mask, student, base, *tensors = ctx.saved_tensors
    zeros = torch.zeros(student.shape[:-1], dtype=torch.float64, device=student.device)
    upstream = [zeros if x is None else x.double().contiguous() for x in upstream[:4]]
    if mask is not None:
        upstream = [torch.where(mask, x, 0) for x in upstream]
    grad = pair_gradient(student, base, ctx.temperature, *tensors, *upstream, inplace=ctx.inplace)
    return grad, *(None,) * 9


pair_statistics.register_autograd(_backward, setup_context=_setup_context)
