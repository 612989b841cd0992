"""`opsd_decomposition`: RLSD's Theorem 1 on samples of the privileged information."""

import math

import nasty
import oracles
import pytest
import torch
from closeness import FLOAT64_BOUND, LOG_PROB_BOUND, assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st
from opsd_oracles import TERMS, assert_decomposition
from opsd_oracles import opsd_decomposition as formula
from supports import DTYPES, FULL, KINDS, LAYOUTS, WIDE, rows

from sdkernels import opsd_decomposition, opsd_loss
from sdkernels.reference.opsd import opsd_decomposition as reference


def sides(samples, count, vocab, dtype=torch.float32, device="cpu", kind="gaussian"):
    """Student (N, V) and teachers (R, N, V) that differ from each other by noise, the last token's altogether."""
    student = rows(kind, count, vocab, dtype, device)
    noise = torch.randn(samples, count, vocab, device=device) * 2
    teachers = (student.float() + noise).to(dtype)
    teachers[:, -1:] = rows("gaussian", samples * min(count, 1), vocab, dtype, device).reshape(samples, -1, vocab)
    return student, teachers


def check(student, teachers, function=opsd_decomposition, **options):
    terms = function(student, teachers, **options)
    exact = student.dtype == teachers.dtype == torch.float64
    assert {x.dtype for x in terms} == {torch.promote_types(student.dtype, torch.float32)}
    assert not any(x.requires_grad for x in terms)
    assert_decomposition(terms, formula(student, teachers, **options), exact)
    return terms


def test_the_oracle_equals_textbook_formulas():
    student, teachers = torch.randn(7, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    p, q = (student / 0.7).softmax(-1), (teachers / 0.7).softmax(-1)
    kl = lambda x, y: (x * (x / y).log()).sum(-1)  # noqa: E731
    expected = (kl(q, p).mean(), kl(q.mean(0), p), kl(q, q.mean(0)).mean())
    truth = formula(student.unsqueeze(0), teachers.unsqueeze(1), temperature=0.7)
    for term, value in zip(TERMS, expected, strict=True):
        torch.testing.assert_close(getattr(truth, term)[0], value, rtol=0, atol=1e-14)
    torch.testing.assert_close(expected[0], expected[1] + expected[2], rtol=0, atol=1e-14)


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_theorem_1_at_a_full_vocabulary(dtype, samples, device):
    terms = check(*sides(samples, 2, FULL, dtype, device))
    error = (terms.total.double() - terms.marginal_kl.double() - terms.mutual_information.double()).abs()
    assert (error <= (FLOAT64_BOUND if dtype == torch.float64 else 5e-5)).all()
    assert (terms.mutual_information <= math.log(samples) + LOG_PROB_BOUND).all()


def test_the_vocabulary_of_qwen(device):
    check(*sides(2, 1, 151936, torch.bfloat16, device))


@pytest.mark.parametrize("function", [opsd_decomposition, reference])
@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("vocab", [1, 2, 111, 1111])
def test_small_vocabularies(vocab, samples, function, device):
    for kind in ("gaussian", "gumbel", "ties"):
        student, teachers = sides(samples, 4, vocab, torch.float64, device, kind)
        check(student, teachers, function)
        if function is opsd_decomposition:
            check(student.bfloat16(), teachers.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nasty_students_and_teachers(kind, dtype, device):
    given_rows = rows(kind, 3, WIDE, dtype, device)
    others = torch.stack([rows("gaussian", 3, WIDE, dtype, device), given_rows.flip(-1)])
    check(given_rows, others, temperature=1.6)
    check(others[0], torch.stack([given_rows, others[1]]), temperature=1.6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_equal_teachers_tell_nothing_and_the_rest_is_the_forward_kl(samples, dtype, device):
    student, teacher = (rows("gaussian", 4, 1111, dtype, device) for _ in range(2))
    terms = check(student, teacher.expand(samples, 4, 1111))
    bound = LOG_PROB_BOUND if dtype != torch.float64 else FLOAT64_BOUND
    assert (terms.mutual_information.abs() <= bound).all()
    forward = opsd_loss(student, teacher).divergence.double()
    for each in (terms.total, terms.marginal_kl):
        assert_within(each, forward, 2 * bound + 2e-7 * forward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [2, 3, 5])
def test_disjoint_teachers_tell_log_r(samples, dtype, device):
    student, teachers = sides(samples, 4, 1111, dtype, device)
    for r in range(samples):
        teachers[r, :, torch.arange(1111, device=device) % samples != r] = -torch.inf
    terms = check(student, teachers)
    assert_within(terms.mutual_information, torch.full((4,), math.log(samples), dtype=torch.float64), LOG_PROB_BOUND)
    assert terms.total.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_student_that_is_the_mixture_has_nothing_left_to_learn(dtype, device):
    _, teachers = sides(4, 3, 1111, torch.float64, device)
    student = oracles.log_softmax(teachers).logsumexp(0)
    terms = check(student.to(dtype), teachers.to(dtype))
    assert (terms.marginal_kl.abs() <= LOG_PROB_BOUND).all()
    assert (terms.mutual_information > 0.01).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_over_samples_is_of_forward_kls(dtype, device):
    student, teachers = sides(3, 4, 1111, dtype, device)
    each = torch.stack([opsd_loss(student, teacher, temperature=0.8).divergence for teacher in teachers]).double()
    terms = opsd_decomposition(student, teachers, temperature=0.8)
    assert_within(terms.total, each.mean(0), 2 * LOG_PROB_BOUND + 4e-7 * each.mean(0))
    assert (terms.mutual_information >= -LOG_PROB_BOUND).all()
    assert (terms.marginal_kl >= -LOG_PROB_BOUND).all()


@pytest.mark.parametrize("function", [opsd_decomposition, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_teachers_and_student_exclude(dtype, function, device):
    student, teachers = (x.to(dtype) for x in (torch.randn(4, 111), torch.randn(3, 4, 111)))
    student, teachers = student.to(device), teachers.to(device)
    teachers[1, 0, 5:] = -torch.inf  # one teacher: finite
    teachers[:, 1, 5:], student[1, 7:] = -torch.inf, -torch.inf  # all of them more than the student: finite
    student[2, 9] = -torch.inf  # the student alone: +inf
    student[3, 9], teachers[1:, 3, 9] = -torch.inf, -torch.inf
    teachers[0, 3, 9] -= 300  # what one of them finds e^-300 probable: +inf
    terms = check(student, teachers, function)
    for term in ("total", "marginal_kl"):
        assert (getattr(terms, term) == torch.inf).tolist() == [False, False, True, True]
    assert terms.mutual_information.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, WIDE), (torch.bfloat16, FULL), (torch.float64, 111)])
def test_views_give_the_bits_of_contiguous_logits(layout, dtype, vocab, device):
    student, teachers = sides(3, 4, vocab, dtype, device)
    student, teachers = student.reshape(2, 2, vocab), teachers.reshape(3, 2, 2, vocab)
    expected = opsd_decomposition(student, teachers, temperature=0.8)
    view = nasty.LAYOUTS[layout]
    many = torch.full((3, 2, 5, vocab), torch.nan, dtype=dtype, device=device)
    many[:, :, 1:3] = teachers
    batch_first = teachers.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    time_first = teachers.transpose(1, 2).contiguous().transpose(1, 2)
    merged = view(teachers.reshape(6, 2, vocab)).unflatten(0, (3, 2))
    backwards = torch.cat([teachers.flip(0)] * 2)[[2, 1, 0]]
    for each in (merged, many[:, :, 1:3], batch_first, time_first, backwards):
        for found, wanted in zip(opsd_decomposition(view(student), each, temperature=0.8), expected, strict=True):
            assert_same_bits(found, wanted)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (2, 3), (2, 1, 2, 2), (1, 2, 1, 2, 2)])
def test_every_leading_shape(shape, device):
    count = torch.Size(shape).numel()
    for samples in (1, 3):
        student = rows("gaussian", count, 111, device=device).reshape(*shape, 111)
        teachers = rows("gaussian", samples * count, 111, device=device).reshape(samples, *shape, 111)
        for temperature in (0.8, torch.rand(shape, device=device) + 0.5):
            terms = check(student, teachers, temperature=temperature)
            assert {x.shape for x in terms} == {torch.Size(shape)}


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64,
                                    torch.bfloat16), (torch.float16, torch.float64)], ids=str)  # fmt: skip
def test_student_and_teachers_may_differ_in_dtype(dtypes, device):
    student, teachers = sides(3, 4, 1111, torch.float32, device)
    check(student.to(dtypes[0]), teachers.to(dtypes[1]), temperature=1.6)


def test_temperature_per_token_per_sequence_and_zero_dimensional(device):
    student, teachers = sides(2, 6, 1111, device=device)
    student, teachers = student.reshape(2, 3, 1111), teachers.reshape(2, 2, 3, 1111)
    each = torch.tensor([[0.3, 1.0, 2.0], [0.9, 0.1, 5.0]], device=device)
    for temperature in (0.7, each, each[:, 1], each[0, 2]):
        check(student, teachers, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_are_zero_whatever_they_hold(dtype, device):
    student, teachers = sides(3, 6, WIDE, dtype, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    gone = mask == 0
    expected = check(student, teachers, mask=mask)
    for value in (torch.nan, torch.inf, -torch.inf):
        student[gone], teachers[:, gone] = value, value
        terms = opsd_decomposition(student, teachers, mask=mask)
        for each, wanted in zip(terms, expected, strict=True):
            assert (each[gone] == 0).all()
            assert_same_bits(each, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["student", "first teacher", "last teacher"])
def test_a_bad_row_is_nan_and_no_other(side, bad, dtype, device):
    vocab = min(WIDE, 9001)
    student, teachers = sides(3, 5, vocab, dtype, device)
    clean = opsd_decomposition(student, teachers)
    target = {"student": student, "first teacher": teachers[0], "last teacher": teachers[-1]}[side]
    for row, column in ((1, 0), (2, vocab - 1), (3, 2000)):
        target[row, column if bad != -torch.inf else slice(None)] = bad
    for each, before in zip(opsd_decomposition(student, teachers), clean, strict=True):
        assert each[1:4].isnan().all()
        assert_same_bits(each[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_its_batch_nor_on_the_run(dtype, device):
    student, teachers = sides(3, 9, WIDE, dtype, device)
    whole, again = (opsd_decomposition(student, teachers) for _ in range(2))
    alone = opsd_decomposition(student[4:5], teachers[:, 4:5])
    for each, repeated, single in zip(whole, again, alone, strict=True):
        assert_same_bits(repeated, each)
        assert_same_bits(single, each[4:5])


def test_adding_numbers_to_the_rows_changes_nothing(device):
    student, *teachers = (torch.randint(-256, 257, (3, WIDE), device=device) / 16 for _ in range(4))
    expected = opsd_decomposition(student, torch.stack(teachers), temperature=0.8)
    moved = torch.stack([x + 64 * r for r, x in enumerate(teachers)])
    for each, wanted in zip(opsd_decomposition(student - 128, moved, temperature=0.8), expected, strict=True):
        assert_same_bits(each, wanted)


def test_the_student_s_logits_may_require_grad_but_get_none(device):
    student, teachers = sides(2, 3, 111, device=device)
    check(student.requires_grad_(), teachers)
    with pytest.raises(ValueError, match=r"teacher_logits requires grad but gets no gradient here: pass teacher_l"):
        opsd_decomposition(student, teachers.requires_grad_())
    with torch.no_grad():
        check(student, teachers)


@given(st.data())
def test_the_reference_and_the_library_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3), "shape"))
    vocab, samples = data.draw(st.integers(1, 300), "V"), data.draw(st.integers(1, 4), "R")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    dtype = data.draw(st.sampled_from(nasty.DTYPES), "dtype")
    kinds = [data.draw(st.sampled_from(["gaussian", "gumbel", "ties"]), side) for side in ("student", "teacher")]
    count = torch.Size(shape).numel()
    student = rows(kinds[0], count, vocab, dtype).reshape(*shape, vocab)
    teachers = rows(kinds[1], samples * count, vocab, dtype).reshape(samples, *shape, vocab)
    options = {
        "mask": data.draw(st.sampled_from([None, (torch.rand(shape) < 0.7).int()]), "mask"),
        "temperature": data.draw(st.sampled_from([1.0, 0.8, torch.rand(shape) + 0.5]), "temperature"),
    }
    check(student, teachers, **options)
    if dtype == torch.float64:
        check(student, teachers, reference, **options)


@pytest.mark.parametrize("samples", [2, 9])
def test_a_term_beside_which_the_others_are_small(samples, device):
    """Each teacher has a token with a term of 20; the 150,000 others are a sum that float32 would lose beside it."""
    student, teachers = torch.randn(1, FULL, device=device) * 0.5, torch.randn(samples, 1, FULL, device=device) * 0.5
    student[0, 0], teachers[:, 0, 0] = -8.0, 14.0
    check(student, teachers)


def test_masks_of_the_least_number_are_finite_logits(device):
    least = torch.finfo(torch.float32).min
    student = torch.tensor([[3, 0, least, least], [3, 0, -torch.inf, 0]], device=device)
    teacher = torch.tensor([[1.0, 0, -300, -400], [1, 0, least, least]], device=device)
    terms = check(student, teacher.unsqueeze(0))
    assert terms.total[0] < 1
    assert (terms.total[1:] == torch.inf).all()
