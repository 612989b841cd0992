"""SSD (Simple Self-Distillation, arXiv 2604.01193): the loss, its three terms, and temperatures that multiply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from sdkernels import _check
from sdkernels import vocab_parallel_pairs as pairs
from sdkernels.modules import LossModule
from sdkernels.reductions import reduce
from sdkernels.rows.layout import as_rows, at_tokens, kernel_temperature
from sdkernels.rows.pair import pair_statistics
from sdkernels.rows.support import LISTED
from sdkernels.truncation import Filters, Support, checked_filters, rows_support
from sdkernels.vocab_parallel import Shard, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SSDTerms(NamedTuple):
    """Results of `ssd_decomposition`, each (...), in nats but for the last two; all but two are differentiable.

    Attributes:
        support_compression: -log of the student's mass on S, >= 0.
        within_support_reshaping: (1 - T) times the Renyi entropy of p_S; it sharpens for T < 1 and flattens for T > 1.
        base_alignment: T KL(q || p_ST), >= 0.
        constant: T H(q), without gradient.
        cross_entropy: -sum_v q(v) log p(v), the sum of the four.
        kept_mass: the student's mass on S, in [0, 1].
        support_size: |S| int64, of a `Support` the tokens it lists.
    """

    support_compression: Tensor
    within_support_reshaping: Tensor
    base_alignment: Tensor
    constant: Tensor
    cross_entropy: Tensor
    kept_mass: Tensor
    support_size: Tensor


class SSDOutput(NamedTuple):
    """Results of `ssd_loss`: the loss, 0-dim or (...), and the terms of each token."""

    loss: Tensor
    terms: SSDTerms


def ssd_decomposition(
    student_logits: Tensor,  # (..., V)
    base: Tensor | Support,  # (..., V) logits or a Support
    temperature: float | Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    mask: Tensor | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> SSDTerms:
    """Split SSD's expected loss, the cross-entropy to the base's truncated distribution, into its terms (Eq. 4).

    With T the training temperature, q the base's distribution at T on its support S (see `truncated_log_softmax`),
    p the student's at temperature 1, p_S = p renormalised on S, and p_ST proportional to p^(1/T) on S:

    ::

        CE = -sum_v q(v) log p(v)
           = -log sum_{v in S} p(v)       support_compression
           + (1 - T) H_{1/T}(p_S)         within_support_reshaping    (Renyi entropy of order 1/T)
           + T KL(q || p_ST)              base_alignment
           + T H(q)                       constant

    For upstream a, b, c on the first three the student's gradient is a (p - p_S) + b (p_S - p_ST) + c (p_ST - q).

    One sweep finds the base's supports and one reads the student; backward reads the student again and writes its
    gradient: 8 bytes per bfloat16 logit, 6 with a `Support`. Rows with more than 64 tokens in S read the base again in
    each sweep: 12 bytes; with no filter, where no support is sought, 10. On a GPU the search for supports takes 16 to
    32 kB a token for its time, see `truncated_log_softmax`.

    Args:
        student_logits: (..., V) float64, float32, bfloat16 or float16.
        base: (..., V) logits of the base, which get no gradient; or a `Support` of the same temperature, the filters
            then being None.
        temperature: T, a number > 0, or a tensor (...), or (...) without time.
        top_k, top_p, min_p: the filters of `truncated_log_softmax`, on the base.
        mask: (...), kept where non-zero; masked rows are not read, their terms and gradient are 0.
        group, vocab_start: as for `grpo_loss`; ids of a `Support` are global. One exchange, besides those of
            `truncated_log_softmax` for the filters.

    Returns:
        SSDTerms of the three terms, constant, cross_entropy, kept_mass = sum_{v in S} p(v) and support_size = |S|, each
        (...): float32 in nats (float64 for float64 logits), sizes int64. A row of either that holds NaN or +inf, or
        only -inf, and an unmasked empty support, give NaN.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it must be.
    """
    _check.logits("student_logits", student_logits)
    terms, _ = _terms(student_logits, base, temperature, (top_k, top_p, min_p), mask, None, (group, vocab_start))
    return _in_dtype_of(student_logits, terms)


def ssd_loss(
    student_logits: Tensor,  # (..., V)
    base: Tensor | Support,  # (..., V) logits or a Support
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
    inplace: bool = False,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> SSDOutput:
    """SSD's expected loss, -sum_v q(v) log p(v), with a weight on each of its terms.

    ::

        loss_t = a support_compression + b within_support_reshaping + c base_alignment + constant

    With weights (a, b, c) = (1, 1, 1) it is the cross-entropy and its gradient p - q: the exact expectation, over the
    next token, of the paper's loss on sampled tokens, ``-token_log_prob(student_logits, sampled_ids).log_prob``.

    Args:
        student_logits, base, temperature, top_k, top_p, min_p, mask: as for `ssd_decomposition`; with `cu_seqlens` a
            temperature may be (S,).
        weights: (a, b, c) on the first three terms.
        token_weight: (...) factor on each token's loss.
        reduction: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum" or "none".
            Sequences without a kept token count, as 0; a batch without any gives 0.
        normalizer: replaces the token count, the number of sequences, or the 1 of "sum"; under gradient accumulation
            or DDP the global count / world size.
        cu_seqlens: (S + 1,) int32, where packed sequences (N, V) start and end.
        inplace: backward writes the gradient over the student's logits; a second backward, or another consumer that
            saved them, then raises. A base in the same memory must be the same logits.
        group, vocab_start: as for `ssd_decomposition`.

    Returns:
        SSDOutput(loss, terms): the loss, 0-dim (or (...) for "none"), and the SSDTerms of each token.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it must be.
    """
    _check.logits("student_logits", student_logits)
    shape = student_logits.shape[:-1]
    factors = _check.reals("weights", weights, 3)
    cu_seqlens = _check.cu_seqlens(cu_seqlens, shape, student_logits)
    token_weight = _check.per_token("token_weight", token_weight, shape, student_logits)
    _check.reduction(reduction, normalizer, shape, cu_seqlens, student_logits)
    _check.inplace(inplace, "student_logits", student_logits)
    terms, keep = _terms(
        student_logits, base, temperature, (top_k, top_p, min_p), mask, cu_seqlens, (group, vocab_start), inplace
    )
    loss = terms.constant
    for factor, term in zip(factors, terms[:3], strict=True):
        loss = loss + (factor * term if factor != 0 else 0 * term.nan_to_num(0, 0, 0))  # it may be infinite
    if token_weight is not None:
        loss = torch.where(keep, loss * token_weight, 0)
    terms = _in_dtype_of(student_logits, terms)
    return SSDOutput(reduce(loss, keep, reduction, normalizer, cu_seqlens).to(terms.constant.dtype), terms)


def effective_temperature(train_temperature: float, eval_temperature: float) -> float:
    """T_eff = T_train T_eval: temperatures multiply (Lemma B.1).

    A student that fits q exactly and is decoded at T_eval samples from base^(1 / (T_train T_eval)) on S (Prop. B.2).
    """
    product = 1.0
    for name, value in (("train_temperature", train_temperature), ("eval_temperature", eval_temperature)):
        product *= _check.positive(name, value)
    return product


class SSDLoss(LossModule):
    """`ssd_loss` configured once: keyword options here, tensors (and any other option) at each call."""

    function = staticmethod(ssd_loss)

    def __init__(self, temperature: float | Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.options = {"temperature": temperature, **options}


def _in_dtype_of(logits: Tensor, terms: SSDTerms) -> SSDTerms:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return SSDTerms(*(x if x is terms.support_size else x.to(dtype) for x in terms))


def _terms(
    student_logits: Tensor,
    base: Tensor | Support,
    temperature: float | Tensor,
    given: tuple[int | None, float | None, float | None],
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    sharding: tuple[ProcessGroup | None, int | None],
    inplace: bool = False,
) -> tuple[SSDTerms, Tensor]:
    """The terms in float64, and which tokens count."""
    shape = student_logits.shape[:-1]
    temperature = _check.temperature(temperature, shape, cu_seqlens, student_logits)
    mask = _check.mask("mask", mask, shape, student_logits)
    shard = shard_of(*sharding, student_logits)
    filters = checked_filters(*given, student_logits, shard)
    student = as_rows(student_logits)
    keep = torch.ones(shape, dtype=torch.bool, device=student.device) if mask is None else mask
    kept_rows = keep.reshape(student.shape[:-1]).contiguous()
    scaling = kernel_temperature(temperature, shape, cu_seqlens)
    base_rows: Tensor | None = None
    support: tuple[Tensor | None, ...] = (None,) * 4
    found = lists = None
    if isinstance(base, Support):
        token_ids, log_probs = check_sparse_base(base, temperature, filters, keep, cu_seqlens, student_logits, shard)
        ids = token_ids.clamp(-1, 2**31 - 1).int().reshape(*kept_rows.shape, token_ids.shape[-1]).contiguous()
        dtype = torch.promote_types(student.dtype, torch.float32)
        lists = (ids, log_probs.detach().to(dtype).reshape(ids.shape).contiguous())
        support = (None, None, *lists)
    else:
        check_base(base)
        _check.same_logits("base", base, student_logits)
        base_rows = as_rows(base.detach())
        if shard is not None:
            base_rows = pairs.matching_float64(base_rows, student)
        if filters.active:
            found = rows_support(base_rows, kept_rows, scaling, filters, LISTED, shard=shard)
            support = (found.threshold, found.size, found.token_ids, found.log_probs)
    if shard is not None:
        results = pairs.ssd_sums(student, base_rows, kept_rows, scaling, found, lists, shard, inplace)
    else:
        results = pair_statistics(student, base_rows, kept_rows, *scaling, *support, inplace)
    lse, support_lse, tempered_lse, cross, negentropy, size = (x.reshape(shape) for x in results[:6])
    t = _temperature_at_tokens(temperature, shape, cu_seqlens)
    if isinstance(t, Tensor):
        t = t.where(keep, 1)
    terms = SSDTerms(
        support_compression=lse - support_lse,
        within_support_reshaping=support_lse - tempered_lse,
        base_alignment=tempered_lse - cross + t * negentropy,
        constant=-t * negentropy,
        cross_entropy=lse - cross,
        kept_mass=torch.where(keep, (support_lse - lse).exp(), 0),
        support_size=size,
    )
    return terms, keep


def check_base(base: Any) -> None:
    """Refuse a base that is neither a tensor nor a Support."""
    if not isinstance(base, Tensor | Support):
        raise TypeError(f"base must be a torch.Tensor or a Support, got {type(base).__name__}")


def check_sparse_base(
    base: Support,
    temperature: float | Tensor,
    filters: Filters,
    keep: Tensor,
    cu_seqlens: Tensor | None,
    student_logits: Tensor,
    shard: Shard | None = None,
) -> tuple[Tensor, Tensor]:
    """The ids and log-probs of a base that is a Support."""
    if filters.active:
        raise ValueError("a Support as base is truncated already: top_k, top_p and min_p must be None")
    token_ids = _check.support_ids("base.token_ids", base.token_ids, keep.shape, student_logits)
    log_probs = _check.floats("base.log_probs", base.log_probs, student_logits)
    if log_probs.shape != token_ids.shape:
        raise ValueError(f"base.log_probs must have the shape of base.token_ids, {tuple(token_ids.shape)}, "
                         f"got {tuple(log_probs.shape)}")  # fmt: skip
    given = _check.temperature(base.temperature, keep.shape, cu_seqlens, student_logits)
    recorded, wanted = (_temperature_at_tokens(x, keep.shape, cu_seqlens) for x in (given, temperature))
    _check.same_temperature("base.temperature", recorded, wanted, keep)
    if not torch.compiler.is_compiling():
        if shard is None:
            _check.support_id_values("base.token_ids", token_ids, keep, student_logits.shape[-1])
        _check.normalised("base.log_probs", log_probs, token_ids, keep)
    return token_ids, log_probs


def _temperature_at_tokens(temperature: float | Tensor, shape: torch.Size, cu_seqlens: Tensor | None) -> float | Tensor:
    number, values = kernel_temperature(temperature, shape, cu_seqlens)
    return number if values is None else at_tokens(values, shape)
