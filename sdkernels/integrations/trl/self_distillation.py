"""TRL's SDPO and SDFT trainers with their divergences from hidden states: no logits of student or teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from trl.experimental import sdft, sdpo
from trl.experimental.sdpo.loss_utils import apply_importance_sampling_clipping

from sdkernels import linear_opsd_loss, linear_token_log_prob
from sdkernels.integrations.transformers import LMHead, add_from_hidden, lm_head

MODES = ("sampled_token", "full_logits", "topk_logits")
# By distillation_alpha, the weight of the teacher in the mixture; in between it is the JSD.
DIVERGENCES = {0.0: "forward_kl", 1.0: "reverse_kl"}


class Distilled(NamedTuple):
    """What TRL's DistillationLogits become."""

    loss: Tensor  # a number
    per_token: Tensor  # (N,), of the tokens that count


class _Fused:
    """Of either trainer: the loss is made inside the student's forward, beside the teacher's hidden states."""

    args: Any
    accelerator: Any
    model: Any
    teacher_model: Any
    temperature: float
    use_teacher_server: bool
    _get_teacher_context_for_self_distillation: Any
    _log_self_distillation_metric: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self.args, "distillation_weight", 1.0) != 1.0:
            raise ValueError("distillation_weight must be 1: TRL's own SDPOTrainer mixes in a policy loss, of logits")
        if self.args.distillation_mode == "topk_logits" and self.args.distillation_topk is None:
            raise ValueError("distillation_mode='topk_logits' needs distillation_topk, got None")
        if self.args.distillation_mode not in MODES:
            raise ValueError(
                f"distillation_mode must be one of {', '.join(MODES)}, got {self.args.distillation_mode!r}"
            )
        if not 0 <= self.args.distillation_alpha <= 1:
            raise ValueError(f"distillation_alpha must be in [0, 1], got {self.args.distillation_alpha}")
        if self.use_teacher_server:
            raise ValueError("use_teacher_server scores outside this process: TRL's own trainer does it")
        for model in (self.model, self.teacher_model):
            add_from_hidden(self.accelerator.unwrap_model(model))

    def _compute_teacher_student_logits(self, model: nn.Module, teacher_model: nn.Module, inputs: Any) -> Distilled:
        ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        length, skipped = ids.shape[1], getattr(self, "num_loss_tokens_to_skip", 0)
        keep = (mask != 0) & (torch.arange(length, device=mask.device) >= skipped)
        taught = inputs.get("self_distillation_mask")  # SDPO's: rows that have something to learn from
        if taught is not None:
            keep = keep & (taught != 0).unsqueeze(1)
        context = self._get_teacher_context_for_self_distillation()
        with torch.no_grad(), self.accelerator.autocast(), context:
            teacher = teacher_model(
                input_ids=inputs["teacher_input_ids"],
                attention_mask=inputs["teacher_attention_mask"],
                from_hidden=lambda hidden, head: hidden[:, -length - 1 : -1][keep],
            )
        unwrapped = [self.accelerator.unwrap_model(each) for each in (model, teacher_model)]
        own = None if unwrapped[0] is unwrapped[1] else lm_head(unwrapped[1])
        return model(
            input_ids=torch.cat((inputs["prompt_ids"], ids), dim=1),
            attention_mask=torch.cat((inputs["prompt_mask"], mask), dim=1),
            from_hidden=lambda hidden, head: self._distilled(
                hidden[:, -length - 1 : -1][keep], teacher, head, own, ids, keep, inputs.get("old_per_token_logps")
            ),
        )

    def _distilled(self, hidden: Tensor, teacher: Tensor, head: LMHead, own: LMHead | None, ids: Tensor, keep: Tensor,
                   old: Tensor | None) -> Distilled:  # fmt: skip
        args, temperature = self.args, self.temperature
        lengths = keep.sum(1)
        token_weight = None
        if args.distillation_is_clip is not None and old is not None:
            with torch.no_grad():
                now = linear_token_log_prob(hidden, head.weight, ids[keep], temperature, **head.options).log_prob
            token_weight = apply_importance_sampling_clipping(
                torch.ones_like(now), now, old[keep], args.distillation_is_clip
            )
        if args.distillation_mode == "sampled_token":
            sides = ((hidden, head), (teacher, own or head))
            student, other = (linear_token_log_prob(x, h.weight, ids[keep], temperature, **h.options).log_prob
                              for x, h in sides)  # fmt: skip
            per_token = (student - other).detach() * student
            per_token = per_token if token_weight is None else per_token * token_weight
            share = (1 / (lengths.clamp(min=1) * len(lengths))).unsqueeze(1).expand(keep.shape)[keep]
            return Distilled((per_token * share).sum(), per_token.detach())
        heads: dict[str, Any] = {} if own is None else {"teacher_lm_head_weight": own.weight.detach()}
        if own is not None and own.bias is not None:
            heads["teacher_bias"] = own.bias.detach()
        reduced = {"top_k": args.distillation_topk, "tail": args.distillation_add_tail}
        output = linear_opsd_loss(
            hidden, teacher, head.weight, temperature=temperature, token_weight=token_weight,
            divergence=DIVERGENCES.get(args.distillation_alpha, "jsd"), beta=args.distillation_alpha or 0.5,
            reduction="seq-mean-token-mean", cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            **(reduced if args.distillation_mode == "topk_logits" else {}), **heads, **head.options,
        )  # fmt: skip
        per_token = output.divergence.detach()
        return Distilled(output.loss, per_token if token_weight is None else per_token * token_weight)

    def _compute_self_distillation_loss(self, model: nn.Module, inputs: Any, distillation_logits: Distilled) -> Tensor:
        loss, per_token = distillation_logits
        mean = per_token.sum() / max(per_token.numel(), 1)
        self._log_self_distillation_metric(
            "train" if model.training else "eval", self.accelerator.gather(mean).mean().item()
        )
        return loss


class SDPOTrainer(_Fused, sdpo.SDPOTrainer):
    """TRL's SDPOTrainer, its sampled-token, full-vocabulary and top-k divergences from hidden states.

    Arguments, SDPOConfig and results are TRL's, but for `distillation_weight` < 1 and `use_teacher_server`, which are
    refused. Of student and teacher together 4 matmuls of tokens x H x V; 5 where `distillation_is_clip` weighs tokens.
    """


class SDFTTrainer(_Fused, sdft.SDFTTrainer):
    """TRL's SDFTTrainer, likewise."""
