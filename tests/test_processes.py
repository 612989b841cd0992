"""Threads, forks, memory that runs out and memory that is kept: calls give the same bits or an exception.

After a fork libgomp waits for threads that the child does not have: where the parent ran anything in several threads,
PyTorch's own operators hang in the child, and so do these. A child of one thread is safe, as DataLoader's workers are
(torch.set_num_threads(1)); so is that of a parent which had one; so are spawn and forkserver.
"""

import contextlib
import copy
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import fuzz_cases
import pytest
import torch
from closeness import assert_same_bits
from conftest import INTERPRETED
from leaks import resident
from torch.utils.data import DataLoader, Dataset

import sdkernels

pytestmark = pytest.mark.skipif(INTERPRETED or sys.platform != "linux", reason="about csrc; needs fork and /proc")
PATIENCE = 120  # seconds; a busy machine needs a few
THREADS = 6


def some_cases(inplace=False):
    """Two calls of each function on logits, with work for several threads."""
    fixed = {"V": 40009, "shape": (2, 3), "pulls": "everything", "inplace": inplace}

    def drawn(name, seed):
        chosen = fuzz_cases.of_random(random.Random(seed))
        return fuzz_cases.on_logits(name, lambda key, values: fixed[key] if key in fixed else chosen(key, values))

    return [drawn(name, seed) for name in fuzz_cases.FUNCTIONS for seed in (1, 2)]


def run(case):
    """All that a call gives, by name."""
    found, gradient, _ = fuzz_cases.run(case)
    return found if gradient is None else {**found, "gradient": gradient}


def assert_same(found, expected):
    for results, wanted in zip(found, expected, strict=True):
        for key, value in wanted.items():
            assert_same_bits(results[key], value, key)


def in_a_process(program, *arguments, method="spawn"):
    """Run it in a process of its own, which must end well and in time."""
    process = multiprocessing.get_context(method).Process(target=program, args=arguments)
    process.start()
    process.join(PATIENCE)
    hangs = process.is_alive()
    process.kill()
    process.join()
    assert not hangs, "the process hangs"
    assert process.exitcode == 0, "the process failed: see its output"


def test_threads_at_once_give_the_bits_of_one_after_another():
    in_a_process(threads_at_once)


def threads_at_once():
    torch.set_num_threads(2)
    together, logits = Barrier(THREADS), torch.randn(3, 40009)
    torch.manual_seed(0)

    def first(_):  # loads the library
        together.wait()
        return sdkernels.token_log_prob(logits, torch.arange(3))._asdict()

    shared, own = some_cases(), None

    def others(seed):
        cases = list(enumerate([*shared, *copy.deepcopy(own)]))
        random.Random(seed).shuffle(cases)
        together.wait()
        return dict((i, run(case)) for i, case in cases)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(first, range(THREADS)))
        assert_same(found[1:], [found[0]] * (THREADS - 1))
        own = some_cases(inplace=True)
        expected = [run(case) for case in [*shared, *copy.deepcopy(own)]]
        for results in pool.map(others, range(THREADS)):
            assert_same([results[i] for i in range(len(expected))], expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_children_give_the_bits_of_their_parent(threads):
    in_a_process(forks, threads)


class Calls(Dataset):
    """What a DataLoader's worker makes of cases."""

    def __init__(self, cases):
        self.cases = cases

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, index):
        return run(self.cases[index])


def forks(threads):
    torch.set_num_threads(threads)
    cases = some_cases(inplace=True)
    before = copy.deepcopy(cases)
    expected = [run(case) for case in copy.deepcopy(cases)]
    in_a_fork(lambda: assert_same([run(case) for case in cases], expected), threads)
    workers = DataLoader(Calls(cases), None, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE)
    assert_same(workers, expected)
    for case, same in zip(cases, before, strict=True):  # a child's gradients are written over its own copy
        assert_same_bits(case.arguments[0], same.arguments[0])
    assert_same([run(case) for case in cases], expected)


def in_a_fork(program, threads):
    child = os.fork()
    if child == 0:
        try:
            if threads > 1:
                torch.set_num_threads(1)
            program()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    begun = time.monotonic()
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > begun + PATIENCE / 2:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    assert ended[1] == 0, f"the child ended with {ended[1]}"


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_processes_give_the_same_bits(method):
    cases = some_cases()
    in_a_process(repeats, cases, [run(case) for case in cases], method=method)


def repeats(cases, expected):
    assert_same([run(case) for case in cases], expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_without_memory_a_call_raises_and_changes_nothing(threads, monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed is not there for the next call
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "0")
    in_a_process(runs_out_of_memory, threads)


def large_calls(student, other):
    """Functions of the student's logits, whose sums, lists or gradient need megabytes."""
    token_ids, ones = torch.arange(len(student)), torch.ones(len(student))
    head = torch.randn(student.shape[-1], 2)
    listed = sdkernels.truncated_support(other, 0.8, top_k=50, max_size=50)
    return {
        "token_log_prob": lambda z: sdkernels.token_log_prob(z, token_ids).log_prob,
        "nucleus": lambda z: sdkernels.token_log_prob(z, token_ids, top_p=0.999).entropy,
        "truncated_log_softmax": lambda z: sdkernels.truncated_log_softmax(z, top_k=5).amax(-1),
        "rlsd_loss": lambda z: sdkernels.rlsd_loss(z, other, token_ids, ones).loss,
        "ssd_loss": lambda z: sdkernels.ssd_loss(z, listed, 0.8).loss,
        "ssd_loss in place": lambda z: sdkernels.ssd_loss(z, other, 0.8, top_p=0.999, inplace=True).loss,
        "opsd_loss": lambda z: sdkernels.opsd_loss(z, other, divergence="jsd").loss,
        "reduced opsd_loss": lambda z: sdkernels.opsd_loss(z, other, top_k=30_000).loss,
        "linear_grpo_loss": lambda z: sdkernels.linear_grpo_loss(z[:, :2], head, token_ids, ones).loss,
    }


def forward_and_backward(function, logits):
    leaf = logits.detach().requires_grad_()
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return {"value": value.detach(), "gradient": gradient}


def runs_out_of_memory(threads):
    torch.set_num_threads(threads)
    student, other = torch.randn(2, 4, 300_000)
    before, enough = student.clone(), 64
    for name, function in large_calls(student, other).items():
        expected = forward_and_backward(function, student.clone())
        errors = {}
        for megabytes in (0, 1, 2, 3, 4, 5, 6, 8, 12, 16, enough):
            own = student.clone() if "in place" in name else student
            try:
                with no_more_memory_than(megabytes):
                    found = forward_and_backward(function, own)
                assert_same([found], [expected])
            except (RuntimeError, MemoryError) as error:
                errors[megabytes] = str(error)
                assert_same_bits(own, before, f"logits of {name}")
            found = None
        assert all("can't allocate memory" in said or "bad_alloc" in said for said in errors.values()), errors
        assert 0 in errors, f"{name} never ran out of memory"
        assert enough not in errors, f"{name} always ran out of memory"
        assert_same([forward_and_backward(function, student.clone())], [expected])
    assert_same_bits(student, before)


@contextlib.contextmanager
def no_more_memory_than(megabytes):
    """What the process has, and so much."""
    pages, (soft, hard) = int(Path("/proc/self/statm").read_text().split()[0]), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (megabytes << 20), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_nothing_is_kept_of_a_chunk_whose_loss_has_no_gradient():
    """As of an entropy bonus, whose backward forms the chunks' logits again, and a graph of the loss besides."""
    hidden, head, token_ids = torch.randn(64, 2, requires_grad=True), torch.randn(20011, 2), torch.arange(64)

    def step():
        output = sdkernels.linear_grpo_loss(hidden, head, token_ids, torch.ones(64))
        (output.loss + output.entropy.mean()).backward()

    step()
    before = resident()
    for _ in range(10):
        step()
    assert resident() - before < 2 * 64 * 20011 * 4, "of ten chunks, more than two are still there"
