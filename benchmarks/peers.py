"""What a user would run instead: eager PyTorch, torch.compile, TRL and Liger. Peers are called, never copied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.inputs import Inputs
from benchmarks.prepared import Forward, ForwardBackward, Results
from benchmarks.runner import Prepared, Unable
from benchmarks.truth import EPSILON, evidence_formula, rlsd_formula

CHUNK_LOGITS = 1 << 22  # of the chunked eager loop at the least: 27 tokens of Qwen3, 32 of Llama 3
MOST_CHUNKS = 32
LIGER_CHUNK = 8  # sequences; at 1, its default, two-dimensional advantages happen to broadcast rightly

LogProb = Callable[[Tensor, Tensor], Tensor]  # of logits (N, V) and token ids (N,): (N,)


def selected_log_prob(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log_softmax and gather, in float32."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, token_ids[:, None])[:, 0]


def torch_log_prob(inputs: Inputs) -> LogProb:
    """PyTorch's, whatever the inputs."""
    return selected_log_prob


def trl_log_prob(inputs: Inputs) -> LogProb:
    """TRL's own, on the logits as they are: a Triton kernel on a GPU, a loop over the sequences on a CPU."""
    from trl.trainer.utils import selective_log_softmax

    equal = bool((inputs.lengths == inputs.lengths[0]).all())
    batch = (len(inputs.lengths) if equal else 1, -1)  # else one packed sequence, as without padding

    def log_prob(logits: Tensor, token_ids: Tensor) -> Tensor:
        return selective_log_softmax(logits.unflatten(0, batch), token_ids.unflatten(0, batch)).flatten()

    return log_prob


def unfused_loss(
    student: Tensor,
    teacher: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    old_log_prob: Tensor,
    log_prob: LogProb = selected_log_prob,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, log-probs and weights; the teacher is logits or log-probs."""
    with torch.no_grad():
        teacher_log_prob = teacher if teacher.dim() == 1 else log_prob(teacher, token_ids)
    student_log_prob = log_prob(student, token_ids)
    per_token = rlsd_formula(student_log_prob, teacher_log_prob, advantages, old_log_prob)
    return per_token.loss.mean(), student_log_prob, per_token.weight


def eager_loss(
    get_log_prob: Callable[[Inputs], LogProb] = torch_log_prob, log_probs: bool = False, compiled: bool = False
) -> Callable[[Inputs], Prepared]:
    """The official formula over PyTorch log-probs, eager or compiled."""

    def build(inputs: Inputs) -> Prepared:
        log_prob = get_log_prob(inputs)
        teacher = inputs.teacher_log_prob.float() if log_probs else inputs.teacher
        function = torch.compile(unfused_loss, dynamic=False) if compiled else unfused_loss

        def loss(leaf: Tensor) -> Results:
            results = function(leaf, teacher, inputs.token_ids, inputs.advantages, inputs.old_log_prob, log_prob)
            return dict(zip(("loss", "log_prob", "weight"), results, strict=True))

        return ForwardBackward(inputs.student, loss)

    return build


class ChunkedEager(Prepared):
    """Eager PyTorch, a few tokens at a time with their own backward, so that temporaries stay small."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def reset(self) -> None:
        """Free the gradient."""
        self.gradient = self.outputs = None

    def run(self) -> None:
        """Forward and backward of each chunk."""
        inputs = self.inputs
        tokens = len(inputs.student)
        self.gradient, self.outputs = torch.empty_like(inputs.student), []
        chunk = max(CHUNK_LOGITS // inputs.student.shape[-1], tokens // MOST_CHUNKS, 1)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            leaf = inputs.student[rows].detach().requires_grad_()
            arguments = (inputs.teacher, inputs.token_ids, inputs.advantages, inputs.old_log_prob)
            loss, log_prob, weight = unfused_loss(leaf, *(x[rows] for x in arguments))
            loss = loss * (len(leaf) / tokens)
            loss.backward()
            self.gradient[rows] = leaf.grad
            self.outputs.append((loss.detach()[None], log_prob.detach(), weight))

    def result(self) -> Results:
        """The chunks put together."""
        loss, log_prob, weight = (torch.cat(parts) for parts in zip(*self.outputs, strict=True))
        return {"loss": loss.sum(), "log_prob": log_prob, "weight": weight, "gradient": self.gradient}


def eager_advantage(
    get_log_prob: Callable[[Inputs], LogProb] = torch_log_prob,
) -> Callable[[Inputs], Prepared]:
    """Two log-probs and the evidence formula."""

    def build(inputs: Inputs) -> Prepared:
        log_prob = get_log_prob(inputs)

        def function() -> Results:
            student = log_prob(inputs.student, inputs.token_ids)
            weight, advantage = evidence_formula(student, log_prob(inputs.teacher, inputs.token_ids), inputs.advantages)
            return {"advantage": advantage, "weight": weight, "log_prob": student}

        return Forward(function)

    return build


def eager_log_prob(
    get_log_prob: Callable[[Inputs], LogProb] = torch_log_prob,
) -> Callable[[Inputs], Prepared]:
    """The log-probs alone."""

    def build(inputs: Inputs) -> Prepared:
        log_prob = get_log_prob(inputs)
        return Forward(lambda: {"log_prob": log_prob(inputs.student, inputs.token_ids)})

    return build


def per_token_advantages(inputs: Inputs) -> Tensor:
    """(S, longest) RLSD's token advantages, as a user would hand them to a GRPO loss."""
    with torch.no_grad():
        student, teacher = (selected_log_prob(x, inputs.token_ids) for x in (inputs.student, inputs.teacher))
    return inputs.padded(evidence_formula(student, teacher, inputs.advantages)[1])


def liger_chunked(inputs: Inputs) -> Prepared:
    """LigerFusedLinearGRPOLoss, from the hidden states."""
    if inputs.student_hidden is None:
        raise Unable("needs hidden states")
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    grpo = LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=LIGER_CHUNK,
        epsilon_low=EPSILON,
        epsilon_high=EPSILON,
    )
    token_ids, old_log_prob = inputs.padded(inputs.token_ids), inputs.padded(inputs.old_log_prob)
    advantages, mask = per_token_advantages(inputs), inputs.mask.long()

    def loss(leaf: Tensor) -> Results:
        loss, _ = grpo(leaf, inputs.lm_head, token_ids, mask, advantages, old_per_token_logps=old_log_prob)
        return {"loss": loss}

    hidden = inputs.padded(inputs.student_hidden)
    return ForwardBackward(hidden, loss, gradient=lambda gradient: {"hidden_gradient": gradient[inputs.mask]})


def liger_triton(inputs: Inputs) -> Prepared:
    """triton_grpo_loss, from logits with one more position, which it ignores."""
    if not inputs.student.is_cuda:
        raise Unable("needs a CUDA GPU")
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    token_ids, old_log_prob = inputs.padded(inputs.token_ids), inputs.padded(inputs.old_log_prob)
    advantages, mask = per_token_advantages(inputs), inputs.mask.long()

    def loss(leaf: Tensor) -> Results:
        loss, *_ = triton_grpo_loss(
            leaf,
            old_log_prob,
            None,
            token_ids,
            advantages,
            completion_mask=mask,
            temperature=1.0,
            beta=0.0,
            eps_low=EPSILON,
            eps_high=EPSILON,
            inplace=False,
            reduce=True,
        )
        return {"loss": loss}

    logits = torch.nn.functional.pad(inputs.padded(inputs.student), (0, 0, 0, 1))
    return ForwardBackward(logits, loss, gradient=lambda gradient: {"gradient": gradient[:, :-1][inputs.mask]})
