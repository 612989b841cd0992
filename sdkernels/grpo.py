"""GRPO's clipped surrogate on the row kernels, with advantages per sequence or per token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sdkernels import _check
from sdkernels.modules import LossModule
from sdkernels.reductions import over_tokens, reduce
from sdkernels.rows.layout import kept_tokens
from sdkernels.token_log_prob import rows_log_probs
from sdkernels.vocab_parallel import shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GRPOOutput(NamedTuple):
    """Results of `grpo_loss`: loss, log_prob and entropy are differentiable."""

    loss: Tensor
    log_prob: Tensor
    entropy: Tensor
    ratio: Tensor


def clipped_surrogate(
    log_prob: Tensor,  # (...), as all tensors here
    old_log_prob: Tensor | None,
    advantages: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    dual_clip: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r) A), at most -c A where A < 0 with dual clip c; and r = exp(log_prob - old_log_prob), detached.

    Where a bound holds strictly the value is the bound's and the gradient 0, even where r overflows. Log-probs that
    agree to the last place of `dtype`, in which they are handed out, are an unmoved policy: for bounds its r is 1.
    """
    old_log_prob = log_prob.detach() if old_log_prob is None else old_log_prob
    impossible = (log_prob == -torch.inf) & (old_log_prob == -torch.inf)  # before and now: r is 1 there too
    log_ratio = (log_prob - old_log_prob).masked_fill(impossible, 0)
    ratio = log_ratio.detach().exp().masked_fill(log_prob.to(dtype) == old_log_prob.to(dtype), 1)
    bound = torch.full_like(ratio, 1 - epsilon_low).masked_fill(advantages > 0, 1 + epsilon_high)
    binds = ((advantages > 0) & (ratio > bound)) | ((advantages < 0) & (ratio < bound))
    if dual_clip is not None:
        binds_above = (advantages < 0) & (ratio > dual_clip)
        bound = bound.masked_fill(binds_above, dual_clip)
        binds = binds | binds_above
    nothing = (advantages == 0) & (ratio >= 0)  # whatever the ratio, unless it is NaN
    bound = bound.masked_fill(nothing, 0)
    free_ratio = log_ratio.masked_fill(binds | nothing, 0).exp()
    return -advantages * torch.where(binds | nothing, bound, free_ratio), ratio


def k3_divergence(log_prob: Tensor, reference_log_prob: Tensor) -> Tensor:
    """exp(d) - d - 1, d = reference_log_prob - log_prob: an unbiased, non-negative estimate of KL(P || reference)."""
    d = reference_log_prob - log_prob
    return torch.where(d == torch.inf, d, d.expm1() - d)


def check_policy_options(
    name: str,
    logits: Tensor,
    token_ids: Tensor,
    old_log_prob: Tensor | None,
    options: dict[str, Any],
) -> None:
    """Check what `grpo_loss` and `rlsd_loss` share, before any kernel starts."""
    _check.logits(name, logits)
    shape = logits.shape[:-1]
    _check.token_ids("token_ids", token_ids, shape, logits)
    cu_seqlens = _check.cu_seqlens(options["cu_seqlens"], shape, logits)
    _check.temperature(options["temperature"], shape, cu_seqlens, logits)
    _check.mask("mask", options["mask"], shape, logits)
    _check.per_token("old_log_prob", old_log_prob, shape, logits)
    _check.per_token("reference_log_prob", options["reference_log_prob"], shape, logits)
    _check.per_token("token_weight", options["token_weight"], shape, logits)
    _check.at_least("epsilon_low", options["epsilon_low"], 0)
    _check.at_least("epsilon_high", options["epsilon_high"], 0)
    _check.optional_above("dual_clip", options["dual_clip"], 1)
    if _check.at_least("beta", options["beta"], 0) > 0 and options["reference_log_prob"] is None:
        raise ValueError(f"beta={options['beta']} needs reference_log_prob, got None")
    _check.reduction(options["reduction"], options["normalizer"], shape, cu_seqlens, logits)
    _check.inplace(options["inplace"], name, logits)


def policy_loss(
    log_prob: Tensor,  # (...)
    advantages: Tensor,  # (...)
    old_log_prob: Tensor | None,  # (...)
    keep: Tensor,  # (...) bool
    options: dict[str, Any],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The reduced loss and the ratio, from per-token log-probs: GRPO's token math."""
    old, reference, token_weight = (
        None if x is None else x.to(log_prob.dtype)
        for x in (old_log_prob, options["reference_log_prob"], options["token_weight"])
    )
    loss, ratio = clipped_surrogate(
        log_prob, old, advantages, options["epsilon_low"], options["epsilon_high"], options["dual_clip"], dtype
    )
    if token_weight is not None:
        loss = loss * token_weight
    if options["beta"] > 0 and reference is not None:
        loss = loss + options["beta"] * k3_divergence(log_prob, reference)
    loss = torch.where(keep, loss, 0)
    reduced = reduce(loss, keep, options["reduction"], options["normalizer"], options["cu_seqlens"])
    return reduced, torch.where(keep, ratio, 0)


def grpo_loss(
    logits: Tensor,  # (..., V)
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
    inplace: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> GRPOOutput:
    """GRPO's clipped policy loss, with per-token or per-sequence advantages.

    ::

        loss_t = -min(r_t A_t, clip(r_t, 1 - epsilon_low, 1 + epsilon_high) A_t) token_weight_t
                 + beta (exp(d_t) - d_t - 1)
        r_t = exp(log P(y_t) - old_log_prob_t),   d_t = reference_log_prob_t - log P(y_t)

    Its gradient is zero iff (A > 0 and r > 1 + epsilon_high), (A < 0 and r < 1 - epsilon_low), or the dual clip binds.

    Forward reads each row of logits once; backward reads it again and writes one gradient, nothing else of size V:
    6 bytes per bfloat16 logit in all, 12 per float32 logit. Rows whose gradient is 0 are written, not read.

    Args:
        logits: (..., V) of the policy; the last leading dimension is time.
        token_ids: (...) int32 or int64, the sampled tokens; -100 masks a token.
        advantages: (...) per token, (...) without time per sequence, or (S,) with `cu_seqlens`.
        old_log_prob: (...) log-probs under the policy that sampled, of the whole softmax at `temperature`, as
            `token_log_prob` without filters gives them; None means the current one, r = 1 with gradient.
        epsilon_low, epsilon_high: the ratio's clip range.
        dual_clip: c > 1 bounds the loss by -c A_t where A_t < 0.
        reference_log_prob, beta: weight of the k3 estimate of KL(P || reference), which token_weight does not touch.
        temperature: the sampling temperature; a number, or a tensor like `advantages`.
        mask: (...), kept where non-zero; a masked token's logits are not read, its results and gradient are 0.
        token_weight: (...) factor on each token's surrogate, e.g. truncated importance weights.
        reduction: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum" or "none".
            Sequences without a kept token count, as 0; a batch without any gives 0.
        normalizer: replaces the token count, the number of sequences, or the 1 of "sum"; under gradient accumulation
            or DDP the global count / world size. (dr_grpo is "sum" with normalizer B * L.)
        cu_seqlens: (S + 1,) int32, where packed sequences (N, V) start and end.
        inplace: backward writes the gradient over the logits' memory; a second backward, or another consumer that
            saved the logits, then raises.
        group: a process group over which the vocabulary is sharded in rank order: logits are (..., V_r), ids global,
            and results those of the whole rows, the same on every rank, for one exchange of statistics. The upstream
            gradient must be the same on every rank.
        vocab_start: this rank's first global id; None means equal shards.

    Returns:
        GRPOOutput(loss, log_prob, entropy, ratio): the loss, 0-dim (or (...) for "none"), and per-token (...) float32
        (float64 for float64 logits). loss, log_prob and entropy are differentiable with respect to the logits.

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
    check_policy_options("logits", logits, token_ids, old_log_prob, options)
    _check.per_sequence("advantages", advantages, token_ids.shape, cu_seqlens, logits)
    keep = kept_tokens(token_ids, mask)
    shard = shard_of(group, vocab_start, logits)
    ((log_prob, entropy),) = rows_log_probs((logits,), token_ids, temperature, keep, cu_seqlens, inplace, shard)
    per_token = over_tokens(advantages.to(log_prob.dtype), token_ids.shape, cu_seqlens)
    loss, ratio = policy_loss(log_prob, per_token, old_log_prob, keep, options, entropy.dtype)
    return GRPOOutput(*(x.to(entropy.dtype) for x in (loss, log_prob, entropy, ratio)))


class GRPOLoss(LossModule):
    """`grpo_loss` configured once: keyword options here, tensors (and any other option) at each call."""

    function = staticmethod(grpo_loss)
