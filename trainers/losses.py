"""Calls a loss of sdkernels on hidden states in one of three ways: fused, on logits in memory, or in plain PyTorch."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

import sdkernels
from sdkernels import Support
from sdkernels.reference import grpo, opsd, rlsd, ssd, token_log_prob, truncation

Head = Literal["fused", "logits", "reference"]
REFERENCE = {
    "token_log_prob": token_log_prob.token_log_prob,
    "grpo_loss": grpo.grpo_loss,
    "rlsd_loss": rlsd.rlsd_loss,
    "ssd_loss": ssd.ssd_loss,
    "opsd_loss": opsd.opsd_loss,
    "truncated_support": truncation.truncated_support,
}


class Side(NamedTuple):
    """Hidden states (N, H) and the LM head that makes logits of them; a weight of None means the student's head."""

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def logits(self, like: "Side | None" = None) -> Tensor:
        """(N, V) float32 logits, by the head of `like` where this side has none of its own."""
        head = self if self.weight is not None else like
        weight = head.weight.full_tensor() if hasattr(head.weight, "full_tensor") else head.weight
        bias = None if head.bias is None else head.bias.float()
        with torch.autocast(self.hidden.device.type, enabled=False):
            logits = torch.nn.functional.linear(self.hidden.float(), weight.float(), bias) * head.logit_scale
        return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def call(
    head: Head, function: str, student: Side, other: Side | Tensor | Support | None, *args: Any, **options: Any
) -> Any:
    """`sdkernels.function(student's logits, other, *args, **options)`.

    Args:
        head: "fused" calls the `linear_*` function, which never holds all logits; "logits" makes them; "reference"
            makes them and calls the plain PyTorch function.
        function: As "rlsd_loss".
        student: Hidden states that get gradients, and their head.
        other: The teacher or base: a side, log-probs (N,) of the tokens, or a `Support`; None where there is none.
        args: What the function takes after these.
        options: Its options.

    """
    if head == "fused":
        if isinstance(other, Side):
            prefix = "base" if function == "ssd_loss" else "teacher"
            own = {f"{prefix}_lm_head_weight": other.weight, f"{prefix}_bias": other.bias}
            options |= {} if other.weight is None else own
            other = other.hidden
        sides = [student.hidden] if other is None else [student.hidden, other]
        linear = getattr(sdkernels, f"linear_{function}")
        return linear(
            *sides, student.weight, *args, bias=student.bias, softcap=student.softcap,
            logit_scale=student.logit_scale, **options,
        )  # fmt: skip
    if isinstance(other, Side):
        with torch.no_grad():
            other = other.logits(like=student)
    sides = [student.logits()] if other is None else [student.logits(), other]
    return (REFERENCE[function] if head == "reference" else getattr(sdkernels, function))(*sides, *args, **options)
