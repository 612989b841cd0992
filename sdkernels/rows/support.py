"""`sdkernels::row_support`: which tokens of a row survive truncation, found by one sweep and no sort of the row."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import rows as reference
from sdkernels.rows import device, layout
from sdkernels.rows import threshold as at
from sdkernels.rows.device import jit, tl, triton
from sdkernels.rows.implementations import runs_csrc, runs_triton
from sdkernels.rows.layout import RowSupport

LISTED = 64  # supports up to this size are kept as lists of token ids; larger ones as their threshold
MOST_CANDIDATES = 4096  # that a kernel takes into registers
SORT_BYTES = 64 << 20  # of float64 rows that are sorted at a time, in ten times as much memory
WIDE_WARP_LANES = 512  # at most, for warps of 64 threads: a predicate for each takes two scalar registers


@jit
def _from_list(m, s, t, size, bound, temperature, scale, filters, capacity, notes, FILTERED: tl.constexpr,
               PARTIAL: tl.constexpr, SHIFT: tl.constexpr):  # fmt: skip
    """A row's support from its notes: whether they tell it, or its largest; its sums, size, threshold.

    Its list replaces the notes.
    """
    top_k, top_p, min_p = filters
    count, note = at.noted(notes)
    known = count <= note.shape[0]
    threshold = tl.zeros((), tl.float32) + device.LOWEST
    z = at.float_of_note(note)
    z = tl.where(z >= bound, z, float("-inf"))  # the bound was lower at first, so these are not all there
    y = (z - m) * scale
    mass = tl.exp2(y)
    listed = (note, at.masses_of(z, m, scale))
    if FILTERED:
        peak = at.rounded_up(m + temperature * tl.log(min_p))
        threshold, measured = at.threshold(bound, m, s, filters, listed, at.orders_above_in_list, at.whole_list, SHIFT)
        nucleus_ends = (top_p < 1) & (device.add_lanes(mass) >= top_p * measured)
        known = known & ((top_k > 0) | nucleus_ends | (peak >= bound))
        threshold = tl.maximum(threshold, peak)
        inside = z >= threshold
        size = tl.sum(inside.to(tl.int32), 0)
        s = device.add_lanes(tl.where(inside, mass, 0.0))
        t = device.add_lanes(tl.where(inside, mass * tl.maximum(y, device.FLOOR), 0.0))
    held = known | ((count <= note.shape[0]) & (size >= capacity))
    if held & (PARTIAL | (size <= capacity)):
        floor = at.first_of_group(at.order_of(threshold))
        if size > capacity:
            floor = at.floor_of_largest(capacity, floor, m, listed, at.notes_above_in_list)
        at.write_back(note, note >= floor, notes)
    return known, held, s, t, size, threshold


@jit
def _write_list(list_ptr, listed, ids_ptr, log_probs_ptr, capacity, m, temperature, log_sum, PLACES: tl.constexpr):
    """The first `listed` notes of a list as ids and log-probs, each at its rank; -1 and -inf after them."""
    tl.debug_barrier()
    places = tl.arange(0, PLACES)
    note = tl.load(list_ptr + places, mask=places < listed, other=0)
    rank = tl.zeros((PLACES,), tl.int32)
    some = tl.arange(0, 16)
    for start in range(0, listed, 16):
        others = tl.load(list_ptr + start + some, mask=start + some < listed, other=-0x8000000000000000)
        rank += tl.sum((others[None, :] > note[:, None]).to(tl.int32), 1)
    rank = tl.where(places < listed, rank, places)
    log_q = ((at.float_of_note(note).to(tl.float64) - m) / temperature - log_sum).to(tl.float32)
    tl.store(ids_ptr + rank, tl.where(places < listed, at.column_of_note(note), -1), mask=places < capacity)
    tl.store(log_probs_ptr + rank, tl.where(places < listed, log_q, float("-inf")), mask=places < capacity)


@jit
def _write(row, m, s, t, size, threshold, temperature, results, lists, list_ptr, capacity,
           PARTIAL: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    """The results of a row; NaN and an empty list if its sum is NaN, or 0 as where every logit is -inf."""
    invalid = tl.where(s > 0, 0.0, float("nan"))
    size = tl.where(s > 0, size, 0)
    log_sum = tl.log(s)
    tl.store(results[0] + row, threshold + invalid)
    tl.store(results[1] + row, size.to(tl.int64))
    tl.store(results[2] + row, m + invalid)
    tl.store(results[3] + row, log_sum + invalid)
    tl.store(results[4] + row, (log_sum - t / (s * device.LOG2E)).to(tl.float32) + invalid)
    if list_ptr is not None:
        listed = tl.where((size <= capacity) | PARTIAL, tl.minimum(size, capacity), 0)
        place = row * capacity
        _write_list(list_ptr, listed, lists[0] + place, lists[1] + place, capacity, m, temperature, log_sum, PLACES)


# The size of a support that the first kernel leaves to the second; the other one where its list holds the largest.
UNKNOWN, HELD = (tl.constexpr(-1), tl.constexpr(-2)) if triton else (-1, -2)


@jit(**layout.unspecialised(""))
def _support_kernel(
    logits_ptr,  # (N, V) through sizes and strides
    mask_ptr,  # (N,) or None
    temperatures_ptr,  # (N / span,) or None
    results,  # threshold (N,), size (N,) int64, maximum (N,), log sum (N,) float64, entropy (N,)
    lists,  # token ids and log-probs (N, capacity)
    notes_ptr,  # (N, CANDIDATES) int64, or None: no lists, no filters
    counts_ptr,  # (N,) int32, 0 at first
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    top_k,  # 0: off
    top_p: tl.float64,  # 1: off
    min_p: tl.float64,  # 0: off
    capacity,
    FILTERED: tl.constexpr,
    PARTIAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PLACES: tl.constexpr,
    GROUPS: tl.constexpr,
    SHIFT: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
    list_ptr = None
    notes = None
    if notes_ptr is not None:
        list_ptr = notes_ptr + row * CANDIDATES
        notes = (list_ptr, counts_ptr + row, tl.arange(0, CANDIDATES))
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            zero = tl.zeros((), tl.float32)
            _write(row, zero, zero.to(tl.float64) + 1, zero, 0, zero, 1.0, results, lists, list_ptr, capacity,
                   PARTIAL, PLACES)  # fmt: skip
            return
    row_ptr = logits_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    scale = device.row_scale(row_temperature)
    filters = (top_k, tl.zeros((), tl.float64) + top_p, tl.zeros((), tl.float64) + min_p)
    limits = at.bounds(filters, vocab, capacity, row_temperature, GROUPS)
    groups = tl.arange(0, GROUPS)
    m, s, t, size, bound = at.sweep_candidates(row_ptr, vocab, scale, limits, groups, notes, LANES)
    threshold = tl.zeros((), tl.float32) + device.LOWEST
    known = True
    held = True
    if notes_ptr is not None:
        if s > 0:
            if at.counted(notes) > CANDIDATES:
                highest = at.last_of_group(at.order_of(m))
                at.note_again(row_ptr, vocab, at.first_of_group(at.order_of(bound)), highest, notes, LANES)
            known, held, s, t, size, threshold = _from_list(
                m, s, t, size, bound, row_temperature, scale, filters, capacity, notes, FILTERED, PARTIAL, SHIFT
            )
    if known:
        _write(
            row, m, s, t, size, threshold, row_temperature, results, lists, list_ptr, capacity, PARTIAL, PLACES
        )  # fmt: skip
    else:
        tl.store(results[1] + row, tl.where(held, HELD, UNKNOWN))
        tl.store(results[2] + row, m)


@jit(**layout.unspecialised(""))
def _search_kernel(
    logits_ptr,  # (N, V) through sizes and strides
    temperatures_ptr,  # (N / span,) or None
    results,  # as of _support_kernel; where it did not know, UNKNOWN or HELD for the size, and the maximum
    lists,  # token ids and log-probs (N, capacity)
    notes_ptr,  # (N, CANDIDATES) int64
    counts_ptr,  # (N,) int32
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    top_k,
    top_p: tl.float64,
    min_p: tl.float64,
    capacity,
    FILTERED: tl.constexpr,
    PARTIAL: tl.constexpr,
    CANDIDATES: tl.constexpr,
    PLACES: tl.constexpr,
    SHIFT: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(results[1] + row)
    if state < 0:
        row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
        scale = device.row_scale(row_temperature)
        row_ptr = logits_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
        m = tl.load(results[2] + row)
        list_ptr = notes_ptr + row * CANDIDATES
        held = (state == HELD) & (2 * PLACES <= CANDIDATES)  # for the second half is taken
        notes = (list_ptr + CANDIDATES // 2, counts_ptr + row, tl.arange(0, CANDIDATES // 2))
        swept = (row_ptr, vocab, m, scale, notes, tl.arange(0, LANES))
        threshold = tl.zeros((), tl.float32) + device.LOWEST
        if FILTERED:
            filters = (top_k, tl.zeros((), tl.float64) + top_p, tl.zeros((), tl.float64) + min_p)
            unknown_mass = tl.zeros((), tl.float64)
            threshold, _measured = at.threshold(
                threshold, m, unknown_mass, filters, swept, at.orders_above_in_row, at.narrowed_row, SHIFT
            )
            threshold = tl.maximum(threshold, at.rounded_up(m + row_temperature * tl.log(filters[2])))
        size, s, t = at.sums_inside(row_ptr, vocab, threshold, m, scale, LANES)
        if (size <= capacity) | (PARTIAL & (held == 0)):
            floor = at.first_of_group(at.order_of(threshold))
            if size > capacity:
                floor = at.floor_of_largest(capacity, floor, m, swept, at.notes_above_in_row)
            chosen = (list_ptr, counts_ptr + row, tl.arange(0, CANDIDATES))
            at.note_again(row_ptr, vocab, floor, at.last_of_group(at.order_of(m)), chosen, LANES)
        _write(
            row, m, s, t, size, threshold, row_temperature, results, lists, list_ptr, capacity, PARTIAL, PLACES
        )  # fmt: skip


def _launch(logits: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
            filters: tuple[int, float, float], capacity: int, partial: bool, outputs: RowSupport) -> None:  # fmt: skip
    rows, vocab = outputs.size.numel(), logits.shape[-1]
    _, lanes = layout.tile(logits)  # in tiles of one line: the notes of a deeper one would spill
    if layout.WARP_SIZE == 64:
        lanes = min(lanes, WIDE_WARP_LANES)
    align = layout.alignment(logits)
    filtered = filters != (0, 1.0, 0.0)
    groups = triton.next_power_of_2(max(filters[0] or LISTED, capacity))
    most = MOST_CANDIDATES if groups > 256 else MOST_CANDIDATES // 2  # the groups' bound leaves groups log(groups)
    candidates = min(32 * groups, most, triton.next_power_of_2(vocab))
    candidates = max(candidates, triton.next_power_of_2(capacity), 16)
    notes = counts = None
    if filtered or capacity > 0:
        notes = torch.empty((rows, candidates), dtype=torch.int64, device=logits.device)
        counts = torch.zeros((rows,), dtype=torch.int32, device=logits.device)
    shape = (*layout.kernel_sizes(logits), *layout.kernel_strides(logits, align), vocab)
    span = 1 if temperatures is None else layout.span(temperatures, rows)
    arguments = (outputs[:5], outputs[5:], notes, counts, *shape, span, temperature, *filters, capacity)
    options = {
        "FILTERED": filtered,
        "PARTIAL": partial,
        "CANDIDATES": candidates,
        "PLACES": triton.next_power_of_2(max(capacity, 1)),
        "SHIFT": {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}[logits.dtype],
        "LANES": lanes,
        "ALIGN": align,
        **layout.sweep_options(),
    }
    with layout.on_device(logits):
        _support_kernel[(rows,)](logits, mask, temperatures, *arguments, GROUPS=min(groups, lanes), **options)
        if notes is not None:
            _search_kernel[(rows,)](logits, temperatures, *arguments, **options)


def _empty_support(logits: Tensor, capacity: int) -> RowSupport:
    shape, device = logits.shape[:-1], logits.device
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return RowSupport(
        torch.empty(shape, dtype=dtype, device=device),
        torch.empty(shape, dtype=torch.int64, device=device),
        torch.empty(shape, dtype=dtype, device=device),
        torch.empty(shape, dtype=torch.float64, device=device),
        torch.empty(shape, dtype=dtype, device=device),
        torch.empty((*shape, capacity), dtype=torch.int32, device=device),
        torch.empty((*shape, capacity), dtype=dtype, device=device),
    )


def _sorted(logits: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
            filters: tuple[int, float, float], capacity: int) -> tuple[Tensor, ...]:  # fmt: skip
    """The reference, which sorts in float64, on pieces of the rows: its memory does not grow with their number."""
    shape = logits.shape[:-1]
    rows = shape.numel()
    pieces = min(-(-8 * logits.numel() // SORT_BYTES), rows)
    if pieces <= 1:
        return reference.row_support(logits, mask, temperature, temperatures, *filters, capacity)
    outputs = _empty_support(logits, capacity)
    at_rows = None if temperatures is None else layout.at_tokens(temperatures, shape).flatten()
    for piece in torch.arange(rows, device=logits.device).tensor_split(pieces):
        kept, each = (None if x is None else x.flatten()[piece] for x in (mask, at_rows))
        some = logits[torch.unravel_index(piece, shape)]
        found = reference.row_support(some, kept, temperature, each, *filters, capacity)
        for output, part in zip(outputs, found, strict=True):
            output.flatten(0, len(shape) - 1)[piece] = part
    return tuple(outputs)


@torch.library.custom_op("sdkernels::row_support", mutates_args=())
def row_support(
    logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    top_k: int,
    top_p: float,
    min_p: float,
    capacity: int,
    partial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `RowSupport`, with lists of `capacity` ids; top_k 0, top_p 1 and min_p 0 keep everything.

    The lists of larger supports hold their most probable tokens if ``partial``, else anything. Lists of more than
    MOST_CANDIDATES ids are no kernel's: in place of Triton's the reference sorts the rows, a piece of them at a time.
    ``logits`` (..., V) is what ``layout.as_rows`` returns; the bool ``mask`` is contiguous, of the leading shape;
    ``temperatures``, contiguous, float64, holds one value for each run of consecutive tokens.
    """
    layout.check_temperatures(temperatures, mask, logits)
    filters = (top_k, top_p, min_p)
    by_triton = runs_triton(logits) and capacity <= MOST_CANDIDATES
    if not (by_triton or runs_csrc(logits)):
        return _sorted(logits, mask, temperature, temperatures, filters, capacity)
    outputs = _empty_support(logits, capacity)
    if outputs.size.numel() == 0:
        return tuple(outputs)
    if by_triton:
        _launch(logits, mask, temperature, temperatures, filters, capacity, partial, outputs)
        return tuple(outputs)
    torch.ops.sdkernels_cpu.row_support(logits, mask, temperature, temperatures, *filters, partial, *outputs)
    return tuple(outputs)


@row_support.register_fake
def _(logits, mask, temperature, temperatures, top_k, top_p, min_p, capacity, partial):
    return tuple(_empty_support(logits, capacity))
