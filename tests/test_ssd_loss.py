"""`ssd_loss`: weights, reductions, and that its terms are `ssd_decomposition`'s."""

import itertools

import oracles
import pytest
import torch
from closeness import FLOAT64_BOUND, LOG_PROB_BOUND, assert_gradient, assert_same_bits, assert_within
from hypothesis import given
from hypothesis import strategies as st
from supports import DTYPES, FULL, SOME_FILTERS, TEMPERATURES, WIDE, name, rows
from test_ssd import assert_terms, base_log_q, pair

from sdkernels import (
    SSDLoss,
    Support,
    effective_temperature,
    ssd_decomposition,
    ssd_loss,
    token_log_prob,
    truncated_log_softmax,
    truncated_support,
)
from sdkernels.reference.ssd import ssd_loss as reference

WEIGHTS = [(1.0, 1.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0, 0, 1), (0.3, 2.0, -1.5)]
REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum", "none")


def check(student, base, temperature=1.0, function=ssd_loss, mask=None, upstream=None, **options):
    """Loss, terms and gradient against the oracle."""
    chosen = {key: options[key] for key in ("top_k", "top_p", "min_p") if key in options}
    reducing = {
        key: options[key] for key in ("reduction", "normalizer", "cu_seqlens", "token_weight") if key in options
    }
    leaf, shape = student.detach().requires_grad_(), student.shape[:-1]
    output = function(leaf, base, temperature, mask=mask, **options)
    if upstream is None:
        upstream = torch.randn(output.loss.shape, device=student.device)
    (gradient,) = torch.autograd.grad(output.loss, leaf, upstream.to(output.loss), allow_unused=True)

    keep = torch.ones(shape, dtype=torch.bool, device=student.device) if mask is None else mask != 0
    each = oracles.per_token(temperature, shape, options.get("cu_seqlens")).to(student.device)
    vocab = {"vocab": student.shape[-1]} if isinstance(base, Support) else {}
    log_q = base_log_q(base, torch.where(keep, each, 1.0), mask, **chosen, **vocab)
    truth = oracles.ssd(student, log_q, each, mask)
    of_base = base.log_probs if isinstance(base, Support) else base
    exact = student.dtype == of_base.dtype == torch.float64
    assert_terms(output.terms, truth, exact)
    weights = options.get("weights", WEIGHTS[0])
    expected = oracles.ssd_loss(truth, weights, keep, **reducing)
    size = expected.share.abs() * (1 + sum(abs(w) for w in weights))
    bound = (FLOAT64_BOUND if exact else LOG_PROB_BOUND) * (size if output.loss.dim() else size.sum())
    assert output.loss.dtype == torch.promote_types(student.dtype, torch.float32)
    assert_within(output.loss, expected.loss, bound + 4e-7 * (0 if exact else expected.loss.abs()), "loss")
    on = {term: torch.where(keep, x * upstream, 0.0) for term, x in expected.upstream.items()}
    assert_gradient(gradient, oracles.ssd_gradient(student, log_q, each, on, mask), student.dtype)
    return output, gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("chosen", [{"top_k": 20}, {"top_k": 300}, {}], ids=name)
def test_weights_on_the_terms(chosen, weights, dtype, device):
    student, base = (x.reshape(2, 2, 1111) for x in pair("gaussian", 4, 1111, dtype, device))
    for temperature in (0.5, 1.0, 1.6):
        check(student, base, temperature, weights=weights, **chosen)
    sparse = truncated_support(base, 0.8, **chosen, max_size=50)
    check(student, sparse, 0.8, weights=weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_accuracy_at_a_full_vocabulary(chosen, dtype, device):
    student, base = (x.reshape(1, 2, FULL) for x in pair("gaussian", 2, FULL, dtype, device))
    check(student, base, 1.6, **chosen)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_equal_weights_are_the_cross_entropy_with_gradient_p_minus_q(temperature, device):
    student, base = pair("gumbel", 3, WIDE, device=device)
    output, gradient = check(student, base, temperature, top_k=20, reduction="none", upstream=torch.ones(3))
    assert_within(output.loss, output.terms.cross_entropy.double(), 5e-5, "loss")
    q = truncated_log_softmax(base, temperature, top_k=20).double().exp()
    error = (gradient.double() - (oracles.log_softmax(student).exp() - q)).norm(dim=-1)
    assert (error <= 2e-6).all()


def test_it_is_the_expectation_of_the_published_loss_on_sampled_tokens(device):
    """sum_y q(y) (-log p(y)), one token_log_prob for each y of S."""
    student, base = pair("gaussian", 1, 111, torch.float64, device)
    log_q = truncated_log_softmax(base, 0.8, top_k=7)
    ids = (log_q[0] > -torch.inf).nonzero()[:, 0]
    sampled = -token_log_prob(student.expand(7, 111), ids).log_prob
    loss = ssd_loss(student, base, 0.8, top_k=7).loss
    assert_within(loss, (log_q[0, ids].exp() * sampled).sum(), 1e-12, "loss")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalizer", [None, 7, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_normalizers_and_token_weights(weighted, normalizer, reduction, device):
    if normalizer is not None and reduction == "none":
        return
    student, base = (x.reshape(3, 4, 111) for x in pair("gaussian", 12, 111, torch.float64, device))
    mask = torch.rand(3, 4, device=device) < 0.7
    mask[1] = False
    options = {"token_weight": torch.randn(3, 4, device=device)} if weighted else {}
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(device)
    check(student, base, 0.8, mask=mask, reduction=reduction, normalizer=normalizer, top_k=5, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ends", [[0, 4, 9], [0, 0, 4, 4, 9, 9], [0, 9]], ids=str)
def test_packed_sequences_with_their_own_temperatures(ends, reduction, device):
    student, base = pair("gaussian", 9, 111, torch.float64, device)
    mask, cu_seqlens = torch.rand(9, device=device) < 0.7, torch.tensor(ends, dtype=torch.int32, device=device)
    packed = torch.rand(len(ends) - 1, device=device) + 0.5
    for temperature in (packed, torch.rand(9, device=device) + 0.5, 0.8):
        options = {"mask": mask, "reduction": reduction, "cu_seqlens": cu_seqlens}
        check(student, base, temperature, top_p=0.9, **options)
        check(student, base, temperature, top_p=0.9, function=reference, **options)
    support = truncated_support(base, oracles.per_token(packed, (9,), cu_seqlens), top_p=0.9, max_size=20)
    check(student, support, packed, mask=mask, reduction=reduction, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_token_is_a_loss_of_zero_that_backpropagates(dtype, reduction, shape, device):
    student = torch.full((*shape, 7), torch.nan, dtype=dtype, device=device).requires_grad_()
    for chosen in ({"top_k": 2}, {}):
        student.grad = None
        output = ssd_loss(student, student.detach(), 0.8, mask=torch.zeros(shape, device=device), reduction=reduction,
                          **chosen)  # fmt: skip
        output.loss.sum().backward()
        assert output.loss.sum().item() == 0
        assert student.grad.shape == student.shape
        assert (student.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [{"top_k": 5}, {}], ids=name)
def test_masked_tokens_hold_anything(chosen, dtype, device):
    student, base = (x.reshape(2, 3, 1111) for x in pair("gaussian", 6, 1111, dtype, device))
    mask, weight = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device), torch.rand(2, 3, device=device)
    results = []
    for value in (None, torch.nan, torch.inf, -torch.inf):
        if value is not None:
            gone = mask == 0
            student, base = (torch.where(gone.unsqueeze(-1), value, x) for x in (student, base))
            weight = torch.where(gone, value, weight)
        output, gradient = check(student, base, 0.8, mask=mask, token_weight=weight, upstream=torch.ones(()), **chosen)
        results.append((output.loss, *output.terms[:-1], gradient))
    for each in results[1:]:
        for found, expected in zip(each, results[0], strict=True):
            assert_same_bits(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_terms_are_those_of_the_decomposition(dtype, device):
    student, base = pair("gaussian", 3, WIDE, dtype, device)
    terms = ssd_decomposition(student, base, 0.8, top_k=20)
    for found, expected in zip(ssd_loss(student, base, 0.8, top_k=20, weights=(1, 2, 3)).terms, terms, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_terms_of_the_output_are_differentiable_too(dtype, device):
    student, base = pair("gaussian", 3, 1111, dtype, device)
    upstream = {term: torch.randn(3, device=device) for term in oracles.SSD_TERMS if term != "constant"}
    leaf = student.clone().requires_grad_()
    terms = ssd_loss(leaf, base, 0.8, top_k=20).terms
    (gradient,) = torch.autograd.grad(sum((getattr(terms, term) * g).sum() for term, g in upstream.items()), leaf)
    log_q = base_log_q(base, 0.8, None, top_k=20)
    assert_gradient(gradient, oracles.ssd_gradient(student, log_q, 0.8, upstream), dtype)


def test_a_term_of_weight_zero_does_not_count_even_if_it_is_infinite(device):
    student, base = (torch.randn(3, 111, device=device) for _ in range(2))
    student[range(3), base.argmax(-1)] = -torch.inf
    infinite = ssd_loss(student, base, 0.8, top_k=5)
    finite = ssd_loss(student.requires_grad_(), base, 0.8, top_k=5, weights=(1, 1, 0))
    finite.loss.backward()
    assert infinite.loss == torch.inf
    assert finite.loss.isfinite()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("chosen", [{"top_k": 5}, {"top_p": 0.9, "min_p": 0.05}, {}], ids=name)
@pytest.mark.parametrize("function", [ssd_loss, reference])
def test_gradcheck(function, chosen):
    student, base = (torch.randn(2, 3, 13, dtype=torch.float64) * 2 for _ in range(2))
    options = {
        "mask": torch.tensor([[1, 1, 1], [1, 0, 1]]),
        "token_weight": torch.rand(2, 3),
        "weights": (0.5, 2.0, 1.5),
    }
    assert torch.autograd.gradcheck(
        lambda x: function(x, base, 1.6, reduction="seq-mean-token-mean", **options, **chosen).loss,
        student.requires_grad_(),
    )


@given(st.data())
def test_the_reference_and_the_library_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=3), "shape"))
    vocab = data.draw(st.integers(1, 150), "V")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    student, base = (rows("gaussian", torch.Size(shape).numel(), vocab, torch.float64) for _ in range(2))
    options = {
        "top_k": data.draw(st.none() | st.integers(0, vocab + 2), "top_k"),
        "top_p": data.draw(st.none() | st.floats(1e-6, 1), "top_p"),
        "weights": data.draw(st.sampled_from(WEIGHTS), "weights"),
        "mask": data.draw(st.sampled_from([None, torch.rand(shape) < 0.7]), "mask"),
        "token_weight": data.draw(st.sampled_from([None, torch.rand(shape)]), "token_weight"),
        "reduction": data.draw(st.sampled_from(REDUCTIONS), "reduction"),
    }
    temperature = data.draw(st.sampled_from([1.0, 0.8, torch.rand(shape[:-1]) + 0.5]), "temperature")
    for function in (ssd_loss, reference):
        check(student.reshape(*shape, vocab), base.reshape(*shape, vocab), temperature, function, **options)


def test_effective_temperatures_multiply(device):
    """A student that fits q = base^(1 / T_train) on S, decoded at T_eval, samples from base at their product."""
    base = rows("gumbel", 3, 1111, torch.float64, device)
    for train, evaluation in itertools.product((0.5, 1.0, 1.6), (0.7, 1, 2.0)):
        product = effective_temperature(train, evaluation)
        assert isinstance(product, float)
        assert product == train * evaluation
        fitted = truncated_log_softmax(base, train, top_k=20)
        decoded = truncated_log_softmax(fitted, evaluation)
        assert_within(decoded, truncated_log_softmax(base, product, top_k=20), 1e-12)


@pytest.mark.parametrize(
    "chosen", [{"top_k": 5}, {"min_p": 0.1, "weights": (0.5, 1, 2)}, {"reduction": "none"}], ids=str
)
def test_the_module_is_the_function_with_options(chosen, device):
    student, base = (x.reshape(2, 2, 111) for x in pair("gaussian", 4, 111, device=device))
    mask = torch.tensor([[1, 1], [1, 0]], device=device)
    module = SSDLoss(0.8, **chosen)
    assert_same_bits(module(student, base, mask=mask).loss, ssd_loss(student, base, 0.8, mask=mask, **chosen).loss)
    other = module(student, base, temperature=2.0, top_k=3).loss
    assert_same_bits(other, ssd_loss(student, base, **{**chosen, "temperature": 2.0, "top_k": 3}).loss)
    assert isinstance(module, torch.nn.Module)
    assert not module.state_dict()
    assert "temperature=0.8" in repr(module)
