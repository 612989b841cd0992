"""Which gradients of linear_* exist, through which results, how often, and to how many bits they are the same."""

import itertools

import pytest
import torch
from closeness import assert_same_bits, epsilon
from conftest import INTERPRETED, no_kernel
from heads import DIFFERENTIABLE, FUNCTIONS, LOSSES, WITH_OTHER, dense, fields, fused, leaves, problem, run_fused
from heads import totals_of as parts_of
from supports import few
from torch.autograd import grad

SUBSETS = [x for n in range(4) for x in itertools.combinations(("hidden", "weight", "bias"), n)]


def same(found, expected, dtype=torch.float32):
    """Up to the order in which a few products are rounded."""
    slack = 32 * epsilon(dtype) * expected.detach().abs().max().nan_to_num(0) if expected.numel() else 0
    assert found.dtype == expected.dtype
    assert ((found - expected).abs() <= slack).all()


@pytest.mark.parametrize(("function", "wanted", "reduction"), few(itertools.product(
    DIFFERENTIABLE, SUBSETS, ("token-mean", "none")), 19), ids=str)  # fmt: skip
def test_any_subset_of_gradients_is_that_of_all(function, wanted, reduction, device):
    p = problem(2, 3, device=device)
    options = {"reduction": reduction} if function in LOSSES else {}
    copy, given, inputs = leaves(p, {"bias": p.bias, "chunk_size": 4, **options})
    expected = dict(zip(("hidden", "weight", "bias"), grad(sum(parts_of(fields(fused(function, copy, **given)), False)),
                                                           inputs), strict=True))  # fmt: skip
    tensors = {"hidden": copy.hidden, "weight": copy.weight, "bias": given["bias"]}
    for each, x in tensors.items():
        x.requires_grad_(each in wanted)
    found = fields(fused(function, copy, **given))
    if not wanted:
        assert not any(x.requires_grad for x in found.values())
        return
    sum(parts_of(found, False)).backward()
    for each, x in tensors.items():
        if each in wanted:
            assert_same_bits(x.grad, expected[each])
        else:
            assert x.grad is None
    assert copy.other.grad is None
    assert p.positive.grad is None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_grad_and_inference_mode_give_the_same_results(function, device):
    p = problem(2, 3, device=device)
    copy, options, _ = leaves(p, {"bias": p.bias})
    expected = fields(fused(function, copy, **options))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = fields(fused(function, copy, **options))
        for key, value in found.items():
            assert_same_bits(value, expected[key].detach(), key)
            assert not value.requires_grad


@pytest.mark.parametrize("function", WITH_OTHER)
def test_under_no_grad_the_other_side_may_require_grad(function, device):
    p = problem(2, 3, device=device)
    p.other.requires_grad_()
    with torch.no_grad():
        fused(function, p)


@pytest.mark.parametrize("function", LOSSES)
def test_the_upstream_gradient_scales(function, device):
    p = problem(2, 3, device=device)
    copy, options, inputs = leaves(p, {"bias": p.bias, "softcap": 9.0, "chunk_size": 4})
    expected = grad(fused(function, copy, **options).loss, inputs)
    for scale in (0.25, -3.0, torch.tensor(65536.0, device=device)):
        for found, one in zip(grad(fused(function, copy, **options).loss * scale, inputs), expected, strict=True):
            same(found, one * scale)


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_a_second_backward_is_the_first(function, device):
    p = problem(2, 3, device=device)
    copy, options, inputs = leaves(p, {"bias": p.bias, "softcap": 9.0, "chunk_size": 4})
    parts = parts_of(fields(fused(function, copy, **options)), True)
    first, second, third = (grad(sum(parts), inputs, retain_graph=True) for _ in range(3))
    for x, y, z in zip(first, second, third, strict=True):
        same(y, x)
        assert_same_bits(z, y)


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_every_differentiable_result_alone(function, device):
    p = problem(2, 3, hidden=torch.float64, device=device)
    copy, options, inputs = leaves(p, {"bias": p.bias, "chunk_size": 4})
    found, truth = fields(fused(function, copy, **options)), fields(dense(function, copy, bias=options["bias"])[0])
    assert {k for k, x in found.items() if x.requires_grad} == {k for k, x in truth.items() if x.requires_grad}
    for key, value in found.items():
        if value.requires_grad:
            upstream = torch.randn_like(value)
            mine, theirs = (grad(x[key], inputs, upstream, retain_graph=True) for x in (found, truth))
            for x, y in zip(mine, theirs, strict=True):
                assert (x - y).abs().max() <= 1e-10 * y.abs().max().clamp(min=1), key


@pytest.mark.parametrize("function", LOSSES)
def test_a_random_upstream_of_each_token(function, device):
    p = problem(2, 3, hidden=torch.float64, device=device)
    copy, options, inputs = leaves(p, {"bias": p.bias, "reduction": "none"})
    upstream = torch.randn(2, 3, dtype=torch.float64, device=device)
    upstream[0, 1] = 0
    mine = grad(fused(function, copy, chunk_size=4, **options).loss, inputs, upstream)
    theirs = grad(dense(function, copy, **options)[0].loss, inputs, upstream)
    for x, y in zip(mine, theirs, strict=True):
        assert (x - y).abs().max() <= 1e-10 * y.abs().max().clamp(min=1)
    assert (mine[0][0, 1] == 0).all()


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_differentiating_twice_raises(function, device):
    p = problem(2, 3, device=device)
    copy, options, inputs = leaves(p, {})
    for total in parts_of(fields(fused(function, copy, **options)), True):
        first = grad(total, inputs, create_graph=True)
        for x in first:
            with pytest.raises(RuntimeError, match="cannot be differentiated again"):
                grad(total + x.square().sum(), inputs, retain_graph=True)


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_gradcheck(function, device):
    if INTERPRETED:
        pytest.skip("float64 runs the reference anyway")
    p = problem(2, 2, hidden=torch.float64, device=device, width=3, vocab=7)
    p.own = ()
    copy, options, inputs = leaves(p, {"bias": p.bias})

    def outputs(hidden, weight, bias):
        copy.hidden, copy.weight = hidden, weight
        evidence = {"evidence_from": "old"} if function == "rlsd_loss" else {}  # the current one is a constant
        found = fields(fused(function, copy, bias=bias, softcap=6.0, logit_scale=0.7, chunk_size=3, **evidence))
        return tuple(x for x in found.values() if x.requires_grad)

    shared = function in WITH_OTHER  # its head also makes the other side's logits, which are constants
    if shared:
        inputs = [inputs[0], options["bias"].detach(), inputs[1].detach()]
        assert torch.autograd.gradcheck(lambda x: outputs(x, inputs[2], inputs[1]), inputs[0])
    else:
        assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_call_gives_the_same_bits(function, device):
    p = problem(3, 5, device=device)
    options = {"bias": p.bias, "softcap": 9.0, "chunk_size": 4}
    (first, gradients), (second, again) = (run_fused(function, p, True, **options) for _ in range(2))
    for x, y in zip((*first.values(), *gradients), (*second.values(), *again), strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_token_does_not_depend_on_the_others(function, device):
    p, q = problem(9, device=device), problem(9, device=device)
    q.weight, q.bias = p.weight, p.bias
    token = 5
    for name in ("hidden", "other", "token_ids", "advantages", "old"):
        getattr(q, name)[token] = getattr(p, name)[token]
    reduced = {"reduction": "sum"} if function in LOSSES else {}
    results = [run_fused(function, x, bias=p.bias, chunk_size=3, **reduced) for x in (p, q)]
    (first, gradients), (second, again) = results
    for key, value in first.items():
        if value.dim():
            assert_same_bits(value[token], second[key][token], key)
    if gradients and function in LOSSES:
        assert_same_bits(gradients[0][token], again[0][token])


@no_kernel
@pytest.mark.parametrize("function", LOSSES)
def test_sixteen_bit_weights_get_sums_made_in_float32(function, device):
    """The parts of 400 tokens, 4 at a time: summed in bfloat16 they would lose what a rounding a part loses."""
    p = problem(400, hidden=torch.bfloat16, device=device)
    p.old = None
    copy, options, inputs = leaves(p, {"reduction": "sum"})
    *_, weight = grad(fused(function, copy, chunk_size=4, **options).loss, inputs)
    wide, given, wide_inputs = leaves(p, options, torch.float64)
    *_, truth = grad(dense(function, wide, **given)[0].loss, wide_inputs)
    summed = torch.zeros_like(truth, dtype=torch.bfloat16)
    each, own, (_, head) = leaves(p, {"reduction": "none"}, torch.float64)
    losses = dense(function, each, **own)[0].loss
    for start in range(0, len(losses), 4):
        summed += grad(losses[start : start + 4].sum(), head, retain_graph=True)[0].bfloat16()
    error = lambda x: (x.double() - truth).norm()  # noqa: E731
    assert error(weight) <= 4e-3 * truth.norm()
    assert error(weight) < error(summed) / 4
