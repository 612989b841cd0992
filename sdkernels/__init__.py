"""sdkernels: fused loss kernels for self-distillation and reinforcement learning with verifiable rewards."""

from sdkernels.evidence import EvidenceAdvantage, evidence_weighted_advantage
from sdkernels.grpo import GRPOLoss, GRPOOutput, grpo_loss
from sdkernels.linear import (
    linear_grpo_loss,
    linear_opsd_loss,
    linear_rlsd_loss,
    linear_rlsd_token_advantage,
    linear_ssd_loss,
    linear_token_log_prob,
    linear_truncated_support,
)
from sdkernels.opsd import OPSDLoss, OPSDOutput, OPSDTerms, opsd_decomposition, opsd_loss
from sdkernels.rlsd import (
    RLSDAdvantage,
    RLSDLoss,
    RLSDOutput,
    lambda_schedule,
    rlsd_loss,
    rlsd_metrics,
    rlsd_token_advantage,
)
from sdkernels.ssd import SSDLoss, SSDOutput, SSDTerms, effective_temperature, ssd_decomposition, ssd_loss
from sdkernels.token_log_prob import TokenLogProb, token_log_prob
from sdkernels.truncation import Support, load_support, save_support, truncated_log_softmax, truncated_support

__version__ = "0.1.0"

__all__ = [
    "EvidenceAdvantage",
    "GRPOLoss",
    "GRPOOutput",
    "OPSDLoss",
    "OPSDOutput",
    "OPSDTerms",
    "RLSDAdvantage",
    "RLSDLoss",
    "RLSDOutput",
    "SSDLoss",
    "SSDOutput",
    "SSDTerms",
    "Support",
    "TokenLogProb",
    "effective_temperature",
    "evidence_weighted_advantage",
    "grpo_loss",
    "lambda_schedule",
    "linear_grpo_loss",
    "linear_opsd_loss",
    "linear_rlsd_loss",
    "linear_rlsd_token_advantage",
    "linear_ssd_loss",
    "linear_token_log_prob",
    "linear_truncated_support",
    "load_support",
    "opsd_decomposition",
    "opsd_loss",
    "rlsd_loss",
    "rlsd_metrics",
    "rlsd_token_advantage",
    "save_support",
    "ssd_decomposition",
    "ssd_loss",
    "token_log_prob",
    "truncated_log_softmax",
    "truncated_support",
]
