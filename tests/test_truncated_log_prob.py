"""`token_log_prob` on truncated distributions and on supports that are replayed."""

import nasty
import oracles
import pytest
import torch
from closeness import assert_gradient, assert_log_probs, assert_same_bits
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
    few,
    filters,
    name,
    rows,
    support_of,
)
from test_token_log_prob import run

from sdkernels import _check, token_log_prob, truncated_support
from sdkernels.reference.token_log_prob import token_log_prob as reference


def ids_in_and_out(logits):
    """Token ids (...): random ones, but the most and the least probable for the first two tokens."""
    vocab, count = logits.shape[-1], logits.shape[:-1].numel()
    token_ids = nasty.ids(count, vocab, logits.device)
    flat = logits.reshape(-1, vocab)[:2].float().nan_to_num(0.0)
    token_ids[:1], token_ids[1:2] = flat[:1].argmax(-1), flat[1:2].argmin(-1)
    return token_ids.reshape(logits.shape[:-1])


def compare(logits, token_ids, inside, result, gradient, upstream, **options):
    """Values and gradient against the oracle on a given S."""
    truth = oracles.token_log_prob(logits, token_ids, **options, inside=inside)
    assert_log_probs(result.log_prob, truth.log_prob)
    assert_log_probs(result.entropy, truth.entropy, "entropy")
    expected = oracles.token_log_prob_gradient(logits, token_ids, *upstream, **options, inside=inside)
    empty = expected.gradient.isnan().any(-1)  # a replayed set of only -inf
    assert gradient[empty].isnan().any(-1).all()
    expected.gradient[empty], expected.c[empty] = 0.0, 0.0
    gradient = gradient.masked_fill(empty.unsqueeze(-1), 0)
    assert_gradient(gradient, expected, logits.dtype)
    assert (gradient[~inside] == 0).all()
    return truth


def check(logits, token_ids, upstream=None, function=token_log_prob, mask=None, temperature=1.0, cu_seqlens=None,
          **chosen):  # fmt: skip
    options = {"mask": mask, "temperature": temperature, "cu_seqlens": cu_seqlens}
    a, b = torch.randn(2, *token_ids.shape, device=logits.device) if upstream is None else upstream
    keep = oracles.kept(token_ids, mask)
    each = oracles.per_token(temperature, token_ids.shape, cu_seqlens).to(logits.device)
    inside = support_of(logits, torch.where(keep, each, 1.0), keep, **chosen)
    if function is token_log_prob:
        result, gradient = run(logits, token_ids, a, b, **options, **chosen)
    else:
        leaf = logits.detach().requires_grad_()
        result = function(leaf, token_ids, **options, **chosen)
        (gradient,) = torch.autograd.grad(result, leaf, [a.to(result[0]), b.to(result[1])])
    compare(logits, token_ids, inside, result, gradient, (a, b), **options)
    return result, gradient


def check_replay(logits, token_ids, support, upstream=None, function=token_log_prob, **options):
    """S is the given set and the token, where their logits are not -inf."""
    a, b = torch.randn(2, *token_ids.shape, device=logits.device) if upstream is None else upstream
    leaf = logits.detach().requires_grad_()
    result = function(leaf, token_ids, support=support, **options)
    (gradient,) = torch.autograd.grad(result, leaf, [a.to(result[0]), b.to(result[1])])
    keep = oracles.kept(token_ids, options.get("mask")).unsqueeze(-1)
    ids = support if isinstance(support, torch.Tensor) else support.token_ids
    ids = torch.where(keep, torch.cat((ids, token_ids.unsqueeze(-1)), -1).long(), -1)
    inside = (oracles.named(ids, logits.shape[-1]) & (logits != -torch.inf)) | ~keep
    compare(logits, token_ids, inside, result, gradient, (a, b), **options)
    return result, gradient


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("chosen", SWEEP, ids=name)
def test_every_filter_at_a_full_vocabulary(chosen, dtype, device):
    kinds = ("gaussian", "tied_everywhere", "gumbel", "large_in_one_place", "gaussian")[: 2 if INTERPRETED else 5]
    logits = torch.cat([rows(kind, 1, FULL, dtype, device) for kind in kinds])
    each = torch.tensor(TEMPERATURES, device=device).roll(len(str(chosen)))[: len(kinds)]
    check(logits, ids_in_and_out(logits), temperature=each, **chosen)


@pytest.mark.parametrize("dtype", DTYPES[2:])
@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_the_other_dtypes_at_a_full_vocabulary(chosen, dtype, device):
    logits = rows("gaussian", 3, FULL, dtype, device)
    check(logits, ids_in_and_out(logits), temperature=0.8, **chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_nasty_rows(kind, dtype, device):
    logits = rows(kind, 3, WIDE, dtype, device)
    for chosen in ({"top_k": 5}, {"top_p": 0.95}, {"top_k": 300, "min_p": 0.01}):
        result, _ = check(logits, ids_in_and_out(logits), temperature=1.6, **chosen)
        assert (result.log_prob <= 0).all()
        assert (result.entropy >= 0).all()


@pytest.mark.parametrize("chosen", few(filters(vocab=111)), ids=name)
@pytest.mark.parametrize("vocab", [1, 2, 111])
def test_small_vocabularies(vocab, chosen, device):
    for kind in ("gaussian", "ties"):
        logits = rows(kind, 4, vocab, device=device)
        check(logits, ids_in_and_out(logits), temperature=0.5, **chosen)


@pytest.mark.parametrize("size", [63, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_supports_around_the_length_of_the_lists(dtype, size, device):
    logits = rows("gaussian", 3, WIDE, dtype, device)
    logits[:, WIDE // 2 : WIDE // 2 + size] = (80 - torch.arange(size, device=device) / 4).to(dtype)
    token_ids = torch.tensor([WIDE // 2, WIDE // 2 + size - 1, 0], device=device)
    result, _ = check(logits, token_ids, temperature=2.0, top_k=size)
    assert (result.log_prob == -torch.inf).tolist() == [False, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_a_token_outside_is_minus_inf_and_gets_no_gradient(chosen, dtype, device):
    logits = rows("gaussian", 3, WIDE, dtype, device)
    token_ids = logits.argmin(-1)
    upstream = torch.tensor([1.0, -1.0, torch.nan], device=device), torch.zeros(3, device=device)
    result, gradient = run(logits, token_ids, *upstream, **chosen)
    assert (result.log_prob == -torch.inf).all()
    assert (gradient == 0).all()
    check(logits, token_ids, (torch.ones(3, device=device), torch.ones(3, device=device)), **chosen)


@pytest.mark.parametrize("upstream", [(1.0, None), (None, 1.0)], ids=["log_prob", "entropy"])
@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_one_output_alone_can_be_differentiated(chosen, upstream, device):
    logits = rows("gumbel", 3, 1111, device=device)
    token_ids = logits.argmax(-1)
    given_upstream = [None if u is None else torch.full((3,), u, device=device) for u in upstream]
    _, gradient = run(logits, token_ids, *given_upstream, **chosen)
    inside = support_of(logits, **chosen)
    expected = oracles.token_log_prob_gradient(logits, token_ids, *(u or 0.0 for u in upstream), inside=inside)
    assert_gradient(gradient, expected, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "vocab"), [(torch.float32, WIDE), (torch.bfloat16, FULL), (torch.float64, 111)])
def test_views_give_the_bits_of_contiguous_logits(layout, dtype, vocab, device):
    logits = rows("gumbel", 4, vocab, dtype, device).reshape(2, 2, vocab)
    token_ids, upstream = ids_in_and_out(logits), torch.randn(2, 2, 2, device=device)
    view = nasty.LAYOUTS[layout](logits)
    replayed = truncated_support(logits, top_k=20, max_size=20)
    for chosen in ({"top_k": 20}, {"top_p": 0.99}, {"support": replayed}):
        result, gradient = (check_replay if "support" in chosen else check)(
            view, token_ids, upstream=upstream, **chosen
        )
        same, same_gradient = run(logits, token_ids, *upstream, **chosen)
        for each, expected in zip((*result, gradient), (*same, same_gradient), strict=True):
            assert_same_bits(each, expected)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (2, 3), (2, 1, 2, 2), (1, 2, 1, 2, 2)])
def test_every_leading_shape(shape, device):
    logits = rows("gaussian", torch.Size(shape).numel(), 111, device=device).reshape(*shape, 111)
    token_ids = ids_in_and_out(logits)
    check(logits, token_ids, top_k=7)
    check_replay(logits, token_ids, torch.randperm(111, device=device)[:9].expand(*shape, 9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "chosen", [*SOME_FILTERS, {"support": torch.arange(12).expand(6, 12)}], ids=lambda c: next(iter(c))
)
def test_masked_tokens_are_zero_whatever_they_and_their_upstream_hold(chosen, dtype, device):
    logits, token_ids = rows("gaussian", 6, WIDE, dtype, device), nasty.ids(6, WIDE, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device)
    token_ids[2] = -100
    gone = torch.tensor([False, True, True, False, True, False], device=device)
    logits[gone], token_ids[4] = torch.nan, 10**6
    upstream = torch.where(gone, torch.nan, 1.0), torch.where(gone, torch.nan, 2.0)
    if "support" in chosen:
        support = torch.where(gone.unsqueeze(-1), -7, chosen["support"].to(device))
        result, gradient = check_replay(logits, token_ids, support, upstream, mask=mask)
    else:
        result, gradient = check(logits, token_ids, upstream, mask=mask, **chosen)
    for each in (*result, gradient):
        assert (each[gone] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chosen", [{"top_k": 7}, {"top_p": 0.95}], ids=name)
def test_temperature_per_token_per_sequence_packed_and_zero_dimensional(chosen, dtype, device):
    logits = rows("gaussian", 6, 1111, dtype, device)
    token_ids = ids_in_and_out(logits)
    each, batch = torch.tensor([0.3, 1.0, 2.0, 0.9, 1e-2, 50.0], device=device), torch.tensor([0.5, 2.0], device=device)
    ends = torch.tensor([0, 0, 4, 4, 6], dtype=torch.int32, device=device)
    packed = torch.tensor([9.0, 0.5, 8.0, 2.0], device=device)
    support = torch.randperm(1111, device=device)[:40].expand(6, 40)
    for shape, options in (
        ((6,), {"temperature": each}),
        ((6,), {"temperature": each[2]}),
        ((2, 3), {"temperature": batch}),
        ((2, 3), {"temperature": each.double().view(3, 2).t()}),
        ((6,), {"temperature": packed, "cu_seqlens": ends}),
    ):
        check(logits.view(*shape, 1111), token_ids.view(shape), **options, **chosen)
        check_replay(logits.view(*shape, 1111), token_ids.view(shape), support.reshape(*shape, 40), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "chosen", [*SOME_FILTERS, {"support": torch.arange(12).expand(5, 12)}], ids=lambda c: next(iter(c))
)
def test_a_bad_row_is_nan_and_no_other(chosen, bad, dtype, device):
    logits, token_ids = rows("gaussian", 5, WIDE, dtype, device), nasty.ids(5, WIDE, device)
    on = torch.ones(5, device=device)
    chosen = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in chosen.items()}
    clean, clean_gradient = run(logits, token_ids, on, on, **chosen)
    for row, column in ((1, 0), (2, token_ids[2]), (3, 7)):  # in the replayed set too
        logits[row, column if bad != -torch.inf else slice(None)] = bad
    result, gradient = run(logits, token_ids, on, on, **chosen)
    for each, before in zip(result, clean, strict=True):
        assert each[1:4].isnan().all()
        assert_same_bits(each[[0, 4]], before[[0, 4]])
    assert gradient[1:4].isnan().any(-1).all()
    assert_same_bits(gradient[[0, 4]], clean_gradient[[0, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_a_token_does_not_depend_on_its_batch_nor_on_the_run(chosen, dtype, device):
    logits = rows("gumbel", 9, WIDE, dtype, device).reshape(3, 3, WIDE)
    token_ids, on = ids_in_and_out(logits), torch.randn(3, 3, device=device)
    token_ids[1] = logits[1].argmax(-1)
    result, gradient = run(logits, token_ids, on, on, **chosen)
    again, again_gradient = run(logits, token_ids, on, on, **chosen)
    alone, alone_gradient = run(logits[1:2, 1], token_ids[1:2, 1], on[1:2, 1], on[1:2, 1], **chosen)
    for whole, repeated, single in zip(
        (*result, gradient), (*again, again_gradient), (*alone, alone_gradient), strict=True
    ):
        assert_same_bits(repeated, whole)
        assert_same_bits(single, whole[1:2, 1])


@pytest.mark.parametrize("kind", ["gaussian", "gumbel", "peaky", "ties"])
@pytest.mark.parametrize("chosen", SOME_FILTERS, ids=name)
def test_the_gradient_of_a_row_sums_to_zero(chosen, kind, device):
    logits = rows(kind, 3, WIDE, device=device)
    token_ids = logits.argmax(-1)
    _, gradient = run(logits, token_ids, torch.ones(3), torch.ones(3), **chosen)
    inside = support_of(logits, **chosen)
    c = oracles.token_log_prob_gradient(logits, token_ids, 1.0, 1.0, inside=inside).c
    assert (gradient.double().sum(-1).abs() <= 1e-6 * c).all()


@pytest.mark.parametrize("chosen", few(filters(vocab=111)), ids=name)
def test_the_reference_equals_the_formula(chosen):
    temperature, mask = torch.tensor(TEMPERATURES), torch.tensor([1, 1, 1, 0, 1])
    for kind in ("gaussian", "scattered_minus_inf", "tied_everywhere"):
        logits = rows(kind, 5, 111, torch.float64)
        token_ids, support = ids_in_and_out(logits), torch.randperm(111)[:9].expand(5, 9)
        check(logits, token_ids, function=reference, temperature=temperature, mask=mask, **chosen)
        check_replay(logits, token_ids, support, function=reference, temperature=temperature, mask=mask)


@pytest.mark.parametrize("function", [token_log_prob, reference])
@pytest.mark.parametrize("chosen", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"support": "ids"}], ids=name)
def test_gradcheck(chosen, function):
    logits = torch.randn(2, 3, 13, dtype=torch.float64) * 2
    token_ids, temperature = logits.argmax(-1), torch.tensor([0.5, 2.0], dtype=torch.float64)
    token_ids[0, 1] = -100
    if "support" in chosen:
        chosen = {"support": torch.tensor([1, 2, -1, 9]).expand(2, 3, 4)}
    assert torch.autograd.gradcheck(
        lambda x: tuple(function(x, token_ids, temperature, **chosen)), logits.requires_grad_()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", [{"top_k": 5}, {"top_k": 300}, {"support": torch.arange(9).expand(5, 9)}],
                         ids=["list", "threshold", "replayed"])  # fmt: skip
def test_an_id_outside_the_vocabulary_is_nan_and_touches_no_other_row(chosen, dtype, device, monkeypatch):
    """What a GPU does without SDKERNELS_VALIDATE=1; ids this near would fall into the rows around."""
    monkeypatch.setattr(_check, "values_are_checked", lambda tensor: False)
    logits = rows("gaussian", 5, 1111, dtype, device)
    bad, on = torch.tensor([False, True, False, True, False], device=device), torch.ones(5, device=device)
    token_ids = logits.argmax(-1)
    chosen = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in chosen.items()}
    clean, clean_gradient = run(logits, token_ids, on, on, **chosen)
    token_ids[bad] = torch.tensor([-1, 1111], device=device)
    result, gradient = run(logits, token_ids, on, on, **chosen)
    for each, before in zip((*result, gradient), (*clean, clean_gradient), strict=True):
        assert_same_bits(each[~bad], before[~bad])
    for each in result:
        assert each[bad].isnan().all()
    assert gradient[bad].isnan().any(-1).all()


@given(st.data())
def test_any_shape_and_options_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), max_size=4), "shape"))
    vocab, dtype = data.draw(st.integers(1, 300), "V"), data.draw(st.sampled_from(nasty.DTYPES), "dtype")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    kind = data.draw(st.sampled_from(["gaussian", "gumbel", "peaky", "scattered_minus_inf", "ties"]), "rows")
    logits = rows(kind, torch.Size(shape).numel(), vocab, dtype).reshape(*shape, vocab)
    token_ids = ids_in_and_out(logits)
    token_ids[torch.rand(shape) < 0.2] = -100
    temperatures = [1.0, 0.3, torch.rand(shape) + 0.1] + ([torch.rand(shape[:-1]) + 0.1] if shape else [])
    options = {
        "mask": data.draw(st.sampled_from([None, (torch.rand(shape) < 0.7).int()]), "mask"),
        "temperature": data.draw(st.sampled_from(temperatures), "temperature"),
    }
    if data.draw(st.booleans(), "replay"):
        places = data.draw(st.integers(0, vocab), "K")
        support = torch.rand(*shape, vocab).argsort(-1)[..., :places]
        check_replay(logits, token_ids, torch.where(torch.rand(support.shape) < 0.2, -1, support), **options)
    else:
        options["top_k"] = data.draw(st.none() | st.integers(0, vocab + 2), "top_k")
        options["top_p"] = data.draw(st.none() | st.floats(1e-6, 1), "top_p")
        options["min_p"] = data.draw(st.none() | st.floats(0, 1), "min_p")
        check(logits, token_ids, **options)
