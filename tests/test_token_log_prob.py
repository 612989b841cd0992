import nasty
import oracles
import pytest
import torch
from closeness import assert_gradient, assert_log_probs, assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from sdkernels import token_log_prob


def run(logits, token_ids, on_log_prob=None, on_entropy=None, **options):
    """token_log_prob and, for upstream gradients, the logits' gradient."""
    leaf = logits.detach().requires_grad_()
    result = token_log_prob(leaf, token_ids, **options)
    pairs = [(y, g) for y, g in zip(result, (on_log_prob, on_entropy), strict=True) if g is not None]
    (gradient,) = torch.autograd.grad([y for y, _ in pairs], leaf, [g.to(y) for y, g in pairs])
    return result, gradient


def eager(logits, token_ids, upstream):
    """What a user would write: float32 log_softmax of the logits, gradient in their dtype."""
    leaf = logits.detach().requires_grad_()
    log_p = leaf.to(torch.promote_types(leaf.dtype, torch.float32)).log_softmax(-1)
    log_prob = log_p.gather(-1, token_ids.long().unsqueeze(-1)).squeeze(-1)
    (gradient,) = torch.autograd.grad(log_prob, leaf, upstream.to(log_prob))
    return log_prob.detach(), torch.special.entr(log_p.detach().exp()).sum(-1), gradient


def check(logits, token_ids, on_log_prob=None, on_entropy=None, **options):
    """Values and gradient against the oracle; returns both of the library's."""
    if on_log_prob is None:
        on_log_prob = torch.randn(token_ids.shape).to(logits.device)
    result, gradient = run(logits, token_ids, on_log_prob, on_entropy, **options)
    truth = oracles.token_log_prob(logits, token_ids, **options)
    assert_log_probs(result.log_prob, truth.log_prob)
    assert_log_probs(result.entropy, truth.entropy, "entropy")
    on_entropy = 0.0 if on_entropy is None else on_entropy
    expected = oracles.token_log_prob_gradient(logits, token_ids, on_log_prob, on_entropy, **options)
    assert_gradient(gradient, expected, logits.dtype)
    return result, gradient


def test_closed_form_gradient_of_the_oracle_equals_autograd():
    logits = (torch.randn(4, 9, dtype=torch.float64) * 3).requires_grad_()
    token_ids, a, b = nasty.ids(4, 9), torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    log_p = (logits / 0.7).log_softmax(-1)
    (a * log_p[range(4), token_ids] - b * (log_p.exp() * log_p).sum(-1)).sum().backward()
    closed = oracles.token_log_prob_gradient(logits, token_ids, a, b, 0.7).gradient
    torch.testing.assert_close(closed, logits.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("kind", nasty.ROWS)
def test_nasty_rows_are_as_accurate_as_eager(kind, dtype, device):
    logits, token_ids = nasty.rows(kind, 3, 50257, dtype, device), nasty.ids(3, 50257, device)
    upstream = torch.tensor([1.0, -2.5, 1e-3], device=device)
    result, gradient = run(logits, token_ids, upstream)
    truth = oracles.token_log_prob(logits, token_ids)
    eager_log_prob, eager_entropy, eager_gradient = eager(logits, token_ids, upstream)
    assert_log_probs(result.log_prob, truth.log_prob, eager=eager_log_prob)
    assert_log_probs(result.entropy, truth.entropy, "entropy", eager=eager_entropy)
    impossible = truth.log_prob == -torch.inf
    eager_gradient[impossible] = 0  # eager gives -p there
    expected = oracles.token_log_prob_gradient(logits, token_ids, upstream, 0.0)
    assert_gradient(gradient, expected, dtype, eager=eager_gradient)
    assert (result.log_prob <= 0).all()
    assert (result.entropy >= 0).all()


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("vocab", nasty.VOCABULARIES)
def test_every_vocabulary_with_both_upstream_gradients(vocab, dtype, device):
    logits, token_ids = nasty.rows("gaussian", 4, vocab, dtype, device), nasty.ids(4, vocab, device)
    on_log_prob, on_entropy = torch.randn(4, device=device), torch.randn(4, device=device)
    check(logits, token_ids, on_log_prob, on_entropy, temperature=0.6)


@pytest.mark.parametrize("kind", nasty.ROWS)
def test_entropy_gradient_of_nasty_rows(kind, device):
    logits, token_ids = nasty.rows(kind, 3, 50257, device=device), nasty.ids(3, 50257, device)
    check(logits, token_ids, torch.zeros(3), torch.tensor([1.0, -0.5, 3.0]))


@pytest.mark.parametrize("layout", nasty.LAYOUTS)
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, 50257), (torch.bfloat16, 151936), (torch.float64, 111)])
def test_views_give_the_bits_of_contiguous_logits(layout, dtype, vocab, device):
    logits = nasty.rows("gumbel", 4, vocab, dtype, device).reshape(2, 2, vocab)
    token_ids, upstream = nasty.ids(4, vocab, device).reshape(2, 2), torch.randn(2, 2, device=device)
    view = nasty.LAYOUTS[layout](logits)
    assert torch.equal(view, logits)
    result, gradient = check(view, token_ids, upstream, -upstream)
    same, same_gradient = run(logits, token_ids, upstream, -upstream)
    assert_same_bits(result.log_prob, same.log_prob)
    assert_same_bits(result.entropy, same.entropy)
    assert_same_bits(gradient, same_gradient)


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (0,), (2, 0), (0, 3), (2, 3), (2, 1, 3), (2, 1, 2, 2), (1, 2, 1, 2, 2)]
)
def test_every_leading_shape(shape, device):
    count = torch.Size(shape).numel()
    logits = nasty.rows("gaussian", count, 111, device=device).reshape(*shape, 111)
    token_ids = nasty.ids(count, 111, device).reshape(shape)
    check(logits, token_ids, None, torch.randn(shape))


def test_broadcast_logits_get_the_sum_of_the_gradients(device):
    row, token_ids, upstream = torch.randn(7, device=device), torch.tensor([1, 6, 1], device=device), torch.randn(3)
    leaf = row.clone().requires_grad_()
    (token_log_prob(leaf.expand(3, 7), token_ids).log_prob * upstream.to(device)).sum().backward()
    each = oracles.token_log_prob_gradient(row.expand(3, 7), token_ids, upstream, 0.0)
    assert (leaf.grad.double() - each.gradient.sum(0)).norm() <= 1e-6 * each.c.sum()


@pytest.mark.parametrize("make", [lambda g: g[:1].expand(6), lambda g: g, lambda g: torch.randn(6, 2).to(g)[:, 0]],
                         ids=["stride 0", "random", "strided"])  # fmt: skip
def test_upstream_gradients_of_any_layout(make, device):
    logits, token_ids = nasty.rows("gaussian", 6, 111, device=device), nasty.ids(6, 111, device)
    upstream = make(torch.randn(6, device=device))
    check(logits, token_ids, upstream, upstream.neg())


@pytest.mark.parametrize("upstream", [(1.0, None), (None, 1.0)], ids=["log_prob", "entropy"])
def test_one_output_alone_can_be_differentiated(upstream, device):
    logits, token_ids = nasty.rows("gaussian", 3, 111, device=device), nasty.ids(3, 111, device)
    given_upstream = [None if u is None else torch.full((3,), u, device=device) for u in upstream]
    _, gradient = run(logits, token_ids, *given_upstream)
    expected = oracles.token_log_prob_gradient(logits, token_ids, *(u or 0.0 for u in upstream))
    assert_gradient(gradient, expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16, torch.float64])
def test_mask_keeps_where_it_is_not_zero(dtype, device):
    logits, token_ids = nasty.rows("gaussian", 4, 111, device=device), nasty.ids(4, 111, device)
    mask = torch.tensor([1, 0, 3, 0]) if dtype in (torch.bool, torch.uint8) else torch.tensor([1, 0, -0.5, -0.0])
    mask = mask.to(dtype) if dtype != torch.int64 else torch.tensor([1, 0, -7, 0])
    check(logits, token_ids, mask=mask.to(device))


@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_masked_tokens_are_zero_whatever_they_and_their_upstream_hold(dtype, device):
    logits, token_ids = nasty.rows("gaussian", 6, 50257, dtype, device), nasty.ids(6, 50257, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    token_ids[2] = -100
    gone = torch.tensor([False, True, True, False, True, False], device=device)
    logits[gone] = torch.nan
    token_ids[4] = 10**6
    upstream = torch.where(gone, torch.nan, 1.0)
    result, gradient = check(logits, token_ids, upstream, upstream, mask=mask)
    for each in (*result, gradient):
        assert (each[gone] == 0).all()


def test_everything_masked_gives_zeros(device):
    logits = torch.full((2, 3, 111), torch.nan, device=device)
    token_ids = torch.full((2, 3), 5, device=device)
    result, gradient = run(logits, token_ids, torch.full((2, 3), torch.nan), mask=torch.zeros(2, 3, device=device))
    for each in (*result, gradient):
        assert (each == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_temperature_per_token_per_sequence_packed_and_zero_dimensional(dtype, device):
    logits, token_ids = nasty.rows("gaussian", 6, 111, dtype, device), nasty.ids(6, 111, device)
    each, batch = torch.tensor([0.3, 1.0, 2.0, 0.9, 1e-2, 50.0], device=device), torch.tensor([0.5, 2.0], device=device)
    on = torch.randn(6, device=device)
    check(logits, token_ids, on, on, temperature=each)
    check(logits, token_ids, on, on, temperature=each[2])
    check(logits.view(2, 3, 111), token_ids.view(2, 3), on.view(2, 3), on.view(2, 3), temperature=batch)
    check(logits.view(2, 3, 111), token_ids.view(2, 3), on.view(2, 3), temperature=each.double().view(3, 2).t())
    ends = torch.tensor([0, 0, 4, 4, 6], dtype=torch.int32, device=device)
    packed = torch.tensor([9.0, 0.5, 8.0, 2.0], device=device)
    check(logits, token_ids, on, temperature=packed, cu_seqlens=ends)


def test_a_label_of_probability_zero_gives_minus_inf_and_no_gradient(device):
    logits, token_ids = nasty.rows("gaussian", 3, 50257, device=device), torch.tensor([0, 40000, 50256], device=device)
    logits[range(3), token_ids] = -torch.inf
    result, gradient = check(logits, token_ids, torch.ones(3))
    assert (result.log_prob == -torch.inf).all()
    assert (gradient == 0).all()
    check(logits, token_ids, torch.ones(3), torch.ones(3))


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_logit_makes_its_row_nan_and_no_other(bad, dtype, device):
    vocab = 50257
    logits, token_ids = nasty.rows("gaussian", 5, vocab, dtype, device), nasty.ids(5, vocab, device)
    clean, clean_gradient = run(logits, token_ids, torch.ones(5))
    for row, column in ((1, 0), (2, vocab - 1), (3, 20000)):
        logits[row, column] = bad
    result, gradient = run(logits, token_ids, torch.ones(5))
    for each, before in zip((*result, gradient), (*clean, clean_gradient), strict=True):
        assert each[1:4].isnan().all()
        assert_same_bits(each[[0, 4]], before[[0, 4]])


@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_a_row_of_only_minus_inf_is_nan(dtype, device):
    logits = nasty.rows("gaussian", 3, 50257, dtype, device)
    logits[1] = -torch.inf
    result, gradient = run(logits, nasty.ids(3, 50257, device), torch.ones(3))
    for each in (*result, gradient):
        assert each[1].isnan().all()
        assert not each[[0, 2]].isnan().any()


@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_a_token_does_not_depend_on_its_batch_nor_on_the_run(dtype, device):
    logits = nasty.rows("gumbel", 9, 50257, dtype, device).reshape(3, 3, 50257)
    token_ids, on = nasty.ids(9, 50257, device).reshape(3, 3), torch.randn(3, 3, device=device)
    result, gradient = run(logits, token_ids, on, on)
    again, again_gradient = run(logits, token_ids, on, on)
    alone, alone_gradient = run(logits[1:2, 1], token_ids[1:2, 1], on[1:2, 1], on[1:2, 1])
    for whole, repeated, single in zip(
        (*result, gradient), (*again, again_gradient), (*alone, alone_gradient), strict=True
    ):
        assert_same_bits(repeated, whole)
        assert_same_bits(single, whole[1:2, 1])


def test_adding_a_number_to_a_row_changes_nothing(device):
    logits = torch.randint(-256, 257, (3, 50257), device=device) / 16  # exact in float32, before and after the shift
    token_ids, upstream = nasty.ids(3, 50257, device), torch.ones(3)
    result, gradient = run(logits, token_ids, upstream, upstream, temperature=0.7)
    shifted, shifted_gradient = run(logits + 128, token_ids, upstream, upstream, temperature=0.7)
    for each, moved in zip((*result, gradient), (*shifted, shifted_gradient), strict=True):
        assert_same_bits(moved, each)


def test_minus_zero_is_zero(device):
    logits, token_ids = nasty.rows("signed_zeros", 3, 111, device=device), nasty.ids(3, 111, device)
    for each, plain in zip(token_log_prob(logits, token_ids), token_log_prob(logits.abs(), token_ids), strict=True):
        assert_same_bits(each, plain)


@pytest.mark.parametrize("kind", ["gaussian", "gumbel", "peaky", "ties"])
def test_the_gradient_of_a_row_sums_to_zero(kind, device):
    logits, token_ids = nasty.rows(kind, 3, 151936, device=device), nasty.ids(3, 151936, device)
    _, gradient = run(logits, token_ids, torch.ones(3), torch.ones(3))
    c = oracles.token_log_prob_gradient(logits, token_ids, 1.0, 1.0).c
    assert (gradient.double().sum(-1).abs() <= 1e-6 * c).all()


def test_int32_ids_equal_int64_ids(device):
    logits, token_ids = nasty.rows("gaussian", 4, 111, device=device), nasty.ids(4, 111, device)
    token_ids[1] = -100
    result, gradient = run(logits, token_ids.int(), torch.ones(4))
    wide, wide_gradient = run(logits, token_ids, torch.ones(4))
    for each, expected in zip((*result, gradient), (*wide, wide_gradient), strict=True):
        assert_same_bits(each, expected)


@given(st.data())
def test_any_shape_and_options_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4), "shape"))
    vocab, dtype = data.draw(st.integers(1, 300), "V"), data.draw(st.sampled_from(nasty.DTYPES), "dtype")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    count = torch.Size(shape).numel()
    kind = data.draw(st.sampled_from(["gaussian", "gumbel", "peaky", "scattered_minus_inf", "ties"]), "rows")
    logits = nasty.rows(kind, count, vocab, dtype).reshape(*shape, vocab)
    token_ids = nasty.ids(count, vocab).reshape(shape)
    token_ids[torch.rand(shape) < 0.2] = -100
    options = {"mask": data.draw(st.sampled_from([None, (torch.rand(shape) < 0.7).int()]), "mask")}
    temperatures = [1.0, 0.3, torch.rand(shape) + 0.1] + ([torch.rand(shape[:-1]) + 0.1] if shape else [])
    options["temperature"] = data.draw(st.sampled_from(temperatures), "temperature")
    check(logits, token_ids, torch.randn(shape), torch.randn(shape), **options)
