"""pass@k, means with their errors, and counts of right responses in the order of the problems."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import no_kernel

from trainers import evaluation, processes
from trainers.data import Example, seed_of
from trainers.evaluation import correct_counts, mean_and_error, paired_difference, pass_at_k
from trainers.generation import Sampling
from trainers.verifiers import Verdict

pytestmark = [no_kernel, pytest.mark.usefixtures("one_thread")]


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([i < correct for i in range(samples)], k))
        assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), rel=1e-15)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert 0 < pass_at_k(2000, 1, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize(("samples", "k"), [(4, 5), (4, 0), (4, -1), (0, 1)])
def test_pass_at_k_needs_k_samples(samples, k):
    with pytest.raises(ValueError, match=f"pass@{k} needs at least {k} samples, got {samples}"):
        pass_at_k(samples, 0, k)


@pytest.mark.parametrize("count", [2, 3, 100])
def test_rate_is_the_mean_and_its_standard_error(count):
    values = np.random.default_rng(count).random(count)
    assert mean_and_error(values.tolist()) == pytest.approx((values.mean(), values.std(ddof=1) / count**0.5), rel=1e-12)


@pytest.mark.parametrize("values", [[0.25], [1.0, 1.0, 1.0]])
def test_equal_values_have_no_error(values):
    assert mean_and_error(values) == (values[0], 0.0)


def test_a_paired_difference_is_that_of_the_problems():
    ours, theirs = np.random.default_rng(0).random((2, 40))
    found = paired_difference(ours.tolist(), (ours - 0.25).tolist())
    assert found == pytest.approx((0.25, 0.0), abs=1e-15)
    found, (gain, difference) = paired_difference(ours.tolist(), theirs.tolist()), (ours - theirs, ours.mean())
    assert found == pytest.approx((difference - theirs.mean(), gain.std(ddof=1) / 40**0.5), rel=1e-12)
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0], [1.0])


class Environment:
    """A response is right where its seed says so."""

    def __init__(self):
        self.asked = []

    def rollouts(self, policy, examples, seeds, sampling):
        self.asked += [(example.source, seed) for example, seed in zip(examples, seeds, strict=True)]
        assert (policy, sampling) == ("policy", Sampling(0.7))
        return [SimpleNamespace(verdict=Verdict(float(seed % 3 == 0), failure="!" * (seed % 5 == 1))) for seed in seeds]


def examples(count):
    return [Example("x", "1", (), "exact", (), f"held-out.jsonl:{i}") for i in range(1, count + 1)]


def counts_of(held_out, samples=6, seed=3):
    environment = Environment()
    counts, failed = correct_counts(environment, "policy", held_out, Sampling(0.7), samples, seed)
    return counts, failed, environment.asked


def test_counts_come_in_the_order_of_the_examples():
    counts, failed, asked = counts_of(examples(7))
    seeds = [[seed_of(3, f"held-out.jsonl:{i}", sample) for sample in range(6)] for i in range(1, 8)]
    assert counts == [sum(seed % 3 == 0 for seed in row) for row in seeds]
    assert len(set(counts)) > 1
    assert failed == sum(seed % 5 == 1 for row in seeds for seed in row) > 0
    assert len(set(asked)) == 7 * 6


def test_an_examples_count_depends_on_itself_and_the_seed():
    (counts, *_), (others, *_), (seeded, *_) = (
        counts_of(examples(7)), counts_of(examples(7)[::-1][:4]), counts_of(examples(7), seed=4),
    )  # fmt: skip
    assert others == counts[::-1][:4]
    assert seeded != counts


@pytest.mark.parametrize("count", [0, 1, 2, 6, 7])
def test_counts_of_several_processes_are_those_of_one(monkeypatch, count):
    *expected, _ = counts_of(examples(count))
    parts, sizes = [], set()
    monkeypatch.setattr(processes, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(evaluation, "gathered", lambda counts: parts.extend(counts) or counts)
        sizes.add(len(counts_of(examples(count))[2]))
    assert len(sizes) == 1  # sampling is collective
    monkeypatch.setattr(evaluation, "gathered", lambda counts: parts)
    assert [*counts_of(examples(count))[:2]] == expected
