"""Responses to prompts, sampled and verified."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainers.config import TrainerConfig
from trainers.data import Example, seed_of
from trainers.generation import Generator, Response, Sampling
from trainers.processes import padded_share, summed
from trainers.prompts import Encoder, Prompt
from trainers.verifiers import Verdict, VerifierPool


@dataclass
class Rollout:
    """A sampled response and what is known about it."""

    example: Example
    prompt: Prompt
    response: Response
    text: str
    verdict: Verdict
    advantage: float = 0.0
    teacher_prompt: Prompt | None = None  # None: there is no privileged information for this one
    old_log_prob: Tensor | None = None  # (tokens,), None: that of the weights which take the step

    def length(self) -> int:
        """Of the response, in tokens."""
        return len(self.response.token_ids)

    def recorded(self) -> dict[str, Any]:
        """What is kept of it in files."""
        return {
            "source": self.example.source,
            "prompt": self.example.prompt,
            "response": self.text,
            "token_ids": self.response.token_ids,
            "finished": self.response.finished,
            "reference": self.example.reference,
            "reward": self.verdict.reward,
            "advantage": self.advantage,
            "failure": self.verdict.failure,
        }


class Environment:
    """Samples from a policy and verifies what it says. A context manager: verifiers are processes."""

    def __init__(self, config: TrainerConfig, encoder: Encoder) -> None:
        self.encoder = encoder
        self.generator = Generator(config, encoder.tokenizer)
        self.verify = VerifierPool(config.verifier_workers, config.verifier_timeout)
        self.finished_only = config.finished_only

    def __enter__(self) -> "Environment":
        self.verify.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.verify.__exit__(*exception)

    def rollouts(
        self,
        policy: nn.Module,
        examples: Sequence[Example],
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        verified: bool = True,
    ) -> list[Rollout]:
        """One response per example and seed; reward 0 for all without verification.

        Collective, with as many examples on every process.
        """
        prompts = [self.encoder(example) for example in examples]
        responses = self.generator(policy, prompts, seeds, sampling)
        texts = self.encoder.decode([response.token_ids for response in responses])
        verdicts = [Verdict(0.0)] * len(texts)
        if verified:
            verdicts = self.verify([e.verifier for e in examples], texts, [e.reference for e in examples])
        if self.finished_only:
            cut = Verdict(0.0, "the response is too long")
            verdicts = [v if r.finished else cut for v, r in zip(verdicts, responses, strict=True)]
        return [Rollout(*columns) for columns in zip(examples, prompts, responses, texts, verdicts, strict=True)]

    def evaluate(
        self, policy: nn.Module, examples: Sequence[Example], sampling: Sampling, seed: int
    ) -> dict[str, float]:
        """Mean reward of one response to each example, with the same random numbers every time, and failures."""
        local, weights = padded_share(examples)
        seeds = [seed_of(seed, "evaluation", example.source) for example in local]
        rollouts = self.rollouts(policy, local, seeds, sampling)
        verdicts = [rollout.verdict for rollout in rollouts]
        rewards = sum(w * verdict.reward for w, verdict in zip(weights, verdicts, strict=True))
        failures = sum(w for w, verdict in zip(weights, verdicts, strict=True) if verdict.failure)
        rewards, failures, count = summed([rewards, failures, sum(weights)])
        return {"eval/reward": rewards / count, "eval/verifier_failures": failures / count}


def summary(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """What the rollouts were like: means over the responses of all processes."""
    rollouts = [rollout for group in groups for rollout in group]
    mixed = [len({rollout.verdict.reward for rollout in group}) > 1 for group in groups for _ in group]
    sums = {
        "reward": sum(rollout.verdict.reward for rollout in rollouts),
        "response_length": sum(map(Rollout.length, rollouts)),
        "finished": sum(rollout.response.finished for rollout in rollouts),
        "verifier_failures": sum(bool(rollout.verdict.failure) for rollout in rollouts),
        "mixed_groups": sum(mixed),
    }
    count, *values = summed([len(rollouts), *sums.values()])
    return {name: value / count for name, value in zip(sums, values, strict=True)}
