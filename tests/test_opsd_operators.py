"""What PyTorch asks of OPSD's operators: opcheck, meta tensors, lengths, no host synchronisation."""

import itertools

import pytest
import torch
from conftest import no_kernel
from operators import B, T, V, opcheck, problem
from opsd_oracles import DIVERGENCES, SOME
from supports import few, name

from sdkernels import opsd_decomposition, opsd_loss
from sdkernels.rows.reduced import top_ids

OPS = torch.ops.sdkernels


def sides(device, layout=lambda x: x):
    """A student's leaf, a teacher, a mask and temperatures, as the row operations get them."""
    student, teacher, _, mask, _ = problem(device=device)
    temperatures = torch.tensor([0.5, 2.0], dtype=torch.float64, device=device)
    return layout(student).requires_grad_(), layout(teacher), mask, temperatures


def time_major(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
@pytest.mark.parametrize("clip", [torch.inf, 0.05])
def test_row_divergence_and_its_gradient_pass_opcheck(clip, divergence, device):
    options = (divergence["divergence"], divergence.get("beta", 0.5), clip)
    every = itertools.product((torch.clone, time_major), (False, True), (False, True))
    for layout, kept, tempered in few(every, 3):
        student, teacher, mask, temperatures = sides(device, layout)
        scaling = (1.0, temperatures) if tempered else (0.7, None)
        given = (student, teacher.bfloat16() if kept else teacher, mask if kept else None, *scaling, *options)
        opcheck(OPS.row_divergence, given)
        student = student.detach()
        _, *statistics = OPS.row_divergence(student, *given[1:])
        upstream = torch.randn(B, T, dtype=torch.float64, device=device) * mask
        for operator in (OPS.divergence_gradient, OPS.divergence_gradient_):
            opcheck(operator, (student, given[1], *scaling, *options, *statistics, upstream))
        opcheck(OPS.row_divergence, (student.requires_grad_(), *given[1:], *statistics[1:]))


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("by_teacher", [False, True])
@pytest.mark.parametrize("layout", [torch.clone, time_major])
def test_reduced_rows_and_their_gradient_pass_opcheck(layout, by_teacher, tail, device):
    student, teacher, mask, temperatures = sides(device, layout)
    every = torch.ones_like(mask)
    every_way = ((mask, 5, (1.0, temperatures)), (None, 5, (0.7, None)), (None, V - 1, (0.7, None)))
    for kept, places, scaling in few(every_way):
        ids = top_ids(teacher if by_teacher else student.detach(), every if kept is None else kept, places)
        arguments = (teacher, ids, by_teacher, tail, kept, *scaling)
        opcheck(OPS.reduced_rows, (student, *arguments))
        plain = student.detach()
        _, _, *sums = OPS.reduced_rows(plain, *arguments)[:4]
        upstream = torch.randn(B, T, places + 1, device=device)
        for operator in (OPS.reduced_gradient, OPS.reduced_gradient_):
            opcheck(operator, (plain, ids, *scaling, *sums, upstream))


@pytest.mark.parametrize("samples", [1, 3])
def test_row_information_passes_opcheck(samples, device):
    student, _, mask, temperatures = sides(device)
    teachers = torch.randn(samples, B, T, V, device=device)
    for kept, scaling in ((None, (0.7, None)), (mask, (1.0, temperatures))):
        for each in (teachers, teachers.transpose(1, 2).contiguous().transpose(1, 2), teachers.bfloat16()):
            given = (student.detach(), each, kept, *scaling)
            opcheck(OPS.row_information, given)
            sums = torch.rand(2, samples + 1, B, T, device=device)
            opcheck(OPS.row_information, (*given, sums[0].double(), sums[1]))


@no_kernel
@pytest.mark.parametrize(("reduced", "dynamic"), [({}, None), ({"top_k": 5}, True)])
def test_another_length_or_number_does_not_break_the_graph(reduced, dynamic, device):
    torch._dynamo.reset()
    compiled = torch.compile(opsd_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, clip, temperature in ((3, 0.5, 1.0), (5, 0.4, 0.9), (8, 0.3, 0.8)):
        student, teacher = (torch.randn(2, length, V, device=device) for _ in range(2))
        options = dict(divergence="jsd", token_clip=clip, temperature=temperature, **reduced)
        expected = opsd_loss(student, teacher, **options)
        for eager, graph in zip(expected, compiled(student, teacher, **options), strict=True):
            assert ((graph - eager).abs() <= 8 * torch.finfo(torch.float32).eps * eager.abs().max()).all()


@pytest.mark.parametrize("chosen", SOME, ids=name)
def test_meta_tensors_go_through_so_nothing_reads_values_on_the_host(chosen):
    student = torch.empty(4, 8192, 151936, device="meta", dtype=torch.bfloat16, requires_grad=True)
    teacher, per_token = torch.empty_like(student, requires_grad=False), torch.zeros(4, 8192, device="meta")
    temperature, one = torch.zeros(4, device="meta"), torch.ones((), device="meta")
    options = {"mask": per_token, "temperature": temperature, "token_weight": per_token, "normalizer": one}
    output = opsd_loss(student, teacher, reduction="seq-mean-token-mean", **options, **chosen)
    output.loss.backward()
    assert {x.dtype for x in output} == {torch.float32}
    assert student.grad.dtype == torch.bfloat16
    assert student.grad.shape == student.shape
    ends = torch.zeros(5, dtype=torch.int32, device="meta")
    packed = opsd_loss(*(x.detach().view(-1, 151936) for x in (student, teacher)), cu_seqlens=ends,
                       temperature=temperature, reduction="seq-mean-token-sum", **chosen)  # fmt: skip
    assert packed.loss.shape == ()


def test_meta_tensors_go_through_the_decomposition():
    student = torch.empty(4, 8192, 151936, device="meta", dtype=torch.bfloat16)
    teachers = torch.empty(5, *student.shape, device="meta", dtype=torch.bfloat16)
    mask, temperature = torch.zeros(4, 8192, device="meta"), torch.zeros(4, device="meta")
    terms = opsd_decomposition(student, teachers, temperature=temperature, mask=mask)
    assert {(x.dtype, x.shape) for x in terms} == {(torch.float32, mask.shape)}


def test_nothing_synchronises_with_the_host(device):
    if device == "cpu":
        pytest.skip("a CPU has no queue to wait for; the meta test covers it")
    student, teacher, mask, _ = sides(device)
    run = lambda: [opsd_loss(student, teacher, mask=mask, **chosen).loss.backward() for chosen in SOME]  # noqa: E731
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        opsd_decomposition(student, teacher.unsqueeze(0), mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
