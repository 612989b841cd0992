"""Row operators on parts of rows: statistics merged by float64 formulas give the whole rows' results and gradients."""

import math

import pytest
import torch
from closeness import LOG_PROB_BOUND, ROUNDING, assert_same_bits, assert_within
from opsd_oracles import DIVERGENCES
from supports import name

from sdkernels.rows.reduced import top_ids

OPS = torch.ops.sdkernels
V, T = 1111, 0.7
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
WIDTHS = ((1, 1110), (700, 1, 410), (37, 1073, 1))
ROWS = 6


def arithmetic(dtype):
    return torch.promote_types(dtype, torch.float32)


def shards(x, widths):
    return x.split(widths, -1)


def sides(dtype, widths, device):
    """Student and teacher, of which a shard is -inf in rows 1 (student), 2 (teacher), 3 (both) and 4 (all but one)."""
    student, teacher = ((torch.randn(ROWS, V, device=device) * 3).to(dtype) for _ in range(2))
    shards(student, widths)[0][1] = -torch.inf
    shards(teacher, widths)[1][2] = -torch.inf
    for logits in (student, teacher):
        shards(logits, widths)[1][3] = -torch.inf
        for part in shards(logits, widths)[:-1]:
            part[4] = -torch.inf
    return student, teacher


def merged(maxima, log_sums):
    """Maximum and centred log sum of whole rows from their parts', float64."""
    m = torch.stack(maxima).double().amax(0)
    parts = [log_sum.double() + (x.double() - m) / T for x, log_sum in zip(maxima, log_sums, strict=True)]
    return m, torch.stack(parts).logsumexp(0)


def normaliser(logits):
    z = logits.double()
    m = z.amax(-1)
    return m, ((z - m.unsqueeze(-1)) / T).logsumexp(-1)


def close(found, whole, what, dtype=torch.float32):
    assert_within(found, whole, LOG_PROB_BOUND + (ROUNDING[dtype] + 1e-5) * whole.double().abs(), what)


def local(ids, start, width, nothing):
    """Ids of whole rows as those of a part, and whether it holds them."""
    held = (ids >= start) & (ids < start + width)
    return torch.where(held, ids - start, nothing), held


def starts(widths):
    return [sum(widths[:i]) for i in range(len(widths))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_row_statistics_and_their_gradient(widths, dtype, device):
    logits, _ = sides(dtype, widths, device)
    ids = logits.float().argmax(-1)  # the log-prob that a part of only -inf gives is NaN
    whole = OPS.row_statistics(logits, ids, None, T, None, False)
    parts, holds = [], []
    for start, part in zip(starts(widths), shards(logits, widths), strict=True):
        inside, held = local(ids, start, part.shape[-1], 0)
        parts.append(OPS.row_statistics(part, inside, None, T, None, False))
        holds.append(held)
    assert all(not part[3].isnan().any() for part in parts)
    m, log_sum = merged([part[2] for part in parts], [part[3] for part in parts])
    log_prob, mean = torch.zeros_like(log_sum), torch.zeros_like(log_sum)
    for (part_log_prob, part_entropy, part_m, part_sum), held in zip(parts, holds, strict=True):
        mass = part_sum.double() + (part_m.double() - m) / T - log_sum
        log_prob += torch.where(held, part_log_prob + mass, 0)
        moment = part_sum.double() - part_entropy + (part_m.double() - m) / T
        mean += torch.where(mass == -torch.inf, 0, mass.exp() * moment)
    statistics = (log_prob, *(x.to(arithmetic(dtype)) for x in (log_sum - mean, m, log_sum)))
    for found, wanted, what in zip(statistics, whole, ("log-prob", "entropy", "max", "log sum"), strict=True):
        close(found, wanted, what)
    upstream = torch.randn(2, ROWS, dtype=arithmetic(dtype), device=device)
    gradients = []
    for start, part in zip(starts(widths), shards(logits, widths), strict=True):
        outside, _ = local(ids, start, part.shape[-1], part.shape[-1] + 3)
        gradients.append(OPS.row_gradient(part, outside, None, T, None, *statistics, *upstream))
    close(torch.cat(gradients, -1), OPS.row_gradient(logits, ids, None, T, None, *whole, *upstream), "gradient", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_without_a_label_is_that_of_the_normaliser_and_reads_nothing_beside_the_row(dtype, device):
    logits = torch.full((4, V + 64), torch.nan, dtype=dtype, device=device)[:, 32 : 32 + V]
    logits[:] = torch.randn(4, V)
    ids = torch.tensor([-1, V, V + 7, -5], device=device)
    m, log_sum = normaliser(logits)
    statistics = (torch.full_like(m, -2.0), *(x.to(arithmetic(dtype)) for x in (m * 0 + 3, m, log_sum + 1)))
    a, b = torch.randn(2, 4, dtype=arithmetic(dtype), device=device)
    log_p = (logits.double() - m.unsqueeze(-1)) / T - log_sum.unsqueeze(-1) - 1
    for on_entropy in (None, b):
        weight = a.double().unsqueeze(-1) + (0 if on_entropy is None else b.double().unsqueeze(-1) * (log_p + 3))
        found = OPS.row_gradient(logits, ids, None, T, None, *statistics, a, on_entropy)
        close(found, -log_p.exp() * weight / T, "gradient", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_log_sum_tells_nothing_from_a_bad_row(dtype, device):
    rows, other = torch.randn(2, 5, V, device=device).to(dtype)
    rows[0], rows[1, 7], rows[2, 7], rows[3, :-1] = -torch.inf, torch.nan, torch.inf, -torch.inf
    ids = torch.full((5,), V - 1, device=device)
    log_prob, entropy, m, log_sum = OPS.row_statistics(rows, ids, None, T, None, False)
    assert m[0] <= torch.finfo(torch.float32).min
    assert log_prob[:3].isnan().all()
    assert entropy[:3].isnan().all()
    one, on = torch.ones_like(m), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0], dtype=m.dtype, device=device)
    gradient = OPS.row_gradient(rows, ids, None, T, None, log_prob, entropy, m, log_sum, on, one)
    for found in (gradient, OPS.row_gradient(rows, ids, None, T, None, log_prob, entropy, m, log_sum, 0 * on, None)):
        assert found[:3].isnan().all()
        assert found[3:].isfinite().all()
    sums = [log_sum]
    for divergence in DIVERGENCES:
        kind, beta = divergence["divergence"], divergence.get("beta", 0.5)
        for clip in (math.inf, 0.05):
            for student, teacher, which in ((rows, other, 2), (other, rows, 3)):
                found = OPS.row_divergence(student, teacher, None, T, None, kind, beta, clip)
                assert found[0][:3].isnan().all()
                assert found[1][:3].isnan().all()
                assert found[5 - which].isfinite().all()
                sums.append(found[which])
                assert found[which + 2][0] <= torch.finfo(torch.float32).min
                gradient = OPS.divergence_gradient(
                    student, teacher, T, None, kind, beta, clip, *found[1:], torch.zeros_like(found[0])
                )
                assert gradient[:3].isnan().all()
                assert (gradient[3:] == 0).all()
    for each in sums:
        assert each[0] == -torch.inf
        assert each[1:3].isnan().all()
        assert each[3:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
@pytest.mark.parametrize("clip", [math.inf, 0.05])
def test_row_divergence_and_its_gradient(clip, divergence, widths, dtype, device):
    student, teacher = sides(dtype, widths, device)
    options = (None, T, None, divergence["divergence"], divergence.get("beta", 0.5), clip)
    upstream = torch.randn(ROWS, dtype=torch.float64, device=device)
    whole = OPS.row_divergence(student, teacher, *options)
    pairs = list(zip(shards(student, widths), shards(teacher, widths), strict=True))
    parts = [OPS.row_divergence(*pair, *options) for pair in pairs]
    assert all(not x.isnan().any() for part in parts for x in part[2:4])
    m, log_sum = merged([part[4] for part in parts], [part[2] for part in parts])
    teacher_m, teacher_log_sum = merged([part[5] for part in parts], [part[3] for part in parts])
    given = (log_sum, teacher_log_sum, m.to(arithmetic(dtype)), teacher_m.to(arithmetic(dtype)))
    for found, wanted in zip(given, whole[2:], strict=True):
        close(found, wanted, "normalisers")
    parts = [OPS.row_divergence(*pair, *options, *given) for pair in pairs]
    for part in parts:
        assert not part[0].isnan().any()
        for found, wanted in zip(part[2:], given, strict=True):
            assert_same_bits(found, wanted)
    value, slope = (sum(part[i] for part in parts) for i in (0, 1))
    close(value, whole[0], "divergence")
    close(slope, whole[1], "slope")
    gradients = [OPS.divergence_gradient(*pair, *options[1:], slope, *given, upstream) for pair in pairs]
    expected = OPS.divergence_gradient(student, teacher, *options[1:], *whole[1:], upstream)
    close(torch.cat(gradients, -1), expected, "gradient", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
def test_partial_divergences_of_bad_masked_and_empty_rows(divergence, dtype, device):
    student, teacher = (torch.randn(7, V, device=device).to(dtype) for _ in range(2))
    student[3], teacher[4], student[5], teacher[5] = (-torch.inf,) * 4
    sums = torch.full((7,), 5.0, dtype=torch.float64, device=device)
    teacher_sums, m = sums.clone(), torch.full((7,), 4.0, dtype=arithmetic(dtype), device=device)
    sums[0], teacher_sums[1], sums[2] = torch.nan, -torch.inf, torch.nan
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1], device=device).bool()
    kind, beta = divergence["divergence"], divergence.get("beta", 0.5)
    arguments = (mask, T, None, kind, beta, math.inf, sums, teacher_sums, m, m)
    value, slope, *_ = results = OPS.row_divergence(student, teacher, *arguments)
    assert all(x[2] == 0 for x in results)
    assert value[:2].isnan().all()
    assert slope[:2].isnan().all()
    assert value[3:].isnan().logical_not().all()
    assert value[5] == 0
    assert (value[3:5] == torch.inf).tolist() == [kind == "forward_kl", kind == "reverse_kl"]
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(OPS.row_divergence(leaf, teacher, *arguments)[0].sum(), leaf)
    log_p, log_q = (((x[6].double() - 4) / T - 5).requires_grad_() for x in (student, teacher))
    p, q = log_p.exp(), log_q.exp()
    mixture = (beta * q + (1 - beta) * p).log()
    terms = {
        "forward_kl": q * (log_q - log_p),
        "reverse_kl": p * (log_p - log_q),
        "jsd": beta * q * (log_q - mixture) + (1 - beta) * p * (log_p - mixture),
    }
    (expected,) = torch.autograd.grad(terms[kind].sum(), log_p)
    close(gradient[6], expected / T, "gradient of the part alone", dtype)
    assert gradient[:2].isnan().all()
    assert (gradient[2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("samples", [1, 3])
def test_row_information(samples, widths, dtype, device):
    student, first = sides(dtype, widths, device)
    teachers = torch.stack([first, *(sides(dtype, widths, device)[1] for _ in range(samples - 1))])
    whole = OPS.row_information(student, teachers, None, T, None)
    every = torch.cat([student.unsqueeze(0), teachers])
    maxima, log_sums = normaliser(every)
    maxima = maxima.to(arithmetic(dtype))
    pairs = list(zip(shards(student, widths), shards(teachers, widths), strict=True))
    parts = [OPS.row_information(*pair, None, T, None, log_sums, maxima) for pair in pairs]
    for i, what in enumerate(("total", "marginal", "information")):
        assert all(not part[i].isnan().any() for part in parts)
        close(sum(part[i] for part in parts), whole[i], what)
    for row, bad in ((0, torch.nan), (samples, -torch.inf)):
        spoiled = log_sums.clone()
        spoiled[row, 2] = bad
        found = OPS.row_information(*pairs[0], None, T, None, spoiled, maxima)
        for each, clean in zip(found, parts[0], strict=True):
            assert each[2].isnan()
            assert_same_bits(each[:2], clean[:2])


def listed_here(ids, start, width):
    """The ids of whole rows' lists that a part holds, in their order behind -1; and the places they come from."""
    inside, held = local(ids, start, width, -1)
    order = held.to(torch.int8).sort(dim=-1, stable=True).indices
    return inside.gather(-1, order).int().contiguous(), order


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("by_teacher", [False, True])
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("places", [1, 7, 300])
def test_reduced_rows_and_their_gradient(places, tail, by_teacher, widths, dtype, device):
    student, teacher = sides(dtype, widths, device)
    for logits in (student, teacher):
        logits[5, torch.randperm(V)[:-4]] = -torch.inf  # fewer than places
    ids = top_ids(teacher if by_teacher else student, torch.ones(ROWS, dtype=torch.bool, device=device), places)
    scaling = (None, T, None)
    whole = OPS.reduced_rows(student, teacher, ids, by_teacher, tail, *scaling)
    parts, lists = [], []
    for start, width, *pair in zip(starts(widths), widths, shards(student, widths), shards(teacher, widths),
                                   strict=True):  # fmt: skip
        here, order = listed_here(ids, start, width)
        lists.append((here, order))
        parts.append(OPS.reduced_rows(*pair, here, by_teacher, tail, *scaling))
        for logits, row, m, log_sum in zip(pair, parts[-1][:2], parts[-1][2::2], parts[-1][3::2], strict=True):
            z = logits.double().gather(-1, here.long().clamp(min=0))
            top = logits.double() if tail else z.masked_fill(here < 0, -torch.inf)
            top = top.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
            close(torch.where(here < 0, 0, row[:, :-1]), torch.where(here < 0, 0, (z - top) / T), "entries")
            if tail:
                close(row[:, -1], (m.double() - top[:, 0]) / T + log_sum, "tail")
    statistics = [merged([part[i] for part in parts], [part[i + 1] for part in parts]) for i in (2, 4)]
    if tail:
        for (m, log_sum), wanted_m, wanted_sum in zip(statistics, whole[2::2], whole[3::2], strict=True):
            close(
                torch.where(wanted_sum == -torch.inf, 0, m), torch.where(wanted_sum == -torch.inf, 0, wanted_m), "max"
            )
            close(log_sum.nan_to_num(-torch.inf, neginf=-torch.inf), wanted_sum, "tail log sum")
    upstream = torch.randn(ROWS, places + 1, dtype=arithmetic(dtype), device=device)
    upstream[:, -1] *= tail
    tails = whole[2:4]
    gradients = []
    for part, (here, order) in zip(shards(student, widths), lists, strict=True):
        on_part = torch.cat([upstream[:, :-1].gather(-1, order), upstream[:, -1:]], -1)
        gradients.append(OPS.reduced_gradient(part, here, T, None, *tails, on_part))
    expected = OPS.reduced_gradient(student, ids, T, None, *tails, upstream)
    close(torch.cat(gradients, -1), expected, "gradient", dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("way", ["whole", "threshold", "lists"])
def test_pair_gradient(way, widths, dtype, device):
    student, base = sides(dtype, widths, device)
    for logits in (student, base):
        logits[1:4] = torch.randn(3, V, device=device).to(dtype)  # an infinite cross term has no gradient
    support = (None,) * 4
    if way != "whole":
        capacity = 8 if way == "threshold" else 64
        found = OPS.row_support(base, None, T, None, 40, 1.0, 0.0, capacity, False)
        support = (found[0], found[1], found[5], found[6]) if way == "threshold" else (None, None, found[5], found[6])
    given = None if way == "lists" else base
    statistics = OPS.pair_statistics(student, given, None, T, None, *support)
    upstream = torch.randn(4, ROWS, dtype=torch.float64, device=device)
    whole = OPS.pair_gradient(student, given, T, None, *support, *statistics, *upstream)
    gradients = []
    for start, part, base_part in zip(starts(widths), shards(student, widths), shards(base, widths), strict=True):
        here = support
        if support[2] is not None:
            inside, held = local(support[2], start, part.shape[-1], -1)
            here = (*support[:2], inside, torch.where(held, support[3], -torch.inf))
        base_part = None if given is None else base_part
        gradients.append(OPS.pair_gradient(part, base_part, T, None, *here, *statistics, *upstream))
    close(torch.cat(gradients, -1), whole, "gradient", dtype)
