"""The registry: every operation, what implements it, and how many rows each must read and write."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import sdkernels
from benchmarks import peers
from benchmarks.inputs import Inputs
from benchmarks.prepared import Forward, ForwardBackward, Results
from benchmarks.runner import Case, Prepared
from benchmarks.truth import CLIP_RANGE, EPSILON

BASELINE = "eager PyTorch"
# Multiples of our tolerance; PyTorch on a CPU needs 75 (AVX-512) to 148 (AVX2) at V = 151,936, where p(y) is near 1.
PEER_ERROR = 200.0
TRL_NOTE = "TRL log-probs: without a GPU it computes and returns bfloat16 log-probs of bfloat16 logits."
LIGER_NOTE = (
    "Liger GRPO: it takes one advantage per sequence; given RLSD's, one per token, it raises nothing and returns "
    "another loss."
)
Build = Callable[[Inputs], Prepared]

RLSD_LOSS = "rlsd_loss, forward + backward"
RLSD_LOSS_LOG_PROBS = "rlsd_loss, forward + backward, teacher log-probs"
RLSD_TOKEN_ADVANTAGE = "rlsd_token_advantage, forward"
TOKEN_LOG_PROB = "token_log_prob, forward"


def fused_loss(inplace: bool, log_probs: bool = False) -> Build:
    """rlsd_loss with the teacher's logits, or with its log-probs."""

    def build(inputs: Inputs) -> Prepared:
        teacher = inputs.teacher_log_prob.float() if log_probs else inputs.teacher

        def loss(leaf: Tensor) -> Results:
            output = sdkernels.rlsd_loss(
                leaf,
                teacher,
                inputs.token_ids,
                inputs.advantages,
                inputs.old_log_prob,
                clip_range=CLIP_RANGE,
                epsilon_low=EPSILON,
                epsilon_high=EPSILON,
                inplace=inplace,
            )
            return {
                "loss": output.loss,
                "log_prob": output.student_log_prob,
                "entropy": output.student_entropy,
                "weight": output.weight,
                "advantage": output.advantage,
            }

        return ForwardBackward(inputs.student, loss, inputs.scratch if inplace else None)

    return build


def fused_advantage(inputs: Inputs) -> Prepared:
    """rlsd_token_advantage; it gives both entropies as well."""

    def function() -> Results:
        output = sdkernels.rlsd_token_advantage(
            inputs.student, inputs.teacher, inputs.token_ids, inputs.advantages, clip_range=CLIP_RANGE
        )
        return {
            "advantage": output.advantage,
            "weight": output.weight,
            "log_prob": output.student_log_prob,
            "entropy": output.student_entropy,
        }

    return Forward(function)


def fused_log_prob(inputs: Inputs) -> Prepared:
    """token_log_prob; it gives the entropy as well."""
    return Forward(lambda: sdkernels.token_log_prob(inputs.student, inputs.token_ids)._asdict())


def ours(op: str, name: str, build: Build, least_sweeps: int, kernel_sweeps: int) -> Case:
    """A case of this library: it must be within its own tolerance."""
    return Case(op, name, build, least_sweeps, kernel_sweeps)


def peer(op: str, name: str, build: Build, least_sweeps: int, note: str = "") -> Case:
    """What a user would run instead: PyTorch's float32 log-softmax is less exact than our tolerance asks."""
    return Case(op, name, build, least_sweeps, allowed_error=PEER_ERROR, note=note)


def rlsd_cases() -> list[Case]:
    """RLSD's loss, token advantages and log-probs."""
    trl = peers.trl_log_prob
    return [
        ours(RLSD_LOSS, "sdkernels, in place", fused_loss(inplace=True), 3, 4),
        ours(RLSD_LOSS, "sdkernels", fused_loss(inplace=False), 3, 4),
        peer(RLSD_LOSS, BASELINE, peers.eager_loss(), 3),
        peer(RLSD_LOSS, "torch.compile", peers.eager_loss(compiled=True), 3),
        peer(RLSD_LOSS, "chunked eager", peers.ChunkedEager, 3),
        peer(RLSD_LOSS, "TRL log-probs", peers.eager_loss(trl), 3, note=TRL_NOTE),
        peer(RLSD_LOSS, "Liger chunked GRPO", peers.liger_chunked, 3, note=LIGER_NOTE),
        peer(RLSD_LOSS, "Liger Triton GRPO", peers.liger_triton, 3, note=LIGER_NOTE),
        ours(RLSD_LOSS_LOG_PROBS, "sdkernels, in place", fused_loss(inplace=True, log_probs=True), 2, 3),
        ours(RLSD_LOSS_LOG_PROBS, "sdkernels", fused_loss(inplace=False, log_probs=True), 2, 3),
        peer(RLSD_LOSS_LOG_PROBS, BASELINE, peers.eager_loss(log_probs=True), 2),
        ours(RLSD_TOKEN_ADVANTAGE, "sdkernels", fused_advantage, 2, 2),
        peer(RLSD_TOKEN_ADVANTAGE, BASELINE, peers.eager_advantage(), 2),
        peer(RLSD_TOKEN_ADVANTAGE, "TRL log-probs", peers.eager_advantage(trl), 2, note=TRL_NOTE),
        ours(TOKEN_LOG_PROB, "sdkernels", fused_log_prob, 1, 1),
        peer(TOKEN_LOG_PROB, BASELINE, peers.eager_log_prob(), 1),
        peer(TOKEN_LOG_PROB, "TRL log-probs", peers.eager_log_prob(trl), 1, note=TRL_NOTE),
    ]
