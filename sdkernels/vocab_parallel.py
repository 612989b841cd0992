"""A vocabulary sharded over the ranks of a group: local row statistics, one exchange, statistics of the whole rows.

Each rank calls the row operators on its shard. What they find is gathered on all ranks and merged in rank order, so
every rank gets the same bits. Gradients then need no exchange: a shard's follows from the whole row's statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sdkernels import _check
from sdkernels.first_order import first_order
from sdkernels.reference.rows import rounded_up
from sdkernels.rows.gradient import row_gradient
from sdkernels.rows.layout import RowSupport, as_rows, at_tokens
from sdkernels.rows.masses import row_masses
from sdkernels.rows.statistics import row_statistics
from sdkernels.rows.truncated import token_gradient
from sdkernels.rows.truncated import truncated_log_softmax as rows_log_softmax
from sdkernels.rows.truncated_gradient import truncated_gradient

PIVOTS = 31  # a round of the threshold search tells 32 parts of what is left: 7 rounds for float32, 4 for 16 bits
Scaling = tuple[float, Tensor | None]


class Shard(NamedTuple):
    """This rank's part of the vocabulary: global ids from `start` on, as many as its logits have columns."""

    group: dist.ProcessGroup
    start: int
    size: int

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Global ids as this shard's, `size` where they are another's, and which are its own."""
        inside = (ids >= self.start) & (ids < self.start + self.size)
        return torch.where(inside, ids - self.start, self.size), inside

    def logits(self, rows: Tensor, ids: Tensor) -> Tensor:
        """The logits (..., K) of global ids (..., K), float64, NaN where they are another's."""
        places, inside = self.local(ids)
        return rows.detach().gather(-1, places.where(inside, 0).long()).double().where(inside, torch.nan)


def is_group(group: Any) -> dist.ProcessGroup:
    """Refuse anything but a process group."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    return group


def shard_of(group: Any, vocab_start: Any, logits: Tensor) -> Shard | None:
    """The checked shard of logits (..., V_r), or None without a group."""
    if group is None:
        if vocab_start is not None:
            raise ValueError(f"vocab_start={vocab_start!r} needs a group, got None")
        return None
    is_group(group)
    size = logits.shape[-1]
    start = group.rank() * size if vocab_start is None else _check.integer("vocab_start", vocab_start, 0)
    return Shard(group, start, size)


def exchange(shard: Shard, columns: Sequence[Tensor], check: Callable[[int], None] | None = None) -> Tensor:
    """Per-token columns (...) of all ranks, (columns, ranks, ...) float64.

    Where values may be read, on all ranks or on none, so are the shards' places, and `check` is told the size of the
    whole vocabulary.
    """
    mine = torch.stack([x.detach().double() for x in columns])
    sent, checked = mine.reshape(-1), _check.values_are_checked(mine)
    if checked:  # elsewhere these two numbers would be copied to the device for nothing, which waits for it
        sent = torch.cat((sent, sent.new_tensor([shard.start, shard.size])))
    received = sent.new_empty((shard.group.size(), len(sent)))
    if len(sent) > 0:
        dist.all_gather(list(received.unbind(0)), sent, group=shard.group)
    if checked:
        starts, sizes = received[:, -2].tolist(), received[:, -1].tolist()
        if any(start != sum(sizes[:rank]) for rank, start in enumerate(starts)):
            raise ValueError(f"vocab_start must make shards cover the vocabulary in rank order, got shards of "
                             f"{[int(x) for x in sizes]} tokens from {[int(x) for x in starts]} on")  # fmt: skip
        if check is not None:
            check(int(sum(sizes)))
    return received[:, : mine.numel()].reshape(len(received), *mine.shape).transpose(0, 1).contiguous()


def from_owner(received: Tensor) -> Tensor:
    """What one rank has, from all ranks' (ranks, ...), NaN at the others; NaN if none has it."""
    known = ~received.isnan()
    return received.nan_to_num(0, torch.inf, -torch.inf).sum(0).where(known.sum(0) == 1, torch.nan)


class _Attached(torch.autograd.Function):
    """Results that an exchange has made, with the gradient of this rank's logits."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, gradient: Callable[..., Tensor], *results: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows)
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return tuple(x.clone() for x in results)

    @staticmethod
    @first_order
    def backward(ctx: Any, saved: Callable[[], Any], *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        (rows,) = saved()
        return ctx.gradient(rows, *upstream), None, *(None,) * len(upstream)


def attach(rows: Tensor, gradient: Callable[..., Tensor], *results: Tensor) -> tuple[Tensor, ...]:
    """The results, differentiable: `gradient(rows, *upstream)` is the rows' from theirs, None where there is none."""
    return _Attached.apply(rows, gradient, *results)


class Normaliser(NamedTuple):
    """Of whole rows, float64: the maximum, the centred log sum, and the log of each rank's share (ranks, ...)."""

    max: Tensor
    log_sum: Tensor
    log_shares: Tensor


def merged(maxima: Tensor, log_sums: Tensor, t: Tensor | float) -> Normaliser:
    """Normalisers of rows from those of their shards (ranks, ...); a shard of -inf alone has a log sum of -inf."""
    nothing = log_sums == -torch.inf
    top = maxima.masked_fill(nothing, -torch.inf).amax(0)
    logs = torch.where(nothing, -torch.inf, (maxima - top) / t + log_sums)
    log_sum = logs.logsumexp(0).masked_fill(nothing.all(0), torch.nan)
    return Normaliser(top, log_sum, logs - log_sum)


def temperature_at(scaling: Scaling, keep: Tensor) -> Tensor | float:
    """The temperature of each kept row, 1 elsewhere."""
    number, temperatures = scaling
    return number if temperatures is None else at_tokens(temperatures, keep.shape).where(keep, 1)


class _Local(NamedTuple):
    """What a rank knows of its shard of some rows and of the labels in it."""

    max: Tensor
    log_sum: Tensor
    mean: Tensor  # of (z - max) / T
    label: Tensor  # its logit
    owned: Tensor


def _local_statistics(rows: Tensor, ids: Tensor, keep: Tensor, scaling: Scaling, shard: Shard) -> _Local:
    places, inside = shard.local(ids)
    places = places.where(inside & keep, 0)
    _, entropy, m, log_sum = row_statistics(rows.detach(), places.where(keep, -100).contiguous(), None, *scaling, False)
    label = rows.detach().gather(-1, places.long().unsqueeze(-1)).squeeze(-1).double()
    mean = (log_sum - entropy).masked_fill(log_sum == -torch.inf, 0)
    owned = inside & keep
    return _Local(m, log_sum, mean, label.where(owned, 0), owned)


def log_probs(
    sides: Sequence[Tensor], ids: Tensor, keep: Tensor, scaling: Scaling, shard: Shard, inplace: bool
) -> list[tuple[Tensor, Tensor]]:
    """log P(token), float64, and the entropy of rows of one or two sides (..., V_r), in one exchange.

    The first side's are differentiable; with `inplace` its gradient takes the logits' memory.
    """
    found = [_local_statistics(rows, ids, keep, scaling, shard) for rows in sides]
    columns = [column for local in found for column in local]
    received = exchange(shard, columns, lambda vocab: _check.token_id_values(ids, keep, vocab))
    t = temperature_at(scaling, keep)
    results = []
    for i, rows in enumerate(sides):
        maxima, log_sums, means, labels, owned = received[5 * i : 5 * i + 5]
        top, log_sum, log_shares = merged(maxima, log_sums, t)
        shares = log_shares.exp()
        shifted = means + torch.where(shares == 0, 0, (maxima - top) / t)
        entropy = log_sum - (shares * shifted).sum(0)
        log_prob = (labels.sum(0) - top) / t - log_sum
        invalid = torch.where(owned.sum(0) == 1, 0.0, torch.nan)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        log_prob, entropy, top, log_sum = (
            torch.where(keep, x, 0) for x in (log_prob + invalid, entropy + invalid, top, log_sum + invalid)
        )
        entropy, top, log_sum = entropy.to(dtype), top.to(dtype), log_sum.to(dtype)
        if i == 0:
            known = (scaling, log_prob, entropy, top, log_sum)
            places = shard.local(ids)[0].where(keep, -100)
            log_prob, entropy = attach(rows, _statistics_gradient(places, known, inplace), log_prob, entropy)
        results.append((log_prob, entropy))
    return results


def _statistics_gradient(places: Tensor, known: tuple[Any, ...], inplace: bool) -> Callable[..., Tensor]:
    scaling, log_prob, entropy, top, log_sum = known

    def gradient(rows: Tensor, on_log_prob: Tensor | None, on_entropy: Tensor | None) -> Tensor:
        on_log_prob = torch.zeros_like(entropy) if on_log_prob is None else on_log_prob.to(entropy.dtype).contiguous()
        on_entropy = None if on_entropy is None else on_entropy.to(entropy.dtype).contiguous()
        arguments = (rows, places, None, *scaling, log_prob, entropy, top, log_sum, on_log_prob, on_entropy)
        return row_gradient(*arguments, inplace=inplace)

    return gradient


def labels_of(rows: Tensor, ids: Tensor, keep: Tensor, shard: Shard) -> Tensor:
    """The logits (...) of global ids, float64, in one exchange; NaN where no rank has them."""
    return logits_at(rows, ids.unsqueeze(-1), keep, shard).squeeze(-1)


def logits_at(rows: Tensor, ids: Tensor, keep: Tensor, shard: Shard) -> Tensor:
    """The logits of global ids (..., K), float64: a support's, -1 for none, then a token's own; NaN where no rank has
    them."""

    def check(vocab: int) -> None:
        _check.token_id_values(ids[..., -1], keep, vocab)
        _check.support_id_values("support", ids[..., :-1], keep, vocab)

    return from_owner(torch.stack(exchange(shard, shard.logits(rows, ids).unbind(-1), check).unbind(0), -1))


def local_lists(found: RowSupport, shard: Shard) -> RowSupport:
    """Listed supports of whole rows, of which only what this shard has is listed."""
    ids, inside = shard.local(found.token_ids)
    first = inside.to(torch.int8).argsort(dim=-1, descending=True, stable=True)  # a list has no gaps
    return found._replace(
        size=inside.sum(-1).where(found.size > 0, 0),
        token_ids=ids.where(inside, -1).gather(-1, first),
        log_probs=found.log_probs.where(inside, -torch.inf).gather(-1, first),
    )


def truncated_log_prob(
    rows: Tensor, ids: Tensor, label: Tensor, keep: Tensor, scaling: Scaling, found: RowSupport, local: RowSupport,
    shard: Shard,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log q of labels, float64, and the entropy of q, from the supports of whole rows and what of them is local."""
    t = temperature_at(scaling, keep)
    log_prob = ((label - found.max) / t - found.log_sum).where(label >= found.threshold, -torch.inf)
    log_prob = log_prob.masked_fill(label.isnan() | found.log_sum.isnan(), torch.nan)
    log_prob = torch.where(keep, log_prob, 0)
    entropy = torch.where(keep, found.entropy + torch.where(label.isnan(), torch.nan, 0.0), 0)
    places = shard.local(ids)[0]

    def gradient(rows: Tensor, on_log_prob: Tensor | None, on_entropy: Tensor | None) -> Tensor:
        return token_gradient(rows, places, log_prob, *scaling, local, on_log_prob, on_entropy)

    results = attach(rows, gradient, log_prob, entropy)
    return results[0], results[1]


def log_softmax(
    rows: Tensor, scaling: Scaling, filters: tuple[int, float, float], dtype: torch.dtype, shard: Shard
) -> Tensor:
    """log q of this shard's tokens, (..., V_r) in `dtype`. Backward exchanges the sums of the upstream gradient."""
    keep = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    found = support(rows, keep, scaling, filters, shard)
    log_q = rows_log_softmax(rows.detach(), *scaling, *found, dtype)
    inside = log_q != -torch.inf

    def gradient(rows: Tensor, upstream: Tensor) -> Tensor:
        mine = upstream.double().where(inside, 0).sum(-1)
        others = (exchange(shard, [mine])[0].sum(0) - mine).to(found.threshold.dtype)
        elsewhere = torch.full_like(found.size, rows.shape[-1])  # a label in another shard: on q alone
        return truncated_gradient(rows, as_rows(upstream), elsewhere, others, None, *scaling, *found)

    return attach(rows, gradient, log_q)[0]


def support(
    rows: Tensor, keep: Tensor, scaling: Scaling, filters: tuple[int, float, float], shard: Shard
) -> RowSupport:
    """The supports of rows (..., V_r) as of whole rows: threshold, size, maximum, log sum and entropy; no lists.

    Exchanges: one of statistics and one of the sums on S, besides 7 of counts for top_k and 7 of masses for top_p (4 of
    16-bit logits, 13 of float64), and one more of masses where both are asked for.
    """
    top_k, top_p, min_p = filters
    rows = rows.detach()
    dtype = torch.promote_types(rows.dtype, torch.float32)
    t = temperature_at(scaling, keep)
    none = torch.where(keep, 0, -100)
    _, _, m, log_sum = row_statistics(rows, none, None, *scaling, False)
    maxima, log_sums = exchange(shard, [m, log_sum])
    normaliser = merged(maxima, log_sums, t)
    valid = keep & normaliser.log_sum.isfinite() & normaliser.max.isfinite()
    top = torch.where(valid, normaliser.max, 0).to(dtype)

    def above(pivots: Tensor) -> Tensor:
        """Counts, masses and moments at and above pivots (..., G), (3, ..., G) float64."""
        found = row_masses(rows, valid.contiguous(), *scaling, top, pivots.contiguous())
        return exchange(shard, found).sum(1)

    threshold = torch.full_like(top, torch.finfo(dtype).min)
    mass = normaliser.log_sum.exp()
    if top_k:
        threshold = _largest(lambda pivots: above(pivots)[0] >= top_k, threshold, top, rows.dtype)
    if top_p < 1:
        if top_k:
            mass = above(threshold.unsqueeze(-1))[1].squeeze(-1)
        needed = (top_p * mass).unsqueeze(-1)
        threshold = _largest(lambda pivots: above(pivots)[1] >= needed, threshold, top, rows.dtype)
    if min_p > 0:
        threshold = threshold.maximum(rounded_up(top.double() + t * math.log(min_p), dtype).to(dtype))
    size, mass, moment = above(threshold.unsqueeze(-1)).squeeze(-1)
    log_sum, entropy = mass.log(), mass.log() - moment / mass
    bad = torch.where(keep & ~valid, torch.nan, 0.0)
    fields = (threshold + bad, top + bad, log_sum + bad, entropy + bad)
    threshold, top, log_sum, entropy = (torch.where(keep, x, 0) for x in fields)
    nothing = torch.empty((*keep.shape, 0), device=rows.device)
    return RowSupport(
        threshold.to(dtype),
        torch.where(valid, size, 0).long(),
        top.to(dtype),
        log_sum,
        entropy.to(dtype),
        nothing.int(),
        nothing.to(dtype),
    )


def _largest(holds: Callable[[Tensor], Tensor], first: Tensor, last: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest logit of `dtype` from `first`, where `holds` is true, to `last`; it is false from some point on.

    `holds` tells of PIVOTS logits (..., PIVOTS) at a time. The search is over integers in the order of floats.
    """
    shift = {torch.float64: 0, torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}[dtype]
    low_order, high_order = (_order_of(x) >> shift for x in (first, last))
    steps = torch.arange(1, PIVOTS + 1, device=first.device)
    bits = 64 if dtype == torch.float64 else 32 - shift
    for _ in range(-(-bits // 5)):
        width = high_order - low_order  # negative: beyond int64, as may be some pivots below
        step = torch.where(width < 0, 1 << 59, width // (PIVOTS + 1) + 1).unsqueeze(-1)
        low, high = low_order.unsqueeze(-1), high_order.unsqueeze(-1)
        pivots = low + steps * step
        pivots = torch.where(pivots < low, high, torch.minimum(pivots, high))
        true = holds(_float_of(pivots << shift, first.dtype))
        best = torch.where(true, pivots, low).amax(-1)
        beyond = torch.where(true, high, pivots - 1).amin(-1)
        low_order, high_order = best, torch.maximum(beyond, best)
    return _float_of(low_order << shift, first.dtype)


def _order_of(x: Tensor) -> Tensor:
    """int64 in the order of floats; -0 and +0 are one."""
    return _folded((x + 0.0).view(torch.int64 if x.dtype == torch.float64 else torch.int32)).long()


def _float_of(order: Tensor, dtype: torch.dtype) -> Tensor:
    """The float of an order."""
    return _folded(order.to(torch.int64 if dtype == torch.float64 else torch.int32)).view(dtype)


def _folded(bits: Tensor) -> Tensor:
    """All but the sign turned over where it is set: from a float's bits to its order and back."""
    of = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (of.bits - 1)) & of.max)
