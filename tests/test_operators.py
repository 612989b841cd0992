"""What PyTorch asks of operators: opcheck, gradcheck, torch.compile, meta tensors."""

import nasty
import pytest
import torch
from closeness import assert_same_bits
from conftest import no_kernel
from operators import B, T, V, opcheck, problem

from sdkernels import (
    evidence_weighted_advantage,
    grpo_loss,
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


def test_row_statistics_passes_opcheck(device):
    student, _, token_ids, mask, _ = problem(device=device)
    temperatures = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    for logits, kept, temperature, inplace in (
        (student, mask, None, False),
        (student.clone().requires_grad_(), None, temperatures, False),
        (student.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), mask, None, False),
    ):
        arguments = (logits, token_ids, kept, 0.7, temperature, inplace)
        opcheck(torch.ops.sdkernels.row_statistics, arguments)


def test_row_gradients_pass_opcheck(device):
    student, _, token_ids, mask, _ = problem(device=device)
    statistics = torch.ops.sdkernels.row_statistics(student, token_ids, mask, 0.7, None, False)
    upstream = torch.randn(2, B, T, device=device)
    arguments = (student, token_ids, mask, 0.7, None, *statistics, *upstream)
    for operator in (torch.ops.sdkernels.row_gradient, torch.ops.sdkernels.row_gradient_):
        opcheck(operator, arguments)


def test_rlsd_token_advantage_passes_opcheck(device):
    student, teacher, token_ids, mask, advantages = problem(device=device)
    tail = (mask, None, 0.7, None, 0.5, 0.8, 1.2, "all", False)
    for judge in (teacher, -torch.rand(B, T, device=device)):
        arguments = (student, judge, token_ids, advantages, *tail)
        opcheck(torch.ops.sdkernels.rlsd_token_advantage, arguments)


SUPPORTS = {  # filters, capacity, and whether larger supports are listed in part
    "listed": (3, 1.0, 0.0, 8, False),
    "unlisted": (9, 1.0, 0.0, 2, False),
    "partly listed": (9, 1.0, 0.0, 2, True),
    "no filter": (0, 1.0, 0.0, 0, False),
    "top_p and min_p": (0, 0.9, 0.01, 4, False),
}


def supports(way, device, dtype=torch.float32):
    """Logits as a row operation gets them, ids, a mask, temperatures, and the fields of their RowSupport."""
    logits, _, token_ids, mask, _ = problem(dtype, device)
    mask = mask & (token_ids != -100)
    temperatures = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    found = torch.ops.sdkernels.row_support(logits, mask, 1.0, temperatures, *SUPPORTS[way])
    return logits, token_ids, mask, temperatures, found


@pytest.mark.parametrize("way", SUPPORTS)
def test_row_support_passes_opcheck(way, device):
    logits, _, mask, temperatures, _ = supports(way, device)
    for rows, kept, temperature in (
        (logits, mask, temperatures),
        (logits.transpose(0, 1).contiguous().transpose(0, 1), None, None),
        (logits.bfloat16(), mask, None),
    ):
        arguments = (rows, kept, 0.7, temperature, *SUPPORTS[way])
        opcheck(torch.ops.sdkernels.row_support, arguments)


@pytest.mark.parametrize("way", SUPPORTS)
def test_truncated_operators_pass_opcheck(way, device):
    logits, token_ids, mask, temperatures, found = supports(way, device)
    scaling, leaf = (1.0, temperatures), logits.clone().requires_grad_()
    ops = torch.ops.sdkernels
    soft, label, gradient = ops.truncated_log_softmax, ops.truncated_token_log_prob, ops.truncated_gradient
    # of a result with -inf a sum is NaN nowhere but in its gradient check, so there S is all of V
    whole = ops.row_support(logits, None, *scaling, 0, 1.0, 0.0, 0, False)
    opcheck(soft, (leaf, *scaling, *whole, torch.float32))
    inside = ops.truncated_log_softmax(logits, *scaling, *found, torch.float32).argmax(-1)
    inside = torch.where(token_ids == -100, -100, inside)
    opcheck(label, (leaf, inside, mask, *scaling, *found))
    upstream, on_label, on_entropy = torch.randn_like(logits), torch.randn(B, T), torch.randn(B, T)
    on_label, on_entropy = on_label.to(device), on_entropy.to(device)
    for pulls in ((upstream, None, None, None), (None, inside.clamp(min=0), on_label, on_entropy)):
        opcheck(gradient, (logits, *pulls, *scaling, *found))


@pytest.mark.parametrize("way", SUPPORTS)
def test_pair_operators_pass_opcheck(way, device):
    base, _, mask, temperatures, found = supports(way, device)
    student = torch.randn_like(base)
    threshold, size, token_ids, log_probs = found[0], found[1], found[5], found[6]
    bases = [(base, threshold, size, token_ids, log_probs), (base, None, None, None, None)]
    bases += [(None, None, None, token_ids, log_probs)] * (way == "listed")
    for logits, *support in bases:
        shared = (mask, 1.0, temperatures, *support)
        for rows in (student, student.clone().requires_grad_()):
            opcheck(torch.ops.sdkernels.pair_statistics, (rows, logits, *shared))
        statistics = torch.ops.sdkernels.pair_statistics(student, logits, *shared)
        upstream = torch.randn(4, B, T, dtype=torch.float64, device=device) * mask
        arguments = (student, logits, *shared[1:], *statistics, *upstream)
        for operator in (torch.ops.sdkernels.pair_gradient, torch.ops.sdkernels.pair_gradient_):
            opcheck(operator, arguments)


def test_gradcheck_of_token_log_prob(device):
    student, _, token_ids, mask, _ = problem(torch.float64, device)
    temperature = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda x: tuple(token_log_prob(x, token_ids, temperature, mask=mask)), student.requires_grad_()
    )


@pytest.mark.parametrize("old", [False, True])
def test_gradcheck_of_grpo_loss(old, device):
    student, _, token_ids, mask, advantages = problem(torch.float64, device)
    log_prob = token_log_prob(student, token_ids, mask=mask).log_prob
    old_log_prob = log_prob + torch.randn_like(log_prob) * 0.3 if old else None

    def outputs(x):
        options = dict(beta=0.1, reference_log_prob=log_prob + 0.2, token_weight=log_prob.exp(), mask=mask)
        result = grpo_loss(x, token_ids, advantages, old_log_prob, reduction="seq-mean-token-mean", **options)
        # without old log-probs the loss has a gradient but, r being 1, no slope that a difference could see
        return (result.loss, result.log_prob, result.entropy) if old else (result.log_prob, result.entropy)

    assert torch.autograd.gradcheck(outputs, student.requires_grad_())


def test_gradcheck_of_rlsd_loss_with_evidence_from_the_rollout(device):
    student, teacher, token_ids, mask, advantages = problem(torch.float64, device)
    log_prob = token_log_prob(student, token_ids, mask=mask).log_prob
    old_log_prob = log_prob + torch.randn_like(log_prob) * 0.1

    def outputs(x):
        result = rlsd_loss(
            x, teacher, token_ids, advantages, old_log_prob, evidence_from="old", mask=mask, dual_clip=3.0
        )
        return result.loss, result.student_log_prob, result.student_entropy

    assert torch.autograd.gradcheck(outputs, student.requires_grad_())


OPTIONS = dict(temperature=0.7, beta=0.1, reduction="seq-mean-token-mean", dual_clip=3.0)
FILTERS = {"top_k": 7, "top_p": 0.9}
COMPILED = {
    "token_log_prob": lambda x, y, i, m, a, o: token_log_prob(x, i, 0.7, mask=m),
    "grpo_loss": lambda x, y, i, m, a, o: grpo_loss(x, i, a, o, reference_log_prob=o - 0.1, mask=m, **OPTIONS),
    "rlsd_loss": lambda x, y, i, m, a, o: rlsd_loss(x, y, i, a, o, reference_log_prob=o - 0.1, mask=m, **OPTIONS),
    "rlsd_loss of log-probs": lambda x, y, i, m, a, o: rlsd_loss(x, o, i, a, mask=m, lam=0.5, pessimistic=True),
    "rlsd_token_advantage": lambda x, y, i, m, a, o: rlsd_token_advantage(x, y, i, a, mask=m, credit_mask=m),
    "evidence_weighted_advantage": lambda x, y, i, m, a, o: evidence_weighted_advantage(o, o - 0.1, a, mask=m),
    "truncated_log_softmax": lambda x, y, i, m, a, o: (truncated_log_softmax(x, 0.7, **FILTERS).exp() * y,),
    "truncated_support": lambda x, y, i, m, a, o: truncated_support(x, 0.7, **FILTERS, max_size=4, mask=m)[:3],
    "truncated token_log_prob": lambda x, y, i, m, a, o: token_log_prob(x, y.argmax(-1), 0.7, mask=m, **FILTERS),
    "replayed token_log_prob": lambda x, y, i, m, a, o: token_log_prob(
        x, i, 0.7, mask=m, support=y.argsort(-1)[..., :5]
    ),
    "ssd_decomposition": lambda x, y, i, m, a, o: ssd_decomposition(x, y, 0.7, **FILTERS, mask=m),
    "ssd_decomposition of a Support": lambda x, y, i, m, a, o: ssd_decomposition(
        x, truncated_support(y, 0.7, **FILTERS, max_size=4, mask=m), 0.7, mask=m
    ),
    "ssd_loss": lambda x, y, i, m, a, o: ssd_loss(
        x, y, a.abs(), **FILTERS, mask=m, weights=(1, 0.5, 2), reduction="seq-mean-token-mean", token_weight=o
    ),
    "opsd_loss": lambda x, y, i, m, a, o: opsd_loss(x, y, temperature=a.abs(), mask=m, token_weight=o),
    "clipped opsd_loss": lambda x, y, i, m, a, o: opsd_loss(x, y, divergence="jsd", token_clip=0.05, mask=m),
    "opsd_loss of a top-k": lambda x, y, i, m, a, o: opsd_loss(x, y, divergence="reverse_kl", top_k=5, mask=m),
    "opsd_loss of a renormalised top-k": lambda x, y, i, m, a, o: opsd_loss(
        x, y, top_k=5, top_k_from="teacher", tail=False, temperature=a.abs(), reduction="seq-mean-token-sum"
    ),
    "opsd_decomposition": lambda x, y, i, m, a, o: opsd_decomposition(
        x, torch.stack([y, -y, y * 2]), temperature=a.abs(), mask=m
    ),
}

INDUCTED = ("rlsd_loss", "ssd_loss", "opsd_loss of a top-k")  # the rest only traced, a tenth of the time


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_to_one_graph_that_equals_eager(name, device):
    torch._dynamo.reset()
    function = COMPILED[name]
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if name in INDUCTED else "aot_eager")
    student, teacher, token_ids, mask, advantages = problem(device=device)
    old = token_log_prob(student, token_ids, 0.7, mask=mask).log_prob + 0.05
    results = []
    for call in (function, compiled):
        leaf = student.clone().requires_grad_()
        output = call(leaf, teacher, token_ids, mask, advantages, old)
        if name == "ssd_loss":
            output = (output.loss, *output.terms)
        scalar = sum(x.sum() for x in output if x.requires_grad)
        gradient = torch.autograd.grad(scalar, leaf)[0] if isinstance(scalar, torch.Tensor) else student
        results.append((*output, gradient))
    for field, (eager, graph) in enumerate(zip(*results, strict=True)):
        # what is compiled besides the operators may be fused and so rounded elsewhere, in a few elementwise steps
        slack = 8 * torch.finfo(torch.float32).eps * eager[eager.isfinite()].abs().max()
        assert ((graph == eager) | ((graph - eager).abs() <= slack)).all(), field
        assert graph.dtype == eager.dtype


def test_compiles_with_inplace(device):
    torch._dynamo.reset()
    student, teacher, token_ids, mask, advantages = problem(device=device)

    def loss_and_gradient(x):
        leaf = x.clone().requires_grad_()
        return rlsd_loss(leaf * 1.0, teacher, token_ids, advantages, mask=mask, inplace=True).loss, leaf

    loss, leaf = loss_and_gradient(student)
    loss.backward()
    graph = torch.compile(lambda x: rlsd_loss(x * 1.0, teacher, token_ids, advantages, mask=mask, inplace=True).loss,
                          fullgraph=True)  # fmt: skip
    again = student.clone().requires_grad_()
    graph(again).backward()
    assert ((again.grad - leaf.grad).abs() <= 8 * torch.finfo(torch.float32).eps * leaf.grad.abs().max()).all()


@no_kernel
@pytest.mark.parametrize("dynamic", [None, True])
def test_another_length_or_number_does_not_break_the_graph(dynamic, device):
    torch._dynamo.reset()
    compiled = torch.compile(rlsd_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, lam, temperature in ((3, 0.5, 1.0), (5, 0.4, 0.9), (8, 0.3, 0.8)):
        shape = (2, length)
        student, teacher = (torch.randn(*shape, V, device=device) for _ in range(2))
        token_ids, advantages = (
            nasty.ids(2 * length, V, device).reshape(shape),
            torch.tensor([1.0, -1.0], device=device),
        )
        options = dict(lam=lam, temperature=temperature)
        expected = rlsd_loss(student, teacher, token_ids, advantages, **options)
        for eager, graph in zip(expected, compiled(student, teacher, token_ids, advantages, **options), strict=True):
            assert ((graph - eager).abs() <= 8 * torch.finfo(torch.float32).eps * eager.abs().max()).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_meta_tensors_go_through_so_nothing_reads_values_on_the_host(inplace):
    """Any .item(), bool(tensor) or data-dependent shape raises on meta tensors; more than 2**31 elements are free."""
    student = torch.empty(4, 8192, 151936, device="meta", dtype=torch.bfloat16, requires_grad=True)
    teacher, token_ids = torch.empty_like(student), torch.zeros(4, 8192, dtype=torch.int64, device="meta")
    advantages, per_token = torch.zeros(4, device="meta"), torch.zeros(4, 8192, device="meta")
    options = dict(mask=per_token, temperature=advantages, clip_range=(0.1, 0.3))
    weighed = rlsd_token_advantage(student, teacher, token_ids, advantages, credit_mask=per_token, **options)
    output = rlsd_loss(student, teacher, token_ids, advantages, per_token, reference_log_prob=per_token, beta=0.1,
                       token_weight=per_token, reduction="seq-mean-token-mean", dual_clip=3.0, inplace=inplace,
                       normalizer=torch.ones((), device="meta"), **options)  # fmt: skip
    output.loss.backward()
    assert {x.dtype for x in (*weighed, *output)} == {torch.float32}
    assert student.grad.dtype == torch.bfloat16
    ends = torch.zeros(5, dtype=torch.int32, device="meta")
    packed = grpo_loss(student.view(-1, 151936), token_ids.view(-1), advantages, cu_seqlens=ends,
                       reduction="seq-mean-token-sum")  # fmt: skip
    assert packed.loss.shape == ()


@pytest.mark.parametrize("filtering", [{"top_k": 20, "top_p": 0.95, "min_p": 0.01}, {}], ids=str)
def test_meta_tensors_go_through_truncation_and_ssd(filtering):
    student = torch.empty(4, 8192, 151936, device="meta", dtype=torch.bfloat16, requires_grad=True)
    base, token_ids = torch.empty_like(student), torch.zeros(4, 8192, dtype=torch.int64, device="meta")
    temperature, per_token = torch.zeros(4, device="meta"), torch.zeros(4, 8192, device="meta")
    options = {"mask": per_token, **filtering}
    support = truncated_support(base, temperature, max_size=64, **options)
    assert support.token_ids.shape == (4, 8192, 64)
    token_log_prob(student, token_ids, temperature, **options).log_prob.sum().backward()
    token_log_prob(student, token_ids, temperature, mask=per_token, support=support).entropy.sum().backward()
    loss_options = {"reduction": "seq-mean-token-mean", "token_weight": per_token}
    for output in (ssd_loss(student, base, temperature, **options, **loss_options),
                   ssd_loss(student, support, temperature, mask=per_token, **loss_options)):  # fmt: skip
        output.loss.backward()
        assert {x.dtype for x in output.terms[:-1]} == {torch.float32}
    truncated_log_softmax(student, temperature, **filtering).sum().backward()
    assert student.grad.dtype == torch.bfloat16


def test_nothing_synchronises_with_the_host(device):
    if device == "cpu":
        pytest.skip("a CPU has no queue to wait for; the meta test covers it")
    student, teacher, token_ids, mask, advantages = problem(device=device)
    expected = rlsd_loss(student.clone().requires_grad_(), teacher, token_ids, advantages, mask=mask).loss.item()
    leaf = student.clone().requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rlsd_token_advantage(student, teacher, token_ids, advantages, mask=mask)
        output = rlsd_loss(leaf, teacher, token_ids, advantages, mask=mask, reduction="seq-mean-token-mean")
        output.loss.backward()
        rlsd_loss(student, teacher, token_ids, advantages, mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(
        rlsd_loss(leaf.detach(), teacher, token_ids, advantages, mask=mask).loss.cpu(), torch.tensor(expected)
    )
