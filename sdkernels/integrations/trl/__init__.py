"""sdkernels in TRL: RLSD and SSD trainers, SDPO and SDFT without logits, and the LM head of every other trainer.

    from sdkernels.integrations.trl import RLSDConfig, RLSDTrainer      # on GRPOTrainer
    from sdkernels.integrations.trl import SSDConfig, SSDTrainer        # on SFTTrainer
    from sdkernels.integrations.trl import SDFTTrainer, SDPOTrainer     # TRL's own, their divergences fused
    from sdkernels.integrations.trl import use_fused_head               # TRL's head kernel, swapped for ours

docs/trl.md is their guide.
"""

import warnings

from sdkernels.integrations.hosts import check_host

_LOGPS = "self, model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, compute_aux_loss"
_HOOKS = {
    "trl.trainer.grpo_trainer:GRPOTrainer._compute_loss": "self, model, inputs",
    "trl.trainer.grpo_trainer:GRPOTrainer._generate_and_score_completions": "self, inputs",
    "trl.trainer.grpo_trainer:GRPOTrainer._get_per_token_logps_and_entropies": _LOGPS,
    "trl.trainer.grpo_trainer:GRPOTrainer._load_optimizer_and_scheduler": "self, checkpoint",
    "trl.trainer.grpo_trainer:GRPOTrainer._save_checkpoint": "self, model, trial",
    "trl.trainer.grpo_trainer:GRPOTrainer._tokenize_prompts": "self, prompts",
    "trl.trainer.sft_trainer:SFTTrainer.compute_loss": "self, model, inputs, return_outputs, num_items_in_batch",
    "trl.trainer.utils:FusedCausalLMOutput": "loss, log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1",
    "trl.trainer.utils:_ChunkedLogProbFunction.forward":
        "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs",
    "trl.experimental.sdpo.teacher_sync:PEFTAdapterEMACallback._initialize_teacher_adapter": "self",
    "trl.trainer.utils:pad": "tensors, padding_value, padding_side",
}  # fmt: skip
for _name in ("SDPO", "SDFT"):
    _HOOKS |= {f"trl.experimental.{_name.lower()}:{_name}Trainer.{hook}": wanted for hook, wanted in {
        "_compute_teacher_student_logits": "self, model, teacher_model, inputs",
        "_compute_self_distillation_loss": "self, model, inputs, distillation_logits",
        "_get_teacher_context_for_self_distillation": "self",
        "_log_self_distillation_metric": "self, mode, value",
        "_setup_teacher_model": "self",
        "_use_peft_ema_teacher_adapter": "self",
    }.items()}  # fmt: skip
with warnings.catch_warnings():  # that trl.experimental may change, which is what is checked
    warnings.simplefilter("ignore")
    check_host("trl", "1.16.0", "trl>=1.16,<2", _HOOKS)

from sdkernels.integrations.trl.head import use_fused_head  # noqa: E402
from sdkernels.integrations.trl.rlsd import RLSDConfig, RLSDTrainer  # noqa: E402
from sdkernels.integrations.trl.self_distillation import SDFTTrainer, SDPOTrainer  # noqa: E402
from sdkernels.integrations.trl.ssd import SSDConfig, SSDTrainer  # noqa: E402

__all__ = ["RLSDConfig", "RLSDTrainer", "SDFTTrainer", "SDPOTrainer", "SSDConfig", "SSDTrainer", "use_fused_head"]
