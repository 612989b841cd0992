"""`sdkernels::reduced_rows`: rows reduced to k listed tokens and a tail, themselves rows of k + 1 logits."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import divergences as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl, triton
from sdkernels.rows.implementations import runs_csrc, runs_triton, serves_both
from sdkernels.rows.reduced_gradient import LIST_LANES, reduced_gradient
from sdkernels.rows.support import row_support


def top_ids(rows: Tensor, mask: Tensor, count: int) -> Tensor:
    """The ids (..., count) int32 of the largest logits of each row, ties by id, -inf after all others.

    Rows that hold NaN or +inf, and masked ones, hold places of -1.
    """
    found = row_support(rows, mask, 1.0, None, 0, 1.0, 0.0, count, True)
    ids, size = found[5], found[1].unsqueeze(-1)
    # A row with fewer finite logits than places has enough of -inf among its first `count` columns.
    excluded = (rows[..., :count] == -torch.inf) & (size > 0)
    places = (size + excluded.cumsum(-1) - 1).where(excluded, count).clamp(max=count)
    columns = torch.arange(count, dtype=ids.dtype, device=ids.device).expand(ids.shape)
    return torch.nn.functional.pad(ids, (0, 1)).scatter(-1, places, columns)[..., :count].contiguous()


@jit
def _fold_others(state, z, other, columns, arguments):
    """Tiles of logits into lanes of the maxima and sums of both rows over the tokens that are not listed.

    Listed are those above the last one's logit, and its equals up to its id; none where there is no last one.
    """
    last, last_id, scale = arguments
    listed = (z > last) | ((z == last) & (columns <= last_id))
    rest, other_rest = tl.where(listed, float("-inf"), z), tl.where(listed, float("-inf"), other)
    return device.fold_both(state, rest, other_rest, columns, scale)


@jit
def _sweep_others(chooser_row, other_row, vocab, arguments, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """One pass over both rows: of either the maximum and the sum over the tokens that are not listed."""
    state = (device.no_statistics(LANES), device.no_statistics(LANES))
    state = device.walk(chooser_row, other_row, vocab, state, arguments, _fold_others, DEPTH, LANES)
    return device.add_both(state, arguments[2])


@jit
def _write_row(row_ptr, ids_ptr, reduced_ptr, vocab, capacity, m, s, temperature, LIST_LANES: tl.constexpr):
    """A reduced row, from the maximum m and the sum s of its tail; NaN all over where s is."""
    lanes = tl.arange(0, LIST_LANES)
    top = m
    for start in range(0, capacity, LIST_LANES):
        ids = tl.load(ids_ptr + start + lanes, mask=start + lanes < capacity, other=-1)
        z = tl.load(row_ptr + ids, mask=(ids >= 0) & (ids < vocab), other=float("-inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(z, 0))
    invalid = tl.where(s == s, 0.0, float("nan"))
    for start in range(0, capacity, LIST_LANES):
        ids = tl.load(ids_ptr + start + lanes, mask=start + lanes < capacity, other=-1)
        z = tl.load(row_ptr + ids, mask=(ids >= 0) & (ids < vocab), other=float("nan")).to(tl.float32)
        values = ((z.to(tl.float64) - top) / temperature + invalid).to(tl.float32)
        tl.store(reduced_ptr + start + lanes, values, mask=start + lanes < capacity)
    tail = (m.to(tl.float64) - top) / temperature + tl.log(s)
    tl.store(reduced_ptr + capacity, tail.to(tl.float32))


@jit(**layout.unspecialised("", "other_"))
def _reduced_kernel(
    chooser_ptr,  # (N, V) through sizes and strides
    other_ptr,  # (N, V) through sizes and other_strides
    mask_ptr,  # (N,) or None
    temperatures_ptr,  # (N / span,) or None
    ids_ptr,  # (N, capacity)
    reduced,  # of either, (N, capacity + 1), 0 at first
    tails,  # of either the maximum (N,) and the log sum (N,) float64 of its tail, 0 at first
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    other_stride0: tl.int64,
    other_stride1: tl.int64,
    other_stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    capacity,
    TAIL: tl.constexpr,
    LIST_LANES: tl.constexpr,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            return
    row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
    chooser_row = chooser_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    other_row = other_ptr + device.row_offset(row, size1, size2, other_stride0, other_stride1, other_stride2, ALIGN)
    list_ptr = ids_ptr + row * capacity
    scale = device.row_scale(row_temperature)
    if TAIL:
        last_id = tl.load(list_ptr + capacity - 1)
        exists = (last_id >= 0) & (last_id < vocab)  # else every token is in the tail: what made the row bad shows
        last = tl.load(chooser_row + last_id, mask=exists, other=float("inf")).to(tl.float32)
        m, s, other_m, other_s = _sweep_others(chooser_row, other_row, vocab, (last, last_id, scale), DEPTH, LANES)
    else:
        _, found, _ = device.sweep(other_row, vocab, scale, DEPTH, LANES)  # the chooser's ids say if it is bad
        m, s = tl.zeros((), tl.float32) + device.LOWEST, tl.zeros((), tl.float64)
        other_m, other_s = m, found - found
    place = row * (capacity + 1)
    _write_row(chooser_row, list_ptr, reduced[0] + place, vocab, capacity, m, s, row_temperature, LIST_LANES)
    _write_row(other_row, list_ptr, reduced[1] + place, vocab, capacity, other_m, other_s, row_temperature, LIST_LANES)
    tl.store(tails[0] + row, m)
    tl.store(tails[1] + row, tl.log(s))
    tl.store(tails[2] + row, other_m)
    tl.store(tails[3] + row, tl.log(other_s))


def _launch(student, teacher, token_ids, by_teacher, tail, mask, temperature, temperatures, outputs) -> None:
    chooser, other, reduced, tails = student, teacher, outputs[:2], outputs[2:]
    if by_teacher:
        chooser, other, reduced, tails = teacher, student, outputs[1::-1], (*outputs[4:], *outputs[2:4])
    rows, capacity = tails[0].numel(), token_ids.shape[-1]
    align = layout.alignment(chooser, other)
    depth, lanes = layout.pair_tile(chooser)
    with layout.on_device(student):
        _reduced_kernel[(rows,)](
            chooser,
            other,
            mask,
            temperatures,
            token_ids,
            reduced,
            tails,
            *layout.kernel_sizes(chooser),
            *layout.kernel_strides(chooser, align),
            *layout.kernel_strides(other, align),
            chooser.shape[-1],
            1 if temperatures is None else layout.span(temperatures, rows),
            temperature,
            capacity,
            TAIL=tail,
            LIST_LANES=min(triton.next_power_of_2(capacity), LIST_LANES),
            DEPTH=min(depth, 2),  # conditions take two scalar registers each on AMD
            LANES=lanes,
            ALIGN=align,
            **layout.sweep_options(),
        )


@torch.library.custom_op("sdkernels::reduced_rows", mutates_args=())
def reduced_rows(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    by_teacher: bool,
    tail: bool,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Student and teacher as (..., k + 1): z / T of the listed tokens, then log sum exp(z / T) of all others.

    Both less the row's maximum, in the arithmetic's dtype; the softmax of such a row is that of the logits, the last
    entry being the others' mass. Then the student's maximum over the others and their centred log sum, float64, and the
    teacher's: at most the lowest float and -inf where there are no others or only -inf.

    ``token_ids`` (..., k) are the ``top_ids`` of the teacher if ``by_teacher``, else of the student: its last one's
    logit tells listed tokens from others. Rows that are a part of whole ones list those of the whole rows' that they
    hold, in their order, behind ids of -1 for the rest, whose entries are NaN and left out of the row's maximum; with
    no other ids all tokens are in the tail. Rows that hold NaN or +inf hold NaN; those of only -inf, -inf or NaN.
    Without ``tail`` what says of it means nothing, and the row that chose is not read.
    ``inplace`` is for backward: it lets the gradient take the student's memory.
    """
    layout.check_temperatures(temperatures, mask, student)
    arguments = (student, teacher, token_ids, by_teacher, tail, mask, temperature, temperatures)
    by_triton = serves_both(runs_triton, student, teacher)
    if not (by_triton or serves_both(runs_csrc, student, teacher)):
        return reference.reduced_rows(student, teacher, token_ids, tail, mask, temperature, temperatures)
    outputs = _empty_results(student, teacher, token_ids)
    if student.shape[:-1].numel() == 0:
        return outputs
    if by_triton:
        for each in outputs:
            each.zero_()  # masked rows are left as they are
        _launch(*arguments, outputs)
    else:
        torch.ops.sdkernels_cpu.reduced_rows(*arguments, *outputs)
    return outputs


def _empty_results(student: Tensor, teacher: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    shape = (*token_ids.shape[:-1], token_ids.shape[-1] + 1)
    dtypes = [torch.promote_types(x.dtype, torch.float32) for x in (student, teacher)]
    rows = [torch.empty(shape, dtype=dtype, device=student.device) for dtype in dtypes]
    kinds = [kind for dtype in dtypes for kind in (dtype, torch.float64)]
    return *rows, *(torch.empty(shape[:-1], dtype=kind, device=student.device) for kind in kinds)


@reduced_rows.register_fake
def _(student, teacher, token_ids, *arguments):
    return _empty_results(student, teacher, token_ids)


def _setup_context(ctx, inputs, output) -> None:
    student, _, token_ids, _, _, mask, ctx.temperature, temperatures, ctx.inplace = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(student, token_ids, mask, temperatures, *output[2:4])


def _backward(ctx, upstream, *_):
    if upstream is None:
        return (None,) * 9
    student, token_ids, mask, temperatures, *tail = ctx.saved_tensors
    if mask is not None:
        upstream = torch.where(mask.unsqueeze(-1), upstream, 0)
    arguments = (student, token_ids, ctx.temperature, temperatures, *tail, upstream.contiguous())
    return reduced_gradient(*arguments, inplace=ctx.inplace), *(None,) * 8


reduced_rows.register_autograd(_backward, setup_context=_setup_context)
