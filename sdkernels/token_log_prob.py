"""The log-probability of chosen tokens and the entropy of their distributions, straight from the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sdkernels import _check, vocab_parallel
from sdkernels.rows.layout import RowSupport, as_rows, at_tokens, check_temperatures, kept_tokens, kernel_temperature
from sdkernels.rows.statistics import check_values, row_statistics
from sdkernels.rows.support import LISTED
from sdkernels.rows.truncated import truncated_token_log_prob
from sdkernels.truncation import Filters, Support, checked_filters, rows_support
from sdkernels.vocab_parallel import Shard, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TokenLogProb(NamedTuple):
    """Results of `token_log_prob`, each (...)."""

    log_prob: Tensor
    entropy: Tensor


def token_log_prob(
    logits: Tensor,  # (..., V)
    token_ids: Tensor,  # (...)
    temperature: float | Tensor = 1.0,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    support: Support | Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
) -> TokenLogProb:
    """log q at the chosen tokens and the entropy of q, where q is softmax(logits / temperature), truncated if asked.

    Both are differentiable: the logits' gradient for upstream a and b is (a (onehot - q) - b q (log q + H)) / T on the
    support of q, and 0 elsewhere.

    The forward pass reads each row once and writes nothing of size V; backward reads it again and writes the gradient:
    in bfloat16 2 bytes per logit forward, 4 backward. A truncated row whose support has at most 64 tokens is not read
    again, and replaying a `support` reads its tokens only: 2 bytes backward. On a GPU the search for supports takes 16
    to 32 kB a token for its time, see `truncated_log_softmax`. Rows are read through their strides, so views cost
    nothing here. (Autograd of a slice like ``logits[:, :-1]`` still fills a zero gradient of its own: to save it, pass
    all logits with shifted ids, the last position masked.)

    Args:
        logits: (..., V) float64, float32, bfloat16 or float16.
        token_ids: (...) int32 or int64 in [0, V); -100 masks a token.
        temperature: divides the logits; a number > 0, or a tensor (...), or (...) without time, or (S,) with
            `cu_seqlens`.
        top_k, top_p, min_p: the filters of `truncated_log_softmax`; a token that they drop has log-prob -inf and
            gradient 0.
        support: replays a given set in place of the filters: a `Support`, of which only the ids are used, or ids
            (..., K), distinct, -1 for none, as inference engines record them. The chosen token is always counted in.
            Ids that were cut (``support.size > K``) replay another distribution.
        mask: (...), kept where non-zero. A masked token's logits are not read, its results and gradient are 0.
        cu_seqlens: (S + 1,) int32, where packed sequences start and end.
        group: a process group over which the vocabulary is sharded in rank order: logits are (..., V_r), ids global,
            and results those of the whole rows, the same on every rank. One exchange of statistics, or of the logits of
            `support`; filters add those of `truncated_log_softmax`.
        vocab_start: this rank's first global id; None means equal shards.

    Returns:
        TokenLogProb(log_prob, entropy), each (...), in nats, float32 (float64 for float64 logits). A token whose logit
        is -inf has log-prob -inf and gives no gradient; a row that holds NaN or +inf, or only -inf, gives NaN.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
        IndexError: an id outside [0, V), on the CPU, and on a GPU where SDKERNELS_VALIDATE=1; otherwise NaN there.
    """
    _check.logits("logits", logits)
    shape = logits.shape[:-1]
    _check.token_ids("token_ids", token_ids, shape, logits)
    cu_seqlens = _check.cu_seqlens(cu_seqlens, shape, logits)
    mask = _check.mask("mask", mask, shape, logits)
    temperature = _check.temperature(temperature, shape, cu_seqlens, logits)
    shard = shard_of(group, vocab_start, logits)
    filters = checked_filters(top_k, top_p, min_p, logits, shard)
    if support is not None:
        log_prob, entropy = _replayed_log_prob(
            logits, token_ids, temperature, support, filters, mask, cu_seqlens, shard
        )
    elif filters.active:
        log_prob, entropy = _truncated_log_prob(logits, token_ids, temperature, filters, mask, cu_seqlens, shard)
    else:
        ((log_prob, entropy),) = rows_log_probs((logits,), token_ids, temperature, mask, cu_seqlens, shard=shard)
    return TokenLogProb(log_prob.to(entropy.dtype), entropy)


def rows_log_probs(
    sides: Sequence[Tensor],  # one or two of (..., V)
    token_ids: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    inplace: bool = False,
    shard: Shard | None = None,
) -> list[TokenLogProb]:
    """`token_log_prob` of checked arguments, log-prob in float64; only the first side's may be differentiated.

    With `inplace` backward overwrites its logits.
    """
    shape, scaling = token_ids.shape, kernel_temperature(temperature, token_ids.shape, cu_seqlens)
    rows = [as_rows(side) for side in sides]
    ids = token_ids.reshape(rows[0].shape[:-1]).contiguous()
    kept = None if mask is None else mask.reshape(ids.shape).contiguous()
    if shard is not None:
        found = vocab_parallel.log_probs(rows, ids, kept_tokens(ids, kept), scaling, shard, inplace)
    else:
        found = [row_statistics(x, ids, kept, *scaling, inplace and not i)[:2] for i, x in enumerate(rows)]
    return [TokenLogProb(log_prob.reshape(shape), entropy.reshape(shape)) for log_prob, entropy in found]


def _truncated_log_prob(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    filters: Filters,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shard: Shard | None,
) -> TokenLogProb:
    rows = as_rows(logits)
    keep = kept_tokens(token_ids, mask).reshape(rows.shape[:-1]).contiguous()
    ids = token_ids.reshape(keep.shape).contiguous()
    scaling = kernel_temperature(temperature, token_ids.shape, cu_seqlens)
    if shard is not None:
        found = rows_support(rows, keep, scaling, filters, 0, shard=shard)
        label = vocab_parallel.labels_of(rows, ids, keep, shard)
        log_prob, entropy = vocab_parallel.truncated_log_prob(rows, ids, label, keep, scaling, found, found, shard)
    else:
        support = rows_support(rows, keep, scaling, filters, LISTED)
        log_prob, entropy = truncated_token_log_prob(rows, ids, keep, *scaling, *support)
    return TokenLogProb(log_prob.reshape(token_ids.shape), entropy.reshape(token_ids.shape))


def _replayed_log_prob(
    logits: Tensor,
    token_ids: Tensor,
    temperature: float | Tensor,
    support: Support | Tensor,
    filters: Filters,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    shard: Shard | None,
) -> TokenLogProb:
    """On K + 1 gathered logits of each row; the rest of it is not read."""
    rows = as_rows(logits)
    keep = kept_tokens(token_ids, mask)
    ids = check_replay(support, filters, token_ids, keep, logits, shard)
    keep = keep.reshape(rows.shape[:-1]).contiguous()
    labels, ids = token_ids.reshape(keep.shape).contiguous(), ids.reshape(*keep.shape, ids.shape[-1])
    scaling = kernel_temperature(temperature, token_ids.shape, cu_seqlens)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    inside = (labels.unsqueeze(-1) == ids) & (ids != -1)
    places = torch.cat((ids, labels.unsqueeze(-1)), -1).long()
    live = torch.cat((ids != -1, ~inside.any(-1, keepdim=True)), -1) & keep.unsqueeze(-1)
    if shard is not None:
        check_temperatures(scaling[1], keep, rows)
        z = vocab_parallel.logits_at(rows, places, keep, shard)
        found = _support_of(z.where(live, -torch.inf), places, keep, scaling, dtype)
        log_prob, entropy = vocab_parallel.truncated_log_prob(
            rows, labels, z[..., -1], keep, scaling, found, vocab_parallel.local_lists(found, shard), shard
        )
    else:
        if not torch.compiler.is_compiling():
            check_values(rows, labels, keep, scaling[1])
        exists = (places >= 0) & (places < rows.shape[-1])
        z = rows.detach().gather(-1, places.where(live & exists, 0)).double().where(exists, torch.nan)
        found = _support_of(z.where(live, -torch.inf), places, keep, scaling, dtype)
        log_prob, entropy = truncated_token_log_prob(rows, labels, keep, *scaling, *found)
    return TokenLogProb(log_prob.reshape(token_ids.shape), entropy.reshape(token_ids.shape))


def check_replay(
    support: Support | Tensor, filters: Filters, token_ids: Tensor, keep: Tensor, logits: Tensor,
    shard: Shard | None = None,
) -> Tensor:  # fmt: skip
    """The ids (..., K) of a support to replay."""
    if filters.active:
        raise ValueError("support replaces top_k, top_p and min_p: they must be None")
    if not isinstance(support, Support | Tensor):
        raise TypeError(f"support must be a Support or a torch.Tensor, got {type(support).__name__}")
    ids = support.token_ids if isinstance(support, Support) else support
    ids = _check.support_ids("support", ids, token_ids.shape, logits)
    if shard is None and not torch.compiler.is_compiling():
        _check.support_id_values("support", ids, keep, logits.shape[-1])
    return ids


def _support_of(
    z: Tensor, places: Tensor, keep: Tensor, scaling: tuple[float, Tensor | None], dtype: torch.dtype
) -> RowSupport:
    """Listed logits (..., K), float64, -inf for none, and their ids as a support; one that is NaN makes it invalid."""
    number, temperatures = scaling
    t = number if temperatures is None else at_tokens(temperatures, keep.shape).where(keep, 1).unsqueeze(-1)
    live = z != -torch.inf
    m = z.amax(-1, keepdim=True)
    y = (z - m) / t
    log_sum = y.exp().sum(-1, keepdim=True).log()
    log_q = y - log_sum
    entropy = -(log_q.exp() * log_q).where(live, 0).sum(-1)
    invalid = torch.where(keep & ~m[..., 0].isfinite(), torch.nan, 0.0)
    first = live.to(torch.int8).argsort(dim=-1, descending=True, stable=True)  # a list has no gaps
    return RowSupport(
        torch.full_like(m[..., 0], torch.finfo(dtype).min).to(dtype) + invalid.to(dtype),
        live.sum(-1).where(keep & (invalid == 0), 0),
        torch.where(keep, m[..., 0], 0).to(dtype),
        torch.where(keep, log_sum[..., 0], 0) + invalid,
        torch.where(keep, entropy, 0).to(dtype) + invalid.to(dtype),
        places.where(live, -1).gather(-1, first).int(),
        log_q.where(live, -torch.inf).gather(-1, first).to(dtype),
    )
