"""Claims about OPSD's implementations: instruction sets, what the kernels load, when they recompile."""

from functools import partial
from types import SimpleNamespace

import nasty
import pytest
import torch
from closeness import LOG_PROB_BOUND, ROUNDING, assert_within
from test_kernels import CSRC, INSTRUCTION_SETS, compiled, counting_loads, interpreted, keys_of, not_interpreted

from sdkernels import opsd_decomposition, opsd_loss
from sdkernels.rows import divergence, divergence_gradient, information, reduced, reduced_gradient, support

OPERATORS = ("row_support", "row_divergence", "divergence_gradient", "reduced_rows", "reduced_gradient",
             "row_information")  # fmt: skip
KERNELS = [
    (divergence, "_divergence_kernel"),
    (divergence_gradient, "_divergence_gradient_kernel"),
    (information, "_information_kernel"),
    (reduced, "_reduced_kernel"),
    (reduced_gradient, "_reduced_gradient_kernel"),
    (support, "_support_kernel"),
    (support, "_search_kernel"),
]
KL, JSD = {"divergence": "forward_kl"}, {"divergence": "jsd", "beta": 0.3}
OPTIONS = (
    KL,
    {"divergence": "reverse_kl", "token_clip": 0.01},
    JSD,
    {**JSD, "top_k": 5},
    {**KL, "top_k": 9, "top_k_from": "teacher", "tail": False},
)


@compiled
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", nasty.DTYPES[:3])
@pytest.mark.parametrize("vocab", [37, 4096, 10001])
def test_instruction_sets_agree_with_the_reference(vocab, dtype, instruction_set, monkeypatch):
    student, teacher, other = (nasty.rows("gumbel", 3, vocab, dtype) for _ in range(3))
    namespace = {name: partial(getattr(CSRC, name), instruction_set=instruction_set) for name in OPERATORS}
    monkeypatch.setattr(torch.ops, "sdkernels_cpu", SimpleNamespace(**namespace))
    for options in OPTIONS:
        results = []
        for z, t in ((student, teacher), (student.double(), teacher.double())):
            leaf = z.clone().requires_grad_()
            output = opsd_loss(leaf, t, temperature=0.8, **options)
            results.append((output.divergence.detach(), *torch.autograd.grad(output.loss, leaf)))
        (value, gradient), (truth, true_gradient) = results
        assert_within(value, truth, LOG_PROB_BOUND, f"divergence of {options}")
        allowed = LOG_PROB_BOUND + ROUNDING[dtype] * true_gradient.abs()
        assert_within(gradient, true_gradient, allowed, f"gradient of {options}")
    teachers = torch.stack([teacher, other])
    exact = opsd_decomposition(student.double(), teachers.double())
    for name, value, truth in zip(exact._fields, opsd_decomposition(student, teachers), exact, strict=True):
        assert_within(value, truth, LOG_PROB_BOUND, name)


def loads(monkeypatch, student, teacher, options):
    """What forward and backward load of each row of student and teacher, in rows."""
    leaf, vocab = student.clone().requires_grad_(), student.shape[-1]
    found = []
    with counting_loads(monkeypatch) as count:
        output = opsd_loss(leaf, teacher, mask=torch.tensor([1, 0, 1]), **options)
    found.append([[count(row) / vocab for row in rows] for rows in (leaf.detach(), teacher)])
    with counting_loads(monkeypatch) as count:
        output.loss.backward()
    found.append([[count(row) / vocab for row in rows] for rows in (leaf.detach(), teacher)])
    return found


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "sweeps"),
    [
        ({"divergence": "forward_kl"}, 1),
        ({"divergence": "reverse_kl"}, 1),
        ({"divergence": "jsd"}, 2),
        ({"divergence": "forward_kl", "token_clip": 0.05}, 2),
    ],
    ids=str,
)
def test_a_kl_loads_both_rows_once_the_jsd_and_a_clip_twice_and_backward_once(options, sweeps, dtype, monkeypatch):
    student, teacher = (nasty.rows("gaussian", 3, 50257, dtype) for _ in range(2))
    forward, backward = loads(monkeypatch, student, teacher, options)
    assert forward == [[sweeps, 0, sweeps]] * 2
    assert backward == [[1, 0, 1]] * 2


@interpreted
@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("top_k_from", ["student", "teacher"])
def test_reduced_rows_cost_a_sweep_to_find_the_tokens_and_with_a_tail_one_over_both(top_k_from, tail, monkeypatch):
    vocab, k = 50257, 20
    student, teacher = (nasty.rows("gaussian", 3, vocab) for _ in range(2))
    options = {"top_k": k, "top_k_from": top_k_from, "tail": tail}
    forward, backward = loads(monkeypatch, student, teacher, options)
    few = 4 * k / vocab  # the listed logits, twice, and the first columns, where -inf may be
    chooser = 2 if tail else 1
    for rows, sweeps in zip(forward, (chooser, 1) if top_k_from == "student" else (1, chooser), strict=True):
        assert rows[1] == 0
        assert all(sweeps <= row <= sweeps + few for row in (rows[0], rows[2]))
    assert backward == [[float(tail), 0, float(tail)], [0, 0, 0]]


@interpreted
def test_the_decomposition_loads_every_row_twice_from_memory(monkeypatch):
    """Teachers three times, but the third right after the second, from a cache."""
    vocab = 50257
    student, teachers = nasty.rows("gaussian", 2, vocab), nasty.rows("gaussian", 6, vocab).view(3, 2, vocab)
    with counting_loads(monkeypatch) as count:
        opsd_decomposition(student, teachers)
    assert count(student) == 2 * student.numel()
    assert count(teachers) == 3 * teachers.numel()


@not_interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_another_length_batch_temperature_beta_or_clip_does_not_recompile(options):
    pytest.importorskip("triton")

    def run(batch, length, temperature):
        student, teacher, other = torch.randn(3, batch, length, 48)
        leaf, mask = student.requires_grad_(), torch.ones(batch, length)
        changed = {name: value * temperature for name, value in options.items() if name in ("beta", "token_clip")}
        opsd_loss(leaf, teacher, temperature=temperature, mask=mask, **{**options, **changed}).loss.backward()
        teachers = torch.stack([teacher, other, other][: 1 + length % 3])
        opsd_decomposition(student, teachers, temperature=temperature, mask=mask)

    first = keys_of(run, [(2, 16, 1.0)], KERNELS)
    others = keys_of(run, [(b, t, 0.7) for b, t in ((1, 1), (1, 7), (2, 17), (3, 64), (1, 4096), (16, 1))], KERNELS)
    for name, found in others.items():
        assert found <= first[name], f"{name} is compiled again:\n" + "\n".join(sorted(found - first[name]))
    assert any(first.values())
