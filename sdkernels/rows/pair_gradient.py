"""`sdkernels::pair_gradient`: the student's gradient from the four coefficients of a pair of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import rows as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl, triton
from sdkernels.rows.implementations import runs_csrc, runs_triton, serves_both
from sdkernels.rows.inplace import gradient_operators

LIST_LANES = 256  # entries of a list at a time, at most


@jit
def _gradient_on_support(z, log2_q, coefficients):
    """The gradient at tokens of S, from their logits and log2 q."""
    _, support_m, scale, tempered, _, support_log2_sum, tempered_log2_sum, _, on_support, on_tempered, on_q = (
        coefficients
    )
    centred = z - support_m
    g = on_support * tl.exp2(centred * scale - support_log2_sum)
    g += on_tempered * tl.exp2(centred * tempered - tempered_log2_sum)
    return g + on_q * tl.exp2(log2_q)


@jit
def _gradient_on_row(z, coefficients):
    """The gradient through the sum over V."""
    m, _, scale, _, log2_sum, _, _, on_row, _, _, _ = coefficients
    return on_row * tl.exp2((z - m) * scale - log2_sum)


@jit
def _coefficients(row, statistics, upstream, temperature):
    """Whether any gradient flows; maxima, scales, log2 sums and upstream gradients of a row, float32."""
    _, support_lse_ptr, tempered_lse_ptr, _, _, _, log_sum_ptr, _, max_ptr, support_max_ptr, _ = statistics
    m = tl.load(max_ptr + row)
    support_m = tl.load(support_max_ptr + row)
    on_row = tl.load(upstream[0] + row)
    on_support = tl.load(upstream[1] + row)
    on_tempered = tl.load(upstream[2] + row)
    on_q = tl.load(upstream[3] + row)
    # Where no gradient flows a distribution may not even exist: then 0 must not meet its NaN.
    support_log_sum = tl.where(on_support == 0, 0.0, tl.load(support_lse_ptr + row))
    tempered_log_sum = tl.where(on_tempered == 0, 0.0, tl.load(tempered_lse_ptr + row) / temperature)
    log_sum = tl.load(log_sum_ptr + row)
    flows = (on_row != 0) | (on_support != 0) | (on_tempered != 0) | (on_q != 0)
    flows = flows | (log_sum != log_sum)  # a row without a distribution is NaN
    return flows, (
        m,
        support_m,
        device.row_scale(tl.zeros((), tl.float64) + 1.0),
        device.row_scale(temperature),
        (log_sum * device.LOG2E).to(tl.float32),
        (support_log_sum * device.LOG2E).to(tl.float32),
        (tempered_log_sum * device.LOG2E).to(tl.float32),
        on_row.to(tl.float32),
        on_support.to(tl.float32),
        on_tempered.to(tl.float32),
        on_q.to(tl.float32),
    )


@jit
def _write_block(row_ptr, base_row, grad_row, columns, vocab, base, flows, coefficients, WHOLE: tl.constexpr):
    """The gradient of a block: through the row, and in rows that are not listed through S."""
    threshold, base_m, base_scale, base_log2_sum, dense = base
    g = tl.zeros((columns.shape[0],), tl.float32)
    if flows:
        z = device.load_block(row_ptr, columns, vocab, WHOLE)
        g = _gradient_on_row(z, coefficients)
        if base_row is not None:
            if dense != 0:
                b = device.load_block(base_row, columns, vocab, WHOLE)
                log2_q = (b - base_m) * base_scale - base_log2_sum
                g += tl.where(b < threshold, 0.0, _gradient_on_support(z, log2_q, coefficients))
    device.store_block(grad_row, columns, vocab, g, WHOLE)


@jit(**layout.unspecialised("", "base_", "grad_"))
def _pair_gradient_kernel(
    student_ptr,  # (N, V) through sizes and strides
    base_ptr,  # (N, V) through sizes and base_strides, or None
    grad_ptr,  # (N, V) through sizes and grad_strides; may be student_ptr
    temperatures_ptr,  # (N / span,) or None
    support,  # threshold and size (N,), token ids, log-probs and, in place, logits (N, capacity); or None
    statistics,  # the results of pair_statistics, (N,)
    upstream,  # of the first four of them, (N,) float64
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    base_stride0: tl.int64,
    base_stride1: tl.int64,
    base_stride2: tl.int64,
    grad_stride0: tl.int64,
    grad_stride1: tl.int64,
    grad_stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    capacity,
    LIST_LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    threshold_ptr, size_ptr, ids_ptr, log_probs_ptr, listed_ptr = support
    row, start, columns = device.program_block(vocab, BLOCK)
    row_ptr = student_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    grad_row = grad_ptr + device.row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2, ALIGN)
    row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
    flows, coefficients = _coefficients(row, statistics, upstream, row_temperature)
    dense = 0
    base_row = None
    threshold = tl.zeros((), tl.float32) + device.LOWEST
    if base_ptr is not None:
        base_row = base_ptr + device.row_offset(row, size1, size2, base_stride0, base_stride1, base_stride2, ALIGN)
        dense = 1
        if size_ptr is not None:
            dense = (tl.load(size_ptr + row) > capacity).to(tl.int32)
            threshold = tl.load(threshold_ptr + row)
    base_log2_sum = (tl.load(statistics[7] + row) * device.LOG2E).to(tl.float32)
    base = (threshold, tl.load(statistics[10] + row), device.row_scale(row_temperature), base_log2_sum, dense)
    if start + BLOCK <= vocab:
        _write_block(row_ptr, base_row, grad_row, columns, vocab, base, flows, coefficients, True)
    else:
        _write_block(row_ptr, base_row, grad_row, columns, vocab, base, flows, coefficients, False)
    if ids_ptr is not None:
        if (dense == 0) & flows:
            tl.debug_barrier()  # the block is written: the listed tokens get theirs on top
            lanes = tl.arange(0, LIST_LANES)
            for first in range(0, capacity, LIST_LANES):
                place = row.to(tl.int64) * capacity + first + lanes
                ids = tl.load(ids_ptr + place, mask=first + lanes < capacity, other=-1)
                here = (ids >= start) & (ids < start + BLOCK) & (ids < vocab)
                log2_q = tl.load(log_probs_ptr + place, mask=here, other=float("-inf")) * device.LOG2E
                source = row_ptr + ids if listed_ptr is None else listed_ptr + place
                z = tl.load(source, mask=here, other=0.0).to(tl.float32)
                here = here & (log2_q != float("-inf"))
                g = _gradient_on_row(z, coefficients) + _gradient_on_support(z, log2_q, coefficients)
                tl.store(grad_row + ids, g.to(grad_ptr.dtype.element_ty), mask=here)


def _launch(student, base, temperature, temperatures, support, statistics, upstream, grad) -> None:
    rows, vocab = statistics[0].numel(), student.shape[-1]
    align = layout.alignment(student, grad) if base is None else layout.alignment(student, grad, base)
    ids, capacity, listed = support[2], 0, None
    if ids is not None:
        capacity = ids.shape[-1]
        if grad is student:  # its gradient is written over what the list reads
            listed = student.gather(-1, ids.clamp(0, vocab - 1).long())
    options = layout.block_options(student)
    with layout.on_device(student):
        _pair_gradient_kernel[(rows * -(-vocab // options["BLOCK"]),)](
            student,
            base,
            grad,
            temperatures,
            (*support, listed),
            statistics,
            upstream,
            *layout.kernel_sizes(student),
            *layout.kernel_strides(student, align),
            *((0, 0, 0) if base is None else layout.kernel_strides(base, align)),
            *layout.kernel_strides(grad, align),
            vocab,
            1 if temperatures is None else layout.span(temperatures, rows),
            temperature,
            capacity,
            LIST_LANES=min(triton.next_power_of_2(max(capacity, 1)), LIST_LANES),
            ALIGN=align,
            **options,
        )


@gradient_operators
def pair_gradient(
    grad: Tensor,
    student: Tensor,
    base: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    threshold: Tensor | None,
    size: Tensor | None,
    token_ids: Tensor | None,
    log_probs: Tensor | None,
    lse: Tensor,
    support_lse: Tensor,
    tempered_lse: Tensor,
    cross: Tensor,
    negentropy: Tensor,
    support_size: Tensor,
    log_sum: Tensor,
    base_log_sum: Tensor,
    max: Tensor,
    support_max: Tensor,
    base_max: Tensor,
    on_lse: Tensor,
    on_support_lse: Tensor,
    on_tempered_lse: Tensor,
    on_cross: Tensor,
) -> None:
    """The student's gradient, (..., V) in its dtype: on_lse p + on_support_lse p_S + on_tempered_lse p_ST + on_cross q.

    The arguments are ``pair_statistics``', then its results, then the upstream gradients of the first four, float64.
    Each row is formed in float32 and rounded once; a row whose four coefficients are 0 is not read.
    """
    statistics = (
        lse,
        support_lse,
        tempered_lse,
        cross,
        negentropy,
        support_size,
        log_sum,
        base_log_sum,
        max,
        support_max,
        base_max,
    )
    upstream = (on_lse, on_support_lse, on_tempered_lse, on_cross)
    support = (threshold, size, token_ids, log_probs)
    arguments = (student, base, temperature, temperatures)
    if serves_both(runs_triton, student, base):
        _launch(*arguments, support, statistics, upstream, grad)
    elif serves_both(runs_csrc, student, base):
        torch.ops.sdkernels_cpu.pair_gradient(*arguments, *support, *statistics, *upstream, grad)
    else:
        grad.copy_(reference.pair_gradient(*arguments, *support, statistics, upstream))
