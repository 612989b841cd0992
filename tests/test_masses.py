"""`row_masses`: how many logits are not below each pivot, and what they weigh, against float64."""

from functools import partial
from types import SimpleNamespace

import nasty
import pytest
import torch
from closeness import assert_same_bits, assert_within, epsilon
from conftest import INTERPRETED
from test_kernels import CSRC, INSTRUCTION_SETS, compiled, counting_loads, interpreted, keys_of, not_interpreted

from sdkernels.rows import layout, masses

LONG = 9001 if INTERPRETED else 50257
VOCABULARIES = (1, 2, 111, LONG)
ROW_MASSES = torch.ops.sdkernels.row_masses


def arithmetic(dtype):
    return torch.promote_types(dtype, torch.float32)


def maxima(logits):
    """The rows' largest logits in the arithmetic's dtype; 0 where there is none."""
    found = logits.to(arithmetic(logits.dtype)).nan_to_num(-torch.inf, neginf=-torch.inf).amax(-1)
    return found.where(found > -torch.inf, 0).contiguous()


def pivots_of(logits, number):
    """Logits, numbers between and beyond them, and infinities, (..., number), in no order."""
    z = logits.to(arithmetic(logits.dtype)).nan_to_num(0, neginf=-9.0)
    equal = z.gather(-1, torch.randint(z.shape[-1], (*z.shape[:-1], number), device=z.device))
    between = equal + torch.randn_like(equal)
    special = torch.tensor([torch.inf, -torch.inf, -1e30, 1e30, 0.0, -0.0], device=z.device, dtype=z.dtype)
    pivots = torch.where(torch.rand_like(equal) < 0.5, equal, between)
    if number > 12:
        pivots[..., 3:9] = special
    return pivots.contiguous()


def oracle(logits, temperature, largest, pivots, mask=None):
    """Counts, masses and moments in float64, and how far rounding y and e^y in the arithmetic may take the two."""
    z, t = logits.double(), torch.as_tensor(temperature, dtype=torch.float64, device=logits.device)
    y = (z - largest.double().unsqueeze(-1)) / t.expand(z.shape[:-1]).unsqueeze(-1)
    e = y.exp()
    weighted = torch.where(e == 0, 0, e * y)
    above = z.unsqueeze(-2) >= pivots.double().unsqueeze(-1)
    keep = torch.ones_like(largest, dtype=torch.bool) if mask is None else mask
    above = above & keep[..., None, None]
    invalid = torch.where(keep & ~largest.isfinite(), torch.nan, 0.0).unsqueeze(-1)

    def add(x):
        return torch.where(above, x.unsqueeze(-2), 0).sum(-1)

    eps = epsilon(arithmetic(logits.dtype))
    slack = torch.where(e == 0, 0, 3 + 2 * y.abs()) * eps + 1e-14  # which is the rounding of the sums here
    mass_bound, moment_bound = add(e * slack), add(-weighted * slack + torch.where(e == 0, 0, e * y.abs()) * eps)
    return above.sum(-1), add(e) + invalid, add(weighted) + invalid, mass_bound + 1e-30, moment_bound + 1e-30


def check(logits, temperature=1.0, temperatures=None, largest=None, number=31, mask=None, pivots=None):
    """The operator's results, having compared them with the oracle's."""
    largest = maxima(logits) if largest is None else largest
    pivots = pivots_of(logits, number) if pivots is None else pivots
    rows = layout.as_rows(logits)
    counts, mass, moment = ROW_MASSES(rows, mask, temperature, temperatures, largest, pivots)
    assert (counts.dtype, mass.dtype, moment.dtype) == (torch.int64, torch.float64, torch.float64)
    each = temperature if temperatures is None else layout.at_tokens(temperatures, logits.shape[:-1])
    count, true_mass, true_moment, mass_bound, moment_bound = oracle(logits, each, largest, pivots, mask)
    assert torch.equal(counts, count)
    assert_within(mass, true_mass, mass_bound, "mass")
    assert_within(moment, true_moment, moment_bound, "moment")
    return counts, mass, moment


@pytest.mark.parametrize("number", [1, 2, 5, 31])
@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_counts_masses_and_moments_equal_the_formula(vocab, dtype, number, device):
    temperatures = torch.tensor([0.5, 3.0], dtype=torch.float64, device=device)
    for kind in ("gumbel", "gaussian", "ties", "signed_zeros"):
        logits = nasty.rows(kind, 4, vocab, dtype, device)
        check(logits, 0.7, number=number)
        check(logits, temperatures=temperatures, number=number)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("kind", nasty.ROWS)
def test_nasty_rows(kind, dtype, device):
    logits = nasty.rows(kind, 3, 9001, dtype, device)
    check(logits, 0.9, number=31)
    check(logits, 0.9, number=1)


@pytest.mark.parametrize("number", [1, 31])
@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_comparison_is_exact(dtype, number, device):
    numbers = [0.0, -0.0, 1.0, -torch.inf, 2.0, torch.nan, -3.0, torch.inf, 5.9e-8, -5.9e-8]  # the last subnormal at 16
    logits = torch.tensor(numbers, device=device).to(dtype)
    kept = torch.cat([logits[:7], logits[8:], logits.new_full((300,), torch.nan)])
    for pivot in logits.to(arithmetic(dtype))[~logits.isnan()].tolist():
        for at in (pivot, float(torch.tensor(pivot, dtype=arithmetic(dtype)).nextafter(torch.tensor(torch.inf)))):
            pivots = torch.full((1, number), at, dtype=arithmetic(dtype), device=device)
            check(kept.unsqueeze(0), largest=pivots.new_full((1,), 2.0), pivots=pivots)


def test_a_pivot_of_minus_inf_counts_every_number_and_nothing_else(device):
    logits = torch.full((2, 1111), -torch.inf, device=device)
    logits[1, 5] = torch.nan
    counts, mass, moment = check(logits, largest=torch.tensor([0.0, 3.0], device=device),
                                 pivots=torch.tensor([[-torch.inf, -3e38]] * 2, device=device))  # fmt: skip
    assert counts.tolist() == [[1111, 0], [1110, 0]]
    assert (mass == 0).all()
    assert (moment == 0).all()


@pytest.mark.parametrize("number", [1, 31])
@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("more", [1.0, 20.0, 70.0, 1e5])
def test_a_maximum_from_elsewhere(more, dtype, number, device):
    logits = nasty.rows("gumbel", 3, 9001, dtype, device)
    check(logits, largest=maxima(logits) + more, number=number)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_where_the_maximum_is_not_finite_the_sums_are_nan(dtype, device):
    logits = nasty.rows("gaussian", 5, 111, dtype, device)
    largest = maxima(logits)
    largest[1:4] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=device)
    logits[2, 7], logits[3] = torch.inf, -torch.inf
    for number in (1, 31):
        _, mass, moment = ROW_MASSES(logits, None, 1.0, None, largest, pivots_of(logits, number))
        for each in (mass, moment):
            assert each[1:4].isnan().all()
            assert not each[::4].isnan().any()


@pytest.mark.parametrize("number", [1, 31])
@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_small_terms_beside_a_large_one_are_not_lost(dtype, number, device):
    logits = nasty.rows("one_against_many", 2, 151936 // (4 if INTERPRETED else 1), dtype, device)
    pivots = torch.zeros(2, number, dtype=arithmetic(dtype), device=device)
    _, mass, _ = check(logits, pivots=pivots)
    assert_within(mass, oracle(logits, 1.0, maxima(logits), pivots)[1], 1e-7)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_masked_rows_are_zeros_and_not_read(dtype, device):
    logits = nasty.rows("gaussian", 6, 111, dtype, device).reshape(2, 3, 111)
    largest, pivots = maxima(logits), pivots_of(logits, 31)
    mask = torch.tensor([[True, False, True], [False, True, True]], device=device)
    expected = ROW_MASSES(logits, None, 1.0, None, largest, pivots)
    logits[~mask] = largest[~mask] = torch.nan
    for found, unmasked in zip(ROW_MASSES(logits, mask, 1.0, None, largest, pivots), expected, strict=True):
        assert (found[~mask] == 0).all()
        assert_same_bits(found[mask], unmasked[mask])


@pytest.mark.parametrize("number", [1, 31])
@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("view", nasty.LAYOUTS)
def test_views_give_the_bits_of_contiguous_logits(view, dtype, number, device):
    logits = nasty.rows("gumbel", 4, 9001, dtype, device).reshape(2, 2, -1)
    pivots = pivots_of(logits, number)
    expected = check(logits, pivots=pivots)
    found = check(nasty.LAYOUTS[view](logits), pivots=pivots)
    for each, same in zip(found, expected, strict=True):
        assert_same_bits(each, same)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (2, 3), (2, 1, 2)])
def test_every_leading_shape(shape, dtype, device):
    logits = nasty.rows("gaussian", torch.Size(shape).numel(), 111, dtype, device).reshape(*shape, 111)
    for each in check(logits, number=7):
        assert each.shape == (*shape, 7)


@pytest.mark.parametrize("number", [1, 31])
@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_neither_batch_nor_threads_nor_other_pivots_change_a_bit(dtype, number, device):
    logits = nasty.rows("gumbel", 5, LONG, dtype, device)
    largest, pivots, before = maxima(logits), pivots_of(logits, number), torch.get_num_threads()
    expected = ROW_MASSES(logits, None, 0.8, None, largest, pivots)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for rows in (slice(2, 3), slice(1, 4)):
                found = ROW_MASSES(logits[rows], None, 0.8, None, largest[rows], pivots[rows])
                for each, same in zip(found, expected, strict=True):
                    assert_same_bits(each, same[rows])
    finally:
        torch.set_num_threads(before)
    reversed_pivots = pivots.flip(-1).contiguous()
    for each, same in zip(ROW_MASSES(logits, None, 0.8, None, largest, reversed_pivots), expected, strict=True):
        assert_same_bits(each.flip(-1), same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_row_masses_passes_opcheck(dtype, device):
    logits = nasty.rows("gaussian", 6, 21, dtype, device).reshape(2, 3, 21)
    mask = torch.rand(2, 3, device=device) < 0.5
    temperatures = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    for rows, kept, each in (
        (logits, mask, temperatures),
        (logits.transpose(0, 1).contiguous().transpose(0, 1), None, None),
    ):
        arguments = (rows, kept, 0.7, each, maxima(logits), pivots_of(logits, 5))
        torch.library.opcheck(ROW_MASSES.default, arguments)


@compiled
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", nasty.DTYPES[:3])
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 10001])
def test_every_instruction_set_at_the_edges_of_its_steps(vocab, dtype, instruction_set, monkeypatch):
    operator = partial(CSRC.row_masses, instruction_set=instruction_set)
    monkeypatch.setattr(torch.ops, "sdkernels_cpu", SimpleNamespace(row_masses=operator))
    for kind in ("gumbel", "scattered_minus_inf", "one_against_many"):
        logits = nasty.rows(kind, 3, vocab, dtype)
        check(logits, 0.9)
        check(logits, 0.9, number=1)


@interpreted
def test_a_row_is_loaded_once_for_each_group_of_pivots_and_masked_rows_never(monkeypatch):
    logits, mask = nasty.rows("gaussian", 3, 9001), torch.tensor([True, False, True])
    for number, sweeps in ((1, 1), (4, 1), (31, 8)):
        with counting_loads(monkeypatch) as count:
            ROW_MASSES(logits, mask, 1.0, None, maxima(logits), pivots_of(logits, number))
        assert [count(row) for row in logits] == [sweeps * 9001, 0, sweeps * 9001]


@not_interpreted
def test_another_length_batch_or_temperature_does_not_recompile():
    pytest.importorskip("triton")

    def run(tokens, number, temperature):
        logits = torch.randn(tokens, 48)
        largest, pivots = torch.zeros(tokens + 1)[1:], torch.zeros(tokens * number + 1)[1:].view(tokens, number)
        ROW_MASSES(logits, None, temperature, None, largest, pivots)

    cases = [(1, 31, 1.0), (16, 31, 0.7), (37, 16, 0.7), (4096, 30, 1.0)]
    for found in keys_of(run, cases, [(masses, "_masses_kernel")]).values():
        assert len(found) == 1, "\n".join(sorted(found))
