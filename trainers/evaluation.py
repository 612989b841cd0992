"""How often a policy solves each of a set of problems: pass@k from several samples each, and by difficulty."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from trainers.data import Example, seed_of
from trainers.generation import Sampling
from trainers.processes import gathered, padded_share
from trainers.rollouts import Environment


class Rate(NamedTuple):
    """A mean over problems and its standard error."""

    mean: float
    error: float


def correct_counts(
    environment: Environment,
    policy: nn.Module,
    examples: Sequence[Example],
    sampling: Sampling,
    samples: int,
    seed: int,
) -> tuple[list[int], int]:
    """How many of `samples` responses to each example were rewarded, in the examples' order; how many verifiers failed.

    On every process.
    """
    local, weights = padded_share(range(len(examples)))
    asked = [place for place in local for _ in range(samples)]
    seeds = [seed_of(seed, examples[place].source, i % samples) for i, place in enumerate(asked)]
    rollouts = environment.rollouts(policy, [examples[place] for place in asked], seeds, sampling)
    verdicts = [rollout.verdict for rollout in rollouts]
    counts = []
    for i, place in enumerate(local):
        own = verdicts[i * samples : (i + 1) * samples]
        if weights[i]:
            counts.append((place, sum(v.reward > 0 for v in own), sum(bool(v.failure) for v in own)))
    counts = sorted(gathered(counts))
    return [right for _, right, _ in counts], sum(failed for _, _, failed in counts)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right: 1 - C(n - c, k) / C(n, k)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_and_error(values: Sequence[float]) -> Rate:
    """Mean and standard error over problems."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return Rate(mean, math.sqrt(variance / len(values)))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Rate:
    """Mean and standard error of the difference on the same problems."""
    return mean_and_error([a - b for a, b in zip(ours, theirs, strict=True)])
