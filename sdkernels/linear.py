"""The losses from hidden states, the LM head fused in: no tensor of size (tokens, V), and logits kept in float32.

Tokens are taken in chunks. Of each, one matmul makes float32 logits, the same row kernels as for logits read them, and
where the loss is a number its gradient is formed at once: two more matmuls take it to hidden states and weight. That is
3 matmuls of tokens x H x V for a side that gets gradients (2 with a frozen head, 1 for a teacher); 4 where the upstream
gradient is only known in backward: `linear_token_log_prob`, and reduction="none". Student and teacher with the same
head share one. Backward then only multiplies what forward has formed by the upstream gradient. A gradient through
per-token results of a reduced loss (student_log_prob, terms, ...) makes backward form all of it again, 3 more matmuls.

Memory beyond inputs and gradients: a chunk of float32 logits a side, 128 MiB on a CPU and 1.25 GiB on a GPU or what
`chunk_size` says, with `softcap` as much again for the student's gradient, and the gradients of weight and hidden
states in float32 (4 H V and 4 H N bytes) from forward to backward. On a CPU, which has no matmul of 16-bit numbers into
float32, a float32 copy of a 16-bit weight for the time of a call. With a sharded vocabulary a chunk is of 256 tokens on
a CPU and 2,048 on a GPU, so that ranks of unequal shards agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sdkernels import _check
from sdkernels.grpo import GRPOOutput
from sdkernels.linear_call import Call, set_evidence, set_policy
from sdkernels.opsd import OPSDOutput, check_opsd_options
from sdkernels.reductions import over_tokens
from sdkernels.rlsd import RLSDAdvantage, RLSDOutput
from sdkernels.ssd import SSDOutput, SSDTerms, check_base, check_sparse_base
from sdkernels.token_log_prob import TokenLogProb, check_replay
from sdkernels.truncation import Support, checked_filters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_token_log_prob(
    hidden: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...)
    temperature: float | Tensor = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    support: Support | Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> TokenLogProb:
    """`token_log_prob` of z = softcap tanh((hidden @ lm_head_weight.T + bias) logit_scale / softcap).

    One matmul forward; three backward, where the logits are made again: their gradient is not known before.

    Args:
        hidden: (..., H) float64, float32, bfloat16 or float16: the last hidden states. Under autocast hidden states and
            weight are used in its dtype. Logits stay in float32 (float64) from the matmul to the row kernels.
        lm_head_weight: (V, H), and `bias` (V,); a DTensor is gathered (`full_tensor`), and its gradient averaged over
            its mesh. Their gradients are summed in float32.
        token_ids, temperature, top_k, top_p, min_p, support, mask, cu_seqlens: as for `token_log_prob`. Hidden states
            of masked tokens may hold anything.
        softcap: c > 0 caps logits at +-c; None does not. (Two more sweeps over the chunk forward, two backward.)
        logit_scale: multiplies the logits before the cap.
        chunk_size: tokens at a time; None follows from a fixed number of bytes (see this module).
        group, vocab_start: as for `token_log_prob`, for a head sharded over the group: lm_head_weight and bias are this
            rank's rows (of a DTensor, Shard(0) over the group alone, its local ones), hidden states are the same on
            every rank, and so is their gradient, which is all-reduced. One exchange of statistics a chunk; chunks are
            of a fixed number of tokens.

    Returns:
        TokenLogProb(log_prob, entropy), each (...), float32 (float64 for float64), differentiable with respect to
        hidden, weight and bias.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it must be.
    """
    call = Call("hidden", hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size, group, vocab_start)
    cu_seqlens = _check.cu_seqlens(cu_seqlens, call.shape, call.logits)
    call.set_temperature(temperature, cu_seqlens)
    keep = call.set_tokens(token_ids, mask)
    filters = checked_filters(top_k, top_p, min_p, call.logits, call.shard)
    if support is not None:
        ids = check_replay(support, filters, token_ids, keep, call.logits, call.shard)
        call.values["support"] = ids.reshape(-1, ids.shape[-1])
    else:
        call.set_values(**filters.given())
    return TokenLogProb(*call.run("token_log_prob"))


def linear_grpo_loss(
    hidden: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    token_ids: Tensor,  # (...)
    advantages: Tensor,  # (...) or (...) without time
    old_log_prob: Tensor | None = None,  # (...)
    *,
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
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> GRPOOutput:
    """`grpo_loss` from hidden states: 3 matmuls with gradients, 2 with a frozen head, 1 without gradients.

    Args:
        hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size: as for `linear_token_log_prob`.
        Others: as for `grpo_loss`.

    Returns:
        GRPOOutput(loss, log_prob, entropy, ratio), as `grpo_loss`.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it must be.
    """
    call = Call("hidden", hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size, group, vocab_start)
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
        inplace=False,
    )
    keep = set_policy(call, token_ids, advantages, old_log_prob, options)
    return GRPOOutput(*call.run_loss("grpo_loss", keep, reduction, normalizer, cu_seqlens))


def linear_rlsd_loss(
    student_hidden: Tensor,  # (..., H)
    teacher: Tensor,  # (..., H) hidden states or (...) log-probs
    lm_head_weight: Tensor,  # (V, H)
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
    bias: Tensor | None = None,
    teacher_lm_head_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> RLSDOutput:
    """`rlsd_loss` from the hidden states of policy and teacher, or from the teacher's log-probs.

    4 matmuls of tokens x H x V with gradients, one of them for the teacher: made together with the student's where they
    share the head. 3 with the teacher's log-probs, 1 fewer with a frozen head. Delta is that of float32 logits: rounded
    to bfloat16 they would move it by 0.02 to 0.04 nats.

    Args:
        student_hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size: as for `linear_token_log_prob`.
        teacher: hidden states (..., H), or log-probs (...) of `token_ids` at the same temperature. No gradient flows
            to it.
        teacher_lm_head_weight, teacher_bias: the teacher's head; of each None means the student's. `softcap` and
            `logit_scale` are both sides'.
        Others: as for `rlsd_loss`.

    Returns:
        RLSDOutput, as `rlsd_loss`.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it must be.
    """
    call = Call(
        "student_hidden", student_hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size, group, vocab_start
    )
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
        inplace=False,
    )
    keep = set_policy(call, token_ids, advantages, old_log_prob, options)
    set_evidence(call, teacher, teacher_lm_head_weight, teacher_bias, clip_range, lam, apply_to, pessimistic,
                  credit_mask)  # fmt: skip
    call.set_values(evidence_from=_check.one_of("evidence_from", evidence_from, ("current", "old")))
    return RLSDOutput(*call.run_loss("rlsd_loss", keep, reduction, normalizer, cu_seqlens))


def linear_rlsd_token_advantage(
    student_hidden: Tensor,  # (..., H)
    teacher: Tensor,  # (..., H) hidden states or (...) log-probs
    lm_head_weight: Tensor,  # (V, H)
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
    bias: Tensor | None = None,
    teacher_lm_head_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> RLSDAdvantage:
    """`rlsd_token_advantage` from hidden states: 2 matmuls, as one where both share the head; no gradients.

    Args:
        student_hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size: as for `linear_token_log_prob`, but
            detached.
        teacher, teacher_lm_head_weight, teacher_bias: as for `linear_rlsd_loss`.
        Others: as for `rlsd_token_advantage`.

    Returns:
        RLSDAdvantage, as `rlsd_token_advantage`.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it must be.
    """
    call = Call(
        "student_hidden", student_hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size, group, vocab_start
    )
    call.detach()
    cu_seqlens = _check.cu_seqlens(cu_seqlens, call.shape, call.logits)
    _check.per_sequence("advantages", advantages, call.shape, cu_seqlens, call.logits)
    call.set_temperature(temperature, cu_seqlens)
    call.set_tokens(token_ids, mask)
    call.set_values(advantages=over_tokens(advantages, call.shape, cu_seqlens))
    set_evidence(call, teacher, teacher_lm_head_weight, teacher_bias, clip_range, lam, apply_to, pessimistic,
                  credit_mask)  # fmt: skip
    return RLSDAdvantage(*call.run("rlsd_token_advantage"))


def linear_ssd_loss(
    student_hidden: Tensor,  # (..., H)
    base: Tensor | Support,  # (..., H) hidden states or a Support
    lm_head_weight: Tensor,  # (V, H)
    temperature: float | Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    mask: Tensor | None = None,
    token_weight: Tensor | None = None,
    reduction: str = "token-mean",
    normalizer: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    base_lm_head_weight: Tensor | None = None,
    base_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> SSDOutput:
    """`ssd_loss` from hidden states of student and base, or from a recorded `Support` of the base.

    4 matmuls with gradients, one of them for the base; 3 with a `Support`, 1 fewer with a frozen head. (A base with a
    head of its own needs `base_lm_head_weight`: None means the student's.)

    Args:
        student_hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size: as for `linear_token_log_prob`.
        base: hidden states (..., H), or a `Support` of the same temperature, the filters then being None.
        base_lm_head_weight, base_bias: the base's head; of each None means the student's. `softcap` and
            `logit_scale` are both sides'.
        Others: as for `ssd_loss`.

    Returns:
        SSDOutput(loss, terms), as `ssd_loss`.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it must be.
    """
    call = Call(
        "student_hidden", student_hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size, group, vocab_start
    )
    factors = _check.reals("weights", weights, 3)
    cu_seqlens = _check.cu_seqlens(cu_seqlens, call.shape, call.logits)
    token_weight = _check.per_token("token_weight", token_weight, call.shape, call.logits)
    _check.reduction(reduction, normalizer, call.shape, cu_seqlens, call.logits)
    filters = checked_filters(top_k, top_p, min_p, call.logits, call.shard)
    call.set_temperature(temperature, cu_seqlens)
    keep = call.set_tokens(None, mask)
    check_base(base)
    if isinstance(base, Support):
        if base_lm_head_weight is not None or base_bias is not None:
            raise ValueError("base_lm_head_weight and base_bias need a base of hidden states (..., H), got a Support")
        ids, log_probs = check_sparse_base(base, temperature, filters, keep, cu_seqlens, call.logits, call.shard)
        call.values["base_ids"] = ids.reshape(-1, ids.shape[-1])
        call.values["base_log_probs"] = log_probs.detach().reshape(-1, ids.shape[-1])
    else:
        call.set_other("base", base, base_lm_head_weight, base_bias, "base_")
        call.set_values(**filters.given())
    call.set_values(weights=factors, token_weight=token_weight)
    loss, *terms = call.run_loss("ssd_loss", keep, reduction, normalizer, cu_seqlens)
    return SSDOutput(loss, SSDTerms(*terms))


def linear_opsd_loss(
    student_hidden: Tensor,  # (..., H)
    teacher_hidden: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
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
    bias: Tensor | None = None,
    teacher_lm_head_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> OPSDOutput:
    """`opsd_loss` from hidden states: 4 matmuls with gradients, one of them for the teacher; 3 with a frozen head.

    Args:
        student_hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size: as for `linear_token_log_prob`.
        teacher_hidden: (..., H), which gets no gradient.
        teacher_lm_head_weight, teacher_bias: the teacher's head; of each None means the student's. `softcap` and
            `logit_scale` are both sides'.
        Others: as for `opsd_loss`.

    Returns:
        OPSDOutput(loss, divergence), as `opsd_loss`.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    call = Call(
        "student_hidden", student_hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size, group, vocab_start
    )
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
    checked = check_opsd_options(call.logits, options)
    call.set_other("teacher_hidden", teacher_hidden, teacher_lm_head_weight, teacher_bias, "teacher_")
    call.set_temperature(temperature, cu_seqlens)
    keep = call.set_tokens(None, mask)
    call.set_values(
        divergence=divergence,
        beta=checked.beta,
        top_k=checked.places,
        top_k_from=top_k_from,
        tail=tail,
        token_clip=checked.token_clip,
        token_weight=token_weight,
    )
    return OPSDOutput(*call.run_loss("opsd_loss", keep, reduction, normalizer, cu_seqlens))


def linear_truncated_support(
    hidden: Tensor,  # (..., H)
    lm_head_weight: Tensor,  # (V, H)
    temperature: float | Tensor = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    max_size: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_size: int | None = None,
) -> Support:
    """`truncated_support` from hidden states: one matmul, no gradients.

    Args:
        hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size: as for `linear_token_log_prob`; detached.
        Others: as for `truncated_support`.

    Returns:
        Support(token_ids, log_probs, size, temperature), as `truncated_support`.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    call = Call("hidden", hidden, lm_head_weight, bias, softcap, logit_scale, chunk_size)
    call.detach()
    filters = checked_filters(top_k, top_p, min_p, call.logits, call.shard)
    call.set_temperature(temperature, None)
    call.set_tokens(None, mask)
    call.set_values(max_size=_check.integer("max_size", max_size, 1), **filters.given())
    given = temperature.detach() if isinstance(temperature, Tensor) else temperature
    token_ids, log_probs, size = call.run("truncated_support")
    return Support(token_ids, log_probs, size, given)
