"""`ssd_decomposition`: each term and its gradient, given the S and q of the base."""

import nasty
import oracles
import pytest
import torch
from closeness import FLOAT64_BOUND, LOG_PROB_BOUND, assert_gradient, assert_same_bits, assert_within, epsilon
from conftest import INTERPRETED
from hypothesis import given
from hypothesis import strategies as st
from supports import (
    DTYPES,
    FULL,
    KINDS,
    SOME_FILTERS,
    SWEEP,
    TEMPERATURES,
    WIDE,
    few,
    filters,
    name,
    rows,
    support_of,
)

from sdkernels import Support, ssd_decomposition, truncated_support
from sdkernels.reference.ssd import ssd_decomposition as reference

FLOATS = oracles.SSD_TERMS
LEARNED = tuple(term for term in FLOATS if term != "constant")


def pair(kind, count, vocab, dtype=torch.float32, device="cpu"):
    """Student and base logits: the base's with some noise on them, and in the last row others altogether."""
    base = rows(kind, count, vocab, dtype, device)
    student = (base.float() + torch.randn(count, vocab, device=device)).to(dtype)
    student[-1:] = rows("gaussian", 1, vocab, dtype, device)
    return student, base


def base_log_q(base, temperature, mask, **chosen):
    """log q (..., V) in float64, on the S that the library chose."""
    if isinstance(base, Support):
        return oracles.dense(base.token_ids, base.log_probs, chosen["vocab"])
    inside = support_of(base, temperature, mask, **chosen)
    return oracles.log_softmax(base, temperature, None if mask is None else mask != 0, inside=inside)


def assert_terms(terms, truth, exact):
    """SPEC 9's bounds; beyond logits of order 10, roundings of the sums that base_alignment is the difference of."""
    for term in FLOATS:
        expected = getattr(truth, term)
        bound = (
            FLOAT64_BOUND * expected.abs().clamp(min=1)
            if exact
            else LOG_PROB_BOUND + epsilon(torch.float32) * expected.abs()
        )
        scale = truth.scale if term == "base_alignment" else torch.zeros_like(expected)
        allowed = (4 * epsilon(torch.float64 if exact else torch.float32) * scale).clamp(min=bound)
        assert_within(getattr(terms, term), expected, allowed.nan_to_num(1.0), term)
    assert torch.equal(terms.support_size, truth.support_size)


def assert_identity(terms, scale):
    """Eq. 4 on the results themselves."""
    parts = sum(getattr(terms, term).double() for term in FLOATS[:4])
    size = sum(getattr(terms, term).double().abs() for term in FLOATS[:5]) + scale
    allowed = (epsilon(torch.float32) * size).clamp(min=5e-5)
    assert_within(parts, terms.cross_entropy.double(), allowed, "the sum of the terms")


def run(student, base, temperature, upstream, function=ssd_decomposition, **options):
    """The terms and the student's gradient for {term: upstream}."""
    leaf = student.detach().requires_grad_()
    terms = function(leaf, base, temperature, **options)
    found = [getattr(terms, term) for term in upstream]
    (gradient,) = torch.autograd.grad(found, leaf, [g.to(x) for x, g in zip(found, upstream.values(), strict=True)])
    return type(terms)(*(x.detach() for x in terms)), gradient


def check(student, base, temperature=1.0, upstream=None, mask=None, function=ssd_decomposition, **chosen):
    if upstream is None:
        upstream = {term: torch.randn(student.shape[:-1], device=student.device) for term in LEARNED}
    terms, gradient = run(student, base, temperature, upstream, function, mask=mask, **chosen)
    log_q = base_log_q(base, temperature, mask, **chosen, **({"vocab": student.shape[-1]} if isinstance(base, Support)
                                                             else {}))  # fmt: skip
    truth = oracles.ssd(student, log_q, temperature, mask)
    of_base = base.log_probs if isinstance(base, Support) else base
    exact = student.dtype == of_base.dtype == torch.float64
    assert all(x.dtype == torch.promote_types(student.dtype, torch.float32) for x in terms[:-1])
    assert terms.support_size.dtype == torch.int64
    assert_terms(terms, truth, exact)
    assert_identity(terms, truth.scale)
    expected = oracles.ssd_gradient(student, log_q, temperature, upstream, mask)
    assert_gradient(gradient, expected, student.dtype)
    return terms, gradient


def test_closed_forms_of_the_oracle_equal_textbook_formulas_and_autograd():
    student = (torch.randn(6, 9, dtype=torch.float64) * 3).requires_grad_()
    base, temperature = torch.randn(6, 9, dtype=torch.float64), torch.tensor([0.5, 0.8, 1.0, 1.25, 1.6, 2.0]).double()
    log_q = oracles.log_softmax(base, temperature, inside=torch.arange(9) < torch.arange(3, 9).unsqueeze(-1))
    upstream = dict(zip(LEARNED, torch.randn(5, 6, dtype=torch.float64), strict=True))
    truth, gradient = oracles.ssd(student, log_q, temperature), 0
    for row, t in enumerate(temperature.tolist()):
        size = row + 3
        p, log_q_s = student[row].softmax(-1), log_q[row, :size]
        kept, q = p[:size].sum(), log_q_s.exp()
        p_s = p[:size] / kept
        power = p_s ** (1 / t)
        terms = {
            "support_compression": -kept.log(),
            "within_support_reshaping": power.sum().log() / (1 - 1 / t) * (1 - t) if t != 1 else 0 * kept,
            "base_alignment": t * (q * (log_q_s - (power / power.sum()).log())).sum(),
            "constant": -t * (q * log_q_s).sum(),
            "cross_entropy": -(q * p[:size].log()).sum(),
            "kept_mass": kept,
        }
        for term, x in terms.items():
            torch.testing.assert_close(getattr(truth, term)[row], x.detach(), rtol=0, atol=1e-13)
        gradient = gradient + sum(terms[term] * upstream[term][row] for term in LEARNED)
    gradient.backward()
    closed = oracles.ssd_gradient(student, log_q, temperature, upstream).gradient
    torch.testing.assert_close(closed, student.grad, rtol=0, atol=1e-13)
    parts = sum(getattr(truth, term) for term in FLOATS[:4])
    torch.testing.assert_close(parts, truth.cross_entropy, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("chosen", SWEEP, ids=name)
def test_every_filter_at_a_full_vocabulary(chosen, dtype, device):
    each = torch.tensor(TEMPERATURES, device=device).roll(len(str(chosen)))
    count = 2 if INTERPRETED else 5
    student, base = pair("gaussian", count, FULL, dtype, device)
    base[1] = rows("tied_everywhere", 1, FULL, dtype, device)
    check(student, base, each[:count], **chosen)


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize("chosen", [*SOME_FILTERS, {}], ids=name)
def test_the_other_dtypes_at_a_full_vocabulary(chosen, dtype, device):
    check(*pair("gaussian", 3, FULL, dtype, device), 0.8, **chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nasty_bases_and_students(kind, dtype, device):
    base = rows(kind, 3, WIDE, dtype, device)
    students = (rows("gaussian", 3, WIDE, dtype, device), base.flip(-1))
    for student, chosen in zip(students, ({"top_k": 5}, {}), strict=True):
        possible = torch.where(student == -torch.inf, -50.0, student.double()).to(dtype)  # -inf has a test of its own
        check(possible, base, 1.6, **chosen)


@pytest.mark.parametrize("chosen", few(filters(vocab=111)), ids=name)
@pytest.mark.parametrize("vocab", [1, 2, 111])
def test_small_vocabularies(vocab, chosen, device):
    for kind in ("gaussian", "ties"):
        check(*pair(kind, 4, vocab, device=device), 0.5, **chosen)


@pytest.mark.parametrize("size", [63, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_supports_around_the_length_of_the_lists(dtype, size, device):
    student, base = pair("gaussian", 3, WIDE, dtype, device)
    base[:, WIDE // 2 : WIDE // 2 + size] = (80 - torch.arange(size, device=device) / 4).to(dtype)
    terms, _ = check(student, base, 2.0, top_k=size)
    assert (terms.support_size == size).all()


@pytest.mark.parametrize("term", LEARNED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [{"top_k": 20}, {"top_k": 300}, {}], ids=name)
def test_each_term_alone_has_its_own_gradient(chosen, dtype, term, device):
    student, base = pair("gaussian", 3, 1111, dtype, device)
    for upstream in (torch.tensor([1.0, -2.0, 1e-3], device=device), torch.ones(1, device=device).expand(3)):
        check(student, base, 1.6, {term: upstream}, **chosen)


def test_only_terms_of_the_student_are_differentiable(device):
    student, base = pair("gaussian", 3, 111, device=device)
    terms = ssd_decomposition(student.requires_grad_(), base, 0.8, top_k=5)
    assert {term for term in terms._fields if getattr(terms, term).requires_grad} == set(LEARNED)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("chosen", [*SOME_FILTERS, {}], ids=name)
def test_the_gradient_telescopes(chosen, temperature, device):
    """(1, 1, 1) on the terms gives p - q, bit for bit what cross_entropy gives."""
    student, base = pair("gumbel", 3, WIDE, device=device)
    ones = torch.ones(3, device=device)
    _, of_terms = run(student, base, temperature, dict.fromkeys(FLOATS[:3], ones), **chosen)
    _, of_cross_entropy = run(student, base, temperature, {"cross_entropy": ones}, **chosen)
    assert_same_bits(of_terms, of_cross_entropy)
    log_q = base_log_q(base, temperature, None, **chosen)
    difference = oracles.log_softmax(student).exp() - log_q.exp()
    assert ((of_terms.double() - difference).norm(dim=-1) <= 2e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_temperature_and_truncation_the_base_is_a_fixed_point(dtype, device):
    """Eq. 9: T = 1, S = V and theta = theta_0 leave nothing to learn."""
    base = rows("gaussian", 3, WIDE, dtype, device)
    terms, gradient = check(base, base, 1.0, dict.fromkeys(FLOATS[:3], torch.ones(3, device=device)))
    assert (gradient.double().norm(dim=-1) <= 2e-6).all()
    for term in FLOATS[:3]:
        assert (getattr(terms, term).abs() <= LOG_PROB_BOUND).all()
    _, truncated = run(base, base, 1.0, {"cross_entropy": torch.ones(3, device=device)}, top_k=1)
    assert (truncated.double().norm(dim=-1) > 1e-3).all()


def test_at_temperature_one_the_reshaping_is_zero(device):
    terms, _ = check(*pair("gaussian", 3, WIDE, device=device), 1.0, top_p=0.95)
    assert (terms.within_support_reshaping.abs() <= 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_signs_of_the_terms(dtype, device):
    for temperature in TEMPERATURES:
        terms, _ = check(*pair("gumbel", 4, WIDE, dtype, device), temperature, top_k=50)
        assert (terms.support_compression >= -1e-6).all()
        assert (terms.within_support_reshaping * (1 - temperature) >= -1e-6).all()
        assert (terms.base_alignment >= -LOG_PROB_BOUND).all()
        assert (terms.constant >= 0).all()
        assert (terms.kept_mass <= 1 + 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_size", [3, 64, 400])
@pytest.mark.parametrize("chosen", [{"top_k": 20}, {"top_k": 300}, {"top_p": 0.95}], ids=name)
def test_a_support_as_base_is_the_distribution_that_it_lists(chosen, max_size, dtype, device):
    """Equal to dense logits where all of S is listed; where it is not, to what is left of it renormalised."""
    student, base = pair("gaussian", 3, WIDE, dtype, device)
    upstream = {term: torch.randn(3, device=device) for term in LEARNED}
    support = truncated_support(base, 1.6, **chosen, max_size=max_size)
    terms, gradient = check(student, support, 1.6, upstream)
    assert torch.equal(terms.support_size, support.size.clamp(max=max_size))
    shuffled = support._replace(token_ids=support.token_ids.flip(-1).int(), log_probs=support.log_probs.flip(-1))
    check(student, shuffled, 1.6, upstream)
    if (support.size <= max_size).all():
        dense, _ = check(student, base, 1.6, upstream, **chosen)
        for each, expected in zip(terms, dense, strict=True):
            assert_within(each, expected, 2 * LOG_PROB_BOUND if each.is_floating_point() else 0)
        of_dense = oracles.ssd_gradient(student, base_log_q(base, 1.6, None, **chosen), 1.6, upstream)
        assert_gradient(gradient, of_dense, dtype)


def test_an_empty_support_is_nan_unless_masked(device):
    student, base = pair("gaussian", 4, 1111, device=device)
    support = truncated_support(base, 0.8, top_k=5, max_size=5)
    support.token_ids[1:3], support.log_probs[1:3] = -1, -torch.inf
    mask = torch.tensor([1, 1, 0, 1], device=device)
    ones = dict.fromkeys(LEARNED, torch.ones(4, device=device))
    terms, gradient = run(student, support, 0.8, ones, mask=mask)
    for each in (*terms[:-1], gradient):
        assert each[1].isnan().all()
        assert (each[2] == 0).all()
        assert each[[0, 3]].isfinite().all()
    assert terms.support_size.tolist() == [5, 0, 0, 5]


@pytest.mark.parametrize("temperature", [torch.tensor([0.5, 2.0]), torch.rand(2, 3) + 0.5, torch.tensor(0.9)],
                         ids=["per sequence", "per token", "0-dim"])  # fmt: skip
def test_a_support_of_tensor_temperatures(temperature, device):
    student, base = (x.reshape(2, 3, 1111) for x in pair("gaussian", 6, 1111, device=device))
    temperature = temperature.to(device)
    support = truncated_support(base, temperature, top_p=0.9, max_size=64)
    check(student, support, temperature)
    if temperature.dim() == 1:  # the same temperatures in another shape
        check(student, support, temperature.unsqueeze(-1).expand(2, 3))
    if temperature.dim() == 0:  # a number is the same temperature as its float32
        check(student, support, 0.9)
        check(student, truncated_support(base, 0.9, top_p=0.9, max_size=64), temperature)
        check(student, support._replace(temperature=temperature.item()), 0.9)  # as it comes back from a file


@pytest.mark.parametrize("chosen", few(filters(vocab=111)), ids=name)
def test_the_reference_equals_the_formula(chosen):
    temperature, mask = torch.tensor(TEMPERATURES), torch.tensor([1, 1, 1, 0, 1])
    for kind in ("gaussian", "ties"):
        student, base = pair(kind, 5, 111, torch.float64)
        check(student, base, temperature, mask=mask, function=reference, **chosen)
        check(student, truncated_support(base, temperature, **chosen, max_size=9), temperature, mask=mask,
              function=reference)  # fmt: skip


@pytest.mark.parametrize("function", [ssd_decomposition, reference])
@pytest.mark.parametrize("chosen", [{"top_k": 5}, {"top_p": 0.8, "min_p": 0.05}, {}, {"sparse": True}], ids=name)
def test_gradcheck(chosen, function):
    student, base = (torch.randn(2, 3, 13, dtype=torch.float64) * 2 for _ in range(2))
    temperature = torch.tensor([0.5, 2.0], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    if "sparse" in chosen:
        chosen, base = {}, truncated_support(base, temperature, top_k=4, max_size=4)

    def outputs(x):
        terms = function(x, base, temperature, mask=mask, **chosen)
        return tuple(getattr(terms, term) for term in LEARNED)

    assert torch.autograd.gradcheck(outputs, student.requires_grad_())


@given(st.data())
def test_any_shape_and_options_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4), "shape"))
    vocab = data.draw(st.integers(1, 300), "V")
    dtype, of_base = (data.draw(st.sampled_from(nasty.DTYPES), side) for side in ("student's dtype", "base's dtype"))
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    kind = data.draw(st.sampled_from(["gaussian", "gumbel", "peaky", "scattered_minus_inf", "ties"]), "rows")
    count = torch.Size(shape).numel()
    student = rows("gaussian", count, vocab, dtype).reshape(*shape, vocab)
    base = rows(kind, count, vocab, of_base).reshape(*shape, vocab)
    temperatures = [1.0, 0.3, torch.rand(shape) + 0.3] + ([torch.rand(shape[:-1]) + 0.3] if shape else [])
    temperature = data.draw(st.sampled_from(temperatures), "temperature")
    mask = data.draw(st.sampled_from([None, (torch.rand(shape) < 0.7).int()]), "mask")
    chosen = {
        "top_k": data.draw(st.none() | st.integers(0, vocab + 2), "top_k"),
        "top_p": data.draw(st.none() | st.floats(1e-6, 1), "top_p"),
        "min_p": data.draw(st.none() | st.floats(0, 1), "min_p"),
    }
    if data.draw(st.booleans(), "sparse"):
        size = data.draw(st.integers(1, 80), "max_size")
        chosen, base = {}, truncated_support(base, temperature, **chosen, max_size=size, mask=mask)
    check(student, base, temperature, mask=mask, **chosen)
