"""Device math of the threshold: which logits may survive truncation, and from where on they do, without a sort of V.

One sweep keeps a list of candidates, those at least as large as a bound that rises as the row is seen; filters then
decide among the sorted list. Where the list cannot tell, the threshold is bisected over the order of floats.
"""

from __future__ import annotations

from sdkernels.rows import device
from sdkernels.rows.device import jit, tl


@jit
def order_of(z):
    """int32 in the order of the floats; -0 and +0 are one."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def float_of(order):
    """The float that `order_of` maps here."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def rounded_up(x):
    """The least float32 that is not below a float64."""
    z = x.to(tl.float32)
    return tl.where(z.to(tl.float64) < x, float_of(order_of(z) + 1), z)


@jit
def bounds(filters, vocab, capacity, temperature, GROUPS: tl.constexpr):
    """What raises the bound of the candidates: the temperature, logs of top_p's and min_p's shares, whether groups do.

    Without top_k the groups only serve the list: the support may reach below, and is then not listed.
    """
    top_k, top_p, min_p = filters
    # Where top_p measures what top_k kept, min_p must not take any of it away.
    log_rest = tl.where(top_k > 0, float("-inf"), tl.log((1.0 - top_p) / vocab))
    log_peak = tl.where((top_k > 0) & (top_p < 1), float("-inf"), tl.log(min_p))
    by_groups = tl.maximum(top_k, capacity) <= GROUPS
    temperature = tl.maximum(temperature, 1e-37)  # not 0 in float32, which times -inf is NaN
    return temperature.to(tl.float32), log_rest.to(tl.float32), log_peak.to(tl.float32), by_groups


@jit
def _below(m, temperature, log_share):
    """m + T log_share, less more than its float32 may be off."""
    drop = temperature * log_share
    return m + drop - 1e-5 * (tl.abs(m) + tl.abs(drop) + temperature)


@jit
def _raised(bound, m, s, scale, limits, groups):
    """The largest number that S provably does not reach below, from lanes' maxima m and sums s so far.

    If top_k is at most the number of groups of lanes, each group holds a logit not below the least of their maxima; all
    logits more than T (log(1 / (1 - top_p)) + log V) below the log-sum hold less than 1 - top_p of the mass together.
    """
    temperature, log_rest, log_min_p, by_groups = limits
    row_m = tl.max(m, 0)
    log_sum = tl.log(tl.sum(s * tl.exp2(tl.maximum((m - row_m) * scale, device.FLOOR)), 0))
    nucleus = _below(row_m, temperature, log_sum + log_rest)
    peak = _below(row_m, temperature, log_min_p)
    GROUPS: tl.constexpr = groups.shape[0]
    least = tl.min(tl.max(tl.reshape(m, (m.shape[0] // GROUPS, GROUPS)), 0), 0)
    bound = tl.maximum(bound, tl.where(by_groups, least, device.LOWEST))
    return tl.maximum(bound, tl.maximum(nucleus, peak))


@jit
def note_of(z, columns):
    """An int64 in the order of the logits, ties by column: their order and, descending, their columns."""
    return (order_of(z).to(tl.int64) << 32) | (0x7FFFFFFF - columns).to(tl.int64)


@jit
def _note(z, columns, found, notes):
    """Put the notes of logits down in a list."""
    list_ptr, count_ptr, slots = notes
    slot = tl.atomic_add(count_ptr + tl.zeros_like(columns), 1, mask=found)
    tl.store(list_ptr + slot, note_of(z, columns), mask=found & (slot < slots.shape[0]))


@jit
def _fold_candidates(state, z, other, columns, arguments):
    m, s, t, finite, bound = state
    scale, limits, groups, notes = arguments
    m, s, t = device.fold(m, s, t, z, scale)
    finite += tl.sum((z >= device.LOWEST).to(tl.int32), 0)
    if notes is not None:
        if tl.max(tl.max(z, 0), 0) >= bound:
            bound = _raised(bound, m, s, scale, limits, groups)
            _note(z, columns, z >= bound, notes)
    return m, s, t, finite, bound


@jit
def sweep_candidates(row_ptr, vocab, scale, limits, groups, notes, LANES: tl.constexpr):
    """`device.sweep`, the number of finite logits, and a bound; all that are at least it are noted."""
    m = tl.full((LANES,), device.LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    t = tl.zeros((LANES,), tl.float32)
    finite = tl.zeros((LANES,), tl.int32)
    state = (m, s, t, finite, tl.zeros((), tl.float32) + device.LOWEST)
    arguments = (scale, limits, groups, notes)
    m, s, t, finite, bound = device.walk(row_ptr, None, vocab, state, arguments, _fold_candidates, 1, LANES)
    row_m, row_s, row_t = device.add_statistics((m, s, t), scale)
    return row_m, row_s, row_t, tl.sum(finite, 0), bound


@jit
def counted(notes):
    """How many logits wanted to be noted."""
    tl.debug_barrier()  # until all threads have put theirs down
    return tl.atomic_add(notes[1], 0)


@jit
def noted(notes):
    """How many logits wanted to be noted, and the notes; the least integer beyond them."""
    list_ptr, _, slots = notes
    count = counted(notes)
    return count, tl.load(list_ptr + slots, mask=slots < count, other=-0x8000000000000000)


@jit
def float_of_note(note):
    """The logit of a note."""
    return float_of((note >> 32).to(tl.int32))


@jit
def column_of_note(note):
    """The column of a note."""
    return 0x7FFFFFFF - (note & 0x7FFFFFFF).to(tl.int32)


@jit
def first_of_group(order):
    """The smallest note of the logits of an order."""
    return order.to(tl.int64) << 32


@jit
def last_of_group(order):
    """The largest note of the logits of an order."""
    return (order.to(tl.int64) << 32) | 0x7FFFFFFF


@jit
def _unshifted(order, SHIFT: tl.constexpr):
    """An order from all but its low bits, which do not vary in the row's dtype: 0, or 1 where it is negative."""
    return (order << SHIFT) | tl.where(order < 0, (1 << SHIFT) - 1, 0)


@jit
def notes_above_in_list(note, arguments, SHIFT: tl.constexpr):
    """How many notes of a list are above one, and their mass; masses are in fixed point, exact in any order."""
    notes, masses = arguments
    above = notes > note
    mass = tl.sum(tl.where(above, masses, 0), 0).to(tl.float64) / device.FIXED_POINT
    return tl.sum(above.to(tl.int32), 0), mass


@jit
def orders_above_in_list(order, arguments, SHIFT: tl.constexpr):
    """How many notes of a list are above all of an order, and their mass."""
    return notes_above_in_list(last_of_group(_unshifted(order, SHIFT)), arguments, SHIFT)


@jit
def _fold_notes_above(state, z, other, columns, note):
    return state + tl.sum(((note_of(z, columns) > note) & (z >= device.LOWEST)).to(tl.int32), 0)


@jit
def notes_above_in_row(note, arguments, SHIFT: tl.constexpr):
    """As of a list, by one more sweep over the row, and without their mass."""
    row_ptr, vocab, _m, _scale, _notes, lanes = arguments
    state = tl.zeros(lanes.shape, tl.int32)
    count = device.walk(row_ptr, None, vocab, state, note, _fold_notes_above, 1, lanes.shape[0])
    return tl.sum(count, 0), tl.zeros((), tl.float64)


@jit
def _fold_above(state, z, other, columns, arguments):
    count, mass = state
    last, m, scale = arguments
    above = order_of(z) > last  # -inf is not: `last` is never below its order
    mass += tl.sum(tl.where(above, tl.exp2((z - m) * scale), 0.0), 0).to(tl.float64)
    return count + tl.sum(above.to(tl.int32), 0), mass


@jit
def orders_above_in_row(order, arguments, SHIFT: tl.constexpr):
    """As of a list, by one more sweep over the row."""
    row_ptr, vocab, m, scale, _notes, lanes = arguments
    last = _unshifted(order, SHIFT).to(tl.int32)
    state = (tl.zeros(lanes.shape, tl.int32), tl.zeros(lanes.shape, tl.float64))
    count, mass = device.walk(row_ptr, None, vocab, state, (last, m, scale), _fold_above, 1, lanes.shape[0])
    return tl.sum(count, 0), device.add_lanes(mass)


@jit
def bisect(search, ABOVE: tl.constexpr, SHIFT: tl.constexpr):
    """The least note or order in [low, high] above which are fewer than `most` logits with less than `most_mass`."""
    low, high, most, most_mass, arguments = search
    while low < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # their difference may overflow
        count, mass = ABOVE(middle, arguments, SHIFT)
        if (count < most) & (mass < most_mass):
            high = middle
        else:
            low = middle + 1
    return low


@jit
def _middle(low, high, m, scale, SHIFT: tl.constexpr):
    """An order in [low, high): between the two floats, or where these are far below m or next to each other, orders."""
    least = float_of(_unshifted(low, SHIFT).to(tl.int32))
    most = float_of(_unshifted(high, SHIFT).to(tl.int32))
    by_value = (order_of(0.5 * least + 0.5 * most) >> SHIFT).to(tl.int64)
    by_value = tl.minimum(tl.maximum(by_value, low), high - 1)
    apart = ((m - least) * scale < -device.FLOOR) & ((most - least) * scale > 1 / 256)
    return tl.where(apart, by_value, (low >> 1) + (high >> 1) + (low & high & 1))


@jit
def masses_of(z, m, scale):
    """The masses of logits relative to m, in fixed point."""
    return (tl.exp2((z - m) * scale) * device.FIXED_POINT).to(tl.int64)


@jit
def whole_list(low, high, most, most_mass, rest, arguments, SHIFT: tl.constexpr):
    """A list is searched as it is, between `low` and `high`, with nothing above it."""
    return low, high, most, most_mass, arguments


@jit
def narrowed_row(low, high, most, most_mass, rest, arguments, SHIFT: tl.constexpr):
    """A row is bisected by sweeps until a list takes all logits from `low` to `high`; what is above is subtracted.

    Logits that have less than 1 / V of the `rest` each, the mass that may be left out, are all left out.
    """
    row_ptr, vocab, m, scale, notes, lanes = arguments
    least = _below(m, 1 / scale, tl.log2(rest / vocab).to(tl.float32))
    low = tl.maximum(low, (order_of(tl.maximum(least, device.LOWEST)) >> SHIFT).to(tl.int64))
    above = tl.zeros((), tl.int32)
    mass = tl.zeros((), tl.float64)
    within = vocab
    while (low < high) & (within > notes[2].shape[0]):
        middle = _middle(low, high, m, scale, SHIFT)
        count, found = orders_above_in_row(middle, arguments, SHIFT)
        if (count < most) & (found < most_mass):
            high = middle
            within -= count - above
            above = count
            mass = found
        else:
            low = middle + 1
            within = count - above
    first = first_of_group(_unshifted(low, SHIFT))
    last = last_of_group(_unshifted(high, SHIFT))
    if low < high:
        note_again(row_ptr, vocab, first, last, notes, lanes.shape[0])
    _count, note = noted(notes)
    z = float_of_note(note)
    z = tl.where(z >= device.LOWEST, z, float("-inf"))  # no logits in the places beyond the last
    return low, high, most - above, most_mass - mass, (note, masses_of(z, m, scale))


@jit
def threshold(
    lowest, m, row_mass, filters, arguments, ABOVE: tl.constexpr, NARROWED: tl.constexpr, SHIFT: tl.constexpr
):
    """The threshold of top_k and top_p, and the mass that top_p measures: of a list, or of a row by some 10 sweeps.

    The row's mass, if it is not given (0), is what is found above all that is below `lowest`.
    """
    top_k, top_p, _min_p = filters
    order = (order_of(lowest) >> SHIFT).to(tl.int64)
    highest = (order_of(m) >> SHIFT).to(tl.int64)
    if top_k > 0:
        found = NARROWED(order, highest, top_k, float("inf"), 0.0, arguments, SHIFT)
        order = bisect(found, orders_above_in_list, SHIFT)
    if (top_k > 0) | (row_mass == 0):
        _count, row_mass = ABOVE(order - 1, arguments, SHIFT)
    if top_p < 1:
        rest = (1 - top_p) * row_mass
        found = NARROWED(order, highest, 0x7FFFFFFF, top_p * row_mass, rest, arguments, SHIFT)
        order = bisect(found, orders_above_in_list, SHIFT)
    return float_of(_unshifted(order, SHIFT).to(tl.int32)), row_mass


@jit
def _fold_notes(state, z, other, columns, arguments):
    first, last, notes = arguments
    note = note_of(z, columns)
    found = (note >= first) & (note <= last) & (z >= device.LOWEST)
    if tl.max(tl.max(found.to(tl.int32), 0), 0) > 0:
        _note(z, columns, found, notes)
    return state


@jit
def note_again(row_ptr, vocab, first, last, notes, LANES: tl.constexpr):
    """Another sweep puts down all notes from `first` to `last`, and no others."""
    tl.debug_barrier()
    tl.atomic_xchg(notes[1], 0)
    tl.debug_barrier()
    device.walk(row_ptr, None, vocab, tl.zeros((), tl.int32), (first, last, notes), _fold_notes, 1, LANES)


@jit
def floor_of_largest(count, floor, m, arguments, ABOVE: tl.constexpr):
    """The note of the last of so many largest logits, ties by column, or `floor` if it is higher."""
    return bisect((floor, last_of_group(order_of(m)), count, float("inf"), arguments), ABOVE, 0)


@jit
def write_back(note, chosen, notes):
    """Chosen notes, in no order, to the start of the list."""
    tl.debug_barrier()
    tl.store(notes[0] + tl.cumsum(chosen.to(tl.int32), 0) - 1, note, mask=chosen)
    tl.debug_barrier()


@jit
def _fold_inside(state, z, other, columns, arguments):
    count, s, t = state
    threshold, m, scale = arguments
    inside = z >= threshold
    y = (z - m) * scale
    e = tl.where(inside, tl.exp2(y), 0.0)
    return count + tl.sum(inside.to(tl.int32), 0), s + tl.sum(e, 0), t + tl.sum(e * tl.maximum(y, device.FLOOR), 0)


@jit
def sums_inside(row_ptr, vocab, threshold, m, scale, LANES: tl.constexpr):
    """|S|, sum 2^y and sum y 2^y over S, one more sweep."""
    zeros = tl.zeros((LANES,), tl.float32)
    state = (tl.zeros((LANES,), tl.int32), zeros, zeros)
    count, s, t = device.walk(row_ptr, None, vocab, state, (threshold, m, scale), _fold_inside, 1, LANES)
    return tl.sum(count, 0), device.add_lanes(s), device.add_lanes(t)
