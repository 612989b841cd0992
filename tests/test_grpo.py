import nasty
import oracles
import pytest
import torch
from closeness import assert_gradient, assert_log_probs, assert_same_bits, assert_weights, assert_within
from hypothesis import given
from hypothesis import strategies as st

from sdkernels import grpo_loss

CLIPPING = [{}, {"epsilon_low": 0.1, "epsilon_high": 0.28}, {"dual_clip": 3.0}, {"epsilon_high": float("inf")},
            {"epsilon_low": 1.5, "dual_clip": 1.05}, {"epsilon_low": 0.0, "epsilon_high": 0.0}]  # fmt: skip

STORED = 2e-6  # how far a float32 log-prob of some -20 may be from the log-prob itself


def policy(*shape, vocab=111, dtype=torch.float32, device="cpu", spread=0.3):
    """Logits, sampled ids, advantages per token and old log-probs near the current ones."""
    count = torch.Size(shape).numel()
    logits = nasty.rows("gumbel", count, vocab, dtype, device).reshape(*shape, vocab)
    token_ids = nasty.ids(count, vocab, device).reshape(shape)
    old = oracles.token_log_prob(logits, token_ids).log_prob + torch.randn(shape, device=device) * spread
    return logits, token_ids, torch.randn(shape, device=device), old.to(torch.promote_types(dtype, torch.float32))


def differentiate(loss_function, logits, *arguments, upstream=None, **options):
    leaf = logits.detach().requires_grad_()
    output = loss_function(leaf, *arguments, **options)
    upstream = torch.ones_like(output.loss) if upstream is None else upstream.to(output.loss)
    (gradient,) = torch.autograd.grad(output.loss, leaf, upstream)
    return output, gradient


def check_loss(output, gradient, truth, dtype, reduction="token-mean"):
    """Loss within the relative error of its ratios, gradient within SPEC's bound."""
    assert output.loss.dtype == torch.promote_types(dtype, torch.float32)
    scale = truth.scale if reduction == "none" else truth.scale.sum()
    assert_weights(output.loss, truth.loss, scale, "loss")
    assert_gradient(gradient, truth, dtype)


def check(logits, token_ids, advantages, old=None, upstream=None, **options):
    output, gradient = differentiate(grpo_loss, logits, token_ids, advantages, old, upstream=upstream, **options)
    options["upstream"] = 1.0 if upstream is None else upstream
    truth = oracles.grpo_loss(logits, token_ids, advantages, old, **options)
    assert_log_probs(output.log_prob, truth.log_prob)
    assert_log_probs(output.entropy, truth.entropy, "entropy")
    assert_weights(output.ratio, truth.ratio, name="ratio")
    check_loss(output, gradient, truth, logits.dtype, options.get("reduction", "token-mean"))
    assert not output.ratio.requires_grad
    return output, gradient


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("clipping", CLIPPING, ids=str)
def test_clipping_equals_the_formula(clipping, dtype, device):
    check(*policy(4, 8, dtype=dtype, device=device), **clipping)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "all_but_the_last"])
def test_accuracy_at_a_full_vocabulary(layout, dtype, device):
    vocab = 151936
    logits = nasty.rows("gaussian", 4, vocab, dtype, device).reshape(2, 2, vocab)
    token_ids = nasty.ids(4, vocab, device).reshape(2, 2)
    old = (oracles.token_log_prob(logits, token_ids).log_prob + 0.05).float()
    check(nasty.LAYOUTS[layout](logits), token_ids, torch.tensor([1.0, -2.0], device=device), old)


@pytest.mark.parametrize("kind", nasty.ROWS)
def test_nasty_rows(kind, device):
    logits, token_ids = nasty.rows(kind, 3, 50257, device=device), nasty.ids(3, 50257, device)
    token_ids[:] = logits.argmax(-1)
    check(logits, token_ids, torch.tensor([1.0, -1.0, 0.0], device=device))


def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_is_reinforce(device):
    logits, token_ids, advantages, _ = policy(3, 5, device=device)
    output, gradient = check(logits, token_ids, advantages)
    assert (output.ratio == 1).all()
    _, same = differentiate(grpo_loss, logits, token_ids, advantages, output.log_prob.detach())
    assert_within(gradient, same, STORED * same.abs() + torch.finfo(gradient.dtype).tiny)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_the_gradient_is_zero_iff_a_clip_binds_strictly(dual_clip, device):
    ratios = torch.tensor([0.5, 0.75, 1.0, 1.25, 1.5, 3.0, 4.0, 0.5, 0.75, 1.0, 1.25, 1.5, 3.0, 4.0], device=device)
    advantages = torch.tensor([1.0] * 7 + [-1.0] * 7, device=device)
    logits = torch.zeros(14, 1, dtype=torch.float64, device=device)  # log-prob exactly 0: ratio = exp(-old)
    logits = torch.cat([logits, torch.full_like(logits, -800.0)], -1)
    leaf, old = logits.requires_grad_(), -ratios.double().log()
    token_ids = torch.zeros(14, dtype=torch.int64, device=device)
    output = grpo_loss(leaf, token_ids, advantages, old, dual_clip=dual_clip, epsilon_low=0.25, epsilon_high=0.25,
                       reduction="none")  # fmt: skip
    slope = torch.autograd.grad(output.loss.sum(), output.log_prob)[0]
    # log and exp are not exact inverses: where r is meant to equal a bound, r itself says on which side it fell
    r = output.ratio
    flat = torch.where(advantages > 0, r > 1.25, r < 0.75)
    if dual_clip:
        flat = flat | ((advantages < 0) & (r > dual_clip))
    assert torch.equal(slope == 0, flat)
    assert_within(slope, torch.where(flat, 0.0, -advantages * r), 1e-15)


@pytest.mark.parametrize("epsilons", [(0.0, 0.2), (0.2, 0.0), (0.0, 0.0)])
def test_at_equality_the_gradient_flows(epsilons, device):
    logits, token_ids, advantages, _ = policy(4, 6, device=device)
    old = grpo_loss(logits, token_ids, advantages).log_prob
    low, high = epsilons
    output, gradient = differentiate(grpo_loss, logits, token_ids, advantages, old, epsilon_low=low, epsilon_high=high)
    assert (output.ratio == 1).all()
    _, free = differentiate(grpo_loss, logits, token_ids, advantages)
    assert_within(gradient, free, STORED * free.abs() + torch.finfo(gradient.dtype).tiny)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_an_overflowing_ratio_clips_without_nan(advantage, device):
    logits, token_ids = nasty.rows("gaussian", 2, 111, device=device), torch.tensor([0, 110], device=device)
    old = torch.full((2,), -1e4, device=device)
    advantages = torch.full((2,), advantage, device=device)
    output, gradient = differentiate(grpo_loss, logits, token_ids, advantages, old, dual_clip=3.0)
    assert (output.ratio == torch.inf).all()
    expected = {1.0: -1.2, -1.0: 3.0, 0.0: 0.0}[advantage]
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert (gradient == 0).all()
    output, gradient = differentiate(grpo_loss, logits, token_ids, advantages.clamp(min=0), old)
    assert output.loss.item() == pytest.approx(max(advantage, 0) * -1.2, rel=1e-6)
    assert (gradient == 0).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_impossible_token_counts_as_ratio_zero_and_gives_no_gradient(advantage, device):
    logits, token_ids = nasty.rows("gaussian", 2, 111, device=device), torch.tensor([3, 4], device=device)
    logits[0, 3] = -torch.inf
    old, advantages = torch.full((2,), -2.0, device=device), torch.full((2,), advantage, device=device)
    output, gradient = differentiate(grpo_loss, logits, token_ids, advantages, old, reduction="none")
    assert output.ratio[0] == 0
    assert output.loss[0].item() == pytest.approx({1.0: 0.0, -1.0: 0.8}[advantage], rel=1e-6)
    assert (gradient[0] == 0).all()
    assert not gradient.isnan().any()
    output, gradient = differentiate(grpo_loss, logits, token_ids, advantages)
    assert output.loss.item() == pytest.approx(-advantage, rel=1e-6)
    assert (gradient[0] == 0).all()


@pytest.mark.parametrize("beta", [0.04, 1.0])
def test_k3_penalty_and_token_weight(beta, device):
    logits, token_ids, advantages, old = policy(3, 6, device=device)
    reference, weight = old + torch.randn(3, 6, device=device) / 2, torch.rand(3, 6, device=device) * 3
    output, _ = check(logits, token_ids, advantages, old, beta=beta, reference_log_prob=reference, token_weight=weight)
    nothing = torch.zeros(3, 6, device=device)
    bare, _ = check(logits, token_ids, advantages, old, beta=beta, reference_log_prob=reference, token_weight=nothing)
    d = reference.double() - output.log_prob.double()
    assert bare.loss.item() == pytest.approx((beta * (d.exp() - d - 1)).mean().item(), rel=1e-4)


def test_the_penalty_of_an_equal_reference_is_zero_and_never_negative(device):
    logits, token_ids, advantages, _ = policy(2, 50, device=device)
    current = grpo_loss(logits, token_ids, advantages).log_prob
    for shift in (0.0, 1e-4, -1e-4, 1e-3, -0.5):
        output, _ = differentiate(grpo_loss, logits, token_ids, advantages * 0, beta=1.0,
                                  reference_log_prob=current + shift, reduction="none")  # fmt: skip
        assert (output.loss >= 0).all()
        assert_within(
            output.loss,
            torch.full((2, 50), torch.tensor(shift).double().expm1().item() - shift),
            3e-5 * abs(shift) + STORED**2,
        )


def test_masked_tokens_hold_anything(device):
    logits, token_ids, advantages, old = policy(2, 4, device=device)
    clean, weight, reference = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 1]], device=device), old.exp(), old - 0.1
    mask = clean.clone()
    token_ids[0, 3] = -100
    clean[0, 3] = 0
    options = dict(beta=0.1, mask=mask, dual_clip=2.0)
    before, gradient_before = differentiate(grpo_loss, logits, token_ids, advantages, old, reference_log_prob=reference,
                                            token_weight=weight, **options)  # fmt: skip
    poison = [torch.where(clean == 0, torch.nan, x) for x in (advantages, old, reference, weight)]
    logits[clean == 0] = torch.nan
    for value in (torch.nan, torch.inf):
        advantages, old, reference, weight = (torch.where(x.isnan(), value, x) for x in poison)
        after, gradient = check(
            logits, token_ids, advantages, old, reference_log_prob=reference, token_weight=weight, **options
        )
        for each, expected in zip((*after, gradient), (*before, gradient_before), strict=True):
            assert_same_bits(each, expected)
        assert (gradient[clean == 0] == 0).all()
        upstream = torch.where(clean == 0, torch.nan, 1.0)
        each, gradient = check(logits, token_ids, advantages, old, upstream, reference_log_prob=reference,
                               token_weight=weight, reduction="none", **options)  # fmt: skip
        assert (each.loss[clean == 0] == 0).all()


def test_loss_log_prob_and_entropy_are_differentiable_together(device):
    logits, token_ids, advantages, old = policy(3, 4, device=device)
    leaf, on_log_prob, on_entropy = (
        logits.requires_grad_(),
        torch.randn(3, 4, device=device),
        torch.randn(3, 4, device=device),
    )
    output = grpo_loss(leaf, token_ids, advantages, old)
    outputs = (output.loss, output.log_prob, output.entropy)
    (gradient,) = torch.autograd.grad(outputs, leaf, (torch.tensor(2.0, device=device), on_log_prob, on_entropy))
    slope = oracles.grpo_loss(leaf, token_ids, advantages, old).slope
    truth = oracles.token_log_prob_gradient(leaf, token_ids, 2 * slope + on_log_prob, on_entropy)
    assert_gradient(gradient, truth, torch.float32)


def test_no_gradient_reaches_logits_that_need_none(device):
    logits, token_ids, advantages, old = policy(2, 3, device=device)
    with torch.no_grad():
        silent = grpo_loss(logits.requires_grad_(), token_ids, advantages.requires_grad_(), old.requires_grad_())
    assert not silent.loss.requires_grad
    assert not grpo_loss(logits.detach(), token_ids, advantages.detach(), old.detach()).loss.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_per_sequence_advantages_equal_expanded_ones(dtype, device):
    logits, token_ids, _, old = policy(3, 4, dtype=dtype, device=device)
    advantages = torch.tensor([1.0, 0.0, -1.0], device=device)
    output, gradient = check(logits, token_ids, advantages, old)
    expanded, same = check(logits, token_ids, advantages[:, None].expand(3, 4), old)
    ends = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=device)
    packed, flat = check(logits.flatten(0, 1), token_ids.flatten(), advantages, old.flatten(), cu_seqlens=ends)
    assert_same_bits(output.loss, expanded.loss)
    assert_same_bits(output.loss, packed.loss)
    assert_same_bits(gradient, same)
    assert_same_bits(gradient.flatten(0, 1), flat)


@given(st.data())
def test_any_shape_and_options_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3), "shape"))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]), "dtype")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    logits, token_ids, advantages, old = policy(*shape, vocab=data.draw(st.integers(1, 150), "V"), dtype=dtype)
    token_ids[torch.rand(shape) < 0.1] = -100
    names = ["token-mean", "sum", "none"] + (["seq-mean-token-mean", "seq-mean-token-sum"] if len(shape) > 1 else [])
    options = {
        **data.draw(st.sampled_from(CLIPPING), "clipping"),
        "beta": data.draw(st.sampled_from([0.0, 0.1]), "beta"),
        "reference_log_prob": old + 0.3 * torch.randn(shape),
        "token_weight": data.draw(st.sampled_from([None, torch.rand(shape)]), "token_weight"),
        "mask": data.draw(st.sampled_from([None, torch.rand(shape) < 0.7]), "mask"),
        "temperature": data.draw(st.sampled_from([1.0, 0.8, torch.rand(shape[:-1]) + 0.5]), "temperature"),
        "reduction": data.draw(st.sampled_from(names), "reduction"),
    }
    if options["reduction"] != "none":
        options["normalizer"] = data.draw(st.sampled_from([None, 3, 0.5, torch.tensor(7.0)]), "normalizer")
    old = data.draw(st.sampled_from([None, old]), "old_log_prob")
    upstream = torch.randn(shape if options["reduction"] == "none" else ())
    check(logits, token_ids, advantages, old, upstream, **options)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_a_token_s_loss_does_not_depend_on_its_batch(dtype, device):
    logits, token_ids, advantages, old = policy(3, 4, vocab=3001, dtype=dtype, device=device)
    whole, gradient = differentiate(grpo_loss, logits, token_ids, advantages, old, reduction="none")
    alone, single = differentiate(
        grpo_loss, *(x[1:2, 2] for x in (logits, token_ids, advantages, old)), reduction="none"
    )
    for each, expected in zip((*alone, single), (*whole, gradient), strict=True):
        assert_same_bits(each, expected[1:2, 2])
