"""RLSD (Self-Distilled RLVR, arXiv 2604.03128): the reward directs each update, a privileged teacher sizes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sdkernels import _check
from sdkernels.evidence import Weighing, checked_weighing, evidence_advantage
from sdkernels.grpo import GRPOOutput, check_policy_options, policy_loss
from sdkernels.modules import LossModule
from sdkernels.reductions import over_tokens
from sdkernels.rows import evidence as rows_evidence
from sdkernels.rows.layout import as_rows, kept_tokens, kernel_temperature, kernel_values
from sdkernels.token_log_prob import rows_log_probs
from sdkernels.vocab_parallel import Shard, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RLSDAdvantage(NamedTuple):
    """Results of `rlsd_token_advantage`, each (...), without gradient."""

    advantage: Tensor
    weight: Tensor
    information_gain: Tensor
    student_log_prob: Tensor
    teacher_log_prob: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor


class RLSDOutput(NamedTuple):
    """Results of `rlsd_loss`: loss, student_log_prob and student_entropy are differentiable."""

    loss: Tensor
    advantage: Tensor
    weight: Tensor
    information_gain: Tensor
    student_log_prob: Tensor
    teacher_log_prob: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    ratio: Tensor


def _check_teacher(teacher: Any, student_logits: Tensor) -> bool:
    """Check the teacher; whether it is logits (else log-probs)."""
    _check.floats("teacher", teacher, student_logits)
    if teacher.shape not in (student_logits.shape, student_logits.shape[:-1]):
        raise ValueError(
            f"teacher must be logits of the student's shape {tuple(student_logits.shape)} or log-probs of shape "
            f"{tuple(student_logits.shape[:-1])}, got {tuple(teacher.shape)}"
        )
    return teacher.dim() == student_logits.dim()


def rlsd_token_advantage(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor,  # (..., V) logits or (...) log-probs
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...) or (...) without time
    *,
    clip_range: float | tuple[float, float] = 0.2,
    lam: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    credit_mask: Tensor | None = None,
    apply_to: str = "all",
    pessimistic: bool = False,
    cu_seqlens: Tensor | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> RLSDAdvantage:
    """Token advantages weighted by a privileged teacher's evidence ratio, from the logits, in one launch.

    ::

        Delta_t = log P_T(y_t) - log P_S(y_t)                           (Eq. 13, information_gain)
        w_t     = exp(sign(A) Delta_t) = (P_T / P_S)^sign(A)            (Eq. 14, weight)
        A_t     = A ((1 - lam) + lam clip(w_t, 1 - below, 1 + above))   (Eq. 15, advantage)

    The student is the policy on the prompt, the teacher the same network on the prompt and privileged information;
    both score the same response tokens. The reward fixes the sign of A_t, the teacher only its size.

    Reads each row of each logits tensor once (2 + 2 bytes per bfloat16 logit) and writes seven numbers per token; with
    teacher log-probs only the student's rows are read. bfloat16 logits alone perturb Delta by 0.02 to 0.04 nats, which
    flips its sign on one token in ten or more: keep logits in float32 where you can.

    Args:
        student_logits: (..., V); the last leading dimension is time. Detached here.
        teacher: logits (..., V), or log-probs (...) of `token_ids` at the same temperature (teacher_entropy is then 0).
        token_ids: (...) int32 or int64, the sampled tokens; -100 masks a token.
        advantages: (...) per token, (...) without time per sequence, or (S,) with `cu_seqlens`. Where A = 0, w = 1.
        clip_range: eps_w, or a pair (below, above); inf means no clip on that side.
        lam: share of the weighted advantage, in [0, 1]; 0 gives A_t = A.
        temperature: divides both logits; a number > 0, or a tensor like `advantages`.
        mask: (...), kept where non-zero; a masked token's logits are not read, its results are 0.
        credit_mask: (...); tokens where it is 0 keep A_t = A, as do, for `apply_to` "negative" or "positive", tokens
            whose own advantage has another sign, whatever the rest of the sequence has.
        pessimistic: min(w A, clip(w) A) in place of clip(w) A (Eq. 16).
        cu_seqlens: (S + 1,) int32, where packed sequences (N, V) start and end.
        group, vocab_start: as for `grpo_loss`; of both sides' logits.

    Returns:
        RLSDAdvantage(advantage, weight, information_gain, student_log_prob, teacher_log_prob, student_entropy,
        teacher_entropy), each (...), float32 (float64 for float64 logits), without gradient.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        IndexError: an id outside [0, V), on the CPU, and on a GPU where SDKERNELS_VALIDATE=1; otherwise NaN there.
    """
    _check.logits("student_logits", student_logits)
    dense = _check_teacher(teacher, student_logits)
    shape = student_logits.shape[:-1]
    _check.token_ids("token_ids", token_ids, shape, student_logits)
    cu_seqlens = _check.cu_seqlens(cu_seqlens, shape, student_logits)
    _check.per_sequence("advantages", advantages, shape, cu_seqlens, student_logits)
    temperature = _check.temperature(temperature, shape, cu_seqlens, student_logits)
    mask = _check.mask("mask", mask, shape, student_logits)
    credit_mask = _check.mask("credit_mask", credit_mask, shape, student_logits)
    weighing = checked_weighing(clip_range, lam, apply_to, pessimistic)
    shard = shard_of(group, vocab_start, student_logits)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    if shard is not None:
        options = dict(temperature=temperature, mask=mask, cu_seqlens=cu_seqlens)
        return _sharded_advantage(
            student_logits.detach(),
            teacher.detach(),
            token_ids,
            advantages.detach(),
            credit_mask,
            weighing,
            shard,
            options,
        )
    student_rows = as_rows(student_logits.detach())
    leading = student_rows.shape[:-1]
    teacher = teacher.detach()
    number, temperatures = kernel_temperature(temperature, shape, cu_seqlens)
    results = rows_evidence.rlsd_token_advantage(
        student_rows,
        as_rows(teacher) if dense else teacher.to(dtype).reshape(leading).contiguous(),
        token_ids.reshape(leading).contiguous(),
        kernel_values(advantages.detach().to(dtype), shape, cu_seqlens),
        None if mask is None else mask.reshape(leading).contiguous(),
        None if credit_mask is None else credit_mask.reshape(leading).contiguous(),
        number,
        temperatures,
        *weighing,
    )
    return RLSDAdvantage(*(x.reshape(shape) for x in results))


def _sharded_advantage(
    student_logits: Tensor, teacher: Tensor, token_ids: Tensor, advantages: Tensor, credit_mask: Tensor | None,
    weighing: Weighing, shard: Shard, options: dict[str, Any],
) -> RLSDAdvantage:  # fmt: skip
    """`rlsd_token_advantage` of shards: no launch can end with the token math, the exchange is between."""
    keep = kept_tokens(token_ids, options["mask"])
    dense = teacher.dim() == student_logits.dim()
    sides = (student_logits, teacher) if dense else (student_logits,)
    (student_log_prob, student_entropy), *others = rows_log_probs(sides, token_ids, **options, shard=shard)
    if others:
        ((teacher_log_prob, teacher_entropy),) = others
    else:
        teacher_log_prob, teacher_entropy = torch.where(keep, teacher.double(), 0), torch.zeros_like(student_entropy)
    tokens = over_tokens(advantages.double(), token_ids.shape, options["cu_seqlens"])
    evidence = evidence_advantage(student_log_prob, teacher_log_prob, tokens, keep, credit_mask, weighing)
    results = (*evidence, student_log_prob, teacher_log_prob, student_entropy, teacher_entropy)
    return RLSDAdvantage(*(x.to(student_entropy.dtype) for x in results))


def rlsd_loss(
    student_logits: Tensor,  # (..., V)
    teacher: Tensor,  # (..., V) logits or (...) log-probs
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...) or (...) without time
    old_log_prob: Tensor | None = None,  # (...)
    *,
    clip_range: float | tuple[float, float] = 0.2,
    lam: float = 1.0,
    apply_to: str = "all",
    pessimistic: bool = False,
    credit_mask: Tensor | None = None,
    evidence_from: str = "current",
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    dual_clip: float | None = None,
    reference_log_prob: Tensor | None = None,
    beta: float = 0.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> RLSDOutput:
    """RLSD's policy loss: GRPO's clipped surrogate on advantages weighted by a privileged teacher's evidence ratio.

    ::

        loss_t = -min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t) token_weight_t
                 + beta (exp(d_t) - d_t - 1)

    with A_t of `rlsd_token_advantage` (Eq. 13-16), a constant, and r_t, d_t, options and reductions of `grpo_loss`. The
    logits' gradient is that of `grpo_loss`: -(A_t r_t token_weight_t) (onehot - p) / T where no clip binds.

    Forward reads each row of the student and of the teacher once; backward reads the student's again and writes one
    gradient: 8 bytes per bfloat16 logit in all, 16 per float32 logit. With teacher log-probs the teacher costs nothing.
    Nothing else of size V is allocated; with `inplace` not even the gradient.

    Args:
        student_logits: (..., V) of the policy; the last leading dimension is time.
        teacher: logits (..., V), or log-probs (...) of `token_ids` at the same temperature. No gradient flows to it.
        evidence_from: Delta's student side is the "current" log-prob, detached (the authors' code), or the "old" one
            (`old_log_prob`; None means old = current), fixed once per rollout as ms-swift does.
        Others: see `rlsd_token_advantage` and `grpo_loss`.

    Returns:
        RLSDOutput(loss, advantage, weight, information_gain, student_log_prob, teacher_log_prob, student_entropy,
        teacher_entropy, ratio): the loss, 0-dim (or (...) for reduction="none"), and per-token (...) float32 (float64
        for float64 logits). loss, student_log_prob and student_entropy are differentiable.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it must be.
    """
    options = dict(
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        dual_clip=dual_clip,
        reference_log_prob=reference_log_prob,
        beta=beta,
        temperature=temperature,
        mask=mask,
        token_weight=token_weight,
        reduction=reduction,
        normalizer=normalizer,
        cu_seqlens=cu_seqlens,
        inplace=inplace,
    )
    check_policy_options("student_logits", student_logits, token_ids, old_log_prob, options)
    dense = _check_teacher(teacher, student_logits)
    shape = token_ids.shape
    _check.per_sequence("advantages", advantages, shape, cu_seqlens, student_logits)
    _check.one_of("evidence_from", evidence_from, ("current", "old"))
    credit_mask = _check.mask("credit_mask", credit_mask, shape, student_logits)
    weighing = checked_weighing(clip_range, lam, apply_to, pessimistic)
    keep = kept_tokens(token_ids, mask)
    sides = (student_logits, teacher.detach()) if dense else (student_logits,)
    shard = shard_of(group, vocab_start, student_logits)
    (student_log_prob, student_entropy), *others = rows_log_probs(
        sides, token_ids, temperature, keep, cu_seqlens, inplace, shard
    )
    if others:
        ((teacher_log_prob, teacher_entropy),) = others
    else:
        teacher_log_prob, teacher_entropy = torch.where(keep, teacher.double(), 0), torch.zeros_like(student_entropy)
    own = old_log_prob if evidence_from == "old" and old_log_prob is not None else student_log_prob.detach()
    dtype = student_entropy.dtype
    tokens = over_tokens(advantages.double(), shape, cu_seqlens)
    evidence = evidence_advantage(own.double(), teacher_log_prob, tokens, keep, credit_mask, weighing)
    loss, ratio = policy_loss(student_log_prob, evidence.advantage, old_log_prob, keep, options, dtype)
    statistics = (student_log_prob, teacher_log_prob, student_entropy, teacher_entropy)
    return RLSDOutput(*(x.to(dtype) for x in (loss, *evidence, *statistics, ratio)))


def lambda_schedule(step: int, *, peak: float = 0.5, warmup_steps: int = 0, decay_steps: int = 0) -> float:
    """The mixing weight lam at a step: linear from 0 to `peak` over `warmup_steps`, then to 0 over `decay_steps`.

    With 0 decay steps it stays at `peak`. The paper decays 0.5 to 0 over the first 50 steps.

    Raises:
        ValueError: a negative step or length, or a peak outside [0, 1].
    """
    _check.at_least("step", step, 0)
    _check.unit_interval("peak", peak)
    _check.at_least("warmup_steps", warmup_steps, 0)
    _check.at_least("decay_steps", decay_steps, 0)
    if step < warmup_steps:
        return peak * step / warmup_steps
    if decay_steps == 0:
        return float(peak)
    return peak * max(1.0 - (step - warmup_steps) / decay_steps, 0.0)


def rlsd_metrics(
    output: RLSDOutput | GRPOOutput,
    mask: Tensor | None = None,
    *,
    clip_range: float | tuple[float, float] = 0.2,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
) -> dict[str, Tensor]:
    """What to log of an `rlsd_loss`: 0-dim tensors, means over the tokens where `mask` is non-zero (None: all of them).

    Of a `grpo_loss`, the keys that do not speak of a teacher.

    Keys: ``evidence_clipped_below`` and ``evidence_clipped_above``, the shares of tokens with w < 1 - below and
    w > 1 + above (the paper's clip ratio, 3 to 6%); ``ratio_clipped_below`` and ``ratio_clipped_above``, those with
    r < 1 - epsilon_low and r > 1 + epsilon_high; ``information_gain_abs``, mean |Delta| in nats; ``entropy``, the
    student's, in nats; ``approx_kl``, the mean of r - 1 - log r, an estimate of KL(old || current). No host sync.

    Pass the mask that the loss had (with ``token_ids != -100``): a masked token's results are all 0.
    """
    if not isinstance(output, RLSDOutput | GRPOOutput):
        raise TypeError(f"output must be an RLSDOutput or a GRPOOutput, got {type(output).__name__}")
    below, above = _check.clip_range(clip_range)
    _check.at_least("epsilon_low", epsilon_low, 0)
    _check.at_least("epsilon_high", epsilon_high, 0)
    ratio = output.ratio
    mask = _check.mask("mask", mask, ratio.shape, ratio)
    keep = torch.ones_like(ratio, dtype=torch.bool) if mask is None else mask
    count = keep.sum().clamp(min=1)
    per_token = {
        "ratio_clipped_below": ratio < 1 - epsilon_low,
        "ratio_clipped_above": ratio > 1 + epsilon_high,
        "entropy": (output.entropy if isinstance(output, GRPOOutput) else output.student_entropy).detach(),
        "approx_kl": torch.where(ratio == torch.inf, ratio, ratio - 1 - ratio.log()),
    }
    if isinstance(output, RLSDOutput):
        per_token |= {
            "evidence_clipped_below": output.weight < 1 - below,
            "evidence_clipped_above": output.weight > 1 + above,
            "information_gain_abs": output.information_gain.abs(),
        }
    return {name: torch.where(keep, value, 0).sum(dtype=ratio.dtype) / count for name, value in per_token.items()}


class RLSDLoss(LossModule):
    """`rlsd_loss` configured once: keyword options here, tensors (and any other option, such as lam) at each call."""

    function = staticmethod(rlsd_loss)
