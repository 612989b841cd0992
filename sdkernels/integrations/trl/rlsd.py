"""RLSD on TRL's GRPOTrainer: a teacher that reads a privileged prompt scales every token's advantage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from trl import GRPOConfig

from sdkernels import evidence_weighted_advantage, lambda_schedule, linear_grpo_loss, linear_rlsd_loss
from sdkernels.integrations.prompts import PRIVILEGED_TEMPLATE, privileged_prompt
from sdkernels.integrations.transformers import LMHead, add_from_hidden
from sdkernels.integrations.trl.teacher import PrivilegedTeacher

REDUCTIONS = {
    "grpo": "seq-mean-token-mean", "bnpo": "token-mean", "dr_grpo": "token-mean", "dapo": "token-mean",
}  # fmt: skip


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RLSDConfig(GRPOConfig):
    """GRPOConfig, and RLSD's options; the defaults are the paper's.

    The teacher reads the dataset's column `teacher_prompt`, or where there is none the prompt with the column
    `privileged_context` put into it by `teacher_prompt_template`.
    """

    rlsd_lambda: float = _option(0.5, "Weight of the evidence in a token's advantage: its peak, where it is scheduled.")
    rlsd_lambda_warmup_steps: int = _option(0, "Steps over which rlsd_lambda rises from 0.")
    rlsd_lambda_decay_steps: int = _option(50, "Steps over which it then falls to 0, where RLSD is GRPO; 0: it stays.")
    rlsd_clip_range: float = _option(0.2, "Evidence weights are clipped at 1 - this, and at 1 + this.")
    rlsd_clip_range_high: float | None = _option(None, "If given, they are clipped at 1 + this above.")
    rlsd_apply_to: str = _option("all", "Sign of the advantages that evidence changes: all, negative or positive.")
    rlsd_evidence_from: str = _option("current", "Log-probs of the student in the evidence: current, or old.")
    teacher_prompt_template: str = _option(PRIVILEGED_TEMPLATE, "How the teacher reads it: {prompt}, {privileged}.")
    teacher_model_kind: str = _option(
        "ema",
        "Whose weights the teacher has. live: the policy's. base: the initial model's; of a PEFT model, those without "
        "adapters. ema: a copy's that moves towards the policy by teacher_update_rate every teacher_sync_steps steps.",
    )
    teacher_update_rate: float = _option(1.0, "Of an ema teacher; 1.0 takes the policy's weights as they are.")
    teacher_sync_steps: int = _option(10, "Of an ema teacher.")

    def __post_init__(self) -> None:
        """Refuse what cannot work before a model is loaded."""
        super().__post_init__()
        probe = torch.zeros(1)
        checks = {
            "rlsd_lambda and its schedule": lambda: self.lam(0),
            "rlsd_clip_range or rlsd_apply_to": lambda: evidence_weighted_advantage(
                probe, probe, probe, **self.weighing
            ),
            "teacher_prompt_template": lambda: privileged_prompt("", "", self.teacher_prompt_template),
        }
        for name, check in checks.items():
            try:
                check()
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        for name, known in (
            ("rlsd_evidence_from", ("current", "old")),
            ("teacher_model_kind", ("live", "base", "ema")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def lam(self, step: int) -> float:
        """The weight of the evidence at a step."""
        warmup, decay = self.rlsd_lambda_warmup_steps, self.rlsd_lambda_decay_steps
        return lambda_schedule(step, peak=self.rlsd_lambda, warmup_steps=warmup, decay_steps=decay)

    @property
    def weighing(self) -> dict[str, Any]:
        """How evidence becomes weights, as sdkernels names it."""
        above = self.rlsd_clip_range if self.rlsd_clip_range_high is None else self.rlsd_clip_range_high
        return {"clip_range": (self.rlsd_clip_range, above), "apply_to": self.rlsd_apply_to}


class RLSDTrainer(PrivilegedTeacher):
    """GRPOTrainer with RLSD's token advantages (arXiv 2604.03128, Eq. 13 to 15), from hidden states, without logits.

        A_t = A ((1 - lam) + lam clip(exp(sign(A) (log P_T(y_t) - log P_S(y_t))), 1 - eps_w, 1 + eps_w))

    What GRPOTrainer does it does too, but environments. The losses grpo, bnpo, dr_grpo and dapo are one
    `linear_rlsd_loss`: 3 matmuls of tokens x H x V forward and backward, and 1 of the teacher. All others, and
    sequence-level importance sampling, entropy bonuses and masks, and MoE's auxiliary loss, are GRPOTrainer's own code
    on per-token advantages and our log-probs: 4 matmuls, and 1. Where lam is 0 the teacher does not run.

    Args:
        model, reward_funcs: As GRPOTrainer takes them.
        args: An RLSDConfig.
        kwargs: What GRPOTrainer takes besides. Rows of the datasets say what is privileged (see RLSDConfig).

    Raises:
        TypeError, ValueError: other args, an environment, whose observations the teacher would not see, or, in
            training, rows that lack the columns.

    """

    _tag_names = ["trl", "rlsd"]  # noqa: RUF012
    _name = "RLSD"
    _paper = {"title": "Self-Distilled RLVR", "id": "2604.03128"}  # noqa: RUF012

    def __init__(self, model: Any, reward_funcs: Any = None, args: RLSDConfig | None = None, **kwargs: Any) -> None:
        if not isinstance(args, RLSDConfig):
            raise TypeError(f"args must be an RLSDConfig, got {type(args).__name__}")
        if kwargs.get("environment_factory") is not None:
            raise ValueError("RLSDTrainer takes no environment_factory: the teacher would not see its observations")
        super().__init__(model, reward_funcs, args, **kwargs)
        self._make_teacher()
        set_seed(args.seed, device_specific=True)  # as before the teacher's weights were made: GRPOTrainer's samples
        for each in (self.model, self.teacher_model, self.ref_model):
            if each is not None:
                add_from_hidden(self.accelerator.unwrap_model(each))
        self._weighed: dict[str, Any] | None = None  # the batch whose loss is computed by the host's code

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        lam = self.args.lam(self.state.global_step)
        self._log("rlsd/lambda", lam)
        teacher = self._teacher_log_prob(inputs) if lam else None
        if self._is_one_call:
            return self._loss_in_one_call(model, inputs, teacher, lam)
        self._weighed = inputs | {"teacher": teacher, "lam": lam}  # a copy: num_iterations uses a batch again
        try:
            return super()._compute_loss(model, self._weighed)
        finally:
            self._weighed = None

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        scores = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        batch = self._weighed
        if batch is not None and batch["teacher"] is not None:  # the host reads the advantages after this
            old = batch.get("old_per_token_logps") if self.args.rlsd_evidence_from == "old" else None
            student, mask = scores[0].detach() if old is None else old, _loss_mask(batch)
            found = evidence_weighted_advantage(
                student, batch["teacher"], batch["advantages"], lam=batch["lam"], mask=mask, **self.args.weighing
            )
            batch["advantages"] = found.advantage
            self._log_evidence(found, mask)
        return scores

    @property
    def _is_one_call(self) -> bool:
        """Whether `linear_grpo_loss` has all that this run's loss consists of."""
        delta = self.args.delta
        return (
            self.loss_type in REDUCTIONS
            and self.importance_sampling_level == "token"
            and self.top_entropy_quantile == 1.0
            and self.off_policy_mask_threshold is None
            and not self._entropy_bonus_enabled
            and not self.aux_loss_enabled
            and not (self.beta and self.args.use_bias_correction_kl)
            and (delta is None or delta > 1 + self.epsilon_high)
        )

    def _loss_in_one_call(self, model: nn.Module, inputs: dict[str, Any], teacher: Tensor | None, lam: float) -> Tensor:
        keep, mask = inputs["completion_mask"] != 0, _loss_mask(inputs)
        advantages, correction = inputs["advantages"], inputs.get("importance_sampling_ratio")
        if not (self.use_vllm and self.vllm_importance_sampling_correction):
            correction = None
        per_token = {
            "old_log_prob": inputs.get("old_per_token_logps"),
            "reference_log_prob": inputs["ref_per_token_logps"] if self.beta else None,
            "token_weight": None if correction is None else correction.expand(keep.shape),
            "mask": mask,
        }
        options: dict[str, Any] = {name: None if x is None else x[keep] for name, x in per_token.items()}
        options |= {
            "epsilon_low": self.epsilon_low,
            "epsilon_high": self.epsilon_high,
            "dual_clip": self.args.delta,
            "beta": self.beta,
            "temperature": self.temperature,
            "reduction": REDUCTIONS[self.loss_type],
            "normalizer": self._normalizer(inputs),
            "cu_seqlens": torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int(),
        }
        advantages = (advantages if advantages.dim() == 2 else advantages.unsqueeze(1).expand(keep.shape))[keep]

        def loss(hidden: Tensor, head: LMHead, ids: Tensor) -> Any:
            if teacher is None:
                return linear_grpo_loss(hidden, head.weight, ids, advantages, **options, **head.options)
            return linear_rlsd_loss(
                hidden, teacher[keep], head.weight, ids, advantages, lam=lam, **self.args.weighing,
                evidence_from=self.args.rlsd_evidence_from, **options, **head.options,
            )  # fmt: skip

        output = self._run(model, inputs, loss)
        if teacher is not None:
            self._log_evidence(output, mask)
        self._log_ratios(output, inputs, mask)
        accumulated = self.loss_type != "dapo" and self._mode == "train"
        return output.loss / (self.current_gradient_accumulation_steps if accumulated else 1)

    def _normalizer(self, inputs: dict[str, Any]) -> Any:
        """What the losses with a denominator of their own divide by."""
        if self.loss_type == "dr_grpo":
            return float(inputs["completion_ids"].shape[0] * self.max_completion_length)
        if self.loss_type != "dapo":
            return None
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self._mode == "train":  # num_items_in_batch spans the generation batch
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return tokens

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _log(self, name: str, value: float) -> None:
        self._metrics[self._mode][name].append(value)

    def _log_means(self, values: dict[str, Tensor], mask: Tensor, of_none: float = 0.0) -> None:
        """Means over the tokens of all processes, in one exchange."""
        sums = torch.stack([mask.sum().double(), *((value * mask).sum().double() for value in values.values())])
        count, *totals = self.accelerator.reduce(sums.float(), reduction="sum").tolist()
        for name, total in zip(values, totals, strict=True):
            self._log(name, total / count if count else of_none)

    def _log_evidence(self, found: Any, mask: Tensor) -> None:
        below, above = self.args.weighing["clip_range"]
        means = {
            "rlsd/evidence_clipped_below": found.weight < 1 - below,
            "rlsd/evidence_clipped_above": found.weight > 1 + above,
            "rlsd/information_gain_abs": found.information_gain.abs(),
        }
        self._log_means(means, mask, of_none=float("nan"))  # which GRPOTrainer leaves out of its averages

    def _log_ratios(self, output: Any, inputs: dict[str, Any], mask: Tensor) -> None:
        """What GRPOTrainer logs of its loss, under its names."""
        log_prob = getattr(output, "student_log_prob", None)
        log_prob, entropy = (
            (output.log_prob, output.entropy) if log_prob is None else (log_prob, output.student_entropy)
        )
        advantages = getattr(output, "advantage", inputs["advantages"])
        advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        low = (output.ratio < 1 - self.epsilon_low) & (advantages < 0) & (mask != 0)
        high = (output.ratio > 1 + self.epsilon_high) & (advantages > 0) & (mask != 0)
        means = {
            "entropy": entropy.detach(),
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low | high,
        }
        if self.beta:
            apart = inputs["ref_per_token_logps"] - log_prob.detach()
            means["kl"] = apart.exp() - apart - 1
        self._log_means(means, mask)
        count = mask.sum(1)
        of_rows = self.accelerator.gather(torch.stack((low.sum(1) / count, high.sum(1) / count), dim=1))
        of_rows = of_rows[~of_rows.isnan().any(1)]  # a sequence without tokens has no share
        self._log("clip_ratio/low_min", of_rows[:, 0].min().item() if len(of_rows) else float("nan"))
        self._log("clip_ratio/high_max", of_rows[:, 1].max().item() if len(of_rows) else float("nan"))


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    """(B, T): the completion's tokens that the policy wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
