"""What forward and backward allocate, and what `inplace` means."""

import itertools

import nasty
import opsd_oracles
import pytest
import torch
from closeness import assert_same_bits
from conftest import INTERPRETED, no_kernel
from supports import few, name

from sdkernels import (
    Support,
    grpo_loss,
    linear_grpo_loss,
    linear_opsd_loss,
    linear_rlsd_loss,
    linear_ssd_loss,
    opsd_decomposition,
    opsd_loss,
    rlsd_loss,
    rlsd_token_advantage,
    ssd_decomposition,
    ssd_loss,
    token_log_prob,
    truncated_log_softmax,
    truncated_support,
)

B, T, V = 3, 2, 9001 if INTERPRETED else 50257
NOTES = B * T * 2048 * 8
ROWS = [  # each dtype, and each layout
    *((dtype, "contiguous") for dtype in nasty.DTYPES[:3]),
    (torch.float32, "time_major"),
    (torch.bfloat16, "padded_vocabulary"),
    (torch.float32, "misaligned"),
]


def problem(dtype=torch.float32, device="cpu", layout="contiguous"):
    student, teacher = (nasty.rows("gaussian", B * T, V, dtype, device).reshape(B, T, V) for _ in range(2))
    token_ids, advantages = nasty.ids(B * T, V, device).reshape(B, T), torch.randn(B, device=device)
    return nasty.LAYOUTS[layout](student).requires_grad_(), teacher, token_ids, advantages


def large_allocations(function):
    """Bytes of each CPU allocation that is at least one row of float16 logits, and what the function returns.

    The notes of a search, 16 kB a row, are less than that at real vocabularies, but not at the interpreter's.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    sizes = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() >= 2 * V]
    return [size for size in sizes if not (INTERPRETED and size == NOTES)], result


LOSSES = {
    "token_log_prob": lambda x, y, i, a, **o: token_log_prob(x, i).log_prob.mean(),
    "grpo_loss": lambda x, y, i, a, **o: grpo_loss(x, i, a, **o).loss,
    "rlsd_loss": lambda x, y, i, a, **o: rlsd_loss(x, y, i, a, **o).loss,
    "rlsd_loss in units of entropy": lambda x, y, i, a, **o: sum(rlsd_loss(x, y, i, a, **o)[6:8]).mean(),
}


@pytest.mark.parametrize(("dtype", "layout"), ROWS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_forward_allocates_nothing_large_and_backward_one_gradient(name, dtype, layout):
    arguments = problem(dtype, layout=layout)
    LOSSES[name](*arguments)  # so that nothing is set up for the first time below
    allocated, loss = large_allocations(lambda: LOSSES[name](*arguments))
    assert allocated == []
    allocated, _ = large_allocations(lambda: torch.autograd.grad(loss, arguments[0]))
    assert allocated == [arguments[0].numel() * arguments[0].element_size()]


def test_token_advantages_allocate_nothing_large():
    student, teacher, token_ids, advantages = problem(torch.bfloat16)
    allocated, _ = large_allocations(lambda: rlsd_token_advantage(student, teacher, token_ids, advantages))
    assert allocated == []


LISTS, THRESHOLDS = {"top_k": 20}, {"top_p": 0.99, "min_p": 1e-4}  # supports of at most 64 tokens, and of more
TRUNCATED = {
    "token_log_prob": lambda x, y, i, **f: sum(token_log_prob(x, i, 0.9, **f)).mean(),
    "replayed token_log_prob": lambda x, y, i, **f: token_log_prob(x, i, support=torch.arange(20).expand(B, T, 20))[
        1
    ].sum(),
    "ssd_decomposition": lambda x, y, i, **f: sum(ssd_decomposition(x, y, 0.9, **f)[:3]).mean(),
    "ssd_loss": lambda x, y, i, **f: ssd_loss(x, y, 0.9, **f).loss,
    "ssd_loss of a Support": lambda x, y, i, **f: ssd_loss(x, truncated_support(y, 0.9, **f, max_size=64), 0.9).loss,
}


@pytest.mark.parametrize("filters", [LISTS, THRESHOLDS], ids=["lists", "thresholds"])
@pytest.mark.parametrize(("dtype", "layout"), ROWS, ids=str)
@pytest.mark.parametrize("name", TRUNCATED)
def test_truncated_forward_allocates_nothing_large_and_backward_one_gradient(name, dtype, filters, layout):
    student, base, token_ids, _ = problem(dtype, layout=layout)
    TRUNCATED[name](student, base, token_ids, **filters)
    allocated, value = large_allocations(lambda: TRUNCATED[name](student, base, token_ids, **filters))
    assert allocated == []
    allocated, _ = large_allocations(lambda: torch.autograd.grad(value, student))
    assert allocated == [student.numel() * student.element_size()]


@pytest.mark.parametrize("options", opsd_oracles.SOME, ids=name)
@pytest.mark.parametrize(("dtype", "layout"), ROWS, ids=str)
def test_opsd_loss_allocates_nothing_large_and_backward_one_gradient(dtype, options, layout):
    student, teacher, *_ = problem(dtype, layout=layout)
    opsd_loss(student, teacher, **options)
    allocated, output = large_allocations(lambda: opsd_loss(student, teacher, **options))
    assert allocated == []
    allocated, _ = large_allocations(lambda: torch.autograd.grad(output.loss, student))
    assert allocated == [student.numel() * student.element_size()]


@pytest.mark.parametrize(("dtype", "layout"), ROWS, ids=str)
def test_opsd_decomposition_allocates_nothing_large(dtype, layout):
    student, teacher, *_ = problem(dtype, layout=layout)
    teachers = torch.stack([teacher, teacher * 0.5, -teacher])
    opsd_decomposition(student, teachers)
    allocated, _ = large_allocations(lambda: opsd_decomposition(student, teachers))
    assert allocated == []


@pytest.mark.parametrize("filters", [LISTS, THRESHOLDS, {}], ids=["lists", "thresholds", "no filter"])
@pytest.mark.parametrize("dtype", nasty.DTYPES[:3])
def test_truncated_support_allocates_nothing_large_and_log_softmax_its_result(dtype, filters):
    logits, *_ = problem(dtype)
    truncated_support(logits, 0.9, **filters, max_size=64)
    allocated, _ = large_allocations(lambda: truncated_support(logits, 0.9, **filters, max_size=64))
    assert allocated == []
    for result in (None, torch.float32):
        truncated_log_softmax(logits, 0.9, **filters, dtype=result)
        allocated, log_q = large_allocations(lambda: truncated_log_softmax(logits, 0.9, **filters, dtype=result))  # noqa: B023
        assert allocated == [log_q.numel() * log_q.element_size()]
        upstream = torch.ones_like(log_q)
        allocated, _ = large_allocations(lambda: torch.autograd.grad(log_q, logits, upstream))  # noqa: B023
        assert allocated == [logits.numel() * logits.element_size()]


def uniform(size, device):
    log_probs = torch.zeros(B, T, size, device=device).log_softmax(-1)
    return Support(torch.arange(size, device=device).expand(B, T, size), log_probs, torch.full((B, T), size), 0.9)


LONG = 300 if INTERPRETED else 700  # more than the kernel reads at a time
IN_PLACE = {
    **{name: LOSSES[name] for name in ("grpo_loss", "rlsd_loss")},
    "ssd_loss": lambda x, y, i, a, **o: ssd_loss(x, y, 0.9, **o).loss,
    "ssd_loss, lists": lambda x, y, i, a, **o: ssd_loss(x, y, 0.9, **LISTS, **o).loss,
    "ssd_loss, thresholds": lambda x, y, i, a, **o: ssd_loss(x, y, 0.9, **THRESHOLDS, **o).loss,
    "ssd_loss, a long Support": lambda x, y, i, a, **o: ssd_loss(x, uniform(LONG, x.device), 0.9, **o).loss,
    **{
        f"opsd_loss, {name(options)}": lambda x, y, i, a, options=options, **o: opsd_loss(x, y, **options, **o).loss
        for options in opsd_oracles.SOME
    },
}


@pytest.mark.parametrize("dtype", nasty.DTYPES[:3])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_backward_allocates_nothing_large(name, dtype):
    arguments = problem(dtype)
    IN_PLACE[name](*arguments, inplace=True)
    allocated, loss = large_allocations(lambda: IN_PLACE[name](*arguments, inplace=True))
    assert allocated == []
    allocated, _ = large_allocations(loss.backward)
    assert allocated == []
    assert arguments[0].grad.data_ptr() == arguments[0].data_ptr()


LINEAR = {  # with how many sides' logits they make
    "linear_grpo_loss": (1, lambda x, y, w, i, a, **o: linear_grpo_loss(x, w, i, a, **o).loss),
    "linear_rlsd_loss": (2, lambda x, y, w, i, a, **o: linear_rlsd_loss(x, y, w, i, a, **o).loss),
    "linear_ssd_loss": (2, lambda x, y, w, i, a, **o: linear_ssd_loss(x, y, w, 0.9, **o).loss),
    "linear_ssd_loss, lists": (2, lambda x, y, w, i, a, **o: linear_ssd_loss(x, y, w, 0.9, **LISTS, **o).loss),
    **{
        f"linear_opsd_loss, {name(options)}": (
            2, lambda x, y, w, i, a, options=options, **o: linear_opsd_loss(x, y, w, **options, **o).loss
        )
        for options in opsd_oracles.SOME
    },
}  # fmt: skip


@no_kernel
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_a_linear_loss_allocates_the_weight_s_gradient_and_a_chunk_of_logits(name, frozen):
    tokens, chunk = 8, 4
    sides, loss = LINEAR[name]
    hidden, other = torch.randn(2, tokens, 8)
    weight = torch.randn(V, 8, requires_grad=not frozen)
    arguments = (hidden.requires_grad_(), other, weight, torch.randint(V, (tokens,)), torch.randn(tokens))
    loss(*arguments, chunk_size=chunk)
    allocated, _ = large_allocations(lambda: loss(*arguments, chunk_size=chunk))
    assert allocated == [weight.numel() * 4] * (not frozen) + [sides * chunk * V * 4]


OF_A_TEACHER = [name for name in IN_PLACE if name not in ("grpo_loss", "ssd_loss, a long Support")]
LAYOUTS = ("contiguous", "time_major", "padded_vocabulary", "misaligned", "every_other_token")


@pytest.mark.parametrize(("name", "dtype", "layout"), few(itertools.product(IN_PLACE, nasty.DTYPES, LAYOUTS)), ids=str)
def test_in_place_writes_the_same_gradient_over_the_logits(name, dtype, layout, device):
    arguments = problem(dtype, device, layout)
    (expected,) = torch.autograd.grad(IN_PLACE[name](*arguments), arguments[0])
    (gradient,) = torch.autograd.grad(IN_PLACE[name](*arguments, inplace=True), arguments[0])
    assert_same_bits(gradient, expected)
    assert_same_bits(arguments[0].detach(), expected)
    assert gradient.data_ptr() == arguments[0].data_ptr()


@pytest.mark.parametrize(("name", "dtype"), few(itertools.product(OF_A_TEACHER, nasty.DTYPES), 5), ids=str)
def test_in_place_may_overwrite_a_teacher_that_is_the_student(name, dtype, device):
    student, _, *others = problem(dtype, device)
    (expected,) = torch.autograd.grad(IN_PLACE[name](student, student.detach().clone(), *others), student)
    loss = IN_PLACE[name](student, student.detach(), *others, inplace=True)
    (gradient,) = torch.autograd.grad(loss, student)
    assert_same_bits(gradient, expected)


def test_in_place_leaves_what_lies_around_a_view_alone(device):
    student, teacher, token_ids, advantages = problem(device=device)
    buffer = torch.full((B, T + 1, V + 3), 7.0, device=device)
    buffer[:, :-1, :V] = student.detach()
    leaf = buffer[:, :-1, :V].requires_grad_()
    rlsd_loss(leaf, teacher, token_ids, advantages, inplace=True).loss.backward()
    (expected,) = torch.autograd.grad(rlsd_loss(student, teacher, token_ids, advantages).loss, student)
    assert_same_bits(buffer[:, :-1, :V], expected)
    assert (buffer[:, -1] == 7).all()
    assert (buffer[..., V:] == 7).all()


def test_in_place_through_a_slice_reaches_the_whole_logits(device):
    student, teacher, token_ids, advantages = problem(device=device)
    whole = torch.cat([student.detach(), torch.zeros(B, 1, V, device=device)], 1).requires_grad_()
    loss = rlsd_loss((whole * 1.0)[:, :-1], teacher, token_ids, advantages, inplace=True).loss
    (gradient,) = torch.autograd.grad(loss, whole)
    (expected,) = torch.autograd.grad(rlsd_loss(student, teacher, token_ids, advantages).loss, student)
    assert_same_bits(gradient[:, :-1], expected)
    assert (gradient[:, -1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_second_backward_after_an_in_place_one_raises(dtype, device):
    student, teacher, token_ids, advantages = problem(dtype, device)
    output = rlsd_loss(student, teacher, token_ids, advantages, inplace=True)
    output.loss.backward(retain_graph=True)
    for again in (output.loss, output.student_entropy.sum()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            again.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("consume", [torch.square, lambda x: x.log_softmax(-1) * x, lambda x: x[:, 1:].square()],
                         ids=["itself", "a function of it", "a view"])  # fmt: skip
def test_another_consumer_of_logits_overwritten_in_place_raises(consume, dtype, device):
    student, _, token_ids, advantages = problem(dtype, device)
    logits = student * 1.0
    other = consume(logits).sum()
    grpo_loss(logits, token_ids, advantages, inplace=True).loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_without_in_place_nothing_of_the_user_s_is_written(device):
    student, teacher, token_ids, advantages = problem(device=device)
    mask, old = torch.ones(B, T, device=device), torch.randn(B, T, device=device)
    given = (student, teacher, token_ids, advantages, old, mask)
    before = [(x._version, x.detach().clone()) for x in given]
    rlsd_loss(student, teacher, token_ids, advantages, old, mask=mask, token_weight=mask).loss.backward()
    for filters in (LISTS, THRESHOLDS, {}):
        ssd_loss(student, teacher, 0.9, **filters, mask=mask, token_weight=mask).loss.backward()
        token_log_prob(student, token_ids, **filters, mask=mask).log_prob.sum().backward()
        truncated_log_softmax(student, **filters).sum().backward()
    for reduced in ({}, {"top_k": 20}, {"top_k": 300, "tail": False}):
        opsd_loss(student, teacher, divergence="jsd", **reduced, mask=mask, token_weight=mask).loss.backward()
    opsd_decomposition(student, teacher.unsqueeze(0), mask=mask)
    for x, (version, values) in zip(given, before, strict=True):
        assert x._version == version
        assert torch.equal(x.detach(), values)
