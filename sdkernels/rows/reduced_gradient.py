"""`sdkernels::reduced_gradient`: the gradient of a row's logits from that of the row reduced to k tokens and a tail."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import divergences as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl, triton
from sdkernels.rows.implementations import runs_csrc, runs_triton
from sdkernels.rows.inplace import gradient_operators

LIST_LANES = 256  # entries of a list at a time, at most


@jit
def _write_block(row_ptr, grad_row, columns, vocab, m, log2_sum, scale, on_tail, WHOLE: tl.constexpr):
    """The tail's gradient of a block: of each token, its share of it."""
    share = tl.exp2((device.load_block(row_ptr, columns, vocab, WHOLE) - m) * scale - log2_sum)
    device.store_block(grad_row, columns, vocab, on_tail * share, WHOLE)


@jit(**layout.unspecialised("", "grad_"))
def _reduced_gradient_kernel(
    student_ptr,  # (N, V) through sizes and strides
    grad_ptr,  # (N, V) through sizes and grad_strides; may be student_ptr
    temperatures_ptr,  # (N / span,) or None
    ids_ptr,  # (N, capacity)
    tail,  # the tail's maximum (N,) and log sum (N,) float64
    upstream_ptr,  # (N, capacity + 1)
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
    capacity,
    LIST_LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row, start, columns = device.program_block(vocab, BLOCK)
    row_ptr = student_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    grad_row = grad_ptr + device.row_offset(row, size1, size2, grad_stride0, grad_stride1, grad_stride2, ALIGN)
    row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
    entries = upstream_ptr + row.to(tl.int64) * (capacity + 1)
    first = tl.load(entries)  # NaN in every entry of a row whose gradient is NaN, and so in this one
    on_tail = tl.load(entries + capacity) + (first - first)
    log_sum = tl.load(tail[1] + row)
    if (on_tail == 0) | ((log_sum == float("-inf")) & (on_tail == on_tail)):
        device.fill_block(grad_row, start, columns, vocab, 0.0)
    else:
        m = tl.load(tail[0] + row)
        on_tail = (on_tail / row_temperature).to(tl.float32)
        log2_sum = (log_sum * device.LOG2E).to(tl.float32)
        scale = device.row_scale(row_temperature)
        if start + BLOCK <= vocab:
            _write_block(row_ptr, grad_row, columns, vocab, m, log2_sum, scale, on_tail, True)
        else:
            _write_block(row_ptr, grad_row, columns, vocab, m, log2_sum, scale, on_tail, False)
    lanes = tl.arange(0, LIST_LANES)
    for first in range(0, capacity, LIST_LANES):
        places = first + lanes
        ids = tl.load(ids_ptr + row.to(tl.int64) * capacity + places, mask=places < capacity, other=-1)
        values = tl.load(entries + places, mask=ids >= 0, other=0.0) / row_temperature
        device.scatter(values.to(tl.float32), ids, grad_row, start, BLOCK)


def _launch(student, token_ids, temperature, temperatures, tail, upstream, grad) -> None:
    rows, vocab = tail[0].numel(), student.shape[-1]
    align = layout.alignment(student, grad)
    options = layout.block_options(student)
    capacity = token_ids.shape[-1]
    with layout.on_device(student):
        _reduced_gradient_kernel[(rows * -(-vocab // options["BLOCK"]),)](
            student,
            grad,
            temperatures,
            token_ids,
            tail,
            upstream,
            *layout.kernel_sizes(student),
            *layout.kernel_strides(student, align),
            *layout.kernel_strides(grad, align),
            vocab,
            1 if temperatures is None else layout.span(temperatures, rows),
            temperature,
            capacity,
            LIST_LANES=min(triton.next_power_of_2(capacity), LIST_LANES),
            ALIGN=align,
            **options,
        )


@gradient_operators
def reduced_gradient(
    grad: Tensor,
    student: Tensor,
    token_ids: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    tail_max: Tensor,
    tail_log_sum: Tensor,
    upstream: Tensor,
) -> None:
    """The gradient of the student's logits, (..., V) in its dtype, from that of its reduced row, (..., k + 1).

    A listed token gets its entry's over T, each other the tail's over T times its share of the tail, of which a tail of
    nothing has none. A row whose tail gets no gradient is not read; one whose first entry gets NaN is NaN. Of rows that
    are a part of whole ones the tail's statistics are the whole tail's; an id of -1 has no token here, whatever its
    entry gets.
    """
    arguments = (student, token_ids, temperature, temperatures)
    tail = (tail_max, tail_log_sum)
    if runs_triton(student):
        _launch(*arguments, tail, upstream, grad)
    elif runs_csrc(student):
        torch.ops.sdkernels_cpu.reduced_gradient(*arguments, *tail, upstream, grad)
    else:
        grad.copy_(reference.reduced_gradient(*arguments, *tail, upstream))
