"""sdkernels: fused loss kernels for self-distillation and reinforcement learning with verifiable rewards."""

from sdkernels.evidence import EvidenceAdvantage, evidence_weighted_advantage
from sdkernels.grpo import GRPOLoss, GRPOOutput, grpo_loss
from sdkernels.rlsd import (
    RLSDAdvantage,
    RLSDLoss,
    RLSDOutput,
    lambda_schedule,
    rlsd_loss,
    rlsd_metrics,
    rlsd_token_advantage,
)
from sdkernels.token_log_prob import TokenLogProb, token_log_prob

__version__ = "0.1.0"

__all__ = [
    "EvidenceAdvantage",
    "GRPOLoss",
    "GRPOOutput",
    "RLSDAdvantage",
    "RLSDLoss",
    "RLSDOutput",
    "TokenLogProb",
    "evidence_weighted_advantage",
    "grpo_loss",
    "lambda_schedule",
    "rlsd_loss",
    "rlsd_metrics",
    "rlsd_token_advantage",
    "token_log_prob",
]
