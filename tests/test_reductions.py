"""Denominators, through `grpo_loss`: with one possible token and no old log-probs each token's loss is -A."""

import oracles
import pytest
import torch
from closeness import assert_within

from sdkernels import grpo_loss

REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum")


def loss_of(values, mask=None, **options):
    """The reduced loss, float64, of per-token losses `values`, and its derivative by each of them."""
    logits = torch.zeros(*values.shape, 1, dtype=torch.float64, device=values.device)
    token_ids = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    per_token = grpo_loss(logits.requires_grad_(), token_ids, -values, mask=mask, **options)
    if not values.numel():
        return per_token.loss, torch.zeros_like(values)
    # with advantages fixed, d loss / d log_prob = -A * weight = value * weight
    (slope,) = torch.autograd.grad(per_token.loss, per_token.log_prob)
    return per_token.loss.detach(), slope / values


def test_written_out_by_hand(device):
    values = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]], dtype=torch.float64, device=device)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], device=device)
    expected = {
        "token-mean": 16 / 4,
        "seq-mean-token-mean": (2 + 10) / 2,
        "seq-mean-token-sum": (6 + 10) / 2,
        "sum": 16,
    }
    for reduction, value in expected.items():
        assert loss_of(values, mask, reduction=reduction)[0].item() == pytest.approx(value, rel=1e-15), reduction
    replaced = {"token-mean": 16 / 5, "seq-mean-token-mean": (2 + 10) / 5, "seq-mean-token-sum": 16 / 5, "sum": 16 / 5}
    for normalizer in (5, 5.0, torch.tensor(5, device=device), torch.tensor(5.0, device=device)):
        for reduction, value in replaced.items():
            loss, _ = loss_of(values, mask, reduction=reduction, normalizer=normalizer)
            assert loss.item() == pytest.approx(value, rel=1e-15), (reduction, normalizer)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (1, 1), (4, 1), (0, 3), (2, 0)])
def test_batches_equal_loops_over_sequences(shape, reduction, device):
    values, mask = torch.randn(shape, dtype=torch.float64, device=device), torch.rand(shape, device=device) < 0.6
    weights = oracles.reduction_weights(mask, reduction)
    loss, slope = loss_of(values, mask, reduction=reduction)
    assert_within(loss, (values * weights).sum(), 1e-14, "loss")
    assert_within(slope, weights, 1e-15, "slope")


@pytest.mark.parametrize("normalizer", [None, 7])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ends", [[0, 4, 9], [0, 0, 4, 4, 4, 9, 9], [0, 9], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]], ids=str)
def test_packed_sequences_some_of_them_empty(ends, reduction, normalizer, device):
    values, mask = torch.randn(9, dtype=torch.float64, device=device), torch.rand(9, device=device) < 0.6
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
    weights = oracles.reduction_weights(mask, reduction, normalizer, cu_seqlens)
    loss, slope = loss_of(values, mask, reduction=reduction, normalizer=normalizer, cu_seqlens=cu_seqlens)
    assert_within(loss, (values * weights).sum(), 1e-14, "loss")
    assert_within(slope, weights, 1e-15, "slope")


def test_a_fully_masked_sequence_counts(device):
    values = torch.tensor([[4.0, 6.0], [9.0, 9.0]], dtype=torch.float64, device=device)
    mask = torch.tensor([[1, 1], [0, 0]], device=device)
    assert loss_of(values, mask, reduction="seq-mean-token-mean")[0].item() == 2.5
    assert loss_of(values, mask, reduction="seq-mean-token-sum")[0].item() == 5.0


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0), (2, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_token_is_a_loss_of_zero_that_backpropagates(dtype, reduction, shape, device):
    logits = torch.full((*shape, 7), torch.nan, dtype=dtype, device=device).requires_grad_()
    token_ids = torch.full(shape, -100, device=device)
    output = grpo_loss(logits, token_ids, torch.ones(shape[:-1], device=device), reduction=reduction)
    output.loss.backward()
    assert output.loss.item() == 0
    assert logits.grad.shape == logits.shape
    assert (logits.grad == 0).all()


def test_zero_over_a_zero_normalizer_is_zero_and_anything_else_is_not(device):
    nothing = torch.tensor(0.0, dtype=torch.float64, device=device)
    values = torch.ones(2, 3, dtype=torch.float64, device=device)
    masked = torch.zeros(2, 3, device=device)
    assert loss_of(values, masked, reduction="sum", normalizer=nothing)[0].item() == 0
    assert loss_of(values, reduction="sum", normalizer=nothing)[0].item() == torch.inf


def test_none_returns_the_tokens(device):
    values, mask = (
        torch.randn(2, 3, dtype=torch.float64, device=device),
        torch.tensor([[1, 0, 1], [1, 1, 0]], device=device),
    )
    token_ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    output = grpo_loss(
        torch.zeros(2, 3, 1, dtype=torch.float64, device=device), token_ids, -values, mask=mask, reduction="none"
    )
    assert_within(output.loss, values * mask, 0.0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_denominators_count_tokens_not_weights(reduction, device):
    values, weight = torch.randn(2, 3, dtype=torch.float64, device=device), torch.rand(2, 3, device=device).double()
    weighted = loss_of(values, reduction=reduction, token_weight=weight)[0]
    assert_within(weighted, loss_of(values * weight, reduction=reduction)[0], 1e-14)


def test_gradient_accumulation_with_a_global_normalizer_equals_one_batch(device):
    values, mask = torch.randn(6, 5, dtype=torch.float64, device=device), torch.rand(6, 5, device=device) < 0.5
    whole, _ = loss_of(values, mask)
    parts = [loss_of(v, m, normalizer=mask.sum())[0] for v, m in zip(values.split(2), mask.split(2), strict=True)]
    assert_within(sum(parts), whole, 1e-14)


@pytest.mark.parametrize(
    "normalizer", [torch.tensor(4.0, dtype=torch.float64), torch.tensor(4), torch.tensor(4.0).half(), 4]
)
def test_a_normalizer_of_any_dtype_leaves_the_loss_its_dtype(normalizer, device):
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(device)
    logits = torch.zeros(2, 3, 7, device=device).requires_grad_()
    token_ids = torch.zeros(2, 3, dtype=torch.int64, device=device)
    output = grpo_loss(logits, token_ids, torch.ones(2, device=device), reduction="sum", normalizer=normalizer)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == -1.5
