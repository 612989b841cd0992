"""`sdkernels::row_support`: which tokens of a row survive truncation, found by one sweep and no sort of the row."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.reference import rows as reference
from sdkernels.rows import layout
from sdkernels.rows.layout import RowSupport
from sdkernels.rows.implementations import runs_csrc, runs_triton

LISTED = 64  # supports up to this size are kept as lists of token ids; larger ones as their threshold


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `RowSupport`, with lists of `capacity` ids; top_k 0, top_p 1 and min_p 0 keep everything.

    ``logits`` (..., V) is what ``layout.as_rows`` returns; the bool ``mask`` is contiguous, of the leading shape;
    ``temperatures``, contiguous, holds one value for each run of consecutive tokens.
    """
    layout.check_temperatures(temperatures, mask, logits)
    filters = (top_k, top_p, min_p)
    if not runs_csrc(logits):
        return reference.row_support(logits, mask, temperature, temperatures, *filters, capacity)
    outputs = _empty_support(logits, capacity)
    if outputs.size.numel() == 0:
        return tuple(outputs)
    temperatures = None if temperatures is None else temperatures.double()
    torch.ops.sdkernels_cpu.row_support(logits, mask, temperature, temperatures, *filters, *outputs)
    return tuple(outputs)


@row_support.register_fake
def _(logits, mask, temperature, temperatures, top_k, top_p, min_p, capacity):
    return tuple(_empty_support(logits, capacity))
