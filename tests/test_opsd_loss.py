"""`opsd_loss` as a loss: reductions, weights, temperatures, packed sequences, modules."""

import oracles
import pytest
import torch
from closeness import assert_same_bits, assert_within, epsilon
from hypothesis import given
from hypothesis import strategies as st
from nasty import DTYPES
from opsd_oracles import DIVERGENCES, EVERY, REDUCED, SOME
from supports import few, name, rows
from test_opsd import check, run
from test_ssd import pair
from test_ssd_loss import REDUCTIONS

from sdkernels import OPSDLoss, opsd_loss
from sdkernels.reference.opsd import opsd_loss as reference


@pytest.mark.parametrize("function", [opsd_loss, reference])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalizer", [None, 7, torch.tensor(0.5)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_normalizers_and_token_weights(weighted, normalizer, reduction, function, device):
    if normalizer is not None and reduction == "none":
        return
    student, teacher = (x.reshape(3, 4, 111) for x in pair("gumbel", 12, 111, torch.float64, device))
    mask = torch.rand(3, 4, device=device) < 0.7
    mask[1] = False
    options = {"token_weight": torch.randn(3, 4, device=device)} if weighted else {}
    if isinstance(normalizer, torch.Tensor):
        normalizer = normalizer.to(device)
    for chosen in SOME:
        check(student, teacher, function, mask=mask, reduction=reduction, normalizer=normalizer, **chosen, **options)


@pytest.mark.parametrize("dtype", few(DTYPES[:3], 2))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_of_other_dtypes(reduction, dtype, device):
    student, teacher = (x.reshape(3, 4, 111) for x in pair("gumbel", 12, 111, dtype, device))
    mask, weight = torch.rand(3, 4, device=device) < 0.7, torch.rand(3, 4, device=device)
    for chosen in SOME[:3]:
        check(student, teacher, mask=mask.int(), reduction=reduction, token_weight=weight, **chosen)


@pytest.mark.parametrize("function", [opsd_loss, reference])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ends", [[0, 4, 9], [0, 0, 4, 4, 9, 9], [0, 9]], ids=str)
def test_packed_sequences_with_their_own_temperatures(ends, reduction, function, device):
    student, teacher = pair("gaussian", 9, 111, torch.float64, device)
    mask, cu_seqlens = torch.rand(9, device=device) < 0.7, torch.tensor(ends, dtype=torch.int32, device=device)
    packed = torch.rand(len(ends) - 1, device=device) + 0.5
    options = {"mask": mask, "reduction": reduction, "cu_seqlens": cu_seqlens}
    for temperature in (packed, torch.rand(9, device=device) + 0.5, 0.8):
        for chosen in SOME[:3]:
            check(student, teacher, function, temperature=temperature, **options, **chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_temperature_per_token_per_sequence_and_zero_dimensional(chosen, dtype, device):
    student, teacher = (x.reshape(2, 3, 1111) for x in pair("gaussian", 6, 1111, dtype, device))
    each = torch.tensor([[0.3, 1.0, 2.0], [0.9, 0.1, 5.0]], device=device)
    for temperature in (0.7, each, each[:, 1], each[0, 2], each.double().t().contiguous().t()):
        check(student, teacher, temperature=temperature, **chosen)


@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_a_number_and_tensors_of_it_are_one_temperature(chosen, device):
    student, teacher = (x.reshape(2, 3, 111) for x in pair("gaussian", 6, 111, device=device))
    ones = torch.ones(2, 3, device=device)
    expected, gradient = run(student, teacher, on_divergence=ones, temperature=0.75, **chosen)
    for temperature in (ones * 0.75, ones[:, 0] * 0.75, ones[0, 0].double() * 0.75):
        found, same = run(student, teacher, on_divergence=ones, temperature=temperature, **chosen)
        assert_same_bits(found.divergence, expected.divergence)
        assert_same_bits(same, gradient)


@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_the_temperature_has_no_square_and_scales_the_gradient(chosen, device):
    """D(z, T) is D(z / T, 1): only the gradient has a factor, 1 / T."""
    student, teacher = pair("gumbel", 3, 111, torch.float64, device)
    ones = torch.ones(3, device=device)
    hot, of_hot = run(student, teacher, on_divergence=ones, temperature=4.0, **chosen)
    divided, of_divided = run(student / 4, teacher / 4, on_divergence=ones, **chosen)
    assert_same_bits(hot.divergence, divided.divergence)
    torch.testing.assert_close(of_hot, of_divided / 4, rtol=1e-14, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_token_is_a_loss_of_zero_that_backpropagates(dtype, reduction, shape, device):
    student = torch.full((*shape, 9), torch.nan, dtype=dtype, device=device).requires_grad_()
    for chosen in SOME:
        student.grad = None
        mask = torch.zeros(shape, device=device)
        output = opsd_loss(student, student.detach(), mask=mask, reduction=reduction, **chosen)
        (output.loss.sum() + output.divergence.sum()).backward()
        assert output.loss.sum().item() == 0
        assert output.divergence.shape == shape
        assert (output.divergence == 0).all()
        assert student.grad.shape == student.shape
        assert (student.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_the_divergence_is_the_loss_per_token(chosen, dtype, device):
    student, teacher = (x.reshape(2, 3, 111) for x in pair("gumbel", 6, 111, dtype, device))
    output = opsd_loss(student, teacher, reduction="none", **chosen)
    assert_same_bits(output.loss, output.divergence)
    weight = torch.randn(2, 3, device=device)
    weighted = opsd_loss(student, teacher, reduction="none", token_weight=weight, **chosen)
    assert_same_bits(weighted.divergence, output.divergence)  # which the weight does not touch
    product = output.divergence.double() * weight
    assert_within(weighted.loss, product, 4 * epsilon(output.loss.dtype) * product.abs(), "loss")


@pytest.mark.parametrize("chosen", EVERY, ids=name)
@pytest.mark.parametrize("function", [opsd_loss, reference])
def test_gradcheck(function, chosen):
    student, teacher = (torch.randn(2, 3, 13, dtype=torch.float64) * 2 for _ in range(2))
    temperature = torch.tensor([0.7, 2.0], dtype=torch.float64)
    options = {"mask": torch.tensor([[1, 1, 1], [1, 0, 1]]), "token_weight": torch.rand(2, 3), **chosen}
    assert torch.autograd.gradcheck(
        lambda x: tuple(function(x, teacher, temperature=temperature, reduction="seq-mean-token-mean", **options)),
        student.requires_grad_(),
    )


@given(st.data())
def test_the_reference_and_the_library_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 4), min_size=2, max_size=3), "shape"))
    vocab = data.draw(st.integers(1, 150), "V")
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    kinds = [data.draw(st.sampled_from(["gaussian", "gumbel", "ties"]), side) for side in ("student", "teacher")]
    count = torch.Size(shape).numel()
    student, teacher = (rows(kind, count, vocab, torch.float64).reshape(*shape, vocab) for kind in kinds)
    options = {
        **data.draw(st.sampled_from(DIVERGENCES), "divergence"),
        "top_k": data.draw(st.none() | st.integers(0, vocab + 2), "top_k"),
        "top_k_from": data.draw(st.sampled_from(["student", "teacher"]), "top_k_from"),
        "tail": data.draw(st.booleans(), "tail"),
        "token_clip": data.draw(st.none() | st.floats(1e-6, 1), "token_clip"),
        "mask": data.draw(st.sampled_from([None, torch.rand(shape) < 0.7]), "mask"),
        "token_weight": data.draw(st.sampled_from([None, torch.rand(shape)]), "token_weight"),
        "reduction": data.draw(st.sampled_from(REDUCTIONS), "reduction"),
        "temperature": data.draw(st.sampled_from([1.0, 0.8, torch.rand(shape[:-1]) + 0.5]), "temperature"),
    }
    if options["divergence"] == "jsd":
        options["beta"] = data.draw(st.floats(0.01, 0.99), "beta")
    for function in (opsd_loss, reference):
        check(student, teacher, function, **options)


@given(st.data())
def test_any_shape_and_dtypes_equal_the_formula(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=4), "shape"))
    vocab = data.draw(st.integers(1, 300), "V")
    dtypes = [data.draw(st.sampled_from(DTYPES), f"{side}'s dtype") for side in ("student", "teacher")]
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    count = torch.Size(shape).numel()
    kinds = [data.draw(st.sampled_from(["gaussian", "gumbel", "peaky"]), side) for side in ("student", "teacher")]
    student, teacher = (
        rows(kind, count, vocab, dtype).reshape(*shape, vocab) for kind, dtype in zip(kinds, dtypes, strict=True)
    )
    chosen = {
        **data.draw(st.sampled_from(DIVERGENCES), "divergence"),
        **data.draw(st.sampled_from([{}, *REDUCED]), "reduced"),
        "mask": data.draw(st.sampled_from([None, (torch.rand(shape) < 0.7).int()]), "mask"),
        "temperature": data.draw(st.sampled_from([1.0, 0.3, torch.rand(shape) + 0.3]), "temperature"),
    }
    check(student, teacher, **chosen)


@pytest.mark.parametrize("chosen", [*SOME, {"reduction": "sum", "normalizer": 3}], ids=name)
def test_the_module_is_the_function_with_options(chosen, device):
    student, teacher = (x.reshape(2, 2, 111) for x in pair("gaussian", 4, 111, device=device))
    mask = torch.tensor([[1, 1], [1, 0]], device=device)
    module = OPSDLoss(temperature=0.8, **chosen)
    expected = opsd_loss(student, teacher, temperature=0.8, mask=mask, **chosen)
    assert_same_bits(module(student, teacher, mask=mask).loss, expected.loss)
    changed = {**chosen, "temperature": 2.0, "divergence": "reverse_kl"}
    other = module(student, teacher, temperature=2.0, divergence="reverse_kl")
    assert_same_bits(other.divergence, opsd_loss(student, teacher, **changed).divergence)
    assert isinstance(module, torch.nn.Module)
    assert not module.state_dict()
    assert "temperature=0.8" in repr(module)


def test_masked_tokens_may_have_any_temperature_and_weight(device):
    student, teacher = (x.reshape(2, 3, 111) for x in pair("gumbel", 6, 111, device=device))
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device)
    clean = torch.full((2, 3), 0.8, device=device)
    expected, gradient = run(student, teacher, torch.ones(()), mask=mask, temperature=clean, token_weight=clean)
    for value in (torch.nan, torch.inf, -torch.inf, 0.0):
        dirty = torch.where(mask == 0, value, clean)
        found, same = run(student, teacher, torch.ones(()), mask=mask, temperature=dirty, token_weight=dirty)
        assert_same_bits(found.loss, expected.loss)
        assert_same_bits(same, gradient)
    everywhere = oracles.per_token(0.8, (2, 3)).to(device)
    options = {"mask": mask, "token_weight": clean}
    _, each = run(student, teacher, torch.ones(()), temperature=everywhere, **options)
    _, number = run(student, teacher, torch.ones(()), temperature=0.8, **options)
    assert_same_bits(each, number)
