"""`opsd_loss`: values and gradients of every divergence, dense and reduced, clipped or not."""

import oracles
import pytest
import torch
from closeness import LOG_PROB_BOUND, assert_gradient, assert_same_bits, assert_within
from opsd_oracles import (
    EVERY,
    GRADIENT_FACTOR,
    REDUCED,
    SOME,
    opsd_loss,
    pulled,
    rounding,
    trl_divergence,
    trl_top_k_divergence,
)
from supports import DTYPES, FULL, few, name
from test_ssd import pair

import sdkernels
from sdkernels.reference.opsd import opsd_loss as reference

SIMPLE = [{"divergence": "forward_kl"}, {"divergence": "reverse_kl"}, {"divergence": "jsd"}]


def run(student, teacher, on_loss=None, on_divergence=None, function=sdkernels.opsd_loss, **options):
    """The output, and the student's gradient for an upstream gradient of the loss, of the divergence, or of both."""
    leaf = student.detach().requires_grad_()
    output = function(leaf, teacher, **options)
    pulls = [(x, g.to(x)) for x, g in zip(output, (on_loss, on_divergence), strict=True) if g is not None]
    (gradient,) = torch.autograd.grad([x for x, _ in pulls], leaf, [g for _, g in pulls])
    return type(output)(*(x.detach() for x in output)), gradient


def check(student, teacher, function=sdkernels.opsd_loss, on_loss=None, on_divergence=None, **options):
    """Loss, divergence and gradient against the oracle, by default with random upstream gradients of both."""
    if on_loss is None and on_divergence is None:
        none = options.get("reduction") == "none"
        on_loss = torch.randn(student.shape[:-1] if none else (), device=student.device)
        on_divergence = torch.randn(student.shape[:-1], device=student.device)
    output, gradient = run(student, teacher, on_loss, on_divergence, function, **options)
    truth = opsd_loss(student, teacher, **options)
    exact = student.dtype == teacher.dtype == torch.float64
    assert {x.dtype for x in output} == {torch.promote_types(student.dtype, torch.float32)}
    allowed = rounding(truth.divergence, truth.scale, exact)
    assert_within(output.divergence, truth.divergence, allowed, "divergence")
    of_loss = allowed * truth.share.abs()
    if not output.loss.dim():
        size = (truth.share * truth.divergence).nan_to_num(0.0, 0.0).abs().sum()
        of_loss = of_loss.sum() + (1e-15 if exact else 4e-7) * size
    assert_within(output.loss, truth.loss, of_loss, "loss")
    upstream = sum(0.0 if g is None else g * s for g, s in ((on_loss, truth.share), (on_divergence, 1.0)))
    expected, bad = pulled(truth, upstream)
    gradient_rows = gradient.reshape(-1, gradient.shape[-1])
    undefined = gradient_rows[bad].isnan()
    assert (undefined.any(-1) if function is reference else undefined).all()  # autograd keeps to the listed tokens
    factor = None if exact else GRADIENT_FACTOR[options.get("divergence", "forward_kl")]
    assert_gradient(gradient_rows[~bad], expected, student.dtype, factor=factor)
    return output, gradient


def test_closed_forms_of_the_oracle_equal_textbook_formulas_and_autograd():
    student, teacher = (torch.randn(9, dtype=torch.float64) * 2 for _ in range(2))
    order = student.argsort(descending=True).tolist()
    for options in EVERY:
        z = student.clone().requires_grad_()
        p, q = (z / 0.7).softmax(-1), (teacher / 0.7).softmax(-1)
        if "top_k" in options:
            ids = order if options["top_k_from"] == "student" else teacher.argsort(descending=True).tolist()
            groups = [[i] for i in ids[:7]] + ([ids[7:]] if options["tail"] else [])
            p, q = (torch.stack([x[group].sum() for group in groups]) for x in (p, q))
            p, q = p / p.sum(), q / q.sum()
        if options["divergence"] == "forward_kl":
            parts = q * (q / p).log()
        elif options["divergence"] == "reverse_kl":
            parts = p * (p / q).log()
        else:
            m = 0.3 * q + 0.7 * p
            parts = 0.3 * q * (q / m).log() + 0.7 * p * (p / m).log()
        value = parts.clamp(max=options.get("token_clip", torch.inf)).sum()
        value.backward()
        truth = opsd_loss(student.unsqueeze(0), teacher.unsqueeze(0), temperature=0.7, **options)
        torch.testing.assert_close(truth.divergence[0], value.detach(), rtol=0, atol=1e-13)
        torch.testing.assert_close(truth.gradient[0], z.grad, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", EVERY, ids=name)
def test_every_divergence_reduced_and_clipped_or_not(options, dtype, device):
    for vocab in few((1, 2, 111, 1111), 3):
        for scale in (1.0, 0.2):
            student, teacher = pair("gaussian", 4, vocab, dtype, device)
            check(student * scale, teacher * scale, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SOME, ids=name)
def test_accuracy_at_a_full_vocabulary(options, dtype, device):
    student, teacher = pair("gaussian", 2, FULL, dtype, device)
    check(student, teacher, **options)


@pytest.mark.parametrize("options", [SOME[0], SOME[2]], ids=name)
def test_the_vocabulary_of_qwen(options, device):
    check(*pair("gumbel", 1, 151936, torch.bfloat16, device), **options)


@pytest.mark.parametrize("top_k", few((1, 2, 20, 63, 64, 65, 300, 1110), 3))
@pytest.mark.parametrize("divergence", SIMPLE, ids=name)
def test_every_number_of_tokens_kept(divergence, top_k, device):
    student, teacher = pair("gumbel", 3, 1111, device=device)
    for options in REDUCED:
        check(student, teacher, **divergence, **{**options, "top_k": top_k})


@pytest.mark.parametrize("clip", [1e-7, 1e-3, 0.05, 3.0])
@pytest.mark.parametrize("divergence", SIMPLE, ids=name)
def test_clips(divergence, clip, device):
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = pair("gumbel", 4, 1111, dtype, device)
        check(student, teacher, token_clip=clip, **divergence)
        check(student, teacher, token_clip=clip, top_k=5, tail=False, **divergence)


@pytest.mark.parametrize("function", [sdkernels.opsd_loss, reference])
def test_an_entry_equal_to_the_clip_flows_and_one_above_does_not(function):
    student, teacher = torch.randn(1, 4, dtype=torch.float64), torch.full((1, 4), -torch.inf, dtype=torch.float64)
    teacher[:, 2] = 1.0  # its one token holds all of D
    ones = torch.ones(())
    output, free = run(student, teacher, ones, token_clip=1e9, function=function)
    largest = output.divergence.item()
    _, at = run(student, teacher, ones, token_clip=largest, function=function)
    assert_same_bits(at, free)
    below = torch.nextafter(output.divergence, torch.zeros_like(output.divergence)).item()
    output, none = run(student, teacher, ones, token_clip=below, function=function)
    assert (none == 0).all()
    assert output.divergence.item() == below


@pytest.mark.parametrize("reduction", ["none", "token-mean"])
@pytest.mark.parametrize("options", few(SOME, 2), ids=name)
def test_loss_and_divergence_are_differentiable_alone_and_together(options, reduction, device):
    student, teacher = (x.reshape(2, 3, 111) for x in pair("gumbel", 6, 111, device=device))
    shape = (2, 3) if reduction == "none" else ()
    one, random = torch.ones(1, device=device), torch.randn(2, 3, device=device)
    for on_loss in (None, one.expand(shape) if shape else one[0], torch.randn(shape, device=device)):
        for on_divergence in (None, one.expand(2, 3), random.t().contiguous().t(), random[:, :1].expand(2, 3)):
            if on_loss is not None or on_divergence is not None:
                check(student, teacher, on_loss=on_loss, on_divergence=on_divergence, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_forward_kl_is_p_s_minus_p_t_even_where_it_is_infinite(dtype, device):
    student, teacher = pair("gaussian", 3, 1111, dtype, device)
    student[:2, teacher.argmax(-1)[:2]] = -torch.inf
    output, gradient = check(student, teacher, on_divergence=torch.ones(3, device=device))
    assert (output.divergence[:2] == torch.inf).all()
    assert output.divergence[2].isfinite()
    p_s, p_t = (oracles.log_softmax(x).exp() for x in (student, teacher))
    error = (gradient.double() - (p_s - p_t)).norm(dim=-1)
    assert (error <= 2e-6 + 4e-3 * (p_s - p_t).norm(dim=-1) * (dtype != torch.float32)).all()


@pytest.mark.parametrize("function", [sdkernels.opsd_loss, reference])
@pytest.mark.parametrize("reduced", [{}, *REDUCED], ids=name)
@pytest.mark.parametrize("divergence", SIMPLE, ids=name)
def test_what_is_infinite_where_one_side_excludes_tokens(divergence, reduced, function, device):
    """Most tokens of either side, in the last row of none; a student's token of probability e^-200 is possible too."""
    student, teacher = (torch.randn(3, 40, dtype=torch.float64, device=device) for _ in range(2))
    for dtype in (torch.float32, torch.float64):
        z_s, z_t = student.to(dtype), teacher.to(dtype)
        z_t[0, 4:], z_s[1, 4:] = -torch.inf, -torch.inf
        output, _ = check(z_s, z_t, function, **divergence, **reduced)
        infinite = {"forward_kl": [False, True], "reverse_kl": [True, False], "jsd": [False, False]}
        if not reduced:
            found = (output.divergence == torch.inf).tolist()
            assert found == [*infinite[divergence["divergence"]], False]
        clipped, gradient = check(z_s, z_t, function, **divergence, **reduced, token_clip=0.05)
        if not reduced or reduced["tail"]:
            assert clipped.divergence.isfinite().all()
            assert gradient.isfinite().all()
        z_s[0, 4:] -= 200.0
        check(z_s[:1], z_t[:1], function, **divergence, **reduced)
        z_t[1, 4:] -= 200.0
        check(z_s[1:2], z_t[1:2], function, **divergence, **reduced)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", SIMPLE, ids=name)
def test_k_of_the_whole_vocabulary_equals_none_bit_for_bit(divergence, dtype, device):
    student, teacher = pair("gumbel", 3, 1111, dtype, device)
    upstream = torch.randn(3, device=device)
    dense = run(student, teacher, on_divergence=upstream, **divergence)
    for top_k in (None, 0, 1111, 1112, 10**6):
        for options in ({}, *REDUCED):
            found = run(student, teacher, on_divergence=upstream, **divergence, **{**options, "top_k": top_k})
            for each, expected in zip((*found[0], found[1]), (*dense[0], dense[1]), strict=True):
                assert_same_bits(each, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("divergence", SIMPLE, ids=name)
def test_the_tail_is_summed_and_never_one_minus_what_is_kept(divergence, side, dtype, device):
    """One side's tail is 1e-12, the other's 1e-2: 1 - kept would have no digit of it in float32."""
    both = [torch.zeros(2, 1111, dtype=torch.float64, device=device) for _ in range(2)]
    for each, tail in zip(both, (1e-12, 1e-2) if side == 0 else (1e-2, 1e-12), strict=True):
        each[:, 5:] = (
            torch.randn(2, 1106, device=device).log_softmax(-1) + torch.tensor(tail, dtype=torch.float64).log()
        )
        each[:, :5] = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], device=device).log()
    student, teacher = (x.to(dtype) for x in both)
    output, gradient = check(student, teacher, on_divergence=torch.ones(2, device=device), top_k=5, **divergence)
    truth = opsd_loss(student, teacher, top_k=5, **divergence)
    assert ((output.divergence - truth.divergence).abs() <= 1e-4 * truth.divergence).all()
    error = (gradient.double() - truth.gradient).abs()[:, 5:]
    assert (error <= 1e-4 * truth.gradient.abs()[:, 5:]).all()


@pytest.mark.parametrize("reduced", [{}, {"top_k": 7}, {"top_k": 7, "tail": False}], ids=name)
def test_swapping_the_sides_of_the_jsd_swaps_its_weights(reduced, device):
    student, teacher = pair("gumbel", 4, 1111, torch.float64, device)
    for beta in (0.1, 0.5, 0.75):
        there = sdkernels.opsd_loss(student, teacher, divergence="jsd", beta=beta, **reduced)
        sides = {"top_k_from": "teacher", **reduced}
        back = sdkernels.opsd_loss(teacher, student, divergence="jsd", beta=1 - beta, **sides)
        assert_within(back.divergence, there.divergence, 1e-13)


def test_the_jsd_goes_to_the_kls_divided_by_its_weights(device):
    student, teacher = (torch.randn(4, 111, dtype=torch.float64, device=device) for _ in range(2))
    for small, weight, divergence in ((1e-7, 1e-7, "forward_kl"), (1 - 1e-7, 1e-7, "reverse_kl")):
        jsd = sdkernels.opsd_loss(student, teacher, divergence="jsd", beta=small).divergence / weight
        kl = sdkernels.opsd_loss(student, teacher, divergence=divergence).divergence
        assert_within(jsd, kl, 1e-5 * kl)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [x for x in EVERY if "token_clip" not in x], ids=name)
def test_a_divergence_is_zero_at_equal_rows_and_positive_elsewhere(options, dtype, device):
    student, teacher = (torch.randn(4, 1111, device=device).to(dtype) for _ in range(2))
    ones = torch.ones(4, device=device)
    output, gradient = check(student, teacher, on_divergence=ones, **options)
    assert (output.divergence >= 1e-3).all()
    assert (gradient.double().norm(dim=-1) >= 1e-4).all()
    output, gradient = check(student, student, on_divergence=ones, **options)
    assert (output.divergence.abs() <= LOG_PROB_BOUND).all()
    assert (gradient.double().norm(dim=-1) <= 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", EVERY, ids=name)
def test_the_gradients_of_a_row_sum_to_zero(options, dtype, device):
    student, teacher = pair("gumbel", 4, 1111, dtype, device)
    _, gradient = check(student, teacher, on_divergence=torch.ones(4, device=device), **options)
    c = opsd_loss(student, teacher, **options).c
    assert (gradient.double().sum(-1).abs() <= (1e-12 if dtype == torch.float64 else 5e-6) * c).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_it_equals_trl(alpha, device):
    """TRL 1.16's SDPO and SDFT, where no tail is less than their clamp, 1e-7."""
    student, teacher = (torch.randn(4, 111, dtype=torch.float64, device=device) for _ in range(2))
    divergence = {0.0: {"divergence": "forward_kl"}, 1.0: {"divergence": "reverse_kl"}}
    options = divergence.get(alpha, {"divergence": "jsd", "beta": alpha})
    expected = trl_divergence(student.log_softmax(-1), teacher.log_softmax(-1), alpha)
    assert_within(sdkernels.opsd_loss(student, teacher, **options).divergence, expected, 1e-7)
    for k in (1, 7, 110):
        for tail in (True, False):
            expected = trl_top_k_divergence(student, teacher, k, alpha, tail)
            found = sdkernels.opsd_loss(student, teacher, top_k=k, tail=tail, **options).divergence
            assert_within(found, expected, 1e-7)
