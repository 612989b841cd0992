"""Losses from hidden states: their inputs, sdkernels, and what a user would run instead. Called, never copied."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import sdkernels
from benchmarks import peers
from benchmarks.cases import PEER_ERROR
from benchmarks.inputs import GROUP_SIZE, group_normalised_advantages, off_policy
from benchmarks.opsd_peers import of_log_softmax
from benchmarks.opsd_truth import Setting
from benchmarks.prepared import Results
from benchmarks.runner import Prepared, Unable
from benchmarks.truth import CLIP_RANGE, EPSILON, rlsd_formula

RLSD, JSD, GRPO = "rlsd_loss", "jsd", "grpo_loss"
OURS, LOGITS, EAGER, TRL = "sdkernels linear", "logits version", "eager PyTorch", "TRL fused head"
JSD_SETTING = Setting("jsd")
DISTINCT = 256  # rows; more tokens repeat them: what they hold decides neither time nor memory
TRL_CHUNK = 32768  # tokens of the vocabulary, its trainers' default
TRL_ROWS = 4096  # tokens of its tiles
LIGER_ROWS = 2048  # its chunks are 1024 tokens to one fewer than this
LIGER_NOTE = "Liger chunked JSD: of 16-bit hidden states it keeps log-probs in 16 bits."
TRL_NOTE = "TRL fused head: of 16-bit hidden states it rounds logits to 16 bits."


@dataclass(frozen=True)
class HeadInputs:
    """Hidden states of student and teacher, the LM head that they share, and what a policy loss needs beside them."""

    student: Tensor  # (N, H)
    teacher: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    token_ids: Tensor  # (N,)
    rewards: Tensor  # (S,) group-normalised, one per sequence; sequences are equally long
    old_log_prob: Tensor  # (N,)

    @property
    def advantages(self) -> Tensor:
        """(N,) the sequence's, at each of its tokens."""
        return self.rewards.repeat_interleave(len(self.student) // len(self.rewards))


def head_inputs(
    tokens: int, vocab: int, hidden: int, dtype: torch.dtype, device: torch.device, distinct: int = DISTINCT
) -> HeadInputs:
    """Hidden states whose logits have the heavy tails of a language model's, of order 10, and a teacher 0.1 away.

    The weights are Gumbel noise. A row follows one of their columns, times a scale that runs from 0.75 to 2 over the
    rows, and Gaussian noise of 1 from all others; every fourth row has one token raised by about 8. That gives the
    softmax of `inputs.synthetic`, a power law. Tokens are sampled from the student.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.empty(vocab, hidden, device=device).exponential_(generator=generator)
    weight = weight.clamp_(min=1e-7).log_().neg_().sub_(0.5772)  # Gumbel's mean
    rows = min(tokens, distinct)
    index = torch.arange(rows, device=device)
    noise = torch.randn(2, rows, hidden, generator=generator, device=device) / (1.2825 * hidden**0.5)  # its deviation
    student = noise[0]
    student[index, index % hidden] += torch.linspace(0.75, 2.0, rows, device=device)
    raised = weight[torch.randint(vocab, (rows,), generator=generator, device=device)]
    student += 8 * raised / raised.square().sum(-1, keepdim=True) * (index % 4 == 0)[:, None]
    teacher = student + 0.1 * noise[1]
    student, teacher, weight = (x.to(dtype) for x in (student, teacher, weight))
    log_p = torch.log_softmax(student.float() @ weight.float().T, -1)
    token_ids = torch.multinomial(log_p.exp(), 1, generator=generator)
    old_log_prob = off_policy(log_p.gather(-1, token_ids)[:, 0], generator)
    every = torch.arange(tokens, device=device) % rows
    rewards = (torch.arange(GROUP_SIZE, device=device) % 3 == 0).float()
    return HeadInputs(
        student=student[every],
        teacher=teacher[every],
        weight=weight,
        token_ids=token_ids[every, 0],
        rewards=group_normalised_advantages(rewards, torch.zeros_like(rewards)),
        old_log_prob=old_log_prob[every],
    )


Loss = Callable[[HeadInputs, Tensor, Tensor], Results]  # of hidden states and weight, which get gradients


class Step(Prepared):
    """A loss, forward and backward to hidden states and weight."""

    def __init__(self, inputs: HeadInputs, loss: Loss) -> None:
        self.inputs, self.loss = inputs, loss

    def reset(self) -> None:
        """Free gradients and results."""
        self.output: Results = {}
        self.hidden, self.weight = (x.detach().requires_grad_() for x in (self.inputs.student, self.inputs.weight))

    def run(self) -> None:
        """Forward and backward."""
        output = self.loss(self.inputs, self.hidden, self.weight)
        output["loss"].backward()
        self.output = {name: value.detach() for name, value in output.items()}

    def result(self) -> Results:
        """What the loss gave, and both gradients."""
        return {**self.output, "hidden_gradient": self.hidden.grad, "weight_gradient": self.weight.grad}


class _Logits(torch.autograd.Function):
    """Float32 logits of 16-bit hidden states, by a GPU's 16-bit matmul; the gradient is rounded for its own."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        grad = grad.to(hidden.dtype)
        return grad @ weight, grad.T @ hidden


def float32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """(N, V), never rounded to 16 bits."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return _Logits.apply(hidden, weight)
    return hidden.float() @ weight.float().T


def teacher_logits(inputs: HeadInputs) -> Tensor:
    """The same of the teacher, without gradient."""
    return float32_logits(inputs.teacher, inputs.weight)


def clip_options() -> dict[str, float]:
    """PPO's clip, as both losses take it."""
    return {"epsilon_low": EPSILON, "epsilon_high": EPSILON}


def ours_rlsd(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """linear_rlsd_loss."""
    output = sdkernels.linear_rlsd_loss(
        hidden, inputs.teacher, weight, inputs.token_ids, inputs.advantages, inputs.old_log_prob,
        clip_range=CLIP_RANGE, **clip_options(),
    )  # fmt: skip
    return {"loss": output.loss, "information_gain": output.information_gain}


def logits_rlsd(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """rlsd_loss, whose gradient takes the logits' place."""
    output = sdkernels.rlsd_loss(
        float32_logits(hidden, weight), teacher_logits(inputs), inputs.token_ids, inputs.advantages,
        inputs.old_log_prob, clip_range=CLIP_RANGE, inplace=True, **clip_options(),
    )  # fmt: skip
    return {"loss": output.loss, "information_gain": output.information_gain}


def eager_rlsd(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """The official formula over PyTorch log-probs."""
    student = float32_logits(hidden, weight)
    with torch.no_grad():
        teacher = peers.selected_log_prob(teacher_logits(inputs), inputs.token_ids)
    loss, log_prob, _ = peers.unfused_loss(student, teacher, inputs.token_ids, inputs.advantages, inputs.old_log_prob)
    return {"loss": loss, "information_gain": teacher - log_prob}


LogProb = Callable[[Tensor, Tensor, Tensor], Tensor]  # of hidden states, weight and token ids: (N,)


def trl_log_prob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """The fused head of TRL's trainers."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, token_ids, 1.0, TRL_CHUNK, None, 1.0, ())[0]


def cce_log_prob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """cut-cross-entropy's."""
    from cut_cross_entropy import linear_cross_entropy

    if not hidden.is_cuda:
        raise Unable("needs a CUDA GPU")
    return -linear_cross_entropy(hidden, weight, token_ids, reduction="none").float()


def rlsd_of(log_prob: LogProb) -> Loss:
    """The student with and the teacher without gradient, and the evidence weights from the log-probs."""

    def loss(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
        with torch.no_grad():
            teacher = log_prob(inputs.teacher, inputs.weight, inputs.token_ids)
        student = log_prob(hidden, weight, inputs.token_ids)
        per_token = rlsd_formula(student, teacher, inputs.advantages, inputs.old_log_prob)
        return {"loss": per_token.loss.mean(), "information_gain": teacher - student}

    return loss


def unable(reason: str) -> Loss:
    """A peer that cannot do the job."""

    def loss(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
        raise Unable(reason)

    return loss


def ours_jsd(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """linear_opsd_loss."""
    return sdkernels.linear_opsd_loss(hidden, inputs.teacher, weight, **JSD_SETTING.options)._asdict()


def logits_jsd(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """opsd_loss."""
    student = float32_logits(hidden, weight)
    return sdkernels.opsd_loss(student, teacher_logits(inputs), **JSD_SETTING.options)._asdict()


def eager_jsd(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """TRL's formula on log_softmax of both."""
    return of_log_softmax(float32_logits(hidden, weight), teacher_logits(inputs), JSD_SETTING, torch.float32)


def trl_jsd(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """ChunkedDivergenceFunction."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        hidden, weight, None, inputs.teacher, inputs.weight, None, JSD_SETTING.beta
    )
    return {"loss": divergence.mean(), "divergence": divergence}


def liger_jsd(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """LigerFusedLinearJSDLoss, without its cross-entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    jsd = LigerFusedLinearJSDLoss(0.0, 1.0, beta=JSD_SETTING.beta, compiled=False)
    return {"loss": jsd(hidden, weight, inputs.teacher, inputs.weight, inputs.token_ids)}


def ours_grpo(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """linear_grpo_loss."""
    output = sdkernels.linear_grpo_loss(
        hidden, weight, inputs.token_ids, inputs.advantages, inputs.old_log_prob, **clip_options()
    )
    return {"loss": output.loss, "log_prob": output.log_prob}


def logits_grpo(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """grpo_loss, whose gradient takes the logits' place."""
    output = sdkernels.grpo_loss(
        float32_logits(hidden, weight), inputs.token_ids, inputs.advantages, inputs.old_log_prob, inplace=True,
        **clip_options(),
    )  # fmt: skip
    return {"loss": output.loss, "log_prob": output.log_prob}


def eager_log_prob(hidden: Tensor, weight: Tensor, token_ids: Tensor) -> Tensor:
    """log_softmax and gather."""
    return peers.selected_log_prob(float32_logits(hidden, weight), token_ids)


def grpo_formula(log_prob: Tensor, advantages: Tensor, old_log_prob: Tensor) -> Tensor:
    """(N,) PPO's clipped surrogate."""
    ratio = torch.exp(log_prob - old_log_prob)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - EPSILON, 1 + EPSILON) * advantages)


def grpo_of(log_prob: LogProb) -> Loss:
    """The surrogate from log-probs."""

    def loss(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
        found = log_prob(hidden, weight, inputs.token_ids)
        return {"loss": grpo_formula(found, inputs.advantages, inputs.old_log_prob).mean(), "log_prob": found}

    return loss


def liger_grpo(inputs: HeadInputs, hidden: Tensor, weight: Tensor) -> Results:
    """LigerFusedLinearGRPOLoss, of sequences."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    grpo = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, **clip_options())
    batch = (len(inputs.rewards), -1)
    token_ids, old_log_prob = (x.unflatten(0, batch) for x in (inputs.token_ids, inputs.old_log_prob))
    mask = torch.ones_like(token_ids)
    loss, _ = grpo(
        hidden.unflatten(0, batch), weight, token_ids, mask, inputs.rewards, old_per_token_logps=old_log_prob
    )
    return {"loss": loss}


@dataclass(frozen=True)
class LinearCase:
    """An implementation of a loss; `tensors` of `rows` x `columns` float32 (tokens x V if None) are its peak, about."""

    op: str
    name: str
    loss: Loss
    matmuls: int  # of tokens x H x V, forward and backward
    tensors: float
    rows: int | None = None
    columns: int | None = None
    allowed_error: float = PEER_ERROR
    note: str = ""  # where it may be wrong

    def estimate(self, tokens: int, vocab: int, hidden: int) -> int:
        """Bytes with the inputs, generously, so that nothing is begun that cannot end."""
        size = min(tokens, self.rows or tokens) * min(vocab, self.columns or vocab)
        return int(4 * size * self.tensors + 16 * hidden * (vocab + tokens))


def linear_cases() -> list[LinearCase]:
    """RLSD, OPSD's JSD and GRPO, each with what does the same job."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    trl, liger = {"rows": TRL_ROWS, "columns": TRL_CHUNK}, {"rows": LIGER_ROWS}
    ours = {"rows": 2048, "allowed_error": 1.0}
    cce, sequences = "cut-cross-entropy", "takes one advantage per sequence"
    return [
        LinearCase(RLSD, OURS, ours_rlsd, 4, 2, **ours),
        LinearCase(RLSD, LOGITS, logits_rlsd, 4, 2, allowed_error=1.0),
        LinearCase(RLSD, EAGER, eager_rlsd, 4, 3),
        LinearCase(RLSD, TRL, rlsd_of(trl_log_prob), 5, 6, **trl, note=TRL_NOTE),
        LinearCase(RLSD, cce, rlsd_of(cce_log_prob), 5, 0),
        LinearCase(RLSD, "Liger chunked GRPO", unable(sequences), 4, 0),
        LinearCase(JSD, OURS, ours_jsd, 4, 3, **ours),
        LinearCase(JSD, LOGITS, logits_jsd, 4, 3, allowed_error=1.0),
        LinearCase(JSD, EAGER, eager_jsd, 4, 17),
        LinearCase(JSD, TRL, trl_jsd, 8, 9, **trl),
        LinearCase(JSD, "Liger chunked JSD", liger_jsd, 4, 17, **liger, note=LIGER_NOTE),
        LinearCase(GRPO, OURS, ours_grpo, 3, 1, **ours),
        LinearCase(GRPO, LOGITS, logits_grpo, 3, 1, allowed_error=1.0),
        LinearCase(GRPO, EAGER, grpo_of(eager_log_prob), 3, 3),
        LinearCase(GRPO, TRL, grpo_of(trl_log_prob), 4, 6, **trl, note=TRL_NOTE),
        LinearCase(GRPO, "Liger chunked GRPO", liger_grpo, 4, 3, rows=2048, columns=4096),
        LinearCase(GRPO, cce, grpo_of(cce_log_prob), 4, 0),
    ]
