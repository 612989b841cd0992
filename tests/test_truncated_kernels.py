"""Claims about implementations of truncation and SSD: instruction sets, what the kernels load, when they recompile."""

from functools import partial
from types import SimpleNamespace

import nasty
import pytest
import torch
from closeness import LOG_PROB_BOUND, ROUNDING, assert_within
from test_kernels import (
    CSRC,
    INSTRUCTION_SETS,
    compiled,
    counting_loads,
    interpreted,
    keys_of,
    not_interpreted,
)

from sdkernels import ssd_decomposition, ssd_loss, token_log_prob, truncated_log_softmax, truncated_support
from sdkernels.rows import layout, pair, pair_gradient, support, truncated, truncated_gradient

OPERATORS = ("row_support", "truncated_log_softmax", "truncated_gradient", "pair_statistics", "pair_gradient")
KERNELS = [
    (support, "_support_kernel"),
    (support, "_search_kernel"),
    (truncated, "_log_softmax_kernel"),
    (truncated_gradient, "_upstream_sum_kernel"),
    (truncated_gradient, "_truncated_gradient_kernel"),
    (pair, "_pair_statistics_kernel"),
    (pair_gradient, "_pair_gradient_kernel"),
]
SHORT, LONG = {"top_k": 20, "top_p": 0.8}, {"top_p": 0.95}  # supports that are kept as lists, and longer ones
FILTERS = (SHORT, LONG, {"top_k": 100}, {"min_p": 0.01}, {})


def everything(student, base, filters, upstream):
    """Values and gradients of all functions that have kernels of their own."""
    leaf = student.detach().requires_grad_()
    log_q = truncated_log_softmax(leaf, 1.6, **filters)
    token_ids = log_q.argmax(-1)
    chosen = token_log_prob(leaf, token_ids, 1.6, **filters)
    loss = ssd_loss(leaf, base, 1.6, **filters, weights=(1.0, 0.5, 2.0))
    upstream = upstream.to(log_q.dtype)
    found = truncated_support(base, 1.6, **filters, max_size=40)
    sparse = ssd_loss(leaf, found, 1.6, weights=(1.0, 0.5, 2.0))
    results = {"log_q": log_q, "size": found.size, "token_ids": found.token_ids, "log_probs": found.log_probs}
    results |= chosen._asdict() | loss.terms._asdict() | {f"sparse {k}": v for k, v in sparse.terms._asdict().items()}
    for name, output, on in (("log_q", log_q, upstream), ("log_prob", chosen.log_prob, upstream[..., 0]),
                             ("entropy", chosen.entropy, upstream[..., 1]), ("loss", loss.loss, None),
                             ("sparse", sparse.loss, None)):  # fmt: skip
        results[f"gradient of {name}"] = torch.autograd.grad(output, leaf, on, retain_graph=True)[0]
    return {name: value.detach().double() for name, value in results.items()}


@compiled
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [37, 4096, 10001])
def test_instruction_sets_agree_with_the_reference(vocab, filters, dtype, instruction_set, monkeypatch):
    student, base = (nasty.rows("gumbel", 3, vocab, dtype) for _ in range(2))
    namespace = {name: getattr(CSRC, name) for name in ("row_statistics", "row_gradient")}
    namespace |= {name: partial(getattr(CSRC, name), instruction_set=instruction_set) for name in OPERATORS}
    monkeypatch.setattr(torch.ops, "sdkernels_cpu", SimpleNamespace(**namespace))
    upstream = torch.randn(student.shape).to(dtype)
    found = everything(student, base, filters, upstream)
    expected = everything(student.double(), base.double(), filters, upstream)
    for name, truth in expected.items():
        rounded = ROUNDING[dtype] * truth.abs().nan_to_num(posinf=0.0) if name == "log_q" or "gradient" in name else 0.0
        assert_within(found[name], truth, LOG_PROB_BOUND + rounded, name)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_supports_cost_one_sweep_to_find_and_none_to_use(dtype, monkeypatch):
    vocab = 50257
    student, base = (nasty.rows("gaussian", 3, vocab, dtype) for _ in range(2))
    mask = torch.tensor([True, False, True])
    leaf = student.requires_grad_()
    with counting_loads(monkeypatch) as count:
        output = ssd_loss(leaf, base, 1.6, **SHORT, mask=mask)
    sizes = output.terms.support_size.tolist()
    assert [count(row) for row in base] == [vocab, 0, vocab]
    assert [count(row) for row in student.detach()] == [vocab + n if n else 0 for n in sizes]
    with counting_loads(monkeypatch) as count:
        output.loss.backward()
    assert count(base) == 0
    assert [count(row) for row in student.detach()] == [vocab + n if n else 0 for n in sizes]
    with counting_loads(monkeypatch) as count:
        log_q = truncated_log_softmax(leaf, 1.6, **SHORT)
    assert [count(row) for row in student.detach()] == [vocab] * 3
    upstream = torch.randn_like(log_q)
    with counting_loads(monkeypatch) as count:
        log_q.backward(upstream)
    assert count(student.detach()) == 0
    blocks = -(-vocab // (layout.block_options(student)["BLOCK"]))
    assert count(upstream) <= (log_q > -torch.inf).sum() * (blocks + 1)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "sweeps"), [("gaussian", 15), ("gumbel", 15), ("ties", 40)])
def test_long_supports_cost_a_few_sweeps_to_find(kind, sweeps, dtype, monkeypatch):
    vocab = 151936
    logits = (nasty.rows(kind, 1, vocab) / 4).to(dtype)
    with counting_loads(monkeypatch) as count:
        log_q = truncated_log_softmax(logits, 1.6, **LONG)
    assert (log_q > -torch.inf).sum() > 4096
    assert count(logits) <= sweeps * vocab


@interpreted
def test_a_recorded_support_costs_the_students_row_only(monkeypatch):
    vocab = 50257
    student, base = (nasty.rows("gaussian", 2, vocab) for _ in range(2))
    found = truncated_support(base, 1.6, **SHORT, max_size=32)
    leaf = student.requires_grad_()
    with counting_loads(monkeypatch) as count:
        output = ssd_loss(leaf, found, 1.6)
        output.loss.backward()
    assert [count(row) for row in student.detach()] == [2 * (vocab + int(n)) for n in found.size]


@interpreted
def test_without_filters_a_pair_is_read_once_forward_and_once_backward(monkeypatch):
    vocab = 50257
    student, base = (nasty.rows("gaussian", 2, vocab) for _ in range(2))
    leaf = student.requires_grad_()
    with counting_loads(monkeypatch) as count:
        output = ssd_loss(leaf, base, 1.5)
    assert [count(rows) for rows in (student.detach(), base)] == [2 * vocab] * 2
    with counting_loads(monkeypatch) as count:
        output.loss.backward()
    assert [count(rows) for rows in (student.detach(), base)] == [2 * vocab] * 2


@not_interpreted
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_another_length_batch_or_temperature_does_not_recompile(filters):
    pytest.importorskip("triton")

    def run(batch, length, temperature):
        student, base = torch.randn(2, batch, length, 48)
        leaf = student.requires_grad_()
        mask, token_ids = torch.ones(batch, length), torch.zeros(batch, length, dtype=torch.int64)
        truncated_log_softmax(leaf, temperature, **filters).sum().backward()
        token_log_prob(leaf, token_ids, temperature, mask=mask, **filters).log_prob.sum().backward()
        ssd_decomposition(leaf, base, temperature, mask=mask, **filters).cross_entropy.sum().backward()

    first = keys_of(run, [(2, 16, 1.0)], KERNELS)
    others = keys_of(run, [(b, t, 0.7) for b, t in ((1, 1), (1, 7), (2, 17), (3, 64), (1, 4096), (16, 1))], KERNELS)
    for name, found in others.items():
        assert found <= first[name], f"{name} is compiled again:\n" + "\n".join(sorted(found - first[name]))
    assert any(first.values())
