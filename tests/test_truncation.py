"""`truncated_log_softmax`: log q and its gradient, given the S that the library chose and SPEC allows."""

import nasty
import oracles
import pytest
import torch
from closeness import assert_gradient, assert_log_probs, assert_same_bits, assert_within
from conftest import INTERPRETED
from hypothesis import given
from hypothesis import strategies as st
from supports import (
    DTYPES,
    FULL,
    KINDS,
    LAYOUTS,
    SOME_FILTERS,
    SWEEP,
    TEMPERATURES,
    WIDE,
    assert_allowed,
    few,
    filters,
    name,
    rows,
)

from sdkernels import truncated_log_softmax
from sdkernels.reference import truncation as reference


def run(logits, upstream=None, function=truncated_log_softmax, **options):
    """log q in the arithmetic's dtype and the logits' gradient for an upstream that is NaN outside S."""
    leaf = logits.detach().requires_grad_()
    log_q = function(leaf, dtype=torch.promote_types(logits.dtype, torch.float32), **options)
    upstream = torch.randn(logits.shape, device=logits.device) if upstream is None else upstream
    upstream = torch.where(log_q == -torch.inf, torch.nan, upstream.to(log_q))
    (gradient,) = torch.autograd.grad(log_q, leaf, upstream)
    return log_q.detach(), gradient, upstream


def check(logits, upstream=None, function=truncated_log_softmax, temperature=1.0, **chosen):
    log_q, gradient, upstream = run(logits, upstream, function, temperature=temperature, **chosen)
    inside = log_q > -torch.inf
    assert_allowed(inside, logits, temperature, **chosen)
    assert_log_probs(log_q, oracles.log_softmax(logits, temperature, inside=inside), "log q")
    truth = oracles.log_softmax_gradient(logits, upstream, inside, temperature)
    assert_gradient(gradient, truth, logits.dtype)
    assert (gradient[~inside] == 0).all()
    return log_q, gradient


def test_closed_form_gradient_of_the_oracle_equals_autograd():
    logits = (torch.randn(4, 9, dtype=torch.float64) * 3).requires_grad_()
    inside, upstream = torch.rand(4, 9) < 0.6, torch.randn(4, 9, dtype=torch.float64)
    inside[:, 3] = True
    log_q = (logits / 0.7).masked_fill(~inside, -torch.inf).log_softmax(-1)
    (log_q[inside] * upstream[inside]).sum().backward()
    closed = oracles.log_softmax_gradient(logits, upstream, inside, 0.7).gradient
    torch.testing.assert_close(closed, logits.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("chosen", few(filters(vocab=111)), ids=name)
def test_the_reference_equals_the_formula(chosen):
    temperature = torch.tensor(TEMPERATURES)
    for kind in ("gaussian", "scattered_minus_inf", "tied_everywhere"):
        check(rows(kind, 5, 111, torch.float64), function=reference.truncated_log_softmax, temperature=temperature,
              **chosen)  # fmt: skip


@pytest.mark.parametrize("function", [truncated_log_softmax, reference.truncated_log_softmax])
@pytest.mark.parametrize("chosen", few(filters(vocab=13)[::3]), ids=name)
def test_gradcheck(chosen, function):
    logits = torch.randn(2, 3, 13, dtype=torch.float64) * 3
    temperature = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def probabilities(x):  # finite differences cannot take -inf
        return function(x, temperature, **chosen).exp()

    assert torch.autograd.gradcheck(probabilities, logits.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("chosen", SWEEP, ids=name)
def test_every_filter_at_a_full_vocabulary(chosen, dtype, device):
    kinds = ("gaussian", "gumbel", "tied_everywhere", "large_in_one_place", "gaussian")
    each = torch.tensor(TEMPERATURES, device=device).roll(len(str(chosen)))
    count = 2 if INTERPRETED else 5
    logits = torch.cat([rows(kind, 1, FULL, dtype, device) for kind in kinds[:count]])
    check(logits, temperature=each[:count], **chosen)


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_the_other_dtypes_at_a_full_vocabulary(chosen, dtype, device):
    check(rows("gaussian", 3, FULL, dtype, device), temperature=0.8, **chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nasty_rows(kind, dtype, device):
    logits = rows(kind, 3, WIDE, dtype, device)
    for chosen in ({"top_k": 5}, {"top_p": 0.95}, {"top_k": 300, "min_p": 0.01}, {}):
        check(logits, temperature=1.6, **chosen)


@pytest.mark.parametrize("chosen", few(filters(vocab=111)), ids=name)
@pytest.mark.parametrize("vocab", [1, 2, 111])
def test_small_vocabularies(vocab, chosen, device):
    check(rows("gaussian", 3, vocab, device=device), temperature=0.5, **chosen)
    check(rows("ties", 3, vocab, device=device), **chosen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, WIDE), (torch.bfloat16, FULL), (torch.float64, 111)])
def test_views_give_the_bits_of_contiguous_logits(layout, dtype, vocab, device):
    logits = rows("gumbel", 4, vocab, dtype, device).reshape(2, 2, vocab)
    view, upstream = nasty.LAYOUTS[layout](logits), torch.randn(2, 2, vocab, device=device)
    for chosen in ({"top_k": 20}, {"top_p": 0.99}):
        for each, same in zip(check(view, upstream, **chosen), run(logits, upstream, **chosen), strict=False):
            assert_same_bits(each, same)


@pytest.mark.parametrize("make", [lambda g: g[:1].expand(g.shape), lambda g: g[:, :1].expand(g.shape), lambda g: g,
                                  lambda g: g.t().contiguous().t()],
                         ids=["stride 0 over tokens", "stride 0 over V", "random", "vocabulary first"])  # fmt: skip
@pytest.mark.parametrize("chosen", [{"top_k": 5}, {"top_p": 0.999}, {}], ids=name)
def test_upstream_gradients_of_any_layout(chosen, make, device):
    logits, upstream = rows("gaussian", 4, WIDE, device=device) / 5, make(torch.randn(4, WIDE, device=device))
    leaf = logits.clone().requires_grad_()
    log_q = truncated_log_softmax(leaf, 0.8, **chosen)
    (gradient,) = torch.autograd.grad(log_q, leaf, upstream)
    inside = log_q > -torch.inf
    assert_gradient(gradient, oracles.log_softmax_gradient(logits, upstream, inside, 0.8), torch.float32)


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (0,), (2, 0), (0, 3), (2, 3), (2, 1, 3), (2, 1, 2, 2), (1, 2, 1, 2, 2)]
)
def test_every_leading_shape(shape, device):
    logits = rows("gaussian", torch.Size(shape).numel(), 111, device=device).reshape(*shape, 111)
    check(logits, top_p=0.9)
    check(logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_temperature_per_token_per_sequence_and_zero_dimensional(chosen, dtype, device):
    logits = rows("gaussian", 6, 1111, dtype, device).reshape(2, 3, 1111)
    each = torch.tensor([[0.3, 1.0, 2.0], [0.9, 1e-2, 50.0]], device=device)
    for temperature in (each, each[:, 1], each[0, 2], each.double().t().contiguous().t()):
        check(logits, temperature=temperature, **chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("result", [None, *nasty.DTYPES])
def test_the_result_has_the_dtype_of_torch_log_softmax(result, dtype, device):
    logits = rows("gumbel", 3, 999, dtype, device).requires_grad_()
    for chosen in ({}, {"top_k": 7}):
        log_q = truncated_log_softmax(logits, 0.8, **chosen, dtype=result)
        assert log_q.dtype == (dtype if result is None else result)
        inside = log_q > -torch.inf
        truth = oracles.log_softmax(logits, 0.8, inside=inside)
        if log_q.dtype in (torch.bfloat16, torch.float16):
            assert_within(log_q, truth, 2e-5 + torch.finfo(log_q.dtype).eps / 2 * truth.abs(), "log q")
        elif dtype == torch.float64 and log_q.dtype == torch.float32:
            assert_within(log_q, truth, torch.finfo(torch.float32).eps * truth.abs() + 1e-10, "log q")
        else:
            assert_log_probs(log_q, truth, "log q")
        upstream = torch.randn(logits.shape, device=device).to(log_q.dtype)
        (gradient,) = torch.autograd.grad(log_q, logits, upstream)
        assert_gradient(gradient, oracles.log_softmax_gradient(logits, upstream, inside, 0.8), dtype)


@pytest.mark.parametrize("chosen", [{"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}, {"top_k": 0, "top_p": 1, "min_p": 0}],
                         ids=name)  # fmt: skip
def test_what_keeps_everything_is_no_filter(chosen, device):
    logits = rows("gaussian", 3, WIDE, device=device)
    plain, gradient, upstream = run(logits)
    for each, same in zip(run(logits, upstream, **chosen), (plain, gradient), strict=False):
        assert_same_bits(each, same)
    assert_within(plain, logits.double().log_softmax(-1), 2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("chosen", [*SOME_FILTERS, {}], ids=name)
def test_a_bad_row_is_nan_and_no_other(chosen, bad, dtype, device):
    vocab = 9001
    logits, upstream = rows("gaussian", 5, vocab, dtype, device), torch.randn(5, vocab, device=device)
    clean = run(logits, upstream, **chosen)
    for row, column in ((1, 0), (2, vocab - 1), (3, 5000)):
        logits[row, column if bad != -torch.inf else slice(None)] = bad
    for each, before in zip(run(logits, upstream, **chosen)[:2], clean[:2], strict=True):
        assert each[1:4].isnan().all()
        assert_same_bits(each[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [*SOME_FILTERS, {}], ids=name)
def test_a_row_does_not_depend_on_its_batch_nor_on_the_run(chosen, dtype, device):
    logits = rows("gumbel", 9, WIDE, dtype, device).reshape(3, 3, WIDE)
    upstream = torch.randn(logits.shape, device=device)
    whole, again = run(logits, upstream, **chosen), run(logits, upstream, **chosen)
    alone = run(logits[1:2, 1], upstream[1:2, 1], **chosen)
    for each, repeated, single in zip(whole, again, alone, strict=True):
        assert_same_bits(repeated, each)
        assert_same_bits(single, each[1:2, 1])


@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_adding_a_number_to_a_row_changes_nothing(chosen, device):
    logits = torch.randint(-256, 257, (3, WIDE), device=device) / 16  # exact in float32, before and after the shift
    upstream = torch.randn(3, WIDE, device=device)
    plain, shifted = (run(x, upstream, temperature=0.7, **chosen) for x in (logits, logits + 128))
    for each, moved in zip(plain, shifted, strict=True):
        assert_same_bits(moved, each)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_the_order_of_the_vocabulary_does_not_matter(chosen, dtype, device):
    for kind in ("gaussian", "tied_everywhere"):
        logits, order = rows(kind, 3, WIDE, dtype, device), torch.randperm(WIDE, device=device)
        plain, permuted = (run(x, torch.ones_like(x), **chosen)[0] for x in (logits, logits[:, order]))
        assert torch.equal(plain[:, order] > -torch.inf, permuted > -torch.inf)
        assert_within(permuted, plain[:, order], 2e-6 * plain[:, order].abs().clamp(min=1))


@given(st.data())
def test_any_shape_and_options_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4), "shape"))
    vocab, dtype = data.draw(st.integers(1, 300), "V"), data.draw(st.sampled_from(nasty.DTYPES), "dtype")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    kind = data.draw(
        st.sampled_from(["gaussian", "gumbel", "peaky", "scattered_minus_inf", "ties", "ascending"]), "rows"
    )
    logits = rows(kind, torch.Size(shape).numel(), vocab, dtype).reshape(*shape, vocab)
    temperatures = [1.0, 0.3, torch.rand(shape) + 0.1] + ([torch.rand(shape[:-1]) + 0.1] if shape else [])
    check(
        logits,
        temperature=data.draw(st.sampled_from(temperatures), "temperature"),
        top_k=data.draw(st.none() | st.integers(0, vocab + 2), "top_k"),
        top_p=data.draw(st.none() | st.floats(1e-6, 1), "top_p"),
        min_p=data.draw(st.none() | st.floats(0, 1), "min_p"),
    )
