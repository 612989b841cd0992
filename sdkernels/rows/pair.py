"""Operators on pairs of rows: the student's sums over V and, with q of the base, over the base's support S."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdkernels.reference import rows as reference
from sdkernels.rows import layout
from sdkernels.rows.implementations import runs_csrc, runs_triton


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What SSD asks of the student's logits z and of q = softmax(b / T) on S, each (...).

    The differentiable four in float64: log sum_V exp z, log sum_S exp z, T log sum_S exp(z / T), sum_S q z; then
    sum_S q log q, float64; |S|, int64; and for the gradient the log sum of q and the maxima of z over V and S and of b.

    ``student`` and ``base`` (..., V) are what ``layout.as_rows`` returns. S and q come from ``token_ids`` and
    ``log_probs`` (..., C), -1 for none, in rows whose ``size`` is at most C; there the base is not read and may be
    None. In other rows S is {b >= threshold}; without lists and thresholds it is {b > -inf}.
    """
    layout.check_temperatures(temperatures, mask, student)
    arguments = (student, base, mask, temperature, temperatures, threshold, size, token_ids, log_probs)
    if not _runs(runs_csrc, student, base):
        return reference.pair_statistics(*arguments)
    outputs = _empty_statistics(student)
    if student.shape[:-1].numel() > 0:
        torch.ops.sdkernels_cpu.pair_statistics(*arguments, *outputs)
    return outputs


def _runs(implementation: Callable[[Tensor], bool], student: Tensor, base: Tensor | None) -> bool:
    """Whether an implementation serves both rows of a pair."""
    return implementation(student) and (base is None or implementation(base))


def _empty_statistics(student: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(student.dtype, torch.float32)
    dtypes = (*(torch.float64,) * 5, torch.int64, torch.float64, *(dtype,) * 3)
    return tuple(torch.empty(student.shape[:-1], dtype=each, device=student.device) for each in dtypes)


@pair_statistics.register_fake
def _(student, *arguments):
    return _empty_statistics(student)


def _setup_context(ctx, inputs, output) -> None:
    student, base, _, ctx.temperature, *tensors = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[4:])
    ctx.save_for_backward(student, base, *tensors, *output)


def _backward(ctx, *upstream):
    student, base, *tensors = ctx.saved_tensors
    zeros = torch.zeros(student.shape[:-1], dtype=torch.float64, device=student.device)
    upstream = [zeros if x is None else x.double().contiguous() for x in upstream[:4]]
    grad = pair_gradient(student, base, ctx.temperature, *tensors, *upstream)
    return grad, *(None,) * 8


pair_statistics.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("sdkernels::pair_gradient", mutates_args=())
def pair_gradient(
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
    base_log_sum: Tensor,
    max: Tensor,
    support_max: Tensor,
    base_max: Tensor,
    on_lse: Tensor,
    on_support_lse: Tensor,
    on_tempered_lse: Tensor,
    on_cross: Tensor,
) -> Tensor:
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
        base_log_sum,
        max,
        support_max,
        base_max,
    )
    upstream = (on_lse, on_support_lse, on_tempered_lse, on_cross)
    support = (threshold, size, token_ids, log_probs)
    if not _runs(runs_csrc, student, base):
        return reference.pair_gradient(student, base, temperature, temperatures, *support, statistics, upstream)
    grad = layout.empty_gradient(student)
    if student.shape[:-1].numel() > 0:
        torch.ops.sdkernels_cpu.pair_gradient(
            student, base, temperature, temperatures, *support, *statistics, *upstream, grad
        )
    return grad


@pair_gradient.register_fake
def _(student, *arguments):
    return layout.empty_gradient(student)
