"""`ssd_decomposition` whatever its rows look like: layouts, shapes, masks, infinities, batches."""

import nasty
import oracles
import pytest
import torch
from closeness import LOG_PROB_BOUND, assert_gradient, assert_same_bits, assert_within
from supports import (
    DTYPES,
    FULL,
    LAYOUTS,
    SOME_FILTERS,
    WIDE,
    name,
    rows,
    support_of,
)
from test_ssd import FLOATS, LEARNED, base_log_q, check, pair, run

from sdkernels import Support, truncated_support


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64,
                                    torch.bfloat16), (torch.float16, torch.float64)], ids=str)  # fmt: skip
@pytest.mark.parametrize("chosen", [{"top_k": 20}, {"top_k": 300}, {}], ids=name)
def test_student_and_base_may_differ_in_dtype_and_layout(chosen, dtypes, device):
    student, base = pair("gaussian", 4, 1111, device=device)
    student, base = student.to(dtypes[0]).reshape(2, 2, 1111), base.to(dtypes[1]).reshape(2, 2, 1111)
    check(nasty.time_major(student), nasty.odd_strides(base), 1.6, **chosen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, WIDE), (torch.bfloat16, FULL), (torch.float64, 111)])
def test_views_give_the_bits_of_contiguous_logits(layout, dtype, vocab, device):
    student, base = (x.reshape(2, 2, vocab) for x in pair("gumbel", 4, vocab, dtype, device))
    views = [nasty.LAYOUTS[layout](x) for x in (student, base)]
    upstream = {term: torch.randn(2, 2, device=device) for term in LEARNED}
    for chosen in ({"top_k": 20}, {"top_p": 0.99}, {}):
        terms, gradient = check(*views, 0.8, upstream, **chosen)
        same, same_gradient = run(student, base, 0.8, upstream, **chosen)
        for each, expected in zip((*terms, gradient), (*same, same_gradient), strict=True):
            assert_same_bits(each.double(), expected.double())


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (2, 3), (2, 1, 2, 2), (1, 2, 1, 2, 2)])
def test_every_leading_shape(shape, device):
    student, base = (rows("gaussian", torch.Size(shape).numel(), 111, device=device) for _ in range(2))
    student, base = student.reshape(*shape, 111), base.reshape(*shape, 111)
    for given_base in (base, truncated_support(base, 0.8, top_k=5, max_size=7)):
        chosen = {} if isinstance(given_base, Support) else {"top_k": 5}
        check(student, given_base, 0.8, **chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chosen", [*SOME_FILTERS, {}], ids=name)
def test_temperature_per_token_per_sequence_and_zero_dimensional(chosen, dtype, device):
    student, base = (x.reshape(2, 3, 1111) for x in pair("gaussian", 6, 1111, dtype, device))
    each = torch.tensor([[0.3, 1.0, 2.0], [0.9, 0.1, 5.0]], device=device)
    for temperature in (each, each[:, 1], each[0, 2], each.double().t().contiguous().t()):
        check(student, base, temperature, **chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [*SOME_FILTERS, {}, {"sparse": True}], ids=name)
def test_masked_tokens_are_zero_whatever_they_and_their_upstream_hold(chosen, dtype, device):
    student, base = pair("gaussian", 6, WIDE, dtype, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    gone = mask == 0
    if chosen == {"sparse": True}:
        chosen, base = {}, truncated_support(base, 0.8, top_k=9, max_size=9)
        base.token_ids[gone], base.log_probs[gone] = -9, torch.nan
    else:
        base[gone] = torch.nan
    student[gone] = torch.nan
    temperature = torch.full((6,), 0.8, dtype=torch.float64, device=device).masked_fill(gone, 0.0)
    temperature = 0.8 if isinstance(base, Support) else temperature
    upstream = {term: torch.where(gone, torch.nan, 1.0) for term in LEARNED}
    terms, gradient = run(student, base, temperature, upstream, mask=mask, **chosen)
    for each in (*terms, gradient):
        assert (each[gone] == 0).all()
    if isinstance(base, Support):
        base.token_ids[gone] = -1
    again, same = check(student, base, 0.8, upstream, mask, **chosen)
    for each, expected in zip((*terms, gradient), (*again, same), strict=True):
        assert_same_bits(each.double(), expected.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "base"])
@pytest.mark.parametrize("chosen", [{"top_k": 20}, {"top_k": 300}, {}], ids=name)
def test_a_bad_row_is_nan_and_no_other(chosen, side, bad, dtype, device):
    both, ones = pair("gaussian", 5, 9001, dtype, device), dict.fromkeys(LEARNED, torch.ones(5, device=device))
    clean, clean_gradient = run(*both, 0.8, ones, **chosen)
    for row, column in ((1, 0), (2, 9000), (3, 5000)):
        both[side][row, column if bad != -torch.inf else slice(None)] = bad
    terms, gradient = run(*both, 0.8, ones, **chosen)
    for term, each, before in zip(
        (*terms._fields, "gradient"), (*terms, gradient), (*clean, clean_gradient), strict=True
    ):
        of_base = side == 0 and term == "constant"  # the base's alone
        if term != "support_size" and not of_base:
            assert each[1:4].isnan().all(), term
        assert_same_bits(each[[0, 4]].double(), before[[0, 4]].double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [{"top_k": 5}, {"top_k": 300}], ids=name)
def test_a_student_that_excludes_part_of_s_has_infinite_cross_entropy_and_a_finite_gradient(chosen, dtype, device):
    student, base = (torch.randn(3, WIDE, device=device).to(dtype) for _ in range(2))
    inside = support_of(base, 0.8, **chosen)
    ids = inside.int().argmax(-1)
    student[range(3), ids] = -torch.inf
    ones = torch.ones(3, device=device)
    for upstream in ({"cross_entropy": ones}, dict.fromkeys(FLOATS[:3], ones), {"base_alignment": ones}):
        terms, gradient = run(student, base, 0.8, upstream, **chosen)
        assert (terms.cross_entropy == torch.inf).all()
        assert (terms.base_alignment == torch.inf).all()
        for each in terms[:2]:
            assert each.isfinite().all()
        log_q = base_log_q(base, 0.8, None, **chosen)
        expected = oracles.ssd_gradient(student, log_q, 0.8, upstream)
        assert gradient.isfinite().all()
        assert_gradient(gradient, expected, dtype)
        assert (gradient[range(3), ids] < 0).all()  # which raises what was excluded


def test_a_student_that_excludes_all_of_s(device):
    student, base = (torch.randn(3, 1111, device=device) for _ in range(2))
    student[support_of(base, top_k=5)] = -torch.inf
    terms, gradient = run(student, base, 1.0, {"cross_entropy": torch.ones(3, device=device)}, top_k=5)
    assert (terms.kept_mass == 0).all()
    assert (terms.support_compression == torch.inf).all()
    assert (terms.cross_entropy == torch.inf).all()
    expected = oracles.log_softmax(student).exp() - base_log_q(base, 1.0, None, top_k=5).exp()
    assert ((gradient.double() - expected).norm(dim=-1) <= 2e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [*SOME_FILTERS, {}], ids=name)
def test_minus_inf_of_the_base_is_outside_s_and_minus_inf_of_both_counts_nothing(chosen, dtype, device):
    student, base = pair("gaussian", 3, WIDE, dtype, device)
    base[:, ::2] = -torch.inf
    check(student, base, 0.8, **chosen)
    student[:, ::2] = -torch.inf
    terms, _ = check(student, base, 0.8, **chosen)
    if not chosen:
        assert (terms.support_size == WIDE // 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [*SOME_FILTERS, {}], ids=name)
def test_a_token_does_not_depend_on_its_batch_nor_on_the_run(chosen, dtype, device):
    student, base = (x.reshape(3, 3, WIDE) for x in pair("gumbel", 9, WIDE, dtype, device))
    upstream = {term: torch.randn(3, 3, device=device) for term in LEARNED}
    whole, again = (run(student, base, 0.8, upstream, **chosen) for _ in range(2))
    one = {term: x[1:2, 1] for term, x in upstream.items()}
    alone = run(student[1:2, 1], base[1:2, 1], 0.8, one, **chosen)
    for each, repeated, single in zip(*((*terms, gradient) for terms, gradient in (whole, again, alone)), strict=True):
        assert_same_bits(repeated.double(), each.double())
        assert_same_bits(single.double(), each[1:2, 1].double())


@pytest.mark.parametrize("chosen", [*SOME_FILTERS, {}], ids=name)
def test_adding_numbers_to_the_rows_changes_nothing(chosen, device):
    student, base = (torch.randint(-256, 257, (3, WIDE), device=device) / 16 for _ in range(2))
    upstream = {term: torch.randn(3, device=device) for term in LEARNED}
    terms, gradient = run(student, base, 0.8, upstream, **chosen)
    moved, moved_gradient = run(student + 128, base - 64, 0.8, upstream, **chosen)
    for each, expected in zip((*moved, moved_gradient), (*terms, gradient), strict=True):
        assert_same_bits(each, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_the_order_of_the_vocabulary_does_not_matter(chosen, dtype, device):
    student, base = pair("gumbel", 3, WIDE, dtype, device)
    order = torch.randperm(WIDE, device=device)
    upstream = {term: torch.randn(3, device=device) for term in LEARNED}
    terms, _ = run(student, base, 0.8, upstream, **chosen)
    permuted, permuted_gradient = run(student[:, order], base[:, order], 0.8, upstream, **chosen)
    for each, expected in zip(permuted, terms, strict=True):
        assert_within(each, expected, 2 * LOG_PROB_BOUND if each.is_floating_point() else 0)
    log_q = base_log_q(base, 0.8, None, **chosen)[:, order]
    assert_gradient(permuted_gradient, oracles.ssd_gradient(student[:, order], log_q, 0.8, upstream), dtype)
