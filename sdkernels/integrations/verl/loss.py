"""RLSD's policy loss as verl's distillation loss "rlsd", and the options that go with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from verl.trainer.distillation.losses import DistillationLossSettings, register_distillation_loss
from verl.trainer.ppo.core_algos import kl_penalty
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.config import DistillationLossConfig
from verl.workers.utils.padding import no_padding_2_padding

from sdkernels import _check
from sdkernels.evidence import EvidenceAdvantage, checked_weighing, evidence_weighted_advantage
from sdkernels.grpo import clipped_surrogate
from sdkernels.integrations.prompts import PRIVILEGED_TEMPLATE, privileged_prompt
from sdkernels.rlsd import lambda_schedule

# Options of verl's that have no meaning here, as they must be left, and what to set instead.
UNUSED: dict[str, tuple[Any, str]] = {
    "loss_mode": ("rlsd", "this is RLSD's config"),
    "use_task_rewards": (False, "the advantages are in RLSD's loss already; verl would add its PPO loss once more"),
    "use_policy_gradient": (False, "RLSD's loss is backpropagated as it is"),
    "distillation_loss_coef": (1.0, "verl reads it with use_task_rewards"),
    "loss_max_clamp": (None, "the PPO clip bounds RLSD's loss"),
    "log_prob_min_clamp": (None, "clip_range bounds the evidence"),
    "clip_ratio": (0.2, "set actor.clip_ratio"),
    "clip_ratio_low": (0.2, "set actor.clip_ratio_low"),
    "clip_ratio_high": (0.2, "set actor.clip_ratio_high"),
}
LARGEST_LOG_RATIO = 20.0  # verl's, in its vanilla loss


@dataclass
class RLSDLossConfig(DistillationLossConfig):
    """`distillation.distillation_loss` for RLSD: its `_target_` in YAML or on the command line.

    Args:
        lam: the share of the weighted advantage, the peak of `lambda_schedule`. 0 is GRPO.
        warmup_steps, decay_steps: of `lambda_schedule`, in verl's global steps; with 0 of both lam stays. The defaults
            are the paper's.
        clip_range, apply_to, pessimistic: of `evidence_weighted_advantage`; a pair (below, above) as a list.
        evidence_from: the student's side of the evidence is the "current" log-prob or the "old" one, as in `rlsd_loss`.
        privileged_key: the teacher's information, in a row's `extra_info`.
        privileged_template: how its prompt reads, with {prompt} and {privileged}.

    The rest of `DistillationLossConfig` stays at the defaults here; the ratio's clip range is the actor's.

    Raises:
        TypeError, ValueError: naming the option, what it was and what it must be.

    """

    loss_mode: str = "rlsd"
    use_task_rewards: bool = False
    use_policy_gradient: bool = False
    loss_max_clamp: float | None = None
    log_prob_min_clamp: float | None = None
    lam: float = 0.5
    warmup_steps: int = 0
    decay_steps: int = 50
    clip_range: Any = 0.2
    apply_to: str = "all"
    pessimistic: bool = False
    evidence_from: str = "current"
    privileged_key: str = "privileged"
    privileged_template: str = PRIVILEGED_TEMPLATE

    def __post_init__(self) -> None:
        """Check all options at once, before any worker starts."""
        for name, (kept, reason) in UNUSED.items():
            if getattr(self, name) != kept:
                raise ValueError(f"distillation_loss.{name} must be {kept!r} for RLSD, got {getattr(self, name)!r}: "
                                 f"{reason}")  # fmt: skip
        super().__post_init__()
        checked_weighing(self.clip_range, self.lam, self.apply_to, self.pessimistic)
        _check.one_of("evidence_from", self.evidence_from, ("current", "old"))
        lambda_schedule(0, peak=self.lam, warmup_steps=self.warmup_steps, decay_steps=self.decay_steps)
        privileged_prompt("", "", self.privileged_template)

    def lam_at(self, data: Any) -> float:
        """`lam` for a batch, which is of verl's global step 1 or later."""
        if self.lam == 0 or not (self.warmup_steps or self.decay_steps):
            return float(self.lam)
        step = tu.get(data, "global_steps")
        if step is None:
            raise ValueError("warmup_steps and decay_steps need `global_steps` in the batch, where verl's v1 trainer "
                             "puts it: put it there too, or set both to 0 for a lam that stays")  # fmt: skip
        step = int(torch.as_tensor(step).max())  # one for each sample
        return lambda_schedule(step - 1, peak=self.lam, warmup_steps=self.warmup_steps, decay_steps=self.decay_steps)


def rlsd_distillation_loss(
    config: Any, distillation_config: Any, model_output: dict[str, Tensor], data: Any
) -> tuple[Tensor, dict[str, Any]]:
    """RLSD's loss per token for a micro-batch, as verl calls it and then reduces it by `actor.loss_agg_mode`.

    .. math::
        loss_t = max(-r_t A_t, -clip(r_t) A_t) w_t - entropy_coeff H_t + kl_loss_coef KL_t

    with A_t of `evidence_weighted_advantage` (RLSD's Eq. 13-15), and clip_ratio, clip_ratio_low, clip_ratio_high,
    clip_ratio_c, entropy_coeff, use_kl_loss and rollout weights w as in verl's `ppo_loss` with its vanilla policy loss,
    which this is for lam = 0.

    Args:
        config: the actor's config.
        distillation_config: whose `distillation_loss` is an `RLSDLossConfig`.
        model_output: log_probs, and entropy where entropy_coeff is not 0, in verl's jagged layout.
        data: the micro-batch, with teacher_logprobs (B, prompt + response, 1), where index t speaks of token t + 1.

    Returns:
        The loss (B, T), 0 where `response_mask` is, and metrics.

    Raises:
        TypeError, ValueError: an option that this loss would have to ignore.

    """
    options = distillation_config.distillation_loss
    if not isinstance(options, RLSDLossConfig):
        raise TypeError("loss_mode=rlsd needs distillation_loss._target_=sdkernels.integrations.verl.RLSDLossConfig, "
                        f"got a {type(options).__name__}")  # fmt: skip
    if config.policy_loss.loss_mode != "vanilla":
        raise ValueError(
            f"actor.policy_loss.loss_mode must be 'vanilla' for RLSD, got {config.policy_loss.loss_mode!r}"
        )
    lam = options.lam_at(data)
    log_prob = no_padding_2_padding(model_output["log_probs"], data)
    teacher = no_padding_2_padding(data["teacher_logprobs"], data).squeeze(-1)
    optional = [name for name in ("rollout_is_weights", "ref_log_prob") if name in data]
    tokens = data.select("response_mask", "old_log_probs", "advantages", *optional).to_padded_tensor()
    mask, old = tokens["response_mask"].bool(), tokens["old_log_probs"]
    evidence = evidence_weighted_advantage(
        old if options.evidence_from == "old" else log_prob, teacher, tokens["advantages"], lam=lam, mask=mask,
        clip_range=options.clip_range, apply_to=options.apply_to, pessimistic=options.pessimistic,
    )  # fmt: skip
    moved = torch.where(mask, log_prob - old, 0).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    low, high, most = _clip_ratios(config)
    loss, ratio = clipped_surrogate(
        moved, torch.zeros_like(moved), evidence.advantage, low, high, most, evidence.advantage.dtype
    )
    metrics = _metrics(evidence, mask, options.clip_range, moved, ratio, (low, high, most))
    metrics["rlsd/lam"] = torch.tensor(lam)
    if "rollout_is_weights" in tokens:
        loss = loss * tokens["rollout_is_weights"]
    if config.entropy_coeff:
        entropy = no_padding_2_padding(model_output["entropy"], data)
        metrics["rlsd/entropy"] = _mean(entropy, mask)
        loss = loss - config.entropy_coeff * entropy
    if config.use_kl_loss:
        kl = kl_penalty(logprob=log_prob, ref_logprob=tokens["ref_log_prob"], kl_penalty=config.kl_loss_type)
        metrics["rlsd/kl"] = _mean(kl, mask)
        loss = loss + config.kl_loss_coef * kl
    return torch.where(mask, loss, 0), Metric.from_dict(metrics, AggregationType.MEAN)


def _clip_ratios(config: Any) -> tuple[float, float, float]:
    """Of the actor: epsilon below and above, and the dual clip's bound."""
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    if not config.clip_ratio_c > 1:
        raise ValueError(f"actor.clip_ratio_c must be > 1, got {config.clip_ratio_c}")
    return low, high, config.clip_ratio_c


def _metrics(
    evidence: EvidenceAdvantage, mask: Tensor, clip_range: Any, moved: Tensor, ratio: Tensor,
    clips: tuple[float, float, float],
) -> dict[str, Tensor]:  # fmt: skip
    """verl's own names for the ratio, `rlsd_metrics`' for the evidence; means over the tokens of the micro-batch."""
    below, above = _check.clip_range(clip_range)
    low, high, most = clips
    advantage = evidence.advantage
    outside = ((advantage > 0) & (ratio > 1 + high)) | ((advantage < 0) & (ratio < 1 - low))
    per_token = {
        "actor/pg_clipfrac": outside,
        "actor/pg_clipfrac_lower": (advantage < 0) & (ratio > most),
        "actor/ppo_kl": -moved,
        "rlsd/evidence_clipped_below": evidence.weight < 1 - below,
        "rlsd/evidence_clipped_above": evidence.weight > 1 + above,
        "rlsd/information_gain_abs": evidence.information_gain.abs(),
    }
    return {name: _mean(value, mask) for name, value in per_token.items()}


def _mean(value: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, value.detach().float(), 0).sum() / mask.sum().clamp(min=1)


register_distillation_loss(DistillationLossSettings(names=["rlsd"], use_estimator=True))(rlsd_distillation_loss)
