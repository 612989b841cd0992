"""`sdkernels::row_masses`: how many logits of a row are not below each of its pivots, and what they weigh.

A search for a threshold over rows whose vocabulary lies in parts on several devices asks each part for these sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import rows as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl, triton
from sdkernels.rows.implementations import runs_csrc, runs_triton

MOST_PIVOTS = 4  # of a program: more accumulators would spill

if triton:
    COARSE = tl.constexpr(1536.0)  # adding it rounds to 2^-13, which floats sum without loss up to 2^11


@jit
def _parts(x):
    """A number between -1 and 1 as a multiple of 2^-13, so that sums of many lose nothing, and the rest."""
    coarse = (x + COARSE) - COARSE
    return coarse, x - coarse


@jit
def _fold_masses(state, z, other, columns, arguments):
    """A line of a row into counts, and coarse and fine sums of 2^y and y 2^y, each (PIVOTS, LANES)."""
    count, mass, fine_mass, moment, fine_moment = state
    pivots, m, scale = arguments
    above = tl.where(z >= pivots[:, None], 1.0, 0.0)  # a factor costs less than a choice for each sum
    y = (z - m) * scale
    y = tl.where(y > device.FLOOR, y, device.FLOOR)  # nor NaN, which times 0 would stay
    e = tl.exp2(y)
    coarse, fine = _parts(e)
    coarse_weighted, fine_weighted = _parts(e * y)
    count += above
    mass += above * coarse
    fine_mass += above * fine
    moment += above * coarse_weighted
    fine_moment += above * fine_weighted
    return count, mass, fine_mass, moment, fine_moment


@jit
def _add_lanes(coarse, fine):
    """Sums over lanes, float64 and exact in any order: the fine ones in fixed point relative to their largest."""
    largest = tl.max(tl.abs(fine), 1)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    unit = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)  # a power of 2, about 1 / largest
    fixed = (fine * unit[:, None] * device.FIXED_POINT).to(tl.int64)
    return tl.sum(coarse.to(tl.float64), 1) + tl.sum(fixed, 1).to(tl.float64) / device.FIXED_POINT / unit


@jit
def _row_masses(row_ptr, vocab, pivots, m, scale, LANES: tl.constexpr):
    """Of each pivot the count and the sums of e^y and y e^y of a row."""
    PIVOTS: tl.constexpr = pivots.shape[0]
    zeros = tl.zeros((PIVOTS, LANES), tl.float32)
    state = (zeros, zeros, zeros, zeros, zeros)
    state = device.walk(row_ptr, None, vocab, state, (pivots, m, scale), _fold_masses, 1, LANES)
    count, mass, fine_mass, moment, fine_moment = state
    padding = tl.cdiv(vocab, LANES) * LANES - vocab
    count = tl.sum(count.to(tl.int32), 1) - tl.where(pivots == float("-inf"), padding, 0)
    invalid = m - m  # 0, or NaN
    return count, _add_lanes(mass, fine_mass) + invalid, _add_lanes(moment, fine_moment) * device.LN2 + invalid


@jit(**layout.unspecialised(""))
def _masses_kernel(
    logits_ptr,  # (N, V) through sizes and strides
    mask_ptr,  # (N,) or None
    temperatures_ptr,  # (N / span,) or None
    max_ptr,  # (N,)
    pivots_ptr,  # (N, pivots)
    results,  # counts int64, masses and moments float64, (N, pivots), 0 at first
    pivots,
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    PIVOTS: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    groups = tl.cdiv(pivots, PIVOTS)
    row = (tl.program_id(0) // groups).to(tl.int64)
    if mask_ptr is not None:
        if tl.load(mask_ptr + row) == 0:
            return
    row_ptr = logits_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
    scale = device.row_scale(device.row_temperature(row, temperature, temperatures_ptr, span))
    index = tl.program_id(0) % groups * PIVOTS + tl.arange(0, PIVOTS)
    pivot = tl.load(pivots_ptr + row * pivots + index, mask=index < pivots, other=float("inf"))
    count, mass, moment = _row_masses(row_ptr, vocab, pivot, tl.load(max_ptr + row), scale, LANES)
    place = row * pivots + index
    tl.store(results[0] + place, count.to(tl.int64), mask=index < pivots)
    tl.store(results[1] + place, mass, mask=index < pivots)
    tl.store(results[2] + place, moment, mask=index < pivots)


def _launch(logits: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None, max: Tensor,
            pivots: Tensor, outputs: tuple[Tensor, ...]) -> None:  # fmt: skip
    rows, count = max.numel(), pivots.shape[-1]
    together = min(triton.next_power_of_2(count), MOST_PIVOTS)
    align = layout.alignment(logits)
    with layout.on_device(logits):
        _masses_kernel[(rows * triton.cdiv(count, together),)](
            logits,
            mask,
            temperatures,
            max,
            pivots,
            outputs,
            count,
            *layout.kernel_sizes(logits),
            *layout.kernel_strides(logits, align),
            logits.shape[-1],
            1 if temperatures is None else layout.span(temperatures, rows),
            temperature,
            PIVOTS=together,
            LANES=layout.THREADS * min(8, 16 // together),  # of a thread: each keeps 5 sums for each pivot
            ALIGN=align,
            **layout.sweep_options(),
        )


def _empty_results(pivots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = (torch.int64, torch.float64, torch.float64)
    counts, masses, moments = (torch.empty(pivots.shape, dtype=dtype, device=pivots.device) for dtype in dtypes)
    return counts, masses, moments


@torch.library.custom_op("sdkernels::row_masses", mutates_args=())
def row_masses(
    logits: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    max: Tensor,
    pivots: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the logits z >= pivot their number, int64, and the sums of e^y and y e^y, float64, y = (z - max) / T.

    Each is (..., G) as ``pivots``, in any order. ``max`` (...) is at least the row's maximum; where it is not finite
    the sums are NaN. Both are contiguous, in the arithmetic's dtype. A logit of NaN is not above any pivot, and one of
    -inf only above -inf. Masked rows hold zeros.
    ``logits`` (..., V) is what ``layout.as_rows`` returns; the bool ``mask`` is contiguous, of the leading shape;
    ``temperatures``, contiguous, float64, holds one value for each run of consecutive tokens.
    """
    layout.check_temperatures(temperatures, mask, logits)
    arguments = (logits, mask, temperature, temperatures, max, pivots)
    if not (runs_triton(logits) or runs_csrc(logits)):
        return reference.row_masses(*arguments)
    outputs = _empty_results(pivots)
    if pivots.numel() == 0:
        return outputs
    if runs_triton(logits):
        for each in outputs:
            each.zero_()  # masked rows are left as they are
        _launch(*arguments, outputs)
    else:
        torch.ops.sdkernels_cpu.row_masses(*arguments, *outputs)
    return outputs


@row_masses.register_fake
def _(logits, mask, temperature, temperatures, max, pivots):
    return _empty_results(pivots)
