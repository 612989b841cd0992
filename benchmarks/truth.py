"""RLSD's formulas over PyTorch log-probs, what they give in float64, and how far from it a result is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import Inputs, exact_statistics, row_chunks

CLIP_RANGE = 0.2  # of the evidence weight, as in the paper
EPSILON = 0.2  # of the policy ratio
LOG_PROB_TOLERANCE = 2e-5  # absolute
WEIGHT_TOLERANCE = 1e-4  # relative
GRADIENT_TOLERANCE = 1e-6  # times the row's coefficient; the dtype's rounding comes on top
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 1e-3}
SMALLEST = {torch.float16: 6e-8}  # absolute, per entry
FAR_OFF = 1e30  # the error of NaN
LINEAR_TOLERANCE = 1e-3  # nats, and so relative to a coefficient, where an implementation forms the logits itself


class TokenLoss(NamedTuple):
    """Per-token results of the official formula, each (N,)."""

    loss: Tensor
    weight: Tensor
    advantage: Tensor


def rlsd_formula(
    student_log_prob: Tensor,  # (N,)
    teacher_log_prob: Tensor,  # (N,)
    advantages: Tensor,  # (N,)
    old_log_prob: Tensor,  # (N,)
) -> TokenLoss:
    """RLSD as its authors write it (Eq. 13-15 at lam = 1), and PPO's clipped surrogate on the result."""
    weight, advantage = evidence_formula(student_log_prob, teacher_log_prob, advantages)
    ratio = torch.exp(student_log_prob - old_log_prob)
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    return TokenLoss(-torch.minimum(ratio * advantage, clipped * advantage), weight, advantage)


def evidence_formula(student_log_prob: Tensor, teacher_log_prob: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """The evidence weight exp(sign(A) Delta) and the advantage A clip(weight), constants for autograd."""
    weight = torch.exp(advantages.sign() * (teacher_log_prob - student_log_prob).detach())
    return weight, advantages * weight.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)


def worst_of(multiples: Tensor) -> float:
    """The largest of some errors; infinite and NaN ones are 1e30."""
    return float(multiples.nan_to_num(nan=FAR_OFF, posinf=FAR_OFF).max())


def gradient_multiples(gradient: Tensor, expected: Tensor, coefficient: Tensor) -> Tensor:
    """||g - g*|| of each row over its bound; `expected` is overwritten."""
    smallest = SMALLEST.get(gradient.dtype, 0.0) * gradient.shape[-1] ** 0.5
    rounding = ROUNDING[gradient.dtype] * expected.norm(dim=-1) + smallest
    bound = GRADIENT_TOLERANCE * coefficient.abs() + rounding
    return expected.sub_(gradient).norm(dim=-1) / (bound + 1e-30)


class Truth:
    """The float64 results on some inputs: per-token values are kept, rows are formed again chunk by chunk."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        student, self.entropy = exact_statistics(inputs.student, inputs.token_ids)
        student.requires_grad_()
        token_loss = rlsd_formula(
            student, inputs.teacher_log_prob, inputs.advantages.double(), inputs.old_log_prob.double()
        )
        loss = token_loss.loss.mean()
        (self.coefficient,) = torch.autograd.grad(loss, student)  # of (onehot - p) in each row's gradient
        self.log_prob, self.loss = student.detach(), loss.detach()
        self.token_loss = token_loss.loss.detach()
        self.weight, self.advantage = token_loss.weight.detach(), token_loss.advantage.detach()

    def row_gradient(self, rows: slice) -> Tensor:
        """coefficient (onehot - p) of some rows."""
        coefficient = self.coefficient[rows, None]
        gradient = torch.softmax(self.inputs.student[rows].double(), -1).mul_(-coefficient)
        return gradient.scatter_add_(-1, self.inputs.token_ids[rows, None], coefficient)

    def errors(self, result: dict[str, Tensor], setting: None = None) -> dict[str, float]:
        """The worst error of each of an implementation's results, as a multiple of its tolerance, at most 1e30.

        Known names: log_prob, entropy, weight, advantage, loss, gradient (of the logits) and hidden_gradient.
        """
        measures = {
            "log_prob": lambda x: (x - self.log_prob).abs() / LOG_PROB_TOLERANCE,
            "entropy": lambda x: (x - self.entropy).abs() / LOG_PROB_TOLERANCE,
            "weight": lambda x: (x - self.weight).abs() / (WEIGHT_TOLERANCE * self.weight),
            "advantage": lambda x: (x - self.advantage).abs() / (WEIGHT_TOLERANCE * self.advantage.abs() + 1e-30),
            "loss": lambda x: (x - self.loss).abs() / (WEIGHT_TOLERANCE * self.token_loss.abs().mean()),
            "gradient": self._gradient_errors,
            "hidden_gradient": self._hidden_gradient_errors,
        }
        worst = {}
        for name, value in result.items():
            worst[name] = worst_of(measures[name](value.detach() if name == "gradient" else value.detach().double()))
        return worst

    def _gradient_errors(self, gradient: Tensor) -> Tensor:
        """||g - g*|| of each row over its bound."""
        multiples = torch.empty_like(self.coefficient)
        for rows in row_chunks(gradient):
            multiples[rows] = gradient_multiples(gradient[rows], self.row_gradient(rows), self.coefficient[rows])
        return multiples

    def _hidden_gradient_errors(self, gradient: Tensor) -> Tensor:
        """The same for (N, H) gradients of hidden states: rows times the LM head, at most its spectral norm larger."""
        lm_head = self.inputs.lm_head.double()
        expected = self.row_gradient(slice(None)) @ lm_head
        bound = LINEAR_TOLERANCE * self.coefficient.abs() * torch.linalg.matrix_norm(lm_head, 2)
        return (gradient - expected).norm(dim=-1) / (bound + 1e-30)
