"""`opsd_loss` whatever its rows look like: layouts, shapes, masks, infinities, ties, batches."""

import nasty
import pytest
import torch
from closeness import assert_same_bits
from opsd_oracles import REDUCED, SOME, opsd_loss
from supports import DTYPES, FULL, KINDS, LAYOUTS, WIDE, few, name, rows
from test_opsd import SIMPLE, check, run
from test_ssd import pair

import sdkernels

CHOSEN = few(SOME, 2)


def assert_same_results(found, expected):
    for each, wanted in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
        assert_same_bits(each, wanted)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64,
                                    torch.bfloat16), (torch.float16, torch.float64)], ids=str)  # fmt: skip
@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_student_and_teacher_may_differ_in_dtype_and_layout(chosen, dtypes, device):
    student, teacher = pair("gaussian", 4, 1111, device=device)
    student, teacher = student.to(dtypes[0]).reshape(2, 2, 1111), teacher.to(dtypes[1]).reshape(2, 2, 1111)
    check(nasty.time_major(student), nasty.odd_strides(teacher), temperature=1.6, **chosen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, WIDE), (torch.bfloat16, FULL), (torch.float64, 111)])
def test_views_give_the_bits_of_contiguous_logits(layout, dtype, vocab, device):
    student, teacher = (x.reshape(2, 2, vocab) for x in pair("gumbel", 4, vocab, dtype, device))
    views = [nasty.LAYOUTS[layout](x) for x in (student, teacher)]
    upstream = torch.randn(2, 2, device=device)
    for chosen in CHOSEN[:3]:
        expected = run(student, teacher, on_divergence=upstream, temperature=0.8, **chosen)
        assert_same_results(run(*views, on_divergence=upstream, temperature=0.8, **chosen), expected)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (2, 3), (2, 1, 2, 2), (1, 2, 1, 2, 2)])
@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_every_leading_shape(chosen, shape, device):
    student, teacher = (rows("gaussian", torch.Size(shape).numel(), 111, device=device) for _ in range(2))
    for temperature in (0.8, torch.rand(shape, device=device) + 0.5):
        output, gradient = check(
            student.reshape(*shape, 111), teacher.reshape(*shape, 111), temperature=temperature, **chosen
        )
        assert output.divergence.shape == shape
        assert output.loss.shape == ()
        assert gradient.shape == (*shape, 111)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nasty_students_and_teachers(kind, dtype, device):
    given, turn = rows(kind, 3, WIDE, dtype, device), KINDS.index(kind)
    check(given, rows("gaussian", 3, WIDE, dtype, device), temperature=1.6, **CHOSEN[turn % len(CHOSEN)])
    check(given.flip(-1), given, temperature=1.6, **CHOSEN[(turn + 1) % len(CHOSEN)])


@pytest.mark.parametrize("kind", few(nasty.ROWS, 3))
@pytest.mark.parametrize("reduced", [{}, *REDUCED], ids=name)
def test_nasty_rows_of_small_vocabularies_in_every_mode(reduced, kind, device):
    for vocab in few((1, 2, 8, 111), 3):
        given, other = (rows(each, 3, vocab, device=device) for each in (kind, "gumbel"))
        for divergence in SIMPLE:
            if kind == "lowest" and divergence["divergence"] != "jsd":
                continue  # log-ratios of 3.4e38 nats, where float32 ends
            for clip in ({}, {"token_clip": 0.02}):
                check(given, other, **divergence, **reduced, **clip)
                check(other, given, **divergence, **reduced, **clip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", CHOSEN, ids=name)
def test_masked_tokens_are_zero_whatever_they_and_their_upstream_hold(chosen, dtype, device):
    student, teacher = pair("gaussian", 6, WIDE, dtype, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    gone = mask == 0
    upstream = torch.where(gone, torch.nan, torch.randn(6, device=device))
    results = []
    for value in (torch.nan, torch.inf, -torch.inf, 0.0):
        student[gone], teacher[gone] = value, value
        output, gradient = run(student, teacher, upstream, upstream, mask=mask, reduction="none", **chosen)
        for each in (*output, gradient):
            assert (each[gone] == 0).all()
        results.append((output, gradient))
    for found in results[:3]:
        assert_same_results(found, results[3])
    check(student, teacher, mask=mask, **chosen)


@pytest.mark.parametrize("dtype", few(DTYPES[:2], 2))
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("reduced", [{}, *REDUCED], ids=name)
def test_a_bad_row_is_nan_and_no_other(reduced, side, bad, dtype, device):
    vocab, ones = min(WIDE, 9001), torch.ones(5, device=device)
    for chosen in few([*SIMPLE, {"divergence": "jsd", "token_clip": 0.02}], 3):
        both = pair("gaussian", 5, vocab, dtype, device)
        clean, clean_gradient = run(*both, on_divergence=ones, **chosen, **reduced)
        for row, column in ((1, 0), (2, vocab - 1), (3, 2000)):
            both[side][row, column if bad != -torch.inf else slice(None)] = bad
        output, gradient = run(*both, on_divergence=ones, **chosen, **reduced)
        assert output.loss.isnan()
        assert output.divergence[1:4].isnan().all()
        assert gradient[1:4].isnan().all()
        assert_same_bits(output.divergence[[0, 4]], clean.divergence[[0, 4]])
        assert_same_bits(gradient[[0, 4]], clean_gradient[[0, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduced", [{}, *REDUCED], ids=name)
def test_minus_inf_of_either_side_and_of_both(reduced, dtype, device):
    """Every other logit, all but a few, and the whole beginning of a row."""
    for divergence in few(SIMPLE, 2):
        for excluded in (slice(None, None, 2), slice(4, None), slice(0, 900)):
            student, teacher = (rows("gumbel", 3, 1111, dtype, device) for _ in range(2))
            teacher[0, excluded] = -torch.inf
            student[1, excluded] = -torch.inf
            teacher[2, excluded] = student[2, excluded] = -torch.inf
            check(student, teacher, **divergence, **reduced)
            check(student, teacher, **divergence, **reduced, token_clip=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_ties_at_the_last_place_are_chosen_by_id(side, tail, dtype, device):
    student, teacher = (torch.zeros(3, 1111, device=device) for _ in range(2))
    student[:, ::7], teacher[:, 1::9] = 2.0, 3.0
    student, teacher = ((x + y).to(dtype) for x, y in ((student, teacher / 4), (teacher, student / 4)))
    student[0, 500:510], teacher[0, 700:710] = 9.0, 8.0  # and in row 1 zeros of both signs, the largest
    student[1] = torch.where(torch.arange(1111, device=device) % 5 == 0, -0.0, student[1] * 0).to(dtype)
    teacher[1, :] = -student[1, :]
    teacher[1, ::3] = -1.0
    for top_k in few((1, 4, 7, 64, 65, 200), 3):
        for divergence in few(SIMPLE, 2):
            check(student, teacher, top_k=top_k, top_k_from=side, tail=tail, **divergence)
    chooser = student if side == "student" else teacher
    options = {"top_k": 7, "top_k_from": side, "tail": tail}
    ids = chooser.float().sort(dim=-1, descending=True, stable=True).indices[:, :7]
    _, gradient = run(student, teacher, on_divergence=torch.ones(3, device=device), **options)
    listed = torch.zeros_like(gradient, dtype=torch.bool).scatter_(-1, ids, True)
    if not tail:
        assert (gradient[~listed] == 0).all()
        assert (gradient[listed] != 0).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_fewer_finite_logits_than_places(side, tail, dtype, device):
    """Tokens of probability 0 are the least probable, ties by id: 3 finite ones, then the first columns."""
    student, teacher = (rows("gumbel", 3, 1111, dtype, device) for _ in range(2))
    chooser = student if side == "student" else teacher
    finite = torch.zeros(3, 1111, dtype=torch.bool, device=device)
    finite[0, [1, 3, 1100]], finite[1, :3], finite[2, 1108:] = True, True, True
    chooser[~finite] = -torch.inf
    for divergence in few(SIMPLE, 2):
        for top_k in few((3, 7, 64, 300), 3):
            options = {"top_k": top_k, "top_k_from": side, "tail": tail, **divergence}
            check(student, teacher, **options)
            check(student, teacher, **options, token_clip=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", CHOSEN, ids=name)
def test_a_token_does_not_depend_on_its_batch_nor_on_the_run(chosen, dtype, device):
    student, teacher = (x.reshape(3, 3, WIDE) for x in pair("gumbel", 9, WIDE, dtype, device))
    upstream = torch.randn(3, 3, device=device)
    whole, again = (run(student, teacher, on_divergence=upstream, **chosen) for _ in range(2))
    assert_same_results(again, whole)
    one = run(student[1:2, 1], teacher[1:2, 1], on_divergence=upstream[1:2, 1], **chosen)
    assert_same_bits(one[0].divergence, whole[0].divergence[1:2, 1])
    assert_same_bits(one[1], whole[1][1:2, 1])


@pytest.mark.parametrize("chosen", CHOSEN, ids=name)
def test_adding_numbers_to_the_rows_changes_nothing(chosen, device):
    student, teacher = (torch.randint(-256, 257, (3, WIDE), device=device) / 16 for _ in range(2))
    upstream = torch.randn(3, device=device)
    expected = run(student, teacher, on_divergence=upstream, temperature=0.8, **chosen)
    found = run(student + 128, teacher - 64, on_divergence=upstream, temperature=0.8, **chosen)
    assert_same_results(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", CHOSEN, ids=name)
def test_the_order_of_the_vocabulary_does_not_matter(chosen, dtype, device):
    """Rows without ties among the places, held to the formula of the rows in their first order."""
    student, teacher = (torch.randn(3, 1111, device=device).to(dtype) for _ in range(2))
    for logits in (student, teacher):
        logits[:, :71] = torch.linspace(4, 12, 71, device=device).to(dtype)
    order = torch.randperm(1111, device=device)
    expected = opsd_loss(student, teacher, **chosen).divergence
    check(student[:, order], teacher[:, order], **chosen)
    found = sdkernels.opsd_loss(student[:, order], teacher[:, order], **chosen).divergence
    assert (found.double() - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_an_upstream_of_zero_is_zero_even_where_the_divergence_is_infinite(dtype, device):
    student, teacher = (torch.randn(3, 111, device=device).to(dtype) for _ in range(2))
    teacher[1, 5] = -torch.inf
    upstream = torch.tensor([1.0, 0.0, -2.0], device=device)
    for chosen in SIMPLE:
        output, gradient = check(student, teacher, on_divergence=upstream, **chosen)
        assert (gradient[1] == 0).all()
        assert gradient.isfinite().all()
        assert output.divergence[1].isinf() == (chosen["divergence"] == "reverse_kl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chosen", CHOSEN, ids=name)
def test_a_temperature_of_a_masked_token_is_not_used(chosen, dtype, device):
    student, teacher = pair("gaussian", 2, 111, dtype, device)
    mask, upstream = torch.tensor([1, 0], device=device), torch.ones(2, device=device)
    expected = run(student, teacher, on_divergence=upstream, mask=mask, temperature=0.7, **chosen)
    for bad in (0.0, torch.nan):
        temperature = torch.tensor([0.7, bad], dtype=torch.float64, device=device)
        assert_same_results(
            run(student, teacher, on_divergence=upstream, mask=mask, temperature=temperature, **chosen), expected
        )


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("divergence", SIMPLE, ids=name)
def test_masks_of_the_least_number_exclude_no_more_than_they_must(divergence, dtypes, device):
    """As attention and padding masks have it: such logits are finite, and their difference counts where P > 0."""
    for student, teacher in (([3, 0, -300], [1, 0, None]), ([3, 0, None], [1, 0, -300]), ([3, 0, None], [1, 0, None])):
        given = [
            torch.tensor([[torch.finfo(dtype).min if x is None else x for x in row]], dtype=dtype, device=device)
            for row, dtype in zip((student, teacher), dtypes, strict=True)
        ]
        for clip in ({}, {"token_clip": 100.0}):
            check(*given, **divergence, **clip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_a_bad_row_without_upstream_gradient_is_nan_too(side, dtype, device):
    both = pair("gaussian", 2, 111, dtype, device)
    both[side][0, 5] = torch.nan
    _, gradient = run(*both, on_divergence=torch.tensor([0.0, 1.0], device=device))
    assert gradient[0].isnan().all()
    assert gradient[1].isfinite().all()


def test_a_beta_that_float32_does_not_hold(device):
    student, teacher = (torch.tensor([x], device=device) for x in ([-300.0, 0.0], [0.0, -300.0]))
    for beta in (1e-46, 1 - 2**-53):
        check(student, teacher, divergence="jsd", beta=beta)


def test_a_term_beside_which_the_others_are_small(device):
    """150,000 entries of 1e-6 after one of 20 are 0.15, which a float32 sum would lose."""
    student, teacher = (torch.randn(1, FULL, device=device) * 0.5 for _ in range(2))
    student[0, 0], teacher[0, 0] = -8.0, 14.0
    for chosen in ({}, {"token_clip": 1e3}):
        check(student, teacher, **chosen)
