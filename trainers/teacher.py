"""The teacher: whose weights it has, what it is told, and how much of that can leak."""

import copy
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sdkernels import opsd_decomposition
from trainers.losses import Side
from trainers.policy import inferred_side, unwrapped
from trainers.processes import summed
from trainers.prompts import Batch, Encoder, Privilege, privileged
from trainers.rollouts import Rollout


class Teacher:
    """The network that reads the privileged prompt: the policy itself, or a copy that follows it.

    "live" is the policy's current weights; "frozen" a copy that takes them every `sync_steps` steps (0: never); "ema" a
    copy that moves towards them by `rate` after every step. A copy shares memory with the weights that are not trained.
    """

    def __init__(
        self,
        policy: nn.Module,
        copied: nn.Module | None,  # `wrapped` copy of the model; None for "live"
        kind: Literal["live", "frozen", "ema"],
        sync_steps: int = 0,
        rate: float = 0.05,
    ) -> None:
        self.kind, self.sync_steps, self.rate = kind, sync_steps, rate
        self.student = policy
        self.network = policy if copied is None else copied

    def side(self, batch: Batch) -> Side:
        """The teacher's hidden states for the responses; with the head only where it is not the policy's own."""
        side = inferred_side(self.network, batch)
        return Side(side.hidden, None) if self.network is self.student else side

    def pairs(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, the copy's parameter and the policy's, of each parameter that is trained."""
        if self.network is not self.student:
            copies = dict(unwrapped(self.network).named_parameters())
            for name, parameter in unwrapped(self.student).named_parameters():
                if parameter.requires_grad:
                    yield name, copies[name], parameter

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Follow the policy after the `step`-th step, counted from 1."""
        sync = self.kind == "frozen" and self.sync_steps and step % self.sync_steps == 0
        for _, parameter, current in self.pairs():
            if sync:
                parameter.copy_(current)
            elif self.kind == "ema":
                parameter.lerp_(current, self.rate)


def copy_of(model: nn.Module) -> nn.Module:
    """A copy that gets no gradients, with its own trained weights and the frozen ones shared."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def privileges(kind: Privilege, rollout: Rollout, group: Sequence[Rollout]) -> list[str]:
    """What a teacher of this rollout may be told: any of these."""
    if kind == "answer":
        return [str(rollout.example.reference)]
    if kind == "solution":
        return list(rollout.example.solutions)
    if kind == "feedback":
        return [rollout.verdict.feedback] if rollout.verdict.feedback else []
    best = max(other.verdict.reward for other in group)
    return [other.text for other in group if other is not rollout and other.verdict.reward == best and best > 0]


@torch.no_grad()
def leakage(
    policy: nn.Module,
    teacher: Teacher,
    encoder: Encoder,
    groups: Sequence[Sequence[Rollout]],
    *,
    samples: int,
    max_tokens: int,
    temperature: float,
    template: str | None,
) -> dict[str, float]:
    """RLSD's Theorem 1 on a rollout of each group: of the expected forward KL, the mutual information with r can leak.

    The `samples` r of a prompt are its worked solutions, else the group's other right responses; a prompt with fewer
    than two counts for nothing. Collective, with as many groups on every process: FSDP gathers weights for each r.
    """
    tokens, total, information = 0, 0.0, 0.0
    for group in groups:
        rollout = group[0]
        kind: Privilege = "solution" if len(rollout.example.solutions) > 1 else "rollout"
        texts = sorted(set(privileges(kind, rollout, group)))
        told = [privileged(rollout.example, kind, texts[i * len(texts) // samples], template) for i in range(samples)
                if len(texts) > 1]  # fmt: skip
        response = [rollout.response.token_ids[:max_tokens]]
        student = inferred_side(policy, encoder.batch([rollout.prompt], response))
        prompts = [encoder(example) for example in told or [rollout.example] * samples]
        teachers = [teacher.side(encoder.batch([prompt], response)).logits(like=student) for prompt in prompts]
        if told:
            terms = opsd_decomposition(student.logits(), torch.stack(teachers), temperature=temperature)
            tokens += len(response[0])
            total += float(terms.total.sum())
            information += float(terms.mutual_information.sum())
    tokens, total, information = summed([tokens, total, information])
    return {"leakage/total": total / tokens, "leakage/mutual_information": information / tokens} if tokens else {}
