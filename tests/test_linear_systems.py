"""linear_* among matmul counts, real vocabularies, torch.compile, checkpointing, autocast and memory limits."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closeness import assert_same_bits, epsilon
from conftest import INTERPRETED, no_kernel
from heads import DIFFERENTIABLE, FUNCTIONS, LOSSES, H, V, dense, fields, from_head, fused, leaves, problem, totals_of
from supports import few
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from sdkernels import linear_rlsd_loss, linear_rlsd_token_advantage, truncated_support

N, CHUNK = 10, 4
CHUNKS = 3


def matmuls(function):
    """Of the matmuls that a call makes: how many there are, and how many of tokens x H x V they amount to."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        function()
    count, products = 0, 0
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm"):
            (m, k), (_, n) = [x for x in event.input_shapes if len(x) == 2][-2:] if event.name == "aten::mm" else (
                event.input_shapes[1], event.input_shapes[2])  # fmt: skip
            count, products = count + 1, products + m * k * n
    return count, products / (N * H * V)


@pytest.mark.parametrize(("function", "options", "forward", "backward"), few([
    ("token_log_prob", {}, (CHUNKS, 1), (3 * CHUNKS, 3)),
    ("grpo_loss", {}, (3 * CHUNKS, 3), (0, 0)),
    ("grpo_loss", {"frozen": True}, (2 * CHUNKS, 2), (0, 0)),
    ("grpo_loss", {"reduction": "none"}, (CHUNKS, 1), (3 * CHUNKS, 3)),
    ("grpo_loss", {"no_grad": True}, (CHUNKS, 1), None),
    ("rlsd_loss", {}, (3 * CHUNKS, 4), (0, 0)),
    ("rlsd_loss", {"frozen": True}, (2 * CHUNKS, 3), (0, 0)),
    ("rlsd_loss", {"reduction": "none"}, (CHUNKS, 2), (3 * CHUNKS, 4)),
    ("rlsd_loss", {"teacher": "log-probs"}, (3 * CHUNKS, 3), (0, 0)),
    ("rlsd_loss", {"teacher": "own head"}, (4 * CHUNKS, 4), (0, 0)),
    ("rlsd_loss", {"no_grad": True}, (CHUNKS, 2), None),
    ("rlsd_token_advantage", {}, (CHUNKS, 2), None),
    ("ssd_loss", {"top_k": 5}, (3 * CHUNKS, 4), (0, 0)),
    ("ssd_loss", {"base": "support"}, (3 * CHUNKS, 3), (0, 0)),
    ("opsd_loss", {}, (3 * CHUNKS, 4), (0, 0)),
    ("opsd_loss", {"top_k": 5, "divergence": "reverse_kl"}, (3 * CHUNKS, 4), (0, 0)),
    ("truncated_support", {"top_k": 5}, (CHUNKS, 1), None),
], 6), ids=str)  # fmt: skip
def test_matmuls(function, options, forward, backward):
    options = {**options}
    p, _, _ = leaves(problem(N), {})
    if options.pop("frozen", False):
        p.weight = p.weight.detach()
    teacher, base = options.pop("teacher", None), options.pop("base", None)
    if teacher == "own head":
        options["teacher_lm_head_weight"] = p.weight.detach().clone()
    other = {"log-probs": p.old}.get(teacher)
    if base == "support":
        other = truncated_support(torch.randn(N, V), 0.8, top_k=5, max_size=5)
    outputs = []
    with torch.set_grad_enabled(not options.pop("no_grad", False)):
        call = lambda: outputs.append(fused(function, p, other=other, chunk_size=CHUNK, **options))  # noqa: E731
        assert matmuls(call) == pytest.approx(forward)
    if backward is not None:
        assert matmuls(lambda: sum(totals_of(fields(outputs[0]), False)).backward()) == pytest.approx(backward)


@pytest.mark.parametrize("result", ["student_log_prob", "student_entropy"])
def test_a_gradient_through_another_result_makes_the_logits_once_more(result):
    p, _, _ = leaves(problem(N), {})
    output = fused("rlsd_loss", p, chunk_size=CHUNK)
    total = output.loss + getattr(output, result).sum()
    assert matmuls(total.backward) == pytest.approx((3 * CHUNKS, 4))


def test_delta_of_bfloat16_hidden_states_at_a_real_vocabulary(device):
    vocab, width, tokens = (20011, 64, 2) if INTERPRETED else (151936, 256, 6)
    p = problem(tokens, hidden=torch.bfloat16, device=device, width=width, vocab=vocab)
    p.weight = (p.weight.float() * 2).bfloat16()
    found = linear_rlsd_token_advantage(p.hidden, p.other, p.weight, p.token_ids, p.advantages)
    log_probs = []
    for hidden in (p.hidden, p.other):
        z = hidden.double() @ p.weight.double().t()
        for logits in (z, z.bfloat16().double()):
            log_probs.append(logits.log_softmax(-1).gather(-1, p.token_ids.unsqueeze(-1)).squeeze(-1))
    truth, rounded = log_probs[2] - log_probs[0], log_probs[3] - log_probs[1]
    assert (found.information_gain - truth).abs().max() <= 1e-3
    assert (rounded - truth).abs().max() > 4e-3  # logits in bfloat16 would not do


COMPILED = [(x, {}) for x in FUNCTIONS] + [
    ("token_log_prob", {"top_k": 5}), ("grpo_loss", {"reduction": "none"}), ("rlsd_loss", {"softcap": 9.0}),
    ("ssd_loss", {"top_p": 0.9}), ("opsd_loss", {"top_k": 5, "divergence": "jsd"}),
]  # fmt: skip


@pytest.mark.parametrize(("function", "options"), few(COMPILED, 5), ids=str)
def test_compiles_to_one_graph_that_equals_eager(function, options, device):
    torch._dynamo.reset()
    p = problem(2, 3, device=device)
    copy, given, inputs = leaves(p, {"bias": p.bias, "mask": p.mask, "temperature": 0.7, "chunk_size": 4, **options})
    bias = given.pop("bias")
    call = from_head(function, copy, **given)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for each in (call, compiled):
        found = fields(each(*inputs[:2], bias))
        gradients = grad(sum(totals_of(found, False)), inputs) if function in DIFFERENTIABLE else ()
        results.append((*found.values(), *gradients))
    for eager, graph in zip(*results, strict=True):
        assert graph.dtype == eager.dtype
        assert graph.shape == eager.shape
        slack = 8 * epsilon(torch.float32) * eager.double().nan_to_num(0, 0, 0).abs().max()
        assert ((graph == eager) | ((graph - eager).abs() <= slack)).all()


@no_kernel
def test_compiles_with_inductor_and_makes_no_more_matmuls(device):
    torch._dynamo.reset()
    p, _, (hidden, weight) = leaves(problem(N, device=device), {})
    call = lambda x, w: linear_rlsd_loss(x, p.other, w, p.token_ids, p.advantages, p.old, chunk_size=CHUNK).loss  # noqa: E731
    compiled = torch.compile(call, fullgraph=True)
    for x, y in zip(grad(compiled(hidden, weight), (hidden, weight)), grad(call(hidden, weight), (hidden, weight)),
                    strict=True):  # fmt: skip
        assert (x - y).abs().max() <= 8 * epsilon(torch.float32) * y.abs().max()
    found = []
    assert matmuls(lambda: found.append(compiled(hidden, weight))) == pytest.approx((3 * CHUNKS, 4))
    assert matmuls(found[0].backward) == (0, 0)


@no_kernel
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_another_length_scale_and_softcap_does_not_break_the_graph(function, dynamic, device):
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length, scale, softcap in ((3, 1.0, 5.0), (5, 0.9, 6.0), (8, 1.1, 7.0)):
        p = problem(2, length, device=device)
        found, eager = (fields(f(function, p, logit_scale=scale, softcap=softcap)) for f in (compiled, fused))
        for name, value in found.items():
            assert torch.equal(value, eager[name]), name


@no_kernel
def test_another_lam_and_temperature_does_not_compile_anew(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    p, _, (hidden, weight) = leaves(problem(2, 3, device=device), {})

    def call(x, lam, temperature):
        return linear_rlsd_loss(x, p.other, weight, p.token_ids, p.advantages, lam=lam, temperature=temperature).loss

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for step in range(10):
        numbers = (0.05 * step + 0.3, 1.0 - 0.03 * step)
        graph, eager = (grad(f(hidden, *numbers), hidden)[0] for f in (compiled, call))
        assert (graph - eager).abs().max() <= 8 * epsilon(torch.float32) * eager.abs().max()
    assert counter.frame_count <= 2


ANOTHER_RESULT = {"token_log_prob": 1, "grpo_loss": 1, "rlsd_loss": 4, "opsd_loss": 1}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_gradient_checkpointing(function, reentrant, device):
    p = problem(2, 3, device=device)
    copy, given, inputs = leaves(p, {"bias": p.bias, "chunk_size": 4})
    bias = given.pop("bias")
    call = from_head(function, copy, **given)

    def total(hidden, weight, bias):
        output = call(hidden * 1.0, weight, bias)
        other = output.terms.kept_mass if function == "ssd_loss" else output[ANOTHER_RESULT[function]]
        return output[0].sum() + 0.3 * other.sum()

    results = []
    for each in (total, lambda *x: checkpoint(total, *x, use_reentrant=reentrant)):
        for x in inputs:
            x.grad = None
        value = each(*inputs[:2], bias)
        value.backward()
        results.append((value.detach(), *(x.grad for x in inputs)))
    for plain, saved in zip(*results, strict=True):
        assert_same_bits(saved, plain)


@no_kernel
@pytest.mark.parametrize("function", LOSSES)
def test_hooks_of_the_caller_do_not_see_the_graph_of_a_chunk(function, device):
    """Checkpointing that recomputes to the end, in many chunks; and how many matmuls it takes."""
    p, options, inputs = leaves(problem(N, device=device), {"softcap": 9.0})

    def call(hidden, **more):
        copy = SimpleNamespace(**{**vars(p), "hidden": hidden * 1.0})
        return fused(function, copy, chunk_size=2, **options, **more).loss

    expected = grad(call(inputs[0]), inputs)
    with set_checkpoint_early_stop(False):
        found = grad(checkpoint(call, inputs[0], use_reentrant=False), inputs)
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x, y)
    once, _ = matmuls(lambda: call(inputs[0]))
    again, _ = matmuls(lambda: checkpoint(call, inputs[0], use_reentrant=False).backward())
    assert again == 2 * once
    for loss in (call, lambda x: call(x, reduction="none").sum()):
        first = grad(checkpoint(loss, inputs[0], use_reentrant=False), inputs[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            first.sum().backward()
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        call(inputs[0])
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x):
        call(inputs[0])
    assert packed
    assert all(x.dim() < 2 or x.shape[-1] != V for x in packed)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast_rounds_hidden_states_and_weight_but_not_logits(function):
    p = problem(2, 3)
    p.hidden, p.other, p.weight = (x * 1.01 for x in (p.hidden, p.other, p.weight))
    copy, options, inputs = leaves(p, {"bias": p.bias, "chunk_size": 4})
    rounded = type(p)(
        **{**vars(copy), **{x: getattr(copy, x).bfloat16().float() for x in ("hidden", "other", "weight")}}
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = fields(fused(function, copy, **options))
    expected = fields(fused(function, rounded, **options))
    for key, value in found.items():
        assert_same_bits(value, expected[key], key)
    if function in DIFFERENTIABLE:
        mine, theirs = (grad(sum(totals_of(x, False)), inputs) for x in (found, expected))
        for x, y in zip(mine, theirs, strict=True):
            assert x.dtype == torch.float32
            assert (x - y).norm() <= 8e-3 * y.norm()


@pytest.mark.parametrize("function", DIFFERENTIABLE)
def test_autocast_leaves_float64_alone(function):
    p, _, _ = leaves(problem(2, 3, hidden=torch.float64), {})
    with torch.autocast("cpu", torch.bfloat16):
        found = fields(fused(function, p))
    for key, value in fields(fused(function, p)).items():
        assert_same_bits(found[key], value, key)


def test_nothing_given_is_written():
    p = problem(2, 3)
    given = [x for x in vars(p).values() if isinstance(x, torch.Tensor)]
    before = [(x.clone(), x._version) for x in given]
    for function in DIFFERENTIABLE:
        sum(totals_of(fields(fused(function, leaves(p, {})[0], mask=p.mask, softcap=9.0)), False)).backward()
    for x, (values, version) in zip(given, before, strict=True):
        assert torch.equal(x, values)
        assert x._version == version


PEAK = """
import sys, torch
from sdkernels import {function}
tokens, width, vocab = int(sys.argv[1]), 64, 65536
torch.set_num_threads(1)
hidden, other = (torch.randn(tokens, width) for _ in range(2))
weight = (torch.randn(vocab, width) / 8).requires_grad_()
token_ids, advantages = torch.randint(vocab, (tokens,)), torch.randn(tokens)
hidden.requires_grad_()
{call}.loss.backward()
print([int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")][0] * 1024)
"""
CALLS = {
    "linear_rlsd_loss": "linear_rlsd_loss(hidden, other, weight, token_ids, advantages)",
    "linear_opsd_loss": "linear_opsd_loss(hidden, other, weight)",
}


@pytest.mark.skipif(INTERPRETED or not Path("/proc/self/status").exists(), reason="too slow; needs /proc")
@pytest.mark.parametrize("function", CALLS)
def test_peak_memory_does_not_grow_with_tokens_times_vocabulary(function):
    code = PEAK.format(function=function, call=CALLS[function])
    run = lambda tokens: int(subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, str(tokens)], check=True, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    ).stdout)  # fmt: skip
    least, most = 512, 2048
    assert run(most) - run(least) < (most - least) * 65536 * 4 / 10


@pytest.mark.parametrize("upstream", ["of the loss", "none"])
@pytest.mark.parametrize("function", LOSSES)
def test_the_operator_passes_opcheck(function, upstream, monkeypatch):
    """Schema and fake tensors; its gradients are those of two autograd functions around it."""
    calls, operator = [], torch.ops.sdkernels.linear_sweep
    p, options, _ = leaves(problem(4), {"bias": torch.randn(V)})
    monkeypatch.setattr(torch.ops.sdkernels, "linear_sweep", lambda *x: calls.append(x) or operator(*x))
    with torch.set_grad_enabled(upstream != "none"):
        fused(function, p, **options, chunk_size=3)
    monkeypatch.undo()
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in calls[0]]
    torch.library.opcheck(operator.default, tuple(plain), test_utils=("test_schema", "test_faketensor"))


def test_dense_logits_are_what_they_stand_for():
    p = problem(2, 3, hidden=torch.float64)
    _, logits = dense("grpo_loss", p, bias=p.bias, softcap=3.0, logit_scale=0.5)
    by_hand = 3 * torch.tanh((torch.einsum("bth,vh->btv", p.hidden, p.weight) + p.bias) * 0.5 / 3)
    assert (logits - by_hand).abs().max() < 1e-14
