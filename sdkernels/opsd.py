"""Distillation from a teacher's logits (OPSD, SDPO, GKD), and Theorem 1 of RLSD: how much of it can only leak."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sdkernels import _check
from sdkernels import vocab_parallel_pairs as pairs
from sdkernels.modules import LossModule
from sdkernels.reductions import reduce
from sdkernels.rows.divergence import row_divergence
from sdkernels.rows.information import row_information
from sdkernels.rows.layout import as_rows, kernel_temperature
from sdkernels.rows.reduced import reduced_rows, top_ids
from sdkernels.vocab_parallel import shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


class OPSDOutput(NamedTuple):
    """Results of `opsd_loss`: the loss, 0-dim or (...), and the divergence of each token; both are differentiable."""

    loss: Tensor
    divergence: Tensor


class OPSDTerms(NamedTuple):
    """Results of `opsd_decomposition`, each (...) in nats and without gradient: total = the sum of the other two.

    Attributes:
        total: mean over r of KL(P_T^r || P_S), what OPSD's forward KL is in expectation.
        marginal_kl: KL(mean_r P_T^r || P_S), what a student that does not see r can remove.
        mutual_information: I(Y_t; R), >= 0, what it cannot.
    """

    total: Tensor
    marginal_kl: Tensor
    mutual_information: Tensor


class Checked(NamedTuple):
    """Options of `opsd_loss` that checks change: top_k as a number of places, 0 for all; the mask as bool."""

    places: int
    beta: float
    token_clip: float | None
    temperature: float | Tensor
    mask: Tensor | None


def check_opsd_options(logits: Tensor, options: dict[str, Any]) -> Checked:
    """Check the options of `opsd_loss`, before any kernel starts."""
    shape, beta = logits.shape[:-1], options["beta"]
    _check.one_of("divergence", options["divergence"], DIVERGENCES)
    cu_seqlens = _check.cu_seqlens(options["cu_seqlens"], shape, logits)
    _check.one_of("top_k_from", options["top_k_from"], ("student", "teacher"))
    _check.flag("tail", options["tail"])
    _check.per_token("token_weight", options["token_weight"], shape, logits)
    _check.reduction(options["reduction"], options["normalizer"], shape, cu_seqlens, logits)
    in_use = options["divergence"] == "jsd"
    return Checked(
        0 if options["top_k"] is None else _check.integer("top_k", options["top_k"], 0),
        _check.inside_unit_interval("beta", beta) if in_use else _check.real("beta", beta),
        _check.optional_above("token_clip", options["token_clip"], 0),
        _check.temperature(options["temperature"], shape, cu_seqlens, logits),
        _check.mask("mask", options["mask"], shape, logits),
    )


def opsd_loss(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    *,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_k_from: str = "student",
    tail: bool = True,
    token_clip: float | None = None,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> OPSDOutput:
    """Divergence of the student from a teacher over the vocabulary: OPSD, GKD, and SDPO with `top_k`.

    With P_S and P_T the softmax of either's logits / T, per token and with no factor T^2:

    ::

        "forward_kl"   D = KL(P_T || P_S) = sum_v P_T (log P_T - log P_S)
        "reverse_kl"   D = KL(P_S || P_T) = sum_v P_S (log P_S - log P_T)
        "jsd"          D = beta KL(P_T || M) + (1 - beta) KL(P_S || M),   M = beta P_T + (1 - beta) P_S

    The gradients of the student's logits, times T: P_S - P_T; P_S (log P_S - log P_T - D); and
    (1 - beta) P_S (log P_S - log M - KL(P_S || M)). As beta goes to 0 or 1 the JSD goes to 0, not to a KL; divided by
    beta or by 1 - beta it goes to the forward or to the reverse KL.

    A KL takes one sweep over both rows, the JSD and a clipped KL two; backward reads both and writes the gradient: 10
    and 14 bytes per bfloat16 logit. With `top_k` one sweep finds the tokens, one reads both rows, and backward reads
    the student's and writes its gradient: 10 bytes. Without a tail each row is read once, the one that did not choose
    only to see that it is finite, and backward only writes: 6 bytes. (On a GPU finding them takes 16 to 32 kB a token
    for its time; more than 4,096 are found by a sort of float64 rows, some of them at a time.)

    Args:
        student_logits: (..., V) float64, float32, bfloat16 or float16.
        teacher_logits: (..., V), which get no gradient; a logit of -inf, as of a truncated teacher, is probability 0.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: the teacher's weight in the JSD, in (0, 1), as in TRL and Liger, whose 0 and 1 are "forward_kl" and
            "reverse_kl" here. The KLs take no notice of it.
        temperature: T, a number > 0, or a tensor (...), or (...) without time; with `cu_seqlens` (S,).
        top_k: reduce both distributions to the k tokens that `top_k_from` finds most probable, ties by id, and to what
            `tail` says. The tokens are a constant. None or 0, and k >= V, keep all of the vocabulary.
        top_k_from: "student" or "teacher".
        tail: True adds one entry, the probability of all other tokens, summed; False renormalises the k.
        token_clip: c > 0 replaces each entry's part l_v of D = sum_v l_v by min(l_v, c), of the JSD both KLs' parts
            together; entries with l_v > c give no gradient. D may then be negative.
        mask: (...), kept where non-zero (of labels pass ``labels != -100``); masked rows are not read, their
            divergence and gradient are 0.
        token_weight: (...) factor on each token's divergence, as SDPO's clipped importance ratio.
        reduction: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum" or "none".
            Sequences without a kept token count, as 0; a batch without any gives 0.
        normalizer: replaces the token count, the number of sequences, or the 1 of "sum"; under gradient accumulation
            or DDP the global count / world size.
        cu_seqlens: (S + 1,) int32, where packed sequences (N, V) start and end.
        inplace: backward writes the gradient over the student's logits; a second backward, or another consumer that
            saved them, then raises. A teacher in the same memory must be the same logits.
        group, vocab_start: as for `grpo_loss`; two exchanges for the JSD, with `token_clip` and with `top_k`.

    Returns:
        OPSDOutput(loss, divergence): the loss, 0-dim (or (...) for "none"), and D (...), float32 in nats (float64 for
        float64 logits). Where P_S is 0 and P_T is not, the forward KL is +inf and its gradient still P_S - P_T; where
        P_T is 0 and P_S is not, the reverse KL is +inf and its row's gradient NaN. The JSD is always finite. A row of
        either that holds NaN or +inf, or only -inf, gives NaN.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    options = dict(
        divergence=divergence,
        beta=beta,
        temperature=temperature,
        top_k=top_k,
        top_k_from=top_k_from,
        tail=tail,
        token_clip=token_clip,
        mask=mask,
        token_weight=token_weight,
        reduction=reduction,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
    )
    _check.logits("student_logits", student_logits)
    _check.same_logits("teacher_logits", teacher_logits, student_logits)
    _check.inplace(inplace, "student_logits", student_logits)
    places, weight, clip, temperature, mask = check_opsd_options(student_logits, options)
    by_teacher = top_k_from == "teacher"
    shape, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    student, teacher = as_rows(student_logits), as_rows(teacher_logits.detach())
    keep = torch.ones(shape, dtype=torch.bool, device=student.device) if mask is None else mask
    kept_rows = keep.reshape(student.shape[:-1]).contiguous()
    scaling = kernel_temperature(temperature, shape, cu_seqlens)
    shard = shard_of(group, vocab_start, student_logits)
    if shard is not None:
        teacher = pairs.matching_float64(teacher, student)
    if shard is not None and places > 0:
        student, teacher = pairs.reduced(student, teacher, places, by_teacher, tail, kept_rows, scaling, shard, inplace)
    elif 0 < places < vocab:
        ids = top_ids(teacher if by_teacher else student.detach(), kept_rows, places)
        student, teacher, *_ = reduced_rows(student, teacher, ids, by_teacher, tail, kept_rows, *scaling, inplace)
    if places > 0 and (shard is not None or places < vocab):
        scaling, shard, inplace = (1.0, None), None, False  # a row of k + 1 logits, the same on every rank
        if not tail:
            student, teacher = student[..., :places], teacher[..., :places]
    divide = (divergence, weight, math.inf if clip is None else clip)
    if shard is not None:
        values = pairs.divergence(student, teacher, kept_rows, scaling, divide, shard, inplace)
    else:
        values, *_ = row_divergence(student, teacher, kept_rows, *scaling, *divide, inplace=inplace)
    values = values.reshape(shape)
    loss = values if token_weight is None else torch.where(keep, values * token_weight, 0)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    return OPSDOutput(reduce(loss, keep, reduction, normalizer, cu_seqlens).to(dtype), values.to(dtype))


def opsd_decomposition(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (R, ..., V)
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> OPSDTerms:
    """Split OPSD's loss into what a student can remove and what can only leak (RLSD Theorem 1), on samples of r.

    With P_T^r the teacher's distribution when it sees r, over R samples of the privileged information r at the same
    positions, and each distribution the softmax of logits / T:

    ::

        mean_r KL(P_T^r || P_S) = KL(mean_r P_T^r || P_S) + I(Y_t; R)

    I(Y_t; R) = mean_r KL(P_T^r || mean_r P_T^r) does not depend on the student: no student that does not see r gets
    below it. As r's distribution here is that of the R samples, it is at most log R.

    Two sweeps in one launch: 4 (R + 1) bytes per bfloat16 logit of a position, and nothing of size (..., V) is written.

    Args:
        student_logits: (..., V) float64, float32, bfloat16 or float16.
        teacher_logits: (R, ..., V), R >= 1: the same positions under R samples of r.
        temperature: T, a number > 0, or a tensor (...), or (...) without time.
        mask: (...), kept where non-zero; masked rows are not read, their terms are 0.
        group, vocab_start: as for `grpo_loss`, in two exchanges.

    Returns:
        OPSDTerms(total, marginal_kl, mutual_information), each (...), float32 in nats (float64 for float64 logits),
        without gradient. Where P_S is 0 and any P_T^r is not, the first two are +inf. A row of the student or of any
        teacher that holds NaN or +inf, or only -inf, gives NaN.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    _check.logits("student_logits", student_logits)
    _check.samples_of_logits("teacher_logits", teacher_logits, student_logits)
    shape = student_logits.shape[:-1]
    temperature = _check.temperature(temperature, shape, None, student_logits)
    mask = _check.mask("mask", mask, shape, student_logits)
    student = as_rows(student_logits.detach())
    teachers = as_rows(teacher_logits.detach(), samples=True)
    kept_rows = None if mask is None else mask.reshape(student.shape[:-1]).contiguous()
    scaling = kernel_temperature(temperature, shape, None)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    shard = shard_of(group, vocab_start, student_logits)
    if shard is not None:
        every = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
        keep = every if kept_rows is None else kept_rows
        terms = pairs.information(student, pairs.matching_float64(teachers, student), keep, scaling, shard)
    else:
        terms = row_information(student, teachers, kept_rows, *scaling)
    return OPSDTerms(*(x.reshape(shape).to(dtype) for x in terms))


class OPSDLoss(LossModule):
    """`opsd_loss` configured once: keyword options here, tensors (and any other option) at each call."""

    function = staticmethod(opsd_loss)
