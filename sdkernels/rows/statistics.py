"""`sdkernels::row_statistics`: one sweep over each row gives log P(token), the entropy, and what the gradient needs."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels import _check
from sdkernels.reference import rows as reference
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl
from sdkernels.rows.gradient import row_gradient
from sdkernels.rows.implementations import runs_csrc, runs_triton


@jit(**layout.unspecialised(""))
def _statistics_kernel(
    logits_ptr,  # (N, V) through sizes and strides
    token_ids_ptr,  # (N,)
    mask_ptr,  # (N,) or None
    temperatures_ptr,  # (N / span,) or None
    results,  # log-prob (N,) float64; entropy, maximum and log sum (N,)
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    vocab,
    span,
    temperature: tl.float64,
    DEPTH: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row = tl.program_id(0)
    token_id = tl.load(token_ids_ptr + row).to(tl.int64)
    log_prob = tl.zeros((), tl.float64)
    entropy = 0.0
    m = 0.0
    log_sum = 0.0
    if device.is_kept(row, token_id, mask_ptr):
        row_ptr = logits_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
        row_temperature = device.row_temperature(row, temperature, temperatures_ptr, span)
        log_prob, entropy, m, log_sum = device.token_statistics(row_ptr, vocab, token_id, row_temperature, DEPTH, LANES)
    tl.store(results[0] + row, log_prob)
    tl.store(results[1] + row, entropy)
    tl.store(results[2] + row, m)
    tl.store(results[3] + row, log_sum)


def _launch(logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperature: float, temperatures: Tensor | None,
            outputs: tuple[Tensor, ...]) -> None:  # fmt: skip
    depth, lanes = layout.tile(logits)
    align = layout.alignment(logits)
    with layout.on_device(logits):
        _statistics_kernel[(token_ids.numel(),)](
            logits,
            token_ids,
            mask,
            temperatures,
            outputs,
            *layout.kernel_sizes(logits),
            *layout.kernel_strides(logits, align),
            logits.shape[-1],
            1 if temperatures is None else layout.span(temperatures, token_ids.numel()),
            temperature,
            DEPTH=depth,
            LANES=lanes,
            ALIGN=align,
            **layout.sweep_options(),
        )


def _empty_results(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    empty = [torch.empty(token_ids.shape, dtype=dtype, device=logits.device) for _ in range(3)]
    return torch.empty(token_ids.shape, dtype=torch.float64, device=logits.device), *empty


@torch.library.custom_op("sdkernels::row_statistics", mutates_args=())
def row_statistics(
    logits: Tensor,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log P(token) in float64, entropy, the row's maximum m and log sum exp((z - m) / T), each (...).

    In a row of only -inf m is at most the lowest float, the log sum is -inf and the first two are NaN; a row that holds
    NaN or +inf, or whose id is outside the vocabulary, has a log sum of NaN.

    ``logits`` (..., V) is what ``layout.as_rows`` returns; ``token_ids`` and the bool ``mask`` are contiguous, of the
    leading shape; ``temperatures``, contiguous, float64, holds one value for each run of consecutive tokens.
    ``inplace`` is for backward: it lets the gradient take the logits' memory.
    """
    check_values(logits, token_ids, mask, temperatures)
    if not (runs_triton(logits) or runs_csrc(logits)):
        return reference.row_statistics(logits, token_ids, mask, temperature, temperatures)
    outputs = _empty_results(logits, token_ids)
    if token_ids.numel() == 0:
        return outputs
    if runs_triton(logits):
        _launch(logits, token_ids, mask, temperature, temperatures, outputs)
    else:
        torch.ops.sdkernels_cpu.row_statistics(logits, token_ids.long(), mask, temperature, temperatures, *outputs)
    return outputs


@row_statistics.register_fake
def _(logits, token_ids, mask, temperature, temperatures, inplace):
    return _empty_results(logits, token_ids)


def _setup_context(ctx, inputs, output) -> None:
    logits, token_ids, mask, temperature, temperatures, inplace = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(logits, token_ids, mask, temperatures, *output)
    ctx.temperature, ctx.inplace = temperature, inplace


def _backward(ctx, grad_log_prob, grad_entropy, *_):
    logits, token_ids, mask, temperatures, *statistics = ctx.saved_tensors
    if grad_log_prob is None:
        grad_log_prob = torch.zeros_like(statistics[1])
    grads = [None if x is None else x.to(statistics[1].dtype).contiguous() for x in (grad_log_prob, grad_entropy)]
    arguments = (logits, token_ids, mask, ctx.temperature, temperatures, *statistics, *grads)
    return row_gradient(*arguments, inplace=ctx.inplace), None, None, None, None, None


row_statistics.register_autograd(_backward, setup_context=_setup_context)


def check_values(logits: Tensor, token_ids: Tensor, mask: Tensor | None, temperatures: Tensor | None) -> None:
    """Refuse ids outside the vocabulary and bad temperatures at the kept tokens, where their values may be read."""
    if not _check.values_are_checked(token_ids):
        return
    keep = layout.kept_tokens(token_ids, mask)
    _check.token_id_values(token_ids, keep, logits.shape[-1])
    layout.check_temperatures(temperatures, keep, logits)
