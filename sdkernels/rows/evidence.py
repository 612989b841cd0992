"""`sdkernels::rlsd_token_advantage`: two rows to an evidence-weighted advantage, one launch and one sweep of each."""

from __future__ import annotations

import torch
from torch import Tensor

from sdkernels.evidence import SIGNS, Weighing, evidence_advantage  # token math, which imports no rows
from sdkernels.rows import device, layout
from sdkernels.rows.device import jit, tl
from sdkernels.rows.implementations import runs_triton
from sdkernels.rows.statistics import check_values, row_statistics


@jit(**layout.unspecialised("", "teacher_"))
def _evidence_kernel(
    student_ptr,  # (N, V) through sizes and strides
    teacher_ptr,  # (N, V) through sizes and teacher_strides, or (N,) log-probs where TEACHER_TILE is None
    token_ids_ptr,  # (N,)
    advantages_ptr,  # (N / advantage_span,)
    mask_ptr,  # (N,) or None
    credit_mask_ptr,  # (N,) or None
    temperatures_ptr,  # (N / temperature_span,) or None
    outputs,  # seven of (N,), in the order of RLSDAdvantage
    size1,
    size2,
    stride0: tl.int64,
    stride1: tl.int64,
    stride2: tl.int64,
    teacher_stride0: tl.int64,
    teacher_stride1: tl.int64,
    teacher_stride2: tl.int64,
    vocab,
    temperature_span,
    advantage_span,
    temperature: tl.float64,
    weighing,  # lam, low, high, sign of the advantages that the teacher weighs (0: both), pessimistic or 0; floats
    STUDENT_TILE: tl.constexpr,  # (depth, lanes)
    TEACHER_TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    row = tl.program_id(0)
    lam, low, high, sign, pessimistic = weighing
    token_id = tl.load(token_ids_ptr + row).to(tl.int64)
    weighted = 0.0
    weight = 0.0
    gain = 0.0
    student = tl.zeros((), tl.float64)
    teacher = tl.zeros((), tl.float64)
    student_entropy = 0.0
    teacher_entropy = 0.0
    if device.is_kept(row, token_id, mask_ptr):
        t = device.row_temperature(row, temperature, temperatures_ptr, temperature_span)
        student_row = student_ptr + device.row_offset(row, size1, size2, stride0, stride1, stride2, ALIGN)
        student, student_entropy, _, _ = device.token_statistics(
            student_row, vocab, token_id, t, STUDENT_TILE[0], STUDENT_TILE[1])  # fmt: skip
        if TEACHER_TILE is None:
            teacher = tl.load(teacher_ptr + row).to(tl.float64)
        else:
            teacher_row = teacher_ptr + device.row_offset(
                row, size1, size2, teacher_stride0, teacher_stride1, teacher_stride2, ALIGN
            )
            teacher, teacher_entropy, _, _ = device.token_statistics(
                teacher_row, vocab, token_id, t, TEACHER_TILE[0], TEACHER_TILE[1])  # fmt: skip
        advantage = tl.load(advantages_ptr + row // advantage_span)
        credited = (sign == 0) | ((sign > 0) & (advantage > 0)) | ((sign < 0) & (advantage < 0))
        if credit_mask_ptr is not None:
            credited = credited & (tl.load(credit_mask_ptr + row) != 0)
        weighted, weight, gain = device.evidence_advantage(
            advantage, student, teacher, credited, lam, low, high, pessimistic
        )
    tl.store(outputs[0] + row, weighted)
    tl.store(outputs[1] + row, weight)
    tl.store(outputs[2] + row, gain)
    tl.store(outputs[3] + row, student)
    tl.store(outputs[4] + row, teacher)
    tl.store(outputs[5] + row, student_entropy)
    tl.store(outputs[6] + row, teacher_entropy)


def _launch(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None],
    outputs: tuple[Tensor, ...],
    temperature: float,
    weighing: Weighing,
) -> None:
    tokens, temperatures = token_ids.numel(), masks[2]
    dense = teacher.dim() == student.dim()
    align = layout.alignment(student, teacher) if dense else layout.alignment(student)
    lam, low, high, apply_to, pessimistic = weighing
    with layout.on_device(student):
        _evidence_kernel[(tokens,)](
            student,
            teacher,
            token_ids,
            advantages,
            *masks,
            outputs,
            *layout.kernel_sizes(student),
            *layout.kernel_strides(student, align),
            *(layout.kernel_strides(teacher, align) if dense else (0, 0, 0)),
            student.shape[-1],
            1 if temperatures is None else layout.span(temperatures, tokens),
            layout.span(advantages, tokens),
            temperature,
            (lam, low, high, float(SIGNS[apply_to]), float(pessimistic)),
            STUDENT_TILE=layout.tile(student),
            TEACHER_TILE=layout.tile(teacher) if dense else None,
            ALIGN=align,
            **layout.sweep_options(),
        )


@torch.library.custom_op("sdkernels::rlsd_token_advantage", mutates_args=())
def rlsd_token_advantage(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    credit_mask: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    lam: float,
    low: float,
    high: float,
    apply_to: str,
    pessimistic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The seven results of ``sdkernels.rlsd_token_advantage``, each (...).

    ``student`` and ``teacher`` are logits (..., V) as ``layout.as_rows`` returns them, or ``teacher`` is log-probs
    (...); ``advantages`` and ``temperatures``, contiguous, hold one value for each run of consecutive tokens; ``low``
    and ``high`` bound the weight. On the CPU and for float64 it is two row statistics and the token math in PyTorch.
    """
    dense = teacher.dim() == student.dim()
    weighing = Weighing(lam, low, high, apply_to, pessimistic)
    if not runs_triton(student) or (dense and teacher.dtype == torch.float64):
        return _composed(
            student, teacher, token_ids, advantages, mask, credit_mask, temperature, temperatures, weighing
        )
    check_values(student, token_ids, mask, temperatures)
    outputs = tuple(torch.empty(token_ids.shape, dtype=torch.float32, device=student.device) for _ in range(7))
    if token_ids.numel() > 0:
        masks = (mask, credit_mask, temperatures)
        _launch(student, teacher, token_ids, advantages, masks, outputs, temperature, weighing)
    return outputs


def _composed(student, teacher, token_ids, advantages, mask, credit_mask, temperature, temperatures, weighing):
    keep = layout.kept_tokens(token_ids, mask)
    options = (token_ids, mask, temperature, temperatures, False)
    student_log_prob, student_entropy, _, _ = row_statistics(student, *options)
    if teacher.dim() == student.dim():
        teacher_log_prob, teacher_entropy, _, _ = row_statistics(teacher, *options)
    else:
        teacher_log_prob, teacher_entropy = torch.where(keep, teacher, 0), torch.zeros_like(student_entropy)
    tokens = layout.at_tokens(advantages, keep.shape)
    evidence = evidence_advantage(student_log_prob, teacher_log_prob, tokens, keep, credit_mask, weighing)
    results = (*evidence, student_log_prob, teacher_log_prob, student_entropy, teacher_entropy)
    return tuple(x.to(student_entropy.dtype, copy=True) for x in results)


@rlsd_token_advantage.register_fake
def _(student, teacher, token_ids, *arguments):
    dtype = torch.promote_types(student.dtype, torch.float32)
    return tuple(torch.empty(token_ids.shape, dtype=dtype, device=student.device) for _ in range(7))
