"""Device math, once, in float32: what the Triton kernels are made of.

A row of logits z at temperature T is seen as y = (z - m) k with k = log2(e) / T and m its maximum. Then s = sum 2^y,
t = sum y 2^y, and softmax is 2^y / s. Keeping m and log s apart keeps the digits that a single logsumexp loses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:  # only the CPU implementation is left
    triton = tl = None


def jit(function: Callable | None = None, **options: Any) -> Any:
    """`triton.jit`; without Triton a mark on code that nothing runs."""
    if triton:
        return triton.jit(function, **options)
    return function if function else jit


if triton:
    LOG2E = tl.constexpr(1.4426950408889634)
    LN2 = tl.constexpr(0.6931471805599453)
    LOWEST = tl.constexpr(-3.402823466e38)  # the maximum of no logits: below every finite one
    FLOOR = tl.constexpr(-200.0)  # 2^y is 0 below: stands for -inf where 0 multiplies it
    FIXED_POINT = tl.constexpr(float(1 << 40))
    IGNORED = tl.constexpr(-100)


@jit
def row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN: tl.constexpr):
    """Where a row starts, in elements, from the two inner leading sizes and three leading strides, these over ALIGN."""
    index0 = (row // (size1 * size2)).to(tl.int64)
    index1 = (row // size2 % size1).to(tl.int64)
    index2 = (row % size2).to(tl.int64)
    return (index0 * stride0 + index1 * stride1 + index2 * stride2) * ALIGN


@jit
def is_kept(row, token_id, mask_ptr):
    """Whether a token counts: its id is not -100 and its mask, if any, is not 0."""
    keep = token_id != IGNORED
    if mask_ptr is not None:
        keep = keep & (tl.load(mask_ptr + row) != 0)
    return keep


@jit
def row_temperature(row, temperature, temperatures_ptr, span):
    """The temperature of a row, float64: a number for all, or one for each `span` consecutive rows."""
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row // span)
    return tl.zeros((), tl.float64) + temperature


@jit
def _factor(x):
    """float32, finite and not 0: times z - m it is 0 for the maximum and -inf for -inf, whatever x."""
    return tl.maximum(tl.minimum(x, 3e38), 1e-37).to(tl.float32)


@jit
def invalid_unless_finite(x):
    """0, or NaN."""
    return x - x


@jit
def row_scale(temperature):
    """k = log2(e) / T, at any temperature a factor of z - m."""
    return _factor(1.0 / temperature * LOG2E)


@jit
def inverse(temperature):
    """1 / T, at any temperature a factor of z - m."""
    return _factor(1.0 / temperature)


@jit
def fold(m, s, t, logits, scale):
    """Lanes of running statistics (m, s, t), (LANES,), and a tile of further logits, (DEPTH, LANES)."""
    new_m = tl.maximum(m, tl.max(logits, 0))
    y = (logits - new_m[None, :]) * scale
    e = tl.exp2(y)
    shift = tl.maximum((m - new_m) * scale, FLOOR)
    factor = tl.exp2(shift)
    new_s = s * factor + tl.sum(e, 0)
    new_t = (t + shift * s) * factor + tl.sum(e * tl.maximum(y, FLOOR), 0)
    return new_m, new_s, new_t


@jit
def add_lanes(values):
    """Sum in fixed point, exact in any order: how lanes lie in threads changes with a view's alignment."""
    total = tl.sum((values * FIXED_POINT).to(tl.int64), 0).to(tl.float64) / FIXED_POINT
    return tl.where(tl.max((values != values).to(tl.int32), 0) != 0, float("nan"), total)


@jit
def walk(row_ptr, other_ptr, vocab, state, arguments, FOLD: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """One pass over a row, or two side by side: `FOLD` takes whole tiles, whole lines, then the rest, into the state.

    `FOLD(state, z, other, columns, arguments)` gets float32 logits (DEPTH, LANES) of both rows, -inf beyond the
    vocabulary, and their columns. Without a second row both are the first.
    """
    TILE: tl.constexpr = DEPTH * LANES
    offsets = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    tiles = vocab // TILE * TILE
    for start in range(0, tiles, TILE):
        z, other = _load(row_ptr, other_ptr, start + offsets)
        state = FOLD(state, z, other, start + offsets, arguments)
    line = tl.arange(0, LANES)[None, :]
    lines = vocab // LANES * LANES
    if DEPTH > 1:
        for start in range(tiles, lines, LANES):
            z, other = _load(row_ptr, other_ptr, start + line)
            state = FOLD(state, z, other, start + line, arguments)
    if lines < vocab:
        inside = lines + line < vocab
        z = tl.load(row_ptr + lines + line, mask=inside, other=float("-inf")).to(tl.float32)
        other = z
        if other_ptr is not None:
            other = tl.load(other_ptr + lines + line, mask=inside, other=float("-inf")).to(tl.float32)
        state = FOLD(state, z, other, lines + line, arguments)
    return state


@jit
def _load(row_ptr, other_ptr, columns):
    z = tl.load(row_ptr + columns).to(tl.float32)
    other = z
    if other_ptr is not None:
        other = tl.load(other_ptr + columns).to(tl.float32)
    return z, other


@jit
def fold_statistics(state, z, other, columns, scale):
    """`fold` as `walk` takes it."""
    m, s, t = state
    return fold(m, s, t, z, scale)


@jit
def add_statistics(state, scale):
    """The row's m, s and t from its lanes'."""
    m, s, t = state
    row_m = tl.max(m, 0)
    shift = tl.maximum((m - row_m) * scale, FLOOR)
    factor = tl.exp2(shift)
    return row_m, add_lanes(s * factor), add_lanes((t + shift * s) * factor)


@jit
def no_statistics(LANES: tl.constexpr):
    """The lanes of m, s and t before any logit."""
    zeros = tl.zeros((LANES,), tl.float32)
    return tl.full((LANES,), LOWEST, tl.float32), zeros, zeros


@jit
def sweep(row_ptr, vocab, scale, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """One pass over a row: its maximum m, s = sum 2^y and t = sum y 2^y."""
    state = walk(row_ptr, None, vocab, no_statistics(LANES), scale, fold_statistics, DEPTH, LANES)
    return add_statistics(state, scale)


@jit
def fold_both(state, z, other, columns, scale):
    """`fold` of either of two rows."""
    row, other_row = state
    return fold_statistics(row, z, z, columns, scale), fold_statistics(other_row, other, z, columns, scale)


@jit
def add_both(state, scale):
    """Of either row m and s from its lanes'."""
    m, s, _ = add_statistics(state[0], scale)
    other_m, other_s, _ = add_statistics(state[1], scale)
    return m, s, other_m, other_s


@jit
def moved(cross, s, step, factor):
    """Sums of e x and of e when x moves by `step` and e by `factor`; a sum of -inf stays."""
    new = tl.where(factor == 0, 0.0, (cross + tl.where(s == 0, 0.0, step * s)) * factor)
    return tl.where(cross == float("-inf"), cross, new)


@jit
def relative(log2_p, log2_q):
    """p log(p / q): 0 where p is 0, +inf where only q is; p may underflow, log2 p tells."""
    p = tl.exp2(log2_p)
    value = tl.where(p == 0, 0.0, p * (log2_p - log2_q) * LN2)
    return tl.where((log2_q == float("-inf")) & (log2_p > float("-inf")), float("inf"), value)


@jit
def add_exactly(total, lost, value):
    """A running sum in two parts, its value and what rounding has lost of it."""
    new = total + value
    added = new - total
    return new, lost + ((total - (new - added)) + (value - added))


@jit
def add_parts(total, lost):
    """The sum over lanes of running sums in two parts; infinite ones have lost nothing."""
    return tl.sum(tl.where(lost == lost, total.to(tl.float64) + lost, total), 0)


@jit
def shares(beta):
    """beta and 1 - beta, float32, and not 0."""
    beta = tl.zeros((), tl.float64) + beta
    return tl.maximum(beta.to(tl.float32), 1e-37), tl.maximum((1 - beta).to(tl.float32), 1e-37)


@jit
def log2_softmax(z, normaliser, scale):
    """log2 P of logits, from their row's maximum and log2 sum; only that of -inf is -inf."""
    m, log2_sum = normaliser
    return tl.where(z == float("-inf"), z, tl.maximum((z - m) * scale - log2_sum, LOWEST))


@jit
def divergence_entry(z, other, student, teacher, scale, beta, DIVERGENCE: tl.constexpr):
    """A token's part l of D = sum l, dl / dlog P_S and P_S, from its logits and the rows' normalisers.

    `beta` is what `shares` returns. Of the JSD with M relative to the larger of both probabilities: log2 of that is
    between log2 of beta or 1 - beta and 0.
    """
    if DIVERGENCE == "jsd":
        log2_p = tl.maximum((z - student[0]) * scale - student[1], FLOOR)
        log2_q = tl.maximum((other - teacher[0]) * scale - teacher[1], FLOOR)
        gap = log2_q - log2_p
        ratio = tl.exp2(-tl.abs(gap))
        larger = tl.exp2(tl.maximum(log2_p, log2_q))
        p, q = tl.where(gap > 0, ratio, 1.0), tl.where(gap > 0, 1.0, ratio)
        log2_m = tl.log2(beta[0] * q + beta[1] * p)
        p *= larger
        slope = -beta[1] * LN2 * p * (tl.maximum(gap, 0.0) + log2_m)
        value = slope + beta[0] * LN2 * larger * q * (tl.minimum(gap, 0.0) - log2_m)
    else:
        log2_p, log2_q = log2_softmax(z, student, scale), log2_softmax(other, teacher, scale)
        p = tl.exp2(log2_p)
        if DIVERGENCE == "forward_kl":
            slope = -tl.exp2(log2_q)
            value = relative(log2_q, log2_p)
        else:
            value = relative(log2_p, log2_q)
            slope = value + p
    return value, slope, p


@jit
def token_statistics(row_ptr, vocab, token_id, temperature, DEPTH: tl.constexpr, LANES: tl.constexpr):
    """log P(token), entropy, m and log s of a row; NaN if the id is outside the vocabulary.

    Where all logits are -inf, log s is too, and the first two are NaN. The log-prob is float64: as a float32 one of -16
    would be off by 1e-6, and so the ratio that exp makes of it.
    """
    m, s, t = sweep(row_ptr, vocab, row_scale(temperature), DEPTH, LANES)
    log_sum = tl.log(s)
    valid = (token_id >= 0) & (token_id < vocab)
    label = tl.load(row_ptr + token_id, mask=valid, other=float("nan")).to(tl.float32)
    invalid = tl.where(valid, 0.0, float("nan"))
    log_prob = (label.to(tl.float64) - m) / temperature - log_sum  # -inf - -inf where s is 0
    entropy = (log_sum - t / (s * LOG2E)).to(tl.float32)
    return log_prob, entropy + invalid, m, log_sum.to(tl.float32) + invalid


@jit
def evidence_advantage(advantage, student, teacher, credited, lam, low, high, pessimistic):
    """RLSD Eq. 13-16 for one token: the advantage A_t, the weight w_t and the information gain Delta_t."""
    gain = (teacher - student).to(tl.float32)
    weight = tl.exp(tl.where(advantage > 0, gain, -gain))
    weight = tl.where(advantage == 0, 1.0, weight)
    target = advantage * tl.clamp(weight, low, high, propagate_nan=tl.PropagateNan.ALL)
    lower = tl.minimum(weight * advantage, target, propagate_nan=tl.PropagateNan.ALL)
    target = tl.where(pessimistic != 0, lower, target)
    mixed = advantage * (1 - lam) + lam * target
    keeps_own = (lam == 0) | (advantage == 0) | (credited == 0)
    return tl.where(keeps_own, advantage, mixed), weight, gain


@jit
def program_block(vocab, BLOCK: tl.constexpr):
    """Of a program per block: its row, where its block starts, and the block's columns."""
    blocks = tl.cdiv(vocab, BLOCK)
    start = tl.program_id(0) % blocks * BLOCK
    return tl.program_id(0) // blocks, start, start + tl.arange(0, BLOCK)


@jit
def load_block(row_ptr, columns, vocab, WHOLE: tl.constexpr):
    """Logits of a block in float32; -inf beyond the vocabulary, unless all of it is WHOLE."""
    if WHOLE:
        z = tl.load(row_ptr + columns)
    else:
        z = tl.load(row_ptr + columns, mask=columns < vocab, other=float("-inf"))
    return z.to(tl.float32)


@jit
def store_block(row_ptr, columns, vocab, values, WHOLE: tl.constexpr):
    """Values of a block into a row, in its dtype."""
    values = values.to(row_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(row_ptr + columns, values)
    else:
        tl.store(row_ptr + columns, values, mask=columns < vocab)


@jit
def fill_block(row_ptr, start, columns, vocab, value):
    """One value all over a block of a row."""
    values = tl.zeros(columns.shape, tl.float32) + value
    if start + columns.shape[0] <= vocab:
        store_block(row_ptr, columns, vocab, values, True)
    else:
        store_block(row_ptr, columns, vocab, values, False)


@jit
def scatter(values, ids, row_ptr, start, BLOCK: tl.constexpr):
    """Values at those ids that lie in a block which other threads have just filled."""
    tl.debug_barrier()
    tl.store(row_ptr + ids, values.to(row_ptr.dtype.element_ty), mask=(ids >= start) & (ids < start + BLOCK))
