"""Claims about implementations: each instruction set, threads, what the Triton kernels load and when they recompile."""

import contextlib

import nasty
import oracles
import pytest
import torch
from closeness import assert_gradient, assert_log_probs, assert_same_bits
from conftest import INTERPRETED

from sdkernels import _check, rlsd_loss, rlsd_token_advantage, token_log_prob
from sdkernels.rows import evidence, gradient, implementations, statistics

CSRC = torch.ops.sdkernels_cpu
INSTRUCTION_SETS = CSRC.instruction_sets().split() if implementations.compiled() else []
compiled = pytest.mark.skipif(INTERPRETED or not INSTRUCTION_SETS, reason="tests csrc")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="counts what the interpreted kernels load")
KERNELS = ((statistics, "_statistics_kernel"), (gradient, "_gradient_kernel"), (evidence, "_evidence_kernel"))


def csrc(logits, token_ids, upstream, instruction_set, mask=None, temperature=1.0, temperatures=None):
    """log_prob, entropy, max, log_sum, gradient of one instruction set."""
    dtypes = (torch.float64, torch.float32, torch.float32, torch.float32)
    results = [torch.full(token_ids.shape, torch.nan, dtype=dtype) for dtype in dtypes]
    shared = (logits, token_ids, mask, temperature, temperatures, *results)
    CSRC.row_statistics(*shared, instruction_set)
    grad = torch.full_like(logits, torch.nan)
    CSRC.row_gradient(*shared, *upstream, grad, instruction_set)
    return *results, grad


@compiled
@pytest.mark.parametrize("dtype", nasty.DTYPES[:3])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set_equals_the_formula(instruction_set, dtype):
    for kind in nasty.ROWS:
        logits, token_ids = nasty.rows(kind, 4, 50257, dtype), nasty.ids(4, 50257)
        upstream = (torch.tensor([1.0, -2.0, 0.0, 3.0]), torch.tensor([0.0, 1.0, -1.0, 0.5]))
        mask = torch.tensor([True, True, True, False])
        temperatures = torch.tensor([1.5, 4.0], dtype=torch.float64)
        log_prob, entropy, _, _, grad = csrc(logits, token_ids, upstream, instruction_set, mask, 1.0, temperatures)
        each = temperatures.repeat_interleave(2)
        truth = oracles.token_log_prob(logits, token_ids, each, mask)
        assert_log_probs(log_prob.float(), truth.log_prob, f"{kind} log_prob")
        assert_log_probs(entropy, truth.entropy, f"{kind} entropy")
        assert_gradient(grad, oracles.token_log_prob_gradient(logits, token_ids, *upstream, each, mask), dtype, kind)


@compiled
@pytest.mark.parametrize("dtype", nasty.DTYPES[:3])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set_rounds_a_gradient_to_nearest(instruction_set, dtype):
    """Half precision results are the rounded float32 ones: one rounding, at the end."""
    logits, token_ids = nasty.rows("gaussian", 3, 999, dtype), nasty.ids(3, 999)
    upstream = (torch.tensor([1.0, -2.0, 1e-4]), None)
    *_, grad = csrc(logits, token_ids, upstream, instruction_set)
    *_, wide = csrc(logits.float(), token_ids, upstream, instruction_set)
    assert_same_bits(grad, wide.to(dtype))


@compiled
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("vocab", [1, 3, 4, 15, 16, 17, 63, 64, 65, 4095, 4096, 4097, 32767, 32768, 32769])
def test_every_instruction_set_at_the_edges_of_its_steps(vocab, instruction_set):
    logits, token_ids = nasty.rows("gaussian", 3, vocab), nasty.ids(3, vocab)
    upstream = (torch.ones(3), torch.ones(3))
    log_prob, entropy, _, _, grad = csrc(logits, token_ids, upstream, instruction_set)
    truth = oracles.token_log_prob(logits, token_ids)
    assert_log_probs(log_prob.float(), truth.log_prob)
    assert_log_probs(entropy, truth.entropy, "entropy")
    assert_gradient(grad, oracles.token_log_prob_gradient(logits, token_ids, *upstream), torch.float32)


@compiled
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match="this processor has no avx1024"):
        csrc(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), (None, None), "avx1024")


@compiled
@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_threads_and_batch_change_no_bit(dtype):
    logits, token_ids = nasty.rows("gumbel", 9, 151936, dtype), nasty.ids(9, 151936)
    upstream, before, results = torch.randn(9), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for rows in (slice(0, 9), slice(2, 3), slice(2, 5)):
                leaf = logits[rows].requires_grad_()
                output = token_log_prob(leaf, token_ids[rows])
                (grad,) = torch.autograd.grad(output, leaf, [upstream[rows].to(output[0])] * 2)
                results.append([x[2 if rows.start == 0 else 0].detach() for x in (*output, grad)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for each, expected in zip(result, results[0], strict=True):
            assert_same_bits(each, expected)


@pytest.mark.parametrize("dtype", nasty.DTYPES)
def test_an_id_outside_the_vocabulary_is_nan_and_reads_nothing_outside_its_row(dtype, device, monkeypatch):
    """What a GPU does without SDKERNELS_VALIDATE=1; ids this far off would crash if they were read."""
    monkeypatch.setattr(_check, "values_are_checked", lambda tensor: False)
    logits, vocab = nasty.rows("gaussian", 6, 111, dtype, device), 111
    token_ids = torch.tensor([5, -1, vocab, 2**40, -(2**40), 7], device=device)
    bad = torch.tensor([False, True, True, True, True, False], device=device)
    leaf = logits.clone().requires_grad_()
    output = token_log_prob(leaf, token_ids)
    (output.log_prob.sum() + output.entropy.sum()).backward()
    alone = logits[~bad].requires_grad_()
    good = token_log_prob(alone, token_ids[~bad])
    (good.log_prob.sum() + good.entropy.sum()).backward()
    for each, expected in zip((*output, leaf.grad), (*good, alone.grad), strict=True):
        assert each[bad].isnan().all()
        assert_same_bits(each[~bad], expected)
    weighed = rlsd_token_advantage(logits, logits, token_ids, torch.ones(6, device=device))
    for each in weighed:
        assert each[bad].isnan().all()
        assert not each[~bad].isnan().any()


@contextlib.contextmanager
def counting_loads(monkeypatch):
    """Counts, by name, how many elements of a tensor's memory interpreted kernels load: yields count(tensor)."""
    from triton.runtime.interpreter import interpreter_builder

    addresses, load = [], interpreter_builder.create_masked_load

    def create_masked_load(ptrs, mask, *arguments):
        addresses.append(torch.from_numpy(ptrs.data[mask.data].astype("int64")))
        return load(ptrs, mask, *arguments)

    def count(tensor):
        everything = torch.cat(addresses)
        first = tensor.data_ptr()
        last = (
            first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) * tensor.element_size()
        )
        return int(((everything >= first) & (everything <= last)).sum())

    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "create_masked_load", create_masked_load)
        yield count


@interpreted
@pytest.mark.parametrize("vocab", [111, 8192, 50257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_evidence_kernel_loads_each_kept_logit_once_and_masked_rows_never(dtype, vocab, monkeypatch):
    student, teacher = (nasty.rows("gaussian", 4, vocab, dtype) for _ in range(2))
    token_ids, mask, advantages = nasty.ids(4, vocab), torch.tensor([1, 0, 1, 1]), torch.ones(4)
    token_ids[3] = -100
    with counting_loads(monkeypatch) as count:
        rlsd_token_advantage(student, teacher, token_ids, advantages, mask=mask)
    for logits in (student, teacher):
        assert [count(row) for row in logits] == [vocab + 1, 0, vocab + 1, 0]  # one more: the label
    with counting_loads(monkeypatch) as count:
        rlsd_token_advantage(student, torch.full((4,), -1.0), token_ids, advantages, mask=mask)
    assert [count(row) for row in student] == [vocab + 1, 0, vocab + 1, 0]
    assert count(teacher) == 0


@interpreted
def test_statistics_and_gradient_load_each_kept_logit_once_and_masked_rows_never(monkeypatch):
    vocab = 50257
    logits, token_ids = nasty.rows("gaussian", 4, vocab), nasty.ids(4, vocab)
    mask, upstream = torch.tensor([True, False, True, True]), torch.tensor([1.0, 1.0, 0.0, 1.0])
    with counting_loads(monkeypatch) as count:
        found = torch.ops.sdkernels.row_statistics(logits, token_ids, mask, 1.0, None, False)
    assert [count(row) for row in logits] == [vocab + 1, 0, vocab + 1, vocab + 1]
    with counting_loads(monkeypatch) as count:
        torch.ops.sdkernels.row_gradient(logits, token_ids, mask, 1.0, None, *found, upstream, None)
    assert [count(row) for row in logits] == [vocab, 0, 0, vocab]  # nor is a row whose gradient is 0
    assert count(upstream[1]) == 0
    assert count(upstream[0]) > 0


@interpreted
def test_ids_outside_the_vocabulary_load_no_label(monkeypatch):
    monkeypatch.setattr(_check, "values_are_checked", lambda tensor: False)
    around = torch.zeros(5, 111)
    logits = around[1:4]
    with counting_loads(monkeypatch) as count:
        rlsd_token_advantage(logits, logits.clone(), torch.tensor([111, -1, 222]), torch.ones(3))
    assert [count(row) for row in around] == [0, 111, 111, 111, 0]


class Recorder:
    """Stands in for a Triton kernel: takes its launches and works out the key that Triton would look up."""

    def __init__(self, kernel, keys):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        self.bind = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
        )
        self.keys = keys

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            _, specialization, others = self.bind(*arguments, **options)
            self.keys.add(f"{specialization} {others}")

        return launch


def keys_of(run, cases, kernels=KERNELS):
    """The compilation keys of each kernel over all cases."""
    keys = {name: set() for _, name in kernels}
    with pytest.MonkeyPatch.context() as patch:
        for module, name in kernels:
            patch.setattr(module, name, Recorder(getattr(module, name), keys[name]))
            patch.setattr(module, "runs_triton", lambda rows: True)
        for case in cases:
            run(*case)
    return keys


def run_everything(batch, length, temperature, vocab, *, ids_view=lambda x: x, inplace=False):
    shape = (batch, length)
    logits = torch.randn(*shape, vocab).requires_grad_()
    token_ids, mask = ids_view(torch.zeros(shape, dtype=torch.int64)), ids_view(torch.ones(shape, dtype=torch.bool))
    advantages = torch.ones(batch)
    options = dict(mask=mask, temperature=temperature, lam=temperature / 2, clip_range=temperature / 4)
    rlsd_loss(logits, logits.detach().clone(), token_ids, advantages, inplace=inplace, **options).loss.backward()
    rlsd_token_advantage(logits, logits.detach().clone(), token_ids, advantages, **options)


not_interpreted = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")


@not_interpreted
@pytest.mark.parametrize("vocab", [48, 37])
def test_another_length_batch_or_temperature_does_not_recompile(vocab):
    pytest.importorskip("triton")
    cases = [(b, t, temperature, vocab) for b, t in ((1, 1), (1, 7), (2, 16), (2, 17), (3, 64), (1, 4096), (16, 1))
             for temperature in (1.0, 1, 0.7)]  # fmt: skip
    for name, found in keys_of(run_everything, cases).items():
        assert len(found) == 1, f"{name} is compiled {len(found)} times:\n" + "\n".join(sorted(found))


@not_interpreted
def test_shifted_token_ids_do_not_recompile():
    """input_ids[:, 1:] of one sequence needs no copy and starts at an odd address; of two it is copied."""
    pytest.importorskip("triton")

    def run(batch):
        run_everything(batch, 8, 1.0, 48, ids_view=lambda x: torch.cat([x[:, :1], x], 1)[:, 1:])

    for name, found in keys_of(run, [(1,), (2,)]).items():
        assert len(found) == 1, f"{name} is compiled {len(found)} times:\n" + "\n".join(sorted(found))
