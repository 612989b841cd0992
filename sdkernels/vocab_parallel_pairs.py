"""Pairs of rows over a sharded vocabulary: SSD's sums, divergences and Theorem 1, merged from the shards'."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sdkernels import _check
from sdkernels.rows.divergence import row_divergence
from sdkernels.rows.divergence_gradient import divergence_gradient
from sdkernels.rows.information import row_information
from sdkernels.rows.layout import RowSupport
from sdkernels.rows.pair import pair_statistics
from sdkernels.rows.pair_gradient import pair_gradient
from sdkernels.rows.reduced import reduced_rows, top_ids
from sdkernels.rows.reduced_gradient import reduced_gradient
from sdkernels.rows.statistics import row_statistics
from sdkernels.vocab_parallel import Normaliser, Scaling, Shard, attach, exchange, from_owner, merged, temperature_at


class Sums(NamedTuple):
    """What `pair_statistics` says of S: log sums of z and z / T and the mean of z under q, all less `max`, and of q."""

    support_lse: Tensor
    tempered_lse: Tensor
    cross: Tensor
    negentropy: Tensor
    size: Tensor
    max: Tensor


def matching_float64(rows: Tensor, student: Tensor) -> Tensor:
    """Rows beside the student's, in float64 if those are: as the row operators compute a pair, so must its shards."""
    return rows.double() if student.dtype == torch.float64 else rows


def _normalisers(sides: list[Tensor], keep: Tensor, scaling: Scaling) -> list[Tensor]:
    """Maximum and log sum of each side's local rows."""
    none = torch.where(keep, 0, -100)
    columns = []
    for rows in sides:
        _, _, m, log_sum = row_statistics(rows.detach(), none, None, *scaling, False)
        columns += [m, log_sum]
    return columns


def ssd_sums(
    student: Tensor, base: Tensor | None, keep: Tensor, scaling: Scaling, found: RowSupport | None,
    lists: tuple[Tensor, Tensor] | None, shard: Shard, inplace: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The first six results of `pair_statistics` of whole rows, the first four differentiable.

    S and q are those of `found`, of all finite logits of `base`, or of `lists`: global ids, -1 for none, and log-probs.
    """
    t = temperature_at(scaling, keep)
    plain: Scaling = (1.0, None)
    columns = _normalisers([student], keep, plain)
    arguments: tuple[Tensor | None, ...]
    if lists is not None:
        ids, log_q = lists
        live = (ids >= 0) & keep.unsqueeze(-1)
        places, inside = shard.local(ids)
        z = shard.logits(student, ids).where(live, torch.nan)

        def check(vocab: int) -> None:
            _check.support_id_values("base.token_ids", ids, keep, vocab)

        m, log_sum, *received = exchange(shard, [*columns, *z.unbind(-1)], check)
        top, log_sum, _ = merged(m, log_sum, 1.0)
        sums = _listed_sums(torch.stack(received, -1), log_q.double(), live, t)
        base_log_sum, base_max = torch.zeros_like(log_sum), torch.zeros_like(top)
        arguments = (None, None, places.where(inside & live, -1).int(), log_q)
    else:
        arguments = (None,) * 4 if found is None else (found.threshold, found.size, found.token_ids, found.log_probs)
        local = pair_statistics(student.detach(), base, keep, *scaling, *arguments)
        columns += [*local[1:4], local[5], local[7], local[9], local[10]]
        if found is None:  # of a shard whose student is all -inf the pair does not tell the base's entropy
            columns.append(row_statistics(base, torch.where(keep, 0, -100), None, *scaling, False)[1])
        m, log_sums, *received = exchange(shard, columns)
        top, log_sum, _ = merged(m, log_sums, 1.0)
        if found is None:
            of_base = merged(received[6], received[4], t)
            base_max, base_log_sum = of_base.max, of_base.log_sum
            share = of_base.log_shares.exp()
            negentropy = torch.where(share > 0, share * (of_base.log_shares - received[7]), 0).sum(0)
        else:
            base_max, base_log_sum, negentropy = found.max.double(), found.log_sum, -found.entropy.double()
        sums = _merged_sums(received[:7], log_sums == -torch.inf, base_max, base_log_sum, negentropy, t)
    bad = log_sum.isnan() | base_log_sum.isnan() | sums.support_lse.isnan()
    invalid = torch.where((sums.size > 0) & top.isfinite() & ~bad, 0.0, torch.nan)
    lse = top - sums.max + log_sum
    four = [torch.where(keep, x + invalid, 0) for x in (lse, sums.support_lse, sums.tempered_lse, sums.cross)]
    dtype, base_dtype = (
        torch.promote_types(x.dtype, torch.float32) for x in (student, student if base is None else base)
    )
    negentropy, log_sum, base_log_sum, top, support_max, base_max = (
        torch.where(keep, x, 0)
        for x in (sums.negentropy + invalid, log_sum + invalid, base_log_sum, top, sums.max, base_max)
    )
    size = torch.where(keep, sums.size, 0).long()
    saved = (
        *four,
        negentropy,
        size,
        log_sum,
        base_log_sum,
        top.to(dtype),
        support_max.to(dtype),
        base_max.to(base_dtype),
    )

    def gradient(rows: Tensor, *upstream: Tensor | None) -> Tensor:
        zeros = torch.zeros_like(log_sum)
        on = [zeros if x is None else torch.where(keep, x.double(), 0).contiguous() for x in upstream]
        return pair_gradient(rows, base, *scaling, *arguments, *saved, *on, inplace=inplace)

    return (*attach(student, gradient, *four), negentropy, size)


def _listed_sums(received: Tensor, log_q: Tensor, live: Tensor, t: Tensor | float) -> Sums:
    """From the listed logits (ranks, ..., K), NaN at all but one rank."""
    z = from_owner(received)
    log_q = log_q.where(live, -torch.inf)
    live = live & (log_q > -torch.inf)
    z = z.where(live, -torch.inf)
    m = z.amax(-1, keepdim=True)
    m = m.masked_fill(m == -torch.inf, 0)
    y, q = z - m, log_q.exp()
    t = t.unsqueeze(-1) if isinstance(t, Tensor) else t
    return Sums(
        y.logsumexp(-1),
        (t * (y / t).logsumexp(-1, keepdim=True)).squeeze(-1),
        (q * y).where(q != 0, 0).sum(-1),
        (q * log_q).where(q != 0, 0).sum(-1),
        live.sum(-1),
        m.squeeze(-1),
    )


def _merged_sums(
    received: list[Tensor], impossible: Tensor, base_max: Tensor, base_log_sum: Tensor, negentropy: Tensor,
    t: Tensor | float,
) -> Sums:  # fmt: skip
    """From the shards' sums (ranks, ...), each with its own q on its own part of S.

    Where the student is `impossible`, all -inf, its own sums are NaN; then those of z on S are -inf.
    """
    support_lse, tempered_lse, cross, size, local_log_sum, support_max, local_base_max = received
    some = (size > 0) & ~impossible
    m = support_max.where(some, -torch.inf).amax(0)
    m = m.masked_fill(m == -torch.inf, 0)
    moved = (support_max - m).where(some, 0)
    share = ((local_base_max - base_max) / t + local_log_sum - base_log_sum).where(size > 0, -torch.inf).exp()
    cross = (cross + moved).masked_fill(impossible, -torch.inf)
    return Sums(
        (support_lse + moved).where(some, -torch.inf).logsumexp(0),
        ((tempered_lse + moved) / t).where(some, -torch.inf).logsumexp(0) * t,
        torch.where(share > 0, share * cross, 0).sum(0),
        negentropy,
        size.sum(0),
        m,
    )


def divergence(
    student: Tensor, teacher: Tensor, keep: Tensor, scaling: Scaling, options: tuple[str, float, float], shard: Shard,
    inplace: bool,
) -> Tensor:  # fmt: skip
    """`row_divergence`'s D of whole rows, differentiable: one exchange for a KL, two for the JSD and with a clip."""
    name, _, clip = options
    t = temperature_at(scaling, keep)
    rows = student.detach()
    if name == "jsd" or not math.isinf(clip):
        m, log_sums, other_m, other_sums = exchange(shard, _normalisers([rows, teacher], keep, scaling))
        p, q = merged(m, log_sums, t), merged(other_m, other_sums, t)
        known = _known(p, q, keep, rows, teacher)
        value, slope, *_ = row_divergence(rows, teacher, keep, *scaling, *options, *known)
        value, slope = exchange(shard, [value, slope]).sum(1)
    else:
        local = row_divergence(rows, teacher, keep, *scaling, *options, None, None, None, None)
        value, log_sums, other_sums, m, other_m = exchange(shard, [local[0], *local[2:]])
        p, q = merged(m, log_sums, t), merged(other_m, other_sums, t)
        known = _known(p, q, keep, rows, teacher)
        first, second = (q, p) if name == "forward_kl" else (p, q)
        nothing, impossible = first.log_shares == -torch.inf, second.log_shares == -torch.inf
        share = first.log_shares.exp()
        part = torch.where(share > 0, share * (value + first.log_shares - second.log_shares), 0)
        part = part.masked_fill(impossible, torch.inf).masked_fill(nothing, 0)
        invalid = 0 * (p.log_sum + q.log_sum)
        value = part.sum(0) + invalid
        slope = invalid - 1 if name == "forward_kl" else (value + 1).masked_fill(value == torch.inf, torch.nan)
    value, slope = (torch.where(keep, x, 0).contiguous() for x in (value, slope))

    def gradient(rows: Tensor, upstream: Tensor) -> Tensor:
        on = torch.where(keep, upstream.double(), 0).contiguous()
        return divergence_gradient(rows, teacher, *scaling, *options, slope, *known, on, inplace=inplace)

    return attach(student, gradient, value)[0]


def _known(p: Normaliser, q: Normaliser, keep: Tensor, student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
    """Normalisers of student and teacher as the row operators take them."""
    log_sum, other_log_sum, m, other_m = (torch.where(keep, x, 0) for x in (p.log_sum, q.log_sum, p.max, q.max))
    dtype, other_dtype = (torch.promote_types(x.dtype, torch.float32) for x in (student, teacher))
    return log_sum, other_log_sum, m.to(dtype), other_m.to(other_dtype)


def reduced(
    student: Tensor, teacher: Tensor, places: int, by_teacher: bool, tail: bool, keep: Tensor, scaling: Scaling,
    shard: Shard, inplace: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Whole rows reduced to the `places` most probable tokens and a tail, as `reduced_rows`, in two exchanges."""
    rows = student.detach()
    chooser = teacher if by_teacher else rows
    ids = _global_top_ids(chooser, keep, places, shard)
    local, inside = shard.local(ids)
    inside = inside & (ids >= 0)
    order = inside.to(torch.int8).argsort(dim=-1, stable=True)  # another shard's first: the last one ends the list
    listed = local.where(inside, -1).gather(-1, order).int().contiguous()
    *_, m, log_sum, other_m, other_sum = reduced_rows(rows, teacher, listed, by_teacher, True, keep, *scaling)
    columns = [m, log_sum, other_m, other_sum]
    for side in (rows, teacher):
        columns += shard.logits(side, ids).unbind(-1)
    received = exchange(shard, columns)
    t = temperature_at(scaling, keep)
    short, results, tails = ids < 0, [], []
    for i, side in enumerate((rows, teacher)):
        z = from_owner(received[4 + i * places : 4 + (i + 1) * places].movedim(0, -1)).masked_fill(short, -torch.inf)
        tail_m, tail_sum = _merged_tail(received[2 * i], received[2 * i + 1], t)
        if not tail:  # all that it says is whether the row is bad
            tail_m, tail_sum = torch.zeros_like(tail_m), tail_sum.where(tail_sum.isnan(), -torch.inf)
        results.append(_reduced_row(z, tail_m, tail_sum, t, keep, torch.promote_types(side.dtype, torch.float32)))
        tails.append((tail_m, tail_sum))
    tail_m, tail_sum = (torch.where(keep, x, 0) for x in tails[0])
    tail_m = tail_m.to(results[0].dtype)

    def gradient(rows: Tensor, upstream: Tensor) -> Tensor:
        upstream = torch.where(keep.unsqueeze(-1), upstream, 0)
        mine = torch.cat((upstream[..., :-1].gather(-1, order), upstream[..., -1:]), -1)
        return reduced_gradient(rows, listed, *scaling, tail_m, tail_sum, mine.contiguous(), inplace=inplace)

    return attach(student, gradient, results[0])[0], results[1]


def _global_top_ids(chooser: Tensor, keep: Tensor, places: int, shard: Shard) -> Tensor:
    """Global ids (..., places) of the largest logits of whole rows, ties by id; -1 beyond the vocabulary."""
    count = min(places, shard.size)
    ids = top_ids(chooser, keep, count).long()
    hollow = (ids[..., :1] < 0) & (chooser[..., :1] == -torch.inf) & keep.unsqueeze(-1)
    ids = torch.where(hollow, torch.arange(count, device=ids.device), ids)  # a shard of -inf alone still has tokens
    z = chooser.gather(-1, ids.clamp(min=0)).double()
    absent = torch.nn.functional.pad(ids < 0, (0, places - count), value=True)
    ids, z = (torch.nn.functional.pad(x, (0, places - count)) for x in (ids + shard.start, z))
    received = exchange(shard, [*ids.unbind(-1), *z.unbind(-1), *absent.unbind(-1)])
    ids, z, absent = (x.flatten(0, 1).movedim(0, -1) for x in received.unflatten(0, (3, places)).transpose(1, 2))
    ids = ids.long().masked_fill(absent > 0, -1)
    present_first = absent.argsort(dim=-1, stable=True)
    by_value = z.gather(-1, present_first).masked_fill(absent.gather(-1, present_first) > 0, -torch.inf)
    order = by_value.argsort(dim=-1, descending=True, stable=True)[..., :places]
    return ids.gather(-1, present_first).gather(-1, order)


def _merged_tail(maxima: Tensor, log_sums: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """Maximum and centred log sum of a tail, which may be empty: then 0 and -inf."""
    top, log_sum, _ = merged(maxima, log_sums, t)
    nothing = (log_sums == -torch.inf).all(0)
    return top.masked_fill(nothing, 0), log_sum.masked_fill(nothing, -torch.inf)


def _reduced_row(
    z: Tensor, tail_m: Tensor, tail_sum: Tensor, t: Tensor | float, keep: Tensor, dtype: torch.dtype
) -> Tensor:
    """A row of listed logits and a tail, over T and less their maximum; NaN without a distribution."""
    t = t.unsqueeze(-1) if isinstance(t, Tensor) else t
    tail_m = tail_m.unsqueeze(-1)
    some = tail_m.masked_fill(tail_sum.unsqueeze(-1) == -torch.inf, -torch.inf)
    m = torch.cat((z, some), -1).amax(-1, keepdim=True)
    tail = torch.where(some == -torch.inf, some, (tail_m - m) / t + tail_sum.unsqueeze(-1))
    row = torch.cat(((z - m) / t, tail), -1)
    valid = m.isfinite() & ~tail_sum.isnan().unsqueeze(-1) & ~z.isnan().any(-1, keepdim=True)
    return torch.where(keep.unsqueeze(-1), row.masked_fill(~valid, torch.nan), 0).to(dtype)


def information(student: Tensor, teachers: Tensor, keep: Tensor, scaling: Scaling, shard: Shard) -> tuple[Tensor, ...]:
    """`row_information` of whole rows, in two exchanges."""
    t = temperature_at(scaling, keep)
    received = exchange(shard, _normalisers([student, *teachers.unbind(0)], keep, scaling))
    found = [merged(received[i], received[i + 1], t) for i in range(0, len(received), 2)]
    dtype = torch.promote_types(student.dtype, torch.float32)
    log_sums = torch.stack([torch.where(keep, x.log_sum, 0) for x in found])
    maxima = torch.stack([torch.where(keep, x.max, 0) for x in found]).to(dtype)
    return tuple(exchange(shard, row_information(student, teachers, keep, *scaling, log_sums, maxima)).sum(1))
